"""How Triton is started for a repository: the backend that runs the engine, the ranks, the ports, the command line."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from builder.core.errors import ServingError
from builder.llmapi import launch as llmapi_launch
from builder.serving.installation import Installation
from builder.serving.private_directory import ServingDirectory
from builder.trtllm import compatibility

# APIs that clients do not need and others could misuse. Triton restricts an API to requests with a secret header. The
# header chosen here cannot be sent: its name contains a colon, which ends a header's name in HTTP, and gRPC rejects it.
# So the APIs are closed to everybody, and the command line, which every local user can read, contains no secret.
CLOSED = "model-repository,shared-memory,trace,logging:no:body=x"
OWN_GRPC = "BUILDER_TRITON_GRPC"  # where tensorrt_llm_bls finds the engine model (its model.py)


@dataclass(frozen=True)
class Ports:
    """The address that a server listens on. A port that is None is replaced by a free one."""

    http: int | None = None
    grpc: int | None = None
    metrics: int | None = None
    host: str = "127.0.0.1"

    def choose(self) -> Addresses:
        """Chooses free ports where none is given. ServingError names the port that is in use."""
        listeners = []
        port = None
        try:
            for port in (self.http, self.grpc, self.metrics):
                listeners.append(socket.create_server((self.host, port or 0)))
        except OSError as error:
            raise ServingError(
                f"Can't listen on {self.host}:{port}.",
                why=error.strerror or str(error),
                hint=f"Find out what uses the port (ss -ltnp 'sport = :{port}'), or choose other ports: --http-port, "
                "--grpc-port, --metrics-port.",
            ) from error
        finally:  # all were open at once, so the three are different
            ports = [listener.getsockname()[1] for listener in listeners]
            for listener in listeners:
                listener.close()
        return Addresses(self.host, *ports)


@dataclass(frozen=True)
class Addresses:
    """The host and ports of a server. The URLs have no scheme, as tritonclient expects."""

    host: str
    http: int
    grpc: int
    metrics: int

    @property
    def http_url(self) -> str:
        """HOST:PORT for HTTP."""
        return f"{self.host}:{self.http}"

    @property
    def grpc_url(self) -> str:
        """HOST:PORT for gRPC."""
        return f"{self.host}:{self.grpc}"

    @property
    def own_grpc_url(self) -> str:
        """HOST:PORT at which the server's own models reach its gRPC port."""
        return f"{self._own_host}:{self.grpc}"

    @property
    def own_http(self) -> tuple[str, int]:
        """Host and port at which this machine reaches its HTTP port."""
        return self._own_host, self.http

    @property
    def _own_host(self) -> str:
        return "127.0.0.1" if self.host == "0.0.0.0" else self.host

    @property
    def metrics_url(self) -> str:
        """HOST:PORT for Prometheus metrics."""
        return f"{self.host}:{self.metrics}"


@dataclass(frozen=True)
class Command:
    """What the command lines of all ranks have in common. `shm` is the prefix of their shared memory's names."""

    binary: Path
    place: ServingDirectory
    backends: Path
    addresses: Addresses
    shm: str
    exit_timeout: int

    def of_rank(self, rank: int) -> list[str]:
        """The command line of one rank.

        Rank 0 loads every model and listens. The other ranks load the engine's model only and open no port.
        """
        place, addresses = self.place, self.addresses
        models = place.models if rank == 0 else place.only(compatibility.ENGINE_MODEL)
        ports = {"http": addresses.http, "grpc": addresses.grpc, "metrics": addresses.metrics}
        shm = f"{self.shm}{rank}-"
        return [
            str(self.binary),
            f"--model-repository={models}",
            f"--backend-directory={self.backends}",
            *(f"--{api}-{key}" for api, port in ports.items() for key in (f"address={addresses.host}", f"port={port}")),
            "--disable-auto-complete-config",
            # Loads every model at start, and again if its files change (model_processes.py). Like "none", it turns off
            # the API that loads (and runs) others.
            "--model-control-mode=poll",
            "--repository-poll-secs=1",
            *(f"--backend-config={backend},shm-region-prefix-name={shm}" for backend in ("python", "tensorrtllm")),
            f"--exit-timeout-secs={self.exit_timeout}",
            f"--http-restricted-api={CLOSED}",
            f"--grpc-restricted-protocol={CLOSED}",
        ]

    def line(self, models: Path, ranks: int) -> list[str]:
        """The command line that starts all ranks. `models` decides which launcher its target needs."""
        commands = [self.of_rank(rank) for rank in range(ranks)]
        if llmapi_launch.arguments(models) is None:
            return mpi_command(commands)
        return llmapi_launch.command(commands)


def mpi_command(ranks: Sequence[list[str]]) -> list[str]:
    """One command line for all ranks of an engine: for a single rank its own, otherwise mpirun's.

    mpirun starts the ranks as upstream does (triton_backend/scripts/launch_triton_server.py@0a2e2c1f, get_cmd).
    ServingError if there is no mpirun.
    """
    if len(ranks) == 1:
        return ranks[0]
    if shutil.which("mpirun") is None:
        raise ServingError(
            f"The engine has {len(ranks)} ranks, and mpirun is not on the PATH.",
            why="mpirun starts one server for each rank.",
            hint="Serve it in NVIDIA's Triton image with TensorRT-LLM, which includes Open MPI, "
            f"on a machine with {len(ranks)} GPUs.",
        )
    first, *others = [["-n", "1", *command] for command in ranks]
    return ["mpirun", "--allow-run-as-root", *first, *(word for command in others for word in (":", *command))]


def stand_in(installation: Installation, models: Path, engine_backend: Path | None) -> str | Path | None:
    """What replaces the C++ `tensorrtllm` backend: the code of a model.py, or a library; None if nothing has to.

    `engine_backend` is a file with that code, or a library (*.so). Without one, an engine directory without a *.engine
    file gets the reference executor.
    """
    if engine_backend is not None:
        return engine_backend if engine_backend.suffix == ".so" else engine_backend.read_text(encoding="utf-8")
    if has_engine(models) or _needs_no_engine(installation, models):
        return None
    root = str(Path(__file__).resolve().parents[2])
    # The backend's Python ignores PYTHONPATH, and a checkout may not be installed.
    return f"import sys; sys.path.append({root!r})\nfrom builder.reference.backend import TritonPythonModel\n"


def _needs_no_engine(installation: Installation, models: Path) -> bool:
    """Whether the model is a Python model (the llmapi target) and the installation can run it as it is."""
    names = (f"{prefix}{compatibility.ENGINE_MODEL}" for prefix in compatibility.prefixes(models))
    files = [models / name / "config.pbtxt" for name in names]
    configs = [file.read_text(encoding="utf-8") for file in files if file.is_file()]
    python = bool(configs) and all('backend: "python"' in config for config in configs)
    return python and (installation.backends / "python" / "triton_python_backend_stub").is_file()


def has_engine(models: Path) -> bool:
    """Whether an engine directory of the repository contains an engine that trtllm-build made."""
    return any(any(directory.glob("*.engine")) for directory in _engine_directories(models))


def world_size(models: Path) -> int:
    """The number of ranks of the engine or the llmapi target; 1 for the reference executor, a single process."""
    if not has_engine(models):
        return llmapi_launch.world_size(models)
    return max(compatibility.read_engine(directory).world_size for directory in _engine_directories(models))


def _engine_directories(models: Path) -> list[Path]:
    found = (compatibility.read_served(models, prefix) for prefix in compatibility.prefixes(models))
    return [served.engine for served in found if served]
