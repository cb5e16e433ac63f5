"""Renders a Report as a self-contained HTML page and as a Markdown model card (configs/report/*.j2, charts.py)."""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup, escape

from builder.aiperf.keep import lengths
from builder.core import paths
from builder.core.errors import UsageError
from builder.core.file_names import truncated
from builder.core.output import Output, seconds, size
from builder.core.store import replace_file, root_of
from builder.evaluate.metrics import Estimate
from builder.evaluate.parts.figures import PARTS
from builder.report import charts, load
from builder.report.charts import Mark
from builder.report.gather import Report, gather
from builder.report.results import OVERALL, RUNNERS, Interval, Score, append, rows, task_rows
from builder.serving.benchmark import format_percentiles

KINDS = {
    "nvfp4_weights": "NVFP4 weights",
    "block_scales": "Block scales",
    "scales": "Tensor scales",
    "kv_scales": "KV cache scales",
    "fp8_linears": "Layers kept in FP8",
    "fp8_scales": "FP8 layer scales",
    "kept_linears": "Layers kept in BF16",
    "embedding": "Embedding",
    "lm_head": "Output head",
    "other": "Norms and others",
}
LAYOUTS = {"unified": "Hugging Face layout", "tensorrt_llm": "TensorRT-LLM layout"}
STAGE_VERBS = {
    "snapshot": "download and hash the model",
    "transform": "rotate the weights",
    "calibration": "collect calibration rows",
    "checkpoint": "quantize and validate",
    "layouts": "write the layouts requested",
    "ranks": "shard by rank",
    "engine": "build the engine",
    "repository": "render the repository",
    "smoke": "serve and smoke-test",
}
VISIBLE = "\n\t\u200c\u200d"  # kept besides printable characters; scripts and emoji need the joiners
# Characters that are markup anywhere in a line, those that are only at its start, and those that GitHub links.
MARKDOWN = re.compile(r"([\\`*_\[\]<>|~&$@]|^[#+=-]|(?<=^\d)[.)]|:(?=//)|(?<=www)\.)", re.IGNORECASE)


def html(report: Report) -> str:
    """The HTML page. It loads nothing from elsewhere, and all text of the report is escaped."""
    return pages().get_template("page.html.j2").render(_context(report))


@functools.cache
def pages() -> jinja2.Environment:
    """The environment of HTML pages: templates in configs/report/, all text escaped."""
    return _environment(autoescape=True, finalize=lambda value: value if _safe(value) else visible(value))


def markdown(report: Report) -> str:
    """The model card in Markdown, with front matter for the Hub. All text of the report is escaped."""
    environment = _environment(autoescape=False, finalize=None)
    return environment.get_template("card.md.j2").render(_context(report), front=_front(report))


def publish(
    repository: Path, out: Output, *, page: Path | None = None, card: Path | None = None, table: Path | None = None
) -> None:
    """Writes the page and the card, appends the evaluation to the table, and prints their paths.

    `page`, `card`, `table`: files; by default in the `reports` directory of the repository's store. UsageError if one
    of them is a directory, or `repository` is not a repository.
    """
    report = gather(repository)
    directory = (root_of(repository.resolve()) or Path()) / "reports"
    name = truncated(report.model.name)
    page = page or directory / f"{name}.html"
    card, table = card or directory / f"{name}.md", table or directory / "results.csv"
    for path in (page, card, table):
        if path.is_dir():
            raise UsageError(f"{path} is a directory.", hint="Name files: --html FILE --markdown FILE --csv FILE")
    replace_file(page, html(report))
    replace_file(card, markdown(report))
    identity = _identity(report)
    fresh = rows(identity, report.evaluation) if report.evaluation else []
    fresh += task_rows(identity, report.tasks)
    added = append(table, fresh) if fresh else 0
    files = {"html": str(page), "markdown": str(card), "csv": str(table)}
    measured = report.benchmark.as_dict() if report.benchmark else None
    # "load" is the old name of "benchmark"; what AIPerf measured is "aiperf".
    aiperf = report.load.as_dict() if report.load else None
    data = {**asdict(report), "benchmark": measured, "load": measured, "aiperf": aiperf}
    out.result({**data, "files": files, "rows": added})
    out.text(f"verdict    {report.verdict.status}: {report.verdict.headline}")
    out.text(f"page       {page}")
    out.text(f"card       {card}")
    out.text(f"table      {table}, {added} new rows" if fresh else "table      no evaluation, no row")
    out.text(f"next       python3 -m webbrowser {page.resolve().as_uri()}")


def _identity(report: Report) -> dict[str, Any]:
    """The columns of the table that identify the model."""
    model = report.model
    built = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(model.built))
    columns = ("revision", "gpu", "target", "format", "name", "repository")
    return {"built": built, "model": model.id, **{name: getattr(model, name) for name in columns}}


def visible(value: object) -> str:
    """The value as text, with control characters, bidirectional overrides and lone surrogates escaped."""
    return "".join(c if c.isprintable() or c in VISIBLE else ascii(c)[1:-1] for c in str(value))


