"""Snapshot, Checkpoint, Repository -> Evaluation: what quantization costs, measured on each variant of the model.

All runners score the same tokens. Each runs in its own process, which returns its memory when it exits. BF16 runs first
and stores the likeliest tokens of each position; the others are compared with them. Each data set of each runner is a
stage of the store, so finished measurements are never repeated. Nothing heavy is imported here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from builder.core import process, workers
from builder.core.errors import EvaluationError, NotMeasurable
from builder.core.output import Output, seconds
from builder.core.store import Artifact, Store, WouldRun, key_of, sources_digest
from builder.evaluate import comparison, datasets, gate, metrics, tasks
from builder.evaluate.comparison import OURS, RATIO, Candidate, Compared
from builder.evaluate.datasets import Texts
from builder.evaluate.gate import OVERALL, GateResult
from builder.evaluate.metrics import Estimate
from builder.evaluate.runners.language import knows
from builder.evaluate.tasks import TaskTable
from builder.evaluate.variants import BF16, Models, Variant, list_variants, runner_job
from builder.model.hashed_files import SourceFiles
from builder.quantize import modelopt
from builder.recipe.schema import Recipe

TABLE_SOURCES = (
    "builder/evaluate/stage.py",
    "builder/evaluate/comparison.py",
    "builder/evaluate/metrics.py",
    "builder/evaluate/gate.py",
    "builder/evaluate/tasks.py",
)


@dataclass(frozen=True)
class Evaluation:
    """The figures of all runners.

    measured: runner -> data set ("overall" for several together) -> metric -> estimate.
    sets: runner -> data set -> counts of texts and tokens, and seconds.
    collapsed: runner -> data sets on which it finds shuffled tokens as likely as text.
    not_measured: runner -> the reason.
    compared: the models of a comparison by their labels, which are runners of their own; empty without one.
    scores: runner -> directories of its scores, one for each data set, which metrics.read reads.
    """

    measured: Mapping[str, Mapping[str, Mapping[str, Estimate]]]
    sets: Mapping[str, Mapping[str, Mapping[str, Any]]]
    collapsed: Mapping[str, Sequence[str]]
    not_measured: Mapping[str, str]
    tasks: TaskTable = field(default_factory=TaskTable)
    verdict: GateResult | None = None
    path: Path = Path()
    compared: Mapping[str, Compared] = field(default_factory=dict)
    scores: Mapping[str, Sequence[Path]] = field(default_factory=dict)

    @property
    def candidates(self) -> list[str]:
        """The labels of the checkpoints that the recipe's own is compared with. No gate judges them."""
        return [label for label in self.compared if label not in ("bf16", OURS)]

    def as_dict(self) -> dict[str, Any]:
        """For JSON. NaN and infinity become None."""
        figures = {
            runner: {
                name: {metric: _plain(estimate) for metric, estimate in found.items()} for name, found in sets.items()
            }
            for runner, sets in self.measured.items()
        }
        verdict = {"passed": self.verdict.passed, **asdict(self.verdict)} if self.verdict else None
        rest = {"sets": self.sets, "collapsed": self.collapsed, "not_measured": self.not_measured}
        rest["compared"] = comparison.as_dict(self.compared)
        return {"measured": figures, **rest, "tasks": asdict(self.tasks), "verdict": verdict}

    def check(self) -> None:
        """EvaluationError if the gate failed, NotMeasurable if nothing but BF16 could be measured."""
        if self.verdict:
            self.verdict.check(str(self.path / "evaluation.json"))
        answered = {row.runner for row in self.tasks.rows}
        refused = {
            **self.not_measured,
            **{name: next(iter(why.values())) for name, why in self.tasks.not_measured.items()},
        }
        if refused and not (set(self.measured) | answered) - {"bf16", *self.candidates}:
            runner, why = next(iter(refused.items()))
            raise NotMeasurable(f"The runner {runner} can't be measured.", why=why)


def evaluate(
    models: Models, recipe: Recipe, *, store: Store, with_tasks: bool = False, against: Sequence[Candidate] = ()
) -> Evaluation:
    """Measures every runner of the recipe on every data set and applies the gate, if the recipe has one.

    with_tasks: measure the recipe's tasks too. against: checkpoints to measure on the same texts. IntegrityError if the
    tokenizer does not match the model, EvaluationError if a runner that the gate needs could not be measured. A failed
    gate is returned as the verdict; `Evaluation.check` raises it.
    """
    part = recipe.evaluation
    texts = datasets.read_texts(part, store=store)
    scores: dict[str, list[Artifact]] = {}
    not_measured: dict[str, str] = {}
    asked = [(variant, models) for variant in list_variants(recipe)]
    asked += [
        (Variant(one.label, "checkpoint", one.cache), replace(models, checkpoint=one.checkpoint)) for one in against
    ]
    for variant, of in asked if texts else ():
        try:
            scores[variant.label] = _score(variant, of, texts, scores.get("bf16"), recipe, store)
        except NotMeasurable as error:
            not_measured[variant.label] = str(error)
    found = _tables(scores, texts, part.resamples, part.seed, not_measured)
    found = replace(found, scores={label: [one.path for one in artifacts] for label, artifacts in scores.items()})
    if against:
        found = replace(found, compared=comparison.compared(models, recipe, against))
    if with_tasks and recipe.tasks.names:
        found = replace(found, tasks=tasks.measure(models, recipe, store=store))
    return _judged(found, scores, recipe, store)


