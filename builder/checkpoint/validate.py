"""Validates a quantized checkpoint: files, configuration, names, dtypes, shapes, values, and how scales fit together.

`isfinite` is not enough: uninitialized scales (`torch.empty(1)` that no calibration filled) were seen as 1e-44,
-1.3e-05 and 1.8e+25. A checkpoint is read once, in parts, and never loaded whole.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from builder.checkpoint import tensor_checks
from builder.checkpoint.inspection import comparisons, documents, expected, findings
from builder.checkpoint.inspection.comparisons import Measured
from builder.checkpoint.inspection.expected import Expected
from builder.checkpoint.inspection.findings import Finding
from builder.checkpoint.inspection.layout import Layout, open_all
from builder.core.errors import UsageError
from builder.core.safetensors_io import StoredBytes, TensorInfo
from builder.formats import registry
from builder.formats.base import FLOATS, NumberFormat
from builder.formats.registry import BF16, FP8, NVFP4

# Tensors that nobody needs and some tools save: RoPE's frequencies, which every loader computes.
IGNORED = (".rotary_emb.inv_freq",)


@dataclass(frozen=True)
class Summary:
    """A layout in numbers.

    linears: the number of linear layers by the label of their format; "kept" for unquantized ones. bits_per_weight: of
    the layers in the checkpoint's main format, with all scales. effective_bits: of all linear layers. nbytes: bytes by
    kind of tensor.
    """

    tensors: int
    decoder_layers: int
    linears: Mapping[str, int]
    bits_per_weight: float
    effective_bits: float
    nbytes: Mapping[str, int]

    def facts(self) -> dict[str, Any]:
        """For JSON: `linears` as nvfp4_linears, fp8_linears, kept_linears, ..."""
        facts = asdict(self)
        return {**facts, **{f"{label}_linears": number for label, number in facts.pop("linears").items()}}


@dataclass(frozen=True)
class Inspection:
    """What was found, and one summary for each layout (`unified`, `tensorrt_llm`)."""

    path: Path
    findings: tuple[Finding, ...]
    layouts: Mapping[str, Summary]

    @property
    def summary(self) -> dict[str, int | float]:
        """The summaries of the layouts in one table: `unified.bits_per_weight`, `unified.nbytes.lm_head`, ..."""
        table = {}
        for layout, summary in self.layouts.items():
            for name, value in summary.facts().items():
                parts = {f".{kind}": n for kind, n in value.items()} if name == "nbytes" else {"": value}
                table.update({f"{layout}.{name}{part}": n for part, n in parts.items()})
        return table

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings that make answers wrong; the others are warnings."""
        return tuple(one for one in self.findings if one.severity == "error")

    def check(self, path: Path | None = None) -> None:
        """IntegrityError that names the tensors, their effect and what helps, if there is any error.

        path: the checkpoint's place in fixes, if it stays there.
        """
        if self.errors:
            raise findings.error(self.errors, path)

    def facts(self) -> dict[str, Any]:
        """For manifests and --json."""
        return {
            "findings": findings.facts(self.findings),
            "layouts": {name: summary.facts() for name, summary in self.layouts.items()},
        }


def inspect(path: Path, *, here: bool = False) -> Inspection:
    """Inspects a checkpoint with several layouts, or a directory with one of them.

    here: this build has just made it, which decides what helps. UsageError if there is no checkpoint, UnsupportedError
    for a layout, tool or format that is not known.
    """
    layouts = list(open_all(path, here=here))
    if not layouts:
        raise UsageError(
            f"{path} holds no quantized checkpoint.",
            why="No configuration file there, or in unified/ or tensorrt_llm/ below it, describes a quantization.",
            hint="Give a directory that `builder quantize`, ModelOpt or llm-compressor wrote.",
        )
    summaries = {layout.name: _inspect(layout) for layout in layouts}
    return Inspection(path, tuple(one for layout in layouts for one in layout.findings), summaries)


def _inspect(layout: Layout) -> Summary:
    documents.check(layout)
    wanted = expected.of(layout)
    _check_missing(layout, wanted)
    measured = Measured(layout)
    nbytes: Counter[str] = Counter()
    weights: Counter[NumberFormat] = Counter()
    modules = {name.rpartition(".")[0] for name, want in wanted.items() if want.linear}
    for name, info in layout.tensors.items():
        want = wanted.get(name) or expected.by_dtype(name, info)
        if not want.known:
            _check_place(layout, name, modules)
        if _check_form(layout, name, info, want):
            _check_content(layout, name, info, want, measured)
        nbytes[_kind(layout, name, want)] += info.nbytes
        if want.linear and want.shapes:
            number = math.prod(want.linear.weight.weight_shape(want.shapes[0]))
            weights[want.linear] += number
            if want.linear.group_size:
                _check_bits(layout, name, want, number)
    comparisons.check(measured)
    linears = Counter(want.linear for want in wanted.values() if want.linear)
    if layout.formats.used and not _is_stored(layout, wanted) and not layout.opened.lost:
        layout.report(
            "every linear layer", f"is unquantized; the configuration says {layout.main.title}", "unquantized"
        )
    found = dict.fromkeys((NVFP4, FP8, BF16, *linears))
    return Summary(
        tensors=len(layout.tensors),
        decoder_layers=layout.config.get("num_hidden_layers", 0),
        linears={one.label: linears[one] for one in found},
        bits_per_weight=_bits([layout.main], nbytes, weights),
        effective_bits=_bits(list(found), nbytes, weights),
        nbytes=dict(nbytes),
    )


