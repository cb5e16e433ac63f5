"""Processes: exit codes, logs, events, and that none is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from builder.core import process, worker
from builder.core.errors import BuilderError, StageError, UnsupportedError, UsageError
from builder.core.output import Output


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the second if it ends while the file is read
        return False


def gone(pid: int) -> bool:
    for _ in range(100):
        if not alive(pid):
            return True
        time.sleep(0.05)
    return False


def test_output_is_in_the_log_and_events_are_heard(tmp_path: Path) -> None:
    events: list[dict[str, object]] = []
    code = "from builder.core.worker import emit\nprint('hello'); emit(done=1); emit(done=2, label='größer')"
    finished = process.run(process.Command(python(code)), log=tmp_path / "log", on_event=events.append)
    assert events == [{"done": 1}, {"done": 2, "label": "größer"}]
    assert "hello" in (tmp_path / "log").read_text()
    assert (tmp_path / "log").read_text().startswith("$ ")
    assert finished.max_rss > 1_000_000


def test_each_line_is_heard_once_while_the_child_runs(tmp_path: Path) -> None:
    """Including a line written in pieces, a last line without a line feed, and lines of a failing process."""
    heard: list[str] = []
    (tmp_path / "log").write_text("of another run\n")
    code = f"""
import sys, time
from pathlib import Path
write = lambda text: (sys.stdout.write(text), sys.stdout.flush())
write("fir")
time.sleep(0.5)
write("st\\n")
while not Path({str(tmp_path / "heard")!r}).exists():
    time.sleep(0.01)
for number in range(5000):
    write(f"{{number}}\\n")
write("größer, without an end")
sys.exit(3)
"""

    def hear(line: str) -> None:
        heard.append(line)
        (tmp_path / "heard").touch()

    with pytest.raises(StageError, match="exited with code 3"):
        process.run(process.Command(python(code)), log=tmp_path / "log", on_line=hear)
    assert heard == ["first", *map(str, range(5000)), "größer, without an end"]


def test_a_failure_shows_the_last_lines_and_the_code(tmp_path: Path) -> None:
    code = "import sys; print('\\n'.join(map(str, range(100)))); sys.exit('out of memory')"
    with pytest.raises(StageError, match="exited with code 1") as caught:
        process.run(process.Command(python(code)), log=tmp_path / "log")
    assert "out of memory" in caught.value.why
    assert "\n50\n" not in caught.value.why
    assert str(tmp_path / "log") in caught.value.hint


def test_the_error_of_a_child_is_raised_as_its_own_class(tmp_path: Path) -> None:
    code = """
