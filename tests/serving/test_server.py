"""Starting and stopping a real Triton server: no process or shared memory is left, however it ends."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
import urllib.request
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from builder.core.errors import ServingError
from builder.core.output import Output
from builder.serving import launch
from builder.serving import server as serving
from builder.serving.launch import Addresses, Ports
from builder.serving.private_directory import prepare_backends, serving_directory
from builder.serving.readiness import reasons
from builder.serving.server import ServerOptions, serve
from builder.serving.shared_memory import SHM

QUIET = Output("quiet")
MODEL = """
import os
class TritonPythonModel:
    def initialize(self, args):
        {initialize}
    def execute(self, requests):
        raise ValueError("never called")
"""
CONFIG = 'name: "{name}" backend: "{backend}" max_batch_size: 1\ninstance_group [ {{ count: 1 kind: KIND_CPU }} ]\n'


def one_model(root: Path, initialize: str = "pass", backend: str = "python", name: str = "lonely") -> Path:
    """The smallest model repository: one Python model without inputs."""
    (root / name / "1").mkdir(parents=True)
    (root / name / "config.pbtxt").write_text(CONFIG.format(name=name, backend=backend))
    (root / name / "1" / "model.py").write_text(MODEL.format(initialize=initialize))
    return root


def stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; empty if the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def children(pid: int) -> list[int]:
    """Every process below this one."""
    everyone = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    direct = [one for one in everyone if stat(one)[1:2] == [str(pid)]]
    return direct + [below for child in direct for below in children(child)]


def alive(pid: int) -> bool:
    return stat(pid)[:1] not in ([], ["Z"])


def shared_memory(pid: int) -> list[str]:
    return [path.name for path in SHM.glob(f"builder-{pid}-*")]


def test_a_stopped_server_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    models = one_model(tmp_path / "models")
    with serve(models, out=QUIET, log=tmp_path / "log") as server:
        for url, path in ((server.http_url, "/v2/models/lonely/ready"), (server.metrics_url, "/metrics")):
            with urllib.request.urlopen(f"http://{url}{path}") as response:
                assert response.status == 200
        processes = [server.pid, *children(server.pid)]
        assert len(processes) > 1
        for pid in processes:
            assert b"hf_secret" not in Path(f"/proc/{pid}/environ").read_bytes()
        assert shared_memory(os.getpid())
        for url in (server.http_url, server.grpc_url, server.metrics_url):
            with pytest.raises(ConnectionRefusedError):  # 127.0.0.1 alone: not even this machine's other addresses
                socket.create_connection(("127.0.0.2", int(url.rpartition(":")[2]))).close()
    assert server.child.returncode == 0
    assert not any(alive(pid) for pid in processes)
    assert not shared_memory(os.getpid())
    assert not list(models.rglob("__pycache__"))


def gone(processes: list[int]) -> bool:
    """Whether all are gone within 20 seconds: a process does not die instantly on SIGKILL."""
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(alive(pid) for pid in processes)


def test_a_killed_server_leaves_nothing(tmp_path: Path) -> None:
    models = one_model(tmp_path / "models")
    with serve(models, out=QUIET, log=tmp_path / "log") as server:
        processes = children(server.pid)
        os.kill(server.pid, signal.SIGKILL)
        assert server.wait() == -signal.SIGKILL
        assert shared_memory(os.getpid())
    assert gone(processes)
    assert not shared_memory(os.getpid())


def test_the_server_does_not_outlive_the_builder(tmp_path: Path) -> None:
    """Even if the builder is killed with SIGKILL: the supervisor notices and cleans up."""
    code = f"""
        import sys, time
        from pathlib import Path
        from builder.core.output import Output
        from builder.serving.server import serve
        models, log = Path({str(one_model(tmp_path / "models"))!r}), Path({str(tmp_path / "log")!r})
        with serve(models, out=Output("quiet"), log=log):
            print("up", flush=True)
            time.sleep(60)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "up\n"
        processes = children(parent.pid)
        assert len(processes) > 1
        parent.kill()
    assert gone(processes)
    assert not shared_memory(parent.pid)


