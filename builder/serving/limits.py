"""What this machine must allow before a server starts: file descriptors, and shared memory for its models.

Triton says nothing of either: it hangs, names a port that is free, or prints a stack of C++ errors.
"""

from __future__ import annotations

import resource
import shutil
from pathlib import Path

from builder.core import supervisor
from builder.core.errors import ServingError
from builder.core.output import size
from builder.trtllm import compatibility

# Triton 24.10 without clients had 65 files open with one Python process, 72 with eight. The rest is for clients.
DESCRIPTORS, DESCRIPTORS_OF_INSTANCE = 160, 4
SHM_OF_INSTANCE = 1 << 20  # python_backend src/python_be.cc: shm_default_byte_size
SHM_MARGIN = 4 << 20
SHM = Path(supervisor.SHM)


def check_machine() -> None:
    """Before any work: what the smallest repository of ours needs, which has five models."""
    _check_descriptors(DESCRIPTORS + DESCRIPTORS_OF_INSTANCE * 5)
    _check_shared_memory(SHM_MARGIN + SHM_OF_INSTANCE * 5, 5)


def check(models: Path) -> None:
    """ServingError where a limit is too low for this repository. Raises our own soft limit where that is enough."""
    instances = python_instances(models)
    _check_descriptors(DESCRIPTORS + DESCRIPTORS_OF_INSTANCE * instances)
    _check_shared_memory(SHM_MARGIN + SHM_OF_INSTANCE * instances, instances)


def python_instances(models: Path) -> int:
    """How many processes Triton's Python backend starts for a repository, at least."""
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
            f"A process may open {hard} files here, and Triton needs {needed} for this repository.",
            hint=f"Raise the limit: ulimit -n {max(1024, needed)}. For docker run: ulimit nofile={max(1024, needed)}",
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _check_shared_memory(needed: int, instances: int) -> None:
    free = shutil.disk_usage(SHM).free if SHM.is_dir() else 0
    if free < needed:
        raise ServingError(
            f"{SHM} has {size(free)} free, and Triton needs {size(needed)} for this repository.",
            why=f"Each Python process of its models ({instances} at least) exchanges tensors with the server there.",
            hint="Give it more: SHM_SIZE=8gb with compose, shm-size 8g of docker run; "
            f"on a machine: mount -o remount,size=8G {SHM}",
        )
