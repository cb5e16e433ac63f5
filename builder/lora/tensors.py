"""Adapters as the inputs `lora_weights` and `lora_config` of TensorRT-LLM's C++ backend.

Each layer is a row. Of lora_config: the kind of layer, the layer, the rank. Of lora_weights: lora_A row by row, then
lora_B times its scale row by row, then zeros up to the longest row. The values are in the engine's dtype
(tensorrt_llm/runtime/loraUtils.cpp@2a9abd95, loraValidateRequestTensors), and computed as
examples/hf_lora_convert.py@05316d33 does: the product is rounded to the adapter's own dtype first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.core.errors import IntegrityError, UnsupportedError
from builder.core.output import size
from builder.core.safetensors_io import NewTensor, Tensors
from builder.core.safetensors_io import write as write_tensors
from builder.lora.adapter import Adapter, Pair
from builder.lora.modules import BY_HF

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}  # of an engine: of the file
LARGEST = (1 << 31) - (1 << 24)  # bytes of a message that Triton takes (gRPC's limit), with room for the prompt
TASK_BITS = 52  # JSON's numbers are exact up to 53 bits


def width(adapter: Adapter) -> int:
    """The number of values in each row."""
    return max(_values(adapter.tensors, pair) for pair in adapter.pairs.values())


def nbytes(adapter: Adapter, itemsize: int = 2) -> int:
    """The size of lora_weights."""
    return len(adapter.pairs) * width(adapter) * itemsize


def check_size(adapter: Adapter) -> None:
    """UnsupportedError for one that is too large for a request to Triton."""
    if nbytes(adapter) > LARGEST:
        raise UnsupportedError(
            f"The adapter {adapter.name} takes {size(nbytes(adapter))} as an input, and Triton takes requests of up to "
            "2 GiB (gRPC's limit).",
            hint="Use an adapter of a smaller rank or of fewer layers, or --target llmapi.",
        )


def task_id(digest: str, dtype: str) -> int:
    """The number by which the backend knows an adapter. It follows from the content, so that a cache that still has
    another adapter, or a client's own with a small number, is never taken for this one."""
    found = hashlib.sha256(f"{digest} {dtype}".encode()).digest()
    return int.from_bytes(found[:8], "big") % (1 << TASK_BITS) or 1


def write(adapter: Adapter, dtype: str, path: Path) -> None:
    """Writes both tensors into a safetensors file, row by row. `dtype`: the engine's.

    IntegrityError for values that are not finite, also in this dtype.
    """
    rows, longest = len(adapter.pairs), width(adapter)
    kind = DTYPES[dtype]

    def weights() -> Iterator[bytes]:
        for (layer, name), pair in adapter.pairs.items():
            row = _row(adapter, pair, kind, f"{name} of layer {layer}")
            yield row + bytes(longest * _itemsize(kind) - len(row))

    config = b"".join(
        number.to_bytes(4, "little")
        for (layer, name), pair in adapter.pairs.items()
        for number in (BY_HF[name].id, layer, pair.rank)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(
        path,
        [
            NewTensor("lora_weights", kind, (rows, longest), weights()),
            NewTensor("lora_config", "I32", (rows, 3), [config]),
        ],
    )


def _values(tensors: Tensors, pair: Pair) -> int:
    return pair.rank * (tensors[pair.a].shape[1] + tensors[pair.b].shape[0])


def _itemsize(kind: str) -> int:
    return 4 if kind == "F32" else 2


def _row(adapter: Adapter, pair: Pair, kind: str, where: str) -> bytes:
    import numpy as np

    one, other = (_read(adapter.tensors, name) for name in (pair.a, pair.b))
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = _rounded(other * np.float32(pair.scale), adapter.tensors[pair.b].dtype)
        for values in (one, scaled):
            if not np.isfinite(_rounded(values, kind)).all():
                raise IntegrityError(
                    f"The adapter {adapter.name} has values in {where} that are NaN, infinite or beyond {kind}.",
                    hint="Save or download the adapter again, or train it with a smaller learning rate.",
                )
        return _bytes(one, kind) + _bytes(scaled, kind)


def _read(tensors: Tensors, name: str) -> Array:
    """The values of a tensor as float32, flat."""
    import numpy as np

    raw, dtype = tensors.read(name), tensors[name].dtype
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw, "<f2" if dtype == "F16" else "<f4").astype(np.float32)


def _rounded(values: Array, kind: str) -> Array:
    """The values as float32, rounded to what this dtype can hold."""
    import numpy as np

    if kind == "BF16":
        return (_bfloat16(values).astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float16).astype(np.float32) if kind == "F16" else values


def _bytes(values: Array, kind: str) -> bytes:
    if kind == "BF16":
        return _bfloat16(values).tobytes()
    return values.astype("<f2" if kind == "F16" else "<f4").tobytes()


def _bfloat16(values: Array) -> Array:
    """The upper halves of float32, rounded to the nearest, ties to even. NaN stays NaN."""
    import numpy as np

    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype("<u2")
