"""What was found of each point of a sweep, compared with its base and over all choices. Imports numpy.

Intervals are 95 %, paired: over the same texts (bootstrap) and the same questions (from the answers that differ).
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from builder import pipeline
from builder.core.store import Store, WouldRun
from builder.evaluate import metrics
from builder.evaluate.comparison import OURS, overall
from builder.evaluate.metrics import Estimate, Sums
from builder.preflight.prepare import Prepared
from builder.sweep import served
from builder.sweep.graph import Kind
from builder.sweep.points import LISTED, Point, base_of
from builder.sweep.served import Served

Array = np.ndarray[Any, Any]
Z = 1.96  # standard errors in half of a 95 % interval
RESAMPLES = 1000


@dataclass(frozen=True)
class Result:
    """What was found of a point.

    texts: {data set, "overall" for several together: {metric: estimate}}; tasks: {task: {metric: estimate}}, "change"
    against BF16. nbytes: of the checkpoint. seconds: that it took to make, now or before. refused: {what was not
    measured: why}. why: the end of the log of a point that failed. finished: when this was read, seconds since 1970.
    served: the verdict on the build and the figures under load, of a point that is built.
    """

    point: Point
    texts: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)
    tasks: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)
    nbytes: int | None = None
    seconds: float | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
    why: str = ""
    finished: float = field(default_factory=time.time)
    sums: tuple[Sums, ...] = field(default=(), repr=False)
    served: Served | None = None

    @property
    def kl(self) -> Estimate | None:
        """Over all data sets."""
        return overall(self.texts)["kl"] if self.texts else None

    @property
    def score(self) -> Estimate | None:
        """Over all data sets."""
        return overall(self.texts)["score"] if self.texts else None

    @property
    def verdict(self) -> str:
        """Of the build: "passed", "failed" or "not checked". Without a build by the score: "passed" or "failed" if its
        whole interval is on one side of the quality check's limit, else "unsure". "" without a score."""
        if self.served:
            return self.served.verdict.status
        if self.score is None:
            return ""
        least = self.point.recipe.quality.min_score
        return "passed" if self.score.low >= least else "failed" if self.score.high < least else "unsure"

    @property
    def tokens_per_second(self) -> float | None:
        """Of the server, at the concurrency with the most."""
        return self.served.tokens_per_second if self.served else None


def read(point: Point, dry: Store, prepared: Prepared | None = None) -> Result:
    """What the store has of a point. WouldRun if something is missing.

    dry: a dry store of its own, which lists what it found (`done`). prepared: of what is measured, if it is known."""
    found = read_eval(point, dry, prepared) if point.measured else Result(point)
    return replace(found, served=served.read(point, dry)) if point.served else found


def read_so_far(point: Point, dry: Store, failed: Mapping[Kind, str]) -> Result:
    """What the store has of a point of which something may be missing. failed: {kind of step: why}."""
    found = Result(point)
    with suppress(WouldRun):
        found = read_eval(point, dry) if point.measured else found
    if point.served:
        with suppress(WouldRun):
            built = served.read_build(point, dry)
            found = replace(found, served=built)
            found = replace(found, served=served.with_levels(built, point, dry))
    rejected = found.served is not None and found.served.rejected
    whys = [why for kind, why in failed.items() if not (rejected and kind in ("build", "load"))]
    return replace(found, why="\n".join(whys))


