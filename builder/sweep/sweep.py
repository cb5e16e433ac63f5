"""Runs a sweep: its points as a graph of steps, on an executor, with results that grow as points finish.

    OUTPUT/sweeps/<title>-<model>/results.csv, results.parquet, report.html
    OUTPUT/sweeps/<title>-<model>/runs/<time>/<step>/recipe.yaml, run.sh, run.log and the logs of its workers

Everything that is built and measured lies in the store, so what an earlier run finished is not run again.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from builder.core.atomic import make_directory
from builder.core.environment import STORE
from builder.core.store import Store, WouldRun, mark, replace_file
from builder.sweep import graph, measured, page, place, results, scheduler
from builder.sweep.expected import note
from builder.sweep.graph import Kind, Step
from builder.sweep.local import Job, LocalExecutor
from builder.sweep.measured import Result
from builder.sweep.planning import Planned, look
from builder.sweep.points import Point
from builder.sweep.scheduler import Executor, Outcome

REPORT = "report.html"
# What `--force` makes each kind of step repeat.
AGAIN: Mapping[Kind, Sequence[str]] = {
    "fetch": ("fetch",),
    "calibrate": ("calibrate",),
    "transform": ("transform",),
    "quantize": ("quantize",),
    "baseline": ("scores", "tasks"),
    "measure": ("scores", "tasks"),
    "build": ("render",),
    "load": (),
}


def run(
    planned: Planned,
    store: Store,
    begun: Callable[[Step], object],
    ended: Callable[[Outcome], object],
    executor: AbstractContextManager[Executor] | None = None,
) -> list[Result]:
    """Runs the steps. Returns the results of all points in their order; those that failed say why.

    begun, ended: told of each step. executor: where they run, by default here. Results and report are written
    anew after each point."""
    directory = place.claim(planned.title, planned.points, store)
    results.check(directory)
    logs = _new_run(directory / "runs") if planned.steps else directory
    found = {one.point.slug: one for one in planned.ready}
    failed: dict[str, dict[Kind, str]] = {}
    left = Counter(step.points[0].slug for step in planned.steps if step.kind in graph.OWN)
    ratios: measured.Known = {}

    def settled(outcome: Outcome) -> None:
        if outcome.step.kind in graph.OWN:
            [point] = outcome.step.points
            why = outcome.why or f"It exited with {outcome.code} and said nothing."
            failures = failed.setdefault(point.slug, {})
            failures.update({} if outcome.ok else {outcome.step.kind: why})
            left[point.slug] -= 1
            whole = not (left[point.slug] or failures)
            found[point.slug] = _result(point, store) if whole else measured.read_so_far(point, look(store), failures)
            write(planned, directory, found, ratios)
        note(outcome, logs)
        ended(outcome)

    mark(store.root)
    write(planned, directory, found, ratios)
    if planned.steps:
        with executor or LocalExecutor(planned.whole) as runs:
            jobs = _jobs(planned, store, logs)
            scheduler.run(planned.steps, jobs, runs, begun, settled)
    for slug, failures in failed.items():
        if found[slug].why and not failures:  # a shared disk may show late what another machine wrote
            found[slug] = _result(found[slug].point, store)
    return write(planned, directory, found, ratios)


def _new_run(runs: Path) -> Path:
    """A directory that no other sweep has, not even one that began in the same second."""
    stamp, number = time.strftime("%Y%m%d-%H%M%S"), 1
    make_directory(runs)
    while True:
        place = runs / (stamp if number == 1 else f"{stamp}-{number}")
        with suppress(FileExistsError):
            place.mkdir()
            return place
        number += 1


def _result(point: Point, store: Store) -> Result:
    """What commands that succeeded left of their point."""
    try:
        return measured.read(point, look(store))
    except WouldRun as error:
        return Result(point, why=f"Its commands succeeded, and the store has no result of it: {error}")


def write(planned: Planned, directory: Path, found: Mapping[str, Result], ratios: measured.Known) -> list[Result]:
    """Writes the results that are there and the page of them. Returns them in the order of the points."""
    so_far = [found[point.slug] for point in planned.points if point.slug in found]
    ordered = measured.with_ratios(so_far, ratios, planned.points)
    if ordered:
        results.update(directory, ordered)
        replace_file(directory / REPORT, page.page(planned.title, ordered, planned.points))
    return ordered


def _jobs(planned: Planned, store: Store, logs: Path) -> Callable[[Step], Job]:
    def job(step: Step) -> Job:
        directory = logs / step.name
        recipe = directory / "recipe.yaml"
        argv, before = step.argv(str(recipe), str(store.root)), step.before(str(recipe), str(store.root))
        if not directory.exists():
            make_directory(directory)
            replace_file(recipe, step.points[0].recipe_file)
            replace_file(directory / "run.sh", _script(step.kind, argv, before))
        return Job(step.name, argv, planned.takes[step.name], directory, before)

    return job


def _script(kind: Kind, argv: Sequence[str], before: Sequence[str] = ()) -> str:
    """Repeats a step by hand. What the store has is not made again unless that is asked for."""
    python = shlex.quote(sys.executable)
    again = "".join(f" --force {stage}" for stage in AGAIN[kind])
    lines = ["#!/bin/sh"]
    lines += [f"# The store has what this makes. To make it again: sh run.sh{again}"] if again else []
    lines += [f"cd {shlex.quote(os.getcwd())} || exit"]
    lines += [f"export {STORE}={shlex.quote(os.environ[STORE])}"] if os.environ.get(STORE) else []
    lines += [f"{python} -m {shlex.join(before)} || exit"] if before else []
    lines += [f'exec {python} -m {shlex.join(argv)} "$@"']
    return "\n".join([*lines, ""])
