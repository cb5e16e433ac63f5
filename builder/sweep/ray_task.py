"""What runs on the nodes of a Ray cluster: one step, or a look at the node. Imports no Ray.

A step is a process of its own under our supervisor, as on one machine. When Ray's worker or its node dies, the step
dies with it.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import builder
from builder.core import bucket, process
from builder.core.atomic import make_directory
from builder.core.environment import STORE
from builder.core.errors import BuilderError
from builder.core.process import Command, Running
from builder.core.store import LOGS, library_versions, replace_file, sources_digest
from builder.preflight.memory import Machine, machine
from builder.preflight.ways import device
from builder.quantize import modelopt
from builder.sweep import cores
from builder.sweep.local import VISIBLE, Ended, ended

POLL_SECONDS = 0.05
LOG_BYTES = 4 << 20  # of the end of each log that comes back from a node with a disk of its own
LIBRARIES = (
    "torch", "transformers", "nvidia-modelopt", "numpy", "tokenizers", "safetensors", "datasets", "pyarrow",
    "accelerate", "lm_eval", "ray",
)  # fmt: skip


@dataclass(frozen=True)
class Common:
    """What all steps of a sweep share. numerics: variables that are part of keys. own_disk: whether a node has an
    output directory of its own, so that logs come back with the result."""

    cwd: str
    versions: Mapping[str, str]
    numerics: Mapping[str, str]
    bucket: str = ""
    own_disk: bool = False


@dataclass(frozen=True)
class Task:
    """A step. files: what its directory holds before it begins, the recipe for one. before: a command that runs first,
    here."""

    name: str
    argv: Sequence[str]
    cores: int
    directory: str
    files: Mapping[str, bytes]
    before: Sequence[str] = ()


@dataclass(frozen=True)
class Done:
    """How it ended, and its logs by their names if they must travel."""

    how: Ended
    logs: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Node:
    """What a look finds. missing: paths that are not there. refused: why its bucket can't be used."""

    versions: Mapping[str, str]
    host: Machine
    missing: Sequence[str]
    refused: str = ""


@functools.cache
def versions() -> Mapping[str, str]:
    """What must be equal on all nodes, because the store's keys depend on it, so that each finds what others made."""
    python = ".".join(map(str, sys.version_info[:2]))
    own = {"trtllm-builder": builder.__version__, "its code": sources_digest("builder")[:12], "Python": python}
    hidden = os.environ.pop(VISIBLE, None)  # Ray shows a task only the GPUs that it takes
    try:
        computes_on = device(machine(Path.cwd())).name
    finally:
        os.environ.update({VISIBLE: hidden} if hidden is not None else {})
    return {**own, **library_versions(*LIBRARIES), "what it computes on": computes_on}


def look(root: str, paths: Sequence[str], address: str) -> Node:
    """A look at the node where this runs. address: of the bucket that it must be able to use, or ""."""
    refused = ""
    if address:
        try:
            bucket.opened(address).check()
        except BuilderError as error:
            refused = f"{error.what} {error.why}"
    missing = [path for path in paths if not os.path.exists(path)]
    return Node(versions(), machine(Path(root)), missing, refused)


def run(common: Common, task: Task) -> Done:
    """Runs a step to its end. An interrupt, which is how Ray cancels, ends it."""
    began, directory = time.monotonic(), Path(task.directory)
    if versions() != common.versions:
        why = "This node has other versions: " + differences(versions(), common.versions)
        return Done(Ended(task.name, 2, 0.0, why=why))
    make_directory(directory)
    for name, data in task.files.items():
        if not (directory / name).exists():
            replace_file(directory / name, data)
    _set_environment(common)
    with cores.taken(task.cores) as own:
        for argv, log in ((task.before, "before.log"), (task.argv, "run.log")):
            if not argv:
                continue
            words = [sys.executable, "-m", *argv]
            command = Command(words, env={LOGS: task.directory}, cwd=Path(common.cwd), kind="step")
            how = ended(task.name, _run(command, directory / log, own), time.monotonic() - began)
            if how.code:
                break
    return Done(how, dict(_logs(directory, task.files)) if common.own_disk else {})


def _run(command: Command, log: Path, own: set[int]) -> Running:
    with ExitStack() as stack:
        with cores.pinned(own), _interruptible():
            running = stack.enter_context(process.started(command, log=log))
        while not running.poll():
            time.sleep(POLL_SECONDS)  # short, since Ray's interrupt does not end a system call
    return running


@contextmanager
def _interruptible() -> Iterator[None]:
    """What is started in the block can be interrupted: Ray's workers block SIGINT, and children inherit that."""
    before = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _set_environment(common: Common) -> None:
    """Ray limits threads by a variable, which would be part of the keys."""
    for name in modelopt.NUMERICS:
        os.environ.pop(name, None)
    os.environ.update(common.numerics)
    if common.bucket:
        os.environ[STORE] = common.bucket


def _logs(directory: Path, known: Mapping[str, bytes]) -> Iterable[tuple[str, bytes]]:
    for path in sorted(directory.iterdir()):
        if path.is_file() and path.name not in known:
            with open(path, "rb") as file:
                file.seek(max(0, path.stat().st_size - LOG_BYTES))
                yield path.name, file.read()


def differences(one: Mapping[str, str], other: Mapping[str, str]) -> str:
    """The versions that differ, for a message."""
    names = [name for name in other if one.get(name) != other[name]]
    return ", ".join(f"{name} {one.get(name, 'absent')} instead of {other[name]}" for name in names)
