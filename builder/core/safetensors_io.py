"""Reads and writes safetensors files as raw bytes: validates headers, never loads a whole file.

Files are read, not mapped: one that is cut while it is mapped ends the process with SIGBUS.

We don't use the safetensors package: its Python writer needs the bytes of all tensors at once (huggingface/safetensors,
bindings/python/src/lib.rs, `serialize_file`), and numpy has neither BF16 nor F8 (safetensors/numpy.py, `_TYPES`).
Standard library only.

File format: the header length as 8 little-endian bytes, a JSON header, then the tensors without gap or overlap
(safetensors' documentation, "Format").
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from builder.core.errors import IntegrityError
from builder.core.untrusted_text import parse_json, read_regular

# Bits per element, in the order of safetensors/src/tensor.rs, `enum Dtype`, which files are sorted by.
DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 64),
}
_ORDER = {dtype: number for number, dtype in enumerate(DTYPE_BITS)}
MAX_HEADER_BYTES = 100_000_000  # safetensors/src/tensor.rs, MAX_HEADER_SIZE
CHUNK_BYTES = 16 * 1024 * 1024
# A file whose tensors replace those of the same name, where the index names it for them (`builder repair`).
PATCH = re.compile(r"repair-(\d{4})\.safetensors")
REPAIRS = "repair.json"  # what was repaired, and what undoes it
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"
# How much of a file's beginning is read first: enough for the header length, and to recognize a Git LFS pointer.
HEAD_BYTES = len(LFS_POINTER)

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of one file. Its bytes are file[begin:end], counted from the start of the file, not of the data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """The tensor's size in bytes."""
        return self.end - self.begin


@dataclass(frozen=True)
class FileRange:
    """Bytes of a file, [begin, end). `write` copies them without reading them into this process."""

    path: Path
    begin: int
    end: int


@dataclass(frozen=True)
class StoredBytes:
    """The bytes of a file's range. A slice of them is read when it is taken; IntegrityError if the file has become
    shorter."""

    place: FileRange

    def __len__(self) -> int:
        return self.place.end - self.place.begin

    def __getitem__(self, part: slice) -> bytes:
        begin, end, _ = slice(part.start, part.stop).indices(len(self))
        return read_bytes(FileRange(self.place.path, self.place.begin + begin, self.place.begin + max(begin, end)))

    def every(self, step: int, nbytes: int) -> bytes:
        """The first `nbytes` bytes of each `step`, joined, as far as there are so many."""
        starts = range(self.place.begin, self.place.end - nbytes + 1, step)
        with open(self.place.path, "rb", buffering=0) as file:
            found = b"".join(os.pread(file.fileno(), nbytes, at) for at in starts)
        if len(found) < len(starts) * nbytes:
            raise shortened(self.place.path)
        return found


@dataclass(frozen=True)
class NewTensor:
    """A tensor to write. `chunks` is iterated once, when the tensor is written, and must yield exactly its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Iterable[Buffer | FileRange]


def patch_name(number: int) -> str:
    """The name of the n-th patch of a directory, from 1 on; it sorts after the files that it corrects."""
    return f"repair-{number:04}.safetensors"


def byte_size(dtype: str, shape: Sequence[int]) -> int:
    """The size of a tensor in bytes. ValueError for an unknown dtype or a size that is not a whole number of bytes."""
    if dtype not in DTYPE_BITS:
        raise ValueError(f"dtype {dtype!r} is unknown")
    bits = DTYPE_BITS[dtype] * prod(shape)
    if bits % 8:
        raise ValueError(f"{dtype} {list(shape)} is not a whole number of bytes")
    return bits // 8


def read_header(path: Path) -> dict[str, TensorInfo]:
    """{tensor name: TensorInfo} of a file. IntegrityError if it is not a complete safetensors file."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(HEAD_BYTES)
        length = header_length(start, size, str(path))
        return parse_header((start + file.read(max(0, 8 + length - len(start))))[8 : 8 + length], size, str(path))


def header_length(start: bytes, size: int, where: str) -> int:
    """The length of the JSON header in bytes, from a file's first bytes `start` and its `size` in bytes.

    IntegrityError if it can't be a safetensors file; `where` names the file in the message.
    """
    length = int.from_bytes(start[:8], "little")
    if size < 8 or len(start) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
        raise _damaged(where, _diagnosis(start, size, length))
    return length


