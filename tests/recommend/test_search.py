"""`builder recommend`: what it tries, in which order, and that what it says was measured.

The recipe is data-free, so that nothing is calibrated; the workers run in this process.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.architectures import catalog
from builder.cli import main
from builder.core.errors import EvaluationError, UnsupportedError, UsageError
from builder.core.output import Output
from builder.core.store import Store, artifacts
from builder.evaluate import stage as evaluate_stage
from builder.evaluate.gate import surely_within
from builder.evaluate.metrics import Estimate
from builder.evaluate.mixtures import stage as mixtures
from builder.evaluate.mixtures import worker as mixtures_worker
from builder.evaluate.parts import stage as parts
from builder.evaluate.parts import worker as parts_worker
from builder.evaluate.runners import worker as runners
from builder.recipe import schema
from builder.recipe.schema import Resolved
from builder.recommend import recipe_file, recommendation
from builder.recommend.candidates import Candidate
from builder.recommend.kept import KeptSearch
from builder.recommend.recommendation import Recommendation, recommend
from builder.recommend.request import Request
from builder.recommend.search import _bisect
from builder.recommend.trials import Trial

DATA = Path(__file__).parents[1] / "data"
TINY = DATA / "tiny-qwen3"
PROSE = str(DATA / "eval" / "prose.jsonl")
JOBS: list[str] = []
# Data-free on these texts: nvfp4 .033, with mse .029; w4a16_nvfp4 .017; fp8 .0017.
BASE: Mapping[str, Any] = {
    "model.id": str(TINY),
    "gpu": "cpu",
    "calibration.samples": 0,
    "quality.check": False,
    "sensitivity.texts": 2,
    "sensitivity.max_tokens": 32,
    "evaluation.data": [PROSE],
    "evaluation.texts": 8,
    "evaluation.max_tokens": 48,
}


def resolve(max_kl: float | None, **more: Any) -> Resolved:
    limit = {} if max_kl is None else {"evaluation.max_kl": max_kl}
    return schema.resolve({**BASE, **limit, **{key.replace("__", "."): value for key, value in more.items()}})


def run(max_kl: float, store: Store, *, max_bytes: int | None = None, **more: Any) -> Recommendation:
    user = resolve(max_kl, **more)
    again = Store(store.root, Output("quiet"))
    return recommend(user, Request(user.recipe.evaluation.limits, max_bytes), store=again)


@pytest.fixture(scope="module", autouse=True)
def here() -> Iterator[None]:
    def inside(worker: Any, name: str) -> Any:
        def work(job: Any, store: Store) -> Any:
            JOBS.append(name)
            return json.loads(json.dumps(worker.run(json.loads(json.dumps(job)))))

        return work

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixtures, "_run", inside(mixtures_worker, "mixtures"))
        patch.setattr(parts, "_run", inside(parts_worker, "parts"))
        patch.setattr(evaluate_stage, "_run", inside(runners, "scores"))
        yield


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("recommend") / "artifacts", Output("quiet"))


@pytest.fixture(scope="module")
def mixed(store: Store) -> Recommendation:
    """NVFP4 that is to lose half as much: no algorithm is enough, so layers are kept."""
    return run(0.02, store, quantization__format="nvfp4", quantization__kv_cache_dtype="fp8")


def test_the_first_that_surely_meets_the_budget_ends_the_search(store: Store) -> None:
    found = run(0.08, store)
    assert [one.label for one in found.outcome.trials] == ["nvfp4, KV fp8"]
    winner = found.outcome.winner
    assert winner is not None
    assert winner.figures["kl"].high <= 0.08
    assert "nvfp4, KV fp8: of what surely meets KL <= 0.08 the cheapest" in found.reason


def test_layers_are_kept_where_no_algorithm_is_enough(mixed: Recommendation) -> None:
    winner, trials = mixed.outcome.winner, mixed.outcome.trials
    assert winner is not None
    assert [one.met for one in trials] == [*[False] * (len(trials) - 1), True]
    assert winner.candidate.settings.kept_format == "fp8"
    assert 0 < len(winner.candidate.settings.kept) < 42
    plain = trials[0].candidate
    assert plain.nbytes < winner.candidate.nbytes < 1.3 * plain.nbytes


def test_a_mixture_is_measured_as_its_build_is(mixed: Recommendation, store: Store) -> None:
    """Its figures come from two checkpoints, and the build that confirms them from a third."""
    made = [one.facts for one in artifacts(store.root) if one.stage == "mixtures" and "figures" in one.facts]
    winner = mixed.outcome.winner
    assert winner is not None
    groups = {name.rpartition(".")[0] for name in winner.candidate.settings.kept}
    [facts] = [one for one in made if one["met"] and {name.rpartition(".")[0] for name in one["groups"]} == groups]
    for metric, figure in winner.figures.items():
        if metric in facts["figures"]:
            assert figure.value == pytest.approx(facts["figures"][metric]["value"], rel=1e-3)
            assert figure.low == pytest.approx(facts["figures"][metric]["low"], rel=1e-3)


def test_one_group_fewer_is_too_few(mixed: Recommendation, store: Store) -> None:
    """The number is the smallest: with the last group in NVFP4 again the build misses the budget."""
    winner = mixed.outcome.winner
    assert winner is not None
    [facts] = [one.facts for one in artifacts(store.root) if one.stage == "mixtures" and "figures" in one.facts]
    last = facts["groups"][-1].rpartition(".")
    members = {"qkv_proj": ("q", "k", "v"), "gate_up_proj": ("gate", "up")}.get(
        last[2], (last[2].removesuffix("_proj"),)
    )
    fewer = tuple(
        name for name in winner.candidate.settings.kept if name not in {f"{last[0]}.{m}_proj" for m in members}
    )
    assert len(fewer) < len(winner.candidate.settings.kept)
    cache, algorithm = "fp8", winner.candidate.settings.algorithm
    part: dict[str, Any] = {"format": "nvfp4", "keep_fp8": fewer, "algorithm": algorithm, "kv_cache_dtype": cache}
    found = run(0.02, store, **{f"quantization__{key}": value for key, value in part.items()})
    assert not found.outcome.trials[0].met


def test_a_second_run_measures_nothing(mixed: Recommendation, store: Store) -> None:
    before = len(JOBS)
    again = run(0.02, store, quantization__format="nvfp4", quantization__kv_cache_dtype="fp8")
    assert len(JOBS) == before
    assert again.as_dict() == mixed.as_dict()


def test_the_recipe_file_builds_the_winner(mixed: Recommendation, tmp_path: Path) -> None:
    winner = mixed.outcome.winner
    assert winner is not None
    recipe_file.write(winner, mixed.user, tmp_path / "recipe.yaml")
    read = schema.resolve({}, recipe_file=tmp_path / "recipe.yaml")
    assert read.recipe.quantization == winner.candidate.prepared.recipe.quantization
    assert read.recipe.calibration == winner.candidate.prepared.recipe.calibration
    assert read.recipe.model == mixed.user.recipe.model
    assert not read.recipe.evaluation.limits, "the build has its quality check"
    assert read.gpu.name == "cpu"


def test_what_no_algorithm_can_win_is_not_built(store: Store) -> None:
    found = run(0.002, store, quantization__format="nvfp4", quantization__kv_cache_dtype="fp8")
    verdicts = {one.label: one.verdict for one in found.outcome.trials}
    assert verdicts["nvfp4 mse, KV fp8"].startswith("not tried: with exact weights the KL would be above 0.0")
    last = found.outcome.trials[-1]
    assert last.verdict == "misses it with 23 of 24 groups kept", "so nothing was built of it"
    assert last.figures["kl"].value > 0.002
    with pytest.raises(EvaluationError, match=r"No candidate surely meets KL <= 0\.002") as caught:
        found.check()
    assert "The least loss so far: nvfp4" in caught.value.why


def test_without_a_solution_in_the_bytes_both_sides_are_named(mixed: Recommendation, store: Store) -> None:
    """There is room for a few layers in FP8, and more are needed."""
    most = mixed.outcome.trials[0].candidate.nbytes + 200_000
    found = run(0.02, store, max_bytes=most, quantization__format="nvfp4", quantization__kv_cache_dtype="fp8")
    assert found.outcome.winner is None
    over, nearest = found.outcome.over, found.outcome.nearest
    assert over is not None
    assert nearest is not None
    assert over.met
    assert over.candidate.nbytes > most
    assert nearest.figures["kl"].high > 0.02
    with pytest.raises(EvaluationError, match=r"surely meets KL <= 0.02 in 10.\d\d MB") as caught:
        found.check()
    assert over.label in caught.value.why
    assert nearest.label in caught.value.why


def test_bf16_meets_every_budget(store: Store) -> None:
    found = run(1e-9, store, quantization__format="bf16")
    winner = found.outcome.winner
    assert winner is not None
    assert (winner.label, winner.figures["kl"].high) == ("bf16, KV auto", 0)
    assert found.reason == "bf16, KV auto: nothing less than BF16 surely meets KL <= 1e-09"
    values = recipe_file.values(winner, found.user)
    assert values["quantization"] == {"format": "bf16", "kv_cache_dtype": "auto", "algorithm": "max"}


def test_mixtures_that_cannot_be_measured_are_built(tmp_path: Path) -> None:
    """With --memory low no model is held whole, so eighths of the layers are tried, worst weights first."""
    store = Store(tmp_path / "artifacts", Output("quiet"))
    options: dict[str, Any] = {
        "quantization__memory": "low",
        "quantization__format": "nvfp4",
        "quantization__algorithm": "max",
    }
    found = run(0.02, store, quantization__kv_cache_dtype="fp8", **options)
    labels = [one.label for one in found.outcome.trials]
    winner = found.outcome.winner
    assert winner is not None
    assert labels[0] == "nvfp4, KV fp8"
    assert len(labels) <= 5
    assert not (store.root / "mixtures").exists()
    met = [one for one in found.outcome.trials if one.met]
    assert winner.candidate.nbytes == min(one.candidate.nbytes for one in met)


def test_kept_layers_that_can_not_be_built_are_no_candidate(
    mixed: Recommendation, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU that is too small for these layers. What was measured before is not lost."""

    def refused(*_: Any) -> Candidate:
        raise UnsupportedError("It does not fit.", why="24 GB are there.")

    monkeypatch.setattr(KeptSearch, "candidate", refused)
    found = run(0.02, store, quantization__format="nvfp4", quantization__kv_cache_dtype="fp8")
    assert found.outcome.winner is None
    assert found.outcome.trials[:-1] == mixed.outcome.trials[:-1]
    assert found.outcome.trials[-1].verdict == "not tried: It does not fit. 24 GB are there."


