"""Two checkpoints of a model -> which groups of layers to take from the second one, which has more bits.

The groups are ranked by the KL that each wins per byte, on the recipe's sensitivity texts; then as few as needed are
taken, judged on the texts that the model is evaluated on. A worker process (worker.py) measures every mixture without
writing it. Nothing heavy is imported here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.architectures import catalog, names
from builder.calibration.rows import calibrate
from builder.checkpoint.layouts import Checkpoint
from builder.core import process, workers
from builder.core.errors import UnsupportedError
from builder.core.partial_results import PartialResults
from builder.core.store import Store, key_of, library_versions, sources_digest
from builder.evaluate import datasets
from builder.evaluate.metrics import Estimate
from builder.evaluate.parts import stage as parts
from builder.evaluate.sensitivity import stage as sensitivity
from builder.hub.snapshot import Snapshot
from builder.model.hashed_files import SourceFiles
from builder.quantize import modelopt
from builder.recipe.schema import Calibration as Rows
from builder.recipe.schema import Recipe
from builder.recipe.target_facts import target_facts

if TYPE_CHECKING:
    from builder.architectures.facts import Architecture
    from builder.evaluate.variants import Models

ONE_BY_ONE = 64  # groups that are each measured alone
SOURCES = (
    "builder/evaluate/mixtures/stage.py",
    "builder/evaluate/mixtures/worker.py",
    "builder/evaluate/gate.py",
    *parts.SOURCES,
)


@dataclass(frozen=True)
class Pair:
    """Two checkpoints of one model, with the KV cache in the same format.

    base: has fewer bits. kept: has more; None means the BF16 model. groups: {group: its linear layers}, which are
    multiplied as one. prices: the bytes that a group takes more in the second.
    """

    base: Checkpoint
    kept: Checkpoint | None
    groups: Mapping[str, Sequence[str]]
    prices: Mapping[str, int]


@dataclass(frozen=True)
class Chosen:
    """The groups to take from the second checkpoint, and the figures of this mixture. met: whether they are surely
    within the limits; if not, these are all groups that may be taken."""

    groups: tuple[str, ...]
    met: bool
    figures: Mapping[str, Estimate]


class NotMixed(UnsupportedError):
    """Mixtures of this model can't be measured: it can't be held, or its layers are not changed one by one."""


def _check(snapshot: Snapshot, recipe: Recipe, store: Store) -> None:
    """NotMixed for a model whose mixtures can't be measured."""
    from builder.evaluate import memory  # decides whether they are measured, not what comes out
    from builder.evaluate.variants import Models

    if any(one.scales_inputs for one in recipe.quantization.quantized_formats):
        raise NotMixed(f"The layers of {recipe.quantization.title} can't be exchanged.", why="Inputs are scaled.")
    if memory.of_runner("bf16", Models(snapshot), recipe, store) == "low":
        raise NotMixed("Mixtures are measured with the whole model in memory.", why="It does not fit.")


def rank(models: Models, pair: Pair, recipe: Recipe, *, store: Store) -> list[str]:
    """The groups, those first that win most KL per byte. An interrupted run resumes.

    NotMixed for a model that can't be held, or whose layers are no modules of their own.
    """
    part, positions = recipe.sensitivity, models.snapshot.config.get("max_position_embeddings")
    data = sensitivity.check_texts(recipe)
    texts = calibrate(Rows(**data.model_dump(), samples=part.texts), store=store, use=sensitivity.USE)
    longest = min(part.max_tokens, int(positions or part.max_tokens))
    sets = [{"name": "the sensitivity texts", "rows": str(texts.path.absolute()), "reference": None}]
    units = _units(pair.groups, catalog.of(models.snapshot.config))
    asked = {"order": None, "limits": {}, "lengths": _lengths(recipe, longest), "of": [texts.digest, None]}
    facts = _measure(models, pair, recipe, {**asked, "units": units, "sets": sets}, store=store)
    won = dict.fromkeys(pair.groups, 1.0)
    for unit, members in units.items():
        for group in members:
            won[group] *= max(0.0, facts["whole"] - facts["with"][unit])
    return sorted(won, key=lambda group: -won[group] / pair.prices[group])