def bf16_scores(models: Models, recipe: Recipe, *, store: Store) -> list[tuple[Texts, Artifact]]:
    """The BF16 model's scores of each data set, from the store or measured now."""
    texts = datasets.read_texts(recipe.evaluation, store=store)
    return list(zip(texts, _score(BF16, models, texts, None, recipe, store), strict=True))


def _score(
    variant: Variant,
    models: Models,
    texts: Sequence[Texts],
    reference: Sequence[Artifact] | None,
    recipe: Recipe,
    store: Store,
) -> list[Artifact]:
    """The scores of each data set, from the store or measured by a worker process."""
    prepared, part = runner_job(variant, models, recipe, store), recipe.evaluation
    positions = int(models.snapshot.config.get("max_position_embeddings") or recipe.engine.max_seq_len)
    longest = datasets.longest(part, positions, recipe.engine)
    asked = {
        "lengths": {"min_tokens": part.min_tokens, "max_tokens": longest},
        **{key: getattr(part, key) for key in ("batch_tokens", "seed")},
    }
    common = {**prepared.ingredients, **asked, "top": part.top if variant.runner == "bf16" else None}
    theirs: Sequence[Artifact | None] = reference or [None] * len(texts)
    sets: list[dict[str, Any]] = []
    for one, bf16 in zip(texts, theirs, strict=True):
        ingredients = {**common, "texts": one.digest, "reference": bf16.digest if bf16 else None}
        sets.append(
            {
                "name": one.name,
                "rows": str(one.path),
                "reference": str(bf16.path) if bf16 else None,
                "ingredients": ingredients,
            }
        )

    def stored(one: Mapping[str, Any]) -> Artifact | None:
        return store.find("scores", key_of("scores", one["ingredients"]))

    missing = [one for one in sets if "scores" in store.force or stored(one) is None]
    if missing and store.dry:
        names = ", ".join(str(one["name"]) for one in missing)
        raise WouldRun(
            "scores", f"{variant.label} has not been measured on {names}", key_of("scores", missing[0]["ingredients"])
        )
    kept = f", {len(sets) - len(missing)} found in the store" if len(missing) < len(sets) else ""
    store.out.stage("evaluate", f"{variant.label} on {len(sets)} data sets{kept}")
    if missing:
        measuring = {"top": part.top, "logits": True, "sets": missing, "force": sorted(store.force)}
        memory = _way(variant, models, recipe, store)
        _run({**prepared.job, **asked, **measuring, "memory": memory}, store)
    return [artifact for artifact in map(stored, sets) if artifact]


def _way(variant: Variant, models: Models, recipe: Recipe, store: Store) -> str:
    """Whether a runner holds the whole model or one layer at a time, which gives the same figures on a CPU."""
    from builder.evaluate import memory

    found = memory.of_runner(variant.runner, models, recipe, store)
    if found == "low":
        store.out.info(f"{variant.label}: one decoder layer at a time is in memory")
    return found


def _run(job: Mapping[str, Any], store: Store) -> None:
    """Runs the worker, which stores each data set's scores as soon as it has them."""
    with SourceFiles.of_job(job).explain_failures():
        process.run_job(
            workers.EVALUATE,
            job,
            log=store.log(f"evaluate-{job['runner']}"),
            bar=process.Bar(store.out, f"{job['label']}: starting", "tokens"),
            env=modelopt.ENVIRONMENT,
        )


def _tables(
    scores: Mapping[str, Sequence[Artifact]],
    texts: Sequence[Texts],
    resamples: int,
    seed: int,
    not_measured: Mapping[str, str],
) -> Evaluation:
    measured: dict[str, dict[str, dict[str, Estimate]]] = {}
    ours: Sequence[metrics.Sums] = ()
    for label, artifacts in scores.items():
        theirs: Sequence[Artifact | None] = [None] * len(texts)
        if "bf16" in scores and label != "bf16":
            theirs = scores["bf16"]
        sums = [metrics.read(a.path, t.path if t else None) for a, t in zip(artifacts, theirs, strict=True)]
        ours = sums if label == OURS else ours
        parts = {one.name: ([n], seed + n) for n, one in enumerate(texts)}
        parts |= {OVERALL: ([*range(len(texts))], seed)} if len(texts) > 1 else {}
        measured[label] = {}
        for name, (which, drawn) in parts.items():
            of = [sums[n] for n in which]
            figures = metrics.measure(of, resamples=resamples, seed=drawn)
            if ours and ours is not sums and ours[0].kl is not None and of[0].kl is not None:
                own = [ours[n] for n in which]
                ratio = metrics.kl_ratio(of, own, resamples=resamples, seed=drawn)
                figures |= {RATIO: ratio} if math.isfinite(ratio.value) else {}  # ours may lose nothing
            measured[label][name] = figures
    named = {
        label: {one.name: dict(a.facts) for one, a in zip(texts, found, strict=True)} for label, found in scores.items()
    }
    collapsed = {
        label: [name for name, facts in sets.items() if not knows(facts)]
        for label, sets in named.items()
        if not all(map(knows, sets.values()))
    }
    return Evaluation(measured, named, collapsed, not_measured)


