"""Signals are named wherever the end of a process is reported."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from builder.core import exit_status, process
from builder.core.errors import StageError


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (0, "exited with code 0"),
        (1, "exited with code 1"),
        (-signal.SIGFPE, "was killed by SIGFPE"),
        (-signal.SIGKILL, "was killed by SIGKILL"),
        (128 + signal.SIGFPE, "exited with code 136 (killed by SIGFPE)"),  # a shell's, mpirun's, a container's
        (139, "exited with code 139 (killed by SIGSEGV)"),
        (128, "exited with code 128"),
        (255, "exited with code 255"),
        (-40, "was killed by signal 40"),
    ],
)
def test_how_a_process_ended(code: int, words: str) -> None:
    assert exit_status.describe(code) == words


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import os; os.kill(os.getpid(), 8)", "was killed by SIGFPE"),
        ("import sys; sys.exit(136)", "exited with code 136 (killed by SIGFPE)"),
        ("import sys; sys.exit(137)", "ran out of memory"),
    ],
)
def test_of_a_child(tmp_path: Path, code: str, words: str) -> None:
    with pytest.raises(StageError) as caught:
        process.run(process.Command([sys.executable, "-c", code]), log=tmp_path / "log")
    assert words in caught.value.what + (caught.value.hint or "")
