"""How much loss is too much: the recipe's limits against what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from builder.core.errors import EvaluationError
from builder.evaluate.metrics import Estimate
from builder.recipe.evaluation import Evaluation

OVERALL = "overall"
# runner -> data set, or OVERALL -> metric -> figure
Measured = Mapping[str, Mapping[str, Mapping[str, Estimate]]]


@dataclass(frozen=True)
class GateResult:
    """`failed` names runner, data set, metric, figure and limit. Empty, and nothing collapsed: passed."""

    limits: Mapping[str, float]
    failed: Sequence[str]

    @property
    def passed(self) -> bool:
        return not self.failed

    def check(self, where: str) -> None:
        """EvaluationError with all that failed."""
        if self.failed:
            raise EvaluationError(
                f"The model fails the gate: {self.failed[0]}.",
                why="\n".join(self.failed),
                hint=f"Everything is kept; the tables: {where}\n"
                "Keep more of the model (--kv-cache-dtype auto), or ask for less: --min-score, --max-kl",
            )


def judge(
    part: Evaluation,
    measured: Measured,
    collapsed: Mapping[str, Sequence[str]],
    not_measured: Mapping[str, str],
) -> GateResult | None:
    """None without a gate. EvaluationError if a metric that it needs was not measured for a runner that was asked.

    `collapsed` holds the data sets on which a runner found shuffled tokens as likely as text: it passes no gate.
    """
    asked = part.limits
    if not asked:
        return None
    for runner, why in not_measured.items():
        raise EvaluationError(
            f"The gate can't be judged: {' and '.join(asked)} of {runner} was not measured.",
            why=why,
            hint="Measure it, or leave it out: --runner bf16 --runner checkpoint",
        )
    failed = []
    for runner, sets in measured.items():
        if runner == "bf16":
            continue
        for name, figures in sets.items():
            failed += [_failure(runner, name, metric, figures[metric], limit) for metric, limit in asked.items()]
            if name in collapsed.get(runner, ()):
                failed.append(f"{runner} on {name} finds shuffled tokens as likely as text")
    return GateResult(asked, [text for text in failed if text])


def _failure(runner: str, name: str, metric: str, figure: Estimate, limit: float) -> str:
    """What failed, or nothing. A figure that is no number fails."""
    if metric == "score":
        return "" if figure.value >= limit else f"score of {runner} on {name} is {figure.value:.2f}, below {limit:g}"
    return "" if figure.value <= limit else f"KL of {runner} on {name} is {figure.value:.4f}, above {limit:g}"
