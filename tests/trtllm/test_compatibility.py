"""Engine, repository and machine are compared before anything is served: each way that they can disagree is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from builder.cli import main
from builder.core.errors import IntegrityError, UsageError
from builder.core.output import Output
from builder.core.store import Store
from builder.machine import gpus
from builder.machine.gpus import Seen
from builder.recipe import schema
from builder.serving import server
from builder.triton import repository
from builder.trtllm import compatibility
from builder.trtllm import flags as trtllm_flags
from builder.trtllm.compatibility import Runtime

SNAPSHOT = Path(__file__).parents[1] / "data" / "tiny-qwen3"
RTX_5090 = Seen("NVIDIA GeForce RTX 5090", 12, 0, "590.44.01")
B200 = Seen("NVIDIA B200", 10, 0, "590.44.01")
GOOD = Runtime([RTX_5090], "1.2.1", "10.14.1.48")
BUILT_WITH = {"target": "engine", "tensorrt_llm": "1.2.1", "tensorrt": "10.14.1.48", "sm": 120, "world_size": 1,
              "gpu": RTX_5090.name, "driver": RTX_5090.driver, "flags": {}}  # fmt: skip


def write_engine(directory: Path, *, profile: str = "sm120", world_size: int = 1, built_with: Any = BUILT_WITH) -> Path:
    """An engine as trtllm-build and the engine stage leave it for a GPU profile, but for the bytes of the engine."""
    asked = schema.resolve({"model.id": "m", "gpu": profile}, sets=["engine.max_batch_size=8"])
    pretrained = {
        "architecture": "Qwen3ForCausalLM",
        "dtype": "bfloat16",
        "logits_dtype": "float16",
        "vocab_size": 4096,
        "mapping": {"world_size": world_size},
    }
    build = trtllm_flags.build_config(trtllm_flags.load("1.2.1"), trtllm_flags.resolve(asked, {}), pretrained)
    directory.mkdir()
    config = {"version": "1.2.1", "pretrained_config": pretrained, "build_config": build}
    (directory / "config.json").write_text(json.dumps(config))
    for rank in range(world_size):
        (directory / f"rank{rank}.engine").write_bytes(b"engine")
    if built_with:
        (directory / "built_with.json").write_text(json.dumps(built_with | {"world_size": world_size}))
    return directory


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """The repository of such an engine, as a build renders it."""
    repository.write(tmp_path / "models", write_engine(tmp_path / "engine"), SNAPSHOT, schema.Repository())
    return tmp_path / "models"


def edit(models: Path, old: str, new: str, model: str = "tensorrt_llm") -> None:
    file = models / model / "config.pbtxt"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def refused(models: Path, runtime: Runtime = GOOD) -> IntegrityError:
    with pytest.raises(IntegrityError) as caught:
        compatibility.check(models, runtime)
    assert caught.value.exit_code == 6
    assert caught.value.why
    assert caught.value.hint
    return caught.value


def test_what_agrees_passes(models: Path, tmp_path: Path) -> None:
    compatibility.check(models, GOOD)
    compatibility.check(models, Runtime())  # what is not known is not held against it
    compatibility.check(models, Runtime([RTX_5090, B200], "1.2.1"))  # the engine takes the first
    compatibility.check(tmp_path, GOOD)  # a repository of other models


def test_the_llmapi_targets_repository_is_for_one_version(tmp_path: Path) -> None:
    """What builder.llmapi.repository writes: no engine, and the version among its parameters."""
    config = tmp_path / "tensorrt_llm" / "config.pbtxt"
    config.parent.mkdir()
    config.write_text('backend: "python"\nparameters { key: "tensorrt_llm" value: { string_value: "1.2.1" } }\n')
    for runtime in (GOOD, Runtime()):
        compatibility.check(tmp_path, runtime)
    said = refused(tmp_path, Runtime(tensorrt_llm="1.3.0rc25"))
    assert "rendered for TensorRT-LLM 1.2.1, and this machine has 1.3.0rc25" in said.what
    assert "--set engine.tensorrt_llm=1.3.0rc25" in said.hint


@pytest.mark.parametrize(
    ("runtime", "what", "hint"),
    [
        (Runtime([RTX_5090], "1.1.0"), "built by TensorRT-LLM 1.2.1, and this machine has 1.1.0", "tensorrt_llm=1.1.0"),
        (Runtime([RTX_5090], "1.2.1", "10.13.3.9"), "built by TensorRT 10.14.1.48, and this", "image that built it"),
        (Runtime([B200], "1.2.1"), "built for sm120 (NVIDIA GeForce RTX 5090), and GPU 0 here, NVIDIA B200, is sm100",
         "--gpu auto"),
        (Runtime([B200, RTX_5090], "1.2.1"), "GPU 0 here, NVIDIA B200, is sm100", "CUDA_VISIBLE_DEVICES=1"),
        (Runtime([B200, RTX_5090], chosen=True), "GPU 0 here, NVIDIA B200, is sm100", "--gpu auto"),
        (Runtime([], "1.2.1"), "has 1 rank, and no GPU is visible here", "--gpu cpu"),
    ],
)  # fmt: skip
def test_a_machine_that_can_not_run_the_engine(models: Path, runtime: Runtime, what: str, hint: str) -> None:
    error = refused(models, runtime)
    assert what in error.what
    assert hint in error.hint


def test_as_many_gpus_as_ranks(tmp_path: Path) -> None:
    engine = write_engine(tmp_path / "engine", world_size=4)
    repository.write(tmp_path / "models", engine, SNAPSHOT, schema.Repository())
    compatibility.check(tmp_path / "models", Runtime([RTX_5090] * 4))
    assert "4 ranks, and 2 GPUs are visible here" in refused(tmp_path / "models", Runtime([RTX_5090] * 2)).what
    assert "GPU 3 here" in refused(tmp_path / "models", Runtime([RTX_5090] * 3 + [B200])).what
    (engine / "rank2.engine").unlink()
    assert "lacks rank2.engine" in refused(tmp_path / "models", Runtime([RTX_5090] * 4)).what


@pytest.mark.parametrize(
    ("old", "new", "what", "why"),
    [
        ("max_batch_size: 8", "max_batch_size: 64", "max_batch_size is 64", "ignores it"),
        ('"max_beam_width" value: { string_value: "1"', '"max_beam_width" value: { string_value: "4"',
         "max_beam_width is 4", "would not load"),
        ('"enable_kv_cache_reuse" value: { string_value: "false"',
         '"enable_kv_cache_reuse" value: { string_value: "True"', "enable_kv_cache_reuse is true", "turn it off"),
        ('"enable_chunked_context" value: { string_value: "false"',
         '"enable_chunked_context" value: { string_value: "1"', "enable_chunked_context is true", "would not load"),
        ('"generation_logits"\n    data_type: TYPE_FP16', '"generation_logits"\n    data_type: TYPE_FP32',
         "declares generation_logits TYPE_FP32, and the engine's logits are float16", "fail each request"),
        ("decoupled: true", "decoupled: false", "decoupled is false for tensorrt_llm and true", "Streaming needs both"),
    ],
)  # fmt: skip
def test_a_repository_edited_by_hand(models: Path, old: str, new: str, what: str, why: str) -> None:
    edit(models, old, new)
    error = refused(models)
    assert what in error.what
    assert why in error.why
    assert "--from render" in error.hint


def test_an_edit_that_the_engine_can_do_passes(models: Path, tmp_path: Path) -> None:
    edit(models, "max_batch_size: 8", "max_batch_size: 4")
    compatibility.check(models, GOOD)
    engine = write_engine(tmp_path / "paged", profile="sm120-fmha")
    repository.write(tmp_path / "other", engine, SNAPSHOT, schema.Repository(enable_chunked_context=True))
    edit(tmp_path / "other", '"enable_kv_cache_reuse" value: { string_value: "true"',
         '"enable_kv_cache_reuse" value: { string_value: "TRUE"')  # fmt: skip
    compatibility.check(tmp_path / "other", GOOD)


def test_all_that_disagrees_is_said_at_once_the_machine_first(models: Path) -> None:
    edit(models, "max_batch_size: 8", "max_batch_size: 64")
    edit(models, '"enable_chunked_context" value: { string_value: "false"',
         '"enable_chunked_context" value: { string_value: "true"')  # fmt: skip
    error = refused(models, Runtime([B200], "1.1.0", "10.13.3.9"))
    assert "are incompatible in 5 ways" in error.what
    order = ["TensorRT-LLM 1.2.1", "TensorRT 10.14", "sm120", "enable_chunked_context", "max_batch_size"]
    places = [error.why.index(f"{number}. ") for number in range(1, 6)]
    assert [name in line for name, line in zip(order, error.why.splitlines(), strict=True)] == [True] * 5
    assert places == sorted(places)
    assert [line[:2] for line in error.hint.splitlines()] == ["1.", "2.", "3.", "4.", "5."]


def test_an_engine_that_moved(models: Path, tmp_path: Path) -> None:
    """The C++ backend would say that no model path is given (model_instance_state.cc@c8c6df08)."""
    (tmp_path / "engine").rename(tmp_path / "elsewhere")
    error = refused(models)
    assert f"no engine at {tmp_path / 'engine'}" in error.what
    assert "builder build" in error.hint


def test_a_copy_of_an_engine_tells_what_it_was_built_with(models: Path, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "engine", tmp_path / "copy")
    edit(models, "../../engine", "../../copy")
    assert "built for sm120" in refused(models, Runtime([B200])).what


def test_an_engine_from_elsewhere_is_compared_as_far_as_it_tells(tmp_path: Path) -> None:
    """Without built_with.json: the version and the sizes of config.json."""
    repository.write(
        tmp_path / "models", write_engine(tmp_path / "engine", built_with=None), SNAPSHOT, schema.Repository()
    )
    compatibility.check(tmp_path / "models", Runtime([B200], "1.2.1", "10.13.3.9"))
    assert "TensorRT-LLM 1.2.1" in refused(tmp_path / "models", Runtime([B200], "1.1.0")).what


def test_the_reference_engine_needs_no_gpu_and_no_version(tmp_path: Path) -> None:
    none = {"tensorrt": None, "sm": None, "gpu": None, "driver": None}
    engine = write_engine(tmp_path / "engine", profile="cpu", built_with=BUILT_WITH | none | {"target": "reference"})
    (engine / "rank0.engine").rename(engine / "rank0.safetensors")
    models = tmp_path / "models"
    repository.write(models, engine, SNAPSHOT, schema.Repository())
    compatibility.check(models, Runtime([], "1.1.0", "9"))
    edit(models, "max_batch_size: 8", "max_batch_size: 64")
    edit(models, '"enable_kv_cache_reuse" value: { string_value: "false"',
         '"enable_kv_cache_reuse" value: { string_value: "true"')  # fmt: skip
    assert "are incompatible in 2 ways" in refused(models).what
    (engine / "rank0.safetensors").unlink()
    assert "lacks rank0.safetensors" in refused(models).what


def test_files_that_can_not_be_read(models: Path, tmp_path: Path) -> None:
    (tmp_path / "engine" / "config.json").write_text("{")
    assert "config.json can't be read" in refused(models).what
    edit(models, "max_batch_size: 8", "max_batch_size: ${triton_max_batch_size}")
    assert "config.pbtxt does not parse" in refused(models).what


def test_the_rule_is_the_one_that_rendering_keeps(tmp_path: Path) -> None:
    engine = write_engine(tmp_path / "engine")
    for name in compatibility.NEED_PAGED_FMHA:
        with pytest.raises(UsageError, match=f"repository.{name} needs an engine with paged context FMHA"):
            repository.write(tmp_path / name, engine, SNAPSHOT, schema.Repository(**{name: True}))


def test_nothing_is_started_that_would_not_run(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`builder serve`, `builder smoke` and the smoke stage come through here; this machine shows no GPU."""
    monkeypatch.setattr(server, "find_server", lambda: pytest.fail("a server was looked for"))
    monkeypatch.setattr(compatibility, "visible", list)
    with pytest.raises(IntegrityError, match="no GPU is visible here"), server.serve(models, out=Output("quiet")):
        pytest.fail("it serves")


