"""Snapshot -> Checkpoint without calibration rows: weights are packed shard by shard, and the model never runs.

Scales of weights follow from the weights, as with any calibration. Those of activations follow from one rule: inputs of
linear layers are taken to lie within INPUT_RANGE, keys and values within CACHE_RANGE. Nothing heavy is imported, and no
process is started.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from builder.architectures import catalog, names
from builder.architectures.attention import attention_layers, shared_kv_layers
from builder.architectures.facts import Architecture
from builder.checkpoint.finished import inspected, write_second_layout
from builder.checkpoint.layouts import Checkpoint
from builder.core import temporary
from builder.core.errors import UnsupportedError
from builder.core.hashes import Hashes
from builder.core.output import BYTES, Progress
from builder.core.store import Store, sources_digest
from builder.formats.assignment import ModelFormats, of_job
from builder.formats.kernels.packing import warn_if_slow
from builder.hub.snapshot import Snapshot, Source
from builder.quantize import modelopt, unified_plan, writer
from builder.quantize.ahead import Ahead
from builder.quantize.modelopt import QuantizeRequest
from builder.quantize.ranges import Ranges
from builder.quantize.source_weights import SourceModel
from builder.quantize.unified_plan import UnifiedPlan
from builder.quantize.writer import Work

SOURCES = (*modelopt.SOURCES, *unified_plan.SOURCES, "builder/quantize/data_free.py", "builder/quantize/ahead.py")
# The largest magnitude that inputs are taken to have. NVFP4's scale of an input is then 1: the scale of 16 values is a
# sixth of their largest magnitude, in E4M3, which holds it without saturation up to 2688 and as a normal number from
# 0.09 on. FP8 inputs get the scale 6. Blocks and values below that lose precision step by step; values above saturate,
# which costs more: the input of a down_proj has a few huge values that a model depends on (up to 3104 here).
# KL divergence from BF16 on 16 texts, weights in the same format, KV cache in BF16, w/o rounding of inputs, with ranges
# measured on 16 other texts, and assumed:
#   SmolLM2-135M-Instruct   NVFP4: 0.249 | 0.452 | 64: 1.267, 448: 0.535, 2688: 0.438, 16384: 0.495
#                           FP8:   0.020 | 0.039 | 64: 0.825, 448: 0.155, 2688: 0.043
#   tests/data/tiny-qwen3   NVFP4: 0.014 | 0.030 | 64: 0.031, 448: 0.030, 2688: 0.030, 16384: 0.030
#                           FP8:   0.001 | 0.003 | 64: 0.004, 448: 0.003, 2688: 0.003
# A bound by the norm before the layer (the root of the width times its largest weight) was no better where it exists,
# and the inputs of o_proj and down_proj have none.
INPUT_RANGE = 6 * 448.0
# That of keys and values: FP8's scale is then 1, as in a server that finds none in the checkpoint.
CACHE_RANGE = 448.0


def ahead_of(source: Source, asked: QuantizeRequest, *, store: Store) -> Ahead:
    """What writes the unified layout while a model on the Hub is downloaded, or while a directory is hashed. The caller
    begins and closes it."""

    def opened() -> SourceModel:
        if source.places:
            return SourceModel.expected(source.directory, source.places)
        return SourceModel.open(source.directory)

    def write(model: SourceModel, unified: Path, work: Work) -> dict[str, Any]:
        return _write_unified(model, _chosen(asked), unified, work)

    return Ahead(opened, write, _chosen(asked), store.root / "checkpoint", downloaded=bool(source.places))


def write_data_free(
    snapshot: Snapshot, asked: QuantizeRequest, *, store: Store, ahead: Ahead | None = None
) -> Checkpoint:
    """Writes both layouts, `unified/` and `tensorrt_llm/`, and inspects them.

    ahead: what has written `unified/` already; used only if source and formats are the same, and closed.

    UnsupportedError for formats and experts that only ModelOpt can quantize; IntegrityError for weights that hold NaN
    or Inf, or if the inspection finds a problem. Such a checkpoint is not kept.
    """
    chosen = _chosen(asked)
    ingredients = {
        "backend": "data_free",
        "ranges": [INPUT_RANGE, CACHE_RANGE],
        "snapshot": snapshot.digest,
        "architecture": catalog.ingredients(catalog.of(snapshot.config)),
        **chosen,
        "sources": sources_digest(*SOURCES),
    }

    def make(tmp: Path) -> dict[str, Any]:
        warn_if_slow(store.out)
        with Hashes(tmp) as hashes:
            with snapshot.source.explain_failures():
                facts = _write(snapshot, chosen, hashes, store, ahead)
            made = {"layers": chosen["layers"], "zero_layers": list(asked.zero_layers)}
            return {**facts, **made, **inspected(hashes)}

    with closing(ahead) if ahead else nullcontext():
        artifact = store.stage("checkpoint", ingredients, make)
    return Checkpoint(path=artifact.path, digest=artifact.digest, facts=artifact.facts)


def _chosen(asked: QuantizeRequest) -> dict[str, Any]:
    """The formats, as ingredients of the checkpoint's key."""
    layers = {name: list(modules) for name, modules in sorted(asked.layers.items()) if modules}
    part = asked.quantization
    return {
        "format": part.number_format.name,
        "kv_cache_dtype": part.kv_cache_dtype,
        "layers": layers,
        **part.rounding,
    }


