"""The three commands and the container flags, with a real Docker engine and CPU images. docker/test runs it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import docker
import pytest
import task_files
from printed_json import first_object

from builder.core import manifest
from builder.serving import container as serving_container
from builder.serving.container import OWNER, TENSORRT_LLM
from builder.triton import repository

pytestmark = pytest.mark.docker
MODEL = "tests/data/tiny-qwen3"
IMAGE = "trtllm-builder-cpu"
# A user of their own: not root, so that what belongs to whom is seen.
USER = os.getuid() or 1234
REQUESTS = Path("/var/run/trtllm-builder-engine/gpu-requests")  # docker/gpu-hook writes it
PROJECT = "trtllm-builder-test"


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    made = docker.from_env()
    yield made
    made.close()


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Compose's settings. Removes all of the project's containers and volumes at the end."""
    root = tmp_path_factory.mktemp("compose")
    for parent in (root, *root.parents[:2]):
        parent.chmod(0o755)
    artifacts = root / "artifacts"
    artifacts.mkdir()
    os.chown(artifacts, USER, USER)
    found = os.environ | {
        "COMPOSE_PROJECT_NAME": PROJECT,
        "COMPOSE_FILE": "docker-compose.yml:compose.cpu.yml",
        "COMPOSE_ANSI": "never",
        "PUID": str(USER),
        "PGID": str(USER),
        "ARTIFACTS_DIR": str(artifacts),
        "HEALTH_INTERVAL": "1s",
        "SHM_SIZE": "1gb",
        "MEMLOCK": "8388608",  # what an engine without CAP_SYS_RESOURCE can give
        "BUILDER_IMAGE": IMAGE,
    }
    found |= {f"{name}_PORT": str(port) for name, port in zip(("HTTP", "GRPC", "METRICS"), free_ports(), strict=True)}
    yield found
    subprocess.run(["docker", "compose", "--profile", "*", "down", "-v", "-t", "0"], env=found, capture_output=True)


def free_ports() -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    ports = [listener.getsockname()[1] for listener in held]
    for listener in held:
        listener.close()
    return ports


