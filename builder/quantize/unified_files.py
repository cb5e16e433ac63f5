"""The safetensors files of a unified layout, created at their final size and filled in any order."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from builder.core.safetensors_io import FileRange, TensorInfo, Tensors, arrange, byte_size, copy_range, write_at
from builder.model.files import INDEX, WEIGHTS
from builder.quantize.unified_plan import UnifiedPlan


class UnifiedFiles:
    """The open safetensors files of the layout, and where each tensor lies in them."""

    def __init__(self, places: Mapping[str, tuple[int, TensorInfo]]) -> None:
        self._places = places

    def write(self, name: str, data: np.ndarray[Any, Any] | bytes, at: int = 0) -> None:
        """Writes bytes of a tensor, from its byte number `at` on."""
        descriptor, info = self._places[name]
        write_at(descriptor, memoryview(data).cast("B"), info.begin + at)  # type: ignore[arg-type]

    def copy(self, name: str, place: FileRange, at: int = 0) -> None:
        """Copies a range of another file into a tensor, from its byte number `at` on."""
        descriptor, info = self._places[name]
        copy_range(place, descriptor, info.begin + at)

    def nbytes(self, name: str) -> int:
        """A tensor's size in bytes."""
        return self._places[name][1].nbytes

    def numbers(self, scales: Mapping[str, float]) -> None:
        """Writes F32 numbers."""
        for name, scale in scales.items():
            self.write(name, struct.pack("<f", scale))


def renumber(unified: Path, scales: Mapping[str, float]) -> None:
    """Writes F32 numbers into the files of a layout that holds others."""
    stored = Tensors(unified)
    with ExitStack() as opened:
        files = {path: os.open(path, os.O_WRONLY) for path in stored.files}
        for descriptor in files.values():
            opened.callback(os.close, descriptor)
        UnifiedFiles({name: (files[stored.place(name).path], stored[name]) for name in scales}).numbers(scales)


@contextmanager
def created(unified: Path, made: UnifiedPlan, shard_bytes: int) -> Iterator[UnifiedFiles]:
    """Creates the files, with their headers, and the index if there are several. A failure in the block, or before it,
    removes them."""
    shards = made.shards(shard_bytes)
    names = [f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))]
    names = [WEIGHTS] if len(shards) == 1 else names
    places: dict[str, tuple[int, TensorInfo]] = {}
    with ExitStack() as opened:
        try:
            for name, tensors in zip(names, shards, strict=True):
                arranged = arrange(((n, *header) for n, header in tensors.items()), {"format": "pt"})
                descriptor = os.open(unified / name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
                opened.callback(os.close, descriptor)
                os.truncate(descriptor, arranged.size)
                write_at(descriptor, arranged.head, 0)
                places.update((tensor, (descriptor, info)) for tensor, info in arranged.infos.items())
            yield UnifiedFiles(places)
        except BaseException:
            for name in names:
                (unified / name).unlink(missing_ok=True)
            raise
    if len(shards) > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(byte_size(*header) for shard in shards for header in shard.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (unified / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
