"""The real MLflow, with a directory as its store."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from sweep_results import result, served

from builder.core.errors import StageError, UsageError
from builder.sweep.mlflow_sink import Sink

pytest.importorskip("mlflow")


def runs(sink: Sink) -> dict[str, Any]:
    """{name of a point: its run}."""
    found = sink._client.search_runs([sink._experiment])
    named = {run.info.run_name: run for run in found}
    assert len(named) == len(found), "none is doubled"
    return named


def test_a_point_has_one_run_that_follows_its_changes(tmp_path: Path) -> None:
    directory = tmp_path / "sweeps" / "t"
    first = [served(result(1.0, a="x", b="p: q"), 50), result(0, why="no memory", a="y", b="p: q")]
    assert Sink(str(tmp_path / "runs"), "A title").log(first, directory) == 2
    sink = Sink((tmp_path / "runs").as_uri(), "A title")
    assert sink.log(first, directory) == 0, "nothing changed"
    found = runs(sink)
    assert found["x, p: q"].data.params == {
        "a": "x", "b": "p: q", "model": "tests/data/tiny-qwen3", "recipe": first[0].point.recipe_digest,
    }  # fmt: skip
    metrics = found["x, p: q"].data.metrics
    assert (metrics["prose/kl"], metrics["prose/kl_low"], metrics["prose/kl_high"]) == pytest.approx((1.0, 0.9, 1.1))
    assert (metrics["concurrency 4/tokens_per_second"], metrics["bytes"]) == (50.0, 1000.0)
    assert found["x, p: q"].data.tags["sweep.verdict"] == "passed"
    assert found["y, p: q"].info.status == "FAILED"
    [recipe] = sink._client.list_artifacts(found["x, p: q"].info.run_id)
    assert recipe.path == "recipe.yaml"
    assert sink.log([result(2.0, a="x", b="p: q"), first[1]], directory) == 1
    assert runs(sink)["x, p: q"].data.metrics["prose/kl"] == 2.0
    assert sink.log(first, tmp_path / "other") == 2, "another sweep of this title"


def test_what_can_t_be_reached_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UsageError, match="There is no MLflow at"):
        Sink("http://127.0.0.1:1", "t")
    sink = Sink(str(tmp_path), "t")
    sink._experiment = "gone"
    with pytest.raises(StageError, match="MLflow did not take the results"):
        sink.log([result(1.0, a="x")], tmp_path)
    with pytest.raises(UsageError, match="user name or a password") as caught:
        Sink("http://me:secret@127.0.0.1:1", "t")
    assert "secret" not in str(caught.value)


def test_a_deleted_experiment_is_refused_before_anything_runs(tmp_path: Path) -> None:
    sink = Sink(str(tmp_path), "A title")
    sink._client.delete_experiment(sink._experiment)
    with pytest.raises(UsageError, match="'A title' was deleted") as caught:
        Sink(str(tmp_path), "A title")
    assert f"--experiment-id {sink._experiment}" in caught.value.hint
    sink._client.restore_experiment(sink._experiment)
    assert Sink(str(tmp_path), "A title").log([result(1.0, a="x")], tmp_path) == 1


def test_an_error_without_a_message_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.exceptions import MlflowException

    sink = Sink(str(tmp_path), "t")

    def fails(*_: object, **__: object) -> None:
        raise MlflowException("")

    monkeypatch.setattr(sink._client, "search_runs", fails)
    with pytest.raises(StageError, match="did not take the results") as caught:
        sink.log([result(1.0, a="x")], tmp_path)
    assert caught.value.why == "MlflowException"


def test_without_mlflow_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(UsageError, match="MLflow is not installed"):
        Sink(str(tmp_path), "t")
