"""What limited a piece of work follows from what was measured, and the measurements are of the work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.core import usage
from builder.core.usage import Usage, limit


@pytest.mark.parametrize(
    ("used", "by"),
    [
        (Usage(10, 19, 2, 0.97, 0.2), "cores"),
        (Usage(10, 5, 2, 0.95, 0.2), "cores"),  # other processes had them
        (Usage(10, 3, 16, 0.05, 8.0), "disk"),
        (Usage(10, 1, 2, 0.1, 0.1, downloading=9.5, received=10**9), "network"),
        (Usage(10, 1, 2, 0.1, 7.0, downloading=9.5, received=10**9), "disk"),  # that the download wrote to
        (Usage(10, 9, 8, 0.15, 0.0), "one core"),
        (Usage(10, 2, 8, 0.1, 2.0, downloading=2.0), ""),
    ],
)
def test_the_limit_follows_from_the_figures(used: Usage, by: str) -> None:
    assert limit(used) == by
    said = usage.sentence(used)
    assert said.startswith("limited by ")
    assert by in said
    assert ("downloaded" in said) is bool(used.downloading)


@given(st.floats(0.1, 1e4), st.integers(1, 256), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_more_work_for_the_cores_never_makes_something_else_the_limit(
    wall: float, cores: int, cpu: float, stalled: float, downloading: float
) -> None:
    used = Usage(wall, cpu * wall * cores, cores, cpu, stalled * wall, downloading=downloading * wall)
    if limit(used) == "cores":
        assert limit(Usage(wall, wall * cores, cores, 1.0, 0.0)) == "cores"
    if limit(used) == "":
        assert max(cpu, stalled, downloading) < usage.BUSY


def test_the_work_of_children_counts(tmp_path: Path) -> None:
    """A child that computes for half a second and writes 8 MB."""
    code = "import os,time\nwhile time.process_time() < 0.5: pass\n"
    code += f"f = open({str(tmp_path / 'file')!r}, 'wb'); f.write(bytes(8 << 20)); f.flush(); os.fsync(f.fileno())"
    used = usage.started()
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True)
    found = used()
    assert 0.5 <= found.cpu <= found.seconds * (os.cpu_count() or 1)
    assert 0 < found.busy <= 1
    assert 0 <= found.stalled <= found.seconds