def _is_stored(layout: Layout, wanted: Mapping[str, Expected]) -> bool:
    """Whether some linear layer is in the checkpoint's main format."""
    weights = {name: want for name, want in wanted.items() if want.linear is layout.main}
    return any(name in layout.tensors and layout.tensors[name].dtype in want.dtypes for name, want in weights.items())


def _bits(formats: Sequence[NumberFormat], nbytes: Mapping[str, int], weights: Mapping[NumberFormat, int]) -> float:
    """Bits per weight of the layers in these formats, including scales; 0 if there are no such layers."""
    labels = {tensor.label for one in formats for tensor in one.tensors}
    number = sum(weights.get(one, 0) for one in formats)
    return round(8 * sum(nbytes.get(label, 0) for label in labels) / number, 4) if number else 0.0


def _kind(layout: Layout, name: str, want: Expected) -> str:
    if want.label:
        return want.label
    module = name.rpartition(".")[0]
    if module == layout.head:
        return "lm_head"
    return "embedding" if (layout.names and module == layout.names.embedding) or "embed" in name else "other"


def _check_missing(layout: Layout, wanted: Mapping[str, Expected]) -> None:
    """Reports what is not there, unless a damaged or missing file, which is reported, holds it."""
    for name, want in wanted.items():
        if name not in layout.tensors and name not in layout.opened.lost and not layout.opened.incomplete:
            scale = want.content == "scale" and not layout.tensorrt_llm
            layout.report(name, "is missing", "missing-scale" if scale else "missing")


def _check_place(layout: Layout, name: str, modules: set[str]) -> None:
    """Reports a tensor that no layer needs. Of other architectures only scales: the rest can't be known."""
    module, _, leaf = name.rpartition(".")
    scale = leaf in _scales()  # not those of the KV cache, nor of experts that are stacked in one tensor
    if scale and module not in modules and f"{module}.weight" not in layout.tensors:
        if not any(f"{module}.{weight}" in layout.opened.lost for weight in ("weight", "weight_packed")):
            layout.report(name, "has no weight beside it", "orphan-scale")
    elif (layout.names or scale) and not name.endswith(IGNORED):
        why = f" ({layout.format_of(module).title} has no such tensor)" if module in modules else ""
        layout.report(name, f"belongs to no layer of {layout.architecture.name}{why}", "unexpected")


@functools.cache
def _scales() -> frozenset[str]:
    """What the scales of linear layers are called in any layout."""
    tensors = [tensor for one in registry.all_formats().values() for tensor in one.tensors[1:]]
    return frozenset(leaf for t in tensors for leaf in (t.unified, t.tensorrt_llm, t.compressed_tensors) if leaf)


def _check_form(layout: Layout, name: str, info: TensorInfo, want: Expected) -> bool:
    """Checks dtype and shape. False if they are so wrong that the content can't be checked."""
    if name.startswith(f"{layout.head}.") and (info.dtype not in FLOATS or not name.endswith((".weight", ".bias"))):
        layout.report(name, f"is {info.dtype}: the output layer must not be quantized", "quantized-head")
        return False
    if info.dtype not in want.dtypes:
        layout.report(name, f"is {info.dtype}, not {' or '.join(want.dtypes)}", "dtype")
        return False
    if want.shapes and info.shape not in want.shapes:
        layout.report(name, f"has the shape {list(info.shape)}, not {list(want.shapes[0])}", "shape")
        return want.content != "scale"
    return info.nbytes > 0


def _check_content(layout: Layout, name: str, info: TensorInfo, want: Expected, measured: Measured) -> None:
    data = layout.tensors.stored(name)
    checked = tensor_checks.check(
        want.content, info, data, zeros=want.linear is BF16, divides=layout.divides(want.stored)
    )
    measured.add(name, want, data, checked)
    if want.numbers is not None and (stated := tensor_checks.integers(info, data)) != want.numbers:
        layout.report(name, f"says {list(stated)}, not {list(want.numbers)}", "shape")
        return
    if checked.wrong:
        layout.report(name, checked.wrong, _kind_of_value(want, checked.wrong))
    elif want.linear and want.linear.quant_algo:
        _check_weight(layout, name, want, data)


def _check_weight(layout: Layout, name: str, want: Expected, data: StoredBytes) -> None:
    """Checks a quantized weight for holes, and that its codes use their range."""
    hole = tensor_checks.hole(data)
    if hole:
        layout.report(name, f"is zero for {hole[1]:,} bytes from byte {hole[0]:,} on", "hole")
    if want.content == "codes" and not tensor_checks.uses_largest(data):
        layout.report(name, "never uses its largest code: its block scales are too large for it", "unused-range")


def _kind_of_value(want: Expected, wrong: str) -> str:
    """The kind of finding that a bad value is."""
    if want.content == "scale":
        if expected.is_kv_scale(want):
            return "kv-scale"
        return "input-scale" if want.stored and want.stored.calibrated else "weight-scale"
    if want.content == "block_scales":
        return "block-scales"
    return "zero" if wrong == "is all zero" else "not-finite"


def _check_bits(layout: Layout, name: str, want: Expected, weights: int) -> None:
    """Checks the bits per weight of a layer in a format with groups, including the scales of the groups."""
    assert want.linear is not None
    leaves = [layout.leaf(tensor) for tensor in want.linear.tensors if len(tensor.dims) == 2]
    stored = [layout.tensors.get(f"{want.module}.{leaf}") for leaf in leaves]
    bits = 8 * sum(info.nbytes for info in stored if info) / weights if weights else 0.0
    if abs(bits - want.linear.bits) > 0.1:
        what = f"takes {bits:.2f} bits per weight with its block scales, not {want.linear.bits}"
        layout.report(name, what, "shape")
