"""The part of a recipe about what is changed in a model before it is quantized."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from builder.recipe.base import Natural, Part


class Transform(Part):
    """Rotations that are folded into the weights and leave the model's function (SpinQuant, arXiv 2405.16406)."""

    name: Annotated[
        Literal["none", "spinquant"], Field(description="of the weights before they are quantized; none: as they are")
    ] = "none"
    rotations: Annotated[
        tuple[Literal["r1", "r2"], ...],
        Field(min_length=1, description="r1: of the residual stream; r2: of each head's values; default: both"),
    ] = ("r1", "r2")
    kind: Annotated[
        Literal["hadamard", "orthogonal"],
        Field(description="hadamard: random signs and a Hadamard matrix; orthogonal: uniformly random, much slower"),
    ] = "hadamard"
    seed: Annotated[Natural, Field(description="of the random signs or matrices")] = 0

    @field_validator("rotations", mode="before")
    @classmethod
    def _separated_by_commas(cls, value: Any) -> Any:
        names = value.split(",") if isinstance(value, str) else value
        return tuple(name.strip() if isinstance(name, str) else name for name in names)

    @field_validator("rotations")
    @classmethod
    def _in_order(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(sorted(set(value)))

    @property
    def rotates(self) -> bool:
        """Whether the weights are rotated."""
        return self.name == "spinquant"

    @property
    def title(self) -> str:
        """What is done, for people."""
        which = " and ".join(name.upper() for name in self.rotations)
        kind = "Hadamard" if self.kind == "hadamard" else self.kind
        return f"SpinQuant {which}, random {kind} matrices (seed {self.seed})"
