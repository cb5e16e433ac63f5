"""Checks the machine's limits before a server starts: file descriptors, and shared memory for the models.

Without either, Triton's own behavior is no help: it hangs, reports a free port as in use, or prints a C++ stack trace.
"""

from __future__ import annotations

import resource
import shutil
from pathlib import Path

from builder.core import supervisor
from builder.core.errors import ServingError
from builder.core.output import size
from builder.trtllm import compatibility

# Measured with Triton 24.10 without clients: 65 open files with one Python process, 72 with eight. The rest is for
# clients.
DESCRIPTORS, DESCRIPTORS_OF_INSTANCE = 160, 4
SHM_OF_INSTANCE = 1 << 20  # python_backend src/python_be.cc: shm_default_byte_size
SHM_MARGIN = 4 << 20
SHM = Path(supervisor.SHM)


def check_machine() -> None:
    """Checks, before any work, what our smallest repository (five models) needs. ServingError if a limit is too low."""
    _check_descriptors(DESCRIPTORS + DESCRIPTORS_OF_INSTANCE * 5)
    _check_shared_memory(SHM_MARGIN + SHM_OF_INSTANCE * 5, 5)


def check(models: Path) -> None:
    """ServingError if a limit is too low for this repository.

    Raises the soft limit of open files if the hard limit allows it.
    """
    instances = python_instances(models)
    _check_descriptors(DESCRIPTORS + DESCRIPTORS_OF_INSTANCE * instances)
    _check_shared_memory(SHM_MARGIN + SHM_OF_INSTANCE * instances, instances)


def python_instances(models: Path) -> int:
    """The number of processes that Triton's Python backend starts for a repository, at least."""
    found = 0
    for path in sorted(models.iterdir()):
        config = compatibility.parse(path / "config.pbtxt")
        if config is not None and config.platform != "ensemble":
            found += sum(group.count for group in config.instance_group) or 1
    return found


def _check_descriptors(needed: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ServingError(
            f"A process may open {hard} files here, but Triton needs {needed} for this repository.",
            hint=f"Raise the limit: ulimit -n {max(1024, needed)}. For docker run: --ulimit nofile={max(1024, needed)}",
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _check_shared_memory(needed: int, instances: int) -> None:
    free = shutil.disk_usage(SHM).free if SHM.is_dir() else 0
    if free < needed:
        raise ServingError(
            f"{SHM} has {size(free)} free, but Triton needs {size(needed)} for this repository.",
            why=f"Each Python process of its models (at least {instances}) exchanges tensors with the server there.",
            hint="Make it larger: SHM_SIZE=8gb with compose, --shm-size 8g with docker run, or without a container "
            f"mount -o remount,size=8G {SHM}",
        )