def _write(
    snapshot: Snapshot, chosen: Mapping[str, Any], hashes: Hashes, store: Store, ahead: Ahead | None
) -> dict[str, Any]:
    """Writes the layouts, and hashes them meanwhile. Returns facts for the manifest."""
    tmp = hashes.root
    temporary.sweep(tmp.parent)  # of a killed run's `Ahead`
    started, source, formats = time.monotonic(), SourceModel.open(snapshot.path), of_job(chosen)
    total = sum(info.nbytes for info in source.tensors.values())
    with store.out.progress("quantizing", total, BYTES) as bar:
        counts = ahead.take(source, chosen, tmp / "unified", bar.update) if ahead else None
        if counts is None:
            counts = _write_unified(source, chosen, tmp / "unified", Work(done=_counter(bar)))
    wrote = time.monotonic()
    lacking = write_second_layout(source.config, hashes)
    snapshot.source.check_unchanged()
    seconds = {"write": round(wrote - started, 3), "layouts": round(time.monotonic() - wrote, 3)}
    summary = {
        **counts,
        "large_kv": 0,  # a scale of 1 says nothing here
        "backend": "data_free",
        "writer": "builder",
        "coverage": {},
        "warnings": {},
        "no_tensorrt_llm": lacking,
        "seconds": seconds,
    }
    return modelopt.checkpoint_facts(summary, store, {}, formats)


def _write_unified(source: SourceModel, chosen: Mapping[str, Any], unified: Path, work: Work) -> dict[str, Any]:
    return write_unified(source, of_job(chosen), unified, replace(work, algorithm=chosen["algorithm"]))


def write_unified(source: SourceModel, formats: ModelFormats, unified: Path, work: Work) -> dict[str, Any]:
    """Writes the unified layout with the scales that follow from the rule. Raises what `writer.write` raises, and
    UnsupportedError if the rule does not fit the model. Returns facts for the manifest."""
    planned = unified_plan.plan(source.config, source.headers, source.dtype, formats)
    unified_plan.check(planned.layers)
    return writer.write(source, formats, assumed(planned, formats, source.config), unified, work)


def assumed(planned: UnifiedPlan, formats: ModelFormats, config: Mapping[str, Any]) -> Ranges:
    """The ranges that follow from the rule: INPUT_RANGE for the inputs of every quantized layer, and
    CACHE_RANGE for the keys and values of every attention.

    UnsupportedError if it is not known which modules keep keys and values.
    """
    inputs = dict.fromkeys(planned.layers, INPUT_RANGE)
    if not formats.cache.quantized:
        return Ranges(inputs)
    copied = [part.name.removesuffix(".weight") for part in planned.copies if part.name.endswith(".weight")]
    attentions = attention_modules([*planned.layers, *copied], planned.architecture)
    common = catalog.with_common_keys(config)
    expected = attention_layers(common)
    if not expected <= len(attentions) <= expected + len(shared_kv_layers(common)):  # some have unused projections
        raise UnsupportedError(
            f"Scales of the KV cache of {(config.get('architectures') or ['this model'])[0]} need calibration.",
            why=f"{expected} layers keep keys and values, and {len(attentions)} have projections of keys and values.",
            hint="Leave the cache in the model's own type: --kv-cache-dtype auto. Or leave --data-free out.",
        )
    return Ranges(inputs, dict.fromkeys(attentions, (CACHE_RANGE, CACHE_RANGE)))


def attention_modules(modules: Iterable[str], architecture: Architecture) -> list[str]:
    """The modules that keep keys and values, by the names of the linear layers: those that have a projection of keys;
    where none has one of its own (multi-head latent attention), those with any projection of attention."""
    inside = [module for module in modules if names.layer_of(architecture, module) is not None]
    keys = [module for module in inside if names.role(architecture, module) in ("k", "qkv")]
    chosen = keys or [module for module in inside if names.in_attention(architecture, module)]
    return list(dict.fromkeys(module.rpartition(".")[0] for module in chosen))


def _counter(bar: Progress) -> Callable[[int], None]:
    """A function that adds bytes to a progress bar, from any thread."""
    lock, done = threading.Lock(), 0

    def add(nbytes: int) -> None:
        nonlocal done
        with lock:
            done += nbytes
            bar.update(done)

    return add
