"""Scores of tokens -> what a model lost: perplexity, KL, agreement, flips, each with a bootstrap confidence interval.

Means are over tokens, in float64. Resamples draw whole texts, because the tokens of a text depend on one another. Over
several data sets means are token-weighted, and each resample draws from every data set as many texts as it has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
CONFIDENCE = 0.95
DRAWN = 1 << 17  # counts of texts that are drawn at a time: 1 MB


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        digits = max(0, 3 - math.floor(math.log10(abs(self.value)))) if 0 < abs(self.value) < math.inf else 3
        digits = min(digits, 5)
        return f"{self.value:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


@dataclass(frozen=True)
class Sums:
    """Sums over the scored tokens of each text, arrays [texts]. Those that compare with BF16 are None for BF16 itself
    and where it was not measured."""

    tokens: Array
    nll: Array
    right: Array
    reference_nll: Array | None = None
    kl: Array | None = None
    agree: Array | None = None
    flips: Array | None = None


def read(scores: Path, reference: Path | None) -> Sums:
    """Reads the column files of a data set's scores (`ColumnFiles`), and those of BF16 to compare with."""
    starts = np.load(scores / "starts.npy")

    def per_text(column: Array) -> Array:
        found: Array = np.add.reduceat(column.astype(np.float64), starts[:-1])
        return found

    nll, best, right = (np.load(scores / f"{name}.npy") for name in ("nll", "best", "right"))
    own = {"tokens": np.diff(starts).astype(np.float64), "nll": per_text(nll), "right": per_text(right)}
    if reference is None:
        return Sums(**own)
    theirs = {name: np.load(reference / f"{name}.npy") for name in ("nll", "best", "right")}
    return Sums(
        **own,
        reference_nll=per_text(theirs["nll"]),
        kl=per_text(np.load(scores / "kl.npy")),
        agree=per_text(best == theirs["best"]),
        flips=per_text(right != theirs["right"]),
    )


def measure(sets: Sequence[Sums], *, resamples: int, seed: int) -> dict[str, Estimate]:
    """The figures of one model over some data sets, by name.

    nll: mean negative log-likelihood, nats per token. ppl: exp(nll). score: PPL of BF16 / PPL x 100.
    kl: mean KL(BF16 || model) in nats per token, a lower bound (scoring.divergence). accuracy: share of tokens that are
    the model's top token. agreement: share of positions where both models have the same top token. flips: share of
    positions where exactly one of the two predicts the text's token (arXiv 2407.09141, section 3).
    """
    names = [name for name in Sums.__dataclass_fields__ if all(getattr(one, name) is not None for one in sets)]
    columns = [np.stack([getattr(one, name) for name in names], axis=1) for one in sets]
    totals = sum(_totals(one, resamples, seed + number) for number, one in enumerate(columns))
    of = dict(zip(names, np.asarray(totals).T, strict=True))
    tokens, nll = of["tokens"], of["nll"]
    with np.errstate(over="ignore"):
        found = {"nll": nll / tokens, "ppl": np.exp(nll / tokens), "accuracy": of["right"] / tokens}
        if "reference_nll" in of:
            found["score"] = 100 * np.exp((of["reference_nll"] - nll) / tokens)
            found |= {"kl": of["kl"] / tokens, "agreement": of["agree"] / tokens, "flips": of["flips"] / tokens}
    return {name: _estimate(values) for name, values in found.items()}


def kl_ratio(sets: Sequence[Sums], ours: Sequence[Sums], *, resamples: int, seed: int) -> Estimate:
    """KL of one model over that of another on the same texts; not finite where the other's is 0. Both were compared
    with BF16.

    The interval is paired: each resample draws the same texts for both, so it is narrower than those of the two KLs.
    """
    kls = [(np.asarray(one.kl), np.asarray(other.kl)) for one, other in zip(sets, ours, strict=True)]
    columns = [np.stack(pair, axis=1) for pair in kls]
    totals = sum(_totals(one, resamples, seed + number) for number, one in enumerate(columns))
    theirs, own = np.asarray(totals).T
    with np.errstate(divide="ignore", invalid="ignore"):
        return _estimate(theirs / own)


def _totals(columns: Array, resamples: int, seed: int) -> Array:
    """[texts, n] -> [1 + resamples, n]: sums over the texts, then over as many texts drawn at random.

    Equal seeds, equal draws: models are compared on the same texts."""
    generator, texts = np.random.default_rng(seed), len(columns)
    found, block = np.empty((1 + resamples, columns.shape[1])), max(1, DRAWN // texts)
    found[0] = columns.sum(axis=0)
    for first in range(1, 1 + resamples, block):
        part = found[first : first + block]
        counts = generator.multinomial(texts, np.full(texts, 1 / texts), size=len(part))
        part[:] = (counts[:, np.newaxis] @ columns)[:, 0]  # row by row, so that no sum depends on the block
    return found


def _estimate(values: Array) -> Estimate:
    tail = (1 - CONFIDENCE) / 2
    with np.errstate(invalid="ignore"):
        low, high = np.quantile(values[1:], [tail, 1 - tail])
    return Estimate(float(values[0]), float(low), float(high))
