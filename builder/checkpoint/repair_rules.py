"""What `builder repair` puts in place of a scale that is not a scale: the rules, in the order in which they are tried.

1. Projections that are served as one layer (q, k and v; gate and up) share their input and one global scale, so the
   scale of another one is exact. Input scales of such projections that differ become the largest.
2. Input and KV scales: the largest of the same layer in other blocks (of the same projection of all experts). The
   largest, because a scale that is too small cuts values off, while one that is too large costs FP8 and NVFP4 little:
   their relative precision is the same over a wide range. INT8 has one step size: it takes the median.
3. Global scales of weights: the median of the same layer in other blocks. It is a guess: nothing in the file holds the
   magnitude of a layer's weights but this scale.
4. Input scales of NVFP4 and FP8, and KV scales: 1. ModelOpt's recipes without data take it for inputs; TensorRT-LLM
   takes it for a KV cache without scales.

If more than a quarter of the scales of a kind are not numbers, no calibration filled any of them, so that the others
are leftovers of memory too: rule 4 for all (llm-compressor's pipeline "datafree", torch.empty(1) of
compressed-tensors, quantization/lifecycle/initialize.py, 0.12 to 0.20).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any, Literal

from builder.checkpoint.inspection.comparisons import INPUT_LIMIT, KV_LIMIT
from builder.checkpoint.tensor_checks import wrong_scale

Kind = Literal["input", "cache", "weight"]
DISTRUST = 0.25
UNKNOWN = 1.0
LIMITS: Mapping[Kind, float] = {"input": INPUT_LIMIT, "cache": KV_LIMIT, "weight": math.inf}


@dataclass(frozen=True)
class Scale:
    """A scale of a checkpoint.

    value: a factor (never the divisor that compressed-tensors stores, unless it is wrong), None where the tensor is
    missing. group: the layer as it is served. wrong: whether the stored number can't be a scale. steps: whether all
    values have the same step size (INT8).
    """

    tensor: str
    kind: Kind
    value: float | None
    group: str
    wrong: bool = False
    steps: bool = False

    @property
    def leaf(self) -> str:
        """The last part of the tensor's name."""
        return self.tensor.rpartition(".")[2]

    @property
    def same(self) -> str:
        """What it has in common with the same layer in other blocks."""
        return re.sub(r"\d+", "N", self.tensor)

    @property
    def sound(self) -> bool:
        """Whether it is a number that can be a scale."""
        return self.value is not None and not self.wrong and not wrong_scale(self.value)


@dataclass(frozen=True)
class Change:
    """A new value for a scale, as a factor. sure: whether the rule gives the value that the layer should have, or one
    that is known to serve."""

    tensor: str
    old: float | None
    new: float
    rule: str
    sure: bool = True

    def facts(self) -> dict[str, Any]:
        """For JSON, which has no NaN and no infinity."""
        old = self.old if self.old is None or math.isfinite(self.old) else str(self.old)
        return {**asdict(self), "old": old}


ROUNDS = 10
MEMBERS = 3  # of a kind, that its median says something (inspection/comparisons.py)


def propose(scales: Sequence[Scale]) -> tuple[list[Change], list[Scale]]:
    """(changes, scales that no rule can repair). A new value can show that another one is an outlier, so the rules are
    applied until nothing changes."""
    made: dict[str, Change] = {}
    for _ in range(ROUNDS):
        changes, lost = _propose(scales)
        made |= {one.tensor: replace(one, old=made.get(one.tensor, one).old) for one in changes}
        if not changes:
            break
        new = {one.tensor: one.new for one in changes}
        scales = [replace(s, value=new[s.tensor], wrong=False) if s.tensor in new else s for s in scales]
    return list(made.values()), lost


def _propose(scales: Sequence[Scale]) -> tuple[list[Change], list[Scale]]:
    distrusted, sound = _distrusted(scales), _Known([one for one in scales if one.sound])
    trusted = [one for one in sound.scales if one.leaf not in distrusted and not sound.is_outlier(one)]
    known, kept = _Known(trusted), {one.tensor for one in trusted}
    changes, lost = [], []
    for one in scales:
        change = _shared(one, known) if one.tensor in kept else _replacement(one, known, distrusted)
        if change is not None and change.new != one.value:
            changes.append(change)
        elif change is None and one.tensor not in kept:
            lost.append(one)
    return changes, lost


def _distrusted(scales: Sequence[Scale]) -> frozenset[str]:
    """The last parts of names whose scales no calibration filled."""
    stored, wrong = Counter[str](), Counter[str]()
    for one in scales:
        if one.kind != "weight" and one.value is not None:
            stored[one.leaf] += 1
            wrong[one.leaf] += not one.sound
    return frozenset(leaf for leaf, number in stored.items() if wrong[leaf] > DISTRUST * number)


class _Known:
    """Values of scales by what they have in common."""

    def __init__(self, scales: Sequence[Scale]) -> None:
        self.scales = scales
        self._by: dict[tuple[str, ...], list[float]] = {}
        for one in scales:
            for key in ((one.leaf,), (one.leaf, one.same), (one.leaf, "group", one.group)):
                self._by.setdefault(key, []).append(one.value if one.value is not None else UNKNOWN)
        self._medians = {key: median(values) for key, values in self._by.items() if key[1:2] != ("group",)}

    def alike(self, one: Scale) -> list[float]:
        """Of the same layer in other blocks."""
        return self._by.get((one.leaf, one.same), [])

    def fused(self, one: Scale) -> list[float]:
        """Of the projections that are served as one layer."""
        return self._by.get((one.leaf, "group", one.group), [])

    def is_outlier(self, one: Scale) -> bool:
        """Whether an input or KV scale is so far from those of its kind that inspection calls it an error."""
        if one.kind == "weight" or one.value is None:
            return False
        keys: list[tuple[str, ...]] = [(one.leaf, one.same), (one.leaf,)]
        key = next((key for key in keys if len(self._by.get(key, [])) >= MEMBERS), None)
        return key is not None and not 1 / LIMITS[one.kind] <= one.value / self._medians[key] <= LIMITS[one.kind]


def _shared(one: Scale, known: _Known) -> Change | None:
    """Input scales of projections that share their input become the largest."""
    if one.kind != "input" or max(known.fused(one)) == one.value:
        return None
    return Change(one.tensor, one.value, max(known.fused(one)), "the largest of the projections that share its input")


def _replacement(one: Scale, known: _Known, distrusted: frozenset[str]) -> Change | None:
    fused, alike = known.fused(one), known.alike(one)
    if fused and one.kind != "cache":
        return Change(one.tensor, one.value, max(fused), "that of the projection that is served as one with it")
    if alike and one.kind == "weight":
        rule = f"a guess: the median of the same layer in {len(alike)} other blocks"
        return Change(one.tensor, one.value, median(alike), rule, sure=False)
    if alike:
        value, which = (median(alike), "median") if one.steps else (max(alike), "largest")
        return Change(one.tensor, one.value, value, f"the {which} of the same layer in {len(alike)} other blocks")
    if one.kind == "weight" or one.steps:
        return None
    why = "no calibration filled any of its kind" if one.leaf in distrusted else "no other layer tells"
    return Change(one.tensor, one.value, UNKNOWN, f"{UNKNOWN:g}, because {why}", sure=False)
