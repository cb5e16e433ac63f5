"""Temporary directories: gone when their process is, however it ended; nobody else's are touched."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from builder.cli import main
from builder.core import interrupts, process, temporary
from builder.core.errors import StageError
from builder.core.temporary import PREFIX

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def left(place: Path, name: str, *files: str, mode: int = 0o700) -> Path:
    path = place / f"{PREFIX}{name}"
    path.mkdir()
    for file in files:
        (path / file).touch()
    path.chmod(mode)
    return path


def test_only_what_killed_processes_left_is_removed(place: Path) -> None:
    killed = [left(place, "killed_1", "lock", "server.log"), left(place, "killed_2", "lock"), left(place, "killed_3")]
    others = [
        left(place, "others_1", "notes"),
        left(place, "a-checkout", "lock"),
        left(place, "others_2", "lock", mode=0o755),
    ]
    outside = place / "outside"
    outside.mkdir(0o700)
    (outside / "lock").touch()
    (place / f"{PREFIX}linked_1").symlink_to(outside)
    failed = [left(place, f"failed_{number}", "lock", "failed") for number in range(7)]
    for number, path in enumerate(failed):
        os.utime(path, (1e9 - number, 1e9 - number))
    with temporary.directory() as used:
        assert used.stat().st_mode & 0o777 == 0o700
        with temporary.directory():
            assert used.exists()
    assert not used.exists()
    assert not [path for path in killed if path.exists()]
    assert [path.exists() for path in failed] == [True] * 5 + [False] * 2
    assert all(path.exists() for path in (*others, outside / "lock"))


@pytest.mark.parametrize("moment", ["before the lock file", "before the lock"])
def test_a_directory_that_is_swept_while_it_is_created_is_created_again(
    place: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """A sweep can't tell a directory that is not locked yet from one that nobody will lock."""
    calls = []
    original = tempfile.mkdtemp if moment == "before the lock file" else temporary.flock

    def once(*arguments: object, **named: object) -> object:
        if named.get("wait") is False:
            return original(*arguments, **named)
        calls.append(1)
        made = original(*arguments, **named) if moment == "before the lock file" else None
        if len(calls) == 1:
            temporary.sweep(place)
        return made if moment == "before the lock file" else original(*arguments, **named)

    target = "tempfile.mkdtemp" if moment == "before the lock file" else "builder.core.temporary.flock"
    monkeypatch.setattr(target, once)
    with temporary.directory() as made:
        assert made.is_dir()
        assert list(place.iterdir()) == [made]
    assert len(calls) == 2


MANY = """
import sys
from pathlib import Path
from builder.core import temporary
for _ in range(100):
    with temporary.directory() as made:
        (made / "file").write_text("x")
        temporary.sweep(made.parent)
        assert (made / "file").read_text() == "x", made
"""


def test_processes_that_create_and_sweep_at_once_keep_their_own(place: Path) -> None:
    running = [subprocess.Popen([sys.executable, "-c", MANY], cwd=ROOT) for _ in range(3)]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    assert not list(place.iterdir())


