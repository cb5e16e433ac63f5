"""Joins the experts of one layer in the parameters that transformers 5 has for them, matrix by matrix.

transformers' own conversion stacks the matrices of each projection and then concatenates the stacks
(core_model_loading.py, MergeModulelist and Concatenate, 5.14), which for a moment takes more than twice the layer's
memory; here it is the layer and one matrix. Imports torch and transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import core_model_loading as loading

Read = Callable[[str], Tensor]  # by its name in the files


class JoinedExperts:
    """mapping: transformers' conversion of names and weights for the model. Parameters that `dtype_plan` gives a dtype
    of their own are left to transformers."""

    def __init__(self, model: Any, mapping: Sequence[Any], dtype_plan: Mapping[str, Any]) -> None:
        self._model = model
        self._converters = [one for one in mapping if isinstance(one, loading.WeightConverter)]
        self._renamings = [one for one in mapping if isinstance(one, loading.WeightRenaming)]
        self._known = {part: one for one in self._converters if _joins(one) for part in one.source_patterns}
        self._own_dtypes = tuple(dtype_plan)
        self._whole = model.state_dict()

    def join(self, names: Sequence[str], read: Read, device: torch.device) -> tuple[set[str], list[str]]:
        """Reads and joins those of the tensors that are experts. Returns the parameters that the model then has, and
        the names of the other tensors: also of experts that are not complete, or of another shape."""
        found: dict[str, dict[str, list[str]]] = {}
        for name in sorted(names, key=loading.dot_natural_key) if self._known else ():
            target, pattern = loading.rename_source_key(
                name, self._renamings, self._converters, self._model.base_model_prefix, self._whole
            )
            own = any(part in target for part in self._own_dtypes)
            if pattern in self._known and target in self._whole and not own:
                found.setdefault(target, {}).setdefault(pattern, []).append(name)
        joined = {target for target, parts in found.items() if self._join(target, parts, read, device)}
        taken = {name for target in joined for part in found[target].values() for name in part}
        return joined, [name for name in names if name not in taken]

    def _join(self, target: str, parts: Mapping[str, list[str]], read: Read, device: torch.device) -> bool:
        empty, patterns = self._whole[target], self._known[next(iter(parts))].source_patterns
        columns = [parts.get(pattern, []) for pattern in patterns]
        if empty.dim() != 3 or any(len(names) != empty.shape[0] for names in columns):
            return False
        joined = torch.empty(empty.shape, dtype=empty.dtype, device=device)
        begin = 0
        for names in columns:
            rows = 0
            for expert, name in enumerate(names):
                matrix = read(name)
                rows = rows or len(matrix)
                place = joined[expert, begin : begin + rows]
                if matrix.shape != place.shape:
                    return False
                place.copy_(matrix)
            begin += rows
        if begin != empty.shape[1]:
            return False
        module, _, leaf = target.rpartition(".")
        self._model.get_submodule(module)._parameters[leaf] = nn.Parameter(joined, requires_grad=False)
        return True


def _joins(converter: Any) -> bool:
    """Whether a conversion stacks matrices in dimension 0 and, of several projections, concatenates them in 1."""
    done = [(type(one).__name__, one.dim) for one in converter.operations if hasattr(one, "dim")]
    stacked = [("MergeModulelist", 0), ("Concatenate", 1)][: len(done)]
    return len(done) == len(converter.operations) == min(2, len(converter.source_patterns)) and done == stacked
