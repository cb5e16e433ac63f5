"""Formats of the KV cache: the recipe's `quantization.kv_cache_dtype`.

Tensors: ModelOpt exports one scale for the keys and one for the values of a layer. TensorRT-LLM reads three and takes
the larger for both (models/modeling_utils.py, process_kv_scaling_factor).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from builder.core.errors import UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

SCALE_BYTES = 4  # of an F32 scale
UNIFIED = ("k_proj.k_scale", "v_proj.v_scale")
TENSORRT_LLM = ("k_cache_scaling_factor", "v_cache_scaling_factor", "kv_cache_scaling_factor")


@dataclass(frozen=True)
class KvCacheFormat:
    """A format of the KV cache. Subclasses add the arithmetic.

    name: in recipes; title: for people; quant_algo: in checkpoints, None where the cache is not quantized.
    bits: of a value, with the scales of its group.
    modelopt_config: the configuration of modelopt.torch.quantization that calibrates the scales.
    gpu_format: the entry of `formats` in configs/gpus/*.yaml that a GPU must have.
    targets: the targets that run it; targets_source: why not the others.
    fp8_attention: whether TensorRT-LLM attends over it in FP8.
    one_scale: whether keys and values are stored under the larger of their scales, as engines do.
    unified, tensorrt_llm, compressed_tensors: the names of a layer's scales (F32, one number) after the attention's
        name, in the order of `unified`.
    scale_range: the largest magnitude of a key or value under the scale 1.
    least_scale: the smallest scale in TensorRT-LLM's layout, as ModelOpt's export to it writes them.
    """

    name: str
    title: str
    quant_algo: str | None
    bits: float
    modelopt_config: str | None = None
    gpu_format: str | None = None
    targets: tuple[str, ...] = ("engine", "llmapi")
    targets_source: str = ""
    fp8_attention: bool = False
    one_scale: bool = True
    unified: tuple[str, ...] = ()
    tensorrt_llm: tuple[str, ...] = ()
    compressed_tensors: tuple[str, ...] = ()
    least_scale: float = 0.0
    scale_range: float = 1.0

    @property
    def quantized(self) -> bool:
        """Whether the cache has scales."""
        return self.quant_algo is not None

    def nbytes(self, values: int) -> int:
        """Bytes of so many values, which are whole groups."""
        return math.ceil(values * self.bits / 8)

    def scale_bytes(self, *, unified: bool) -> int:
        """Bytes of one layer's scales in a layout."""
        return SCALE_BYTES * len(self.unified if unified else self.tensorrt_llm)

    def modelopt(self, mtq: Any) -> Any:
        """ModelOpt's entries for the cache's quantizers, {} if there are none; `mtq` is modelopt.torch.quantization."""
        return getattr(mtq, self.modelopt_config)["quant_cfg"] if self.modelopt_config else {}

    def engine_scales(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Scales of the Hugging Face layout -> those under which an engine made of it stores keys and values."""
        keys, values = (scale.clamp(min=self.least_scale) for scale in (keys, values))
        return (keys.maximum(values),) * 2 if self.one_scale else (keys, values)

    def round(self, x: Tensor, scale: Tensor) -> Tensor:
        """Keys (after RoPE) or values [..., head size] as they are read back from the cache, in the dtype of `x`."""
        return x


class Fp8Cache(KvCacheFormat):
    """E4M3 under one scale."""

    def round(self, x: Tensor, scale: Tensor) -> Tensor:
        """Rounds to E4M3."""
        from builder.formats.arithmetic import fp8

        return fp8.round_e4m3(x, scale)


class Nvfp4Cache(KvCacheFormat):
    """E2M1 in blocks of 16 values of a head, with an E4M3 scale each that is computed as the cache is filled, under one
    calibrated scale."""

    def round(self, x: Tensor, scale: Tensor) -> Tensor:
        """Rounds as NVFP4 activations are."""
        from builder.formats.arithmetic import nvfp4

        return nvfp4.fake_quantize(x, scale)


FP8 = Fp8Cache(
    name="fp8",
    title="FP8 KV cache",
    quant_algo="FP8",
    bits=8.0,
    modelopt_config="FP8_KV_CFG",
    gpu_format="fp8_kv_cache",
    fp8_attention=True,
    unified=UNIFIED,
    tensorrt_llm=TENSORRT_LLM,
    compressed_tensors=("k_scale", "v_scale"),
    scale_range=448.0,
    # "Recommend default kv cache scaling factor to be 1" (export/quant_utils.py, get_kv_cache_scaling_factor).
    least_scale=1.0,
)
AUTO = KvCacheFormat(name="auto", title="KV cache in the model's type", quant_algo=None, bits=16.0)
# Scale: amax / (6 x 448) in ModelOpt 0.37, amax / 448 in 0.47's Hugging Face layout (export/unified_export_hf.py).
# Values are written and read under the same scale, so both are right; TensorRT-LLM of autumn 2025 multiplies by 6,
# later ones don't (_torch/modules/linear.py). TensorRT-LLM's layout keeps the value: no engine reads it.
NVFP4 = Nvfp4Cache(
    name="nvfp4",
    title="NVFP4 KV cache",
    quant_algo="NVFP4",
    bits=4.5,  # 4 for each value, 8 for every 16
    modelopt_config="NVFP4_KV_CFG",
    gpu_format="nvfp4_kv_cache",
    targets=("llmapi",),
    targets_source="TensorRT-LLM added it to the PyTorch backend (NVIDIA/TensorRT-LLM #6244).",
    fp8_attention=True,  # in both phases, says NVIDIA/TensorRT-LLM #6244
    one_scale=False,
    unified=UNIFIED,
    tensorrt_llm=TENSORRT_LLM,
    scale_range=6 * 448.0,
)
FORMATS: Mapping[str, KvCacheFormat] = {one.name: one for one in (FP8, AUTO, NVFP4)}
# Formats of TensorRT-LLM's that are rejected, and why (rules R31 and R32 of configs/trtllm).
REJECTED = {
    "int8": "an INT8 KV cache does not work with paged context FMHA, so in an engine it costs KV reuse and chunked "
    "context, and sm100 to sm119 do not support it; the PyTorch backend took it up in autumn 2026, for BF16 weights "
    "alone, and ModelOpt's Hugging Face exporter does not write it",
}


def get(name: str) -> KvCacheFormat:
    """The format with this name in recipes. KeyError for another."""
    return FORMATS[name]


def of_algo(quant_algo: str | None) -> KvCacheFormat | None:
    """The format that a checkpoint's kv_cache_quant_algo names, None for an unknown one."""
    return next((one for one in FORMATS.values() if one.quant_algo == quant_algo), None)


def of_checkpoint(quant_algo: str | None) -> KvCacheFormat:
    """The same; UnsupportedError for an unknown one."""
    found = of_algo(quant_algo)
    if found is not None:
        return found
    raise UnsupportedError(
        f"A KV cache in {quant_algo} is not supported.",
        why=f"Supported: {', '.join(str(one.quant_algo) for one in FORMATS.values())}.",
    )