def choose(
    models: Models, pair: Pair, recipe: Recipe, limits: Mapping[str, float], order: Sequence[str], *, store: Store
) -> Chosen:
    """As few groups from the beginning of `order` as bring the loss surely within the limits. Raises as `rank`."""
    from builder.evaluate.stage import bf16_scores  # its result is an ingredient

    scored, part = bf16_scores(models, recipe, store=store), recipe.evaluation
    positions = int(models.snapshot.config.get("max_position_embeddings") or recipe.engine.max_seq_len)
    sets = [
        {"name": texts.name, "rows": str(texts.path), "reference": str(scores.path.absolute())}
        for texts, scores in scored
    ]
    asked = {
        "order": list(order),
        "limits": dict(limits),
        "lengths": _lengths(recipe, datasets.longest(part, positions, recipe.engine)),
        "of": [digest for texts, scores in scored for digest in (texts.digest, scores.digest)],
    }
    facts = _measure(models, pair, recipe, {**asked, "sets": sets}, store=store)
    figures = {name: Estimate(**one) for name, one in facts["figures"].items()}
    return Chosen(tuple(facts["groups"]), facts["met"], figures)


def _units(groups: Mapping[str, Sequence[str]], architecture: Architecture) -> dict[str, list[str]]:
    """What is measured to rank the groups: each one or, if there are many, all of a decoder layer and all with the same
    role. What a group wins is then taken as proportional to what its layer wins and to what its role does."""
    if len(groups) <= ONE_BY_ONE:
        return {group: [group] for group in groups}
    found: dict[str, list[str]] = {}
    for group, (first, *_) in groups.items():
        layer = names.layer_of(architecture, f"{first}.")
        for unit in (f"layer {layer}", f"all {names.role(architecture, first)}"):
            found.setdefault(unit, []).append(group)
    return found


def _lengths(recipe: Recipe, longest: int) -> dict[str, int]:
    return {"min_tokens": recipe.evaluation.min_tokens, "max_tokens": longest}


def _measure(
    models: Models, pair: Pair, recipe: Recipe, asked: Mapping[str, Any], *, store: Store
) -> Mapping[str, Any]:
    """The worker's result, from the store or measured now."""
    snapshot = models.transformed or models.snapshot  # whose weights the checkpoints round
    _check(snapshot, recipe, store)
    evaluation = recipe.evaluation
    common: dict[str, Any] = {
        "groups": {name: list(modules) for name, modules in pair.groups.items()},
        "kv_cache_dtype": recipe.quantization.kv_cache_dtype,
        "engine_cache": target_facts(recipe.target).has_engine,
        "trust_remote_code": recipe.model.trust_remote_code,
        **{key: getattr(evaluation, key) for key in ("dtype", "batch_tokens", "top", "resamples", "seed")},
        **{key: value for key, value in asked.items() if key not in ("of", "sets")},
    }
    checkpoints = [pair.base.digest, pair.kept.digest if pair.kept else ""]
    ingredients = {
        **common,
        "of": [snapshot.digest, *checkpoints],
        "texts": asked["of"],
        "libraries": library_versions("torch", "transformers"),
        "sources": sources_digest(*SOURCES),
        "gpus": modelopt.calibrating(),
        "environment": modelopt.numerics(),
    }
    partial = PartialResults(store, "mixtures", key_of("mixtures", ingredients))
    job = {
        **common,
        **snapshot.source.as_job(),
        "sets": asked["sets"],
        "unified": str(pair.base.unified),
        "kept": str(pair.kept.unified) if pair.kept else None,
        "gpus": ingredients["gpus"],
        "results": str(partial.path.with_suffix(".jsonl")),
    }

    def make(tmp: Path) -> dict[str, Any]:
        partial.begin()
        summary = _run({**job, "scratch": str(tmp)}, store)
        (tmp / "mixtures.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        return summary

    facts = store.stage("mixtures", ingredients, make).facts
    partial.end()
    return facts


def _run(job: dict[str, Any], store: Store) -> dict[str, Any]:
    """Runs the worker and returns its summary."""
    try:
        with SourceFiles.of_job(job).explain_failures():
            events, _ = process.run_job(
                workers.MIXTURES,
                job,
                log=store.log("mixtures"),
                bar=process.Bar(store.out, "loading the model"),
                env=modelopt.ENVIRONMENT,
            )
    except UnsupportedError as error:
        raise NotMixed(error.what, why=error.why, hint=error.hint) from error
    summary: dict[str, Any] = events["summary"]
    return summary
