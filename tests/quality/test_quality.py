"""The quality check of every build, and what follows from it: what is published, and what may be served."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import exports
import pytest

from builder import pipeline
from builder.checkpoint.layouts import read_json
from builder.cli import main
from builder.core.errors import EvaluationError, NotMeasurable
from builder.core.output import Output
from builder.core.safetensors_io import Tensors
from builder.core.store import Store, WouldRun, read
from builder.evaluate import memory as measuring
from builder.evaluate.metrics import Estimate
from builder.formats import kv_cache, registry
from builder.pipeline import Built
from builder.preflight import checks as preflight_checks
from builder.preflight import memory
from builder.preflight.memory import Machine
from builder.preflight.model_facts import ModelFacts
from builder.preflight.prepare import prepare
from builder.publish import links as publish_links
from builder.publish import verdict
from builder.publish.verdict import BuildVerdict
from builder.quality import check
from builder.quality.answers import ANSWER_TOKENS, PROMPTS
from builder.quality.check import Quality, Remedy
from builder.recipe import schema
from builder.report import gather, quality_summary

TINY = exports.DATA / "tiny-qwen3"
VARIANTS = exports.DATA / "arch-variants"
PROSE = exports.DATA / "eval" / "prose.jsonl"
SMALL = {"calibration.samples": 6, "calibration.seq_len": 64, "quality.texts": 12, "quality.max_tokens": 96}
FLAGS = ["--gpu", "cpu", *(word for key, value in SMALL.items() for word in ("--set", f"{key}={value}"))]


def resolve(model: Path = TINY, **values: Any) -> schema.Resolved:
    given = {key.replace("__", "."): value for key, value in values.items()}
    return schema.resolve({"model.id": str(model), "gpu": "cpu", **SMALL, **given})


def build(root: Path, *, model: Path = TINY, **values: Any) -> Built:
    return pipeline.build(resolve(model, **values), Store(root, Output("quiet")), until="repository")


def links(root: Path) -> dict[str, str]:
    return {path.name: os.readlink(path) for path in (root / "models").glob("*")}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Built]:
    """The bundled model as far as its repository, published."""
    root = tmp_path_factory.mktemp("quality")
    return root, build(root)


def test_the_bundled_model_passes_and_manifest_report_and_plan_say_so(built: tuple[Path, Built]) -> None:
    root, made = built
    found = made.quality
    assert found
    assert found.score is not None
    assert 93 < found.score < 100
    assert found.figures
    assert 0 < found.figures["kl"].value < 0.1
    assert found.figures["score"].low < found.score < found.figures["score"].high
    assert found.texts == {"bundled": 6, "held-out": 6}
    assert (found.runner, found.collapsed, found.remedies) == ("checkpoint", False, ())
    assert [one.prompt for one in found.answers] == [one["ask"] for one in PROMPTS]
    assert all(one.bf16 and one.quantized for one in found.answers)
    assert made.verdict == BuildVerdict("passed", (f"a score of {found.score:.2f}, at least 90 was asked",))
    assert made.link
    assert made.link.resolve() == (made.repository.path if made.repository else None)
    [manifest] = [json.loads(path.read_text()) for path in root.glob("verdict/*/manifest.json")]
    assert manifest["facts"] == {"status": "passed", "reasons": list(made.verdict.reasons), "by": "quality check"}
    [manifest] = [json.loads(path.read_text()) for path in root.glob("quality/*/manifest.json")]
    assert manifest["facts"]["figures"]["score"]["value"] == found.score
    assert list(manifest["files"]) == ["quality.json"], "column files are not kept"
    gathered = gather.gather(made.link)
    assert gathered.quality
    assert gathered.quality.figures == found.figures
    [row] = [row for row in plan(root) if row["stage"] == "quality"]
    assert row["state"] == "cached"
    assert row["why"].endswith(f"score {found.score:.2f}, at least 90 asked: passed")


def test_the_answers_are_those_of_what_is_served(built: tuple[Path, Built]) -> None:
    """Greedy answers of the executor that Triton runs, from the files that it loads: the same arithmetic, with other
    orders of float32 sums."""
    import torch
    from transformers import AutoTokenizer

    from builder.quality import worker
    from builder.reference.model import ReferenceModel

    _, made = built
    assert made.checkpoint
    assert made.quality
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    model, same = ReferenceModel.load(made.checkpoint.tensorrt_llm), 0
    ends = json.loads((TINY / "generation_config.json").read_text())["eos_token_id"]
    for asked, answer in zip(PROMPTS, made.quality.answers, strict=True):
        cache, ids = model.new_cache(), worker._prompt(tokenizer, asked)[1]
        tokens: list[int] = []
        while len(tokens) < ANSWER_TOKENS and not (tokens and tokens[-1] in ends):
            logits = model.forward(torch.tensor(tokens[-1:] or ids), cache)
            tokens.append(int(logits[-1].argmax()))
        same += tokenizer.decode(tokens, skip_special_tokens=True).strip() == answer.quantized
    assert same >= 2, "a near tie may fall otherwise"


def plan(root: Path, *argv: str) -> list[dict[str, str]]:
    from builder import plan as plans

    resolved = schema.resolve({"model.id": str(TINY), "gpu": "cpu", **SMALL}, sets=argv)
    return [
        {"stage": stage, "state": state, "why": why}
        for stage, state, why in plans.plan(resolved, Store(root, Output("quiet"), dry=True)).stages
    ]


def test_a_second_build_measures_nothing_and_moves_nothing(built: tuple[Path, Built]) -> None:
    root, made = built
    before = links(root)
    store = Store(root, Output("quiet"))
    again = pipeline.build(resolve(), store, until="repository")
    assert all(done.cached for done in store.done)
    assert {"quality", "verdict"} <= {done.stage for done in store.done}
    assert again.quality == made.quality
    assert links(root) == before


def test_the_page_and_the_card_show_it(built: tuple[Path, Built], tmp_path: Path) -> None:
    from builder.report.render import html, markdown

    _, made = built
    assert made.link
    assert made.quality
    page, card = (write(gather.gather(made.link)) for write in (html, markdown))
    for text in (page, card):
        assert "Quality check" in text
        assert f"{made.quality.score:.2f}" in text
        assert "What is the capital of France?" in text


def test_too_low_a_score_ends_with_4_names_the_next_commands_and_leaves_the_old_link(
    built: tuple[Path, Built], capsys: pytest.CaptureFixture[str]
) -> None:
    root, made = built
    before = links(root)
    argv = ["render", "--model", str(TINY), *FLAGS, "--output", str(root)]
    assert main.main([*argv, "--set", "quality.min_score=99.9", "--json"]) == 4
    said = capsys.readouterr()
    assert made.quality
    assert f"fails the quality check: its score is {made.quality.score:.2f}, below 99.9" in said.err
    assert "builder sensitivity --model" in said.err
    assert "--keep-fp8 auto:0.01 --sensitivity-data builtin:python-docs" in said.err
    told = json.loads(said.out)
    assert (told["repository"], told["verdict"]["status"]) == (None, "failed")
    assert told["quality"]["figures"]["score"]["value"] == made.quality.score
    assert links(root) == before
    assert made.repository
    verdict.check(made.repository.path)  # a build with another threshold accepted it
    assert main.main(argv) == 0, "and the old threshold still does"
    assert "quality    passed" in capsys.readouterr().out


def test_the_next_commands_can_be_typed(built: tuple[Path, Built], capsys: pytest.CaptureFixture[str]) -> None:
    root, _ = built
    argv = ["render", "--model", str(TINY), *FLAGS, "--output", str(root), "--set", "quality.min_score=99.9"]
    assert main.main(argv) == 4
    lines = [line.partition("#")[0].split() for line in capsys.readouterr().err.splitlines() if "  builder " in line]
    assert len(lines) >= 2
    for words in lines:
        parsed = main.parser().parse_args(words[1:])
        assert vars(parsed)["model.id"] == str(TINY)
        assert "quality.min_score=99.9" in parsed.set


def test_without_the_check_it_is_published_and_said_to_be_unchecked(tmp_path: Path) -> None:
    made = build(tmp_path, quality__check=False)
    assert made.quality is None
    assert made.verdict == BuildVerdict("not checked", ("--no-quality-check",))
    assert made.link
    assert not (tmp_path / "quality").exists()
    smoke = gather.SmokeReport.from_dict({"checks": [], "sample": None, "passed": True})
    judged = gather.judge(smoke, None, "reference", judged=made.verdict)
    assert (judged.status, judged.headline) == ("incomplete", "It serves; quality not checked")
    [row] = [row for row in plan(tmp_path, "quality.check=false") if row["stage"] == "quality"]
    assert row["state"] == "skipped"
    [row] = [row for row in plan(tmp_path) if row["stage"] == "quality"]
    assert row["state"] == "will run"
    assert "12 texts, BF16 against the checkpoint, must score 90; about" in row["why"]
    assert row["why"].endswith("of memory")


@pytest.mark.slow
def test_a_failed_gate_publishes_nothing_and_is_served_only_ungated(
    built: tuple[Path, Built], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A gate of the recipe takes the place of the check, and nothing is measured twice."""
    root, _ = built
    before, checks = links(root), list(root.glob("quality/*"))
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(PROSE.read_text().splitlines(keepends=True)[:4]))
    gate = {"evaluation__data": [str(texts)], "evaluation__min_score": 101.0}
    other = {"engine__max_batch_size": 2}  # another repository, of the same checkpoint
    made = build(root, **gate, **other)
    assert made.verdict
    assert made.verdict.status == "failed"
    assert "below 101" in made.verdict.reasons[0]
    assert (made.quality, made.link) == (None, None)
    assert links(root) == before
    assert list(root.glob("quality/*")) == checks
    assert made.repository
    path = str(made.repository.path)
    for command in (["serve", path], ["smoke", path], ["bench", path, "--concurrency", "1", "--requests", "1"]):
        assert main.main(command) == 4
        error = capsys.readouterr().err
        assert "failed the accuracy gate of its build: score of checkpoint on texts is" in error
        assert "--ungated" in error
    assert main.main(["smoke", path, "--ungated"]) == 0
    assert gather.judge(None, None, "reference", judged=made.verdict).headline == "It failed the accuracy gate"
    with pytest.raises(EvaluationError):
        verdict.check(made.repository.path)
    accepted = build(root, **{**gate, "evaluation__min_score": 50.0}, **other)
    assert accepted.link
    assert accepted.link.resolve() == made.repository.path
    verdict.check(made.repository.path)
    assert links(root).items() > before.items()