def _judged(found: Evaluation, scores: Mapping[str, Sequence[Artifact]], recipe: Recipe, store: Store) -> Evaluation:
    """The evaluation with its verdict, stored. If the gate can't be applied, the tables are stored before the error."""
    part = recipe.evaluation
    unjudged: EvaluationError | None = None
    try:
        others = found.candidates
        measured = {label: sets for label, sets in found.measured.items() if label not in others}
        refused = {label: why for label, why in found.not_measured.items() if label not in others}
        verdict = gate.judge(part, measured, found.collapsed, refused)
    except EvaluationError as error:
        verdict, unjudged = None, error
    whole = replace(found, verdict=verdict)
    digests = {label: [artifact.digest for artifact in artifacts] for label, artifacts in scores.items()}
    against = {label: digests.pop(label, []) for label in found.candidates}
    ingredients = {
        "of": [*(digest for of in digests.values() for digest in of), *found.tasks.of],
        "against": [against, comparison.as_dict(found.compared)],
        "data": {label: list(sets) for label, sets in found.sets.items()},  # the names in the tables
        "runners": [*dict.fromkeys([*digests, *(row.runner for row in found.tasks.rows)])],
        "not_measured": [found.not_measured, found.tasks.not_measured],
        "limits": part.limits,
        "resamples": part.resamples,
        "seed": part.seed,
        "sources": sources_digest(*TABLE_SOURCES),
    }

    def make(directory: Path) -> dict[str, Any]:
        content = whole.as_dict()
        (directory / "evaluation.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
        rest = {name: content[name] for name in ("verdict", "not_measured", "collapsed")}
        return {**rest, "texts": bool(scores), "tasks": len(found.tasks.rows)}

    artifact = store.stage("evaluation", ingredients, make)
    if unjudged:
        raise unjudged
    return replace(whole, path=artifact.path)


def _plain(estimate: Estimate) -> dict[str, float | None]:
    return {key: value if math.isfinite(value) else None for key, value in asdict(estimate).items()}


COLUMNS = ["runner", "data", "PPL", "score", "KL to BF16", "same top token", "flips"]


def show(found: Evaluation, out: Output) -> None:
    """Prints the tables; with --json one object."""
    show_tables(found, out)
    out.result(found.as_dict() | {"path": str(found.path)})


def show_tables(found: Evaluation, out: Output) -> None:
    """Prints what was scored, the figures of each runner on each data set, the tasks and the gate's verdict."""
    first = next(iter(found.sets.values()), {})
    rows = [
        (name, *(facts[key] for key in ("texts", "dropped", "cut", "tokens")), _times(found, name))
        for name, facts in first.items()
    ]
    if found.sets or found.not_measured:
        out.table("scored", ["data", "texts", "too short", "cut", "tokens", "time"], rows)
        out.table("what quantization cost (95 % intervals)", COLUMNS, _rows(found))
    if found.compared:
        comparison.show(found.compared, found.measured, out)
    if found.tasks.rows or found.tasks.not_measured:
        tasks.show(found.tasks, found.path.parent.parent, out)
    if found.verdict:
        asked = ", ".join(f"{metric} {limit:g}" for metric, limit in found.verdict.limits.items())
        out.text(f"gate       {asked}: {'passed' if found.verdict.passed else 'FAILED'}")
        for text in found.verdict.failed:
            out.text(f"           {text}")


def _rows(found: Evaluation) -> list[tuple[str, ...]]:
    rows = []
    for runner, sets in found.measured.items():
        for name, figures in sets.items():
            cells = [str(figures[metric]) if metric in figures else "-" for metric in ("ppl", "score", "kl")]
            cells += [_percent(figures.get(metric)) for metric in ("agreement", "flips")]
            mark = " (collapsed)" if name in found.collapsed.get(runner, ()) else ""
            rows.append((runner + mark, name, *cells))
    rows += [(runner, "", "not measurable: " + why.splitlines()[0]) for runner, why in found.not_measured.items()]
    return [(*row, *[""] * (len(COLUMNS) - len(row))) for row in rows]


def _percent(estimate: Estimate | None) -> str:
    return f"{100 * estimate.value:.2f} %" if estimate else "-"


def _times(found: Evaluation, name: str) -> str:
    return ", ".join(f"{runner} {seconds(sets[name]['seconds'])}" for runner, sets in found.sets.items())