def escape_markdown(value: object) -> str:
    """The value as text for a line or table cell of Markdown, with all markup escaped."""
    return MARKDOWN.sub(r"\\\1", " ".join(visible(value).split()))


def code(value: object) -> str:
    """The value as Markdown inline code for a table cell; "" if it is empty."""
    text = " ".join(visible(value).split()).replace("|", "\\|")
    fence = "`" * (1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}" if text else ""


def fenced(value: object) -> str:
    """The value as a Markdown code block, with a fence that is longer than any in the content."""
    text = visible(value)
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _safe(value: object) -> bool:
    return isinstance(value, Markup)


def _environment(*, autoescape: bool, finalize: Any) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(paths.data("configs", "report")),
        undefined=jinja2.StrictUndefined,
        autoescape=autoescape,
        finalize=finalize,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "size": size,
        "seconds": seconds,
        "md": escape_markdown,
        "code": code,
        "fenced": fenced,
        "figure": lambda value, digits, scale: f"{value * scale:,.{digits}f}",
        "number": number,
        "thousands": lambda value: f"{value:,}",
        "percentiles": format_percentiles,
        "lengths": lengths,
        "signed": lambda value, digits, scale=1: "–" if value is None else f"{value * scale:+.{digits}f}",
        "runner": lambda name: RUNNERS.get(name, name),
        "breakable": lambda text: Markup(re.sub(r"([._/=-])", r"\1<wbr>", str(escape(visible(text))))),
        "verb": lambda name: STAGE_VERBS.get(name, name),
        "kind": lambda name: KINDS.get(name, name),
        "layout": lambda name: LAYOUTS.get(name, name),
        "value": lambda value: "–" if value is None else value if isinstance(value, str) else json.dumps(value),
        "date": lambda stamp: time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(stamp)),
    }
    return environment


def number(interval: Interval | Estimate | None, digits: int = 2, scale: float = 1.0) -> str:
    """A metric as text: `98.71 (98.20 to 99.12)`, or a dash if it was not measured. `scale`: 100 for per cent."""
    if interval is None:
        return "–"
    text = f"{interval.value * scale:,.{digits}f}"
    if interval.low is None or interval.high is None:
        return text
    return f"{text} ({interval.low * scale:,.{digits}f} to {interval.high * scale:,.{digits}f})"


def _context(report: Report) -> dict[str, Any]:
    return {
        "report": report,
        "scores": _scores(report),
        "tiles": _tiles(report),
        "score_chart": _score_chart(report),
        "compared_chart": _compared_chart(report),
        "loss_chart": _loss_chart(report),
        "part_names": PARTS,
        "size_chart": _size_chart(report),
        "contents_charts": [_contents_chart(name, kinds) for name, kinds in report.size.contents.items()],
        "time_chart": _time_chart(report),
        "throughput_chart": _throughput_chart(report),
        "load_charts": load.charts(report.load),
        "best_load": load.best(report.load),
        "set_by_hand": [row for row in report.values if row[2] != "default"],
        "defaults": [row for row in report.values if row[2] == "default"],
    }


def _scores(report: Report) -> list[Score]:
    """The rows of the evaluation, without `overall` if there is only one data set."""
    scores = report.evaluation.scores if report.evaluation else ()
    single = len({score.data for score in scores} - {OVERALL}) == 1
    return [score for score in scores if not (single and score.data == OVERALL)]


def _headline_score(report: Report) -> Score | None:
    """The score to show first: over all data sets, of the runner that is closest to what users get."""
    scores = [score for score in _scores(report) if score.score]
    overall = [score for score in scores if score.data == OVERALL] or scores
    nearest = ("served", "reference", "checkpoint", "simulated")
    return min(overall, key=lambda s: nearest.index(s.runner) if s.runner in nearest else 9, default=None)


def _tiles(report: Report) -> list[tuple[str, str, str]]:
    """The key numbers at the top, as (label, value, explanation)."""
    tiles: list[tuple[str, str, str]] = []
    best = _headline_score(report)
    if best and best.score:
        tiles.append(("Quality against BF16", f"{best.score.value:.2f}", "BF16 = 100"))
    elif report.quality and report.quality.score is not None:
        tiles.append(("Quality against BF16", f"{report.quality.score:.2f}", "BF16 = 100, by the quality check"))
    if report.size.weights:
        before, after = report.size.weights
        tiles.append(("Weights", size(after), f"{before / after:.1f} times smaller than {size(before)}"))
    if report.size.bits_per_weight:
        tiles.append(("Bits per weight", f"{report.size.bits_per_weight:.2f}", "in quantized layers, with scales"))
    if report.smoke:
        unchecked = len(report.smoke.unchecked)
        passed = len(report.smoke.checks) - len(report.smoke.failed) - unchecked
        rest = f", {unchecked} not checked" if unchecked else ""
        tiles.append(
            ("Smoke test", f"{passed} of {len(report.smoke.checks)}", f"checks passed on the served model{rest}")
        )
    tiles.append(("Build time", seconds(sum(stage.seconds for stage in report.stages)), "all stages together"))
    return tiles


