"""Copies of the bundled models with one defect each, for tests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from builder.core.safetensors_io import NewTensor, Tensors, write

DATA = Path(__file__).parents[1] / "data"
SHARDED = DATA / "tiny-qwen3"
VARIANTS = DATA / "arch-variants"
LLAMA, QWEN2, MOE, GEMMA2, PHI3 = (VARIANTS / name for name in ("llama", "qwen2", "qwen3_moe", "gemma2", "phi3"))
ALL = (SHARDED, *sorted(VARIANTS.iterdir()))
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

Change = Callable[[NewTensor], list[NewTensor]]


def copy(source: Path, target: Path, change: Change | None = None, **config: Any) -> Path:
    """A copy with each tensor replaced by the result of `change`, and with these values in its config.json."""
    shutil.copytree(source, target)
    if change:
        for file in sorted(target.glob("*.safetensors")):
            tensors = Tensors(target, [file])
            made = [t for n, i in tensors.items() for t in change(NewTensor(n, i.dtype, i.shape, [tensors.read(n)]))]
            write(target / "new", made, {"format": "pt"})
            (target / "new").replace(file)
        _write_index(target)
    set_config(target, **config)
    return target


def set_config(model: Path, **values: Any) -> None:
    """Sets keys of config.json; None removes one."""
    old = json.loads((model / "config.json").read_text())
    merged = {key: value for key, value in {**old, **values}.items() if key not in values or value is not None}
    (model / "config.json").write_text(json.dumps(merged))


def _write_index(model: Path) -> None:
    if (model / INDEX).exists():
        names = {n: f.name for f in sorted(model.glob("model-*.safetensors")) for n in Tensors(model, [f])}
        (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))


def without(*names: str) -> Change:
    """A `change` that drops these tensors."""
    return lambda t: [] if t.name in names else [t]


def renamed(old: str, new: str) -> Change:
    """A `change` that replaces the prefix `old` of tensor names by `new`."""
    return lambda t: [_named(t, new + t.name.removeprefix(old)) if t.name.startswith(old) else t]


def also(name: str, new: str, dtype: str | None = None, shape: tuple[int, ...] | None = None) -> Change:
    """A `change` that adds a tensor beside the named one; with a shape, zeros of a one-byte type or BF16."""

    def change(t: NewTensor) -> list[NewTensor]:
        if t.name != name:
            return [t]
        kind, size = dtype or t.dtype, t.shape if shape is None else shape
        return [t, NewTensor(new, kind, size, t.chunks if shape is None else [zeros(kind, size)])]

    return change


def typed(name: str, dtype: str) -> Change:
    """A `change` that replaces a tensor by zeros of another type."""
    return lambda t: [NewTensor(t.name, dtype, t.shape, [zeros(dtype, t.shape)]) if t.name == name else t]


def zeros(dtype: str, shape: tuple[int, ...]) -> bytes:
    from builder.core.safetensors_io import byte_size

    return bytes(byte_size(dtype, shape))


def _named(t: NewTensor, name: str) -> NewTensor:
    return NewTensor(name, t.dtype, t.shape, t.chunks)


def flags(model: Path, **more: Any) -> Mapping[str, Any]:
    """A recipe for a model, for `recipe.resolve`."""
    return {"model.id": str(model), "gpu": "cpu", "calibration.data": "builtin:python-docs", **more}
