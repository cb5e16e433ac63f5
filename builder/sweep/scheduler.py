"""Runs the steps of a sweep in an order that their needs allow, as many at once as there are slots for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from builder.sweep.graph import Step
from builder.sweep.local import Ended, Job


class Executor(Protocol):
    """Where jobs run."""

    def fits(self, job: Job) -> bool:
        """Whether a job can be started now."""

    def start(self, job: Job) -> None:
        """Starts a job."""

    def wait(self) -> list[Ended]:
        """The jobs that have ended since, at least one."""


@dataclass(frozen=True)
class Outcome:
    """What became of a step. why: the end of its log, or which step before it failed; "" if it succeeded."""

    step: Step
    seconds: float = 0.0
    memory: int = 0
    why: str = ""
    code: int = 0
    retried: bool = False

    @property
    def ok(self) -> bool:
        """Whether it succeeded."""
        return self.code == 0


def run(
    steps: Sequence[Step],
    job_of: Callable[[Step], Job],
    executor: Executor,
    begun: Callable[[Step], object],
    ended: Callable[[Outcome], object],
) -> dict[str, Outcome]:
    """Runs all steps and tells of each when it begins and when it has ended. Returns {name of a step: outcome}.

    A step whose needs failed is not run, and fails with them. Those that most points wait for go first.
    """
    found: dict[str, Outcome] = {}
    pending = sorted(steps, key=lambda step: -len(step.points))
    running: dict[str, Step] = {}
    retried: set[str] = set()

    def end(outcome: Outcome) -> None:
        found[outcome.step.name] = outcome
        ended(outcome)

    while pending or running:
        for step in _hopeless(pending, found):
            pending.remove(step)
            end(_not_run(step, found))
        for step in [one for one in pending if all(need in found and found[need].ok for need in one.needs)]:
            job = job_of(step)
            if executor.fits(job):
                pending.remove(step)
                running[step.name] = step
                begun(step)
                executor.start(job)
        for one in executor.wait() if running else ():
            step = running.pop(one.name)
            if one.lost and step.name not in retried:
                retried.add(step.name)
                pending.insert(0, step)
            else:
                again = step.name in retried
                end(Outcome(step, one.seconds, one.memory, one.why, one.code, again))
    return found


def _hopeless(pending: Sequence[Step], found: Mapping[str, Outcome]) -> list[Step]:
    return [step for step in pending if any(need in found and not found[need].ok for need in step.needs)]


def _not_run(step: Step, found: Mapping[str, Outcome]) -> Outcome:
    """The outcome of a step that was not run because of one that it needs."""
    first = next(found[need] for need in step.needs if need in found and not found[need].ok)
    return Outcome(step, why=f"{first.step.name}, which it needs, failed: {first.why}", code=first.code)
