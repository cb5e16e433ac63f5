"""Serves a repository in a container, through the Docker API. No container outlives the process that started it.

This process holds the container's stdin. When it ends, even by SIGKILL, the kernel closes stdin, `builder serve
--until-eof` in the container stops, and the Docker engine removes the container. A container that was created but never
started is found later by its label.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.core import process
from builder.core.errors import BuilderError, IntegrityError, ServingError, UnsupportedError, UsageError
from builder.core.output import Output, seconds
from builder.core.safe_text import printable_bytes
from builder.machine import containers
from builder.recipe.target_facts import target_facts
from builder.serving.launch import Addresses, Ports
from builder.serving.private_directory import serving_directory
from builder.serving.readiness import answers_ok, ready_paths, reasons
from builder.trtllm import compatibility, references

if TYPE_CHECKING:
    from builder.triton.repository import Repository

OWNER = "trtllm-builder.owner"  # label of a container: the process that it belongs to
TENSORRT_LLM = "trtllm-builder.tensorrt-llm"  # label of an image: the version in its base image
# Compose labels the images that it builds. Without these empty labels our container would inherit the image's, and
# Compose would take it for one of its services.
NO_COMPOSE = {f"com.docker.compose.{key}": "" for key in ("project", "service", "version")}
PORTS = {"http": 8000, "grpc": 8001, "metrics": 8002}  # in the container


@dataclass(frozen=True)
class ContainerServer:
    """A server in a container that is ready. The URLs have no scheme, as tritonclient expects."""

    http_url: str
    grpc_url: str
    metrics_url: str
    log: Path
    container: Any

    @property
    def pid(self) -> str:
        """The container's short id."""
        return str(self.container.short_id)

    def wait(self, timeout: float | None = None) -> int | None:
        """Waits until the server exits; returns its exit code, or None if it still runs after `timeout` seconds.

        The exit code is 1 if the container has been removed already.
        """
        import docker.errors
        import requests.exceptions

        try:
            return int(self.container.wait(timeout=timeout)["StatusCode"])
        except docker.errors.NotFound:
            return 1
        except (requests.exceptions.ReadTimeout, requests.exceptions.ConnectionError):
            if timeout is None:
                raise
            return None

    @property
    def processes(self) -> None:
        """None: the `builder serve` in the container watches the processes."""
        return None

    @property
    def draining(self) -> None:
        """None: so it is with requests in progress."""
        return None


@contextmanager
def serve_container(
    repository: Repository,
    *,
    out: Output,
    image: str,
    ports: Ports | None = None,
    follow_log: bool = False,
    timeout: float = 1800.0,
) -> Iterator[ContainerServer]:
    """Serves a repository in a container of `image` until the block ends. `timeout` is seconds until it is ready.

    The log is a temporary file, which is kept only if the server fails.
    UsageError if there is no Docker engine or no such image, IntegrityError if the image's TensorRT-LLM is not the one
    that the repository needs, UnsupportedError if Docker has no GPU, ServingError if the server does not become ready.
    """
    with serving_directory(executable=False) as place, _removed(connect()) as (client, owner):
        check_image(client, image, repository.facts)
        addresses = (ports or Ports()).choose()
        start = time.monotonic()
        container = _create(client, repository, image, addresses, owner)
        # Open until the block ends. The output is attached before the start too, so that no line is missed.
        stdin = container.attach_socket(params={"stdin": 1, "stream": 1})
        _copy(container.attach(stream=True, logs=True), place.log, follow_log)
        _start(container)
        server = ContainerServer(addresses.http_url, addresses.grpc_url, addresses.metrics_url, place.log, container)
        _wait_until_ready(server, repository.models, start + timeout)
        elapsed = seconds(time.monotonic() - start)
        out.info(f"Triton is ready after {elapsed} in container {container.short_id}: {server.http_url}")
        yield server
        del stdin


@contextmanager
def _removed(client: Any) -> Iterator[tuple[Any, str]]:
    """The client and an owner label: every container that has this label is removed when the block ends."""
    remove_orphans(client)
    owner = _owner()
    try:
        yield client, owner
    finally:
        for container in client.containers.list(all=True, filters={"label": f"{OWNER}={owner}"}, ignore_removed=True):
            _remove(container)
        client.close()


