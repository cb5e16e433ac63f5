"""Worker process that checks the names of lm-eval tasks: python -m builder.evaluate.task_names JOB.json

Unknown names are reported before anything is downloaded or computed. Imports lm_eval's list of tasks, but not torch.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.tasks import TaskManager

from builder.core.errors import UsageError
from builder.core.worker import worker_main


def manager_of(names: Sequence[str], directory: str | None) -> TaskManager:
    """The task manager for these names. Reading lm-eval's own 14,000 tasks takes ten seconds, so it is skipped when all
    names are single tasks of the directory; a group there may refer to lm-eval's tasks."""
    if directory:
        own = TaskManager(include_path=directory, include_defaults=False)
        if set(names) <= set(own.all_subtasks):
            return own
    return TaskManager(include_path=directory)


def check(job: Mapping[str, Any]) -> None:
    """UsageError for an unknown task, with similar names."""
    known = manager_of(job["names"], job["directory"]).all_tasks
    for name in job["names"]:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            raise UsageError(
                f"lm-eval has no task {name!r}.",
                why="" if job["directory"] else "Your own tasks are read from --task-dir DIRECTORY.",
                hint=f"Did you mean {', '.join(near)}?" if near else "List all tasks: lm-eval ls tasks",
            )


if __name__ == "__main__":
    sys.exit(worker_main(sys.argv, check))
