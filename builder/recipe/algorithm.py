"""The part of a recipe about the algorithm that chooses codes and scales."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from builder.formats import algorithms
from builder.formats.base import NumberFormat
from builder.recipe.base import Part

AlgorithmName = Literal["max", "mse", "hessian", "gptq"]  # formats/algorithms.py, ALGORITHMS


class Gptq(Part):
    """Values of the GPTQ algorithm."""

    scales: Annotated[
        Literal["max", "mse", "hessian"], Field(description="how GPTQ's scales are chosen, as by algorithm")
    ] = "hessian"
    damping: Annotated[
        float, Field(gt=0, le=1, description="added to the diagonal of the Hessian, as a share of its mean")
    ] = 0.05
    order: Annotated[
        Literal["none", "activation"],
        Field(description="in which columns are rounded: as they are, or blocks with the largest inputs first"),
    ] = "activation"
    block_size: Annotated[int, Field(ge=16, le=65536, description="columns at a time, a multiple of 16")] = 128

    @field_validator("block_size")
    @classmethod
    def _whole_blocks(cls, value: int) -> int:
        if value % 16:
            raise ValueError(f"{value} is not a multiple of 16, the number of weights that share a block scale")
        return value


def refusal(name: str, format_name: str, quantized: tuple[NumberFormat, ...]) -> str:
    """Why this algorithm can't choose the weights of these formats; "" if it can."""
    algorithm = algorithms.ALGORITHMS[name]
    if algorithm is algorithms.MAX or any(map(algorithm.treats, quantized)):
        return ""
    if any(one.scales_inputs for one in quantized):
        return (
            f"format {format_name} has an algorithm of its own, which searches scales of the inputs, so {name} can't "
            "be combined with it; leave algorithm out, or use format nvfp4"
        )
    if algorithm.integers:
        return f"algorithm {name} rounds NVFP4 and INT8, and format {format_name} has neither; leave algorithm out"
    treated = dict.fromkeys(other.name for one in quantized for other in algorithms.treated(one))
    instead = f"use algorithm {' or '.join(treated)}, or leave it out" if treated else "leave algorithm out"
    return f"algorithm {name} chooses the block scales of NVFP4, and format {format_name} has none; {instead}"
