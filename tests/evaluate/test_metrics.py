"""From scores of tokens to figures with intervals, and the gate on them. No model here."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builder.core.errors import EvaluationError, UsageError
from builder.evaluate import gate, metrics
from builder.evaluate.metrics import Estimate, Sums
from builder.recipe import schema
from builder.recipe.evaluation import Evaluation


def sums(tokens: list[int], nll: list[float], reference: list[float] | None = None, **more: Any) -> Sums:
    columns = {name: np.array(values, float) for name, values in more.items()}
    if reference is not None:
        columns = {"reference_nll": np.array(reference), **columns}
        columns |= {name: np.zeros(len(tokens)) for name in ("kl", "agree", "flips") if name not in columns}
    right = columns.pop("right", np.zeros(len(tokens)))
    return Sums(np.array(tokens, float), np.array(nll), right, **columns)


def measure(*sets: Sums, resamples: int = 200, seed: int = 0) -> dict[str, Estimate]:
    return metrics.measure(sets, resamples=resamples, seed=seed)


def test_figures_by_hand(tmp_path: Path) -> None:
    """Two texts of three and two scored tokens; BF16 and a model that changed its mind twice."""
    for name, values in (
        ("model", {"nll": [1.0, 2.0, 3.0, 0.5, 0.5], "best": [1, 2, 3, 4, 9], "right": [1, 1, 0, 1, 0]}),
        ("bf16", {"nll": [1.0, 1.0, 3.0, 0.5, 0.0], "best": [1, 2, 3, 8, 5], "right": [1, 1, 0, 0, 1]}),
    ):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "starts.npy", [0, 3, 5])
        for column, numbers in values.items():
            np.save(tmp_path / name / f"{column}.npy", np.array(numbers, bool if column == "right" else None))
    np.save(tmp_path / "model" / "kl.npy", np.array([0.0, 0.1, 0.0, 0.2, 0.2], np.float32))
    read = metrics.read(tmp_path / "model", tmp_path / "bf16")
    assert (read.tokens.tolist(), read.nll.tolist(), read.flips.tolist()) == ([3, 2], [6, 1], [0, 2])
    found = {name: estimate.value for name, estimate in measure(read).items()}
    assert found["ppl"] == pytest.approx(math.exp(7 / 5))
    assert found["score"] == pytest.approx(100 * math.exp(5.5 / 5) / math.exp(7 / 5))
    assert found["kl"] == pytest.approx(0.1)
    assert (found["agreement"], found["flips"], found["accuracy"]) == pytest.approx((3 / 5, 2 / 5, 3 / 5))
    alone = measure(metrics.read(tmp_path / "bf16", None))
    assert not {"score", "kl", "agreement", "flips"} & set(alone)


def test_bf16_scores_100() -> None:
    found = measure(sums([5, 7], [1.25, 9.5], [1.25, 9.5]))["score"]
    assert (found.value, found.low, found.high) == (100, 100, 100)


def test_overall_is_weighted_by_tokens() -> None:
    short, long = sums([10], [10.0]), sums([90], [270.0])
    assert measure(short, long)["nll"].value == pytest.approx(280 / 100)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 500), st.floats(0.01, 12)), min_size=1, max_size=40), st.integers(0, 9))
def test_the_interval_is_repeatable_and_within_the_texts(texts: list[tuple[int, float]], seed: int) -> None:
    one = sums([n for n, _ in texts], [n * nll for n, nll in texts])
    found = measure(one, seed=seed)["nll"]
    assert found == measure(one, seed=seed)["nll"]
    low, high = min(nll for _, nll in texts), max(nll for _, nll in texts)
    assert low - 1e-9 <= found.low <= found.high <= high + 1e-9


@pytest.mark.parametrize("drawn", [1, 30, 1 << 17], ids=["one by one", "in blocks", "at once"])
def test_resamples_do_not_depend_on_how_many_are_drawn_at_a_time(drawn: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "DRAWN", drawn)
    columns, generator = np.random.default_rng(1).random((7, 3)), np.random.default_rng(5)
    expected = [generator.multinomial(7, np.full(7, 1 / 7)) @ columns for _ in range(50)]
    assert np.array_equal(metrics._totals(columns, 50, 5), [columns.sum(axis=0), *expected])


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """95 %: of 200 samples of 60 texts from a population whose mean is 3, between 88 and 100 % hold it."""
    generator = np.random.default_rng(1)
    held = 0
    for sample in range(200):
        nll = generator.normal(3, 1, 60)
        found = metrics.measure([sums([10] * 60, (10 * nll).tolist())], resamples=200, seed=sample)["nll"]
        held += found.low <= 3 <= found.high
    assert 176 <= held <= 200


def test_models_are_compared_on_the_same_resampled_texts() -> None:
    """Texts differ far more than models do: a score's interval is narrow though a perplexity's is wide."""
    generator = np.random.default_rng(2)
    tokens, nll = [50] * 80, generator.normal(200, 60, 80)
    found = measure(sums(tokens, (nll + 0.5).tolist(), nll.tolist()))
    assert found["score"].high - found["score"].low < 1e-9
    assert found["ppl"].high / found["ppl"].low > 1.5


def test_a_figure_that_overflows_or_is_none_is_shown_and_not_hidden() -> None:
    assert measure(sums([1], [1e6]))["ppl"].value == math.inf
    assert "nan" in str(measure(sums([1], [math.nan]))["ppl"])
    assert str(Estimate(0.02784, 0.0268, 0.0288)) == "0.02784 (0.02680 to 0.02880)"


# ---- the gate


def figures(score: float = 99, kl: float = 0.01) -> dict[str, Estimate]:
    return {"score": Estimate(score, score, score), "kl": Estimate(kl, kl, kl)}


GATE = Evaluation(min_score=98, max_kl=0.02)


def test_the_gate_names_metric_and_data_set() -> None:
    measured = {
        "bf16": {"prose": {}},
        "checkpoint": {"prose": figures(), "chat": figures(97.5), "code": figures(99, 1)},
    }
    verdict = gate.judge(GATE, measured, {}, {})
    assert verdict is not None
    assert list(verdict.failed) == [
        "score of checkpoint on chat is 97.50, below 98",
        "KL of checkpoint on code is 1.0000, above 0.02",
    ]
    with pytest.raises(EvaluationError, match="score of checkpoint on chat") as caught:
        verdict.check("evaluation.json")
    assert caught.value.exit_code == 4
    assert "code" in caught.value.why


@pytest.mark.parametrize("wrong", [figures(math.nan), figures(99, math.nan)])
def test_no_number_passes_no_gate(wrong: dict[str, Estimate]) -> None:
    verdict = gate.judge(GATE, {"checkpoint": {"prose": wrong}}, {}, {})
    assert verdict is not None
    assert not verdict.passed


def test_a_collapsed_model_passes_no_gate() -> None:
    verdict = gate.judge(GATE, {"checkpoint": {"prose": figures()}}, {"checkpoint": ["prose"]}, {})
    assert verdict is not None
    assert "shuffled" in verdict.failed[0]


def test_a_good_model_passes_and_without_limits_there_is_no_gate() -> None:
    verdict = gate.judge(GATE, {"checkpoint": {"prose": figures(98, 0.02)}}, {}, {})
    assert verdict is not None
    assert verdict.passed
    assert gate.judge(Evaluation(), {"checkpoint": {"prose": figures(1)}}, {}, {}) is None


def test_a_gate_on_what_was_not_measured_is_an_error_of_its_own() -> None:
    with pytest.raises(EvaluationError, match="score and kl of served was not measured") as caught:
        gate.judge(GATE, {"checkpoint": {"prose": figures()}}, {}, {"served": "no logits"})
    assert caught.value.why == "no logits"


@pytest.mark.parametrize("runners", [["bf16"], ["checkpoint", "served"]])
def test_a_gate_without_something_to_compare_is_refused_at_once(runners: list[str]) -> None:
    flags = {"model.id": "a/b", "gpu": "cpu", "evaluation.min_score": 98.0, "evaluation.runners": runners}
    with pytest.raises(UsageError, match="a gate compares a runner with bf16"):
        schema.resolve(flags)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0.01, 10), min_size=2, max_size=12), st.floats(0.1, 10))
def test_a_ratio_of_kls_is_paired(kls: list[float], factor: float) -> None:
    """Texts differ a lot, and one model loses `factor` times as much on each: every resample has that ratio."""
    tokens, zeros = [10] * len(kls), [0.0] * len(kls)
    ours = sums(tokens, zeros, zeros, kl=kls)
    theirs = sums(tokens, zeros, zeros, kl=[factor * kl for kl in kls])
    found = metrics.kl_ratio([theirs], [ours], resamples=100, seed=0)
    assert (found.value, found.low, found.high) == pytest.approx((factor, factor, factor))


def test_a_ratio_to_a_kl_of_zero_is_not_a_number() -> None:
    none = sums([5, 5], [0, 0], [0, 0])
    assert math.isnan(metrics.kl_ratio([none], [none], resamples=100, seed=0).value)
