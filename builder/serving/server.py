"""Start, wait for and stop Triton: the container's, or the one inside the nvidia-pytriton wheel.

The server runs below a supervisor (supervisor.py), from a directory of its own (serving_directory.py), in an
environment without secrets (environment.py). It has no API that loads models or changes what it logs.
"""

from __future__ import annotations

import http.client
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from builder.core import exit_status, process, supervisor
from builder.core.errors import ServingError
from builder.core.output import Output, seconds
from builder.core.safe_text import printable_bytes
from builder.llmapi import launch as llmapi_launch
from builder.machine import gpus
from builder.serving import limits
from builder.serving.installation import Installation, find_server
from builder.serving.private_directory import ServingDirectory, prepare_backends, serving_directory
from builder.trtllm import build_log, compatibility

SHM = Path(supervisor.SHM)
DEAD_SECONDS = 5.0  # Triton notices within three where the model's own code ends its process
# What clients don't need and others could misuse. The header that would open it has a name that none can have: HTTP
# ends a name at its first colon, and gRPC refuses a call with such a name. So the command line, which every user of the
# machine can read, has no secret in it.
CLOSED = "model-repository,shared-memory,trace,logging:no:body=x"


@dataclass(frozen=True)
class Server:
    """A server that is ready. The URLs have no scheme, as tritonclient wants them."""

    http_url: str
    grpc_url: str
    metrics_url: str
    log: Path
    child: process.Child

    @property
    def pid(self) -> int:
        """Of the server's supervisor, which passes SIGTERM on."""
        return self.child.pid

    def wait(self, timeout: float | None = None) -> int | None:
        """Until the server ends by itself: its exit code. None where it still runs after `timeout` seconds."""
        try:
            return self.child.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def lost_a_model(self) -> bool:
        """Whether a process that the server started has ended, and the server has not noticed."""
        ours, found = set(supervisor.descendants(self.pid)), list(supervisor.processes())
        servers = {pid for pid, name, _, _ in found if name == "tritonserver" and pid in ours}
        return any(state == "Z" and parent in servers for _, _, state, parent in found)


