"""Plants faults into a checkpoint: changed tensors, headers, files, indexes and configuration.

`edit` rewrites a checkpoint of one file; what it takes for a tensor is a function of its header and bytes that returns
the new (dtype, shape, bytes), or None to remove it. All others return a function that changes a directory in place.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from builder.core.safetensors_io import NewTensor, TensorInfo, Tensors, write

Plant = Callable[[Path], None]
New = tuple[str, tuple[int, ...], bytes]
Change = Callable[[TensorInfo, bytes], New | None]
INDEX = "model.safetensors.index.json"


def edit(*changes: tuple[str, Change]) -> Plant:
    """Rewrites the only file with tensors changed: (dtype, shape, bytes), or None to remove one."""

    def plant(folder: Path) -> None:
        tensors = Tensors(folder)
        [file] = tensors.files
        made = {name: (info.dtype, info.shape, tensors.read(name)) for name, info in tensors.items()}
        for name, change in changes:
            new = change(tensors[name], made[name][2]) if name in made else change(TensorInfo("F32", (), 0, 4), b"")
            made.pop(name, None)
            if new is not None:
                made[name] = new
        file.unlink()
        write(file, [NewTensor(n, d, s, [data]) for n, (d, s, data) in made.items()], {"format": "pt"})

    return plant


def number(value: float) -> Change:
    def change(info: TensorInfo, old: bytes) -> New:
        data = struct.pack("<f", value)
        return info.dtype, info.shape, data[2:] if info.dtype == "BF16" else data

    return change


def times(factor: float) -> Change:
    def change(info: TensorInfo, old: bytes) -> New:
        assert info.dtype == "F32"
        return "F32", info.shape, struct.pack("<f", struct.unpack("<f", old)[0] * factor)

    return change


def start(data: bytes) -> Change:
    return lambda info, old: (info.dtype, info.shape, data + old[len(data) :])


def end(data: bytes) -> Change:
    return lambda info, old: (info.dtype, info.shape, old[: len(old) - len(data)] + data)


def smaller(exponents: int) -> Change:
    """E4M3 numbers divided by a power of two, not below zero."""
    return each(lambda byte: byte & 0x80 | max((byte & 0x7F) - 8 * exponents, 0))


def each(table: Callable[[int], int]) -> Change:
    """Every byte replaced."""
    return lambda info, old: (info.dtype, info.shape, old.translate(bytes(table(byte) for byte in range(256))))


def gone(info: TensorInfo, old: bytes) -> None:
    return None


def new(kind: str, sizes: tuple[int, ...], data: bytes) -> Change:
    return lambda info, old: (kind, sizes, data)


def bf16() -> Change:
    """An unquantized weight in place of a packed one."""
    value = b"\x80\x3c"

    return lambda info, old: ("BF16", (info.shape[0], info.shape[1] * 2), value * (info.shape[0] * info.shape[1] * 2))


def copied(source: str, target: str) -> Plant:
    """The bytes of all tensors of one module in those of another."""

    def plant(folder: Path) -> None:
        tensors = Tensors(folder)
        names = [name for name in tensors if name.startswith(f"{source}.")]
        content = {name: tensors.read(name) for name in names}
        edit(*((target + n.removeprefix(source), start(data)) for n, data in content.items()))(folder)

    return plant


def document(file: str, change: Callable[[Any], None]) -> Plant:
    def plant(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        change(content)
        (folder / file).write_text(json.dumps(content))

    return plant


def both(*plants: Plant) -> Plant:
    def plant(folder: Path) -> None:
        for one in plants:
            one(folder)

    return plant


def cut(file: str, nbytes: int) -> Plant:
    return lambda folder: os.truncate(folder / file, (folder / file).stat().st_size - nbytes)


def append(file: str, data: bytes) -> Plant:
    def plant(folder: Path) -> None:
        with open(folder / file, "ab") as opened:
            opened.write(data)

    return plant


def header(file: str, change: Callable[[dict[str, Any]], None]) -> Plant:
    """Changes a file's header in place, padded to the same length."""

    def plant(folder: Path) -> None:
        content = (folder / file).read_bytes()
        length = int.from_bytes(content[:8], "little")
        entries = json.loads(content[8 : 8 + length])
        change(entries)
        text = json.dumps(entries, separators=(",", ":")).encode()
        assert len(text) <= length
        (folder / file).write_bytes(content[:8] + text.ljust(length) + content[8 + length :])

    return plant


def alias(one: str, other: str) -> Callable[[dict[str, Any]], None]:
    def change(entries: dict[str, Any]) -> None:
        entries[one]["data_offsets"] = entries[other]["data_offsets"]

    return change


def add(folder: Path, file: str, name: str) -> None:
    tensors = Tensors(folder)
    entry = NewTensor(name, tensors[name].dtype, tensors[name].shape, [tensors.read(name)])
    own = Tensors(folder, [folder / file])
    kept = [NewTensor(n, i.dtype, i.shape, [own.read(n)]) for n, i in own.items()]
    write(folder / "new", [*kept, entry])
    (folder / "new").replace(folder / file)


def remove(folder: Path, file: str, name: str) -> None:
    own = Tensors(folder, [folder / file])
    kept = [NewTensor(n, i.dtype, i.shape, [own.read(n)]) for n, i in own.items() if n != name]
    write(folder / "new", kept)
    (folder / "new").replace(folder / file)


def listed(name: str, file: str | None) -> Plant:
    def change(index: Any) -> None:
        if file is None:
            del index["weight_map"][name]
        else:
            index["weight_map"][name] = file

    return document(INDEX, change)


def text(file: str, content: str) -> Plant:
    """Another content of a file."""

    def plant(folder: Path) -> None:
        (folder / file).write_text(content)

    return plant


def without(file: str) -> Plant:
    """A file removed."""
    return lambda folder: (folder / file).unlink()


def weights_of(model: Path) -> Plant:
    """An unquantized model's weights in place of a checkpoint's."""

    def plant(folder: Path) -> None:
        tensors = Tensors(model)
        made = [NewTensor(n, info.dtype, info.shape, tensors.chunks(n)) for n, info in tensors.items()]
        write(folder / "model.safetensors", made)

    return plant


def shards(source: Path, destination: Path, first: str, files: tuple[str, str]) -> None:
    """Writes a checkpoint in two files with an index; the tensor `first` is in the first of them."""
    tensors = Tensors(source)
    shutil.copytree(source, destination, ignore=shutil.ignore_patterns("*.safetensors"))
    names = [first, *(n for n in sorted(tensors) if n != first)]
    half = len(names) // 2
    parts = dict(zip(files, (names[:half], names[half:]), strict=True))
    for file, members in parts.items():
        made = [NewTensor(n, tensors[n].dtype, tensors[n].shape, tensors.chunks(n)) for n in members]
        write(destination / file, made)
    weights = {n: file for file, members in parts.items() for n in members}
    total = sum(info.nbytes for info in tensors.values())
    (destination / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weights}))
