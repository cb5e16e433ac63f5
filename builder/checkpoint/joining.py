"""Joins the rank files of a TensorRT-LLM layout to one model: the inverse of `sharding.split`, bit for bit.

Tensors are assembled in blocks of rows, so that no tensor is in memory whole unless it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from builder.checkpoint import sharding
from builder.checkpoint.sharding import LAYERS, Rows, Shard
from builder.core.errors import IntegrityError
from builder.core.safetensors_io import CHUNK_BYTES, FileRange, TensorInfo, Tensors, byte_size


class Joined:
    """The rank files of a directory as one model.

    IntegrityError if files are missing, or if ranks differ in what they must share.
    """

    def __init__(self, directory: Path, config: Mapping[str, Any]) -> None:
        self.config, self.parallel = config, sharding.parallel_of(config)
        self._ranks = [Tensors(directory, [file]) for file in sharding.rank_files(directory, config)]
        self._where: dict[str, tuple[int, str]] = {}  # whole name -> pipeline stage, name there
        for pp_rank in range(self.parallel.pp):
            first = self.parallel.layers(pp_rank, config["num_hidden_layers"])[0]
            for local in self._ranks[pp_rank * self.parallel.tp]:
                self._where[_global_name(local, first)] = pp_rank, local

    @property
    def names(self) -> list[str]:
        """The names of the whole model's tensors."""
        return list(self._where)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of the whole tensor, with offsets as in a file that holds nothing else."""
        pp_rank, local = self._where[name]
        part = self._ranks[pp_rank * self.parallel.tp][local]
        shape = sharding.whole_shape(name, part.shape, self.config, self.parallel.tp)
        return TensorInfo(part.dtype, shape, 0, byte_size(part.dtype, shape))

    def data(self, name: str) -> bytearray:
        """The bytes of the whole tensor."""
        whole = bytearray()
        for block in self._blocks(name, 0, _rows(self.info(name))):
            whole += block
        return whole

    def chunks(self, name: str, start: int = 0, end: int | None = None) -> Iterable[bytes | FileRange]:
        """The bytes of the rows [start, end) of dimension 0, to write: where they are in a file that holds them whole,
        else in blocks."""
        info = self.info(name)
        rows = _rows(info)
        end = rows if end is None else end
        if self.parallel.tp > 1:
            return self._blocks(name, start, end)
        pp_rank, local = self._where[name]
        place, width = self._ranks[pp_rank].place(local), info.nbytes // max(rows, 1)
        return [FileRange(place.path, place.begin + start * width, place.begin + end * width)]

    def _blocks(self, name: str, start: int, end: int) -> Iterator[bytes]:
        """The rows [start, end), in blocks of at most CHUNK_BYTES, or one row."""
        info = self.info(name)
        width = info.nbytes // max(_rows(info), 1)
        parts = self._parts(name, info)
        step = max(1, CHUNK_BYTES // max(width, 1))
        for at in range(start, end, step):
            block = np.empty((min(step, end - at), width), np.uint8)
            filled: set[tuple[int, int, int]] = set()
            for tensors, local, part in parts:
                _put(block, at, Rows.of(tensors, local), part, filled, name)
            yield block.tobytes()

    def _parts(self, name: str, info: TensorInfo) -> list[tuple[Tensors, str, Shard]]:
        """What each rank of the pipeline stage holds of a tensor. IntegrityError if one holds something else."""
        pp_rank, local = self._where[name]
        parts = []
        for tp_rank in range(self.parallel.tp):
            rank = pp_rank * self.parallel.tp + tp_rank
            part = sharding.shard(name, info.shape, self.config, self.parallel.tp, tp_rank)
            wanted = part.shape(info.shape) if info.shape else ()
            if local not in self._ranks[rank] or self._ranks[rank][local].shape != wanted:
                raise IntegrityError(f"rank{rank}.safetensors: {local} is missing or has the wrong shape.")
            parts.append((self._ranks[rank], local, part))
        return parts


def _rows(info: TensorInfo) -> int:
    return info.shape[0] if info.shape else 1


def _put(
    block: np.ndarray[Any, Any],
    first: int,
    held: Rows,
    part: Shard,
    filled: set[tuple[int, int, int]],
    name: str,
) -> None:
    """Copies a rank's rows into a block of the whole table that starts at row `first`. IntegrityError if rows that
    another rank holds too differ."""
    taken, at = sharding.columns(block.shape[1], part), 0
    for start, end in part.rows:
        low, high = max(start, first), min(end, first + len(block))
        if low < high:
            rows = held.read(at + low - start, at + high - start)
            place, key = block[low - first : high - first, taken], (start, end, taken.start)
            if key in filled and not np.array_equal(place, rows):
                raise IntegrityError(f"{name} differs between ranks that must hold the same part of it.")
            place[:] = rows
            filled.add(key)
        at += end - start


def _global_name(local: str, first: int) -> str:
    if not local.startswith(LAYERS):
        return local
    index, _, rest = local.removeprefix(LAYERS).partition(".")
    return f"{LAYERS}{int(index) + first}.{rest}"
