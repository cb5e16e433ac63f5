"""The error types, and the exit code of each.

BuilderError
├── StageError           1    a stage failed: a worker process crashed, the disk is full
├── UsageError           2    a flag, a recipe or an input file is invalid
├── UnsupportedError     3    the model, GPU or machine is not supported, or the model does not fit
├── EvaluationError      4    the model is below the gate's limits, or the metric can't be measured
│   └── NotMeasurable         this runner returns no log-probabilities for the tokens of a text
├── ServingError         5    the server did not start, or a smoke check failed
└── IntegrityError       6    a file, checkpoint or version is not the expected one

Exit code 130 means interrupted, as in shells. Exit code 0 always means success.
"""

from __future__ import annotations


class BuilderError(Exception):
    """An error to show to the user: what happened, why, and what to type next.

    The CLI prints the three parts without a traceback and exits with `exit_code`.
    """

    exit_code = 1

    def __init__(self, what: str, *, why: str = "", hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.why = why
        self.hint = hint

    def __str__(self) -> str:
        return "\n".join(part for part in (self.what, self.why, self.hint) if part)


class StageError(BuilderError):
    exit_code = 1


class UsageError(BuilderError):
    exit_code = 2


class UnsupportedError(BuilderError):
    exit_code = 3


class EvaluationError(BuilderError):
    exit_code = 4


class NotMeasurable(EvaluationError):
    pass


class ServingError(BuilderError):
    exit_code = 5


class IntegrityError(BuilderError):
    exit_code = 6


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out; torch raises different ones for GPUs and CPUs."""
    text = str(error)
    return isinstance(error, MemoryError) or "out of memory" in text or "DefaultCPUAllocator" in text
