"""Snapshot, Calibration -> Checkpoint in little memory: one decoder layer at a time, without ModelOpt.

Ranges and bytes equal those of `modelopt.quantize`. A killed run leaves results of finished layers in `partial/` of the
store, under the key of the checkpoint, and the next one continues there. This module runs in the parent process and
imports nothing heavy; `builder.quantize.streamed_worker` does the work.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from builder.architectures import catalog
from builder.calibration.rows import Calibration, required_tokens
from builder.checkpoint.finished import inspected
from builder.checkpoint.layouts import Checkpoint
from builder.core import workers
from builder.core.early_worker import EarlyWorker
from builder.core.errors import UnsupportedError
from builder.core.hashes import Hashes
from builder.core.partial_results import PartialResults
from builder.core.process import Bar, job_file
from builder.core.store import Store, key_of, library_versions, sources_digest
from builder.formats.assignment import ModelFormats, of_job
from builder.formats.kernels.packing import warn_if_slow
from builder.hub.snapshot import Snapshot
from builder.quantize import modelopt, unified_plan
from builder.quantize.modelopt import QuantizeRequest
from builder.quantize.source_weights import SourceModel

LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "accelerate")
SOURCES = (
    *modelopt.SOURCES,
    "builder/model/dense.py",
    "builder/model/rope.py",
    "builder/model/streamed.py",
    "builder/model/joined_experts.py",
    "builder/model/streamed_embedding.py",
    "builder/model/streamed_weights.py",
    "builder/quantize/streamed.py",
    "builder/quantize/streamed_worker.py",
    "builder/quantize/streamed_calibration.py",
    "builder/quantize/streamed_ranges.py",
    "builder/quantize/streamed_rows.py",
    "builder/quantize/expert_inputs.py",
    "builder/quantize/streamed_solve.py",
    "builder/quantize/streamed_states.py",
    "builder/quantize/algorithms",
    "builder/quantize/data_free.py",
    "builder/quantize/ahead.py",
)
STAGE = "checkpoint"
NEEDED = ("torch", "transformers", "tokenizers")


def check(source: SourceModel, formats: ModelFormats) -> None:
    """UnsupportedError, by headers alone, for formats and experts that only ModelOpt can quantize, for layers that do
    not fit their format, and if a library is absent."""
    absent = [name for name in NEEDED if library_versions(name)[name] == "absent"]
    if absent:
        raise UnsupportedError(
            f"Calibrating needs {', '.join(absent)}, not installed in this Python environment.",
            hint="Install the project with its quantize extra, or run the build in the container.",
        )
    planned = unified_plan.plan(source.config, source.headers, source.dtype, formats)
    unified_plan.check(planned.layers)
    every = [layer for group in planned.groups for layer in group]
    for one in dict.fromkeys(planned.layers.values()):
        shapes = {f"{layer.module}.weight": layer.part.shape for layer in every if layer.number_format is one}
        modelopt.check_sizes(shapes, one)


def worker(store: Store) -> EarlyWorker:
    """The process that quantizes. It may begin before `quantize_streamed` is called."""
    return EarlyWorker(workers.QUANTIZE_STREAMED, modelopt.ENVIRONMENT, lambda: store.log("quantize"))


def quantize_streamed(
    snapshot: Snapshot,
    calibration: Calibration,
    asked: QuantizeRequest,
    *,
    store: Store,
    early: EarlyWorker | None = None,
) -> Checkpoint:
    """Calibrates on the rows layer by layer, writes both layouts, `unified/` and `tensorrt_llm/`, and inspects them.

    early: the `worker`, which may have begun.
    UnsupportedError if the model or a format needs ModelOpt, or if transformers can't run the model layer by layer;
    IntegrityError with the tensors' names if the inspection finds a problem. Such a checkpoint is not kept.
    """
    ingredients = _ingredients(snapshot, calibration, asked)
    layers = ingredients["layers"]
    partial = PartialResults(store, STAGE, key_of(STAGE, ingredients))

    def make(tmp: Path) -> dict[str, Any]:
        warn_if_slow(store.out)
        partial.begin()
        job = _job(snapshot, calibration, ingredients)
        check(SourceModel.open(snapshot.path), of_job(job))
        with snapshot.source.explain_failures():
            facts = _run({**job, "partial": str(partial.path)}, tmp, store, early)
        facts |= {"layers": layers, "zero_layers": list(asked.zero_layers)}
        with Hashes(tmp) as hashes:
            return {**facts, **inspected(hashes)}

    artifact = store.stage(STAGE, ingredients, make)
    partial.end()
    return Checkpoint(path=artifact.path, digest=artifact.digest, facts=artifact.facts)


def _ingredients(snapshot: Snapshot, calibration: Calibration, asked: QuantizeRequest) -> dict[str, Any]:
    part, rows = asked.quantization, asked.calibration
    return {
        "backend": "streamed",
        "snapshot": snapshot.digest,
        "architecture": catalog.ingredients(catalog.of(snapshot.config)),
        "calibration": calibration.digest,
        "format": part.number_format.name,
        "kv_cache_dtype": part.kv_cache_dtype,
        **part.rounding,
        "layers": {name: list(modules) for name, modules in sorted(asked.layers.items()) if modules},
        "seq_len": rows.seq_len,
        "batch_size": rows.batch_size,
        "min_tokens": required_tokens(rows),
        "libraries": library_versions(*LIBRARIES),
        "sources": sources_digest(*SOURCES),
        "gpus": modelopt.calibrating(),
        "environment": modelopt.numerics(),
        "trust_remote_code": asked.trust_remote_code,
    }


def _job(snapshot: Snapshot, calibration: Calibration, ingredients: Mapping[str, Any]) -> dict[str, Any]:
    named = ("format", "kv_cache_dtype", "layers", "seq_len", "batch_size", "min_tokens", "gpus", "trust_remote_code")
    return {
        **snapshot.source.as_job(),
        "rows": str(calibration.path.absolute()),
        **{name: ingredients[name] for name in (*named, "algorithm", "gptq") if name in ingredients},
    }


def _run(job: Mapping[str, Any], tmp: Path, store: Store, early: EarlyWorker | None) -> dict[str, Any]:
    """Runs the worker and returns the facts of the checkpoint."""
    with closing(early or worker(store)) as process:
        bar = Bar(store.out, "starting", "B")
        events, finished, log = process.run({**job, "destination": str(tmp.absolute())}, bar)
    run = {"log": str(log), "job": str(job_file(log)), "max_rss": finished.max_rss}
    return modelopt.checkpoint_facts(events["summary"], store, run, of_job(job))
