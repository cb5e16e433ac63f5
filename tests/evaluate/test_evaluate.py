"""Evaluation of the fixture model in all its forms: BF16, ModelOpt's simulation, both layouts on disk, and served.

The real parts, run in this process where a run of its own would only import torch again.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import exports
import numpy as np
import pytest
import qwen2_outliers
import torch
from hub_server import Hub

from builder import pipeline
from builder.checkpoint.layouts import Checkpoint
from builder.core.errors import BuilderError, EvaluationError, IntegrityError, NotMeasurable, ServingError, UsageError
from builder.core.output import Output
from builder.core.safetensors_io import NewTensor, Tensors
from builder.core.store import Store, read
from builder.evaluate import datasets, memory, variants
from builder.evaluate import stage as evaluate_stage
from builder.evaluate.runners import triton, worker
from builder.evaluate.stage import Evaluation
from builder.evaluate.variants import Models
from builder.hub import client as hub_client
from builder.hub import snapshot as hub_snapshot
from builder.pipeline import Built
from builder.preflight.memory import Machine
from builder.quantize import kv_safety
from builder.quantize import worker as quantizer
from builder.recipe import schema
from builder.recipe.evaluation import KNOWN_SETS, RUNNERS
from builder.recipe.evaluation import Evaluation as Part
from builder.recipe.schema import Resolved

DATA = Path(__file__).parents[1] / "data"
TINY = DATA / "tiny-qwen3"
SETS = [str(DATA / "eval" / name) for name in ("prose.jsonl", "chat.jsonl")]
QUIET = Output("quiet")


def resolve(**more: Any) -> Resolved:
    """Short texts of the fixture, few rows to calibrate on."""
    flags = {
        "model.id": str(TINY),
        "gpu": "cpu",
        "calibration.samples": 6,
        "calibration.seq_len": 128,
        "quality.check": False,  # of builds whose quality is not what is tested
        "evaluation.data": SETS,
        "evaluation.texts": 10,
        "evaluation.max_tokens": 80,
        "evaluation.resamples": 200,
        "engine.flags.gather_context_logits": "enable",
        **{key.replace("__", "."): value for key, value in more.items()},
    }
    return schema.resolve(flags)


@pytest.fixture(scope="module", autouse=True)
def here() -> Iterator[None]:
    """Runners in this process, which has torch and ModelOpt loaded; the job goes through JSON as it does there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate_stage, "_run", lambda job, store: worker.run(json.loads(json.dumps(job))))
        yield


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("evaluate") / "artifacts", QUIET)


@pytest.fixture(scope="module")
def built(store: Store) -> Built:
    """As far as the repository, by the pipeline."""
    return pipeline.build(resolve(), store, until="repository")


@pytest.fixture(scope="module")
def models(built: Built) -> Models:
    return Models(built.snapshot, built.calibration, built.checkpoint, built.repository)


@pytest.fixture(scope="module")
def whole(models: Models, store: Store) -> Evaluation:
    """Everything there is to measure."""
    asked = resolve(evaluation__runners=list(RUNNERS), evaluation__compare_kv=True)
    return evaluate_stage.evaluate(models, asked.recipe, store=store)


def nll(store: Store, found: Evaluation, runner: str) -> np.ndarray:
    """Of every token of both data sets, in the order of the texts."""
    parts = []
    for path in sorted(store.root.glob("scores/*/manifest.json")):
        artifact = read(path.parent)
        assert artifact is not None
        parts.append((artifact.manifest["ingredients"], np.load(path.parent / "nll.npy")))
    texts = [facts["tokens"] for facts in found.sets[runner].values()]
    cache = "auto" if runner in (variants.KV_AUTO, variants.BF16.runner) else "fp8"
    name = "checkpoint" if runner == variants.KV_AUTO else runner
    ours = [column for made, column in parts if (made["runner"], made["kv_cache_dtype"]) == (name, cache)]
    return np.concatenate(sorted(ours, key=lambda column: texts.index(len(column))))


