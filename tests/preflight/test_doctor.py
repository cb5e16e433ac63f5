"""builder doctor: each check has what was seen, what is needed, and what to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from builder.core.errors import UnsupportedError
from builder.core.output import Output
from builder.formats.kernels import native, packing
from builder.machine import containers, gpus
from builder.machine.gpus import Seen
from builder.preflight import doctor
from builder.preflight.doctor import Check

VERSION = "1.2.1"
ROW = containers.newest(VERSION)
RTX5090 = Seen("NVIDIA GeForce RTX 5090", 12, 0, "590.48.01")


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def with_cards(monkeypatch: pytest.MonkeyPatch, *cards: Seen) -> None:
    monkeypatch.setattr(gpus, "visible", lambda: list(cards))


@pytest.mark.parametrize(
    ("driver", "state"),
    [
        ("590.44.01", "ok"),
        ("610.43.02", "ok"),
        ("590.44.00", "warning"),
        ("580.95.05", "warning"),
        ("575.57.08", "failed"),
    ],
)
def test_an_older_driver_is_warned_of_or_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, driver: str, state: str
) -> None:
    with_cards(monkeypatch, Seen("RTX", 12, 0, driver))
    found = by_name(doctor.examine(gpus.load("sm120"), VERSION, tmp_path))["driver"]
    assert (found.state, found.seen, ROW.driver in found.needed) == (state, driver, True)
    assert bool(found.hint) == (state != "ok")


def test_an_older_driver_is_told_the_newest_image_that_it_can_run() -> None:
    [check] = doctor._driver(ROW, "575.57.08")
    assert "TensorRT-LLM 1.0.0, nvcr.io/nvidia/tritonserver:25.10-trtllm-python-py3" in check.hint


def test_the_card_must_be_the_one_that_is_built_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with_cards(monkeypatch, RTX5090)
    wrong = by_name(doctor.examine(gpus.load("sm100"), VERSION, tmp_path))["GPU"]
    assert (wrong.state, wrong.seen) == ("failed", "NVIDIA GeForce RTX 5090 (sm120)")
    assert "--gpu sm120" in wrong.hint
    monkeypatch.setattr(gpus, "visible", lambda: None)
    mixed = by_name(doctor.examine(gpus.load("sm120"), VERSION, tmp_path))["GPU"]
    assert (mixed.state, "CUDA_VISIBLE_DEVICES" in mixed.hint) == ("warning", True)
    with_cards(monkeypatch, RTX5090)
    for right in (gpus.load("sm120"), gpus.load("sm120-fmha"), None):
        assert by_name(doctor.examine(right, VERSION, tmp_path))["GPU"].state == "ok"


def test_the_target_counts_not_the_profile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(doctor.INSIDE, "1")
    with_cards(monkeypatch, RTX5090)
    sm120 = gpus.load("sm120")
    assert "GPU" not in by_name(doctor.examine(sm120, VERSION, tmp_path, target="reference"))
    for version in (VERSION, "1.3.0rc22", "1.4.0"):
        found = by_name(doctor.examine(sm120, version, tmp_path, target="llmapi"))
        assert found["GPU"].state == "ok"
        assert "trtllm-build" not in found
        assert ("tensorrt_llm" in found) == (version != "1.4.0")


MPIRUN = """#!/bin/sh
echo 'mpirun (Open MPI) {version}'
"""


@pytest.mark.parametrize(("version", "state"), [("4.1.9a1", "ok"), ("5.0.10rc2", "warning")])
def test_an_open_mpi_that_spawns_nothing_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str, state: str
) -> None:
    (tmp_path / "mpirun").write_text(MPIRUN.format(version=version))
    (tmp_path / "mpirun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = by_name(list(doctor._mpi()))
    assert (found["mpirun"].state, found["mpirun"].seen) == ("ok", str(tmp_path / "mpirun"))
    assert found["trtllm-llmapi-launch"].state == "warning"
    assert (found["Open MPI"].state, version in found["Open MPI"].seen) == (state, True)
    assert ("BUILDER_LLMAPI_LAUNCH=1" in found["Open MPI"].hint) == (state == "warning")


def test_it_says_where_upstreams_documents_contradict_each_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(doctor.INSIDE, "1")
    with_cards(monkeypatch, RTX5090)
    ranks = by_name(doctor.examine(gpus.load("sm120"), VERSION, tmp_path, target="llmapi"))["ranks"]
    assert "mpirun" in ranks.seen
    assert "contradict" in ranks.needed
    assert "MPI_ERR_SPAWN" in ranks.needed
    engine = by_name(doctor.examine(gpus.load("sm120"), VERSION, tmp_path))
    assert not {"ranks", "openai", "mpirun"} & engine.keys()


def test_an_openai_that_tensorrt_llm_cannot_import_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay"
    monkeypatch.setattr(
        doctor.llmapi_launch,
        "import_error",
        lambda v: "" if str(overlay) in v.get("PYTHONPATH", "") else "ImportError: X",
    )
    monkeypatch.delenv("BUILDER_LLMAPI_OVERLAY", raising=False)
    found = doctor._openai()
    assert (found.state, found.seen) == ("failed", "ImportError: X")
    assert "openai==1.109.1" in found.hint
    monkeypatch.setenv("BUILDER_LLMAPI_OVERLAY", str(overlay))
    assert (doctor._openai().state, str(overlay) in doctor._openai().seen) == ("ok", True)


def test_a_cpu_build_needs_no_gpu_and_no_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(native, "missing", lambda: "")
    monkeypatch.setattr(native, "paths", lambda: ["baseline"])
    assert {c.state for c in doctor.examine(gpus.load("cpu"), VERSION, tmp_path)} == {"ok"}


def test_inside_a_container_its_versions_and_limits_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(doctor.INSIDE, "1")
    monkeypatch.setattr(doctor, "SHM", tmp_path / "none")
    with_cards(monkeypatch, RTX5090)
    found = by_name(doctor.examine(gpus.load("sm120"), VERSION, tmp_path))
    assert (found["tensorrt_llm"].seen, found["tensorrt_llm"].needed) == ("absent", "1.2.1")
    assert found["tensorrt_llm"].state == found["shared memory"].state == found["trtllm-build"].state == "failed"
    assert "SHM_SIZE" in found["shared memory"].hint
    assert {"ulimit memlock", "ulimit stack"} <= set(found)
    assert "Docker" not in found


def test_the_limits_are_those_of_this_process() -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_STACK, (1 << 20, 1 << 20))\n"
        "from builder.preflight import doctor; print([c.state for c in doctor._limits()])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "'warning']" in done.stdout, done.stderr


DOCKER = """#!/bin/sh
# Stands in for Docker's client: what it prints on a machine {what}.
case $1 in
  info) echo '{info}';;
  compose) echo '{{"version":"2.26.1"}}';;
