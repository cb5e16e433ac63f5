"""The reference target: the engine's repository, run on a CPU by the executor of `builder/reference/`."""

from __future__ import annotations

from builder.recipe.target_facts import REFERENCE, TargetFacts
from builder.targets.base import Excluded, Inputs, Launch, Made, Settings
from builder.targets.engine import EngineTarget


class ReferenceTarget(EngineTarget):
    """As the engine target, without TensorRT: no GEMM kernels that limit sizes or formats, and no command."""

    facts: TargetFacts = REFERENCE

    def check_excluded(self, excluded: Excluded, settings: Settings) -> None:
        """The executor multiplies each layer in its own format."""

    def why_output_is_quantized(self, settings: Settings, number_format: str) -> str:
        """It need not be."""
        return ""

    def launch(self, inputs: Inputs, settings: Settings, made: Made) -> Launch:
        """Nothing is run to make the engine directory."""
        return Launch()
