"""LoRA adapters in the reference executor: the requests' tensors, and the cache that keeps them. Imports torch.

As TensorRT-LLM 1.2 does (tensorrt_llm/runtime/loraUtils.cpp, loraCache.cpp, batch_manager/peftCacheManager.cpp): a
request brings an adapter's weights or names one that is cached. Those in use stay; of the others the one that was not
used for longest gives way first.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from builder.lora import cache
from builder.lora.modules import BY_ID, MODULES, sizes
from builder.reference.sampling import RequestError

NOT_CACHED = "LoRA task {} not found in cache. Please send LoRA weights with request"
FULL = "PEFT Cache is full. Could not store taskId={}"
COLUMNS = (3, 4)  # of lora_config; the fourth says whether the layer is DoRA

Tensors = Mapping[str, "np.ndarray[Any, Any]"]


@dataclass(frozen=True)
class AdapterLimits:
    """What an engine takes: the kinds of layers with their inputs and outputs, the largest rank, and the layers."""

    modules: Mapping[str, tuple[int, int]]
    max_rank: int
    layers: int

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> AdapterLimits | None:
        """From an engine's config.json; None if it takes no adapters."""
        build = config.get("build_config") or {}
        if not cache.has_adapters(build):
            return None
        pretrained, lora = config["pretrained_config"], build["lora_config"]
        known = sizes(pretrained)
        enabled = {one.hf: known[one.hf] for one in MODULES if one.name in lora["lora_target_modules"]}
        return cls(enabled, int(lora["max_lora_rank"]), int(pretrained["num_hidden_layers"]))


class Adapter:
    """The matrices of an adapter. pairs: {(layer, kind of layer): (A [rank, inputs], B [outputs, rank])}, B scaled."""

    def __init__(self, pairs: Mapping[tuple[int, str], tuple[Tensor, Tensor]]) -> None:
        self._pairs = pairs

    @property
    def nbytes(self) -> int:
        """In 16 bits, as an engine holds it."""
        return sum(2 * (a.numel() + b.numel()) for a, b in self._pairs.values())

    def added(self, layer: int, kind: str, x: Tensor, outputs: int) -> Tensor:
        """What the adapter adds to the outputs of a linear layer for x [n, inputs] -> [n, outputs]."""
        pair = self._pairs.get((layer, kind))
        if pair is None:
            return x.new_zeros(len(x), outputs)
        return F.linear(F.linear(x, pair[0].to(x.dtype)), pair[1].to(x.dtype))


class AdapterCache:
    """Adapters by their number (lora_task_id), up to `limit` bytes. Safe for several threads."""

    def __init__(self, limits: AdapterLimits | None, limit: int) -> None:
        self._limits, self._limit = limits, limit
        self._lock = threading.Lock()
        self._adapters: OrderedDict[int, Adapter] = OrderedDict()  # the one that was not used for longest first
        self._users: dict[int, int] = {}  # how many rows use it, of those that are in use

    def take(self, tensors: Tensors, row: int) -> tuple[int, Adapter] | None:
        """The adapter of a row of a request, which `release` gives back; None if the row has none.

        RequestError, with the backend's words, for tensors that don't fit the engine or each other.
        """
        task = _task(tensors, row)
        brought = [name for name in ("lora_weights", "lora_config") if name in tensors and tensors[name].size]
        if task is None and not brought:
            return None
        if self._limits is None:
            raise RequestError("This engine takes no LoRA adapters (lora_plugin).")
        if task is None:
            raise RequestError("lora_task_id must be set for LoRA inference")
        made = _adapter(tensors, row, self._limits) if brought else None
        with self._lock:
            if task not in self._adapters:
                if made is None:
                    raise RequestError(NOT_CACHED.format(task))
                self._make_room(task, made.nbytes)
                self._adapters[task] = made  # as upstream, weights of a number that is cached are ignored
            self._adapters.move_to_end(task)
            self._users[task] = self._users.get(task, 0) + 1
            return task, self._adapters[task]

    def release(self, task: int) -> None:
        """A row that has taken it has ended."""
        with self._lock:
            self._users[task] -= 1
            if not self._users[task]:
                del self._users[task]

    def _make_room(self, task: int, nbytes: int) -> None:
        used = sum(one.nbytes for one in self._adapters.values())
        for other in list(self._adapters):
            if used + nbytes <= self._limit:
                return
            if other not in self._users:
                used -= self._adapters.pop(other).nbytes
        if used + nbytes > self._limit:
            raise RequestError(FULL.format(task))


def _task(tensors: Tensors, row: int) -> int | None:
    array = tensors.get("lora_task_id")
    if array is None or not array.size:
        return None
    flat = array.reshape(-1)
    return int(flat[row if row < flat.size else 0])


def _adapter(tensors: Tensors, row: int, limits: AdapterLimits) -> Adapter:
    """The adapter that a row brings. RequestError as loraValidateRequestTensors."""
    weights, config = (tensors.get(name) for name in ("lora_weights", "lora_config"))
    if weights is None or config is None or not weights.size or not config.size:
        raise RequestError("Request for LoRA inference must have both lora_weights and lora_keys")
    if weights.ndim != 3 or config.ndim != 3:
        raise RequestError("Invalid shape for lora_weights tensor")
    values, keys = (array[row if row < len(array) else 0] for array in (weights, config))
    if keys.shape[-1] not in COLUMNS:
        raise RequestError("Expected dim2 of lora_keys to have a size in [3, 4]")
    if len(values) != len(keys):
        raise RequestError("Expected dim1 lora_weights and lora_keys to have the same size")
    numbers = torch.from_numpy(np.ascontiguousarray(values))
    pairs = {}
    for key, line in zip(keys.tolist(), numbers, strict=True):
        module, layer, rank, *dora = key
        if any(dora):
            raise RequestError("The reference executor does not support DoRA adapters.")
        kind = _kind(module, limits)
        pairs[layer, kind] = _pair(line, layer, rank, kind, limits)
    return Adapter(pairs)


def _kind(module: int, limits: AdapterLimits) -> str:
    found = BY_ID.get(module)
    if found is None or found.hf not in limits.modules:
        raise RequestError(f"lora module {found.name if found else module} not enabled for this model")
    return found.hf


def _pair(line: Tensor, layer: int, rank: int, kind: str, limits: AdapterLimits) -> tuple[Tensor, Tensor]:
    if not 0 <= layer < limits.layers:
        raise RequestError("Expected layerId to be in the range [0, numModelLayers)")
    if rank < 1:
        raise RequestError("Expected adapterSize to be > 0")
    if rank > limits.max_rank:
        raise RequestError(f"Invalid low_rank ({rank}). low_rank must be smaller than mMaxLowRank ({limits.max_rank})")
    inputs, outputs = limits.modules[kind]
    if rank * (inputs + outputs) > len(line):
        raise RequestError(f"lora_weights has to few values for {kind}")
    a, b = line[: rank * inputs], line[rank * inputs : rank * (inputs + outputs)]
    return a.reshape(rank, inputs).clone(), b.reshape(outputs, rank).clone()
