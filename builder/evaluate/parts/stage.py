"""Snapshot, Checkpoint -> Losses: what a checkpoint loses by its weights, by the inputs of its layers, by its KV cache.

A worker process (worker.py) measures each part alone, and everything but each part, against BF16 on the recipe's texts.
Nothing heavy is imported here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.architectures import names
from builder.calibration.rows import calibrate
from builder.checkpoint.layouts import Checkpoint
from builder.core import process, workers
from builder.core.errors import UnsupportedError, UsageError
from builder.core.output import Output
from builder.core.partial_results import PartialResults
from builder.core.store import Store, key_of, library_versions, sources_digest
from builder.evaluate.parts.figures import PARTS, WHOLE, Figure, Losses, alone, without
from builder.evaluate.sensitivity import stage as sensitivity
from builder.hub.snapshot import Snapshot
from builder.model.hashed_files import SourceFiles
from builder.quantize import modelopt
from builder.recipe.schema import Calibration as Rows
from builder.recipe.schema import Recipe
from builder.recipe.target_facts import target_facts

if TYPE_CHECKING:
    from builder.preflight.model_facts import ModelFacts

JOINING = 5  # the transformers that has one module for the experts of a layer
SOURCES = (
    "builder/evaluate/metrics.py",
    "builder/evaluate/parts/stage.py",
    "builder/evaluate/parts/figures.py",
    "builder/evaluate/parts/worker.py",
    "builder/recipe/target_facts.py",
    *sensitivity.SOURCES,
)


def check(recipe: Recipe) -> None:
    """UsageError if the recipe names no texts, quantizes nothing or excludes the whole model from memory;
    UnsupportedError for formats whose parts can't be told apart: before any work."""
    sensitivity.check_texts(recipe)
    part = recipe.quantization
    if part.memory == "low":
        raise UsageError(
            "Parts are measured with the whole model in memory, and --memory low excludes that.",
            hint="Leave --memory low out. Or measure the checkpoint as a whole: builder eval",
        )
    if part.as_it_is:
        raise UsageError("Nothing is quantized, so nothing is lost.", hint="Choose another --format.")
    if scaled := [one.title for one in part.quantized_formats if one.scales_inputs]:
        raise UnsupportedError(
            f"The loss of {scaled[0]} can't be divided into weights and inputs.",
            why="It moves a part of each weight into a scale of the inputs, so neither is quantized alone.",
            hint="Measure the checkpoint as a whole: builder eval",
        )


def check_model(model: ModelFacts, recipe: Recipe, *, quantized: bool) -> None:
    """UsageError for a quantized model without its original, UnsupportedError for experts that transformers joins."""
    if quantized and not recipe.model.original:
        raise UsageError(
            f"{recipe.model.id} is quantized, and there is no original to compare it with.",
            hint="Name that model: --original Qwen/Qwen3-8B",
        )
    joins = int(library_versions("transformers")["transformers"].partition(".")[0]) >= JOINING
    experts = (name for name, (_, shape) in model.tensors.items() if model.quantizes(name, shape))
    if joins and (first := next((name for name in experts if names.experts_of(name)), None)):
        raise UnsupportedError(
            f"{first.removesuffix('.weight')} is not a linear layer of its own in this model.",
            why="transformers stores the experts of a mixture in one module.",
            hint="Measure the checkpoint as a whole: builder eval",
        )


