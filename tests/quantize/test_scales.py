"""`--calibrate-scales`: what it writes into quantized checkpoints, and that it touches nothing else."""

from __future__ import annotations

import json
import logging
import shutil
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import exports
import pytest

from builder.architectures import catalog
from builder.calibration.rows import calibrate
from builder.checkpoint.layouts import read_json
from builder.core.errors import IntegrityError
from builder.core.output import Output
from builder.core.safetensors_io import NewTensor, Tensors, write
from builder.core.store import Store
from builder.formats import kv_cache
from builder.formats.registry import BF16, FP8, NVFP4, all_formats
from builder.hub.snapshot import fetch
from builder.model import streamed
from builder.preflight.prepare import prepare
from builder.quantize import scales, scales_worker, stored_scales, streamed_states, worker
from builder.quantize.data_free import write_data_free
from builder.quantize.modelopt import QuantizeRequest
from builder.recipe import schema

DATA = Path(__file__).parents[1] / "data"
TINY, MOE = DATA / "tiny-qwen3", DATA / "arch-variants" / "qwen3_moe"
pytestmark = pytest.mark.filterwarnings("ignore")  # ModelOpt's own, of mixtures and of exports
ENDS = (".input_scale", ".k_scale", ".v_scale")
JOB = {"seq_len": 128, "batch_size": 1, "trust_remote_code": False, "kv_cache_dtype": "fp8"}

Calibrated = Callable[..., tuple[Path, Path, dict[str, Any]]]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("".join((DATA / "eval" / "prose.jsonl").read_text().splitlines(keepends=True)[:8]))
    return file


@pytest.fixture(scope="module")
def checkpoint(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Path]]:
    """Makes a model's unified checkpoint with the worker, in this process."""
    show, handlers = warnings.showwarning, list(logging.getLogger("modelopt").handlers)
    made: dict[Any, Path] = {}

    def make(model: Path, fp8: tuple[str, ...] = (), whole: str = "nvfp4") -> Path:
        if (model, fp8, whole) not in made:
            directory = tmp_path_factory.mktemp("made")
            formats = {"format": whole, "layers": {"fp8": fp8}}
            worker.run({**JOB, **formats, "model": str(model), "rows": str(rows), "destination": str(directory)})
            made[model, fp8, whole] = directory / "unified"
        return made[model, fp8, whole]

    yield make
    warnings.showwarning = show
    logging.getLogger("modelopt").handlers = handlers


def without_scales(unified: Path, directory: Path) -> Path:
    """A copy that declares no KV cache and stores no scale of inputs or of the cache."""
    gone = dict.fromkeys(name for name in Tensors(unified) if name.endswith(ENDS))
    copy = exports.rewrite(unified, directory, gone)
    for name in ("hf_quant_config.json", "config.json"):
        said = json.loads((copy / name).read_text())
        said.get("quantization", {}).pop("kv_cache_quant_algo", None)
        said.get("quantization_config", {}).pop("kv_cache_scheme", None)
        (copy / name).write_text(json.dumps(said))
    return copy


def values(unified: Path) -> dict[str, float]:
    stored = Tensors(unified)
    return {n: struct.unpack("<f", stored.read(n))[0] for n in stored if n.endswith(ENDS)}


def others(unified: Path) -> dict[str, bytes]:
    stored = Tensors(unified)
    return {name: stored.read(name) for name in stored if not name.endswith(ENDS)}


def scales_of(unified: Path, directory: Path, rows: Path, **job: Any) -> tuple[dict[str, float], dict[str, Any]]:
    """The scales that a copy of a checkpoint gets, and the worker's facts."""
    copy = Path(shutil.copytree(unified, directory))
    facts = scales_worker.run({**JOB, "model": str(copy), "rows": str(rows), **job})
    assert others(copy) == others(unified), "weights and their scales"
    return values(copy), facts


FP8_LAYERS = ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj")


