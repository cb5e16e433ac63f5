"""A worker that starts before its job is known does the job as any other, and leaves nothing without one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from builder.core import process
from builder.core.early_worker import EarlyWorker
from builder.core.errors import UsageError
from builder.core.output import Output
from builder.core.process import Bar

MODULE = """
import os, sys
from pathlib import Path
from builder.core import errors
from builder.core.worker import emit, worker_main
HERE = Path(__file__).parent
def prepare():
    emit(info="not heard")
    (HERE / "prepared").write_text(str(os.getpid()))
    if (HERE / "fails").exists():
        raise ImportError("a library")
def work(job):
    if "wrong" in job:
        raise errors.UsageError(job["wrong"])
    emit(pid=os.getpid())
    return {"doubled": 2 * job["number"], "early": (HERE / "prepared").exists()}
sys.exit(worker_main(sys.argv, work, prepare=prepare))
"""
BAR = Bar(Output("human"), "starting")


def until(found: Callable[[], object]) -> bool:
    deadline = time.monotonic() + 30
    while not found() and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(found())


def environment(tmp_path: Path) -> dict[str, str]:
    return {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.getcwd()}"}


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[EarlyWorker]:
    (tmp_path / "early_module.py").write_text(MODULE)
    made = EarlyWorker("early_module", environment(tmp_path), lambda: tmp_path / "of.log")
    yield made
    made.close()


def prepared(tmp_path: Path) -> int:
    """The process id of a worker that waits for its job."""
    assert until(lambda: (tmp_path / "prepared").exists() and (tmp_path / "prepared").read_text())
    return int((tmp_path / "prepared").read_text())


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_it_prepares_before_its_job_is_known(
    worker: EarlyWorker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    worker.begin()
    pid = prepared(tmp_path)
    found, finished, log = worker.run({"number": 21}, BAR)
    assert found == {"pid": pid, "summary": {"doubled": 42, "early": True}}
    assert finished.max_rss > 1_000_000
    assert f"-m early_module {process.job_file(log)}" in log.read_text()
    worker.close()
    assert log.is_file()
    assert process.job_file(log).is_file()
    assert "not heard" not in capsys.readouterr().err


def test_without_an_early_start_it_starts_with_its_job(worker: EarlyWorker, tmp_path: Path) -> None:
    found, _, log = worker.run({"number": 21}, BAR)
    assert found["summary"] == {"doubled": 42, "early": False}
    assert log == tmp_path / "of.log"


def test_without_a_job_nothing_is_left_of_it(worker: EarlyWorker, tmp_path: Path) -> None:
    worker.begin()
    pid = prepared(tmp_path)
    worker.close()
    assert not alive(pid)
    assert not (tmp_path / "of.log").exists()
    assert not process.job_file(tmp_path / "of.log").exists()


def test_what_its_job_fails_with_is_raised(worker: EarlyWorker, tmp_path: Path) -> None:
    worker.begin()
    with pytest.raises(UsageError, match="not so"):
        worker.run({"wrong": "not so"}, BAR)
    assert (tmp_path / "of.log").is_file()


def test_what_fails_early_is_left_to_the_job(worker: EarlyWorker, tmp_path: Path) -> None:
    (tmp_path / "fails").touch()
    worker.begin()
    assert worker.run({"number": 1}, BAR)[0]["summary"] == {"doubled": 2, "early": True}


def test_one_that_was_killed_before_its_job_is_reported(worker: EarlyWorker, tmp_path: Path) -> None:
    worker.begin()
    pid = prepared(tmp_path)
    os.kill(pid, signal.SIGKILL)
    assert until(lambda: not alive(pid))
    with pytest.raises(process.Failed, match="SIGKILL") as caught:
        worker.run({"number": 1}, BAR)
    assert caught.value.code == -signal.SIGKILL


def test_a_machine_that_refuses_the_early_start_is_reported_with_the_job(tmp_path: Path) -> None:
    worker = EarlyWorker("early_module", environment(tmp_path), lambda: tmp_path / "absent" / "of.log")
    worker.begin()
    with pytest.raises(FileNotFoundError):
        worker.run({"number": 1}, BAR)


PARENT = """
import sys, time
from pathlib import Path
from builder.core.early_worker import EarlyWorker
place = Path(sys.argv[1])
worker = EarlyWorker("early_module", {"PYTHONPATH": sys.argv[2]}, lambda: place / "of.log")
worker.begin()
time.sleep(60)
"""


def test_it_ends_with_a_parent_that_is_killed(worker: EarlyWorker, tmp_path: Path) -> None:
    argv = [sys.executable, "-c", PARENT, str(tmp_path), environment(tmp_path)["PYTHONPATH"]]
    parent = subprocess.Popen(argv)
    pid = prepared(tmp_path)
    parent.kill()
    parent.wait()
    assert until(lambda: not alive(pid))
