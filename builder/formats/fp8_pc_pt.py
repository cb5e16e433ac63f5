"""FP8 per channel and token: E4M3 weights with an FP32 scale for each output, and inputs with one for each token.

The scales of the inputs are computed when the layer runs, so nothing of the checkpoint is calibrated. TensorRT-LLM has
a name of its own for the scales of the weight (ModelOpt 0.37, export/model_config_utils.py, pack_linear_weights).
Arithmetic: builder/formats/arithmetic/fp8.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from builder.formats.base import IN, OUT, NumberFormat, Scheme, StoredTensor
from builder.formats.fp8 import LARGEST

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, dtype


class Fp8PerChannelPerToken(NumberFormat):
    """FP8 per channel and token with its arithmetic."""

    def pack(
        self, rows: np.ndarray[Any, Any], dtype: str, amax: float, *, rounded_to: str, threads: int | None = None
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Codes under the scale that maps an output's largest magnitude to the largest E4M3 value, and these scales."""
        import numpy as np

        from builder.formats.kernels import packing

        scales = packing.largest_rows(rows, dtype, rounded_to=rounded_to, threads=threads) / np.float32(LARGEST)
        codes = packing.pack_fp8(rows, dtype, scales, rounded_to=rounded_to, threads=threads)
        return {"weight": codes, "weight_scale": scales}

    def dequantize(self, stored: Mapping[str, Tensor], kind: dtype) -> Tensor:
        """The E4M3 weight [outputs, inputs] times the scale of each output."""
        from builder.formats.kernels import tensors

        return tensors.dequantize_fp8(stored["weight"], stored["weight_scale"].reshape(-1, 1), kind)

    def round_input(self, x: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
        """Rounds each token to E4M3 under a scale of its own."""
        from builder.formats.arithmetic import fp8

        return fp8.fake_quantize_rows(x)

    def round_weight(self, weight: Tensor, amax: Tensor) -> Tensor:
        """Rounds each output to E4M3 under a scale of its own; a largest magnitude of several does not matter."""
        from builder.formats.arithmetic import fp8

        return fp8.round_weight(weight, weight.abs().amax(-1, keepdim=True).float() / fp8.E4M3_MAX)


FORMAT = Fp8PerChannelPerToken(
    name="fp8_pc_pt",
    title="FP8 per channel and token",
    quant_algo="FP8_PER_CHANNEL_PER_TOKEN",
    bits=8.0,
    tensors=(
        StoredTensor("weight", "weight", "weight", ("F8_E4M3",), (OUT, IN), "floats", "fp8_linears"),
        StoredTensor("weight_scale", "weight_scale", "per_channel_scale", ("F32",), (OUT,), "positive", "fp8_scales"),
    ),
    label="fp8_pc_pt",
    whole_model=True,
    modelopt_config="FP8_PER_CHANNEL_PER_TOKEN_CFG",
    prepare_export=True,
    gpu_format="fp8_pc_pt",
    # compressed-tensors 0.18, quantization/quant_scheme.py, FP8_DYNAMIC
    compressed_tensors=Scheme(
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "channel"},
        {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "observer": None},
    ),
)
