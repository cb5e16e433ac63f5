"""Presents a quality check: the tables of a build's summary, and the error with what to try if it failed."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from itertools import pairwise

from builder.core.errors import EvaluationError
from builder.core.output import Output, seconds, size
from builder.quality.check import Quality, Remedy
from builder.report.results import RUNNERS

COLUMNS = ["model", "texts", "tokens", "PPL", "score", "KL to BF16", "same top token"]
SHOWN = 160  # characters of an answer to print


def show(found: Quality, min_score: float, out: Output) -> None:
    """Prints the metrics, the answers, estimates of what would help, and the result: passed, failed or not checked."""
    if found.figures is None or found.bf16 is None:
        out.text(f"quality    not checked: {found.unmeasured}")
        return
    texts = ", ".join(f"{n} {name}" for name, n in (found.texts or {}).items())
    ours = found.figures
    rows = [
        (RUNNERS["bf16"], texts, f"{found.tokens:,}", f"{found.bf16['ppl'].value:.3f}", "100", "-", "-"),
        (
            RUNNERS[found.runner],
            texts,
            f"{found.tokens:,}",
            f"{ours['ppl'].value:.3f}",
            str(ours["score"]),
            str(ours["kl"]),
            f"{100 * ours['agreement'].value:.1f} %",
        ),
    ]
    out.table(f"quality ({seconds(found.seconds)}; 95 % intervals)", COLUMNS, rows)
    answers = [(answer.prompt, _short(answer.bf16), _short(answer.quantized)) for answer in found.answers]
    if answers:
        out.table("greedy answers", ["prompt", "BF16", "quantized"], answers)
    if found.remedies:
        rows_of = [(shlex.join(r.flags), f"{r.score:.1f}", size(r.nbytes)) for r in ordered(found.remedies, min_score)]
        out.table("what would help (estimated)", ["flags", "score", "additional size"], rows_of)
    for note in found.notes:
        out.text(f"quality    {note}")
    if found.lost:
        out.text(f"quality    unlike BF16, {found.lost}; `builder recommend` tries until it doesn't")
    failed = found.failure(min_score)
    out.text(f"quality    {f'FAILED: {failed}' if failed else f'passed: a score of at least {min_score:g}'}")


def ordered(remedies: Sequence[Remedy], min_score: float) -> list[Remedy]:
    """Sorts remedies: first those whose estimated score is sufficient, by the bytes that they add to the weights.

    Among equal sizes, fewer flags come first: more flags may enlarge the KV cache. Then the others, by score.
    """
    sufficient = [remedy for remedy in remedies if remedy.score >= min_score]
    others = [remedy for remedy in remedies if remedy.score < min_score]
    by_size = sorted(sufficient, key=lambda remedy: (remedy.nbytes, len(remedy.flags)))
    return by_size + sorted(others, key=lambda remedy: -remedy.score)


def error(found: Quality, min_score: float, command: Sequence[str], *, better: str = "") -> EvaluationError | None:
    """The EvaluationError for a score below `min_score`; None if it passed.

    `command`: the words of a command that builds the same recipe, to which the hints add flags. `better`: the
    algorithm that would round the same format better, if there is one.
    """
    failed = found.failure(min_score)
    if not failed:
        return None
    return EvaluationError(
        f"The model fails the quality check: {failed}.",
        why=_why(found),
        hint="\n".join(_next_steps(found, min_score, command, better)),
    )


def _why(found: Quality) -> str:
    assert found.figures is not None
    kl, same = found.figures["kl"].value, 100 * found.figures["agreement"].value
    lines = [f"KL to BF16 is {kl:.3f} nats per token, and {same:.1f} % of the most likely tokens are the same."]
    lines += [
        f"To {answer.prompt!r}, BF16 answers {_short(answer.bf16)!r}, quantized {_short(answer.quantized)!r}."
        for answer in found.answers[:1]
    ]
    return "\n".join([*lines, "It was not published. The stages that were built are kept."])


def _next_steps(found: Quality, min_score: float, command: Sequence[str], better: str) -> list[str]:
    """Commands to try next, the most promising first."""
    without, command = command, calibrated(command)
    calibrate = [f"{shlex.join(command)}    # calibrates, instead of --data-free"] if command != without else []
    lines = calibrate + [
        f"{shlex.join([*command, *remedy.flags])}    # estimated score {remedy.score:.0f}, {size(remedy.nbytes)} more"
        for remedy in ordered(found.remedies, min_score)[:3]
    ]
    if better:
        lines.append(
            f"{shlex.join([*command, '--algorithm', better])}    # rounds better in the same format, no bytes more"
        )
    budget = budget_of(min_score)
    texts = ["--sensitivity-data", "builtin:python-docs"]
    measure = ["builder", "sensitivity", *command[2:]]
    lines.append(f"{shlex.join([*measure, *texts])}    # shows which layers lose most")
    if not any("auto:" in word for word in command):  # a recipe can have only one budget
        kept = [word for remedy in found.remedies for word in remedy.flags if word.startswith("--keep-")]
        automatic = [*command, kept[0] if kept else "--keep-fp8", f"auto:{budget:g}", *texts]
        lines.append(f"{shlex.join(automatic)}    # selects the layers automatically")
        recommend = ["builder", "recommend", *command[2:], "--max-kl", f"{budget:g}"]
        lines.append(f"{shlex.join(recommend)}    # finds the cheapest recipe within a KL, by measuring")
    return ["Try next, in this order:", *lines, "Or accept it: --set quality.min_score=N, --no-quality-check"]


def calibrated(command: Sequence[str]) -> Sequence[str]:
    """The words of a command without those that build data-free."""
    words = [word for word in command if word != "--data-free"]
    pairs = [n for n, pair in enumerate(pairwise(words)) if pair == ("--calib-samples", "0")]
    return [word for n, word in enumerate(words) if not any(n in (at, at + 1) for at in pairs)]


def budget_of(min_score: float) -> float:
    """Roughly the KL of a model with this score: a score of 90 is a loss of -ln 0.9 = 0.105 nats per token."""
    return float(f"{max(0.01, -math.log(min(min_score, 99.0) / 100)):.1g}")


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else line[: SHOWN - 1] + "…"
