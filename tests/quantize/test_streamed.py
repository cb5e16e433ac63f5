"""Calibration with one decoder layer in memory: ModelOpt's ranges and bytes, and killed runs that continue."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from builder.calibration.rows import Calibration, calibrate
from builder.checkpoint import layouts
from builder.core.errors import UnsupportedError
from builder.core.output import Output
from builder.core.safetensors_io import Tensors
from builder.core.store import Store, key_of
from builder.formats import kv_cache, registry
from builder.formats.assignment import ModelFormats
from builder.hub.snapshot import Snapshot, fetch
from builder.model import streamed
from builder.preflight.model_facts import ModelFacts
from builder.quantize import (
    calibrated,
    data_free,
    exclude,
    experts,
    quantizers,
    streamed_calibration,
    streamed_states,
    streamed_worker,
)
from builder.quantize.modelopt import QuantizeRequest
from builder.quantize.ranges import Ranges
from builder.quantize.source_weights import SourceModel
from builder.quantize.streamed import check, quantize_streamed
from builder.quantize.streamed_states import PRELUDE, CarriedStates
from builder.recipe import schema
from builder.recipe.quantization import Quantization
from tests.support import exports, families
from tests.support.peak_memory import growth

TINY = exports.MODELS["qwen3"]
# One of each kind: joined experts, inputs before the first layer, state spaces, latent attention, linear attention.
KINDS = ("qwen3_moe", "gemma4_text", "nemotron_h", "deepseek_v3", "qwen3_next")


def streamed_ranges(directory: Path, partial: Path, **options: Any) -> tuple[Ranges, dict[str, Any]]:
    """What calibration layer by layer finds, with the batches of `exports.quantized`."""
    model = opened(directory)
    batches = [ids % model.config.vocab_size for ids in exports.batches()]
    return streamed_calibration.calibrate(model, batches, facts(directory).written, partial, **options)


def opened(directory: Path) -> streamed.StreamedModel:
    model = streamed.open_decoder({"model": str(directory), "trust_remote_code": False}, None, 64)
    if hasattr(model.config, "_experts_implementation"):
        model.config._experts_implementation = "eager"
    return model


def facts(directory: Path) -> ModelFacts:
    config = json.loads((directory / "config.json").read_text())
    return ModelFacts(config, {name: (info.dtype, info.shape) for name, info in Tensors(directory).items()})


def check_ranges(directory: Path, partial: Path) -> None:
    """They equal those of ModelOpt's calibration of the whole model."""
    found, extra = streamed_ranges(directory, partial)
    whole = exports.quantized(directory, kept=quantizers.NEVER)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        routed = experts.RoutedTokens(extra.get("experts", {}), extra.get("experts_see_all", False))
        assert experts.widen_ranges(whole, routed) == extra.get("rare_experts", {})
    expected, model = calibrated.ranges(whole, facts(directory).written), facts(directory)
    linears = exclude.linears(model.written, model.architecture)
    assert {name: found.inputs.get(name) for name in linears} == {name: expected.inputs.get(name) for name in linears}
    assert linears
    assert found.cache == expected.cache
    assert found.cache


@pytest.mark.parametrize("model", exports.MODELS)
def test_ranges_equal_modelopt_s(model: str, tmp_path: Path) -> None:
    check_ranges(exports.MODELS[model], tmp_path / "checkpoint-0")


@pytest.mark.parametrize("family", KINDS)
def test_ranges_of_families_equal_modelopt_s(family: str, tmp_path: Path) -> None:
    written(family, tmp_path)
    check_ranges(tmp_path, tmp_path / "partial" / "checkpoint-0")


@pytest.mark.slow
@pytest.mark.parametrize("family", [one for one in families.MODELS if one not in KINDS])
def test_ranges_of_every_family_equal_modelopt_s(family: str, tmp_path: Path) -> None:
    written(family, tmp_path)
    check_ranges(tmp_path, tmp_path / "partial" / "checkpoint-0")


def written(family: str, directory: Path) -> None:
    try:
        families.write(family, directory)
    except ValueError as error:
        pytest.skip(f"not in this transformers: {error}")
    if not families_with_modelopt(family):
        pytest.skip("the installed ModelOpt can't calibrate it")


def families_with_modelopt(family: str) -> bool:
    """Whether the installed ModelOpt calibrates a family: 0.37 fails on two."""
    return exports.MODELOPT >= (0, 40) or family not in ("nemotron", "qwen2_moe")


