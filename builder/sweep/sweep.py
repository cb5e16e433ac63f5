"""Runs a sweep: its points as a graph of steps, on an executor, with results that grow as points finish.

    OUTPUT/sweeps/<title>-<model>/results.csv, results.parquet, report.html
    OUTPUT/sweeps/<title>-<model>/runs/<time>/<step>/recipe.yaml, run.sh, run.log and the logs of its workers

Everything that is built and measured lies in the store, so what an earlier run finished is not run again.
"""

from __future__ import annotations

import math
import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from builder import pipeline
from builder.core.atomic import make_directory
from builder.core.environment import STORE
from builder.core.errors import BuilderError, UsageError
from builder.core.output import Output
from builder.core.store import Store, WouldRun, mark, replace_file
from builder.evaluate import memory, tasks
from builder.hub.snapshot import Source
from builder.preflight import checks
from builder.preflight.memory import Machine, machine
from builder.preflight.prepare import Prepared, prepare
from builder.preflight.ways import device
from builder.recipe.schema import Model
from builder.sweep import graph, measured, page, place, results, scheduler, served
from builder.sweep.cluster import Cluster
from builder.sweep.expected import Expected, expected, note
from builder.sweep.graph import Kind, Step
from builder.sweep.local import Job, LocalExecutor
from builder.sweep.measured import Result
from builder.sweep.points import Point
from builder.sweep.scheduler import Executor, Outcome
from builder.sweep.slots import Slots, of_step

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
AT_ONCE = 4  # steps that share the cores, unless the user says otherwise


@dataclass(frozen=True)
class Planned:
    """A sweep before it runs. ready: results that the store has already. takes: {step: what it takes}. whole: what all
    steps share. expected: {step: seconds, memory and disk}. cached: steps that the store has, by kind."""

    title: str
    points: Sequence[Point]
    prepared: Mapping[str, Prepared]
    ready: Sequence[Result]
    steps: Sequence[Step]
    takes: Mapping[str, Slots]
    whole: Slots
    expected: Mapping[str, Expected]
    cached: Mapping[Kind, int]

    def directory(self, store: Store) -> Path:
        """Where its results are."""
        return place.directory(self.title, self.points, store)


def plan(
    title: str, points: Sequence[Point], store: Store, *, jobs: int | None = None, cluster: Cluster | None = None
) -> Planned:
    """What would run. UsageError that names every point whose model, formats and layers do not go together.

    jobs: steps that run at once at most; by default up to 4 on a machine, as far as cores and memory go. cluster: whose
    nodes run them, instead of this machine."""
    host = cluster.host if cluster else machine(store.root)
    prepared = _prepared(points, host, store)
    ready, missing, made = list[Result](), list[Point](), dict[str, set[str]]()
    for point in points:
        dry = look(store)
        try:
            ready.append(measured.read(point, dry, None if point.served else prepared[point.slug]))
        except WouldRun:
            missing.append(point)
            made[point.slug] = {one.stage for one in dry.done}
    every = graph.steps(points)
    steps = _missing(graph.steps(missing), made, store)
    whole = cluster.whole if cluster else _whole(host)
    on_each = math.ceil(len(missing) / len(cluster.nodes)) if cluster else len(missing)
    at_once = min(jobs or AT_ONCE, max(1, on_each))
    cores = max(1, whole.cores // at_once)
    takes = {}
    for step in steps:
        found = of_step(step.kind, prepared[step.points[0].slug], host, cores).within(whole)
        takes[step.name] = (
            found if jobs is None or cluster else Slots(max(found.cores, cores), found.memory, found.gpus)
        )
    whole = cluster.total if cluster else whole
    cached = Counter(step.kind for step in every) - Counter(step.kind for step in steps)
    return Planned(
        title, points, prepared, ready, steps, takes, whole, expected(steps, prepared, takes, host, store), cached
    )


def look(store: Store) -> Store:
    """A dry store that lists what it finds and says nothing."""
    return Store(store.root, Output("quiet"), dry=True)


def _missing(steps: Sequence[Step], made: Mapping[str, set[str]], store: Store) -> list[Step]:
    """The steps without those whose results are in the store. made: {point: stages of it that are there}."""
    done = {step.name for step in steps if _is_stored(step, made, store)}
    return [
        replace(step, needs=tuple(need for need in step.needs if need not in done))
        for step in steps
        if step.name not in done
    ]


def _is_stored(step: Step, made: Mapping[str, set[str]], store: Store) -> bool:
    """Whether the store has what the step makes. A step that nothing follows is stored if its point's result is."""
    dry, [point, *_] = look(store), step.points
    if step.kind in graph.STAGES:
        return graph.STAGES[step.kind] in made[point.slug]
    try:
        if step.kind == "measure":
            if not point.served:
                return False  # or else the point would be ready
            measured.read_eval(point, dry)
        elif step.kind == "build":
            served.read_build(point, dry)
        elif step.kind == "load":
            served.read(point, dry)
        else:
            alone = point.resolved.recipe.evaluation.model_copy(
                update={"runners": ("bf16",), "min_score": None, "max_kl": None}
            )
            recipe = point.resolved.recipe.model_copy(update={"evaluation": alone})
            pipeline.measure(replace(point.resolved, recipe=recipe), dry)
    except WouldRun:
        return False
    return True


def _prepared(points: Sequence[Point], host: Machine, store: Store) -> dict[str, Prepared]:
    found, wrong, sources = dict[str, Prepared](), list[str](), dict[Model, Source]()
    for point in points:
        try:
            if point.served:
                checks.check_machine(point.served, serving=point.load is not None)
            asked, model = point.served or point.resolved, point.recipe.model
            made = prepare(asked, store, layouts=point.served is not None, source=sources.get(model))
            found[point.slug] = made
            if made.quantized is None:  # or else its source is changed to what it was made from
                sources[model] = made.source
            if point.measured and point.recipe.tasks.names and memory.of_facts(point.recipe, made.model, host) == "low":
                wrong.append(f"{point.name}: {tasks.NOT_WHOLE}")
        except BuilderError as error:
            wrong.append(f"{point.name}: {error.what} {error.why}".strip())
    if wrong:
        raise UsageError("Not all points can be built.", why="\n".join(wrong), hint="Exclude them; nothing was run.")
    return found


def _whole(host: Machine) -> Slots:
    """What this machine has: memory that is free now, and one GPU if it is not known how many."""
    from builder.machine.gpus import visible

    on, gpus = device(host), visible()
    return Slots(on.cores, host.available, int(on.gpu) if gpus is None else len(gpus))


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
