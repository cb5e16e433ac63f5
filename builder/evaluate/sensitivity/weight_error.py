"""How much a number format changes the weights of each linear layer, from a model's files. Imports torch.

A cheap proxy for the measured loss of a model that is too large to run. Reads one tensor at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from builder.core.errors import IntegrityError
from builder.core.safetensors_io import Tensors
from builder.formats.algorithms import MAX, MSE, Algorithm
from builder.formats.arithmetic import nvfp4, nvfp4_search
from builder.formats.arithmetic.dtypes import read
from builder.formats.base import NumberFormat
from builder.formats.registry import NVFP4

Rounding = Callable[[Tensor, Tensor], Tensor]  # of rows, and the largest magnitude that they share

_STEP = 1 << 16  # blocks at a time: bounds the float32 copies of a weight


def weight_errors(
    tensors: Tensors,
    groups: Mapping[str, Sequence[str]],
    number_format: NumberFormat = NVFP4,
    algorithm: Algorithm = MAX,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """||W - quantized W|| / ||W|| of each group, in the Frobenius norm over all its modules.

    tensors: of the source model, under its own names (model/source_tensors.py). algorithm: max, or mse where it treats
    the format.
    IntegrityError for a weight with NaN or Inf.
    """
    found, rounding = {}, _searched if algorithm is MSE else number_format.round_weight
    for done, (group, modules) in enumerate(groups.items()):
        progress(done, len(groups))
        fused = group not in modules and not group.endswith(".experts")
        found[group] = _group_error(tensors, modules, number_format.group_size, rounding, fused=fused)
    progress(len(groups), len(groups))
    return found


def _searched(rows: Tensor, amax: Tensor) -> Tensor:
    return nvfp4.dequantize(*nvfp4_search.quantize(rows, nvfp4.scale_of(amax)), torch.float32)


def _group_error(
    tensors: Tensors, modules: Sequence[str], group_size: int | None, rounding: Rounding, *, fused: bool
) -> float:
    """`fused`: the modules are served as one layer and share one global scale, the largest (q, k, v; gate, up)."""
    weights = [f"{module}.weight" for module in modules]
    amaxes = [read(tensors, name).abs().amax() for name in weights]
    error = whole = 0.0
    for name, own in zip(weights, amaxes, strict=True):
        amax = torch.stack(amaxes).amax() if fused else own
        if amax == 0:
            continue
        if not torch.isfinite(own):
            raise IntegrityError(f"{name} holds NaN or Inf.", hint="Fetch the model again, or take another one.")
        weight = read(tensors, name)
        for part in torch.split(weight.view(-1, group_size or weight.shape[-1]), _STEP):
            rows = part.float()
            back = rounding(rows, amax)
            error += float((back - rows).double().pow(2).sum())
            whole += float(rows.double().pow(2).sum())
    return math.sqrt(error / whole) if whole else 0.0