def read_eval(point: Point, dry: Store, prepared: Prepared | None = None) -> Result:
    """What the store has of a point's figures on texts and tasks. WouldRun if something is missing."""
    found = pipeline.measure(point.resolved, dry, prepared=prepared)
    made = next((one for one in dry.done if one.stage == "checkpoint"), None)
    scores = [found.scores.get(label, ()) for label in (OURS, "bf16")]
    sums = tuple(metrics.read(own, bf16) for own, bf16 in zip(*scores, strict=True)) if all(scores) else ()
    tasks: dict[str, dict[str, Estimate]] = {}
    for row in found.tasks.rows:
        if row.runner == OURS:
            tasks[row.task] = {row.metric: _around(row.value, row.stderr)}
            if row.change is not None and row.flips is not None:
                deviation = math.sqrt(max(0.0, row.flips - row.change**2) / max(1, row.documents))
                tasks[row.task]["change"] = _around(row.change, deviation)
    files = made.manifest["files"] if made else {}
    nbytes = sum(entry["size"] for name, entry in files.items() if name.startswith("unified/"))
    return Result(
        point,
        found.measured.get(OURS, {}),
        tasks,
        nbytes or None,
        made.manifest["seconds"] if made else None,
        {**found.not_measured, **found.tasks.not_measured.get(OURS, {})},
        sums=sums,
    )


Known = dict[
    tuple[str, float, float], Mapping[str, Mapping[str, Estimate]]
]  # {(point, when it and its base were read)}


def with_ratios(results: Sequence[Result], known: Known | None = None, points: Sequence[Point] = ()) -> list[Result]:
    """The results, each with the ratio of its KL to that of its base (points.base_of) on each data set.

    known: ratios of earlier calls, which are not computed again and to which this call adds. points: all of the sweep,
    if some have no result yet: the first of them is the base, not the first that ended."""
    known = {} if known is None else known
    points, by_name = points or [one.point for one in results], {one.point.name: one for one in results}
    found = []
    for one in results:
        base = base_of(one.point, points)
        other = by_name.get(base.name) if base else None
        if other is None or other is one or not same_texts(one, other):
            found.append(one)
            continue
        key = (one.point.slug, one.finished, other.finished)
        if key not in known:
            known[key] = _with_ratio(one, other)
        found.append(replace(one, texts=known[key]))
    return found


def _with_ratio(one: Result, other: Result) -> dict[str, Mapping[str, Estimate]]:
    """A result's figures on texts with the ratio of its KL to the other's."""
    texts = {}
    for number, (name, figures) in enumerate(one.texts.items()):
        which = [number] if number < len(one.sums) else [*range(len(one.sums))]  # all sets together are last
        pair = [one.sums[n] for n in which], [other.sums[n] for n in which]
        ratio = metrics.kl_ratio(*pair, resamples=RESAMPLES, seed=number)
        texts[name] = {**figures, "kl_ratio": ratio} if math.isfinite(ratio.value) else figures
    return texts


@dataclass(frozen=True)
class Effect:
    """What a choice does to the KL: the geometric mean of its ratios, with its interval over the texts. mixed: why that
    misleads, where it surely helps some points and surely harms others."""

    mean: Estimate
    mixed: str = ""


def effects(results: Sequence[Result], points: Sequence[Point] = ()) -> dict[str, Effect]:
    """{"axis: label": of the KL with that choice over the KL with the axis' first label, over all texts, for the points
    that differ in nothing else}. points: as in with_ratios."""
    found = {}
    for name, pairs in _pairs(results, points).items():
        ratios = sorted(((_geometric_mean([logs]), one.point.name) for one, logs in pairs), key=lambda it: it[0].value)
        (least, helped), (most, harmed) = ratios[0], ratios[-1]
        mixed = f"helps {helped} ({least.value:.2g}), harms {harmed} ({most.value:.2g})"
        found[name] = Effect(_geometric_mean([logs for _, logs in pairs]), mixed if least.high < 1 < most.low else "")
    return found


