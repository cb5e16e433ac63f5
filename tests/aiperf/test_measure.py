"""What AIPerf leaves is read; its environment is there whole or not at all; a server that ends is told."""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from builder.aiperf import environment, measure, measured, target
from builder.aiperf.environment import Environment
from builder.aiperf.measure import Target
from builder.aiperf.measured import Measurement
from builder.aiperf.workload import Load, Workload
from builder.core.errors import ServingError, StageError, UsageError
from builder.core.output import Output
from builder.serving.benchmark import Percentiles

EXPORT = Path("tests/data/aiperf/profile_export_aiperf.json")  # of AIPerf 0.13.0, 8 requests, without other metrics
QUIET = Output("quiet")
LOAD = Load(concurrency=2)


def test_an_export_is_read_in_seconds() -> None:
    export = json.loads(EXPORT.read_text())
    point = measured.point(LOAD, export)
    assert (point.completed, point.failed, point.error) == (8, 0, "")
    assert (point.input_tokens, point.output_tokens) == (24, 8)
    assert point.ttft == Percentiles(0.841985, 1.311685, 1.767147)
    assert point.latency is not None
    assert point.latency.p99 == pytest.approx(6.156, abs=0.001)
    assert (point.goodput, point.good) == (0.0, 0.0)
    assert point.requests_per_second == pytest.approx(8 / point.seconds, rel=0.1)


def test_failed_requests_are_counted_and_metrics_that_are_not_there_are_none() -> None:
    error = {"error_details": {"type": "X", "message": "503\n busy"}, "count": 3}
    export = {**json.loads(EXPORT.read_text()), "error_summary": [error], "completed_request_count": {"avg": 11.0}}
    del export["time_to_first_token"], export["goodput"], export["good_request_fraction"]
    point = measured.point(LOAD, export)
    assert (point.completed, point.failed, point.error) == (8, 3, "503 busy")
    assert (point.ttft, point.goodput, point.good) == (None, None, None)


def test_a_measurement_survives_json_and_names_its_best_point() -> None:
    point = measured.point(LOAD, json.loads(EXPORT.read_text()))
    points = (point, replace(point, load=Load(rate=0.5), goodput=2.0, good=1.0), replace(point, load=Load(), ttft=None))
    asked = Workload((LOAD, Load(rate=0.5), Load()))
    made = Measurement(asked.as_dict(), points, "0.13.0")
    assert Measurement.from_dict(json.loads(json.dumps(made.as_dict()))) == made
    assert made.best == points[1]
    assert replace(made, points=points[:1]).best is None


def standing_in(root: Path, script: str) -> Environment:
    """An environment whose Python is a shell script: what becomes of AIPerf, not what it does, is tested with it."""
    made = Environment(root)
    made.python.parent.mkdir(parents=True)
    made.python.write_text(f"#!/bin/bash\n{script}\n")
    made.python.chmod(0o755)
    return made


def run(place: Environment, alive: Callable[[], str] = lambda: "") -> Measurement:
    asked = Workload((LOAD,))
    return measure.measure(place, Target("http://127.0.0.1:1", "m", Path("/none"), alive), asked, out=QUIET)


def test_a_server_that_ends_is_told_at_once_and_aiperf_is_ended(tmp_path: Path) -> None:
    place = standing_in(tmp_path / "e", f'echo $$ > "{tmp_path}/pid"; exec sleep 600')
    start = time.monotonic()
    with pytest.raises(ServingError, match="The server ended while AIPerf measured concurrency 2") as caught:
        run(place, lambda: "Triton was killed." if (tmp_path / "pid").exists() else "")
    assert caught.value.why == "Triton was killed."
    assert time.monotonic() - start < 30
    assert not Path("/proc", (tmp_path / "pid").read_text().strip()).exists()


OUT = 'while [ "$1" != --output-artifact-dir ]; do shift; done; mkdir -p "$2"'


@pytest.mark.parametrize(
    ("script", "error", "said"),
    [
        (f"""{OUT}; echo '{{"error": {{"message": "503 busy"}}}}' > "$2/profile_export.jsonl"; exit 1""",
         ServingError, "More than half of the requests failed at concurrency 2.\n503 busy"),
        ("echo it broke >&2; exit 3", StageError, "it broke"),
        ("exit 0", StageError, "AIPerf left no results."),
        (f"""{OUT}; echo '{{' > "$2/profile_export_aiperf.json" """, StageError, "AIPerf left no results."),
    ],
)  # fmt: skip
def test_a_run_without_results_says_why(tmp_path: Path, script: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        run(standing_in(tmp_path / "e", script))
    assert said in str(caught.value)


def test_an_environment_that_can_t_be_made_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry without packages, as on a machine without a network."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "none"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    stale = tmp_path / "trtllm-builder" / ".aiperf-killed.tmp"
    stale.mkdir(parents=True)
    with pytest.raises(StageError, match="could not be made") as caught:
        environment.environment(QUIET, {})
    assert "No matching distribution" in caught.value.why
    assert "BUILDER_AIPERF=DIR" in caught.value.hint
    assert [path.name for path in (tmp_path / "trtllm-builder").iterdir()] == ["aiperf.lock"]


def test_a_named_environment_is_taken_if_it_has_aiperf(tmp_path: Path) -> None:
    named = {environment.NAMED: str(tmp_path)}
    with pytest.raises(UsageError, match="not an environment with AIPerf"):
        environment.environment(QUIET, named)
    made = standing_in(tmp_path / "e", "")
    (tmp_path / "e/lib/python3.11/site-packages/aiperf").mkdir(parents=True)
    assert environment.environment(QUIET, {environment.NAMED: str(tmp_path / "e")}) == made


def test_versions_are_pinned_and_another_python_has_another_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    text = environment.requirements().read_text()
    pins = [line for line in text.splitlines() if not line.startswith(("#", " "))]
    assert all(line.count("==") == 1 and line.endswith(" \\") for line in pins), "hashes follow"
    assert len(re.findall(r"\n    --hash=sha256:[0-9a-f]{64}", text)) > len(pins)
    assert f"aiperf=={environment.version()} \\" in pins
    ours = environment.place()
    monkeypatch.setattr("sys.base_prefix", "/elsewhere")
    assert environment.place() != ours


@pytest.mark.parametrize(
    "url",
    ["localhost:8000", "ftp://h/v1", "http:///v1", "http://u:p@h/v1", "http://h/v1?x=1", "http://h/v1#x", "http://[::1",
     "http://h:port/v1", "http://h:99999/v1"],
)  # fmt: skip
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="is not the address"):
        target.running(url, None, "m")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "answer",
    [b"\x00\x00\x12\x04 not HTTP\n\n", b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 100_000, b"HTTP/1.1 200 OK\r\n\r\n{}"],
    ids=["a port of gRPC", "nested", "no list"],
)
def test_a_port_that_speaks_something_else_is_told(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def respond() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(answer)

        thread = threading.Thread(target=respond)
        thread.start()
        with pytest.raises(ServingError, match="lists no model"):
            target.running(f"http://127.0.0.1:{server.getsockname()[1]}/v1", None, None)  # type: ignore[arg-type]
        thread.join()
