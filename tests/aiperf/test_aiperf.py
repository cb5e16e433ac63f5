"""`builder bench` with the real AIPerf against the real gateway. See `make test-aiperf`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import exports
import pytest

from builder import pipeline
from builder.aiperf import environment
from builder.aiperf.measured import Measurement
from builder.core import temporary
from builder.core.output import Output
from builder.core.store import Store
from builder.recipe import schema
from builder.report.gather import gather
from builder.report.render import html
from builder.triton.repository import Repository

pytestmark = pytest.mark.aiperf

SNAPSHOT = exports.MODELS["qwen3"]
SIZES = ["--requests", "4", "--input-tokens", "24", "--output-tokens", "4"]
START_SECONDS = 240.0


@pytest.fixture(scope="module", autouse=True)
def made() -> None:
    """The user's environment, which is made if it is not there."""
    environment.environment(Output("human"))


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    store = Store(tmp_path_factory.mktemp("aiperf") / "artifacts", Output("quiet"))
    recipe = schema.resolve({"model.id": str(SNAPSHOT), "gpu": "cpu", "calibration.samples": 4, "quality.check": False})
    found = pipeline.build(recipe, store, until="repository").repository
    assert found is not None
    return found


def bench(repository: Repository, tmp: Path, *options: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, JSON and messages. All temporary files are in `tmp`, where nothing may stay."""
    process = started(repository, tmp, *options)
    stdout, stderr = process.communicate(timeout=500)
    assert not left(tmp), stderr
    return process.returncode, json.loads(stdout), stderr


def started(repository: Repository, tmp: Path, *options: str) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "builder", "bench", str(repository.path), "--json", *options]
    env = {**os.environ, "TMPDIR": str(tmp)}
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def left(tmp: Path) -> list[str]:
    """What is in the directory, but for logs of failures, and the processes whose TMPDIR is in it."""
    found = [str(path) for path in tmp.iterdir() if not (path / temporary.FAILED).exists()]
    return found + [" ".join(words) for words in processes(tmp).values()]


def processes(tmp: Path) -> dict[int, list[str]]:
    """The command lines of processes whose TMPDIR is in this directory, but for ours and zombies."""
    found = {}
    for proc in Path("/proc").glob("[0-9]*"):
        try:
            inside = f"TMPDIR={tmp}".encode() in (proc / "environ").read_bytes()
            words = (proc / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if inside and int(proc.name) != os.getpid() and any(words):
            found[int(proc.name)] = words
    return found


def waited_for(what: str, tmp: Path, process: subprocess.Popen[str]) -> list[int]:
    """The processes with this in their command line, once there are any."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if found := [pid for pid, words in processes(tmp).items() if what in words]:
            return found
        time.sleep(0.2)
    raise AssertionError(f"no {what}: {process.communicate()[1]}")


@pytest.fixture
def tmp(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "t").mkdir()
    yield tmp_path / "t"
    assert not left(tmp_path / "t")


def test_closed_and_open_loop_are_measured_and_reported(repository: Repository, tmp: Path) -> None:
    objective = "ttft<=60s,itl<=30s"
    code, made, _ = bench(repository, tmp, "--concurrency", "2", "--rate", "2", *SIZES, "--objective", objective)
    assert code == 0
    measurement = Measurement.from_dict(made)
    assert [point.load.label for point in measurement.points] == ["concurrency 2", "2 requests/s"]
    for point in measurement.points:
        assert (point.completed, point.failed) == (4, 0)
        assert (point.input_tokens, point.output_tokens) == (24, 4), "with the chat template's tokens"
        assert point.ttft is not None
        assert point.latency is not None
        assert 0 < point.ttft.p50 <= point.latency.p99 < 60
        assert point.tokens_per_second == pytest.approx(4 * point.requests_per_second)
        assert (point.good, point.goodput) == (1.0, pytest.approx(point.requests_per_second))
    report = gather(repository.path)
    assert report.load == measurement
    assert "ttft ≤ 60000 ms, itl ≤ 30000 ms" in html(report)


def test_recorded_requests_are_replayed_with_their_lengths(repository: Repository, tmp: Path, tmp_path: Path) -> None:
    lines = [
        {"timestamp": 1000 + 400 * n, "input_length": 20 + 10 * n, "output_length": 3 + n, "hash_ids": [n]}
        for n in range(4)
    ]
    file = tmp_path / "trace.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    code, made, _ = bench(repository, tmp, "--trace", str(file), "--api", "completions")
    assert code == 0
    [point] = Measurement.from_dict(made).points
    assert (point.load.label, point.completed) == ("recorded times", 4)
    assert point.output_tokens == pytest.approx(4.5)
    assert point.input_tokens == pytest.approx(35, abs=1.5), "text of a length can encode to a token more or less"
    assert point.seconds > 1.2, "the last one was sent after 1.2 s"


def test_a_server_that_dies_is_told(repository: Repository, tmp: Path) -> None:
    process = started(repository, tmp, "--concurrency", "2", "--requests", "500", *SIZES[2:])
    waited_for("aiperf", tmp, process)
    [server, *_] = [pid for pid, words in processes(tmp).items() if words[0].endswith("/tritonserver")]
    os.kill(server, signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 5, stderr
    assert "The server ended while AIPerf measured concurrency 2" in json.loads(stdout)["error"]["what"]


def test_an_interrupt_leaves_nothing(repository: Repository, tmp: Path) -> None:
    process = started(repository, tmp, "--concurrency", "2", "--requests", "500", *SIZES[2:])
    waited_for("aiperf", tmp, process)
    time.sleep(5)  # its services have started
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode == 130


def test_a_server_that_is_not_there_is_told(repository: Repository, tmp: Path) -> None:
    code, made, _ = bench(repository, tmp, "--url", "http://127.0.0.1:9/v1", "--concurrency", "1", *SIZES)
    assert (code, made["error"]["what"]) == (5, "http://127.0.0.1:9/v1/models lists no model.")
    code, made, _ = bench(
        repository, tmp, "--url", "http://127.0.0.1:9/v1", "--model-name", "m", "--concurrency", "1", *SIZES
    )
    assert code == 5
    assert made["error"]["what"] == "More than half of the requests failed at concurrency 1."
    assert "Connect call failed" in made["error"]["why"]
