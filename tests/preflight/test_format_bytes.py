"""The plan's bytes are those of a checkpoint in every format, at tp 1 and 2."""

from __future__ import annotations

from pathlib import Path

import exports
import fabricated
import planned
import pytest

from builder.checkpoint import layouts
from builder.core.safetensors_io import Tensors
from builder.formats import kv_cache, registry
from builder.formats.assignment import ModelFormats
from builder.formats.base import NumberFormat
from builder.formats.registry import BF16


@pytest.mark.parametrize("name", ["qwen3", "llama", "qwen2"])
@pytest.mark.parametrize("number_format", registry.for_tensorrt_llm(), ids=lambda one: one.name)
def test_the_plan_is_exact(tmp_path: Path, number_format: NumberFormat, name: str) -> None:
    source = exports.MODELS[name]
    if not all(number_format.fits(info.shape) for tensor, info in Tensors(source).items() if "_proj.weight" in tensor):
        pytest.skip("the model is not made of whole groups")
    kept = ["model.layers.0.mlp.down_proj"] if number_format is not BF16 else []
    made = tmp_path / "made"
    fabricated.unified(source, number_format, made / "unified", excluded=kept)
    layouts.write_tensorrt_llm(made / "unified", layouts.read_json(source / "config.json"), made / "tensorrt_llm")
    formats = ModelFormats(number_format, {BF16: kept} if kept else {}, kv_cache.FP8)
    halves = (number_format.group_size or 1) * 2
    tps = (1, 2) if layouts.read_json(source / "config.json")["hidden_size"] % halves == 0 else (1,)
    planned.check(made, source, formats, tmp_path, tps)