def test_a_model_that_fails_is_reported_with_its_error(tmp_path: Path) -> None:
    models = one_model(tmp_path / "models", "raise FileNotFoundError('no tokenizer here')")
    with (
        pytest.raises(ServingError, match="before it was ready") as caught,
        serve(models, out=QUIET, log=tmp_path / "log"),
    ):
        pytest.fail("it came up")
    assert caught.value.why == "lonely: Internal: FileNotFoundError: no tokenizer here"
    assert str(tmp_path / "log") in caught.value.hint
    assert not shared_memory(os.getpid())


def test_a_missing_backend_is_reported(tmp_path: Path) -> None:
    models = one_model(tmp_path / "models", backend="nothing")
    with pytest.raises(ServingError) as caught, serve(models, out=QUIET, log=tmp_path / "log"):
        pytest.fail("it came up")
    assert "unable to find backend library for backend 'nothing'" in caught.value.why


def test_a_port_in_use_is_reported_before_the_server_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(ServingError, match=f"Can't listen on 127.0.0.1:{port}") as caught,
            serve(one_model(tmp_path / "models"), out=QUIET, log=tmp_path / "log", ports=Ports(grpc=port)),
        ):
            pytest.fail("it came up")
    assert "ss -ltnp" in caught.value.hint
    assert not (tmp_path / "log").exists()


def test_serving_fails_after_the_timeout(tmp_path: Path) -> None:
    models = one_model(tmp_path / "models", "import time; time.sleep(30)")
    start = time.monotonic()
    with (
        pytest.raises(ServingError, match="not ready in time"),
        serve(models, out=QUIET, log=tmp_path / "log", options=ServerOptions(timeout=1)),
    ):
        pytest.fail("it came up")
    assert time.monotonic() - start < 15
    assert not shared_memory(os.getpid())


def test_the_log_that_an_error_names_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    models = one_model(tmp_path / "models", "import time; time.sleep(30)")
    with (
        pytest.raises(ServingError, match="not ready in time") as caught,
        serve(models, out=QUIET, options=ServerOptions(timeout=1)),
    ):
        pytest.fail("it came up")
    log = Path(caught.value.hint.removeprefix("The full log: "))
    assert "Initialize: lonely" in log.read_text()
    assert not list(log.parent.glob("*/"))


def test_a_directory_with_an_engine_file_has_an_engine(tmp_path: Path) -> None:
    models = tmp_path / "models"
    (models / "tensorrt_llm").mkdir(parents=True)
    engine = tmp_path / 'an "engine"'
    engine.mkdir()
    quoted = str(engine).replace('"', '\\"')
    (models / "tensorrt_llm" / "config.pbtxt").write_text(
        f'parameters {{ key: "gpt_model_path" value: {{ string_value: "{quoted}" }} }}'
    )
    assert not launch.has_engine(models)
    (engine / "rank0.engine").touch()
    assert launch.has_engine(models)


