"""The points of an ablation: a YAML file with a matrix of recipe keys becomes ordinary recipes, all validated."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from builder.core.errors import BuilderError, UsageError
from builder.recipe import schema
from builder.recipe.base import Part
from builder.recipe.schema import Resolved
from builder.recipe.sources import flatten, load_yaml, parse_set

Labels = Mapping[str, str]  # {axis: label}
Keys = dict[str, Any]  # {recipe key with dots: value}


class Included(Part):
    """A point beside those of the matrix."""

    labels: dict[str, str]
    recipe: Keys = Field(default_factory=dict)


class Ablation(Part):
    """A file. recipe: the keys that all points share, as in a recipe. matrix: {axis: {label: keys}}. exclude: points
    with all of these labels are left out."""

    title: str
    recipe: dict[str, Any]
    matrix: Annotated[dict[str, dict[str, Keys]], Field(min_length=1)]
    exclude: tuple[dict[str, str], ...] = ()
    include: tuple[Included, ...] = ()

    @model_validator(mode="after")
    def _labels_exist(self) -> Ablation:
        for axis, labels in self.matrix.items():
            if not labels:
                raise ValueError(f"the axis {axis} has no labels")
        for one in self.exclude:
            for axis, label in one.items():
                if label not in self.matrix.get(axis, {}):
                    raise ValueError(f"exclude names {axis}: {label}, which the matrix does not have")
        for more in self.include:
            if more.labels.keys() != self.matrix.keys():
                raise ValueError(f"include names the axes {sorted(more.labels)}, the matrix has {sorted(self.matrix)}")
        return self


@dataclass(frozen=True)
class Point:
    """One recipe. labels: in the order of the axes."""

    labels: Labels
    resolved: Resolved

    @property
    def name(self) -> str:
        """For files and messages."""
        return ", ".join(self.labels.values())

    @property
    def slug(self) -> str:
        """The name in lower-case letters, digits and dashes."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


def read(file: Path, *, model: Path | None = None, sets: Sequence[str] = ()) -> tuple[str, list[Point]]:
    """The title and all points of a file. UsageError names what is wrong and the points that no build would accept.

    model: measured instead of the file's. sets: KEY=VALUE for all points.
    """
    try:
        asked = Ablation.model_validate(load_yaml(file))
    except ValidationError as error:
        found = "\n".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise UsageError(f"{file} is not an ablation.", why=found, hint="Compare it with configs/ablations/") from error
    more: Keys = {"model.id": str(model)} if model else {}
    for text in sets:
        more |= flatten(parse_set(text))
    points, wrong = [], list[str]()
    for labels, keys in _combinations(asked):
        try:
            values = {**flatten(asked.recipe), "quality.check": False, **keys, **more}
            points.append(Point(labels, schema.resolve(values)))
        except BuilderError as error:
            wrong.append(f"{', '.join(labels.values())}: {error.what} {error.why}".strip())
    names = [point.slug for point in points]
    wrong += [f"{name}: two points have this name" for name in dict.fromkeys(names) if names.count(name) > 1]
    if wrong or not points:
        what = "points that can't be built" if wrong else "no points"
        raise UsageError(f"{file} has {what}.", why="\n".join(wrong), hint="Correct the file; nothing was run.")
    return asked.title, points


def _combinations(asked: Ablation) -> list[tuple[Labels, Keys]]:
    found: list[tuple[Labels, Keys]] = []
    for chosen in itertools.product(*(labels.items() for labels in asked.matrix.values())):
        labels = {axis: label for axis, (label, _) in zip(asked.matrix, chosen, strict=True)}
        if not any(one.items() <= labels.items() for one in asked.exclude):
            found.append((labels, {key: value for _, keys in chosen for key, value in flatten(keys).items()}))
    ordered = [({axis: one.labels[axis] for axis in asked.matrix}, flatten(one.recipe)) for one in asked.include]
    return found + ordered


def base_of(point: Point, points: Sequence[Point]) -> Point | None:
    """What the point is compared with: the same label of the last axis, and the first point's label of all others."""
    *others, last = point.labels
    first = points[0].labels
    wanted = {**{axis: first[axis] for axis in others}, last: point.labels[last]}
    return next((one for one in points if one.labels == wanted), None)
