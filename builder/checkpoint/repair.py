"""Repairs activation and global scales of a checkpoint from any tool, by the rules of checkpoint/repair_rules.py.

In place: the new values are written to a patch file, repair-0001.safetensors, and model.safetensors.index.json names it
for these tensors. All files that were there keep their bytes; repair.json lists old and new values, and what `undo`
needs. A single model.safetensors is renamed to model-00001-of-00001.safetensors, because transformers prefers that name
to an index (modeling_utils.py, 4.57 and 5). Readers must follow the index: transformers and vLLM read the patch last,
but TensorRT-LLM's LLM class reads all files in any order (_torch/models/checkpoints/hf/weight_loader.py), so a repaired
directory is served through `builder build`, or after a rewrite into another directory (`output`).
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from builder import __version__
from builder.checkpoint import tensor_checks
from builder.checkpoint.inspection import expected
from builder.checkpoint.inspection.expected import Expected, is_kv_scale
from builder.checkpoint.inspection.layout import Layout, open_all
from builder.checkpoint.layouts import read_json
from builder.checkpoint.repair_rules import Change, Kind, Scale, propose
from builder.core import atomic
from builder.core.errors import IntegrityError, UnsupportedError, UsageError
from builder.core.manifest import MANIFEST
from builder.core.safetensors_io import (
    PATCH,
    REPAIRS,
    NewTensor,
    Tensors,
    byte_size,
    patch_name,
    read_header,
    read_metadata,
    write,
)
from builder.formats.base import SCALAR
from builder.model.files import INDEX, WEIGHTS

RENAMED = "model-00001-of-00001.safetensors"
LARGEST_F16 = 65504.0
# Conflicts between files that a repair can't cure, and that make its index wrong.
FILES = ("truncated", "damaged", "overlap", "index", "missing-file", "duplicate")


@dataclass(frozen=True)
class Repair:
    """What was repaired. changes: new values as factors. lost: tensors that no rule can repair. directory: where the
    repaired checkpoint is; patch: the file with the new values, "" if there is none."""

    directory: Path
    changes: tuple[Change, ...]
    lost: tuple[str, ...]
    patch: str = ""

    def facts(self) -> dict[str, Any]:
        """For --json."""
        return {
            "directory": str(self.directory),
            "patch": self.patch,
            "changes": [one.facts() for one in self.changes],
            "lost": list(self.lost),
        }


def repair(path: Path, *, output: Path | None = None) -> Repair:
    """Repairs the checkpoint in `path`, in place or, with `output`, in a rewritten copy there.

    UsageError for a directory that can't be changed, or an output that exists; UnsupportedError for TensorRT-LLM's
    layout; IntegrityError for damaged files.
    """
    layout = _layout(path)
    if output is None:
        _check_place(path)
    wanted = expected.of(layout)
    changes, lost = propose(list(scales(layout, wanted)))
    found = Repair(output or path, tuple(changes), tuple(one.tensor for one in lost))
    tensors = [_tensor(layout, one, wanted[one.tensor]) for one in changes]
    if output is not None:
        _rewrite(layout, {one.name: one for one in tensors}, output)
        return found
    if not changes:
        return found
    return replace(found, patch=_patch(layout, tensors, changes))


def scales(layout: Layout, wanted: Mapping[str, Expected]) -> Iterator[Scale]:
    """The activation and global scales that the layout's layers must have, of those that have the right form."""
    for name, want in wanted.items():
        info = layout.tensors.get(name)
        if want.content != "scale" or (info and (info.dtype not in want.dtypes or info.shape not in SCALAR)):
            continue
        value = tensor_checks.scalar(info, layout.tensors.stored(name)) if info else None
        wrong = bool(value is not None and tensor_checks.wrong_scale(value, divides=layout.divides(want.stored)))
        if value and not wrong and layout.divides(want.stored):
            value = 1 / value
        if is_kv_scale(want):
            yield Scale(name, "cache", value, name, wrong=wrong)
            continue
        assert want.stored is not None
        kind: Kind = "input" if want.stored.calibrated else "weight"
        steps = layout.format_of(want.module).weight.content == "integers"
        yield Scale(name, kind, value, layout.fused(want.module) or want.module, wrong=wrong, steps=steps)


