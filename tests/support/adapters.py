"""LoRA adapters as PEFT writes them, for the bundled model: values without a random generator, the same everywhere."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SIZES = {  # (inputs, outputs) of tests/data/tiny-qwen3
    "q_proj": (256, 256), "k_proj": (256, 128), "v_proj": (256, 128), "o_proj": (256, 256),
    "gate_proj": (256, 768), "up_proj": (256, 768), "down_proj": (768, 256),
}  # fmt: skip
LAYERS = 6


def module(layer: int, kind: str) -> str:
    """The name of a linear layer of the model."""
    return f"model.layers.{layer}.{'self_attn' if kind in ALL[:4] else 'mlp'}.{kind}"


def values(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Numbers between -1 and 1 that look random (Knuth's multiplicative hash of their places)."""
    places = np.arange(rows * columns, dtype=np.uint64) + np.uint64(1 + 7919 * seed)
    hashed = (places * np.uint64(2654435761)) % np.uint64(1 << 32)
    return torch.from_numpy(hashed.astype(np.float64) / 2**31 - 1).float().reshape(rows, columns)


def tensors(kinds: Sequence[str], rank: int, seed: int, strength: float = 1.0) -> dict[str, torch.Tensor]:
    """The adapter's tensors in float32, by the names in its file."""
    made = {}
    for layer in range(LAYERS):
        for kind in kinds:
            (inputs, outputs), number = SIZES[kind], 1000 * seed + 10 * layer + ALL.index(kind)
            name = f"base_model.model.{module(layer, kind)}"
            made[f"{name}.lora_A.weight"] = values(rank, inputs, 2 * number) / inputs**0.5
            made[f"{name}.lora_B.weight"] = values(outputs, rank, 2 * number + 1) * strength
    return made


def write(
    directory: Path,
    kinds: Sequence[str] = ("q_proj", "v_proj"),
    *,
    rank: int = 4,
    seed: int = 1,
    dtype: torch.dtype = torch.float32,
    changed: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """Writes an adapter. `changed`: tensors by their names in the file, None leaves one out. `config`: more of
    adapter_config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    made = {name: tensor.to(dtype) for name, tensor in tensors(kinds, rank, seed).items()} | (changed or {})
    save_file(
        {name: tensor for name, tensor in made.items() if tensor is not None}, directory / "adapter_model.safetensors"
    )
    described = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "tiny-qwen3", "r": rank,
        "lora_alpha": 2 * rank, "target_modules": list(kinds), "bias": "none", **config,
    }  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps(described))
    return directory


def products(directory: Path, scale: float) -> dict[tuple[int, str], torch.Tensor]:
    """{(layer, kind): what is added to its weight}, which is what LoRA means (arXiv 2106.09685, section 4.1)."""
    found, made = load_file(directory / "adapter_model.safetensors"), {}
    for name, a in found.items():
        if ".lora_A." in name:
            words = name.split(".")
            made[int(words[4]), words[6]] = scale * found[name.replace("_A.", "_B.")].float() @ a.float()
    return made
