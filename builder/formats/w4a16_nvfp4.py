"""W4A16 NVFP4: the weights of NVFP4, and activations that are not quantized. Nothing is calibrated.

Tensor names: ModelOpt 0.47, export/quant_utils.py. Arithmetic: builder/formats/arithmetic/nvfp4.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from builder.formats import nvfp4
from builder.formats.base import Scheme

if TYPE_CHECKING:
    from torch import Tensor


class W4a16Nvfp4(nvfp4.Nvfp4):
    """NVFP4 for weights only."""

    def round_input(self, x: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
        """The input as it is."""
        return x


FORMAT = W4a16Nvfp4(
    name="w4a16_nvfp4",
    title="NVFP4 weights",
    quant_algo="W4A16_NVFP4",
    bits=nvfp4.FORMAT.bits,
    tensors=tuple(one for one in nvfp4.FORMAT.tensors if not one.calibrated),
    label="w4a16_nvfp4",
    group_size=nvfp4.BLOCK,
    whole_model=True,
    modelopt_config="W4A16_NVFP4_CFG",
    gpu_format="w4a16_nvfp4",
    targets=("llmapi",),
    targets_source="Only TensorRT-LLM's PyTorch backend knows W4A16_NVFP4, since the release candidates of 1.3 "
    "(NVIDIA/TensorRT-LLM #14775, #16511).",
    # compressed-tensors 0.18, quantization/quant_scheme.py, NVFP4A16
    compressed_tensors=Scheme("nvfp4-pack-quantized", nvfp4.E2M1),
)
