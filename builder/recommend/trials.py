"""Candidates -> what each loses: its checkpoint is built and measured, both as stages of the store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from builder.checkpoint.layouts import Checkpoint
from builder.core.errors import BuilderError, EvaluationError, NotMeasurable, UnsupportedError, UsageError
from builder.core.store import Store
from builder.evaluate.comparison import OURS, overall
from builder.evaluate.gate import surely_within
from builder.evaluate.metrics import Estimate
from builder.evaluate.variants import Models
from builder.pipeline import Built, evaluate_built, run_stages
from builder.recommend.candidates import Candidate, title
from builder.recommend.request import Request

FAILURES = (EvaluationError, UsageError, UnsupportedError)  # of one candidate; the search goes on
NOTHING_LOST = {"kl": Estimate(0.0, 0.0, 0.0), "score": Estimate(100.0, 100.0, 100.0)}


@dataclass(frozen=True)
class Trial:
    """A candidate and what became of it.

    figures: by metric, over all data sets; empty if it was not measured. met: whether the whole intervals are within
    the limits, and the quality check passed where it ran. verdict: that in words, or why it was not tried. seconds:
    that its checkpoint took to make, now or before. built: its checkpoint, None where it was not built.
    """

    candidate: Candidate
    verdict: str
    met: bool = False
    figures: Mapping[str, Estimate] = field(default_factory=dict)
    seconds: float | None = None
    checkpoint: Checkpoint | None = None
    models: Models | None = field(default=None, repr=False)

    @property
    def label(self) -> str:
        """The candidate in a few words."""
        return title(self.candidate.settings, searches=self.candidate.searches)


def measure(one: Candidate, request: Request, *, store: Store) -> Trial:
    """Builds the candidate's checkpoint and measures it. EvaluationError if it can't be measured."""
    if one.exact:
        return Trial(one, "meets it: nothing is quantized", met=True, figures=NOTHING_LOST, seconds=0.0)
    before = len(store.done)
    built = run_stages(one.prepared, store, "checkpoint")
    made = next((done for done in reversed(store.done[before:]) if done.stage == "checkpoint"), None)
    figures = _figures(built, one, store)
    verdict, met = judge(figures, request.limits)
    seconds = made.manifest["seconds"] if made else None
    return Trial(one, verdict, met, figures, seconds, built.checkpoint, built.models)


def not_measured(one: Candidate, error: BuilderError) -> Trial:
    """The trial of a candidate that can't be built or measured."""
    return Trial(one, f"not measured: {words(error)}")


def words(error: BuilderError) -> str:
    """What happened and why, in one line."""
    return " ".join(f"{error.what} {error.why}".split())


def check_quality(one: Trial, *, store: Store) -> str:
    """Why a build of the candidate would fail its quality check, or what its answers lack that BF16's have; "" if it
    passes with answers as good, or can't be measured."""
    prepared = one.candidate.prepared
    if one.candidate.exact or not prepared.recipe.quality.check:
        return ""
    built = run_stages(prepared, store, "checkpoint", quality=True)
    assert built.quality is not None
    failed = built.quality.failure(prepared.recipe.quality.min_score)
    if failed:
        return f"fails the quality check: {failed}"
    return built.quality.lost and f"unlike BF16, {built.quality.lost}"


def judge(figures: Mapping[str, Estimate], limits: Mapping[str, float]) -> tuple[str, bool]:
    """The verdict in words, and whether the figures are surely within the limits."""
    if surely_within(limits, figures):
        return "meets it", True
    inside = {"kl": figures["kl"].value <= limits.get("kl", figures["kl"].value)}
    inside["score"] = figures["score"].value >= limits.get("score", figures["score"].value)
    return ("may meet it: the interval is too wide" if all(inside.values()) else "misses it"), False


def _figures(built: Built, one: Candidate, store: Store) -> Mapping[str, Estimate]:
    found = evaluate_built(built, one.prepared.recipe, store)
    if OURS not in found.measured:
        why = found.not_measured.get(OURS, "")
        raise NotMeasurable(f"{title(one.settings)} can't be measured.", why=why)
    if OURS in found.collapsed:
        raise EvaluationError(f"{title(one.settings)} finds shuffled tokens as likely as text.")
    return overall(found.measured[OURS])
