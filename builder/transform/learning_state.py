"""Matrices in files: what a killed run of learning leaves, and its result. Imports torch."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from builder.core.errors import BuilderError
from builder.core.safetensors_io import NewTensor, Tensors, read_metadata, write
from builder.formats.arithmetic.dtypes import read

EVERY = 5.0  # seconds between saves


class State:
    """The matrices after the last saved step and the losses so far, in the file `path`."""

    def __init__(self, path: Path) -> None:
        self._path, self._saved_at = path, time.monotonic()

    def load(self, like: Mapping[str, Tensor]) -> tuple[int, dict[str, Tensor], list[float]] | None:
        """(steps done, matrices, losses) as they were saved, or None if there is no state of such matrices."""
        try:
            stored, stated = Tensors(self._path.parent, [self._path]), read_metadata(self._path)
            step, losses = int(stated["step"]), [float(loss) for loss in json.loads(stated["losses"])]
            found = {name: read(stored, name).to(one.device) for name, one in like.items()}
        except (BuilderError, OSError, ValueError, KeyError):
            return None
        return (step, found, losses) if all(found[name].shape == one.shape for name, one in like.items()) else None

    def save(self, step: int, matrices: Mapping[str, Tensor], losses: Sequence[float]) -> None:
        """Saves them, unless that was done a moment ago."""
        if time.monotonic() - self._saved_at >= EVERY:
            write_matrices(self._path, matrices, {"step": str(step), "losses": json.dumps(list(losses))})
            self._saved_at = time.monotonic()


def write_matrices(path: Path, matrices: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes matrices in float64; the file appears whole or not at all."""
    tensors = []
    for name, matrix in matrices.items():
        raw = matrix.detach().double().cpu().contiguous().view(torch.uint8).numpy()
        tensors.append(NewTensor(name, "F64", tuple(matrix.shape), [raw.data]))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    write(temporary, tensors, metadata)
    temporary.replace(path)
