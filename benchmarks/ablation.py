"""Runs an ablation: every point of a matrix of recipes, measured on the same texts and tasks, as one table.

    python benchmarks/ablation.py configs/ablations/bundled.yaml [--model DIR] [--work DIR] [--set KEY=VALUE]

The whole file is validated before anything runs. Points are made and measured as `builder eval` does it, so a second
run with the same --work repeats nothing. After each point WORK/ablation.json and WORK/ablation.html are written anew.
Intervals are 95 %, paired: over the same texts (bootstrap) and the same questions (from the answers that differ).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from markupsafe import Markup
from points import Point, base_of, read

from builder import pipeline
from builder.core.errors import BuilderError, UsageError
from builder.core.output import Output
from builder.core.store import Store, replace_file
from builder.evaluate import metrics
from builder.evaluate.metrics import Estimate, Sums
from builder.evaluate.stage import Evaluation
from builder.preflight.prepare import prepare
from builder.report import charts
from builder.report.render import pages

TEMPLATE = Path(__file__).with_suffix(".html.j2")
RUNNER = "checkpoint"
Z = 1.96  # standard errors in half of a 95 % interval


@dataclass(frozen=True)
class Result:
    """What was found of a point. texts: {data set: {metric: estimate}}; tasks: {task: {metric: estimate}}."""

    labels: Mapping[str, str]
    texts: Mapping[str, Mapping[str, Estimate]]
    tasks: Mapping[str, Mapping[str, Estimate]]


def measured(point: Point, found: Evaluation, base: Sequence[Sums] | None) -> tuple[Result, list[Sums]]:
    """The figures of a point, with its KL over that of the point that it is compared with, and its sums."""
    sums = [
        metrics.read(own, bf16)
        for own, bf16 in zip(found.scores.get(RUNNER, ()), found.scores.get("bf16", ()), strict=True)
    ]
    part, texts = point.resolved.recipe.evaluation, {}
    for number, (name, figures) in enumerate(found.measured.get(RUNNER, {}).items()):
        texts[name] = {metric: figures[metric] for metric in ("kl", "ppl", "score")}
        which = [number] if number < len(sums) else [*range(len(sums))]  # all sets together are the last entry
        if base and base is not sums:
            pair = [sums[n] for n in which], [base[n] for n in which]
            texts[name]["kl_ratio"] = metrics.kl_ratio(*pair, resamples=part.resamples, seed=part.seed + number)
    tasks: dict[str, dict[str, Estimate]] = {}
    for row in found.tasks.rows:
        if row.runner == RUNNER:
            tasks[row.task] = {row.metric: around(row.value, row.stderr)}
            if row.change is not None and row.flips is not None:
                deviation = math.sqrt(max(0.0, row.flips - row.change**2) / max(1, row.documents))
                tasks[row.task]["change"] = around(row.change, deviation)
    return Result(point.labels, texts, tasks), sums


def around(value: float, stderr: float | None) -> Estimate:
    """A value and its 95 % interval."""
    half = Z * (stderr or 0.0)
    return Estimate(value, value - half, value + half)


def table(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows. KL / base: of the point with the first labels and the same last one."""
    first = results[0]
    head = [*first.labels]
    for name in first.texts:
        head += [f"PPL {name}", f"KL {name}", "KL / base"]
    head += [cell for task in first.tasks for cell in (task, "against BF16")]
    return head, [_cells(one, first) for one in results]


def _cells(one: Result, first: Result) -> list[str]:
    cells = [*one.labels.values()]
    for name in first.texts:
        found = one.texts.get(name, {})
        cells += [_text(found.get("ppl"), 2), _text(found.get("kl"), 5), _text(found.get("kl_ratio"), 2)]
    for task in first.tasks:
        values = list(one.tasks.get(task, {}).values())
        cells += [_text(values[0], 1, 100) if values else "-", _text(values[1], 1, 100) if len(values) > 1 else "-"]
    return cells


def _text(found: Estimate | None, digits: int, scale: float = 1) -> str:
    if found is None:
        return "-"
    value, low, high = (f"{scale * number:.{digits}f}" for number in (found.value, found.low, found.high))
    return value if low == high else f"{value} ({low} to {high})"