def undo(path: Path) -> list[str]:
    """Removes all repairs of a directory; afterwards its files are those from before, byte for byte. Returns the names
    of the patches. UsageError if there are none."""
    if not (path / REPAIRS).is_file():
        raise UsageError(f"{path} has no {REPAIRS}: nothing was repaired in it.")
    report = _read_report(path)
    patches = [one["file"] for one in report["patches"]]
    if report["renamed"] and not (path / WEIGHTS).exists():
        os.link(path / RENAMED, path / WEIGHTS)
    if report["index"] is None:
        (path / INDEX).unlink(missing_ok=True)
    else:
        atomic.replace_file(path / INDEX, report["index"])
    if report["renamed"]:
        (path / RENAMED).unlink(missing_ok=True)
    for patch in patches:
        (path / patch).unlink(missing_ok=True)
    (path / REPAIRS).unlink()
    atomic.fsync(path)
    return patches


def _layout(path: Path) -> Layout:
    found = [layout for layout in open_all(path) if layout.folder.resolve() == path.resolve()]
    if not found:
        below = [folder for folder in ("unified", "compressed_tensors") if (path / folder).is_dir()]
        raise UsageError(
            f"{path} holds no quantized checkpoint.",
            hint=f"builder repair {path / below[0]}" if below else "Give the directory that holds its config.json.",
        )
    layout = found[0]
    if layout.tensorrt_llm:
        raise UnsupportedError(
            f"{path} is in TensorRT-LLM's layout, which is not repaired.",
            hint="Repair the Hugging Face layout that it was made from, and build from that.",
        )
    damaged = [str(one) for one in layout.findings if one.kind in FILES]
    if damaged:
        raise IntegrityError(
            f"The files of {path} are damaged.",
            why="\n".join(damaged[:5]),
            hint="Fetch or copy the checkpoint again. A repair can only replace scales.",
        )
    return layout


def _check_place(path: Path) -> None:
    """UsageError for a directory whose files belong to others: the Hub's cache, an artifact of a store."""
    parts = path.resolve().parts
    links = any(file.is_symlink() for file in path.glob("*.safetensors"))
    why = ""
    if links or ("snapshots" in parts and any(part.startswith("models--") for part in parts)):
        why = "It is in a Hugging Face cache, whose files are shared and checked by their hash."
    elif (path / MANIFEST).is_file() or (path.parent / MANIFEST).is_file():
        why = "It is an artifact of a build, whose files are checked by their hash."
    elif not os.access(path, os.W_OK):
        why = "It is not writable."
    if why:
        raise UsageError(
            f"{path} can't be repaired in place.",
            why=why,
            hint=f"Write a repaired copy: builder repair {path} --output DIRECTORY",
        )


def _tensor(layout: Layout, change: Change, want: Expected) -> NewTensor:
    """The new tensor, in the shape of the old one, and in its dtype if that can hold the value."""
    info = layout.tensors.get(change.tensor)
    value = 1 / change.new if layout.divides(want.stored) else change.new
    dtype = info.dtype if info and not (info.dtype == "F16" and abs(value) > LARGEST_F16) else "F32"
    shape = info.shape if info else ((1,) if layout.compressed else ())
    return NewTensor(change.tensor, dtype, shape, [_bytes(dtype, value)])


def _bytes(dtype: str, value: float) -> bytes:
    """A number as F32, F16 or (rounded to the nearest, ties to even) BF16."""
    if dtype == "F16":
        return struct.pack("<e", value)
    data = struct.pack("<f", value)
    if dtype == "F32":
        return data
    bits = int.from_bytes(data, "little")
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).to_bytes(2, "little")


def _patch(layout: Layout, tensors: Sequence[NewTensor], changes: Sequence[Change]) -> str:
    """Writes the patch, the report and the index. A process killed at any moment leaves a directory that readers of the
    index read as before or as repaired, and that `undo` restores."""
    folder = layout.folder
    report = _report(folder)
    name = patch_name(len(report["patches"]) + 1)
    index = _index(layout, tensors, name, renamed=report["renamed"])
    report["patches"].append({"file": name, "changes": [one.facts() for one in changes]})
    atomic.replace_file(folder / REPAIRS, json.dumps(report, indent=1))
    temporary = folder / f".{name}.{os.getpid()}.tmp"
    try:
        write(temporary, tensors, {"format": "pt"})
        temporary.chmod(layout.tensors.files[0].stat().st_mode & 0o777)
        atomic.fsync(temporary)
        temporary.replace(folder / name)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    if report["renamed"] and not (folder / RENAMED).exists():
        os.link(folder / WEIGHTS, folder / RENAMED)
    atomic.replace_file(folder / INDEX, json.dumps(index, indent=2) + "\n")
    if report["renamed"]:
        (folder / WEIGHTS).unlink(missing_ok=True)
    atomic.fsync(folder)
    return name


