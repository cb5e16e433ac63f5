"""What killed commands leave in /dev/shm is removed, and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from builder.core import supervisor
from builder.serving import shared_memory

HOLDER = """
import sys, time
from pathlib import Path
from builder.core import supervisor
from builder.serving import shared_memory
supervisor.SHM, shared_memory.SHM = sys.argv[1], Path(sys.argv[1])
with shared_memory.prefix() as name:
    Path(sys.argv[1], f"{name}0-region").touch()
    print(name, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def shm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(supervisor, "SHM", str(tmp_path))
    monkeypatch.setattr(shared_memory, "SHM", tmp_path)
    return tmp_path


@pytest.fixture
def holder(shm: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that has a prefix, and that prefix."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(shm)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        yield child, child.stdout.readline().strip()
        child.kill()


def names(shm: Path) -> set[str]:
    return {path.name for path in shm.iterdir()}


def test_what_a_killed_command_left_is_removed(shm: Path, holder: tuple[subprocess.Popen[str], str]) -> None:
    child, name = holder
    assert names(shm) == {f"{name}lock", f"{name}0-region"}
    shared_memory.sweep()
    assert names(shm) == {f"{name}lock", f"{name}0-region"}, "it still runs"
    child.send_signal(signal.SIGKILL)
    child.wait()
    with shared_memory.prefix() as own:
        assert names(shm) == {f"{own}lock"}
    assert not names(shm)


def test_the_process_number_does_not_matter(shm: Path) -> None:
    """Our own one, as if a killed command had had it, and that of a process that never was."""
    for name in (f"builder-{os.getpid()}-00112233-", f"builder-{1 << 30}-00112233-"):
        (shm / f"{name}lock").touch()
        (shm / f"{name}0-region").touch()
    with shared_memory.prefix() as own, shared_memory.prefix() as other:
        (shm / f"{own}0-region").touch()
        shared_memory.sweep()
        assert names(shm) == {f"{own}lock", f"{own}0-region", f"{other}lock"}


@pytest.mark.parametrize("name", ["psm_1", "builder-lock", "builder-1-0011-lock", "builder-x-00112233-lock"])
def test_other_names_stay(shm: Path, name: str) -> None:
    (shm / name).touch()
    shared_memory.sweep()
    assert names(shm) == {name}


def test_links_and_directories_stay(shm: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    target = tmp_path_factory.mktemp("elsewhere") / "file"
    target.touch()
    (shm / "builder-1-00112233-lock").symlink_to(target)
    (shm / "builder-2-00112233-lock").mkdir()
    shared_memory.sweep()
    assert len(names(shm)) == 2
    assert target.exists()


def test_the_lock_goes_last(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    removed: list[str] = []
    monkeypatch.setattr(os, "unlink", lambda path: removed.append(Path(path).name))
    for name in ("lock", "0-a", "0-z"):
        (shm / f"builder-1-00112233-{name}").touch()
    supervisor.clean_up("builder-1-00112233-")
    assert removed[-1] == "builder-1-00112233-lock"


def test_without_a_place_for_shared_memory(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "SHM", shm / "absent")
    with shared_memory.prefix() as name:
        assert name.startswith("builder-")
