"""The worker that calibrates a local model starts while the model is hashed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import source_models

from builder import pipeline
from builder.core.early_worker import EarlyWorker
from builder.core.output import Output
from builder.core.store import Artifact, Store
from builder.preflight import checks
from builder.recipe import schema


def build(model: Path, root: Path) -> Artifact:
    asked = {
        "model.id": str(model),
        "gpu": "cpu",
        "quantization.format": "nvfp4",
        "quantization.memory": "low",
        "calibration.samples": 2,
        "calibration.seq_len": 64,
    }
    store = Store(root, Output("quiet"))
    pipeline.build(schema.resolve(asked), store, until="checkpoint")
    return store.done[-1]


def test_the_worker_starts_early_and_makes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, ran = [], []
    begin, run = EarlyWorker.begin, EarlyWorker.run

    def seen_run(worker: EarlyWorker, *arguments: Any) -> Any:
        ran.append(worker in begun)
        return run(worker, *arguments)

    monkeypatch.setattr(EarlyWorker, "begin", lambda worker: begun.append(worker) or begin(worker))
    monkeypatch.setattr(EarlyWorker, "run", seen_run)
    # It starts a process with transformers, and has tests of its own.
    monkeypatch.setattr(checks, "check_architecture", lambda *arguments: None)

    made = build(source_models.SHARDED, tmp_path)
    assert ran == [True]
    logs = set((tmp_path / "logs").iterdir())

    copied = build(shutil.copytree(source_models.SHARDED, tmp_path / "copy"), tmp_path)
    assert copied.cached
    assert len(begun) == 2
    assert ran == [True], "a checkpoint of the same model is in the store"
    assert set((tmp_path / "logs").iterdir()) == logs

    shutil.rmtree(made.path)
    again = build(source_models.SHARDED, tmp_path)
    assert len(begun) == 2, "nothing is hashed"
    assert ran == [True, False]
    assert (again.digest, again.manifest["files"]) == (made.digest, made.manifest["files"])
