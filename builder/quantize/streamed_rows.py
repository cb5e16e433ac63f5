"""Batches of calibration rows that go through a decoder layer side by side, each in a thread with a share of the cores.

With all cores in each operation, what one core wrote is read by others, and all wait for each other several dozen times
per layer and batch. Measured on 2 cores, 28 layers of Qwen3-0.6B's shape, 8 batches of 256 tokens: 7.1 s and 13.0 CPU
seconds one after the other, 6.1 s and 11.3 CPU seconds side by side.

A library may split a sum over threads where a product has few rows and columns, and a sum that is split otherwise is
rounded otherwise. So each shape of batch is tried first, and runs with all cores if a bit differs, or if so few numbers
come out that they might agree by chance. Imports torch.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby

import torch
from torch import Tensor, nn

from builder.model.dense import DenseModel
from builder.model.streamed import StreamedModel

# Below this many operations of a layer with a batch, Python takes longer than the arithmetic, and one thread runs it.
LEAST_OPERATIONS = 1e9
# Outputs of a linear layer that show how its sums are split. Of sums of 576 to 3,072 BF16 products (normally
# distributed, 262,144 sums), one in 8,000 to 14,000 is rounded to another BF16 number if it is split in two.
LEAST_OUTPUTS = 1 << 16

Advance = Callable[[int], Tensor]  # a batch's number -> its hidden states after the layer


class SideBySide:
    """Threads that take batches through a layer. Its owner closes it."""

    def __init__(self, count: int, shapes: Sequence[tuple[int, ...]]) -> None:
        """count: of threads. shapes: of each batch, [rows, tokens]."""
        self._count, self._shapes, self._cores = count, shapes, torch.get_num_threads()
        share = max(1, self._cores // count)
        self._pool = ThreadPoolExecutor(count, "rows", initializer=torch.set_num_threads, initargs=(share,))
        self._equal: dict[tuple[int, ...], bool] = {}

    def prove(self, layer: nn.Module, advance: Advance) -> None:
        """Tries one batch of each shape with all cores and with a share of them, once, as all layers have one size."""
        fewest = min((one.out_features for one in layer.modules() if isinstance(one, nn.Linear)), default=0)
        for number, shape in enumerate(self._shapes):
            if shape not in self._equal:
                enough = math.prod(shape) * fewest >= LEAST_OUTPUTS
                self._equal[shape] = enough and self._same_bits(layer, advance, number)

    def _same_bits(self, layer: nn.Module, advance: Advance, number: int) -> bool:
        with _linear_outputs(layer) as whole:
            whole.append(advance(number))
        with _linear_outputs(layer) as shared:
            shared.append(self._pool.submit(_inferred, advance, number).result())
        return len(whole) == len(shared) and all(map(torch.equal, whole, shared))

    def results(self, advance: Advance) -> Iterator[Tensor]:
        """What comes out for each batch, in the order of the batches."""
        every = range(len(self._shapes))
        for equal, same in groupby(every, lambda number: self._equal[self._shapes[number]]):
            numbers = list(same)
            yield from self._together(advance, numbers) if equal else map(advance, numbers)

    def _together(self, advance: Advance, numbers: Sequence[int]) -> Iterator[Tensor]:
        running: deque[Future[Tensor]] = deque()
        for number in numbers:
            if len(running) == 2 * self._count:  # so that no thread waits for a slower one's batch
                yield running.popleft().result()
            running.append(self._pool.submit(_inferred, advance, number))
        while running:
            yield running.popleft().result()

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._cores)  # which the threads changed for those that are yet to start


def side_by_side(model: StreamedModel, shapes: Sequence[tuple[int, ...]]) -> SideBySide | None:
    """Threads for batches of these shapes, [rows, tokens]; None where they would gain nothing, or if transformers
    computes the layers, whose code may keep state of the batch that it is at.

    All but one batch may hold half a layer's bytes of activations: that is what memory was planned for.
    """
    if model.device.type != "cpu" or not isinstance(model.model, DenseModel) or not shapes:
        return None
    linears = [module for module in model.layers[0].modules() if isinstance(module, nn.Linear)]
    tokens = max(rows * length for rows, length in shapes)
    if 2 * tokens * sum(one.weight.numel() for one in linears) < LEAST_OPERATIONS:
        return None
    width = sum(one.out_features for one in linears) + 2 * linears[0].in_features
    fitting = 1 + model.nbytes(0) // 2 // (tokens * width * linears[0].weight.itemsize)
    count = min(torch.get_num_threads(), len(shapes), fitting)
    return SideBySide(count, shapes) if count > 1 else None


def _inferred(advance: Advance, number: int) -> Tensor:
    with torch.inference_mode():  # of this thread
        return advance(number)


@contextmanager
def _linear_outputs(layer: nn.Module) -> Iterator[list[Tensor]]:
    """What linear layers compute while the block runs."""
    made: list[Tensor] = []
    linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
    hooks = [one.register_forward_hook(lambda _, __, output: made.append(output)) for one in linears]
    try:
        yield made
    finally:
        for hook in hooks:
            hook.remove()