def page(title: str, points: Sequence[Point], results: Sequence[Result]) -> str:
    """The results as an HTML page that loads nothing from elsewhere."""
    recipe, drawn = points[0].resolved.recipe, {}
    for name in results[0].texts:
        marks = []
        for one in results:
            kl = one.texts[name]["kl"]
            marks.append(charts.Mark(", ".join(one.labels.values()), kl.value, _text(kl, 5), kl.low, kl.high))
        description = "; ".join(f"{mark.label}: {mark.text}" for mark in marks)
        drawn[name] = Markup(charts.bars(f"kl-{len(drawn)}", f"KL to BF16 on {name}", description, marks))
    head, rows = table(results)
    facts = [f"{len(results)} of {len(points)} points", f"{recipe.calibration.samples} calibration rows"]
    template = pages().from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(title=title, model=recipe.model.id, facts=facts, charts=drawn, head=head, rows=rows)


def check(points: Sequence[Point], store: Store) -> None:
    """UsageError that names every point whose model, formats and layers do not go together."""
    wrong = []
    for point in points:
        try:
            prepare(point.resolved, store, layouts=False)  # nothing is served
        except BuilderError as error:
            wrong.append(f"{point.name}: {error.what} {error.why}".strip())
    if wrong:
        raise UsageError("Not all points can be built.", why="\n".join(wrong), hint="Exclude them; nothing was run.")


def run(title: str, points: Sequence[Point], work: Path, out: Output) -> list[Result]:
    """Measures all points, each base before what is compared with it. One that fails, or whose checkpoint can't be
    measured, is reported and left out."""
    store, found, sums = Store(work, out), dict[str, Result](), dict[str, list[Sums]]()
    check(points, store)
    for point in sorted(points, key=lambda one: base_of(one, points) is not one):
        out.info(f"point {len(found) + 1} of {len(points)}: {point.name}")
        base = base_of(point, points)
        try:
            with store.in_use():
                evaluation = pipeline.measure(point.resolved, store)
        except BuilderError as error:
            out.warn(f"{point.name} failed: {error.what} {error.why}")
            continue
        refused = {**evaluation.not_measured, **evaluation.tasks.not_measured.get(RUNNER, {})}
        for what, why in refused.items():
            out.warn(f"{point.name}: {what} was not measured: {why}")
        if RUNNER in evaluation.not_measured:
            continue
        of = sums.get(base.name) if base is not None and base is not point else None
        found[point.name], sums[point.name] = measured(point, evaluation, of)
        results = [found[one.name] for one in points if one.name in found]
        written = {"title": title, "points": [asdict(one) for one in results]}
        replace_file(work / "ablation.json", json.dumps(written, indent=1, allow_nan=True) + "\n")
        replace_file(work / "ablation.html", page(title, points, results))
    return [found[one.name] for one in points if one.name in found]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table. Exits with 1 if a point failed, 2 if the file is not valid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file such as those of configs/ablations")
    parser.add_argument("--model", type=Path, help="measure this model instead")
    parser.add_argument("--work", type=Path, help="store and results (default: a temporary directory)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of all points' recipes")
    parser.add_argument("--list", action="store_true", help="print the points and run nothing")
    asked = parser.parse_args(argv)
    out = Output("human")
    try:
        title, points = read(asked.config, model=asked.model, sets=asked.set)
        if asked.list:
            out.table(title, [*points[0].labels], [tuple(point.labels.values()) for point in points])
            return 0
        with tempfile.TemporaryDirectory() as temporary:
            work = asked.work or Path(temporary)
            work.mkdir(parents=True, exist_ok=True)
            results = run(title, points, work, out)
    except BuilderError as error:
        print(error.what, error.why, error.hint, sep="\n", file=sys.stderr)
        return 2
    if results:
        head, rows = table(results)
        out.table(title, head, [tuple(row) for row in rows])
        kept = f"written to {work / 'ablation.json'} and {work / 'ablation.html'}"
        print(kept if asked.work else "name --work DIR to keep the table", file=sys.stderr)
    return 0 if len(results) == len(points) else 1


if __name__ == "__main__":
    sys.exit(main())
