"""Names, types and limits of a pseudo-quantized model (pseudo.py). Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from builder.core.errors import UnsupportedError
from builder.core.output import listed
from builder.formats.base import NumberFormat

if TYPE_CHECKING:
    import torch

PREFIX = "pseudo_quantized_model-"
QUANTIZE_CONFIG = "quantize_config.json"
# Weights are one file up to this size, and several beyond it: where transformers 5 begins to shard what it saves
# (modeling_utils.py, save_pretrained, max_shard_size), and the largest file that the Hub advises.
LARGEST_FILE = 50_000_000_000


@dataclass(frozen=True)
class Dtype:
    """A type of weights: its names in config.json and in safetensors."""

    title: str
    safetensors: str

    @property
    def torch(self) -> torch.dtype:
        """torch's own."""
        import torch

        found: Any = getattr(torch, self.title)
        return found  # type: ignore[no-any-return]


DTYPES = {"bf16": Dtype("bfloat16", "BF16"), "fp16": Dtype("float16", "F16")}


def stem(whole: NumberFormat) -> str:
    """The files' name without its end, by the format of most layers: pseudo_quantized_model-4bit-16g."""
    group = f"-{whole.group_size}g" if whole.group_size else ""
    return f"{PREFIX}{int(whole.bits)}bit{group}"


def has_blocks(one: NumberFormat) -> bool:
    """Whether its weights are E2M1 codes in blocks with a scale each, under a scale of the tensor."""
    return any(tensor.name == "block_scale" for tensor in one.tensors)


def check_formats(formats: Iterable[NumberFormat]) -> None:
    """UnsupportedError unless these are formats of quantized layers that a pseudo-quantized model has files for."""
    used = [one for one in dict.fromkeys(formats) if one.quant_algo is not None]
    lacking = [one.title for one in used if one.scales_inputs or not (has_blocks(one) or _is_fp8(one) or is_int8(one))]
    if used and not lacking:
        return
    why = f"Its weights are in {listed(lacking)}." if lacking else "Nothing is quantized."
    raise UnsupportedError(
        "There is no pseudo-quantized model of this checkpoint.",
        why=f"{why} It is written for NVFP4, FP8 and INT8 without scales of inputs, whose scales are then beside the "
        "weights.",
        hint="Leave --save-pseudo out, or choose --format nvfp4.",
    )


def is_int8(one: NumberFormat) -> bool:
    """Whether its weights are integers with a scale for each output, and nothing else."""
    return one.packs and one.weight.content == "integers"


def _is_fp8(one: NumberFormat) -> bool:
    return one.weight.dtypes == ("F8_E4M3",) and one.group_size is None
