"""Measures what a sweep costs beside its work, and what sharing and two workers save, against their goals:

    python benchmarks/sweep.py [--points 1 4 16] [--steps 200] [--json]

Sharing: N points of one model, which differ in their layers in BF16, in one sweep with two steps at once; against N
separate builds (N times one with a store of its own) and against the best possible: the longest path of its steps or
their sum over two slots, whichever takes longer, with the seconds that the steps took in this sweep.

Own cost: seconds of this process for each point: reading the file and planning, starting and ending the point's two
steps where the executor does nothing, reading its result and writing files and page. A process of a local step is not
part of it, nor is the wait for it.

Two workers: steps that compute in a few kilobytes, one at a time and two at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import process_tree
import yaml
from comparison import ENVIRONMENT, Figure, Result, show

from builder.core.output import Output
from builder.core.store import Store
from builder.sweep import graph, measured, planning, points, scheduler, sweep
from builder.sweep.graph import Step
from builder.sweep.local import Ended, Job, LocalExecutor
from builder.sweep.slots import Slots

ROOT = Path(__file__).parents[1]
WITHIN, OWN_COST, TWO = 1.2, 0.050, 1.8
LAYERS = 6  # of the bundled model
WORK = "s = 0\nfor n in range(12_000_000): s ^= n * n"
OFTEN = 8  # steps of the two-workers measurement


def file(directory: Path, count: int) -> Path:
    """A sweep with so many data-free points: FP8, each with another set of layers in BF16."""
    sets = [[f"model.layers.{layer}.*" for layer in range(LAYERS) if number >> layer & 1] for number in range(count)]
    listed = [{"name": f"p{number}", "recipe": {"quantization.keep_bf16": kept}} for number, kept in enumerate(sets)]
    recipe = {
        "model": {"id": str(ROOT / "tests/data/tiny-qwen3")}, "gpu": "cpu",
        "calibration": {"samples": 0}, "quantization": {"format": "fp8", "kv_cache_dtype": "auto"},
        "evaluation": {"data": [str(ROOT / "tests/data/eval/prose.jsonl")], "texts": 4, "max_tokens": 64},
    }  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    found = directory / f"{count}.yaml"
    found.write_text(yaml.safe_dump({"title": f"of {count}", "recipe": recipe, "points": listed}))
    return found


def seconds_of(steps: Sequence[Step], runs: Path) -> dict[str, float]:
    """What each step took: from the note beside its log."""
    return {step.name: json.loads((runs / step.name / "step.json").read_text())["seconds"] for step in steps}


def best(steps: Sequence[Step], took: Mapping[str, float], slots: int) -> float:
    """The least that any schedule takes."""
    ends: dict[str, float] = {}
    for step in steps:
        ends[step.name] = took[step.name] + max((ends[need] for need in step.needs), default=0.0)
    return max(max(ends.values()), sum(took.values()) / slots)


def sharing(work: Path, counts: Sequence[int], result: Result) -> None:
    """Wall time of sweeps against separate builds and the best possible."""

    def timed(what: Path, output: Path) -> process_tree.Cost:
        argv = [sys.executable, "-m", "builder", "sweep", str(what), "--output", str(output), "--jobs", "2", "-q"]
        return process_tree.run(argv, ENVIRONMENT)

    alone = timed(file(work, 1), work / "alone")
    result.costs["one, by itself"] = [alone]
    for count in counts:
        output = work / f"of-{count}"
        cost = timed(file(work, count), output)
        result.costs[f"{count} in one sweep"] = [cost]
        _, found = points.read(work / f"{count}.yaml")
        steps = graph.steps(found)
        [runs] = output.glob("sweeps/*/runs/*")
        least = best(steps, seconds_of(steps, runs), min(2, len(os.sched_getaffinity(0))))
        result.figures.append(Figure(f"{count} points / the best possible", cost.seconds / least, WITHIN))
        separate = count * alone.seconds / cost.seconds
        result.notes.append(f"{count} points: {separate:.2f} times as fast as {count} separate builds")


class Instant:
    """An executor whose jobs have ended at once."""

    def __init__(self) -> None:
        self._ended: list[Ended] = []

    def fits(self, job: Job) -> bool:
        """All do."""
        return True

    def start(self, job: Job) -> None:
        """Ends it."""
        self._ended.append(Ended(job.name, 0, 0.0))

    def wait(self) -> list[Ended]:
        """Those that were started."""
        done, self._ended = self._ended, []
        return done


@contextmanager
def watch() -> Iterator[list[float]]:
    """The CPU seconds of this process in the block."""
    found: list[float] = []
    began = time.process_time()
    yield found
    found.append(time.process_time() - began)


def own_cost(work: Path, count: int, result: Result) -> None:
    """CPU seconds for each point of a plan, of scheduling, and of writing results. Needs the store of `sharing`."""
    many, few = file(work, 60), work / f"{count}.yaml"
    title, found = points.read(few)
    store, empty = (Store(work / name, Output("quiet"), dry=True) for name in (f"of-{count}", "none"))
    planned = planning.plan(title, found, empty)  # imports
    parts: dict[str, float] = {}
    with watch() as took:
        title, every = points.read(many)
        planning.plan(title, every, empty)
    parts["plan"] = took[0] / len(every)
    steps = graph.steps(every)
    with watch() as took:
        jobs = {step.name: Job(step.name, (), Slots(1, 0), work) for step in steps}
        scheduler.run(steps, lambda step: jobs[step.name], Instant(), print_nothing, print_nothing)
    parts["schedule"] = took[0] / len(every)
    first, *others = found
    read, ratios = {first.slug: measured.read(first, planning.look(store))}, measured.Known()
    sweep.write(planned, work, read, ratios)  # imports
    parts["read"] = parts["write"] = 0.0
    for point in others:
        with watch() as took:
            read[point.slug] = measured.read(point, planning.look(store))
        parts["read"] += took[0] / len(others)
        with watch() as took:
            sweep.write(planned, work, read, ratios)
        parts["write"] += took[0] / len(others)
    result.figures.append(Figure("own CPU seconds for each point", sum(parts.values()), OWN_COST))
    result.notes.append("of these: " + ", ".join(f"{name} {1000 * one:.1f} ms" for name, one in parts.items()))


def print_nothing(_: object) -> None:
    """Nobody watches."""


def empty_steps(work: Path, count: int, result: Result) -> None:
    """Wall time for each empty local step, beside that of the same command without a scheduler."""
    argv = ("timeit", "-n1", "-r1", "pass")
    one = process_tree.run([sys.executable, "-m", *argv], ENVIRONMENT).seconds
    steps = [Step(f"s{number}", "measure", (), ()) for number in range(count)]
    began = time.perf_counter()
    with LocalExecutor(Slots(1, 1 << 30)) as executor:
        scheduler.run(steps, lambda step: job(step, argv, work / "empty"), executor, print_nothing, print_nothing)
    each = (time.perf_counter() - began) / count
    result.notes.append(
        f"{count} empty local steps: {1000 * each:.0f} ms each, of which Python's own start {1000 * one:.0f} ms"
    )


def job(step: Step, argv: Sequence[str], place: Path) -> Job:
    """A step of one core with a directory for its log."""
    (place / step.name).mkdir(parents=True, exist_ok=True)
    return Job(step.name, argv, Slots(1, 0), place / step.name)


def two_workers(work: Path, result: Result) -> None:
    """Wall time of steps one by one over that of two at once."""
    cores = len(os.sched_getaffinity(0))
    if cores < 2:
        result.notes.append("one core: two workers were not measured")
        return
    steps = [Step(f"w{number}", "measure", (), ()) for number in range(OFTEN)]
    walls = []
    for slots in (1, 2):
        began = time.perf_counter()
        with LocalExecutor(Slots(slots, 1 << 30)) as executor:
            place = work / f"workers-{slots}"
            argv = ("timeit", "-n1", "-r1", WORK)

            def made(step: Step, argv: Sequence[str] = argv, place: Path = place) -> Job:
                return job(step, argv, place)

            scheduler.run(steps, made, executor, print_nothing, print_nothing)
        walls.append(time.perf_counter() - began)
    result.figures.append(Figure("one worker / two workers", walls[0] / walls[1], TWO, at_least=True))


def main() -> int:
    """Returns 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, nargs="+", default=[1, 4, 16], help="sizes of the sweeps")
    parser.add_argument("--steps", type=int, default=100, help="empty local steps")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    asked: Any = parser.parse_args()
    os.chdir(ROOT)
    result = Result("Sweeps")
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        sharing(work, asked.points, result)
        own_cost(work, asked.points[-1], result)
        empty_steps(work, asked.steps, result)
        two_workers(work, result)
    if asked.json:
        print(json.dumps(result.as_json()))
    else:
        show(result, "one, by itself")
    return 0 if all(one.met for one in result.figures) else 1


if __name__ == "__main__":
    sys.exit(main())
