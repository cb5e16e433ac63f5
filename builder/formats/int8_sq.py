"""INT8 with SmoothQuant: INT8 weights with a scale for each output, INT8 activations with a calibrated scale.

ModelOpt's INT8_SMOOTHQUANT_CFG moves outliers of the inputs into the weights by a scale for each input, which servers
multiply the input by. Tensor names: ModelOpt's export (export/quant_utils.py, 0.37 to 0.47); TensorRT-LLM 1.x,
quantization/layers.py, Int8SmoothQuantLinear. Arithmetic: builder/formats/arithmetic/int8.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from builder.formats import smoothing
from builder.formats.base import IN, OUT, NumberFormat, StoredTensor

if TYPE_CHECKING:
    from torch import Tensor, dtype


class Int8Sq(NumberFormat):
    """INT8 with its arithmetic."""

    def dequantize(self, stored: Mapping[str, Tensor], kind: dtype) -> Tensor:
        """The INT8 weight [outputs, inputs] times the scales of its outputs."""
        from builder.formats.arithmetic import int8

        return int8.dequantize(stored["weight"], stored["weight_scale"], kind)

    def round_input(self, x: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
        """Multiplies by the scales of the inputs, then rounds under the calibrated scale."""
        from builder.formats.arithmetic import int8

        return int8.fake_quantize(smoothing.scaled(x, stored), stored["input_scale"])

    def round_weight(self, weight: Tensor, amax: Tensor) -> Tensor:
        """Rounds each output under its own largest magnitude, without SmoothQuant's scales."""
        from builder.formats.arithmetic import int8

        own = weight.float().abs().amax(-1, keepdim=True)
        return int8.fake_quantize(weight.float(), own.clamp(min=1e-12) / int8.INT8_MAX)


FORMAT = Int8Sq(
    name="int8_sq",
    title="INT8 (SmoothQuant)",
    quant_algo="W8A8_SQ_PER_CHANNEL",
    bits=8.0,
    tensors=(
        StoredTensor("weight", "weight", "weight", ("I8",), (OUT, IN), "integers", "int8_weights"),
        StoredTensor(
            "weight_scale", "weight_scale", "weights_scaling_factor", ("F32",), (OUT,), "positive", "int8_scales"
        ),
        StoredTensor(
            "input_scale", "input_scale", "activation_scaling_factor", ("F32",), (), "scale", "int8_scales",
            tensorrt_llm_shape=(1,), calibrated=True,
        ),
        smoothing.pre_quant_scale("int8_scales"),
    ),
    label="int8",
    whole_model=True,
    modelopt_config="INT8_SMOOTHQUANT_CFG",
    gpu_format="int8_sq",
    input_range=127.0,
    targets=("engine",),
    targets_source="TensorRT-LLM's PyTorch backend has no W8A8 linear layer (_torch/modules/linear.py@ed53795b, "
    "get_quant_method; NVIDIA/TensorRT-LLM #3701).",
)  # fmt: skip
