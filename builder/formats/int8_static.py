"""INT8 W8A8 static: the weights of `int8_dynamic`, and one calibrated scale for all inputs of a layer.

llm-compressor has no preset of this name; it is W8A8 with `input_activations` per tensor and not dynamic. Servers
compute no range while they run, but a layer whose inputs have a few huge values (down_proj) loses all others: measure
it, and leave such layers out with --keep-bf16 '*.down_proj'. It differs from `int8_sq` in that no scales of single
inputs smooth these outliers. Arithmetic: builder/formats/arithmetic/int8.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from builder.formats.base import Scheme, StoredTensor
from builder.formats.int8_dynamic import PER_CHANNEL, SOURCE, WEIGHT, Int8

if TYPE_CHECKING:
    from torch import Tensor

# The observer that llm-compressor (0.12) needs for an input that is not dynamic.
PER_TENSOR = {"num_bits": 8, "type": "int", "strategy": "tensor", "observer": "static_minmax"}


class Int8Static(Int8):
    """INT8 with one scale for the inputs of a layer."""

    def round_input(self, x: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
        """Rounds under the calibrated scale."""
        from builder.formats.arithmetic import int8

        return int8.round_trip(x, stored["input_scale"])


FORMAT = Int8Static(
    name="int8_static",
    title="INT8 W8A8 (static)",
    quant_algo="INT8_STATIC",
    bits=8.0,
    tensors=(
        *WEIGHT,
        StoredTensor("input_scale", "input_scale", "", ("F32",), (), "scale", "int8_scales", calibrated=True),
    ),
    label="int8_static",
    whole_model=True,
    targets=(),
    targets_source=SOURCE,
    compressed_tensors=Scheme("int-quantized", PER_CHANNEL, PER_TENSOR),
    input_range=127.5,
    needs_ranges=True,
    compressed_only=True,
)
