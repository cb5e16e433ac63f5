"""An adapter as PEFT's save_pretrained writes it: adapter_config.json and adapter_model.safetensors, checked.

Scales are those of PEFT (tuners/lora/layer.py, update_layer): lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora,
r and lora_alpha of a layer from rank_pattern and alpha_pattern where these match its name.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from builder.core.errors import IntegrityError, UnsupportedError, UsageError
from builder.core.safe_text import quoted
from builder.core.safetensors_io import Tensors
from builder.core.untrusted_text import parse_json, read_regular
from builder.lora.modules import BY_HF, MODULES
from builder.model.files import ADAPTER

FILES = CONFIG, WEIGHTS = ADAPTER
TENSOR = re.compile(r"base_model\.model\.((?:model\.)?layers\.(\d{1,3})\.(?:self_attn|mlp)\.(\w+))\.lora_(A|B)\.weight")
PATTERN = re.compile(r"[\w.*+?^$\\\[\]|-]{1,200}")  # no groups and no counts, which can be nested
# Of * + ? in a pattern, which takes time to this power, and in all patterns, each of which is tried with each layer.
MOST_REPEATS, MOST_REPEATS_TOGETHER = 3, 150
LARGEST_ALPHA = 1e6
Patterns = Sequence[tuple[re.Pattern[str], Any]]
FLOATS = ("F16", "BF16", "F32")
MERGE = "Merge it into the model with PEFT (merge_and_unload), save the model, and build that."
# Fields of PEFT's LoraConfig (0.21.2, tuners/lora/config.py) with which an adapter is more than two matrices beside
# each layer, and what that is. An absent or empty value is the default.
MORE = {
    "use_dora": "DoRA scales the columns of the model's own weights",
    "modules_to_save": "whole layers are replaced",
    "trainable_token_indices": "rows of the embedding are replaced",
    "layer_replication": "layers are repeated",
    "target_parameters": "parameters of experts are changed",
    "alora_invocation_tokens": "it applies from certain tokens on (aLoRA)",
    "use_qalora": "it changes groups of inputs (QALoRA)",
    "use_bdlora": "its matrices are of blocks (BD-LoRA)",
    "arrow_config": "it is chosen token by token (Arrow)",
    "kasa_config": "it has singular values of its own (KaSA)",
    "monteclora_config": "its matrices are drawn at random (MonteCLoRA)",
    "lora_bias": "its second matrices have a bias",
    "fan_in_fan_out": "its layers are stored transposed",
}
# Initializations that also change the model's own weights, so that the adapter alone means nothing; those that PEFT
# converts when it saves (path_initial_model_for_weight_conversion) say `true` instead.
CHANGES_MODEL = ("pissa", "olora", "corda", "loftq", "lora_ga")


class Pair(NamedTuple):
    """The two matrices of one layer: the tensors' names, the rank, and what the second one is multiplied by."""

    a: str
    b: str
    rank: int
    scale: float


