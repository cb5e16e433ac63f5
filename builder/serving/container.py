"""A repository served in a container by the engine's API: nothing of it stays, however we end.

We hold the container's stdin: when we die, even by SIGKILL, the kernel closes it, `builder serve --until-eof` inside
sees the end and stops, and the engine removes the container. One created and never started is found by its label.
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
from builder.serving.private_directory import serving_directory
from builder.serving.server import answers_ok, choose_ports, ready_paths, reasons
from builder.trtllm import compatibility

if TYPE_CHECKING:
    from builder.triton.repository import Repository

OWNER = "trtllm-builder.owner"  # container label: which process it belongs to
TENSORRT_LLM = "trtllm-builder.tensorrt-llm"  # image label: what the Dockerfile found in its base image
# Compose marks the images that it builds, and what runs from one would count as a part of its project.
UNMARKED = {f"com.docker.compose.{what}": "" for what in ("project", "service", "version")}
PORTS = {"http": 8000, "grpc": 8001, "metrics": 8002}  # inside


@dataclass(frozen=True)
class ContainerServer:
    """A server that is ready, in a container. The URLs have no scheme, as tritonclient wants them."""

    http_url: str
    grpc_url: str
    metrics_url: str
    log: Path
    container: Any

    @property
    def pid(self) -> str:
        """What the engine calls it."""
        return str(self.container.short_id)

    def wait(self, timeout: float | None = None) -> int | None:
        """Until the server ends by itself: its exit code (1 where the engine has forgotten it already). None where it
        still runs after `timeout` seconds."""
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

    def lost_a_model(self) -> bool:
        """Not seen from outside: the `builder serve` in the container looks."""
        return False


@contextmanager
def serve_container(repository: Repository, *, out: Output, image: str, **options: Any) -> Iterator[ContainerServer]:
    """Serves a repository in a container of `image` until the block ends; `options` as in `_serve`.

    The log is a temporary file, which stays only if the server fails.
    """
    with (
        serving_directory(executable=False) as place,
        _serve(repository, out=out, image=image, log=place.log, **options) as server,
    ):
        yield server


@contextmanager
def _serve(
    repository: Repository,
    *,
    out: Output,
    image: str,
    log: Path,
    http_port: int | None = None,
    grpc_port: int | None = None,
    metrics_port: int | None = None,
    host: str = "127.0.0.1",
    follow_log: bool = False,
    timeout: float = 1800.0,
) -> Iterator[ContainerServer]:
    """Serves a repository in a container of `image` until the block ends. Ports default to free ones.

    UsageError for no engine or no such image, IntegrityError for an image with another TensorRT-LLM than the engine's,
    UnsupportedError where the engine has no GPU to give, ServingError where the server does not come up.
    """
    client = connect()
    remove_orphans(client)
    check_image(client, image, repository.facts)
    ports = choose_ports(host, http_port, grpc_port, metrics_port)
    owner = _owner()
    start = time.monotonic()
    try:
        container = _create(client, repository, image, host, ports, owner)
        # Held until the block ends. The other stream is opened before the start too: not a line is missed.
        stdin = container.attach_socket(params={"stdin": 1, "stream": 1})
        _copy(container.attach(stream=True, logs=True), log, follow_log)
        _started(container)
        http, grpc, metrics = (f"{host}:{port}" for port in ports)
        server = ContainerServer(http, grpc, metrics, log, container)
        _wait_until_ready(server, repository.models, start + timeout)
        out.info(f"Triton is ready after {seconds(time.monotonic() - start)} in container {container.short_id}: {http}")
        yield server
        del stdin
    finally:
        for left in client.containers.list(all=True, filters={"label": f"{OWNER}={owner}"}, ignore_removed=True):
            _remove(left)
        client.close()


def connect() -> Any:
    """A client of the engine that DOCKER_HOST or the usual socket names."""
    try:
        import docker
        import docker.errors
    except ModuleNotFoundError:
        raise UsageError(
            "The Python package of Docker is not installed.", hint="pip install 'trtllm-builder[container]'"
        ) from None
    try:
        return docker.from_env(timeout=120)
    except docker.errors.DockerException as error:
        raise UsageError(
            "No Docker engine answers.",
            why=str(error),
            hint="Start it (systemctl start docker), or enter the group docker; DOCKER_HOST names another engine. "
            "Without an engine: the same command without --container.",
        ) from error


def check_image(client: Any, name: str, facts: Mapping[str, Any]) -> None:
    """The image is here, ours, and holds the TensorRT-LLM that built the engine."""
    import docker.errors

    try:
        labels = client.images.get(name).labels
    except docker.errors.ImageNotFound:
        raise UsageError(
            f"The image {name} is not on this machine.",
            hint="Build it: docker compose build build. Or name another: --image NAME",
        ) from None
    if TENSORRT_LLM not in labels:
        raise UsageError(
            f"The image {name} was not made by this project's Dockerfile.",
            why=f"It has no label {TENSORRT_LLM}.",
            hint="Build one: docker compose build build. Or name another: --image NAME",
        )
    target = target_facts(facts["target"])
    if target.needs_gpu and labels[TENSORRT_LLM] != facts["tensorrt_llm"]:
        raise IntegrityError(
            f"The image {name} has TensorRT-LLM {labels[TENSORRT_LLM]}, and {facts['tensorrt_llm']} "
            + ("built the engine." if target.has_engine else "is what the repository was rendered for."),
            why="An engine runs only on the version that built it."
            if target.has_engine
            else compatibility.LLM_ARGUMENTS,
            hint="Build the image on the right base (configs/containers.yaml): BASE_IMAGE=... docker compose build "
            "build. Or name another: --image NAME",
        )


def remove_orphans(client: Any) -> None:
    """Removes containers of builders that are gone: of one killed between the container's creation and its start."""
    for container in client.containers.list(all=True, filters={"label": OWNER}, ignore_removed=True):
        if _is_orphan(container.labels[OWNER]):
            _remove(container)