@pytest.mark.parametrize("command", ["serve", "smoke"])
def test_the_commands_end_with_exit_code_6(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = write_engine(tmp_path / "engine")

    def make(directory: Path) -> dict[str, Any]:
        return repository.write(directory / "models", engine, SNAPSHOT, schema.Repository())

    made = Store(tmp_path / "out", Output("quiet")).stage("repository", {}, make).path
    monkeypatch.setattr(compatibility, "visible", lambda: [RTX_5090])
    edit(made / "models", "max_batch_size: 8", "max_batch_size: 9")  # as long as before
    assert main.main([command, str(made)]) == 6
    assert "max_batch_size is 9" in capsys.readouterr().err
    edit(made / "models", "max_batch_size: 9", "max_batch_size: 64")  # longer: the store sees it too
    assert main.main([command, str(made)]) == 6
    assert "max_batch_size is 64" in capsys.readouterr().err
    edit(made / "models", "max_batch_size: 64", "max_batch_size: 8 ")  # agrees, but is not what was made
    assert main.main([command, str(made)]) == 6
    assert "were changed, added or removed after the build" in capsys.readouterr().err


FOUND = [("GPU-aaaa-1", RTX_5090), ("GPU-bbbb-2", B200)]


@pytest.mark.parametrize(
    ("asked", "chosen"),
    [
        (None, [RTX_5090, B200]),
        ("1,0", [B200, RTX_5090]),
        ("GPU-bbbb", [B200]),
        ("1,7,0", [B200]),  # CUDA stops at the first that is none
        ("", []),
        ("-1", []),
        ("MIG-1234", None),
    ],
)
def test_cuda_visible_devices_is_heeded(asked: str | None, chosen: list[Seen] | None) -> None:
    assert gpus._chosen(FOUND, asked) == chosen


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Any], None]:
    """A stand-in for NVML with one RTX 5090; what a test sets replaces one of its answers."""
    import pynvml

    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(name, raising=False)
    answers: dict[str, Any] = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: "590.44.01",
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetCudaComputeCapability": lambda handle: (12, 0),
        "nvmlDeviceGetName": lambda handle: RTX_5090.name,
        "nvmlDeviceGetUUID": lambda handle: f"GPU-{handle}",
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, answer)
    return lambda name, answer: monkeypatch.setattr(pynvml, name, answer)


