"""What each algorithm must gain over `max` on texts that it was not calibrated on, on the bundled model.

KL to BF16 of the checkpoints on disk, and of what Triton answers, as benchmarks/accuracy.py measures it. Some 30 s of
CPU time for the checkpoints, 40 s for the served ones.
"""

from __future__ import annotations

from collections.abc import Mapping
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
TINY = ROOT / "tests" / "data" / "tiny-qwen3"
TEXTS = 30  # of prose and of chat each
GOALS = {"mse": 0.88, "hessian": 0.82, "gptq": 0.72}  # KL relative to that of max

pytestmark = pytest.mark.slow
KL = Mapping[str, np.ndarray[Any, Any]]  # of each text


@pytest.fixture(scope="module")
def accuracy() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import accuracy
    return accuracy


@pytest.fixture(scope="module")
def texts(accuracy: Any) -> Any:
    return accuracy.Texts(TINY, TEXTS)


@pytest.fixture(scope="module")
def kls(texts: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, KL]:
    directory = tmp_path_factory.mktemp("goals")
    (directory / "partial").mkdir()
    asked = {"model.id": str(TINY), "gpu": "cpu", "calibration.samples": 64, "calibration.seq_len": 256}
    recipe = schema.resolve({**asked, "quantization.kv_cache_dtype": "auto"}).recipe
    rows = calibrate(recipe.calibration, store=Store(directory / "store", Output("quiet"))).path
    found = {}
    for name in ("max", *GOALS):
        job = {
            "model": str(TINY), "rows": str(rows), "seq_len": 256, "batch_size": recipe.calibration.batch_size,
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
    assert ours.sum() / plain.sum() <= goal
    assert np.quantile(ours[draws].sum(1) / plain[draws].sum(1), 0.975) < 1


@pytest.mark.parametrize("algorithm", GOALS)
def test_each_algorithm_gains_what_it_must(algorithm: str, kls: dict[str, KL]) -> None:
    require(GOALS[algorithm], kls[algorithm], kls["max"])


@pytest.mark.parametrize(("better", "worse"), [("hessian", "mse"), ("gptq", "hessian")])
def test_what_costs_more_gains_more(better: str, worse: str, kls: dict[str, KL]) -> None:
    assert all(kls[better][name].sum() < kls[worse][name].sum() for name in kls["max"])


def test_the_served_model_gains_it_too(accuracy: Any, texts: Any, tmp_path: Path) -> None:
    found = []
    for flags in ((), ("--algorithm", "gptq")):
        repository, _ = accuracy.quantize(TINY, flags, 64, tmp_path, served=True)
        found.append(texts.kl(texts.served(repository)))
    require(GOALS["gptq"], found[1], found[0])
