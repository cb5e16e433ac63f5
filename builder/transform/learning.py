"""Learns rotations: the next-token loss of calibration rows, with rounded inputs of layers, falls by Cayley SGD
(SpinQuant, arXiv 2405.16406). Weights are not rounded, which that paper found better before GPTQ.

A step reads its rows one after the other, and recomputes each decoder layer for its gradients, so memory is the
weights', one row's hidden states', and one layer's activations' (learning_cost.py). Imports torch.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from builder.transform import cayley
from builder.transform.learning_cost import CHUNK
from builder.transform.learning_state import State
from builder.transform.rounded_inputs import RoundedInputs

MEASURED = 4  # steps whose rows the loss before and after is of


@dataclass
class Learned:
    """Orthogonal matrices, float64. before, after: the loss on the rows of the first steps. losses: of the rows of each
    step, before it."""

    matrices: dict[str, Tensor]
    before: float
    after: float
    losses: list[float] = field(default_factory=list)

    @property
    def fell(self) -> bool:
        """Whether the loss is lower than at the start."""
        return self.after < self.before


class Learner:
    """A model whose rotations are learned. rows: token ids [1, tokens], with at least two tokens each."""

    def __init__(self, model: Any, inputs: RoundedInputs, rows: Sequence[Tensor], *, per_step: int) -> None:
        self._model, self._inputs, self._rows, self._per_step = model, inputs, rows, per_step
        self._head = model.get_output_embeddings()
        self._divisor = float(getattr(model.config, "logits_scaling", 1.0))  # Granite divides its logits
        for parameter in model.parameters():
            parameter.requires_grad_(False)

    def recompute(self, layers: Sequence[Any]) -> None:
        """Keeps of these layers only their inputs for the gradients."""
        for layer in layers:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)

    def loss(self, matrices: Mapping[str, Tensor], rows: Sequence[Tensor], *, backward: bool = False) -> float:
        """The mean loss of the next token. backward: also adds its gradients to those of the matrices."""
        self._inputs.matrices, total = matrices, sum(row.shape[1] - 1 for row in rows)
        found = 0.0
        for row in rows:
            with torch.set_grad_enabled(backward):
                lost = self._row_loss(row.to(self._model.device)) / total
            if backward:
                lost.backward()  # type: ignore[no-untyped-call]
            found += float(lost.detach())
        return found

    def _row_loss(self, row: Tensor) -> Tensor:
        hidden = self._model.base_model(row, use_cache=False).last_hidden_state[0, :-1]
        targets = row[0, 1:]
        parts = [
            checkpoint(self._chunk_loss, *both, use_reentrant=False)
            for both in zip(torch.split(hidden, CHUNK), torch.split(targets, CHUNK), strict=True)
        ]
        return torch.stack(parts).sum()

    def _chunk_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(self._head(hidden) / self._divisor, targets, reduction="sum")

    def learn(
        self,
        start: Mapping[str, np.ndarray[Any, Any]],
        *,
        steps: int,
        rate: float,
        state: State,
        progress: Callable[[int], None],
    ) -> Learned:
        """Learns from `start` on, or from where a killed run left its state. If the loss has not fallen in the end, the
        result is the start."""
        device = self._model.device
        first = {name: torch.from_numpy(np.ascontiguousarray(matrix)).to(device) for name, matrix in start.items()}
        measured = self._rows_of(0, min(steps, MEASURED))
        found = state.load(first)
        if found is None:
            found = 0, first, [self.loss(_single(first), measured)]
        done, matrices, losses = found
        for number in range(done, steps):
            progress(number)
            current = {name: one.requires_grad_() for name, one in _single(matrices).items()}
            losses.append(self.loss(current, self._rows_of(number, 1), backward=True))
            matrices = {
                name: cayley.step(one, _gradient(current[name]), cayley.rate_of(number, steps, rate))
                for name, one in matrices.items()
            }
            state.save(number + 1, matrices, losses)
        progress(steps)
        before, after = losses[0], self.loss(_single(matrices), measured)
        made = Learned(matrices, before, after, losses[1:])
        return made if made.fell else replace(made, matrices=first)

    def _rows_of(self, step: int, steps: int) -> list[Tensor]:
        """The rows of `steps` steps from this one on. After the last row comes the first."""
        begin = step * self._per_step
        everyone = itertools.islice(itertools.cycle(self._rows), begin, begin + steps * self._per_step)
        return list({id(row): row for row in everyone}.values())


def _single(matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: one.to(torch.float32) for name, one in matrices.items()}


def _gradient(matrix: Tensor) -> Tensor:
    if matrix.grad is None:
        raise ValueError("a matrix had no part in the loss")
    return matrix.grad.double()
