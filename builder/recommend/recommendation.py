"""A budget and a recipe -> the cheapest recipe that meets it, or what it would take."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from builder.core import interrupts
from builder.core.errors import EvaluationError
from builder.core.output import Output, seconds, size
from builder.core.store import STAGES, Store, WouldRun, artifacts, strings
from builder.evaluate.parts.figures import PARTS
from builder.evaluate.stage import bf16_scores
from builder.evaluate.variants import Models
from builder.hub.snapshot import fetch, open_source
from builder.preflight.memory import machine
from builder.preflight.quantized import not_quantizable
from builder.recipe.schema import Resolved
from builder.recommend.candidates import Listed, list_candidates
from builder.recommend.request import Request, varied
from builder.recommend.search import Outcome, Search
from builder.recommend.trials import FAILURES, Trial, measure, not_measured

COLUMNS = ["candidate", "weights", "KV cache", "KL to BF16", "score", "to make", "result"]


@dataclass(frozen=True)
class Recommendation:
    """user: the recipe as it was given. outcome: all trials and the winner."""

    user: Resolved
    request: Request
    listed: Listed
    outcome: Outcome

    @property
    def reason(self) -> str:
        """Why the winner is the one, in a sentence."""
        found = self.outcome.winner
        if found is None:
            return ""
        if found.candidate.exact:
            return f"{found.label}: nothing less than BF16 surely meets {limits(self.request.limits)}"
        return (
            f"{found.label}: of what surely meets {limits(self.request.limits)} the cheapest, "
            f"KL {found.figures['kl']}, {size(found.candidate.nbytes)}"
        )

    def losers(self, store: Store, *, new: bool = False) -> list[str]:
        """Names for `builder clean` of the checkpoints that lost and that nothing was made from. new: only those that
        this search made."""
        made_now = {one.path for one in store.done if not one.cached}
        won = self.outcome.winner.checkpoint if self.outcome.winner else None
        used = {
            digest
            for one in artifacts(store.root, check_files=False)
            if one.stage in STAGES[STAGES.index("checkpoint") + 1 :]
            for digest in strings(one.manifest["ingredients"])
        }
        made = [one for one in store.done if one.stage == "checkpoint" and (one.path in made_now or not new)]
        lost = [one for one in made if one.digest not in used and not (won and one.path == won.path)]
        return list(dict.fromkeys(f"checkpoint/{one.path.name}" for one in lost))

    def check(self) -> None:
        """EvaluationError if no candidate is recommended, with the nearest on both sides."""
        found = self.outcome
        if found.winner is not None:
            return
        near = [f"The least loss so far: {_short(found.nearest)}."] if found.nearest else []
        near += (
            [f"The fewest bytes that meet {limits(self.request.limits)}: {_short(found.over)}."] if found.over else []
        )
        within = f" in {size(self.request.max_bytes)}" if self.request.max_bytes is not None else ""
        stopped = f" The search ended early: {found.stopped}." if found.stopped else ""
        raise EvaluationError(
            f"No candidate surely meets {limits(self.request.limits)}{within}.{stopped}",
            why="\n".join(near),
            hint="Allow more loss (--max-kl) or more bytes (--max-bytes), or narrow the intervals with more texts "
            "(--set evaluation.texts=N). What was measured is kept.",
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = self.outcome
        return {
            "limits": dict(self.request.limits),
            "max_bytes": self.request.max_bytes,
            "candidates": [_row(one) for one in found.trials],
            "winner": _row(found.winner) if found.winner else None,
            "reason": self.reason,
            "over": _row(found.over) if found.over else None,
            "stopped": found.stopped,
            "impossible": dict(self.listed.impossible),
        }


def recommend(user: Resolved, request: Request, *, store: Store) -> Recommendation:
    """Searches for the cheapest recipe; if interrupted, shows what it has. A second call finds all measurements in the
    store. UsageError for a quantized model and for what `varied` refuses."""
    start = time.monotonic()
    base, listed = _listed(user, store)
    found = Recommendation(user, request, listed, Outcome())

    def search() -> None:
        snapshot = fetch(base.recipe.model, store=store)
        bf16_scores(Models(snapshot), base.recipe, store=store)  # errors of texts and model are no candidate's
        Search(request, base, store, found.outcome, start).run(listed.candidates)

    try:
        done = interrupts.within(request.max_seconds, search)
    except KeyboardInterrupt:
        show(found, store.out)
        raise
    if not done and request.max_seconds is not None:
        during = found.outcome.trying and f" while {found.outcome.trying} was tried"
        found.outcome.stopped = f"{seconds(request.max_seconds)} were over (--max-minutes){during}"
    return found


def plan(user: Resolved, request: Request, *, store: Store) -> Recommendation:
    """The candidates in the order of the search, none tried: what the store knows of each. store: a dry one."""
    _, listed = _listed(user, store)
    outcome = Outcome()
    for one in listed.candidates:
        trial = Trial(
            one, "if none of those above meets it: layers by their loss" if one.searches else "to be measured"
        )
        if not one.searches:
            try:
                trial = measure(one, request, store=store)
            except WouldRun:
                trial = replace(trial, seconds=one.seconds(machine(store.root)))
            except FAILURES as error:  # as the search found
                trial = not_measured(one, error)
        over = request.max_bytes is not None and one.nbytes > request.max_bytes
        outcome.trials.append(Trial(one, "too large", seconds=trial.seconds) if over else trial)
    return Recommendation(user, request, listed, outcome)


def _listed(user: Resolved, store: Store) -> tuple[Resolved, Listed]:
    base = varied(user)
    if open_source(base.recipe.model, store=store).quantized:
        raise not_quantizable(base.recipe.model.id, "A recipe is recommended by")
    return base, list_candidates(base, store)


def show(found: Recommendation, out: Output) -> None:
    """Prints the candidates, the parts of their losses, and what is not possible; with --json one object."""
    rows = [_cells(one) for one in found.outcome.trials]
    out.table(f"candidates for {limits(found.request.limits)}, cheapest first (95 % intervals)", COLUMNS, rows)
    parts = []
    for trial, losses in found.outcome.parts.values():
        cells = [str(losses.without[part]) if part in losses.without else "-" for part in PARTS]
        parts.append((trial.label, str(losses.whole), *cells))
    if parts:
        titles = [f"{title} exact" for title in PARTS.values()]
        out.table("KL on the texts that rank layers, with a part exact", ["candidate", "all", *titles], parts)
    if found.outcome.stopped:
        out.info(f"the search ended early: {found.outcome.stopped}; the same command continues it")
    for label, why in found.listed.impossible.items():
        out.info(f"not possible: {label}: {why}")
    out.result(found.as_dict())


def limits(asked: Mapping[str, float]) -> str:
    """The limits as words: KL <= 0.1 and score >= 95."""
    words = {"kl": "KL <=", "score": "score >="}
    return " and ".join(f"{words[metric]} {limit:g}" for metric, limit in sorted(asked.items()))


def _cells(one: Trial) -> tuple[str, ...]:
    figures = [str(one.figures[name]) if name in one.figures else "-" for name in ("kl", "score")]
    took = "-" if one.seconds is None else seconds(one.seconds)
    return one.label, size(one.candidate.weights), size(one.candidate.cache), *figures, took, one.verdict


def _row(one: Trial) -> dict[str, Any]:
    settings = one.candidate.settings
    return {
        "candidate": one.label,
        "format": settings.format,
        "algorithm": settings.algorithm,
        "kv_cache_dtype": settings.cache,
        "rotated": settings.rotates,
        "kept": list(settings.kept),
        "kept_format": settings.kept_format,
        "weights": one.candidate.weights,
        "kv_cache": one.candidate.cache,
        "figures": {name: vars(one.figures[name]) for name in ("kl", "score") if name in one.figures},
        "seconds": one.seconds,
        "met": one.met,
        "result": one.verdict,
        "checkpoint": str(one.checkpoint.path) if one.checkpoint else None,
    }


def _short(one: Trial | None) -> str:
    return "" if one is None else f"{one.label}, KL {one.figures['kl']}, {size(one.candidate.nbytes)}"