def test_every_form_has_the_same_tables(whole: Evaluation) -> None:
    assert list(whole.measured) == [*RUNNERS, variants.KV_AUTO]
    for runner, sets in whole.measured.items():
        assert list(sets) == ["prose", "chat", "overall"]
        assert {facts["texts"] for facts in whole.sets[runner].values()} == {10}
        for figures in sets.values():
            assert (("kl" in figures), ("score" in figures)) == (runner != "bf16",) * 2
            assert all(e.low <= e.value <= e.high or e.low == e.high for e in figures.values())
    assert not whole.collapsed
    assert not whole.not_measured


def test_quantization_costs_something_and_not_much(whole: Evaluation) -> None:
    """NVFP4 weights and activations lose some 3 % of perplexity on the fixture, in every form."""
    for runner in RUNNERS[1:]:
        figures = whole.measured[runner]["overall"]
        assert 93 < figures["score"].value < 100, runner
        assert 0.01 < figures["kl"].value < 0.08, runner
        assert 0.75 < figures["agreement"].value < 0.95, runner
        assert 0 < figures["flips"].value < 0.1, runner


def test_the_served_model_is_the_reference_bit_by_bit(store: Store, whole: Evaluation) -> None:
    """The same executor, asked through Triton: context logits travel as float32."""
    assert np.array_equal(nll(store, whole, "served"), nll(store, whole, "reference"))


def test_both_layouts_are_measured_as_they_are_served(store: Store, whole: Evaluation) -> None:
    """The Hugging Face layout in transformers and TensorRT-LLM's in the executor, with the same scales of the KV cache.
    What differs is the order of float32 sums, and near a boundary of NVFP4 or FP8 that decides which code is taken."""
    served, ours, bf16 = (nll(store, whole, runner) for runner in ("reference", "checkpoint", "bf16"))
    assert abs(float((ours - served).mean())) < 0.002
    noise, loss = (float(np.abs(x - served).mean()) for x in (ours, bf16))
    assert noise < 0.25 * loss


def test_modelopts_simulation_differs_by_the_scale_of_an_engines_cache(store: Store, whole: Evaluation) -> None:
    """There KV scales are 1 at least, by upstream's advice: FP8 keeps its relative precision, but takes other codes.
    Measured on the whole fixture: -0.0006 nats, with a standard error of 0.0014; here, on a twenty-fifth of it, five
    times that error. A token differs by 0.19 nats on average, and by 0.22 from BF16's. Under the scales that it has
    itself it has the checkpoint's logits (test_runners.py)."""
    simulated, ours, bf16 = (nll(store, whole, runner) for runner in ("simulated", "checkpoint", "bf16"))
    assert abs(float((ours - simulated).mean())) < 0.02
    assert float(np.abs(ours - simulated).mean()) < float(np.abs(bf16 - simulated).mean())


def test_in_little_memory_the_figures_are_the_same(whole: Evaluation, models: Models, tmp_path: Path) -> None:
    """Of data sets, runners and the gate's figures: one decoder layer at a time is in memory."""
    asked = resolve(evaluation__runners=["bf16", "checkpoint"], quantization__memory="low")
    found = evaluate_stage.evaluate(models, asked.recipe, store=Store(tmp_path / "artifacts", QUIET))
    assert found.measured == {runner: whole.measured[runner] for runner in ("bf16", "checkpoint")}


def test_the_way_to_measure_is_the_recipe_s_or_what_fits(models: Models, store: Store) -> None:
    snapshot, host = models.snapshot, Machine(disk=1 << 40, memory=1 << 40, available=1 << 40)

    def way(recipe: schema.Recipe, on: Machine = host) -> str:
        return memory.of_model(recipe, snapshot.path, snapshot.config, on)

    small = replace(host, memory=1 << 20)
    assert (way(resolve().recipe), way(resolve().recipe, small)) == ("whole", "low")
    assert way(resolve(quantization__memory="low").recipe) == "low"
    with pytest.raises(NotMeasurable, match="--memory low excludes"):
        memory.of_runner("simulated", models, resolve(quantization__memory="low").recipe, store)
    assert way(resolve(quantization__memory="whole").recipe, small) == "whole"


