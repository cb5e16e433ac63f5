"""A Ray cluster that runs a sweep's steps: connecting, what its nodes have, and what makes them unfit.

`auto` is the cluster of this machine, or what RAY_ADDRESS names; an address is HOST:PORT of its head. The machine where
a sweep is started is one of the nodes, since Ray's tasks and results go through it.
"""

from __future__ import annotations

import functools
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder.core.atomic import make_directory
from builder.core.environment import STORE
from builder.core.errors import StageError, UsageError
from builder.core.store import replace_file, strings
from builder.preflight.memory import Machine
from builder.sweep import ray_task
from builder.sweep.points import Point
from builder.sweep.ray_task import Node
from builder.sweep.slots import Slots

CONNECT_SECONDS = 5.0
LOOK_SECONDS = 120.0  # Ray starts a worker process, which imports torch's facts
SHOWN = 5  # nodes of a message
JOIN = "Start one: ray start --head, and on each other machine ray start --address HEAD:6379"


@dataclass(frozen=True)
class Cluster:
    """A cluster that is connected. gcs: where its head listens. nodes: those that run steps, by their names; ids: Ray's
    names of them. whole: what the largest node has; total: all together. host: the machine with the most memory."""

    gcs: tuple[str, int]
    nodes: Mapping[str, Node]
    ids: Mapping[str, str]
    whole: Slots
    total: Slots
    host: Machine

    def answers(self) -> bool:
        """Whether its head can be reached."""
        return _answers(self.gcs)

    def shares(self, root: Path) -> bool:
        """Whether all nodes see the output directory. UsageError if not and there is no bucket."""
        seen = root / "locks" / f"cluster-{secrets.token_hex(8)}"
        make_directory(seen.parent)
        replace_file(seen, "")
        try:
            found = _look(self.ids, str(root), [str(seen)])
        finally:
            seen.unlink()
        blind = [name for name, node in found.items() if node.missing]
        if blind and not os.environ.get(STORE):
            raise UsageError(
                f"{_names(blind)} of the cluster can't see the output directory {root}.",
                hint="Put --output on a disk that all nodes share, or add a bucket: --store s3://BUCKET/PREFIX",
            )
        return not blind


@contextmanager
def connected(address: str, points: Sequence[Point], root: Path) -> Iterator[Cluster]:
    """The cluster while the block runs. UsageError for none, for nodes with other versions, and for nodes that miss
    files that the recipes name."""
    ray = _ray()
    gcs = _find(address)
    old = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=f"{gcs[0]}:{gcs[1]}", log_to_driver=False, configure_logging=False, logging_level="ERROR")
    except Exception as error:  # Ray raises several kinds, for other versions of Ray or Python too
        raise UsageError(
            f"Can't join the Ray cluster at {gcs[0]}:{gcs[1]}.", why=str(error).strip()[:500], hint=JOIN
        ) from None
    finally:
        signal.signal(signal.SIGTERM, old)  # Ray's own handler would leave steps to be killed
    # Ray 2.60 prints the log of a raylet that died to our stdout, with no option against it (worker.py,
    # listen_error_messages).
    ray._private.worker.print_to_stdstream = lambda *_, **__: None
    try:
        yield _checked(ray, gcs, points, root)
    finally:
        ray.shutdown()


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise UsageError(
            "--on needs Ray, which is not installed.", hint="pip install 'trtllm-builder[cluster]', on every node"
        ) from None
    return ray


def _find(address: str) -> tuple[str, int]:
    """Where the head of the cluster listens. Looked up and tried first: Ray itself tries for minutes."""
    from ray._private.services import canonicalize_bootstrap_address

    if "://" in address:
        raise UsageError(
            f"--on {address}: Ray Client is not supported.",
            hint="Start the sweep on a node of the cluster (--on auto), or with: ray job submit",
        )
    try:
        found = canonicalize_bootstrap_address(address)
        host, _, port = str(found or "").rpartition(":")
        gcs = (host, int(port))
    except (ConnectionError, ValueError):
        what = "There is no Ray cluster on this machine." if address == "auto" else f"{address!r} is not HOST:PORT."
        raise UsageError(what, hint=JOIN) from None
    if not _answers(gcs):
        raise UsageError(f"No Ray cluster answers at {address if port in address else found}.", hint=JOIN)
    return gcs


