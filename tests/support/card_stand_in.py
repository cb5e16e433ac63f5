"""Stand-ins for a machine with an NVIDIA card and TensorRT-LLM: NVML, the installed versions, and a trtllm-build.

`machine` writes them into a directory; with PATH and PYTHONPATH set to it a process sees that card. Run as a program
this file is the trtllm-build: tests/support/trtllm_build_stand_in.py. CARD is a list of
[conditions, deed]: the deed of the first whose conditions hold, flags of the command line or head_size. Its deeds are
what upstream does: `unfused` and `no tactic` warn and build (rule R44; gemmPluginProfiler.cpp@c85e8726), `assert` is a
failed check of the C++ side, which ends in SIGABRT, `fail` an exit code 1, `oom`, `segv`, `slow`, `empty`. CALLS is a
file that gets a line for each call.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from itertools import pairwise
from pathlib import Path

NVML = """
NVML_ERROR_LIBRARY_NOT_FOUND, NVML_ERROR_DRIVER_NOT_LOADED = 12, 9
class NVMLError(Exception): value = NVML_ERROR_LIBRARY_NOT_FOUND
def nvmlInit():
    if not {capability}: raise NVMLError("NVML Shared Library Not Found")
nvmlDeviceGetCount = lambda: 1
nvmlDeviceGetUUID = lambda handle: "GPU-0"
nvmlShutdown = lambda: None
nvmlDeviceGetHandleByIndex = lambda index: index
nvmlDeviceGetCudaComputeCapability = lambda handle: {capability}
nvmlDeviceGetName = lambda handle: {name!r}
class nvmlDeviceGetMemoryInfo:
    def __init__(self, handle): self.total = {memory}
nvmlSystemGetDriverVersion = lambda: "590.44.01"
"""


def machine(
    directory: Path,
    *,
    capability: tuple[int, int] | None = (12, 0),
    name: str = "NVIDIA GeForce RTX 5090",
    tensorrt_llm: str | None = "1.2.1",
    tensorrt: str | None = "10.14.1.48",
    build: bool = True,
    memory: int = 34_190_917_632,
) -> dict[str, str]:
    """The environment of a process on such a machine; without a capability, it has no GPU. CALLS: directory/calls."""
    programs, libraries = directory / "bin", directory / "site"
    programs.mkdir(parents=True)
    libraries.mkdir()
    (libraries / "pynvml.py").write_text(NVML.format(capability=capability, name=name, memory=memory))
    for package, version in (("tensorrt_llm", tensorrt_llm), ("tensorrt", tensorrt)):
        if version:
            facts = libraries / f"{package}-{version}.dist-info"
            facts.mkdir()
            (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    if build:
        script = programs / "trtllm-build"
        script.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).absolute()} "$@"\n')
        script.chmod(0o755)
    root = str(Path(__file__).absolute().parents[2])
    inherited = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([str(libraries), root, *([inherited] if inherited else [])])
    return {
        **os.environ,
        "PATH": f"{programs}:/usr/bin:/bin",
        "PYTHONPATH": path,
        "CALLS": str(directory / "calls"),
    }


def main() -> int | str:
    words = sys.argv[1:]
    flags = {name.removeprefix("--"): value for name, value in pairwise(words)}
    config = json.loads((Path(flags["checkpoint_dir"]) / "config.json").read_text())
    flags["head_size"] = config["head_size"]
    with open(os.environ["CALLS"], "a") as calls:
        calls.write(json.dumps({**flags, "kv": config["quantization"]["kv_cache_quant_algo"]}) + "\n")
    told = json.loads(os.environ.get("CARD", "[]"))
    deed = next((deed for when, deed in told if all(flags.get(k) == v for k, v in when.items())), "build")
    heard = os.environ.get("TLLM_LOG_LEVEL", "INFO") != "ERROR"
    if deed == "unfused" and heard:
        print(
            f"[TensorRT-LLM][WARNING] Fall back to unfused MHA for headSize = {flags['head_size']} in sm_120.",
            flush=True,
        )
    if deed == "no tactic" and heard:
        print(
            "[TensorRT-LLM][WARNING] Have not found any valid GEMM config for shape (m=1, n=1024, k=512).", flush=True
        )
    if deed == "assert":
        print(
            "[TensorRT-LLM][ERROR] Assertion failed: fuse_fp4_quant only supports SM100f or SM120 devices.", flush=True
        )
        os.kill(os.getpid(), signal.SIGABRT)
    if deed == "oom":
        return "RuntimeError: [TensorRT-LLM][ERROR] CUDA runtime error in cudaMalloc: out of memory"
    if deed == "segv":
        os.kill(os.getpid(), signal.SIGSEGV)
    if deed == "fail":
        return "RuntimeError: Engine building failed, please check error log."
    if deed == "slow":
        time.sleep(120)
    if deed == "empty":
        return 0
    sys.stdout.flush()
    import trtllm_build_stand_in

    return trtllm_build_stand_in.main()


if __name__ == "__main__":
    sys.exit(main())
