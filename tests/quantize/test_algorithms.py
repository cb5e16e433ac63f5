"""quantization.algorithm in the writer: which tensors it changes, and that ModelOpt's sweep gives the same ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import exports
import families
import pytest
import torch
from safetensors.torch import load_file, save_file

from builder.core.errors import IntegrityError, UnsupportedError
from builder.core.output import Output
from builder.core.safetensors_io import Tensors
from builder.core.store import Store
from builder.formats import kv_cache, registry
from builder.formats.arithmetic import nvfp4, nvfp4_search
from builder.formats.assignment import ModelFormats
from builder.hub.snapshot import fetch
from builder.quantize import data_free, simulation, streamed_worker, unified_plan, worker, writer
from builder.quantize.modelopt import QuantizeRequest
from builder.quantize.source_weights import SourceModel
from builder.quantize.writer import Work
from builder.recipe import schema

pytestmark = pytest.mark.filterwarnings("ignore")  # ModelOpt's own
FORMATS = ModelFormats(registry.NVFP4, {registry.FP8: ("model.layers.1.mlp.down_proj",)}, kv_cache.FP8)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("algorithms") / "source"
    families.write("qwen3", directory)
    return directory


def write(source: Path, directory: Path, **work: Any) -> dict[str, torch.Tensor]:
    model = SourceModel.open(source)
    planned = unified_plan.plan(model.config, model.headers, model.dtype, FORMATS)
    writer.write(model, FORMATS, data_free.assumed(planned, FORMATS, model.config), directory, Work(**work))
    return load_file(directory / "model.safetensors")


def held(directory: Path) -> dict[str, bytes]:
    tensors = Tensors(directory)
    return {name: tensors.read(name) for name in tensors}


def test_a_search_changes_codes_and_block_scales_alone(source: Path, tmp_path: Path) -> None:
    by_max, by_search = write(source, tmp_path / "max"), write(source, tmp_path / "mse", algorithm="mse")
    assert by_max.keys() == by_search.keys()
    before, after = held(tmp_path / "max"), held(tmp_path / "mse")
    weights = load_file(next(source.glob("*.safetensors")))
    searched = 0
    for name, found in by_search.items():
        module = name.removesuffix("_scale")
        if name.endswith("weight_scale") and found.dtype == torch.float8_e4m3fn and found.dim() == 2:
            scale = by_search[f"{module}_scale_2"]
            packed, blocks, _ = nvfp4_search.quantize(weights[module], scale)
            assert torch.equal(found.view(torch.uint8), blocks.view(torch.uint8))
            assert torch.equal(by_search[module], packed)
            searched += not torch.equal(packed, by_max[module])
        elif not (name.endswith(".weight") and found.dtype == torch.uint8):
            assert after[name] == before[name], f"{name} stays as it is"
    assert searched > 5


def test_solved_layers_are_copied(source: Path, tmp_path: Path) -> None:
    """What another algorithm made of a layer takes its place; the others are packed."""
    module, by_max = "model.layers.0.mlp.up_proj", write(source, tmp_path / "max")
    codes = torch.randint_like(by_max[f"{module}.weight"], 256)
    blocks = by_max[f"{module}.weight_scale"].view(torch.uint8).flip(0).contiguous().view(torch.float8_e4m3fn)
    save_file({f"{module}.weight": codes, f"{module}.block_scale": blocks}, tmp_path / "solved.safetensors")
    made = write(source, tmp_path / "made", solved={module: tmp_path / "solved.safetensors"})
    assert torch.equal(made[f"{module}.weight"], codes)
    assert torch.equal(made[f"{module}.weight_scale"].view(torch.uint8), blocks.view(torch.uint8))
    before, after = held(tmp_path / "max"), held(tmp_path / "made")
    assert {name for name in before if before[name] != after[name]} == {f"{module}.weight", f"{module}.weight_scale"}


def test_a_solved_layer_of_another_model_is_rejected(source: Path, tmp_path: Path) -> None:
    module = "model.layers.0.mlp.up_proj"
    save_file({f"{module}.weight": torch.zeros(3, 3, dtype=torch.uint8)}, tmp_path / "solved.safetensors")
    with pytest.raises(IntegrityError, match=f"does not hold {module}.weight of this model"):
        write(source, tmp_path / "made", solved={module: tmp_path / "solved.safetensors"})
    assert not list(tmp_path.glob("made/*.safetensors"))


def test_every_backend_writes_the_same_weights(tmp_path: Path) -> None:
    """Without rows, layer by layer, and with ranges of ModelOpt: the weights depend on the weights alone."""
    source, rows = exports.MODELS["qwen3"], tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "The quick brown fox jumps over the lazy dog."}) + "\n")
    (tmp_path / "partial").mkdir()
    recipe = schema.resolve({"model.id": str(source), "gpu": "cpu", "quantization.algorithm": "mse"}).recipe
    store = Store(tmp_path / "out", Output("quiet"))
    asked = QuantizeRequest(recipe.quantization, recipe.calibration)
    free = data_free.write_data_free(fetch(recipe.model, store=store), asked, store=store)
    assert free.facts["algorithm"] == "mse"
    job = {
        "model": str(source), "rows": str(rows), "seq_len": 24, "batch_size": 1, "format": "nvfp4",
        "kv_cache_dtype": "fp8", "layers": {}, "trust_remote_code": False, "algorithm": "mse",
        "partial": str(tmp_path / "partial" / "one"),
    }  # fmt: skip
    for name, one in (("whole", worker), ("low", streamed_worker)):
        facts = one.run({**job, "destination": str(tmp_path / name)})
        assert (facts["algorithm"], facts["writer"]) == ("mse", "builder")
    found = [held(path / "unified") for path in (free.path, tmp_path / "whole", tmp_path / "low")]
    weights = [{name: data for name, data in one.items() if "weight" in name} for one in found]
    assert weights[0] == weights[1] == weights[2]


def test_what_only_modelopt_can_write_is_refused_before_it_is_imported(tmp_path: Path) -> None:
    """Experts that stay stacked in one tensor."""
    families.write("gpt_oss", tmp_path / "source")
    job = {"model": str(tmp_path / "source"), "destination": str(tmp_path / "made"), "kv_cache_dtype": "auto"}
    with pytest.raises(UnsupportedError, match="can't be chosen by algorithm mse"):
        worker.run({**job, "algorithm": "mse"})


@pytest.mark.skipif(exports.MODELOPT < (0, 47), reason="ModelOpt has no sweep of E4M3 scales")
def test_the_checkpoint_is_that_of_modelopts_sweep(source: Path, tmp_path: Path) -> None:
    """But for blocks of which two scales are equally good (tests/formats/test_nvfp4_search.py)."""
    simulation.enable_cpu_simulation()
    exports.export(exports.quantized(source, config="NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG"), tmp_path / "theirs")
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    ours = write(source, tmp_path / "ours", algorithm="mse")
    differing = blocks = 0
    for name, found in ours.items():
        if found.dtype != torch.float8_e4m3fn or found.dim() != 2 or not name.endswith("weight_scale"):
            continue
        module = name.removesuffix("_scale")
        other = theirs[name].view(torch.uint8) != found.view(torch.uint8)
        differing, blocks = differing + int(other.sum()), blocks + found.numel()
        assert torch.equal(ours[f"{module}_scale_2"], theirs[f"{module}_scale_2"])
        same = ~other.repeat_interleave(nvfp4.BLOCK // 2, -1)
        assert torch.equal(ours[module][same], theirs[module][same])
    assert blocks > 100
    assert differing <= 1e-3 * blocks
