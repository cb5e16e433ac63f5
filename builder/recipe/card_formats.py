"""Which number formats a card runs, by target and TensorRT-LLM version, and which a recipe gets that names none. Pure.

The facts are data: `formats` and `best` in configs/gpus/*.yaml, and `targets` of a format for what no card changes.
"""

from __future__ import annotations

from builder.core.release import reaches
from builder.formats import kv_cache, registry
from builder.formats.base import NumberFormat
from builder.formats.kv_cache import KvCacheFormat
from builder.formats.schemes import SCHEMES
from builder.machine import gpus
from builder.machine.gpus import GpuProfile, Support
from builder.recipe.target_facts import TARGETS, target_facts

FIRST_FP8 = 89  # the first SM with FP8 context FMHA: tensorrt_llm/builder.py (1.2), rule R28
# The formats of weights with which TensorRT-LLM attends in FP8, so that an FP8 KV cache costs neither KV reuse nor
# chunked context: builder.py (1.2), build, rule R27. In the PyTorch backend W4A16_AWQ with an FP8 KV cache found no
# FMHA kernel for paged context (NVIDIA/TensorRT-LLM #8862).
FP8_ATTENTION = ("FP8", "NVFP4", "NVFP4_AWQ")


def support(one: NumberFormat | KvCacheFormat, gpu: GpuProfile, target: str) -> Support | None:
    """Since when the target runs a format on a card. None if it doesn't, or if nothing limits it."""
    if one.gpu_format is None or target not in one.targets:
        return None
    return gpu.support(one.gpu_format, target)


def runs(one: NumberFormat | KvCacheFormat, gpu: GpuProfile, target: str, version: str | None = None) -> bool:
    """Whether a target runs a format on a card, in this TensorRT-LLM version (None: in any)."""
    if isinstance(one, NumberFormat) and one.compressed_only:
        return False
    if not target_facts(target).needs_gpu or gpu.sm is None:
        return True
    if target not in one.targets:
        return False
    if one.gpu_format is None:
        return True
    found = support(one, gpu, target)
    return found is not None and reaches(version, found.since)


def running(gpu: GpuProfile, target: str, version: str | None = None) -> list[NumberFormat]:
    """The formats for a whole model that a target runs on a card, the profile's best first."""
    first = [choice.format for choice in gpu.best]
    found = [one for one in registry.for_whole_model() if runs(one, gpu, target, version)]
    return sorted(found, key=lambda one: first.index(one.name) if one.name in first else len(first))


def choosable(gpu: GpuProfile, target: str) -> list[str]:
    """What `--format` accepts for a card and a target in some TensorRT-LLM version: formats, then schemes of them."""
    mixed = [one.name for one in SCHEMES.values() if all(runs(part, gpu, target) for part in one.formats)]
    return [one.name for one in running(gpu, target)] + mixed


def running_caches(gpu: GpuProfile, target: str, version: str | None = None) -> list[KvCacheFormat]:
    """The formats of the KV cache that a target runs on a card."""
    return [one for one in kv_cache.FORMATS.values() if runs(one, gpu, target, version)]


def cards_with(one: NumberFormat | KvCacheFormat, target: str) -> list[str]:
    """The names of the profiles on which a target runs a format."""
    found = (gpu for gpu in map(gpus.load, gpus.names()) if gpu.sm is not None)
    return [gpu.name for gpu in found if runs(one, gpu, target)]


def other_targets(one: NumberFormat | KvCacheFormat, gpu: GpuProfile, target: str) -> list[str]:
    """The other targets with TensorRT-LLM that run a format on a card."""
    return [name for name, facts in TARGETS.items() if facts.needs_gpu and name != target and runs(one, gpu, name)]


def default_format(gpu: GpuProfile, target: str) -> tuple[str, str]:
    """The name of the profile's best format that the target runs, and the reason. Without one, the first format."""
    known = {one.name: one for one in registry.for_whole_model()}
    for choice in gpu.best:
        if choice.format in known and runs(known[choice.format], gpu, target):
            return choice.format, f"the best that {gpu.name} runs"
    return registry.for_whole_model()[0].name, f"{gpu.name} names none that suits it better"


def default_cache(gpu: GpuProfile, target: str, weights: str) -> tuple[str, str]:
    """The name of the KV cache's format, and the reason: FP8 where it costs no feature.

    weights: the format in `quantization.format`.
    """
    one = registry.all_formats().get(weights)
    if one is not None and one.compressed_only:
        return kv_cache.AUTO.name, "FP8 would need calibrated scales, and vLLM and SGLang choose the cache themselves"
    if not target_facts(target).needs_gpu or gpu.sm is None:
        return kv_cache.FP8.name, "half the bytes"
    if not runs(kv_cache.FP8, gpu, target):
        return kv_cache.AUTO.name, f"{gpu.name} has no FP8 KV cache"
    if gpu.sm < FIRST_FP8:
        return kv_cache.AUTO.name, "no FP8 attention here, so FP8 would cost KV reuse and chunked context"
    if one is None or one.quant_algo not in FP8_ATTENTION:  # None: a scheme, whose attention is not in NVFP4
        return kv_cache.AUTO.name, "FP8 would cost KV reuse and chunked context with these weights"
    return kv_cache.FP8.name, "half the bytes, read by FP8 attention"
