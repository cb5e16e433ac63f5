"""`builder load` on a real Triton with the reference executor, and the workloads that are rejected before serving."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import exports
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from builder import pipeline
from builder.cli import main
from builder.core.errors import ServingError, UsageError
from builder.core.output import Output
from builder.core.store import Store, read
from builder.recipe import schema
from builder.serving import benchmark
from builder.serving.benchmark import BenchmarkReport, Level, Workload
from builder.serving.client import Client, ServerError
from builder.serving.server import Server, serve
from builder.triton.repository import Repository

SNAPSHOT = exports.MODELS["qwen3"]
QUIET = Output("quiet")
SMALL = Workload(concurrency=(1, 3), requests=6, input_tokens=24, output_tokens=5)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """As a build leaves it, in its store."""
    store = Store(tmp_path_factory.mktemp("benchmark") / "artifacts", QUIET)
    recipe = schema.resolve({"model.id": str(SNAPSHOT), "gpu": "cpu", "calibration.samples": 4, "quality.check": False})
    found = pipeline.build(recipe, store, until="repository").repository
    assert found is not None
    return found


@pytest.fixture(scope="module")
def served(repository: Repository, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(repository.models, out=QUIET, log=tmp_path_factory.mktemp("log") / "server.log") as server:
        yield server


@pytest.fixture(scope="module")
def report(served: Server, repository: Repository) -> BenchmarkReport:
    return benchmark.run(served.http_url, served.grpc_url, repository, SMALL, out=QUIET)


def test_every_level_completes_and_its_figures_are_consistent(report: BenchmarkReport) -> None:
    assert [level.concurrency for level in report.levels] == [1, 3]
    for level in report.levels:
        assert (level.completed, level.failed, level.error) == (6, 0, "")
        assert level.ttft is not None
        assert level.inter_token_latency is not None
        for times in (level.ttft, level.inter_token_latency, level.latency):
            assert 0 < times.p50 <= times.p90 <= times.p99
        assert level.ttft.p99 <= level.latency.p99
        assert 4 <= level.shortest <= level.longest <= 5  # two tokens may be one when encoded again
        assert level.tokens_per_second == pytest.approx(6 * 5 / level.seconds, rel=0.2)
        # All together take as long as the slowest one at least, and one after the other no longer than their sum.
        assert level.latency.p99 <= level.seconds <= 6 * level.latency.p99 + 1


def test_pieces_make_up_the_answer_and_sent_is_called_before_the_first(served: Server, repository: Repository) -> None:
    client = Client(served.http_url, served.grpc_url, repository.facts["models"], 60)
    events: list[str] = []
    ask = request(5)
    for piece in client.grpc_chunks(ask, sent=lambda: events.append("sent")):
        events.append(piece)
    assert events[0] == "sent"
    assert events.count("sent") == 1
    assert "".join(events[1:]) == client.grpc_stream(ask).text


def request(tokens: int) -> Any:
    from builder.serving.client import Request

    return Request("The parser repeats", tokens, {"min_tokens": tokens})


def test_prompts_have_the_requested_length_and_share_no_prefix(repository: Repository) -> None:
    tokenizer = Tokenizer.from_file(str(repository.models / repository.facts["tokenizer_dir"] / "tokenizer.json"))
    prompts = benchmark.prompts(repository, 24, 40, prefix="7")
    counts = [len(tokenizer.encode(prompt).ids) for prompt in prompts]
    assert max(counts) <= 24
    assert min(counts) >= 22
    assert len({prompt[:8] for prompt in prompts}) == 40
    again = benchmark.prompts(repository, 24, 40, prefix="8")
    assert not {prompt[:8] for prompt in prompts} & {prompt[:8] for prompt in again}, "nor with those of another run"


def test_failed_requests_are_counted_and_a_level_without_any_answer_is_an_error(
    served: Server, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every third request is refused, as by a full queue."""
    whole, count = Client.grpc_chunks, []

    def refusing(self: Client, *more: Any, **options: Any) -> Iterator[str]:
        count.append(1)
        if len(count) % 3 == 0:
            raise ServerError("Exceeds maximum queue size\nmore")
        yield from whole(self, *more, **options)

    monkeypatch.setattr(Client, "grpc_chunks", refusing)
    workload = replace(SMALL, concurrency=(1,))
    [level] = benchmark.run(served.http_url, served.grpc_url, repository, workload, out=QUIET).levels
    assert (level.completed, level.failed, level.error) == (4, 2, "Exceeds maximum queue size")
    assert level.tokens_per_second == pytest.approx(4 * 5 / level.seconds, rel=0.2), "of the completed requests"

    def none(self: Client, *more: Any, **options: Any) -> Iterator[str]:
        raise ServerError("no")

    monkeypatch.setattr(Client, "grpc_chunks", none)
    with pytest.raises(ServingError, match="Every request failed at concurrency 1"):
        benchmark.run(served.http_url, served.grpc_url, repository, workload, out=QUIET)


