"""The compressed-tensors layout as a stage of a build: on request, once, and only where it has the formats."""

from __future__ import annotations

from pathlib import Path

import exports
import pytest

from builder.checkpoint import requested_layouts
from builder.checkpoint.conversion import LAYOUTS
from builder.checkpoint.description import describe_directory
from builder.checkpoint.layouts import Checkpoint
from builder.core.errors import UnsupportedError, UsageError
from builder.core.output import Output
from builder.core.safetensors_io import Tensors
from builder.core.store import Store
from builder.formats import kv_cache, registry
from builder.recipe import schema


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """ModelOpt's export of a fixture model."""
    root = tmp_path_factory.mktemp("checkpoint")
    exports.export(exports.quantized(exports.MODELS["qwen2"]), root / "unified")
    return Checkpoint(root, "0123")


def test_it_is_written_once_and_has_the_bytes_that_a_plan_states(checkpoint: Checkpoint, tmp_path: Path) -> None:
    store = Store(tmp_path, Output("quiet"))
    assert requested_layouts.write_requested(checkpoint, ("unified", "tensorrt_llm"), store=store) is None
    first = requested_layouts.write_requested(checkpoint, ("compressed-tensors",), store=store)
    again = requested_layouts.write_requested(checkpoint, ("unified", "compressed-tensors"), store=store)
    assert first is not None
    assert again is not None
    assert (first.cached, again.cached, first.path) == (False, True, again.path)
    there = first.path / "compressed_tensors"
    assert describe_directory(there).layers == describe_directory(checkpoint.unified).layers
    tensor_bytes = [sum(info.nbytes for info in Tensors(one).values()) for one in (there, checkpoint.unified)]
    assert tensor_bytes[0] == tensor_bytes[1]  # preflight/checks.py, sizes


def test_formats_that_the_library_lacks_are_refused_before_any_work() -> None:
    good = [registry.get(name) for name in ("nvfp4", "fp8", "bf16", "w4a16_nvfp4", "fp8_pc_pt")]
    requested_layouts.check(("compressed-tensors",), good, kv_cache.FP8)
    requested_layouts.check(("unified",), [registry.get("int8_sq")], kv_cache.FP8)
    with pytest.raises(UnsupportedError, match=r"has no INT8 \(SmoothQuant\)\.") as refused:
        requested_layouts.check(("compressed-tensors",), [*good, registry.get("int8_sq")], kv_cache.FP8)
    assert "nvfp4, fp8, fp8_pc_pt, int8_dynamic, int8_static, w4a16_nvfp4, w8a16_int8;" in refused.value.why
    with pytest.raises(UnsupportedError, match="Nothing is quantized"):
        requested_layouts.check(("compressed-tensors",), [registry.get("bf16")], kv_cache.AUTO)
    with pytest.raises(UnsupportedError, match="NVFP4 KV cache"):
        requested_layouts.check(("compressed-tensors",), good, kv_cache.get("nvfp4"))


def test_the_recipes_key() -> None:
    def layouts(value: object) -> tuple[str, ...]:
        given = {"model.id": "m", "gpu": "cpu", "quantization.layouts": value}
        return schema.resolve(given).recipe.quantization.layouts

    assert layouts("unified, compressed-tensors") == ("unified", "compressed-tensors")
    assert layouts(["tensorrt_llm"]) == ("tensorrt_llm",)
    with pytest.raises(UsageError, match="compressed-tensors"):
        layouts("unified,gguf")
    assert set(LAYOUTS) == {"unified", "tensorrt_llm", "compressed-tensors"}
