"""The checks of a tensor's numbers read it in parts, and find what a look at all of it finds."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.checkpoint import tensor_checks
from builder.checkpoint.tensor_checks import HOLE, PAGE
from builder.core.errors import IntegrityError
from builder.core.safetensors_io import FileRange, StoredBytes, TensorInfo

RUNS = st.lists(st.tuples(st.booleans(), st.integers(1, 40)), min_size=1, max_size=12)  # (zeros?, pages)


def stored(path: Path, content: bytes, begin: int = 3) -> StoredBytes:
    path.write_bytes(b"x" * begin + content + b"\0" * PAGE)
    return StoredBytes(FileRange(path, begin, begin + len(content)))


def first_hole(content: bytes) -> tuple[int, int] | None:
    """Page by page."""
    begin = 0
    for page in range(0, len(content) // PAGE * PAGE + PAGE, PAGE):
        if page + PAGE <= len(content) and not any(content[page : page + PAGE]):
            continue
        if page - begin >= HOLE:
            return begin, page - begin
        begin = page + PAGE
    return None


@given(RUNS, st.integers(0, PAGE - 1), st.sampled_from([0, 8, PAGE - 1]))
def test_the_first_hole_is_found(runs: list[tuple[bool, int]], rest: int, at: int) -> None:
    """`at`: where a page that is not zero holds its one other byte."""
    page = {True: bytes(PAGE), False: bytes(at) + b"\x11" + bytes(PAGE - 1 - at)}
    content = b"".join(page[zeros] * pages for zeros, pages in runs) + bytes(rest)
    with tempfile.TemporaryDirectory() as made:
        assert tensor_checks.hole(stored(Path(made) / "file", content)) == first_hole(content)


def test_a_hole_that_is_longer_than_a_read_is_measured_whole(tmp_path: Path) -> None:
    length = 3 * tensor_checks.STEP + 5 * PAGE
    content = b"\x11" * (HOLE - PAGE) + bytes(length) + b"\x11" * HOLE
    assert tensor_checks.hole(stored(tmp_path / "file", content)) == (HOLE - PAGE, length)


@pytest.mark.parametrize("at", [0, tensor_checks.STEP - 2, tensor_checks.STEP, 2 * tensor_checks.STEP])
def test_bad_values_are_counted_in_all_parts(tmp_path: Path, at: int) -> None:
    content = bytearray(b"\x80\x3f" * (tensor_checks.STEP + 2))
    content[at : at + 2], content[-2:] = b"\xc0\x7f", b"\x80\xff"  # NaN, -Inf
    info = TensorInfo("BF16", (len(content) // 2,), 3, 3 + len(content))
    wrong = tensor_checks.wrong_floats(info, stored(tmp_path / "file", bytes(content)))
    assert wrong == f"has 1 NaN and 1 Inf of {len(content) // 2} values"


def test_a_slice_is_that_of_bytes(tmp_path: Path) -> None:
    content = bytes(range(100))
    data = stored(tmp_path / "file", content)
    for part in (slice(None), slice(5, 7), slice(90, 200), slice(7, 5), slice(-3, None), slice(100, 101)):
        assert data[part] == content[part]
    assert data.every(30, 4) == b"".join(content[at : at + 4] for at in (0, 30, 60, 90))
    assert data.every(49, 4) == content[:4] + content[49:53]  # at 98 there are two


def test_a_file_that_is_cut_is_reported(tmp_path: Path) -> None:
    data = stored(tmp_path / "file", b"\x11" * 4 * HOLE)
    os.truncate(tmp_path / "file", 2 * HOLE)
    for read in (tensor_checks.hole, tensor_checks.wrong_blocks, lambda data: data[:]):
        with pytest.raises(IntegrityError, match="became shorter"):
            read(data)
