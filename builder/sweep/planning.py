"""A sweep before it runs: what the store has of it, which steps are left, and what each takes. Nothing is made."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from builder import pipeline
from builder.core.errors import BuilderError, UsageError
from builder.core.output import Output
from builder.core.store import Store, WouldRun
from builder.evaluate import memory, tasks
from builder.hub.snapshot import Source
from builder.preflight import checks
from builder.preflight.memory import Machine, machine
from builder.preflight.prepare import Prepared, prepare
from builder.preflight.ways import device
from builder.recipe.schema import Model
from builder.sweep import graph, measured, place, served
from builder.sweep.cluster import Cluster
from builder.sweep.expected import Expected, expected
from builder.sweep.graph import Kind, Step
from builder.sweep.measured import Result
from builder.sweep.points import Point
from builder.sweep.slots import Slots, of_step

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
