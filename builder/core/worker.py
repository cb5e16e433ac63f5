"""What a worker's own process does: it reads its job, works, and sends events to the parent (process.run_job)."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from builder.core.errors import BuilderError

PROGRESS_FD = "BUILDER_PROGRESS_FD"
JOB_FD = "BUILDER_JOB_FD"  # where a worker that was started early reads a byte once its job file is there


def worker_main(
    argv: Sequence[str],
    work: Callable[[dict[str, Any]], dict[str, Any] | None],
    known: Callable[[BaseException, dict[str, Any]], BuilderError | None] = lambda error, job: None,
    prepare: Callable[[], object] = lambda: None,
) -> int:
    """The main function of a worker that `run_job` started. Returns its exit code.

    If it was started before its job is known (early_worker.py), it calls `prepare` and waits for the job.
    Reads the job file, calls `work` and emits its result as "summary". A BuilderError is sent to the parent, which
    raises it; so is any other exception that `known` translates to one. Anything else is a bug: its traceback goes to
    the log.
    """
    if JOB_FD in os.environ and not _is_wanted(prepare):
        return 0
    job = json.loads(Path(argv[1]).read_text(encoding="utf-8"))
    try:
        summary = work(job)
    except BaseException as error:
        to_send = error if isinstance(error, BuilderError) else known(error, job)
        if to_send is None and isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            from builder.core.atomic import disk_error

            to_send = disk_error(error, _written(error, job, Path(argv[1]).parent))
        if to_send is None:
            raise
        emit_error(to_send)
        return to_send.exit_code
    if summary is not None:
        emit(summary=summary)
    return 0


def _written(error: OSError, job: Mapping[str, Any], logs: Path) -> Path:
    """Where a worker wrote when the disk refused: a write to an open file raises without a name (write(2))."""
    return Path(str(error.filename or job.get("destination") or job.get("root") or logs))


def leave(code: int) -> NoReturn:
    """Ends a worker that is done, without finalizing the interpreter: with torch that takes 0.5 s, and 0.1 s if its
    objects are frozen (gc.freeze)."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _is_wanted(prepare: Callable[[], object]) -> bool:
    """Waits for the job, after `prepare`. False if the parent ended or has no job."""
    with suppress(Exception):  # the work meets the same
        prepare()
    with os.fdopen(int(os.environ.pop(JOB_FD)), "rb", buffering=0) as wanted:
        return bool(wanted.read(1))


def emit(**event: Any) -> None:
    """In a worker: sends an event, a JSON object, to the parent. Without a parent it does nothing."""
    fd = os.environ.get(PROGRESS_FD)
    if fd:
        os.write(int(fd), (json.dumps(event) + "\n").encode())


def emit_error(error: BuilderError) -> None:
    """In a worker, before it exits: sends an error, which `run` raises in the parent with the same class and text."""
    emit(error={"class": type(error).__name__, "what": error.what, "why": error.why, "hint": error.hint})