def parse_header(header: bytes, size: int, where: str) -> dict[str, TensorInfo]:
    """{tensor name: TensorInfo} from a JSON header, for local and remote files alike. `size`: the file's, in bytes.

    IntegrityError, naming the file as `where`, for an invalid header or one that does not match the size.
    """
    data_start = 8 + len(header)
    try:
        infos = _entries(header)
        _check_layout(infos, data_start, size)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _damaged(where, f"Its header is invalid: {error}") from None
    return infos


def read_entries(path: Path) -> dict[str, TensorInfo]:
    """The same as `read_header`, but the tensors are compared neither with the file's size nor with each other: for
    reports on damaged files. IntegrityError if there is no readable header."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = header_length(file.read(HEAD_BYTES), size, str(path))
        file.seek(8)
        try:
            return _entries(file.read(length))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise _damaged(str(path), f"Its header is invalid: {error}") from None


def _entries(header: bytes) -> dict[str, TensorInfo]:
    entries = parse_json(header, unique=True)
    return {name: _info(entry, 8 + len(header)) for name, entry in entries.items() if name != "__metadata__"}


def _info(entry: Mapping[str, Any], data_start: int) -> TensorInfo:
    dtype, shape = entry["dtype"], entry["shape"]
    begin, end = entry["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise ValueError("a shape or an offset is not a non-negative integer")
    if end - begin != byte_size(dtype, shape):
        raise ValueError(f"{dtype} {shape} needs {byte_size(dtype, shape)} bytes but has {end - begin}")
    return TensorInfo(dtype, tuple(shape), data_start + begin, data_start + end)


def _check_layout(infos: Mapping[str, TensorInfo], data_start: int, size: int) -> None:
    """ValueError unless the tensors cover the file from `data_start` to `size` without gap or overlap."""
    position = data_start
    for name, info in sorted(infos.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != position:
            raise ValueError(f"{name} begins at {info.begin}, expected {position}: tensors overlap or leave a gap")
        position = info.end
    if position != size:
        state = "is truncated" if position > size else "has bytes after its last tensor"
        raise ValueError(f"the file {state}: it has {size} bytes, the header says {position}")


def _diagnosis(head: bytes, size: int, length: int) -> str:
    if head.startswith(LFS_POINTER):
        return "It is a Git LFS pointer of a few lines, not the weights: the repository was cloned without git-lfs."
    if size < 8:
        return f"It has {size} bytes, too few for a header length."
    return f"Its header should be {length} bytes long, the file has {size}: truncated, or not a safetensors file."


def _damaged(path: str, why: str) -> IntegrityError:
    return IntegrityError(
        f"{path} is not a complete safetensors file.", why=why, hint="Download or write the file again."
    )


class Tensors(Mapping[str, TensorInfo]):
    """All tensors of a directory, or of the given files, read-only. Maps names to TensorInfo.

    If there is an index (`model.safetensors.index.json`), it selects the files and must match them tensor by tensor.
    A tensor that is also in a patch is read from where the index says. IntegrityError if index and files disagree, if a
    tensor occurs twice, or if there is no safetensors file.
    """

    def __init__(self, directory: Path, files: Sequence[Path] | None = None) -> None:
        self.files = tuple(files) if files is not None else _files(directory)
        if not self.files:
            raise IntegrityError(f"{directory} contains no *.safetensors file.", hint="Check the path.")
        self._infos: dict[str, TensorInfo] = {}
        self._file: dict[str, Path] = {}
        index = _index(directory) if files is None else None
        for file in self.files:
            for name, info in read_header(file).items():
                if name in self._infos and index is not None and PATCH.fullmatch(file.name):
                    if index.get(name) != file.name:
                        continue
                elif name in self._infos:
                    raise IntegrityError(f"The tensor {name} is both in {self._file[name].name} and in {file.name}.")
                self._infos[name], self._file[name] = info, file
        if index is not None:
            self._check_index(directory, index)

    @classmethod
    def of(cls, files: Mapping[Path, Mapping[str, TensorInfo]]) -> Tensors:
        """The tensors of these files as given, unchecked: {file: {name: TensorInfo}}. Names must not occur twice."""
        made = cls.__new__(cls)
        made.files = tuple(files)
        made._infos = {name: info for infos in files.values() for name, info in infos.items()}
        made._file = {name: file for file, infos in files.items() for name in infos}
        return made

    def renamed(self, named: Callable[[str], str | None]) -> Tensors:
        """The same tensors under the names that `named` gives them, without those for which it returns None."""
        files: dict[Path, dict[str, TensorInfo]] = {file: {} for file in self.files}
        for name, info in self._infos.items():
            if own := named(name):
                files[self._file[name]][own] = info
        return Tensors.of(files)

    def __getitem__(self, name: str) -> TensorInfo:
        return self._infos[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    def stored(self, name: str) -> StoredBytes:
        """The tensor's bytes, to read a part at a time."""
        return StoredBytes(self.place(name))

    def place(self, name: str) -> FileRange:
        """Where the tensor's bytes are."""
        info = self._infos[name]
        return FileRange(self._file[name], info.begin, info.end)

    def read(self, name: str) -> bytes:
        """The tensor's bytes, read into memory. IntegrityError if the file has become shorter."""
        return read_bytes(self.place(name))

    def prefetch(self, name: str) -> None:
        """Asks the kernel to read the tensor's bytes from disk ahead of their use."""
        place = self.place(name)
        with open(place.path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), place.begin, place.end - place.begin, os.POSIX_FADV_WILLNEED)

    def chunks(self, *names: str) -> Iterator[bytes]:
        """The bytes of the named tensors in order, CHUNK_BYTES at a time: their concatenation in dimension 0.

        IntegrityError if a file has become shorter."""
        for place in map(self.place, names):
            for begin in range(place.begin, place.end, CHUNK_BYTES):
                yield read_bytes(FileRange(place.path, begin, min(begin + CHUNK_BYTES, place.end)))

    def _check_index(self, directory: Path, index: Mapping[str, str]) -> None:
        wrong = sorted(
            n for n in index.keys() | self._file.keys() if index.get(n) != getattr(self._file.get(n), "name", 0)
        )
        if wrong:
            raise IntegrityError(
                f"{directory}: the index and the files disagree on {len(wrong)} tensors.",
                why=f"The first: {', '.join(wrong[:10])}",
                hint="Download the model again.",
            )