def test_the_gpus_are_those_that_nvml_tells(nvml: Callable[[str, Any], None]) -> None:
    assert gpus.visible() == [RTX_5090]
    assert compatibility.here().gpus == [RTX_5090]


def test_unlike_cards_that_cuda_counts_its_own_way_are_unknown(
    nvml: Callable[[str, Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml("nvmlDeviceGetCount", lambda: 2)
    nvml("nvmlDeviceGetName", lambda handle: (B200, RTX_5090)[handle].name)
    nvml("nvmlDeviceGetCudaComputeCapability", lambda handle: ((10, 0), (12, 0))[handle])
    assert gpus.visible() == [B200, RTX_5090]
    assert gpus.cuda_order() == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}  # as NVML counts them
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    assert gpus.cuda_order() == {"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}
    assert gpus.visible() is None


def test_no_driver_is_no_gpu_and_a_silent_nvml_is_unknown(nvml: Callable[[str, Any], None]) -> None:
    import pynvml

    def fail(code: int) -> Callable[..., None]:
        def raises(*_: object) -> None:
            raise pynvml.NVMLError(code)

        return raises

    nvml("nvmlDeviceGetName", fail(pynvml.NVML_ERROR_UNKNOWN))
    assert gpus.visible() is None
    nvml("nvmlInit", fail(pynvml.NVML_ERROR_NO_PERMISSION))
    assert gpus.visible() is None
    nvml("nvmlInit", fail(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND))
    assert gpus.visible() == []


def test_libraries_are_found_in_the_image_s_own_venv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "venv-tritonserver" / "lib" / "python3.12" / "site-packages"
    (site / "in_the_image-1.2.1.dist-info").mkdir(parents=True)
    (site / "in_the_image-1.2.1.dist-info" / "METADATA").write_text("Name: in_the_image\nVersion: 1.2.1\n")
    assert compatibility.installed("in-the-image") is None
    monkeypatch.setattr(compatibility, "SITES", (f"{tmp_path}/venv-*/lib/python3*/site-packages",))
    assert compatibility.installed("in-the-image") == "1.2.1"