STARTED = """
import os, signal, sys
from pathlib import Path
from builder.core import interrupts, temporary
interrupts.handle()
number, wanted = int(sys.argv[1]), sys.argv[2]
def at(event, arguments):
    if event == wanted:
        os.kill(os.getpid(), number)
sys.addaudithook(at)
try:
    with temporary.directory() as made:
        (made / "below").mkdir()
except KeyboardInterrupt:
    sys.exit(130)
"""
MOMENTS = ["tempfile.mkdtemp", "os.mkdir", "open", "shutil.rmtree", "os.remove", "os.rmdir"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_moment_of_an_interrupt_leaves_a_directory(place: Path, number: int) -> None:
    """Of a kill neither, once the next command has run."""
    for moment in MOMENTS:
        argv = [sys.executable, "-c", STARTED, str(int(number)), moment]
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == (130 if number == signal.SIGTERM else -9), (moment, done.stderr)
        if number == signal.SIGKILL:
            temporary.sweep(place)
        assert not list(place.iterdir()), moment


REMOVED = """
import os, signal, sys
from builder.core import temporary
left = int(sys.argv[1])
with temporary.directory() as made:
    for name in ("a", "lock.d", "z/y"):
        (made / name).mkdir(parents=True)
        (made / name / "file").touch()
    for name in ("0", "zz"):
        (made / name).touch()
    def at(event, arguments):
        global left
        if event in ("os.remove", "os.rmdir", "shutil.rmtree"):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(at)
"""


def test_a_removal_that_is_killed_at_any_step_is_completed_by_the_next_sweep(place: Path) -> None:
    """In whatever order the file system names the files: the lock goes last."""
    for step in range(1, 100):
        code = subprocess.run([sys.executable, "-c", REMOVED, str(step)], cwd=ROOT).returncode
        assert code in (0, -9)
        temporary.sweep(place)
        assert not list(place.iterdir()), step
        if code == 0:
            break
    assert step > 10


def test_what_cannot_be_removed_keeps_its_lock_for_the_next_sweep(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched, temporary.directory() as made:
        (made / "backends").mkdir()
        (made / "backends" / "library").touch()
        patched.setattr("shutil.rmtree", lambda *_, **__: None)  # as if the disk refused
    assert sorted(path.name for path in made.iterdir()) == ["backends", "lock"]
    temporary.sweep(place)
    assert not made.exists()


KILLED = """
import os, sys
from pathlib import Path
from builder.core import process
code = "import os, signal, tempfile; tempfile.mkdtemp(); os.kill(int(os.environ['VICTIM']), signal.SIGKILL)"
victim = "0" if sys.argv[2] == "worker" else str(os.getpid())
code = code if victim != "0" else code.replace("int(os.environ['VICTIM'])", "os.getpid()")
command = process.Command([sys.executable, "-c", code + "; import time; time.sleep(60)"], env={"VICTIM": victim})
process.run(command, log=Path(sys.argv[1]))
"""


@pytest.mark.parametrize("victim", ["worker", "builder"])
def test_a_killed_worker_leaves_no_temporary_file(place: Path, tmp_path_factory: pytest.TempPathFactory, victim: str):
    """Nor does one whose parent was killed, before any other command runs."""
    log = tmp_path_factory.mktemp("logs") / "log"
    done = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(log), victim], cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    _, stderr = done.communicate(timeout=60)  # the supervisor holds stderr until it has cleaned up
    assert b"was killed by SIGKILL" in stderr if victim == "worker" else done.returncode == -9
    for _ in range(200):
        if not list(place.iterdir()):
            break
        signal.sigtimedwait([], 0.05)
    assert not list(place.iterdir())


def test_a_worker_finds_its_temporary_directory_and_the_cache_of_what_torch_compiles(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)  # torch sets it in a process that compiled something
    code = "import os, tempfile; print(tempfile.gettempdir(), os.environ['TORCHINDUCTOR_CACHE_DIR'], sep='|')"
    process.run(process.Command([sys.executable, "-c", code]), log=place / "log")
    tmp, cache = (place / "log").read_text().splitlines()[-1].split("|")
    assert temporary.outside(Path(tmp)) == place == Path(cache).parent
    assert Path(tmp) != place
    assert not Path(tmp).exists()


def test_looking_for_a_place_creates_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`tempfile.gettempdir` creates one; an interrupt at that moment left it."""
    monkeypatch.setattr("tempfile._get_default_tempdir", lambda: pytest.fail("asked tempfile"))
    assert temporary.base() == tmp_path
    monkeypatch.setattr("tempfile.tempdir", None)
    assert main.main(["gpus", "--quiet"]) == 0
    assert tempfile.gettempdir() == str(tmp_path)
    with temporary.directory() as made:
        assert temporary.outside(made / "a" / "b") == tmp_path
    assert temporary.outside(tmp_path / "a") == tmp_path / "a"


def test_without_a_place_the_error_names_those_that_were_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(temporary, "bases", lambda: [tmp_path / "absent"])
    with pytest.raises(StageError, match="no directory for temporary files") as caught, temporary.directory():
        pass
    assert f"{tmp_path}/absent: No such file or directory" in caught.value.why
    assert not interrupts.received()
