"""What each algorithm must gain over `max` on texts that it was not calibrated on.

KL to BF16 as benchmarks/accuracy.py measures it: of the bundled model's checkpoints on disk (some 30 s of CPU time) and
as Triton serves them (40 s), and of the checkpoints of the real model of `make test-real` (some ten minutes).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builder.calibration.rows import calibrate
from builder.core.output import Output
from builder.core.store import Store
from builder.quantize import streamed_worker
from builder.recipe import schema

ROOT = Path(__file__).parents[2]
KL = Mapping[str, np.ndarray[Any, Any]]  # of each text

pytestmark = pytest.mark.timeout(3600)


@dataclass(frozen=True)
class Case:
    """goals: the KL relative to that of `max`. texts: of prose and of chat each."""

    goals: Mapping[str, float]
    texts: int
    place: str | None = None  # a variable of the environment; None: the bundled model

    @property
    def model(self) -> Path:
        return Path(os.environ[self.place]).absolute() if self.place else ROOT / "tests" / "data" / "tiny-qwen3"


BUNDLED = Case({"mse": 0.88, "hessian": 0.82, "gptq": 0.72}, texts=30)
REAL = Case({"hessian": 0.65, "gptq": 0.60}, texts=60, place="REAL_MODEL")


@pytest.fixture(scope="module")
def accuracy() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import accuracy
    return accuracy


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(BUNDLED, marks=pytest.mark.slow, id="bundled"),
        pytest.param(REAL, marks=pytest.mark.real, id="real"),
    ],
)
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


@pytest.fixture(scope="module")
def kls(case: Case, accuracy: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, KL]:
    """{algorithm: its KL}."""
    directory, texts = tmp_path_factory.mktemp("goals"), accuracy.Texts(case.model, case.texts)
    (directory / "partial").mkdir()
    asked = {"model.id": str(case.model), "gpu": "cpu", "calibration.samples": 64, "calibration.seq_len": 256}
    recipe = schema.resolve({**asked, "quantization.kv_cache_dtype": "auto"}).recipe
    rows = calibrate(recipe.calibration, store=Store(directory / "store", Output("quiet"))).path
    found = {}
    for name in ("max", *case.goals):
        job = {
            "model": str(case.model), "rows": str(rows), "seq_len": 256, "batch_size": recipe.calibration.batch_size,
            "format": "nvfp4", "kv_cache_dtype": "auto", "layers": {}, "trust_remote_code": False, "algorithm": name,
            "gptq": recipe.quantization.gptq.model_dump(), "partial": str(directory / "partial" / name),
            "destination": str(directory / name),
        }  # fmt: skip
        streamed_worker.run(job)
        found[name] = texts.kl(texts.checkpoint(directory / name))
    return found


def require(goal: float, found: KL, of: KL) -> None:
    """The ratio of the KLs reaches a goal, and the paired interval lies below 1."""
    ours, plain = (np.concatenate([*one.values()]) for one in (found, of))
    draws = np.random.default_rng(0).integers(0, len(plain), (2000, len(plain)))
    low, high = np.quantile(ours[draws].sum(1) / plain[draws].sum(1), [0.025, 0.975])
    print(f"KL {ours.sum() / plain.sum():.4f} ({low:.3f} to {high:.3f}) of max's, goal {goal}")
    assert ours.sum() / plain.sum() <= goal
    assert high < 1


def test_each_algorithm_gains_what_it_must(case: Case, kls: dict[str, KL]) -> None:
    for algorithm, goal in case.goals.items():
        require(goal, kls[algorithm], kls["max"])


def test_what_costs_more_gains_more(case: Case, kls: dict[str, KL]) -> None:
    for worse, better in pairwise(case.goals):
        assert all(kls[better][name].sum() < kls[worse][name].sum() for name in kls["max"])


@pytest.mark.slow
def test_the_served_model_gains_it_too(accuracy: Any, tmp_path: Path) -> None:
    texts, found = accuracy.Texts(BUNDLED.model, BUNDLED.texts), []
    for flags in ((), ("--algorithm", "gptq")):
        repository, _ = accuracy.quantize(BUNDLED.model, flags, 64, tmp_path, served=True)
        found.append(texts.kl(texts.served(repository)))
    require(BUNDLED.goals["gptq"], found[1], found[0])