esac
"""


@pytest.mark.parametrize(
    ("info", "states"),
    [
        ({"ServerVersion": "", "ServerErrors": ["Cannot connect to the Docker daemon"]}, ["failed"]),
        ({"ServerVersion": "26.1.5", "Runtimes": {"runc": {}}}, ["ok", "ok", "failed"]),
        ({"ServerVersion": "26.1.5", "Runtimes": {"runc": {}, "nvidia": {}}}, ["ok", "ok", "ok"]),
        (
            {"ServerVersion": "28.3", "Runtimes": {}, "DiscoveredDevices": [{"ID": "nvidia.com/gpu=0"}]},
            ["ok", "ok", "ok"],
        ),
    ],
)
def test_on_a_host_the_engine_and_the_toolkit_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, info: dict[str, object], states: list[str]
) -> None:
    client = tmp_path / "docker"
    client.write_text(DOCKER.format(what="like this", info=json.dumps(info)))
    client.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setattr(doctor, "_hook", lambda: False)
    found = list(doctor._docker(ROW))
    assert [check.state for check in found] == states
    assert all(check.hint for check in found if check.state == "failed")


def test_a_disk_too_small_for_the_image_is_warned_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small = SimpleNamespace(total=1, used=1, free=13 * 10**9)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: small)
    [check] = doctor._room({"DockerRootDir": str(tmp_path)}, ROW)
    assert (check.state, check.seen) == ("warning", "13.00 GB free")
    assert not list(doctor._room({}, ROW))


def test_without_docker_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    [check] = doctor._docker(ROW)
    assert (check.state, check.seen) == ("failed", "not running, or this user has no access")


UNWRITABLE = """
import os, sys
from pathlib import Path
from builder.preflight import doctor
if os.getuid() == 0:
    os.setuid(65534)  # nobody: root may write everywhere
