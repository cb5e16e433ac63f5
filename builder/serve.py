"""Start, wait for and stop Triton: the container's, or the one inside the nvidia-pytriton wheel.

The server gets a session of its own, an environment without tokens, and a SIGTERM from the kernel when we die.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from builder import build_log, gpus, guards, llmapi_launch, process
from builder.errors import ServingError
from builder.output import Output, seconds

CONTAINER = Path("/opt/tritonserver")
SHM = Path("/dev/shm")
SECRETS = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|CREDENTIALS?|API_?KEY)(_|$)", re.IGNORECASE)
# Settings of ours that the models may need; the wheel's server gets nothing else of our environment.
PASSED_ON = ("HOME", "TMPDIR", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "CUDA_VISIBLE_DEVICES")


@dataclass(frozen=True)
class Installation:
    """A Triton server on this machine: its binary, where its backends lie, the files of its Python backend."""

    binary: Path
    backends: Path
    python_backend: tuple[Path, ...]
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Server:
    """A server that is ready. The URLs have no scheme, as tritonclient wants them."""

    http_url: str
    grpc_url: str
    metrics_url: str
    log: Path
    child: subprocess.Popen[bytes]

    @property
    def pid(self) -> int:
        return self.child.pid

    def wait(self) -> int:
        """Until the server ends by itself; its exit code."""
        return self.child.wait()


def find_server() -> Installation:
    """The server on the PATH or in NVIDIA's container; else the one in the nvidia-pytriton wheel."""
    on_path = shutil.which("tritonserver")
    binary = Path(on_path) if on_path else CONTAINER / "bin" / "tritonserver"
    if binary.is_file():
        backends = binary.resolve().parent.parent / "backends"
        environment = {name: value for name, value in os.environ.items() if not SECRETS.search(name)}
        return Installation(binary, backends, tuple(sorted((backends / "python").glob("*"))), environment)
    return _wheel()


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
    engine_backend: Path | None = None,
    timeout: float = 1800.0,
    exit_timeout: int = 30,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """Serves a model repository until the block ends. Ports default to free ones, the log to a file in TMPDIR.

    `engine_backend` is the model.py that stands in for the C++ backend; default: the reference executor's where the
    repository's engine directory holds no *.engine. IntegrityError when engine, repository and machine do not agree,
    ServingError when the server does not come up in `timeout` seconds.
    Call it in the main thread: the kernel stops the server when the thread that started it ends.
    """
    if engine_backend is None:
        guards.check(models)
    installation = find_server()
    backends = _backends(installation, models, engine_backend)
    ports = choose_ports(host, http_port, grpc_port, metrics_port)
    log = log or Path(tempfile.mkdtemp(prefix="triton-")) / "server.log"
    shm = f"builder-{os.getpid()}-{secrets.token_hex(4)}-"
    world_size = 1 if engine_backend else _world_size(models)
    variables = llmapi_launch.environment(
        models, {**installation.environment, **gpus.cuda_order(), **(environment or {})}
    )
    launched = launch_command if llmapi_launch.arguments(models) is None else llmapi_launch.command
    argv = launched(
        [
            _command(installation.binary, models, backends, host, ports, f"{shm}{rank}-", exit_timeout, rank=rank)
            for rank in range(world_size)
        ]
    )
    start = time.monotonic()
    patience = 2.0
    # SIGTERM if we die, not SIGKILL: the server ends its stubs and removes its shared memory.
    with (
        _cleaned(models, shm),
        open(log, "wb") as sink,
        process.started(
            argv,
            stop=lambda child: _stop(child, patience),
            death=signal.SIGTERM,
            log=sink,
            env=variables,
        ) as child,
    ):
        http, grpc, metrics = (f"{host}:{port}" for port in ports)
        server = Server(http, grpc, metrics, log, child)
        _wait_until_ready(server, models, start + timeout)
        patience = exit_timeout + 10.0
        out.info(f"Triton is ready after {seconds(time.monotonic() - start)}: {server.http_url}, log {log}")
        yield server


@contextmanager
def _cleaned(models: Path, shm: str) -> Iterator[None]:
    """Removes what a server leaves: its shared memory, and compiled files in the repository, a finished artefact (the
    stub heeds no PYTHONDONTWRITEBYTECODE)."""
    try:
        yield
    finally:
        for leftover in SHM.glob(f"{shm}*"):
            leftover.unlink(missing_ok=True)
        for leftover in models.glob("*/1/__pycache__"):
            shutil.rmtree(leftover, ignore_errors=True)


