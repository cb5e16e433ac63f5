"""GPU profiles: each loads, lists its formats with sources, and leads to flags that its cards support."""

from __future__ import annotations

import re

import pytest
import yaml
from model_configs import QWEN3_8B

from builder.core import paths
from builder.core.errors import UnsupportedError
from builder.core.release import order
from builder.formats import kv_cache, registry
from builder.machine import gpus
from builder.recipe import card_formats, schema
from builder.trtllm import flags as trtllm_flags

BLACKWELL = ["sm100", "sm103", "sm120", "sm120-fmha", "sm121"]
OLDER = ["sm80", "sm86", "sm89", "sm90"]
# Formats of TensorRT-LLM's that no recipe can choose.
NOT_OURS = ("mxfp4", "fp8_block_scales", "w4a8_awq", "w4a8_gptq", "w4a16_gptq")


def flags(gpu: str, *sets: str) -> dict[str, str]:
    resolved = schema.resolve({"model.id": "Qwen/Qwen3-8B", "gpu": gpu}, sets=sets)
    return {flag.name: flag.value for flag in trtllm_flags.resolve(resolved, QWEN3_8B)}


def test_the_list_of_profiles() -> None:
    assert gpus.names() == sorted([*BLACKWELL, *OLDER, "cpu"])


@pytest.mark.parametrize("name", gpus.names())
def test_a_profile_has_a_source_for_every_fact(name: str) -> None:
    profile = gpus.load(name)
    version = trtllm_flags.load(trtllm_flags.versions()[-1])
    for flag, said in profile.flags.items():
        trtllm_flags.check(version, flag, said.value)
        assert said.reason
        assert said.source
    for card in profile.cards:
        assert card.source
        if card.bandwidth_gb_s:
            assert card.memory_gb
    for by_target in profile.formats.values():
        for target, support in by_target.items():
            assert support.source
            order(support.since)
            if target == "engine":
                assert support.since in (*trtllm_flags.versions(), "1.2.0")
    assert bool(profile.cards) == bool(profile.formats) == (profile.sm is not None)
    assert profile.best[0].reason


@pytest.mark.parametrize("name", gpus.names())
def test_a_profile_has_no_unused_key(name: str) -> None:
    raw = yaml.safe_load(paths.data("configs", "gpus", f"{name}.yaml").read_text())
    known = {"title", "sm", "target", "flags", "flags_of", "card_facts_of", "recipe"}
    assert set(raw) <= known | {"cards", "best", "formats", "fmha_head_sizes", "notes"}
    entries = {one.gpu_format for one in (*registry.all_formats().values(), *kv_cache.FORMATS.values())}
    assert set(raw.get("formats", {})) <= {*entries, *NOT_OURS}


@pytest.mark.parametrize("name", [name for name in BLACKWELL if name != "sm120"])
def test_context_fmha_is_on_except_for_sm120(name: str) -> None:
    found = flags(name)
    for flag in ("context_fmha", "use_paged_context_fmha", "use_fp8_context_fmha"):
        assert found[flag] == "enable"
        assert flags("sm120")[flag] == "disable"
    assert (found["gemm_plugin"], found["kv_cache_type"]) == ("nvfp4", "paged")


def test_nvfp4_runs_only_on_blackwell() -> None:
    for name in gpus.names():
        assert ("nvfp4" in gpus.load(name).formats) == (name in BLACKWELL)


@pytest.mark.parametrize("name", OLDER)
def test_a_card_without_nvfp4_is_rejected_with_its_formats(name: str) -> None:
    with pytest.raises(UnsupportedError, match=f"{name} can't run NVFP4 with the engine target") as caught:
        flags(name, "quantization.format=nvfp4")
    known = [one.name for one in card_formats.running(gpus.load(name), "engine")]
    assert f"{name} ({gpus.load(name).title}) runs {', '.join(known)} with this target" in caught.value.why
    assert "NVFP4 runs on sm100, sm103, sm120, sm120-fmha, sm121" in caught.value.why
    assert caught.value.hint.startswith(f"--format {gpus.load(name).best[0].format}")
    assert "--gpu cpu" in caught.value.hint
    assert flags(name, "quantization.format=nvfp4", "target=reference")


def test_a_card_newer_than_the_version_is_rejected() -> None:
    assert flags("sm103")
    with pytest.raises(UnsupportedError, match=r"sm103 runs NVFP4 .* since TensorRT-LLM 1\.2\.0") as caught:
        flags("sm103", "engine.tensorrt_llm=1.1.0")
    assert caught.value.hint.startswith("--set engine.tensorrt_llm=1.2.1")
    assert flags("sm120-fmha", "engine.tensorrt_llm=1.0.0")


def test_sm120_fmha_has_the_same_cards() -> None:
    one, other = gpus.load("sm120"), gpus.load("sm120-fmha")
    assert (one.cards, one.formats, one.fmha_head_sizes, one.sm) == (
        other.cards, other.formats, other.fmha_head_sizes, other.sm,
    )  # fmt: skip
    assert list(one.fmha_head_sizes) == [64, 128, 192]


@pytest.mark.parametrize(
    ("capability", "name"),
    [((8, 0), "sm80"), ((8, 6), "sm86"), ((8, 9), "sm89"), ((9, 0), "sm90"), ((10, 0), "sm100"), ((10, 3), "sm103"),
     ((12, 0), "sm120"), ((12, 1), "sm121")],
)  # fmt: skip
def test_a_compute_capability_has_its_profile(capability: tuple[int, int], name: str) -> None:
    assert gpus.for_capability(*capability, "card").name == name


