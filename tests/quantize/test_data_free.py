"""Data-free checkpoints: the weights of every calibration, scales by the rule, no library that is not needed."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import source_models

from builder.architectures import catalog
from builder.architectures.written import Part
from builder.core.errors import IntegrityError, UnsupportedError
from builder.core.output import Output
from builder.core.safetensors_io import NewTensor, Tensors
from builder.core.store import Store
from builder.formats import kv_cache
from builder.formats.assignment import ModelFormats
from builder.formats.kernels import native
from builder.formats.registry import BF16, FP8, NVFP4
from builder.hub.snapshot import fetch
from builder.quantize import data_free, unquantized, writer
from builder.quantize.data_free import INPUT_RANGE, write_data_free
from builder.quantize.modelopt import QuantizeRequest
from builder.quantize.ranges import Ranges
from builder.quantize.source_weights import SourceModel
from builder.quantize.unified_plan import UnifiedPlan
from builder.recipe import schema

TINY = Path("tests/data/tiny-qwen3")
SCALES = ("input_scale", *kv_cache.UNIFIED)


def request(model: Path = TINY, **values: Any) -> QuantizeRequest:
    asked = {"model.id": str(model), "gpu": "cpu", "calibration.samples": 0, **values}
    recipe = schema.resolve(asked).recipe
    return QuantizeRequest(recipe.quantization, recipe.calibration)


def made(root: Path, model: Path = TINY, out: Output | None = None, **values: Any) -> Path:
    store = Store(root, out or Output("quiet"))
    asked = schema.resolve({"model.id": str(model), "gpu": "cpu"}).recipe.model
    checkpoint = write_data_free(fetch(asked, store=store), request(model, **values), store=store)
    assert checkpoint.facts["backend"] == "data_free"
    return checkpoint.unified


def read(unified: Path) -> dict[str, bytes]:
    tensors = Tensors(unified)
    return {name: tensors.read(name) for name in tensors}


def number(data: bytes) -> float:
    found: float = struct.unpack("<f", data)[0]
    return found


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ({"quantization.format": "nvfp4"}, INPUT_RANGE / (6 * 448)),
        ({"quantization.format": "fp8"}, INPUT_RANGE / 448),
        ({"quantization.format": "nvfp4", "quantization.kv_cache_dtype": "auto"}, INPUT_RANGE / (6 * 448)),
    ],
)
def test_only_scales_of_activations_differ_from_a_calibrated_checkpoint(
    tmp_path: Path, values: Mapping[str, Any], scale: float
) -> None:
    part = request(**values).quantization
    formats = ModelFormats(part.number_format, {}, part.cache_format)
    source = SourceModel.open(TINY)
    headers = [name.removesuffix(".weight") for name in source.tensors if name.endswith("proj.weight")]
    attentions = {name.rpartition(".")[0] for name in headers if ".self_attn." in name}
    cached = dict.fromkeys(attentions, (2.0, 4.0)) if part.cache_format.quantized else {}
    measured = Ranges(dict.fromkeys(headers, 3.5), cached)
    writer.write(source, formats, measured, tmp_path / "calibrated")
    calibrated, free = read(tmp_path / "calibrated"), read(made(tmp_path / "out", **values))
    assert free.keys() == calibrated.keys()
    differ = {name for name in free if free[name] != calibrated[name]}
    assert differ == {name for name in free if name.endswith(SCALES)}
    assert {np.float32(number(free[name])) for name in differ if name.endswith("input_scale")} == {np.float32(scale)}
    cache = {number(free[name]) for name in differ if name.endswith(kv_cache.UNIFIED)}
    assert cache == ({1.0} if part.cache_format.quantized else set())


def test_layers_in_other_formats_have_their_rule(tmp_path: Path) -> None:
    store = Store(tmp_path, Output("quiet"))
    down = "model.layers.0.mlp.down_proj"
    layers = {FP8.name: [down], BF16.name: ["model.layers.1.mlp.down_proj"]}
    recipe = schema.resolve({"model.id": str(TINY), "gpu": "cpu", "calibration.samples": 0}).recipe
    asked = QuantizeRequest(recipe.quantization, recipe.calibration, layers)
    found = read(write_data_free(fetch(recipe.model, store=store), asked, store=store).unified)
    assert number(found[f"{down}.input_scale"]) == INPUT_RANGE / 448
    assert "model.layers.1.mlp.down_proj.input_scale" not in found


def test_the_same_command_again_does_nothing_and_each_choice_has_a_key(tmp_path: Path) -> None:
    first = made(tmp_path)
    assert made(tmp_path) == first
    assert made(tmp_path, **{"quantization.memory": "low", "calibration.seq_len": 7}) == first, "no row is read"
    assert made(tmp_path, **{"quantization.format": "fp8"}) != first
    assert made(tmp_path, **{"quantization.kv_cache_dtype": "auto"}) != first


def test_a_stale_extension_is_warned_of_and_changes_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = read(made(tmp_path / "compiled"))
    monkeypatch.setattr(native, "missing", lambda: "the C extension is older than its source")
    monkeypatch.setattr(native, "paths", list)
    assert read(made(tmp_path / "torch", out=Output("human"))) == expected
    assert "the C extension is older than its source" in capsys.readouterr().err


def test_a_weight_with_nan_leaves_nothing_behind(tmp_path: Path) -> None:
    name = "model.layers.2.mlp.up_proj.weight"

    def spoiled(tensor: NewTensor) -> list[NewTensor]:
        nan = [b"\xc0\x7f" * int(np.prod(tensor.shape))]
        return [NewTensor(name, tensor.dtype, tensor.shape, nan) if tensor.name == name else tensor]

    model = source_models.copy(TINY, tmp_path / "model", spoiled)
    with pytest.raises(IntegrityError, match="can't be quantized") as caught:
        made(tmp_path / "out", model)
    assert name in caught.value.why
    assert "--keep-bf16" not in caught.value.hint, "in BF16 it would be NaN, too"
    assert not list((tmp_path / "out" / "checkpoint").iterdir())


@pytest.mark.parametrize("size", [0, 1000])
@pytest.mark.parametrize("name", ["nvfp4", "bf16"])
def test_a_source_that_is_cut_while_it_is_read_is_said_to_have_changed(tmp_path: Path, name: str, size: int) -> None:
    source = source_models.copy(TINY, tmp_path / "model", lambda tensor: [tensor])
    store = Store(tmp_path / "out", Output("quiet"))
    snapshot = fetch(schema.resolve({"model.id": str(source), "gpu": "cpu"}).recipe.model, store=store)
    opened = SourceModel.open(source)
    os.truncate(next(source.glob("*.safetensors")), size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SourceModel, "open", lambda _: opened)
        make = {
            "nvfp4": lambda: write_data_free(snapshot, request(source), store=store),
            "bf16": lambda: unquantized.write_checkpoint(snapshot, store=store),
        }[name]
        with pytest.raises(IntegrityError, match="changed after its files were hashed"):
            make()
    assert not list((tmp_path / "out" / "checkpoint").iterdir())


def test_formats_with_searched_scales_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="without calibration"):
        made(tmp_path, **{"quantization.format": "int4_awq"})


def test_a_model_whose_attention_is_not_known_is_refused_only_with_a_quantized_cache() -> None:
    source = SourceModel.open(TINY)
    for cache in (kv_cache.AUTO, kv_cache.FP8):
        formats = ModelFormats(NVFP4, {}, cache)
        planned = data_free.unified_plan.plan(source.config, source.headers, source.dtype, formats)
        more = {**source.config, "layer_types": ["full_attention"] * 8, "num_hidden_layers": 8}
        if cache is kv_cache.AUTO:
            assert set(data_free.assumed(planned, formats, more).inputs) == set(planned.layers)
            continue
        with pytest.raises(UnsupportedError, match="need calibration"):
            data_free.assumed(planned, formats, more)


def test_neither_torch_nor_transformers_is_imported() -> None:
    code = "import sys, builder.quantize.data_free; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(("shared", "projections", "taken"), [(0, 4, True), (2, 2, True), (2, 4, True), (0, 2, False)])
def test_layers_that_share_keys_need_no_scales_of_the_cache(shared: int, projections: int, taken: bool) -> None:
    """They may have projections all the same, which are not used."""
    config = {"architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 4, "num_kv_shared_layers": shared}
    architecture = catalog.of(config)
    copies = [Part(f"model.layers.{n}.self_attn.k_proj.weight", "BF16", (16, 16), "") for n in range(projections)]
    planned, formats = UnifiedPlan(architecture, "BF16", [], copies), ModelFormats(NVFP4, cache=kv_cache.FP8)
    if taken:
        assert len(data_free.assumed(planned, formats, config).cache) == projections
    else:
        with pytest.raises(UnsupportedError, match="need calibration"):
            data_free.assumed(planned, formats, config)
