"""Traces and workloads that are refused before anything is installed or served, and AIPerf's command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.aiperf import measure, objective, trace, workload
from builder.aiperf.environment import Environment
from builder.aiperf.measure import Target
from builder.aiperf.trace import Recorded, Trace
from builder.aiperf.workload import Load, Workload
from builder.core.errors import UsageError

FACTS = {"max_input_len": 1024, "max_seq_len": 2048, "decoupled": True}
CLOSED = Workload((Load(concurrency=4),))


def written(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def request(**more: object) -> dict[str, object]:
    return {"input_length": 512, "output_length": 128, **more}


def test_a_trace_is_read_with_what_it_has(tmp_path: Path) -> None:
    found = trace.read(written(tmp_path / "t", request(timestamp=0), "", request(timestamp=1.5, hash_ids=[1])))
    assert found.requests == (Recorded(512, 128, 0.0), Recorded(512, 128, 1.5))
    assert found.timed
    assert not trace.read(written(tmp_path / "t", request(timestamp=0), request())).timed


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[]", "It is not an object."),
        ("{", "Expecting"),
        (request(output_length=0), "output_length must be a whole number from 1 (got 0)."),
        ({"input_length": 3}, "output_length must be a whole number from 1 (got null)."),
        (request(input_length=True), "got true"),
        (request(input_length=2.5), "got 2.5"),
        (request(timestamp=-1), "timestamp must be milliseconds from 0, below 1e+15 (got -1)."),
        ('{"input_length": 1, "output_length": 1, "timestamp": NaN}', "timestamp must be"),
        (request(timestamp=10**400), "timestamp must be"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_a_line_that_is_no_request_is_named(tmp_path: Path, line: object, said: str) -> None:
    file = written(tmp_path / "t.jsonl", request(), "", line)
    with pytest.raises(UsageError, match=r"t\.jsonl:3 is not a request") as caught:
        trace.read(file)
    assert said in caught.value.why


@pytest.mark.parametrize("data", [b"", b"\n\n", b"\xff\xfe"])
def test_a_file_without_requests_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "t").write_bytes(data)
    with pytest.raises(UsageError):
        trace.read(tmp_path / "t")
    with pytest.raises(UsageError, match="Can't read"):
        trace.read(tmp_path / "absent")


recorded = st.builds(Recorded, st.integers(1, 9999), st.integers(1, 9999), st.floats(0, 1e9) | st.none())


@given(st.lists(recorded, min_size=1, max_size=20), st.integers(1, 20), st.booleans())
def test_what_is_written_for_aiperf_reads_back(
    tmp_path_factory: pytest.TempPathFactory, requests: list[Recorded], count: int, timed: bool
) -> None:
    file = tmp_path_factory.mktemp("trace") / "t.jsonl"
    made = Trace(tuple(requests), "digest")
    made.write(file, count, timed=timed)
    back = trace.read(file).requests
    assert back == tuple(one if timed else replace(one, timestamp=None) for one in requests[:count])
    for line in file.read_text().splitlines():
        assert json.loads(line)["extra"]["min_tokens"] == json.loads(line)["output_length"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loads": (Load(concurrency=0),)}, "--concurrency must be at least 1 (got 0)."),
        ({"loads": (Load(rate=0.0),)}, "--rate must be above 0"),
        ({"loads": (Load(rate=float("nan")),)}, "--rate must be above 0"),
        ({"loads": (Load(rate=float("inf")),)}, "--rate must be above 0"),
        ({"requests": 0}, "--requests must be at least 1 (got 0)."),
        ({"requests": 3}, "3 requests are too few for a concurrency of 4."),
        ({"input_tokens": 0}, "--input-tokens must be at least 1 (got 0)."),
        ({"output_tokens": -1}, "--output-tokens must be at least 1 (got -1)."),
        ({"input_tokens": 1025}, "Each request has 1025 input and 32 output tokens"),
        ({"input_tokens": 1024, "output_tokens": 1025}, "more than the repository takes"),
        ({"trace": Trace((Recorded(9, 9, 0.0),), "d")}, "The trace has 1 requests, not 32."),
        ({"trace": Trace((Recorded(9, 9),) * 32, "d"), "loads": (Load(),)}, "requests without a timestamp"),
        ({"trace": Trace((*[Recorded(9, 9)] * 31, Recorded(9, 3000)), "d")}, "Request 32 of the trace has 9 input"),
    ],
)
def test_a_workload_that_can_t_be_sent_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        workload.check(replace(CLOSED, **changes), FACTS)
    assert said in caught.value.what


def test_a_good_workload_passes_and_a_repository_that_does_not_stream_is_refused() -> None:
    workload.check(CLOSED, FACTS)
    workload.check(replace(CLOSED, loads=(Load(),), trace=Trace((Recorded(9, 9, 0.0),) * 32, "d")), FACTS)
    with pytest.raises(UsageError, match="does not stream"):
        workload.check(CLOSED, {**FACTS, "decoupled": False})


def test_requests_keep_every_load_busy() -> None:
    assert workload.default_requests((Load(concurrency=1),), None) == 32
    assert workload.default_requests((Load(rate=5.0), Load(concurrency=100)), None) == 200
    assert workload.default_requests((Load(),), Trace((Recorded(1, 1, 0.0),) * 7, "d")) == 7


def command_line(asked: Workload, directory: Path) -> dict[str, str]:
    """The options with their values; "" for a switch."""
    target = Target("http://127.0.0.1:1", "m", Path("/tokenizer"))
    words = measure.arguments(Environment(Path("/e")), target, asked, directory / "out", directory / "trace.jsonl")
    assert words[:4] == ["/e/bin/python", "-m", "aiperf", "profile"]
    found: dict[str, str] = {}
    for word in words[4:]:
        if word.startswith("--"):
            name, found[word] = word, ""
        else:
            found[name] = word
    return found


def test_each_kind_of_load_has_its_options(tmp_path: Path) -> None:
    goal = objective.parse("ttft<=1s")
    closed = command_line(replace(CLOSED, objective=goal, seed=7), tmp_path)
    assert (closed["--concurrency"], closed["--request-count"], closed["--isl"]) == ("4", "32", "128")
    assert (closed["--goodput"], closed["--random-seed"]) == ("time_to_first_token:1000", "7")
    assert json.loads(closed["--extra-inputs"]) == {"min_tokens": 32}, "no answer ends early"
    assert int(closed["--num-dataset-entries"]) == 32, "no prompt is sent twice"
    rate = command_line(replace(CLOSED, loads=(Load(rate=2.5),), api="completions", arrival="constant"), tmp_path)
    assert (rate["--request-rate"], rate["--arrival-pattern"], rate["--endpoint-type"]) == (
        "2.5", "constant", "completions"
    )  # fmt: skip
    assert "--concurrency" not in rate
    assert "--apply-chat-template" not in rate
    recorded = Trace((Recorded(9, 8, 0.0), Recorded(7, 6, 1.0)), "d")
    replay = command_line(replace(CLOSED, loads=(Load(),), trace=recorded, requests=2), tmp_path)
    assert "--fixed-schedule" in replay
    assert "timestamp" in (tmp_path / "trace.jsonl").read_text()
    lengths = command_line(replace(CLOSED, loads=(Load(rate=1.0),), trace=recorded, requests=2), tmp_path)
    assert "--no-fixed-schedule" in lengths
    assert "timestamp" not in (tmp_path / "trace.jsonl").read_text()
    assert "--isl" not in lengths
