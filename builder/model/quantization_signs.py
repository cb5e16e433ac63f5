"""Recognizes quantized models by their files, keys of config.json, and names and dtypes of tensors. Pure.

Three layouts can be served (`layout_of`); every other quantization is refused by the name of its tool or format, with
what works instead. Both is decided before any weight is downloaded.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from builder.core.errors import UnsupportedError

Layout = Literal["unified", "tensorrt_llm", "compressed_tensors"]
CONFIG, HF_QUANT_CONFIG, QUANT_CFG = "config.json", "hf_quant_config.json", "quant_cfg.json"
DOCUMENTS = (CONFIG, HF_QUANT_CONFIG, QUANT_CFG)  # the files that describe the quantization of a layout
RANK = re.compile(r"rank\d+\.safetensors")  # weights in TensorRT-LLM's layout
# Keys written by transformers and vLLM, compressed-tensors, ModelOpt, MLX.
KEYS = ("quantization_config", "compression_config", "quant_config", "quant_cfg", "quantization")


@dataclass(frozen=True)
class Foreign:
    """A quantization that can't be served from its checkpoint.

    title: what it is. native: models are published in it that have no BF16 version.
    """

    title: str
    native: bool = False


GPTQ = Foreign("GPTQ: integer weights in groups, with zero points")
AWQ = Foreign("AutoAWQ: 4-bit integer weights in its own packing")
BITSANDBYTES = Foreign("bitsandbytes")
BITSANDBYTES_4 = Foreign("bitsandbytes in 4 bits (NF4 or FP4)")
BITSANDBYTES_8 = Foreign("bitsandbytes in 8 bits (LLM.int8)")
FP8_BLOCKS = Foreign("FP8 with a scale for each block of weights", native=True)
FP8_OWN = Foreign("FP8 by transformers or vLLM (quant_method fp8)", native=True)
FP8_ROWS = Foreign("FP8 by FBGEMM: a scale for each row", native=True)
MXFP4 = Foreign("MXFP4: 4-bit floats with a shared exponent for every 32 values", native=True)
MXFP8 = Foreign("MXFP8: FP8 with a shared exponent for every 32 values", native=True)
MLX = Foreign("MLX: integer weights with a scale and a bias for each group, for Apple's GPUs")
EXL2 = Foreign("EXL2 (ExLlamaV2)")
EXL3 = Foreign("EXL3 (ExLlamaV3)")
SVDQUANT = Foreign("SVDQuant (Nunchaku): 4-bit weights with a low-rank correction")
TORCHAO = Foreign("torchao")
HQQ = Foreign("HQQ")
GGUF = Foreign("GGUF (llama.cpp)")
AQLM = Foreign("AQLM: weights as sums of codebook entries")
QUANTO = Foreign("quanto")
# By `quant_method` in config.json: transformers' QuantizationMethod (utils/quantization_config.py, 5.14), and the names
# that ExLlama's converters write.
METHODS: Mapping[str, Foreign] = {
    "gptq": GPTQ,
    "awq": AWQ,
    "bitsandbytes": BITSANDBYTES,
    "fp8": FP8_BLOCKS,
    "fbgemm_fp8": FP8_ROWS,
    "mxfp4": MXFP4,
    "mxfp8": MXFP8,
    "exl2": EXL2,
    "exl3": EXL3,
    "svdquant": SVDQUANT,
    "nunchaku": SVDQUANT,
    "torchao": TORCHAO,
    "hqq": HQQ,
    "aqlm": AQLM,
    "quanto": QUANTO,
    "auto-round": Foreign("AutoRound: integer weights in groups"),
    "quark": Foreign("Quark (AMD)"),
    "bitnet": Foreign("BitNet: weights of three values", native=True),
    "eetq": Foreign("EETQ: 8-bit integer weights"),
    "higgs": Foreign("HIGGS"),
    "vptq": Foreign("VPTQ: vector quantization"),
    "spqr": Foreign("SpQR"),
    "fp_quant": Foreign("FP-Quant: 4-bit floats with rotated weights"),
    "fouroversix": Foreign("Four Over Six: 4-bit floats"),
    "sinq": Foreign("SINQ"),
    "metal": Foreign("Metal: integer weights for Apple's GPUs"),
    "gemma": Foreign("a quantization of Gemma's own"),
}
# By files that quantizers write: AutoGPTQ and GPTQModel; AutoAWQ.
FILES: Mapping[str, Foreign] = {"quantize_config.json": GPTQ, "quant_config.json": AWQ}
# Weights that were quantized and are stored dequantized, beside such a file (quantize/pseudo.py): an ordinary model.
PSEUDO = re.compile(r"pseudo_quantized_model-.*\.safetensors$")
# By names of tensors, the most telling first; torchao's are those of its safetensors (transformers/quantizers/
# quantizer_torchao.py, 5.14).
TENSORS: Sequence[tuple[re.Pattern[str], Foreign]] = tuple(
    (re.compile(pattern), found)
    for pattern, found in (
        (r"\.(g_idx|weight_g_idx)$", GPTQ),
        (r"\.(trellis|suh|svh)$", EXL3),
        (r"\.(q_weight|q_invperm|q_scale_max)$", EXL2),
        (r"\.(absmax|quant_map|nested_absmax|nested_quant_map)$|\.quant_state\.", BITSANDBYTES_4),
        (r"\.(SCB|weight_format)$", BITSANDBYTES_8),
        (r"\.(wscales|smooth_factor|smooth_factor_orig|wcscales)$", SVDQUANT),
        (r"\.(codebooks|codes)$", AQLM),
        (r"\.W_q$", HQQ),
        (r"\.weight\._(data|scale|packed)$", QUANTO),
        (r"\._\w+_qdata$", TORCHAO),
        (r"_proj_(blocks|scales)$", MXFP4),
        (r"_scale_inv$", FP8_BLOCKS),
        (r"\.(qweight|qzeros)$", AWQ),
        (r"\.biases$", MLX),
    )
)
# Last parts of tensor names that ModelOpt and compressed-tensors write, and those of tools without a name above.
LEAVES = frozenset({
    "weight_scale", "weight_scale_2", "weight_packed", "weight_shape", "weight_zero_point", "weight_global_scale",
    "input_scale", "input_global_scale", "input_zero_point", "output_scale", "k_scale", "v_scale", "kv_scale",
    "pre_quant_scale", "scales", "weight_amax", "scale_inv", "activation_scale", "activation_scaling_factor",
    "weights_scaling_factor",
})  # fmt: skip
# ModelOpt's own checkpoints, before their export.
PARTS = re.compile(r"(^|\.)((weight|input|output|[kv]_bmm)_quantizer)(\.|$)|(_amax|_blocks|_scales)$")
FLOATS = ("BF16", "F16", "F32")
ORIGINAL = (
    "Give the original model, which is quantized to the best format that the card runs, or a checkpoint of it by "
    "ModelOpt or llm-compressor."
)
SUPPORTED = "checkpoints of ModelOpt 0.x, in its Hugging Face layout and in TensorRT-LLM's, and of compressed-tensors"
# Buffers that some architectures save: positions or masks, not weights.
BUFFERS = re.compile(r"(^|\.)(position_ids|masked_bias|attn\.bias|causal_mask|bias_mask|num_batches_tracked)$")


def layout_of(documents: Mapping[str, Any]) -> Layout | None:
    """The layout that parsed configuration files describe, {file name: content}; None if it is none that can be served.

    Content of a wrong type counts as described: describing it says what is wrong.
    """
    config = documents.get(CONFIG, {})
    config = config if isinstance(config, Mapping) else {}
    block = config.get("quantization_config") or config.get("compression_config")
    method = str(block.get("quant_method") or "").lower() if isinstance(block, Mapping) else ""
    if "architecture" in config and isinstance(config.get("quantization"), Mapping):
        return "tensorrt_llm"
    if method == "compressed-tensors":
        return "compressed_tensors"
    return "unified" if HF_QUANT_CONFIG in documents or method == "modelopt" else None


def is_described(names: Collection[str], config: Mapping[str, Any]) -> bool:
    """Whether a model with these files is quantized in a layout that can be served."""
    return layout_of({CONFIG: config, **{name: {} for name in DOCUMENTS[1:] if name in names}}) is not None


def ranks(names: Collection[str]) -> list[str]:
    """The weight files in TensorRT-LLM's layout among these names."""
    return sorted((name for name in names if RANK.fullmatch(name)), key=lambda name: (len(name), name))


