"""Snapshot, Checkpoint, Repository -> TaskTable: how many questions each variant of the model answers correctly.

lm-eval supplies the questions, the scoring and the statistics (tasks_worker.py). Each task of each variant is a stage
of the store that holds everything lm-eval returned. Nothing heavy is imported here.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from builder.core import process, workers
from builder.core.environment import Kind
from builder.core.errors import NotMeasurable, UnsupportedError, UsageError
from builder.core.output import Output
from builder.core.store import Artifact, Store, key_of, library_versions, sources_digest
from builder.core.untrusted_text import LARGEST_YAML, check_yaml, read_regular
from builder.evaluate import variants as of_model
from builder.evaluate.variants import Models, Variant
from builder.model.hashed_files import SourceFiles
from builder.quantize import modelopt
from builder.recipe import evaluation as recipe_evaluation
from builder.recipe.schema import Recipe

SOURCES = (
    *of_model.SOURCES,
    "builder/evaluate/tasks_worker.py",
    "builder/evaluate/task_names.py",
    "builder/core/file_names.py",
)
LIBRARIES = ("lm_eval", "datasets")
CONCURRENCY = 64  # requests that are sent to a server at the same time, at most: it batches them


NOT_WHOLE = "Tasks need the whole model in memory, which does not fit or which --memory low excludes."


@dataclass(frozen=True)
class Row:
    """One figure of a task for one variant: `value` and its standard error over `documents`.

    `change` is the value minus BF16's. `flips` is the share of documents that only one of the two answers correctly
    (arXiv 2407.09141, section 3): a change of zero can hide many. None where there is nothing to compare.
    """

    runner: str
    task: str
    metric: str
    value: float
    stderr: float | None
    documents: int
    fewshot: int | None
    change: float | None = None
    flips: float | None = None


@dataclass(frozen=True)
class TaskTable:
    """`not_measured`: runner -> task -> the reason. `of`: digests of the stored results.

    `paths`: runner -> task -> the directory with everything lm-eval returned, relative to the output directory.
    """

    rows: Sequence[Row] = ()
    not_measured: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    of: Sequence[str] = ()
    paths: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def check(part: recipe_evaluation.Tasks, store: Store) -> None:
    """Checks before any work that lm-eval is installed and has these tasks. The answer is cached: it takes ten seconds.

    UnsupportedError without lm-eval, UsageError for an unknown task or an unreadable task file.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UnsupportedError(
            "Tasks need lm-eval, which is not installed.", hint="pip install 'trtllm-builder[tasks]'"
        )
    if part.directory and not Path(part.directory).is_dir():
        raise UsageError(
            f"There is no directory {part.directory}.", hint="Name the directory with your tasks: --task-dir"
        )
    if part.directory:
        _check_files(Path(part.directory))
    job = {"names": part.names, "directory": _directory(part)}

    def make(_: Path) -> dict[str, Any]:
        process.run_job(
            workers.TASK_NAMES,
            job,
            log=store.log("task-names"),
            bar=process.Bar(store.out, "looking for the tasks"),
            env={},
        )
        return {"names": part.names}

    ingredients = {"names": part.names, "files": _files(part), "libraries": library_versions(*LIBRARIES)}
    store.stage("task_names", ingredients, make)


def _check_files(directory: Path) -> None:
    """UsageError for files that lm-eval, which parses with PyYAML, would read forever or misread (repeated keys)."""
    for path in sorted(directory.rglob("*")):
        if path.is_dir():
            continue
        try:
            if not path.is_file():
                raise ValueError("not a regular file")
            if path.suffix in (".yaml", ".yml"):
                check_yaml(read_regular(path, LARGEST_YAML))
        except (OSError, ValueError) as error:
            raise UsageError(
                f"The task file {path} can't be used.", why=str(error), hint="Repair or remove it."
            ) from None


def measure(models: Models, recipe: Recipe, *, store: Store) -> TaskTable:
    """Runs every task on every variant of the recipe, and compares the results with BF16's."""
    found: dict[str, dict[str, Artifact]] = {}
    not_measured: dict[str, dict[str, str]] = {}
    for variant in of_model.list_variants(recipe):
        answered, refused = _answers(variant, models, recipe, store)
        found[variant.label] = answered
        not_measured |= {variant.label: refused} if refused else {}
    rows = tuple(_compared(found))
    of = [artifact.digest for answered in found.values() for artifact in answered.values()]
    paths = {
        label: {name: str(artifact.path.relative_to(store.root)) for name, artifact in answered.items()}
        for label, answered in found.items()
    }
    return TaskTable(rows, not_measured, of, paths)


def _answers(
    variant: Variant, models: Models, recipe: Recipe, store: Store
) -> tuple[dict[str, Artifact], dict[str, str]]:
    """The results by task, from the store or from a worker, and the reasons by task where there are none."""
    part, engine = recipe.tasks, recipe.engine
    if variant.runner == "reference":
        why = "Tasks run on local weights and on the served model. The executor answers when served: --runner served"
        return {}, dict.fromkeys(part.names, why)
    try:
        prepared = of_model.runner_job(variant, models, recipe, store)
    except NotMeasurable as error:
        return {}, dict.fromkeys(part.names, str(error))
    positions = int(models.snapshot.config.get("max_position_embeddings") or engine.max_seq_len)
    asked = {
        **{key: getattr(part, key) for key in ("limit", "fewshot", "seed", "batch_size", "chat_template")},
        "max_length": min(engine.max_seq_len, positions),
        "max_input_len": engine.max_input_len,
    }
    libraries = {**prepared.ingredients["libraries"], **library_versions(*LIBRARIES)}
    common = {**prepared.ingredients, **asked, "libraries": libraries, "sources": sources_digest(*SOURCES)}
    wanted = {name: {**common, "task": name, "files": _files(part)} for name in part.names}

    def stored() -> dict[str, Artifact]:
        held = {name: store.find("tasks", key_of("tasks", ingredients)) for name, ingredients in wanted.items()}
        return {name: artifact for name, artifact in held.items() if artifact}

    found = {} if "tasks" in store.force else stored()
    missing = [{"name": name, "ingredients": wanted[name]} for name in wanted if name not in found]
    kept = f", {len(found)} found in the store" if found else ""
    store.out.stage("tasks", f"{variant.label}: {', '.join(part.names)}{kept}")
    summary: dict[str, Any] = {}
    if missing and (why := _does_not_fit(variant, models, recipe, store)):
        return found, {name: why for name in wanted if name not in found}
    if missing:
        job = {
            **prepared.job,
            **asked,
            "tasks": missing,
            "directory": _directory(part),
            "working_directory": os.getcwd(),
            "logits": False,
            "force": sorted(store.force),
            "concurrency": min(engine.max_batch_size, CONCURRENCY),
        }
        summary = _run(job, store)
    return stored(), summary.get("not_measured", {})


