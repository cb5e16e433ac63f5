"""Limits of the machine that make Triton hang or fail with a misleading error are checked before it starts."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from builder.core.errors import ServingError
from builder.serving import limits
from builder.serving.server import serve
from tests.serving.test_server import QUIET, one_model

SERVE = """
import resource, sys
from pathlib import Path
from builder.core.errors import ServingError
from builder.core.output import Output
from builder.serving.server import serve
try:
    with serve(Path(sys.argv[1]), out=Output("quiet")):
        print("up", resource.getrlimit(resource.RLIMIT_NOFILE)[0])
except ServingError as error:
    print(error)
"""


def under(shell: str, models: Path, *before: str) -> subprocess.CompletedProcess[str]:
    script = f'{shell} && exec {sys.executable} -c "$1" {models}'
    return subprocess.run([*before, "sh", "-c", script, "sh", SERVE], capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize("limit", [32, 64, 128])
def test_too_few_open_files_are_reported(tmp_path: Path, limit: int) -> None:
    """With 32, Triton hung; with 64, it reported that a port was in use."""
    done = under(f"ulimit -n {limit}", one_model(tmp_path / "models"))
    assert done.stdout.startswith(f"A process may open {limit} files here, but Triton needs 164 for this repository.\n")
    assert "ulimit -n 1024" in done.stdout
    assert done.stderr == ""


def test_a_soft_limit_is_raised(tmp_path: Path) -> None:
    assert under("ulimit -S -n 64", one_model(tmp_path / "models")).stdout == "up 164\n"


def test_python_processes_are_counted(tmp_path: Path) -> None:
    models = one_model(tmp_path / "models")
    (models / "many").mkdir()
    (models / "many" / "config.pbtxt").write_text('backend: "python" instance_group [{count: 7}, {count: 2}]')
    (models / "together").mkdir()
    (models / "together" / "config.pbtxt").write_text('platform: "ensemble"')
    (models / "plain").mkdir()
    (models / "plain" / "config.pbtxt").write_text('backend: "python"')
    assert limits.python_instances(models) == 1 + 9 + 1


@pytest.mark.skipif(os.getuid() != 0, reason="mounts a file system")
def test_too_little_shared_memory_is_reported(tmp_path: Path) -> None:
    done = under("mount -t tmpfs -o size=4m none /dev/shm", one_model(tmp_path / "models"), "unshare", "-m")
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip(done.stderr)
    assert done.stdout.startswith("/dev/shm has 4.19 MB free, but Triton needs 5.24 MB for this repository.\n")
    assert "shm-size 8g" in done.stdout


def test_this_machine_is_sufficient(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    limits.check_machine()
    with serve(one_model(tmp_path / "models"), out=QUIET, log=tmp_path / "log"):
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == before


def test_a_build_is_rejected_before_any_work(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "builder", "build", "--model", "tests/data/tiny-qwen3", "--gpu", "cpu"]
    script = f"ulimit -n 48 && exec {' '.join(argv)} --output {tmp_path / 'out'}"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=100)
    assert done.returncode == ServingError.exit_code
    assert "A process may open 48 files here" in done.stderr
    assert not list((tmp_path / "out").glob("checkpoint/*"))
