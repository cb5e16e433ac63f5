"""How a model shows that it is quantized already: files beside it, keys in config.json, tensors' names and types."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from builder.core.errors import UnsupportedError

# ModelOpt (the first two), AutoGPTQ, AutoAWQ.
FILES = ("hf_quant_config.json", "quant_cfg.json", "quantize_config.json", "quant_config.json")
# transformers and vLLM, compressed-tensors, ModelOpt, MLX.
KEYS = ("quantization_config", "compression_config", "quant_config", "quant_cfg", "quantization")
# Last parts of tensor names: ModelOpt, compressed-tensors, GPTQ and AWQ, DeepSeek's FP8, bitsandbytes, MLX, torchao.
LEAVES = frozenset({
    "weight_scale", "weight_scale_2", "weight_scale_inv", "weight_packed", "weight_shape", "weight_zero_point",
    "weight_g_idx", "weight_global_scale", "input_scale", "input_global_scale", "input_zero_point", "output_scale",
    "k_scale", "v_scale", "kv_scale", "pre_quant_scale", "qweight", "qzeros", "g_idx", "scales", "SCB", "weight_format",
    "absmax", "quant_map", "nested_absmax", "nested_quant_map", "weight_amax", "scale_inv",
    "activation_scale", "activation_scaling_factor", "weights_scaling_factor",
})  # fmt: skip
# TensorRT Model Optimizer's own checkpoints, bitsandbytes; gpt-oss in MXFP4.
PARTS = re.compile(r"(^|\.)((weight|input|output|[kv]_bmm)_quantizer|quant_state)(\.|$)|(_amax|_blocks|_scales)$")
FLOATS = ("BF16", "F16", "F32")
# Formats that makers publish their models in without a BF16 version: DeepSeek-V3 in FP8, gpt-oss in MXFP4.
NATIVE = ("fp8", "mxfp4")
NATIVE_TENSORS = re.compile(r"\.weight_scale_inv$|_(blocks|scales)$")
# Buffers that some architectures save: they hold positions or masks, no weights.
BUFFERS = re.compile(r"(^|\.)(position_ids|masked_bias|attn\.bias|causal_mask|bias_mask|num_batches_tracked)$")


def check_names(names: Collection[str], where: str) -> None:
    """UnsupportedError if a quantizer's file is among a model's files."""
    found = [name for name in FILES if name in names]
    if found:
        raise quantized(where, f"It holds {', '.join(found)}, which a quantizer writes.")


def check_config(config: Mapping[str, Any], where: str) -> None:
    """UnsupportedError if config.json says so, at its top or in a part of it."""
    for key, value in _keys(config, 8):
        method = value.get("quant_method") or value.get("quant_algo") if isinstance(value, Mapping) else None
        label = f" ({ascii(str(method))[1:-1][:60]})" if method else ""
        native = str(method).lower() in NATIVE
        raise quantized(where, f"{key} in its config.json says so.", label, native=native)


def _keys(config: Mapping[str, Any], depth: int, path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if key in KEYS and value not in (None, False):
            yield f"{path}{key}", value
        elif isinstance(value, Mapping) and depth:
            yield from _keys(value, depth - 1, f"{path}{key}.")


def check_tensors(tensors: Mapping[str, tuple[str, Sequence[int]]], where: str) -> None:
    """UnsupportedError if names or types of the tensors {name: (dtype, shape)} are those of quantized layers."""
    scales = [name for name in tensors if name.rpartition(".")[2] in LEAVES or PARTS.search(name)]
    packed = [f"{name} ({kind})" for name, (kind, shape) in tensors.items() if _is_packed(name, kind, shape)]
    if found := scales or packed:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        why = f"Only a quantized checkpoint has tensors like {', '.join(found[:3])}{more}."
        raise quantized(where, why, native=any(map(NATIVE_TENSORS.search, found)))


def _is_packed(name: str, dtype: str, shape: Sequence[int]) -> bool:
    """Weights in a type of a byte or less, or packed in integers."""
    if dtype.startswith(("F8_", "F6_")) or dtype == "F4":
        return True
    integer = dtype.startswith(("U", "I")) or dtype == "BOOL"
    return integer and not BUFFERS.search(name) and (len(shape) > 1 or name.endswith("weight"))


def quantized(where: str, why: str, label: str = "", *, native: bool = False) -> UnsupportedError:
    """The refusal of a model that is quantized already. native: in a format that its maker may have released alone."""
    hint = "Give the BF16 model that it was made from."
    if native:
        hint = (
            "If its maker also released it in BF16, give that. Some did not (DeepSeek-V3 is FP8 alone, gpt-oss MXFP4 "
            "alone): then take another model."
        )
    return UnsupportedError(
        f"{where} is quantized already{label}.",
        why=f"{why} NVFP4 values are computed from the original weights; rounding twice would only lose more.",
        hint=hint,
    )