def _is_orphan(owner: str) -> bool:
    """Whether an owner label names a process of this machine, boot and namespace that has ended.

    Several hosts can share an engine (DOCKER_HOST), and the initial process namespace has the same inode on all of
    them; the boot id is drawn anew by each kernel. A label that we did not write, or one of an earlier boot, is never
    judged: the machine id may be a clone's.
    """
    place, _, process_id = owner.rpartition("/")
    pid, _, started = process_id.partition(".")
    if not _boot_id() or place != _place() or not (pid.isascii() and pid.isdigit() and started):
        return False
    return _start_time(int(pid)) != started


def _owner() -> str:
    """The label of our own containers: MACHINE/BOOT/NAMESPACE/PID.START."""
    return f"{_place()}/{os.getpid()}.{_start_time(os.getpid())}"


def _place() -> str:
    """Where our process ids hold: this machine, since it was started, in this process namespace."""
    namespace = os.stat("/proc/self/ns/pid").st_ino
    return f"{_read_id('/etc/machine-id')}/{_boot_id()}/{namespace}"


def _boot_id() -> str:
    return _read_id("/proc/sys/kernel/random/boot_id")


def _read_id(path: str) -> str:
    """An id in a file, without anything but letters, digits and dashes; "" where there is none."""
    try:
        return re.sub(r"[^0-9A-Za-z-]", "", Path(path).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return ""


def _start_time(pid: int) -> str:
    """In clock ticks since boot, which tells a process from a later one of the same id; "" where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(") ")[2].split()[19]
    except (OSError, ValueError):
        return ""


def _create(client: Any, repository: Repository, image: str, host: str, ports: list[int], owner: str) -> Any:
    """The container, not yet started. The store lies at the path that the rendered configuration names."""
    from docker.types import DeviceRequest, Mount, Ulimit

    inside = _inside(repository.facts)
    root = repository.path.parents[1]
    argv = ["serve", str(inside / repository.path.relative_to(root)), "--quiet", "--until-eof", "--follow-log"]
    argv += ["--host", "0.0.0.0"]
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
    published = zip(PORTS.values(), ports, strict=True)
    configuration = client.api.create_host_config(
        auto_remove=True,
        init=True,
        mounts=[Mount(target=str(inside), source=str(root), type="bind", read_only=True)],
        tmpfs={"/tmp": "mode=1777", "/cache": "exec,mode=1777"},
        shm_size="8g",
        read_only=True,
        cap_drop=["ALL"],
        security_opt=["no-new-privileges:true"],
        port_bindings={own: (host, port) for own, port in published},
        **gpu,
    )
    # The low-level call: only a container that is made not to be detached closes its stdin with our connection.
    made = client.api.create_container(
        image, argv, detach=False, stdin_open=True, host_config=configuration, labels={**UNMARKED, OWNER: owner},
        user=f"{os.getuid()}:{os.getgid()}", ports=list(PORTS.values()),
    )  # fmt: skip
    return client.containers.get(made["Id"])


def _inside(facts: Mapping[str, Any]) -> Path:
    """The store's path where the repository was rendered: STORE/engine/KEY, or STORE/checkpoint/KEY/unified."""
    return Path(facts["engine"]).parents[1] if "engine" in facts else Path(facts["checkpoint"]).parents[2]


def _started(container: Any) -> None:
    import docker.errors

    try:
        container.start()
    except docker.errors.APIError as error:
        raise _start_error(error.explanation or str(error)) from error


def _start_error(said: str) -> BuilderError:
    if "device driver" in said or "nvidia" in said:
        return UnsupportedError(
            "The Docker engine has no GPU to give to the container.",
            why=said,
            hint="`builder doctor` says what is missing. A repository for the CPU: builder build --gpu cpu",
        )
    if "port is already allocated" in said or "address already in use" in said:
        return ServingError(
            "A port of the server is in use.", why=said, hint="Choose others: --http-port, --grpc-port, --metrics-port."
        )
    return ServingError("The container does not start.", why=said, hint="`builder doctor` looks for the reason.")


def _copy(lines: Iterator[bytes], log: Path, follow: bool) -> None:
    """The container's output to a file, and to stderr where that is asked for; until it ends."""

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
            what = "is not ready in time" if running else "ended before it was ready"
            time.sleep(0.5)  # its last words
            why = "\n".join(reasons(server.log.read_text(encoding="utf-8", errors="replace")))
            raise ServingError(
                f"The server in the container {what}.",
                why=why or process.tail(server.log),
                hint=f"The whole log: {server.log}",
            )
        if answers_ok(server.http_url, paths[0]):
            paths.pop(0)
        else:
            time.sleep(0.1)


def _remove(container: Any) -> None:
    """SIGTERM, time to answer what is under way, then whatever is left by force."""
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