@contextmanager
def serve(
    models: Path,
    *,
    out: Output,
    http_port: int | None = None,
    grpc_port: int | None = None,
    metrics_port: int | None = None,
    host: str = "127.0.0.1",
    log: Path | None = None,
    follow_log: bool = False,
    engine_backend: Path | None = None,
    timeout: float = 1800.0,
    exit_timeout: int = 30,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """Serves a model repository until the block ends. Ports default to free ones, the log to a temporary file.

    `engine_backend` is the model.py that stands in for the C++ backend; default: the reference executor's where the
    repository's engine directory holds no *.engine. `follow_log` copies the log to stderr. IntegrityError when engine,
    repository and machine do not agree, ServingError when the server does not come up in `timeout` seconds.
    """
    if engine_backend is None:
        compatibility.check(models)
    limits.check(models)
    installation = find_server()
    ports = choose_ports(host, http_port, grpc_port, metrics_port)
    shm = f"builder-{os.getpid()}-{secrets.token_hex(4)}-"
    world_size = 1 if engine_backend else _world_size(models)
    variables = llmapi_launch.environment(
        models, {**installation.environment, **gpus.cuda_order(), **(environment or {})}
    )
    launched = launch_command if llmapi_launch.arguments(models) is None else llmapi_launch.command
    code = _stand_in(installation, models, engine_backend)
    start = time.monotonic()
    patience = 2.0
    with serving_directory(executable=code is not None) as place, _no_compiled_files(models):
        place.link(models)
        backends = prepare_backends(installation, code, place.backends)
        argv = launched(
            [
                _command(installation.binary, place, backends, host, ports, f"{shm}{rank}-", exit_timeout, rank=rank)
                for rank in range(world_size)
            ]
        )
        log = log or place.log
        with (
            open(log, "wb") as sink,
            process.supervised(
                argv,
                stop=lambda child: _stop(child, patience),
                log=sink,
                env=variables,
                shm=shm,
                directory=place.path,
            ) as child,
        ):
            if follow_log:
                _follow(log)
            http, grpc, metrics = (f"{host}:{port}" for port in ports)
            server = Server(http, grpc, metrics, log, child)
            _wait_until_ready(server, models, start + timeout)
            patience = exit_timeout + 10.0
            out.info(f"Triton is ready after {seconds(time.monotonic() - start)}: {server.http_url}, log {log}")
            yield server


@contextmanager
def _no_compiled_files(models: Path) -> Iterator[None]:
    """Removes compiled files from the repository, a finished artifact (the stub heeds no PYTHONDONTWRITEBYTECODE)."""
    try:
        yield
    finally:
        for leftover in models.glob("*/1/__pycache__"):
            shutil.rmtree(leftover, ignore_errors=True)


def _stand_in(installation: Installation, models: Path, engine_backend: Path | None) -> str | None:
    """The model.py that stands in for the C++ backend; None where the installation's own backends serve."""
    if engine_backend is not None:
        return engine_backend.read_text(encoding="utf-8")
    if _has_engine(models) or _complete(installation, models):
        return None
    root = str(Path(__file__).resolve().parents[2])
    # The stub ignores PYTHONPATH, and a checkout may not be installed.
    return f"import sys; sys.path.append({root!r})\nfrom builder.reference.backend import TritonPythonModel\n"


def _complete(installation: Installation, models: Path) -> bool:
    """Whether no stand-in is needed (the llmapi target: a python model) and the Python backend lies ready."""
    config = models / compatibility.ENGINE_MODEL / "config.pbtxt"
    python = config.is_file() and 'backend: "python"' in config.read_text(encoding="utf-8")
    return python and (installation.backends / "python" / "triton_python_backend_stub").is_file()


def _has_engine(models: Path) -> bool:
    """Whether the engine directory that the repository names holds an engine of TensorRT's."""
    directory = _engine_directory(models)
    return directory is not None and any(directory.glob("*.engine"))


def _engine_directory(models: Path) -> Path | None:
    served = compatibility.read_served(models)
    return served.engine if served else None


def _world_size(models: Path) -> int:
    """How many ranks an engine of TensorRT's or the llmapi target has; the reference executor is one process."""
    directory = _engine_directory(models)
    if directory is None or not _has_engine(models):
        return llmapi_launch.world_size(models)
    return compatibility.read_engine(directory).world_size


def launch_command(servers: Sequence[list[str]]) -> list[str]:
    """One command line for the servers of all ranks: itself for one, else mpirun's, which starts one after the other.

    As upstream launches them (triton_backend/scripts/launch_triton_server.py@0a2e2c1f, get_cmd). ServingError where
    there is no mpirun.
    """
    if len(servers) == 1:
        return servers[0]
    if shutil.which("mpirun") is None:
        raise ServingError(
            f"The engine has {len(servers)} ranks, and mpirun, which starts a server for each, is not on the PATH.",
            hint="Serve it in NVIDIA's Triton image with TensorRT-LLM, which brings Open MPI, "
            f"on a machine with {len(servers)} GPUs.",
        )
    ranks = [["-n", "1", *server] for server in servers]
    rest = [word for rank in ranks[1:] for word in (":", *rank)]
    return ["mpirun", "--allow-run-as-root", *ranks[0], *rest]


def choose_ports(host: str, *given: int | None) -> list[int]:
    """The given ports, free ones in place of None. ServingError names the one that is in use."""
    held = []
    try:
        for port in given:
            held.append(socket.create_server((host, port or 0)))
    except OSError as error:
        raise ServingError(
            f"Can't listen on {host}:{port}.",
            why=error.strerror or str(error),
            hint=f"See what uses it (ss -ltnp 'sport = :{port}'), or choose other ports: --http-port, --grpc-port, "
            "--metrics-port.",
        ) from error
    finally:
        ports = [listener.getsockname()[1] for listener in held]
        for listener in held:
            listener.close()
    return ports


def _command(
    binary: Path,
    place: ServingDirectory,
    backends: Path,
    host: str,
    ports: list[int],
    shm: str,
    exit_timeout: int,
    *,
    rank: int = 0,
) -> list[str]:
    """One server's. Rank 0 loads everything and answers; the others load the engine's model alone and open no port."""
    listening = zip(("http", "grpc", "metrics"), ports, strict=True)
    models = place.models if rank == 0 else place.only(compatibility.ENGINE_MODEL)
    return [
        str(binary),
        f"--model-repository={models}",
        f"--backend-directory={backends}",
        *(f"--{name}-{what}" for name, port in listening for what in (f"address={host}", f"port={port}")),
        "--disable-auto-complete-config",
        "--model-control-mode=none",  # loads what is there; the API that loads, and runs what it is sent, is off
        *(f"--backend-config={backend},shm-region-prefix-name={shm}" for backend in ("python", "tensorrtllm")),
        f"--exit-timeout-secs={exit_timeout}",
        f"--http-restricted-api={CLOSED}",
        f"--grpc-restricted-protocol={CLOSED}",
    ]


def _wait_until_ready(server: Server, models: Path, deadline: float) -> None:
    """Until the server and each of its models say that they are ready, and its metrics port, opened last, answers."""
    asked = [*((server.http_url, path) for path in ready_paths(models)), (server.metrics_url, "/metrics")]
    look, dead_since = time.monotonic() + 1.0, None
    while asked:
        now = time.monotonic()
        if server.child.poll() is not None:
            how = exit_status.describe(server.child.returncode)
            raise _failure(f"Triton {how} before it was ready.", server.log)
        if now > deadline:
            raise _failure("Triton is not ready in time.", server.log)
        if now > look:
            look = now + 1.0
            dead_since = (dead_since or now) if server.lost_a_model() else None
            if dead_since and now - dead_since > DEAD_SECONDS:
                raise _failure(
                    "The process of a model ended while it was loading, and Triton waits for it.", server.log
                )
        if answers_ok(*asked[0]):
            asked.pop(0)
        else:
            time.sleep(0.05)


def ready_paths(models: Path) -> list[str]:
    """What to ask the server and each of its models until all are ready."""
    names = [path.name for path in sorted(models.iterdir()) if path.is_dir()]
    return ["/v2/health/ready", *(f"/v2/models/{quote(name)}/ready" for name in names)]


def answers_ok(url: str, path: str) -> bool:
    """Whether a GET of this path is answered with 200."""
    connection = http.client.HTTPConnection(url, timeout=5)
    try:
        connection.request("GET", path, headers={"Connection": "close"})
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _follow(log: Path) -> None:
    """Copies a server's log to stderr as it grows, until we end: what `docker logs` shows."""

    def copy() -> None:
        with open(log, "rb") as file:
            begun = b""
            while True:
                lines, newline, begun = (begun + file.read()).rpartition(b"\n")
                process.write_all(2, printable_bytes(lines + newline))
                time.sleep(0.1)

    threading.Thread(target=copy, daemon=True).start()


def stop_at_eof() -> None:
    """SIGTERM to ourselves when stdin ends: a container whose client is gone stops by itself."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _failure(what: str, log: Path) -> ServingError:
    text = log.read_text(encoding="utf-8", errors="replace")
    why = "\n".join(reasons(text)) or process.tail(log)
    if known := build_log.diagnose(text, "serving"):
        hint = f"{known.hint}\nThe whole log: {log}"
        return ServingError(what, why=f"{known.why} ({known.source})\n{why}", hint=hint)
    return ServingError(what, why=why, hint=f"The whole log: {log}")


def reasons(log: str) -> list[str]:
    """The lines of a server's log that say why it did not come up, each once; of a traceback only the error."""
    failed = re.findall(r'"failed to load \'([^\']+)\' version \d+: (.+)', log)
    found = [f"{model}: {reason}" for model, reason in failed]
    found += re.findall(r'^E\d{4} .*?\] "((?:failed to start|Poll failed).*)', log, re.MULTILINE)
    found += re.findall(r"^Bad option: .*\n(.*)", log, re.MULTILINE)
    return list(dict.fromkeys(line.split(r"\n\nAt:")[0].strip(' "') for line in found))


def _stop(child: process.Child, patience: float) -> None:
    """SIGTERM, and the patience for what is under way; what is left then is killed by the caller."""
    if child.poll() is None:
        child.terminate()
        with suppress(subprocess.TimeoutExpired):
            child.wait(patience)