def test_a_plan_moves_no_link(built: tuple[Path, Built]) -> None:
    """Built A, built B under the same name, planned A: B is still what is served."""
    root, _ = built
    one, two = ({"name": "prod"}, {"name": "prod", "engine__max_batch_size": 4})
    build(root, **one)
    second = build(root, **two)
    assert second.link == root / "models" / "prod"
    target, inode = os.readlink(second.link), second.link.lstat().st_ino
    record = (root / "builds" / "prod.json").read_text()
    store = Store(root, Output("quiet"), dry=True)
    found, first = pipeline.stored(prepare(resolve(**one), store), store)
    assert first
    assert first.stage == "smoke"
    assert found[-1].stage == "repository"
    assert (os.readlink(second.link), second.link.lstat().st_ino) == (target, inode)
    assert (root / "builds" / "prod.json").read_text() == record


def test_a_plan_in_an_empty_output_makes_nothing(tmp_path: Path) -> None:
    assert plan(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_of_random_numbers_is_not_called_good(tmp_path: Path) -> None:
    """The BF16 model is as bad as the checkpoint, so the ratio says nothing."""
    made = build(tmp_path, model=VARIANTS / "llama")
    assert made.verdict
    assert made.verdict.status == "not checked"
    assert "no likelier than the same tokens shuffled" in made.verdict.reasons[0]
    store = Store(tmp_path, Output("quiet"))
    pipeline.build(resolve(VARIANTS / "llama"), store, until="repository")
    assert all(done.cached for done in store.done)


def test_what_does_not_fit_says_what_it_needs(built: tuple[Path, Built]) -> None:
    root, made = built
    assert made.calibration
    assert made.checkpoint
    assert made.prepared
    model = made.prepared.model
    host = Machine(disk=1 << 40, memory=1 << 20, available=1 << 20)
    store = Store(root, Output("quiet"), dry=True)
    found = check.check_quality(made.models, model, resolve().recipe, host, store=store)
    assert found.score is None
    assert found.unmeasured.startswith("it needs ")
    assert found.unmeasured.endswith("and this machine has 1.05 MB")
    needs = measuring.needs(model, resolve().recipe.quality.max_tokens).whole
    middle = Machine(disk=1 << 40, memory=needs + 1, available=needs)
    with pytest.raises(WouldRun):  # in BF16, as float32 would not fit: another measurement
        check.check_quality(made.models, model, resolve().recipe, middle, store=store)


def test_held_out_rows_are_the_next_ones_and_none_is_calibrated_on(built: tuple[Path, Built], tmp_path: Path) -> None:
    root, made = built
    assert made.calibration
    calibrated = [json.loads(line) for line in made.calibration.path.read_text().splitlines()]
    found = check._texts(resolve().recipe, Store(root, Output("quiet")))
    assert [len(rows) for rows in found.values()] == [6, 6]
    for rows in found.values():
        assert not [row for row in rows if row in calibrated]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"row {n}"}) + "\n" for n in range(9)))
    own = {"calibration__data": str(file), "calibration__samples": 7}
    found = check._texts(resolve(**own).recipe, Store(root, Output("quiet")))
    assert found["held-out"] == [{"text": "row 7"}, {"text": "row 8"}]
    assert len(found["bundled"]) == 10
    assert list(
        check._texts(resolve(**own, calibration__column="text", quality__texts=1).recipe, Store(root, Output("quiet")))
    ) == ["bundled"]


