"""An embedding that reads those rows of its weight that a batch needs, instead of all of them.

A batch of calibration rows has a few thousand different tokens, and the embedding of an 8B model is 1.2 GB. Imports
torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from builder.core.safetensors_io import FileRange, Tensors, read_into
from builder.formats.arithmetic.dtypes import DTYPES


@contextmanager
def by_rows(embedding: nn.Embedding, rows: Callable[[Sequence[int]], Tensor], device: torch.device) -> Iterator[None]:
    """While the block runs, an embedding without weights computes as one with them. rows: reads rows of its weight."""
    empty, padding = embedding._parameters["weight"], embedding.padding_idx
    assert empty is not None

    def set_weight(rows: Tensor) -> None:
        embedding._parameters["weight"] = nn.Parameter(rows, requires_grad=False)

    def take(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        needed, numbers = torch.unique(args[0], return_inverse=True)
        read = rows(needed.tolist()).to(device=device, dtype=empty.dtype)
        set_weight(read)
        return (numbers, *args[1:])

    hook = embedding.register_forward_pre_hook(take)
    set_weight(empty.new_empty(0, empty.shape[1], device=device))  # models send ids to its device
    embedding.padding_idx = None  # matters in training only, and is not a number of these rows
    try:
        yield
    finally:
        hook.remove()
        embedding._parameters["weight"] = empty
        embedding.padding_idx = padding


def read_rows(stored: Tensors, name: str, numbers: Sequence[int]) -> Tensor:
    """Rows of a stored matrix, which must be sorted. IndexError for one that it lacks; IntegrityError if the file has
    become shorter."""
    info, place = stored[name], stored.place(name)
    if numbers and not 0 <= numbers[0] <= numbers[-1] < info.shape[0]:
        raise IndexError(f"{name} has no row {numbers[0] if numbers[0] < 0 else numbers[-1]}")
    width = info.nbytes // info.shape[0]
    made = torch.empty((len(numbers), *info.shape[1:]), dtype=DTYPES[info.dtype])
    buffer, at = made.view(torch.uint8).reshape(-1).numpy().data, 0
    for first, count in _runs(numbers):
        begin = place.begin + first * width
        read_into(FileRange(place.path, begin, begin + count * width), buffer[at : at + count * width])
        at += count * width
    return made


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, count) of numbers that follow each other."""
    first = 0
    for index in range(1, len(numbers) + 1):
        if index == len(numbers) or numbers[index] != numbers[index - 1] + 1:
            yield numbers[first], index - first
            first = index
