"""BF16: a linear layer that is left as the model has it. (The model may also be float16: builder/model/dtypes.py.)"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from builder.formats.base import FLOATS, IN, OUT, NumberFormat, StoredTensor

if TYPE_CHECKING:
    from torch import Tensor, dtype


class Bf16(NumberFormat):
    """BF16: nothing is rounded."""

    def modelopt(self, mtq: Any) -> dict[str, Any]:
        """A configuration without quantizers, in the form that this version of ModelOpt has."""
        as_dict = isinstance(mtq.FP8_DEFAULT_CFG["quant_cfg"], dict)
        off = {"default": {"enable": False}} if as_dict else [{"quantizer_name": "*", "enable": False}]
        return {"quant_cfg": off, "algorithm": "max"}

    def quantizers(self, mtq: Any) -> dict[str, Mapping[str, Any] | None]:
        """All off."""
        return {"*": None}

    def dequantize(self, stored: Mapping[str, Tensor], kind: dtype) -> Tensor:
        """The weight in `kind`."""
        return stored["weight"].to(kind)

    def round_input(self, x: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
        """The input as it is."""
        return x

    def round_weight(self, weight: Tensor, amax: Tensor) -> Tensor:
        """The weight as it is."""
        return weight.float()


FORMAT = Bf16(
    name="bf16",
    title="BF16",
    quant_algo=None,
    bits=16.0,
    tensors=(StoredTensor("weight", "weight", "weight", FLOATS, (OUT, IN), "floats", "kept_linears"),),
    label="kept",
    whole_model=True,
)
