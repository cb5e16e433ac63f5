"""Which targets serve an architecture, and the errors for those that do not. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from builder.architectures import catalog
from builder.architectures.facts import Architecture, Engine
from builder.core.errors import UnsupportedError
from builder.core.release import order


def check_engine(config: Mapping[str, Any], version: str | None = None) -> tuple[Architecture, Engine]:
    """The architecture of a model, and how TensorRT-LLM's engine path serves it. The reference target runs the same
    layout, so this holds for it too.

    version: of TensorRT-LLM, if an engine is to be built. UnsupportedError if there is no layout for this config.json.
    """
    found = catalog.of(config)
    if found.engine is None:
        raise UnsupportedError(
            f"{found.name} has no TensorRT-LLM layout here.",
            why=f"The known ones: {', '.join(catalog.served_by('engine'))}.",
            hint=_without_engine(found),
        )
    for refusal in found.engine.refused:
        if config.get(refusal.key):
            what = f"{found.name} with {refusal.key} has no TensorRT-LLM layout."
            raise UnsupportedError(what, why=refusal.why, hint=_without_engine(found))
    if version is not None and order(version) < order(found.engine.since):
        raise UnsupportedError(
            f"TensorRT-LLM builds engines of {found.name} since {found.engine.since}; this recipe uses {version}.",
            why=found.engine.source,
            hint=f"--set engine.tensorrt_llm={found.engine.since}",
        )
    return found, found.engine


def _without_engine(found: Architecture) -> str:
    """What to do with a model that has no engine: the LLM API, if it serves the architecture."""
    if found.llmapi:
        return "Serve the Hugging Face layout, on a GPU and without an engine: --target llmapi. Or take another model."
    return "Take one of these models, or stop at the checkpoint in the Hugging Face layout: `builder quantize`."


def check_llmapi(config: Mapping[str, Any], version: str) -> None:
    """UnsupportedError if TensorRT-LLM's LLM class does not serve this model's architecture in this version."""
    known = catalog.served_by("llmapi", version)
    if (name := catalog.name_of(config)) not in known:
        raise UnsupportedError(
            f"{name} is not an architecture that the llmapi target is known to serve.",
            why=f"Known: {', '.join(known)} (tensorrt_llm/_torch/models).",
            hint="Take one of these models, or stop at the checkpoint: `builder quantize`.",
        )


def by_any_target(config: Mapping[str, Any]) -> bool:
    """Whether some target serves this model's architecture."""
    found = catalog.of(config)
    return bool(found.engine or found.llmapi or found.reference)
