"""Measures streaming through the gateway and through Triton's own models, and checks every text.

    python benchmarks/gateway.py
    NVIDIA_TEMPLATES=.../all_models/inflight_batcher_llm python benchmarks/gateway.py

The real Triton, with an engine in C that repeats the prompt's tokens (engine_in_c.c). Prompts of 512 tokens, answers
of 128. Three parts, each with its table:

- load: an engine without a pause, 32 clients. CPU milliseconds for a request are the robust figure: of the text models
  and the gateway ("text"), and of Triton's own process. Beside them, reading the engine's streams without making text.
- paced: 20 ms a token, 32 and 128 clients. The rate as a part of what the engine alone would yield, and the time to the
  first token. The clients begin spread over the time of one answer.
- memory: of each text model and the gateway, in MB (PSS), for vocabularies of several sizes.

NVIDIA's templates, filled by its own tool, are measured beside ours if NVIDIA_TEMPLATES names them; they need pillow,
requests, torch and transformers. Rates and times need a machine that does nothing else: on two cores, the clients,
Triton and the gateway share them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvloop
from engine_in_c import (
    cpu_seconds,
    engine_server,
    make_nvidia_repository,
    make_repository,
    make_snapshot,
    memory,
    processes,
)
from streaming_clients import Ask, Load, drive, over_grpc, over_http, triton_channel
from tokenizers import Tokenizer

from builder.gateway.engine import Engine
from builder.gateway.settings import Model
from builder.gateway.tensors import Sampling, TokenRequest
from builder.serving.server import Server
from builder.triton import repository

SNAPSHOT = Path("tests/data/tiny-qwen3")
NVIDIA = os.environ.get("NVIDIA_TEMPLATES", "")
INPUT, OUTPUT, TOKEN_SECONDS = 512, 128, 0.02
VOCABULARIES = (0, 151_936, 262_144)  # 0: the fixture's own; Qwen3's and Gemma 3's sizes
GOALS = """goals: gateway at most 8 CPU-ms of text and 20,000 tokens a second, 0 wrong; paced at least 0.95 of the ideal
rate and p50 TTFT under 40 ms; each text model under 80 MB"""
PARTS = ("load", "paced", "memory")


@dataclass(frozen=True)
class Texts:
    """The prompt and the answer to it. Both have characters of several tokens."""

    prompt: str
    ids: list[int]
    expected: str


@dataclass(frozen=True)
class Way:
    """A way to an answer. `ask` makes a client, within an event loop."""

    name: str
    ask: Callable[[], Callable[[], Awaitable[Ask]]]


def make_texts() -> Texts:
    """English prose behind some emoji, accents and Chinese."""
    tokenizer = Tokenizer.from_file(str(SNAPSHOT / "tokenizer.json"))
    prose = Path("tests/data/eval/prose.jsonl").read_text(encoding="utf-8")
    text = "Grüße 🎉👩‍👩‍👧 und 你好,世界! " + " ".join(json.loads(line)["text"] for line in prose.splitlines())
    ids = tokenizer.encode(tokenizer.decode(tokenizer.encode(text).ids[:INPUT])).ids
    return Texts(tokenizer.decode(ids), ids, tokenizer.decode((ids * OUTPUT)[:OUTPUT]))


@contextmanager
def gateway(opened: repository.Repository, grpc: str) -> Iterator[tuple[int, int]]:
    """A running gateway: its process id and its port."""
    argv = [sys.executable, "-m", "builder", "gateway", str(opened.path), "--grpc", grpc, "--model-name", "m", "--json"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        try:
            assert child.stdout is not None
            lines = iter(child.stdout.readline, "}\n")
            yield child.pid, int(next(line for line in lines if '"url"' in line).split(":")[3].partition("/")[0])
        finally:
            child.terminate()


def of_gateway(port: int, texts: Texts) -> Way:
    """Streaming through the gateway."""
    request = {"model": "m", "prompt": texts.prompt, "max_tokens": OUTPUT, "temperature": 0, "stream": True,
               "ignore_eos": True}  # fmt: skip
    return Way("gateway, stream", lambda: over_http(port, request))


def of_model(server: Server, model: str, texts: Texts, *, stream: bool, whose: str = "") -> Way:
    """A Triton model that takes text."""
    return Way(
        f"{whose}{model}, {'stream' if stream else 'whole'}",
        lambda: over_grpc(triton_channel(server.grpc_url), model, texts.prompt, OUTPUT, stream=stream),
    )


def send(path: Way, load: Load, spread: float = 0.0) -> float:
    """Sends a load; returns the seconds that it took."""

    async def run() -> None:
        await drive(path.ask(), load, spread)

    started = time.perf_counter()
    uvloop.run(run())
    return time.perf_counter() - started


def wrong(load: Load, texts: Texts) -> int:
    """How many answers are wrong or missing."""
    return load.requests - sum(text == texts.expected for text in load.texts)


class Used:
    """CPU milliseconds for a request since this was made. `extra`: the gateway's process, if there is one."""

    def __init__(self, server: Server, extra: list[int]) -> None:
        self._names = processes(server) | dict.fromkeys(extra, "gateway")
        self._before = {pid: cpu_seconds(pid) for pid in self._names}

    def columns(self, requests: int) -> str:
        """Of the text models and the gateway, and of Triton's own process."""
        used = {pid: 1000 * (cpu_seconds(pid) - before) / requests for pid, before in self._before.items()}
        triton = sum(ms for pid, ms in used.items() if self._names[pid] == "Triton")
        return f"{sum(used.values()) - triton:7.1f} {triton:7.1f}"