def test_the_bundled_texts_are_enough_and_are_not_those_of_the_bundled_calibration_set() -> None:
    here = Path(check.paths.data("configs"))
    texts = [line for line in (here / "quality" / "texts.jsonl").read_text().splitlines() if line]
    calibrated = set((here / "calibration" / "python-docs.jsonl").read_text().splitlines())
    assert len(texts) == resolve(quality__texts=32).recipe.quality.texts
    assert not calibrated.intersection(texts)
    assert not set(texts) & {
        line for path in (exports.DATA / "eval").glob("*.jsonl") for line in path.read_text().splitlines()
    }


def figures(score: float) -> Mapping[str, Estimate]:
    values = {"score": score, "kl": 0.4, "agreement": 0.6, "ppl": 30.0}
    return {name: Estimate(value, value, value) for name, value in values.items()}


@pytest.mark.parametrize(
    ("score", "limit", "fails"), [(90.0, 90, False), (89.99, 90, True), (math.nan, 90, True), (101.0, 90, False)]
)
def test_the_threshold(score: float, limit: float, fails: bool) -> None:
    assert bool(Quality(runner="checkpoint", figures=figures(score)).failure(limit)) == fails
    assert Quality(runner="checkpoint", figures=figures(99.0), collapsed=True).failure(limit)
    assert not Quality(unmeasured="too large").failure(limit), "that is no failure, and no pass either"


