"""The gateway's benchmark: the real Triton with an engine in C, whose tokens arrive faster than any model's."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("cc"), reason="there is no C compiler for the engine")
def test_every_text_of_an_engine_without_a_pause_is_right() -> None:
    command = [sys.executable, "benchmarks/gateway.py", "--requests", "64", "--parts", "load"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "gateway, stream" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("cc"), reason="there is no C compiler for the engine")
def test_all_answers_of_clients_that_leave_end() -> None:
    """How soon depends on what else runs here, so no goal is checked."""
    command = [sys.executable, "benchmarks/leaving.py", "--rounds", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert "seconds until the last answer has ended:\nmedian " in done.stdout, done.stdout + done.stderr
