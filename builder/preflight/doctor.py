"""`builder doctor`: checks this machine or container before anything starts. Each check has a result and a hint."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from builder.core import paths, supervisor
from builder.core.environment import child_environment
from builder.core.errors import BuilderError, UnsupportedError
from builder.core.output import Output, size
from builder.llmapi import launch as llmapi_launch
from builder.llmapi import notes as llmapi_notes
from builder.llmapi import versions as llmapi_versions
from builder.machine import containers, gpus
from builder.machine.containers import Container
from builder.machine.gpus import GpuProfile, Seen
from builder.recipe.target_facts import ENGINE, TargetFacts, target_facts
from builder.trtllm import compatibility

INSIDE = "BUILDER_CONTAINER"  # set by our Dockerfile
SHM = Path(supervisor.SHM)
TOOLKIT = "https://docs.nvidia.com/datacenter/cloud-native/container-toolkit"


@dataclass(frozen=True)
class Check:
    """The result of one check.

    seen: what was found. needed: what is required. hint: what to type or install if the state is not ok. A build in the
    container does not start with a `failed` check.
    """

    name: str
    state: Literal["ok", "warning", "failed"]
    seen: str
    needed: str = ""
    hint: str = ""


def examine(gpu: GpuProfile | None, tensorrt_llm: str, output: Path, *, target: str | None = None) -> list[Check]:
    """The checks that apply to this machine, in the order of the table.

    gpu: the profile to build for; None: any card in this machine. target: the profile's own by default.
    """
    facts = target_facts(target or (gpu.target if gpu else ENGINE.name))
    inside = bool(os.environ.get(INSIDE))
    found = [Check("place", "ok", "in a container" if inside else "on the host")]
    if facts.needs_gpu:
        # The LLM API also runs on versions that no Triton image has.
        known = [row for row in containers.rows() if row.tensorrt_llm == tensorrt_llm]
        row = (
            known[0]
            if known and not facts.has_engine
            else containers.newest(tensorrt_llm)
            if facts.builds_tensorrt
            else None
        )
        cards = gpus.visible()
        found.append(_gpu(gpu, cards, inside))
        if row and cards:
            found += _driver(row, cards[0].driver)
        if inside or shutil.which("trtllm-build"):
            found += [*(_versions(row, facts) if row else ()), _shm(), *_limits()]
            found += [_openai(), *_mpi()] if facts.python_model else []
        else:
            found += _docker(row)
        if facts.python_model:
            found.append(Check("ranks", "ok", llmapi_notes.STARTED, llmapi_notes.DISPUTED))
    return [*found, _kernels(), _disk(output), *_writable(output, inside)]


def require(gpu: GpuProfile, tensorrt_llm: str, output: Path, *, target: str | None = None) -> None:
    """UnsupportedError that lists all failed checks with their hints."""
    failed = [check for check in examine(gpu, tensorrt_llm, output, target=target) if check.state == "failed"]
    if failed:
        where = "container" if os.environ.get(INSIDE) else "machine"
        raise UnsupportedError(
            f"This {where} can't build for {gpu.name}; nothing was started.",
            why="\n".join(f"{c.name}: {c.seen}" + (f" (needed: {c.needed})" if c.needed else "") for c in failed),
            hint="\n".join(dict.fromkeys(check.hint for check in failed)),
        )


def show(checks: Sequence[Check], row: Container, out: Output) -> bool:
    """Prints the checks as a table, or one object with --json. Returns whether no check failed."""
    passed = all(check.state != "failed" for check in checks)
    out.table("doctor", ["state", "check", "seen", "needed"], [(c.state, c.name, c.seen, c.needed) for c in checks])
    out.result({"passed": passed, "image": asdict(row), "checks": [asdict(check) for check in checks]})
    for check in checks:
        if check.state == "warning":
            out.warn(f"{check.name}: {check.hint}")
        elif check.state == "failed":
            out.stage("failed", f"{check.name}: {check.hint}")
    return passed


def _gpu(gpu: GpuProfile | None, cards: Sequence[Seen] | None, inside: bool) -> Check:
    """The first GPU counts: the engine is built on it, for it."""
    needed = f"a card of profile {gpu.name}: {gpu.title}" if gpu else "an NVIDIA GPU"
    if cards is None:
        hint = "Choose the GPU to build on: CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES=INDEX"
        return Check("GPU", "warning", "several different GPUs, or MIG slices", needed, hint)
    if not cards:
        hint = "Install NVIDIA's driver, so that `nvidia-smi` lists the card; or build for the CPU: --gpu cpu"
        if inside:
            hint = (
                "Give the container the GPU: docker-compose.yml without compose.cpu.yml, on a machine with NVIDIA's "
                f"container toolkit ({TOOLKIT}); or build for the CPU: --gpu cpu"
            )
        return Check("GPU", "failed", "no NVIDIA GPU is visible", needed, hint)
    seen = ", ".join(f"{card.name} (sm{card.sm})" for card in cards)
    if gpu and gpu.sm != cards[0].sm:
        return Check("GPU", "failed", seen, needed, f"Build for the card in this machine: --gpu sm{cards[0].sm}")
    return Check("GPU", "ok", seen, needed)


def _driver(row: Container, seen: str) -> Iterator[Check]:
    if row.driver is None or row.cuda is None:
        return
    wanted, floor = row.driver, containers.driver_floor(row.cuda)
    needed = f"{wanted} or later (CUDA {row.cuda})"
    older = next((r for r in containers.rows() if r.driver and _fits(seen, r.driver)), None)
    other = f" Or take an image for this driver: TensorRT-LLM {older.tensorrt_llm}, {older.image}." if older else ""
    if _fits(seen, wanted):
        yield Check("driver", "ok", seen, needed)
    elif floor and _fits(seen, floor):
        hint = f"Drivers from {floor} run this CUDA version with limits. Install {wanted} or later.{other}"
        yield Check("driver", "warning", seen, needed, hint)
    else:
        yield Check("driver", "failed", seen, needed, f"Install NVIDIA's driver {wanted} or later.{other}")


def _fits(driver: str, wanted: str) -> bool:
    return containers.numbers(driver) >= containers.numbers(wanted)


def _versions(row: Container, target: TargetFacts) -> Iterator[Check]:
    """Compares the installed versions with those of the image. An engine runs only on the version that built it."""
    wanted = {"tensorrt_llm": row.tensorrt_llm, "tensorrt": row.tensorrt, "nvidia-modelopt": row.modelopt}
    hint = f"Build the image on {row.image} (docker compose build build)"
    for name, version in wanted.items():
        seen = compatibility.installed(name) or "absent"
        state: Literal["ok", "warning", "failed"] = "ok"
        if version and seen != version:
            state = "failed" if name == "tensorrt_llm" else "warning"
        yield Check(name, state, seen, version or "", hint if state != "ok" else "")
    if target.builds_tensorrt:
        path = shutil.which("trtllm-build")
        yield Check("trtllm-build", "ok" if path else "failed", path or "not on the PATH", "on the PATH", hint)


def _openai() -> Check:
    """Whether TensorRT-LLM can be imported with the openai package that a server's processes would use."""
    overlay, variables = os.environ.get(llmapi_launch.OVERLAY, ""), dict(os.environ)
    seen = compatibility.installed("openai") or "absent"
    wrong = llmapi_launch.import_error(variables)
    if wrong and overlay:
        seen += f", and another version for the llmapi target in {overlay}"
        wrong = llmapi_launch.import_error(llmapi_launch.with_overlay(variables, overlay))
    hint = llmapi_launch.CURE if wrong else ""
    return Check("openai", "failed" if wrong else "ok", wrong or seen, "a version that TensorRT-LLM can import", hint)


