"""Formats of the KV cache: the recipe's `quantization.kv_cache_dtype`.

Tensors: ModelOpt exports one scale for the keys and one for the values of a layer. TensorRT-LLM reads three and takes
the larger for both (models/modeling_utils.py, process_kv_scaling_factor).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from builder.core.errors import UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

SCALE_BYTES = 4  # of an F32 scale


@dataclass(frozen=True)
class KvCacheFormat:
    """A format of the KV cache.

    name: in recipes; title: for people; quant_algo: in checkpoints, None where the cache is not quantized.
    nbytes: of a value. modelopt_config: the configuration of modelopt.torch.quantization that calibrates the scales.
    gpu_format: the entry of `formats` in configs/gpus/*.yaml that a GPU must have.
    unified, tensorrt_llm, compressed_tensors: the names of a layer's scales (F32, one number) after the attention's
        name, in the order of `unified`.
    """

    name: str
    title: str
    quant_algo: str | None
    nbytes: int
    modelopt_config: str | None = None
    gpu_format: str | None = None
    unified: tuple[str, ...] = ()
    tensorrt_llm: tuple[str, ...] = ()
    compressed_tensors: tuple[str, ...] = ()

    @property
    def quantized(self) -> bool:
        """Whether the cache has scales."""
        return self.quant_algo is not None

    def scale_bytes(self, *, unified: bool) -> int:
        """Bytes of one layer's scales in a layout."""
        return SCALE_BYTES * len(self.unified if unified else self.tensorrt_llm)

    def modelopt(self, mtq: Any) -> Any:
        """ModelOpt's entries for the cache's quantizers, {} if there are none; `mtq` is modelopt.torch.quantization."""
        return getattr(mtq, self.modelopt_config)["quant_cfg"] if self.modelopt_config else {}

    def round(self, x: Tensor, scale: Tensor) -> Tensor:
        """Keys (after RoPE) or values as they are read back from the cache, in the dtype of `x`."""
        if not self.quantized:
            return x
        from builder.formats.arithmetic import fp8

        return fp8.round_e4m3(x, scale)


FP8 = KvCacheFormat(
    name="fp8",
    title="FP8 KV cache",
    quant_algo="FP8",
    nbytes=1,
    modelopt_config="FP8_KV_CFG",
    gpu_format="fp8_kv_cache",
    unified=("k_proj.k_scale", "v_proj.v_scale"),
    tensorrt_llm=("k_cache_scaling_factor", "v_cache_scaling_factor", "kv_cache_scaling_factor"),
    compressed_tensors=("k_scale", "v_scale"),
)
AUTO = KvCacheFormat(name="auto", title="KV cache in the model's type", quant_algo=None, nbytes=2)
FORMATS: Mapping[str, KvCacheFormat] = {one.name: one for one in (FP8, AUTO)}
# Formats of TensorRT-LLM's that are rejected, and why (rules R31, R32 and R45 of configs/trtllm).
REJECTED = {
    "nvfp4": "an NVFP4 KV cache does not run on sm120 (NVIDIA/TensorRT-LLM #10241), and is never calibrated here",
    "int8": "an INT8 KV cache does not work with paged context FMHA, so it costs KV reuse and chunked context, "
    "and sm100 to sm119 do not support it",
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