@dataclass(frozen=True)
class Adapter:
    """A checked adapter. name: what clients call it. base: the model that it was trained on, "" if it does not say.

    pairs: {(layer, Hugging Face's name of the kind of layer): Pair}, in this order. repository, commit: on the Hub; ""
    for a directory.
    """

    name: str
    directory: Path
    base: str
    tensors: Tensors
    pairs: Mapping[tuple[int, str], Pair]
    repository: str = ""
    commit: str = ""

    @property
    def rank(self) -> int:
        """The largest rank of its layers."""
        return max(pair.rank for pair in self.pairs.values())

    @property
    def modules(self) -> list[str]:
        """The kinds of layers that it changes, by Hugging Face's names."""
        found = {kind for _, kind in self.pairs}
        return [module.hf for module in MODULES if module.hf in found]

    @property
    def values(self) -> int:
        """How many numbers it consists of."""
        return sum(math.prod(self.tensors[name].shape) for pair in self.pairs.values() for name in (pair.a, pair.b))

    @property
    def digest(self) -> str:
        """The sha256 of its files, as they are now."""
        digest = hashlib.sha256()
        for name in FILES:
            with open(self.directory / name, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()


def open_adapter(name: str, directory: Path) -> Adapter:
    """Reads an adapter's configuration and the header of its weights.

    UsageError if it is none, UnsupportedError for one that no engine can serve, IntegrityError for a damaged one.
    """
    check_files(name, directory)
    return checked(name, directory, read_config(directory), Tensors(directory, [directory / WEIGHTS]))


def checked(name: str, directory: Path, config: Mapping[str, Any], tensors: Tensors) -> Adapter:
    """The adapter with this configuration and these tensors. Errors as for `open_adapter`."""
    check_config(name, config)
    base = str(config.get("base_model_name_or_path") or "")
    return Adapter(name, directory, base, tensors, _pairs(name, config, tensors))


def check_files(name: str, directory: Path) -> None:
    """UsageError for a directory without the files of an adapter."""
    missing = [file for file in FILES if not (directory / file).is_file()]
    if not missing:
        return
    pickled = (directory / "adapter_model.bin").is_file() and missing == [WEIGHTS]
    raise UsageError(
        f"{directory} is no LoRA adapter: it has no {' and no '.join(missing)}.",
        why="adapter_model.bin is a pickle, which can run code when it is read." if pickled else "",
        hint="Save the adapter again with PEFT, which writes safetensors."
        if pickled
        else f"Name the directory that PEFT's save_pretrained wrote: --lora {name}=DIRECTORY",
    )


def read_config(directory: Path) -> dict[str, Any]:
    """An adapter's adapter_config.json. IntegrityError if it can't be read."""
    try:
        config = parse_json(read_regular(directory / CONFIG))
        if not isinstance(config, dict):
            raise ValueError("it is not an object")
    except (OSError, ValueError) as error:
        raise IntegrityError(
            f"{directory / CONFIG} can't be read.", why=str(error), hint="Save or download the adapter again."
        ) from None
    return config


def check_config(
    name: str,
    config: Mapping[str, Any],
    why: str = "TensorRT-LLM's C++ backend takes pairs of matrices only (tensorrt_llm/runtime/loraUtils.cpp).",
) -> None:
    """UnsupportedError for an adapter that is more than pairs of matrices. why: what serves it takes no more."""
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise UnsupportedError(
            f"The adapter {name} is {quoted(str(kind))}, and TensorRT-LLM serves LoRA only.",
            hint=f"{MERGE} Not every kind can be merged.",
        )
    bias = config.get("bias", "none")
    found = [more for field, more in MORE.items() if config.get(field)]
    found += ["biases of the model are changed"] if bias != "none" else []
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGES_MODEL):
        found.append(f"it was initialized by {start}, which changes the model's own weights")
    if found:
        raise UnsupportedError(
            f"The adapter {name} is more than pairs of matrices beside linear layers: {'; '.join(found)}.",
            why=why,
            hint=MERGE,
        )


def _pairs(name: str, config: Mapping[str, Any], tensors: Tensors) -> dict[tuple[int, str], Pair]:
    """The layers' matrices. Every tensor must belong to one."""
    halves: dict[tuple[int, str], dict[str, str]] = {}
    modules: dict[tuple[int, str], str] = {}
    other = []
    for tensor, info in tensors.items():
        found = TENSOR.fullmatch(tensor)
        if not found or found[3] not in BY_HF or info.dtype not in FLOATS or len(info.shape) != 2:
            other.append(tensor)
            continue
        key = (int(found[2]), found[3])
        if modules.setdefault(key, found[1]) != found[1]:
            other.append(tensor)  # a second name of the same layer
            continue
        halves.setdefault(key, {})[found[4]] = tensor
    if other:
        raise UnsupportedError(
            f"The adapter {name} has tensors that no engine takes: {', '.join(map(quoted, sorted(other)[:3]))}"
            f"{', ...' * (len(other) > 3)}.",
            why=f"Supported are lora_A and lora_B of {', '.join(BY_HF)} of the decoder layers, in 16 or 32 bits.",
            hint=MERGE,
        )
    if not halves:
        raise IntegrityError(f"The adapter {name} has no tensors.", hint="Save or download the adapter again.")
    scales = _Scales.read(config)
    return {key: _pair(name, scales, tensors, modules[key], halves[key]) for key in sorted(halves, key=_order)}


