"""Snapshot -> Checkpoint of --format bf16: the model's own weights in the layouts that the targets load.

Nothing is calibrated, and ModelOpt does not run. The Hugging Face layout has no hf_quant_config.json, because
TensorRT-LLM's LLM class rejects one without a quant_algo ("Pre-quantized checkpoint must have quant_algo",
tensorrt_llm/llmapi/llm_utils.py). Tensors are streamed; one whose type is already the one to serve is copied.
Of a multimodal model the language model is written.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from builder.architectures import catalog, written
from builder.checkpoint import huggingface, layouts, validate
from builder.checkpoint.layouts import Checkpoint, read_json, write_json
from builder.core.safetensors_io import CHUNK_BYTES, FileRange, NewTensor, TensorInfo, Tensors, write
from builder.core.store import Store, sources_digest
from builder.hub.snapshot import Snapshot
from builder.model import dtypes, multimodal, tensor_names
from builder.model.source_tensors import open_tensors
from builder.quantize import modelopt

SOURCES = (*modelopt.SOURCES, "builder/quantize/unquantized.py", "builder/model/tensor_names.py")
_SAFETENSORS = {"bfloat16": "BF16", "float16": "F16"}


def write_checkpoint(snapshot: Snapshot, *, store: Store) -> Checkpoint:
    """Writes `unified/` and, where the architecture has one, `tensorrt_llm/`, in the dtype that the model is served in,
    but for tensors that the family keeps in float32.

    IntegrityError if the inspection finds an error. Such a checkpoint is not kept.
    """
    ingredients = {
        "snapshot": snapshot.digest,
        "architecture": catalog.ingredients(catalog.of(snapshot.config)),
        "format": "bf16",
        "sources": sources_digest(*SOURCES),
    }

    def make(tmp: Path) -> dict[str, Any]:
        unified = tmp / "unified"
        unified.mkdir()
        source = open_tensors(snapshot.path)
        dtype = _SAFETENSORS[dtypes.served(dtypes.with_type(snapshot.config, _headers(source)))]
        write(unified / "model.safetensors", list(_written(source, snapshot.config, dtype)), {"format": "pt"})
        for name in snapshot.files:
            if name.endswith(".json") and "safetensors" not in name:
                shutil.copyfile(snapshot.path / name, unified / name)
        named = next(name for name, kind in _SAFETENSORS.items() if kind == dtype)
        write_json(unified / "config.json", {**_config(snapshot), "dtype": named})
        huggingface.complete(unified, snapshot.path)
        lacking = layouts.write_if_served(unified, snapshot.config, tmp / "tensorrt_llm")
        snapshot.source.check_unchanged()
        if lacking is not None:
            store.out.warn(f"only the Hugging Face layout was written: {lacking}")
        found = validate.inspect(tmp, here=True)
        found.check()
        store.out.info(f"no layer is quantized; {len(source)} tensors in {named}")
        return {"layers": {}, "no_tensorrt_llm": lacking, "inspection": found.facts()}

    artifact = store.stage("checkpoint", ingredients, make)
    return Checkpoint(path=artifact.path, digest=artifact.digest, facts=artifact.facts)


def _headers(source: Tensors) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (info.dtype, info.shape) for name, info in source.items()}


def _config(snapshot: Snapshot) -> dict[str, Any]:
    """The model's own config.json; of a multimodal model, that of its language model."""
    if multimodal.MARK in snapshot.config:
        return multimodal.own_config(snapshot.config)
    return read_json(snapshot.path / "config.json")


def _written(source: Tensors, config: Mapping[str, Any], dtype: str) -> Iterator[NewTensor]:
    """The tensors that transformers would load and save, without an output layer that is tied to the embedding."""
    tied = {tensor_names.head(config)} if config.get("tie_word_embeddings") else set()
    architecture = catalog.of(config)
    for name, info in source.items():
        if name in tied or dtypes.NOT_WRITTEN.search(name) or not written.is_loaded(architecture, config, name):
            continue
        served = "F32" if written.in_float32(architecture, name) else dtype
        kind = served if info.dtype in dtypes.FLOATS else info.dtype
        chunks: list[FileRange] | Iterator[bytes] = [source.place(name)]
        yield NewTensor(name, kind, info.shape, chunks if kind == info.dtype else _converted(source, name, info, kind))


def _converted(source: Tensors, name: str, info: TensorInfo, dtype: str) -> Iterator[bytes]:
    """A tensor's bytes in another float type, rounded to nearest, ties to even."""
    data = np.frombuffer(source.data(name), np.float32 if info.dtype == "F32" else np.uint16)
    for start in range(0, len(data), CHUNK_BYTES // 4):
        yield _rounded(_as_float32(data[start : start + CHUNK_BYTES // 4], info.dtype), dtype)
    source.release(name)


def _as_float32(values: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.view(np.float16).astype(np.float32) if dtype == "F16" else values


def _rounded(values: np.ndarray[Any, Any], dtype: str) -> bytes:
    """float32 values as BF16, F16 or F32. A NaN stays one."""
    if dtype == "F32":
        return values.tobytes()
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).tobytes()
    bits = values.view(np.uint32)
    even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, even).astype(np.uint16).tobytes()
