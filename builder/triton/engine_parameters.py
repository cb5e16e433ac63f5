"""The parameters of an engine's model in Triton, each with its reason and source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from builder.core.errors import UsageError
from builder.lora import cache
from builder.recipe import schema
from builder.recipe.triton_parameters import PREFIX, text
from builder.trtllm import compatibility, parameter_rules

BACKEND = "model_instance_state.cc@c8c6df08"
LORA_CACHE = "cpp/tensorrt_llm/batch_manager/peftCacheManager.cpp"
OWN_KEYS = ("batch_scheduler_policy", "kv_cache_free_gpu_mem_fraction", "exclude_input_in_output")


@dataclass(frozen=True)
class Parameter:
    """A parameter of a model in Triton as config.pbtxt has it, why it has this value, and where that is known from."""

    name: str
    value: str
    reason: str
    source: str


def resolve(config: Mapping[str, Any], part: schema.Repository, path: str = "") -> list[Parameter]:
    """All parameters that are not left to the backend's defaults.

    `config` is the engine's config.json, or what it will be; `part` the recipe's `repository`, `path` the engine.
    UsageError for values that the engine or another parameter contradicts.

    An engine of several ranks needs no further parameters. In leader mode each rank is a separate server, which
    mpirun starts (serving/launch.py), and without `gpu_device_ids` all visible GPUs are used (docs/model_config.md).
    """
    build = config["build_config"]
    beams = int(build.get("max_beam_width") or 1)
    derived = [
        Parameter("gpt_model_type", "inflight_fused_batching", "the engine's KV cache is paged", BACKEND),
        *([Parameter("gpt_model_path", path, "the engine", "the engine's directory")] if path else []),
        Parameter("max_beam_width", str(beams), "what the engine was built for", "build_config"),
        *(Parameter(name, text(getattr(part, name)), "repository." + name, "recipe") for name in OWN_KEYS),
        *_paged(build, part),
        *(
            Parameter(name, value, why, LORA_CACHE)
            for name, value, why in cache.parameters(build, config.get("pretrained_config") or {})
        ),
        Parameter("FORCE_CPU_ONLY_INPUT_TENSORS", "no", "the default, written down", "docs/model_config.md"),
    ]
    asked = [Parameter(name, value, PREFIX + name, "recipe") for name, value in part.parameters.items()]
    found = {one.name: one for one in [*derived, *asked]}
    _check(found, config, beams)
    return list(found.values())


def values(found: list[Parameter]) -> dict[str, str]:
    """{name: value}."""
    return {one.name: one.value for one in found}


def _paged(build: Mapping[str, Any], part: schema.Repository) -> list[Parameter]:
    """What is on if the engine supports it, unless the recipe decides."""
    paged = compatibility.has_paged_fmha(build)
    reasons = {
        name: f"the engine has {'' if paged else 'no '}paged context FMHA" for name in compatibility.NEED_PAGED_FMHA
    }
    on = dict.fromkeys(reasons, paged)
    if build.get("gather_context_logits"):
        on["enable_kv_cache_reuse"] = False
        reasons["enable_kv_cache_reuse"] = "the engine has gather_context_logits, and reused tokens have no logits"
    chosen = {name: getattr(part, name) for name in reasons}
    for name in compatibility.lacking_paged_fmha(build, [name for name, value in chosen.items() if value]):
        raise UsageError(
            f"repository.{name} needs an engine with paged context FMHA, and this engine has none.",
            hint=f"Omit {name}, or build with --set engine.flags.use_paged_context_fmha=enable "
            "on a GPU profile with context FMHA.",
        )
    return [
        Parameter(name, text(on[name]), reasons[name], "build_config")
        if chosen[name] is None
        else Parameter(name, text(chosen[name]), f"repository.{name}", "recipe")
        for name in reasons
    ]


def _check(found: Mapping[str, Parameter], config: Mapping[str, Any], beams: int) -> None:
    """UsageError for the first contradiction."""
    asked = int(found["max_beam_width"].value)
    if asked > beams:
        raise UsageError(
            f"{PREFIX}max_beam_width is {asked}, and the engine is built for {beams}.",
            why="The C++ backend would not load the engine.",
            hint=f"Omit it, or build with --set engine.flags.max_beam_width={asked}.",
        )
    pretrained = config.get("pretrained_config") or {}
    world_size = (pretrained.get("mapping") or {}).get("world_size") or 1
    mapping = {name: one.value for name, one in found.items()}
    for wrong in parameter_rules.contradictions(mapping, config["build_config"], world_size):
        raise UsageError(f"repository.parameters: {wrong.what}", why=wrong.why, hint=wrong.hint)
