"""Serves a rendered repository with a stand-in engine for minutes, at a concurrency of 32, and prints its memory.

    make soak                # 10 minutes
    make soak MINUTES=1

The stand-in repeats the prompt's tokens without computing anything (tests/support/echo_backend.py), so every answer is
checked, and the text models are as busy as they can be. A quarter of the clients leave in the middle of their answer.
Exits with 1 if an answer is wrong, a client has waited a minute for one, a process has ended, or memory grows by more
than 10 % between the first and the last third of the run. On two busy cores it passed with 1.01 times the memory.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import tritonclient.grpc as grpcclient

from builder.core import supervisor
from builder.core.output import Output
from builder.recipe import schema
from builder.serving.server import Server, ServerOptions, serve
from builder.triton import repository
from tests.triton.test_models import ECHO, echo, inputs, stream
from tests.triton.test_repository import SNAPSHOT, write_engine

CONCURRENCY, TOKENS, GROWTH, STUCK_SECONDS = 32, 64, 1.1, 60.0


def leave(server: Server, **values: object) -> None:
    """Starts a stream and leaves after its first response."""
    first = threading.Event()
    with grpcclient.InferenceServerClient(server.grpc_url) as client:
        client.start_stream(lambda result, error: first.set())
        client.async_stream_infer("tensorrt_llm_bls", inputs(**values))
        arrived = first.wait(STUCK_SECONDS)
        client.stop_stream(cancel_requests=True)
    if not arrived:
        raise TimeoutError("no first response")


def run(
    server: Server, number: int, end: float, wrong: list[str], sent: dict[int, float], answered: list[float]
) -> None:
    """One client: sends requests until `end`. sent: when each client sent the request that it waits for. answered:
    when each answer was complete."""
    count = 0
    while time.monotonic() < end:
        count += 1
        sent[number] = time.monotonic()
        prompt = f"client {number}, request {count} 🎉"
        try:
            if count % 4 == 0:
                leave(server, text_input=prompt, max_tokens=TOKENS, stream=True)
            elif "".join(stream(server, text_input=prompt, max_tokens=TOKENS, stream=True)) != echo(prompt, TOKENS):
                wrong.append(prompt)
        except Exception as error:  # every failure counts, whatever it is
            wrong.append(f"{prompt}: {error!r}")
        answered.append(time.monotonic())
    del sent[number]


def stuck(sent: dict[int, float]) -> list[int]:
    """The clients that have waited for an answer for more than a minute."""
    return [number for number, at in list(sent.items()) if time.monotonic() - at > STUCK_SECONDS]


def memory(server: Server) -> float:
    """Private memory of the server's processes, in MB. Pages shared with other servers do not count."""
    total = 0
    for pid in supervisor.descendants(server.pid):
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8")
        except OSError:  # it has just ended, which `lost_a_model` reports
            continue
        total += next((int(line.split()[1]) for line in text.splitlines() if line.startswith("Private_Dirty:")), 0)
    return total / 1024


def main() -> int:
    """Runs the soak test; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    seconds = parser.parse_args().minutes * 60
    wrong: list[str] = []
    sent: dict[int, float] = {}
    answered: list[float] = []
    with tempfile.TemporaryDirectory() as directory:
        models = Path(directory, "models")
        limits = {"max_batch_size": CONCURRENCY, "max_input_len": 128, "max_seq_len": 256, "plugin_config": {}}
        repository.write(
            models, write_engine(Path(directory, "engine"), build_config=limits), SNAPSHOT, schema.Repository()
        )
        with serve(models, out=Output("human"), options=ServerOptions(engine_backend=ECHO)) as server:
            start = time.monotonic()
            clients = [
                threading.Thread(target=run, args=(server, number, start + seconds, wrong, sent, answered), daemon=True)
                for number in range(CONCURRENCY)
            ]
            for client in clients:
                client.start()
            samples = []
            while any(client.is_alive() for client in clients) and not stuck(sent):
                time.sleep(min(5.0, seconds / 12))
                samples.append(memory(server))
                print(f"{time.monotonic() - start:6.0f} s  {samples[-1]:7.1f} MB  {len(wrong)} wrong", flush=True)
            lost, waiting = server.lost_a_model(), stuck(sent)
    third = max(1, len(samples) // 3)
    growth = max(samples[-third:]) / max(samples[:third])
    print(f"memory: {growth:.2f} times that of the first third; {len(wrong)} wrong; a process ended: {lost}")
    early, late = (sum(part / 3 <= (at - start) / seconds < (part + 1) / 3 for at in answered) for part in (0, 2))
    print(f"answers: {early} in the first third of the time, {late} in the last")  # a busy machine changes them, too
    if waiting:
        print(f"clients that waited for more than {STUCK_SECONDS:g} s: {waiting}")
    for line in wrong[:10]:
        print(line)
    return 1 if wrong or lost or waiting or growth > GROWTH else 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # a client that is stuck can't keep the process alive