def _report(folder: Path) -> dict[str, Any]:
    """The report so far. index: the index's text from before the first repair, None without one. renamed: whether
    model.safetensors has another name now."""
    if (folder / REPAIRS).is_file():
        return _read_report(folder)
    index = (folder / INDEX).read_text(encoding="utf-8") if (folder / INDEX).is_file() else None
    renamed = index is None and (folder / WEIGHTS).is_file()
    return {"builder": __version__, "index": index, "renamed": renamed, "patches": []}


def _read_report(folder: Path) -> dict[str, Any]:
    """The report of a directory, which may come from anywhere. IntegrityError for one that no repair wrote."""
    report = read_json(folder / REPAIRS)
    index, renamed, patches = report.get("index"), report.get("renamed"), report.get("patches")
    files = [one.get("file") if isinstance(one, dict) else None for one in patches] if isinstance(patches, list) else []
    sound = files and all(isinstance(file, str) and PATCH.fullmatch(file) for file in files)
    if not (sound and isinstance(index, str | None) and isinstance(renamed, bool)):
        raise IntegrityError(
            f"{folder / REPAIRS} was not written by a repair.",
            hint="Fetch or copy the checkpoint again, and repair it anew.",
        )
    return report


def _index(layout: Layout, patched: Sequence[NewTensor], patch: str, *, renamed: bool) -> dict[str, Any]:
    """The index with the patch's tensors. total_size counts each tensor once."""
    existing = layout.folder / INDEX
    if existing.is_file():
        index = read_json(existing)
    else:
        files = layout.tensors.files
        index = {"metadata": {}, "weight_map": {}}
        for file in files:
            shown = RENAMED if renamed and file.name == WEIGHTS else file.name
            index["weight_map"] |= dict.fromkeys(read_header(file), shown)
        index["metadata"] = {"total_size": sum(info.nbytes for info in layout.tensors.values())}
    added = sum(byte_size(one.dtype, one.shape) for one in patched if one.name not in index["weight_map"])
    if added and isinstance(index.get("metadata", {}).get("total_size"), int):
        index["metadata"]["total_size"] += added
    index["weight_map"] = {**index["weight_map"], **{one.name: patch for one in patched}}
    return index


def _rewrite(layout: Layout, changed: Mapping[str, NewTensor], output: Path) -> None:
    """Copies the checkpoint with the new values in the files of the old ones. Nothing is left of an unfinished copy."""
    if output.exists():
        raise UsageError(f"{output} exists.", hint="Choose another --output, or remove it.")
    atomic.make_directory(output.parent)
    temporary = output.parent / f".{output.name}.{os.getpid()}.tmp"
    temporary.mkdir()
    try:
        kept = [file for file in layout.tensors.files if not PATCH.fullmatch(file.name)]
        held = {file: list(read_header(file)) for file in kept}
        new = (layout.tensors.keys() | changed.keys()) - {name for names in held.values() for name in names}
        held[kept[0]] += sorted(new)
        weights = {name: WEIGHTS if len(kept) == 1 else file.name for file, names in held.items() for name in names}
        for file, names in held.items():  # with its notes on scales, which a conversion back needs
            notes = {"format": "pt", **read_metadata(file)}
            write(temporary / weights[names[0]], _written(layout.tensors, names, changed), notes)
        for file in layout.folder.iterdir():
            if file.is_file() and file.suffix != ".safetensors" and file.name not in (REPAIRS, INDEX):
                shutil.copyfile(file, temporary / file.name)
        if len(kept) > 1:
            size = sum(byte_size(one.dtype, one.shape) for one in changed.values())
            size += sum(info.nbytes for name, info in layout.tensors.items() if name not in changed)
            index = {"metadata": {"total_size": size}, "weight_map": weights}
            (temporary / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        temporary.rename(output)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)


def _written(source: Tensors, names: Sequence[str], changed: Mapping[str, NewTensor]) -> Iterator[NewTensor]:
    for name in names:
        if name in changed:
            yield changed[name]
        else:
            yield NewTensor(name, source[name].dtype, source[name].shape, [source.place(name)])
