"""The formats that a checkpoint's own configuration declares, layer by layer.

`quantization` is that of hf_quant_config.json (ModelOpt's Hugging Face layout), or of config.json in TensorRT-LLM's
with, where quant_algo is MIXED_PRECISION, what quant_cfg.json says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from builder.core.errors import UnsupportedError
from builder.formats.base import NumberFormat
from builder.formats.registry import BF16, for_whole_model, of_entry

# quant_algo of a checkpoint whose layers are in several formats (tensorrt_llm/quantization/mode.py, QuantAlgo).
MIXED = "MIXED_PRECISION"


@dataclass(frozen=True)
class DeclaredFormats:
    """`default` is the format of all layers that `excluded` does not name, None where `layers` lists each layer's."""

    default: NumberFormat | None
    layers: Mapping[str, NumberFormat]
    excluded: tuple[str, ...]

    def of(self, module: str) -> NumberFormat:
        """The format that is declared for a linear layer."""
        if self.default is None:
            return self.layers.get(module, BF16)
        return BF16 if any(fnmatchcase(module, pattern) for pattern in self.excluded) else self.default

    def stored(self, module: str, dtype: str) -> NumberFormat:
        """The format of a linear layer whose weight has this safetensors dtype: the declared one if it fits, else
        another declared one that does (configurations forget layers that were left as they were)."""
        known = [self.of(module), *dict.fromkeys(self.layers.values()), *([self.default] if self.default else [])]
        return next((one for one in known if dtype in one.weight.dtypes), BF16)

    @property
    def used(self) -> tuple[NumberFormat, ...]:
        """The quantized formats that are declared."""
        return tuple(dict.fromkeys(self.layers.values())) if self.default is None else (self.default,)


def declared(quantization: Mapping[str, Any]) -> DeclaredFormats:
    """What a checkpoint's `quantization` declares. UnsupportedError for formats that are not known here."""
    algo, layers = quantization.get("quant_algo"), quantization.get("quantized_layers") or {}
    excluded = tuple(quantization.get("exclude_modules") or ())
    if algo != MIXED:
        one = of_entry(quantization)
        if one is None or not one.whole_model:
            raise _unsupported({str(algo)})
        return DeclaredFormats(one, {}, excluded)
    found = {name: of_entry(entry) for name, entry in layers.items()}
    unknown = {str(layers[name].get("quant_algo")) for name, one in found.items() if one is None}
    if unknown:
        raise _unsupported(unknown)
    return DeclaredFormats(None, {name: one for name, one in found.items() if one}, excluded)


def _unsupported(found: set[str]) -> UnsupportedError:
    whole = ", ".join(one.title for one in for_whole_model())
    return UnsupportedError(
        f"The checkpoint's weights are in {', '.join(sorted(found))} (quant_algo), which is not supported.",
        why=f"Supported: {whole} for a whole model, with single layers in FP8 or BF16.",
    )
