"""--keep-bf16 auto:X and --keep-fp8 auto:X: the layers to exclude from NVFP4 for a KL budget, in what follows."""

from __future__ import annotations

from builder.calibration.rows import Calibration
from builder.core.store import Store
from builder.evaluate.sensitivity import stage
from builder.hub.snapshot import Snapshot
from builder.preflight import checks
from builder.preflight.prepare import Prepared


def choose_excluded(prepared: Prepared, snapshot: Snapshot, calibration: Calibration, store: Store) -> Prepared:
    """The same with as many more layers in BF16 or FP8 as the budget needs. UnsupportedError where none suffice."""
    recipe = prepared.recipe
    refused = prepared.target.why_output_is_quantized(prepared.settings, recipe.quantization.kept_format)
    chosen = stage.select(snapshot, calibration, prepared.model, recipe, store=store, refused=refused)
    prepared = prepared.with_chosen(chosen.modules)
    checks.check_kept(recipe, prepared.model, prepared.settings)
    return prepared
