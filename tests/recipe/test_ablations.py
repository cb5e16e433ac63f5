"""Files of configs/ablations: every point is a valid recipe, faults are named before anything runs, and one runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from builder.core import paths
from builder.core.errors import UsageError
from builder.core.output import Output
from builder.core.store import Store
from builder.evaluate.metrics import Estimate
from builder.evaluate.stage import Evaluation
from builder.recipe.schema import Resolved

FILES = sorted(paths.data("configs", "ablations").glob("*.yaml"))
MODEL = Path("tests/data/tiny-qwen3")


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))


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
    (directory / "ablation.yaml").write_text(yaml.safe_dump(asked, sort_keys=False))
    return directory / "ablation.yaml"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_point_of_a_shipped_file_can_be_built(file: Path, tmp_path: Path) -> None:
    from ablation import check
    from points import base_of, read

    title, points = read(file)
    assert title
    check(points, Store(tmp_path, Output("quiet")))
    assert all(base_of(point, points) in points for point in points)
    assert f"benchmarks/ablation.py configs/ablations/{file.name}" in file.read_text()


def test_the_field_s_ablation_has_its_axes() -> None:
    from points import base_of, read

    _, points = read(paths.data("configs", "ablations", "bundled.yaml"))
    assert len(points) == 2 * 2 * 7
    last = points[-1]
    assert list(last.labels.values()) == ["R1R2", "GPTQ", "INT8 weights"]
    assert last.resolved.recipe.transform.name == "spinquant"
    assert last.resolved.recipe.quantization.rounding["algorithm"] == "gptq"
    base = base_of(last, points)
    assert base is not None
    assert list(base.labels.values()) == ["original", "RTN", "INT8 weights"]


def test_points_are_left_out_added_and_set(tmp_path: Path) -> None:
    from points import read

    more = {"labels": {"rounding": "GPTQ, scales by max", "format": "NVFP4"}}
    more |= {"recipe": {"quantization": {"algorithm": "gptq", "gptq": {"scales": "max"}}}}
    file = written(tmp_path, exclude=[{"rounding": "GPTQ", "format": "INT8"}], include=[more])
    _, points = read(file, sets=["calibration.samples=8"])
    assert [point.slug for point in points] == ["rtn-nvfp4", "rtn-int8", "gptq-nvfp4", "gptq-scales-by-max-nvfp4"]
    assert points[-1].resolved.recipe.quantization.gptq.scales == "max"
    assert {point.resolved.recipe.calibration.samples for point in points} == {8}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"matrix": {}}, "matrix: Dictionary should have at least 1 item"),
        ({"matrix": {"format": {}}}, "the axis format has no labels"),
        ({"matrices": {}}, "matrices: Extra inputs are not permitted"),
        ({"exclude": [{"format": "FP8"}]}, "exclude names format: FP8, which the matrix does not have"),
        ({"include": [{"labels": {"format": "FP8"}}]}, "include names the axes ['format']"),
        (
            {"matrix": {"format": {"A": {"quantization.formt": "nvfp4"}}}},
            "A: The recipe is not valid: there is no key 'quantization.formt'",
        ),
        ({"matrix": {"a": {"x y": {}, "x-y": {}}}}, "x-y: two points have this name"),
        ({"matrix": {"a": {"low": {"quantization.algorithm": "mse", "quantization.format": "int8_dynamic"}}}}, "low: "),
    ],
)
def test_a_fault_is_named_before_anything_runs(more: dict[str, Any], said: str, tmp_path: Path) -> None:
    from points import read

    with pytest.raises(UsageError) as caught:
        read(written(tmp_path, **more))
    assert said in caught.value.why


def test_points_that_the_model_does_not_take_are_named(tmp_path: Path) -> None:
    from ablation import main

    file = written(tmp_path, matrix={"a": {"fits": {}, "does not": {"quantization.keep_bf16": ["*.no_such_layer"]}}})
    assert main([str(file), "--work", str(tmp_path / "work")]) == 2
    assert not (tmp_path / "work" / "checkpoint").exists()


def test_points_that_are_not_measured_are_left_out_and_the_run_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ablation

    def measure(resolved: Resolved, store: Store) -> Evaluation:
        if resolved.recipe.quantization.algorithm == "gptq":
            return Evaluation({}, {}, {}, {"checkpoint": "its layers are joined"})
        figures = dict.fromkeys(("kl", "ppl", "score"), Estimate(1.0, 0.5, 2.0))
        return Evaluation({"checkpoint": {"prose": figures}}, {}, {}, {})

    monkeypatch.setattr(ablation.pipeline, "measure", measure)
    assert ablation.main([str(written(tmp_path)), "--work", str(tmp_path / "work")]) == 1
    said = capsys.readouterr()
    assert "GPTQ, NVFP4: checkpoint was not measured: its layers are joined" in said.err
    assert "RTN" in said.out
    assert "GPTQ" not in said.out
    assert "2 of 4 points" in (tmp_path / "work" / "ablation.html").read_text()


@pytest.mark.slow
def test_an_ablation_is_measured_on_texts_and_tasks_and_repeats_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ablation import main

    file, work = paths.data("configs", "ablations", "smallest.yaml"), tmp_path / "work"
    assert main([str(file), "--work", str(work)]) == 0
    first = json.loads((work / "ablation.json").read_text())
    rtn, gptq = first["points"]
    assert rtn["labels"] == {"rounding": "RTN", "format": "NVFP4"}
    assert gptq["texts"]["prose"]["kl_ratio"]["high"] < 1
    assert "kl_ratio" not in rtn["texts"]["prose"]
    assert gptq["tasks"]["follows"]["acc"]["low"] <= gptq["tasks"]["follows"]["acc"]["value"]
    page = (work / "ablation.html").read_text()
    assert "<svg" in page
    assert "KL / base" in page
    capsys.readouterr()
    assert main([str(file), "--work", str(work)]) == 0
    assert " making " not in capsys.readouterr().err
    assert json.loads((work / "ablation.json").read_text()) == first