def test_there_is_a_server_for_each_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Started as upstream does (triton_backend/scripts/launch_triton_server.py@0a2e2c1f), but without the load API."""
    mpirun = tmp_path / "bin" / "mpirun"
    mpirun.parent.mkdir()
    mpirun.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(mpirun.parent))
    one_model(one_model(tmp_path / "models", name="tensorrt_llm"), name="other")
    with serving_directory() as place:
        place.link(tmp_path / "models")
        addresses = Addresses("127.0.0.1", 8000, 8001, 8002)
        command = launch.Command(Path("/t"), place, Path("/b"), addresses, "prefix-", 30)
        servers = [command.of_rank(rank) for rank in range(2)]
        assert command.line(tmp_path / "models", 1) == servers[0]
        assert sorted(path.name for path in place.models.iterdir()) == ["other", "tensorrt_llm"]
        assert [path.name for path in place.only("tensorrt_llm").iterdir()] == ["tensorrt_llm"]
        repositories = f"--model-repository={place.models}", f"--model-repository={place.only('tensorrt_llm')}"
    assert launch.mpi_command(servers[:1]) == servers[0]
    argv = launch.mpi_command(servers)
    assert argv[:5] == ["mpirun", "--allow-run-as-root", "-n", "1", "/t"]
    middle = argv.index(":")
    first, second = set(argv[4:middle]), set(argv[middle + 3 :])
    assert argv[middle : middle + 4] == [":", "-n", "1", "/t"]
    common = {"--http-port=8000", "--grpc-port=8001", "--metrics-port=8002", "--model-control-mode=poll"}
    assert common | {"--disable-auto-complete-config"} <= first & second
    assert "--backend-config=python,shm-region-prefix-name=prefix-0-" in first
    assert "--backend-config=python,shm-region-prefix-name=prefix-1-" in second
    assert repositories[0] in first - second
    assert repositories[1] in second - first
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ServingError, match="The engine has 2 ranks, and mpirun is not on the PATH") as caught:
        launch.mpi_command(servers)
    assert "a machine with 2 GPUs" in caught.value.hint


def test_the_number_of_ranks_is_read_from_the_engine(tmp_path: Path) -> None:
    """Two for a TensorRT engine of two ranks; one for the reference executor, whatever its rank files."""
    models, engine = tmp_path / "models", tmp_path / "engine"
    (models / "tensorrt_llm").mkdir(parents=True)
    engine.mkdir()
    (models / "tensorrt_llm" / "config.pbtxt").write_text(
        f'parameters {{ key: "gpt_model_path" value: {{ string_value: "{engine}" }} }}'
    )
    (engine / "config.json").write_text('{"pretrained_config": {"mapping": {"world_size": 2}}}')
    (engine / "rank0.safetensors").touch()
    assert launch.world_size(models) == 1
    (engine / "rank0.engine").touch()
    assert launch.world_size(models) == 2
    assert launch.world_size(tmp_path) == 1


def test_the_reference_executor_replaces_the_engine_backend(tmp_path: Path) -> None:
    """Its files are copies, because Triton rejects symbolic links, next to those of the Python backend."""
    installation = serving.find_server()
    code = launch.stand_in(installation, tmp_path, None)
    assert code is not None
    made = prepare_backends(installation, code, tmp_path / "backends")
    assert "builder.reference.backend" in (made / "tensorrtllm" / "model.py").read_text()
    assert not any(path.is_symlink() for path in made.rglob("*"))
    assert os.access(made / "python" / "triton_python_backend_stub", os.X_OK)


def test_a_server_on_the_path_takes_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in NVIDIA's container. CUDA and MPI need the environment, so it is kept, without secrets."""
    binary = tmp_path / "bin" / "tritonserver"
    utils = tmp_path / "backends" / "python" / "triton_python_backend_utils.py"
    for file in (binary, utils):
        file.parent.mkdir(parents=True)
        file.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(binary.parent), prepend=os.pathsep)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "TOKENIZERS_PARALLELISM", "OMPI_X"):
        monkeypatch.setenv(name, "x")
    found = serving.find_server()
    assert (found.binary, found.backends, found.python_backend) == (binary, tmp_path / "backends", (utils,))
    assert found.environment.keys() & {"OMPI_X", "TOKENIZERS_PARALLELISM"} == {"OMPI_X", "TOKENIZERS_PARALLELISM"}
    assert not found.environment.keys() & {"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY"}


def http_status(url: str, path: str, header: str = "any: x", body: str | None = None) -> int:
    """The status of a hand-written request: HTTP clients refuse to send the header that an attacker would try."""
    host, port = url.split(":")
    method, length = ("GET", 0) if body is None else ("POST", len(body))
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{header}\r\nContent-Length: {length}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall((head + (body or "")).encode())
        return int(connection.recv(4096).split()[1])


def raw_grpc(url: str, method: str, header: tuple[str, str]) -> bytes:
    """A hand-written call with literal HPACK headers: gRPC clients refuse to send what an attacker could."""
    headers = [(":method", "POST"), (":scheme", "http"), (":path", f"/inference.GRPCInferenceService/{method}"),
               (":authority", "x"), ("content-type", "application/grpc"), ("te", "trailers"), header]  # fmt: skip
    block = b"".join(b"\0" + bytes([len(n)]) + n.encode() + bytes([len(v)]) + v.encode() for n, v in headers)

    def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload

    host, port = url.split(":")
    answer = b""
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        start = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"")
        connection.sendall(start + frame(1, 4, 1, block) + frame(0, 1, 1, bytes(5)))
        with suppress(TimeoutError):
            while b"grpc-status" not in answer and (more := connection.recv(65536)):
                answer += more
    return answer


