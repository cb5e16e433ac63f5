"""NVFP4 with AWQ: the tensors and the arithmetic of NVFP4, and scales of the inputs that ModelOpt searched.

ModelOpt's NVFP4_AWQ_LITE_CFG. From 0.44 on its exporter also folds the scales of down_proj into up_proj, and those of
o_proj into v_proj where both have one head for each, in models that it knows (export/quant_utils.py,
PQS_FUSE_MODULE_MAPPING, 0.47), so any layer may lack them. TensorRT-LLM has no engine for it (models/modeling_utils.py,
preprocess_perlayer_weights, 1.2); its LLM class multiplies the input where the checkpoint has pre_quant_scale
(_torch/modules/linear.py, NVFP4LinearMethod).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from builder.formats import nvfp4, smoothing

if TYPE_CHECKING:
    from torch import Tensor


class Nvfp4Awq(nvfp4.Nvfp4):
    """NVFP4's arithmetic on scaled inputs."""

    def round_input(self, x: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
        """Multiplies by the scales of the inputs, then rounds as NVFP4."""
        return super().round_input(smoothing.scaled(x, stored), stored)


_TENSORS = (*nvfp4.FORMAT.tensors, smoothing.pre_quant_scale("input_scales", folded=smoothing.AFTER_NORM))

FORMAT = replace(
    Nvfp4Awq(**{name: getattr(nvfp4.FORMAT, name) for name in nvfp4.FORMAT.__dataclass_fields__}),
    name="nvfp4_awq",
    title="NVFP4 (AWQ)",
    label="nvfp4_awq",
    quant_algo="NVFP4_AWQ",
    tensors=_TENSORS,
    entry={"has_zero_point": False, "pre_quant_scale": True},
    modelopt_config="NVFP4_AWQ_LITE_CFG",
    compressed_tensors=None,  # it has no scales of inputs that a runtime applies
    gpu_format="nvfp4_awq",
    targets=("llmapi",),
    targets_source="Only TensorRT-LLM's PyTorch backend scales the inputs of NVFP4 layers (NVIDIA/TensorRT-LLM #8698).",
)
