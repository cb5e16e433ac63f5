"""The weights of a source model as raw bits, read from its files piece by piece, and rounded to other float types."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from builder.architectures.written import Header, Part
from builder.core.errors import IntegrityError
from builder.core.safetensors_io import FileRange, TensorInfo, Tensors, byte_size, read_into
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


class WeightReader:
    """Reads the source's weights, each thread into a buffer of its own that it uses again.

    The files are not mapped: one that is cut while it is mapped ends the process with SIGBUS.
    """

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors
        self._own = threading.local()

    def rows(self, part: Part, begin: int = 0, end: int | None = None) -> Array:
        """The raw bits of a matrix's rows [begin, end), until the same thread reads again. IntegrityError if the file
        has become shorter."""
        info, size = self._tensors[part.source], itemsize(self._tensors[part.source].dtype)
        width = part.shape[-1] if part.shape else 1
        count = (math.prod(part.shape[:-1]) if end is None else end) - begin
        start = info.begin + (part.start + begin * width) * size
        nbytes = count * width * size
        buffer = self._buffer(nbytes)[:nbytes]
        read_into(FileRange(self._tensors.place(part.source).path, start, start + nbytes), buffer)
        return np.frombuffer(buffer, f"<u{size}").reshape(count, width)

    def _buffer(self, nbytes: int) -> memoryview:
        """This thread's buffer, of at least so many bytes."""
        held: memoryview | None = getattr(self._own, "buffer", None)
        if held is None or len(held) < nbytes:
            self._own.buffer = held = memoryview(np.empty(nbytes, np.uint8))  # type: ignore[arg-type]
        return held


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
