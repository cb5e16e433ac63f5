"""Two sweeps' results, row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from builder.core.errors import UsageError
from builder.core.output import Output
from builder.sweep import results
from builder.sweep.results import Row

FIGURES = ("kl", "score", "ppl", "task", "tokens_per_second", "ttft")
Rows = dict[tuple[str, str, str], Row]  # {(point, kind, name): row with a figure}


@dataclass(frozen=True)
class Comparison:
    """Rows of both runs with the same point and data set, task or concurrency; and what only one run has: points, and
    of a point that both have "POINT (data set, task or concurrency)"."""

    both: Sequence[tuple[Row, Row]]
    only: Mapping[str, Sequence[str]]


def compare(first: Path, second: Path) -> Comparison:
    """UsageError for a directory without results."""
    one, other = _rows(first), _rows(second)
    only = {str(first): _only(one, other), str(second): _only(other, one)}
    return Comparison([(row, other[key]) for key, row in one.items() if key in other], only)


def _only(one: Rows, other: Rows) -> list[str]:
    """What the first of two runs has and the second has not."""
    theirs = {point for point, *_ in other}
    alone = [key for key in one if key not in other]
    return sorted({f"{point} ({name})" if point in theirs else point for point, _, name in alone})


def _rows(run: Path) -> Rows:
    file = run / results.CSV if run.is_dir() else run
    if not file.is_file():
        raise UsageError(f"{run} holds no results of a sweep.", hint="Name a directory OUTPUT/sweeps/TITLE.")
    measured = [row for row in results.read(file) if any(row.get(figure) is not None for figure in FIGURES)]
    return {(row["point"], row["kind"], row["name"]): row for row in measured}


def show(found: Comparison, out: Output) -> None:
    """Prints a table."""
    rows, printed = [], []
    for one, other in found.both:
        for figure in FIGURES:
            if one.get(figure) is not None and other.get(figure) is not None:
                cells = [_cell(row, figure) for row in (one, other)]
                ratio = f"{other[figure] / one[figure]:.3f}" if one[figure] else "-"
                rows.append((one["point"], one["name"], figure, *cells, ratio))
                printed.append({"point": one["point"], "name": one["name"], "figure": figure,
                                "first": one[figure], "second": other[figure]})  # fmt: skip
    out.table("both runs", ["point", "of", "figure", "first", "second", "second / first"], rows)
    for run, points in found.only.items():
        if points:
            out.text(f"only in {run}: {', '.join(points)}")
    out.result({"both": printed, "only": found.only})


def _cell(row: Row, figure: str) -> str:
    low, high = row.get(f"{figure}_low"), row.get(f"{figure}_high")
    return (
        f"{row[figure]:.5g} ({low:.5g} to {high:.5g})" if low is not None and high is not None else f"{row[figure]:.5g}"
    )