def connect() -> Any:
    """A client of the Docker engine at DOCKER_HOST or the default socket. UsageError if none answers."""
    try:
        import docker
        import docker.errors
    except ModuleNotFoundError:
        raise UsageError(
            "Docker's Python package is not installed.", hint="pip install 'trtllm-builder[container]'"
        ) from None
    try:
        return docker.from_env(timeout=120)
    except docker.errors.DockerException as error:
        raise UsageError(
            "No Docker engine answers.",
            why=str(error),
            hint="Start it (systemctl start docker), join the group docker, or set DOCKER_HOST to another engine. "
            "To serve without Docker, omit --container.",
        ) from error


def check_image(client: Any, name: str, facts: Mapping[str, Any]) -> str:
    """Checks that the image exists, is ours, and has the TensorRT-LLM version that the repository needs. Its id.

    `facts` are the repository's. UsageError for the first two, IntegrityError for the third.
    """
    import docker.errors

    try:
        image = client.images.get(name)
    except docker.errors.ImageNotFound:
        raise UsageError(
            f"The image {name} is not on this machine.",
            hint="Build it: docker compose build build. Or choose another image: --image NAME",
        ) from None
    labels = image.labels
    if TENSORRT_LLM not in labels:
        raise UsageError(
            f"The image {name} was not made by this project's Dockerfile.",
            why=f"It has no label {TENSORRT_LLM}.",
            hint="Build one: docker compose build build. Or choose another image: --image NAME",
        )
    target = target_facts(facts["target"])
    if target.needs_gpu and labels[TENSORRT_LLM] != facts["tensorrt_llm"]:
        raise IntegrityError(
            f"The image {name} has TensorRT-LLM {labels[TENSORRT_LLM]}, but the "
            + ("engine was built by " if target.has_engine else "repository was rendered for ")
            + f"{facts['tensorrt_llm']}.",
            why="An engine runs only on the version that built it."
            if target.has_engine
            else compatibility.LLM_ARGUMENTS,
            hint="Build the image on the right base (configs/containers.yaml): BASE_IMAGE=... docker compose build "
            "build. Or choose another image: --image NAME",
        )
    return str(image.id)


def remove_orphans(client: Any) -> None:
    """Removes containers whose process was killed between creating and starting them."""
    for container in client.containers.list(all=True, filters={"label": OWNER}, ignore_removed=True):
        if _is_orphan(container.labels[OWNER]):
            _remove(container)


def _is_orphan(owner: str) -> bool:
    """Whether the owner label names a process of this machine, boot and process namespace that has ended.

    Several hosts can share a Docker engine (DOCKER_HOST), and the initial process namespace has the same inode on all
    of them. The boot id is unique: each kernel generates one. Labels of other formats or of an earlier boot are left
    alone, because the machine id may belong to a clone of this machine.
    """
    place, _, process_id = owner.rpartition("/")
    pid, _, started = process_id.partition(".")
    if not _boot_id() or place != _place() or not (pid.isascii() and pid.isdigit() and started):
        return False
    return _start_time(int(pid)) != started


def _owner() -> str:
    """The owner label of this process: MACHINE/BOOT/NAMESPACE/PID.START."""
    return f"{_place()}/{os.getpid()}.{_start_time(os.getpid())}"


def _place() -> str:
    """Where this process id is unique: the machine, its boot and the process namespace."""
    namespace = os.stat("/proc/self/ns/pid").st_ino
    return f"{_read_id('/etc/machine-id')}/{_boot_id()}/{namespace}"


def _boot_id() -> str:
    return _read_id("/proc/sys/kernel/random/boot_id")


