"""Remedies for a low score, estimated on a few texts: layers in FP8 or BF16, or the KV cache in the model's type.

Works on the open runner `checkpoint`: weights of the BF16 model, rounded to the remedy's format, temporarily replace
quantized ones. Inputs are rounded under their own largest value, while a build uses a calibrated one, so the scores
are estimates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from builder.core.safetensors_io import Tensors
from builder.core.worker import emit
from builder.evaluate.datasets import Sequences
from builder.evaluate.runners.worker import mean_nll
from builder.formats import registry
from builder.formats.arithmetic import fp8
from builder.formats.arithmetic.dtypes import read
from builder.formats.base import NumberFormat
from builder.model.source_tensors import open_tensors

TEXTS = 8  # of all sets together; five candidates then take about as long as the check itself


def estimate(
    runner: Any, sets: Mapping[str, Sequences], work: Path, candidates: Sequence[Mapping[str, Any]], snapshot: Path
) -> list[dict[str, Any]]:
    """[{"flags", "score", "nbytes"}] in the order of the candidates. `work` holds the scores of both models.

    Measures on a few texts which share of the loss remains, and multiplies the loss on all texts by it.
    """
    names = list(sets)
    loss = _mean(work / "quantized", names) - _mean(work / "bf16", names)
    step = max(1, sum(len(one.ids) for one in sets.values()) // TEXTS)
    texts = [ids for one in sets.values() for ids in one.ids[::step]]
    original, before = (_mean(work / variant, names, sets, step) for variant in ("bf16", "quantized"))
    stored, found = open_tensors(snapshot), []
    for number, candidate in enumerate(candidates):
        emit(progress={"label": "quality: remedies", "done": number, "total": len(candidates)})
        with (
            _kept(runner.model, candidate["modules"], stored, registry.get(candidate["format"])),
            _cache(runner.model, candidate["kv_cache_dtype"] != "auto"),
        ):
            share = (mean_nll(runner, texts) - original) / max(before - original, 1e-6)
        score = round(100 * math.exp(-loss * share), 3)
        found.append({"flags": list(candidate["flags"]), "score": score, "nbytes": int(candidate["nbytes"])})
    return found


def _mean(scores: Path, names: Sequence[str], sets: Mapping[str, Sequences] | None = None, step: int = 1) -> float:
    """Mean NLL of all texts, or of every `step`-th text of each set, in nats per token."""
    columns = []
    for name in names:
        nll = np.load(scores / name / "nll.npy")
        starts = sets[name].starts if sets else [0, len(nll)]
        columns += [nll[starts[index] : starts[index + 1]] for index in range(0, len(starts) - 1, step)]
    return float(np.concatenate(columns).mean(dtype=np.float64))


@contextmanager
def _kept(model: Any, modules: Sequence[str], stored: Tensors, number_format: NumberFormat) -> Iterator[None]:
    """These linear layers in a format, FP8 or BF16, while the block runs."""
    before = []
    for name in modules:
        module = model.get_submodule(name)
        before.append((module, module.weight.data, dict(module._forward_pre_hooks)))
        weight = read(stored, f"{name}.weight").to(module.weight.device)
        module._forward_pre_hooks.clear()
        rounded = number_format.round_weight(weight, weight.abs().amax())
        module.weight.data = rounded.to(module.weight.dtype)
        if number_format is registry.FP8:
            module.register_forward_pre_hook(lambda layer, inputs: (_through_fp8(inputs[0]),))
    try:
        yield
    finally:
        for module, weight, hooks in before:
            module.weight.data = weight
            module._forward_pre_hooks.clear()
            module._forward_pre_hooks.update(hooks)


def _through_fp8(x: Tensor) -> Tensor:
    largest = x.abs().amax().float().clamp(min=torch.finfo(torch.float32).tiny)
    return fp8.fake_quantize(x, largest / fp8.E4M3_MAX)


@contextmanager
def _cache(model: Any, quantized: bool) -> Iterator[None]:
    """Keeps the KV cache as it is, or in the dtype of computation while the block runs."""
    scaled = [] if quantized else [one for one in model.modules() if getattr(one, "k_scale", None) is not None]
    before = [(one, one.k_scale, one.v_scale) for one in scaled]
    for one in scaled:
        one.k_scale = one.v_scale = None
    try:
        yield
    finally:
        for one, key, value in before:
            one.k_scale, one.v_scale = key, value
