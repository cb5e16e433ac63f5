"""What the benchmarks of `convert` and `inspect` measure is the command's, not the benchmark's own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
HELD = 200_000_000


def test_peak_memory_is_that_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from random_checkpoint import run

    held = bytearray(b"x") * HELD
    _, little = run([sys.executable, "-c", "pass"])
    _, much = run([sys.executable, "-c", f"bytearray(b'x') * {2 * HELD}"])
    assert little < len(held) < 2 * HELD < much
    with pytest.raises(SystemExit, match="failed with 3"):
        run([sys.executable, "-c", "raise SystemExit(3)"])
