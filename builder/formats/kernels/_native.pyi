"""The C extension, native.c. `path` is one of `paths()`. Types are numbered: 0 BF16, 1 F16, 2 F32.

Arrays are contiguous. ValueError if their sizes do not match. Each function releases the GIL and runs in one thread.
"""

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

SOURCE: str  # the digest of the source that it was compiled from

def paths() -> list[str]: ...
def largest_rows(path: str, values: Array, type: int, rounded: int, rows: int, out: Array, /) -> None: ...
def pack_nvfp4(  # too many for six parameters: it is C
    path: str, values: Array, type: int, rounded: int, scale: float, searched: bool, codes: Array, scales: Array, /
) -> None: ...
def pack_fp8(path: str, values: Array, type: int, rounded: int, rows: int, scales: Array, codes: Array, /) -> None: ...
def pack_int8(
    path: str, values: Array, type: int, rounded: int, rows: int, scales: Array, sign: int, codes: Array, /
) -> None: ...
def unpack_nvfp4(path: str, codes: Array, scales: Array, scale: float, type: int, values: Array, /) -> None: ...
def unpack_fp8(path: str, codes: Array, rows: int, scales: Array, type: int, values: Array, /) -> None: ...
