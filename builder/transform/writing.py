"""Writes a rotated model: a directory with config.json, safetensors and the other files of the model it is made from.

Tensors are read and written one at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from builder.checkpoint.layouts import write_json
from builder.checkpoint.shards import SHARD_BYTES, write_shards
from builder.core.output import BYTES, Output
from builder.core.safetensors_io import byte_size
from builder.model.files import CONFIG, INDEX, parse_config
from builder.model.loading import check_tied
from builder.model.source_tensors import open_tensors
from builder.transform import spinquant
from builder.transform.folding import Folding
from builder.transform.rotations import Rotations


def write(
    source: Path,
    names: Iterable[str],
    rotations: Rotations,
    destination: Path,
    out: Output,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Writes the model in `source`, rotated, into the existing directory `destination`. Returns facts for the manifest.

    names: the model's files. UnsupportedError if it can't be rotated, IntegrityError for weights that hold NaN or Inf,
    or for a head that config.json ties to the embedding and that differs from it."""
    config = parse_config((source / CONFIG).read_bytes(), str(source))
    check_tied(config, source)
    tensors = open_tensors(source)
    headers = {name: (info.dtype, info.shape) for name, info in tensors.items()}
    folds = spinquant.plan(config, headers, rotations.names, str(source))
    for name, title in rotations.titles.items():
        out.info(f"{name.upper()}: {title}")
    folding = Folding(tensors, rotations)
    total = sum(byte_size(fold.dtype, fold.shape) for fold in folds)
    with out.progress("rotating", total, BYTES) as bar:
        made = [folding.tensor(fold) for fold in folds]
        files = write_shards(destination, made, shard_bytes, done=_counter(bar.update))
    for name in names:
        if not name.endswith(".safetensors") and name not in (CONFIG, INDEX):
            (destination / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, destination / name)
    write_json(destination / CONFIG, spinquant.config(config, rotations.names))
    return {
        "rotations": rotations.titles,
        "untied": bool(config.get("tie_word_embeddings")) and not spinquant.tied(config, rotations.names),
        "tensors": {"changed": sum(not fold.unchanged for fold in folds), "all": len(folds)},
        "shards": len(files),
    }


def _counter(update: Callable[[int], object]) -> Callable[[int], None]:
    """A function that adds bytes to a progress bar."""
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        update(done)

    return count
