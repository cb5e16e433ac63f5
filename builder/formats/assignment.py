"""The formats that a model is quantized to: of all its linear layers, of single ones, and of the KV cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from builder.formats import kv_cache, registry
from builder.formats.base import NumberFormat
from builder.formats.kv_cache import KvCacheFormat
from builder.formats.registry import BF16, FP8, NVFP4


@dataclass(frozen=True)
class ModelFormats:
    """`whole` is the format of every linear layer that `layers` does not name ({format: Hugging Face modules})."""

    whole: NumberFormat = NVFP4
    layers: Mapping[NumberFormat, Sequence[str]] = field(default_factory=dict)
    cache: KvCacheFormat = kv_cache.AUTO

    def modules(self, number_format: NumberFormat) -> Sequence[str]:
        """The single layers in a format."""
        return self.layers.get(number_format, ())


def of_job(job: Mapping[str, Any]) -> ModelFormats:
    """From the entries of a worker's job: `format` and `kv_cache_dtype` as in the recipe, and the modules that stay in
    BF16 (`kept`) or FP8 (`fp8`)."""
    return ModelFormats(
        registry.get(job.get("format", NVFP4.name)),
        {BF16: tuple(job.get("kept", ())), FP8: tuple(job.get("fp8", ()))},
        kv_cache.get(job["kv_cache_dtype"]),
    )
