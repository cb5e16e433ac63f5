"""The verdict at the top of a report, from smoke test, accuracy gate, and the build's own quality check."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from builder.evaluate.tasks import Row
from builder.publish.verdict import BuildVerdict
from builder.quality.check import Quality
from builder.recipe.target_facts import TARGETS
from builder.report.results import Evaluation
from builder.serving.smoke import SmokeReport

Status = Literal["passed", "failed", "incomplete"]


@dataclass(frozen=True)
class ReportVerdict:
    """`headline`: one line; `reasons`: the details behind it."""

    status: Status
    headline: str
    reasons: tuple[str, ...]


def judge(
    smoke: SmokeReport | None,
    evaluation: Evaluation | None,
    target: str,
    tasks: Sequence[Row] = (),
    *,
    quality: Quality | None = None,
    judged: BuildVerdict | None = None,
) -> ReportVerdict:
    """Combines all tests to one verdict. A missing test makes it "incomplete", never "passed".

    `smoke`, `evaluation`: None if there is none; `target`: of the recipe; `judged`: the build's own verdict, which is
    by the quality check if no gate was set.
    """
    failed = list(evaluation.failed) if evaluation and evaluation.passed is False else []
    gate = bool(evaluation and evaluation.passed is False)
    if judged and judged.status == "failed" and not gate and not (evaluation and evaluation.passed):
        failed += judged.reasons
    if smoke and smoke.failed:
        failed += [f"Smoke test: {check.name}: {check.detail}" for check in smoke.failed]
    server = TARGETS[target].served_by if target in TARGETS else target
    checks = "" if smoke is None else smoke.counts if smoke.unchecked else f"{len(smoke.checks)} checks"
    served = f"The smoke test passed ({checks}), served by {server}." if smoke else ""
    if failed:
        checked = judged.by if judged and judged.status == "failed" else "smoke test"
        return ReportVerdict("failed", f"It failed the {'accuracy gate' if gate else checked}", tuple(failed))
    if smoke is None:
        accurate = evaluation and evaluation.passed
        headline = "Accuracy passed; not served, not tested" if accurate else "Built, but not served and not tested"
        return ReportVerdict("incomplete", headline, ("No smoke test of this repository is in the store.",))
    if evaluation is None or (evaluation.passed is None and judged and judged.status == "passed"):
        return _judge_by_check(served, tasks, quality, judged)
    limits = {"score": "a score of at least {:g}", "kl": "a KL of at most {:g}"}
    gate_text = " and ".join(limits.get(name, name + " {:g}").format(n) for name, n in evaluation.limits.items())
    reasons = (served, f"The gate: {gate_text}.") if gate_text else (served,)
    if evaluation.passed is None:
        why = "the accuracy gate could not be judged" if gate_text else "accuracy was measured, no gate was set"
        return ReportVerdict("incomplete", f"It serves; {why}", reasons)
    return ReportVerdict("passed", "It serves, and passed the accuracy gate", reasons)


def _judge_by_check(
    served: str, tasks: Sequence[Row], quality: Quality | None, judged: BuildVerdict | None
) -> ReportVerdict:
    """The verdict on a model that serves but has no gate: by the build's quality check, if there was one."""
    known = f"The quality check measured a score of {quality.score:.2f} (BF16 = 100)." if quality else ""
    if judged and judged.status == "passed":
        return ReportVerdict("passed", "It serves, and passed the quality check", (served, known))
    if judged:
        return ReportVerdict("incomplete", "It serves; quality not checked", (served, f"{judged.reasons[0]}.", known))
    what = "accuracy was measured by tasks only, no gate was set" if tasks else "accuracy was not measured"
    return ReportVerdict("incomplete", f"It serves; {what}", (served, known))
