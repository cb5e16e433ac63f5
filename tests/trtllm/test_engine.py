"""Checkpoint -> engine: by a stand-in for trtllm-build with its command line, and for the reference target."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from builder.checkpoint.layouts import Checkpoint
from builder.core.errors import IntegrityError, StageError, UnsupportedError
from builder.core.output import Output
from builder.core.store import Store
from builder.machine.gpus import Seen
from builder.recipe import schema
from builder.trtllm import compatibility, engine
from builder.trtllm import flags as trtllm_flags

QUIET = Output("quiet")
RTX_5090 = Seen("NVIDIA GeForce RTX 5090", 12, 0, "590.44.01")
PRETRAINED = {
    "architecture": "Qwen3ForCausalLM",
    "dtype": "bfloat16",
    "logits_dtype": "float16",
    "mapping": {"world_size": 1},
}


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An executable named trtllm-build on PATH: the stand-in beside this file."""
    script = tmp_path / "bin" / "trtllm-build"
    script.parent.mkdir()
    program = Path(__file__).parents[1] / "support" / "trtllm_build_stand_in.py"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} {program} "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    layout = tmp_path / "checkpoint" / "tensorrt_llm"
    layout.mkdir(parents=True)
    (layout / "config.json").write_text(json.dumps(PRETRAINED))
    (layout / "rank0.safetensors").write_bytes(b"tensors")
    return Checkpoint(layout.parent, "0" * 64)


def resolved(gpu: str, *sets: str) -> schema.Resolved:
    return schema.resolve({"model.id": "m", "gpu": gpu}, sets=sets)


def build(checkpoint: Checkpoint, gpu: str, root: Path, *sets: str) -> engine.Engine:
    asked = resolved(gpu, *sets)
    return engine.build(checkpoint, trtllm_flags.resolve(asked, {}), asked, store=Store(root, QUIET))


def test_trtllm_build_takes_the_resolved_command_line(stand_in: None, checkpoint: Checkpoint, tmp_path: Path) -> None:
    built = build(checkpoint, "sm120", tmp_path / "out", "engine.max_batch_size=16")
    assert built.config["version"] == "1.2.1"
    assert built.config["build_config"]["max_batch_size"] == 16
    assert built.config["build_config"]["plugin_config"]["use_paged_context_fmha"] is False
    assert built.config["pretrained_config"] == PRETRAINED
    assert (built.path / "rank0.engine").is_file()
    assert engine.timing_cache(tmp_path / "out", "1.2.1").read_bytes() == b"timing"
    command = built.artifact.facts["command"]
    assert command[command.index("--gemm_plugin") + 1] == "nvfp4"
    assert Path(built.artifact.facts["log"]).read_text().startswith("$ trtllm-build")


def built_with(built: engine.Engine) -> dict[str, object]:
    loaded: dict[str, object] = json.loads((built.path / "built_with.json").read_text())
    return loaded


def test_what_an_engine_was_built_with_lies_beside_it(
    stand_in: None, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "visible", lambda: [RTX_5090])
    found = built_with(build(checkpoint, "sm120", tmp_path / "out"))
    flags = found.pop("flags")
    assert isinstance(flags, dict)
    assert (flags["gemm_plugin"], flags["context_fmha"]) == ("nvfp4", "disable")
    assert found == {
        "target": "engine",
        "tensorrt_llm": "1.2.1",
        "tensorrt": compatibility.installed("tensorrt"),
        "sm": 120,
        "gpu": "NVIDIA GeForce RTX 5090",
        "driver": "590.44.01",
        "world_size": 1,
    }


