"""Benchmarks a served repository: time to first token, inter-token latency and throughput at several concurrencies.

At a concurrency of N there are always N requests in flight: a new one is sent as soon as one completes. No two prompts
share a prefix, so that the KV cache cannot be reused, and every answer has its full length. The client, and with it
tritonclient, is imported only when the benchmark starts.
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

STAGE = "benchmark"
OLD_STAGE = "load"  # its name before; stores still hold such artifacts, and reports still read them
# Old JSON key -> the key that replaced it. `from_dict` reads both, and `--json` prints both for one more version.
RENAMED = {
    "asked": "workload",
    "clients": "concurrency",
    "answered": "completed",
    "whole": "latency",
    "first": "ttft",
    "token": "inter_token_latency",
    "why": "error",
}
REQUESTS = 32  # the default for each concurrency level


@dataclass(frozen=True)
class Workload:
    """What is measured: each concurrency level sends `requests` requests of this many input and output tokens."""

    concurrency: tuple[int, ...] = (1, 4, 16)
    requests: int = REQUESTS
    input_tokens: int = 128
    output_tokens: int = 32


@dataclass(frozen=True)
class Percentiles:
    """Seconds. Nearest rank, so each is a measured value; with few requests p99 is the slowest one."""

    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class Level:
    """Results at one concurrency.

    `tokens_per_second` is the output throughput of all requests together. Output tokens are counted by encoding each
    answer with the served tokenizer. The count can be slightly lower than what was generated, where the tokenizer has
    one token for text that the model generated as two. `shortest` and `longest` are answer lengths in tokens.
    `ttft` (time to first token) and `inter_token_latency` are None unless the repository streams. `latency` is the time
    to the end of the answer. `error` is the first error, if a request failed.
    """

    concurrency: int
    completed: int
    failed: int
    seconds: float
    tokens_per_second: float
    latency: Percentiles
    ttft: Percentiles | None = None
    inter_token_latency: Percentiles | None = None
    error: str = ""
    shortest: int = 0
    longest: int = 0


@dataclass(frozen=True)
class BenchmarkReport:
    """The workload and the results of each of its concurrency levels."""

    workload: Workload
    levels: tuple[Level, ...]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> BenchmarkReport:
        """The inverse of `asdict`, also after a round trip through JSON. Accepts the old key names."""

        def level(stored: Mapping[str, Any]) -> Level:
            fields = _renamed(stored)
            names = ("latency", "ttft", "inter_token_latency")
            return Level(
                **{**fields, **{name: Percentiles(**fields[name]) if fields[name] else None for name in names}}
            )

        report = _renamed(data)
        workload = _renamed(report["workload"])
        return cls(
            Workload(**{**workload, "concurrency": tuple(workload["concurrency"])}),
            tuple(level(stored) for stored in report["levels"]),
        )

    def as_dict(self) -> dict[str, Any]:
        """The report for `--json`: each renamed key appears under its old name too."""
        made = _with_old_names({**asdict(self), "workload": _with_old_names(asdict(self.workload))})
        return {**made, "levels": [_with_old_names(asdict(level)) for level in self.levels]}


@dataclass(frozen=True)
class _Response:
    """The arrival time of each chunk in seconds since the request was sent, and the text; or the error."""

    chunks: Sequence[float] = ()
    text: str = ""
    error: str = ""


def default_requests(concurrency: Sequence[int]) -> int:
    """Requests per level that keep every level busy: 32, or two per request in flight at the highest concurrency."""
    return max(REQUESTS, *(2 * number for number in concurrency))


def check(workload: Workload, facts: Mapping[str, Any]) -> None:
    """UsageError if the repository (`facts` are its limits) would refuse the workload. Call it before serving."""
    for name, value in (("requests", workload.requests), *(("concurrency", level) for level in workload.concurrency)):
        if value < 1:
            raise UsageError(f"--{name} must be at least 1 (got {value}).", hint=f"--{name} 1")
    highest = max(workload.concurrency)
    if highest > workload.requests:
        raise UsageError(
            f"{workload.requests} requests are too few for a concurrency of {highest}.",
            why="There would never be that many requests in flight.",
            hint=f"--requests {2 * highest}",
        )
    if workload.input_tokens < 1 or workload.output_tokens < 1:
        raise UsageError(
            "--input-tokens and --output-tokens must be at least 1 "
            f"(got {workload.input_tokens} and {workload.output_tokens}).",
            hint="--input-tokens 128 --output-tokens 32",
        )
    longest = min(facts["max_input_len"], facts["max_seq_len"] - workload.output_tokens)
    if workload.input_tokens > longest:
        raise UsageError(
            f"Prompts of {workload.input_tokens} tokens with answers of {workload.output_tokens} exceed the "
            "repository's limits.",
            why=f"It accepts up to {facts['max_input_len']} input tokens (max_input_len) and "
            f"{facts['max_seq_len']} tokens in total (max_seq_len).",
            hint=f"--input-tokens {max(1, min(longest, 128))} --output-tokens {min(workload.output_tokens, 32)}",
        )


def run(
    http_url: str, grpc_url: str, repository: Repository, workload: Workload, *, out: Output, timeout: float = 600.0
) -> BenchmarkReport:
    """Benchmarks a running server at every concurrency. URLs have no scheme; `timeout` is seconds per response.

    ServingError if at one concurrency every request failed.
    """
    from builder.serving.client import Client

    client = Client.for_repository(http_url, grpc_url, repository.facts, timeout)
    count = workload.requests + max(workload.concurrency)  # the surplus warms up the server
    tokenizer = _tokenizer(repository)

    def count_tokens(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    # The time makes prompts unique across runs: the server's KV cache may still hold those of the previous run.
    texts = prompts(repository, workload.input_tokens, count * len(workload.concurrency), prefix=str(time.time_ns()))
    levels: list[Level] = []
    with out.progress("benchmark", total=workload.requests * len(workload.concurrency), unit="requests") as bar:
        for number, concurrency in enumerate(workload.concurrency):
            before = number * workload.requests
            bar.update(before, label=f"concurrency {concurrency}")

            def progress(done: int, before: int = before) -> None:
                bar.update(before + done)

            measure = _Measurement(
                client, workload, count_tokens, progress, streams=bool(repository.facts["decoupled"])
            )
            levels.append(measure.level(concurrency, texts[number * count : (number + 1) * count]))
    return BenchmarkReport(workload, tuple(levels))


def prompts(repository: Repository, tokens: int, count: int, *, prefix: str) -> list[str]:
    """`count` prompts of `tokens` tokens, or slightly fewer where a cut changes the tokenization.

    Each begins with its number and `prefix`, so that no two of them, nor those of another `prefix`, share a prefix.
    """
    tokenizer = _tokenizer(repository)
    rows = paths.data("configs", "calibration", "python-docs.jsonl").read_text(encoding="utf-8").splitlines()
    words = " ".join(json.loads(row).get("text", "") for row in rows).split()
    special = len(tokenizer.encode("").ids)
    made = []
    for number in range(count):
        start = number * 97 % len(words)
        rotated = words[start:] + words[:start]
        text = f"{number} {prefix} " + " ".join(rotated[: 2 * tokens])
        ends = tokenizer.encode(text, add_special_tokens=False).offsets
        made.append(text[: ends[max(1, tokens - special) - 1][1]] if len(ends) + special > tokens else text)
    return made


def save(repository: Repository, report: BenchmarkReport, out: Output) -> Path | None:
    """Keeps the report beside the repository (`keep`)."""
    return keep(repository, STAGE, asdict(report), out)


def keep(repository: Repository, stage: str, facts: Mapping[str, Any], out: Output) -> Path | None:
    """Stores a measurement next to the repository, for `builder report`, and returns its directory.

    None if the repository is in no store, or (with a warning) if the store is not writable.
    """
    root = root_of(repository.path)
    if root is None:
        return None
    ingredients = {
        "repository": repository.digest,
        "workload": facts["workload"],
        "measured": time.time_ns(),  # makes the key of every run unique
    }

    def make(directory: Path) -> dict[str, Any]:
        (directory / f"{stage}.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
        return dict(facts)

    try:
        store = Store(root, Output("quiet"))
        with store.in_use():
            made: Artifact = store.stage(stage, ingredients, make)
    except (BuilderError, OSError) as error:  # for example a store that is mounted read-only where it is served
        out.warn(f"The results of this measurement were not saved in {root}: {error}")
        return None
    return made.path


def show(report: BenchmarkReport, out: Output) -> None:
    """Prints the results as a table, and warns about failed requests and answers that were too short."""
    workload = report.workload
    rows = [
        (
            str(level.concurrency),
            f"{level.completed}" + (f", {level.failed} FAILED" if level.failed else ""),
            f"{level.tokens_per_second:.1f}",
            *(format_percentiles(times) for times in (level.ttft, level.inter_token_latency, level.latency)),
        )
        for level in report.levels
    ]
    out.table(
        f"benchmark: {workload.input_tokens} input tokens, {workload.output_tokens} output tokens (p50 / p90 / p99)",
        ["concurrency", "completed", "tokens/s", "TTFT", "inter-token latency", "request latency"],
        rows,
    )
    for level in report.levels:
        if level.failed:
            out.warn(
                f"{level.failed} requests failed at concurrency {level.concurrency}. The first error: {level.error}"
            )
        if level.shortest < workload.output_tokens // 2:
            out.warn(
                f"The shortest answer at concurrency {level.concurrency} has {level.shortest} tokens instead of "
                f"{workload.output_tokens}."
            )


def format_percentiles(times: Percentiles | None) -> str:
    """`12.1 / 15.0 / 121 ms`, from 100 ms on without decimals; a dash for None."""
    if times is None:
        return "–"
    found = [1000 * value for value in (times.p50, times.p90, times.p99)]
    return " / ".join(f"{value:,.1f}" if value < 99.95 else f"{value:,.0f}" for value in found) + " ms"


def _tokenizer(repository: Repository) -> Tokenizer:
    from tokenizers import Tokenizer

    facts = repository.facts
    bundled = "tokenizer_dir" in facts
    directory = repository.models / str(facts["tokenizer_dir"]) if bundled else repository.path_of("checkpoint")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.no_truncation()  # as in preprocessing's model.py
    tokenizer.no_padding()
    return tokenizer


@dataclass(frozen=True)
class _Measurement:
    """Measures one concurrency level at a time. `progress` gets the number of requests that are done."""

    client: Client
    workload: Workload
    count_tokens: Callable[[str], int]
    progress: Callable[[int], None]
    streams: bool

    def level(self, concurrency: int, prompts: Sequence[str]) -> Level:
        """Warms up with the first prompts and measures the last `requests` of them."""
        requests = self.workload.requests
        answers: list[_Response] = []
        with ThreadPoolExecutor(concurrency) as pool:
            list(pool.map(self._send, prompts[: len(prompts) - requests][:concurrency]))
            start = time.perf_counter()
            for answer in pool.map(self._send, prompts[-requests:]):
                answers.append(answer)
                self.progress(len(answers))
            elapsed = time.perf_counter() - start
        return self._level(concurrency, answers, elapsed)

    def _level(self, concurrency: int, answers: Sequence[_Response], elapsed: float) -> Level:
        good = [answer for answer in answers if not answer.error]
        error = next((answer.error for answer in answers if answer.error), "")
        if not good:
            raise ServingError(
                f"Every request failed at concurrency {concurrency}.", why=error, hint="builder smoke REPOSITORY"
            )
        counts = [self.count_tokens(answer.text) for answer in good]
        # The time after the first chunk is divided by the other tokens, because a chunk may contain several.
        gaps = [(a.chunks[-1] - a.chunks[0]) / (n - 1) for a, n in zip(good, counts, strict=True) if n > 1]
        return Level(
            concurrency=concurrency,
            completed=len(good),
            failed=len(answers) - len(good),
            seconds=round(elapsed, 4),
            tokens_per_second=round(sum(counts) / elapsed, 3),
            latency=_percentiles([answer.chunks[-1] for answer in good]),
            ttft=_percentiles([answer.chunks[0] for answer in good]) if self.streams else None,
            inter_token_latency=_percentiles(gaps) if self.streams and gaps else None,
            error=error,
            shortest=min(counts),
            longest=max(counts),
        )

    def _send(self, prompt: str) -> _Response:
        from builder.serving.client import Request, ResponseTimeout, ServerError

        tokens = self.workload.output_tokens
        request = Request(prompt, tokens, {"min_tokens": tokens})  # forbids the end token before that
        times: list[float] = []
        texts: list[str] = []

        def stamp() -> None:
            times.append(time.perf_counter())

        try:
            if self.streams:
                for chunk in self.client.grpc_chunks(request, sent=stamp):
                    stamp()
                    texts.append(chunk)
            else:
                stamp()
                texts.append(self.client.http_generate(request).text)
                stamp()
        except (ServerError, ResponseTimeout) as error:
            return _Response(error=str(error).splitlines()[0])
        sent, *arrived = times
        if not arrived:
            return _Response(error="the stream ended without a response")
        return _Response([arrival - sent for arrival in arrived], "".join(texts))


def _percentiles(values: Sequence[float]) -> Percentiles:
    """Nearest rank: each result is one of the values."""
    ordered = sorted(values)
    ranks = (max(0, -(-len(ordered) * percent // 100) - 1) for percent in (50, 90, 99))
    return Percentiles(*(round(ordered[rank], 6) for rank in ranks))


def _renamed(data: Mapping[str, Any]) -> dict[str, Any]:
    return {RENAMED.get(key, key): value for key, value in data.items()}


def _with_old_names(data: Mapping[str, Any]) -> dict[str, Any]:
    return {**data, **{old: data[new] for old, new in RENAMED.items() if new in data}}
