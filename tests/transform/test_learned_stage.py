"""Learned rotations in a build: cached, in the key with all they depend on, complete or absent, refused where they
can't be learned."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from source_models import QWEN2, VARIANTS

from builder import pipeline, plan
from builder.calibration.rows import calibrate
from builder.cli import plan_view
from builder.core.errors import UnsupportedError, UsageError
from builder.core.output import Output
from builder.core.safetensors_io import Tensors
from builder.core.store import Store, WouldRun
from builder.hub.snapshot import Snapshot, fetch
from builder.preflight.prepare import prepare
from builder.recipe import schema
from builder.recipe.transform import Learning, Transform
from builder.transform.learned import Rows
from builder.transform.stage import transformed

QUIET = Output("quiet")
RECIPE: dict[str, Any] = {
    "model.id": str(QWEN2), "gpu": "cpu", "quality.check": False,
    "calibration.data": "builtin:python-docs", "calibration.samples": 4, "calibration.seq_len": 32,
    "transform.name": "spinquant", "transform.kind": "learned", "transform.learning.steps": 3,
    "transform.learning.rows": 2,
}  # fmt: skip


def resolved(**more: Any) -> schema.Resolved:
    return schema.resolve({**RECIPE, **more})


def parts(store: Store, **more: Any) -> tuple[Snapshot, Transform, Rows]:
    recipe = resolved(**more).recipe
    rows = Rows(calibrate(recipe.calibration, store=store), recipe.calibration.seq_len, "nvfp4", {})
    return fetch(recipe.model, store=store), recipe.transform, rows


def logits(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(torch.arange(40).reshape(2, 20) * 7 % 4096).logits


def test_a_build_learns_from_the_rows_and_the_model_computes_the_same(tmp_path: Path) -> None:
    store = Store(tmp_path, QUIET)
    built = pipeline.build(resolved(), store, until="checkpoint")
    made = built.snapshot.artifact
    assert [done.stage for done in store.done] == ["snapshot", "calibration", "transform", "calibration", "checkpoint"]
    assert made.facts["rotations"] == {
        "r1": "orthogonal matrix of order 64, learned",
        "r2": "orthogonal matrix of order 16, learned",
    }
    learned = made.facts["learned"]
    assert learned["fell"] == (learned["loss"]["after"] < learned["loss"]["before"])
    assert len(learned["losses"]) == 3
    before, after = logits(QWEN2), logits(built.snapshot.path)
    assert (before - after).abs().max() < 0.02 * before.abs().max(), "weights are rounded to BF16"
    assert not list((tmp_path / "partial").iterdir())
    again = pipeline.build(resolved(), Store(tmp_path, QUIET), until="checkpoint")
    assert again.snapshot.digest == built.snapshot.digest
    assert again.snapshot.artifact.cached


def test_everything_that_it_depends_on_is_in_the_key(tmp_path: Path) -> None:
    dry = Store(tmp_path, QUIET, dry=True)

    def key(rows: dict[str, Any] | None = None, **more: Any) -> str:
        snapshot, part, found = parts(Store(tmp_path, QUIET), **more)
        with pytest.raises(WouldRun) as would:
            transformed(snapshot, part, replace(found, **(rows or {})), store=dry)
        return str(would.value.key)

    first = key()
    assert key() == first
    others = [
        key(**{"transform.learning.steps": 4}),
        key(**{"transform.learning.rate": 0.5}),
        key(**{"transform.learning.rows": 1}),
        key(**{"transform.seed": 1}),
        key(**{"transform.rotations": "r1"}),
        key(**{"calibration.samples": 5}),
        key(**{"calibration.seq_len": 33}),
        key({"number_format": "fp8"}),
        key({"layers": {"bf16": ("model.layers.0.mlp.down_proj",)}}),
        key({"trust_remote_code": True}),
    ]
    assert len({first, *others}) == 1 + len(others)
    assert Learning.model_fields.keys() == {"steps", "rate", "rows"}, "each has a line above"


@pytest.mark.slow
def test_a_killed_run_leaves_nothing_but_its_state_and_the_next_one_completes(tmp_path: Path) -> None:
    code = (
        "import sys; from test_learned_stage import *; pipeline.build(resolved(**{'transform.learning.steps': 2000}), "
    )
    code += "Store(Path(sys.argv[1]), QUIET), until='checkpoint')"
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    env = {**os.environ, "PYTHONPATH": path}
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=env, start_new_session=True) as child:
        while child.poll() is None and not list((tmp_path / "partial").glob("transform-*.safetensors")):
            time.sleep(0.05)
        os.killpg(child.pid, signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    assert not [path for path in (tmp_path / "transform").glob("*") if not path.name.startswith(".")]
    store = Store(tmp_path, QUIET)
    pipeline.build(resolved(), store, until="checkpoint")
    assert len([path for path in (tmp_path / "transform").iterdir() if not path.name.startswith(".")]) == 1
    assert len(Tensors(store.done[2].path)) == len(Tensors(QWEN2)) + 1


def test_the_plan_learns_after_the_rows_are_read_and_says_what_it_costs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = plan.plan(resolved(), Store(tmp_path, QUIET, dry=True))
    assert [row[0] for row in found.stages][:4] == ["snapshot", "calibration", "transform", "checkpoint"]
    plan_view.show(found, Output("human"))
    said = " ".join(capsys.readouterr().out.split())
    assert "learned in 3 steps from random Hadamard matrices" in said
    assert "learning costs about" in said
    assert found.learning is not None
    assert found.learning.memory > 600_000_000


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ({"calibration.samples": 0}, "transform.kind learned reads calibration rows, and there are none"),
        ({"quantization.format": "w4a16_nvfp4"}, "format w4a16_nvfp4 leaves them"),
        ({"quantization.format": "nvfp4_awq"}, "format nvfp4_awq leaves them, or scales them first"),
        ({"quantization.format": "bf16"}, "format bf16 leaves them"),
        ({"transform.learning.rate": 0}, "transform.learning.rate: Input should be greater than 0"),
        ({"transform.kind": "hadamard"}, "values of learning have no effect with kind hadamard; use kind learned"),
    ],
)
def test_what_can_not_be_learned_is_refused_with_what_can(value: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError) as error:
        resolved(**value)
    assert why in error.value.what


def test_a_mixture_is_refused_before_it_is_downloaded(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="can't be learned") as error:
        prepare(resolved(**{"model.id": str(VARIANTS / "qwen3_moe")}), Store(tmp_path, QUIET))
    assert "transform.kind=hadamard" in error.value.hint


def test_too_little_memory_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from builder.preflight import memory

    monkeypatch.setattr(memory, "host_memory", lambda: memory_of(500_000_000))
    store = Store(tmp_path, QUIET)
    with pytest.raises(UnsupportedError, match="Learning rotations takes about") as error:
        pipeline.build(resolved(), store, until="checkpoint")
    assert "--calib-seq-len" in error.value.hint
    assert store.done == []
    found = plan.plan(resolved(), Store(tmp_path, QUIET, dry=True))
    assert found.refusal is not None


def memory_of(nbytes: int) -> Any:
    from builder.machine.host_memory import HostMemory

    return HostMemory(nbytes, nbytes)
