"""Closed, full and abandoned standard streams: the right exit code, no traceback, no unfinished output."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

MODEL = "tests/data/tiny-qwen3"
BUILDER = shlex.join([sys.executable, "-m", "builder"])


def shell(command: str, cwd: Path | None = None) -> tuple[int, str]:
    """The exit code of the first command of a pipe, and the output of both streams."""
    script = f"{command}\nexit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return done.returncode, done.stdout + done.stderr


REDIRECTIONS = [
    (">&-", 0),
    ("2>&-", 0),
    (">&- 2>&-", 0),
    ("<&- >&- 2>&-", 0),
    ("2>/dev/full", 0),
    (">/dev/full", 1),
    (">/dev/full 2>&1", 1),
    ("| true", 1),
    ("2>&1 | true", 1),
]


@pytest.mark.parametrize(("redirection", "code"), REDIRECTIONS)
@pytest.mark.parametrize("command", ["--help", "gpus", "schema", "explain context_fmha --json"])
def test_a_command_that_prints(command: str, redirection: str, code: int) -> None:
    found, said = shell(f"{{ sleep 0.2; {BUILDER} {command}; }} {redirection}")
    assert (found, "Traceback" in said, "Exception" in said) == (code, False, False), said
    assert "No space left" in said or redirection != ">/dev/full"


@pytest.mark.parametrize("redirection", [">&-", "2>&-", ">/dev/full 2>/dev/full"])
def test_an_error_keeps_its_exit_code(redirection: str) -> None:
    assert shell(f"{BUILDER} explain no_such_flag_at_all {redirection}")[0] == 2
    assert shell(f"{BUILDER} bild {redirection}")[0] == 2
    assert shell(f"{BUILDER} explain no_such_flag_at_all --json {redirection}")[0] == 2


@pytest.mark.parametrize(
    ("redirection", "code"), [(">&- 2>&-", 0), ("2>/dev/full", 0), (">/dev/full", 1), ("| true", 1)]
)
def test_a_stage_is_made_whole(redirection: str, code: int, tmp_path: Path) -> None:
    """A file of the store must not get the number of a closed descriptor, or messages would be written into it."""
    fetch = f"{BUILDER} fetch --model {MODEL} --gpu cpu --output {tmp_path}"
    found, said = shell(f"{fetch} {redirection}")
    assert (found, "Traceback" in said) == (code, False), said
    assert shell(f"{BUILDER} verify --output {tmp_path}")[0] == 0
    found, said = shell(fetch)
    assert "nothing to do: every stage is cached" in said
    for lock in (tmp_path / "locks").iterdir():
        assert lock.read_bytes() == b""
    assert not list(tmp_path.rglob("*.tmp"))
