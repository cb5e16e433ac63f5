"""The part of a recipe about what is changed in a model before it is quantized."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from builder.recipe.base import Natural, Part, Positive


class Learning(Part):
    """How rotations are learned. Defaults are those of SpinQuant (arXiv 2405.16406, section 4.1: 100 steps of Cayley
    SGD at 1.5, eight rows each)."""

    steps: Annotated[Positive, Field(description="of Cayley SGD, each on its own calibration rows")] = 100
    rate: Annotated[float, Field(gt=0, le=100, description="largest learning rate; it falls to 0 as a cosine")] = 1.5
    rows: Annotated[Positive, Field(description="calibration rows of a step")] = 8


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
        Literal["hadamard", "orthogonal", "learned"],
        Field(
            description="hadamard: random signs and a Hadamard matrix; orthogonal: uniformly random, much slower; "
            "learned: from hadamard on, by the loss of the calibration rows"
        ),
    ] = "hadamard"
    seed: Annotated[Natural, Field(description="of the random signs or matrices")] = 0
    learning: Learning = Learning()

    @field_validator("rotations", mode="before")
    @classmethod
    def _separated_by_commas(cls, value: Any) -> Any:
        names = value.split(",") if isinstance(value, str) else value
        return tuple(name.strip() if isinstance(name, str) else name for name in names)

    @field_validator("rotations")
    @classmethod
    def _in_order(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(sorted(set(value)))

    @model_validator(mode="after")
    def _learning_has_an_effect(self) -> Transform:
        if self.kind != "learned" and self.learning != Learning():
            raise ValueError(f"values of learning have no effect with kind {self.kind}; use kind learned")
        return self

    @property
    def rotates(self) -> bool:
        """Whether the weights are rotated."""
        return self.name == "spinquant"

    @property
    def learns(self) -> bool:
        """Whether the rotations are learned."""
        return self.rotates and self.kind == "learned"

    @property
    def title(self) -> str:
        """What is done, for people."""
        which = " and ".join(name.upper() for name in self.rotations)
        if self.kind == "learned":
            steps = self.learning.steps
            return f"SpinQuant {which}, learned in {steps} steps from random Hadamard matrices (seed {self.seed})"
        kind = "Hadamard" if self.kind == "hadamard" else self.kind
        return f"SpinQuant {which}, random {kind} matrices (seed {self.seed})"