class Killed(BaseException):
    """Stands in for a kill: nothing after it runs."""


def killed_at(monkeypatch: pytest.MonkeyPatch, layer: int, batch: int) -> list[int]:
    """Lets the next calibration die when it comes to a batch of a layer. Returns the list of layers that run."""
    ran: list[int] = []
    advance = streamed.StreamedModel.advance

    def dying(self: Any, index: int, state: Any, hidden: Any) -> Any:
        ran.append(index)
        if index == layer and ran.count(index) == batch + 1:
            raise Killed
        return advance(self, index, state, hidden)

    monkeypatch.setattr(streamed.StreamedModel, "advance", dying)
    return ran


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize(("layer", "batch"), [(0, 0), (3, 1), (5, 1)])
def test_a_killed_run_continues_at_its_layer(
    on_disk: bool, layer: int, batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = streamed_ranges(TINY, tmp_path / "whole", on_disk=on_disk)
    monkeypatch.setattr(streamed_states, "SAVE_SHARE", 0)  # after each layer, however short
    with monkeypatch.context() as patch:
        killed_at(patch, layer, batch)
        with pytest.raises(Killed):
            streamed_ranges(TINY, tmp_path / "killed", on_disk=on_disk)
    with monkeypatch.context() as patch:
        ran = killed_at(patch, -1, 0)
        assert streamed_ranges(TINY, tmp_path / "killed", on_disk=on_disk) == whole
    assert ran[0] == (layer if layer or on_disk else 0)
    assert len(ran) == (6 - layer) * len(exports.batches())


@pytest.mark.parametrize("damage", ["line", "states", "checksum", "other rows", "half a line", "temporary file"])
def test_damaged_partial_results_never_change_the_ranges(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = streamed_ranges(TINY, tmp_path / "whole")
    monkeypatch.setattr(streamed_states, "SAVE_SHARE", 0)
    with monkeypatch.context() as patch:
        killed_at(patch, 4, 0)
        with pytest.raises(Killed):
            streamed_ranges(TINY, tmp_path / "killed")
    lines, states = tmp_path / "killed.jsonl", tmp_path / "killed.safetensors"
    content, data = lines.read_bytes(), states.read_bytes()
    if damage == "line":
        lines.write_bytes(content.replace(b'"layer": 2', b'"layer": 9'))
    elif damage == "half a line":
        lines.write_bytes(content + b'{"layer": 4, "res')
    elif damage == "states":
        states.write_bytes(data[:-100])
    elif damage == "checksum":
        states.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "other rows":
        save_file({"000000": torch.zeros(2, 64, 64, dtype=torch.bfloat16)}, states, {"layer": "3"})
    else:
        (tmp_path / ".killed.safetensors.1.tmp").write_bytes(data)
    assert streamed_ranges(TINY, tmp_path / "killed") == whole
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk_costs_the_possibility_to_resume_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    whole = streamed_ranges(TINY, tmp_path / "whole")
    monkeypatch.setattr(streamed_states, "write", full)
    assert streamed_ranges(TINY, tmp_path / "full") == whole
    assert not (tmp_path / "full.safetensors").exists()
    with pytest.raises(OSError, match="space"):
        streamed_ranges(TINY, tmp_path / "disk", on_disk=True)


def test_states_leave_a_device_that_runs_out_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for a GPU: the CPU under another name, whose memory is full once."""
    whole, failed = streamed_ranges(TINY, tmp_path / "whole"), list[int]()
    advance = streamed.StreamedModel.advance

    def full_once(self: Any, index: int, state: Any, hidden: Any) -> Any:
        if index == 2 and not failed:
            failed.append(index)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return advance(self, index, state, hidden)

    monkeypatch.setattr(streamed.StreamedModel, "advance", full_once)
    monkeypatch.setattr(
        streamed_calibration._Run,
        "_new_states",
        lambda run, *_: CarriedStates(run._partial, torch.device("cpu:0")),
    )
    assert streamed_ranges(TINY, tmp_path / "stand-in") == whole
    assert failed


@pytest.mark.parametrize(("rows", "hint"), [(4, "batch_size=2"), (1, "--calib-seq-len")])
def test_what_to_do_about_a_layer_that_does_not_fit(rows: int, hint: str) -> None:
    error = streamed_worker.known(torch.OutOfMemoryError("CUDA out of memory. Tried"), {"batch_size": rows})
    assert isinstance(error, UnsupportedError)
    assert hint in error.hint


def test_nan_in_a_weight_is_named(tmp_path: Path) -> None:
    families.write("qwen3", tmp_path)
    file, name = tmp_path / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(file)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(FloatingPointError, match=r"layers.1.mlp.down_proj") as caught:
        streamed_ranges(tmp_path, tmp_path / "checkpoint-0")
    error = streamed_worker.known(caught.value, {"model": str(tmp_path), "batch_size": 1})
    assert error is not None
    assert name in error.why


@pytest.mark.parametrize(("family", "number_format"), [("qwen3", "nvfp4_awq"), ("gpt_oss", "nvfp4")])
def test_what_needs_modelopt_is_refused_before_anything_is_computed(
    family: str, number_format: str, tmp_path: Path
) -> None:
    families.write(family, tmp_path)
    formats = ModelFormats(registry.get(number_format), {}, kv_cache.FP8)
    with pytest.raises(UnsupportedError, match=r"ModelOpt|calibration data") as caught:
        check(SourceModel.open(tmp_path), formats)
    assert "--memory" in caught.value.hint


def test_a_size_that_is_no_multiple_of_16_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "MODELS", {"qwen3": {"intermediate_size": 120}})
    families.write("qwen3", tmp_path)
    with pytest.raises(UnsupportedError, match="2 linear layers") as caught:
        check(SourceModel.open(tmp_path), ModelFormats(registry.get("nvfp4"), {}, kv_cache.FP8))
    assert "layers.1.mlp.down_proj.weight [64, 120]" in caught.value.why


def inputs(store: Store, rows: Path, model: Path = TINY) -> tuple[Snapshot, Calibration, QuantizeRequest]:
    part = schema.Calibration(data=str(rows), samples=4, seq_len=64)
    calibration = calibrate(part, store=store)
    return fetch(schema.Model(id=str(model)), store=store), calibration, QuantizeRequest(Quantization(), part)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    texts = (exports.DATA / "eval" / "prose.jsonl").read_text().splitlines(keepends=True)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(texts[:4]))
    return file


def test_the_stage_resumes_after_a_kill_and_leaves_nothing(rows: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store", Output("quiet"))
    snapshot, calibration, asked = inputs(store, rows)
    made = quantize_streamed(snapshot, calibration, asked, store=store)
    assert made.facts["backend"] == "streamed"
    assert made.facts["writer"] == "builder"
    assert made.facts["quantized_linears"] == 6 * 7
    assert not list((store.root / "partial").iterdir())
    job = json.loads(Path(made.facts["job"]).read_text())
    again = {**job, "destination": str(tmp_path / "again"), "partial": str(tmp_path / "partial" / "checkpoint-0")}
    (tmp_path / "job.json").write_text(json.dumps(again))
    kill_after_a_layer(tmp_path / "job.json", Path(again["partial"]))
    ran = subprocess.run([sys.executable, "-c", IMPORTED, tmp_path / "job.json"], check=True, capture_output=True)
    assert ran.stdout.decode().split() == ["torch"]
    for layout in ("unified/model.safetensors", "tensorrt_llm/rank0.safetensors"):
        assert (tmp_path / "again" / layout).read_bytes() == (made.path / layout).read_bytes()


@pytest.mark.parametrize("rule", ["fails", "lacks an attention"])
def test_what_can_t_be_written_ahead_is_written_in_the_end(
    rule: str, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, assumed = Store(tmp_path / "store", Output("quiet")), data_free.assumed
    made = quantize_streamed(*inputs(store, rows), store=store)
    job, destination = json.loads(Path(made.facts["job"]).read_text()), tmp_path / "again"

    def other(*given: Any) -> Ranges:
        if rule == "fails":
            raise UnsupportedError("The rule does not fit.")
        found = assumed(*given)
        return Ranges(found.inputs, dict(list(found.cache.items())[1:]))

    monkeypatch.setattr(data_free, "assumed", other)
    facts = streamed_worker.run({**job, "destination": str(destination), "partial": str(tmp_path / "partial" / "one")})
    assert {path.name for path in destination.iterdir()} == {"unified", "tensorrt_llm"}
    for path in (path for path in destination.rglob("*") if path.is_file()):
        assert path.read_bytes() == (made.path / path.relative_to(destination)).read_bytes()
    differing = {name for name in facts if facts[name] != made.facts[name]}
    assert differing <= {"seconds"}


def test_a_worker_that_fails_does_not_wait_for_the_second_layout(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, begun, ended = Store(tmp_path / "store", Output("quiet")), threading.Event(), threading.Event()
    made = quantize_streamed(*inputs(store, rows), store=store)
    job, original = json.loads(Path(made.facts["job"]).read_text()), layouts.write_if_served

    def write(unified: Path, config: Any, second: Path, done: Callable[[int], object]) -> str | None:
        begun.set()
        while not ended.wait(0.01):
            done(1)
        return original(unified, config, second)

    def fails(*_: Any) -> None:
        assert begun.wait(60)
        threading.Timer(20, ended.set).start()
        raise MemoryError

    monkeypatch.setattr(layouts, "write_if_served", write)
    monkeypatch.setattr(streamed_worker, "calibrate", fails)
    with pytest.raises(MemoryError):
        streamed_worker.run({**job, "destination": str(tmp_path / "a"), "partial": str(tmp_path / "partial" / "one")})
    assert not ended.is_set()
    assert not list((tmp_path / "a").iterdir())


# Runs the worker's job here, and names those of the large libraries that it imported.
IMPORTED = """
import json, sys
from builder.quantize import streamed_worker
streamed_worker.run(json.load(open(sys.argv[1])))
print(*({"torch", "transformers", "accelerate", "modelopt", "safetensors"} & sys.modules.keys()))
"""


def worker_of(job: Path) -> list[str]:
    return [sys.executable, "-m", "builder.quantize.streamed_worker", str(job)]


def kill_after_a_layer(job: Path, partial: Path) -> None:
    """Starts a worker and kills it once the states after a layer are saved."""
    with subprocess.Popen(worker_of(job), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        while child.poll() is None and not partial.with_suffix(".safetensors").exists():
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    assert len(partial.with_suffix(".jsonl").read_bytes().splitlines()) >= 2


def test_results_of_another_source_or_of_other_rows_are_never_used(rows: Path, tmp_path: Path) -> None:
    """Partial results have the key of everything that changes them."""
    from builder.quantize import streamed as stage

    store, names = Store(tmp_path / "store", Output("quiet")), set[str]()
    changed = tmp_path / "changed"
    changed.mkdir()
    for path in TINY.iterdir():
        (changed / path.name).write_bytes(path.read_bytes())
    file = next(changed.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    for model, text in ((TINY, None), (changed, None), (TINY, "Other rows of text, of which there are few.")):
        if text:
            rows.write_text(json.dumps({"text": text}) + "\n")
        snapshot, calibration, asked = inputs(store, rows, model)
        names.add(key_of(stage.STAGE, stage._ingredients(snapshot, calibration, asked)))
    assert len(names) == 3


DEEP = """
import torch
from builder.model import streamed
from builder.quantize import streamed_calibration
model = streamed.open_model({"model": sys.argv[1], "trust_remote_code": False})
before = peak()
ids = [torch.arange(64)[None] for _ in range(2)]
streamed_calibration.calibrate(model, ids, [], Path(sys.argv[1]) / "partial" / "checkpoint-0")
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 4096, "vocab_size": 512}
    grown, layer = {}, 2 * (3 * 512 * 4096 + 512 * 16 * 12)
    for depth in (4, 40):
        directory = tmp_path / str(depth)
        changed = {"qwen3": {**sizes, "num_hidden_layers": depth}}
        monkeypatch.setattr(families, "MODELS", changed)
        families.write("qwen3", directory)
        grown[depth] = growth(DEEP, directory)
    assert grown[40] - grown[4] < layer
    assert grown[40] < 10 * layer  # of 40; torch's own first use of its kernels is among it


def test_states_in_memory_and_on_disk_are_the_same(tmp_path: Path) -> None:
    states = [torch.randn(2, 5, 8).bfloat16(), torch.randn(1, 3, 8).bfloat16()]
    headers = [streamed_states.header(state) for state in states]
    for on_disk in (False, True):
        carried = CarriedStates(tmp_path / f"checkpoint-{on_disk}", torch.device("cpu"), on_disk=on_disk)
        carried.resume([tuple(state.shape) for state in states], torch.bfloat16)
        carried.step(PRELUDE, headers, states.__getitem__)
        carried.record(PRELUDE, {})
        for layer in range(3):
            carried.step(layer, headers, lambda number, carried=carried: carried.get(number) * 2)  # type: ignore[misc]
            carried.record(layer, {})
        assert all(torch.equal(carried.get(number), state * 8) for number, state in enumerate(states))
