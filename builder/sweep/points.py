"""A sweep's file -> its points: ordinary recipes, all validated before anything runs."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, PositiveInt, ValidationError, model_validator

from builder.core.errors import BuilderError, UsageError
from builder.core.store import digest_of
from builder.recipe import schema
from builder.recipe.base import Part
from builder.recipe.schema import Recipe, Resolved
from builder.recipe.sources import flatten, load_yaml, merge, nest, parse_set

Measure = Literal["eval", "build", "load"]
Labels = Mapping[str, str]  # {axis: label}
Keys = dict[str, Any]  # {recipe key with dots: value}
SLUG = 100  # characters of a directory's name
LISTED = "point"  # the only axis of a file with a list of points


class Included(Part):
    """A point beside those of the matrix."""

    labels: dict[str, str]
    recipe: Keys = Field(default_factory=dict)


class Listed(Part):
    """A point of a file without a matrix."""

    name: str
    recipe: Keys = Field(default_factory=dict)


def _once(values: tuple[int, ...]) -> tuple[int, ...]:
    """Each value once: two rows of a point with one name could not be told apart."""
    return tuple(dict.fromkeys(values))


class Load(Part):
    """What each served repository is sent: the options of `builder load`."""

    concurrency: Annotated[tuple[PositiveInt, ...], AfterValidator(_once)] = Field(default=(1, 4), min_length=1)
    requests: PositiveInt = 32
    input_tokens: PositiveInt = 128
    output_tokens: PositiveInt = 32


class Sweep(Part):
    """A file. recipe: the keys that all points share, as in a recipe. matrix: {axis: {label: keys}}. exclude: points
    with all of these labels are left out. points: instead of a matrix, the points one by one. measure: eval: texts and
    tasks; build: the repository with its quality check; load: that, served and measured with what `load` says."""

    title: str
    measure: tuple[Measure, ...] = Field(default=("eval",), min_length=1)
    load: Load = Load()
    recipe: dict[str, Any] = Field(default_factory=dict)
    matrix: dict[str, dict[str, Keys]] = Field(default_factory=dict)
    exclude: tuple[dict[str, str], ...] = ()
    include: tuple[Included, ...] = ()
    points: tuple[Listed, ...] = ()

    @model_validator(mode="after")
    def _labels_exist(self) -> Sweep:
        if "load" in self.model_fields_set and "load" not in self.measure:
            raise ValueError("load says what a served point is sent, and measure does not name load")
        if bool(self.matrix) == bool(self.points):
            raise ValueError("give a matrix, or a list of points")
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
    """One recipe. labels: in the order of the axes. values: the keys that the file sets, which are its recipe file.
    resolved: what is measured on texts and tasks, without a quality check. served: what is built, with one; None if
    nothing is. load: what the server is sent; None if it is not served."""

    labels: Labels
    values: Keys
    resolved: Resolved
    measured: bool = True
    served: Resolved | None = None
    load: Load | None = None

    @property
    def name(self) -> str:
        """For messages and tables."""
        return ", ".join(self.labels.values())

    @property
    def slug(self) -> str:
        """The name for files."""
        return slug(self.name)

    @property
    def recipe(self) -> Recipe:
        """Of what is built or, if nothing is, measured."""
        return (self.served or self.resolved).recipe

    @property
    def recipe_digest(self) -> str:
        """Of the keys that the file sets: another one for each change of the point."""
        return digest_of(self.values)[:16]

    @property
    def recipe_file(self) -> str:
        """The point as a file for `builder build --recipe`."""
        tree, _ = merge(("", nest(key, value)) for key, value in self.values.items())
        return f"# {self.name}\n{yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)}"


def slug(text: str) -> str:
    """The text in lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:SLUG]


def read(file: Path, *, model: str | None = None, sets: Sequence[str] = ()) -> tuple[str, list[Point]]:
    """The title and all points of a file. UsageError names what is wrong, and every point that is not a valid recipe.

    model: measured instead of the file's. sets: KEY=VALUE for all points.
    """
    try:
        asked = Sweep.model_validate(load_yaml(file))
    except ValidationError as error:
        found = "\n".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise UsageError(f"{file} is not a sweep.", why=found, hint="Compare it with configs/sweeps/") from error
    more: Keys = {"model.id": model} if model else {}
    for text in sets:
        more |= flatten(parse_set(text))
    points, wrong = [], list[str]()
    for labels, keys in _combinations(asked):
        values = {**flatten(asked.recipe), **keys, **more}
        try:
            points.append(_point(asked, labels, values))
        except BuilderError as error:
            wrong.append(f"{', '.join(labels.values())}: {error.what} {error.why}".strip())
    slugs = [point.slug for point in points]
    wrong += [f"{name}: two points have this name" for name in dict.fromkeys(slugs) if slugs.count(name) > 1]
    wrong += [f"{point.name}: the name has no letter or digit" for point in points if not point.slug]
    if wrong or not points:
        what = "points that are no valid recipe" if wrong else "no points"
        raise UsageError(f"{file} has {what}.", why="\n".join(wrong), hint="Correct the file; nothing was run.")
    return asked.title, points


def _point(asked: Sweep, labels: Labels, values: Keys) -> Point:
    """Each repository has a name of its own in models/, by which it is served."""
    built = asked.measure != ("eval",)
    if built:
        of = Path(str(values.get("model.id", ""))).name
        name = slug(" ".join([asked.title, of, *labels.values()]))
        values = {**values, "name": name if len(name) < SLUG else f"{name}-{digest_of([of, labels])[:8]}"}
    return Point(
        labels,
        values,
        schema.resolve({**values, "quality.check": False}),
        "eval" in asked.measure,
        schema.resolve(values) if built else None,
        asked.load if "load" in asked.measure else None,
    )


def _combinations(asked: Sweep) -> list[tuple[Labels, Keys]]:
    if asked.points:
        return [({LISTED: one.name}, flatten(one.recipe)) for one in asked.points]
    found: list[tuple[Labels, Keys]] = []
    for chosen in itertools.product(*(labels.items() for labels in asked.matrix.values())):
        labels = {axis: label for axis, (label, _) in zip(asked.matrix, chosen, strict=True)}
        if not any(one.items() <= labels.items() for one in asked.exclude):
            found.append((labels, {key: value for _, keys in chosen for key, value in flatten(keys).items()}))
    added = [({axis: one.labels[axis] for axis in asked.matrix}, flatten(one.recipe)) for one in asked.include]
    return found + added


def base_of(point: Point, points: Sequence[Point]) -> Point | None:
    """What the point is compared with: the same label of the last axis, and the first point's label of all others. Of
    a list or of a single axis the first point."""
    if len(point.labels) == 1:
        return points[0]
    *others, last = point.labels
    first = points[0].labels
    wanted = {**{axis: first[axis] for axis in others}, last: point.labels[last]}
    return next((one for one in points if one.labels == wanted), None)