def test_the_quality_check_may_reject_what_meets_the_budget(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check itself is tested elsewhere."""
    from builder.recommend import search

    def failing(one: Trial, *, store: Store) -> str:
        return "unlike BF16, it answers 'Why?' without because" if one.candidate.settings.format == "nvfp4" else ""

    monkeypatch.setattr(search, "check_quality", failing)
    found = run(0.08, store, quantization__algorithm="max", quantization__kv_cache_dtype="fp8")
    assert [one.label for one in found.outcome.trials] == ["nvfp4, KV fp8", "w4a16_nvfp4, KV fp8"]
    assert found.outcome.trials[0].verdict == "meets it, but unlike BF16, it answers 'Why?' without because"
    assert found.outcome.winner is found.outcome.trials[1]


def test_an_interrupted_search_shows_what_it_has(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from builder.recommend import search

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(search, "measure_parts", interrupted)
    user, out = resolve(0.02), Output("json")
    with pytest.raises(KeyboardInterrupt):
        recommend(user, Request({"kl": 0.02}), store=Store(store.root, out))
    assert out._result is not None
    assert [one["candidate"] for one in out._result["candidates"]] == ["nvfp4, KV fp8"]


def test_the_bounds_end_the_search(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Candidate, "seconds", lambda one, host: 100.0)
    user = resolve(0.02)
    for request, why in (
        (Request({"kl": 0.02}, max_candidates=1), "1 candidates were measured"),
        (Request({"kl": 0.02}, max_seconds=0.0), "0.0s were over (--max-minutes)"),
        (Request({"kl": 0.02}, max_seconds=60.0), "would take longer than 1m00s (--max-minutes)"),
    ):
        found = recommend(user, request, store=Store(store.root, Output("quiet")))
        assert why in found.outcome.stopped
        with pytest.raises(EvaluationError, match="The search ended early"):
            found.check()


def test_the_time_limit_ends_a_measurement(mixed: Recommendation, store: Store, monkeypatch: Any) -> None:
    """Also one that takes much longer than was expected. What was measured before is shown."""
    from builder.recommend import search

    monkeypatch.setattr(search, "measure_parts", lambda *_, **__: time.sleep(600))
    user = resolve(0.02, quantization__format="nvfp4", quantization__kv_cache_dtype="fp8")
    found = recommend(user, Request({"kl": 0.02}, max_seconds=6.0), store=Store(store.root, Output("quiet")))
    assert found.outcome.stopped == "6.0s were over (--max-minutes) while nvfp4, KV fp8 was tried"
    with pytest.raises(EvaluationError, match=r"ended early: 6\.0s were over") as failed:
        found.check()
    assert "The least loss so far: nvfp4, KV fp8, KL" in failed.value.why


def test_a_plan_builds_nothing(tmp_path: Path) -> None:
    user = resolve(0.02)
    store = Store(tmp_path / "none", Output("quiet"), dry=True)
    found = recommendation.plan(user, Request({"kl": 0.02}, max_bytes=12_200_000), store=store)
    assert not (tmp_path / "none").exists()
    assert {one.verdict for one in found.outcome.trials} >= {"to be measured", "too large"}
    nbytes = [one.candidate.nbytes for one in found.outcome.trials if not one.candidate.searches]
    assert all(later > 0.98 * earlier for earlier, later in pairwise(nbytes))


def test_a_plan_names_what_an_earlier_search_could_not_measure(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a stored measurement that finds shuffled tokens as likely as text: the plan goes on, as the search does."""
    run(0.08, store)  # its measurement is in the store
    monkeypatch.setattr(evaluate_stage, "knows", lambda facts: False)
    dry = Store(store.root, Output("quiet"), dry=True)
    found = recommendation.plan(resolve(0.08), Request({"kl": 0.08}), store=dry)
    verdicts = [one.verdict for one in found.outcome.trials]
    assert verdicts[0] == "not measured: nvfp4, KV fp8 finds shuffled tokens as likely as text."
    assert "meets it: nothing is quantized" in verdicts


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(tmp_path / "none", Output("quiet"))
    for recipe, why in (
        (resolve(None), "No budget is named"),
        (
            resolve(0.1, quantization__keep_fp8="auto:0.1", sensitivity__data=PROSE, calibration__samples=4),
            "auto chooses",
        ),
    ):
        with pytest.raises(UsageError, match=why):
            recommend(recipe, Request({"kl": 0.1}), store=store)
    assert main.main(["recommend", "--model", "x", "--gpu", "cpu", "--max-kl", "1", "--max-candidates", "0"]) == 2
    assert main.main(["recommend", "--model", "x", "--gpu", "cpu", "--max-kl", "1", "--save", str(tmp_path)]) == 2
    assert f"--save {tmp_path} is a directory" in capsys.readouterr().err


def test_losers_are_named_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    sets = [word for key in BASE if key.startswith(("sens", "evaluation.")) and key != "evaluation.data"
            for word in ("--set", f"{key}={BASE[key]}")]  # fmt: skip
    argv = [
        "recommend",
        "--model",
        str(TINY),
        "--gpu",
        "cpu",
        "--data-free",
        "--no-quality-check",
        "--data",
        PROSE,
        *sets,
    ]
    argv += ["--output", "a", "--algorithm", "max", "--kv-cache-dtype", "fp8", "--max-kl", "0.022"]
    assert main.main(argv) == 0
    printed = capsys.readouterr()
    assert "builder clean checkpoint/" in printed.err
    assert "recommended w4a16_nvfp4, KV fp8" in printed.out
    assert schema.resolve({}, recipe_file=tmp_path / "recommended.yaml").recipe.quantization.format == "w4a16_nvfp4"
    kept = {one.path for one in artifacts(tmp_path / "a") if one.stage == "checkpoint"}
    assert main.main([*argv, "--remove"]) == 0
    assert {one.path for one in artifacts(tmp_path / "a") if one.stage == "checkpoint"} == kept, (
        "made by another search"
    )
    assert main.main([*argv, "--remove", "--force", "quantize"]) == 0
    [left] = [one for one in artifacts(tmp_path / "a") if one.stage == "checkpoint"]
    assert left.path in kept


@given(st.integers(1, 40))
def test_of_many_groups_layers_and_roles_are_measured(layers: int) -> None:
    """A few are measured one by one; of many each is part of a layer and of a role, so 34 measurements rank 120."""
    leaves = {"self_attn.qkv_proj": ("q_proj", "k_proj"), "self_attn.o_proj": ("o_proj",),
              "mlp.gate_up_proj": ("gate_proj",), "mlp.down_proj": ("down_proj",)}  # fmt: skip
    groups = {
        f"model.layers.{layer}.{group}": [f"model.layers.{layer}.{group.partition('.')[0]}.{name}" for name in members]
        for layer in range(layers)
        for group, members in leaves.items()
    }
    units = mixtures._units(groups, catalog.of({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}))
    members = [group for unit in units.values() for group in unit]
    if len(groups) <= mixtures.ONE_BY_ONE:
        assert units == {group: [group] for group in groups}
    else:
        assert len(units) == layers + 4
        assert sorted(members) == sorted([*groups, *groups])


@given(st.integers(1, 40), st.sets(st.integers(1, 40), min_size=1))
def test_bisection_finds_the_smallest_number(least: int, numbers: set[int]) -> None:
    tried: list[int] = []
    candidate = cast("Candidate", None)  # which bisection does not read

    def attempt(number: int) -> Trial:
        tried.append(number)
        return Trial(candidate, str(number), met=number >= least)

    steps = sorted(numbers)
    found = _bisect(steps, attempt)
    assert found is not None
    expected = min((number for number in steps if number >= least), default=steps[-1])
    assert found.verdict == str(expected)
    assert len(tried) <= len(steps).bit_length() + 1


@given(st.floats(0, 1), st.floats(0, 0.5), st.floats(0.01, 1))
def test_surely_is_the_whole_interval(value: float, half: float, limit: float) -> None:
    figure = Estimate(value, value - half, value + half)
    assert surely_within({"kl": limit}, {"kl": figure}) == (value + half <= limit)
    assert surely_within({"score": limit}, {"score": figure}) == (value - half >= limit)
    assert not surely_within({"kl": limit}, {"kl": replace(figure, high=float("nan"))})
