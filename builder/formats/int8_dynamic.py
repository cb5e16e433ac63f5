"""INT8 W8A8 dynamic: INT8 weights with a scale for each output, and INT8 inputs with one for each token.

Nothing is calibrated: scales of inputs are computed when the layer runs. llm-compressor calls it W8A8, and models that
vLLM serves end in `quantized.w8a8`; it is `int8_dynamic` here beside `int8_static` and `int8_sq`. Only readers of
compressed-tensors take it: TensorRT-LLM 1.2 multiplies INT8 in engines alone, with a fused SmoothQuant
(tensorrt_llm/models/llama/convert.py, W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN; its PyTorch backend has no W8A8 layer:
_torch/modules/linear.py@ed53795b, get_quant_method). vLLM's kernel divides a token's largest magnitude by 127 where
compressed-tensors divides it by 127.5 (csrc/quantization/w8a8/int8/scaled_quant.cu), a step of 0.4 %.
Arithmetic: builder/formats/arithmetic/int8.py.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from builder.formats.base import IN, OUT, NumberFormat, Scheme, StoredTensor

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, dtype

SOURCE = "Only servers that read compressed-tensors run it (vLLM, SGLang), and transformers."
# compressed-tensors' arguments (0.18, quantization/quant_scheme.py, INT8_W8A8).
PER_CHANNEL = {"num_bits": 8, "type": "int", "strategy": "channel"}
PER_TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "observer": None}


class Int8(NumberFormat):
    """INT8 per channel with its arithmetic; inputs have a scale for each token."""

    def modelopt(self, mtq: Any) -> dict[str, Any]:
        """What reads ranges of the KV cache with ModelOpt, and of the inputs where the format stores their scale.
        ModelOpt's own INT8 has other scales, and its weights are not written."""
        config: dict[str, Any] = copy.deepcopy(mtq.INT8_DEFAULT_CFG)
        if self.input_range is None:
            entries, off = config["quant_cfg"], {"enable": False}
            if isinstance(entries, dict):  # up to ModelOpt 0.43
                entries["*input_quantizer"] = off
            else:
                entries.append({"quantizer_name": "*input_quantizer", **off})
        return config

    def pack(
        self, rows: np.ndarray[Any, Any], dtype: str, amax: float, *, rounded_to: str, threads: int | None = None
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Codes under a scale for each output, and these scales."""
        from builder.formats.kernels import integers

        scales = integers.scales_of(rows, dtype, rounded_to=rounded_to, threads=threads)
        return {"weight": integers.pack(rows, dtype, scales, rounded_to, threads), "weight_scale": scales}

    def scales_of(self, amax: Tensor, kind: dtype) -> Tensor:
        """The float32 scales of outputs with these largest magnitudes, in a model of the type `kind`."""
        from builder.formats.arithmetic import int8

        return int8.scales_of(amax)

    def stored_codes(self, codes: Tensor) -> Tensor:
        """INT8 codes [outputs, inputs] with the bytes that are stored."""
        return codes

    def dequantize(self, stored: Mapping[str, Tensor], kind: dtype) -> Tensor:
        """The INT8 weight [outputs, inputs] times the scales of its outputs."""
        from builder.formats.arithmetic import int8

        return int8.dequantize(stored["weight"], stored["weight_scale"], kind)

    def round_input(self, x: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
        """Rounds each token under a scale of its own."""
        from builder.formats.arithmetic import int8

        return int8.round_rows(x)

    def round_weight(self, weight: Tensor, amax: Tensor) -> Tensor:
        """Rounds each output under a scale of its own; a largest magnitude of several does not matter."""
        from builder.formats.arithmetic import int8

        return int8.round_rows(weight.float())


WEIGHT = (
    StoredTensor("weight", "weight", "", ("I8",), (OUT, IN), "integers", "int8_weights"),
    StoredTensor("weight_scale", "weight_scale", "", ("F32",), (OUT,), "positive", "int8_scales"),
)
FORMAT = Int8(
    name="int8_dynamic",
    title="INT8 W8A8 (dynamic)",
    quant_algo="INT8_DYNAMIC",
    bits=8.0,
    tensors=WEIGHT,
    label="int8_dynamic",
    whole_model=True,
    targets=(),
    targets_source=SOURCE,
    compressed_tensors=Scheme("int-quantized", PER_CHANNEL, PER_TOKEN),
    compressed_only=True,
)