def test_a_second_evaluation_measures_nothing(
    whole: Evaluation, models: Models, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(job: Any, store: Store) -> None:
        raise AssertionError("everything was measured")

    monkeypatch.setattr(evaluate_stage, "_run", refuse)
    asked = resolve(evaluation__runners=list(RUNNERS), evaluation__compare_kv=True)
    again = evaluate_stage.evaluate(models, asked.recipe, store=store)
    assert again == whole
    kept = json.loads((again.path / "evaluation.json").read_text())
    assert kept["measured"]["served"]["prose"]["ppl"]["value"] == whole.measured["served"]["prose"]["ppl"].value


def test_a_wrong_scale_that_the_inspection_passes_is_caught_by_the_gate(
    models: Models, store: Store, tmp_path: Path
) -> None:
    """One layer's down projection with four times its global scale: finite, positive, plausible, and wrong."""
    assert models.checkpoint is not None
    name = "model.layers.3.mlp.down_proj.weight_scale_2"
    unified = models.checkpoint.unified
    value = np.frombuffer(Tensors(unified).read(name), np.float32) * 4
    exports.rewrite(unified, tmp_path / "unified", {name: NewTensor(name, "F32", (), [value.tobytes()])})
    broken = Models(models.snapshot, models.calibration, Checkpoint(tmp_path, "broken"))
    asked = resolve(evaluation__min_score=90.0, evaluation__max_kl=0.1)
    found = evaluate_stage.evaluate(broken, asked.recipe, store=store)
    with pytest.raises(EvaluationError, match=r"score of checkpoint on (prose|chat)") as caught:
        found.check()
    assert caught.value.exit_code == 4
    assert "KL of checkpoint on chat" in caught.value.why
    manifest = read(found.path)
    assert manifest is not None
    assert manifest.facts["verdict"]["passed"] is False
    good = evaluate_stage.evaluate(models, asked.recipe, store=store)
    assert good.verdict is not None
    assert good.verdict.passed
    good.check()


def test_a_server_that_dies_is_an_error_and_the_next_run_goes_on(
    models: Models, tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at the second data set's third text. What was finished is kept and not measured again."""
    other = Store(tmp_path / "artifacts", QUIET)
    asked = resolve(evaluation__runners=["served"], evaluation__texts=4)
    whole_ask, count = triton.Served._ask, []

    def dying(self: triton.Served, ids: Any) -> torch.Tensor:
        count.append(1)
        if len(count) == 4 * 3 + 3:  # each data set: 4 texts, and 4 beginnings twice
            self._server.child.kill()
        return whole_ask(self, ids)

    monkeypatch.setattr(triton.Served, "_ask", dying)
    with pytest.raises(ServingError, match=r"during the measurement|did not answer") as caught:
        evaluate_stage.evaluate(models, asked.recipe, store=other)
    assert "same command again" in caught.value.hint
    [kept] = other.root.glob("scores/*/manifest.json")
    before = kept.stat().st_mtime_ns
    monkeypatch.setattr(triton.Served, "_ask", whole_ask)
    found = evaluate_stage.evaluate(models, asked.recipe, store=other)
    assert list(found.measured["served"]) == ["prose", "chat", "overall"]
    assert kept.stat().st_mtime_ns == before
    assert "score" not in found.measured["served"]["prose"], "BF16 was not measured"


def test_an_engine_that_gathers_no_logits_is_not_measurable(models: Models, store: Store) -> None:
    """trtllm-build's default. Said so in its row; an error where nothing else was asked, or a gate needs it."""
    plain = resolve(engine__flags__gather_context_logits="disable")
    built = pipeline.build(plain, store, until="repository")
    ungathered = Models(built.snapshot, built.calibration, built.checkpoint, built.repository)
    asked = resolve(evaluation__runners=["bf16", "checkpoint", "served"])
    found = evaluate_stage.evaluate(ungathered, asked.recipe, store=store)
    assert set(found.measured) == {"bf16", "checkpoint"}
    assert "returns no prompt logits" in found.not_measured["served"]
    assert "gather_context_logits=enable" in found.not_measured["served"]
    found.check()
    with pytest.raises(NotMeasurable, match="served can't be measured") as caught:
        evaluate_stage.evaluate(ungathered, resolve(evaluation__runners=["bf16", "served"]).recipe, store=store).check()
    assert caught.value.exit_code == 4
    gated = resolve(evaluation__runners=["bf16", "served"], evaluation__min_score=1.0)
    with pytest.raises(EvaluationError, match="score of served was not measured"):
        evaluate_stage.evaluate(ungathered, gated.recipe, store=store)


def test_a_gate_on_a_served_model_that_gives_no_logits_is_refused_before_the_build(tmp_path: Path) -> None:
    asked = resolve(
        evaluation__runners=["bf16", "served"],
        evaluation__max_kl=0.1,
        engine__flags__gather_context_logits="disable",
    )
    store = Store(tmp_path / "artifacts", QUIET)
    with pytest.raises(UsageError, match="would not return prompt logits"):
        pipeline.build(asked, store)
    assert not store.done


def test_logits_that_no_answer_can_carry_are_not_measurable() -> None:
    with pytest.raises(NotMeasurable, match="do not fit into one gRPC message") as caught:
        triton.check({"target": "engine", "vocab_size": 151_936}, True, 4000, free=0)
    assert "evaluation.max_tokens=3531" in caught.value.hint
    triton.check({"target": "engine", "vocab_size": 151_936}, True, 3531, free=0)


# ---- bad input


def test_a_tokenizer_of_another_model_is_found_before_any_figure(tmp_path: Path) -> None:
    """The same tokens under other numbers, as where a tokenizer was retrained and the model not."""
    model = Path(shutil.copytree(TINY, tmp_path / "model"))
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    shuffled = np.random.default_rng(0).permutation(len(vocab)).tolist()
    tokenizer["model"]["vocab"] = dict(zip(vocab, shuffled, strict=True))
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    store = Store(tmp_path / "artifacts", QUIET)
    snapshot = hub_snapshot.fetch(schema.Model(id=str(model)), store=store)
    with pytest.raises(IntegrityError, match="its tokenizer belongs to another model"):
        evaluate_stage.evaluate(Models(snapshot), resolve(evaluation__runners=["bf16"]).recipe, store=store)
    assert not list(store.root.glob("scores/[!.]*"))


def lines(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "has no usable row"),
        ([{"text": ""}, {"text": "  "}], "has no usable row"),
        ([{"text": "too short"}, {"text": "this too"}], "All 2 texts of texts are too short"),
    ],
)
def test_nothing_to_score(models: Models, tmp_path: Path, rows: list[Any], says: str) -> None:
    asked = resolve(evaluation__runners=["bf16"], evaluation__data=[lines(tmp_path / "texts.jsonl", *rows)])
    with pytest.raises(UsageError, match=says) as caught:
        evaluate_stage.evaluate(models, asked.recipe, store=Store(tmp_path / "artifacts", QUIET))
    assert caught.value.hint
    assert "calib" not in str(caught.value)


