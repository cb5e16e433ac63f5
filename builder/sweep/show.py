"""A sweep in the terminal: what would run, what runs, and the table of results."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from builder.core.errors import EvaluationError
from builder.core.output import Output, seconds, size
from builder.sweep import measured, page
from builder.sweep.expected import makespan
from builder.sweep.graph import Step
from builder.sweep.measured import Result
from builder.sweep.planning import Planned
from builder.sweep.scheduler import Outcome

BASES = {"measured": "earlier", "plan": "plan", "unknown": "-"}


def plan(planned: Planned, out: Output) -> None:
    """The steps of a dry run: who shares them, what each takes, and how long all of them take."""
    rows, disk = [], 0
    for step in planned.steps:
        takes, found = planned.takes[step.name], planned.expected[step.name]
        disk += found.disk
        rows.append((
            step.name, f"{len(step.points)} points" if len(step.points) > 1 else "1", ", ".join(step.needs) or "-",
            str(takes.cores), size(found.memory), str(takes.gpus), size(found.disk) if found.disk else "-",
            "-" if found.seconds is None else f"about {seconds(found.seconds)}", BASES[found.basis],
        ))  # fmt: skip
    head = ["step", "for", "after", "cores", "memory", "GPUs", "disk", "time", "time from"]
    out.table(planned.title, head, rows)
    had = ", ".join(f"{count} {kind}" for kind, count in planned.cached.items()) or "nothing"
    out.text(f"{len(planned.ready)} of {len(planned.points)} points are in the store; {len(rows)} steps would run")
    out.text(f"cached     {had}")
    took = makespan(planned.steps, planned.takes, planned.whole, planned.expected)
    unknown = sum(one.seconds is None for one in planned.expected.values())
    more = f"; {unknown} steps have no estimate and are not in it" if unknown else ""
    out.text(f"expected   about {seconds(took)}, {size(disk)} more on the disk{more}")
    out.result({
        "points": [point.name for point in planned.points],
        "ready": [one.point.name for one in planned.ready],
        "cached": planned.cached,
        "seconds": took, "disk": disk,
        "steps": [{"name": step.name, "kind": step.kind, "points": [one.name for one in step.points],
                   "needs": step.needs, **asdict(planned.expected[step.name])} for step in planned.steps],
    })  # fmt: skip


class Told:
    """Tells of steps as they begin and end, with an estimate of the time left. A context: on a terminal, a table of the
    steps that run is redrawn while it is open."""

    def __init__(self, planned: Planned, out: Output) -> None:
        self._planned, self._out = planned, out
        self._steps, self._began = len(planned.steps), time.monotonic()
        self._running: dict[str, float] = {}
        self._done: set[str] = set()
        self._drawn: Any = None

    def __enter__(self) -> Told:
        if self._out.live:
            from rich.live import Live

            live = Live(get_renderable=self.draw, console=self._out.console, refresh_per_second=2, transient=True)
            self._drawn = live
            live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._drawn is not None:
            self._drawn.stop()

    def begun(self, step: Step) -> None:
        """A step begins."""
        self._running[step.name] = time.monotonic()
        if self._drawn is None:
            self._out.stage(step.kind, f"{step.name} begins")

    def ended(self, outcome: Outcome) -> None:
        """A step has ended."""
        name = outcome.step.name
        self._running.pop(name, None)
        self._done.add(name)
        left = f"; {self._left()}" if len(self._done) < self._steps else ""
        if outcome.code == EvaluationError.exit_code and outcome.step.kind in ("build", "load"):
            self._out.stage(outcome.step.kind, f"{name} has nothing to serve: the build was rejected{left}")
        elif outcome.ok:
            self._out.stage(outcome.step.kind, f"{name} took {seconds(outcome.seconds)}{left}")
        else:
            last = (outcome.why.strip().splitlines() or ["no message"])[-1]
            self._out.warn(f"{name} failed: {last}{left}")

    def draw(self) -> Any:
        """The table of the steps that run: how long they have, how long they are expected to take."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        drawn = Table(box=box.SIMPLE, title=Text(self._left()), title_justify="left")
        for head in ("step", "for", "running", "expected", "memory"):
            drawn.add_column(head)
        users = {step.name: len(step.points) for step in self._planned.steps}
        for name, began in [*self._running.items()]:
            found = self._planned.expected[name]
            took = f"about {seconds(found.seconds)}" if found.seconds is not None else "-"
            whose = f"{users[name]} point{'s' * (users[name] > 1)}"
            cells = (name, whose, seconds(time.monotonic() - began), took, size(found.memory))
            drawn.add_row(*map(Text, cells))
        return drawn

    def _left(self) -> str:
        """How many steps have ended, and an estimate of the time that the others take: by what is expected of each and
        by how long the finished ones really took."""
        known = [one.seconds for one in self._planned.expected.values() if one.seconds is not None]
        usual = sum(known) / len(known) if known else 10.0
        work = {name: usual if one.seconds is None else one.seconds for name, one in self._planned.expected.items()}
        done = sum(took for name, took in work.items() if name in self._done)  # which changes while this is drawn
        if done:
            left = (time.monotonic() - self._began) * (sum(work.values()) - done) / done
        else:
            left = makespan(self._planned.steps, self._planned.takes, self._planned.whole, self._planned.expected)
        return f"{len(self._done)} of {self._steps} steps, about {seconds(left)} left"


def table(planned: Planned, results: Sequence[Result], out: Output) -> None:
    """All figures, and the point that is recommended."""
    head, rows = page.table(results)
    out.table(planned.title, head, [tuple(row) for row in rows])
    effects = measured.effects(results, planned.points)
    if effects:
        out.table("KL with a choice / with the first of its axis", ["choice", "ratio", "mixed"],
                  [(name, str(one.mean), one.mixed or "-") for name, one in effects.items()])  # fmt: skip
    chosen = measured.recommended(results)
    if chosen:
        out.text(f"recommended {chosen[0].point.name}: {chosen[1]}")