def measure_load(path: Way, server: Server, extra: list[int], texts: Texts, requests: int) -> int:
    """Prints a line of the first table; returns the number of wrong answers."""
    send(path, Load(32, 64))  # warm
    used, load = Used(server, extra), Load(32, requests)
    seconds = send(path, load)
    found = wrong(load, texts)
    print(f"{path.name:<42} {used.columns(requests)} {OUTPUT * requests / seconds:10,.0f} {found:6}", flush=True)
    return found


def reading_alone(opened: repository.Repository, server: Server, texts: Texts, requests: int) -> None:
    """Prints what reading the engine's streams costs in this process, without making text of them."""
    model = Model.read(opened.models, opened.facts)
    request = TokenRequest(texts.ids, OUTPUT, Sampling(temperature=0), model.end_ids, streaming=True)

    async def make() -> Ask:
        async def ask(load: Load) -> None:
            await engine.generate(request, f"read-{time.monotonic_ns()}", lambda step: True)

        return ask

    def connect() -> Callable[[], Awaitable[Ask]]:
        nonlocal engine
        engine = Engine(server.grpc_url, model)
        return make

    engine: Engine
    names = processes(server)
    before, started = sum(cpu_seconds(pid) for pid in names), time.process_time()
    seconds = send(Way("", connect), Load(32, requests))
    own, theirs = time.process_time() - started, sum(cpu_seconds(pid) for pid in names) - before
    figures = f"{1000 * own / requests:7.1f} {1000 * theirs / requests:7.1f} {OUTPUT * requests / seconds:10,.0f}"
    print(f"{'reading the engine alone':<42} {figures}", flush=True)


def measure_paced(path: Way, server: Server, extra: list[int], texts: Texts, clients: int) -> int:
    """Prints a line of the second table; returns the number of wrong answers."""
    ideal = OUTPUT * TOKEN_SECONDS
    used, load = Used(server, extra), Load(clients, 4 * clients)
    send(path, load, spread=ideal)
    found = wrong(load, texts)
    quantiles = statistics.quantiles(load.ttft, n=20)
    print(
        f"{path.name:<42} {clients:7} {used.columns(load.requests)} {ideal / statistics.mean(load.seconds):7.3f} "
        f"{1000 * quantiles[9]:10.0f} {1000 * quantiles[18]:10.0f} {found:6}",
        flush=True,
    )
    return found


