"""A model whose layers get rounded inputs, as those of a rotated and quantized one, without a rotated weight. Imports
torch.

A norm's output n becomes round(n R1) R1^T, then the norm's own weights multiply it: what a rotated model computes, for
R1 commutes with the norm, and the layers that read it hold diag(g) and R1. Likewise each head's part of what the output
projection reads, with R2. So gradients reach R1 and R2 through a matrix product with the activations, and weights stay
as they are. Rounding passes gradients unchanged (the straight-through estimator), as in SpinQuant (arXiv 2405.16406).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from builder.architectures.facts import Rotation
from builder.formats.assignment import ModelFormats
from builder.formats.base import NumberFormat


class RoundedInputs:
    """Hooks in the decoder layers of a model.

    matrices: `r1` [hidden, hidden] and `r2.N` [head, head] of layer N, those that there are; float32. They may be
    replaced between forward passes. on: whether inputs are rounded.
    """

    def __init__(self, model: Any, family: Rotation, formats: ModelFormats, layers: int) -> None:
        self.matrices: Mapping[str, Tensor] = {}
        self.on = True
        self._single = {module: one for one, modules in formats.layers.items() for module in modules}
        self._whole = formats.whole
        modules = dict(model.named_modules())
        for layer in range(layers):
            prefix = f"{family.layers}.{layer}"
            for norm, readers in family.reads.items():
                self._hook_norm(modules[f"{prefix}.{norm}"], self._format(f"{prefix}.{readers[0]}"))
            for name in family.writes:
                rotated = f"r2.{layer}" if name == family.output else ""
                self._hook_input(modules[f"{prefix}.{name}"], self._format(f"{prefix}.{name}"), rotated)

    def _format(self, module: str) -> NumberFormat:
        return self._single.get(module, self._whole)

    def _hook_norm(self, norm: Any, number_format: NumberFormat) -> None:
        gain = norm.weight.detach().clone()
        norm.weight.data.fill_(1)

        def forward(_: Any, inputs: Any, normed: Tensor) -> Tensor:
            r1 = self.matrices.get("r1")
            if r1 is None:
                return self._rounded(normed * gain, number_format)
            made: Tensor = self._rounded(normed @ r1, number_format) @ r1.T * gain
            return made

        norm.register_forward_hook(forward)

    def _hook_input(self, layer: Any, number_format: NumberFormat, rotated: str) -> None:
        def forward(_: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
            [x] = inputs
            r2 = self.matrices.get(rotated)
            if r2 is None:
                return (self._rounded(x, number_format),)
            heads = (*x.shape[:-1], -1, len(r2))
            turned = (x.reshape(heads) @ r2).reshape(x.shape)
            return ((self._rounded(turned, number_format).reshape(heads) @ r2.T).reshape(x.shape),)

        layer.register_forward_pre_hook(forward)

    def _rounded(self, x: Tensor, number_format: NumberFormat) -> Tensor:
        if not self.on:
            return x
        with torch.no_grad():
            difference = number_format.round_input(x, scales(x, number_format)) - x
        return x + difference


def scales(x: Tensor, number_format: NumberFormat) -> dict[str, Tensor]:
    """The scale of these inputs, where the format stores one, under which the largest of them is its largest number."""
    if number_format.input_range is None:
        return {}
    amax = x.abs().amax().float().clamp_min(torch.finfo(torch.float32).tiny * number_format.input_range)
    return {"input_scale": amax / number_format.input_range}
