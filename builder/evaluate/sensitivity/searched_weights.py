"""Weights of ModelOpt's fake-quantized model rounded by our algorithm `mse`, which its quantizers of 0.37 lack.

Imports torch; the model comes with ModelOpt.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from builder.formats.arithmetic import nvfp4, nvfp4_search

E2M1 = (2, 1)  # ModelOpt's name of NVFP4's numbers


class SearchedWeight:
    """Stands in for the forward of a quantizer of NVFP4 weights. The codes and scales of its weight are kept: a seventh
    of the weight in float32."""

    def __init__(self, quantizer: Any) -> None:
        self._quantizer, self._by_max = quantizer, quantizer.forward
        self._packed: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, weight: Tensor) -> Tensor:
        """The weight rounded, as long as the quantizer is on and set to NVFP4; else what the quantizer makes of it."""
        if not self._quantizer.is_enabled or self._quantizer.num_bits != E2M1:
            made: Tensor = self._by_max(weight)
            return made
        if self._packed is None:
            shared = getattr(self._quantizer, "global_amax", None)
            amax = self._quantizer.amax if shared is None else shared
            self._packed = nvfp4_search.quantize(weight, nvfp4.scale_of(amax.float().amax()))
        return nvfp4.dequantize(*self._packed, weight.dtype)


def search(model: Any) -> None:
    """Makes the model round all weights that it has in NVFP4 by `mse`."""
    for name, module in model.named_modules():
        if name.endswith("weight_quantizer") and getattr(module, "num_bits", None) == E2M1:
            module.forward = SearchedWeight(module)
