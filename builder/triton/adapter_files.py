"""LoRA adapters in an engine's repository: their files, and the type of the input that they are sent in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.core.errors import IntegrityError
from builder.core.safetensors_io import Tensors
from builder.lora import cache, tensors
from builder.trtllm.compatibility import LOGITS_TYPES

if TYPE_CHECKING:
    from builder.lora.adapter import Adapter

KINDS = {"F16": "FP16", "BF16": "BF16", "F32": "FP32", "I32": "INT32"}  # safetensors' names of types: Triton's
DIRECTORY = "1/adapters"  # relative to the model's directory, so that the model can be renamed


def ingredients(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """The repository's ingredients: names and content."""
    return {"adapters": {one.name: one.digest for one in adapters}} if adapters else {}


def check_unchanged(adapters: Sequence[Adapter], known: Mapping[str, Any]) -> None:
    """IntegrityError if an adapter changed since `known`, the ingredients, were made of it."""
    if changed := [one.name for one in adapters if one.digest != known["adapters"][one.name]]:
        raise IntegrityError(
            f"The files of an adapter changed while they were converted: {', '.join(changed)}.",
            why="The result would be stored under the key of the old files.",
            hint="Wait until nothing writes to them, then run the same command again.",
        )


def with_dtype(listed: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of the models with lora_weights in the engine's dtype, if it takes adapters; `config` is its
    config.json. Upstream's template says TYPE_FP16 for every engine, and the backend then rejects the adapters of a
    bfloat16 one."""
    if not cache.has_adapters(config["build_config"]):
        return dict(listed)
    kind = LOGITS_TYPES[config["pretrained_config"]["dtype"]]
    return {name: _with_dtype(part, kind) for name, part in listed.items()}


def _with_dtype(part: Any, kind: str) -> Any:
    if not isinstance(part, Mapping) or "input" not in part:
        return part
    inputs = [{**one, "data_type": kind} if one["name"] == "lora_weights" else one for one in part["input"]]
    return {**part, "input": inputs}


def write(model: Path, adapters: Sequence[Adapter], config: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the adapters into the engine model's directory. Returns the facts that clients need: names, and for each
    its file and the number that stands for it (lora_task_id)."""
    if not adapters:
        return {}
    dtype, found = config["pretrained_config"]["dtype"], {}
    for adapter in adapters:
        file = f"{DIRECTORY}/{adapter.name}.safetensors"
        tensors.write(adapter, dtype, model / file)
        found[adapter.name] = {"file": file, "task_id": tensors.task_id(adapter.digest, dtype)}
    return {"adapters": list(found), "adapter_files": found}


def read(file: Path) -> Iterator[tuple[str, str, tuple[int, ...], bytes]]:
    """The inputs with which a request brings the adapter of a file, up to some hundred MB: name, Triton's data type,
    shape without the batch dimension, and content."""
    found = Tensors(file.parent, [file])
    return ((name, KINDS[info.dtype], tuple(info.shape), found.read(name)) for name, info in found.items())