def _score_chart(report: Report) -> Markup | None:
    scores = [score for score in _scores(report) if score.score]
    if not scores or not report.evaluation:
        return None
    marks = [
        Mark(
            visible(f"{score.data}, {RUNNERS.get(score.runner, score.runner)}"),
            score.score.value,
            f"{score.score.value:.2f}",
            score.score.low,
            score.score.high,
            "overall" if score.data == OVERALL else "",
        )
        for score in scores
        if score.score
    ]
    lines = [(100.0, "BF16 = 100", "base")]
    if gate := report.evaluation.limits.get("score"):
        lines.append((gate, f"gate {gate:g}", "gate"))
    text = "Perplexity of BF16 over perplexity of the model, times 100, with 95% confidence intervals. " + _spoken(
        marks
    )
    return Markup(charts.dots("score", "Relative score, BF16 = 100", text, marks, lines))


def _compared_chart(report: Report) -> Markup | None:
    """The relative score of each checkpoint of a comparison, with its size."""
    marks = [
        Mark(
            f"{visible(RUNNERS.get(one.label, one.label))}, {size(one.nbytes)}",
            score.value,
            f"{score.value:.2f}",
            score.low,
            score.high,
            "overall" if one.label == "checkpoint" else "",
        )
        for one in (report.evaluation.compared if report.evaluation else ())
        if (score := one.score.score)
    ]
    if not marks:
        return None
    text = "Relative score of each checkpoint on the same texts, with 95% confidence intervals. " + _spoken(marks)
    lines = [(100.0, "BF16 = 100", "base")]
    return Markup(charts.dots("compared", "Checkpoints compared, BF16 = 100", text, marks, lines))


def _loss_chart(report: Report) -> Markup | None:
    if not report.losses:
        return None
    marks = [
        Mark(visible(loss.layer), loss.kl, f"{loss.kl:.3g}", tick=_number_in(loss.layer)) for loss in report.losses
    ]
    worst = max(report.losses, key=lambda loss: loss.kl)
    text = (
        f"KL divergence to BF16 with one layer quantized at a time. The worst: {visible(worst.layer)}, {worst.kl:.3g}."
    )
    return Markup(charts.columns("loss", "Loss of each layer", text, marks))


def _number_in(layer: str) -> str:
    """The first number in a layer's name: `model.layers.12.mlp` -> `12`; "" if there is none."""
    found = re.search(r"\d+", layer)
    return found.group() if found else ""


def _size_chart(report: Report) -> Markup | None:
    marks = [Mark(what, nbytes, size(nbytes)) for what, nbytes in report.size.disk]
    return Markup(charts.bars("sizes", "Bytes on disk", _spoken(marks), marks)) if marks else None


def _contents_chart(layout: str, kinds: Any) -> tuple[str, Markup]:
    total = sum(kinds.values()) or 1
    ordered = sorted(kinds.items(), key=lambda item: -item[1])
    marks = [Mark(visible(KINDS.get(kind, kind)), n, f"{size(n)}, {100 * n / total:.1f} %") for kind, n in ordered if n]
    name = LAYOUTS.get(layout, layout)
    slug = re.sub(r"[^a-z0-9]+", "-", layout.lower())
    return name, Markup(
        charts.bars(f"contents-{slug}", f"Checkpoint by kind of tensor, {visible(name)}", _spoken(marks), marks)
    )


def _time_chart(report: Report) -> Markup | None:
    marks = [
        Mark(STAGE_VERBS.get(stage.name, stage.name).capitalize(), stage.seconds, seconds(stage.seconds))
        for stage in report.stages
    ]
    marks += [
        Mark(visible(f"Accuracy, {RUNNERS.get(score.runner, score.runner)}"), score.seconds, seconds(score.seconds))
        for score in (report.evaluation.scores if report.evaluation else ())
        if score.data == OVERALL and score.seconds
    ]
    return Markup(charts.bars("times", "Time of each stage", _spoken(marks), marks)) if marks else None


def _throughput_chart(report: Report) -> Markup | None:
    if report.benchmark is None:
        return None
    marks = [
        Mark(f"Concurrency {level.concurrency}", level.tokens_per_second, f"{level.tokens_per_second:,.1f} tokens/s")
        for level in report.benchmark.levels
    ]
    return Markup(charts.bars("throughput", "Output tokens per second", _spoken(marks), marks))


def _spoken(marks: Sequence[Mark]) -> str:
    """The marks of a chart as a sentence, for its description."""
    return "; ".join(f"{mark.label}: {mark.text}" for mark in marks) + "."


def _front(report: Report) -> str:
    """The card's front matter as YAML, for the Hub. A local model has no base_model: nobody else could download it."""
    front: dict[str, Any] = {"library_name": "tensorrt-llm", "pipeline_tag": "text-generation"}
    if report.model.revision:
        front["base_model"] = report.model.id
        front["base_model_relation"] = "quantized"
    front["tags"] = [*report.model.format.lower().replace(",", "").split()[:1], "modelopt", "triton", report.model.gpu]
    return yaml.safe_dump(front, sort_keys=False, allow_unicode=False)
