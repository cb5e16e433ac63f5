"""A sweep in the terminal: what would run, what runs, and the table of results."""

from __future__ import annotations

import time
from collections.abc import Sequence

from builder.core.errors import EvaluationError
from builder.core.output import Output, seconds, size
from builder.core.store import Store
from builder.preflight.memory import machine
from builder.sweep import measured, page
from builder.sweep.graph import Step
from builder.sweep.measured import Result
from builder.sweep.scheduler import Outcome
from builder.sweep.sweep import Planned


def plan(planned: Planned, store: Store, out: Output) -> None:
    """The steps of a dry run: who shares them, and what each takes."""
    host = machine(store.root)
    rows = []
    for step in planned.steps:
        choice = planned.prepared[step.points[0].slug].way(host)
        took = choice.taken.seconds if choice and step.kind in ("quantize", "measure") else None
        takes = planned.takes[step.name]
        rows.append((
            step.name, f"{len(step.points)} points" if len(step.points) > 1 else "1", ", ".join(step.needs) or "-",
            str(takes.cores), size(takes.memory), str(takes.gpus),
            f"about {seconds(took)}" if took is not None else "-",
        ))  # fmt: skip
    head = ["step", "for", "after", "cores", "memory", "GPUs", "to quantize"]
    out.table(planned.title, head, rows)
    out.text(f"{len(planned.ready)} of {len(planned.points)} points are in the store; {len(rows)} steps would run")
    out.result({
        "points": [point.name for point in planned.points],
        "ready": [one.point.name for one in planned.ready],
        "steps": [{"name": step.name, "kind": step.kind, "points": [one.name for one in step.points],
                   "needs": step.needs} for step in planned.steps],
    })  # fmt: skip


class Told:
    """Tells of steps as they begin and end, with an estimate of the time left once one has ended."""

    def __init__(self, steps: int, out: Output) -> None:
        self._steps, self._out, self._done, self._began = steps, out, 0, time.monotonic()

    def begun(self, step: Step) -> None:
        """A step begins."""
        self._out.stage(step.kind, f"{step.name} begins")

    def ended(self, outcome: Outcome) -> None:
        """A step has ended."""
        self._done += 1
        name, left = outcome.step.name, ""
        if self._done < self._steps:
            took = (time.monotonic() - self._began) / self._done * (self._steps - self._done)
            left = f"; {self._done} of {self._steps} steps, about {seconds(took)} left"
        if outcome.code == EvaluationError.exit_code and outcome.step.kind in ("build", "load"):
            self._out.stage(outcome.step.kind, f"{name} has nothing to serve: the build was rejected{left}")
        elif outcome.ok:
            self._out.stage(outcome.step.kind, f"{name} took {seconds(outcome.seconds)}{left}")
        else:
            last = (outcome.why.strip().splitlines() or ["no message"])[-1]
            self._out.warn(f"{name} failed: {last}{left}")


def table(planned: Planned, results: Sequence[Result], out: Output) -> None:
    """All figures, and the point that is recommended."""
    head, rows = page.table(results)
    out.table(planned.title, head, [tuple(row) for row in rows])
    effects = measured.effects(results)
    if effects:
        out.table("KL with a choice / with the first of its axis", ["choice", "ratio"],
                  [(name, str(one)) for name, one in effects.items()])  # fmt: skip
    chosen = measured.recommended(results)
    if chosen:
        out.text(f"recommended {chosen[0].point.name}: {chosen[1]}")
