"""What each layer loses: against the same number computed otherwise, resumed, and the choice that holds a budget."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import exports
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from builder import pipeline
from builder.checkpoint import validate
from builder.checkpoint.layouts import hf_quant_config, read_json
from builder.clean import removal
from builder.clean.reachability import Request
from builder.cli import main
from builder.core.errors import BuilderError, IntegrityError, UnsupportedError, UsageError
from builder.core.output import Output
from builder.core.safetensors_io import NewTensor, Tensors, write
from builder.core.store import Store, WouldRun
from builder.evaluate.sensitivity import stage as sensitivity_stage
from builder.evaluate.sensitivity import weight_error
from builder.evaluate.sensitivity import worker as measuring
from builder.formats import algorithms, kv_cache, registry
from builder.formats.arithmetic import nvfp4
from builder.formats.arithmetic.dtypes import read
from builder.formats.assignment import ModelFormats
from builder.formats.declared import declared
from builder.formats.registry import BF16
from builder.preflight import memory
from builder.preflight.model_facts import ModelFacts
from builder.quantize import exclude, modelopt, stored_model, worker, writer
from builder.quantize.ranges import Ranges
from builder.quantize.simulation import enable_cpu_simulation
from builder.quantize.source_weights import SourceModel
from builder.recipe import schema

LLAMA, TINY = exports.MODELS["llama"], exports.MODELS["qwen3"]
PROSE = exports.DATA / "eval" / "prose.jsonl"
Job = dict[str, Any]


def facts(source: Path, kept: tuple[str, ...] = ()) -> ModelFacts:
    tensors = {name: (info.dtype, info.shape) for name, info in Tensors(source).items()}
    return ModelFacts(read_json(source / "config.json"), tensors, {"bf16": kept} if kept else {})


GROUPS = {name: list(modules) for name, modules in exclude.groups(exclude.linears(facts(LLAMA).tensors)).items()}


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., Job]:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(PROSE.read_text().splitlines(keepends=True)[:5]))

    def make(**changed: Any) -> Job:
        standard: Job = {
            "model": str(LLAMA),
            "texts": str(rows),
            "calibration": {"rows": str(rows), "seq_len": 64, "batch_size": 1},
            "lengths": {"min_tokens": 2, "max_tokens": 60},
            "groups": GROUPS,
            "layers": {},
            "kv_cache_dtype": "fp8",
            "format": "nvfp4",
            "algorithm": "max",
            "trust_remote_code": False,
            "dtype": "auto",
            "batch_tokens": 4096,
            "top": 1 << 20,  # all of the vocabulary: the KL is exact
            "budget": None,
            "proxy": False,
            "results": str(tmp_path / "results.jsonl"),
            "scratch": str(tmp_path),
        }
        return {**standard, **changed}

    return make


def kl_by_hand(job: Job, group: str | None) -> float:
    """Mean KL of ModelOpt's model with only this group quantized (None: all, and the cache), text by text."""
    from modelopt.torch.export import unified_export_hf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    others = [name for name, members in GROUPS.items() if group not in (None, name) for name in members]
    model, rows = worker.load({**job, **job["calibration"]})
    cache = kv_cache.FP8 if group is None else kv_cache.AUTO
    cache = cache if kv_cache.get(job["kv_cache_dtype"]).quantized else kv_cache.AUTO
    worker.calibrate(model, rows, ModelFormats(registry.get(job["format"]), {BF16: others}, cache))
    enable_cpu_simulation()
    with torch.inference_mode():
        unified_export_hf.requantize_resmooth_fused_llm_layers(model)
    model, plain = model.float(), AutoModelForCausalLM.from_pretrained(LLAMA, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(LLAMA)
    parts = []
    for line in Path(job["texts"]).read_text().splitlines():
        ids = tokenizer(json.loads(line)["text"], return_tensors="pt").input_ids[:, :60]
        with torch.no_grad():
            p, q = (m(ids, use_cache=False).logits[0, :-1].double().log_softmax(-1) for m in (plain, model))
        parts.append((p.exp() * (p - q)).sum(-1))
    return float(torch.cat(parts).mean())


def test_a_groups_loss_is_that_of_a_model_in_which_it_alone_is_quantized(job: Callable[..., Job]) -> None:
    found = measuring.run(job())
    results = found["results"]
    assert list(results) == [measuring.WHOLE, measuring.KV_CACHE, *GROUPS]
    for group in ("model.layers.0.self_attn.qkv_proj", "model.layers.1.mlp.gate_up_proj"):
        assert results[group]["kl"] == pytest.approx(kl_by_hand(job(), group), rel=1e-3)
    assert results[measuring.WHOLE]["kl"] == pytest.approx(kl_by_hand(job(), None), rel=1e-3)
    assert results[measuring.WHOLE]["kl"] > max(results[group]["kl"] for group in GROUPS) > 0
    assert all(0.5 < one["agreement"] <= 1 for one in results.values())
    assert set(found["output_errors"]) == set(found["weight_errors"]) == set(GROUPS)
    assert all(0 < error < 0.2 for error in found["output_errors"].values())
    assert all(0.08 < error < 0.11 for error in found["weight_errors"].values())


def test_inputs_stay_as_they_are_in_a_format_of_weights_alone(job: Callable[..., Job]) -> None:
    group, other = "model.layers.0.self_attn.qkv_proj", "model.layers.1.mlp.gate_up_proj"
    asked = job(format="w4a16_nvfp4", kv_cache_dtype="auto", groups={name: GROUPS[name] for name in (group, other)})
    results = measuring.run(asked)["results"]
    assert results[group]["kl"] == pytest.approx(kl_by_hand(asked, group), rel=1e-3)


def test_a_run_that_died_goes_on_where_it_was(job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    """Found results are taken as they are; a line that was half written is measured again."""
    results = Path(job()["results"])
    first, second, *_ = GROUPS
    kept = {"name": first, "kl": 123.0, "agreement": 1.0}
    results.write_text(json.dumps(kept) + '\n{"name": "' + second + '", "kl": 45')
    measured: list[str] = []
    score = measuring.Meter._score

    def listed(self: measuring.Meter, label: str, *rest: Any, **named: Any) -> Any:
        measured.append(label)
        return score(self, label, *rest, **named)

    monkeypatch.setattr(measuring.Meter, "_score", listed)
    found = measuring.run(job())
    assert found["results"][first]["kl"] == 123.0
    assert found["results"][second]["kl"] < 1
    assert measured == ["BF16", measuring.WHOLE, measuring.KV_CACHE, *(g for g in GROUPS if g != first)]
    monkeypatch.setattr(measuring, "Simulated", None)  # all is there: the model is not even loaded
    assert measuring.run(job()) == found


def test_the_proxy_measures_no_kl(job: Callable[..., Job]) -> None:
    found = measuring.run(job(proxy=True))
    assert found["results"] == {}
    assert set(found["output_errors"]) == set(GROUPS)
    assert found["tokens"] > 100


def test_the_quantizers_are_off_but_for_what_is_measured(job: Callable[..., Job]) -> None:
    from transformers import AutoModelForCausalLM

    model, ids = measuring.Simulated(job()), torch.arange(5, 60)[None]
    plain = AutoModelForCausalLM.from_pretrained(LLAMA, dtype=torch.float32).eval()
    with torch.no_grad():
        before = model.model(ids).logits
        with model.quantized(measuring.Quantized(list(GROUPS), cache=True)):
            assert not torch.equal(model.model(ids).logits, before)
        assert torch.equal(model.model(ids).logits, before)
        assert torch.equal(plain(ids).logits, before)


def test_nan_is_no_loss(job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(measuring.Simulated):
        def __init__(self, job: Job) -> None:
            super().__init__(job)
            self.model.model.layers[1].mlp.down_proj.weight.data[3, 3] = float("nan")

    monkeypatch.setattr(measuring, "Simulated", Broken)
    with pytest.raises(IntegrityError, match="NaN or Inf"):
        measuring.run(job())


def test_layers_without_a_module_are_told(job: Callable[..., Job]) -> None:
    with pytest.raises(UnsupportedError, match="are not separate modules"):
        measuring.run(job(groups={**GROUPS, "experts": ["model.layers.0.mlp.experts.0.up_proj"]}))


class Ledger:
    """In place of the Meter: KLs by a rule, and how often each was asked for."""

    tokens = 100

    def __init__(self, losses: dict[str, float], cache: float) -> None:
        self.losses, self.cache, self.asked = losses, cache, 0

    def kl(self, name: str, what: measuring.Quantized, label: str = "") -> float:
        self.asked += 1
        return sum(self.losses[group] for group in what.groups) + self.cache * what.cache


@example([0.001], 0.05, 0.03125, True)  # 0.051000000000000004: more than 0.051
@given(st.lists(st.floats(0.001, 1), min_size=1, max_size=40), st.floats(0, 1), st.floats(0.001, 30), st.booleans())
def test_as_few_layers_are_kept_as_hold_the_budget(
    losses: list[float], cache: float, budget: float, fp8_kv: bool
) -> None:
    named = {f"layer {n}": loss for n, loss in enumerate(losses)}
    meter = Ledger(named, cache)
    order = sorted(named, key=lambda name: -named[name])[: len(named) - 1]
    asked = {
        "order": order,
        "groups": {n: [n] for n in named},
        "budget": budget,
        "kv_cache_dtype": "fp8" if fp8_kv else "auto",
        "rest": "because",
    }
    asked["kept_format"] = "bf16"

    def kl(number: int) -> float:
        return meter.kl("", measuring.Quantized([n for n in named if n not in order[:number]], cache=fp8_kv))

    if min(kl(0), kl(len(order))) > budget:
        with pytest.raises(UnsupportedError, match="can't be reached") as caught:
            measuring.select(meter, asked)  # type: ignore[arg-type]
        most = float(caught.value.hint.split("auto:")[1].split(",")[0])
        assert kl(len(order)) <= most <= 1.2 * kl(len(order))
        assert ("--kv-cache-dtype auto" in caught.value.hint) == fp8_kv
        return
    meter.asked = 0
    found = measuring.select(meter, asked)  # type: ignore[arg-type]
    number = len(found["kept"])
    assert found["kept"] == order[:number]
    assert found["kl"] == kl(number) <= budget
    assert number == 0 or kl(number - 1) > budget
    assert meter.asked < 14


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [([1, 2, 3, 4], [10, 20, 30, 99], 1), ([1, 2, 3], [3, 2, 1], -1), ([1, 1, 2], [3, 3, 5], 1), ([1, 1], [2, 3], 0)],
)
def test_rank_correlation(x: list[float], y: list[float], expected: float) -> None:
    assert sensitivity_stage.spearman(x, y) == pytest.approx(expected)


def test_weight_errors_are_those_of_the_number_format() -> None:
    """q, k and v under one global scale, as they are exported; each tensor by the formula."""
    tensors, groups = Tensors(TINY), exclude.groups(exclude.linears(facts(TINY).tensors))
    found = weight_error.weight_errors(tensors, groups)
    members = groups["model.layers.3.self_attn.qkv_proj"]
    weights = torch.cat([read(tensors, f"{name}.weight") for name in members])
    back = nvfp4.dequantize(*nvfp4.quantize(weights), torch.float64)
    expected = float((back - weights.double()).norm() / weights.double().norm())
    assert found["model.layers.3.self_attn.qkv_proj"] == pytest.approx(expected, rel=1e-5)
    assert len(found) == 24


def test_a_weight_that_is_no_number_has_no_error_but_is_one(tmp_path: Path) -> None:
    names, whole = ("l.mlp.gate_proj", "l.mlp.up_proj"), torch.ones(4, 32)
    broken = whole.clone()
    broken[1, 7] = torch.nan
    parts = [
        NewTensor(f"{name}.weight", "F32", (4, 32), [weight.numpy().tobytes()])
        for name, weight in zip(names, (whole, broken), strict=True)
    ]
    write(tmp_path / "model.safetensors", parts)
    with pytest.raises(IntegrityError, match=r"up_proj\.weight holds NaN"):
        weight_error.weight_errors(Tensors(tmp_path), {"gate_up": names})


def resolved(model: Path, **flags: Any) -> schema.Resolved:
    standard = {"model.id": str(model), "gpu": "cpu", "sensitivity.data": str(PROSE), "sensitivity.texts": 12}
    standard |= {"calibration.samples": 8, "calibration.seq_len": 64}
    return schema.resolve({**standard, **flags})


def test_without_texts_the_proxy_reads_the_files_and_starts_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path, Output("quiet"))
    asked = schema.resolve({"model.id": str(TINY), "gpu": "cpu"})
    found = pipeline.measure_layers(asked, store, proxy=True)
    assert {loss.kl for loss in found.losses} == {None}
    assert all(loss.proxy == loss.weight_error for loss in found.losses)
    assert [done.stage for done in store.done] == ["snapshot"]
    with pytest.raises(UsageError, match="no texts") as caught:
        pipeline.measure_layers(asked, store)
    assert "--sensitivity-data" in caught.value.hint


def test_what_was_measured_outlives_a_run_that_died_and_no_other_recipe_takes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, results = Store(tmp_path, Output("quiet")), []

    def dies(job: Job, *rest: Any) -> Any:
        found = Path(job["results"])
        results.append(found)
        with open(found, "a") as file:
            file.write("a result\n")
        raise KeyboardInterrupt

    monkeypatch.setattr(sensitivity_stage, "_run", dies)
    for changed in ({}, {}, {"sensitivity.texts": 11}, {"quantization.keep_bf16": "*.o_proj"}):
        with pytest.raises(KeyboardInterrupt):
            pipeline.measure_layers(resolved(LLAMA, **changed), store)
    assert [results.count(path) for path in results] == [2, 2, 1, 1]
    assert results[0].read_text() == "a result\n" * 2
    with pytest.raises(KeyboardInterrupt):
        pipeline.measure_layers(resolved(LLAMA), Store(tmp_path, Output("quiet"), force=["sensitivity"]))
    assert results[-1] == results[0]
    assert results[0].read_text() == "a result\n", "forced: begun anew"
    assert not list((tmp_path / "sensitivity").iterdir())
    kept = removal.plan(tmp_path, Request())
    assert {entry.path for entry in kept.keep} >= set(results), "hours of work: they stay until they are old"
    assert not removal.carry_out(removal.plan(tmp_path, Request(older_than=0)))
    assert not list((tmp_path / "partial").iterdir())


def test_a_plan_of_auto_needs_no_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the measuring does, and says so."""
    monkeypatch.setattr(modelopt, "library_versions", lambda *names: dict.fromkeys(names, "absent"))
    asked = resolved(LLAMA, **{"quantization.keep_bf16": "auto:0.1"})
    store = Store(tmp_path, Output("quiet"))
    with pytest.raises(UnsupportedError, match="Quantizing needs torch"):
        pipeline.build(asked, store, until="checkpoint")
    with pytest.raises(WouldRun, match="sensitivity"):
        pipeline.build(asked, Store(tmp_path, Output("quiet"), dry=True), until="checkpoint")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[sensitivity_stage.Sensitivity, Store]:
    """The tiny Qwen3 by the stage itself, in its child process."""
    store = Store(tmp_path_factory.mktemp("store"), Output("quiet"))
    return pipeline.measure_layers(resolved(TINY), store), store


def test_the_stage_tells_the_losses_and_is_found_again(measured: tuple[sensitivity_stage.Sensitivity, Store]) -> None:
    found, store = measured
    assert len(found.losses) == 24
    assert found.whole is not None
    assert found.kv_cache is not None
    # Losses add up, more or less: the sum of those of the layers is near that of the whole.
    assert 0.5 < found.whole / sum(loss.kl or 0 for loss in found.losses) < 2
    assert found.worst[0].name == "model.layers.0.mlp.gate_up_proj"
    assert found.correlation["output_error"] > 0.7
    for loss in found.losses:
        members = exclude.groups(exclude.linears(facts(TINY).tensors))[loss.name]
        asked = memory.Serving(max_batch_size=1, max_input_len=8, max_seq_len=16, max_num_tokens=16)
        assert loss.bytes == memory.price(facts(TINY, members), asked, BF16)
    told = json.loads(found.path.read_text())
    assert {"name", "layer", "kl", "proxy", "bytes"} <= set(told["layers"][0])
    assert not list((store.root / "partial").iterdir())
    again = Store(store.root, Output("quiet"))
    assert pipeline.measure_layers(resolved(TINY), again) == found
    assert all(done.cached for done in again.done)
    with pytest.raises(WouldRun, match="sensitivity: forced"):
        pipeline.measure_layers(resolved(TINY), Store(store.root, Output("quiet"), force=["sensitivity"], dry=True))


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "builder", *argv], capture_output=True, text=True)


@pytest.mark.slow
def test_auto_keeps_what_holds_the_budget_and_the_plan_knows_the_price(
    measured: tuple[sensitivity_stage.Sensitivity, Store],
) -> None:
    found, store = measured
    assert found.whole is not None
    budget = found.whole / 2
    argv = ["--model", str(TINY), "--gpu", "cpu", "--output", str(store.root), "--calib-samples", "8"]
    argv += ["--calib-seq-len", "64", "--sensitivity-data", str(PROSE), "--sensitivity-texts", "12"]
    argv += ["--keep-bf16", f"auto:{budget}"]

    def plan() -> Any:
        """As JSON; what is found in the store is nothing to wait for."""
        done = run("plan", *argv, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    before = plan()
    assert before["kept"] == {"open_choice": True, "layers": {}, "bytes": None}
    states = {stage["stage"]: stage["state"] for stage in before["stages"]}
    assert (states["sensitivity"], states["selection"], states["checkpoint"]) == ("cached", "will run", "will run")
    assert "has not chosen its layers yet" in run("plan", *argv).stdout

    done = run("quantize", *argv, "--json")
    assert done.returncode == 0, done.stderr
    stages = {stage["stage"]: Path(stage["path"]) for stage in json.loads(done.stdout)["stages"]}
    chosen = json.loads((stages["selection"] / "manifest.json").read_text())["facts"]
    assert chosen["kl"] <= budget < chosen["kl_before"] == found.whole
    assert 0 < len(chosen["modules"]) < 42

    after = plan()
    assert set(after["kept"]["layers"]["bf16"]) == set(chosen["modules"])
    layouts = validate.inspect(stages["checkpoint"]).layouts
    assert layouts["unified"].linears["kept"] == len(chosen["modules"])
    assert after["sizes"]["checkpoint"] == sum(layouts["tensorrt_llm"].nbytes.values())
    assert after["kept"]["bytes"]["bf16"] == after["sizes"]["checkpoint"] - before["sizes"]["checkpoint"] > 0
    assert {stage["state"] for stage in after["stages"][:6]} == {"cached"}


def test_the_command_shows_a_table_and_what_to_type_next(measured: tuple[sensitivity_stage.Sensitivity, Store]) -> None:
    found, store = measured
    argv = ["--model", str(TINY), "--gpu", "cpu", "--calib-samples", "8", "--calib-seq-len", "64", "--sensitivity-data"]
    argv += [str(PROSE), "--sensitivity-texts", "12", "--output", str(store.root)]
    done = run("sensitivity", *argv)
    assert done.returncode == 0, done.stderr
    title, header, *lines = done.stdout.splitlines()
    assert title.startswith("# loss by layer")
    assert header.split("\t")[0] == "layer"
    assert lines[0].split("\t")[0] == found.worst[0].name
    assert len(lines) == 24 + 4
    assert "with only the KV cache quantized" in lines[24]  # of any format
    command = shlex.split(lines[-1].removeprefix("next"))
    assert main.parser().parse_args(command[1:]).command == "quantize"
    assert set(argv) < set(command)
    assert command[-1].startswith("auto:0.0")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("auto", "not a budget"),
        ("auto:", "not a budget"),
        ("auto:much", "not a budget"),
        ("auto:-0.1", "not a budget"),
        ("auto:0", "not a budget"),
        ("auto:nan", "not a budget"),
        ("auto:inf", "not a budget"),
        (("auto:0.1", "auto:0.2"), "given twice"),
    ],
)
def test_a_budget_is_a_positive_number(value: str | tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolved(TINY, **{"quantization.keep_bf16": value})


def test_auto_without_texts_names_the_flag() -> None:
    with pytest.raises(BuilderError, match="--sensitivity-data"):
        schema.resolve({"model.id": str(TINY), "gpu": "cpu", "quantization.keep_bf16": "auto:0.1"})
    asked = resolved(TINY, **{"quantization.keep_bf16": ["auto:0.1", "*.down_proj"]}).recipe.quantization
    assert (asked.kept_budget, asked.kept_patterns) == (0.1, ("*.down_proj",))


def test_weights_are_rounded_by_the_recipe_s_algorithm(job: Callable[..., Job], tmp_path: Path) -> None:
    """As a checkpoint has them that the writer made; others stay as they are."""
    source = SourceModel.open(LLAMA)
    linears = exclude.linears(facts(LLAMA).tensors)
    seen = Ranges({name: 1.0 for name in linears})
    formats = ModelFormats(registry.NVFP4, {}, kv_cache.AUTO)
    model = measuring.Simulated(job(algorithm="mse"))
    group = next(name for name, members in GROUPS.items() if len(members) == 3)
    for algorithm in ("mse", "max"):
        writer.write(source, formats, seen, tmp_path / algorithm, writer.Work(algorithm=algorithm))
    written = {
        name: stored_model.Dequantized(Tensors(tmp_path / name), formats_of(tmp_path / name), torch.float32)
        for name in ("mse", "max")
    }
    with torch.no_grad(), model.quantized(measuring.Quantized([group])):
        for name in GROUPS[group]:
            module = model.model.get_submodule(name)
            rounded = module.weight_quantizer(module.weight)
            assert torch.equal(rounded, written["mse"].tensor(f"{name}.weight"))
            assert not torch.equal(rounded, written["max"].tensor(f"{name}.weight"))
    module = model.model.get_submodule(GROUPS[group][0])
    assert torch.equal(module.weight_quantizer(module.weight), module.weight)


def formats_of(unified: Path) -> Any:
    return declared(hf_quant_config(unified)["quantization"])


@pytest.mark.parametrize(
    ("algorithm", "number_format", "used", "said"),
    [
        ("max", "nvfp4", "max", ""),
        ("mse", "nvfp4", "mse", "by mse"),
        ("gptq", "nvfp4", "mse", "by mse, not by gptq: with gptq layers lose less than this"),
    ],
)
def test_what_rounds_with_the_rows_is_measured_by_mse_and_said(
    algorithm: str, number_format: str, used: str, said: str
) -> None:
    asked = {"model.id": str(TINY), "gpu": "sm120", "quantization.algorithm": algorithm}
    recipe = schema.resolve({**asked, "quantization.format": number_format}).recipe
    assert sensitivity_stage.algorithm_of(recipe, facts(TINY)).name == used
    assert sensitivity_stage._rounding_note(used, algorithm) == said


def test_searched_weights_have_the_smaller_error() -> None:
    tensors, groups = Tensors(TINY), exclude.groups(exclude.linears(facts(TINY).tensors))
    by_max, by_mse = (
        weight_error.weight_errors(tensors, groups, registry.NVFP4, one) for one in (algorithms.MAX, algorithms.MSE)
    )
    assert all(by_mse[group] < by_max[group] for group in groups)
