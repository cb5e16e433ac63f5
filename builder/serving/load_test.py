"""A served repository under load -> LoadReport: how soon an answer begins, how fast it comes, how much comes in all.

So many clients, each with one request under way and the next when that one is answered. Prompts are cuts of the
bundled texts, no two with the same beginning, so that no KV cache knows them; every answer has its full length. The
client, and with it tritonclient, is imported when the measurement begins.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.core import paths
from builder.core.errors import BuilderError, ServingError, UsageError
from builder.core.output import Output
from builder.core.store import Artifact, Store, root_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from builder.serving.client import Client
    from builder.triton.repository import Repository

STAGE = "load"
REQUESTS = 32  # of a level, where --requests does not say so


@dataclass(frozen=True)
class Asked:
    """What is measured: `clients` are the levels; each asks `requests` in all, of so many tokens in and out."""

    clients: tuple[int, ...] = (1, 4, 16)
    requests: int = REQUESTS
    input_tokens: int = 128
    output_tokens: int = 32


@dataclass(frozen=True)
class Spread:
    """Seconds: the median, and what nine and ninety-nine of a hundred requests stay below (of few, the slowest)."""

    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class Level:
    """What so many `clients` saw together: answered and failed requests, output tokens a second of them all.

    Tokens are counted: the answers, encoded by the served tokenizer. That may be a few less than were generated, where
    the tokenizer has one token for what came as two. `shortest` and `longest` are the answers' tokens.
    Of what streams: `first` is the time to the first piece, `token` that of each token after it. `whole` is to the end.
    """

    clients: int
    answered: int
    failed: int
    seconds: float
    tokens_per_second: float
    whole: Spread
    first: Spread | None = None
    token: Spread | None = None
    why: str = ""
    shortest: int = 0
    longest: int = 0


@dataclass(frozen=True)
class LoadReport:
    """The levels, and what was asked of each."""

    asked: Asked
    levels: tuple[Level, ...]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LoadReport:
        """From what `asdict` made, also by way of JSON."""

        def level(told: Mapping[str, Any]) -> Level:
            spreads = {name: Spread(**told[name]) if told[name] else None for name in ("whole", "first", "token")}
            return Level(**{**told, **spreads})

        asked = Asked(**{**data["asked"], "clients": tuple(data["asked"]["clients"])})
        return cls(asked, tuple(level(told) for told in data["levels"]))


@dataclass(frozen=True)
class _Answer:
    """Seconds since the request was sent, of each piece, and the text of them all; or why there is none."""

    pieces: Sequence[float] = ()
    text: str = ""
    why: str = ""


def enough(clients: Sequence[int]) -> int:
    """Requests of each level that keep its clients busy: 32, or two for each client of the largest."""
    return max(REQUESTS, *(2 * number for number in clients))


def check(asked: Asked, facts: Mapping[str, Any]) -> None:
    """UsageError for what the repository would refuse, before a server is started."""
    for name, value in (("requests", asked.requests), *(("clients", clients) for clients in asked.clients)):
        if value < 1:
            raise UsageError(f"{value} {name} are none.", hint=f"Say at least one: --{name} 1")
    idle = [clients for clients in asked.clients if clients > asked.requests]
    if idle:
        raise UsageError(
            f"{asked.requests} requests can't keep {max(idle)} clients busy: there are never more at once.",
            hint=f"--requests {2 * max(idle)}, so that each client has some.",
        )
    if asked.input_tokens < 1 or asked.output_tokens < 1:
        raise UsageError("A prompt and an answer have a token at least.", hint="--input-tokens 128 --output-tokens 32")
    room = min(facts["max_input_len"], facts["max_seq_len"] - asked.output_tokens)
    if asked.input_tokens > room:
        raise UsageError(
            f"Prompts of {asked.input_tokens} tokens and answers of {asked.output_tokens} are not served.",
            why=f"The repository takes {facts['max_input_len']} tokens in, and {facts['max_seq_len']} in and out.",
            hint=f"--input-tokens {max(1, min(room, 128))} --output-tokens {min(asked.output_tokens, 32)}",
        )


def load(
    http_url: str, grpc_url: str, repository: Repository, asked: Asked, *, out: Output, timeout: float = 600.0
) -> LoadReport:
    """Measures every level on a running server. ServingError where a level got no answer at all."""
    from builder.serving.client import Client

    client = Client.of(http_url, grpc_url, repository.facts, timeout)
    count = asked.requests + max(asked.clients)  # some to warm up with
    # A server that runs on may know the prompts of the last measurement.
    tokenizer = _tokenizer(repository)

    def count_tokens(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    prompts = texts(repository, asked.input_tokens, count * len(asked.clients), begin=str(time.time_ns()))
    levels: list[Level] = []
    with out.progress("load", total=asked.requests * len(asked.clients), unit="requests") as bar:
        for number, clients in enumerate(asked.clients):
            mine = prompts[number * count : (number + 1) * count]
            bar.update(number * asked.requests, label=f"{clients} at once")

            def tell(done: int, before: int = number * asked.requests) -> None:
                bar.update(before + done)

            streams = bool(repository.facts["decoupled"])
            levels.append(_level(client, clients, mine, asked, tell, count_tokens, streams=streams))
    return LoadReport(asked, tuple(levels))


def texts(repository: Repository, tokens: int, count: int, *, begin: str) -> list[str]:
    """So many prompts of `tokens` tokens (a few less where a cut makes other tokens), each with another beginning:
    its number and `begin`."""
    tokenizer = _tokenizer(repository)
    rows = paths.data("configs", "calibration", "python-docs.jsonl").read_text(encoding="utf-8").splitlines()
    words = " ".join(json.loads(row).get("text", "") for row in rows).split()
    special = len(tokenizer.encode("").ids)
    made = []
    for number in range(count):
        start = number * 97 % len(words)
        turned = words[start:] + words[:start]
        text = f"{number} {begin} " + " ".join(turned[: 2 * tokens])
        ends = tokenizer.encode(text, add_special_tokens=False).offsets
        made.append(text[: ends[max(1, tokens - special) - 1][1]] if len(ends) + special > tokens else text)
    return made


def keep(repository: Repository, report: LoadReport, out: Output) -> Path | None:
    """Beside the repository in its store, for `builder report`; None where that can't be written or is no store."""
    root = root_of(repository.path)
    if root is None:
        return None
    ingredients = {"repository": repository.digest, "asked": asdict(report.asked), "measured": time.time_ns()}

    def make(directory: Path) -> dict[str, Any]:
        told = asdict(report)
        (directory / "load.json").write_text(json.dumps(told, indent=1), encoding="utf-8")
        return told

    try:
        store = Store(root, Output("quiet"))
        with store.in_use():
            made: Artifact = store.stage(STAGE, ingredients, make)
    except (BuilderError, OSError) as error:  # as where it is mounted read-only for those who serve
        out.warn(f"What was measured is not kept in {root}: {error}")
        return None
    return made.path


