"""Reads evaluation results from a store, and appends them to a CSV file: a row per model, data set and runner."""

from __future__ import annotations

import csv
import fcntl
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from builder.core.errors import UsageError
from builder.core.store import Artifact, digest_of, replace_file
from builder.evaluate.parts import stage as parts
from builder.evaluate.parts.figures import Losses
from builder.evaluate.tasks import Row

OVERALL = "overall"  # all data sets together, weighted by tokens
BF16 = "bf16"
# Labels of the runners: what was measured.
RUNNERS = {
    "bf16": "BF16 (the original)",
    "simulated": "simulated by ModelOpt",
    "checkpoint": "checkpoint on disk",
    "reference": "reference executor",
    "served": "served by Triton",
}
# A cell that begins with one of these may be executed as a formula by a spreadsheet (OWASP, "CSV Injection").
FORMULA = ("=", "+", "-", "@", "\t", "\r")
GATE = {True: "passed", False: "failed", None: ""}
ENDS = {"": "value", "_low": "low", "_high": "high"}  # column suffixes of an interval


@dataclass(frozen=True)
class Interval:
    """A measured value, with its confidence interval where there is one."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Score:
    """The metrics of one runner on one data set, or on all (`OVERALL`). None: not measured.

    `score`: PPL_BF16 / PPL x 100; `kl`: KL divergence from BF16 in nats per token; `agreement`, `flips`: 0 to 1.
    Metrics that compare with BF16 are None for BF16 itself.
    """

    runner: str
    data: str
    texts: int | None
    tokens: int | None
    seconds: float | None
    perplexity: Interval | None
    score: Interval | None = None
    kl: Interval | None = None
    agreement: Interval | None = None
    flips: Interval | None = None


@dataclass(frozen=True)
class Compared:
    """One model of a comparison, over all data sets. label: BF16, the repository's checkpoint or another checkpoint.

    `ratio`: its KL over that of the repository's own checkpoint.
    """

    label: str
    formats: str
    tool: str
    nbytes: int
    score: Score
    ratio: Interval | None = None


@dataclass(frozen=True)
class Evaluation:
    """An evaluation on texts. `scores` are of this model's runners, `compared` of all checkpoints that were compared.

    `passed`: the gate's verdict, None if there is no gate or it can't be judged; `limits`: the gate's, by metric;
    `failed`: what missed a limit. `not_measured`: {runner: reason}. `collapsed`: {runner: data sets whose shuffled
    tokens it rates as likely as the text}.
    """

    digest: str
    scores: tuple[Score, ...]
    passed: bool | None = None
    limits: Mapping[str, float] = field(default_factory=dict)
    failed: tuple[str, ...] = ()
    not_measured: Mapping[str, str] = field(default_factory=dict)
    collapsed: Mapping[str, Sequence[str]] = field(default_factory=dict)
    compared: tuple[Compared, ...] = ()


@dataclass(frozen=True)
class Loss:
    """The loss if only this layer is quantized: KL divergence from BF16 at the output, in nats per token.

    `nbytes`: how many bytes keeping it in BF16 would add.
    """

    layer: str
    kl: float
    nbytes: int | None = None


def evaluation_of(chain: Mapping[str, Artifact], everything: Sequence[Artifact]) -> Evaluation | None:
    """The newest evaluation on texts of these artifacts only; evaluations with a gate take precedence. Its comparison
    with other checkpoints is the newest one, also if another evaluation made it."""
    mine = [artifact for artifact in _evaluations(chain, everything) if artifact.facts.get("texts", True)]
    newest = max(mine, key=lambda a: (bool(a.facts.get("verdict")), _started(a)), default=None)
    if newest is None:
        return None
    found = read_evaluation(_tables(newest), newest.digest, newest.manifest["ingredients"].get("limits", {}))
    tables = (_tables(artifact) for artifact in sorted(mine, key=_started, reverse=True))
    return replace(found, compared=next(filter(None, map(_comparison, tables)), ()))


def tasks_of(chain: Mapping[str, Artifact], everything: Sequence[Artifact]) -> tuple[Row, ...]:
    """The metrics of the newest evaluation by tasks, which need not be the one that `evaluation_of` returns."""
    mine = [artifact for artifact in _evaluations(chain, everything) if artifact.facts.get("tasks")]
    newest = max(mine, key=_started, default=None)
    return tuple(Row(**row) for row in _tables(newest)["tasks"]["rows"]) if newest else ()


def _evaluations(chain: Mapping[str, Artifact], everything: Sequence[Artifact]) -> list[Artifact]:
    """Evaluations of these artifacts only, with a runner other than BF16."""
    ours = {artifact.digest for artifact in chain.values()}
    measured = ("scores", "tasks")
    # Equal figures have one digest, also if they are of different checkpoints: one of them must be ours.
    mine = {a.digest for a in everything if a.stage in measured and set(a.manifest["ingredients"]["of"]) <= ours}
    return [
        artifact
        for artifact in everything
        if artifact.stage == "evaluation"
        and set(artifact.manifest["ingredients"]["runners"]) - {BF16}
        and set(artifact.manifest["ingredients"]["of"]) <= mine
    ]


def _started(artifact: Artifact) -> float:
    return float(artifact.manifest["started"])


def _tables(artifact: Artifact) -> dict[str, Any]:
    tables: dict[str, Any] = json.loads((artifact.path / "evaluation.json").read_text(encoding="utf-8"))
    return tables


def read_evaluation(tables: Mapping[str, Any], digest: str, limits: Mapping[str, float]) -> Evaluation:
    """Parses the evaluation.json of `builder eval`: measured, sets, collapsed, not_measured, verdict.

    `digest`: of its artifact; `limits`: of the recipe's gate, for files without a verdict.
    """
    verdict = tables.get("verdict") or {}
    others = [label for label in tables.get("compared") or {} if label not in RUNNERS]
    return Evaluation(
        digest=digest,
        scores=tuple(
            _score(runner, data, metrics, tables["sets"][runner])
            for runner, sets in tables["measured"].items()
            for data, metrics in sets.items()
            if runner not in others
        ),
        compared=_comparison(tables),
        passed=verdict.get("passed"),
        limits=verdict.get("limits", limits),
        failed=tuple(verdict.get("failed", ())),
        not_measured=tables.get("not_measured", {}),
        collapsed=tables.get("collapsed", {}),
    )


def _comparison(tables: Mapping[str, Any]) -> tuple[Compared, ...]:
    """The models of a comparison that were measured; none for an evaluation without other checkpoints."""
    compared = tables.get("compared") or {}
    return tuple(_compared(label, one, tables) for label, one in compared.items() if label in tables["measured"])


def _compared(label: str, one: Mapping[str, Any], tables: Mapping[str, Any]) -> Compared:
    """The model `one` of a comparison: its figures over all data sets, or on the only one."""
    sets = tables["measured"][label]
    data = OVERALL if OVERALL in sets else next(iter(sets))
    score, ratio = _score(label, data, sets[data], tables["sets"][label]), _interval(sets[data], "kl_ratio")
    return Compared(label, one["formats"], one["tool"], one["nbytes"], score, ratio)


def _score(runner: str, data: str, figures: Mapping[str, Any], sets: Mapping[str, Mapping[str, Any]]) -> Score:
    counted = list(sets.values()) if data == OVERALL else [sets[data]]

    def total(name: str) -> Any:
        return sum(data_set[name] for data_set in counted) if all(name in data_set for data_set in counted) else None

    metrics = {name: _interval(figures, name) for name in ("score", "kl", "agreement", "flips")}
    ppl = _interval(figures, "ppl")
    return Score(runner, data, total("texts"), total("tokens"), total("seconds"), ppl, **metrics)


def _interval(figures: Mapping[str, Any], name: str) -> Interval | None:
    figure = figures.get(name) or {}
    return Interval(**figure) if figure.get("value") is not None else None


def losses_of(chain: Mapping[str, Artifact], everything: Sequence[Artifact]) -> list[Loss]:
    """The loss of each layer of the chain's model, in layer order, from the newest sensitivity analysis; or empty."""
    ours = {artifact.digest for artifact in chain.values()}
    found = [a for a in everything if a.stage == "sensitivity" and set(a.manifest["ingredients"]["of"]) <= ours]
    newest = max(found, key=_started, default=None)
    layers = newest.facts["layers"] if newest else []
    return [Loss(layer["layer"], layer["kl"], layer.get("bytes")) for layer in layers if layer["kl"] is not None]


