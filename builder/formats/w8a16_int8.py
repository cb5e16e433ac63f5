"""W8A16 INT8: INT8 weights with a scale for each output, and inputs that are not quantized.

llm-compressor's preset W8A16 has groups of 128 inputs; a scale for each output costs nothing and loses little in 8
bits. compressed-tensors packs four codes into an integer (0.18, compressors/pack_quantized: `pack-quantized`, each code
plus 128), which vLLM's Marlin kernels read; it loads the scales in the model's type, so they are rounded to it here,
before the codes are computed (model_executor/layers/quantization/compressed_tensors/schemes, wNa16). TensorRT-LLM 1.2
has a weight-only INT8 plugin for engines, whose checkpoints are laid out for one GPU architecture
(tensorrt_llm/quantization/functional.py, preprocess_weights_for_mixed_gemm), and none in its PyTorch backend.
Arithmetic: builder/formats/arithmetic/int8.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from builder.formats.base import OUT, Dim, Scheme, StoredTensor
from builder.formats.int8_dynamic import PER_CHANNEL, SOURCE, WEIGHT, Int8

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, dtype

PACKED = 4  # codes in an I32


class W8a16Int8(Int8):
    """INT8 for weights only."""

    def misfit(self, weight: Sequence[int]) -> str:
        """It is made of whole packed integers."""
        odd = weight[-1] % PACKED
        return f"an input size that is not a multiple of {PACKED}, which {self.title} packs into one number" * bool(odd)

    def pack(
        self, rows: np.ndarray[Any, Any], dtype: str, amax: float, *, rounded_to: str, threads: int | None = None
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Packed codes under a scale for each output, and these scales, which the model's type can hold."""
        from builder.formats.kernels import integers

        scales = integers.scales_of(rows, dtype, rounded_to=rounded_to, threads=threads, kind=rounded_to)
        codes = integers.pack(rows, dtype, scales, rounded_to, threads, unsigned=True)
        return {"weight": codes, "weight_scale": scales}

    def scales_of(self, amax: Tensor, kind: dtype) -> Tensor:
        """The scales, which the model's type can hold."""
        from builder.formats.arithmetic import int8

        return int8.scales_of(amax, kind)

    def stored_codes(self, codes: Tensor) -> Tensor:
        """Packs four codes into each number."""
        from builder.formats.arithmetic import int8

        return int8.pack(codes)

    def dequantize(self, stored: Mapping[str, Tensor], kind: dtype) -> Tensor:
        """Unpacks the weight [outputs, inputs]."""
        from builder.formats.arithmetic import int8

        return int8.dequantize(int8.unpack(stored["weight"]), stored["weight_scale"], kind)

    def round_input(self, x: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
        """The input as it is."""
        return x

    def round_weight(self, weight: Tensor, amax: Tensor) -> Tensor:
        """Rounds each output under a scale of its own, which the type of `weight` can hold."""
        from builder.formats.arithmetic import int8

        scale = self.scales_of(weight.abs().amax(-1, keepdim=True), weight.dtype)
        return int8.round_trip(weight.float(), scale)


FORMAT = W8a16Int8(
    name="w8a16_int8",
    title="INT8 weights",
    quant_algo="W8A16_INT8",
    bits=8.0,
    tensors=(
        StoredTensor(
            "weight", "weight", "", ("I32",), (OUT, Dim("in", PACKED)), "integers", "int8_weights",
            compressed_tensors="weight_packed",
        ),
        *WEIGHT[1:],
    ),
    label="w8a16_int8",
    whole_model=True,
    targets=(),
    targets_source=SOURCE,
    compressed_tensors=Scheme("pack-quantized", PER_CHANNEL),
    compressed_only=True,
)  # fmt: skip
