"""Our safetensors reader and writer, against the safetensors library in both directions, and on damaged files."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from builder.core.errors import IntegrityError
from builder.core.safetensors_io import (
    FileRange,
    NewTensor,
    TensorInfo,
    Tensors,
    byte_size,
    overwrite,
    read_header,
    read_metadata,
    write,
)

DATA = Path(__file__).parents[1] / "data"
TORCH_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16", "I32": "int32", "U32": "uint32",
    "I64": "int64", "U64": "uint64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12)
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
TENSORS = st.dictionaries(
    NAMES.filter("__metadata__".__ne__), st.tuples(st.sampled_from(sorted(TORCH_NAMES)), SHAPES), max_size=8
)


def content(name: str, dtype: str, shape: tuple[int, ...]) -> bytes:
    """Distinct bytes for each tensor (only 0 and 1, which are also valid for bool)."""
    return bytes((len(name) * 7 + i * i) % 3 % 2 for i in range(byte_size(dtype, shape)))


@given(TENSORS, st.integers(0, 40))
@settings(max_examples=50)
def test_small_tensors_are_overwritten_and_others_stay(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Any], up_to: int
) -> None:
    path = tmp_path_factory.mktemp("overwrite") / "ours.safetensors"
    old = {n: bytes(byte_size(*header)) for n, header in tensors.items()}
    new = {n: content(n, *header) for n, header in tensors.items()}
    write(path, [NewTensor(n, d, s, [old[n]]) for n, (d, s) in tensors.items()])
    overwrite(path, [NewTensor(n, d, s, [new[n]]) for n, (d, s) in tensors.items()], up_to)
    stored = Tensors(path.parent, [path])
    assert {n: stored.read(n) for n in stored} == {n: new[n] if len(new[n]) <= up_to else old[n] for n in tensors}


def test_a_file_of_other_tensors_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "ours.safetensors"
    write(path, [NewTensor("a", "F32", (1,), [b"0000"])])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="holds other tensors"):
        overwrite(path, [NewTensor("b", "F32", (1,), [b"1111"])], 64)
    assert path.read_bytes() == before


@given(TENSORS)
@settings(max_examples=150)
def test_the_library_reads_what_we_write(tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Any]) -> None:
    path = tmp_path_factory.mktemp("write") / "ours.safetensors"
    write(path, [NewTensor(n, d, s, [content(n, d, s)]) for n, (d, s) in tensors.items()], {"format": "pt"})
    raw = path.read_bytes()
    read = {name: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for name, t in safetensors.deserialize(raw)}
    assert read == {n: (d, s, content(n, d, s)) for n, (d, s) in tensors.items()}
    assert int.from_bytes(raw[:8], "little") % 8 == 0
    for name, info in read_header(path).items():
        if info.nbytes:
            assert info.begin % (byte_size(info.dtype, ()) or 1) == 0, name


@given(TENSORS)
@settings(max_examples=150)
def test_we_read_what_the_library_writes(tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Any]) -> None:
    import torch
    from safetensors.torch import save_file

    def tensor(name: str, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
        raw = torch.tensor(list(content(name, dtype, shape)), dtype=torch.uint8)
        return raw.view(getattr(torch, TORCH_NAMES[dtype])).reshape(shape)

    directory = tmp_path_factory.mktemp("read")
    theirs = {n: tensor(n, d, s) for n, (d, s) in tensors.items()}
    save_file(theirs, directory / "theirs.safetensors", {"a": "b"})
    ours = Tensors(directory)
    assert set(ours) == set(tensors)
    for name, (dtype, shape) in tensors.items():
        assert (ours[name].dtype, ours[name].shape) == (dtype, shape)
        assert ours.read(name) == b"".join(ours.chunks(name)) == content(name, dtype, shape)
    again = [NewTensor(name, info.dtype, info.shape, [ours.place(name)]) for name, info in ours.items()]
    write(directory / "again.safetensors", again, {"a": "b"})
    assert (directory / "again.safetensors").read_bytes() == (directory / "theirs.safetensors").read_bytes()


def test_all_shards_of_a_directory_are_one(tmp_path: Path) -> None:
    tensors = Tensors(DATA / "tiny-qwen3")
    assert len(tensors.files) == 3
    assert len(tensors) == 69
    assert tensors["model.embed_tokens.weight"].shape == (4096, 256)
    joined = b"".join(tensors.chunks("model.norm.weight", "model.layers.0.input_layernorm.weight"))
    assert joined == tensors.read("model.norm.weight") + tensors.read("model.layers.0.input_layernorm.weight")


def test_a_file_that_is_cut_while_its_tensors_are_read_is_reported(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    write(file, [NewTensor("a", "U8", (1 << 20,), [b"1" * (1 << 20)])])
    tensors = Tensors(tmp_path)
    os.truncate(file, 1 << 19)
    tensors.prefetch("a")
    for read in (lambda: tensors.read("a"), lambda: list(tensors.chunks("a"))):
        with pytest.raises(IntegrityError, match="became shorter"):
            read()


def test_a_file_beside_the_model_is_not_the_model(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", [NewTensor("a", "U8", (1,), [b"1"])])
    write(tmp_path / "consolidated.safetensors", [NewTensor("b", "U8", (1,), [b"2"])])
    assert list(Tensors(tmp_path)) == ["a"]


def test_an_index_that_disagrees_is_refused(tmp_path: Path) -> None:
    model = shutil.copytree(DATA / "tiny-qwen3", tmp_path / "model")
    path = model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["model.norm.weight"]
    path.write_text(json.dumps(index))
    with pytest.raises(IntegrityError, match=r"disagree on 1 tensors[\s\S]*model\.norm\.weight"):
        Tensors(model)
    path.write_text(json.dumps({"weight_map": {"x": "../model-00001-of-00003.safetensors"}}))
    with pytest.raises(IntegrityError, match="not an index") as refused:
        Tensors(model)
    assert "outside of its directory" in refused.value.why
    for text, why in (("{", "JSONDecodeError"), ("{}", "KeyError: 'weight_map'"), ("[]", "TypeError")):
        path.write_text(text)
        with pytest.raises(IntegrityError, match="not an index") as refused:
            Tensors(model)
        assert why in refused.value.why
    path.write_text(json.dumps({"weight_map": {"x": "absent.safetensors"}}))
    with pytest.raises(IntegrityError, match=r"absent\.safetensors"):
        Tensors(model)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / f"{name}.safetensors", [NewTensor("a", "U8", (1,), [b"1"])])
    with pytest.raises(IntegrityError, match=r"one\.safetensors and in two\.safetensors"):
        Tensors(tmp_path)


def header(**tensors: Any) -> bytes:
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4" * 64 + b"\nsize 4853112\n"
DAMAGED = {
    "a Git LFS pointer": (POINTER, "Git LFS pointer"),
    "empty": (b"", "0 bytes"),
    "cut in the header": (header(a=entry("U8", [4], 0, 4))[:20], "truncated"),
    "cut in the data": (header(a=entry("U8", [4], 0, 4)) + b"123", "truncated"),
    "too long": (header(a=entry("U8", [4], 0, 4)) + b"12345", "after its last tensor"),
    "not JSON": ((4).to_bytes(8, "little") + b"{{{{", "header is invalid"),
    "a list": ((2).to_bytes(8, "little") + b"[]", "header is invalid"),
    "an unknown dtype": (header(a=entry("F99", [4], 0, 4)) + b"1234", "F99"),
    "a wrong size": (header(a=entry("F32", [4], 0, 4)) + b"1234", "needs 16 bytes but has 4"),
    "an overlap": (header(a=entry("U8", [4], 0, 4), b=entry("U8", [4], 2, 6)) + b"123456", "overlap"),
    "a gap": (header(a=entry("U8", [1], 0, 1), b=entry("U8", [1], 2, 3)) + b"123", "gap"),
    "a negative shape": (header(a=entry("U8", [-1, -4], 0, 4)) + b"1234", "not a non-negative integer"),
    "a name twice": ((b := b'{"a":1,"a":2}') and len(b).to_bytes(8, "little") + b, "twice"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_says_what_it_is(tmp_path: Path, case: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(DAMAGED[case][0])
    with pytest.raises(IntegrityError, match=DAMAGED[case][1]) as caught:
        Tensors(tmp_path)
    assert str(path) in caught.value.what
    assert caught.value.exit_code == 6


def test_no_file_at_all(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="contains no"):
        Tensors(tmp_path)


@pytest.mark.parametrize("chunks", [[b"123"], [b"123", b"45"]])
def test_a_wrong_number_of_bytes_leaves_no_file(tmp_path: Path, chunks: list[bytes]) -> None:
    with pytest.raises(ValueError, match=r"a: got \d bytes"):
        write(tmp_path / "x.safetensors", [NewTensor("a", "U8", (4,), chunks)])
    assert list(tmp_path.iterdir()) == []


def test_a_name_twice_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="twice"):
        write(tmp_path / "x.safetensors", [NewTensor("a", "U8", (1,), [b"1"])] * 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_mode_honours_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write(tmp_path / "x.safetensors", [])
    finally:
        os.umask(before)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == mode


def test_writing_holds_one_chunk(tmp_path: Path) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(64):
            yield bytes(1 << 20)

    tracemalloc.start()
    try:
        write(tmp_path / "x.safetensors", [NewTensor("a", "U8", (1 << 26,), chunks())])
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    info = read_header(tmp_path / "x.safetensors")["a"]
    assert info == TensorInfo("U8", (1 << 26,), info.begin, info.begin + (1 << 26))


@pytest.mark.parametrize("kernel_copy", [True, False])
def test_a_tensor_is_copied_from_another_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel_copy: bool
) -> None:
    data = bytes(range(256)) * 40
    write(tmp_path / "a.safetensors", [NewTensor("x", "U8", (5,), [b"12345"]), NewTensor("y", "F32", (2560,), [data])])
    if not kernel_copy:  # as across two file systems

        def refuse(*_: object) -> int:
            raise OSError(errno.EXDEV, "Invalid cross-device link")

        monkeypatch.setattr(os, "copy_file_range", refuse)
    source = Tensors(tmp_path, [tmp_path / "a.safetensors"])
    made = [NewTensor(name, info.dtype, info.shape, [source.place(name)]) for name, info in source.items()]
    write(tmp_path / "b.safetensors", made)
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()


def test_a_source_that_shrinks_while_it_is_copied_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(b"123")
    with pytest.raises(IntegrityError, match="shorter"):
        write(tmp_path / "x.safetensors", [NewTensor("a", "U8", (4,), [FileRange(tmp_path / "raw", 0, 4)])])
    assert not (tmp_path / "x.safetensors").exists()


def test_the_metadata_of_a_file_is_read(tmp_path: Path) -> None:
    write(tmp_path / "x.safetensors", [NewTensor("a", "U8", (1,), [b"1"])], {"format": "pt", "note": "ü"})
    assert read_metadata(tmp_path / "x.safetensors") == {"format": "pt", "note": "ü"}
    write(tmp_path / "y.safetensors", [])
    assert read_metadata(tmp_path / "y.safetensors") == {}
