"""Evaluation results as reports show them, and the CSV that grows by a row for each model, data set and runner."""

from __future__ import annotations

import csv
import fcntl
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from builder.core.errors import UsageError
from builder.core.store import Artifact, digest_of, replace_file
from builder.evaluate.tasks import Row

OVERALL = "overall"  # the data sets together, weighted by tokens
BF16 = "bf16"
# What was measured, in words.
RUNNERS = {
    "bf16": "BF16 (the original)",
    "simulated": "simulated by ModelOpt",
    "checkpoint": "checkpoint on disk",
    "reference": "reference executor",
    "served": "served by Triton",
}
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet would calculate at the start of a cell
GATE = {True: "passed", False: "failed", None: ""}
ENDS = {"": "value", "_low": "low", "_high": "high"}  # columns of an interval


@dataclass(frozen=True)
class Interval:
    """A measured value, with its confidence interval where there is one."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Score:
    """One runner on one data set, or on all (`OVERALL`). `score` is PPL_BF16 / PPL x 100.

    Agreement and flips are 0 to 1. None is what was not measured, as what compares with BF16 is for BF16 itself.
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
class Evaluation:
    """`passed` is the gate's verdict, None where none was set or it can't be judged; `limits` are its, by metric.

    `not_measured` is runner -> why; `collapsed` runner -> data sets whose shuffled tokens it finds as likely as text.
    """

    digest: str
    scores: tuple[Score, ...]
    passed: bool | None = None
    limits: Mapping[str, float] = field(default_factory=dict)
    failed: tuple[str, ...] = ()
    not_measured: Mapping[str, str] = field(default_factory=dict)
    collapsed: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Loss:
    """One layer quantized by itself: KL divergence to BF16 at the output; the bytes that it would add in BF16."""

    layer: str
    kl: float
    nbytes: int | None = None


def evaluation_of(chain: Mapping[str, Artifact], everything: Sequence[Artifact]) -> Evaluation | None:
    """The newest evaluation on texts of these artifacts and no others; one with a gate before one without."""
    mine = [artifact for artifact in _evaluations(chain, everything) if artifact.facts.get("texts", True)]
    newest = max(mine, key=lambda a: (bool(a.facts.get("verdict")), _started(a)), default=None)
    if newest is None:
        return None
    return read_evaluation(_told(newest), newest.digest, newest.manifest["ingredients"].get("limits", {}))


def tasks_of(chain: Mapping[str, Artifact], everything: Sequence[Artifact]) -> tuple[Row, ...]:
    """The figures of the newest evaluation by tasks, which may be another one than that on texts."""
    mine = [artifact for artifact in _evaluations(chain, everything) if artifact.facts.get("tasks")]
    newest = max(mine, key=_started, default=None)
    return tuple(Row(**row) for row in _told(newest)["tasks"]["rows"]) if newest else ()


def _evaluations(chain: Mapping[str, Artifact], everything: Sequence[Artifact]) -> list[Artifact]:
    """Those of these artifacts and no others, with more than BF16."""
    ours = {artifact.digest for artifact in chain.values()}
    measured = ("scores", "tasks")
    of = {a.digest: set(a.manifest["ingredients"]["of"]) for a in everything if a.stage in measured}
    return [
        artifact
        for artifact in everything
        if artifact.stage == "evaluation"
        and set(artifact.manifest["ingredients"]["runners"]) - {BF16}
        and all(of.get(digest, {""}) <= ours for digest in artifact.manifest["ingredients"]["of"])
    ]


def _started(artifact: Artifact) -> float:
    return float(artifact.manifest["started"])


def _told(artifact: Artifact) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((artifact.path / "evaluation.json").read_text(encoding="utf-8"))
    return told


def read_evaluation(told: Mapping[str, Any], digest: str, limits: Mapping[str, float]) -> Evaluation:
    """What `builder eval` wrote: measured, sets, collapsed, not_measured, verdict. `limits` were asked for."""
    verdict = told.get("verdict") or {}
    return Evaluation(
        digest=digest,
        scores=tuple(
            _score(runner, data, figures, told["sets"][runner])
            for runner, sets in told["measured"].items()
            for data, figures in sets.items()
        ),
        passed=verdict.get("passed"),
        limits=verdict.get("limits", limits),
        failed=tuple(verdict.get("failed", ())),
        not_measured=told.get("not_measured", {}),
        collapsed=told.get("collapsed", {}),
    )


def _score(runner: str, data: str, figures: Mapping[str, Any], sets: Mapping[str, Mapping[str, Any]]) -> Score:
    counted = list(sets.values()) if data == OVERALL else [sets[data]]

    def total(name: str) -> Any:
        return sum(one[name] for one in counted) if all(name in one for one in counted) else None

    def interval(name: str) -> Interval | None:
        figure = figures.get(name) or {}
        return Interval(**figure) if figure.get("value") is not None else None

    metrics = {name: interval(name) for name in ("score", "kl", "agreement", "flips")}
    return Score(runner, data, total("texts"), total("tokens"), total("seconds"), interval("ppl"), **metrics)


def losses_of(chain: Mapping[str, Artifact], everything: Sequence[Artifact]) -> list[Loss]:
    """The loss by layer of the chain's model, in the order of the layers; empty where nobody measured it."""
    ours = {artifact.digest for artifact in chain.values()}
    found = [a for a in everything if a.stage == "sensitivity" and set(a.manifest["ingredients"]["of"]) <= ours]
    newest = max(found, key=_started, default=None)
    layers = newest.facts["layers"] if newest else []
    return [Loss(one["layer"], one["kl"], one.get("bytes")) for one in layers if one["kl"] is not None]


def rows(identity: Mapping[str, object], evaluation: Evaluation) -> list[dict[str, str]]:
    """The rows of one evaluation. `identity` says which model; its `repository` and the evaluation make the `id`."""
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
    """A row for each figure of a task: `data` is the task, `texts` its questions. Equal figures are one row."""
    found = []
    for one in tasks:
        row: dict[str, object] = {
            "id": digest_of([asdict(one), identity["repository"]])[:16],
            **identity,
            "data": one.task,
            "runner": one.runner,
            "texts": one.documents,
            "flips": one.flips,
            **{name: getattr(one, name) for name in ("metric", "value", "stderr", "change", "fewshot")},
        }
        found.append({name: _cell(value) for name, value in row.items()})
    return found


def append(path: Path, fresh: Sequence[Mapping[str, str]]) -> int:
    """Adds the rows whose `id` the file has not, under a lock and in one step; the number of rows added.

    Columns that the file has and we don't stay, and the other way round. UsageError if it is no such table.
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
    """A lock file beside the table: the table itself is replaced, and a lock on it would go with the old one."""
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
        raise _no_table(path, "It has no column `id`, or a row of another length than its first line.")
    return columns, found


def _no_table(path: Path, why: str) -> UsageError:
    return UsageError(f"{path} is no table of results.", why=why, hint="Name another file: --csv FILE")


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        plain = "".join(c if c.isprintable() else " " for c in value)
        return f"'{plain}" if value.startswith(FORMULA) else plain
    return f"{value:.6g}" if isinstance(value, float) else str(value)