def _mpi() -> Iterator[Check]:
    """The programs that start several ranks, and versions of Open MPI that cannot spawn processes."""
    for name in ("mpirun", llmapi_launch.WRAPPER):
        path = shutil.which(name)
        hint = "Serve in NVIDIA's Triton image with TensorRT-LLM, which contains it. One rank does not need it."
        yield Check(
            name,
            "ok" if path else "warning",
            path or "not on the PATH",
            "on the PATH, for more than one rank",
            "" if path else hint,
        )
    version, bad = _open_mpi(), llmapi_versions.read()["open_mpi_without_spawn"]
    if version in bad:
        hint = f"Use an image with another Open MPI version, or try {llmapi_launch.ALWAYS}=1 builder serve"
        yield Check("Open MPI", "warning", f"{version}, which can't spawn processes", f"not {', '.join(bad)}", hint)
    elif version:
        yield Check("Open MPI", "ok", version)


def _open_mpi() -> str:
    """The version of mpirun's Open MPI, "" if there is none."""
    try:
        done = subprocess.run(["mpirun", "--version"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    found = re.search(r"\(Open MPI\) (\S+)", done.stdout)
    return found[1] if found else ""


def _shm() -> Check:
    needed = containers.needs().shm_bytes
    seen = shutil.disk_usage(SHM).total if SHM.is_dir() else 0
    hint = (
        "Give the container more shared memory: SHM_SIZE=8gb with compose, --shm-size 8g or --ipc host with docker run"
    )
    return Check("shared memory", "ok" if seen >= needed else "failed", size(seen), f"{size(needed)} in {SHM}", hint)


def _limits() -> Iterator[Check]:
    """NVIDIA asks for both limits; with less, pinning memory and building engines still work in most cases."""
    wanted = {
        "memlock": (resource.RLIMIT_MEMLOCK, None),
        "stack": (resource.RLIMIT_STACK, containers.needs().stack_bytes),
    }
    for name, (which, needed) in wanted.items():
        soft, _ = resource.getrlimit(which)
        unlimited = soft == resource.RLIM_INFINITY
        fits = unlimited or (needed is not None and soft >= needed)
        yield Check(
            f"ulimit {name}",
            "ok" if fits else "warning",
            "unlimited" if unlimited else size(soft),
            size(needed) if needed else "unlimited",
            "" if fits else f"docker run --ulimit {name}={needed or -1}; docker-compose.yml sets it (MEMLOCK)",
        )


def _docker(row: Container | None) -> Iterator[Check]:
    """On a host without trtllm-build: Docker, compose, and the toolkit that gives containers access to GPUs."""
    info = _docker_json("info", "--format", "{{json .}}")
    needed = f"running, to use {row.image}" if row else "running"
    if not info or not info.get("ServerVersion"):
        hint = "Install Docker and start it (systemctl start docker), as a user of the group docker"
        yield Check("Docker", "failed", "not running, or this user has no access", needed, hint)
        return
    yield Check("Docker", "ok", str(info["ServerVersion"]), needed)
    compose = _docker_json("compose", "version", "--format", "json") or {}
    version = compose.get("version", "")
    hint = "Install the plugin: docker-compose-plugin"
    yield Check("docker compose", "ok" if version else "failed", version or "absent", "2.24 or later", hint)
    yield from _room(info, row)
    runtimes, cdi = info.get("Runtimes") or {}, info.get("DiscoveredDevices") or []
    there = "nvidia" in runtimes or any("nvidia" in str(device) for device in cdi) or _hook()
    yield Check(
        "container toolkit",
        "ok" if there else "failed",
        "configured in Docker" if there else "not configured in Docker",
        "the nvidia runtime, its hook, or CDI devices",
        f"Install NVIDIA's container toolkit ({TOOLKIT}): nvidia-ctk runtime configure --runtime docker, "
        "then restart Docker",
    )


def _room(info: Mapping[str, Any], row: Container | None) -> Iterator[Check]:
    """Disk space for the image, if Docker's directory is on this machine. The image may be there already."""
    root = Path(info.get("DockerRootDir") or "/nowhere")
    if row and row.gb and root.is_dir():
        free = shutil.disk_usage(root).free
        state: Literal["ok", "warning"] = "ok" if free >= row.gb * 1e9 else "warning"
        hint = "Free some space (docker system prune), or set another data-root for Docker"
        yield Check("Docker's disk", state, f"{size(free)} free", f"{size(row.gb * 1e9)} for {row.image}", hint)


def _hook() -> bool:
    """Docker accepts GPU requests if this hook is on its PATH, even without the nvidia runtime."""
    return shutil.which("nvidia-container-runtime-hook") is not None


def _docker_json(*arguments: str) -> Mapping[str, Any] | None:
    if shutil.which("docker") is None:
        return None
    try:
        done = subprocess.run(
            ["docker", *arguments], env=child_environment("docker"), capture_output=True, text=True, timeout=20
        )
        found: Mapping[str, Any] = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        return None
    return found


def _kernels() -> Check:
    """What packs weights: the C extension for this CPU, or torch."""
    from builder.formats.kernels import native, packing

    try:
        chosen = packing.path()
    except BuilderError as error:
        return Check("packing kernels", "failed", " ".join(filter(None, (error.what, error.why))), hint=error.hint)
    if chosen in native.paths():
        return Check("packing kernels", "ok", f"{chosen}, compiled")
    if not native.missing():
        return Check("packing kernels", "ok", f"torch, as {packing.VARIABLE} asks")
    found = f"torch, which is slower: {native.missing()}"
    return Check("packing kernels", "warning", found, "the extension", packing.BUILD_HINT)


def _disk(output: Path) -> Check:
    needed = containers.needs().disk_bytes
    there = _nearest(output)
    free = shutil.disk_usage(there).free
    hint = "Free some space, or choose another --output. `builder plan` says what a model needs"
    return Check(
        "disk", "ok" if free >= needed else "failed", f"{size(free)} free", f"at least {size(needed)} free", hint
    )


def _writable(output: Path, inside: bool) -> Iterator[Check]:
    cache = paths.user_cache()
    hub = Path(os.environ.get("HF_HOME") or cache / "huggingface")
    uid, gid = os.getuid(), os.getgid()
    for name, path in {"artifacts": output, "Hub's cache": hub, "cache": cache, "temporary": _tmp()}.items():
        why = _refusal(path)
        hint = f"chown -R {uid}:{gid} {path}, or choose another directory"
        if inside:
            hint = f"On the host give it to uid {uid} (chown -R {uid}:{gid} DIRECTORY), or run as its owner: PUID, PGID"
        yield Check(name, "failed" if why else "ok", f"{path}: {why}" if why else str(path), "writable", hint)


def _tmp() -> Path:
    return Path(os.environ.get("TMPDIR") or "/tmp")


def _refusal(directory: Path) -> str:
    """Tries to write in the directory, or its nearest existing parent; returns why that failed, or ""."""
    try:
        with tempfile.TemporaryFile(dir=_nearest(directory)):
            return ""
    except OSError as error:
        return f"{error.strerror} for uid {os.getuid()}"


def _nearest(path: Path) -> Path:
    """The path or its nearest existing parent. Path.exists would raise below a directory that cannot be entered."""
    return next(there for there in (path.absolute(), *path.absolute().parents) if os.path.exists(there))


def profile(name: str | None) -> GpuProfile | None:
    """The named profile; for `auto` or None, that of the card in this machine, or None if no known card is found."""
    if name not in (None, "auto"):
        return gpus.named(str(name))
    try:
        return gpus.detect()
    except UnsupportedError:
        return None
