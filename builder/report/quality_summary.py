"""A Quality in words: the tables of a build's summary, and the error below the threshold with what to try next."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence

from builder.core.errors import EvaluationError
from builder.core.output import Output, seconds, size
from builder.quality.check import Quality, Remedy
from builder.report.results import RUNNERS

COLUMNS = ["model", "texts", "tokens", "PPL", "score", "KL to BF16", "same top token"]
SHOWN = 160  # characters of an answer in a table


def show(found: Quality, min_score: float, out: Output) -> None:
    """Figures, answers, what would help, and whether it is enough."""
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
    answers = [(one.prompt, _short(one.bf16), _short(one.quantized)) for one in found.answers]
    if answers:
        out.table("greedy answers", ["prompt", "BF16", "quantized"], answers)
    if found.remedies:
        rows_of = [(shlex.join(r.flags), f"{r.score:.1f}", size(r.nbytes)) for r in ordered(found.remedies, min_score)]
        out.table("what would help (estimated)", ["flags", "score", "more bytes"], rows_of)
    for note in found.notes:
        out.text(f"quality    {note}")
    failed = found.failure(min_score)
    out.text(f"quality    {f'FAILED: {failed}' if failed else f'passed: a score of at least {min_score:g}'}")


def ordered(remedies: Sequence[Remedy], min_score: float) -> list[Remedy]:
    """Those that are estimated to be enough, by the bytes of weights that they add, of equal ones that with the fewest
    flags (an FP8 KV cache is half as large); then the others, the most effective first."""
    enough = [one for one in remedies if one.score >= min_score]
    others = [one for one in remedies if one.score < min_score]
    return sorted(enough, key=lambda one: (one.nbytes, len(one.flags))) + sorted(others, key=lambda one: -one.score)


def error(found: Quality, min_score: float, command: Sequence[str]) -> EvaluationError | None:
    """EvaluationError for a score below the threshold. `command` builds by the same recipe."""
    failed = found.failure(min_score)
    if not failed:
        return None
    return EvaluationError(
        f"The model fails the quality check: {failed}.",
        why=_why(found),
        hint="\n".join(_cure(found, min_score, command)),
    )


def _why(found: Quality) -> str:
    assert found.figures is not None
    kl, same = found.figures["kl"].value, 100 * found.figures["agreement"].value
    lines = [f"KL to BF16 is {kl:.3f} nats a token, and {same:.1f} % of the likeliest tokens are the same."]
    lines += [
        f"Asked {one.prompt!r}, BF16 answers {_short(one.bf16)!r}, quantized it answers {_short(one.quantized)!r}."
        for one in found.answers[:1]
    ]
    return "\n".join([*lines, "It was not published; what was made is kept."])


def _cure(found: Quality, min_score: float, command: Sequence[str]) -> list[str]:
    """The next commands to type, those first that the estimates promise most of."""
    tried = ordered(found.remedies, min_score)
    lines = [
        f"{shlex.join([*command, *one.flags])}    # estimated score {one.score:.0f}, {size(one.nbytes)} more"
        for one in tried[:3]
    ]
    budget = budget_of(min_score)
    texts = ["--sensitivity-data", "builtin:python-docs"]
    measure = ["builder", "sensitivity", *command[2:]]
    lines.append(f"{shlex.join([*measure, *texts])}    # which layers lose most")
    if not any("auto:" in word for word in command):  # a recipe has one budget
        automatic = [*command, "--keep-fp8", f"auto:{budget:g}", *texts]
        lines.append(f"{shlex.join(automatic)}    # chooses the layers by it")
    return ["Try next, in this order:", *lines, "Or accept it: --set quality.min_score=N, --no-quality-check"]


def budget_of(min_score: float) -> float:
    """The KL of a model with that score, roughly: a score of 90 is a loss of -ln 0.9 = 0.105 nats a token."""
    return float(f"{max(0.01, -math.log(min(min_score, 99.0) / 100)):.1g}")


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else line[: SHOWN - 1] + "…"
