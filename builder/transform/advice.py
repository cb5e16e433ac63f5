"""Which formats rotations cost accuracy in. Pure."""

from __future__ import annotations

from builder.recipe.schema import Recipe

# NVFP4's. A scale for so few values keeps an outlier from its neighbours, and a rotation spreads it over all of them.
# Seen on SmolLM2-135M-Instruct, R1 and R2, KL from BF16 on about 4000 tokens of prose, KV cache in BF16: 0.440 became
# 1.421; with exact weights and NVFP4 inputs, 0.179 became 0.462. MR-GPTQ (arXiv 2509.23202) shows by analysis that so
# small a group leaves rotations nothing to gain. Formats with one scale for a whole row or tensor gain, which is what
# SpinQuant was made for.
SMALL_GROUP = 16


def warning(recipe: Recipe) -> str | None:
    """What to know before rotating weights that are quantized to these formats; None if nothing is against it."""
    formats = recipe.quantization.quantized_formats
    small = [one.title for one in formats if one.group_size is not None and one.group_size <= SMALL_GROUP]
    if not recipe.transform.rotates or not small:
        return None
    return (
        f"rotations cost accuracy in {small[0]}: a scale for {SMALL_GROUP} values isolates outliers, and a rotation "
        "spreads them over all values (KL to BF16 0.440 became 1.421 on a model of 135M parameters). They help formats "
        "with one scale for a row or a tensor, such as int8. Compare first: builder eval with and without --transform"
    )
