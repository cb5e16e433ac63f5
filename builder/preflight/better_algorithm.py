"""The algorithm to propose after one that lost too much: only one that the next build would accept. Pure."""

from __future__ import annotations

from pydantic import ValidationError

from builder.core.errors import UnsupportedError, UsageError
from builder.formats import algorithms
from builder.preflight import ways
from builder.preflight.model_facts import ModelFacts
from builder.recipe.schema import Recipe


def better_algorithm(recipe: Recipe, model: ModelFacts) -> str:
    """The best of the algorithms after the recipe's that this model and this recipe can use; "" if there is none."""
    names = list(algorithms.ALGORITHMS)
    values = recipe.model_dump()
    for name in reversed(names[names.index(recipe.quantization.algorithm) + 1 :]):
        try:
            quantization = {**values["quantization"], "algorithm": name}
            ways.check(Recipe.model_validate({**values, "quantization": quantization}), model)
        except (ValidationError, UsageError, UnsupportedError):
            continue
        return name
    return ""
