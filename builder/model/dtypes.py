"""The 16-bit dtype that a model is loaded, quantized and served in, whatever dtype its files have. Pure.

TensorRT-LLM quantizes activations to NVFP4 from float16, bfloat16 and FP8 alone (cpp/tensorrt_llm/plugins/
quantizeToFP4Plugin/quantizeToFP4Plugin.cpp@16d2467e, supportsFormatCombination), so float32 weights are rounded to
bfloat16, which has the same range, before anything is calibrated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from builder.core.safetensors_io import byte_size

FLOATS = ("BF16", "F16", "F32")
# Copies of a buffer that transformers computes; it neither loads nor saves them.
NOT_WRITTEN = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
Header = tuple[str, tuple[int, ...]]  # a tensor's dtype and shape


def served(config: Mapping[str, Any]) -> str:
    """ "float16" if config.json says so, else "bfloat16"."""
    return "float16" if stated(config) == "float16" else "bfloat16"


def stated(config: Mapping[str, Any]) -> str | None:
    """The dtype in config.json: `dtype` of transformers 5 or `torch_dtype` of 4. None if it states none."""
    return config.get("dtype") or config.get("torch_dtype")


def with_type(config: Mapping[str, Any], tensors: Mapping[str, Header]) -> dict[str, Any]:
    """config.json with a dtype: its own or, if it states none, that of the weights. It is float16 only if all matrices
    are; anything else is served in bfloat16."""
    if stated(config):
        return dict(config)
    matrices = {dtype for dtype, shape in tensors.values() if len(shape) == 2}
    return {**config, "dtype": "float16" if matrices == {"F16"} else "bfloat16"}


def written_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of an unquantized tensor in a checkpoint, and in memory during calibration."""
    return 2 * math.prod(shape) if dtype in FLOATS else byte_size(dtype, shape)
