"""The results of a sweep as a table and as an HTML page that loads nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from builder.core.output import seconds, size
from builder.evaluate.metrics import Estimate
from builder.report import charts, scatter
from builder.report.render import pages
from builder.serving.benchmark import Level
from builder.sweep import measured
from builder.sweep.measured import Effect, Result
from builder.sweep.points import Point

LOADED = ["tokens/s", "TTFT"]


def table(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: labels, bytes, figures on each data set and task. KL / base: see points.base_of."""
    sets = list(dict.fromkeys(name for one in results for name in one.texts))
    tasks = list(dict.fromkeys(name for one in results for name in one.tasks))
    head = [*results[0].point.labels, "bytes"] if results else []
    for name in sets:
        head += [f"PPL {name}", f"KL {name}", "KL / base"]
    head += [cell for task in tasks for cell in (task, "against BF16")]
    head += ["verdict"] + LOADED * any(one.tokens_per_second for one in results)
    cells = [_cells(one, sets, tasks) for one in results]
    return head, [row[: len(head)] for row in cells]


def _cells(one: Result, sets: Sequence[str], tasks: Sequence[str]) -> list[str]:
    cells = [*one.point.labels.values(), size(one.nbytes) if one.nbytes else "failed" if one.why else "-"]
    for name in sets:
        found = one.texts.get(name, {})
        cells += [_text(found.get("ppl"), 2), _text(found.get("kl"), 5), _text(found.get("kl_ratio"), 2)]
    for task in tasks:
        values = list(one.tasks.get(task, {}).values())
        cells += [_text(values[0], 1, 100) if values else "-", _text(values[1], 1, 100) if len(values) > 1 else "-"]
    return [*cells, one.verdict or "-", *_speeds(one.served.levels if one.served else ())]


def _speeds(levels: Sequence[Level]) -> list[str]:
    """Tokens a second of the fastest concurrency, and the time to the first token at the lowest one."""
    if not levels:
        return ["-", "-"]
    fastest = max(levels, key=lambda level: level.tokens_per_second)
    lowest = min(levels, key=lambda level: level.concurrency)
    ttft = f"{1000 * lowest.ttft.p50:.1f} ms" if lowest.ttft else "-"
    return [f"{fastest.tokens_per_second:.1f} (concurrency {fastest.concurrency})", ttft]


def _text(found: Estimate | None, digits: int, scale: float = 1) -> str:
    if found is None:
        return "-"
    value, low, high = (f"{scale * number:.{digits}f}" for number in (found.value, found.low, found.high))
    return value if low == high else f"{value} ({low} to {high})"


def page(title: str, results: Sequence[Result], points: Sequence[Point]) -> str:
    """The page. points: all of the sweep, of which these have ended."""
    axes = len(results[0].point.labels)
    head, rows = table(results)
    facts = [f"{len(results)} of {len(points)} points"]
    failed = [(one.point.name, one.why.strip().splitlines()[-1]) for one in results if one.why.strip()]
    chosen, effects = measured.recommended(results), measured.effects(results, points)
    template = pages().get_template("sweep.html.j2")
    return template.render(
        title=title, model=", ".join(dict.fromkeys(one.point.recipe.model.id for one in results)), facts=facts,
        head=head, rows=[_parted(row, axes) for row in rows], axes=axes, failed=failed,
        joined=[one.point.name for one in measured.front(results)],
        charts=_charts(results), front=_front(results), speed=_speed(results), effects=effects and _effects(effects),
        mixed=[f"{name} {one.mixed}." for name, one in effects.items() if one.mixed],
        best=[one.point.name for one in measured.front(results, served=True)],
        chosen=chosen and {"name": chosen[0].point.name, "why": chosen[1], "recipe": chosen[0].point.recipe_file},
    )  # fmt: skip


def _parted(row: Sequence[str], axes: int) -> list[tuple[str, str]]:
    """Each cell and what stands below it: the interval of a figure."""
    parts = [cell.partition(" (") for cell in row[axes:]]
    return [*((cell, "") for cell in row[:axes]), *((value, more.removesuffix(")")) for value, _, more in parts)]


def _charts(results: Sequence[Result]) -> dict[str, Markup]:
    """{data set: KL of each point}."""
    drawn: dict[str, Markup] = {}
    for name in dict.fromkeys(name for one in results for name in one.texts):
        marks = []
        for one in results:
            if kl := one.texts.get(name, {}).get("kl"):
                marks.append(charts.Mark(one.point.name, kl.value, f"{kl.value:.5f}", kl.low, kl.high))
        drawn[name] = Markup(charts.bars(f"kl-{len(drawn)}", f"KL to BF16 on {name}", _spoken(marks), marks))
    return drawn


def _front(results: Sequence[Result]) -> Markup | None:
    """KL and bytes of each point, those joined that no other one beats in both."""
    best = {one.point.name for one in measured.front(results)}
    spots = []
    for one in sorted(results, key=lambda one: one.nbytes or 0):
        if one.kl is not None and one.nbytes:
            text = f"{size(one.nbytes)}, KL {_text(one.kl, 5)}, {seconds(one.seconds or 0)} to quantize"
            tone = "front" if one.point.name in best else "other"
            spots.append(scatter.Spot(one.point.name, one.nbytes / 1e6, one.kl.value, text, tone))
    if len(spots) < 2:
        return None
    spoken = "; ".join(f"{spot.label}: {spot.text}" for spot in spots)
    return Markup(scatter.scatter("front", "KL to BF16 and size of the checkpoint", spoken, spots))


def _speed(results: Sequence[Result]) -> Markup | None:
    """KL and tokens a second of each point that was served, those marked that no other one beats in KL, bytes and
    tokens a second."""
    best = {one.point.name for one in measured.front(results, served=True)}
    spots = []
    for one in results:
        if one.kl is not None and (speed := one.tokens_per_second):
            text = f"{speed:.1f} tokens/s, KL {_text(one.kl, 5)}, {size(one.nbytes or 0)}"
            spots.append(
                scatter.Spot(one.point.name, speed, one.kl.value, text, "best" if one.point.name in best else "other")
            )
    if len(spots) < 2:
        return None
    spoken = "; ".join(f"{spot.label}: {spot.text}" for spot in spots)
    return Markup(scatter.scatter("speed", "KL to BF16 and throughput", spoken, spots))


def _effects(found: Mapping[str, Effect]) -> Markup:
    """The KL with each choice over that without it."""
    means = {name: one.mean for name, one in found.items()}
    marks = [charts.Mark(name, one.value, _ratio(one), one.low, one.high) for name, one in means.items()]
    return Markup(
        charts.dots("effects", "Effect of each choice on the KL", _spoken(marks), marks, [(1.0, "no effect", "")])
    )


def _ratio(found: Estimate) -> str:
    """With as many digits as its interval lets one tell apart from no effect, and from none at all."""
    return _text(found, next((n for n in range(2, 6) if found.value >= 10 ** (1 - n)), 6))


def _spoken(marks: Sequence[charts.Mark]) -> str:
    return "; ".join(f"{mark.label}: {mark.text}" for mark in marks)
