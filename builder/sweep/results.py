"""The results of a sweep as files that grow as its points finish: results.csv and results.parquet, a row for each point
and data set, task or concurrency.

Both are replaced whole and under a lock, so no reader sees half a row, and of two sweeps that write at once neither
loses the other's rows. The rows of a point that is measured again take the place of its old ones. CSV is what is read
back; Parquet has the same rows with types.
"""

from __future__ import annotations

import csv
import fcntl
import io
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from builder.core.errors import UsageError
from builder.core.locks import flock, lock_file
from builder.core.store import replace_file
from builder.evaluate.metrics import Estimate
from builder.serving.benchmark import Level
from builder.sweep.measured import Result

FORMAT = 2  # 1 had no model, recipe, verdict and figures under load
CSV, PARQUET, LOCK = "results.csv", "results.parquet", ".results.lock"
INTERVALS = ("ppl", "score", "kl", "kl_ratio", "task", "change")  # each with _low and _high
FIRST, LAST = ("format", "model", "point", "recipe"), ("kind", "name")
NUMBERS = tuple(f"{name}{end}" for name in INTERVALS for end in ("", "_low", "_high"))
LOADED = ("tokens_per_second", "ttft", "inter_token_latency", "latency")  # the last three: median seconds
REST = (*NUMBERS, *LOADED, "bytes", "seconds", "verdict", "status", "why", "finished")
WHOLE = ("format", "bytes")
FLOATS = (*NUMBERS, *LOADED, "seconds")
AXIS = "axis "  # begins the columns of labels
Row = dict[str, Any]  # {column: str, number or None}


def rows(result: Result) -> list[Row]:
    """A row for each data set, task and concurrency; of a point without figures one row that says why."""
    point, refused = result.point, "; ".join(f"{name}: {text}" for name, text in result.refused.items())
    levels = result.served.levels if result.served else ()
    rejected = result.served.verdict.reasons if result.served and result.served.rejected else ()
    common = {"format": FORMAT, "model": point.recipe.model.id, "point": point.slug, "recipe": point.recipe_digest}
    common |= {f"{AXIS}{axis}": label for axis, label in point.labels.items()}
    common |= {"bytes": result.nbytes, "seconds": result.seconds, "verdict": result.verdict}
    common["why"] = " ".join((result.why or refused or "; ".join(rejected)).split())
    measured = bool(result.texts or result.tasks or result.served)
    common["status"] = "failed" if result.why else "measured" if measured else "not measured"
    common["finished"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(result.finished))
    found: list[Row] = []
    for name, figures in result.texts.items():
        row = {metric: figures[metric] for metric in ("ppl", "score", "kl", "kl_ratio") if metric in figures}
        found.append({**common, "kind": "texts", "name": name, **_numbers(row)})
    for name, figures in result.tasks.items():
        values = {("change" if metric == "change" else "task"): value for metric, value in figures.items()}
        found.append({**common, "kind": "task", "name": name, **_numbers(values)})
    for level in levels:
        found.append({**common, "kind": "load", "name": f"concurrency {level.concurrency}", **_load(level)})
    return found or [{**common, "kind": "build" if result.served else "", "name": ""}]


def _load(level: Level) -> dict[str, float | None]:
    medians = {name: getattr(level, name) for name in LOADED[1:]}
    return {
        "tokens_per_second": level.tokens_per_second,
        **{name: times.p50 if times else None for name, times in medians.items()},
    }


def _numbers(figures: Mapping[str, Estimate]) -> dict[str, float | None]:
    found = {}
    for name, one in figures.items():
        for end, value in (("", one.value), ("_low", one.low), ("_high", one.high)):
            found[name + end] = value if math.isfinite(value) else None
    return found


def update(directory: Path, results: Sequence[Result]) -> None:
    """Puts the rows of these points into both files, in place of their old ones. UsageError for files of another
    version; OSError if the disk refuses: each file then has either its old rows or the new ones."""
    with lock_file(directory / LOCK) as handle:
        flock(handle, fcntl.LOCK_EX)
        new = {result.point.slug: rows(result) for result in results}
        kept = [row for row in read(directory / CSV) if row["point"] not in new] if (directory / CSV).exists() else []
        _write(directory, [*kept, *(row for of in new.values() for row in of)])


def check(directory: Path) -> None:
    """UsageError, before anything runs, for a file that `update` would refuse."""
    if (directory / CSV).exists():
        read(directory / CSV)


def read(path: Path) -> list[Row]:
    """The rows of a CSV. UsageError if it is not one of ours, or of another version."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            found = list(reader)
    except (csv.Error, UnicodeDecodeError) as error:
        raise _not_ours(path, str(error)) from None
    names = [*(reader.fieldnames or ())]
    if "format" not in names:
        raise _not_ours(path, "It has no column 'format'.")
    if any(None in row or None in row.values() for row in found):
        raise _not_ours(path, "Not every row has a value for each column.")
    versions = {row["format"] for row in found} - {str(FORMAT)}
    if versions:
        raise UsageError(
            f"{path} has version {', '.join(sorted(versions))} of the results.",
            why=f"This builder reads and writes version {FORMAT}.",
            hint="Move it away; measured points are in the store and are not measured again.",
        )
    known = (*FIRST, *LAST, *REST)
    if {name for name in names if not name.startswith(AXIS)} != {*known}:
        raise _not_ours(path, f"Its columns are {', '.join(names)[:300]}.")
    try:
        return [{name: _read(name, text) for name, text in row.items()} for row in found]
    except ValueError as error:
        raise _not_ours(path, str(error)) from None


def _not_ours(path: Path, why: str) -> UsageError:
    return UsageError(
        f"{path} is not a file of a sweep's results.", why=why, hint="Name another --output, or move it away."
    )


def _read(name: str, text: str) -> Any:
    if name in WHOLE:
        return int(text) if text else None
    if name in FLOATS:
        return float(text) if text else None
    return text


def _write(directory: Path, found: Sequence[Row]) -> None:
    axes = list(dict.fromkeys(name for row in found for name in row if name.startswith(AXIS)))
    names = [*FIRST, *axes, *LAST, *REST]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    replace_file(directory / PARQUET, _parquet(names, found))
    replace_file(directory / CSV, text.getvalue())


def _parquet(names: Sequence[str], found: Sequence[Row]) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    types = {**dict.fromkeys(WHOLE, pa.int64()), **dict.fromkeys(FLOATS, pa.float64())}
    schema = pa.schema([(name, types.get(name, pa.string())) for name in names])
    columns = {name: [row.get(name, None if name in types else "") for row in found] for name in names}
    sink = io.BytesIO()
    parquet.write_table(pa.table(columns, schema=schema), sink)
    return sink.getvalue()
