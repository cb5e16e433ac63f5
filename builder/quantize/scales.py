"""`--calibrate-scales`: new scales of inputs and of the KV cache for a quantized checkpoint, whose weights stay.

For checkpoints of other tools that lack them, or whose scales are wrong. This module runs in the parent process and
imports nothing heavy; `builder.quantize.scales_worker` does the work.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder.calibration import coverage
from builder.calibration.rows import Calibration, required_tokens
from builder.core import process, workers
from builder.core.store import Store, library_versions, sources_digest
from builder.quantize import modelopt, streamed
from builder.recipe import schema

SOURCES = (
    *streamed.SOURCES,
    "builder/quantize/scales.py",
    "builder/quantize/scales_worker.py",
    "builder/quantize/stored_model.py",
    "builder/checkpoint/description.py",
)


@dataclass(frozen=True)
class ScalesRequest:
    """How to calibrate the scales of a quantized checkpoint.

    kv_cache_dtype: the recipe's; with "auto" no scale of the KV cache is written, and those that exist stay. by_layer:
    with one decoder layer in memory at a time, which finds the same scales.
    """

    calibration: schema.Calibration
    kv_cache_dtype: str = "fp8"
    trust_remote_code: bool = False
    by_layer: bool = False


def ingredients(calibration: Calibration, asked: ScalesRequest) -> dict[str, Any]:
    """What the scales depend on beside the checkpoint, for the key of the stage that calls `calibrate_scales`."""
    rows = asked.calibration
    return {
        "calibration": calibration.digest,
        "seq_len": rows.seq_len,
        "batch_size": rows.batch_size,
        "min_tokens": required_tokens(rows),
        "kv_cache_dtype": asked.kv_cache_dtype,
        "libraries": library_versions(*modelopt.LIBRARIES),
        "sources": sources_digest(*SOURCES),
        "gpus": modelopt.calibrating(),
        "environment": modelopt.numerics(),
        "trust_remote_code": asked.trust_remote_code,
        **({"by_layer": True} if asked.by_layer else {}),
    }


def calibrate_scales(
    unified: Path, calibration: Calibration, asked: ScalesRequest, *, store: Store, partial: Path | None = None
) -> dict[str, Any]:
    """Calibrates the scales of a checkpoint in the unified layout and writes them into its files.

    Every layer whose format stores a scale of its inputs gets one, and every attention those of the KV cache. All other
    tensors keep their bytes. partial: where results of finished layers are kept, a path without suffix; needed if
    `by_layer`. Returns facts: counts of scales, coverage, tokens of each expert, log, peak memory.
    UsageError for too little text; UnsupportedError if transformers or ModelOpt can't take the model; IntegrityError if
    a layer saw nothing, or NaN or Inf.
    """
    rows, given = asked.calibration, ingredients(calibration, asked)
    log, by_layer = store.log("scales"), str(partial.absolute()) if asked.by_layer and partial else ""
    label, unit = ("opening the checkpoint", "B") if by_layer else ("starting ModelOpt", "batches")
    events, finished = process.run_job(
        workers.SCALES,
        {
            "model": str(unified.absolute()),
            "destination": str(unified.absolute()),
            "rows": str(calibration.path.absolute()),
            "seq_len": rows.seq_len,
            "batch_size": rows.batch_size,
            "partial": by_layer,
            **{key: given[key] for key in ("min_tokens", "kv_cache_dtype", "gpus", "trust_remote_code")},
        },
        log=log,
        bar=process.Bar(store.out, label, unit),
        env=modelopt.ENVIRONMENT,
    )
    facts: dict[str, Any] = events["summary"]
    _tell(facts, store)
    return {**facts, "log": os.fspath(log), "max_rss": finished.max_rss}


def _tell(facts: Mapping[str, Any], store: Store) -> None:
    cache = f" and {facts['kv_scales']} of the KV cache" if facts["kv_scales"] else ""
    store.out.info(f"{facts['input_scales']} scales of inputs{cache}, calibrated on {coverage.summary(facts)}")
    for sentence in coverage.shortfalls(facts):
        store.out.warn(f"calibration covers little: {sentence}")