def _answers(gcs: tuple[str, int]) -> bool:
    try:
        socket.create_connection(gcs, CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def _checked(ray: Any, gcs: tuple[str, int], points: Sequence[Point], root: Path) -> Cluster:
    alive = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    if not alive:
        raise UsageError(f"The Ray cluster at {gcs[0]}:{gcs[1]} has no node with cores.", hint=JOIN)
    ids = {f"{node['NodeManagerAddress']} ({node['NodeID'][:8]})": str(node["NodeID"]) for node in alive}
    nodes = _look(ids, str(root), _paths(points))
    _check(nodes)
    having = [_slots(node["Resources"]) for node in alive]
    whole = max(having, key=lambda one: (one.gpus, one.cores, one.memory))
    total = functools.reduce(Slots.plus, having)
    host = max((node.host for node in nodes.values()), key=lambda one: one.memory)
    return Cluster(gcs, nodes, ids, whole, total, host)


def _slots(resources: Mapping[str, float]) -> Slots:
    return Slots(int(resources["CPU"]), int(resources.get("memory", 0)), int(resources.get("GPU", 0)))


def _check(nodes: Mapping[str, Node]) -> None:
    other = {name: ray_task.differences(node.versions, ray_task.versions()) for name, node in nodes.items()}
    _refuse(
        other,
        "The nodes of the cluster do not have the same versions as this machine.",
        "Install the same builder and packages on all of them: what one makes, others could not find.",
    )
    _refuse(
        {name: ", ".join(node.missing[:SHOWN]) for name, node in nodes.items()},
        "Nodes of the cluster lack files that this sweep needs.",
        "Start it in a directory that all nodes share, or ship the directory: ray job submit --working-dir .",
    )
    _refuse(
        {name: node.refused for name, node in nodes.items()},
        "Nodes of the cluster can't use the bucket.",
        "Set the bucket's credentials in the environment of `ray start` on each node.",
    )


def _refuse(problems: Mapping[str, str], what: str, hint: str) -> None:
    """UsageError if a node has a problem; `problems` has "" for those without."""
    found = [f"{name}: {text}" for name, text in problems.items() if text]
    if found:
        raise UsageError(what, why="\n".join(found[:SHOWN]), hint=hint)


def _paths(points: Sequence[Point]) -> list[str]:
    """The working directory, and each local path that a recipe names."""
    named = {text for point in points for text in strings(point.resolved.recipe.model_dump(mode="json"))}
    return [os.getcwd(), *sorted(os.path.abspath(text) for text in named if _is_path(text))]


def _is_path(text: str) -> bool:
    return ("/" in text or "." in text) and "\0" not in text and len(text) < 1000 and os.path.exists(text)


def _look(ids: Mapping[str, str], root: str, paths: Sequence[str]) -> dict[str, Node]:
    """A look at each node, all at once."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look = remote(ray_task.look, num_cpus=0)
    asked = {
        name: look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(one, soft=False)).remote(
            root, paths, os.environ.get(STORE, "")
        )
        for name, one in ids.items()
    }
    try:
        return dict(zip(asked, ray.get(list(asked.values()), timeout=LOOK_SECONDS), strict=True))
    except ray.exceptions.GetTimeoutError:
        raise StageError(f"The nodes of the cluster did not answer within {LOOK_SECONDS:.0f} s.", hint=JOIN) from None
    except ray.exceptions.RayError as error:
        raise UsageError(
            "A node of the cluster can't run the builder.",
            why=str(error).strip()[-500:],
            hint="Install the same release with its extra `cluster` on every node, in the Python that runs Ray.",
        ) from None


def remote(function: Callable[..., Any], **options: Any) -> Any:
    """A function as a Ray task that is not retried: the scheduler does that."""
    import ray

    return ray.remote(max_retries=0, **options)(function)


def _names(nodes: Sequence[str]) -> str:
    more = f" and {len(nodes) - SHOWN} more" if len(nodes) > SHOWN else ""
    return ("Nodes " if len(nodes) > 1 else "Node ") + ", ".join(nodes[:SHOWN]) + more


class Watch:
    """Notices that a cluster went away: its head has not answered for some time."""

    def __init__(self, cluster: Cluster, seconds: float = 20.0) -> None:
        self._cluster, self._seconds, self._answered = cluster, seconds, time.monotonic()

    def check(self) -> None:
        """StageError once it is gone."""
        if self._cluster.answers():
            self._answered = time.monotonic()
        elif time.monotonic() - self._answered > self._seconds:
            host, port = self._cluster.gcs
            raise StageError(
                f"The Ray cluster at {host}:{port} went away.",
                why=f"Its head has not answered for {self._seconds:.0f} s.",
                hint="What was finished is kept: run the same command again when it is back.",
            )
