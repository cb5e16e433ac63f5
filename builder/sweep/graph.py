"""The points of a sweep as a graph of steps: each is a `builder` command, and work that several points share is one.

A step is shared by what it depends on: a model is fetched once, rotated once, its calibration rows are read once, a
checkpoint that several points measure is made once, and the BF16 model is measured once on the same texts and tasks.
What only one point needs is left to that point's own command. The store's keys decide in the end what runs: a step
whose stage is there already does nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from builder.core.store import digest_of
from builder.recipe.schema import Recipe
from builder.sweep.points import Point

Kind = Literal["fetch", "calibrate", "transform", "quantize", "baseline", "measure"]
# The words after `builder` of each kind. A baseline measures BF16 alone.
COMMANDS: Mapping[Kind, tuple[str, ...]] = {
    "fetch": ("fetch",),
    "calibrate": ("calibrate",),
    "transform": ("transform",),
    "quantize": ("quantize",),
    "baseline": ("eval", "--runner", "bf16"),
    "measure": ("eval",),
}
# The store's name of the last stage of those that only build.
STAGES: Mapping[Kind, str] = {
    "fetch": "snapshot",
    "calibrate": "calibration",
    "transform": "transform",
    "quantize": "checkpoint",
}
NEEDS: Mapping[Kind, tuple[Kind, ...]] = {
    "fetch": (),
    "transform": ("fetch", "calibrate"),  # learned rotations read the rows
    "calibrate": ("fetch",),
    "quantize": ("fetch", "transform", "calibrate"),
    "baseline": ("fetch",),
    "measure": ("fetch", "transform", "calibrate", "quantize", "baseline"),
}
UNMEASURED = ("runners", "min_score", "max_kl")  # keys of an evaluation that BF16's figures do not depend on


@dataclass(frozen=True)
class Step:
    """One command. points: whose recipe it has (the first's), and who wait for it. needs: names of other steps."""

    name: str
    kind: Kind
    points: tuple[Point, ...]
    needs: tuple[str, ...]

    @property
    def argv(self) -> tuple[str, ...]:
        """The command, without its recipe file and its output directory."""
        gated = self.kind == "baseline" and self.points[0].resolved.recipe.evaluation.limits
        ungated = ("--set", "evaluation.min_score=null", "--set", "evaluation.max_kl=null") if gated else ()
        return ("builder", *COMMANDS[self.kind], *ungated)


def steps(points: Sequence[Point]) -> list[Step]:
    """The steps of all points, each after those that it needs."""
    users: dict[tuple[Kind, str], list[Point]] = {}
    for point in points:
        for kind, what in _parts(point.resolved.recipe):
            users.setdefault((kind, digest_of(what)), []).append(point)
    shared = {key: of for key, of in users.items() if len(of) > 1}
    made, found = dict[tuple[Kind, str], str](), list[Step]()
    for (kind, digest), of in sorted(shared.items(), key=lambda item: [*COMMANDS].index(item[0][0])):
        needs = _needed(of[0], kind, made)
        made[kind, digest] = f"{kind}-{digest[:8]}"
        found.append(Step(made[kind, digest], kind, tuple(of), needs))
    return found + [Step(point.slug, "measure", (point,), _needed(point, "measure", made)) for point in points]


def _needed(point: Point, kind: Kind, made: Mapping[tuple[Kind, str], str]) -> tuple[str, ...]:
    """The names of those of the steps made that this kind of step needs for a point."""
    keys = [(before, digest_of(what)) for before, what in _parts(point.resolved.recipe) if before in NEEDS[kind]]
    return tuple(made[key] for key in keys if key in made)


def _parts(recipe: Recipe) -> Iterator[tuple[Kind, Any]]:
    """What each step of a recipe depends on, as far as the recipe says."""
    whole = recipe.model_dump(mode="json")
    model, calibration, transform = whole["model"], whole["calibration"], whole["transform"]
    yield "fetch", model
    if not (recipe.quantization.as_it_is or recipe.calibration.data_free):
        yield "calibrate", [model, calibration]
    rotated = [model, transform, calibration if recipe.transform.learns else None]
    if recipe.transform.rotates:
        yield "transform", rotated
    yield "quantize", [rotated, calibration, whole["quantization"], whole["gpu"], whole["target"], whole["engine"]]
    measured = {key: value for key, value in whole["evaluation"].items() if key not in UNMEASURED}
    yield "baseline", [model, measured, whole["tasks"], whole["quantization"]["memory"]]