def _does_not_fit(variant: Variant, models: Models, recipe: Recipe, store: Store) -> str:
    """Why a model can't do tasks on this machine; "" if it can."""
    from builder.evaluate import memory

    try:
        if memory.of_runner(variant.runner, models, recipe, store) == "whole":
            return ""
    except NotMeasurable as error:
        return str(error)
    return f"{NOT_WHOLE} Ask the served model: --runner served"


def _run(job: Mapping[str, Any], store: Store) -> dict[str, Any]:
    """Runs the worker, which stores each task's results. It may download, because the tasks' data is on the Hub.

    If the model's own code is run, the worker does not get the user's token.
    """
    kind: Kind = "public" if job["trust_remote_code"] else "hub"
    offline = os.environ.get("HF_HUB_OFFLINE", "0")
    with SourceFiles.of_job(job).explain_failures():
        summary, _ = process.run_job(
            workers.TASKS,
            job,
            log=store.log(f"tasks-{job['runner']}"),
            bar=process.Bar(store.out, f"{job['label']}: starting", "questions"),
            env={**modelopt.ENVIRONMENT, "HF_HUB_OFFLINE": offline, "TRANSFORMERS_OFFLINE": offline},
            kind=kind,
        )
    return summary


def _compared(found: Mapping[str, Mapping[str, Artifact]]) -> Iterator[Row]:
    """The figures of each variant and task, compared with BF16's."""
    theirs = {
        (name, one["task"], one["metric"], one["filter"]): (artifact, one)
        for name, artifact in found.get("bf16", {}).items()
        for one in artifact.facts["rows"]
    }
    for label, answered in found.items():
        for name, artifact in answered.items():
            for one in artifact.facts["rows"]:
                metric = one["metric"] if one["filter"] == "none" else f"{one['metric']} ({one['filter']})"
                same = {key: one[key] for key in ("task", "value", "stderr", "documents", "fewshot")}
                row = Row(runner=label, metric=metric, **same)
                bf16 = theirs.get((name, one["task"], one["metric"], one["filter"]))
                if label != "bf16" and bf16:
                    row = replace(row, change=row.value - bf16[1]["value"], flips=_flips(artifact, bf16[0], one))
                yield row


def _flips(ours: Artifact, theirs: Artifact, row: Mapping[str, Any]) -> float | None:
    """The share of documents that only one of two variants answers correctly; None where answers are not 0 or 1."""
    right, other = (dict(_judged(artifact.path, row)) for artifact in (ours, theirs))
    if not right or right.keys() != other.keys() or not {*right.values(), *other.values()} <= {0.0, 1.0}:
        return None
    return sum(right[document] != other[document] for document in right) / len(right)


def _judged(path: Path, row: Mapping[str, Any]) -> Iterator[tuple[tuple[str, int], float]]:
    """Yields ((task, document), metric value) for each answered document of the row's tasks."""
    for task, file in row["samples"].items():
        with open(path / file, encoding="utf-8") as lines:
            for line in lines:
                sample = json.loads(line)
                value = sample.get(row["metric"])
                if sample["filter"] == row["filter"] and isinstance(value, (int, float)):
                    yield (task, sample["doc_id"]), float(value)


def _directory(part: recipe_evaluation.Tasks) -> str | None:
    return str(Path(part.directory).absolute()) if part.directory else None


def _files(part: recipe_evaluation.Tasks) -> str | None:
    """A digest of the directory with the task files and their data, so that a change makes a new stage."""
    return sources_digest(Path(part.directory).absolute()) if part.directory else None


COLUMNS = ["runner", "task", "metric", "value", "change", "flips", "questions", "examples"]


def show(found: TaskTable, root: Path, out: Output) -> None:
    """Prints the table, and where below the output directory `root` the full results of lm-eval are."""
    rows: list[Sequence[str]] = [
        (row.runner, row.task, row.metric, _with_error(row), _signed(row.change), _percent(row.flips),
         str(row.documents), "-" if row.fewshot is None else str(row.fewshot))
        for row in found.rows
    ]  # fmt: skip
    for runner, tasks in found.not_measured.items():
        rows += [(runner, task, "not measurable: " + why.splitlines()[0], *[""] * 5) for task, why in tasks.items()]
    out.table("tasks, by lm-eval (± standard error)", COLUMNS, rows)
    for runner, tasks in found.paths.items():
        for task, path in tasks.items():
            out.text(f"kept       {runner}, {task}: {root / path / 'results.json'}")


def _with_error(row: Row) -> str:
    return f"{row.value:.4f} ± {row.stderr:.4f}" if row.stderr is not None else f"{row.value:.4f}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.4f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
