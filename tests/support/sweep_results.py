"""Results of sweeps that nothing was measured for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from builder.evaluate.metrics import Estimate, Sums
from builder.publish.verdict import BuildVerdict
from builder.recipe import schema
from builder.serving.benchmark import Level, Percentiles
from builder.sweep.measured import Result
from builder.sweep.points import Point
from builder.sweep.served import Served

RESOLVED = schema.resolve({"model.id": "tests/data/tiny-qwen3", "gpu": "cpu"})


def result(kl: float, nbytes: int = 1000, *, score: float = 95.0, why: str = "", **labels: str) -> Result:
    point = Point(labels, {}, RESOLVED)
    if why:
        return Result(point, why=why)
    figures = {"kl": Estimate(kl, kl * 0.9, kl * 1.1), "score": Estimate(score, score - 1, score + 1)}
    kls = np.linspace(0.5, 1.5, 20) * kl
    ones = np.ones(20)
    sums = (Sums(ones, ones, ones, kl=kls, agree=ones, flips=ones),)
    figures["ppl"] = Estimate(10.0, 9.0, float("inf"))
    return Result(point, {"prose": figures}, {"follows": {"acc": Estimate(0.5, 0.4, 0.6)}}, nbytes, 1.5, sums=sums)


def served(one: Result, speed: float, status: Any = "passed") -> Result:
    """The same, built and served."""
    times = Percentiles(0.1, 0.2, 0.3)
    levels = (Level(1, 4, 0, 1.0, speed / 2, times, times, times), Level(4, 4, 0, 1.0, speed, times))
    rejected = status == "failed"
    return replace(one, served=Served(BuildVerdict(status, ("why",)), None, () if rejected else levels))
