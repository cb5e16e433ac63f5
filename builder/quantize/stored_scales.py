"""Scales of inputs and of the KV cache in the files of a unified checkpoint: computed from ranges, and written.

The ranges come from a caller; nothing here imports torch.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from builder.architectures import names
from builder.architectures.facts import Architecture
from builder.checkpoint.layouts import read_json, write_json
from builder.core.errors import IntegrityError
from builder.core.safetensors_io import NewTensor, Tensors, read_metadata, write
from builder.formats.base import NumberFormat
from builder.formats.kv_cache import KvCacheFormat
from builder.model.files import INDEX

INPUT_SCALE = "input_scale"


def of_inputs(
    layers: Mapping[str, NumberFormat], ranges: Mapping[str, float], architecture: Architecture
) -> dict[str, float]:
    """{tensor: scale} of the inputs of all layers whose format stores one.

    ranges: {layer: largest magnitude of its inputs}. Layers that are served as one (q, k and v; gate and up of one
    expert) share the widest range, as in ModelOpt's exporter. IntegrityError for one that is absent, zero, NaN or Inf.
    """
    groups: dict[str, list[str]] = {}
    leaves = {one: _input_leaf(one) for one in dict.fromkeys(layers.values())}
    for layer in (name for name, one in layers.items() if leaves[one]):
        fused = names.fused_name(architecture, layer)
        groups.setdefault(f"{layer.rpartition('.')[0]}.{fused}" if fused else layer, []).append(layer)
    found = {}
    for members in groups.values():
        keep = f"Or leave what only ever reads zeros in BF16: --keep-bf16 {members[0]}"
        widest = max(_checked(ranges.get(layer), f"the inputs of {layer}", keep) for layer in members)
        for layer in members:
            found[f"{layer}.{leaves[layers[layer]]}"] = widest / (layers[layer].input_range or 1.0)
    return found


def _input_leaf(one: NumberFormat) -> str | None:
    """The last part of the name of an input's scale in the unified layout; None where the format stores none."""
    return next((tensor.unified for tensor in one.tensors if tensor.name == INPUT_SCALE and one.input_range), None)


def of_cache(cache: KvCacheFormat, ranges: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """{tensor: scale} of the KV cache. ranges: {attention: largest magnitudes of keys and values}."""
    return {
        f"{attention}.{leaf}": _checked(amax, f"the KV cache of {attention}") / cache.scale_range
        for attention, both in ranges.items()
        for leaf, amax in zip(cache.unified, both, strict=False)
    }


def _checked(amax: float | None, of: str, if_zero: str = "") -> float:
    if amax is not None and math.isfinite(amax) and amax > 0:
        return amax
    said = "No token reached them" if amax is None else f"Their largest magnitude was {abs(amax):g}"
    hint = "Calibrate on more text: --calib-data, --calib-samples."
    raise IntegrityError(
        f"Calibration found no range for {of}.",
        why=f"{said}, and a scale must be a positive number.",
        hint=f"{hint} {if_zero if amax == 0 else '`builder inspect` names weights with NaN or Inf.'}".strip(),
    )


def replace(unified: Path, scales: Mapping[str, float]) -> int:
    """Writes the scales, F32 numbers, into the checkpoint's files: in place of the old ones, or beside their layer's
    weight. All other tensors keep their bytes. Returns how many scales changed or are new.

    A file is written beside the old one and renamed, so links to other copies of the checkpoint stay as they are.
    """
    stored = Tensors(unified)
    home = {name: path for path in stored.files for name in Tensors(unified, [path])}
    beside = {name.rpartition(".")[0]: path for name, path in home.items() if name.endswith(".weight")}
    place = {name: home.get(name) or beside[name.rpartition(".")[0]] for name in scales}
    values = {name: struct.pack("<f", scale) for name, scale in scales.items()}
    changed = sum(name not in stored or stored.read(name) != values[name] for name in scales)
    for path in stored.files:
        new = {name for name, file in place.items() if file == path}
        if not new:
            continue
        kept = Tensors(unified, [path])
        tensors = [NewTensor(n, i.dtype, i.shape, [kept.place(n)]) for n, i in kept.items() if n not in new]
        tensors += [NewTensor(name, "F32", kept[name].shape if name in kept else (), [values[name]]) for name in new]
        written = path.with_name(f"{path.name}.new")
        write(written, tensors, read_metadata(path) or {"format": "pt"})
        written.chmod(path.stat().st_mode)
        written.replace(path)
    _update_index(unified, stored.files, place)
    return changed


def _update_index(unified: Path, files: Sequence[Path], place: Mapping[str, Path]) -> None:
    if not (unified / INDEX).exists():
        return
    index = read_json(unified / INDEX)
    index["weight_map"] = dict(sorted({**index["weight_map"], **{n: p.name for n, p in place.items()}}.items()))
    total = sum(info.nbytes for info in Tensors(unified, files).values())
    write_json(unified / INDEX, {**index, "metadata": {**index.get("metadata", {}), "total_size": total}})


def declare_cache(unified: Path, cache: KvCacheFormat) -> None:
    """States the format of the KV cache in hf_quant_config.json and config.json, as ModelOpt's exporter does
    (export/convert_hf_config.py, 0.47)."""
    path = unified / "hf_quant_config.json"
    if path.is_file():
        said = read_json(path)
        quantization: dict[str, Any] = {**said["quantization"], "kv_cache_quant_algo": cache.quant_algo}
        write_json(path, {**said, "quantization": quantization})
    config = read_json(unified / "config.json")
    if isinstance(config.get("quantization_config"), dict):
        fp8 = {"dynamic": False, "num_bits": 8, "type": "float"}
        scheme = fp8 if cache.quant_algo == "FP8" else cache.quant_algo
        block = {**config["quantization_config"], "kv_cache_scheme": scheme}
        write_json(unified / "config.json", {**config, "quantization_config": block})
