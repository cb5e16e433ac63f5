"""Which targets serve an architecture, and the errors for those that do not. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from builder.architectures import catalog
from builder.architectures.facts import Architecture, Engine, LlmApi
from builder.core.errors import UnsupportedError
from builder.core.release import reaches


def check_engine(config: Mapping[str, Any], version: str | None = None) -> tuple[Architecture, Engine]:
    """The architecture of a model, and how TensorRT-LLM's engine path serves it. The reference target runs the same
    layout, so this holds for it too.

    version: of TensorRT-LLM, if an engine is to be built. UnsupportedError if there is no layout for this config.json.
    """
    found = catalog.of(config)
    if found.engine is None:
        raise UnsupportedError(
            f"{found.name} has no TensorRT-LLM layout here.",
            why=f"The known ones: {', '.join(catalog.served_by('engine'))}."
            + (f" {found.not_served.why} ({found.not_served.source})." if found.not_served else ""),
            hint=_without_engine(found, config, version),
        )
    for refusal in found.engine.refused:
        if config.get(refusal.key):
            what = f"{found.name} with {refusal.key} has no TensorRT-LLM layout."
            raise UnsupportedError(what, why=refusal.why, hint=_without_engine(found, config, version))
    if not reaches(version, found.engine.since):
        raise UnsupportedError(
            f"TensorRT-LLM builds engines of {found.name} since {found.engine.since}; this recipe uses {version}.",
            why=found.engine.source,
            hint=f"--set engine.tensorrt_llm={found.engine.since}",
        )
    return found, found.engine


STOP = "stop at the checkpoint in the Hugging Face layout: `builder quantize`"


def _without_engine(found: Architecture, config: Mapping[str, Any], version: str | None) -> str:
    """What to do with a model that has no engine: the LLM API, if it serves the architecture.

    version: of TensorRT-LLM in the recipe; None for a recipe without a GPU, which must name one then.
    """
    served = found.llmapi
    if served is None or any(config.get(refusal.key) for refusal in served.refused):
        return f"Take one of these models, or {STOP}."
    needed = served.since is not None and (version is None or not reaches(version, served.since))
    flags = [*(["--gpu sm120"] if version is None else []), "--target llmapi"]
    flags += [f"--set engine.tensorrt_llm={served.since}"] if needed else []
    return f"Serve the Hugging Face layout, on a GPU and without an engine: {' '.join(flags)}"


def check_llmapi(config: Mapping[str, Any], version: str) -> LlmApi:
    """How TensorRT-LLM's LLM class serves this model's architecture. UnsupportedError if this version does not."""
    found = catalog.of(config)
    if found.llmapi is None:
        known = f"Known: {', '.join(catalog.served_by('llmapi', version))} (tensorrt_llm/_torch/models)."
        raise UnsupportedError(
            f"{found.name} is not an architecture that the llmapi target is known to serve.",
            why=f"{found.not_served.why} ({found.not_served.source})." if found.not_served else known,
            hint=f"Take another model, or {STOP}.",
        )
    since = found.llmapi.since
    if not reaches(version, since):
        raise UnsupportedError(
            f"TensorRT-LLM's LLM class serves {found.name} since {since}; this recipe uses {version}.",
            why=found.llmapi.source,
            hint=f"--set engine.tensorrt_llm={since}",
        )
    for refusal in found.llmapi.refused:
        if config.get(refusal.key):
            raise UnsupportedError(
                f"TensorRT-LLM's LLM class does not load a quantized {found.name} with {refusal.key}.",
                why=refusal.why,
                hint=f"Take another model, or {STOP}.",
            )
    return found.llmapi


def by_any_target(config: Mapping[str, Any]) -> bool:
    """Whether some target serves this model's architecture."""
    found = catalog.of(config)
    return bool(found.engine or found.llmapi or found.reference)
