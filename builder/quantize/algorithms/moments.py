"""Second moments of the inputs of linear layers, X^T X, gathered while a decoder layer runs: GPTQ's Hessians.

A matrix of float32 for each input: of all its columns for GPTQ, or only of each block of 16 columns, which is all that
a block scale's error depends on. They are on the device that computes. Imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from builder.formats.arithmetic.nvfp4 import BLOCK

# Columns at a time. Only the blocks on and above the diagonal are multiplied: half the work of the whole matrix.
_COLUMNS = 512


class Moments:
    """Those of some inputs.

    wanted: {place: columns}, where a place is the name of a linear layer or that of one expert's projection
        (expert_inputs.expert_place); other places are ignored. blocks: only within blocks of 16 columns.
    """

    def __init__(self, wanted: Mapping[str, int], *, blocks: bool) -> None:
        self.wanted, self.blocks = wanted, blocks
        self.tokens = dict.fromkeys(wanted, 0)
        self._sums: dict[str, Tensor] = {}

    def add(self, place: str, values: Tensor) -> None:
        """Adds the rows of an input [..., columns]. One of other columns than expected is ignored."""
        if self.wanted.get(place) != values.shape[-1] or not values.numel():
            return
        rows = values.reshape(-1, values.shape[-1]).float()
        self.tokens[place] += len(rows)
        if place not in self._sums:
            columns = rows.shape[1]
            shape = (columns // BLOCK, BLOCK, BLOCK) if self.blocks else (columns, columns)
            self._sums[place] = rows.new_zeros(shape)
        if self.blocks:
            _add_blocks(self._sums[place], rows)
        else:
            _add_upper(self._sums[place], rows)

    def take(self, place: str) -> Tensor | None:
        """The mean over the tokens, [columns, columns] or [columns / 16, 16, 16], which is then no longer held here;
        None if no token was seen."""
        found = self._sums.pop(place, None)
        if found is None:
            return None
        found.div_(self.tokens[place])
        if not self.blocks:
            _mirror(found)
        return found


def _add_blocks(sums: Tensor, rows: Tensor) -> None:
    parts = rows.view(len(rows), -1, BLOCK).transpose(0, 1)  # [blocks, tokens, 16]
    sums.baddbmm_(parts.transpose(1, 2), parts)


def _add_upper(sums: Tensor, rows: Tensor) -> None:
    """Adds X^T X to the blocks on and above the diagonal."""
    for start in range(0, rows.shape[1], _COLUMNS):
        end = start + _COLUMNS
        sums[start:end, start:].addmm_(rows[:, start:end].T, rows[:, start:])


def _mirror(matrix: Tensor) -> None:
    """Fills the blocks below the diagonal from those above it."""
    for start in range(0, len(matrix), _COLUMNS):
        end = start + _COLUMNS
        matrix[end:, start:end].copy_(matrix[start:end, end:].T)
