"""What `packing` hands to `native` and `plain`."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]

# Raw bits of each safetensors dtype.
BITS: dict[str, np.dtype[Any]] = {"BF16": np.dtype("<u2"), "F16": np.dtype("<u2"), "F32": np.dtype("<u4")}


class Weights(NamedTuple):
    """Raw bits [rows, inputs] of a dtype, to be rounded to another first; None where they have the type already."""

    bits: Array
    dtype: str
    rounded_to: str | None
