"""The formats that a model is quantized to: of all its linear layers, of single ones, and of the KV cache.

Single layers are named by their format, `Layers`, in recipes' consequences, in jobs and in facts of artifacts:
{format name: Hugging Face modules}. Every linear layer that they don't name is in the model's own format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from builder.formats import kv_cache, registry
from builder.formats.base import NumberFormat
from builder.formats.kv_cache import KvCacheFormat
from builder.formats.registry import BF16, FP8, NVFP4

Layers = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class ModelFormats:
    """`whole` is the format of every linear layer that `layers` does not name ({format: Hugging Face modules})."""

    whole: NumberFormat = NVFP4
    layers: Mapping[NumberFormat, Sequence[str]] = field(default_factory=dict)
    cache: KvCacheFormat = kv_cache.AUTO

    @property
    def quantizes(self) -> bool:
        """Whether any linear layer is quantized."""
        return any(one.quant_algo for one in (self.whole, *(one for one, modules in self.layers.items() if modules)))

    @property
    def calibrated(self) -> bool:
        """Whether anything of it is read from calibration rows: inputs, or keys and values."""
        used = [self.whole, *(one for one, modules in self.layers.items() if modules)]
        return self.cache.quantized or any(tensor.calibrated for one in used for tensor in one.tensors)

    def modules(self, number_format: NumberFormat) -> Sequence[str]:
        """The single layers in a format."""
        return self.layers.get(number_format, ())


def of_job(job: Mapping[str, Any]) -> ModelFormats:
    """From the entries of a worker's job: `format` (of the whole model), `layers` and `kv_cache_dtype`."""
    return ModelFormats(
        registry.get(job.get("format", NVFP4.name)),
        {registry.get(name): tuple(modules) for name, modules in job.get("layers", {}).items()},
        kv_cache.get(job["kv_cache_dtype"]),
    )


def by_layer(layers: Layers) -> dict[str, NumberFormat]:
    """{module: its format} of the single layers."""
    return {module: registry.get(name) for name, modules in layers.items() for module in modules}


def to_keep(whole: NumberFormat) -> NumberFormat:
    """The format to put single layers in where a model in `whole` loses too much: FP8, or BF16 where the layers would
    be no larger in FP8, or where it can't be combined with `whole` (recipe/quantization.py)."""
    return BF16 if whole.scales_inputs or whole.bits >= FP8.bits else FP8


def grouped(formats: Mapping[str, NumberFormat]) -> dict[str, tuple[str, ...]]:
    """{format name: modules} for {module: format}: the inverse of `by_layer`."""
    found: dict[str, tuple[str, ...]] = {}
    for module, one in formats.items():
        found[one.name] = (*found.get(one.name, ()), module)
    return found


def merged(layers: Layers, name: str, modules: Sequence[str], order: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The single layers with these modules in the format `name` too, each format's in the order of `order`."""
    added = {*layers.get(name, ()), *modules}
    rest = {one: tuple(found) for one, found in layers.items() if one != name}
    return {**rest, name: tuple(module for module in order if module in added)} if added else rest
