"""Tries candidates, cheapest first, until one surely meets the budget.

What can't meet it is not built: once a format missed, the parts of its loss (evaluate/parts) say what no algorithm for
weights can win, and what the KV cache costs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from builder.core.output import seconds, size
from builder.core.store import Store
from builder.evaluate.mixtures.stage import Chosen, NotMixed
from builder.evaluate.parts.figures import Losses
from builder.evaluate.parts.stage import measure_parts
from builder.preflight.memory import machine
from builder.recipe.schema import Resolved
from builder.recommend import kept
from builder.recommend.candidates import Candidate
from builder.recommend.request import Request
from builder.recommend.trials import FAILURES, Trial, check_quality, measure, not_measured, words

# A KV cache that has less of the loss than this is not what a candidate fails by.
LITTLE = 0.1
# If the build of a mixture misses what its measurement met: the share of the groups that is added, and how often.
STEP, STEPS = 8, 3
Family = tuple[str, str, bool]  # format, KV cache, whether rotated


@dataclass
class Outcome:
    """All trials in order, the winner, and with a limit of bytes that none kept the cheapest that met the others.

    parts: of the first candidate of each family that missed. stopped: why the search ended early, or "". trying: what
    is tried now.
    """

    trials: list[Trial] = field(default_factory=list)
    winner: Trial | None = None
    over: Trial | None = None
    parts: dict[Family, tuple[Trial, Losses]] = field(default_factory=dict)
    stopped: str = ""
    trying: str = ""

    @property
    def nearest(self) -> Trial | None:
        """Of the candidates that were measured and missed, the one that loses least."""
        missed = [one for one in self.trials if one.figures and not one.met]
        return min(missed, key=lambda one: one.figures["kl"].value, default=None)


class Search:
    """One search; what it finds goes into `outcome` as it is found. start: since when its time counts."""

    def __init__(
        self, request: Request, base: Resolved, store: Store, outcome: Outcome, start: float | None = None
    ) -> None:
        self._request, self._base, self._store, self._outcome = request, base, store, outcome
        self._count, self._start = 0, time.monotonic() if start is None else start
        self._measured = 0.0  # seconds that candidates took beyond what their checkpoints were estimated to take

    def run(self, candidates: Sequence[Candidate]) -> None:
        """First what keeps the limit of bytes; if none of that meets the others, what does not."""
        most = self._request.max_bytes
        inside = [one for one in candidates if most is None or one.nbytes <= most]
        for trial in self._found(inside, most):
            self._outcome.winner = trial
        if self._outcome.winner is None and most is not None and not self._outcome.stopped:
            self._store.out.info(f"none within {size(most)}; looking for what meets the other limits")
            outside = [one for one in candidates if one.nbytes > most or one.searches]
            for trial in self._found(outside, None):
                self._outcome.over = trial

    def _found(self, candidates: Sequence[Candidate], room: int | None) -> Iterator[Trial]:
        """Those that meet the budget, each cheaper than the one before. One that searches for layers may turn out to
        have more bytes than a later one, so those are still tried."""
        best: Trial | None = None
        for one in candidates:
            if best is not None and one.nbytes >= best.candidate.nbytes:
                break
            if why := self._hopeless(one):
                self._note(Trial(one, f"not tried: {why}"))
                continue
            if self._ends(one):
                break
            most = room if best is None else best.candidate.nbytes - 1
            self._outcome.trying = Trial(one, "").label
            trial = self._with_kept(one, most) if one.searches else self._try(one)
            if trial is not None and trial.met:
                best = trial
                yield trial
                if not one.searches:
                    break

    def _note(self, trial: Trial) -> Trial:
        self._outcome.trials.append(trial)
        self._store.out.stage("recommend", f"{trial.label}: {trial.verdict}")
        return trial

    def _ends(self, one: Candidate) -> bool:
        """Whether the bounds of the search end it before this candidate."""
        request, out = self._request, self._outcome
        took, expected = time.monotonic() - self._start, one.seconds(machine(self._store.root)) or 0.0
        expected += self._measured / max(1, self._count)
        if self._count >= request.max_candidates:
            out.stopped = f"{self._count} candidates were measured (--max-candidates)"
        elif request.max_seconds is not None and took + expected > request.max_seconds:
            out.stopped = f"the next candidate would take longer than {seconds(request.max_seconds)} (--max-minutes)"
        return bool(out.stopped)

    def _hopeless(self, one: Candidate) -> str:
        """Why measured parts of the loss exclude a candidate; "" if they don't."""
        mine = one.settings
        if mine.cache == "auto":
            others = [
                key for key in self._outcome.parts if key[::2] == (mine.format, mine.rotates) and key[1] != "auto"
            ]
            for key in others:
                whole, part = self._outcome.parts[key][1].whole.kl, self._outcome.parts[key][1].without.get("cache")
                if part is not None and part.kl > (1 - LITTLE) * whole:
                    return f"the KV cache has {100 * max(0.0, 1 - part.kl / whole):.0f} % of the loss"
        family = (mine.format, mine.cache, mine.rotates)
        limit = self._request.limits.get("kl")
        if one.searches or limit is None or family not in self._outcome.parts:
            return ""
        trial, losses = self._outcome.parts[family]
        exact = losses.without.get("weights")
        if exact is None or not losses.whole.high:
            return ""
        floor = trial.figures["kl"].low * exact.low / losses.whole.high
        return f"with exact weights the KL would be above {floor:.3g}" if floor > limit else ""

    def _try(self, one: Candidate) -> Trial:
        """Builds and measures a candidate, checks the quality of one that meets the budget, and has the parts of one
        that misses it measured."""
        out, took = self._store.out, one.seconds(machine(self._store.root))
        about = "" if took is None else f", about {seconds(took)} to make"
        number = f"{self._count + 1} of at most {self._request.max_candidates}"
        out.stage("recommend", f"candidate {number}: {Trial(one, '').label}, {size(one.nbytes)}{about}")
        began = time.monotonic()
        try:
            trial = measure(one, self._request, store=self._store)
            self._count += not one.exact
            if trial.met and (why := check_quality(trial, store=self._store)):
                trial = replace(trial, met=False, verdict=f"meets it, but {why}")
        except FAILURES as error:
            return self._note(not_measured(one, error))
        self._note(trial)
        if not trial.met:
            self._measure_parts(trial)
        self._measured += max(0.0, time.monotonic() - began - (trial.seconds or 0.0))
        return trial

    def _measure_parts(self, trial: Trial) -> None:
        """Of the first candidate of a family, where they can be measured."""
        one, models = trial.candidate.settings, trial.models
        family = (one.format, one.cache, one.rotates)
        if models is None or models.checkpoint is None or one.kept or family in self._outcome.parts:
            return
        recipe, model = trial.candidate.prepared.recipe, models.transformed or models.snapshot
        try:
            found = measure_parts(model, models.checkpoint, recipe, store=self._store, by_layer=False)
        except FAILURES as error:
            self._store.out.info(f"parts of the loss: {error.what}")
            return
        self._outcome.parts[family] = trial, found

    def _with_kept(self, one: Candidate, most: int | None) -> Trial | None:
        """The candidate with as few layers in more bits as meet the budget."""
        try:
            search = kept.open_search(one, self._base, most, store=self._store)
            try:
                found = search.by_mixtures(self._request.limits)
            except NotMixed as error:
                self._store.out.info(f"{error.what} {error.why} Mixtures are built to measure them.")
                return self._by_builds(search)
            return self._confirmed(search, found)
        except FAILURES as error:  # such as no room on the GPU for these layers
            return self._note(Trial(one, f"not tried: {words(error)}"))

    def _confirmed(self, search: kept.KeptSearch, found: Chosen) -> Trial | None:
        """Builds the mixture that was found, with more groups if the build misses what the mixture met."""
        number, total = len(found.groups), len(search.order)
        if not found.met:
            verdict = f"misses it with {number} of {len(search.groups)} groups kept"
            return self._note(Trial(search.base, verdict, figures=found.figures))
        trial = None
        for _ in range(STEPS):
            trial = self._try(search.candidate(number))
            if trial.met or number == total:
                break
            number = min(total, number + math.ceil(total / STEP))
        return trial

    def _by_builds(self, search: kept.KeptSearch) -> Trial | None:
        """The same by building each step: eighths of the groups, by bisection."""
        steps = sorted({math.ceil(len(search.order) * part / STEP) for part in range(1, STEP + 1)} - {0})
        return _bisect(steps, lambda number: self._try(search.candidate(number)))


def _bisect(numbers: Sequence[int], tried: Callable[[int], Trial]) -> Trial | None:
    """The trial of the smallest number that meets the budget, or of the largest one if none does."""
    if not numbers:
        return None
    best = tried(numbers[-1])
    low, high = -1, len(numbers) - 1
    while best.met and low + 1 < high:
        middle = (low + high) // 2
        trial = tried(numbers[middle])
        low, high, best = (low, middle, trial) if trial.met else (middle, high, best)
    return best