def test_no_data_set_no_runner_and_no_room_are_refused() -> None:
    for flags in ({"evaluation__data": []}, {"evaluation__runners": ["bf61"]}, {"evaluation__runners": []}):
        with pytest.raises(UsageError, match="evaluation"):
            resolve(**flags)
    with pytest.raises(UsageError, match="No text would be left"):
        datasets.longest(Part(), 20, schema.Engine())
    with pytest.raises(UsageError, match="no quantized KV cache to compare"):
        variants.list_variants(resolve(evaluation__compare_kv=True, quantization__kv_cache_dtype="auto").recipe)


# ---- the data sets


class Words:
    """A tokenizer for rules: a token a word."""

    def __call__(self, text: str, verbose: bool) -> dict[str, list[int]]:
        return {"input_ids": list(range(len(text.split())))}


def test_short_texts_are_dropped_and_long_ones_cut(tmp_path: Path) -> None:
    rows = [{"text": "a " * n} for n in (3, 16, 15, 40, 17)]
    found = datasets.sequences(
        Path(lines(tmp_path / "rows.jsonl", *rows)), Words(), name="words", min_tokens=16, max_tokens=20
    )
    assert [len(ids) for ids in found.ids] == [16, 20, 17]
    assert (found.read, found.dropped, found.cut) == (5, 2, 1)
    assert found.starts == [0, 15, 34, 50], "the first token of a text is not scored"


