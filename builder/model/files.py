"""The files of a causal LM: which ones are needed, and errors that say what to do if some are missing or unusable.

Takes file names, so that a directory and a listing of the Hub are checked alike.
"""

from __future__ import annotations

import fnmatch
import hashlib
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from builder.architectures import catalog, served
from builder.core.errors import IntegrityError, UnsupportedError, UsageError
from builder.core.manifest import chunks
from builder.core.untrusted_text import parse_json, read_regular
from builder.model import config_values, kinds, multimodal, quantization_signs

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
GENERATION = "generation_config.json"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")  # of PEFT
# What transformers' AutoTokenizer reads, all at the top of the directory.
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "chat_template*",
)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# What to do about a damaged tokenizer file, or generation_config.json beside it.
SAVE_AGAIN = (
    "Copy or download it again, or write it with transformers: "
    "AutoTokenizer.from_pretrained(MODEL).save_pretrained(DIRECTORY)"
)
LFS_POINTER = b"version https://git-lfs"
LARGEST_BLOB = 1 << 24  # bytes; the Hub takes at most 10 MB outside LFS


def wanted(names: Collection[str], shards: Collection[str] | None, *, remote_code: bool) -> list[str]:
    """The files to fetch among `names`: config.json, tokenizer, weights, what describes their quantization, and Python
    code if remote_code.

    shards: the files that the index names, None without an index.
    """
    companions = _matching(names, [GENERATION, *TOKENIZER, *(["*.py"] if remote_code else [])])
    weights = [WEIGHTS] if shards is None else [INDEX, *shards]
    if parts := split_ranks(names):
        weights = parts
    described = [name for name in quantization_signs.DOCUMENTS if name in names]
    return sorted({CONFIG, *companions, *weights, *described})


def split_ranks(names: Collection[str]) -> list[str]:
    """The weights of a checkpoint in TensorRT-LLM's layout, [] for another model."""
    return [] if WEIGHTS in names or INDEX in names else quantization_signs.ranks(names)


def tokenizer_files(directory: Path) -> list[Path]:
    """Paths of the tokenizer's files in a model directory."""
    return [directory / name for name in tokenizer_names([path.name for path in directory.iterdir() if path.is_file()])]


def tokenizer_names(names: Collection[str]) -> list[str]:
    """The tokenizer's files among these names, sorted."""
    return sorted(_matching(names, TOKENIZER))


def _matching(names: Collection[str], patterns: Sequence[str]) -> list[str]:
    return [n for n in names if "/" not in n and any(fnmatch.fnmatchcase(n, p) for p in patterns)]


def check_names(names: Collection[str], where: str) -> None:
    """UsageError or UnsupportedError unless `names` include config.json, safetensors weights and tokenizer.json, and no
    file of a quantizer whose checkpoints can't be served. TensorRT-LLM's layout needs no tokenizer."""
    if CONFIG not in names:
        kinds.check_names(names, where)
        raise UsageError(
            f"{where} has no config.json.",
            why=_contents(names),
            hint="Give the directory (or Hub id) of a transformers model: config.json, *.safetensors, tokenizer.json.",
        )
    if split_ranks(names):
        return
    if WEIGHTS not in names and INDEX not in names:
        raise _no_weights(names, where)
    quantization_signs.check_names(names, where)
    if "tokenizer.json" not in names:
        raise UnsupportedError(
            f"{where} has no tokenizer.json.",
            why="It is the file of the fast tokenizer, which the served repository uses.",
            hint="Create it with transformers: AutoTokenizer.from_pretrained(MODEL).save_pretrained(DIRECTORY)",
        )


