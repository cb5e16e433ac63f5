"""The values of a rotated model's tensors: computed in float64 from the model's files, a block at a time, and rounded
once to the dtype of the tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from builder.architectures.written import Part
from builder.core.errors import IntegrityError
from builder.core.safetensors_io import Buffer, FileRange, NewTensor, TensorInfo, Tensors
from builder.quantize.source_weights import WeightReader, itemsize, rounded
from builder.transform.rotation import Rotation
from builder.transform.rotations import Rotations
from builder.transform.spinquant import Fold

Array = np.ndarray[Any, Any]
BLOCK = 1 << 21  # values in a block: 16 MB in float64, a few of which exist at once


class Folding:
    """Makes the tensors of a plan (spinquant.plan)."""

    def __init__(self, tensors: Tensors, rotations: Rotations) -> None:
        self._tensors, self._rotations = tensors, rotations
        self._reader = WeightReader(tensors)
        self._gains: Mapping[str, Array] = {}

    def tensor(self, fold: Fold) -> NewTensor:
        """A tensor to write. Nothing is computed before it is written."""
        return NewTensor(fold.name, fold.dtype, fold.shape, self._chunks(fold))

    def _chunks(self, fold: Fold) -> Iterator[Buffer | FileRange]:
        if fold.unchanged:
            yield self._tensors.place(fold.source)
        elif fold.ones:
            yield self._round(np.ones(fold.shape), fold)
        elif len(fold.shape) == 1 or fold.writes:
            yield self._round(self._bias(fold), fold) if len(fold.shape) == 1 else self._columns(fold)
        else:
            yield from self._rows(fold)

    def _bias(self, fold: Fold) -> Array:
        """A bias is added to what the layer's rows give, so it is rotated as they are."""
        values = self._read(fold, 0, None)[0]
        if fold.values is not None:
            rotation = self._rotations.values(fold.values)
            values = _by_heads(values[None], rotation)[0]
        return self._residual.rotate(values) if fold.writes else values

    def _rows(self, fold: Fold) -> Iterator[Buffer]:
        """W diag(g) R1, some rows at a time; of the values by whole heads, each R2^T times that. Without R1 also W R2
        of the attention's output."""
        rotation = None if fold.values is None else self._rotations.values(fold.values)
        unit = 1 if rotation is None else len(rotation.signs)
        step = max(1, BLOCK // fold.shape[1] // unit) * unit
        for begin in range(0, fold.shape[0], step):
            end = min(begin + step, fold.shape[0])
            block = self._read(fold, begin, end)
            if fold.output is not None:
                block = _by_heads(block, self._rotations.values(fold.output))
            if fold.gain is not None:
                block *= self._gain(fold.gain)
            if fold.reads:
                block = self._residual.rotate(block)
            if rotation is not None:
                heads = block.reshape(-1, unit, fold.shape[1])
                block = rotation.rotate(heads.swapaxes(1, 2)).swapaxes(1, 2).reshape(block.shape)
            yield self._round(block, fold)

    def _columns(self, fold: Fold) -> Buffer:
        """R1^T W, some columns at a time, of the attention's output with R2 to the right of each head. Both tensors are
        held in their own dtype, because rows are read and written, and each depends on all others."""
        rotation = None if fold.output is None else self._rotations.values(fold.output)
        unit = 1 if rotation is None else len(rotation.signs)
        step = max(1, BLOCK // fold.shape[0] // unit) * unit
        bits = self._reader.rows(_part(fold))
        made = np.empty(fold.shape, f"<u{itemsize(fold.dtype)}")
        for begin in range(0, fold.shape[1], step):
            end = min(begin + step, fold.shape[1])
            block = _widened(bits[:, begin:end], fold.dtype)
            if rotation is not None:
                block = _by_heads(block, rotation)
            turned = self._residual.rotate(np.ascontiguousarray(block.T)).T
            made[:, begin:end] = np.frombuffer(self._round(turned, fold), made.dtype).reshape(turned.shape)
        return _bytes(made)

    @property
    def _residual(self) -> Rotation:
        assert self._rotations.residual is not None
        return self._rotations.residual

    def _gain(self, name: str) -> Array:
        """The weights of a norm, of which the last is kept: several layers read one norm."""
        if name not in self._gains:
            info: TensorInfo = self._tensors[name]
            self._gains = {name: self._read(Fold(name, name, info.dtype, info.shape), 0, None)[0]}
        return self._gains[name]

    def _read(self, fold: Fold, begin: int, end: int | None) -> Array:
        return _widened(self._reader.rows(_part(fold), begin, end), fold.dtype)

    def _round(self, values: Array, fold: Fold) -> Buffer:
        """The bytes of values in the tensor's dtype. IntegrityError for values that it can't hold."""
        with np.errstate(over="ignore"):
            single = np.ascontiguousarray(values, dtype=np.float32)
        bits = rounded(single, "F32", fold.dtype)
        if not np.isfinite(rounded(bits, fold.dtype, "F32") if fold.dtype != "F32" else single).all():
            raise self._not_finite(values, fold)
        return _bytes(bits)

    def _not_finite(self, values: Array, fold: Fold) -> IntegrityError:
        """Why rotated values are not finite in the tensor's dtype: a damaged tensor of the model, or too large ones."""
        if np.isfinite(values).all():
            return IntegrityError(
                f"{fold.name} has values that {fold.dtype} can't hold once they are rotated.",
                why=f"The largest magnitude is {abs(values).max():.3g}: sums of many values, times the norm's weights.",
                hint="Leave --transform out, or save the model in BF16 first.",
            )
        damaged = fold.gain if fold.gain and not np.isfinite(self._gain(fold.gain)).all() else fold.source
        return IntegrityError(
            f"{damaged} holds NaN or Inf.",
            why=f"The rotated {fold.name} is made of it.",
            hint="Download the model again, or take another revision.",
        )


def _by_heads(rows: Array, rotation: Rotation) -> Array:
    """Rows whose columns are those of several heads, each times R2."""
    return rotation.rotate(rows.reshape(len(rows), -1, len(rotation.signs))).reshape(rows.shape)


def _bytes(bits: Array) -> Buffer:
    return memoryview(np.ascontiguousarray(bits).reshape(-1).view(np.uint8))  # type: ignore[arg-type]


def _part(fold: Fold) -> Part:
    return Part(fold.name, fold.dtype, fold.shape, fold.source)


def _widened(bits: Array, dtype: str) -> Array:
    return rounded(np.ascontiguousarray(bits), dtype, "F32").astype(np.float64)
