"""A worker process that may start before its job is known, so that it imports its libraries in the meantime."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from builder.core import process, worker
from builder.core.errors import BuilderError
from builder.core.process import Bar, Finished, Running


class EarlyWorker:
    """A worker that starts with `begin`, or else with its job. Its owner closes it in any case.

    module, env: as for process.run_job. new_log: makes the path of its log.
    """

    def __init__(self, module: str, env: Mapping[str, str], new_log: Callable[[], Path]) -> None:
        self._module, self._env, self._new_log = module, env, new_log
        self._stack = ExitStack()
        self._waiting: tuple[Running, int] | None = None  # and the descriptor that says that the job is there

    def begin(self) -> None:
        """Starts the process. A machine that refuses one is left for `run` to report."""
        with suppress(BuilderError, OSError):
            self._begin(self._new_log())

    def _begin(self, log: Path) -> None:
        theirs, ours = os.pipe()
        try:
            env = {**self._env, worker.JOB_FD: str(theirs)}
            command = process.worker_command(self._module, log, env)
            running = self._stack.enter_context(process.started(command, log=log, inherited=[theirs]))
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        self._stack.callback(os.close, ours)  # before the process is told to end: it then ends by itself
        self._waiting = running, ours

    def run(self, job: Mapping[str, Any], bar: Bar) -> tuple[dict[str, Any], Finished, Path]:
        """Does the job. Returns its results, its cost and its log. Raises what process.run_job raises."""
        if self._waiting is None:
            log = self._new_log()
            return *process.run_job(self._module, job, log=log, bar=bar, env=self._env), log
        (running, wanted), self._waiting = self._waiting, None
        process.write_job(running.log, job)
        with process.listening(bar) as (result, receive):
            running.on_event = receive
            with suppress(BrokenPipeError):  # it has ended, for a reason that `finished` gives
                os.write(wanted, b"1")
            running.wait()
            self._stack.close()  # all events have come
        return result, running.finished(), running.log

    def close(self) -> None:
        """Ends the process, and removes the log of one that had no job."""
        self._stack.close()
        if self._waiting is not None:
            self._waiting[0].log.unlink(missing_ok=True)
            self._waiting = None
