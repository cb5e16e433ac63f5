"""FP8: E4M3 weights and activations, one FP32 scale for the weight and one for the input.

The scale of the weight has the name of NVFP4's block scales in both layouts. In TensorRT-LLM's both scales have the
shape [1], as ModelOpt's TensorRT-LLM export writes them. Arithmetic: builder/formats/arithmetic/fp8.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from builder.formats.base import IN, OUT, NumberFormat, Scheme, StoredTensor

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, dtype

LARGEST = 448.0  # the largest E4M3 value
# compressed-tensors' arguments of the same (0.18, quantization/quant_scheme.py, FP8).
PER_TENSOR = {"num_bits": 8, "type": "float", "strategy": "tensor"}


class Fp8(NumberFormat):
    """FP8 with its arithmetic."""

    def pack(
        self, rows: np.ndarray[Any, Any], dtype: str, amax: float, *, rounded_to: str, threads: int | None = None
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Codes under the scale that maps `amax` to the largest E4M3 value, and this scale."""
        import numpy as np

        from builder.formats.kernels import packing

        scale = np.float32(amax) / np.float32(LARGEST)
        codes = packing.pack_fp8(rows, dtype, float(scale), rounded_to=rounded_to, threads=threads)
        return {"weight": codes, "weight_scale": np.asarray(scale)}

    def dequantize(self, stored: Mapping[str, Tensor], kind: dtype) -> Tensor:
        """The E4M3 weight [outputs, inputs] times its scale."""
        from builder.formats.kernels import tensors

        return tensors.dequantize_fp8(stored["weight"], stored["weight_scale"], kind)

    def round_input(self, x: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
        """Rounds to E4M3 under the calibrated scale."""
        from builder.formats.arithmetic import fp8

        return fp8.fake_quantize(x, stored["input_scale"])

    def round_weight(self, weight: Tensor, amax: Tensor) -> Tensor:
        """Rounds to E4M3 under the scale that maps `amax` to the largest E4M3 value."""
        from builder.formats.arithmetic import fp8

        return fp8.round_weight(weight, amax.float() / fp8.E4M3_MAX)


FORMAT = Fp8(
    name="fp8",
    title="FP8",
    quant_algo="FP8",
    bits=8.0,
    tensors=(
        StoredTensor("weight", "weight", "weight", ("F8_E4M3",), (OUT, IN), "floats", "fp8_linears"),
        StoredTensor(
            "weight_scale", "weight_scale", "weights_scaling_factor", ("F32",), (), "scale", "fp8_scales",
            tensorrt_llm_shape=(1,),
        ),
        StoredTensor(
            "input_scale", "input_scale", "activation_scaling_factor", ("F32",), (), "scale", "fp8_scales",
            tensorrt_llm_shape=(1,), calibrated=True,
        ),
    ),
    label="fp8",
    whole_model=True,
    modelopt_config="FP8_DEFAULT_CFG",
    prepare_export=True,
    gpu_format="fp8",
    gemm_plugin="disable",
    gemm_plugin_why="TensorRT's own FP8 kernels: upstream recommends the plugin for small batches only",
    gemm_plugin_source="nvidia.github.io/TensorRT-LLM/performance/performance-tuning-guide/useful-build-time-flags.html",
    compressed_tensors=Scheme("float-quantized", PER_TENSOR, {**PER_TENSOR, "observer": "static_minmax"}),
    input_range=LARGEST,
)  # fmt: skip
