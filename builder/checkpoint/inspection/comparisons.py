"""Compares what tensors hold: scales of layers that are served as one, of layers of a kind, and with their weights.

Limits, as factors between a value and the median of its kind (the same layer in all blocks, the same projection of all
experts). They are wide, because sound models differ a lot, and an error stops a build:

- weights (their largest magnitude): 1e4. Layers of a kind are within about a factor of 100 of each other.
- inputs: 1e5 is an error, 1e3 a warning. Single layers of sound models have inputs that are hundreds to some thousand
  times larger than others ("massive activations", arXiv 2402.17762; the inputs of down_proj, arXiv 2405.14428).
- keys and values: 1e4.

A global scale is amax / (6 * 448), so that the largest block scale is 448; methods that search for scales go down to
half of it (256 in ModelOpt's four-over-six). A sixteenth says that the scale was not made for these weights.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median

from builder.checkpoint import tensor_checks
from builder.checkpoint.inspection.expected import Expected, is_kv_scale
from builder.checkpoint.inspection.layout import Layout
from builder.core.safetensors_io import StoredBytes
from builder.formats.base import NumberFormat

WEIGHT_LIMIT, INPUT_LIMIT, INPUT_UNUSUAL, KV_LIMIT = 1e4, 1e5, 1e3, 1e4
# The largest magnitude of a weight that is plausible by itself. Trained weights are between 1e-4 and 1e2.
SMALLEST_WEIGHT, LARGEST_WEIGHT = 1e-8, 1e5
LARGEST_E4M3, USED = 448.0, 16.0
E2M1_MAX = 6.0
MEMBERS = 3  # of a kind, that its median says something
SMALL, SAMPLE = 1 << 12, 1 << 20  # bytes of a fingerprint's parts, and of a comparison's
SMALLEST_COPY = 1 << 10  # smaller tensors can be equal by chance


@dataclass
class Measured:
    """What the checks of one layout read.

    scales: {tensor: value} of scales that are numbers. peaks: {module: largest block scale or E4M3 weight}. prints:
    fingerprints of weights, with the tensors that have each. wants: what each tensor is.
    """

    layout: Layout
    scales: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)
    prints: dict[tuple[object, ...], list[str]] = field(default_factory=dict)
    wants: dict[str, Expected] = field(default_factory=dict)

    def add(self, name: str, want: Expected, data: StoredBytes, checked: tensor_checks.Checked) -> None:
        """Records a tensor whose own check is done."""
        self.wants[name] = want
        if want.content == "scale" and not checked.wrong and checked.peak is not None:
            self.scales[name] = checked.peak
        elif checked.peak is not None and not checked.wrong and want.module:
            self.peaks[want.module] = checked.peak
        if want.linear is not None and not checked.wrong and len(data) >= SMALLEST_COPY:
            info = self.layout.tensors[name]
            middle = len(data) // 2
            ends = zlib.crc32(data[middle : middle + SMALL], zlib.crc32(data[:SMALL]))
            self.prints.setdefault((info.dtype, info.shape, ends), []).append(name)


def check(measured: Measured) -> None:
    """Reports what does not fit together."""
    groups = _groups(measured)
    for members in groups.values():
        _check_equal(measured, members)
        _check_range(measured, members)
    _check_kinds(measured)
    _check_copies(measured)


def _groups(measured: Measured) -> dict[str, list[str]]:
    """{layer as it is served: its projections}."""
    groups: dict[str, list[str]] = {}
    for module in dict.fromkeys(want.module for want in measured.wants.values() if want.module):
        groups.setdefault(measured.layout.fused(module) or module, []).append(module)
    return groups


def _check_equal(measured: Measured, members: list[str]) -> None:
    """Projections that are served as one layer share what they have once: scales, and the scales of their input."""
    layout = measured.layout
    one = layout.format_of(members[0])
    if len(members) < 2 or any(layout.format_of(module) is not one for module in members):
        return
    for tensor in one.tensors:
        if tensor.per_output:
            continue
        named = [f"{module}.{layout.leaf(tensor)}" for module in members]
        named = [name for name in named if name in measured.wants]
        contents = {name: layout.tensors.read(name) for name in named if not _not_a_number(measured, name)}
        [(usual, _)] = Counter(contents.values()).most_common(1) or [(b"", 0)]
        first = next((name for name, content in contents.items() if content == usual), "")
        for name in (name for name, content in contents.items() if content != usual):
            what = (
                f"{_value(measured, name)}differs from that of {_projection(first)} {_value(measured, first)}".rstrip()
            )
            kind = "unequal-input" if tensor.calibrated else "unequal"
            layout.report(name, what, "unequal-fp8" if one.weight.dtypes == ("F8_E4M3",) else kind)


def _value(measured: Measured, name: str) -> str:
    return f"({measured.scales[name]:.6g}) " if name in measured.scales else ""


def _projection(name: str) -> str:
    return name.split(".")[-2]


def _not_a_number(measured: Measured, name: str) -> bool:
    """Whether this is a scale that was reported for its own value."""
    return measured.wants[name].content == "scale" and name not in measured.scales


def _check_range(measured: Measured, members: list[str]) -> None:
    """The largest block scale (of FP8, the largest weight) of a served layer is 448, or its scale is too large."""
    scaled = [module for module in members if _has_global_scale(measured.layout.format_of(module))]
    peaks = {module: measured.peaks[module] for module in scaled if module in measured.peaks}
    if peaks and 0 < max(peaks.values()) < LARGEST_E4M3 / USED:
        largest = max(peaks, key=lambda module: peaks[module])
        one = measured.layout.format_of(largest)
        stored = next((t for t in one.tensors if t.content == "block_scales"), one.weight)
        what = f"is at most {peaks[largest]:.3g}, not {LARGEST_E4M3:.0f}: its global scale is "
        what += f"{LARGEST_E4M3 / peaks[largest]:.0f} times too large for these weights"
        measured.layout.report(f"{largest}.{measured.layout.leaf(stored)}", what, "unused-range")


def _has_global_scale(one: NumberFormat) -> bool:
    """Whether one number scales all weights of a layer."""
    return any(tensor.content == "scale" and not tensor.calibrated for tensor in one.tensors)


def _check_kinds(measured: Measured) -> None:
    """Compares input scales, KV scales and weights with those of their kind."""
    layout, wants = measured.layout, measured.wants
    inputs = {n: v for n, v in measured.scales.items() if (s := wants[n].stored) and s.calibrated}
    cache = {n: v for n, v in measured.scales.items() if is_kv_scale(wants[n])}
    for name, ratio in _ratios(_multiplying(layout, wants, inputs)):
        if _beyond(ratio, INPUT_UNUSUAL):
            kind = "input-outlier" if _beyond(ratio, INPUT_LIMIT) else "input-wide"
            layout.report(name, f"is {inputs[name]:.4g}, {_times(ratio)} the median of its kind", kind)
    for name, ratio in _ratios(cache):
        if _beyond(ratio, KV_LIMIT):
            layout.report(name, f"is {cache[name]:.4g}, {_times(ratio)} the median of its kind", "kv-outlier")
    weights = dict(_weights(measured))
    odd = {name: ratio for name, ratio in _ratios(weights) if _beyond(ratio, WEIGHT_LIMIT)}
    for name, amax in weights.items():
        if name in odd:
            what = f"makes the largest weight {amax:.3g}, {_times(odd[name])} the median of its kind"
            layout.report(name, what, "weight-outlier")
        elif not SMALLEST_WEIGHT <= amax <= LARGEST_WEIGHT:
            layout.report(name, f"makes the largest weight {amax:.3g}", "weight-outlier")


def _weights(measured: Measured) -> Iterable[tuple[str, float]]:
    """(global scale's name, largest magnitude of the layer's weights) of layers that have one global scale."""
    layout = measured.layout
    for name, value in measured.scales.items():
        want = measured.wants[name]
        if want.stored is None or want.stored.calibrated or want.module not in measured.peaks:
            continue
        one = layout.format_of(want.module)
        scale = 1 / value if layout.divides(want.stored) else value
        yield name, scale * measured.peaks[want.module] * _code_max(one)


def _code_max(one: NumberFormat) -> float:
    """The largest code of a weight: 6 for E2M1; an E4M3 weight is its own."""
    return E2M1_MAX if one.weight.content == "codes" else 1.0


def _multiplying(layout: Layout, wants: Mapping[str, Expected], scales: Mapping[str, float]) -> dict[str, float]:
    """Scales as factors: compressed-tensors stores some as divisors."""
    return {name: 1 / value if layout.divides(wants[name].stored) else value for name, value in scales.items()}


def _ratios(values: Mapping[str, float]) -> Iterable[tuple[str, float]]:
    """(name, value divided by the median of its kind). A kind of few members is compared with all tensors that have
    the same last part of their names."""
    kinds: dict[str, list[float]] = {}
    for name, value in values.items():
        for kind in {_kind(name), name.rpartition(".")[2]}:
            kinds.setdefault(kind, []).append(value)
    for name, value in values.items():
        members = kinds[_kind(name)]
        if len(members) < MEMBERS:
            members = kinds[name.rpartition(".")[2]]
        if len(members) >= MEMBERS:
            yield name, value / median(members)


def _kind(name: str) -> str:
    return re.sub(r"\d+", "N", name)


def _beyond(ratio: float, limit: float) -> bool:
    return ratio > limit or ratio < 1 / limit


def _times(ratio: float) -> str:
    return f"{ratio:.2g} times"


def _check_copies(measured: Measured) -> None:
    """Reports weights of different layers that hold the same bytes."""
    layout = measured.layout
    for alike in measured.prints.values():
        first = alike[0]
        for other in alike[1:]:
            if _same(layout, first, other):
                layout.report(other, f"holds the same bytes as {first}", "identical")


def _same(layout: Layout, one: str, other: str) -> bool:
    first, second = layout.tensors.stored(one), layout.tensors.stored(other)
    return all(first[n : n + SAMPLE] == second[n : n + SAMPLE] for n in range(0, len(first), SAMPLE))
