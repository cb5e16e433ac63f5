"""A real Ray cluster of several nodes on this machine, small in memory and on disk, and removed whole."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OBJECTS = 80_000_000  # bytes of a node's object store in /dev/shm; 75 MB is the least that Ray takes
MEMORY = 3_000_000_000


@contextmanager
def running(nodes: int = 2, cores: int = 1, **environment: str) -> Iterator[Any]:
    """A head without cores, and nodes with some. Yields Ray's Cluster, whose `address` is the head's."""
    short = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # paths of Unix sockets hold 107 bytes
    known = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": short, **environment}
    known["RAY_worker_niceness"] = "0"  # Ray's is 15: beside other tests steps would hardly run
    before = {name: os.environ.get(name) for name in known}
    os.environ.update(known)
    terminated = signal.getsignal(signal.SIGTERM)  # Ray's nodes replace it
    try:
        from ray.cluster_utils import Cluster

        node = {"object_store_memory": OBJECTS, "memory": MEMORY}
        cluster = Cluster(True, head_node_args={"num_cpus": 0, "include_dashboard": False, **node})
        try:
            for _ in range(nodes):
                cluster.add_node(num_cpus=cores, **node)
            yield cluster
        finally:
            cluster.shutdown()
    finally:
        signal.signal(signal.SIGTERM, terminated)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        shutil.rmtree(short, ignore_errors=True)


def processes(text: str) -> list[int]:
    """Those whose command line has this text, but for this one."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if text.encode() in path.read_bytes() and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found
