"""Runs the jobs of a sweep as processes of this machine, as many as its cores, memory and GPUs allow."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from builder.core import process
from builder.core.errors import BuilderError
from builder.core.process import Command, Running
from builder.core.store import LOGS
from builder.sweep.cores import pinned
from builder.sweep.slots import Slots

POLL_SECONDS = 0.02
KILLED = "killed by SIGKILL"  # in the words of core/exit_status.py: as the kernel does when memory runs out
VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Job:
    """A step that runs. argv: the command, "builder" first. directory: for its log and those of its workers. before: a
    command that must have run on the same machine (Step.before)."""

    name: str
    argv: Sequence[str]
    takes: Slots
    directory: Path
    before: Sequence[str] = ()

    @property
    def log(self) -> Path:
        """What the command prints."""
        return self.directory / "run.log"


@dataclass(frozen=True)
class Ended:
    """How a job ended. why: the end of its log if it failed. lost: the machine was at fault, not the job."""

    name: str
    code: int
    seconds: float
    memory: int = 0
    why: str = ""
    lost: bool = False


@dataclass
class _Process:
    job: Job
    running: Running
    stack: ExitStack
    cores: tuple[int, ...]
    gpus: tuple[int, ...]
    began: float = field(default_factory=time.monotonic)


class LocalExecutor:
    """The processes. A context: all that still run when it ends are stopped, as by ctrl-C."""

    def __init__(self, slots: Slots) -> None:
        self.slots, self.free = slots, slots
        self._running: list[_Process] = []
        self._cores, self._gpus = os.sched_getaffinity(0), set(range(slots.gpus))

    def __enter__(self) -> LocalExecutor:
        return self

    def __exit__(self, *_: object) -> None:
        with ExitStack() as all_jobs:  # a second ctrl-C or an error while one is stopped must not leave the others
            while self._running:
                all_jobs.push(self._running.pop().stack)

    def fits(self, job: Job) -> bool:
        """Whether a job can be started now."""
        return self.free.holds(job.takes)

    def start(self, job: Job) -> None:
        """Starts a job, which must fit into what is free."""
        cores = tuple(sorted(self._cores)[: job.takes.cores])
        gpus = tuple(sorted(self._gpus)[: job.takes.gpus])
        command = Command(
            [sys.executable, "-m", *job.argv], env=_environment(job, gpus if self.slots.gpus else None), kind="step"
        )
        stack = ExitStack()
        with pinned(cores):
            running = stack.enter_context(process.started(command, log=job.log))
        self._cores, self._gpus = self._cores - {*cores}, self._gpus - {*gpus}
        self.free = self.free.minus(job.takes)
        self._running.append(_Process(job, running, stack, cores, gpus))

    def wait(self) -> list[Ended]:
        """The jobs that have ended, at least one. There must be one that runs."""
        while not (done := [one for one in self._running if one.running.poll()]):
            time.sleep(POLL_SECONDS)
        return [self._ended(one) for one in done]

    def _ended(self, one: _Process) -> Ended:
        self._running.remove(one)
        one.stack.close()
        self.free = self.free.plus(one.job.takes)
        self._cores, self._gpus = self._cores | {*one.cores}, self._gpus | {*one.gpus}
        return ended(one.job.name, one.running, time.monotonic() - one.began)


def ended(name: str, running: Running, took: float) -> Ended:
    """How a process that has exited ended."""
    try:
        finished = running.finished()
    except process.Failed as error:
        code = error.code or 1
        return Ended(name, code, took, why=error.why, lost=-code == signal.SIGKILL or KILLED in error.why)
    except BuilderError as error:  # sent by the command
        return Ended(name, error.exit_code, took, why=f"{error.what} {error.why}".strip())
    return Ended(name, 0, took, finished.max_rss)


def _environment(job: Job, gpus: Sequence[int] | None) -> Mapping[str, str]:
    found = {LOGS: str(job.directory)}
    if gpus is None:
        return found
    named = os.environ.get(VISIBLE)
    names = named.split(",") if named else [*map(str, range(max(gpus, default=-1) + 1))]
    return found | {VISIBLE: ",".join(names[number] for number in gpus)}