def _wheel() -> Installation:
    try:
        package = metadata.distribution("nvidia-pytriton")
    except metadata.PackageNotFoundError:
        raise ServingError(
            "There is no Triton server on this machine.",
            why=f"No tritonserver on the PATH, none in {CONTAINER}, and nvidia-pytriton is not installed.",
            cure="pip install --no-deps nvidia-pytriton==0.7.0, or run in NVIDIA's Triton image.",
        ) from None
    site = Path(str(package.locate_file("")))
    home = site / "pytriton" / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = home / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        raise ServingError(
            f"nvidia-pytriton {package.version} has no Python backend for Python {version}.",
            cure="Use Python 3.11 or 3.12.",
        )
    # The stub runs the first python3 of the PATH: it must be the one whose packages the models need.
    environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ} | {
        "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin",
        "LD_LIBRARY_PATH": f"{site / 'nvidia_pytriton.libs'}:{sysconfig.get_config_var('LIBDIR')}",
        "LANG": "C.UTF-8",
        "OMP_WAIT_POLICY": "PASSIVE",  # torch's threads must not spin while a tokenizer wants the core
        "PYTHONUNBUFFERED": "1",
    }
    backend = home / "backends" / "python"
    files = (backend / "libtriton_python.so", backend / "triton_python_backend_utils.py", stub)
    return Installation(home / "bin" / "tritonserver", home / "backends", files, environment)


def _backends(installation: Installation, models: Path, engine_backend: Path | None) -> Path:
    """The backend directory. For a stand-in of the engine: the Python backend's files and the stand-in's model.py."""
    if engine_backend is None and (_has_engine(models) or _complete(installation, models)):
        return installation.backends
    if engine_backend is None:
        root = str(Path(__file__).resolve().parent.parent)
        # The stub ignores PYTHONPATH, and a checkout may not be installed.
        code = f"import sys; sys.path.append({root!r})\nfrom builder.reference.backend import TritonPythonModel\n"
    else:
        code = engine_backend.read_text(encoding="utf-8")
    return _prepare(installation.python_backend, code)


def _complete(installation: Installation, models: Path) -> bool:
    """Whether no stand-in is needed (the llmapi target: a python model) and the Python backend lies ready."""
    config = models / guards.ENGINE_MODEL / "config.pbtxt"
    python = config.is_file() and 'backend: "python"' in config.read_text(encoding="utf-8")
    return python and (installation.backends / "python" / "triton_python_backend_stub").is_file()


def _has_engine(models: Path) -> bool:
    """Whether the engine directory that the repository names holds an engine of TensorRT's."""
    directory = _engine_directory(models)
    return directory is not None and any(directory.glob("*.engine"))


def _engine_directory(models: Path) -> Path | None:
    served = guards.read_served(models)
    return served.engine if served else None


def _world_size(models: Path) -> int:
    """How many ranks an engine of TensorRT's or the llmapi target has; the reference executor is one process."""
    directory = _engine_directory(models)
    if directory is None or not _has_engine(models):
        return llmapi_launch.world_size(models)
    return guards.read_engine(directory).world_size


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
            cure="Serve it in NVIDIA's Triton image with TensorRT-LLM, which brings Open MPI, "
            f"on a machine with {len(servers)} GPUs.",
        )
    ranks = [["-n", "1", *server] for server in servers]
    rest = [word for rank in ranks[1:] for word in (":", *rank)]
    return ["mpirun", "--allow-run-as-root", *ranks[0], *rest]


def _prepare(files: tuple[Path, ...], code: str) -> Path:
    """Copies, for the server refuses symbolic links; made once, under a name that says what is in it."""
    described = "".join(f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}\n" for file in files) + code
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trtllm-builder" / "triton-backends"
    final = cache / hashlib.sha256(described.encode()).hexdigest()[:16]
    if final.is_dir():
        return final
    try:
        cache.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=".", dir=cache))
        for name in ("python", "tensorrtllm"):
            (made / name).mkdir()
        for file in files:
            if file.is_file():
                shutil.copy(file, made / "python" / file.name)
        stub = made / "python" / "triton_python_backend_stub"
        stub.chmod(0o755)
        (made / "tensorrtllm" / "model.py").write_text(code, encoding="utf-8")
        with suppress(OSError):  # another process was faster
            made.rename(final)
        shutil.rmtree(made, ignore_errors=True)
    except OSError as error:
        raise ServingError(
            f"Triton's backends can't be prepared in {cache}.",
            why=str(error),
            cure="Name a writable directory: XDG_CACHE_HOME=DIR",
        ) from error
    return final


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
            cure=f"See what uses it (ss -ltnp 'sport = :{port}'), or choose other ports: --http-port, --grpc-port, "
            "--metrics-port.",
        ) from error
    finally:
        ports = [listener.getsockname()[1] for listener in held]
        for listener in held:
            listener.close()
    return ports