def _no_weights(names: Collection[str], where: str) -> UsageError | UnsupportedError:
    pickles = sorted(n for n in names if any(fnmatch.fnmatchcase(n, p) for p in PICKLES))
    if pickles:
        return UnsupportedError(
            f"{where} has its weights only as pickles ({', '.join(pickles[:3])}).",
            why="Loading a pickle runs the code inside it, so pickles are never opened.",
            hint="Convert it with transformers, on a machine where you trust it: "
            'AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto").save_pretrained(DIRECTORY)',
        )
    if kinds.ADAPTER in names:
        return kinds.adapter(where)
    if gguf := sorted(n for n in names if n.endswith(".gguf")):
        return quantization_signs.foreign(where, quantization_signs.GGUF, f"Its weights are {', '.join(gguf[:3])}.")
    others = sorted(n for n in names if n.endswith(".safetensors"))
    found = f"Found {', '.join(others[:3])}." if others else _contents(names)
    return UsageError(
        f"{where} has no {WEIGHTS} and no {INDEX}.",
        why=found,
        hint="Give a model saved by transformers' save_pretrained.",
    )


def parse_config(text: bytes, where: str) -> dict[str, Any]:
    """config.json, with the common keys where the architecture has others; of a multimodal model, that of its language
    model (multimodal.py). UsageError if it is not a JSON object."""
    try:
        config = parse_json(text)
    except ValueError as error:
        raise UsageError(f"{where}/{CONFIG} is not JSON.", why=str(error), hint="Save the model again.") from None
    if not isinstance(config, dict):
        raise UsageError(f"{where}/{CONFIG} is a {type(config).__name__}, not an object.", hint="Save the model again.")
    return catalog.with_common_keys(multimodal.language_config(config))


def json_object(path: Path, where: str = "") -> dict[str, Any]:
    """The JSON object in a model's file, {} if the file is absent. IntegrityError if it is not an object.

    where: the model's name in messages; by default the file's directory.
    """
    where = where or str(path.parent)
    if not path.is_file():
        return {}
    try:
        content = parse_json(read_regular(path))
    except OSError as error:
        raise IntegrityError(f"{where}/{path.name} can't be used.", why=str(error), hint=SAVE_AGAIN) from None
    except ValueError as error:
        why = str(error) if path.stat().st_size else "the file is empty"
        raise IntegrityError(f"{where}/{path.name} is not JSON.", why=why, hint=SAVE_AGAIN) from None
    if not isinstance(content, dict):
        raise IntegrityError(f"{where}/{path.name} is a JSON {type(content).__name__}, not an object.", hint=SAVE_AGAIN)
    return content


def check_config(config: Mapping[str, Any], where: str, *, trust_remote_code: bool) -> None:
    """UnsupportedError unless this is a causal LM whose code is part of transformers, unquantized or in a layout that
    can be served; UsageError for invalid values. trust_remote_code: accepts code that comes with the model."""
    if quantization_signs.layout_of({CONFIG: config}) == "tensorrt_llm":
        return  # a checkpoint for trtllm-build: its config.json has other keys, which its description reads
    config_values.check(config, where)
    kinds.check_config(config, where)
    quantization_signs.check_config(config, where)
    if needs_remote_code(config) and not trust_remote_code:
        raise UnsupportedError(
            f"{where} needs its own Python code (auto_map in config.json).",
            why=f"transformers has no model type {config.get('model_type')!r}, and the code of a model runs only with "
            "--trust-remote-code.",
            hint=_with_remote_code(config),
        )


def _with_remote_code(config: Mapping[str, Any]) -> str:
    """The hint for a model that brings its own code: what --trust-remote-code makes possible."""
    if served.by_any_target(config):
        return "Read that code, then add --trust-remote-code."
    return (
        f"Choose another model: no target serves {catalog.name_of(config)}, even with its code. To make only a "
        "checkpoint, read that code, then run `builder quantize` with --trust-remote-code."
    )


