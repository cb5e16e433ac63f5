"""Snapshot of a quantized model -> Checkpoint: the same weights in the layouts that the targets need.

Nothing is quantized, though scales of inputs and of the KV cache may be calibrated. The Hugging Face layout is copied,
or converted from another layout; TensorRT-LLM's is derived from it, as after quantizing; the inspection is that of
every build.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from builder import __version__
from builder.architectures import catalog
from builder.calibration.rows import Calibration
from builder.checkpoint import conversion, huggingface, layouts, unified_config, validate
from builder.checkpoint.description import CONFIG, HF_QUANT_CONFIG, Description
from builder.checkpoint.layouts import Checkpoint, read_json, write_json
from builder.checkpoint.quantized_source import Formats
from builder.checkpoint.shards import write_shards
from builder.core.errors import IntegrityError, UnsupportedError
from builder.core.partial_results import PartialResults
from builder.core.safetensors_io import PATCH, REPAIRS, NewTensor, Tensors
from builder.core.store import Store, key_of, sha256, sources_digest
from builder.formats.kv_cache import KvCacheFormat
from builder.hub.snapshot import Snapshot, Source
from builder.model import files as model_files
from builder.model.hashed_files import times
from builder.quantize import scales
from builder.quantize.scales import ScalesRequest

SOURCES = (*scales.SOURCES, "builder/checkpoint", "builder/model", "builder/quantize/imported.py")


@dataclass(frozen=True)
class ImportRequest:
    """What to take over.

    found: what the checkpoint is. cache: the KV cache that it will be served with: the declared one, or none if its
    scales are missing. formats: of its layers, by Hugging Face names. layouts: those to write, `unified` among them.
    original: has the config.json and tokenizer of a layout without them. rows, scales: what to calibrate new scales on,
    and how; None leaves them.
    """

    found: Description
    cache: KvCacheFormat
    formats: Formats
    layouts: Sequence[str]
    original: Source | None = None
    rows: Calibration | None = None
    scales: ScalesRequest | None = None


def import_checkpoint(snapshot: Snapshot, asked: ImportRequest, *, store: Store) -> Checkpoint:
    """Writes the layouts `unified/` and `tensorrt_llm/` of a quantized model, and inspects them.

    IntegrityError with the tensors' names if the inspection finds an error. Such a checkpoint is not kept.
    """
    ingredients = {
        "snapshot": snapshot.digest,
        "architecture": catalog.ingredients(catalog.of(snapshot.config)),
        "cache": asked.cache.name,
        "layouts": list(asked.layouts),
        "version": __version__,  # which a converted checkpoint names as its tool
        "companions": {} if asked.original is None else _companions(asked.original),
        "scales": scales.ingredients(asked.rows, asked.scales) if asked.rows and asked.scales else None,
        "sources": sources_digest(*SOURCES),
    }

    partial = PartialResults(store, "checkpoint", key_of("checkpoint", ingredients))

    def make(tmp: Path) -> dict[str, Any]:
        unified, companions = tmp / "unified", asked.original.directory if asked.original else snapshot.path
        unified.mkdir()
        lost = _unified(snapshot, asked, unified, companions)
        huggingface.complete(unified, companions)
        calibrated = {}
        if asked.rows and asked.scales:
            partial.begin()
            calibrated = scales.calibrate_scales(unified, asked.rows, asked.scales, store=store, partial=partial.path)
        lacking = None
        if "tensorrt_llm" in asked.layouts:
            lacking = _second_layout(unified, snapshot.config, tmp / "tensorrt_llm")
        snapshot.source.check_unchanged()
        found = validate.inspect(tmp)
        found.check(snapshot.path)
        facts = {**calibrated, **_facts(asked)}
        store.out.info(summary(facts["imported"]))
        for sentence in (*lost, *([f"only the unified layout was written: {lacking}"] if lacking else [])):
            store.out.warn(sentence)
        return {**facts, "no_tensorrt_llm": lacking, "inspection": found.facts()}

    artifact = store.stage("checkpoint", ingredients, make)
    partial.end()
    return Checkpoint(path=artifact.path, digest=artifact.digest, facts=artifact.facts)


def tokenizer_source(checkpoint: Checkpoint, snapshot: Snapshot) -> Snapshot:
    """The snapshot to take the tokenizer from: of a model in TensorRT-LLM's layout, which has none, the checkpoint's
    Hugging Face layout."""
    if any(name in snapshot.files for name in ("tokenizer.json", "tokenizer_config.json")):
        return snapshot
    names = [path.name for path in model_files.tokenizer_files(checkpoint.unified)]
    files = {name: {"size": (checkpoint.unified / name).stat().st_size, "sha256": ""} for name in names}
    external = {"root": str(checkpoint.unified), "files": files}
    facts = {**snapshot.artifact.facts, "external": external, "times": times(checkpoint.unified, names)}
    return replace(snapshot, path=checkpoint.unified, artifact=replace(snapshot.artifact, facts=facts))


def _companions(original: Source) -> dict[str, str]:
    """{file: sha256} of the original's config.json and tokenizer."""
    files = [original.directory / model_files.CONFIG, *model_files.tokenizer_files(original.directory)]
    return {file.name: sha256(file) for file in files}


