"""The variants of a model that can be measured: BF16, simulated, on disk, in the reference executor, served.

A measurement takes a variant's job, adds what to measure, and passes it to a worker process, which opens the variant
with the module of `builder.evaluate.runners` that the job names. Nothing heavy is imported here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from builder.calibration.rows import Calibration
from builder.checkpoint.layouts import Checkpoint
from builder.core.errors import NotMeasurable, UsageError
from builder.core.store import Store, library_versions, sources_digest
from builder.formats import algorithms, kv_cache
from builder.formats.kv_cache import KvCacheFormat
from builder.hub.snapshot import Snapshot
from builder.quantize import modelopt
from builder.recipe.evaluation import RUNNERS
from builder.recipe.schema import Recipe
from builder.recipe.target_facts import target_facts
from builder.serving.sources import SERVED_SOURCES
from builder.triton.repository import Repository, repository_key

SOURCES = (
    "builder/evaluate/variants.py",
    "builder/evaluate/runners",
    "builder/evaluate/datasets.py",
    "builder/quantize",
    "builder/checkpoint/shards.py",
    "builder/model/dense.py",
    "builder/model/rope.py",
    "builder/model/streamed.py",
    "builder/model/joined_experts.py",
    "builder/model/streamed_embedding.py",
    "builder/model/streamed_weights.py",
    *modelopt.SOURCES,
    *SERVED_SOURCES,
)
LIBRARIES = (*modelopt.LIBRARIES, "tritonclient", "nvidia-pytriton", "tensorrt_llm", "tensorrt")
KV_AUTO = "checkpoint, KV auto"  # the row of evaluation.compare_kv


@dataclass(frozen=True)
class Models:
    """The artifacts to measure. One that no runner of the recipe needs may be None.

    snapshot: the model that BF16 means. transformed: what was quantized, if that is not the snapshot itself."""

    snapshot: Snapshot
    calibration: Calibration | None = None
    checkpoint: Checkpoint | None = None
    repository: Repository | None = None
    transformed: Snapshot | None = None


@dataclass(frozen=True)
class Variant:
    """`label` names its row in tables, `runner` the module that opens it; `cache`: the KV cache's format."""

    label: str
    runner: str
    cache: KvCacheFormat


BF16 = Variant("bf16", "bf16", kv_cache.AUTO)  # whatever the recipe quantizes, so it is measured once


def list_variants(recipe: Recipe) -> list[Variant]:
    """The variants that the recipe measures, in the order of RUNNERS: BF16 first.

    UsageError if the recipe compares KV caches and its own is not quantized.
    """
    part, cache = recipe.evaluation, recipe.quantization.cache_format
    found = [BF16 if name == BF16.runner else Variant(name, name, cache) for name in RUNNERS if name in part.runners]
    if part.compare_kv and not cache.quantized:
        raise UsageError(
            "There is no quantized KV cache to compare: the recipe keeps the cache in the model's own type.",
            hint="Compare with --kv-cache-dtype fp8",
        )
    if part.compare_kv:
        quantized = [] if "checkpoint" in part.runners else [Variant("checkpoint", "checkpoint", cache)]
        found += [*quantized, Variant(KV_AUTO, "checkpoint", kv_cache.AUTO)]
    return found


@dataclass(frozen=True)
class RunnerJob:
    """The worker's job, and the ingredients that a stored measurement of this variant depends on."""

    job: Mapping[str, Any]
    ingredients: Mapping[str, Any]


def runner_job(variant: Variant, models: Models, recipe: Recipe, store: Store) -> RunnerJob:
    """The job that opens a variant. NotMeasurable if an artifact that it needs does not exist."""
    job = {
        "runner": variant.runner,
        "label": variant.label,
        "kv_cache_dtype": variant.cache.name,
        **models.snapshot.source.as_job(),
        "trust_remote_code": recipe.model.trust_remote_code,
        "root": str(store.root),
        "gpus": modelopt.calibrating(),
        **{key: getattr(recipe.evaluation, key) for key in ("dtype", "batch_tokens")},
    }
    more, of = _of(variant, models, recipe, store)
    ingredients = {
        "of": of,
        "runner": variant.runner,
        "tokenizer": models.snapshot.digest,
        **{key: job[key] for key in ("dtype", "kv_cache_dtype", "trust_remote_code")},
        **{key: more.get("calibration", {}).get(key) for key in ("format", "layers", "seq_len", "batch_size")},
        "engine_cache": more.get("engine_cache"),
        # A repository refers to its engine by path, so rebuilding the engine does not change the repository's digest.
        "repository": repository_key(models.repository) if variant.runner == "served" and models.repository else None,
        "libraries": library_versions(*LIBRARIES),
        "sources": sources_digest(*SOURCES),
        "gpus": job["gpus"],
        "environment": modelopt.numerics(),
    }
    return RunnerJob({**job, **more}, ingredients)


def _of(variant: Variant, models: Models, recipe: Recipe, store: Store) -> tuple[dict[str, Any], list[str]]:
    """What the runner needs besides the snapshot, and the digests of the artifacts that it measures."""
    if variant.runner == "bf16":
        return {}, [models.snapshot.digest]
    if variant.runner == "simulated":
        if recipe.quantization.as_it_is:
            raise NotMeasurable("Nothing is quantized, so there is nothing to simulate.", hint="--runner checkpoint")
        if recipe.quantization.number_format.compressed_only:
            raise NotMeasurable(f"ModelOpt has no {recipe.quantization.title}, so it does not simulate it.",
                                hint="--runner checkpoint")  # fmt: skip
        if recipe.quantization.algorithm != algorithms.MAX.name:
            raise NotMeasurable(
                f"ModelOpt simulates rounding by max, and the weights are rounded by {recipe.quantization.algorithm}.",
                hint="--runner checkpoint",
            )
        if models.calibration is None:
            raise NotMeasurable("Nothing was calibrated (--data-free), so there is nothing to simulate.",
                                hint="--runner checkpoint")  # fmt: skip
        assert models.checkpoint is not None
        model = models.transformed or models.snapshot
        rows = {"rows": str(models.calibration.path.absolute())}
        rows |= {"format": recipe.quantization.number_format.name, "layers": models.checkpoint.facts["layers"]}
        rows |= {key: getattr(recipe.calibration, key) for key in ("seq_len", "batch_size")}
        return {**model.source.as_job(), "calibration": rows}, [model.digest, models.calibration.digest]
    if variant.runner == "served":
        return _served(models.repository, store), [models.repository.digest if models.repository else ""]
    assert models.checkpoint is not None
    if variant.runner == "reference" and not models.checkpoint.tensorrt_llm.is_dir():
        raise NotMeasurable("The checkpoint has no TensorRT-LLM layout, which the reference executor reads.")
    layouts: dict[str, Any] = {
        "unified": str(models.checkpoint.unified),
        "tensorrt_llm": str(models.checkpoint.tensorrt_llm),
        "engine_cache": target_facts(recipe.target).has_engine,
    }
    return layouts, [models.checkpoint.digest]


def _served(repository: Repository | None, store: Store) -> dict[str, Any]:
    assert repository is not None
    gathers = target_facts(repository.facts["target"]).python_model
    if not gathers:
        engine = json.loads((repository.path_of("engine") / "config.json").read_text(encoding="utf-8"))
        gathers = bool(engine.get("build_config", {}).get("gather_context_logits"))
    return {
        "models": str(repository.models.absolute()),
        "facts": dict(repository.facts),
        "gathers": gathers,
        "server_log": str(store.log("triton")),
        "timeout": 600.0,
    }
