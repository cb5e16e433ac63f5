"""Checkpoint -> a pseudo-quantized model beside it (--save-pseudo), or of any directory (`builder convert`)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.checkpoint import conversion, quantized_source
from builder.checkpoint.description import Description, describe_directory
from builder.checkpoint.layouts import Checkpoint
from builder.core.errors import UsageError
from builder.core.output import BYTES, Output, size
from builder.core.safetensors_io import byte_size
from builder.core.store import Artifact, Store, library_versions, sources_digest
from builder.quantize import pseudo_names

if TYPE_CHECKING:
    from builder.quantize.pseudo import Written

DIRECTORY = "pseudo"  # in the stage's own
SOURCES = (
    "builder/architectures",
    "builder/checkpoint",
    "builder/core/safetensors_io.py",
    "builder/formats",
    "builder/model",
    "builder/quantize/pseudo.py",
    "builder/quantize/pseudo_names.py",
    "builder/quantize/pseudo_stage.py",
    "builder/quantize/stored_model.py",
    "builder/tokenizer",
)


def save_pseudo(checkpoint: Checkpoint, dtype: str | None, *, algorithm: str, store: Store) -> Artifact | None:
    """Writes `pseudo/` of a checkpoint in this type, bf16 or fp16; None if no type is given."""
    if dtype is None:
        return None
    ingredients = {
        "checkpoint": checkpoint.digest,
        "pseudo": dtype,
        "algorithm": algorithm,
        "libraries": library_versions("torch"),
        "sources": sources_digest(*SOURCES),
    }

    def make(tmp: Path) -> dict[str, Any]:
        directory = tmp / DIRECTORY
        directory.mkdir()
        made = _write(checkpoint.unified, directory, dtype, store.out, algorithm)
        store.out.info(f"pseudo-quantized model: {size(made.nbytes)} in {dtype.upper()}, an ordinary model")
        return {"files": made.files, "nbytes": made.nbytes, "inexact": made.inexact}

    return store.stage("layouts", ingredients, make)


def convert_to_pseudo(
    source: Path, destination: Path, dtype: str, options: conversion.Options, out: Output
) -> Mapping[str, Any]:
    """The same of a checkpoint in any layout, in a directory that must not exist. Returns facts of what was written.

    Raises what `conversion.convert` raises, and UnsupportedError for formats that have no such model.
    """
    if os.path.lexists(destination):
        raise UsageError(f"{destination} exists.", hint="Name a new directory, or remove this one first.")
    found = describe_directory(source)
    quantized_source.check(found, str(source))
    pseudo_names.check_formats(found.layers.values())
    with conversion.new_directory(destination, _nbytes(found)) as new:
        unified = source
        if found.layout != "unified":
            unified = new / ".unified"
            unified.mkdir()
            conversion.write(source, unified, "unified", options, found)
        made = _write(unified, new, dtype, out, None, options.shard_bytes)
        if unified != source:
            conversion.remove(unified)
    return {"layout": DIRECTORY, "files": made.files, "nbytes": made.nbytes, "inexact": made.inexact}


def _write(
    unified: Path, directory: Path, dtype: str, out: Output, algorithm: str | None, largest: int | None = None
) -> Written:
    from builder.quantize.pseudo import write_pseudo  # torch: only where weights are dequantized

    done = 0
    with out.progress("dequantizing", _nbytes(describe_directory(unified)), BYTES) as bar:

        def count(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            bar.update(done)

        limit = largest or pseudo_names.LARGEST_FILE
        made = write_pseudo(unified, directory, dtype, algorithm=algorithm, largest=limit, done=count)
    if made.inexact:
        out.warn(
            f"FP16 can't tell all codes of {len(made.inexact)} layers apart, whose scales are tiny: quantizing them "
            "again may give others; BF16 holds all of them"
        )
    return made


def _nbytes(found: Description) -> int:
    """Bytes of the model with weights in 16 bits."""
    quantized = {module: one for module, one in found.layers.items() if one.quant_algo is not None}
    leaf = "weight_packed" if found.layout == "compressed_tensors" else "weight"
    total = 0
    for name, info in found.headers.items():
        module, _, last = name.rpartition(".")
        one = quantized.get(module)
        if one is None:
            total += info.nbytes
        elif last in ("weight", leaf):
            total += byte_size("BF16", one.weight.weight_shape(info.shape))
    return total