@pytest.mark.parametrize(
    ("model", "fp8", "whole"),
    [(TINY, (), "nvfp4"), (TINY, FP8_LAYERS, "nvfp4"), (MOE, (), "nvfp4"), (TINY, (), "int8_sq"), (TINY, (), "fp8")],
)
def test_scales_that_are_missing_are_near_those_of_modelopt(
    model: Path, fp8: tuple[str, ...], whole: str, checkpoint: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    """ModelOpt read its ranges from the BF16 weights, this from the rounded ones: that is all that differs."""
    original = checkpoint(model, fp8, whole)
    copy = without_scales(original, tmp_path / "copy")
    assert not values(copy)
    facts = scales_worker.run({**JOB, "model": str(copy), "rows": str(rows)})
    mine, theirs = values(copy), values(original)
    assert set(mine) == set(theirs)
    assert others(copy) == others(original), "weights and their scales"
    assert facts["changed_scales"] == len(mine) == facts["input_scales"] + facts["kv_scales"]
    compared = {name: mine[name] / theirs[name] for name in mine if not name.endswith((".k_scale", ".v_scale"))}
    assert all(0.5 < ratio < 2 for ratio in compared.values()), compared
    near = sorted(abs(ratio - 1) for ratio in compared.values())
    assert near[len(near) // 2] < 0.05
    for name in ("hf_quant_config.json", "config.json"):
        assert read_json(copy / name) == read_json(original / name)
    if model == TINY:
        first = [mine[f"model.layers.0.self_attn.{x}_proj.input_scale"] for x in "qkv"]
        assert len(set(first)) == 1
        # The input of the first layer does not depend on any rounded weight.
        assert first[0] == pytest.approx(theirs["model.layers.0.self_attn.q_proj.input_scale"], rel=1e-6)


@pytest.mark.parametrize(
    ("model", "fp8", "whole"),
    [(TINY, FP8_LAYERS, "nvfp4"), (MOE, (), "nvfp4"), (TINY, (), "int8_sq")],
)
def test_one_layer_at_a_time_gives_the_same_scales(
    model: Path, fp8: tuple[str, ...], whole: str, checkpoint: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    bare = without_scales(checkpoint(model, fp8, whole), tmp_path / "bare")
    expected, of_whole = scales_of(bare, tmp_path / "whole", rows)
    found, facts = scales_of(bare, tmp_path / "low", rows, partial=str(tmp_path / "partial" / "checkpoint-0"))
    assert found == expected
    assert any(name.endswith(".k_scale") for name in found)
    assert facts == of_whole
    auto = {"partial": str(tmp_path / "auto" / "checkpoint-0"), "kv_cache_dtype": "auto"}
    assert not any(
        name.endswith((".k_scale", ".v_scale")) for name in scales_of(bare, tmp_path / "kv", rows, **auto)[0]
    )


def test_a_killed_run_continues_at_its_layer(
    checkpoint: Callable[..., Path], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = scales_of(checkpoint(TINY), tmp_path / "whole", rows)
    partial, advance = str(tmp_path / "partial" / "checkpoint-0"), streamed.StreamedModel.advance
    ran: list[int] = []

    def killed(self: Any, index: int, *rest: Any) -> Any:
        ran.append(index)
        if index == 3 and ran.count(3) == 1:
            raise KeyboardInterrupt
        return advance(self, index, *rest)

    monkeypatch.setattr(streamed_states, "SAVE_SHARE", 0)  # after each layer, however short
    monkeypatch.setattr(streamed.StreamedModel, "advance", killed)
    with pytest.raises(KeyboardInterrupt):
        scales_of(checkpoint(TINY), tmp_path / "killed", rows, partial=partial)
    ran.clear()
    ran.append(3)
    assert scales_of(checkpoint(TINY), tmp_path / "again", rows, partial=partial)[0] == expected
    assert min(ran) == 3


def test_a_data_free_checkpoint_gets_measured_scales_and_keeps_its_weights(
    checkpoint: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    store = Store(tmp_path / "out", Output("quiet"))
    recipe = schema.resolve({"model.id": str(TINY), "gpu": "cpu", "calibration.samples": 0}).recipe
    asked = QuantizeRequest(recipe.quantization, recipe.calibration)
    free = write_data_free(fetch(recipe.model, store=store), asked, store=store).unified
    again = {"model.id": str(free), "gpu": "cpu", "calibration.scales": True}
    assert prepare(schema.resolve(again), store).calibration is not None
    copy = Path(shutil.copytree(free, tmp_path / "copy"))
    scales_worker.run({**JOB, "model": str(copy), "rows": str(rows)})
    assert others(copy) == others(free) == others(checkpoint(TINY))
    mine, theirs, rule = values(copy), values(checkpoint(TINY)), values(free)
    assert mine.keys() == theirs.keys() == rule.keys()
    assert all(0.5 < mine[name] / theirs[name] < 2 for name in mine)
    assert not set(mine.values()) & set(rule.values())


def test_a_second_run_changes_nothing_and_auto_leaves_the_cache(
    checkpoint: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    copy = without_scales(checkpoint(TINY), tmp_path / "copy")
    job = {**JOB, "model": str(copy), "rows": str(rows), "kv_cache_dtype": "auto"}
    facts = scales_worker.run(job)
    assert facts["kv_scales"] == 0
    assert not any(name.endswith((".k_scale", ".v_scale")) for name in Tensors(copy))
    before = (copy / "model.safetensors").read_bytes()
    assert scales_worker.run(job)["changed_scales"] == 0
    assert (copy / "model.safetensors").read_bytes() == before


def test_files_are_replaced_and_the_index_follows(tmp_path: Path) -> None:
    """Another copy of the checkpoint that shares files by links keeps its own."""
    directory = tmp_path / "unified"
    directory.mkdir()
    for n in range(2):
        weight = NewTensor(f"model.layers.{n}.mlp.up_proj.weight", "U8", (2, 8), [bytes(16)])
        old = [NewTensor("model.layers.0.mlp.up_proj.input_scale", "F32", (1,), [bytes(4)])] * (n == 0)
        write(directory / f"{n}.safetensors", [weight, *old], {"format": "pt"})
    weight_map = {
        name: f"{n}.safetensors" for n in range(2) for name in Tensors(directory, [directory / f"{n}.safetensors"])
    }
    (directory / stored_scales.INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    other = Path(shutil.copytree(directory, tmp_path / "other", copy_function=lambda a, b: Path(b).hardlink_to(a)))
    before = {path.name: path.read_bytes() for path in other.iterdir()}
    scales = {f"model.layers.{n}.mlp.up_proj.input_scale": 0.5 + n for n in range(2)}
    assert stored_scales.replace(directory, scales) == 2
    assert values(directory) == scales
    index = read_json(directory / stored_scales.INDEX)
    assert index["weight_map"]["model.layers.1.mlp.up_proj.input_scale"] == "1.safetensors"
    assert index["metadata"]["total_size"] == 2 * 16 + 2 * 4
    assert Tensors(directory)["model.layers.0.mlp.up_proj.input_scale"].shape == (1,)
    assert {path.name: path.read_bytes() for path in other.iterdir()} == before
    assert not list(directory.glob("*.new"))


@pytest.mark.parametrize("amax", [None, 0.0, float("nan"), float("inf")])
def test_a_range_that_is_none_is_an_error_with_the_layers_name(amax: float | None) -> None:
    layers = {"model.layers.0.mlp.down_proj": NVFP4}
    ranges = {} if amax is None else {"model.layers.0.mlp.down_proj": amax}
    with pytest.raises(IntegrityError, match=r"the inputs of model\.layers\.0\.mlp\.down_proj"):
        stored_scales.of_inputs(layers, ranges, catalog.of(read_json(TINY / "config.json")))


def test_layers_that_are_served_as_one_share_the_widest_range() -> None:
    layers = {f"model.layers.0.self_attn.{x}_proj": NVFP4 for x in "qkvo"} | {"model.layers.0.mlp.down_proj": FP8}
    ranges = dict(zip(layers, (1.0, 4.0, 2.0, 8.0, 448.0), strict=True))
    found = stored_scales.of_inputs(layers, ranges, catalog.of(read_json(TINY / "config.json")))
    assert [found[f"{name}.input_scale"] for name in layers] == [4 / 2688, 4 / 2688, 4 / 2688, 8 / 2688, 1.0]
    of_cache = stored_scales.of_cache(kv_cache.FP8, {"model.layers.0.self_attn": (448.0, 44.8)})
    assert of_cache == {
        "model.layers.0.self_attn.k_proj.k_scale": 1.0,
        "model.layers.0.self_attn.v_proj.v_scale": pytest.approx(0.1),
    }


def test_every_format_that_stores_a_scale_of_inputs_knows_its_range() -> None:
    for one in all_formats().values():
        stores = any(tensor.name == stored_scales.INPUT_SCALE for tensor in one.tensors)
        assert (one.input_range is not None) is stores, one.name
    assert BF16.input_range is None
    assert all(one.scale_range > 1 for one in kv_cache.FORMATS.values() if one.quantized)


@pytest.mark.slow
def test_the_worker_writes_them_and_says_what_it_saw(
    checkpoint: Callable[..., Path], rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = without_scales(checkpoint(TINY), tmp_path / "copy")
    store = Store(tmp_path / "store", Output("human"))
    part = schema.Calibration(data=str(rows), samples=8, seq_len=128)
    facts = scales.calibrate_scales(copy, calibrate(part, store=store), scales.ScalesRequest(part), store=store)
    assert values(copy) == pytest.approx(values(checkpoint(TINY)), rel=0.5)
    assert facts["input_scales"] == 42
    assert facts["max_rss"] > 0
    said = capsys.readouterr().err
    assert "42 scales of inputs and 12 of the KV cache, calibrated on 8 rows" in said
    assert "only 8 rows of text" in said
