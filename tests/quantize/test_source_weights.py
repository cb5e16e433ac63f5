"""A source's weights, mapped piece by piece and rounded to other float types."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from builder.architectures.written import Part
from builder.core.safetensors_io import NewTensor, Tensors, write
from builder.quantize.source_weights import MappedWeights, rounded

KINDS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@given(st.lists(st.floats(width=32), min_size=1, max_size=50), st.sampled_from([*KINDS]), st.sampled_from([*KINDS]))
def test_rounding_is_to_nearest_even(values: list[float], stored: str, to: str) -> None:
    given = torch.tensor(values, dtype=torch.float32).to(KINDS[stored])
    bits = given.view(torch.int16 if given.itemsize == 2 else torch.int32).numpy()
    made = rounded(bits.view("<u2" if given.itemsize == 2 else "<u4"), stored, to)
    found, wanted = torch.frombuffer(bytearray(made.tobytes()), dtype=KINDS[to]), given.to(KINDS[to])
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found[~found.isnan()], wanted[~wanted.isnan()])


def test_rows_of_a_stacked_parameter_are_views_that_survive_their_release(tmp_path: Path) -> None:
    values = np.arange(3 * 8 * 4, dtype=np.uint16).reshape(3, 8, 4)
    write(tmp_path / "model.safetensors", [NewTensor("experts", "BF16", values.shape, [values.tobytes()])])
    mapped = MappedWeights(Tensors(tmp_path))
    second = Part("experts.1.up", "BF16", (4, 4), "experts", start=8 * 4 + 4 * 4)
    rows = mapped.rows(second, 1, 3)
    assert rows.tolist() == values[1, 5:7].tolist()
    mapped.release(second)
    assert rows.tolist() == values[1, 5:7].tolist()
    assert not rows.flags.writeable
