"""Stops a Triton server without losing a request in progress, and without waiting for clients that only stay connected.

Triton alone does neither (24.10; no fix is known). After SIGTERM it first waits until all HTTP connections are closed,
idle ones too, at most its exit timeout. When they are, it closes its gRPC port at once, over which tensorrt_llm_bls and
ensemble_infer still want to send the requests that wait in them. So an HTTP connection of ours holds Triton in the
first of these steps until its models have answered everything; then it is closed, with all others that are idle.
"""

from __future__ import annotations

import socket
import subprocess
import time
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from builder.core import process, supervisor
from builder.serving import connections

LOOK_SECONDS = 0.1
LEAST_SECONDS = 10.0  # for requests to Triton itself, however long the gateway has taken
# For a server that has lost a model: requests in flight to other models may finish. Triton unloads the processes of a
# model one after the other, which takes a second or more for each, so waiting for a clean exit would delay the error.
BROKEN_SECONDS = 3.0
LOOKS = 3  # in a row at which nothing is in progress: a request on its way from Triton to a model is in no count


@dataclass
class Draining:
    """A server that is to stop. `requests`: of its private directory."""

    child: process.Child
    http: tuple[str, int]
    grpc_port: int
    requests: Path
    _begun: float | None = None
    _given_up: bool = False

    def begin(self) -> None:
        """From now on the time runs: the gateway is drained first."""
        self._begun = time.monotonic()

    def give_up(self) -> None:
        """The server does not answer, so nothing is lost if it is killed."""
        self._given_up = True

    def stop(self, seconds: float) -> None:
        """Sends SIGTERM and waits until the server has exited, at most so many seconds. Then it may still run."""
        if self._given_up:
            self.child.terminate()
            self._exited(BROKEN_SECONDS)
            return
        now = time.monotonic()
        end = now + seconds if self._begun is None else max(self._begun + seconds, now + LEAST_SECONDS)
        with closing(self._connected()) as ours:
            self.child.terminate()
            while not self._exited(LOOK_SECONDS) and self._is_busy(ours, end):
                pass
        while not self._exited(LOOK_SECONDS) and time.monotonic() < end:
            if not self._close_idle():
                return  # the caller kills it

    def _connected(self) -> socket.socket:
        """Our connection, on which Triton has answered one request; unconnected if it does not answer."""
        try:
            connection = socket.create_connection(self.http, timeout=1.0)
        except OSError:
            return socket.socket()
        with suppress(OSError):
            connection.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: builder\r\n\r\n")
            connection.recv(4096)
        return connection

    def _exited(self, seconds: float) -> bool:
        with suppress(subprocess.TimeoutExpired):
            self.child.wait(seconds)
        return self.child.poll() is not None

    def _is_busy(self, ours: socket.socket, end: float) -> bool:
        """Whether a request is in progress at one of LOOKS looks."""
        for _ in range(LOOKS):
            if time.monotonic() > end or self._exited(LOOK_SECONDS):
                return False
            own = ours.getsockname()[1] if ours.fileno() >= 0 else 0
            others = [one for one in _established(self.http[1]) if one.client_port != own]
            if in_progress(self.requests) or not all(one.is_idle for one in others):
                return True
        return False

    def _close_idle(self) -> bool:
        """Closes the HTTP connections that are idle. False if that is not allowed and Triton waits for nothing else."""
        http = _established(self.http[1])
        idle = [one for one in http if one.is_idle]
        if not idle or all([connections.close(idle, pid) for pid in self.servers()]):
            return True
        ours = supervisor.descendants(self.child.pid)
        own = connections.ports_to(self.grpc_port, ours)  # those of tensorrt_llm_bls and ensemble_infer
        others = [one for one in _established(self.grpc_port) if one.client_port not in own]
        return len(idle) < len(http) or bool(others) or bool(in_progress(self.requests))

    def servers(self) -> list[int]:
        """The process ids of Triton."""
        ours = set(supervisor.descendants(self.child.pid))
        return [pid for pid, name, _, _ in supervisor.processes() if name == "tritonserver" and pid in ours]


def in_progress(directory: Path) -> int:
    """How many requests the processes of a server's models have, each in a file named by its process id."""
    found = 0
    for file in directory.iterdir():
        if Path("/proc", file.name).exists():
            found += int(file.read_bytes() or 0)
    return found


def _established(port: int) -> list[connections.Connection]:
    """The connections to a port; none if the kernel does not say: then Triton's own limits apply."""
    try:
        return connections.established(port)
    except OSError:
        return []
