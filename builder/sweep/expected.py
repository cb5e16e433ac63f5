"""What steps are expected to take: from steps of earlier sweeps and stages in the store, else from the plan.

Each step that ran leaves step.json beside its log. Of those of the same kind, model and format the one that agrees with
the step in the most other settings counts, and of equal ones the newest.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from builder.core.manifest import Damaged, read_object
from builder.core.store import Artifact, Store, artifacts, replace_file, strings
from builder.preflight.memory import Machine
from builder.preflight.prepare import Prepared
from builder.publish.links import source_of
from builder.quality.check import cost
from builder.sweep import graph, scheduler
from builder.sweep.graph import Step
from builder.sweep.local import Ended, Job
from builder.sweep.place import DIRECTORY
from builder.sweep.scheduler import Outcome
from builder.sweep.slots import Slots

NOTE = "step.json"
SAME = ("kind", "model", "format")  # what an earlier step must have in common with one
# The stages of the store that each kind of step fills, with what the plan calls them on the disk.
FILLED: Mapping[str, Sequence[str]] = {**{kind: (stage,) for kind, stage in graph.STAGES.items()},
                                       "build": ("ranks", "engine")}  # fmt: skip
Basis = Literal["measured", "plan", "unknown"]


@dataclass(frozen=True)
class Expected:
    """seconds: None if nothing is known. memory: of one process at its peak. disk: bytes that stay in the store. basis:
    of the seconds and the memory."""

    seconds: float | None
    memory: int
    disk: int
    basis: Basis


def note(outcome: Outcome, runs: Path) -> None:
    """Keeps what a step took beside its log, for later sweeps."""
    if outcome.ok and (runs / outcome.step.name).is_dir():
        took = {"seconds": outcome.seconds, "memory": outcome.memory}
        replace_file(runs / outcome.step.name / NOTE, json.dumps({**settings(outcome.step), **took}, indent=1))


def settings(step: Step) -> dict[str, Any]:
    """What a step's time depends on."""
    point = step.points[0]
    recipe = point.recipe
    found: dict[str, Any] = {"kind": step.kind, "model": source_of(recipe.model)}
    found["format"] = "" if step.kind in ("fetch", "calibrate", "baseline") else recipe.quantization.format
    found["algorithm"], found["memory way"] = recipe.quantization.algorithm, recipe.quantization.memory
    found["rows"] = [recipe.calibration.samples, recipe.calibration.seq_len]
    found["transform"] = recipe.transform.name
    found["texts"] = [recipe.evaluation.texts, recipe.evaluation.max_tokens, len(recipe.evaluation.data)]
    found["tasks"] = [*recipe.tasks.names, recipe.tasks.limit]
    found["load"] = point.load.model_dump(mode="json") if point.load and step.kind == "load" else None
    return found


def notes(store: Store) -> list[dict[str, Any]]:
    """Those of all earlier sweeps of a store, oldest first."""
    files = sorted((store.root / DIRECTORY).glob(f"*/runs/**/{NOTE}"), key=_written)
    found = []
    for file in files:
        with suppress(Damaged):
            one = read_object(file)
            if all(isinstance(one.get(name), int | float) for name in ("seconds", "memory")):
                found.append(one)
    return found


def _written(file: Path) -> float:
    """When; 0 for one that was removed since it was listed."""
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0


def expected(
    steps: Sequence[Step], prepared: Mapping[str, Prepared], takes: Mapping[str, Slots], host: Machine, store: Store
) -> dict[str, Expected]:
    """{name of a step: what it is expected to take}."""
    earlier, stored = notes(store), artifacts(store.root, check_files=False)
    found = {}
    for step in steps:
        mine, ready = settings(step), prepared[step.points[0].slug]
        alike = [one for one in earlier if all(one.get(name) == mine[name] for name in SAME)]
        made = _made(step, stored)
        disk = _size(made) if made else sum(ready.sizes.disk.get(stage, 0) for stage in FILLED.get(step.kind, ()))
        if alike:
            one = max(reversed(alike), key=lambda one: sum(one.get(name) == value for name, value in mine.items()))
            found[step.name] = Expected(float(one["seconds"]), int(one["memory"]), disk, "measured")
            continue
        took = float(made.manifest["seconds"]) if made else _planned(step, ready, host)
        basis: Basis = "measured" if made else "unknown" if took is None else "plan"
        found[step.name] = Expected(took, takes[step.name].memory, disk, basis)
    return found


def _made(step: Step, stored: Sequence[Artifact]) -> Artifact | None:
    """The newest artifact of the step's stage, model and format that any command has made."""
    recipe = step.points[0].recipe
    source = source_of(recipe.model)
    models = [
        one
        for one in stored
        if one.stage == "snapshot" and source in (one.manifest["ingredients"].get("directory"), one.facts["model_id"])
    ]
    if step.kind == "fetch":
        found = models
    elif step.kind in ("transform", "quantize"):
        wanted = {recipe.quantization.format} if step.kind == "quantize" else {recipe.transform.name}
        found = [
            one
            for one in stored
            if one.stage == graph.STAGES[step.kind]
            and {*strings(one.manifest["ingredients"])} >= wanted
            and {*strings(one.manifest["ingredients"])} & {model.digest for model in models}
        ]
    else:
        found = []
    return max(found, key=lambda one: float(one.manifest["started"]), default=None)


def _size(artifact: Artifact) -> int:
    return sum(entry["size"] for entry in artifact.manifest["files"].values())


def _planned(step: Step, prepared: Prepared, host: Machine) -> float | None:
    """The plan's estimate in seconds; None for a download, tasks and a server, which it has none of."""
    choice, recipe = prepared.way(host), prepared.recipe
    if step.kind == "calibrate":
        return 1.0  # of rows that are here
    if step.kind == "quantize":
        return choice.taken.seconds if choice else None
    if step.kind == "build":
        return cost(prepared.model, recipe, host)[0] if recipe.quality.check else None
    part = recipe.evaluation
    if step.kind in ("baseline", "measure") and part.max_tokens and not recipe.tasks.names:
        as_check = {"texts": part.texts * max(1, len(part.data)), "max_tokens": part.max_tokens}
        both = cost(
            prepared.model, recipe.model_copy(update={"quality": recipe.quality.model_copy(update=as_check)}), host
        )
        return both[0] / 2  # of the BF16 model and the checkpoint
    return None


class _Simulated:
    """An executor that takes the expected time and does nothing."""

    def __init__(self, slots: Slots, seconds: Callable[[str], float]) -> None:
        self.free, self.now = slots, 0.0
        self._seconds = seconds
        self._running: list[tuple[float, str, Slots]] = []

    def fits(self, job: Job) -> bool:
        return self.free.holds(job.takes)

    def start(self, job: Job) -> None:
        heapq.heappush(self._running, (self.now + self._seconds(job.name), job.name, job.takes))
        self.free = self.free.minus(job.takes)

    def wait(self) -> list[Ended]:
        self.now, name, takes = heapq.heappop(self._running)
        self.free = self.free.plus(takes)
        return [Ended(name, 0, 0.0)]


def makespan(steps: Sequence[Step], takes: Mapping[str, Slots], whole: Slots, found: Mapping[str, Expected]) -> float:
    """Seconds until the last of these steps has ended, if each takes what is expected. Unknown ones count as 0."""
    executor = _Simulated(whole, lambda name: found[name].seconds or 0.0)

    def job(step: Step) -> Job:
        return Job(step.name, (), takes[step.name], Path())

    scheduler.run(steps, job, executor, lambda step: None, lambda outcome: None)
    return executor.now
