"""Changes each input of each stage in turn: exactly the keys that depend on it change."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import card_stand_in
import pytest
from pydantic import BaseModel

from builder import pipeline
from builder.calibration.rows import calibrate
from builder.checkpoint.layouts import Checkpoint
from builder.core import store as stores
from builder.core.output import Output
from builder.core.safetensors_io import Tensors
from builder.core.store import Store, WouldRun
from builder.evaluate import stage as evaluate_stage
from builder.evaluate import variants
from builder.evaluate.datasets import read_texts
from builder.evaluate.sensitivity import stage as sensitivity_stage
from builder.hub.snapshot import fetch
from builder.llmapi import arguments as llmapi_arguments
from builder.llmapi import repository as llmapi_repository
from builder.llmapi import versions as llmapi_versions
from builder.machine.gpus import Seen
from builder.preflight.model_facts import ModelFacts
from builder.preflight.prepare import prepare
from builder.quantize import device, modelopt
from builder.recipe import schema
from builder.recipe.algorithm import Gptq
from builder.recipe.transform import Learning
from builder.serving import smoke
from builder.triton.repository import Repository
from builder.trtllm import engine
from builder.trtllm import flags as trtllm_flags

DATA = Path(__file__).parents[1] / "data"
MODEL = DATA / "tiny-qwen3"
QUIET = Output("quiet")
BASE: dict[str, Any] = {
    "model.id": str(MODEL), "gpu": "cpu", "calibration.data": "builtin:python-docs", "calibration.samples": 4,
    "calibration.seq_len": 32, "evaluation.data": [{"data": str(DATA / "eval" / "prose.jsonl")}],
    "sensitivity.data": {"data": str(DATA / "eval" / "prose.jsonl")},
}  # fmt: skip
HUB = "of the Hub alone (test_fetch.py, test_calibrate.py)"
ONE = "has one value"
MEASURED = "measurements alone, below"

# For each value of the recipe another one, and the first stage of the chain that it changes; None: no stage.
CHAIN: dict[str, tuple[Any, str | None]] = {
    "model.trust_remote_code": (True, "snapshot"),
    "gpu": ("sm120", "engine"),
    "target": ("engine", "engine"),
    "transform.name": ("spinquant", "transform"),
    "quantization.kv_cache_dtype": ("auto", "checkpoint"),
    "quantization.algorithm": ("mse", "checkpoint"),
    "quantization.memory": ("low", "checkpoint"),
    "quantization.keep_bf16": (["*.o_proj"], "checkpoint"),
    "quantization.keep_fp8": (["*.down_proj"], "checkpoint"),
    "quantization.layouts": ("compressed-tensors", "layouts"),
    "quantization.save_pseudo": ("bf16", "layouts"),
    "calibration.config": ("other", None),
    "calibration.split": ("test", None),
    "calibration.revision": ("main", None),
    "calibration.column": ("text", "calibration"),
    "calibration.samples": (5, "calibration"),
    "calibration.seq_len": (33, "checkpoint"),
    "calibration.batch_size": (2, "checkpoint"),
    "engine.max_batch_size": (3, "engine"),
    "engine.max_input_len": (100, "engine"),
    "engine.max_seq_len": (1500, "engine"),
    "engine.max_num_tokens": (4096, "engine"),
    "engine.tp": (2, "ranks"),
    "engine.pp": (2, "ranks"),
    "engine.flags": ({"multiple_profiles": "enable"}, "engine"),
    "repository.decoupled": (False, "repository"),
    "repository.preprocessing_instances": (2, "repository"),
    "repository.postprocessing_instances": (2, "repository"),
    "repository.bls_instances": (2, "repository"),
    "repository.max_queue_delay_microseconds": (7, "repository"),
    "repository.max_queue_size": (7, "repository"),
    "repository.queue_timeout_seconds": (7, "repository"),
    "repository.stall_timeout_seconds": (7, "repository"),
    "repository.kv_cache_free_gpu_mem_fraction": (0.5, "repository"),
    "repository.batch_scheduler_policy": ("max_utilization", "repository"),
    "repository.enable_kv_cache_reuse": (False, "repository"),
    "repository.enable_chunked_context": (False, "repository"),
    "repository.exclude_input_in_output": (False, "repository"),
    "repository.end_ids": ([3], "repository"),
    "repository.parameters": ({"multi_block_mode": False}, "repository"),
    "repository.guided_decoding": (False, "repository"),
    "repository.add_special_tokens": (False, "repository"),
    "repository.skip_special_tokens": (False, "repository"),
    "repository.parse_special_tokens": ("never", "repository"),
    "repository.tool_calls": ("hermes", "repository"),
    "repository.reasoning": ("none", "repository"),
    "repository.sampling_defaults.from_model": (True, "repository"),
    "repository.sampling_defaults.temperature": (0.5, "repository"),
    "repository.sampling_defaults.top_p": (0.5, "repository"),
    "repository.sampling_defaults.top_k": (5, "repository"),
    "repository.sampling_defaults.repetition_penalty": (1.5, "repository"),
    "repository.sampling_defaults.presence_penalty": (0.5, "repository"),
    "repository.sampling_defaults.frequency_penalty": (0.5, "repository"),
    "name": ("production", None),
}
ELSEWHERE = {
    "model.id": "below",
    "model.revision": HUB,
    "model.original": "of a quantized model alone (test_quantized_models.py)",
    **{f"transform.{name}": "of a transform alone (test_stage.py)" for name in ("rotations", "kind", "seed")},
    **{f"transform.learning.{name}": "of learned rotations (test_learned_stage.py)" for name in Learning.model_fields},
    "quantization.format": ONE,
    **{f"quantization.gptq.{name}": "with algorithm gptq alone" for name in Gptq.model_fields},
    "calibration.data": "below",
    "calibration.scales": "test_scales.py: for quantized models only",
    "engine.tensorrt_llm": "below",
    "llmapi.args": "below",
    "lora.adapters": "tests/lora/test_recipe.py",
    "lora.max_rank": "with adapters alone (tests/lora/test_recipe.py)",
    **{f"evaluation.{name}": MEASURED for name in schema.Evaluation.model_fields},
    **{f"quality.{name}": "test_quality.py" for name in schema.Quality.model_fields},
    **{f"sensitivity.{name}": MEASURED for name in schema.Sensitivity.model_fields},
    **{f"tasks.{name}": "test_tasks.py" for name in schema.Tasks.model_fields},
}


def leaves(model: type[BaseModel], above: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from leaves(kind, f"{above}{name}.")
        else:
            yield f"{above}{name}"


def test_every_value_of_the_recipe_is_decided_about() -> None:
    """A new value needs a line here: which stage's key contains it?"""
    assert set(leaves(schema.Recipe)) == {*CHAIN, *ELSEWHERE}


