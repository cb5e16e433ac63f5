"""The number formats that exist: every module of this package that defines `FORMAT`."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from builder.formats.base import Axis, NumberFormat
from builder.formats.bf16 import FORMAT as BF16
from builder.formats.fp8 import FORMAT as FP8
from builder.formats.nvfp4 import FORMAT as NVFP4

__all__ = ["BF16", "FP8", "NVFP4", "all_formats", "axes", "for_tensorrt_llm", "for_whole_model", "get", "of_entry"]


@functools.cache
def all_formats() -> dict[str, NumberFormat]:
    """{name: format}, NVFP4 first. Packages below this one are not searched: they import torch."""
    found: dict[str, NumberFormat] = {one.name: one for one in (NVFP4, FP8, BF16)}
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if not module.ispkg:
            one = getattr(importlib.import_module(f"builder.formats.{module.name}"), "FORMAT", None)
            if one is not None:
                found[one.name] = one
    return found


def get(name: str) -> NumberFormat:
    """The format with this name in recipes. KeyError for another."""
    return all_formats()[name]


def for_whole_model() -> list[NumberFormat]:
    """The formats that a recipe can choose for all layers of a model."""
    return [one for one in all_formats().values() if one.whole_model]


def for_tensorrt_llm() -> list[NumberFormat]:
    """Those of them that TensorRT-LLM has a layout of."""
    return [one for one in for_whole_model() if not one.compressed_only]


def of_entry(entry: Mapping[str, Any]) -> NumberFormat | None:
    """The format that a checkpoint's entry {"quant_algo", "group_size"} names, None for an unknown one. Where the entry
    leaves the group size out, the first format with this quant_algo."""
    algo, group = entry.get("quant_algo"), entry.get("group_size")
    same = [one for one in all_formats().values() if one.quant_algo is not None and one.quant_algo == algo]
    return next((one for one in same if group in (None, one.group_size)), None)


def axes(leaf: str, shape: Sequence[int]) -> tuple[Axis, ...]:
    """Which axis of its layer each dimension of a TensorRT-LLM tensor follows, by the last part of its name; () for one
    number. KeyError for a tensor of no format."""
    if tuple(shape) in ((), (1,)):
        return ()
    if leaf == "bias":
        return ("out",)
    return _axes()[leaf, len(shape)]


def _axes() -> dict[tuple[str, int], tuple[Axis, ...]]:
    """{(last part of a name, dimensions): axes}. Formats that share a name and a rank must agree on the axes, because
    a file is split by names and shapes alone."""
    found: dict[tuple[str, int], tuple[Axis, ...]] = {}
    for one in (one for one in all_formats().values() if not one.compressed_only):
        for tensor in one.tensors:
            key = tensor.tensorrt_llm, len(tensor.dims)
            if found.setdefault(key, tensor.axes) != tensor.axes:
                raise ValueError(f"{one.name}: {key[0]} with {key[1]} dimensions has other axes in another format")
    return found
