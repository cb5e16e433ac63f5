"""trtllm-build's log: its phases, its memory, and for each known failure the cause and the hint, by the whole path."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from builder.checkpoint.layouts import Checkpoint
from builder.cli import main
from builder.core.errors import StageError
from builder.trtllm import build_log
from tests.trtllm.test_engine import build, checkpoint, stand_in

__all__ = ["checkpoint", "stand_in"]  # fixtures

STAMP = "[11/21/2026-10:00:00]"
TLLM = "[TensorRT-LLM][ERROR] Assertion failed:"
SRC = "/src/tensorrt_llm/cpp/tensorrt_llm"
# What the log says, in upstream's words; the sources are in the table.
FAILURES = {
    "unknown-flag": "trtllm-build: error: unrecognized arguments: --exclude_modules lm_head",
    "flag-choice": "trtllm-build: error: argument --gemm_plugin: invalid choice: 'fp4' (choose from 'auto', 'nvfp4')",
    "disk-full": f"{STAMP} [TRT-LLM] [I] Serializing engine to /e/rank0.engine...\n"
    "OSError: [Errno 28] No space left on device",
    "timing-cache": "PermissionError: [Errno 13] Permission denied: 'model.cache'",
    "libmpi": "ImportError: libmpi.so.40: cannot open shared object file: No such file or directory",
    "no-gpu": "ValueError: max_workers must be greater than 0",
    "rank-file": '  File "modeling_utils.py", line 1, in from_checkpoint\n    assert os.path.isfile(weights_path)\n'
    "AssertionError",
    "world-size": f"RuntimeError: {TLLM} MPI size 1 != TP size 2 * PP size 1 * CP Size 1 ({SRC}/worldConfig.cpp:99)",
    "architecture-name": "    model_cls = MODEL_MAP[config['architecture']]\nKeyError: 'Qwen9ForCausalLM'",
    "quant-algo": "    assert quant_algo is None or quant_algo in QUANT_ALGO_LIST\nAssertionError",
    "config-key": "TypeError: QuantConfig.__init__() got an unexpected keyword argument 'block_size'",
    "tensors": "RuntimeError: Required but not provided tensors:{'transformer.layers.0.mlp.fc.alpha'}",
    "sm-of-tensorrt": f"{STAMP} [TRT] [E] IBuilder::buildSerializedNetwork: Error Code 9: API Usage Error "
    "(Target GPU SM 121 is not supported by this TensorRT release.)",
    "unsupported-architecture": f"{TLLM} Unsupported architecture "
    f"({SRC}/kernels/contextFusedMultiHeadAttention/fmhaRunner.cpp:89)",
    "fp8-fmha": f"{TLLM} FP8 FMHA cannot be enabled except on Ada or Hopper or Blackwell Arch. (attentionOp.cpp:1)",
    "k-alignment": f"{TLLM} K dim should be aligned to 16 Bytes ({SRC}/plugins/fp4GemmPlugin/fp4GemmPlugin.cpp:1)",
    "fp4-gemm": "RuntimeError: [TensorRT-LLM Error][FP4 gemm Runner] Failed to initialize cutlass FP4 gemm. Error: "
    "Error Internal no error",
    "nvfp4-without-plugin": "AssertionError: UB with nvfp4 model must use nvfp4 gemm plugin",
    "fp4-lora": "AssertionError: lora is not supported on FP4Linear now",
    "gpu-memory": f"{STAMP} [TRT] [E] [virtualMemoryBuffer.cpp::resizePhysical::151] Error Code 2: OutOfMemory "
    "(Requested size was 16654532608 bytes.)\n"
    f"{STAMP} [TRT] [E] IBuilder::buildSerializedNetwork: Error Code 10: Internal Error (Could not find any "
    "implementation for node {ForeignNode[a...b]}.)\n"
    f"{STAMP} [TRT-LLM] [E] Engine building failed, please check the error log.",
    "host-memory": "concurrent.futures.process.BrokenProcessPool: A process in the process pool was terminated "
    "abruptly while the future was running or pending.",
    "fmha-kernel": f"{TLLM} FMHA kernels are not found with these parameters:\n  S                     : 0\n"
    "  D                     : 256",
    "no-implementation": f"{STAMP} [TRT] [E] IBuilder::buildSerializedNetwork: Error Code 10: Internal Error (Could "
    "not find any implementation for node {ForeignNode[Qwen3ForCausalLM/transformer/layers/0/mlp/x...y]}.)",
}
KNOWN = {known.name: known for known in build_log.known_errors()}


def test_every_entry_of_the_table_has_its_message_here() -> None:
    assert list(FAILURES) == list(KNOWN)
    assert all(known.why and known.hint and known.source for known in KNOWN.values())


@pytest.mark.parametrize("name", FAILURES)
def test_a_known_failure_shows_its_cause_and_its_cure(
    name: str, stand_in: None, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN", "says")
    monkeypatch.setenv("STAND_IN_SAYS", FAILURES[name])
    with pytest.raises(StageError, match="trtllm-build exited with code 1") as caught:
        build(checkpoint, "sm120", tmp_path / "out")
    assert caught.value.exit_code == 1
    assert caught.value.why.startswith(f"{KNOWN[name].why} ({KNOWN[name].source})")
    assert FAILURES[name].splitlines()[-1] in caught.value.why  # the last lines
    assert caught.value.hint.startswith(KNOWN[name].hint)
    assert str(tmp_path / "out" / "logs") in caught.value.hint  # the whole log
    assert not list((tmp_path / "out" / "engine").iterdir())


def test_the_kernel_that_ends_it_is_known_too(
    stand_in: None, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN", "killed")
    with pytest.raises(StageError, match="was killed by SIGKILL") as caught:
        build(checkpoint, "sm120", tmp_path / "out")
    assert KNOWN["host-memory"].hint in caught.value.hint


def test_the_cause_is_found_far_above_the_end(
    stand_in: None, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After it upstream lists every kernel that it has."""
    monkeypatch.setenv("STAND_IN", "says")
    monkeypatch.setenv("STAND_IN_SAYS", FAILURES["fmha-kernel"] + "\n  Meta[0]:\n    S : 0" * 2000)
    with pytest.raises(StageError) as caught:
        build(checkpoint, "sm120", tmp_path / "out")
    assert caught.value.why.startswith(KNOWN["fmha-kernel"].why)
    assert len(caught.value.why.splitlines()) < 20