def test_the_length_is_the_models_less_the_reserve_and_no_more_than_a_prompt() -> None:
    engine = schema.Engine(max_seq_len=4096, max_input_len=1024)
    assert datasets.longest(Part(), 32768, engine) == 4088
    assert datasets.longest(Part(), 2048, engine) == 2040
    assert datasets.longest(Part(max_tokens=99), 2048, engine) == 99
    assert datasets.longest(Part(runners=("bf16", "served")), 2048, engine) == 1024


def test_messages_are_lines_of_role_and_content() -> None:
    messages = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello.\nYou?"}]
    assert datasets.text_of({"messages": messages}) == "user: Hi?\nassistant: Hello.\nYou?"


def wikitext(hub: Hub, folder: Path, *texts: str) -> str:
    """A commit of WikiText-2 raw's shape that `main` names from now on."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    (folder / "wikitext-2-raw-v1").mkdir(parents=True)
    rows = pa.Table.from_pylist([{"text": text} for text in texts])
    pq.write_table(rows, folder / "wikitext-2-raw-v1" / "test-00000-of-00001.parquet")
    files = "data_files:\n  - split: test\n    path: wikitext-2-raw-v1/test-*"
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: wikitext-2-raw-v1\n  {files}\n---\n")
    return hub.add("Salesforce/wikitext", folder, repo_type="dataset")


def texts_of(store: Store, **values: Any) -> tuple[str, list[str]]:
    """The commit and the first two texts of WikiText-2 under these values of a data set."""
    one = {"data": "Salesforce/wikitext", **values}
    [texts] = datasets.read_texts(Part.model_validate({"texts": 2, "data": [one]}), store=store)
    assert texts.name == "wikitext"
    kept = [json.loads(line)["text"] for line in texts.path.read_text().splitlines()]
    return store.done[-1].facts["commit"], kept


def test_a_known_data_set_of_the_hub_is_read_at_the_commit_that_is_pinned(hub: Hub, tmp_path: Path) -> None:
    """WikiText-2 by its name: the usual configuration, split and column, whatever `main` has become since; empty lines
    are no texts."""
    pinned = KNOWN_SETS["Salesforce/wikitext"]["revision"]
    store = Store(tmp_path / "artifacts", QUIET)
    made = wikitext(hub, tmp_path / "then", "", " = Title = \n", "", "Words.\n", "More.\n")
    repo = hub.repos["dataset", "Salesforce/wikitext"]
    repo.commits[pinned] = repo.commits.pop(made)
    newer = wikitext(hub, tmp_path / "now", "Other words.\n", "And more.\n")
    assert texts_of(store) == (pinned, [" = Title = \n", "Words.\n"])
    asked = [request.path for request in hub.requests]
    assert any(pinned in path for path in asked)
    assert not any(newer in path or path.endswith("/main") for path in asked)
    assert texts_of(store, revision="main") == (newer, ["Other words.\n", "And more.\n"])


def test_a_hub_that_lacks_the_pinned_commit_is_told_with_the_way_out(hub: Hub, tmp_path: Path) -> None:
    wikitext(hub, tmp_path / "now", "Other words.\n", "And more.\n")
    with pytest.raises(BuilderError) as refused:
        texts_of(Store(tmp_path / "artifacts", QUIET))
    assert KNOWN_SETS["Salesforce/wikitext"]["revision"] in str(refused.value)
    assert "revision: main" in refused.value.hint


def test_what_is_evaluated_on_where_nothing_is_said() -> None:
    wikitext, ultrachat = Part().data
    assert (wikitext.data, wikitext.config, wikitext.split) == ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")
    assert (ultrachat.data, ultrachat.split) == ("HuggingFaceH4/ultrachat_200k", "test_sft")
    for one in (wikitext, ultrachat):  # pinned: a branch could move
        assert hub_client.COMMIT.fullmatch(str(one.revision))
    named = resolve(evaluation__data=["Salesforce/wikitext", {"data": "a/b", "split": "dev"}]).recipe.evaluation.data
    assert [(one.config, one.split) for one in named] == [("wikitext-2-raw-v1", "test"), (None, "dev")]


# ---- FP8 and keys with outliers


def test_an_fp8_cache_that_ruins_a_model_shows_beside_one_that_does_not(tmp_path: Path) -> None:
    """A Qwen2 with a bias on its keys, as in Qwen2.5: BF16 does not mind it, nor does NVFP4; the FP8 cache does."""
    texts = [json.loads(line) for line in Path(SETS[0]).read_text().splitlines()[:6]]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    model = qwen2_outliers.write(TINY, [tokenizer(row["text"])["input_ids"] for row in texts], tmp_path / "qwen2")
    store = Store(tmp_path / "artifacts", QUIET)
    snapshot = hub_snapshot.fetch(schema.Model(id=str(model)), store=store)
    assert "can ruin it" in (kv_safety.warning(snapshot.config, "fp8") or "")
    rows = lines(tmp_path / "rows.jsonl", *texts)
    job = {"model": str(model), "rows": rows, "seq_len": 64, "batch_size": 1, "trust_remote_code": False}
    summary = quantizer.run({**job, "kv_cache_dtype": "fp8", "destination": str(tmp_path / "made")})
    assert summary["large_kv"] > 0
    asked = resolve(
        model__id=str(model), evaluation__compare_kv=True, evaluation__data=SETS[:1], evaluation__min_score=90.0
    )
    found = evaluate_stage.evaluate(
        Models(snapshot, checkpoint=Checkpoint(tmp_path / "made", "qwen2")), asked.recipe, store=store
    )
    with_fp8, without = (found.measured[row]["prose"]["score"] for row in ("checkpoint", variants.KV_AUTO))
    assert without.value > 93
    assert with_fp8.high < 85
    assert found.verdict is not None
    assert len(found.verdict.failed) == 1
    assert found.verdict.failed[0].startswith("score of checkpoint on prose")


@pytest.mark.parametrize(
    ("config", "dtype", "warned"),
    [
        ({"model_type": "qwen2"}, "fp8", True),
        ({"model_type": "qwen2"}, "auto", False),
        ({"model_type": "llama", "attention_bias": True}, "fp8", True),
        ({"model_type": "llama", "attention_bias": False}, "fp8", False),
        ({"model_type": "qwen3", "attention_bias": True}, "fp8", False),
        ({"model_type": "glm4_moe", "attention_bias": True, "use_qk_norm": True}, "fp8", False),
    ],
)
def test_who_is_warned_of_an_fp8_cache(config: dict[str, Any], dtype: str, warned: bool) -> None:
    assert bool(kv_safety.warning(config, dtype)) == warned


def test_figures_that_are_no_numbers_are_none_in_json(whole: Evaluation) -> None:
    from dataclasses import replace

    from builder.evaluate.metrics import Estimate

    broken = replace(whole, measured={"bf16": {"prose": {"ppl": Estimate(math.inf, 1.0, math.nan)}}})
    told = json.loads(json.dumps(broken.as_dict(), allow_nan=False))
    assert told["measured"]["bf16"]["prose"]["ppl"] == {"value": None, "low": 1.0, "high": None}


def test_calibration_is_compared_with_none(built: Built, whole: Evaluation, store: Store) -> None:
    """`--against data-free`: the same recipe without calibration, on the same texts."""
    found = pipeline.measure(resolve(), store, against=["data-free"])
    ours, theirs = found.measured["checkpoint"]["overall"], found.measured["data-free"]["overall"]
    assert found.candidates == ["data-free"]
    assert theirs["kl_ratio"].value == pytest.approx(theirs["kl"].value / ours["kl"].value)
    assert 0.5 < theirs["kl_ratio"].low < theirs["kl_ratio"].high < 2
