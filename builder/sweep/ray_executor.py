"""Runs the jobs of a sweep as tasks of a Ray cluster, which chooses the node of each and lets it wait for room."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from builder import pipeline
from builder.core.environment import STORE
from builder.core.manifest import KEY
from builder.core.output import Output
from builder.core.store import USED, Store, replace_file
from builder.hub.snapshot import local_directory
from builder.publish import verdict
from builder.quantize import modelopt
from builder.serving import benchmark
from builder.sweep import ray_task
from builder.sweep.cluster import Cluster, Watch, remote
from builder.sweep.local import Ended, Job
from builder.sweep.points import Point
from builder.sweep.ray_task import Common, Task

WATCH_SECONDS = 2.0  # between two looks at the cluster while nothing ends
TAKEN = (verdict.STAGE, benchmark.STAGE)  # stages whose newest artifact counts, not that of one key
STOP_SECONDS = 20.0  # for steps that were cancelled; their own supervisors give them ten


def on_cluster(cluster: Cluster, points: Sequence[Point], store: Store, jobs: int | None) -> RayExecutor:
    """The executor of a sweep, once the nodes can see its output directory or use its bucket."""
    shared = cluster.shares(store.root)
    if not shared:  # results are read here, by the model's digest: a local model's is known only where it was hashed
        models = {point.resolved.recipe.model: point for point in points}
        for model, point in models.items():
            if local_directory(model):
                pipeline.build(point.resolved, Store(store.root, Output("quiet")), until="snapshot")
    return RayExecutor(cluster, shared=shared, jobs=jobs, store=store)


class RayExecutor:
    """The tasks. A context: all that still run when it ends are cancelled, and their processes end."""

    def __init__(self, cluster: Cluster, *, shared: bool, jobs: int | None = None, store: Store | None = None) -> None:
        """shared: whether all nodes see the output directory (Cluster.shares). jobs: at once at most. store: takes the
        verdicts and the figures under load of nodes with directories of their own."""
        self._cluster, self._jobs, self._running = cluster, jobs, dict[Any, Job]()
        self._store = None if shared else store
        self._watch, bucket = Watch(cluster), os.environ.get(STORE, "")
        numerics = {name: os.environ[name] for name in modelopt.NUMERICS if name in os.environ}
        self._common = Common(os.getcwd(), ray_task.versions(), numerics, bucket, not shared)
        self._task = remote(ray_task.run)

    def __enter__(self) -> RayExecutor:
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        refs = list(self._running)
        if refs and self._cluster.answers():
            for ref in refs:
                with suppress(Exception):  # it may have ended just now
                    ray.cancel(ref, force=False)
            with suppress(Exception):
                ray.wait(refs, num_returns=len(refs), timeout=STOP_SECONDS)
        self._running.clear()

    def fits(self, job: Job) -> bool:
        """Whether a job can be started now. Ray lets those wait for which no node has room."""
        return self._jobs is None or len(self._running) < self._jobs

    def start(self, job: Job) -> None:
        """Submits a job with what it takes."""
        files = {path.name: path.read_bytes() for path in job.directory.iterdir() if path.suffix in (".yaml", ".sh")}
        before = job.before if self._common.own_disk else ()
        task = Task(job.name, job.argv, job.takes.cores, str(job.directory), files, before)
        options = self._task.options(
            num_cpus=job.takes.cores, memory=job.takes.memory, num_gpus=job.takes.gpus, name=job.name
        )
        self._running[options.remote(self._common, task)] = job

    def wait(self) -> list[Ended]:
        """The jobs that have ended, at least one. There must be one that runs. StageError if the cluster is gone."""
        import ray

        done: list[Any] = []
        while not done:
            done, _ = ray.wait(list(self._running), timeout=WATCH_SECONDS)
            if not done:
                self._watch.check()
        done, _ = ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
        return [self._ended(ref) for ref in done]

    def _ended(self, ref: Any) -> Ended:
        import ray

        job = self._running.pop(ref)
        try:
            done: ray_task.Done = ray.get(ref)
        except ray.exceptions.RayTaskError as error:  # what we raised there
            return Ended(job.name, 1, 0.0, why=str(error.cause or error))
        except ray.exceptions.RayError as error:
            self._watch.check()
            why = f"The node or the process that ran it died: {str(error).strip()[:500]}"
            return Ended(job.name, 1, 0.0, why=why, lost=True)
        for name, data in done.logs.items():
            replace_file(job.directory / name, data)
        if self._store is not None:
            _take(job.directory / USED, self._store)
        return done.how


def _take(used: Path, store: Store) -> None:
    """Takes what results are read from out of the bucket: those of the listed artifacts that have no digest to find
    them by."""
    listed = used.read_text(encoding="utf-8").split() if used.is_file() else []
    quiet = Store(store.root, Output("quiet"))
    for stage, _, key in (name.partition("/") for name in dict.fromkeys(listed)):
        if stage in TAKEN and KEY.fullmatch(key):
            quiet.find(stage, key)