def parts_of(chain: Mapping[str, Artifact], everything: Sequence[Artifact]) -> Losses | None:
    """What the chain's checkpoint loses by its weights, inputs and KV cache, from the newest measurement of its parts;
    None if they were not measured."""
    checkpoint = chain.get("checkpoint")
    if checkpoint is None:
        return None
    measured = [artifact for artifact in everything if artifact.stage == "parts"]
    found = [artifact for artifact in measured if checkpoint.digest in artifact.manifest["ingredients"]["of"]]
    newest = max(found, key=_started, default=None)
    return parts.losses_of(newest.facts, newest.path) if newest else None


def rows(identity: Mapping[str, object], evaluation: Evaluation) -> list[dict[str, str]]:
    """The CSV rows of an evaluation, one per score. `identity`: columns that identify the model.

    The `id` of a row follows from the evaluation, the repository, the data set and the runner.
    """
    found = []
    for score in evaluation.scores:
        row: dict[str, object] = {
            "id": digest_of([evaluation.digest, identity["repository"], score.data, score.runner])[:16],
            **identity,
            **{name: getattr(score, name) for name in ("data", "runner", "texts", "tokens")},
        }
        for name in ("perplexity", "score", "kl", "agreement", "flips"):
            interval = getattr(score, name)
            row |= {f"{name}{end}": getattr(interval, part, None) for end, part in ENDS.items()}
        found.append(row | {"gate": GATE[evaluation.passed]})
    return [{name: _cell(value) for name, value in row.items()} for row in found]