def _unified(snapshot: Snapshot, asked: ImportRequest, unified: Path, companions: Path) -> tuple[str, ...]:
    """Writes the Hugging Face layout, weights and configuration. Returns what it can't hold of the source."""
    if asked.found.layout != "unified":
        found = replace(asked.found, cache=asked.found.served_cache)
        made = conversion.write(snapshot.path, unified, "unified", conversion.Options(model=companions), found)
        return made.lost
    repaired = any(PATCH.fullmatch(name) for name in snapshot.files)
    for name in snapshot.files:
        if not (repaired and (name.endswith(".safetensors") or name in (model_files.INDEX, REPAIRS))):
            shutil.copyfile(snapshot.path / name, unified / name)
    if repaired:
        _write_repaired(snapshot.path, unified)
    _describe(unified, asked)
    return ()


def _write_repaired(source: Path, unified: Path) -> None:
    """Writes each tensor once: TensorRT-LLM's LLM class reads all files in any order, so it could take what
    `builder repair` replaced (_torch/models/checkpoints/hf/weight_loader.py)."""
    tensors = Tensors(source)
    write_shards(unified, [NewTensor(n, info.dtype, info.shape, [tensors.place(n)]) for n, info in tensors.items()])


def _describe(unified: Path, asked: ImportRequest) -> None:
    """Writes the description into hf_quant_config.json and config.json: of a copy where one of them may lack it, forget
    layers that are not quantized, or name a KV cache whose scales are missing.

    TensorRT-LLM 1.2 reads ModelOpt's formats from hf_quant_config.json alone (_torch/model_config.py, from_pretrained).
    """
    found = asked.found
    quantized = {module: one for module, one in found.layers.items() if one.quant_algo is not None}
    kept = [module for module, one in found.layers.items() if one.quant_algo is None]
    forgotten = any(found.formats.of(module).quant_algo is not None for module in kept)
    if (unified / HF_QUANT_CONFIG).is_file() and not forgotten and found.served_cache is found.cache:
        return
    head = catalog.of(found.config).tensors
    excluded = {*kept, *found.formats.excluded, head.head if head else "lm_head"}
    document = {
        "producer": {"name": found.producer.name or "modelopt", "version": found.producer.version},
        "quantization": unified_config.quantization(quantized, excluded, found.served_cache),
    }
    config = read_json(unified / CONFIG)
    write_json(unified / CONFIG, {**config, "quantization_config": unified_config.block(document, quantized)})
    write_json(unified / HF_QUANT_CONFIG, document)


def _second_layout(unified: Path, config: Mapping[str, Any], destination: Path) -> str | None:
    """Derives TensorRT-LLM's layout. Returns why there is none, if so."""
    try:
        return layouts.write_if_served(unified, config, destination)
    except IntegrityError as error:  # scales that TensorRT-LLM's fused layers must share, and other tools' need not
        raise UnsupportedError(
            "This checkpoint can't be built into an engine.",
            why=f"{error.what} {error.why}".strip(),
            hint="Serve it without an engine, on a GPU: --target llmapi. Or quantize the original model.",
        ) from None


def _facts(asked: ImportRequest) -> dict[str, Any]:
    """What the manifest keeps: the layers in another format than most, as after quantizing, and where all came from."""
    found, layers = asked.found, asked.formats.layers
    counts: dict[str, int] = {}
    for one in found.layers.values():
        counts[one.title] = counts.get(one.title, 0) + 1
    imported = {
        "tool": str(found.producer),
        "layout": found.layout,
        "format": asked.formats.whole.name,
        "linears": counts,
        "kv_cache": asked.cache.title,
    }
    return {"layers": {name: list(modules) for name, modules in layers.items()}, "imported": imported}


def summary(imported: Mapping[str, Any]) -> str:
    """One line about an imported checkpoint."""
    linears = ", ".join(f"{number} linear layers in {title}" for title, number in imported["linears"].items())
    return f"quantized by {imported['tool']}, taken over as it is: {linears}; {imported['kv_cache']}"