def test_the_smallest_remedy_that_is_enough_comes_first() -> None:
    tried = [
        Remedy(("--kv-cache-dtype", "auto"), 70.0, 0),
        Remedy(("--keep-fp8", "*.mlp.*"), 91.0, 500),
        Remedy(("--keep-fp8", "*.down_proj"), 92.0, 200),
        Remedy(("--keep-fp8", "*.down_proj", "--kv-cache-dtype", "auto"), 93.0, 200),
        Remedy(("--keep-fp8", "*.self_attn.*"), 80.0, 100),
    ]
    assert [one.score for one in quality_summary.ordered(tried, 90)] == [92.0, 93.0, 91.0, 80.0, 70.0]
    assert quality_summary.ordered(tried, 60)[0].score == 70.0
    failed = Quality(runner="checkpoint", figures=figures(67.0), remedies=tuple(tried))
    error = quality_summary.error(failed, 90, ["builder", "build", "--model", "a b"])
    assert error
    assert error.exit_code == 4
    lines = error.hint.splitlines()
    assert lines[1].startswith("builder build --model 'a b' --keep-fp8 '*.down_proj'    # estimated score 92")
    assert "builder sensitivity --model 'a b' --sensitivity-data builtin:python-docs" in error.hint
    assert "auto:0.1 " in error.hint
    assert "builder recommend --model 'a b' --max-kl 0.1    # finds the cheapest recipe" in error.hint
    assert "--algorithm" not in error.hint
    better = quality_summary.error(failed, 90, ["builder", "build", "--model", "a b"], better="mse")
    assert better
    assert "builder build --model 'a b' --algorithm mse    # rounds better in the same format" in better.hint
    assert quality_summary.error(failed, 60, []) is None


