"""What serves a checkpoint: how each target is configured, checked, planned, built and rendered."""

from __future__ import annotations

from builder.targets.base import Target
from builder.targets.engine import EngineTarget
from builder.targets.llmapi import LlmApiTarget
from builder.targets.reference import ReferenceTarget

_TARGETS: dict[str, Target] = {
    target.facts.name: target for target in (EngineTarget(), LlmApiTarget(), ReferenceTarget())
}


def target(name: str) -> Target:
    """The target of a recipe by its name. KeyError for a name that the recipe's schema does not allow."""
    return _TARGETS[name]