def needs_remote_code(config: Mapping[str, Any]) -> bool:
    """Whether `auto_map` is the only way to the model's class. transformers prefers its own class where it has one
    (`has_local_code` in transformers/dynamic_module_utils.py), so a known model type needs no code of the model's."""
    if not config.get("auto_map"):
        return False
    spec = find_spec("transformers")
    model_type = str(config.get("model_type", "")).replace("-", "_")
    if spec is None or spec.origin is None or not model_type.isidentifier():
        return True
    return not (Path(spec.origin).parent / "models" / model_type).is_dir()


def index_of(index: bytes, where: str) -> dict[str, str]:
    """{tensor: file}, from the content of model.safetensors.index.json. IntegrityError if it is not such an index."""
    try:
        found = parse_json(index)["weight_map"]
        if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
            raise ValueError("weight_map does not map tensors to files")
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"{where}/{INDEX} is not an index of safetensors files.",
            why=repr(error),
            hint="Fetch or save the model again.",
        ) from None
    strange = sorted({n for n in found.values() if "/" in n or "\\" in n or not n.endswith(".safetensors")})
    if strange:
        raise IntegrityError(
            f"{where}/{INDEX} refers to files that are not *.safetensors in the model's directory.",
            why=f"{strange[:3]!a}.",
            hint="Do not use this model.",
        )
    return found


def shards_of(index: bytes, names: Collection[str], where: str) -> list[str]:
    """The files that model.safetensors.index.json names, sorted. IntegrityError if one is missing from `names` or is in
    another directory, or if there is a model.safetensors too."""
    shards = sorted(set(index_of(index, where).values()))
    if WEIGHTS in names and WEIGHTS not in shards:
        raise IntegrityError(
            f"{where} has two sets of weights: {WEIGHTS}, and {len(shards)} files that {INDEX} names.",
            why=f"transformers loads {WEIGHTS} and ignores the others; other programs load the others.",
            hint=f"Remove the wrong set: {WEIGHTS}, or {INDEX} and its files.",
        )
    missing = [name for name in shards if name not in names]
    if missing:
        raise IntegrityError(
            f"{where} lacks {len(missing)} of the {len(shards)} files that its index names.",
            why=f"Missing: {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}.",
            hint="Copy or download the rest of the model.",
        )
    return shards


def check_no_pointer(path: Path) -> None:
    """IntegrityError if the file is a Git LFS pointer, which `git clone` leaves without Git LFS (about 130 bytes)."""
    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise IntegrityError(
                f"{path} is a Git LFS pointer of {path.stat().st_size} bytes, not the file itself.",
                why="The repository was cloned without its large files.",
                hint=f"git -C {path.parent} lfs pull",
            )


@dataclass(frozen=True)
class Hashed:
    """Hashes and size of a file: sha256, sha1 of its git blob ("" for large files), bytes."""

    sha256: str
    git_sha1: str
    size: int


def hash_files(root: Path, names: Sequence[str], told: Callable[[int], None]) -> dict[str, Hashed]:
    """{name: hashes}, four files at a time, because one core hashes slower than a disk reads.

    told: called with the number of bytes hashed so far.
    """
    done, lock = 0, threading.Lock()

    def count(n: int) -> None:
        nonlocal done
        with lock:
            done += n
            told(done)

    with ThreadPoolExecutor(4) as pool:
        return dict(zip(names, pool.map(lambda name: _hash_file(root / name, count), names), strict=True))


def _hash_file(path: Path, count: Callable[[int], None]) -> Hashed:
    size = path.stat().st_size
    sha256, sha1 = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    small = size <= LARGEST_BLOB
    read = 0
    with open(path, "rb", buffering=0) as file:
        for chunk in chunks(file):
            sha256.update(chunk)
            if small:
                sha1.update(chunk)
            read += len(chunk)
            count(len(chunk))
    return Hashed(sha256.hexdigest(), sha1.hexdigest() if small else "", read)


def _contents(names: Collection[str]) -> str:
    shown = sorted(names)
    if not shown:
        return "It is empty."
    return f"It has {', '.join(shown[:6])}{f' and {len(shown) - 6} more' if len(shown) > 6 else ''}."