def test_an_unknown_failure_shows_the_last_lines_alone(
    stand_in: None, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN", "says")
    monkeypatch.setenv("STAND_IN_SAYS", "RuntimeError: nobody has seen this before")
    with pytest.raises(StageError) as caught:
        build(checkpoint, "sm120", tmp_path / "out")
    assert caught.value.why.endswith("RuntimeError: nobody has seen this before")
    assert caught.value.hint.startswith("The full log: ")


WARNINGS = f"""
{STAMP} [TRT] [W] Requested amount of GPU memory (24793579520 bytes) could not be allocated.
{STAMP} [TRT] [W] UNSUPPORTED_STATE: Skipping tactic 2 due to insufficient memory on requested size of 33555480576
[TensorRT-LLM][WARNING] FMHA kernels are not found with these parameters:
[TensorRT-LLM][WARNING] Fall back to unfused MHA for data_type = bf16, head_size = 256 in sm_120.
{STAMP} [TRT-LLM] [W] Invalid timing cache, using freshly created one
{STAMP} [TRT-LLM] [W] Context FMHA is disabled, FP8 Context FMHA and Paged Context FMHA are disabled.
{STAMP} [TRT-LLM] [I] NVFP4 quantization detected, by default enabling NVFP4 GEMM plugin.
"""


def test_what_a_good_build_warns_of_is_no_cause() -> None:
    assert build_log.diagnose(WARNINGS) is None


def test_cures_name_only_flags_that_exist() -> None:
    commands = next(action for action in main.parser()._actions if action.dest == "command").choices or {}
    known = {option for command in commands.values() for action in command._actions for option in action.option_strings}
    for entry in KNOWN.values():
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", entry.hint)) <= known, entry.name


def ticking() -> Iterator[float]:
    now = 0.0
    while True:
        yield now
        now += 1.0


def test_phases_of_two_ranks_one_after_the_other() -> None:
    shown: list[tuple[str, float]] = []
    clock = ticking()
    log = build_log.BuildLog(2, lambda *phase: shown.append(phase), clock=lambda: next(clock))
    rank = [
        "[I] Total time of constructing network from module object 2.79 seconds",
        "[I] Build TensorRT engine Unnamed Network 0",
        "[TRT] [I] [MemUsageStats] Peak memory usage of TRT CPU/GPU memory allocators: CPU 4 MiB, GPU 70725 MiB",
        "[I] Total time of building Unnamed Network 0: 00:00:52",
        "[I] Serializing engine to /e/rank0.engine...",
        "[I] Engine serialized. Total time: 00:00:25",
    ]
    for line in [
        "[TensorRT-LLM] TensorRT LLM version: 1.2.1",
        *rank,
        *rank,
        "[I] Total time of building all engines: 1",
    ]:
        log.read_line(line)
    log.end()
    assert log.peak_gpu_memory == 70725 << 20
    assert [phase for phase, _ in shown].count("building the TensorRT engine") == 2
    assert shown[-1][0] == "finishing"
    assert [after for _, after in shown] == sorted(after for _, after in shown)
    assert log.phases["building the TensorRT engine"] == 2.0
    assert "building the TensorRT engine 2.0s" in log.summary()
    assert log.summary().endswith("74.16 GB of GPU memory at most")
    assert sum(log.phases.values()) == next(clock) - 1.0  # not a moment is lost, or counted twice
