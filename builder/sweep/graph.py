"""The points of a sweep as a graph of steps. Each step is one `builder` command that ends with one stage of the store.

A step that several points need is one: a model is fetched once, rotated once, its calibration rows are read once, a
checkpoint that several points measure is made once, and the BF16 model is measured once on the same texts and tasks.
The store's keys decide in the end what runs: a step whose stage is there already does nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from builder import pipeline
from builder.core.store import STAGES as IN_ORDER
from builder.core.store import digest_of
from builder.recipe.schema import Recipe
from builder.sweep.points import Point

Kind = Literal["fetch", "calibrate", "transform", "quantize", "baseline", "measure", "build", "load"]
# The words after `builder` of each kind. A baseline measures BF16 alone. A server that is measured needs no smoke test.
COMMANDS: Mapping[Kind, tuple[str, ...]] = {
    "fetch": ("fetch",),
    "calibrate": ("calibrate",),
    "transform": ("transform",),
    "quantize": ("quantize",),
    "baseline": ("eval", "--runner", "bf16"),
    "measure": ("eval",),
    "build": ("build", "--no-smoke"),
    "load": ("load",),
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
    "measure": ("fetch", "quantize", "baseline"),
    "build": ("quantize",),
    "load": ("build",),
}
OWN: tuple[Kind, ...] = ("measure", "build", "load")  # never shared
UNMEASURED = ("runners", "min_score", "max_kl")  # keys of an evaluation that BF16's figures do not depend on


@dataclass(frozen=True)
class Step:
    """One command. name: POINT/KIND, or KIND-DIGEST for several points. points: whose recipe it has (the first's), and
    who wait for it. needs: names of other steps."""

    name: str
    kind: Kind
    points: tuple[Point, ...]
    needs: tuple[str, ...]

    def argv(self, recipe: str, output: str) -> tuple[str, ...]:
        """The command, with its recipe file and its output directory."""
        [point, *_] = self.points
        if self.kind == "load":
            assert point.load is not None
            sent = [word for n in point.load.concurrency for word in ("--concurrency", str(n))]
            for name in ("requests", "input_tokens", "output_tokens"):
                sent += [f"--{name.replace('_', '-')}", str(getattr(point.load, name))]
            return ("builder", "load", f"{output}/models/{point.recipe.name}", *sent, "--output", output)
        return self._from_recipe(self.kind, recipe, output)

    def before(self, recipe: str, output: str) -> tuple[str, ...]:
        """A command that makes what this one finds beside the store, for a machine that did not run the steps before: a
        server is started by the link in models/, which only a build makes."""
        return self._from_recipe("build", recipe, output) if self.kind == "load" else ()

    def _from_recipe(self, kind: Kind, recipe: str, output: str) -> tuple[str, ...]:
        [point, *_] = self.points
        gated = kind == "baseline" and point.resolved.recipe.evaluation.limits
        ungated = ("--set", "evaluation.min_score=null", "--set", "evaluation.max_kl=null") if gated else ()
        return ("builder", *COMMANDS[kind], *ungated, "--recipe", recipe, "--output", output)


def steps(points: Sequence[Point]) -> list[Step]:
    """The steps of all points, each after those that it needs: what is shared, then point by point."""
    users: dict[tuple[Kind, str], list[Point]] = {}
    for point in points:
        for key in _keys(point):
            users.setdefault(key, []).append(point)
    names, found = dict[tuple[Kind, str], str](), list[Step]()
    shared = sorted((key for key, of in users.items() if len(of) > 1), key=lambda key: [*COMMANDS].index(key[0]))
    own = (key for point in points for key in _keys(point) if len(users[key]) == 1)
    for key in (*shared, *own):
        (kind, digest), of = key, users[key]
        names[key] = f"{kind}-{digest[:8]}" if len(of) > 1 else f"{of[0].slug}/{kind}"
        needs = tuple(names[before] for before in _keys(of[0]) if before[0] in NEEDS[kind])
        found.append(Step(names[key], kind, tuple(of), needs))
    return found


def _keys(point: Point) -> list[tuple[Kind, str]]:
    """Each kind of step that the point needs, with a digest of what it depends on."""
    return [(kind, digest_of(what)) for kind, what in _parts(point)]


def _parts(point: Point) -> Iterator[tuple[Kind, Any]]:
    """What each step of a point depends on, as far as the recipe says."""
    recipe: Recipe = point.resolved.recipe
    whole = recipe.model_dump(mode="json")
    model, calibration, transform = whole["model"], whole["calibration"], whole["transform"]
    yield "fetch", model
    if not (recipe.quantization.as_it_is or recipe.calibration.data_free):
        yield "calibrate", [model, calibration]
    rotated = [model, transform, calibration if recipe.transform.learns else None]
    if recipe.transform.rotates:
        yield "transform", rotated
    if point.served or IN_ORDER.index(pipeline.stage_needed(recipe)) >= IN_ORDER.index(STAGES["quantize"]):
        yield "quantize", [rotated, calibration, whole["quantization"], whole["gpu"], whole["target"], whole["engine"]]
    if point.measured:
        measured = {key: value for key, value in whole["evaluation"].items() if key not in UNMEASURED}
        if "bf16" in recipe.evaluation.runners:
            yield "baseline", [model, measured, whole["tasks"], whole["quantization"]["memory"]]
        yield "measure", point.slug
    if point.served:
        yield "build", point.slug
    if point.load:
        yield "load", point.slug
