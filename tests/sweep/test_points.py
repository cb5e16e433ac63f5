"""Files of configs/sweeps: every point is a valid recipe, and faults are named before anything runs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from builder.core import paths
from builder.core.errors import UsageError
from builder.core.output import Output
from builder.core.store import Store
from builder.hub import snapshot
from builder.preflight import prepare as preparing
from builder.recipe import schema
from builder.sweep import place, planning
from builder.sweep.points import Load, base_of, read

FILES = sorted(paths.data("configs", "sweeps").glob("*.yaml"))
MODEL = Path("tests/data/tiny-qwen3")


def written(directory: Path, **more: Any) -> Path:
    """A file with two axes and four points."""
    asked: dict[str, Any] = {
        "title": "test",
        "recipe": {"model": {"id": str(MODEL)}, "gpu": "cpu", "quantization": {"kv_cache_dtype": "auto"}},
        "matrix": {
            "rounding": {"RTN": {}, "GPTQ": {"quantization.algorithm": "gptq"}},
            "format": {"NVFP4": {"quantization.format": "nvfp4"}, "INT8": {"quantization.format": "int8_dynamic"}},
        },
        **more,
    }
    (directory / "sweep.yaml").write_text(yaml.safe_dump(asked, sort_keys=False))
    return directory / "sweep.yaml"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_point_of_a_shipped_file_can_be_built(file: Path, tmp_path: Path) -> None:
    title, points = read(file)
    assert title
    planned = planning.plan(title, points, Store(tmp_path, Output("quiet"), dry=True))
    assert {point.slug for step in planned.steps if step.kind == "measure" for point in step.points} == {
        point.slug for point in points
    }
    assert not (tmp_path / "sweeps").exists()
    assert all(base_of(point, points) in points for point in points)
    assert f"builder sweep configs/sweeps/{file.name}" in file.read_text()


def test_the_field_s_ablation_has_its_axes() -> None:
    _, points = read(paths.data("configs", "sweeps", "bundled.yaml"))
    assert len(points) == 2 * 2 * 7
    last = points[-1]
    assert list(last.labels.values()) == ["R1R2", "GPTQ", "INT8 weights"]
    assert last.resolved.recipe.transform.name == "spinquant"
    assert last.resolved.recipe.quantization.rounding["algorithm"] == "gptq"
    base = base_of(last, points)
    assert base is not None
    assert list(base.labels.values()) == ["original", "RTN", "INT8 weights"]


def test_points_are_left_out_added_and_set(tmp_path: Path) -> None:
    more: dict[str, Any] = {"labels": {"rounding": "GPTQ, scales by max", "format": "NVFP4"}}
    more |= {"recipe": {"quantization": {"algorithm": "gptq", "gptq": {"scales": "max"}}}}
    file = written(tmp_path, exclude=[{"rounding": "GPTQ", "format": "INT8"}], include=[more])
    _, points = read(file, sets=["calibration.samples=8"])
    assert [point.slug for point in points] == ["rtn-nvfp4", "rtn-int8", "gptq-nvfp4", "gptq-scales-by-max-nvfp4"]
    assert points[-1].resolved.recipe.quantization.gptq.scales == "max"
    assert {point.resolved.recipe.calibration.samples for point in points} == {8}


@pytest.mark.parametrize("named", [{"model": f"{MODEL}/"}, {"sets": (f"model.id={MODEL}",)}], ids=["model", "set"])
def test_a_model_that_is_named_takes_the_place_of_the_file_s(tmp_path: Path, named: dict[str, Any]) -> None:
    file, store = written(tmp_path), Store(tmp_path, Output("quiet"), dry=True)
    directories = {place.directory(*read(file, **more), store) for more in ({}, named)}
    assert directories == {tmp_path / "sweeps" / "test-tiny-qwen3"}


def test_files_of_one_title_and_other_models_of_one_name_share_no_results(tmp_path: Path) -> None:
    store = Store(tmp_path / "out", Output("quiet"))
    files = []
    for parent in ("a", "b"):
        shutil.copytree(MODEL, tmp_path / parent / "model")
        shared = {"model": {"id": str(tmp_path / parent / "model")}, "gpu": "cpu", "calibration": {"samples": 0}}
        files.append(written(tmp_path / parent, recipe=shared, matrix={"a": {"x": {}}}))
    places = [place.claim(*read(file), store) for file in (*files, *files)]
    assert places[0].name == "test-model"
    assert places[1].name.startswith("test-model-")
    assert places[2:] == places[:2], "the same ones again"


def test_a_point_that_is_built_has_a_repository_of_its_own(tmp_path: Path) -> None:
    _, points = read(written(tmp_path, measure=["build", "load"], load={"concurrency": [2]}))
    names = [point.recipe.name for point in points]
    assert names[0] == "test-tiny-qwen3-rtn-nvfp4"
    assert len({*names}) == len(points)
    assert points[0].load == Load(concurrency=(2,))
    assert Load(concurrency=(4, 1, 4)).concurrency == (4, 1), "the rows of a point have names of their own"
    assert points[0].served
    assert points[0].served.recipe.quality.check
    assert not points[0].measured


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"matrix": {}}, "give a matrix, or a list of points"),
        ({"matrix": {"format": {}}}, "the axis format has no labels"),
        ({"matrices": {}}, "matrices: Extra inputs are not permitted"),
        ({"exclude": [{"format": "FP8"}]}, "exclude names format: FP8, which the matrix does not have"),
        ({"include": [{"labels": {"format": "FP8"}}]}, "include names the axes ['format']"),
        (
            {"matrix": {"format": {"A": {"quantization.formt": "nvfp4"}}}},
            "A: The recipe is not valid: there is no key 'quantization.formt'",
        ),
        ({"points": [{"name": "A"}]}, "give a matrix, or a list of points"),
        ({"measure": ["speed"]}, "measure.0: Input should be 'eval', 'build' or 'load'"),
        ({"load": {"requests": 4}}, "measure does not name load"),
        ({"measure": ["load"], "load": {"requests": 0}}, "load.requests: Input should be greater than 0"),
        ({"matrix": {"a": {"x y": {}, "x-y": {}}}}, "x-y: two points have this name"),
        ({"matrix": {"a": {"low": {"quantization.algorithm": "mse", "quantization.format": "int8_dynamic"}}}}, "low: "),
    ],
)
def test_a_fault_is_named_before_anything_runs(more: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        read(written(tmp_path, **more))
    assert said in caught.value.why


def test_points_that_the_model_does_not_take_are_named(tmp_path: Path) -> None:
    file = written(tmp_path, matrix={"a": {"fits": {}, "does not": {"quantization.keep_bf16": ["*.no_such_layer"]}}})
    with pytest.raises(UsageError, match="Not all points can be built") as caught:
        planning.plan(*read(file), Store(tmp_path / "out", Output("quiet"), dry=True))
    assert caught.value.why.startswith("does not: ")
    assert not (tmp_path / "out").exists()


def test_tasks_that_a_point_can_not_do_are_named_before_anything_is_quantized(tmp_path: Path) -> None:
    tasks = {"tasks.directory": "tests/data/tasks", "tasks.names": ["next_word"]}
    sets = {
        "whole": tasks,
        "layer by layer": {**tasks, "quantization.memory": "low"},
        "texts": {"quantization.memory": "low"},
    }
    file = written(tmp_path, matrix={"a": sets})
    with pytest.raises(UsageError, match="Not all points can be built") as caught:
        planning.plan(*read(file), Store(tmp_path / "out", Output("quiet"), dry=True))
    assert caught.value.why.startswith("layer by layer: Tasks need the whole model in memory")
    assert "\n" not in caught.value.why


def test_a_model_is_opened_once_for_all_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model on the Hub, each time is a request for each of its files."""
    opened = list[str]()

    def counted(model: schema.Model, **more: Any) -> Any:
        opened.append(model.id)
        return snapshot.open_source(model, **more)

    monkeypatch.setattr(preparing, "open_source", counted)
    title, points = read(paths.data("configs", "sweeps", "bundled.yaml"))
    assert len(planning.plan(title, points, Store(tmp_path, Output("quiet"), dry=True)).prepared) == 28
    assert len(opened) == 1


def test_a_list_of_points_is_compared_with_its_first(tmp_path: Path) -> None:
    points = [{"name": "Plain"}, {"name": "FP8", "recipe": {"quantization": {"format": "fp8"}}}]
    _, found = read(written(tmp_path, matrix={}, points=points))
    assert [point.slug for point in found] == ["plain", "fp8"]
    assert [base_of(point, found) for point in found] == [found[0], found[0]]


def test_the_recipe_file_of_a_point_is_the_point(tmp_path: Path) -> None:
    _, points = read(written(tmp_path))
    for point in points:
        (tmp_path / "recipe.yaml").write_text(point.recipe_file)
        read_back = schema.resolve({"quality.check": False}, recipe_file=tmp_path / "recipe.yaml")
        assert read_back.recipe == point.resolved.recipe
