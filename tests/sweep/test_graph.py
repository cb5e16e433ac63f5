"""Which steps points share, and which they do not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from builder.recipe import schema
from builder.sweep.graph import Step, steps
from builder.sweep.points import Load, Point

MODEL = "tests/data/tiny-qwen3"


def point(name: str, values: Mapping[str, Any]) -> Point:
    whole = {"model.id": MODEL, "gpu": "cpu", "calibration.data": "builtin:python-docs", **values}
    return Point({"point": name}, whole, schema.resolve({**whole, "quality.check": False}))


def made(*values: Mapping[str, Any]) -> list[Step]:
    return steps([point(f"p{number}", one) for number, one in enumerate(values)])


def test_each_stage_of_a_point_is_a_step() -> None:
    found = made({})
    assert [step.name for step in found] == [
        f"p0/{kind}" for kind in ("fetch", "calibrate", "quantize", "baseline", "measure")
    ]
    assert found[-1].argv("recipe.yaml", "out") == ("builder", "eval", "--recipe", "recipe.yaml", "--output", "out")
    assert found[-1].needs == ("p0/fetch", "p0/quantize", "p0/baseline")


def test_a_point_that_is_served_is_built_and_loaded_after_its_checkpoint() -> None:
    values = {"model.id": MODEL, "gpu": "cpu", "calibration.samples": 0, "name": "mine"}
    resolved = schema.resolve(values)
    one = Point({"point": "p"}, values, resolved, measured=False, served=resolved, load=Load(concurrency=(1, 2)))
    found = {step.kind: step for step in steps([one])}
    assert [*found] == ["fetch", "quantize", "build", "load"]
    assert (found["build"].needs, found["load"].needs) == (("p/quantize",), ("p/build",))
    said = " ".join(found["load"].argv("recipe.yaml", "out"))
    assert said.startswith("builder load out/models/mine --concurrency 1 --concurrency 2 --requests 32 ")
    assert found["build"].argv("r", "o") == ("builder", "build", "--no-smoke", "--recipe", "r", "--output", "o")
    assert found["load"].before("r", "o") == found["build"].argv("r", "o"), "for a machine without the link"
    assert found["build"].before("r", "o") == ()


def test_two_algorithms_share_all_but_the_checkpoint() -> None:
    found = made({}, {"quantization.algorithm": "mse"})
    fetch, calibrate, baseline, *own = found
    assert [step.kind for step in found] == ["fetch", "calibrate", "baseline", *["quantize", "measure"] * 2]
    assert (fetch.needs, calibrate.needs, baseline.needs) == ((), (fetch.name,), (fetch.name,))
    assert own[0].needs == own[2].needs == (fetch.name, calibrate.name)
    assert own[1].needs == (fetch.name, own[0].name, baseline.name)


@pytest.mark.parametrize(
    ("changed", "shared"),
    [
        ({"evaluation.texts": 3}, ["fetch", "calibrate", "quantize"]),
        ({"evaluation.runners": ["bf16", "checkpoint", "simulated"]}, ["fetch", "calibrate", "quantize", "baseline"]),
        ({"calibration.samples": 8}, ["fetch", "baseline"]),
        ({"calibration.samples": 0}, ["fetch", "baseline"]),
        ({"quantization.kv_cache_dtype": "auto"}, ["fetch", "calibrate", "baseline"]),
        ({"transform.name": "spinquant"}, ["fetch", "calibrate", "baseline"]),
        ({"quantization.format": "bf16", "quantization.kv_cache_dtype": "auto"}, ["fetch", "baseline"]),
        ({"model.id": "tests/data/eval"}, []),
    ],
)
def test_what_two_points_share_follows_from_their_recipes(changed: dict[str, Any], shared: list[str]) -> None:
    found = made({}, changed)
    assert [step.kind for step in found if len(step.points) > 1] == shared


def test_a_rotation_is_computed_once_for_all_formats() -> None:
    rotated = {"transform.name": "spinquant"}
    found = made({}, rotated, {**rotated, "quantization.format": "fp8"})
    [transform] = [step for step in found if step.kind == "transform"]
    assert [one.name for one in transform.points] == ["p1", "p2"]
    users = [step.name for step in found if transform.name in step.needs]
    assert users == ["p1/quantize", "p2/quantize"]


def test_learned_rotations_wait_for_the_rows_that_they_read() -> None:
    learned = {"transform.name": "spinquant", "transform.kind": "learned"}
    found = made(learned, {**learned, "quantization.algorithm": "mse"})
    transform, calibrate = (next(step for step in found if step.kind == kind) for kind in ("transform", "calibrate"))
    assert calibrate.name in transform.needs


def test_a_gate_does_not_refuse_the_baseline_alone(tmp_path: Path) -> None:
    gate = {"evaluation.max_kl": 0.1}
    baseline = next(step for step in made(gate, {**gate, "quantization.algorithm": "mse"}) if step.kind == "baseline")
    file = tmp_path / "recipe.yaml"
    file.write_text(baseline.points[0].recipe_file)
    sets = [word for word in baseline.argv("recipe.yaml", "out") if "=" in word]
    assert sets
    resolved = schema.resolve({"evaluation.runners": ("bf16",)}, sets=sets, recipe_file=file)
    assert not resolved.recipe.evaluation.limits


def test_every_step_comes_after_those_that_it_needs() -> None:
    learned = {"transform.name": "spinquant", "transform.kind": "learned"}
    found = made({}, learned, {**learned, "quantization.algorithm": "mse"}, {"evaluation.texts": 3})
    seen: set[str] = set()
    for step in found:
        assert {*step.needs} <= seen, step.name
        seen.add(step.name)
