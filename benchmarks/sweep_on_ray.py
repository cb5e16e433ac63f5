"""Measures what a step costs on Ray beside its work, against the goal of 200 ms for each point:

    python benchmarks/sweep_on_ray.py [--steps 20] [--json]

A cluster of one node with one core on this machine runs steps that do nothing, one after the other, and so does the
local executor; both start the same process for each. The difference of their wall times for each step is what Ray and
the way there cost; the CPU time is that of the process that schedules. Rounds of both take turns; the median counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

import ray_cluster  # noqa: E402

from builder.sweep import cluster, scheduler  # noqa: E402
from builder.sweep.graph import Step  # noqa: E402
from builder.sweep.local import Job, LocalExecutor  # noqa: E402
from builder.sweep.ray_executor import RayExecutor  # noqa: E402
from builder.sweep.slots import Slots  # noqa: E402

GOAL = 0.200
ROUNDS = 5
STEPS_OF_A_POINT = 2  # of those that nothing shares, usually: quantize and measure


def timed(make: Callable[[], AbstractContextManager[Any]], place: Path, count: int) -> tuple[float, float]:
    """Wall and CPU seconds for each step."""

    def job(step: Step) -> Job:
        directory = place / step.name
        directory.mkdir(exist_ok=True)
        return Job(step.name, ("timeit", "-n1", "-r1", "pass"), Slots(1, 1000), directory)

    steps = [Step(f"s{number}", "measure", (), ()) for number in range(count)]
    with make() as executor:
        began, cpu = time.monotonic(), time.process_time()
        found = scheduler.run(steps, job, executor, lambda step: None, lambda outcome: None)
        took = time.monotonic() - began, time.process_time() - cpu
    assert all(outcome.ok for outcome in found.values())
    return took[0] / count, took[1] / count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=20, help="of each round")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, ray_cluster.running(1, 1) as nodes:
        place = Path(name)
        with cluster.connected(nodes.address, [], place) as on:
            local, ray = list[tuple[float, float]](), list[tuple[float, float]]()
            timed(lambda: RayExecutor(on, shared=True), place, 2)  # Ray's worker starts
            for _ in range(ROUNDS):
                local.append(timed(lambda: LocalExecutor(Slots(1, 1 << 30)), place, arguments.steps))
                ray.append(timed(lambda: RayExecutor(on, shared=True), place, arguments.steps))
    more = [one[0] - other[0] for one, other in zip(ray, local, strict=True)]
    found = {
        "wall_ms_per_point": 1000 * STEPS_OF_A_POINT * statistics.median(more),
        "cpu_ms_per_point": 1000 * STEPS_OF_A_POINT * statistics.median(one[1] for one in ray),
        "local_step_ms": 1000 * statistics.median(one[0] for one in local),
        "ray_step_ms": 1000 * statistics.median(one[0] for one in ray),
    }
    reached = max(found["wall_ms_per_point"], found["cpu_ms_per_point"]) < 1000 * GOAL
    if arguments.json:
        print(json.dumps({**found, "reached": reached}))
    else:
        for what, value in found.items():
            print(f"{what:20} {value:8.1f}")
        print(f"goal: under {1000 * GOAL:.0f} ms for each point: {'reached' if reached else 'NOT reached'}")
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