def show(report: LoadReport, out: Output) -> None:
    """A table for people."""
    asked = report.asked
    rows = [
        (
            str(level.clients),
            f"{level.answered}" + (f", {level.failed} FAILED" if level.failed else ""),
            f"{level.tokens_per_second:.1f}",
            *(spread_words(spread) for spread in (level.first, level.token, level.whole)),
        )
        for level in report.levels
    ]
    out.table(
        f"load: {asked.input_tokens} tokens in, {asked.output_tokens} out (median / 90 % / 99 %)",
        ["at once", "answered", "tokens a second", "first piece", "each token after", "whole answer"],
        rows,
    )
    for level in report.levels:
        if level.failed:
            out.warn(f"{level.failed} of {level.clients} at once failed; the first: {level.why}")
        if level.shortest < asked.output_tokens // 2:
            out.warn(
                f"{level.clients} at once: the shortest answer has {level.shortest} tokens, not {asked.output_tokens}"
            )


def spread_words(spread: Spread | None) -> str:
    """`12.1 / 15.0 / 21.3 ms`; a dash for what does not stream."""
    if spread is None:
        return "–"
    return " / ".join(f"{1000 * value:,.1f}" for value in (spread.p50, spread.p90, spread.p99)) + " ms"


def _tokenizer(repository: Repository) -> Tokenizer:
    from tokenizers import Tokenizer

    facts = repository.facts
    inside = "tokenizer_dir" in facts
    directory = repository.models / str(facts["tokenizer_dir"]) if inside else Path(facts["checkpoint"])
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.no_truncation()  # as the served model does
    tokenizer.no_padding()
    return tokenizer


def _level(
    client: Client,
    clients: int,
    prompts: Sequence[str],
    asked: Asked,
    tell: Callable[[int], None],
    count_tokens: Callable[[str], int],
    *,
    streams: bool,
) -> Level:
    def ask(prompt: str) -> _Answer:
        return _ask(client, prompt, asked.output_tokens, streams=streams)

    warm, measured = prompts[: len(prompts) - asked.requests], prompts[-asked.requests :]
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(ask, warm[:clients]))
        start = time.perf_counter()
        answers: list[_Answer] = []
        for answer in pool.map(ask, measured):
            answers.append(answer)
            tell(len(answers))
        took = time.perf_counter() - start
    good = [answer for answer in answers if not answer.why]
    why = next((answer.why for answer in answers if answer.why), "")
    if not good:
        raise ServingError(
            f"With {clients} requests at once none was answered.", why=why, hint="builder smoke REPOSITORY"
        )
    counts = [count_tokens(answer.text) for answer in good]
    after = [(a.pieces[-1] - a.pieces[0]) / (n - 1) for a, n in zip(good, counts, strict=True) if n > 1]
    return Level(
        clients=clients,
        answered=len(good),
        failed=len(answers) - len(good),
        seconds=round(took, 4),
        tokens_per_second=round(sum(counts) / took, 3),
        whole=_spread([answer.pieces[-1] for answer in good]),
        first=_spread([answer.pieces[0] for answer in good]) if streams else None,
        token=_spread(after) if streams and after else None,
        why=why,
        shortest=min(counts),
        longest=max(counts),
    )


def _ask(client: Client, prompt: str, tokens: int, *, streams: bool) -> _Answer:
    from builder.serving.client import Ask, Refused, Stalled

    ask = Ask(prompt, tokens, {"min_tokens": tokens})  # the end token is forbidden until then
    times: list[float] = []
    texts: list[str] = []

    def now() -> None:
        times.append(time.perf_counter())

    try:
        if streams:
            for piece in client.grpc_pieces(ask, sent=now):
                now()
                texts.append(piece)
        else:
            now()
            texts.append(client.http_generate(ask).text)
            now()
    except (Refused, Stalled) as error:
        return _Answer(why=str(error).splitlines()[0])
    sent, *pieces = times
    if not pieces:
        return _Answer(why="an answer without a piece")
    return _Answer([piece - sent for piece in pieces], "".join(texts))


def _spread(values: Sequence[float]) -> Spread:
    """Nearest rank: a value that was really seen."""
    ordered = sorted(values)
    ranks = (max(0, -(-len(ordered) * share // 100) - 1) for share in (50, 90, 99))
    return Spread(*(round(ordered[rank], 6) for rank in ranks))
