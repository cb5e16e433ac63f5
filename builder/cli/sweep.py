"""The commands that build and measure many recipes, and compare what was found."""

from __future__ import annotations

import argparse
import os
from contextlib import nullcontext
from typing import Any

from builder.cli.options import add_command, add_output, path
from builder.core.output import Output


def add(commands: Any) -> None:
    """Adds sweep and compare."""
    command = add_command(
        commands, "sweep", "build and measure many recipes from one file, and compare them", run_sweep,
        examples=[
            "builder sweep configs/sweeps/smallest.yaml --dry-run",
            "builder sweep configs/sweeps/bundled.yaml --output /tmp/sweep",
            "builder sweep configs/sweeps/short.yaml --model ./my-model --jobs 2",
        ],
    )  # fmt: skip
    command.add_argument("file", type=path, metavar="FILE", help="a YAML file such as those of configs/sweeps")
    command.add_argument("--model", metavar="MODEL", help="measure this model instead of the file's")
    command.add_argument("--set", metavar="KEY=VALUE", action="append", default=[],
                         help="set a recipe key of all points; repeatable")  # fmt: skip
    command.add_argument("--jobs", type=int, metavar="N",
                         help="steps at once (default: up to 4, as cores and memory allow)")  # fmt: skip
    command.add_argument("--mlflow", metavar="URL",
                         help="also log each point to this MLflow server or directory")  # fmt: skip
    command.add_argument("--dry-run", action="store_true", help="print the steps and what they share; run nothing")
    command.add_argument("--on", metavar="auto|HOST:PORT",
                         help="run the steps on this Ray cluster (auto: the one here)")  # fmt: skip
    command.add_argument("--store", metavar="s3://BUCKET/PREFIX",
                         help="share what is made through this bucket")  # fmt: skip
    add_output(command)

    command = add_command(
        commands, "compare", "compare the results of two sweeps", run_compare,
        examples=["builder compare artifacts/sweeps/first artifacts/sweeps/second"],
    )  # fmt: skip
    command.add_argument("runs", type=path, nargs=2, metavar="RUN", help="a directory with a sweep's results.csv")


def run_sweep(arguments: argparse.Namespace, out: Output) -> int:
    """Runs all points that the store does not have. Exits with 1 if one failed."""
    from builder.core import bucket
    from builder.core.environment import STORE
    from builder.core.errors import UsageError
    from builder.core.store import Store
    from builder.sweep import cluster, planning, points, ray_executor, show, sweep

    if arguments.jobs is not None and arguments.jobs < 1:
        raise UsageError(f"--jobs must be 1 or more (got {arguments.jobs}).")
    if arguments.store is not None:
        os.environ[STORE] = arguments.store
    if (used := bucket.named()) is not None:
        used.check()
    title, found = points.read(arguments.file, model=arguments.model, sets=arguments.set)
    store = Store(arguments.output, out)
    dry = Store(arguments.output, Output("quiet"), dry=True)
    with cluster.connected(arguments.on, found, store.root) if arguments.on else nullcontext() as on:
        planned = planning.plan(title, found, dry, jobs=arguments.jobs, cluster=on)
        if arguments.dry_run:
            show.plan(planned, out)
            return 0
        sink = _sink(arguments, title)
        with store.in_use(), show.Told(planned, out) as told:
            executor = ray_executor.on_cluster(on, found, store, arguments.jobs) if on and planned.steps else None
            results = sweep.run(planned, store, told.begun, told.ended, executor)
    show.table(planned, results, out)
    directory = planned.directory(store)
    if sink:
        out.text(f"mlflow     {sink.log(results, directory)} points logged to {arguments.mlflow}")
    out.text(f"results    {directory / 'results.csv'}")
    out.text(f"report     {directory / sweep.REPORT}")
    failed = [one.point.name for one in results if one.why]
    out.result({"directory": str(directory), "points": len(results), "failed": failed})
    return 1 if failed else 0


def _sink(arguments: argparse.Namespace, title: str) -> Any:
    """What --mlflow names; None without it."""
    if not arguments.mlflow:
        return None
    from builder.sweep.mlflow_sink import Sink

    return Sink(arguments.mlflow, title)


def run_compare(arguments: argparse.Namespace, out: Output) -> int:
    """Prints the figures of both runs for the points that they have in common."""
    from builder.sweep.compare import compare, show

    show(compare(*arguments.runs), out)
    return 0
