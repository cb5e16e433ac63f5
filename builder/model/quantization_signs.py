"""Detects models that are quantized already, by their files, keys of config.json, and names and dtypes of tensors."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from builder.core.errors import UnsupportedError

# Written by ModelOpt (the first two), AutoGPTQ and AutoAWQ.
FILES = ("hf_quant_config.json", "quant_cfg.json", "quantize_config.json", "quant_config.json")
# Written by transformers and vLLM, compressed-tensors, ModelOpt, MLX.
KEYS = ("quantization_config", "compression_config", "quant_config", "quant_cfg", "quantization")
# Last parts of tensor names: ModelOpt, compressed-tensors, GPTQ and AWQ, DeepSeek's FP8, bitsandbytes, MLX, torchao.
LEAVES = frozenset({
    "weight_scale", "weight_scale_2", "weight_scale_inv", "weight_packed", "weight_shape", "weight_zero_point",
    "weight_g_idx", "weight_global_scale", "input_scale", "input_global_scale", "input_zero_point", "output_scale",
    "k_scale", "v_scale", "kv_scale", "pre_quant_scale", "qweight", "qzeros", "g_idx", "scales", "SCB", "weight_format",
    "absmax", "quant_map", "nested_absmax", "nested_quant_map", "weight_amax", "scale_inv",
    "activation_scale", "activation_scaling_factor", "weights_scaling_factor",
})  # fmt: skip
# ModelOpt's own checkpoints, bitsandbytes; gpt-oss in MXFP4.
PARTS = re.compile(r"(^|\.)((weight|input|output|[kv]_bmm)_quantizer|quant_state)(\.|$)|(_amax|_blocks|_scales)$")
FLOATS = ("BF16", "F16", "F32")
# Formats that models are published in without a BF16 version: DeepSeek-V3 in FP8, gpt-oss in MXFP4.
NATIVE = ("fp8", "mxfp4")
NATIVE_TENSORS = re.compile(r"\.weight_scale_inv$|_(blocks|scales)$")
# Buffers that some architectures save: positions or masks, not weights.
BUFFERS = re.compile(r"(^|\.)(position_ids|masked_bias|attn\.bias|causal_mask|bias_mask|num_batches_tracked)$")


def check_names(names: Collection[str], where: str) -> None:
    """UnsupportedError if one of a model's files was written by a quantizer."""
    found = [name for name in FILES if name in names]
    if found:
        raise quantized(where, f"It contains {', '.join(found)}, which quantizers write.")


def check_config(config: Mapping[str, Any], where: str) -> None:
    """UnsupportedError if a key of config.json, at the top level or below, says that the model is quantized."""
    for key, value in _keys(config, 8):
        method = value.get("quant_method") or value.get("quant_algo") if isinstance(value, Mapping) else None
        label = f" ({ascii(str(method))[1:-1][:60]})" if method else ""
        native = str(method).lower() in NATIVE
        raise quantized(where, f"Its config.json has {key}.", label, native=native)


def _keys(config: Mapping[str, Any], depth: int, path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if key in KEYS and value not in (None, False):
            yield f"{path}{key}", value
        elif isinstance(value, Mapping) and depth:
            yield from _keys(value, depth - 1, f"{path}{key}.")


def check_tensors(tensors: Mapping[str, tuple[str, Sequence[int]]], where: str) -> None:
    """UnsupportedError if tensors, {name: (dtype, shape)}, have names or dtypes of quantized layers."""
    scales = [name for name in tensors if name.rpartition(".")[2] in LEAVES or PARTS.search(name)]
    packed = [f"{name} ({kind})" for name, (kind, shape) in tensors.items() if _is_packed(name, kind, shape)]
    if found := scales or packed:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        why = f"Only quantized checkpoints have tensors such as {', '.join(found[:3])}{more}."
        raise quantized(where, why, native=any(map(NATIVE_TENSORS.search, found)))


def _is_packed(name: str, dtype: str, shape: Sequence[int]) -> bool:
    """Whether these are weights in a dtype of one byte or less, or packed in integers."""
    if dtype.startswith(("F8_", "F6_")) or dtype == "F4":
        return True
    integer = dtype.startswith(("U", "I")) or dtype == "BOOL"
    return integer and not BUFFERS.search(name) and (len(shape) > 1 or name.endswith("weight"))


def quantized(where: str, why: str, label: str = "", *, native: bool = False) -> UnsupportedError:
    """The error for a model that is quantized already. native: in a format that it may have been published in only."""
    hint = "Give the BF16 model that it was made from."
    if native:
        hint = (
            "Give the BF16 version if there is one. Some models have none (DeepSeek-V3 is published in FP8 only, "
            "gpt-oss in MXFP4 only); then choose another model."
        )
    return UnsupportedError(
        f"{where} is quantized already{label}.",
        why=f"{why} NVFP4 weights are computed from the original ones; quantizing twice would lose more accuracy.",
        hint=hint,
    )