def task_rows(identity: Mapping[str, object], tasks: Sequence[Row]) -> list[dict[str, str]]:
    """The CSV rows of tasks, one per metric: column `data` is the task, `texts` the number of questions.

    Equal results of a repository have equal ids, so `append` adds them once.
    """
    found = []
    for task in tasks:
        row: dict[str, object] = {
            "id": digest_of([asdict(task), identity["repository"]])[:16],
            **identity,
            "data": task.task,
            "runner": task.runner,
            "texts": task.documents,
            "flips": task.flips,
            **{name: getattr(task, name) for name in ("metric", "value", "stderr", "change", "fewshot")},
        }
        found.append({name: _cell(value) for name, value in row.items()})
    return found


def append(path: Path, fresh: Sequence[Mapping[str, str]]) -> int:
    """Appends rows whose `id` is new to a CSV file, atomically and under a lock. Returns how many it appended.

    Columns are merged: those only in the file are kept, new ones are added. UsageError if it is not such a table, or
    not writable.
    """
    with _locked(path):
        columns, kept = _read(path)
        known = {row["id"] for row in kept}
        added = [row for row in fresh if row["id"] not in known]
        if added:
            columns += [name for name in dict.fromkeys(name for row in added for name in row) if name not in columns]
            text = io.StringIO()
            writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows([*kept, *added])
            replace_file(path, text.getvalue())
    return len(added)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Locks a file beside the table. A lock on the table itself would be lost when it is replaced."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path.parent / f".{path.name}.lock", "ab")  # noqa: SIM115
    except OSError as error:
        raise UsageError(f"Can't write {path}.", why=str(error), hint="Name another file: --csv FILE") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            found = list(reader)
            columns = list(reader.fieldnames or [])
    except FileNotFoundError:
        return [], []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise _no_table(path, str(error)) from error
    if "id" not in columns or any(None in row or None in row.values() for row in found):
        raise _no_table(path, "It has no column `id`, or a row that is longer or shorter than the header.")
    return columns, found


def _no_table(path: Path, why: str) -> UsageError:
    return UsageError(f"{path} is not a table of results.", why=why, hint="Name another file: --csv FILE")


def _cell(value: object) -> str:
    """A value as CSV text: "" for None, control characters replaced, formulas quoted for spreadsheets."""
    if value is None:
        return ""
    if isinstance(value, str):
        plain = "".join(c if c.isprintable() else " " for c in value)
        return f"'{plain}" if value.startswith(FORMULA) else plain
    return f"{value:.6g}" if isinstance(value, float) else str(value)
