"""The accuracy gate: compares the measured loss with the recipe's limits."""

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
    """`failed`: one sentence per violated limit, with runner, data set, metric, figure and limit. Empty: passed."""

    limits: Mapping[str, float]
    failed: Sequence[str]

    @property
    def passed(self) -> bool:
        return not self.failed

    def check(self, where: str) -> None:
        """EvaluationError that lists every violated limit. `where`: the file with the tables."""
        if self.failed:
            raise EvaluationError(
                f"The model fails the gate: {self.failed[0]}.",
                why="\n".join(self.failed),
                hint=f"All artifacts are kept. The tables: {where}\n"
                "Quantize less (--kv-cache-dtype auto, --keep-fp8), or lower the limits: --min-score, --max-kl",
            )


def judge(
    part: Evaluation,
    measured: Measured,
    collapsed: Mapping[str, Sequence[str]],
    not_measured: Mapping[str, str],
) -> GateResult | None:
    """The gate's result, None if the recipe has no limits. EvaluationError if a requested runner was not measured.

    collapsed: runner -> data sets on which it finds shuffled tokens as likely as text; such a runner never passes.
    """
    asked = part.limits
    if not asked:
        return None
    for runner, why in not_measured.items():
        raise EvaluationError(
            f"The gate can't be applied: {' and '.join(asked)} of {runner} was not measured.",
            why=why,
            hint="Measure it, or choose other runners: --runner bf16 --runner checkpoint",
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
    """The violated limit as a sentence, "" if it holds. NaN violates it."""
    if metric == "score":
        return "" if figure.value >= limit else f"score of {runner} on {name} is {figure.value:.2f}, below {limit:g}"
    return "" if figure.value <= limit else f"KL of {runner} on {name} is {figure.value:.4f}, above {limit:g}"


def surely_within(limits: Mapping[str, float], figures: Mapping[str, Estimate]) -> bool:
    """Whether the whole 95 % interval of each limited metric is within its limit. NaN never is."""
    sides = {"score": lambda limit: figures["score"].low >= limit, "kl": lambda limit: figures["kl"].high <= limit}
    return all(sides[metric](limit) for metric, limit in limits.items())