def check_names(names: Collection[str], where: str) -> None:
    """UnsupportedError if one of a model's files was written by a quantizer whose checkpoints can't be served."""
    found = [name for name in FILES if name in names and HF_QUANT_CONFIG not in names]
    if found and not any(PSEUDO.match(name) for name in names):
        raise foreign(where, FILES[found[0]], f"It contains {', '.join(found)}.")


def check_config(config: Mapping[str, Any], where: str) -> None:
    """UnsupportedError if config.json, at the top level or below, describes a quantization that can't be served."""
    if layout_of({CONFIG: config}) is not None:
        return
    for key, value in _keys(config, 8):
        block = value if isinstance(value, Mapping) else {}
        raise foreign(where, _by_block(key, block), f"Its config.json has {key}.", _method(block))


def _method(block: Mapping[str, Any]) -> str:
    return ascii(str(block.get("quant_method") or block.get("quant_algo") or ""))[1:-1][:60]


def _by_block(key: str, block: Mapping[str, Any]) -> Foreign | None:
    """What a part of config.json describes; None for an unknown tool."""
    method = str(block.get("quant_method") or "").lower()
    if method == "bitsandbytes":
        bits = [("load_in_4bit", BITSANDBYTES_4), ("load_in_8bit", BITSANDBYTES_8)]
        return next((found for sign, found in bits if block.get(sign)), BITSANDBYTES)
    if method == "fp8" and not block.get("weight_block_size"):
        return FP8_OWN
    if not method and "bits" in block and "group_size" in block:  # mlx-lm's convert writes no quant_method
        return MLX
    return METHODS.get(method)


