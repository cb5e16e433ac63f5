"""The backend's caches of adapters: what they must hold at least, and the parameters that make them so large.

From cpp/tensorrt_llm/batch_manager/peftCacheManager.cpp (getPageManagerConfig, getMaxNumSlots, TensorRT-LLM 1.2): the
engine is not loaded if either cache can't hold one adapter of the engine's largest rank that changes every layer that
the engine was built for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from builder.lora.modules import MODULES, sizes

HOST_DEFAULT = 1 << 30
# Of the GPU memory that is free after the engine is loaded, before the KV cache is made: TrtGptModelInflightBatching's
# constructor (batch_manager/trtGptModelInflightBatching.cpp, 1.x) makes the cache of adapters first. It is the default
# (triton-inference-server/tensorrtllm_backend, docs/lora.md@0b9d7d5), written down.
GPU_FRACTION_KEY, GPU_FRACTION = "lora_cache_gpu_memory_fraction", 0.05
HELD = 8  # adapters of the largest rank that the host's cache holds at least


def has_adapters(build: Mapping[str, Any]) -> bool:
    """Whether an engine, by its build_config, takes adapters."""
    plugins = build.get("plugin_config") or {}
    return plugins.get("lora_plugin") not in (None, False, "disable") and bool(
        (build.get("lora_config") or {}).get("lora_target_modules")
    )


def largest(build: Mapping[str, Any], pretrained: Mapping[str, Any]) -> int:
    """Bytes of an adapter of the engine's largest rank in all layers that it was built for, over all GPUs."""
    config = build["lora_config"]
    itemsize = 4 if pretrained["dtype"] == "float32" else 2
    return adapter_bytes(config["lora_target_modules"], int(config["max_lora_rank"]), pretrained, itemsize)


def adapter_bytes(modules: Sequence[str], rank: int, config: Mapping[str, Any], itemsize: int = 2) -> int:
    """Bytes of an adapter of this rank in all layers of these kinds (TensorRT-LLM's names) of a model."""
    known = sizes(config)
    row = sum(sum(known[module.hf]) for module in MODULES if module.name in modules)
    return row * rank * int(config["num_hidden_layers"]) * itemsize


def parameters(build: Mapping[str, Any], pretrained: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(name, value, reason) of the backend's parameters; none for an engine without adapters."""
    if not has_adapters(build):
        return []
    rank = str(build["lora_config"]["max_lora_rank"])
    host = HELD * largest(build, pretrained)
    found = [
        ("lora_cache_max_adapter_size", rank, "the engine's largest rank; the default is 64"),
        ("lora_cache_optimal_adapter_size", rank, "so that an adapter takes one page"),
        (GPU_FRACTION_KEY, f"{GPU_FRACTION:g}", "of the memory beside the weights; the default, written down"),
    ]
    if host > HOST_DEFAULT:
        found.append(("lora_cache_host_memory_bytes", str(host), f"{HELD} adapters of the largest rank"))
    return found