def test_one_acceptance_outweighs_rejections_and_nothing_known_is_no_rejection(tmp_path: Path) -> None:
    import report_store

    link = report_store.build(tmp_path)
    store = Store(tmp_path, Output("quiet"))
    verdict.check(link)
    made = {path.parent.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("*/*/manifest.json")}
    failed = BuildVerdict("failed", ("its score is 67.00, below 90 (BF16 = 100)",))
    verdict.keep(failed, [made["checkpoint"]["digest"]], {"min_score": 90}, store=store)
    with pytest.raises(EvaluationError, match=r"failed the quality check of its build: its score is 67\.00"):
        verdict.check(link)
    assert gather.gather(link).verdict.headline == "It failed the quality check"
    verdict.keep(BuildVerdict("not checked", ("--no-quality-check",)), [made["repository"]["digest"]], {}, store=store)
    verdict.check(link)
    found = gather.gather(link).verdict
    assert (found.status, found.headline) == ("incomplete", "It serves; quality not checked")
    verdict.check(tmp_path / "nowhere")
    assert read(link.resolve())


def test_the_estimated_cost_grows_with_model_and_texts() -> None:
    store = Store(Path("nowhere"), Output("quiet"), dry=True)
    host = memory.machine(Path.cwd())
    model = preflight_checks.read_model(resolve().recipe.model, store)
    took, needs = check.cost(model, resolve(quality__texts=32, quality__max_tokens=256).recipe, host)
    less = check.cost(model, resolve().recipe, host)
    assert 10 < took < 30
    assert less[0] < took
    assert less[1] < needs < 1 << 30
    assert publish_links.MODELS


def test_a_family_without_a_runner_for_its_checkpoint_is_measured_by_simulation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mixture that multiplies with its experts in a way that the runner `checkpoint` does not know."""
    import torch

    from builder.evaluate.variants import Models, Variant, runner_job
    from builder.quality import worker as quality_worker
    from builder.quantize import expert_inputs

    monkeypatch.setattr(expert_inputs, "is_joined", lambda _: False)
    asked = resolve(VARIANTS / "qwen3_moe")
    store = Store(tmp_path, Output("quiet"))
    made = pipeline.build(asked, store, until="checkpoint")
    models = Models(made.snapshot, made.calibration, made.checkpoint)
    jobs = [
        runner_job(Variant(name, name, kv_cache.FP8), models, asked.recipe, store).job
        for name in ("checkpoint", "simulated")
    ]
    with torch.inference_mode(), quality_worker._first(json.loads(json.dumps(jobs))) as (label, runner):
        assert label == "simulated"
        assert runner.vocab_size > 0
    with pytest.raises(NotMeasurable, match="is not a linear layer"), quality_worker._first(jobs[:1]):
        pass


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("nvfp4", {"--kv-cache-dtype", "--keep-fp8"}),
        ("w4a16_nvfp4", {"--kv-cache-dtype", "--keep-fp8"}),
        ("fp8", {"--kv-cache-dtype", "--keep-bf16"}),
        ("fp8_pc_pt", {"--kv-cache-dtype", "--keep-bf16"}),
        ("int4_awq", {"--kv-cache-dtype"}),  # the BF16 model's weights don't belong behind its norms
    ],
)
def test_remedies_can_be_combined_with_the_format(name: str, flags: set[str]) -> None:
    source = TINY
    tensors = {one: (info.dtype, info.shape) for one, info in Tensors(source).items()}
    model = ModelFacts(read_json(source / "config.json"), tensors, number_format=registry.get(name))
    found = check._candidates(model, kv_cache.FP8)
    assert {word for one in found for word in one["flags"] if word.startswith("--")} == flags
    assert all(one["nbytes"] > 0 for one in found if one["modules"])
    for one in found:
        values: dict[str, Any] = {"model.id": str(source), "gpu": "cpu", "quantization.format": name}
        for flag, value in zip(one["flags"][::2], one["flags"][1::2], strict=True):
            key = f"quantization.{flag[2:].replace('-', '_')}"
            values[key] = [*values[key], value] if isinstance(values.get(key), list) else [value]
        values |= {key: value[0] for key, value in values.items() if key.endswith("kv_cache_dtype")}
        schema.resolve(values)  # the recipe takes it
