"""GPU profiles: each loads, lists its formats with sources, and leads to flags that its cards support."""

from __future__ import annotations

import re

import pytest
import yaml
from model_configs import QWEN3_8B

from builder.core import paths
from builder.core.errors import UnsupportedError
from builder.machine import gpus
from builder.recipe import schema
from builder.trtllm import flags as trtllm_flags

BLACKWELL = ["sm100", "sm103", "sm120", "sm120-fmha", "sm121"]
OLDER = ["sm80", "sm86", "sm89", "sm90"]


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
    for said_format in profile.formats.values():
        assert said_format.source
        assert said_format.since in trtllm_flags.versions() or said_format.since == "1.2.0"
    assert bool(profile.cards) == bool(profile.formats) == (profile.sm is not None)


@pytest.mark.parametrize("name", gpus.names())
def test_a_profile_has_no_unused_key(name: str) -> None:
    raw = yaml.safe_load(paths.data("configs", "gpus", f"{name}.yaml").read_text())
    known = {"title", "sm", "target", "flags", "flags_of", "card_facts_of", "recipe"}
    assert set(raw) <= known | {"cards", "formats", "fmha_head_sizes", "notes"}


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
    with pytest.raises(UnsupportedError, match=f"{name} can't run nvfp4") as caught:
        flags(name)
    assert f"{name} ({gpus.load(name).title}) runs {', '.join(gpus.load(name).formats)}" in caught.value.why
    assert "--gpu cpu" in caught.value.hint
    assert flags(name, "target=reference")


def test_a_card_newer_than_the_version_is_rejected() -> None:
    assert flags("sm103")
    with pytest.raises(UnsupportedError, match=r"sm103 runs nvfp4 since TensorRT-LLM 1\.2\.0") as caught:
        flags("sm103", "engine.tensorrt_llm=1.1.0")
    assert caught.value.hint == "--set engine.tensorrt_llm=1.2.1"
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