def test_the_phases_and_the_memory_that_trtllm_build_tells(
    stand_in: None, split: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = resolved("sm120", "engine.tp=2")
    store = Store(tmp_path / "out", Output())
    facts = engine.build(split, trtllm_flags.resolve(asked, {}), asked, store=store).artifact.facts
    assert facts["peak_gpu_memory"] == 386 << 20  # the larger rank's
    assert list(facts["phases"]) == [
        "starting",
        "reading the checkpoint and constructing the network",
        "initializing the weights",
        "building the TensorRT engine",
        "saving the timing cache",
        "serializing the engine",
        "finishing",
    ]
    assert min(facts["phases"].values()) >= 0
    said = capsys.readouterr().err
    assert "404.75 MB of GPU memory at most" in said
    assert said.index("building the TensorRT engine") < said.index("serializing the engine") < said.index("finishing")


@pytest.mark.parametrize(
    ("behaviour", "error", "message"),
    [
        ("crash", StageError, "FMHA kernel not found"),
        ("empty", StageError, "did not write config.json"),
        ("hollow", StageError, "did not write config.json"),
        ("other-version", IntegrityError, "built by TensorRT-LLM 1.1.0"),
    ],
)
def test_a_failed_build_leaves_no_engine(
    stand_in: None,
    checkpoint: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    behaviour: str,
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.setenv("STAND_IN", behaviour)
    with pytest.raises(error) as caught:
        build(checkpoint, "sm120", tmp_path / "out")
    assert message in str(caught.value)
    assert not list((tmp_path / "out" / "engine").iterdir())


BUILD = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], f"{sys.argv[1]}/tests/support"]
from builder.checkpoint.layouts import Checkpoint
from tests.trtllm import test_engine
print("begin", flush=True)
test_engine.build(Checkpoint(Path(sys.argv[2]), "0" * 64), "sm120", Path(sys.argv[3]))
"""


def test_an_interrupt_reaches_trtllm_build_and_leaves_nothing(
    stand_in: None, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN", "slow")
    out = tmp_path / "out"
    argv = [sys.executable, "-c", BUILD, str(Path(__file__).parents[2]), str(checkpoint.path), str(out)]
    child = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    while not list(out.glob("engine/.*.tmp/rank0.engine")):
        assert child.poll() is None
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=20)
    assert not list((out / "engine").iterdir())


def test_the_reference_engine_is_the_checkpoint_with_the_config_of_an_engine(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    built = build(checkpoint, "cpu", tmp_path / "out")
    assert set(built.config) == {"version", "pretrained_config", "build_config"}
    assert built.config["pretrained_config"] == PRETRAINED
    assert built.config["build_config"]["plugin_config"]["gemm_plugin"] == "nvfp4"
    found = built_with(built)
    assert (found["target"], found["tensorrt_llm"], found["world_size"]) == ("reference", "1.2.1", 1)
    assert {found[name] for name in ("sm", "gpu", "driver", "tensorrt")} == {None}
    rank = built.path / "rank0.safetensors"
    assert rank.samefile(checkpoint.tensorrt_llm / "rank0.safetensors")


@pytest.fixture
def split(checkpoint: Checkpoint, tmp_path: Path) -> Checkpoint:
    """Of two ranks, as the stage before leaves it."""
    config = {**PRETRAINED, "mapping": {"world_size": 2, "tp_size": 2, "pp_size": 1}}
    (checkpoint.tensorrt_llm / "config.json").write_text(json.dumps(config))
    (checkpoint.tensorrt_llm / "rank1.safetensors").write_bytes(b"others")
    return checkpoint


def test_an_engine_of_two_ranks(stand_in: None, split: Checkpoint, tmp_path: Path) -> None:
    built = build(split, "sm120", tmp_path / "out", "engine.tp=2")
    assert built.artifact.facts["world_size"] == 2
    assert (built.path / "rank1.engine").is_file()
    command = built.artifact.facts["command"]
    assert command[command.index("--workers") + 1] == "2"
    reference = build(split, "cpu", tmp_path / "out", "engine.tp=2")
    assert reference.artifact.facts["world_size"] == 2
    assert (reference.path / "rank1.safetensors").read_bytes() == b"others"
    # rule R37: with several ranks the plugin stays, in the model's type
    assert reference.config["build_config"]["plugin_config"]["nccl_plugin"] == "bfloat16"


def test_a_rank_that_was_forgotten_is_seen(
    stand_in: None, split: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN", "one-rank")
    with pytest.raises(StageError, match=r"did not write config.json and rank0.engine to rank1.engine"):
        build(split, "sm120", tmp_path / "out", "engine.tp=2")


def test_a_machine_with_fewer_gpus_can_build_but_not_serve(stand_in: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "visible", lambda: [RTX_5090])
    engine.check_machine(resolved("sm120"))
    engine.check_machine(resolved("cpu", "engine.tp=2"))
    engine.check_machine(resolved("sm120", "engine.tp=2"), serving=False)
    with pytest.raises(UnsupportedError, match="needs 4 GPUs to be served and tested, and this machine has 1"):
        engine.check_machine(resolved("sm120", "engine.tp=2", "engine.pp=2"))


def test_an_engine_is_built_on_the_card_of_its_profile_or_not_at_all(
    stand_in: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rule R08: without a GPU trtllm-build crashes; on another card it would build another engine."""
    monkeypatch.setattr(engine, "visible", list)
    with pytest.raises(UnsupportedError, match="no GPU is visible") as caught:
        engine.check_machine(resolved("sm120"))
    assert caught.value.exit_code == 3
    engine.check_machine(resolved("cpu"))
    monkeypatch.setattr(engine, "visible", lambda: [Seen("NVIDIA B200", 10, 0, "590")])
    with pytest.raises(UnsupportedError, match="sm120 profile was asked for, and this machine's NVIDIA B200 is sm100"):
        engine.check_machine(resolved("sm120"))
    monkeypatch.setattr(engine, "visible", lambda: None)  # NVML does not say: trtllm-build will
    engine.check_machine(resolved("sm120"))


def test_a_timing_cache_that_can_not_be_written_is_seen_before_the_build(
    stand_in: None, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """In upstream's order it would be the last thing to fail."""
    engine.timing_cache(tmp_path / "out", "1.2.1").mkdir(parents=True)
    with pytest.raises(StageError, match=r"timing/.*\.cache"):
        build(checkpoint, "sm120", tmp_path / "out")
    assert not list((tmp_path / "out" / "logs").glob("*trtllm-build*"))


def test_the_timing_cache_is_kept_between_builds(stand_in: None, checkpoint: Checkpoint, tmp_path: Path) -> None:
    cache = engine.timing_cache(tmp_path / "out", "1.2.1")
    for batch in ("4", "5"):
        facts = build(checkpoint, "sm120", tmp_path / "out", f"engine.max_batch_size={batch}").artifact.facts
        for flag in ("--input_timing_cache", "--output_timing_cache"):
            assert facts["command"][facts["command"].index(flag) + 1] == str(cache)
    assert cache.read_bytes() == b"timing"


def test_other_flags_are_another_engine(checkpoint: Checkpoint, tmp_path: Path) -> None:
    one = build(checkpoint, "cpu", tmp_path / "out")
    assert build(checkpoint, "cpu", tmp_path / "out").path == one.path
    assert build(checkpoint, "cpu", tmp_path / "out", "engine.max_batch_size=4").path != one.path
    other = Checkpoint(checkpoint.path, "1" * 64)
    assert build(other, "cpu", tmp_path / "out").path != one.path


def test_without_trtllm_build_nothing_is_begun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnsupportedError, match="trtllm-build is not on this machine's PATH") as caught:
        engine.check_machine(resolved("sm120"))
    assert "--gpu cpu" in caught.value.hint
    engine.check_machine(resolved("cpu"))
