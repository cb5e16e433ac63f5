"""Hidden states of the calibration rows on their way from one decoder layer to the next, and what a killed run leaves.

States are in memory, or in a file where they are large. Results of each finished layer are a line of a JSONL file, and
the states after it are saved beside it from time to time, so that the next run with the same ingredients, whose key
names both files, continues there. A states file counts only with a line that has its checksum. Imports torch.
"""

from __future__ import annotations

import errno
import json
import os
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from builder.core.atomic import replace_file
from builder.core.errors import BuilderError
from builder.core.safetensors_io import NewTensor, Tensors, byte_size, read_metadata, write
from builder.core.worker import emit
from builder.formats.arithmetic.dtypes import DTYPES, read
from builder.machine.host_memory import host_memory

PRELUDE = -1  # the number of what comes before the first layer
# A save may take one part of this many of the time since the last one.
SAVE_SHARE = 20
# States on disk, if they would take more than this share of the memory that is available.
MEMORY_SHARE = 0.25
_NAMES = {kind: name for name, kind in DTYPES.items()}

Result = Mapping[str, Any]  # JSON values: what calibration found in one layer


class CarriedStates:
    """The states of all batches after the layers so far.

    path: where partial results go, without suffix: `.jsonl` and `.safetensors` are added. home: where states in memory
    are. on_disk: whether they are in the file instead.
    """

    def __init__(self, path: Path, home: torch.device, *, on_disk: bool = False) -> None:
        self.home, self.on_disk = home, on_disk
        self._lines, self._states = path.with_suffix(".jsonl"), path.with_suffix(".safetensors")
        self._written = path.with_name(f".{self._states.name}.{os.getpid()}.tmp")
        self._memory: list[Tensor] = []
        self._stored: Tensors | None = None
        self._crc: int | None = None
        self._saved_at, self._save_took, self._saves = time.monotonic(), 0.0, True

    def resume(
        self,
        shapes: Sequence[tuple[int, ...]],
        dtype: torch.dtype,
        accept: Callable[[Sequence[Result]], bool] = lambda results: True,
    ) -> list[Result]:
        """The results of a killed run, PRELUDE's first, and its states; [] if there is nothing to continue with.

        shapes: of the states of each batch. accept: whether results can be continued from.
        """
        self._path().mkdir(parents=True, exist_ok=True)
        for stale in self._path().glob(f".{self._states.name}.*.tmp"):
            stale.unlink(missing_ok=True)
        found = _read_lines(self._lines)
        try:
            layer = int(read_metadata(self._states)["layer"])
            stored = Tensors(self._path(), [self._states])
            headers = [(_NAMES[dtype], tuple(shape)) for shape in shapes]
            whole = [(info.dtype, info.shape) for _, info in sorted(stored.items())] == headers
            if not whole or found[layer - PRELUDE]["crc"] != _checksum(stored):
                raise ValueError("other states")
            if not accept([one["result"] for one in found[: layer - PRELUDE + 1]]):
                raise ValueError("other results")
        except (OSError, BuilderError, ValueError, KeyError, IndexError):
            self._states.unlink(missing_ok=True)
            self._lines.unlink(missing_ok=True)
            return []
        kept = found[: layer - PRELUDE + 1]
        replace_file(self._lines, "".join(json.dumps(one) + "\n" for one in kept))
        self._stored = stored
        if not self.on_disk:
            self._memory = [self.get(number) for number in range(len(shapes))]
        return [one["result"] for one in kept]

    def get(self, number: int) -> Tensor:
        """The state of a batch."""
        if self._stored is None or number < len(self._memory):
            return self._memory[number]
        name = _name(number)
        return read(self._stored, name).to(self.home)

    def step(self, layer: int, headers: Sequence[tuple[str, tuple[int, ...]]], make: Callable[[int], Tensor]) -> None:
        """Replaces each state by what `make` returns for the batch's number. headers: (dtype, shape) of each."""
        if self.on_disk:
            self._write(layer, headers, make)
            return
        made = len(self._memory)
        for number in range(len(headers)):
            state = make(number).to(self.home)
            if number < made:
                self._memory[number] = state
            else:
                self._memory.append(state)

    def record(self, layer: int, result: Result) -> None:
        """Stores a finished layer's result, and its states if it is time."""
        started = time.monotonic()
        due = layer > PRELUDE and self._saves and started - self._saved_at >= SAVE_SHARE * self._save_took
        if due and not self.on_disk:
            self._save(layer)
            self._saved_at, self._save_took = time.monotonic(), time.monotonic() - started
        line = {"layer": layer, "result": result, **({} if self._crc is None else {"crc": self._crc})}
        try:
            with open(self._lines, "ab") as file:
                file.write((json.dumps(line) + "\n").encode())
        except OSError:  # a line that is missing or cut short ends what can be continued
            if self.on_disk:
                raise
        if self._crc is not None:
            self._written.replace(self._states)
            self._stored = Tensors(self._path(), [self._states]) if self.on_disk else None
            self._crc = None

    def to_host(self) -> bool:
        """Moves the states from a device to the host's memory. False if they are there or in a file."""
        if self.on_disk or self.home == torch.device("cpu"):
            return False
        self.home = torch.device("cpu")
        self._memory = [state.to(self.home) for state in self._memory]
        return True

    def _save(self, layer: int) -> None:
        """Saves the states in memory. A full disk only costs the possibility to resume."""
        headers = [(_NAMES[state.dtype], tuple(state.shape)) for state in self._memory]
        try:
            self._write(layer, headers, self._memory.__getitem__)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._saves, self._crc = False, None
            emit(info=f"no space to save partial results in {self._path()}: a killed run would start again")

    def _write(self, layer: int, headers: Sequence[tuple[str, tuple[int, ...]]], make: Callable[[int], Tensor]) -> None:
        crc = 0

        def chunks(number: int) -> Iterator[memoryview]:
            nonlocal crc
            data = make(number).detach().cpu().contiguous().view(torch.uint8).numpy().data.cast("B")
            crc = zlib.crc32(data, crc)
            yield data

        tensors = [NewTensor(_name(n), kind, shape, chunks(n)) for n, (kind, shape) in enumerate(headers)]
        write(self._written, tensors, {"layer": str(layer)})
        self._crc = crc

    def _path(self) -> Path:
        return self._lines.parent


def on_disk(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> bool:
    """Whether states of these shapes are too large for the memory that is available."""
    nbytes = sum(byte_size(_NAMES[dtype], shape) for shape in shapes)
    return nbytes > MEMORY_SHARE * host_memory().available


def header(state: Tensor) -> tuple[str, tuple[int, ...]]:
    """(dtype, shape) of a state, for `step`."""
    return _NAMES[state.dtype], tuple(state.shape)


def _name(number: int) -> str:
    return f"{number:06}"  # files hold tensors of one type in the order of their names


def _checksum(stored: Tensors) -> int:
    crc = 0
    for name in sorted(stored):
        for part in stored.chunks(name):
            crc = zlib.crc32(part, crc)
    return crc


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of layers without a gap from PRELUDE on; a line that a kill cut short ends them."""
    found: list[dict[str, Any]] = []
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return found
    for line in lines:
        try:
            one = json.loads(line)
            if one["layer"] != PRELUDE + len(found) or not isinstance(one["result"], dict):
                break
        except (ValueError, KeyError, TypeError):
            break
        found.append(one)
    return found
