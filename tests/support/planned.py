"""Whether a plan's bytes are those of a checkpoint on disk."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from builder.checkpoint import layouts, sharding
from builder.checkpoint.sharding import Parallel
from builder.core.safetensors_io import Tensors
from builder.formats.assignment import ModelFormats
from builder.preflight import memory
from builder.preflight.memory import Serving
from builder.preflight.model_facts import ModelFacts


def check(made: Path, source: Path, formats: ModelFormats, scratch: Path, tps: Iterable[int] = (1, 2)) -> None:
    """Both layouts in `made`, quantized from `source`, and the ranks that are split from them."""
    tensors = {name: (info.dtype, info.shape) for name, info in Tensors(source).items()}
    layers = {one.name: tuple(modules) for one, modules in formats.layers.items()}
    config = layouts.read_json(source / "config.json")
    model = ModelFacts(config, tensors, layers, source, formats.whole)
    for tp in tps:
        asked = Serving(2, 64, 128, 128, cache=formats.cache, tp=tp)
        found = memory.sizes(model, asked)
        sharding.split(made / "tensorrt_llm", scratch / f"planned{tp}", Parallel(tp))
        files = [scratch / f"planned{tp}" / f"rank{rank}.safetensors" for rank in range(tp)]
        assert found.unified == _nbytes(Tensors(made / "unified"))
        assert found.checkpoint == _nbytes(Tensors(made / "tensorrt_llm"))
        assert list(found.ranks) == [_nbytes(Tensors(file.parent, [file])) for file in files]


def _nbytes(tensors: Tensors) -> int:
    return sum(info.nbytes for info in tensors.values())