def load_part(opened: repository.Repository, directory: Path, texts: Texts, requests: int) -> int:
    """The first table."""
    print(f"\n{'load, 32 clients':<42} {'text ms':>7} {'Triton':>7} {'tokens/s':>10} {'wrong':>6}")
    found = 0
    with engine_server(opened.models, 0, directory / "log") as server:
        with gateway(opened, server.grpc_url) as (pid, port):
            found += measure_load(of_gateway(port, texts), server, [pid], texts, requests)
        reading_alone(opened, server, texts, requests)
        for model, stream in (("tensorrt_llm_bls", True), ("tensorrt_llm_bls", False), ("ensemble", False)):
            path = of_model(server, model, texts, stream=stream)
            found += measure_load(path, server, [], texts, requests // 2)
    if NVIDIA:
        models = directory / "nvidia"
        make_nvidia_repository(models, Path(NVIDIA), SNAPSHOT)
        with engine_server(models, 0, directory / "log") as server:
            for model, stream in (("ensemble", False), ("ensemble", True), ("tensorrt_llm_bls", True)):
                path = of_model(server, model, texts, stream=stream, whose="NVIDIA's ")
                try:
                    measure_load(path, server, [], texts, requests // 4)
                except FileNotFoundError:  # in /proc
                    print(f"{path.name:<42} a process of the server ended")
    return found


def paced_part(opened: repository.Repository, directory: Path, texts: Texts) -> int:
    """The second table."""
    columns = f"{'clients':>7} {'text ms':>7} {'Triton':>7} {'rate':>7} {'TTFT p50':>10} {'TTFT p95':>10} {'wrong':>6}"
    print(f"\n{'20 ms a token':<42} {columns}")
    found = 0
    with engine_server(opened.models, TOKEN_SECONDS, directory / "log") as server:
        with gateway(opened, server.grpc_url) as (pid, port):
            for clients in (32, 128):
                found += measure_paced(of_gateway(port, texts), server, [pid], texts, clients)
        bls = of_model(server, "tensorrt_llm_bls", texts, stream=True)
        for clients in (32, 128):
            found += measure_paced(bls, server, [], texts, clients)
    if NVIDIA:
        models = directory / "nvidia-paced"
        make_nvidia_repository(models, Path(NVIDIA), SNAPSHOT)
        with engine_server(models, TOKEN_SECONDS, directory / "log") as server:
            path = of_model(server, "ensemble", texts, stream=True, whose="NVIDIA's ")
            for clients in (32, 128):
                measure_paced(path, server, [], texts, clients)
    return found


def memory_part(directory: Path, texts: Texts) -> int:
    """The third table, after 32 clients have had answers in every way."""
    names = ("preprocessing", "postprocessing", "tensorrt_llm_bls", "ensemble_infer", "gateway")
    print(f"\n{'memory, MB':<42} " + " ".join(f"{name:>16}" for name in names))
    for number, size in enumerate(VOCABULARIES):
        place = directory / f"memory-{number}"
        place.mkdir()
        snapshot = make_snapshot(place / "snapshot", SNAPSHOT, size) if size else SNAPSHOT
        opened = make_repository(place, snapshot)
        with (
            engine_server(opened.models, 0, place / "log") as server,
            gateway(opened, server.grpc_url) as (pid, port),
        ):
            ways = (("tensorrt_llm_bls", True), ("ensemble_infer", False), ("ensemble", False))
            paths = [of_model(server, model, texts, stream=stream) for model, stream in ways]
            for path in (of_gateway(port, texts), *paths):
                send(path, Load(32, 64))
            found = {name: memory(pid) for pid, name in processes(server).items()} | {"gateway": memory(pid)}
        label = f"{size or 'fixture'} tokens"
        print(f"{label:<42} " + " ".join(f"{found.get(name, 0.0):16.0f}" for name in names), flush=True)
    return 0


def main() -> int:
    """Prints the tables. Exit code 1 if a text of ours is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    arguments = parser.parse_args()
    texts, found = make_texts(), 0
    print(f"load average: {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        opened = make_repository(directory, SNAPSHOT)
        if "load" in arguments.parts:
            found += load_part(opened, directory, texts, arguments.requests)
        if "paced" in arguments.parts:
            found += paced_part(opened, directory, texts)
        if "memory" in arguments.parts:
            found += memory_part(directory, texts)
    print(f"\n{GOALS}")
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