@pytest.mark.parametrize(
    ("capability", "near"),
    [((7, 5), ["sm80"]), ((8, 7), ["sm86", "sm89"]), ((11, 0), ["sm103", "sm120", "sm120-fmha"]), ((13, 0), ["sm121"])],
)
def test_an_unknown_capability_names_the_nearest_profiles(capability: tuple[int, int], near: list[str]) -> None:
    with pytest.raises(UnsupportedError, match="Some Card is sm") as caught:
        gpus.for_capability(*capability, "Some Card")
    assert re.findall(r"(sm[\w-]+) \(", caught.value.why) == near


def test_the_first_gpu_comes_from_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    for name in ("nvmlInit", "nvmlShutdown"):
        monkeypatch.setattr(pynvml, name, lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 2)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUUID", lambda handle: f"GPU-{handle}")
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCudaComputeCapability", lambda handle: (12, 0))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetName", lambda handle: "NVIDIA GeForce RTX 5090")
    monkeypatch.setattr(pynvml, "nvmlSystemGetDriverVersion", lambda: "590.44.01")
    assert schema.resolve({"model.id": "m"}).gpu.name == "sm120"
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCudaComputeCapability", lambda handle: [(12, 0), (10, 0)][handle])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert gpus.detect().name == "sm100"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-0")
    assert gpus.detect().name == "sm120"
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCudaComputeCapability", lambda handle: (7, 5))
    with pytest.raises(UnsupportedError, match="RTX 5090 is sm75"):
        gpus.detect()


def test_a_profile_is_loaded_by_its_exact_name_only() -> None:
    with pytest.raises(UnsupportedError, match="no GPU profile or card named 'SM120'") as caught:
        gpus.load("SM120")
    assert "Did you mean 'sm120' or 'sm120-fmha'?" in caught.value.why


def every_case() -> list[tuple[str, str, str]]:
    """(profile, target, format) of every format on every card, by the targets that need a GPU."""
    names = [one.name for one in registry.for_tensorrt_llm()]
    return [(gpu, target, name) for gpu in [*OLDER, *BLACKWELL] for target in gpus.TARGETS for name in names]


@pytest.mark.parametrize(("gpu", "target", "name"), every_case())
def test_a_format_runs_or_the_error_names_what_does(gpu: str, target: str, name: str) -> None:
    """Following any advice of the error leads to a plan that is not refused."""
    profile, one = gpus.load(gpu), registry.get(name)
    newest = {"engine": "1.2.1", "llmapi": "1.4.0rc1"}[target]
    sets = [f"target={target}", f"quantization.format={name}", f"engine.tensorrt_llm={newest}"]
    resolved = schema.resolve({"model.id": "m", "gpu": gpu}, sets=sets)
    if card_formats.runs(one, profile, target):
        assert (one.gpu_format is None) or card_formats.support(one, profile, target)
        trtllm_flags.check_format(resolved)
        return
    with pytest.raises(UnsupportedError, match=f"{gpu} can't run") as caught:
        trtllm_flags.check_format(resolved)
    advice = [re.findall(r"--(format|target|set) (\S+)", part) for part in caught.value.hint.split("; or ")]
    assert any(advice)
    for flags_of_advice in filter(None, advice):
        keys = {"format": "quantization.format={}", "target": "target={}", "set": "{}"}
        followed = [keys[option].format(value) for option, value in flags_of_advice]
        trtllm_flags.check_format(schema.resolve({"model.id": "m", "gpu": gpu}, sets=[*sets, *followed]))


@pytest.mark.parametrize("target", gpus.TARGETS)
@pytest.mark.parametrize("gpu", [*OLDER, *BLACKWELL])
def test_without_a_format_the_best_one_is_chosen_and_named(gpu: str, target: str) -> None:
    resolved = schema.resolve({"model.id": "m", "gpu": gpu, "target": target})
    part, origins = resolved.recipe.quantization, resolved.origins
    assert part.format == card_formats.running(resolved.gpu, target)[0].name
    assert origins["quantization.format"].startswith(f"GPU profile {gpu}: the best that {gpu} runs")
    assert origins["quantization.kv_cache_dtype"].startswith(f"GPU profile {gpu}: ")
    assert not trtllm_flags.asked_for(origins["quantization.format"])
    trtllm_flags.check_format(resolved)


@pytest.mark.parametrize(("gpu", "name"), [(gpu, name) for gpu, target, name in every_case() if target == "engine"])
def test_the_default_cache_costs_neither_kv_reuse_nor_chunked_context(gpu: str, name: str) -> None:
    """The flags of each card, for each format that trtllm-build runs there."""
    if not card_formats.runs(registry.get(name), gpus.load(gpu), "engine"):
        pytest.skip("the card does not run it")
    found = flags(gpu, f"quantization.format={name}")
    assert found["use_paged_context_fmha"] == ("disable" if gpu == "sm120" else "enable")
    cache = schema.resolve({"model.id": "m", "gpu": gpu, "quantization.format": name}).recipe.quantization.cache_format
    assert (found["use_fp8_context_fmha"] == "enable") == (cache.fp8_attention and gpu != "sm120")
    assert found["gemm_plugin"] == registry.get(name).gemm_plugin