def measure_parts(
    snapshot: Snapshot, checkpoint: Checkpoint, recipe: Recipe, *, store: Store, by_layer: bool = True
) -> Losses:
    """Measures each part of the checkpoint, and by_layer each part of each decoder layer, which takes most of the time.
    An interrupted run resumes. Raises what `check` raises."""
    check(recipe)
    _check_memory(snapshot, recipe, store)
    part, evaluation = recipe.sensitivity, recipe.evaluation
    assert part.data is not None
    texts = calibrate(Rows(**part.data.model_dump(), samples=part.texts), store=store, use=sensitivity.USE)
    longest = min(part.max_tokens, int(snapshot.config.get("max_position_embeddings") or part.max_tokens))
    asked: dict[str, Any] = {
        "lengths": {"min_tokens": evaluation.min_tokens, "max_tokens": longest},
        "kv_cache_dtype": recipe.quantization.kv_cache_dtype,
        "engine_cache": target_facts(recipe.target).has_engine,
        "trust_remote_code": recipe.model.trust_remote_code,
        "by_layer": by_layer,
        **{key: getattr(evaluation, key) for key in ("dtype", "batch_tokens", "top")},
    }
    ingredients = {
        "of": [snapshot.digest, checkpoint.digest],
        "texts": texts.digest,
        **asked,
        "libraries": library_versions("torch", "transformers"),
        "sources": sources_digest(*SOURCES),
        "gpus": modelopt.calibrating(),
        "environment": modelopt.numerics(),
    }
    partial = PartialResults(store, "parts", key_of("parts", ingredients))
    job = {
        **asked,
        **snapshot.source.as_job(),
        "texts": str(texts.path.absolute()),
        "unified": str(checkpoint.unified),
        "gpus": ingredients["gpus"],
        "results": str(partial.path.with_suffix(".jsonl")),
    }

    def make(tmp: Path) -> dict[str, Any]:
        partial.begin()
        summary = _run({**job, "scratch": str(tmp)}, store)
        (tmp / "parts.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        return summary

    artifact = store.stage("parts", ingredients, make)
    partial.end()
    return losses_of(artifact.facts, artifact.path / "parts.json")


def _check_memory(snapshot: Snapshot, recipe: Recipe, store: Store) -> None:
    """UnsupportedError if the whole model does not fit."""
    from builder.evaluate import memory  # decides whether it is measured, not what comes out
    from builder.evaluate.variants import Models

    if memory.of_runner("bf16", Models(snapshot), recipe, store) == "low":
        raise UnsupportedError(
            "Parts are measured with the whole model in memory, and it does not fit.",
            hint="Use a machine with more memory. Or measure the checkpoint as a whole: builder eval",
        )


def _run(job: dict[str, Any], store: Store) -> dict[str, Any]:
    """Runs the worker and returns its summary."""
    with SourceFiles.of_job(job).explain_failures():
        events, _ = process.run_job(
            workers.PARTS,
            job,
            log=store.log("parts"),
            bar=process.Bar(store.out, "loading the model"),
            env=modelopt.ENVIRONMENT,
        )
    summary: dict[str, Any] = events["summary"]
    return summary


def losses_of(facts: Mapping[str, Any], path: Path) -> Losses:
    """What an artifact of this stage holds. path: its file for people."""
    results, parts = facts["results"], facts["parts"]

    def figure(name: str) -> Figure:
        return Figure(**results[name])

    layers = {
        int(layer): {
            part: results[alone(part, int(layer))]["kl"] for part in parts if alone(part, int(layer)) in results
        }
        for layer in facts["layers"]
    }
    return Losses(
        whole=figure(WHOLE),
        alone={part: figure(alone(part)) for part in parts},
        without={part: figure(without(part)) for part in parts} if len(parts) > 1 else {},
        layers=layers,
        modules={int(layer): prefix for layer, prefix in facts["layers"].items()},
        tokens=facts["tokens"],
        path=path,
    )


def show(found: Losses, recipe: Recipe, out: Output) -> None:
    """Prints what each part costs, for the model and by layer, and what to try next."""
    from builder.evaluate.parts import advice  # read by no measurement, so no part of its key

    rows = [
        (PARTS[part], str(figure), str(found.without[part]) if part in found.without else "-")
        for part, figure in found.alone.items()
    ]
    rows.append(("all of them", str(found.whole), "-"))
    out.table("KL to BF16 by part (95 % intervals)", ["part", "quantized alone", "all but this one"], rows)
    columns = ["layer", *(PARTS[part] for part in found.alone)]
    by_layer = [
        (str(layer), *(f"{parts[part]:.2e}" if part in parts else "-" for part in found.alone))
        for layer, parts in sorted(found.layers.items())
    ]
    out.table("KL to BF16 by decoder layer, each part of each layer quantized alone", columns, by_layer)
    sentences = advice.advise(found, recipe)
    for label, sentence in zip(["advice", *[""] * len(sentences)], sentences, strict=False):
        out.text(f"{label:<10} {sentence}")
    out.text(f"tokens     {found.tokens:,}")
    out.text(f"kept       {found.path}")
    out.result(_as_dict(found) | {"advice": sentences})


def _as_dict(found: Losses) -> dict[str, Any]:
    return {
        "whole": vars(found.whole),
        "alone": {part: vars(figure) for part, figure in found.alone.items()},
        "without": {part: vars(figure) for part, figure in found.without.items()},
        "layers": {str(layer): dict(parts) for layer, parts in found.layers.items()},
        "tokens": found.tokens,
        "path": str(found.path),
    }
