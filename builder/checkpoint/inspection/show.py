"""Prints inspections and repairs: what was found as a table of kinds, with effect and fix of each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from builder.checkpoint.inspection.findings import grouped, with_path
from builder.core.output import Output, size

if TYPE_CHECKING:
    from builder.checkpoint.repair import Repair
    from builder.checkpoint.validate import Inspection, Summary

EXAMPLES = 3  # tensors of a warning
CHANGES = 12  # rows of a table of changes


def show(inspection: Inspection, out: Output) -> None:
    """The layouts in numbers, the kinds of findings, and the warnings. Errors are for `check` to print."""
    rows = [_row(name, summary) for name, summary in inspection.layouts.items()]
    columns = ["layout", "tensors", "layers", "linear layers", "bits/weight", "bytes"]
    out.table("checkpoint", columns, rows)
    groups = grouped(inspection.findings)
    if groups:
        out.table(
            "findings",
            ["severity", "layout", "where", "what"],
            [(g.first.severity, g.first.layout, g.scope, g.title) for g in groups],
        )
    for group in groups:
        if group.first.severity == "warning":
            examples = [f"{one.tensor} {one.what}" for one in group.findings[:EXAMPLES]]
            more = len(group.findings) - EXAMPLES
            examples += [f"and {more} more"] * (more > 0)
            lines = [f"{group.scope}: {group.title}. {group.first.effect}", *(f"  {line}" for line in examples)]
            out.warn("\n".join([*lines, with_path(group.first.fix, inspection.path)]))


def _row(name: str, summary: Summary) -> tuple[str, ...]:
    linears = ", ".join(f"{n} {label}" for label, n in summary.linears.items() if n)
    return (
        name,
        str(summary.tensors),
        str(summary.decoder_layers),
        linears or "none",
        f"{summary.bits_per_weight:.2f}",
        size(sum(summary.nbytes.values())),
    )


def show_repair(done: Repair, out: Output) -> None:
    """What a repair changed, and what it could not repair."""
    shown = done.changes[:CHANGES]
    if shown:
        rows = [(one.tensor, _value(one.old), _value(one.new), one.rule) for one in shown]
        out.table(f"{len(done.changes)} scales replaced", ["tensor", "old", "new", "rule"], rows)
    more = len(done.changes) - len(shown)
    if more:
        out.info(f"and {more} more: all are in {'repair.json and in ' * bool(done.patch)}--json")
    guesses = sum(not one.sure for one in done.changes)
    if guesses:
        text = (
            f"{guesses} new values are not derived from this model's data: measure with `builder eval`, or calibrate "
        )
        out.warn(text + "the scales (--calibrate-scales)")
    for tensor in done.lost:
        out.warn(f"{tensor} can't be repaired: no other tensor tells its value. Quantize the model again.")
    if not done.changes:
        out.info("every scale is a number: nothing to repair")
    elif done.patch:
        out.info(f"wrote {done.patch} and the index; undo with: builder repair {done.directory} --undo")
    else:
        out.info(f"wrote {done.directory}")


def _value(value: float | None) -> str:
    return "missing" if value is None else f"{value:.4g}"
