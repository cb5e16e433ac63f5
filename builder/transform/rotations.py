"""The rotations of one model: R1 of the residual stream, and R2 of the values of each layer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from builder.architectures.attention import head_size
from builder.recipe.transform import Transform
from builder.transform.rotation import Kind, Rotation, of_matrix, random


@dataclass(frozen=True)
class Rotations:
    """R1, and R2 of each layer. Either is asked for only where a tensor needs it.

    names: those of "r1" and "r2" that there are; titles: what each is.
    """

    names: tuple[str, ...]
    residual: Rotation | None
    values: Callable[[int], Rotation]

    @property
    def titles(self) -> dict[str, str]:
        """What each of them is."""
        found = {"r1": self.residual.title} if self.residual else {}
        return found | ({"r2": self.values(0).title} if "r2" in self.names else {})


def random_rotations(config: Mapping[str, Any], part: Transform) -> Rotations:
    """Random ones of a kind that is not learned, of the sizes in config.json."""
    kind: Kind = "orthogonal" if part.kind == "orthogonal" else "hadamard"

    @functools.cache
    def values(layer: int) -> Rotation:
        return random(head_size(config), kind, part.seed, f"r2.{layer}")

    residual = random(int(config["hidden_size"]), kind, part.seed, "r1") if "r1" in part.rotations else None
    return Rotations(part.rotations, residual, values)


def learned_rotations(matrices: Mapping[str, np.ndarray[Any, Any]], part: Transform) -> Rotations:
    """Those of a worker: "r1", and "r2.N" of layer N."""

    def one(name: str) -> Rotation:
        return of_matrix(matrices[name], f"orthogonal matrix of order {len(matrices[name])}, learned")

    residual = one("r1") if "r1" in part.rotations else None
    return Rotations(part.rotations, residual, functools.cache(lambda layer: one(f"r2.{layer}")))