CLOSED_CALLS = {
    "RepositoryModelLoad": {"model_name": "lonely"},
    "RepositoryModelUnload": {"model_name": "lonely"},
    "RepositoryIndex": {},
    "LogSettings": {},
    "TraceSetting": {},
    "SystemSharedMemoryStatus": {},
    "SystemSharedMemoryRegister": {"name": "x", "key": "/x", "byte_size": 1},
}
CLOSED_PATHS = ("/v2/logging", "/v2/trace/setting", "/v2/models/lonely/trace/setting", "/v2/systemsharedmemory/status",
                "/v2/cudasharedmemory/status")  # fmt: skip
CLOSED_POSTS = ("/v2/repository/models/lonely/load", "/v2/repository/models/lonely/unload", "/v2/repository/index",
                "/v2/logging", "/v2/systemsharedmemory/region/x/register")  # fmt: skip


def test_nobody_can_load_models_or_change_the_logging(tmp_path: Path) -> None:
    """The command line contains no secret, and the header that it names opens nothing."""
    import grpc
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    with serve(one_model(tmp_path / "models"), out=QUIET, log=tmp_path / "log") as server:
        argv = [word for pid in children(server.pid) for word in Path(f"/proc/{pid}/cmdline").read_text().split("\0")]
        [header, value] = next(word for word in argv if "restricted-api" in word).rpartition("logging:")[2].split("=")
        assert not [word for word in argv if re.search("restricted.*[0-9a-f]{16}", word)]
        for given in ("any: x", f"{header}: {value}"):
            for path in CLOSED_PATHS:
                assert http_status(server.http_url, path, given) == 403
            for path in CLOSED_POSTS:
                assert http_status(server.http_url, path, given, "{}") == 403
        with grpc.insecure_channel(server.grpc_url) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            for name, fields in CLOSED_CALLS.items():
                with pytest.raises(grpc.RpcError, match="restricted"):
                    getattr(stub, name)(getattr(service_pb2, f"{name}Request")(**fields))
            assert stub.ServerReady(service_pb2.ServerReadyRequest()).ready
        prefix = "triton-grpc-protocol-"
        for name in CLOSED_CALLS:
            answer = raw_grpc(server.grpc_url, name, (prefix + header, value))
            assert b"grpc-status\x010" not in answer
            assert b"grpc-status" in answer
        assert b"grpc-status\x010" in raw_grpc(server.grpc_url, "ServerLive", ("any", "x"))
        assert http_status(server.http_url, "/v2/models/lonely/config") == 200


def test_a_model_that_never_starts_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton would wait for half an hour. Here the model's program prints an error and exits."""
    found = serving.find_server()
    stub = tmp_path / "triton_python_backend_stub"
    stub.write_text("#!/bin/sh\necho error while loading shared libraries: libpython >&2\nexit 127\n")
    broken = replace(found, python_backend=(*found.python_backend[:2], stub))
    monkeypatch.setattr(serving, "find_server", lambda: broken)
    monkeypatch.setattr(serving, "DEAD_SECONDS", 1.0)
    with (
        pytest.raises(ServingError, match="ended while it was loading") as caught,
        serve(one_model(tmp_path / "models"), out=QUIET, log=tmp_path / "log", options=ServerOptions(timeout=60)),
    ):
        pytest.fail("it came up")
    assert "error while loading shared libraries: libpython" in caught.value.why


def test_reasons_are_the_errors_without_stack_traces() -> None:
    log = r"""
I1121 server.cc:605] "something"
E1121 03:09:49.216008 1 model_lifecycle.cc:654] "failed to load 'pre' version 1: Internal: KeyError: 'x'\n\nAt:\n  /a"
E1121 03:09:49.216009 1 model_lifecycle.cc:654] "failed to load 'pre' version 1: Internal: KeyError: 'x'\n\nAt:\n  /a"
E1121 03:09:49.216010 1 main.cc:245] "failed to start GRPC service: Unavailable - Socket '127.0.0.1:1' already in use "
"""
    assert reasons(log) == [
        "pre: Internal: KeyError: 'x'",
        "failed to start GRPC service: Unavailable - Socket '127.0.0.1:1' already in use",
    ]
