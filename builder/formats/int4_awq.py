"""INT4 with AWQ: INT4 weights in blocks of 128 inputs with an FP32 scale each; activations are not quantized.

ModelOpt's INT4_AWQ_CFG searches a scale for each input that protects the weights of large inputs. Tensor names:
ModelOpt's export (export/quant_utils.py, 0.37 to 0.47). TensorRT-LLM 1.x: models/modeling_utils.py,
preprocess_perlayer_weights, and quantization/quantize.py, weight_only_groupwise_quantize, for engines, which multiply
the input of every layer by prequant_scaling_factor; _torch/modules/linear.py, W4A16_AWQ_LinearMethod, for the LLM
class, which reads pre_quant_scale of o_proj and down_proj only. Arithmetic: builder/formats/arithmetic/int4.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from builder.formats import smoothing
from builder.formats.base import IN, OUT, Dim, NumberFormat, StoredTensor

if TYPE_CHECKING:
    from torch import Tensor, dtype


class Int4Awq(NumberFormat):
    """INT4 with its arithmetic."""

    def modelopt(self, mtq: Any) -> dict[str, Any]:
        """ModelOpt's configuration with this block size."""
        config = super().modelopt(mtq)
        entries = config["quant_cfg"]  # a mapping up to ModelOpt 0.43, then a list
        named = entries.items() if isinstance(entries, dict) else [(e["quantizer_name"], e.get("cfg")) for e in entries]
        for name, settings in named:
            if name == "*weight_quantizer":
                settings["block_sizes"] = {-1: self.group_size, "type": "static"}
        return config

    def misfit(self, weight: Sequence[int]) -> str:
        """It is made of whole groups of inputs and pairs of outputs."""
        odd = f"an odd output size, and {self.title} packs two outputs in a byte" if weight[0] % 2 else ""
        return super().misfit(weight) or odd

    def dequantize(self, stored: Mapping[str, Tensor], kind: dtype) -> Tensor:
        """Unpacks the weight [outputs, inputs]."""
        from builder.formats.arithmetic import int4

        return int4.dequantize(stored["weight"], stored["weight_scale"], kind)

    def round_input(self, x: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
        """Multiplies by the scales of the inputs; nothing is rounded."""
        return smoothing.scaled(x, stored)

    def round_weight(self, weight: Tensor, amax: Tensor) -> Tensor:
        """Rounds each block under its own largest magnitude, without AWQ's scales."""
        from builder.formats.arithmetic import int4

        blocks = weight.float().view(-1, self.group_size or weight.shape[-1])
        return int4.fake_quantize(blocks, blocks.abs().amax(-1, keepdim=True)).view(weight.shape)


def of_block(size: int, name: str, title: str) -> Int4Awq:
    """The format with blocks of so many inputs. TensorRT-LLM's kernels take 64 and 128."""
    return Int4Awq(
        name=name,
        title=title,
        quant_algo="W4A16_AWQ",
        bits=4 + 32 / size,
        tensors=(
            StoredTensor(
                "weight", "weight", "weight", ("U8", "I8"), (Dim("out", 2), IN), "integers", "int4_weights",
                tensorrt_llm_dtype="I8",
            ),
            StoredTensor(
                "weight_scale", "weight_scale", "weights_scaling_factor", ("F32",), (OUT, Dim("in", size)),
                "positive", "int4_scales",
            ),
            smoothing.pre_quant_scale("int4_input_scales", folded=smoothing.AFTER_NORM, filled=True),
        ),
        label="int4",
        group_size=size,
        entry={"has_zero_point": False, "pre_quant_scale": True},
        whole_model=True,
        modelopt_config="INT4_AWQ_CFG",
        gpu_format="int4_awq",
    )  # fmt: skip


FORMAT = of_block(128, "int4_awq", "INT4 (AWQ)")