def _pairs(results: Sequence[Result], points: Sequence[Point]) -> dict[str, list[tuple[Result, Array]]]:
    """{"axis: label": points with that choice, each with the logarithms of its KL over the KL of the point that differs
    only in having the axis' first label}: over all texts, and over each resample of them."""
    measured = {tuple(one.point.labels.items()): (one, _log_kl(one)) for one in results if one.sums}
    if not measured or any(LISTED in one.point.labels for one in results):
        return {}
    first = points[0].labels if points else results[0].point.labels
    found: dict[str, list[tuple[Result, Array]]] = {
        f"{axis}: {one.point.labels[axis]}": [] for axis in first for one in results
    }
    for key, (one, logs) in measured.items():
        for axis, label in key:
            base = measured.get(tuple((name, first[axis] if name == axis else its) for name, its in key))
            if label != first[axis] and base and same_texts(one, base[0]) and np.isfinite([logs, base[1]]).all():
                found[f"{axis}: {label}"].append((one, logs - base[1]))
    return {name: pairs for name, pairs in found.items() if pairs}


def same_texts(one: Result, other: Result) -> bool:
    """Whether both were measured, on texts of the same tokens."""
    pairs = [*zip(one.sums, other.sums, strict=False)]
    whole = len(pairs) == len(one.sums) == len(other.sums) > 0
    return whole and all(np.array_equal(a.tokens, b.tokens) for a, b in pairs)


def _log_kl(one: Result) -> Array:
    """Logarithms of the sum of the KL over all texts, and over each resample of them."""
    kl = np.concatenate([np.asarray(sums.kl) for sums in one.sums])
    with np.errstate(divide="ignore"):  # BF16 itself has none
        found: Array = np.log(_times_drawn(len(kl)) @ kl)
    return found


@functools.cache
def _times_drawn(texts: int) -> Array:
    """How often each text counts: all of them once, and in each resample as often as it is drawn."""
    draws = np.random.default_rng(0).integers(0, texts, (RESAMPLES, texts))
    return np.vstack([np.ones(texts), *(np.bincount(row, minlength=texts) for row in draws)])


def _geometric_mean(logs: Sequence[Array]) -> Estimate:
    """Of ratios, whose logarithms these are: each over all texts, and over each resample."""
    value, *drawn = np.mean(logs, axis=0)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Estimate(float(np.exp(value)), float(np.exp(low)), float(np.exp(high)))


def front(results: Sequence[Result], *, served: bool = False) -> list[Result]:
    """The points that no other one beats in both KL and bytes, smallest first; with `served` in KL, bytes and tokens a
    second."""
    measured = [one for one in results if one.kl is not None and one.nbytes is not None]
    if served:
        measured = [one for one in measured if one.tokens_per_second is not None]
    costs = {one.point.name: _costs(one, served) for one in measured}
    found: list[Result] = []
    for one in sorted(measured, key=lambda one: (one.nbytes, *costs[one.point.name])):
        mine = costs[one.point.name]
        if not any(all(a <= b for a, b in zip(costs[kept.point.name], mine, strict=True)) for kept in found):
            found.append(one)
    return found


def _costs(one: Result, served: bool) -> tuple[float, ...]:
    """Less is better in all."""
    assert one.kl is not None
    speed = (-(one.tokens_per_second or 0),) if served else ()
    return (float(one.nbytes or 0), one.kl.value, *speed)


def recommended(results: Sequence[Result]) -> tuple[Result, str] | None:
    """The point to build, and why: the smallest whose whole interval of the score passes the quality check of a build;
    of points that differ by less than 1 % in bytes the one with the least KL. Without one, the least KL. What a build
    rejected is not recommended."""
    on_front = front([one for one in results if not (one.served and one.served.rejected)])
    if not on_front:
        return None
    least = on_front[0].point.recipe.quality.min_score
    passing = [one for one in on_front if one.score is not None and one.score.low >= least]
    if not passing:
        return on_front[-1], f"no point surely has a score of {least:g}; this one has the least KL"
    near = [one for one in passing if (one.nbytes or 0) <= 1.01 * (passing[0].nbytes or 0)]
    return near[-1], f"the fewest bytes with a score that is surely {least:g} or above, and of these the least KL"


def _around(value: float, stderr: float | None) -> Estimate:
    """A value and its 95 % interval."""
    half = Z * (stderr or 0.0)
    return Estimate(value, value - half, value + half)
