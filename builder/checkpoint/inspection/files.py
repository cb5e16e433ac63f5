"""Opens the safetensors files of a checkpoint, damaged or not, and says what is wrong with them and their index."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from builder.core.errors import IntegrityError
from builder.core.output import listed
from builder.core.safetensors_io import PATCH, TensorInfo, Tensors, read_entries
from builder.core.untrusted_text import parse_json, read_regular
from builder.model.files import INDEX, WEIGHTS

_SHARD = re.compile(r"(model|pytorch_model)-\d+(-of-\d+)?\.safetensors")


@dataclass
class Opened:
    """The readable tensors of a checkpoint.

    problems: (tensor or file, what, kind of finding). lost: tensors that are named somewhere and can't be read;
    incomplete: whether that may be more than `lost` names, because a whole file can't be read.
    """

    tensors: Tensors
    problems: list[tuple[str, str, str]] = field(default_factory=list)
    lost: set[str] = field(default_factory=set)
    incomplete: bool = False


def open_files(folder: Path, files: Sequence[Path] | None = None) -> Opened:
    """Opens the given files, or those that the index names, or model.safetensors, or all."""
    opened = Opened(Tensors.of({}))
    index = _Index.read(folder, opened) if files is None else None
    if files is None:
        files = _files(folder, index, opened)
    found = {file: _entries(file, opened) for file in files}
    owner = _owners(found, index, opened)
    readable = {
        file: {name: info for name, info in infos.items() if owner[name] == file and name not in opened.lost}
        for file, infos in found.items()
    }
    opened.tensors = Tensors.of(readable)
    if index is not None:
        _check_index(index, found, opened)
    return opened


@dataclass(frozen=True)
class _Index:
    """The content of model.safetensors.index.json. total_size: bytes of all tensors, if it says so."""

    weight_map: Mapping[str, str]
    total_size: Any

    @classmethod
    def read(cls, folder: Path, opened: Opened) -> _Index | None:
        if not (folder / INDEX).is_file():
            return None
        try:
            content = parse_json(read_regular(folder / INDEX))
            weight_map = content["weight_map"]
            if all(isinstance(name, str) and name == os.path.basename(name) for name in weight_map.values()):
                return cls(weight_map, (content.get("metadata") or {}).get("total_size"))
            why = "names files outside of its directory"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            why = f"is not an index of safetensors files ({type(error).__name__})"
        opened.problems.append((INDEX, why, "damaged"))
        return None


def _files(folder: Path, index: _Index | None, opened: Opened) -> list[Path]:
    """The files to open. Reports those that the index names and that are not there, and shards that it lacks."""
    there = sorted(folder.glob("*.safetensors"))
    if index is None:
        return [folder / WEIGHTS] if (folder / WEIGHTS) in there else there
    named = sorted(set(index.weight_map.values()))
    for name in named:
        if not (folder / name).is_file():
            gone = [tensor for tensor, file in index.weight_map.items() if file == name]
            opened.lost.update(gone)
            opened.problems.append((name, f"is missing; the index names it for {listed(gone)}", "missing-file"))
    for file in there:
        if file.name not in named and _SHARD.fullmatch(file.name):
            opened.problems.append((file.name, "is not in the index: loaders do not read it", "index"))
    return [folder / name for name in named if (folder / name).is_file()]


def _entries(file: Path, opened: Opened) -> dict[str, TensorInfo]:
    """The tensors of one file by its header; those whose bytes the file lacks become lost."""
    try:
        infos = read_entries(file)
    except (IntegrityError, OSError) as error:
        opened.incomplete = True
        opened.problems.append((file.name, f"can't be read: {_reason(error)}", "damaged"))
        return {}
    size = file.stat().st_size
    end = max((info.end for info in infos.values()), default=size)
    if end > size:
        gone = [name for name, info in infos.items() if info.end > size]
        opened.lost.update(gone)
        what = f"is cut off at {size:,} of {end:,} bytes: {listed(gone)} {'is' if len(gone) == 1 else 'are'} incomplete"
        opened.problems.append((file.name, what, "truncated"))
    elif end < size:
        opened.problems.append((file.name, f"has {size - end:,} bytes after its last tensor", "damaged"))
    _check_order(infos, opened)
    return infos


def _check_order(infos: Mapping[str, TensorInfo], opened: Opened) -> None:
    """Tensors must follow each other without gap or overlap (safetensors' documentation, "Format")."""
    position, before = None, ""
    for name, info in sorted(infos.items(), key=lambda item: (item[1].begin, item[1].end)):
        if position is not None and info.begin < position:
            opened.problems.append((name, f"shares {position - info.begin:,} bytes with {before}", "overlap"))
        elif position is not None and info.begin > position:
            opened.problems.append((name, f"begins {info.begin - position:,} bytes after {before} ends", "overlap"))
        if position is None or info.end > position:
            position, before = info.end, name


def _owners(found: Mapping[Path, Mapping[str, TensorInfo]], index: _Index | None, opened: Opened) -> dict[str, Path]:
    """The file that each tensor is read from: the one that the index names, else the first."""
    owner: dict[str, Path] = {}
    for file, infos in found.items():
        for name in infos:
            named = index is not None and index.weight_map.get(name) == file.name
            if name in owner and not (index is not None and PATCH.fullmatch(file.name)):
                opened.problems.append((name, f"is both in {owner[name].name} and in {file.name}", "duplicate"))
            if name not in owner or named:
                owner[name] = file
    return owner


def _check_index(index: _Index, found: Mapping[Path, Mapping[str, TensorInfo]], opened: Opened) -> None:
    where = {name: file.name for file, infos in found.items() for name in infos if not PATCH.fullmatch(file.name)}
    where |= {n: f.name for f, infos in found.items() for n in infos if index.weight_map.get(n) == f.name}
    names = {file.name: infos for file, infos in found.items()}
    for name, file in index.weight_map.items():
        if name in opened.lost or name in names.get(file, {}):
            continue
        if opened.incomplete and not names.get(file):  # the file that can't be read may hold it
            opened.lost.add(name)
            continue
        what = (
            f"is in {where[name]}; the index says {file}" if name in where else f"is not in {file}, as the index says"
        )
        opened.problems.append((name, what, "index"))
        opened.lost.update({name} - where.keys())
    for name in sorted(where.keys() - index.weight_map.keys()):
        opened.problems.append((name, f"is in {where[name]}, and not in the index", "index"))
    total = sum(info.nbytes for info in opened.tensors.values())
    if isinstance(index.total_size, int | float) and not opened.problems and index.total_size != total:
        what = f"says {index.total_size:,} bytes; its tensors have {total:,}"
        opened.problems.append((INDEX, what, "index-size"))


def _reason(error: Exception) -> str:
    text = str(getattr(error, "why", "") or error)
    return json.dumps(text[:300])[1:-1]