def _index(directory: Path) -> dict[str, str] | None:
    path = directory / "model.safetensors.index.json"
    if not path.exists():
        return None
    try:
        weight_map: dict[str, str] = parse_json(read_regular(path))["weight_map"]
        if all(isinstance(v, str) and v == os.path.basename(v) for v in weight_map.values()):
            return weight_map
        why = "It names files outside of its directory."
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
    raise IntegrityError(f"{path} is not an index of safetensors files.", why=why, hint="Download the file again.")


def _files(directory: Path) -> tuple[Path, ...]:
    """The model's files: those in the index, else model.safetensors, else all.

    Others may lie beside them: Mistral's repositories also contain `consolidated.safetensors`.
    """
    index = _index(directory)
    if index is not None:
        files = tuple(directory / name for name in sorted(set(index.values())))
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise IntegrityError(f"{directory}: the index names missing files: {', '.join(missing[:10])}.")
        return files
    if (directory / "model.safetensors").exists():
        return (directory / "model.safetensors",)
    return tuple(sorted(directory.glob("*.safetensors")))


@dataclass(frozen=True)
class Arrangement:
    """Where the tensors of a file to write lie: its first bytes (header length and header), and {name: TensorInfo} in
    the order of the file."""

    head: bytes
    infos: Mapping[str, TensorInfo]

    @property
    def size(self) -> int:
        """The file's size in bytes."""
        return max((info.end for info in self.infos.values()), default=len(self.head))