def compose(environment: dict[str, str], *argv: str, **changed: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["docker", "compose", *argv],
        env=environment | changed, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def builder(*argv: str, **changed: str) -> subprocess.CompletedProcess[str]:
    argv = (sys.executable, "-m", "builder", *argv)
    return subprocess.run(argv, env=os.environ | changed, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def built(environment: dict[str, str]) -> Path:
    """Runs `docker compose run build` once; the repository on the host."""
    model = f"{Path(MODEL).resolve()}:/models/tiny-qwen3:ro"
    done = compose(
        environment, "run", "--rm", "-T", "--volume", model, "build", "--model", "/models/tiny-qwen3",
        "--gpu", "cpu", "--calib-samples", "6", "--calib-seq-len", "64",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "16 of 16 passed" in done.stderr
    assert done.stdout.splitlines()[-1] == "next       builder serve /artifacts/models/tiny-qwen3-cpu-nvfp4"
    return Path(environment["ARTIFACTS_DIR"]) / "models" / "tiny-qwen3-cpu-nvfp4"


@pytest.fixture
def copied(built: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the repository whose facts are changed."""

    def copy(**facts: object) -> Path:
        made = tmp_path / "artifacts" / "repository" / built.resolve().name
        shutil.copytree(built.resolve(), made)
        told = json.loads((made / "manifest.json").read_text())
        told["facts"] |= facts
        unsealed = {key: value for key, value in told.items() if key != manifest.SEAL}
        (made / "manifest.json").write_text(json.dumps(manifest.seal(unsealed)))
        return made

    return copy


def gpu_requests() -> int:
    return len(REQUESTS.read_text().splitlines()) if REQUESTS.is_file() else 0


def containers(client: Any, label: str) -> list[Any]:
    found: list[Any] = client.containers.list(all=True, filters={"label": label}, ignore_removed=True)
    return found


def wait_until(what: Callable[[], object], patience: float = 120.0) -> None:
    deadline = time.monotonic() + patience
    while not what():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def test_the_image_is_labelled_and_runs_as_an_ordinary_user(client: Any) -> None:
    image = client.images.get(IMAGE)
    assert image.attrs["Config"]["User"] == "1000:1000"
    for name in ("version", "revision", "source", "licenses"):
        assert image.labels[f"org.opencontainers.image.{name}"]
    assert image.labels[TENSORRT_LLM] == "none"
    history = json.dumps(client.api.history(IMAGE))
    assert "TOKEN" not in history
    found = client.containers.run(IMAGE, ["-c", "command -v gcc cc g++ make || true"], entrypoint="sh", remove=True)
    assert found == b""


def test_the_artifacts_belong_to_the_caller(built: Path, environment: dict[str, str]) -> None:
    root = Path(environment["ARTIFACTS_DIR"])
    assert built.resolve().is_dir()
    assert {(path.lstat().st_uid, path.lstat().st_gid) for path in root.rglob("*")} == {(USER, USER)}


def test_what_it_cost_is_measured_on_what_was_built(built: Path, environment: dict[str, str], tmp_path: Path) -> None:
    """On texts and by tasks: lm-eval is in the image, and writes only to its volumes."""
    task_files.write(tmp_path, documents=4, seen_as=Path("/tasks"))
    for path in (tmp_path, *tmp_path.iterdir()):
        path.chmod(0o755)
    mounts = [f"{Path(MODEL).resolve()}:/models/tiny-qwen3:ro", f"{Path('tests/data/eval').resolve()}:/texts:ro"]
    mounts.append(f"{tmp_path}:/tasks:ro")
    done = compose(
        environment, "run", "--rm", "-T", *(word for mount in mounts for word in ("--volume", mount)), "eval",
        "--model", "/models/tiny-qwen3", "--gpu", "cpu", "--calib-samples", "6", "--calib-seq-len", "64",
        "--data", "/texts/prose.jsonl", "--set", "evaluation.texts=4", "--json",
        "--tasks", "follows,next_word", "--task-dir", "/tasks",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "checkpoint  found" in done.stderr  # nothing is calibrated again
    told = json.loads(done.stdout)
    assert set(told["measured"]) == {"bf16", "checkpoint"}
    asked = [(row["runner"], row["task"]) for row in told["tasks"]["rows"]]
    assert asked == [(runner, task) for runner in ("bf16", "checkpoint") for task in ("follows", "next_word")]


def test_a_gpu_that_is_not_there_is_said_by_the_doctor(environment: dict[str, str], client: Any) -> None:
    """With the compose file as it is, GPU reservation included. docker/gpu-hook lets it start on our own engine."""
    before = gpu_requests()
    argv = ["run", "--rm", "-T", "build", "--model", "Qwen/Qwen3-8B", "--gpu", "sm120"]
    done = compose(environment, *argv, COMPOSE_FILE="docker-compose.yml")
    if "could not select device driver" in done.stderr:
        assert done.returncode != 0  # the engine's own word: it has neither hook nor runtime
        return
    assert done.returncode == 3, done.stderr
    assert "This container can't build for sm120; nothing was started." in done.stderr
    assert "GPU: no NVIDIA GPU is visible" in done.stderr
    assert "Traceback" not in done.stderr
    assert gpu_requests() == before + 1
    assert not [path for path in Path(environment["ARTIFACTS_DIR"]).glob("snapshot/*") if "Qwen3-8B" in path.name]


def test_the_reservation_reaches_the_engine(environment: dict[str, str], built: Path, client: Any) -> None:
    done = compose(environment, "create", "--no-build", "triton", COMPOSE_FILE="docker-compose.yml")
    assert done.returncode == 0, done.stderr
    [container] = containers(client, f"com.docker.compose.project={PROJECT}")
    host = container.attrs["HostConfig"]
    container.remove(force=True)
    [request] = host["DeviceRequests"]
    assert (request["Driver"], request["Count"], request["Capabilities"]) == ("nvidia", -1, [["gpu"]])
    assert {limit["Name"] for limit in host["Ulimits"]} == {"memlock", "stack"}


def test_bad_input_gets_its_exit_code_and_one_message(environment: dict[str, str], tmp_path: Path) -> None:
    run = ["run", "--rm", "-T", "build", "--gpu", "cpu", "--model"]
    absent = compose(environment, *run, "/models/absent/")
    assert (absent.returncode, "There is no directory '/models/absent" in absent.stderr) == (2, True), absent.stderr
    missing = compose(environment, *run, "a/b", ARTIFACTS_DIR=str(tmp_path / "missing"))
    assert missing.returncode == 1
    assert f"bind source path does not exist: {tmp_path / 'missing'}" in missing.stderr
    assert not (tmp_path / "missing").exists()
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    unwritable = compose(environment, *run, "a/b", ARTIFACTS_DIR=str(closed))
    assert unwritable.returncode == 3, unwritable.stderr
    assert "artifacts: /artifacts: Permission denied for uid" in unwritable.stderr
    assert "PUID, PGID" in unwritable.stderr


def test_triton_is_served_hardened_and_smoked(environment: dict[str, str], built: Path, client: Any) -> None:
    up = compose(environment, "up", "-d", "--wait", "triton")
    assert up.returncode == 0, up.stderr + compose(environment, "logs", "triton").stdout
    [container] = containers(client, f"com.docker.compose.project={PROJECT}")
    host = container.attrs["HostConfig"]
    assert (host["ReadonlyRootfs"], host["CapDrop"], host["DeviceRequests"]) == (True, ["ALL"], None)
    assert container.attrs["Config"]["User"] == f"{USER}:{USER}"
    assert {b["HostIp"] for bound in host["PortBindings"].values() for b in bound} == {"127.0.0.1"}
    assert container.exec_run(["sh", "-c", "touch /usr/x /artifacts/x"]).exit_code != 0
    assert "Started HTTPService" in compose(environment, "logs", "triton").stdout

    smoke = compose(environment, "run", "--rm", "-T", "smoke")
    assert smoke.returncode == 0, smoke.stderr
    assert "16 of 16 passed" in smoke.stderr
    other = compose(environment, "run", "--rm", "-T", "--no-deps", "smoke", MODEL_REPOSITORY="other")
    assert (other.returncode, "It contains tiny-qwen3-cpu-nvfp4." in other.stderr) == (2, True), other.stderr

    occupied = compose(environment, "up", "-d", "triton", COMPOSE_PROJECT_NAME=f"{PROJECT}-2")
    assert occupied.returncode == 1
    assert "port is already allocated" in occupied.stderr
    compose(environment, "down", "-v", "-t", "0", COMPOSE_PROJECT_NAME=f"{PROJECT}-2")


def start(built: Path, *argv: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "builder", "serve", "--container", "--image", IMAGE, str(built), "--json", *argv]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_kill_leaves_no_container(built: Path, client: Any) -> None:
    child = start(built)
    where = first_object(child)
    body = json.dumps({"text_input": "Return the number of", "max_tokens": 8}).encode()
    with urllib.request.urlopen(f"http://{where['http']}/v2/models/ensemble/generate", body, timeout=60) as answer:
        assert json.load(answer)["text_output"]
    [container] = containers(client, OWNER)
    assert container.short_id == where["pid"]
    assert not containers(client, "com.docker.compose.project=trtllm-builder")
    child.kill()
    _, log = child.communicate(timeout=60)
    assert "Started HTTPService" in log  # the server's own words came to us
    wait_until(lambda: not containers(client, OWNER))


def test_a_stop_signal_leaves_no_container_nor_one_of_a_builder_that_is_gone(built: Path, client: Any) -> None:
    """The signal arrives while the server starts."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    client.containers.create(IMAGE, labels={OWNER: f"{serving_container._place()}/{gone.pid}.1"})
    child = start(built)
    wait_until(lambda: [container.status for container in containers(client, OWNER)] == ["running"])
    child.send_signal(signal.SIGTERM)
    _, log = child.communicate(timeout=120)
    assert (child.returncode, "interrupted" in log) == (130, True), log
    assert not containers(client, OWNER)


def test_smoke_in_a_container_that_is_not_there_or_not_ours(built: Path, client: Any) -> None:
    absent = builder("smoke", "--container", "--image", "no-such-image", str(built))
    assert (absent.returncode, "The image no-such-image is not on this machine." in absent.stderr) == (2, True)
    foreign = builder("smoke", "--container", "--image", "trtllm-builder-base-cpu", str(built))
    assert (foreign.returncode, "was not made by this project's Dockerfile" in foreign.stderr) == (2, True)


def test_an_occupied_port_is_said_before_anything_starts(built: Path, client: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = builder("serve", "--container", "--image", IMAGE, "--http-port", str(port), str(built))
    assert (done.returncode, f"Can't listen on 127.0.0.1:{port}." in done.stderr) == (5, True), done.stderr
    assert not containers(client, OWNER)


def test_an_engine_needs_an_image_of_its_version_and_a_gpu(
    copied: Callable[..., Path], client: Any, tmp_path: Path
) -> None:
    engine = copied(target="engine")
    version = repository.open_repository(engine).facts["tensorrt_llm"]
    wrong = builder("serve", "--container", "--image", IMAGE, str(engine))
    assert wrong.returncode == 6, wrong.stderr
    assert f"has TensorRT-LLM none, but the engine was built by {version}" in wrong.stderr

    (tmp_path / "Dockerfile").write_text(f'FROM {IMAGE}\nLABEL {TENSORRT_LLM}="{version}"\nENTRYPOINT ["true"]\n')
    subprocess.run(["docker", "build", "-q", "-t", f"{IMAGE}-as-{version}", tmp_path], check=True, capture_output=True)
    before = gpu_requests()
    done = builder("serve", "--container", "--image", f"{IMAGE}-as-{version}", str(engine), MEMLOCK="8388608")
    client.images.remove(f"{IMAGE}-as-{version}")
    if gpu_requests() == before:
        assert (done.returncode, "cannot give the container a GPU" in done.stderr) == (3, True), done.stderr
    else:
        assert (done.returncode, "ended before it was ready" in done.stderr) == (5, True), done.stderr
    assert not containers(client, OWNER)


def test_nothing_is_left(environment: dict[str, str], client: Any) -> None:
    assert compose(environment, "--profile", "*", "down", "-v", "-t", "0").returncode == 0
    assert not containers(client, f"com.docker.compose.project={PROJECT}")
    assert not containers(client, OWNER)
    assert not client.networks.list(filters={"label": f"com.docker.compose.project={PROJECT}"})
    assert not client.volumes.list(filters={"label": f"com.docker.compose.project={PROJECT}"})
