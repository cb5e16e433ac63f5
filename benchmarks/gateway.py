"""Measures the gateway's CPU time for streamed answers, and checks every text.

    python benchmarks/gateway.py [--requests 200] [--concurrency 32] [--triton]

Prompts of 512 tokens, answers of 128. The engine generates without a pause: a process that speaks Triton's gRPC
protocol and repeats the prompt's tokens, one in each response. With --triton it is the real server with the tests'
stand-in in Python, which is slower. The robust figure is the gateway's CPU time for a request. Beside it
stands the CPU time of a program that only reads the same gRPC streams, in the same run: both depend on what else runs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from builder.core.output import Output
from builder.core.store import Store
from builder.gateway.engine import Engine
from builder.gateway.settings import Model
from builder.gateway.tensors import Sampling, TokenRequest
from builder.recipe import schema
from builder.serving.server import ServerOptions, serve
from builder.triton import repository

SNAPSHOT = Path("tests/data/tiny-qwen3")
ECHO = Path("tests/support/echo_backend.py")
INPUT, OUTPUT, GOAL = 512, 128, 8.0
QUIET = Output("quiet")


async def instant_engine(port: int) -> None:
    """A gRPC server that answers as the engine model does, with the prompt's tokens."""
    import struct

    import grpc.aio
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    class Instant(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
        async def ModelStreamInfer(self, requests: Any, context: Any) -> Any:
            async for request in requests:
                raw = dict(zip([one.name for one in request.inputs], request.raw_input_contents, strict=True))
                (count,) = struct.unpack("<i", raw["request_output_len"])
                for place in range(count):
                    at = 4 * place % len(raw["input_ids"])
                    yield response(raw["input_ids"][at : at + 4])
                yield response(None)

    def response(token: bytes | None) -> Any:
        made = service_pb2.ModelStreamInferResponse()
        made.infer_response.parameters["triton_final_response"].bool_param = token is None
        if token is not None:
            for name, content in (("output_ids", token), ("sequence_length", struct.pack("<i", 1))):
                made.infer_response.outputs.add(name=name, datatype="INT32", shape=[1, 1])
                made.infer_response.raw_output_contents.append(content)
        return made

    server = grpc.aio.server()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Instant(), server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


def make_repository(directory: Path) -> repository.Repository:
    """A repository with the fixture's tokenizer, for an engine that does not exist."""
    build = {"max_batch_size": 128, "max_input_len": 1024, "max_seq_len": 2048, "max_beam_width": 1,
             "plugin_config": {"use_paged_context_fmha": False}}  # fmt: skip
    engine = directory / "engine"
    engine.mkdir()
    pretrained = {"logits_dtype": "float16", "vocab_size": 4096}
    config = {"version": "1.2.1", "pretrained_config": pretrained, "build_config": build}
    (engine / "config.json").write_text(json.dumps(config))

    def make(made: Path) -> dict[str, Any]:
        return repository.write(made / "models", engine, SNAPSHOT, schema.Repository())

    return repository.open_repository(Store(directory / "store", QUIET).stage("repository", {}, make).path)


@contextmanager
def engine_server(opened: repository.Repository, *, triton: bool) -> Iterator[str]:
    """The address of the engine's gRPC port."""
    if triton:
        with serve(opened.models, out=QUIET, options=ServerOptions(engine_backend=ECHO)) as server:
            yield server.grpc_url
        return
    port = free_port()
    with subprocess.Popen([sys.executable, __file__, "--instant-engine", str(port)]) as child:
        try:
            yield f"127.0.0.1:{port}"
        finally:
            child.kill()


def free_port() -> int:
    """A port that nobody uses now."""
    from builder.gateway.listener import listen

    with listen("127.0.0.1", None) as listener:
        return int(listener.getsockname()[1])


def cpu_seconds(pid: int) -> float:
    """The CPU time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def ask(port: int, body: bytes, waiting: list[int], texts: list[str]) -> None:
    """Sends requests one after the other on one connection, and collects the texts."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    while waiting:
        waiting.pop()
        writer.write(head + body)
        received = b""
        while not received.endswith(b"\r\n0\r\n\r\n"):
            part = await reader.read(1 << 16)
            if not part:
                break
            received += part
        texts.append(text_of(received.partition(b"\r\n\r\n")[2]))
    writer.close()


def text_of(chunked: bytes) -> str:
    """The text of a stream of events in HTTP chunks; a wrong one for an error."""
    events = b""
    while chunked:
        size, _, rest = chunked.partition(b"\r\n")
        length = int(size, 16)
        events, chunked = events + rest[:length], rest[length + 2 :]
    found = [json.loads(event[6:]) for event in events.split(b"\n\n") if event.startswith(b"data: {")]
    return "".join(choice["text"] for event in found for choice in event.get("choices", []))


async def run(port: int, body: bytes, requests: int, concurrency: int) -> list[str]:
    """The texts of so many requests, with so many in flight."""
    texts: list[str] = []
    waiting = [1] * requests
    await asyncio.gather(*(ask(port, body, waiting, texts) for _ in range(concurrency)))
    return texts


async def read_only(address: str, model: Model, ids: list[int], requests: int, concurrency: int) -> float:
    """CPU seconds of reading the streams of so many requests in this process, without making text of them."""
    engine, waiting = Engine(address, model), [1] * requests
    request = TokenRequest(ids, OUTPUT, Sampling(temperature=0), model.end_ids, streaming=True)

    async def one() -> None:
        while waiting:
            await engine.generate(request, f"read-{waiting.pop()}-{len(waiting)}", lambda step: True)

    before = resource.getrusage(resource.RUSAGE_SELF)
    await asyncio.gather(*(one() for _ in range(concurrency)))
    after = resource.getrusage(resource.RUSAGE_SELF)
    await engine.close()
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(opened: repository.Repository, grpc: str, requests: int, concurrency: int) -> dict[str, float]:
    """One round."""
    import uvloop

    tokenizer = Tokenizer.from_file(str(SNAPSHOT / "tokenizer.json"))
    source = Path("tests/data/eval/prose.jsonl").read_text(encoding="utf-8")
    prompt = tokenizer.decode(
        tokenizer.encode(" ".join(json.loads(line)["text"] for line in source.splitlines())).ids[:INPUT]
    )
    ids = tokenizer.encode(prompt).ids
    expected = tokenizer.decode((ids * OUTPUT)[:OUTPUT])
    asked = {"model": "m", "prompt": prompt, "max_tokens": OUTPUT, "temperature": 0, "stream": True, "ignore_eos": True}
    argv = [sys.executable, "-m", "builder", "gateway", str(opened.path), "--grpc", grpc, "--model-name", "m", "--json"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as gateway:
        try:
            assert gateway.stdout is not None
            lines = iter(gateway.stdout.readline, "}\n")
            port = int(next(line for line in lines if '"url"' in line).split(":")[3].partition("/")[0])
            body = json.dumps(asked).encode()
            uvloop.run(run(port, body, concurrency, concurrency))  # warm
            start, before = time.perf_counter(), cpu_seconds(gateway.pid)
            texts = uvloop.run(run(port, body, requests, concurrency))
            wall, used = time.perf_counter() - start, cpu_seconds(gateway.pid) - before
        finally:
            gateway.terminate()
    model = Model.read(opened.models, opened.facts)
    reading = uvloop.run(read_only(grpc, model, ids, requests, concurrency))
    return {
        "gateway CPU-ms per request": 1000 * used / requests,
        "reading alone, CPU-ms per request": 1000 * reading / requests,
        "tokens per second": OUTPUT * requests / wall,
        "wrong texts": sum(text != expected for text in texts) + requests - len(texts),
    }  # fmt: skip


def main() -> int:
    """Prints the figures. Exit code 1 if a text is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--triton", action="store_true", help="the real server, with a stand-in in Python")
    parser.add_argument("--instant-engine", type=int, metavar="PORT", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.instant_engine:
        asyncio.run(instant_engine(arguments.instant_engine))
    with tempfile.TemporaryDirectory() as directory:
        opened = make_repository(Path(directory))
        with engine_server(opened, triton=arguments.triton) as grpc:
            found = measure(opened, grpc, arguments.requests, arguments.concurrency)
    for name, value in found.items():
        print(f"{name:<36} {value:10.1f}")
    print(f"goal: at most {GOAL} CPU-ms per request, 0 wrong texts")
    return int(found["wrong texts"] > 0)


if __name__ == "__main__":
    sys.exit(main())
