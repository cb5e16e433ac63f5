"""Whichever process is killed, at any time: no process, shared memory or directory is left behind."""

from __future__ import annotations

import glob
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from builder.core import supervisor
from builder.serving import shared_memory
from tests.serving.test_server import one_model

MARK = "BUILDER_TEST_RUN"


def marked(run: str) -> list[int]:
    """All living processes of a run, found by an inherited variable, since parents change."""
    found = []
    for pid, _, state, _ in supervisor.processes():
        if state != "Z" and f"{MARK}={run}".encode() in supervisor._environment(pid):
            found.append(pid)
    return found


def wait_for(condition: object, seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.02)
    return False


# A model that needs a second to load, and starts processes that leave their session and their parent.
SLOW = "import subprocess, time; subprocess.Popen(['setsid', 'sh', '-c', 'sleep 300 & exec sleep 300']); time.sleep(1)"
SERVE = """
import signal, sys, time
from pathlib import Path
from builder.core import interrupts
from builder.core.output import Output
from builder.serving.server import serve
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, interrupts.interrupt)
try:
    with serve(Path(sys.argv[1]), out=Output("quiet")) as server:
        print("up", flush=True)
        server.wait()
        sys.exit(1)
except KeyboardInterrupt:
    sys.exit(130)
"""


def victim(run: str, who: str) -> int | None:
    """The process to kill: the run's first one, its supervisor, or the server."""
    for pid in marked(run):
        try:
            argv = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        kind = "server" if argv[0].endswith(b"tritonserver") else "builder"
        kind = "supervisor" if any(word.endswith(b"supervisor.py") for word in argv[:5]) else kind
        if kind == who:
            return pid
    return None


@pytest.mark.parametrize(
    ("who", "how"),
    [
        ("builder", signal.SIGKILL),
        ("builder", signal.SIGHUP),
        ("builder", signal.SIGTERM),
        ("supervisor", signal.SIGKILL),
        ("server", signal.SIGKILL),
    ],
)
@pytest.mark.parametrize("after", [0.05, 0.6, 2.0])
def test_a_kill_while_models_load_leaves_nothing(
    tmp_path: Path, who: str, how: signal.Signals, after: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = f"{tmp_path.name}-{os.getpid()}"
    temporary = tmp_path / "t"
    temporary.mkdir()
    models = tmp_path / "models"
    for name in ("one", "two", "three"):
        one_model(models, SLOW, name=name)
    environment = os.environ | {MARK: run, "TMPDIR": str(temporary)}
    parent = subprocess.Popen([sys.executable, "-c", SERVE, str(models)], env=environment, stderr=subprocess.DEVNULL)
    assert wait_for(lambda: victim(run, who))
    time.sleep(after)
    pid = victim(run, who)
    assert pid
    os.kill(pid, how)
    assert parent.wait(60) in (130, 1, -how)
    assert wait_for(lambda: not marked(run)), [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in marked(run)]
    shared = f"{supervisor.SHM}/builder-{parent.pid}-"
    # A builder that was killed before its supervisor ran has left a lock and nothing else, which the next one removes.
    assert wait_for(lambda: all(one.endswith("-lock") for one in glob.glob(f"{shared}*")))
    shared_memory.sweep()
    assert not glob.glob(f"{shared}*")
    left = [
        path for path in temporary.rglob("*") if path.is_file() and path.name not in ("server.log", "lock", "failed")
    ]
    assert not left
    if who == "builder":
        assert wait_for(lambda: not list(temporary.iterdir()))


JOB = """
import sys
from pathlib import Path
from builder.core import process
process.run(process.Command(["sh", "-c", sys.argv[2]]), log=Path(sys.argv[1]))
"""


@pytest.fixture
def run(tmp_path: Path) -> Iterator[str]:
    name = f"{tmp_path.name}-{os.getpid()}"
    yield name
    assert not marked(name)


@pytest.mark.parametrize(
    "command",
    [
        "sleep 300 & exit 3",
        "setsid sleep 300 & sleep 0.2; kill -KILL $$",
        "(setsid sh -c 'sleep 300 & sleep 300' &) ; sleep 0.2; exit 0",
        "env -i sleep 300 & sleep 0.2; exit 1",
    ],
)
def test_what_a_child_leaves_behind_goes_with_it(tmp_path: Path, run: str, command: str) -> None:
    """Like trtllm-build --workers, failed or interrupted: its processes are killed, even in sessions of their own."""
    seconds = str(10**6 + os.getpid())  # tells its processes from all others, whatever environment they have
    argv = [sys.executable, "-c", JOB, str(tmp_path / "log"), command.replace("300", seconds)]
    subprocess.run(argv, env=os.environ | {MARK: run}, stderr=subprocess.DEVNULL, timeout=60)
    left = [pid for pid, name, _, _ in supervisor.processes() if name == "sleep"]
    assert not [pid for pid in left if seconds.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_grandchildren_of_an_interrupted_child_end(tmp_path: Path, run: str, how: signal.Signals) -> None:
    command = "trap '' INT; setsid sleep 300 & sleep 300"
    argv = [sys.executable, "-c", JOB.replace("import sys", "import sys; sys.excepthook = lambda *_: None"),
            str(tmp_path / "log"), command]  # fmt: skip
    parent = subprocess.Popen(argv, env=os.environ | {MARK: run})
    assert wait_for(lambda: len(marked(run)) == 5)
    parent.send_signal(how)
    parent.wait(30)
    assert wait_for(lambda: not marked(run))


@pytest.mark.parametrize(("command", "code"), [("exit 7", 7), ("kill -SEGV $$", -11), ("kill -KILL $$", -9)])
def test_it_ends_as_its_command_did(command: str, code: int) -> None:
    argv = [sys.executable, "-I", "-S", supervisor.__file__, "", "", "sh", "-c", command]
    with subprocess.Popen(argv, stdin=subprocess.PIPE) as child:
        assert child.wait(30) == code


def test_it_starts_fast(tmp_path: Path) -> None:
    """Every command waits for it, so it must import few modules. They are counted, since times vary with load."""
    code = f"""
        import sys
        before = set(sys.modules)
        sys.path.insert(0, {str(Path(supervisor.__file__).parent)!r})
        import supervisor
        print(sorted(set(sys.modules) - before))
    """
    argv = [sys.executable, "-I", "-S", "-c", textwrap.dedent(code)]
    loaded = subprocess.check_output(argv, text=True)
    assert not any(name in loaded for name in ("'subprocess'", "'json'", "'pathlib'", "'shutil'"))
