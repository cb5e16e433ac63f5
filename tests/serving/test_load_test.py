"""A repository under load, on a real Triton with the reference executor; and what is refused before one is started."""

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
from builder.serving import load_test
from builder.serving.client import Client, Refused
from builder.serving.load_test import Asked, Level, LoadReport
from builder.serving.server import Server, serve
from builder.triton.repository import Repository

SNAPSHOT = exports.MODELS["qwen3"]
QUIET = Output("quiet")
SMALL = Asked(clients=(1, 3), requests=6, input_tokens=24, output_tokens=5)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """As a build leaves it, in its store."""
    store = Store(tmp_path_factory.mktemp("load") / "artifacts", QUIET)
    asked = schema.resolve({"model.id": str(SNAPSHOT), "gpu": "cpu", "calibration.samples": 4, "quality.check": False})
    found = pipeline.build(asked, store, until="repository").repository
    assert found is not None
    return found


@pytest.fixture(scope="module")
def served(repository: Repository, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(repository.models, out=QUIET, log=tmp_path_factory.mktemp("log") / "server.log") as server:
        yield server


@pytest.fixture(scope="module")
def report(served: Server, repository: Repository) -> LoadReport:
    return load_test.load(served.http_url, served.grpc_url, repository, SMALL, out=QUIET)


def test_every_level_is_answered_and_its_figures_hang_together(report: LoadReport) -> None:
    assert [level.clients for level in report.levels] == [1, 3]
    for level in report.levels:
        assert (level.answered, level.failed, level.why) == (6, 0, "")
        assert level.first is not None
        assert level.token is not None
        for spread in (level.first, level.token, level.whole):
            assert 0 < spread.p50 <= spread.p90 <= spread.p99
        assert level.first.p99 <= level.whole.p99
        assert 4 <= level.shortest <= level.longest <= 5  # two tokens may be one when encoded again
        assert level.tokens_per_second == pytest.approx(6 * 5 / level.seconds, rel=0.2)
        # All together take as long as the slowest one at least, and one after the other no longer than their sum.
        assert level.whole.p99 <= level.seconds <= 6 * level.whole.p99 + 1


def test_the_pieces_are_the_answer_and_sent_is_told_before_the_first(served: Server, repository: Repository) -> None:
    client = Client(served.http_url, served.grpc_url, repository.facts["models"], 60)
    told: list[str] = []
    ask = load_ask(5)
    for piece in client.grpc_pieces(ask, sent=lambda: told.append("sent")):
        told.append(piece)
    assert told[0] == "sent"
    assert told.count("sent") == 1
    assert "".join(told[1:]) == client.grpc_stream(ask).text


def load_ask(tokens: int) -> Any:
    from builder.serving.client import Ask

    return Ask("The parser repeats", tokens, {"min_tokens": tokens})


def test_prompts_have_their_length_and_no_two_begin_alike(repository: Repository) -> None:
    tokenizer = Tokenizer.from_file(str(repository.models / repository.facts["tokenizer_dir"] / "tokenizer.json"))
    prompts = load_test.texts(repository, 24, 40, begin="7")
    counts = [len(tokenizer.encode(prompt).ids) for prompt in prompts]
    assert max(counts) <= 24
    assert min(counts) >= 22
    assert len({prompt[:8] for prompt in prompts}) == 40
    again = load_test.texts(repository, 24, 40, begin="8")
    assert not {prompt[:8] for prompt in prompts} & {prompt[:8] for prompt in again}, "nor as those of another time"


def test_what_fails_is_counted_and_where_all_fails_it_is_an_error(
    served: Server, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every third request is refused, as by a full queue."""
    whole, count = Client.grpc_pieces, []

    def refusing(self: Client, *more: Any, **options: Any) -> Iterator[str]:
        count.append(1)
        if len(count) % 3 == 0:
            raise Refused("Exceeds maximum queue size\nmore")
        yield from whole(self, *more, **options)

    monkeypatch.setattr(Client, "grpc_pieces", refusing)
    asked = replace(SMALL, clients=(1,))
    [level] = load_test.load(served.http_url, served.grpc_url, repository, asked, out=QUIET).levels
    assert (level.answered, level.failed, level.why) == (4, 2, "Exceeds maximum queue size")
    assert level.tokens_per_second == pytest.approx(4 * 5 / level.seconds, rel=0.2), "of what was answered"

    def none(self: Client, *more: Any, **options: Any) -> Iterator[str]:
        raise Refused("no")

    monkeypatch.setattr(Client, "grpc_pieces", none)
    with pytest.raises(ServingError, match="none was answered"):
        load_test.load(served.http_url, served.grpc_url, repository, asked, out=QUIET)


def test_tokens_are_counted_not_assumed(
    served: Server, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that ends its answers early, whatever it is told, makes no more tokens a second by that."""
    whole = Client.grpc_pieces

    def short(self: Client, ask: Any, **options: Any) -> Iterator[str]:
        yield from whole(self, replace(ask, max_tokens=2, options={"min_tokens": 2}), **options)

    monkeypatch.setattr(Client, "grpc_pieces", short)
    asked = replace(SMALL, clients=(2,), output_tokens=20)
    [level] = load_test.load(served.http_url, served.grpc_url, repository, asked, out=QUIET).levels
    assert (level.answered, level.longest) == (6, 2)
    assert level.tokens_per_second <= 6 * 2 / level.seconds * 1.01


def test_no_proxy_stands_between_us_and_our_server(
    served: Server, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # the discard port: nobody listens there
        monkeypatch.setenv(name.upper(), "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    client = Client(served.http_url, served.grpc_url, repository.facts["models"], 60)
    ask = load_ask(3)
    ways = [client.http_infer, client.http_generate, client.grpc_infer, client.grpc_stream]
    assert len({way(ask).text for way in ways}) == 1
    assert client.ready()


def test_a_repository_that_does_not_stream_has_whole_answers_only(served: Server, repository: Repository) -> None:
    whole = Repository(repository.path, repository.digest, {**repository.facts, "decoupled": False})
    asked = replace(SMALL, clients=(2,), requests=2)
    [level] = load_test.load(served.http_url, served.grpc_url, whole, asked, out=QUIET).levels
    assert (level.first, level.token) == (None, None)
    assert level.whole.p50 > 0


def test_the_command_keeps_it_for_the_report(
    served: Server, repository: Repository, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    running = ["--http", served.http_url, "--grpc", served.grpc_url]
    argv = ["load", str(repository.path), "--clients", "2", "--requests", "3", "--input-tokens", "16"]
    assert main.main([*argv, "--output-tokens", "4", *running, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [level["answered"] for level in told["levels"]] == [3]
    kept = read(Path(told["path"]))
    assert kept is not None
    assert asdict(LoadReport.from_dict(kept.facts)) == {key: told[key] for key in ("asked", "levels")} | {
        "asked": {**told["asked"], "clients": (2,)},
        "levels": (told["levels"][0],),
    }
    files = ["--html", str(tmp_path / "p.html"), "--markdown", str(tmp_path / "c.md"), "--csv", str(tmp_path / "t.csv")]
    assert main.main(["report", str(repository.path), *files]) == 0
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert "Under load" in page
    assert "nothing follows from it for a GPU" in page
    assert "Load was not measured" not in page
    assert "## Under load" in (tmp_path / "c.md").read_text(encoding="utf-8")
    assert main.main([*argv, *running[:2]]) == 2
    assert "both its ports" in capsys.readouterr().err


def test_outside_of_a_store_and_where_none_can_be_written_nothing_is_kept(
    report: LoadReport, repository: Repository, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load_test.keep(Repository(tmp_path, "0" * 64, repository.facts), report, QUIET) is None
    (tmp_path / "load").write_text("a file where a directory has to be")
    inside = Repository(tmp_path / "repository" / "key", "0" * 64, repository.facts)
    assert load_test.keep(inside, report, Output("human")) is None
    assert "is not kept" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (Asked(clients=(0,)), "0 clients are none"),
        (Asked(requests=0), "0 requests are none"),
        (Asked(clients=(1, 64), requests=32), "32 requests can't keep 64 clients busy"),
        (Asked(output_tokens=0), "a token at least"),
        (Asked(input_tokens=2000), "Prompts of 2000 tokens and answers of 32"),
        (Asked(input_tokens=500, output_tokens=1900), "Prompts of 500 tokens and answers of 1900"),
    ],
)
def test_what_would_not_be_served_is_refused_first(asked: Asked, says: str, repository: Repository) -> None:
    with pytest.raises(UsageError, match=says):
        load_test.check(asked, repository.facts)


def test_without_requests_given_every_client_has_two() -> None:
    assert load_test.enough((1, 4, 16)) == 32
    assert load_test.enough((64,)) == 128


@given(st.lists(st.floats(0.001, 100), min_size=1, max_size=300))
def test_a_spread_is_made_of_what_was_seen(values: list[float]) -> None:
    spread = load_test._spread(values)
    seen = {round(value, 6) for value in values}
    assert {spread.p50, spread.p90, spread.p99} <= seen
    for share, value in ((0.5, spread.p50), (0.9, spread.p90), (0.99, spread.p99)):
        below = sum(round(one, 6) <= value for one in values) / len(values)
        assert below >= share - 1e-9
    assert spread.p50 <= spread.p90 <= spread.p99 <= max(seen)


def test_a_report_survives_json() -> None:
    level = Level(1, 3, 0, 1.5, 20.0, load_test.Spread(0.1, 0.2, 0.3))
    made = LoadReport(Asked(), (level,))
    assert LoadReport.from_dict(json.loads(json.dumps(asdict(made)))) == made
    assert load_test.spread_words(level.whole) == "100.0 / 200.0 / 300.0 ms"
    assert load_test.spread_words(level.first) == "–"
