"""What can go wrong, and the exit code that says so.

BuilderError
├── StageError           1    a stage failed: a child process crashed, a disk filled up
├── UsageError           2    a flag, a recipe or an input file is wrong
├── UnsupportedError     3    this model, GPU or machine can't do it, or it does not fit
├── EvaluationError      4    the model is not as good as the gate asks, or what was asked can't be measured
│   └── NotMeasurable         this runner gives no probabilities of the tokens of a text
├── ServingError         5    the server does not come up, or a smoke check failed
└── IntegrityError       6    a file, a checkpoint or a version is not what it must be

Exit code 130 is an interrupt, as in every shell. Exit code 0 is nothing but success.
"""

from __future__ import annotations


class BuilderError(Exception):
    """What happened, why, and what to type next. The CLI prints the three and exits with `exit_code`."""

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
