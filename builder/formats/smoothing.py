"""The scales of AWQ and SmoothQuant: each input of a layer is multiplied by its own before it is quantized, and the
weight was divided by them before.

ModelOpt's names: export/quant_utils.py, 0.37 to 0.47 (postprocess_state_dict; model_config.py, LinearConfig).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from builder.formats.base import FLOATS, IN, StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

# Layers that the norm before them feeds, and nothing else: AWQ's scales are folded into the norm's weight
# (export/unified_export_hf.py, requantize_resmooth_fused_llm_layers).
AFTER_NORM = ("q", "k", "v", "qkv", "gate", "up", "gate_up")


def pre_quant_scale(label: str, *, folded: Sequence[str] = (), filled: bool = False) -> StoredTensor:
    """The tensor with these scales [inputs], in the dtype of the model. `folded`: the roles of layers without it."""
    return StoredTensor(
        "pre_quant_scale", "pre_quant_scale", "prequant_scaling_factor", FLOATS, (IN,), "positive", label,
        calibrated=True, optional=bool(folded), folded=tuple(folded), filled=filled, compressed_tensors="",
    )  # fmt: skip


def scaled(x: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
    """The input [..., inputs] times its scales, in the dtype of `x`; as it is where they are folded into the norm."""
    scale = stored.get("pre_quant_scale")
    return x if scale is None else x * scale.to(x.dtype)