def _order(key: tuple[int, str]) -> tuple[int, int]:
    return key[0], BY_HF[key[1]].id


def _pair(name: str, scales: _Scales, tensors: Tensors, module: str, halves: Mapping[str, str]) -> Pair:
    if len(halves) < 2:
        raise IntegrityError(
            f"The adapter {name} has only one of the two matrices of {module}.",
            hint="Save or download the adapter again.",
        )
    a, b = halves["A"], halves["B"]
    rank, other = tensors[a].shape[0], tensors[b].shape[1]
    stated = _of_layer(scales.ranks, module, scales.rank)
    if rank != other or not rank or stated not in (None, rank):
        raise IntegrityError(
            f"The ranks of {module} in the adapter {name} contradict each other: lora_A has {rank}, lora_B {other}, "
            f"and {CONFIG} says {quoted(stated)}.",
            hint="Save or download the adapter again.",
        )
    alpha = _of_layer(scales.alphas, module, scales.alpha)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) <= LARGEST_ALPHA:
        raise IntegrityError(
            f"lora_alpha of the adapter {name} is {quoted(str(alpha))}, not a number up to {LARGEST_ALPHA:g}.",
            hint="Save or download the adapter again.",
        )
    return Pair(a, b, rank, alpha / math.sqrt(rank) if scales.rslora else alpha / rank)


class _Scales(NamedTuple):
    """What adapter_config.json says of ranks and scales: for all layers, and by patterns of their names."""

    rank: Any
    alpha: Any
    rslora: bool
    ranks: Patterns
    alphas: Patterns

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> _Scales:
        alpha = config.get("lora_alpha", 8)  # 8: the default of LoraConfig
        ranks, alphas = (_patterns(config, field) for field in ("rank_pattern", "alpha_pattern"))
        return cls(config.get("r"), alpha, bool(config.get("use_rslora")), ranks, alphas)


def _patterns(config: Mapping[str, Any], field: str) -> Patterns:
    """rank_pattern or alpha_pattern, whose keys are regular expressions for the ends of layers' names (PEFT,
    utils/other.py, get_pattern_key). UnsupportedError for those that could take for ever."""
    given = config.get(field) or {}
    if not isinstance(given, Mapping):
        raise IntegrityError(f"{field} of {CONFIG} is no object.", hint="Save or download the adapter again.")
    found, repeats = [], 0
    for key, value in given.items():
        here = sum(key.count(sign) for sign in "*+?")
        repeats += here
        if not PATTERN.fullmatch(key) or here > MOST_REPEATS or repeats > MOST_REPEATS_TOGETHER:
            raise UnsupportedError(
                f"{field} of {CONFIG} has the pattern {quoted(key)}, which is not evaluated.",
                why="A pattern can't have groups, counts, or more than three repetitions, and all of them together not "
                f"more than {MOST_REPEATS_TOGETHER}.",
                hint=MERGE,
            )
        try:
            found.append((re.compile(rf"(.*\.)?({key})"), value))
        except re.error as error:
            raise IntegrityError(
                f"{field} of {CONFIG} has the pattern {quoted(key)}, which is no regular expression.",
                why=str(error),
                hint="Save or download the adapter again.",
            ) from None
    return found


def _of_layer(patterns: Patterns, module: str, default: Any) -> Any:
    """The value of a layer: that of the first pattern which its name ends with."""
    return next((value for pattern, value in patterns if pattern.fullmatch(module)), default)
