"""A source's weights, read piece by piece and rounded to other float types."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from builder.architectures.written import Part
from builder.core.errors import IntegrityError
from builder.core.safetensors_io import NewTensor, Tensors, write
from builder.quantize.source_weights import WeightReader, rounded

KINDS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@given(st.lists(st.floats(width=32), min_size=1, max_size=50), st.sampled_from([*KINDS]), st.sampled_from([*KINDS]))
def test_rounding_is_to_nearest_even(values: list[float], stored: str, to: str) -> None:
    given = torch.tensor(values, dtype=torch.float32).to(KINDS[stored])
    bits = given.view(torch.int16 if given.itemsize == 2 else torch.int32).numpy()
    made = rounded(bits.view("<u2" if given.itemsize == 2 else "<u4"), stored, to)
    found, wanted = torch.frombuffer(bytearray(made.tobytes()), dtype=KINDS[to]), given.to(KINDS[to])
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found[~found.isnan()], wanted[~wanted.isnan()])


def test_rows_of_a_stacked_parameter(tmp_path: Path) -> None:
    values = np.arange(3 * 8 * 4, dtype=np.uint16).reshape(3, 8, 4)
    write(tmp_path / "model.safetensors", [NewTensor("experts", "BF16", values.shape, [values.tobytes()])])
    reader = WeightReader(Tensors(tmp_path))
    second = Part("experts.1.up", "BF16", (4, 4), "experts", start=8 * 4 + 4 * 4)
    assert reader.rows(second, 1, 3).tolist() == values[1, 5:7].tolist()
    assert reader.rows(second).tolist() == values[1, 4:8].tolist()


def test_each_thread_reads_into_a_buffer_of_its_own(tmp_path: Path) -> None:
    values = np.arange(4 * 8, dtype=np.uint32).reshape(4, 8)
    write(tmp_path / "model.safetensors", [NewTensor("weight", "F32", values.shape, [values.tobytes()])])
    reader, part = WeightReader(Tensors(tmp_path)), Part("weight", "F32", (4, 8), "weight")
    mine = reader.rows(part, 0, 2)
    with ThreadPoolExecutor(1) as other:
        theirs = other.submit(reader.rows, part, 2, 4).result()
    assert (mine.tolist(), theirs.tolist()) == (values[:2].tolist(), values[2:].tolist())
    assert np.shares_memory(mine, reader.rows(part, 1, 3))


def test_a_file_that_is_cut_between_two_reads_is_reported(tmp_path: Path) -> None:
    values = np.zeros((64, 1024), np.uint16)
    file = tmp_path / "model.safetensors"
    write(file, [NewTensor("weight", "BF16", values.shape, [values.tobytes()])])
    reader, part = WeightReader(Tensors(tmp_path)), Part("weight", "BF16", (64, 1024), "weight")
    reader.rows(part)
    os.truncate(file, file.stat().st_size // 2)
    assert not reader.rows(part, 0, 8).any()
    with pytest.raises(IntegrityError, match="became shorter"):
        reader.rows(part, 0, 64)
