"""Checkpoint -> the layouts that a recipe requests for other servers: compressed-tensors.

A stage of its own: to request a layout later needs no calibration.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from builder import __version__
from builder.checkpoint import conversion
from builder.checkpoint.layouts import Checkpoint
from builder.core.errors import UnsupportedError
from builder.core.output import size
from builder.core.store import Artifact, Store, sources_digest
from builder.formats import registry
from builder.formats.base import NumberFormat
from builder.formats.kv_cache import KvCacheFormat

COMPRESSED_TENSORS = "compressed-tensors"
SHAPE_BYTES = 16  # of the tensor weight_shape beside a packed weight: two I64
SOURCES = (
    "builder/architectures",
    "builder/checkpoint",
    "builder/checkpoint/requested_layouts.py",
    "builder/core/safetensors_io.py",
    "builder/formats",
    "builder/model",
    "builder/tokenizer",
)


def check(layouts: Collection[str], formats: Iterable[NumberFormat], cache: KvCacheFormat) -> None:
    """UnsupportedError if compressed-tensors is requested and lacks one of these formats."""
    if COMPRESSED_TENSORS not in layouts:
        return
    used = dict.fromkeys(formats)
    if not any(one.quant_algo for one in used):
        raise UnsupportedError(
            "Nothing is quantized, so there is no compressed-tensors layout.",
            why="vLLM, SGLang and transformers read the Hugging Face layout of an unquantized model.",
            hint="Leave compressed-tensors out of --layouts.",
        )
    lacking = [one.title for one in used if one.quant_algo and one.compressed_tensors is None]
    lacking += [cache.title] if cache.quantized and not cache.compressed_tensors else []
    if lacking:
        known = ", ".join(one.name for one in registry.all_formats().values() if one.compressed_tensors)
        raise UnsupportedError(
            f"The compressed-tensors layout has no {' and no '.join(lacking)}.",
            why=f"It has these formats of linear layers: {known}; and an FP8 KV cache.",
            hint="Leave compressed-tensors out of --layouts, or choose another --format or --kv-cache-dtype.",
        )


def write_requested(checkpoint: Checkpoint, layouts: Collection[str], *, store: Store) -> Artifact | None:
    """Writes `compressed_tensors/` of a checkpoint if it is requested; None if not."""
    if COMPRESSED_TENSORS not in layouts:
        return None
    ingredients = {
        "checkpoint": checkpoint.digest,
        "layouts": [COMPRESSED_TENSORS],
        "builder": __version__,
        "sources": sources_digest(*SOURCES),
    }

    def make(tmp: Path) -> dict[str, Any]:
        directory = tmp / "compressed_tensors"
        directory.mkdir()
        made = conversion.write(checkpoint.unified, directory, "compressed_tensors")
        store.out.info(f"compressed-tensors layout: {size(made.nbytes)}, for vLLM, SGLang and transformers")
        return {"files": list(made.files), "nbytes": made.nbytes, "lost": list(made.lost)}

    return store.stage("layouts", ingredients, make)