def test_output_tokens_are_counted_not_assumed(
    served: Server, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that ends answers early does not get a higher throughput for it."""
    whole = Client.grpc_chunks

    def short(self: Client, ask: Any, **options: Any) -> Iterator[str]:
        yield from whole(self, replace(ask, max_tokens=2, options={"min_tokens": 2}), **options)

    monkeypatch.setattr(Client, "grpc_chunks", short)
    workload = replace(SMALL, concurrency=(2,), output_tokens=20)
    [level] = benchmark.run(served.http_url, served.grpc_url, repository, workload, out=QUIET).levels
    assert (level.completed, level.longest) == (6, 2)
    assert level.tokens_per_second <= 6 * 2 / level.seconds * 1.01


def test_the_client_ignores_proxies(served: Server, repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # the discard port: nobody listens there
        monkeypatch.setenv(name.upper(), "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    client = Client(served.http_url, served.grpc_url, repository.facts["models"], 60)
    ask = request(3)
    ways = [client.http_infer, client.http_generate, client.grpc_infer, client.grpc_stream]
    assert len({way(ask).text for way in ways}) == 1
    assert client.ready()


def test_a_repository_that_does_not_stream_has_no_ttft(served: Server, repository: Repository) -> None:
    whole = Repository(repository.path, repository.digest, {**repository.facts, "decoupled": False})
    workload = replace(SMALL, concurrency=(2,), requests=2)
    [level] = benchmark.run(served.http_url, served.grpc_url, whole, workload, out=QUIET).levels
    assert (level.ttft, level.inter_token_latency) == (None, None)
    assert level.latency.p50 > 0


def test_the_command_saves_the_results_for_the_report(
    served: Server, repository: Repository, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    running = ["--http", served.http_url, "--grpc", served.grpc_url]
    argv = ["load", str(repository.path), "--concurrency", "2", "--requests", "3", "--input-tokens", "16"]
    assert main.main([*argv, "--output-tokens", "4", *running, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [level["completed"] for level in printed["levels"]] == [3]
    saved = read(Path(printed["path"]))
    assert saved is not None
    assert saved.facts["workload"]["concurrency"] == [2]
    assert BenchmarkReport.from_dict(saved.facts) == BenchmarkReport.from_dict(printed)
    files = ["--html", str(tmp_path / "p.html"), "--markdown", str(tmp_path / "c.md"), "--csv", str(tmp_path / "t.csv")]
    assert main.main(["report", str(repository.path), *files]) == 0
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert "<h2>Benchmark</h2>" in page
    assert "say nothing about a GPU" in page
    assert "Serving was not benchmarked" not in page
    assert "## Benchmark" in (tmp_path / "c.md").read_text(encoding="utf-8")
    assert main.main([*argv, *running[:2]]) == 2
    assert "--http and --grpc must be given together" in capsys.readouterr().err


def test_results_are_not_saved_outside_a_store_or_in_one_that_is_not_writable(
    report: BenchmarkReport, repository: Repository, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark.save(Repository(tmp_path, "0" * 64, repository.facts), report, QUIET) is None
    (tmp_path / "benchmark").write_text("a file in place of the directory")
    inside = Repository(tmp_path / "repository" / "key", "0" * 64, repository.facts)
    assert benchmark.save(inside, report, Output("human")) is None
    assert "were not saved" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("workload", "says"),
    [
        (Workload(concurrency=(0,)), r"--concurrency must be at least 1 \(got 0\)"),
        (Workload(requests=0), r"--requests must be at least 1 \(got 0\)"),
        (Workload(concurrency=(1, 64), requests=32), "32 requests are too few for a concurrency of 64"),
        (Workload(output_tokens=0), r"must be at least 1 \(got 128 and 0\)"),
        (Workload(input_tokens=2000), "Prompts of 2000 tokens with answers of 32"),
        (Workload(input_tokens=500, output_tokens=1900), "Prompts of 500 tokens with answers of 1900"),
    ],
)
def test_a_workload_that_would_be_refused_is_rejected_before_serving(
    workload: Workload, says: str, repository: Repository
) -> None:
    with pytest.raises(UsageError, match=says):
        benchmark.check(workload, repository.facts)


def test_default_requests_keep_every_level_busy() -> None:
    assert benchmark.default_requests((1, 4, 16)) == 32
    assert benchmark.default_requests((64,)) == 128


@given(st.lists(st.floats(0.001, 100), min_size=1, max_size=300))
def test_percentiles_are_measured_values(values: list[float]) -> None:
    times = benchmark._percentiles(values)
    seen = {round(value, 6) for value in values}
    assert {times.p50, times.p90, times.p99} <= seen
    for share, value in ((0.5, times.p50), (0.9, times.p90), (0.99, times.p99)):
        below = sum(round(one, 6) <= value for one in values) / len(values)
        assert below >= share - 1e-9
    assert times.p50 <= times.p90 <= times.p99 <= max(seen)


def test_a_report_survives_json() -> None:
    level = Level(1, 3, 0, 1.5, 20.0, benchmark.Percentiles(0.1, 0.2, 0.3), error="a queue was full")
    made = BenchmarkReport(Workload(), (level,))
    assert BenchmarkReport.from_dict(json.loads(json.dumps(asdict(made)))) == made
    assert BenchmarkReport.from_dict(json.loads(json.dumps(made.as_dict()))) == made
    assert benchmark.format_percentiles(level.latency) == "100 / 200 / 300 ms"
    assert benchmark.format_percentiles(level.ttft) == "–"


def test_old_json_keys_are_read_and_still_printed() -> None:
    times = {"p50": 0.1, "p90": 0.2, "p99": 0.3}
    old = {
        "asked": {"clients": [2], "requests": 3, "input_tokens": 24, "output_tokens": 5},
        "levels": [
            {"clients": 2, "answered": 3, "failed": 0, "seconds": 1.5, "tokens_per_second": 20.0, "whole": times,
             "first": times, "token": None, "why": "", "shortest": 4, "longest": 5},
        ],
    }  # fmt: skip
    report = BenchmarkReport.from_dict(old)
    [level] = report.levels
    assert (level.concurrency, level.completed, level.ttft, level.inter_token_latency) == (2, 3, level.latency, None)
    printed = json.loads(json.dumps(report.as_dict()))
    assert {key: printed["asked"][key] for key in old["asked"]} == old["asked"]  # type: ignore[call-overload]
    assert {key: printed["levels"][0][key] for key in old["levels"][0]} == old["levels"][0]  # type: ignore[index]
