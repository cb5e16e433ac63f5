"""How much NVFP4 changes the weights of each linear layer, straight from a model's files. Imports torch.

The cheap stand-in for a measured loss where a model is too large to run: tensor by tensor, never the model in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from builder.core.errors import IntegrityError
from builder.core.safetensors_io import Tensors
from builder.formats.arithmetic import nvfp4

_STEP = 1 << 16  # blocks at a time: bounds the float32 copies of a weight
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def weight_errors(
    files: Sequence[Path],
    groups: Mapping[str, Sequence[str]],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """Of each group ||W - quantized W|| / ||W||, in the Frobenius norm over all its modules. IntegrityError for a
    weight with NaN or Inf."""
    tensors = Tensors(files[0].parent, files)
    found = {}
    for done, (group, modules) in enumerate(groups.items()):
        progress(done, len(groups))
        found[group] = _group_error(tensors, modules, fused=group not in modules and not group.endswith(".experts"))
    progress(len(groups), len(groups))
    return found


def _group_error(tensors: Tensors, modules: Sequence[str], *, fused: bool) -> float:
    """What is multiplied as one has one global scale, the largest (of q, k and v; of gate and up)."""
    weights = [f"{module}.weight" for module in modules]
    amaxes = [_load(tensors, name).abs().amax() for name in weights]
    error = whole = 0.0
    for name, own in zip(weights, amaxes, strict=True):
        amax = torch.stack(amaxes).amax() if fused else own
        if amax == 0:
            continue
        if not torch.isfinite(own):
            raise IntegrityError(f"{name} holds NaN or Inf.", hint="Fetch the model again, or take another one.")
        scale = nvfp4.scale_of(amax)
        for part in torch.split(_load(tensors, name).view(-1, nvfp4.BLOCK), _STEP):
            rows = part.float()
            back = nvfp4.fake_quantize_static(rows, nvfp4.block_scales(rows, scale).float() * scale)
            error += float((back - rows).double().pow(2).sum())
            whole += float(rows.double().pow(2).sum())
        tensors.release(name)
    return math.sqrt(error / whole) if whole else 0.0


def _load(tensors: Tensors, name: str) -> Tensor:
    info = tensors[name]
    return torch.frombuffer(bytearray(tensors.data(name)), dtype=DTYPES[info.dtype]).reshape(info.shape)
