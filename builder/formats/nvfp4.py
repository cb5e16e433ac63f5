"""NVFP4: E2M1 weights and activations in blocks of 16 with an E4M3 scale each, and an FP32 scale for the tensor.

Tensor names: ModelOpt's export (export/quant_utils.py, 0.37 to 0.47); TensorRT-LLM 1.x, models/modeling_utils.py,
preprocess_perlayer_weights, which makes `alpha` of the last two. Arithmetic: builder/formats/arithmetic/nvfp4.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from builder.formats.base import OUT, Dim, NumberFormat, Scheme, StoredTensor

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, dtype

BLOCK = 16
LARGEST = 6 * 448.0  # the largest E2M1 value under the largest E4M3 scale
# The arguments of compressed-tensors (0.18, quantization/quant_scheme.py, NVFP4). Its dequantization divides
# by the global scales (quantization/lifecycle/forward_helpers.py, _dequantize).
E2M1 = {
    "num_bits": 4,
    "type": "float",
    "strategy": "tensor_group",
    "group_size": BLOCK,
    "scale_dtype": "torch.float8_e4m3fn",
}
SCHEME = Scheme("nvfp4-pack-quantized", E2M1, {**E2M1, "dynamic": "local", "observer": "static_minmax"})


class Nvfp4(NumberFormat):
    """NVFP4 with its arithmetic."""

    def pack(
        self, rows: np.ndarray[Any, Any], dtype: str, amax: float, *, rounded_to: str, threads: int | None = None
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Codes, block scales, and the scale that makes `amax` the largest value."""
        from builder.formats.kernels import packing

        scale = _global_scale(amax)
        codes, scales = packing.pack_nvfp4(rows, dtype, float(scale), rounded_to=rounded_to, threads=threads)
        return {"weight": codes, "block_scale": scales, "weight_scale": scale}

    def pack_searched(
        self, rows: np.ndarray[Any, Any], dtype: str, amax: float, *, rounded_to: str, threads: int | None = None
    ) -> dict[str, np.ndarray[Any, Any]]:
        """The same with the block scales of least squared error. The scale of the tensor stays."""
        from builder.formats.kernels import packing

        scale = _global_scale(amax)
        codes, scales = packing.search_nvfp4(rows, dtype, float(scale), rounded_to=rounded_to, threads=threads)
        return {"weight": codes, "block_scale": scales, "weight_scale": scale}

    def dequantize(self, stored: Mapping[str, Tensor], kind: dtype) -> Tensor:
        """Unpacks the weight [outputs, inputs]."""
        from builder.formats.kernels import tensors

        return tensors.dequantize_nvfp4(stored["weight"], stored["block_scale"], stored["weight_scale"], kind)

    def round_input(self, x: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
        """Rounds in blocks whose scales are computed from `x`, under the calibrated scale of the tensor."""
        from builder.formats.arithmetic import nvfp4

        return nvfp4.fake_quantize(x, stored["input_scale"])

    def round_weight(self, weight: Tensor, amax: Tensor) -> Tensor:
        """Rounds as `quantize` and `dequantize` do, without packing."""
        from builder.formats.arithmetic import nvfp4

        scale, rows = nvfp4.scale_of(amax), weight.float().view(-1, nvfp4.BLOCK)
        return nvfp4.fake_quantize_static(rows, nvfp4.block_scales(rows, scale).float() * scale).view(weight.shape)


def _global_scale(amax: float) -> np.ndarray[Any, Any]:
    """float32 []."""
    import numpy as np

    return np.asarray(np.float32(amax) / np.float32(LARGEST))


FORMAT = Nvfp4(
    name="nvfp4",
    title="NVFP4",
    quant_algo="NVFP4",
    bits=4.5,  # 4 for each value, 8 for every 16
    tensors=(
        StoredTensor(
            "weight", "weight", "weight", ("U8",), (OUT, Dim("in", 2)), "codes", "nvfp4_weights",
            compressed_tensors="weight_packed",
        ),
        StoredTensor(
            "block_scale", "weight_scale", "weights_scaling_factor", ("F8_E4M3",), (OUT, Dim("in", BLOCK)),
            "block_scales", "block_scales",
        ),
        StoredTensor(
            "weight_scale", "weight_scale_2", "weights_scaling_factor_2", ("F32",), (), "scale", "scales",
            compressed_tensors="weight_global_scale", reciprocal=True,
        ),
        StoredTensor(
            "input_scale", "input_scale", "activation_scaling_factor", ("F32",), (), "scale", "scales", calibrated=True,
            compressed_tensors="input_global_scale", reciprocal=True,
        ),
    ),
    label="nvfp4",
    group_size=BLOCK,
    input_range=LARGEST,
    whole_model=True,
    modelopt_config="NVFP4_DEFAULT_CFG",
    gpu_format="nvfp4",
    gemm_plugin="nvfp4",
    gemm_plugin_why="CUTLASS FP4 GEMM, with tactics measured during the build; TensorRT-LLM's own choice for NVFP4 "
    "checkpoints",
    gemm_plugin_source="cpp/tensorrt_llm/plugins/fp4GemmPlugin (1.2-era main); tensorrt_llm/builder.py (1.2), rule R33",
    # The GEMM refuses other inputs and outputs (in half precision) of a GPU when it first runs: "K dim should be
    # aligned to 16 Bytes" (cpp/tensorrt_llm/plugins/fp4GemmPlugin/fp4GemmPlugin.cpp@1a43c7d6, enqueue).
    gemm_inputs=32,
    gemm_outputs=8,
    compressed_tensors=SCHEME,
)  # fmt: skip
