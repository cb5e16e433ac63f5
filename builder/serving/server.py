"""Starts a Triton server, waits until it is ready, and stops it: NVIDIA's, or the one in the nvidia-pytriton wheel.

The server runs below a supervisor (core/supervisor.py), in a private directory (private_directory.py), with an
environment without secrets (core/environment.py). Its APIs that load models or change its logging are closed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from builder.core import exit_status, process
from builder.core.output import Output, seconds
from builder.core.safe_text import printable_bytes
from builder.llmapi import launch as llmapi_launch
from builder.machine import gpus
from builder.serving import launch, limits, shared_memory
from builder.serving.draining import Draining
from builder.serving.installation import find_server
from builder.serving.launch import Ports
from builder.serving.model_processes import ModelProcesses
from builder.serving.private_directory import prepare_backends, serving_directory
from builder.serving.readiness import answers_ok, ready_paths, start_failure
from builder.trtllm import compatibility

# A model whose process has been dead for so long while loading does not come up. When a model's own code ends its
# process, Triton notices within three seconds and exits by itself, with a better message in its log.
DEAD_SECONDS = 5.0
STOP_SECONDS = 2.0  # for a server that is not ready yet to exit after SIGTERM


@dataclass(frozen=True)
class Server:
    """A server that is ready. The URLs have no scheme, as tritonclient expects."""

    http_url: str
    grpc_url: str
    metrics_url: str
    log: Path
    child: process.Child
    processes: ModelProcesses
    draining: Draining

    @property
    def pid(self) -> int:
        """The process id of the server's supervisor, which forwards SIGTERM."""
        return self.child.pid

    def wait(self, timeout: float | None = None) -> int | None:
        """Waits until the server exits; returns its exit code, or None if it still runs after `timeout` seconds."""
        try:
            return self.child.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def lost_a_model(self) -> bool:
        """Whether the process of a model has ended and was not replaced."""
        return bool(self.processes.ended())


@dataclass(frozen=True)
class ServerOptions:
    """How to run a server.

    follow_log: copy the log to stderr.
    engine_backend: the model.py or library (*.so) that replaces the C++ backend. By default the reference executor
        does if the engine directory has no *.engine file.
    timeout: seconds until the server must be ready.
    exit_timeout: seconds for requests in flight when the server is stopped.
    environment: variables to add to the server's environment.
    """

    follow_log: bool = False
    engine_backend: Path | None = None
    timeout: float = 1800.0
    exit_timeout: int = 30
    environment: Mapping[str, str] = field(default_factory=dict)


@contextmanager
def serve(
    models: Path,
    *,
    out: Output,
    log: Path | None = None,
    ports: Ports | None = None,
    options: ServerOptions | None = None,
) -> Iterator[Server]:
    """Serves a model repository until the block ends. The log is a temporary file by default.

    IntegrityError if engine, repository and machine do not match. ServingError if a limit of the machine is too low, a
    port is in use, or the server is not ready in time.
    """
    options = options or ServerOptions()
    if options.engine_backend is None:
        compatibility.check(models)
    limits.check(models)
    start = time.monotonic()
    with _started(models, log, ports or Ports(), options) as (server, stopping):
        if options.follow_log:
            follow(server.log)
        _wait_until_ready(server, models, start + options.timeout)
        stopping.seconds = options.exit_timeout + 10.0
        stopping.draining = server.draining
        server.lost_a_model()  # from now on it is known which process is which model's
        out.info(f"Triton is ready after {seconds(time.monotonic() - start)}: {server.http_url}, log {server.log}")
        try:
            yield server
        finally:
            if server.child.poll() is None and server.lost_a_model():
                server.draining.give_up()


@dataclass
class _Stopping:
    """How long a server may take to exit after SIGTERM. Whatever is left then is killed.

    draining: how a server is stopped that has requests in progress.
    """

    seconds: float = STOP_SECONDS
    draining: Draining | None = None

    def stop(self, child: process.Child) -> None:
        """Sends SIGTERM and waits."""
        if child.poll() is None and self.draining:
            self.draining.stop(self.seconds)
        elif child.poll() is None:
            child.terminate()
            with suppress(subprocess.TimeoutExpired):
                child.wait(self.seconds)


@contextmanager
def _started(
    models: Path, log: Path | None, ports: Ports, options: ServerOptions
) -> Iterator[tuple[Server, _Stopping]]:
    """A server that has been started and is not ready yet."""
    installation = find_server()
    addresses = ports.choose()
    code = launch.stand_in(installation, models, options.engine_backend)
    variables = llmapi_launch.environment(
        models, {**installation.environment, **gpus.cuda_order(), **options.environment}
    )
    ranks = 1 if options.engine_backend else launch.world_size(models)
    stopping = _Stopping()
    with shared_memory.prefix() as shm, serving_directory(executable=code is not None) as place:
        place.link(models)
        backends = prepare_backends(installation, code, place.backends)
        command = launch.Command(installation.binary, place, backends, addresses, shm, options.exit_timeout)
        log = log or place.log
        with (
            open(log, "wb") as sink,
            process.supervised(
                command.line(models, ranks),
                stop=stopping.stop,
                log=sink,
                env={**variables, **place.environment, launch.OWN_GRPC: addresses.own_grpc_url},
                scratch=process.Scratch(shm, place.path),
            ) as child,
        ):
            urls = (addresses.http_url, addresses.grpc_url, addresses.metrics_url)
            draining = Draining(child, addresses.own_http, addresses.grpc, place.requests)
            yield Server(*urls, log, child, ModelProcesses(child.pid, place.models), draining), stopping


def _wait_until_ready(server: Server, models: Path, deadline: float) -> None:
    """Waits until the server and each model are ready and the metrics port, which Triton opens last, answers."""
    pending = [*((server.http_url, path) for path in ready_paths(models)), (server.metrics_url, "/metrics")]
    next_look, dead_since = time.monotonic() + 1.0, None
    while pending:
        now = time.monotonic()
        if server.child.poll() is not None:
            ended = exit_status.describe(server.child.returncode)
            raise start_failure(f"Triton {ended} before it was ready.", server.log)
        if now > deadline:
            raise start_failure("Triton is not ready in time.", server.log)
        if now > next_look:
            next_look = now + 1.0
            dead_since = (dead_since or now) if server.lost_a_model() else None
            if dead_since and now - dead_since > DEAD_SECONDS:
                raise start_failure(
                    "The process of a model ended while it was loading, and Triton still waits for it.", server.log
                )
        if answers_ok(*pending[0]):
            pending.pop(0)
        else:
            time.sleep(0.05)


def follow(log: Path) -> None:
    """Copies a server's log to stderr as it grows, for `docker logs`. A thread that ends with this process."""

    def copy() -> None:
        with open(log, "rb") as file:
            rest = b""
            while True:
                lines, newline, rest = (rest + file.read()).rpartition(b"\n")
                process.write_all(2, printable_bytes(lines + newline))
                time.sleep(0.1)

    threading.Thread(target=copy, daemon=True).start()


def stop_at_eof() -> None:
    """Sends SIGTERM to this process when stdin ends, so that a container stops when its client is gone."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