def _command(
    binary: Path,
    models: Path,
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
    # The load API runs whatever code it is sent; nobody has this key.
    locked = f"model-repository:{secrets.token_hex(8)}={secrets.token_hex(16)}"
    return [
        str(binary),
        f"--model-repository={models.resolve()}",
        f"--backend-directory={backends}",
        *(f"--{name}-{what}" for name, port in listening for what in (f"address={host}", f"port={port}")),
        "--disable-auto-complete-config",
        "--model-control-mode=explicit",
        "--load-model=*" if rank == 0 else f"--load-model={guards.ENGINE_MODEL}",
        *(f"--backend-config={backend},shm-region-prefix-name={shm}" for backend in ("python", "tensorrtllm")),
        f"--exit-timeout-secs={exit_timeout}",
        f"--http-restricted-api={locked}",
        f"--grpc-restricted-protocol={locked}",
    ]


def _wait_until_ready(server: Server, models: Path, deadline: float) -> None:
    """Until the server and each of its models say that they are ready, and its metrics port, opened last, answers."""
    asked = [*((server.http_url, path) for path in ready_paths(models)), (server.metrics_url, "/metrics")]
    while asked:
        if server.child.poll() is not None:
            raise _failure(f"Triton ended with {_how(server.child.returncode)} before it was ready.", server.log)
        if time.monotonic() > deadline:
            raise _failure("Triton is not ready in time.", server.log)
        if answers_ok(*asked[0]):
            asked.pop(0)
        else:
            time.sleep(0.05)


def ready_paths(models: Path) -> list[str]:
    """What to ask the server and each of its models until all are ready."""
    return ["/v2/health/ready", *(f"/v2/models/{path.name}/ready" for path in sorted(models.iterdir()))]


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


def followed_log() -> Path:
    """A new log for a server, copied to stderr as it grows, until we end: what `docker logs` shows."""
    log = Path(tempfile.mkdtemp(prefix="triton-")) / "server.log"
    log.touch()

    def copy() -> None:
        with open(log, "rb") as file:
            while True:
                process.write_all(2, file.read())
                time.sleep(0.1)

    threading.Thread(target=copy, daemon=True).start()
    return log


def stop_at_eof() -> None:
    """SIGTERM to ourselves when stdin ends: a container whose client is gone stops by itself."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _how(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _failure(what: str, log: Path) -> ServingError:
    text = log.read_text(encoding="utf-8", errors="replace")
    why = "\n".join(reasons(text)) or process.tail(log)
    if known := build_log.diagnose(text, "serving"):
        cure = f"{known.cure}\nThe whole log: {log}"
        return ServingError(what, why=f"{known.why} ({known.source})\n{why}", cure=cure)
    return ServingError(what, why=why, cure=f"The whole log: {log}")


def reasons(log: str) -> list[str]:
    """The lines of a server's log that say why it did not come up, each once; of a traceback only the error."""
    failed = re.findall(r'"failed to load \'([^\']+)\' version \d+: (.+)', log)
    found = [f"{model}: {reason}" for model, reason in failed]
    found += re.findall(r'^E\d{4} .*?\] "((?:failed to start|Poll failed).*)', log, re.MULTILINE)
    found += re.findall(r"^Bad option: .*\n(.*)", log, re.MULTILINE)
    return list(dict.fromkeys(line.split(r"\n\nAt:")[0].strip(' "') for line in found))


def _stop(child: subprocess.Popen[bytes], patience: float) -> None:
    """SIGTERM, the patience, then SIGKILL to whatever is left of the server's process group."""
    try:
        if child.poll() is None:
            child.terminate()
            with suppress(subprocess.TimeoutExpired):
                child.wait(patience)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