import sys
from builder.core.errors import UnsupportedError
from builder.core.worker import emit_error
emit_error(UnsupportedError("too large", why="it is", hint="take a smaller one"))
sys.exit(3)
"""
    with pytest.raises(UnsupportedError, match="too large") as caught:
        process.run(process.Command(python(code)), log=tmp_path / "log")
    assert caught.value.hint == "take a smaller one"


def test_a_signal_is_named(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="SIGKILL") as caught:
        process.run(process.Command(python("import os; os.kill(os.getpid(), 9)")), log=tmp_path / "log")
    assert "memory" in caught.value.hint


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        process.run(process.Command(["no-such-program"]), log=tmp_path / "log")


PARENT = """
import sys
from pathlib import Path
from builder.core import process
code = "import os, sys, time; from builder.core.worker import emit; emit(pid=os.getpid()); time.sleep(60)"
command = process.Command([sys.executable, "-c", code])
process.run(command, log=Path(sys.argv[1]), on_event=lambda e: print(e["pid"], flush=True))
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_child_never_outlives_its_parent(tmp_path: Path, how: signal.Signals) -> None:
    parent = subprocess.Popen(
        [*python(PARENT), str(tmp_path / "log")], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert alive(child)
    parent.send_signal(how)
    parent.wait(20)
    parent.stdout.close()
    assert gone(child)


INTERRUPTED = """
import os, signal, sys, time
from pathlib import Path
from builder.core import process
def interrupt(*_):
    raise KeyboardInterrupt
signal.signal(getattr(signal, sys.argv[2]), interrupt)
def in_popen(event, arguments):
    if event == "subprocess.Popen":
        os.kill(os.getpid(), getattr(signal, sys.argv[2]))
        time.sleep(0.3)
sys.addaudithook(in_popen)
try:
    process.run(process.Command([sys.executable, "-c", "import time; time.sleep(60)"]), log=Path(sys.argv[1]))
except KeyboardInterrupt:
    sys.exit("interrupted")
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_an_interrupt_while_a_child_is_started_is_not_lost(tmp_path: Path, name: str) -> None:
    argv = [*python(INTERRUPTED), str(tmp_path / "log"), name]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (1, "interrupted\n")


def test_emit_without_a_parent_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(worker.PROGRESS_FD, raising=False)
    worker.emit(done=1)


def test_a_stopped_child_says_what_it_was(tmp_path: Path) -> None:
    with pytest.raises(process.Failed, match="took more than 1 s") as caught:
        process.run(process.Command(["sleep", "60"]), log=tmp_path / "log", limit=1)
    assert caught.value.code is None
    with pytest.raises(process.Failed) as caught:
        process.run(process.Command(["sh", "-c", "exit 3"]), log=tmp_path / "log", limit=60)
    assert caught.value.code == 3
    assert isinstance(caught.value, StageError)


def test_a_job_is_told_by_a_file_and_its_events_are_heard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The job file stays beside the log, so that the command in the log can be run again."""
    module = tmp_path / "job_module.py"
    module.write_text(
        "import json, os, sys\n"
        "from builder.core.worker import emit\n"
        "job = json.load(open(sys.argv[1]))\n"
        "emit(progress={'done': 1, 'total': 2, 'label': 'half'})\n"
        "emit(info='said by the child')\n"
        "emit(summary=job['name'] + os.environ['OF_THE_JOB'])\n"
    )
    told, finished = process.run_job(
        "job_module",
        {"name": "größer"},
        log=tmp_path / "of.log",
        bar=process.Bar(Output("human"), "starting"),
        env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.getcwd()}", "OF_THE_JOB": "!"},
    )
    assert told == {"summary": "größer!"}
    assert finished.max_rss > 1_000_000
    assert "said by the child" in capsys.readouterr().err
    assert process.job_file(tmp_path / "of.log").is_file()
    assert f"-m job_module {process.job_file(tmp_path / 'of.log')}" in (tmp_path / "of.log").read_text()


@pytest.mark.parametrize(
    ("failure", "raises", "says"),
    [
        ("errors.UsageError('not so', hint='but so')", UsageError, "not so"),
        ("MemoryError()", UnsupportedError, "too large: 7"),
        ("ZeroDivisionError()", process.Failed, "ZeroDivisionError"),
    ],
)
def test_what_a_job_fails_with_is_what_its_parent_raises(
    failure: str, raises: type[BuilderError], says: str, tmp_path: Path
) -> None:
    """A bug leaves its traceback in the log; an error that users can fix keeps its message and exit code."""
    (tmp_path / "failing_module.py").write_text(
        "import sys\n"
        "from builder.core import errors\n"
        "from builder.core.worker import leave, worker_main\n"
        f"def work(job): raise {failure}\n"
        "def known(error, job):\n"
        "    if isinstance(error, MemoryError): return errors.UnsupportedError(f'too large: {job[\"size\"]}')\n"
        "leave(worker_main(sys.argv, work, known))\n"
    )
    environment = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.getcwd()}"}
    with pytest.raises(raises, match=says):
        process.run_job(
            "failing_module",
            {"size": 7},
            log=tmp_path / "of.log",
            bar=process.Bar(Output("quiet"), ""),
            env=environment,
        )


def test_a_worker_that_leaves_loses_no_output() -> None:
    code = "import atexit\nfrom builder.core.worker import leave\n"
    code += "atexit.register(print, 'late')\nprint('x' * 9000)\nleave(6)"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert (done.stdout, done.returncode) == ("x" * 9000 + "\n", 6)


@pytest.mark.parametrize(
    ("job", "named"), [({"destination": "/store/made"}, "/store/made"), ({"root": "/store"}, "/store"), ({}, None)]
)
def test_a_full_disk_is_named_where_the_kernel_names_no_file(
    job: dict[str, str], named: str | None, tmp_path: Path
) -> None:
    """write(2) to an open file fails without a name, unlike open(2)."""
    (tmp_path / "filling_module.py").write_text(
        "import sys\n"
        "from builder.core.worker import leave, worker_main\n"
        "def work(job):\n"
        "    with open('/dev/full', 'w') as full: full.write('anything')\n"
        "leave(worker_main(sys.argv, work))\n"
    )
    environment = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.getcwd()}"}
    bar = process.Bar(Output("quiet"), "")
    with pytest.raises(StageError, match=rf"The disk that holds {named or tmp_path} is full"):
        process.run_job("filling_module", job, log=tmp_path / "of.log", bar=bar, env=environment)