def resolved(**more: Any) -> schema.Resolved:
    return schema.resolve({**BASE, **more})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the whole chain built for real, and with the texts of the measurements."""
    output = tmp_path_factory.mktemp("keys") / "out"
    argv = [sys.executable, "-m", "builder", "build", "--output", str(output), "--json", "--no-quality-check"]
    argv += [
        word
        for key, value in BASE.items()
        for word in ("--set", f"{key}={value}")
        if key.split(".")[0] in ("calibration",)
    ]
    done = subprocess.run([*argv, "--model", str(MODEL), "--gpu", "cpu"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    read_texts(resolved().recipe.evaluation, store=Store(output, QUIET))
    return output


def first(root: Path, **more: Any) -> str | None:
    """The first stage that a build with these values would run."""
    _, would = pipeline.stored(prepare(resolved(**more), Store(root, QUIET)), Store(root, QUIET))
    return would.stage if would else None


def test_nothing_changed_is_nothing_to_do(root: Path) -> None:
    assert first(root) is None


@pytest.mark.parametrize("key", CHAIN)
def test_each_value_of_the_recipe_changes_its_stage_and_none_before(root: Path, key: str) -> None:
    value, stage = CHAIN[key]
    more = {"gpu": "sm120"} if key == "target" else {}
    assert first(root, **{key: value, **more}) == stage


def test_the_model_and_the_calibration_set_are_known_by_their_content(root: Path, tmp_path: Path) -> None:
    model = shutil.copytree(MODEL, tmp_path / "model")
    assert first(root, **{"model.id": str(model)}) == "snapshot"
    rows = tmp_path / "rows.jsonl"
    shutil.copyfile("configs/calibration/python-docs.jsonl", rows)
    assert first(root, **{"calibration.data": str(rows)}) is None, "the same rows in another place"
    rows.write_text('{"text": "other"}\n')
    assert first(root, **{"calibration.data": str(rows)}) == "calibration"


# Libraries, environment and GPU, which no recipe names.


def other_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, version: str = "99.1") -> None:
    facts = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "stage"),
    [(name, "checkpoint") for name in modelopt.LIBRARIES]
    + [("jinja2", "repository"), ("nvidia-pytriton", "smoke"), ("tritonclient", "smoke"), ("tensorrt_llm", "smoke")]
    + [("tensorrt", "smoke"), ("pytest", None)],
)
def test_each_library(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, stage: str | None
) -> None:
    other_version(monkeypatch, tmp_path, name)
    assert first(root) == stage


@pytest.mark.parametrize("name", modelopt.NUMERICS)
def test_each_variable_that_changes_numbers(root: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "another value")
    assert first(root) == "checkpoint"


def test_variables_that_change_no_number(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "LANG", "TMPDIR", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM", "PYTHONHASHSEED"):
        monkeypatch.setenv(name, "1" if name != "TMPDIR" else "/tmp")
    assert first(root) is None


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes NVML and PyTorch's metadata look like those of a machine with a GPU, another one with each call."""

    def put(**nvml: Any) -> None:
        directory = tmp_path / f"machine{len(list(tmp_path.iterdir()))}"
        card_stand_in.machine(directory, build=False, **{"tensorrt_llm": None, "tensorrt": None, **nvml})
        torch = directory / "site" / "torch-2.99.0.dist-info"
        torch.mkdir()
        (torch / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.99.0\n")
        monkeypatch.delitem(sys.modules, "pynvml", raising=False)
        monkeypatch.syspath_prepend(str(directory / "site"))

    return put


def test_a_hidden_gpu_does_not_calibrate(card: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    card()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert modelopt.gpus() == ["NVIDIA GeForce RTX 5090"]
    for hidden in ("", "-1", "NoDevFiles"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert modelopt.gpus() == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-0")
    assert modelopt.gpus() == ["NVIDIA GeForce RTX 5090"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1")
    assert modelopt.numerics()["CUDA_VISIBLE_DEVICES"] == "MIG-1", "which part of a GPU that is, nobody says"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    card(name="NVIDIA B200")
    assert modelopt.gpus() == ["NVIDIA B200"]


def test_a_pytorch_for_cpus_calibrates_on_none(
    card: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card()
    other_version(monkeypatch, tmp_path, "torch", "2.99.0+cpu")
    assert (modelopt.gpus(), modelopt.calibrating()) == (["NVIDIA GeForce RTX 5090"], [])


def test_a_gpu_that_pytorch_does_not_see_is_refused() -> None:
    """PyTorch sees no GPU on this machine, so the key would name a device that is not used."""
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        assert device.check_device(["any"]) == torch.cuda.get_device_name(0)
        return
    assert device.check_device([]) == "cpu"
    with pytest.raises(device.UnsupportedError, match="lists NVIDIA B200, and PyTorch sees no GPU"):
        device.check_device(["NVIDIA B200"])


def test_a_card_makes_another_checkpoint_and_no_other_smoke_test_of_the_reference(
    root: Path, card: Callable[..., None]
) -> None:
    before = smoke_key(root, "reference")
    card()
    assert first(root) == "checkpoint"
    assert smoke_key(root, "reference") == smoke_key(root, "reference", libraries=before)


def smoke_key(root: Path, target: str, *, key: str = "0" * 16, libraries: str = "") -> str:
    repository = Repository(root / "repository" / key, "0" * 64, {"target": target})
    with pytest.raises(WouldRun) as would:
        smoke.smoke_test(repository, store=Store(root, QUIET, dry=True))
    return would.value.key


@pytest.mark.parametrize("target", ["engine", "llmapi"])
def test_smoke_tests_of_a_gpu_are_of_that_gpu_and_driver(
    root: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    def keys(gpu: Seen) -> tuple[str, str]:
        monkeypatch.setattr(smoke, "visible", lambda: [gpu])
        return smoke_key(root, target), smoke_key(root, "reference")

    one = Seen("RTX 5090", 12, 0, "590.44.01")
    cards = [one, replace(one, driver="595"), replace(one, name="RTX 5080"), replace(one, minor=1)]
    found = [keys(gpu) for gpu in cards]
    assert len({key for key, _ in found}) == 4
    assert len({key for _, key in found}) == 1, "the reference executor runs on the CPU"


def test_an_engine_made_again_is_tested_again(root: Path) -> None:
    """The repository's files stay the same, because they name the engine and do not contain it."""
    assert smoke_key(root, "engine", key="1" * 16) != smoke_key(root, "engine", key="2" * 16)


def test_penalties_are_an_input_of_the_llmapi_repository(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = schema.resolve({**BASE, "gpu": "sm100", "target": "llmapi"})
    snapshot = fetch(asked.recipe.model, store=Store(root, QUIET))

    def key(arguments: Any) -> str:
        with pytest.raises(WouldRun) as would:
            llmapi_repository.render(
                Checkpoint(root, "0" * 64), snapshot, arguments, asked, store=Store(root, QUIET, dry=True)
            )
        return would.value.key

    arguments = llmapi_arguments.resolve(asked, snapshot.config)
    before, facts = key(arguments), llmapi_versions.load(asked.recipe.engine.tensorrt_llm)
    smaller = schema.resolve({**BASE, "gpu": "sm100", "target": "llmapi", "llmapi.args": {"print_iter_log": True}})
    other = llmapi_arguments.resolve(smaller, snapshot.config)
    assert key(other) != before
    monkeypatch.setattr(llmapi_versions, "load", lambda version: replace(facts, penalties=not facts.penalties))
    assert key(arguments) != before


def test_an_engine_is_of_one_version_of_tensorrt_llm(root: Path, models: variants.Models) -> None:
    """There are repository templates for one version only, so the whole chain can't be built for another one."""

    def key(version: str) -> str:
        asked = resolved(**{"engine.tensorrt_llm": version, "gpu": "sm120"})
        flags = trtllm_flags.resolve(resolved(gpu="sm120"), models.snapshot.config)
        assert models.checkpoint is not None
        with pytest.raises(WouldRun) as would:
            engine.build(models.checkpoint, flags, asked, store=Store(root, QUIET, dry=True))
        return would.value.key

    assert key("1.2.1") != key("1.1.0")


def test_timing_caches_are_of_one_version_and_card(tmp_path: Path, card: Callable[..., None]) -> None:
    card(tensorrt="10.14.1")
    one = engine.timing_cache(tmp_path, "1.2.1")
    assert one.name == "tensorrt_llm-1.2.1-tensorrt-10.14.1-sm120-NVIDIA-GeForce-RTX-5090.cache"
    assert engine.timing_cache(tmp_path, "1.1.0") != one
    card(tensorrt="10.15.0")
    two = engine.timing_cache(tmp_path, "1.2.1")
    card(tensorrt="10.15.0", name="NVIDIA B200", capability=(10, 0))
    assert len({one, two, engine.timing_cache(tmp_path, "1.2.1")}) == 3


# Measurements.


@pytest.fixture(scope="module")
def models(root: Path) -> variants.Models:
    asked, store = resolved(), Store(root, QUIET)
    by_stage = {artifact.stage: artifact for artifact in stores.artifacts(root)}
    checkpoint, repository = by_stage["checkpoint"], by_stage["repository"]
    return variants.Models(
        fetch(asked.recipe.model, store=store),
        calibrate(asked.recipe.calibration, store=store),
        Checkpoint(checkpoint.path, checkpoint.digest, checkpoint.facts),
        Repository(repository.path, repository.digest, repository.facts),
    )


def scores_key(root: Path, models: variants.Models, runner: str, **more: Any) -> str:
    asked = resolved(**{"evaluation.runners": [runner], **more})
    with pytest.raises(WouldRun) as would:
        evaluate_stage.evaluate(models, asked.recipe, store=Store(root, QUIET, dry=True))
    assert would.value.stage == "scores"
    return would.value.key


ALL = {"bf16", "simulated", "checkpoint", "served"}


@pytest.mark.parametrize(
    ("key", "value", "changed"),
    [
        ("calibration.seq_len", 33, {"simulated"}),
        ("calibration.batch_size", 2, {"simulated"}),
        ("quantization.kv_cache_dtype", "auto", ALL - {"bf16"}),
        ("evaluation.min_tokens", 17, ALL),
        ("evaluation.reserve", 9, ALL - {"served"}),
        ("evaluation.max_tokens", 99, ALL),
        ("evaluation.batch_tokens", 99, ALL),
        ("evaluation.dtype", "float32", ALL),
        ("evaluation.seed", 1, ALL),
        ("evaluation.top", 99, {"bf16"}),
        ("evaluation.resamples", 200, set()),
        ("repository.bls_instances", 2, set()),
    ],
)
def test_each_value_that_scores_depend_on(
    root: Path, models: variants.Models, key: str, value: Any, changed: set[str]
) -> None:
    for runner in sorted(ALL):
        before, after = scores_key(root, models, runner), scores_key(root, models, runner, **{key: value})
        assert (before != after) == (runner in changed), runner


def test_scores_of_a_served_model_are_of_its_engine(root: Path, models: variants.Models) -> None:
    """As for the smoke test: rebuilding the engine does not change the repository's digest."""
    assert models.repository is not None
    other_root = root.parent / "other"
    copied = shutil.copytree(models.repository.path, other_root / "repository" / ("3" * 16))
    (other_root / "engine").symlink_to(root / "engine")  # which the repository refers to by a relative path
    other = replace(models, repository=replace(models.repository, path=copied))
    assert scores_key(root, other, "served") != scores_key(root, models, "served")
    assert scores_key(root, other, "bf16") == scores_key(root, models, "bf16")


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "NVIDIA_TF32_OVERRIDE"])
def test_variables_that_scores_and_losses_depend_on(
    root: Path, models: variants.Models, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    before = scores_key(root, models, "checkpoint"), loss_key(root, models)
    monkeypatch.setenv(name, "3")
    assert scores_key(root, models, "checkpoint") != before[0]
    assert loss_key(root, models) != before[1]


def loss_key(root: Path, models: variants.Models, **more: Any) -> str:
    tensors = {name: (info.dtype, info.shape) for name, info in Tensors(MODEL).items()}
    facts = ModelFacts(models.snapshot.config, tensors)
    assert models.calibration is not None
    _, ingredients = sensitivity_stage._job(
        models.snapshot, models.calibration, facts, resolved(**more).recipe, Store(root, QUIET)
    )
    return stores.key_of("sensitivity", ingredients)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("calibration.seq_len", 33), ("calibration.batch_size", 2), ("quantization.kv_cache_dtype", "auto"),
        ("evaluation.min_tokens", 17), ("evaluation.dtype", "float32"), ("evaluation.batch_tokens", 99),
        ("evaluation.top", 99), ("sensitivity.texts", 3), ("sensitivity.max_tokens", 99),
    ],
)  # fmt: skip
def test_each_value_that_losses_depend_on(root: Path, models: variants.Models, key: str, value: Any) -> None:
    assert loss_key(root, models, **{key: value}) != loss_key(root, models)
    assert loss_key(root, models, **{"evaluation.resamples": 200}) == loss_key(root, models)


def test_os_environ_is_as_it_was() -> None:
    assert not {name for name in modelopt.NUMERICS if os.environ.get(name) == "another value"}