def arrange(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> Arrangement:
    """Where tensors (name, dtype, shape) lie in a file.

    They are in the order of the safetensors library, so that its files are reproduced: by dtype, the widest first,
    which aligns each one to its element size, then by name. ValueError for a name that occurs twice.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, dtype, shape in sorted(tensors, key=lambda one: (-_ORDER.get(one[1], 0), one[0].encode())):
        if name in header or name == "__metadata__":
            raise ValueError(f"{name} can't be written twice")
        end = position + byte_size(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the data to 8 bytes, as safetensors does
    header.pop("__metadata__", None)
    infos = {name: _info(entry, 8 + len(text)) for name, entry in header.items()}
    return Arrangement(len(text).to_bytes(8, "little") + text, infos)


def write(
    path: Path,
    tensors: Iterable[NewTensor],
    metadata: Mapping[str, str] | None = None,
    done: Callable[[int], object] = lambda nbytes: None,
) -> None:
    """Writes a file chunk by chunk, in the order of `arrange`; a failure leaves no file behind.

    done: called with the number of bytes that are written so far, after each tensor.
    ValueError for a name that occurs twice or chunks that don't add up to the tensor's size.
    """
    given = list(tensors)
    made = arrange(((tensor.name, tensor.dtype, tensor.shape) for tensor in given), metadata)
    chunks = {tensor.name: tensor.chunks for tensor in given}
    try:
        with open(path, "wb", buffering=0) as file:
            _append(file.fileno(), made.head)
            for name, info in made.infos.items():
                written = sum(_append(file.fileno(), chunk) for chunk in chunks[name])
                if written != info.nbytes:
                    raise ValueError(f"{name}: got {written} bytes for {info.dtype} {list(info.shape)}")
                done(info.end)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def overwrite(path: Path, tensors: Iterable[NewTensor], up_to: int) -> None:
    """Writes those tensors that have at most `up_to` bytes into a file that `write` made of tensors with these names,
    dtypes and shapes. ValueError if it is no such file."""
    given = {tensor.name: tensor for tensor in tensors}
    made = arrange((tensor.name, tensor.dtype, tensor.shape) for tensor in given.values())
    with open(path, "r+b", buffering=0) as file:
        if file.read(len(made.head)) != made.head or os.fstat(file.fileno()).st_size != made.size:
            raise ValueError(f"{path} holds other tensors")
        for name, info in made.infos.items():
            if info.nbytes <= up_to:
                file.seek(info.begin)
                for chunk in given[name].chunks:
                    _append(file.fileno(), chunk)


def _append(target: int, chunk: Buffer | FileRange) -> int:
    """Writes a chunk at the file's position; returns its size in bytes."""
    if isinstance(chunk, FileRange):
        return _copy(chunk, target)
    view, done = memoryview(chunk).cast("B"), 0
    while done < len(view):
        done += os.write(target, view[done:])
    return done


# copy_file_range(2) fails with one of these where the file systems of the two files do not support it.
_NO_KERNEL_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)


def _copy(place: FileRange, target: int) -> int:
    """Appends a range of a file; returns its size in bytes."""
    copy_range(place, target, os.lseek(target, 0, os.SEEK_CUR))
    os.lseek(target, place.end - place.begin, os.SEEK_CUR)
    return place.end - place.begin


def copy_range(place: FileRange, target: int, offset: int) -> None:
    """Copies a range of a file to an offset of an open one, in the kernel where the file systems support that."""
    source, at = os.open(place.path, os.O_RDONLY), place.begin
    try:
        while at < place.end:
            to = offset + at - place.begin
            try:
                done = os.copy_file_range(source, target, place.end - at, at, to)
            except OSError as error:
                if error.errno not in _NO_KERNEL_COPY:
                    raise
                done = write_at(target, os.pread(source, min(CHUNK_BYTES, place.end - at), at), to)
            if not done:
                raise shortened(place.path)
            at += done
    finally:
        os.close(source)


def read_bytes(place: FileRange) -> bytes:
    """The bytes of a range. IntegrityError if the file has become shorter."""
    file = os.open(place.path, os.O_RDONLY | os.O_CLOEXEC)  # a third of the time of Python's `open`
    try:
        parts, at = [], place.begin
        while at < place.end:
            parts.append(os.pread(file, place.end - at, at))  # of 2 GiB at most
            if not parts[-1]:
                raise shortened(place.path)
            at += len(parts[-1])
    finally:
        os.close(file)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def read_into(place: FileRange, buffer: memoryview) -> None:
    """Fills a buffer, which has the range's size. IntegrityError if the file has become shorter."""
    view, done = buffer.cast("B"), 0
    with open(place.path, "rb", buffering=0) as file:
        while done < len(view):
            got = os.preadv(file.fileno(), [view[done:]], place.begin + done)
            if not got:
                raise shortened(place.path)
            done += got


def shortened(path: Path) -> IntegrityError:
    """The error for a file that ends before a tensor of its header does, which was not so before."""
    return IntegrityError(
        f"{path} became shorter while it was read.",
        hint="Wait until nothing writes to it, then run the same command again.",
    )


def write_at(target: int, data: Buffer, offset: int) -> int:
    """Writes all bytes at an offset of an open file; returns how many."""
    view, done = memoryview(data).cast("B"), 0
    while done < len(view):
        done += os.pwrite(target, view[done:], offset + done)
    return done


def read_metadata(path: Path) -> dict[str, str]:
    """The `__metadata__` of a file's header: strings that do not describe tensors; {} if there is none."""
    with open(path, "rb") as file:
        length = header_length(file.read(HEAD_BYTES), path.stat().st_size, str(path))
        file.seek(8)
        header = parse_json(file.read(length))
    found = header.get("__metadata__") if isinstance(header, dict) else None
    entries = found.items() if isinstance(found, dict) else ()
    return {key: value for key, value in entries if isinstance(value, str)}