def _keys(config: Mapping[str, Any], depth: int, path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if key in KEYS and value not in (None, False):
            yield f"{path}{key}", value
        elif isinstance(value, Mapping) and depth:
            yield from _keys(value, depth - 1, f"{path}{key}.")


def check_tensors(tensors: Mapping[str, tuple[str, Sequence[int]]], where: str) -> None:
    """UnsupportedError if tensors, {name: (dtype, shape)}, of a model that describes no quantization have names or
    dtypes of quantized layers."""
    for pattern, tool in TENSORS:
        if found := [name for name in tensors if pattern.search(name)]:
            raise foreign(where, tool, _such_as(found))
    scales = [name for name in tensors if name.rpartition(".")[2] in LEAVES or PARTS.search(name)]
    packed = [f"{name} ({kind})" for name, (kind, shape) in tensors.items() if _is_packed(name, kind, shape)]
    if found := scales or packed:
        raise foreign(where, None, f"{_such_as(found)} Neither config.json nor {HF_QUANT_CONFIG} describes them.")


def _such_as(found: Sequence[str]) -> str:
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return f"Only quantized checkpoints have tensors such as {', '.join(found[:3])}{more}."


def _is_packed(name: str, dtype: str, shape: Sequence[int]) -> bool:
    """Whether these are weights in a dtype of one byte or less, or packed in integers."""
    if dtype.startswith(("F8_", "F6_")) or dtype == "F4":
        return True
    integer = dtype.startswith(("U", "I")) or dtype == "BOOL"
    return integer and not BUFFERS.search(name) and (len(shape) > 1 or name.endswith("weight"))


def foreign(where: str, tool: Foreign | None, why: str, method: str = "") -> UnsupportedError:
    """The error for a model in a quantization that can't be served. tool: None for one that is not known. method: what
    config.json calls it."""
    why += f" Supported: {SUPPORTED}."
    if tool is None:
        label = f" ({method})" if method else ""
        return UnsupportedError(
            f"{where} is quantized by a tool whose checkpoints are not supported{label}.",
            why=why,
            hint=ORIGINAL,
        )
    rest = " Some models were never published in BF16; then take a BF16 conversion of it." if tool.native else ""
    return UnsupportedError(
        f"{where} is quantized with {tool.title}, which is not supported.",
        why=why,
        hint=f"{ORIGINAL}{rest}",
    )
