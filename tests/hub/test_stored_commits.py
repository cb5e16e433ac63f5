"""A plan without a connection to the Hub uses commits from the store, and requests only what it needs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hub_server import Hub

from builder import plan
from builder.calibration.rows import calibrate
from builder.core.errors import StageError, UsageError
from builder.core.output import Output
from builder.core.store import Store
from builder.hub import snapshot
from builder.recipe import schema

SMALL = Path(__file__).parents[1] / "data" / "arch-variants" / "llama"
DATA = "news/articles"


def resolved(model: str, **more: str | int) -> schema.Resolved:
    keys = {"calibration.data": DATA, "calibration.samples": 8} | {k.replace("__", "."): v for k, v in more.items()}
    return schema.resolve({"model.id": model, "gpu": "sm100", "model.revision": None, **keys})


def planned(model: str, root: Path, **more: str | int) -> plan.Plan:
    return plan.plan(resolved(model, **more), Store(root, Output("quiet"), dry=True))


def states(found: plan.Plan) -> dict[str, str]:
    return {stage: state for stage, state, _ in found.stages}


@pytest.fixture
def filled(hub: Hub, tmp_path: Path) -> tuple[str, str]:
    """Builds the stages of a model and a data set from the Hub; returns their commits."""
    rows = tmp_path / "rows"
    rows.mkdir()
    lines = [json.dumps({"article": f"The article number {i}. " * 20}) for i in range(20)]
    (rows / "train.jsonl").write_text("\n".join(lines))
    return hub.add("tiny/llama", SMALL), hub.add(DATA, rows, repo_type="dataset")


def make(root: Path, model: str) -> None:
    """Makes the two stages that come from the Hub."""
    store = Store(root, Output("quiet"))
    asked = resolved(model).recipe
    snapshot.fetch(asked.model, store=store)
    calibrate(asked.calibration, store=store)


@pytest.mark.usefixtures("filled")
def test_a_local_model_needs_no_network(hub: Hub, tmp_path: Path) -> None:
    root = tmp_path / "out"
    with_hub = planned(str(SMALL), root)
    snapshot.fetch(schema.Model(id=str(SMALL)), store=Store(root, Output("quiet")))
    hub.__exit__()
    without = planned(str(SMALL), root)
    assert without.sizes == with_hub.sizes
    [why] = [why for stage, _, why in without.stages if stage == "calibration"]
    assert f"the commit of {DATA} is unknown: Can't reach the Hub" in why
    assert states(without)["snapshot"] == "cached"


def test_what_is_in_the_store_is_planned_with(hub: Hub, filled: tuple[str, str], tmp_path: Path) -> None:
    model, rows = filled
    make(tmp_path / "out", "tiny/llama")
    with_hub = planned("tiny/llama", tmp_path / "out")
    hub.__exit__()
    without = planned("tiny/llama", tmp_path / "out")
    assert (without.stages, without.sizes) == (with_hub.stages, with_hub.sizes)
    assert states(without)["calibration"] == "cached"
    [first, second] = [note.text for note in without.notes if note.rule == "offline"]
    assert f"commit {model} of tiny/llama" in first
    assert f"commit {rows} of {DATA}" in second
    assert not [note for note in with_hub.notes if note.rule == "offline"]


def test_a_commit_that_is_in_the_store_is_asked_of_nobody(hub: Hub, filled: tuple[str, str], tmp_path: Path) -> None:
    model, rows = filled
    make(tmp_path / "out", "tiny/llama")
    before = len(hub.requests)
    found = planned("tiny/llama", tmp_path / "out", model__revision=model, calibration__revision=rows)
    assert len(hub.requests) == before
    assert states(found)["snapshot"] == states(found)["calibration"] == "cached"


def test_what_the_store_lacks_is_no_guess(hub: Hub, filled: tuple[str, str], tmp_path: Path) -> None:
    """For another model, a branch that may have moved or other rows: an error or an open stage, no wrong commit."""
    make(tmp_path / "out", "tiny/llama")
    hub.__exit__()
    for model, more in (("tiny/other", {}), ("tiny/llama", {"model__revision": "v2"})):
        with pytest.raises(StageError, match="Can't reach the Hub"):
            planned(model, tmp_path / "out", **more)
    for more in ({"calibration__split": "test"}, {"calibration__revision": "v2"}, {"calibration__samples": 9}):
        assert states(planned("tiny/llama", tmp_path / "out", **more))["calibration"] == "will run"


@pytest.mark.usefixtures("filled")
def test_a_build_takes_no_commit_for_granted(hub: Hub, tmp_path: Path) -> None:
    make(tmp_path / "out", "tiny/llama")
    hub.__exit__()
    with pytest.raises(StageError, match="Can't reach the Hub"):
        make(tmp_path / "out", "tiny/llama")


def test_offline_by_request(hub: Hub, filled: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "out", "tiny/llama")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = len(hub.requests)
    assert states(planned("tiny/llama", tmp_path / "out"))["calibration"] == "cached"
    assert len(hub.requests) == before


def test_a_data_set_that_does_not_exist_is_still_an_error(hub: Hub, filled: tuple[str, str], tmp_path: Path) -> None:
    snapshot.fetch(schema.Model(id=str(SMALL)), store=Store(tmp_path / "out", Output("quiet")))
    with pytest.raises(UsageError, match="absent/rows"):
        planned(str(SMALL), tmp_path / "out", calibration__data="absent/rows")
    assert "HF_HUB_OFFLINE" not in os.environ
