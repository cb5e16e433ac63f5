"""Measures how long answers go on after 200 clients have left their streams at once.

    python benchmarks/leaving.py
    python benchmarks/leaving.py --rounds 30

The real Triton and gateway, with an engine in C (engine_in_c.c) that generates a token of each answer every 50 ms. A
round's figure is the time from the first closed connection to the last answer that the engine has stopped, which does
so at its next token. Beside it, the CPU time of the gateway and of Triton.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path

from engine_in_c import cpu_seconds, engine_server, make_repository, processes
from gateway import SNAPSHOT, gateway

CLIENTS, TOKEN_SECONDS, GOAL = 200, 0.05, 0.5
BODY = json.dumps({"model": "m", "prompt": "one two three", "max_tokens": 600, "stream": True}).encode()
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


def leave(port: int, log: Path) -> float:
    """Seconds until the last answer has ended."""
    before = stopped(log)
    clients = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(CLIENTS)]
    for client in clients:
        client.sendall(HEAD % len(BODY) + BODY)
    for client in clients:
        if not client.recv(99).startswith(b"HTTP/1.1 200"):
            raise SystemExit("The gateway does not answer with 200.")
    time.sleep(1)  # all of them are read steadily then
    start = time.monotonic()
    for client in clients:
        client.close()
    while stopped(log) < before + CLIENTS:
        if time.monotonic() > start + 30:
            raise SystemExit(f"After 30 s, {before + CLIENTS - stopped(log)} answers go on.")
        time.sleep(0.005)
    return time.monotonic() - start


def stopped(log: Path) -> int:
    """How many answers the engine has stopped so far."""
    return log.read_bytes().count(b"stopped after")


def main() -> int:
    """Prints the figures; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as directory:
        opened, log = make_repository(Path(directory), SNAPSHOT), Path(directory, "log")
        with (
            engine_server(opened.models, TOKEN_SECONDS, log) as server,
            gateway(opened, server.grpc_url) as (pid, port),
        ):
            took, own, tritons = [], [], []
            triton = next(found for found, name in processes(server).items() if name == "Triton")
            for _ in range(rounds):
                before = cpu_seconds(pid), cpu_seconds(triton)
                took.append(leave(port, log))
                own.append(cpu_seconds(pid) - before[0])
                tritons.append(cpu_seconds(triton) - before[1])
                time.sleep(1)  # what was stopped is read to its end
    print(f"{CLIENTS} clients leave, {rounds} times; seconds until the last answer has ended:")
    print(f"median {statistics.median(took):.2f}, longest {max(took):.2f}, goal {GOAL}")
    print(f"CPU seconds of a round, its {CLIENTS} requests included: gateway {statistics.median(own):.2f}, "
          f"Triton {statistics.median(tritons):.2f}")  # fmt: skip
    return 0 if statistics.median(took) <= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
