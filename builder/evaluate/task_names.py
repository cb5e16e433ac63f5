"""The child process that knows lm-eval's tasks by name: python -m builder.evaluate.task_names JOB.json

A wrong name is told before anything is downloaded or computed. Imports lm_eval's list of tasks, and no torch.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.tasks import TaskManager

from builder.core.errors import UsageError
from builder.core.process import worker_main


def manager_of(names: Sequence[str], directory: str | None) -> TaskManager:
    """What knows the tasks. To read lm-eval's own fourteen thousand takes ten seconds: not where none of them is named.

    A directory's group may be made of lm-eval's tasks, so only its single tasks stand alone.
    """
    if directory:
        own = TaskManager(include_path=directory, include_defaults=False)
        if set(names) <= set(own.all_subtasks):
            return own
    return TaskManager(include_path=directory)


def check(job: Mapping[str, Any]) -> None:
    """UsageError for a name that is none, with those that look like it."""
    known = manager_of(job["names"], job["directory"]).all_tasks
    for name in job["names"]:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            raise UsageError(
                f"lm-eval has no task {name!r}.",
                why="" if job["directory"] else "Tasks of your own are read from --task-dir DIRECTORY.",
                hint=f"Did you mean {', '.join(near)}?" if near else "All of them: lm-eval ls tasks",
            )


if __name__ == "__main__":
    sys.exit(worker_main(sys.argv, check))
