"""The dtypes of safetensors files as torch's, and their tensors. Imports torch."""

from __future__ import annotations

import torch
from torch import Tensor

from builder.core.safetensors_io import Tensors, read_into

DTYPES = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "BOOL": torch.bool,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}


def read(stored: Tensors, name: str) -> Tensor:
    """A tensor of a file, in memory of its own. IntegrityError if the file has become shorter."""
    info = stored[name]
    made = torch.empty(info.shape, dtype=DTYPES[info.dtype])
    if info.nbytes:
        read_into(stored.place(name), made.reshape(-1).view(torch.uint8).numpy().data)
    return made
