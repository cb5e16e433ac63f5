"""Writes the tensors of a checkpoint as one safetensors file, or as several with an index, as transformers reads it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from builder.core.safetensors_io import NewTensor, byte_size, write
from builder.model.files import INDEX, WEIGHTS

SHARD_BYTES = 5_000_000_000


def write_shards(
    directory: Path,
    tensors: Sequence[NewTensor],
    shard_bytes: int = SHARD_BYTES,
    notes: Mapping[str, Mapping[str, Any]] | None = None,
    done: Callable[[int], None] = lambda nbytes: None,
    stem: str = "model",
) -> list[Path]:
    """Writes the tensors, in their order, to files of at most `shard_bytes` (or of one larger tensor).

    notes: {key: {tensor: anything}} for the headers' `__metadata__`: each file gets the entries of its own tensors, as
    JSON. done: called with the bytes of each tensor after it was written. stem: of the files' names; with another one
    than transformers looks for, a single file has an index too. The files follow the umask.
    """
    groups = _groups(tensors, shard_bytes)
    names = [f"{stem}-{n + 1:05d}-of-{len(groups):05d}.safetensors" for n in range(len(groups))]
    names = [f"{stem}.safetensors"] if len(groups) == 1 else names
    for name, group in zip(names, groups, strict=True):
        write(directory / name, [_counted(tensor, done) for tensor in group], _metadata(group, notes or {}))
    if names != [WEIGHTS]:
        weight_map = {t.name: name for name, group in zip(names, groups, strict=True) for t in group}
        total = sum(byte_size(t.dtype, t.shape) for t in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [directory / name for name in names]


def _groups(tensors: Sequence[NewTensor], shard_bytes: int) -> list[list[NewTensor]]:
    groups: list[list[NewTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        nbytes = byte_size(tensor.dtype, tensor.shape)
        if groups[-1] and filled + nbytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += nbytes
    return groups


def _metadata(group: Sequence[NewTensor], notes: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    own = {key: {t.name: entries[t.name] for t in group if t.name in entries} for key, entries in notes.items()}
    return {"format": "pt", **{key: json.dumps(found, sort_keys=True) for key, found in own.items() if found}}


def _counted(tensor: NewTensor, done: Callable[[int], None]) -> NewTensor:
    def chunks() -> Any:
        yield from tensor.chunks
        done(byte_size(tensor.dtype, tensor.shape))

    return NewTensor(tensor.name, tensor.dtype, tensor.shape, chunks())