print(doctor._refusal(Path(sys.argv[1])))
"""


def test_an_unwritable_directory_is_found_by_trying(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as closed:
        Path(closed).chmod(0o555)
        argv = [sys.executable, "-c", UNWRITABLE, f"{closed}/deeper"]
        done = subprocess.run(argv, capture_output=True, text=True)
    assert done.stdout.startswith("Permission denied for uid "), done.stderr
    assert doctor._refusal(tmp_path) == ""


def test_what_fails_is_raised_together(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(doctor.INSIDE, "1")
    with_cards(monkeypatch)
    with pytest.raises(UnsupportedError) as caught:
        doctor.require(gpus.load("sm120"), VERSION, tmp_path)
    assert "can't build for sm120" in caught.value.what
    assert "GPU: no NVIDIA GPU is visible" in caught.value.why
    assert "tensorrt_llm: absent" in caught.value.why
    assert "--gpu cpu" in caught.value.hint


@pytest.mark.parametrize(("gpu", "code"), [("cpu", 0), ("sm120", 3)])
def test_the_command(tmp_path: Path, gpu: str, code: int) -> None:
    environment = {"PATH": "/nowhere", "HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    environment |= {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
    argv = [sys.executable, "-m", "builder", "doctor", "--gpu", gpu, "--output", str(tmp_path)]
    done = subprocess.run([*argv, "--json"], capture_output=True, text=True, env=environment)
    said = json.loads(done.stdout)
    assert (done.returncode, said["passed"]) == (code, code == 0)
    assert said["image"]["triton"] == "26.07"
    people = subprocess.run(argv, capture_output=True, text=True, env=environment)
    assert people.returncode == code
    assert "ok\tdisk\t" in people.stdout


def test_a_build_in_a_container_asks_the_doctor_first(tmp_path: Path) -> None:
    environment = {**os.environ, doctor.INSIDE: "1"}
    argv = [sys.executable, "-m", "builder", "build", "--model", "no-such/model", "--gpu", "sm120"]
    done = subprocess.run([*argv, "--output", str(tmp_path)], capture_output=True, text=True, env=environment)
    assert (done.returncode, "Traceback" in done.stderr) == (3, False)
    assert "This container can't build for sm120; nothing was started." in done.stderr
    assert not any(tmp_path.iterdir())


def test_nothing_failed_is_shown_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.show([Check("a", "ok", "b"), Check("c", "warning", "d", "e", "do f")], ROW, Output("human"))
    assert "c: do f" in capsys.readouterr().err


def test_what_packs_weights_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """The C extension's instruction set, or why torch does it instead."""
    if native.paths():
        assert doctor._kernels().seen == f"{native.paths()[0]}, compiled"
    monkeypatch.setattr(native, "missing", lambda: "")
    monkeypatch.setattr(native, "paths", lambda: ["avx2", "baseline"])
    assert doctor._kernels().seen == "avx2, compiled"
    monkeypatch.setenv(packing.VARIABLE, "torch")
    assert (doctor._kernels().state, doctor._kernels().seen) == ("ok", "torch, as BUILDER_KERNELS asks")
    monkeypatch.setenv(packing.VARIABLE, "sse9")
    assert (doctor._kernels().state, "'sse9'" in doctor._kernels().seen) == ("failed", True)
    monkeypatch.delenv(packing.VARIABLE)
    monkeypatch.setattr(native, "missing", lambda: "the C extension is not compiled")
    monkeypatch.setattr(native, "paths", list)
    found = doctor._kernels()
    assert (found.state, "not compiled" in found.seen, "gcc" in found.hint) == ("warning", True, True)
    monkeypatch.setattr(packing, "find_spec", lambda name: None)
    found = doctor._kernels()
    assert (found.state, "torch is not installed" in found.seen, "gcc" in found.hint) == ("failed", True, True)
