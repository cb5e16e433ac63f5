"""Which files make a causal LM that can be quantized here, and what is wrong with a directory or a listing of them.

Names, a parsed config.json, file headers in; the wanted names and their hashes, or an error that says what to do, out.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from builder.errors import IntegrityError, UnsupportedError, UsageError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
GENERATION = "generation_config.json"
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
# transformers names what it can decode token by token so; its encoder-decoders and multimodal models otherwise.
CAUSAL = ("ForCausalLM", "LMHeadModel")
LFS_POINTER = b"version https://git-lfs"
HASH_CHUNK = 1 << 23  # bytes
LARGEST_BLOB = 1 << 24  # bytes; the Hub takes at most 10 MB outside LFS
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library itself


def wanted(names: Collection[str], shards: Collection[str] | None, *, remote_code: bool) -> list[str]:
    """The files of a model among `names`: config, tokenizer, the index's shards (None: no index), code if asked."""
    companions = _matching(names, [GENERATION, *TOKENIZER, *(["*.py"] if remote_code else [])])
    weights = [WEIGHTS] if shards is None else [INDEX, *shards]
    return sorted({CONFIG, *companions, *weights})


def tokenizer_files(directory: Path) -> list[Path]:
    """The files of a model directory that its tokenizer is made of."""
    return [directory / name for name in tokenizer_names([path.name for path in directory.iterdir()])]


def tokenizer_names(names: Collection[str]) -> list[str]:
    """Those of these file names that a tokenizer is made of."""
    return sorted(_matching(names, TOKENIZER))


def _matching(names: Collection[str], patterns: Sequence[str]) -> list[str]:
    return [n for n in names if "/" not in n and any(fnmatch.fnmatchcase(n, p) for p in patterns)]


def check_names(names: Collection[str], where: str) -> None:
    """UsageError or UnsupportedError unless config.json, safetensors weights and tokenizer.json are among `names`."""
    if CONFIG not in names:
        raise UsageError(
            f"{where} has no config.json.",
            why=_contents(names),
            cure="Give the directory (or Hub id) of a transformers model: config.json, *.safetensors, tokenizer.json.",
        )
    if WEIGHTS not in names and INDEX not in names:
        raise _no_weights(names, where)
    if "tokenizer.json" not in names:
        raise UnsupportedError(
            f"{where} has no tokenizer.json.",
            why="The served repository tokenizes with the fast tokenizer, whose file that is.",
            cure="Write one with transformers: AutoTokenizer.from_pretrained(MODEL).save_pretrained(DIRECTORY)",
        )


def _no_weights(names: Collection[str], where: str) -> UsageError | UnsupportedError:
    pickles = sorted(n for n in names if any(fnmatch.fnmatchcase(n, p) for p in PICKLES))
    if pickles:
        return UnsupportedError(
            f"{where} has its weights only as pickles ({', '.join(pickles[:3])}).",
            why="Loading a pickle runs whatever code is inside it, so none is ever opened here.",
            cure="Convert it once where you trust it, with transformers: "
            'AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto").save_pretrained(DIRECTORY)',
        )
    others = sorted(n for n in names if n.endswith(".safetensors"))
    adapter = "An adapter must first be merged into its base model." if "adapter_config.json" in names else ""
    found = f"Found {', '.join(others[:3])}." if others else _contents(names)
    return UsageError(
        f"{where} has no {WEIGHTS} and no {INDEX}.",
        why=f"{found} {adapter}".strip(),
        cure="Give a model saved by transformers' save_pretrained.",
    )


def parse_config(text: bytes, where: str) -> dict[str, Any]:
    """config.json as a mapping."""
    try:
        config = json.loads(text)
    except ValueError as error:
        raise UsageError(f"{where}/{CONFIG} is no JSON.", why=str(error), cure="Save the model again.") from None
    if not isinstance(config, dict):
        raise UsageError(f"{where}/{CONFIG} is a {type(config).__name__}, not an object.", cure="Save the model again.")
    return config


def check_config(config: Mapping[str, Any], where: str, *, trust_remote_code: bool) -> None:
    """Raises UnsupportedError unless this is an unquantized causal LM whose code transformers brings itself."""
    architectures = config.get("architectures") or []
    name = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    if not name.endswith(CAUSAL) or config.get("is_encoder_decoder"):
        raise UnsupportedError(
            f"{where} is no causal language model.",
            why=f"Its config.json names the architecture {name or '(none)'}; needed is one that ends in "
            f"{' or '.join(CAUSAL)} and has no encoder.",
            cure="Give a decoder-only text model, like Qwen/Qwen3-8B.",
        )
    quantized = config.get("quantization_config") or config.get("compression_config")
    if quantized:
        method = quantized.get("quant_method", "unknown") if isinstance(quantized, Mapping) else "unknown"
        raise UnsupportedError(
            f"{where} is quantized already ({method}).",
            why="NVFP4 values are computed from the original weights; a second rounding on top would only lose more.",
            cure="Give the BF16 model that it was made from.",
        )
    if needs_remote_code(config) and not trust_remote_code:
        raise UnsupportedError(
            f"{where} needs its own Python code (auto_map in config.json).",
            why=f"transformers has no model type {config.get('model_type')!r}, and a model's code is not run unasked.",
            cure="Read that code, then add --trust-remote-code.",
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


def shards_of(index: bytes, names: Collection[str], where: str) -> list[str]:
    """The shard names of model.safetensors.index.json. IntegrityError if one is missing or is no plain file name."""
    try:
        shards = sorted({str(name) for name in json.loads(index)["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(
            f"{where}/{INDEX} is no index of safetensors.", why=repr(error), cure="Fetch or save the model again."
        ) from None
    strange = [name for name in shards if "/" in name or "\\" in name or not name.endswith(".safetensors")]
    if strange or not shards:
        raise IntegrityError(f"{where}/{INDEX} names strange files: {strange[:3]}.", cure="Do not use this model.")
    missing = [name for name in shards if name not in names]
    if missing:
        raise IntegrityError(
            f"{where} lacks {len(missing)} of the {len(shards)} files that its index names.",
            why=f"Missing: {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}.",
            cure="Copy or download the rest of the model.",
        )
    return shards


def check_no_pointer(path: Path) -> None:
    """IntegrityError if this is what `git clone` leaves without Git LFS: a pointer of some 130 bytes."""
    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise IntegrityError(
                f"{path} is a Git LFS pointer of {path.stat().st_size} bytes, not the file itself.",
                why="The repository was cloned without its large files.",
                cure=f"git -C {path.parent} lfs pull",
            )


def check_safetensors(path: Path) -> None:
    """IntegrityError unless the last byte that the header announces is the file's last: a cut copy is found at once.

    The format: 8 bytes little-endian length, that much JSON, then the data (safetensors README, "Format").
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        try:
            if len(head) < 8 or length > min(size - 8, MAX_HEADER):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            if 8 + length + max(ends, default=0) != size:
                raise ValueError(f"{8 + length + max(ends, default=0)} bytes announced, {size} found")
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise IntegrityError(
                f"{path} is no whole safetensors file.", why=str(error), cure="Copy or download it again."
            ) from None


@dataclass(frozen=True)
class Hashed:
    """What a file's content is: sha256, sha1 as of a git blob (small files only), bytes."""

    sha256: str
    git_sha1: str
    size: int


def hash_files(root: Path, names: Sequence[str], told: Callable[[int], None]) -> dict[str, Hashed]:
    """Hashes a few files at a time: one core hashes slower than a disk reads. `told` hears the bytes done so far."""
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
    with open(path, "rb") as file:
        while chunk := file.read(HASH_CHUNK):
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
