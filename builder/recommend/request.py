"""What a recommendation is asked for: the limits, the bounds of the search, and the recipe that candidates vary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from builder.core.errors import UsageError
from builder.recipe.schema import Recipe, Resolved

BUILTIN = "builtin:python-docs"
# Texts that decide which layers are kept first, unless the recipe says otherwise: each group of layers is measured on
# them, so there are few. They rank layers; whether a candidate meets the budget is measured on the evaluation's texts.
RANKED_ON = {"sensitivity.texts": 8, "sensitivity.max_tokens": 128}


@dataclass(frozen=True)
class Request:
    """limits: by metric (evaluation.limits): the largest KL, the least score. max_bytes: of the checkpoint and the KV
    cache of one full sequence; None: any. max_candidates: how many to build and measure. max_seconds: of the whole
    search, with all that it measures; None: any time."""

    limits: Mapping[str, float]
    max_bytes: int | None = None
    max_candidates: int = 16
    max_seconds: float | None = None


def named(resolved: Resolved) -> set[str]:
    """The keys that the user named, in whatever source. These are not varied."""
    profile = f"GPU profile {resolved.gpu.name}"
    return {key for key, origin in resolved.origins.items() if not origin.startswith(profile)}


def varied(resolved: Resolved) -> Resolved:
    """The recipe that candidates vary: without a gate, measured as BF16 and as the checkpoint, and with texts to rank
    layers on. UsageError for a recipe that leaves no loss to limit, or in which `auto` chooses layers."""
    recipe = resolved.recipe
    if not recipe.evaluation.limits:
        raise UsageError(
            "No budget is named.",
            why="A recipe is recommended for the loss that is accepted.",
            hint="Name the largest KL to BF16: --max-kl 0.1, or the least score: --min-score 95",
        )
    if not recipe.evaluation.data:
        raise UsageError("There are no texts to measure candidates on.", hint="Name some: --data FILE.jsonl")
    if recipe.quantization.kept_budget is not None:
        raise UsageError(
            "auto chooses layers to keep for a KL, and so does this command.",
            hint="Leave auto:X out and give its X as --max-kl. Layers named by patterns stay kept.",
        )
    return resolved.changed({**_measured(), **_ranking(resolved)})


def _measured() -> dict[str, object]:
    return {
        "evaluation.max_kl": None,
        "evaluation.min_score": None,
        "evaluation.runners": ("bf16", "checkpoint"),
        "evaluation.compare_kv": False,
        "tasks.names": (),
    }


def _ranking(resolved: Resolved) -> dict[str, object]:
    """The texts to rank layers on: the recipe's, or the first rows of its calibration data."""
    recipe = resolved.recipe
    found: dict[str, object] = {key: value for key, value in RANKED_ON.items() if key not in resolved.origins}
    if recipe.sensitivity.data is None:
        found["sensitivity.data"] = _calibration_data(recipe)
    return found


def _calibration_data(recipe: Recipe) -> object:
    rows = recipe.calibration
    if rows.data_free:
        return BUILTIN
    keys = ("data", "config", "split", "column", "revision")
    return {key: value for key in keys if (value := getattr(rows, key)) is not None}
