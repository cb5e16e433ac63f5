"""The formats that a checkpoint's own configuration declares, layer by layer.

`quantization` is that of hf_quant_config.json (ModelOpt's Hugging Face layout), or of config.json in TensorRT-LLM's
with, where quant_algo is MIXED_PRECISION, what quant_cfg.json says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import translate
from functools import cached_property
from typing import Any

from builder.core.errors import UnsupportedError
from builder.formats.base import NumberFormat
from builder.formats.registry import BF16, all_formats, for_tensorrt_llm, of_entry

# quant_algo of a checkpoint whose layers are in several formats (tensorrt_llm/quantization/mode.py, QuantAlgo).
MIXED = "MIXED_PRECISION"
REGEX = "re:"  # how compressed-tensors marks an entry of `ignore` or `targets` as a regular expression
# quant_algo of ModelOpt and TensorRT-LLM for formats that no module of this package describes (modelopt/torch/export/
# quant_utils.py, process_layer_quant_config, 0.47; tensorrt_llm/quantization/mode.py, 1.2): what they are.
OTHER_ALGOS: Mapping[str, str] = {
    "FP8_PB_WO": "FP8 weights with a scale for each block of 128x128",
    "FP8_PB_REAL": "FP8 weights with a scale for each block of 128x128",
    "FP8_BLOCK_SCALES": "FP8 weights with a scale for each block of 128x128",
    "MXFP8": "FP8 with a shared exponent for every 32 values",
    "MXFP4": "4-bit floats with a shared exponent for every 32 values",
    "W4A8_MXFP4_FP8": "MXFP4 weights with FP8 activations",
    "W4A8_NVFP4_FP8": "NVFP4 weights with FP8 activations",
    "W4A8_AWQ": "4-bit integer weights with FP8 activations",
    "W8A16": "8-bit integer weights",
    "NVFP4_SVD": "NVFP4 with a low-rank correction of the weights (SVDQuant)",
}


def _no_aliases(module: str) -> Sequence[str]:
    return ()


@dataclass(frozen=True)
class DeclaredFormats:
    """`default` is the format of all layers that `excluded` does not name, None where `layers` lists each layer's.

    An entry of `excluded` and of `layers` names a module or one that contains it, exactly, with wildcards, or after
    `re:` as a regular expression; TensorRT-LLM reads them so (models/modeling_utils.py,
    QuantConfig.is_module_excluded_from_quantization). aliases: other names that a configuration may call a module by.
    """

    default: NumberFormat | None
    layers: Mapping[str, NumberFormat]
    excluded: tuple[str, ...]
    aliases: Callable[[str], Sequence[str]] = _no_aliases

    def of(self, module: str) -> NumberFormat:
        """The format that is declared for a linear layer."""
        if self.default is None:
            return self._listed(module) or BF16
        return BF16 if self.excludes(module) else self.default

    def stored(self, module: str, dtype: str) -> NumberFormat:
        """The format of a linear layer whose weight has this safetensors dtype: the declared one if it fits, else
        another declared one that does (configurations forget layers that were left as they were)."""
        known = [self.of(module), *dict.fromkeys(self.layers.values()), *([self.default] if self.default else [])]
        return next((one for one in known if dtype in one.weight.dtypes), BF16)

    def of_weight(self, module: str, dtype: str) -> NumberFormat:
        """The same, for readers of weights: UnsupportedError for a dtype that no declared format stores weights in."""
        found = self.stored(module, dtype)
        if dtype in found.weight.dtypes:
            return found
        raise UnsupportedError(
            f"The weight of {module} is stored as {dtype}, which its declared format can't be.",
            why=f"The configuration says {self.of(module).title}.",
            hint="`builder inspect` lists what is wrong with the checkpoint.",
        )

    @property
    def used(self) -> tuple[NumberFormat, ...]:
        """The quantized formats that are declared."""
        if self.default is None:
            return tuple(dict.fromkeys(self.layers.values()))
        return (self.default,) if self.default is not BF16 else ()

    def excludes(self, module: str) -> bool:
        """Whether an entry of `excluded` names this module or one that contains it."""
        exact, pattern = self._excluded
        return any(name in exact or bool(pattern and pattern.match(name)) for name in self._names(module))

    def _listed(self, module: str) -> NumberFormat | None:
        exact, patterns = self._patterns
        for name in self._names(module):
            if name in exact:
                return exact[name]
            for pattern, one in patterns:
                if pattern.match(name):
                    return one
        return None

    def _names(self, module: str) -> Iterator[str]:
        """What an entry may call a module: by its name, its aliases, and the names of all modules that contain it."""
        for name in (module, *self.aliases(module)):
            yield name
            while "." in name:
                name = name.rpartition(".")[0]
                yield name

    @cached_property
    def _excluded(self) -> tuple[frozenset[str], re.Pattern[str] | None]:
        """Entries without wildcards, and one pattern for all others: a mixture has tens of thousands of modules."""
        exact, patterns = _split(self.excluded)
        return exact, re.compile("|".join(f"(?:{one})" for one in patterns)) if patterns else None

    @cached_property
    def _patterns(self) -> tuple[Mapping[str, NumberFormat], Sequence[tuple[re.Pattern[str], NumberFormat]]]:
        exact, _ = _split(list(self.layers))
        patterns = [
            (re.compile(expression), one)
            for name, one in self.layers.items()
            if name not in exact
            for expression in _expressions(name)
        ]
        return {name: one for name, one in self.layers.items() if name in exact}, patterns


def _split(entries: Sequence[str]) -> tuple[frozenset[str], list[str]]:
    """The entries that are plain names, and regular expressions for the others."""
    plain = frozenset(entry for entry in entries if not entry.startswith(REGEX) and not set(entry) & set("*?["))
    return plain, [expression for entry in entries if entry not in plain for expression in _expressions(entry)]


def _expressions(entry: str) -> list[str]:
    """Regular expressions for an entry with wildcards or `re:`. UnsupportedError for an invalid one.

    `model.layers.1.*` also means model.layers.1 itself. compressed-tensors matches from the beginning, and not to the
    end (compressed_tensors/utils/match.py, match_name).
    """
    if not entry.startswith(REGEX):
        return [translate(one) for one in (entry, *([entry[:-2]] if entry.endswith(".*") else []))]
    try:
        re.compile(entry[len(REGEX) :])
    except re.error as error:
        raise UnsupportedError(
            f"The checkpoint's configuration has a regular expression that is not valid: {ascii(entry)[:100]}.",
            why=str(error),
            hint="Correct it in the checkpoint's configuration, or quantize the original model.",
        ) from None
    return [entry[len(REGEX) :]]


def declared(quantization: Mapping[str, Any], aliases: Callable[[str], Sequence[str]] = _no_aliases) -> DeclaredFormats:
    """What a checkpoint's `quantization` declares. UnsupportedError for formats that are not known here."""
    algo, layers = quantization.get("quant_algo"), quantization.get("quantized_layers") or {}
    excluded = tuple(quantization.get("exclude_modules") or ())
    if algo is None:
        return DeclaredFormats(BF16, {}, excluded, aliases)
    if algo != MIXED:
        one = of_entry(quantization)
        if one is None or not one.whole_model:
            raise _unsupported([quantization])
        return DeclaredFormats(one, {}, excluded, aliases)
    found = {name: of_entry(entry) for name, entry in layers.items()}
    unknown = [layers[name] for name, one in found.items() if one is None]
    if unknown:
        raise _unsupported(unknown)
    return DeclaredFormats(None, {name: one for name, one in found.items() if one}, excluded, aliases)


def _unsupported(entries: Sequence[Mapping[str, Any]]) -> UnsupportedError:
    """The error for entries {"quant_algo", "group_size"} that no format has."""
    algos = sorted({str(entry.get("quant_algo")) for entry in entries})
    why = [f"{algo}: {OTHER_ALGOS[algo]}." for algo in algos if algo in OTHER_ALGOS]
    for algo in algos:
        known = [one.group_size for one in all_formats().values() if one.quant_algo == algo]
        stated = {entry.get("group_size") for entry in entries if entry.get("quant_algo") == algo}
        if known and (odd := sorted(map(str, stated - {None, *known}))):
            sizes = " or ".join(str(size) for size in known if size)
            has = f"has groups of {sizes}" if sizes else "has no groups"
            why.append(f"{algo} {has}; this checkpoint says {', '.join(odd)}.")
    names = ", ".join(one.name for one in for_tensorrt_llm())
    return UnsupportedError(
        f"The checkpoint's weights are in {', '.join(algos)} (quant_algo), which is not supported.",
        why=" ".join([*why, f"Supported: {', '.join(one.title for one in for_tensorrt_llm())}."]),
        hint=f"Give the original model that it was made from, with --format and one of {names}.",
    )