def _read_id(path: str) -> str:
    """The id in a file, reduced to letters, digits and dashes; "" if the file is missing."""
    try:
        return re.sub(r"[^0-9A-Za-z-]", "", Path(path).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return ""


def _start_time(pid: int) -> str:
    """The start time in clock ticks since boot, which distinguishes processes that reuse an id; "" if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(") ")[2].split()[19]
    except (OSError, ValueError):
        return ""


def _create(client: Any, repository: Repository, image: str, addresses: Addresses, owner: str) -> Any:
    """Creates the container. The store is mounted where the rendered configuration expects it."""
    from docker.types import DeviceRequest, Mount, Ulimit

    facts = next(iter(repository.members.values()))  # several are in one store
    inside = _inside(repository.path, facts)
    root = repository.path.parents[1]
    argv = ["serve", str(inside / repository.path.relative_to(root)), "--quiet", "--until-eof", "--follow-log"]
    argv += ["--host", "0.0.0.0", "--no-gateway"]  # the command on the host starts one
    argv += ["--watchdog", "/tmp/watchdog.json"]  # its events are part of the log
    argv += [word for name, port in PORTS.items() for word in (f"--{name}-port", str(port))]
    gpu: dict[str, Any] = {}
    if target_facts(repository.facts["target"]).needs_gpu:
        gpu = {
            "device_requests": [DeviceRequest(driver="nvidia", count=-1, capabilities=[["gpu"]])],
            "ulimits": [
                Ulimit(name="memlock", soft=(lock := int(os.environ.get("MEMLOCK", "-1"))), hard=lock),
                Ulimit(name="stack", soft=(stack := containers.needs().stack_bytes), hard=stack),
            ],
        }
    published = zip(PORTS.values(), (addresses.http, addresses.grpc, addresses.metrics), strict=True)
    configuration = client.api.create_host_config(
        auto_remove=True,
        init=True,
        mounts=[Mount(target=str(inside), source=str(root), type="bind", read_only=True)],
        tmpfs={"/tmp": "mode=1777", "/cache": "exec,mode=1777"},
        shm_size="8g",
        read_only=True,
        cap_drop=["ALL"],
        security_opt=["no-new-privileges:true"],
        port_bindings={inner: (addresses.host, port) for inner, port in published},
        **gpu,
    )
    # The low-level API: stdin closes with our connection only if the container is created with detach=False.
    made = client.api.create_container(
        image, argv, detach=False, stdin_open=True, host_config=configuration, labels={**NO_COMPOSE, OWNER: owner},
        user=f"{os.getuid()}:{os.getgid()}", ports=list(PORTS.values()),
    )  # fmt: skip
    return client.containers.get(made["Id"])


def _inside(repository: Path, facts: Mapping[str, Any]) -> Path:
    """The store's path that the repository refers to, from STORE/engine/KEY or STORE/checkpoint/KEY/unified."""
    if "engine" in facts:
        return references.resolved(str(facts["engine"]), repository).parents[1]
    return references.resolved(str(facts["checkpoint"]), repository).parents[2]


def _start(container: Any) -> None:
    import docker.errors

    try:
        container.start()
    except docker.errors.APIError as error:
        raise _start_error(error.explanation or str(error)) from error


def _start_error(message: str) -> BuilderError:
    if "device driver" in message or "nvidia" in message:
        return UnsupportedError(
            "The Docker engine cannot give the container a GPU.",
            why=message,
            hint="Run `builder doctor` to see what is missing. To serve on the CPU, build with --gpu cpu.",
        )
    if "port is already allocated" in message or "address already in use" in message:
        return ServingError(
            "A port of the server is in use.",
            why=message,
            hint="Choose other ports: --http-port, --grpc-port, --metrics-port.",
        )
    return ServingError("The container does not start.", why=message, hint="Run `builder doctor` to check Docker.")


def _copy(lines: Iterator[bytes], log: Path, follow: bool) -> None:
    """Copies the container's output to a file, and to stderr if `follow`, in a thread that ends with the output."""

    def copy() -> None:
        with open(log, "wb", buffering=0) as file:
            for line in lines:
                file.write(line)
                if follow:
                    process.write_all(2, printable_bytes(line))

    log.touch()
    threading.Thread(target=copy, daemon=True).start()


def _wait_until_ready(server: ContainerServer, models: Path, deadline: float) -> None:
    import docker.errors

    paths = ready_paths(models)
    while paths:
        try:
            server.container.reload()
            running = server.container.status == "running"
        except docker.errors.NotFound:
            running = False
        if not running or time.monotonic() > deadline:
            problem = "is not ready in time" if running else "ended before it was ready"
            time.sleep(0.5)  # for the last lines of the log
            why = "\n".join(reasons(server.log.read_text(encoding="utf-8", errors="replace")))
            raise ServingError(
                f"The server in the container {problem}.",
                why=why or process.tail(server.log),
                hint=f"The full log: {server.log}",
            )
        if answers_ok(server.http_url, paths[0]):
            paths.pop(0)
        else:
            time.sleep(0.1)


def _remove(container: Any) -> None:
    """Sends SIGTERM, waits up to 45 s for requests in flight, and then removes the container by force."""
    import docker.errors

    with suppress(docker.errors.NotFound):
        container.reload()
        if container.status == "running":
            container.stop(timeout=45)
    for _ in range(50):
        try:
            container.remove(force=True)
        except docker.errors.NotFound:
            return
        except docker.errors.APIError as error:
            if error.status_code != 409:  # "removal of container ... is already in progress"
                raise
        time.sleep(0.1)
