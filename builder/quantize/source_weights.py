"""The weights of a source model as raw bits, mapped from its files piece by piece, and rounded to other float types."""

from __future__ import annotations

import math
import mmap
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from builder.architectures.written import Header, Part
from builder.core.errors import IntegrityError
from builder.core.safetensors_io import TensorInfo, Tensors, byte_size, shortened
from builder.model import dtypes
from builder.model.files import CONFIG, parse_config
from builder.model.source_tensors import open_tensors, own_names

NAMES = {"BF16": "bfloat16", "F16": "float16"}  # the types that models are served in

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class SourceModel:
    """A model to write from: its directory, config.json (of a multimodal model that of its language model), and tensors
    under the model's own names."""

    directory: Path
    config: Mapping[str, Any]
    tensors: Tensors

    @classmethod
    def open(cls, directory: Path) -> SourceModel:
        """Reads config.json and the headers. Raises what `parse_config` and `open_tensors` raise."""
        return cls(directory, parse_config((directory / CONFIG).read_bytes(), str(directory)), open_tensors(directory))

    @classmethod
    def expected(cls, directory: Path, files: Mapping[str, Mapping[str, TensorInfo]]) -> SourceModel:
        """A model whose files of weights are not all in the directory yet: {file: {tensor: its place}}.

        IntegrityError for a tensor in two files."""
        names = [name for infos in files.values() for name in infos]
        if len(set(names)) < len(names):
            raise IntegrityError("A tensor is in two files.")
        config = parse_config((directory / CONFIG).read_bytes(), str(directory))
        return cls(directory, config, own_names(Tensors.of({directory / n: i for n, i in files.items()}), config))

    @property
    def headers(self) -> dict[str, Header]:
        """{tensor: (dtype, shape)}."""
        return {name: (info.dtype, info.shape) for name, info in self.tensors.items()}

    @property
    def dtype(self) -> str:
        """The type that the model is served in, BF16 or F16."""
        served = dtypes.served(dtypes.with_type(self.config, self.headers))
        return next(dtype for dtype, name in NAMES.items() if name == served)


class MappedWeights:
    """The source's files, mapped read-only. Pages are dropped by those who know that they are done with them."""

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors
        self._maps: dict[Path, mmap.mmap] = {}
        self._lock = threading.Lock()

    def rows(self, part: Part, begin: int = 0, end: int | None = None) -> Array:
        """The raw bits of a matrix's rows [begin, end)."""
        info, size = self._tensors[part.source], itemsize(self._tensors[part.source].dtype)
        width = part.shape[-1] if part.shape else 1
        count = math.prod(part.shape[:-1]) if end is None else end
        start = info.begin + (part.start + begin * width) * size
        bits = np.frombuffer(self._map(part), f"<u{size}", (count - begin) * width, start)
        return bits.reshape(count - begin, width)

    def release(self, part: Part, begin: int = 0, end: int | None = None) -> None:
        """Drops the pages of these rows from this process."""
        info, size = self._tensors[part.source], itemsize(self._tensors[part.source].dtype)
        width = part.shape[-1] if part.shape else 1
        count = math.prod(part.shape[:-1]) if end is None else end
        first = info.begin + (part.start + begin * width) * size
        start = first // mmap.PAGESIZE * mmap.PAGESIZE
        self._map(part).madvise(mmap.MADV_DONTNEED, start, first + (count - begin) * width * size - start)

    def _map(self, part: Part) -> mmap.mmap:
        """The mapped file of a tensor. IntegrityError if it has become shorter."""
        place = self._tensors.place(part.source)
        with self._lock:
            if place.path not in self._maps:
                with open(place.path, "rb") as file:
                    if os.fstat(file.fileno()).st_size < place.end:
                        raise shortened(place.path)
                    self._maps[place.path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            mapped = self._maps[place.path]
        if len(mapped) < place.end:
            raise shortened(place.path)
        return mapped


def itemsize(dtype: str) -> int:
    """Bytes of a value."""
    return byte_size(dtype, (1,))


def rounded(bits: Array, dtype: str, to: str) -> Array:
    """Raw bits of floats, BF16, F16 or F32, as raw bits of another type: rounded to nearest, ties to even."""
    values = _as_float32(bits, dtype)
    if to == "F32":
        return values
    if to == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16)
    raw = values.view(np.uint32)
    even = (raw + 0x7FFF + ((raw >> 16) & 1)) >> 16
    return np.where(np.isnan(values), (raw >> 16) | 0x40, even).astype(np.uint16)


def _as_float32(bits: Array, dtype: str) -> Array:
    if dtype == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(np.float16).astype(np.float32) if dtype == "F16" else bits.view(np.float32)
