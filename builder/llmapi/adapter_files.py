"""What TensorRT-LLM's LLM class takes of a LoRA adapter: it reads PEFT's files itself, and not all that they say.

From tensorrt_llm/lora_manager.py (1.2; LoraManager.load_from_hf, HF_LORA_PATTERN, get_hf_target_modules): matrices are
found by the names of their tensors, wherever in the model they are; the scale is lora_alpha by the rank of the matrix,
or by its root with use_rslora. alpha_pattern is not read, and neither is what `lora.adapter.MORE` lists: it would be
ignored without an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder.core.errors import UnsupportedError
from builder.core.safe_text import quoted
from builder.core.safetensors_io import Tensors
from builder.lora import adapter
from builder.lora.adapter import MERGE, WEIGHTS
from builder.lora.modules import MODULES, enabled

TENSOR = re.compile(r".*\.\d+\.\w+\.(\w+)\.lora_[AB]\.weight")
FUSED = "gate_up_proj"  # Hugging Face's name for gate_proj and up_proj in one; TensorRT-LLM's is FUSED_NAME
FUSED_NAME = "mlp_gate_up"
WHY = "TensorRT-LLM's LLM class would ignore it, or does not apply it (tensorrt_llm/lora_manager.py, load_from_hf)."
KINDS = (*(module.hf for module in MODULES), FUSED)


@dataclass(frozen=True)
class Adapter:
    """An adapter that the LLM class can serve. modules: the kinds of layers that it changes, by Hugging Face's names.
    base: the model that it says it was trained on."""

    name: str
    base: str
    modules: tuple[str, ...]


def open_adapter(name: str, directory: Path) -> Adapter:
    """Reads an adapter's configuration and the header of its weights.

    UsageError if it is none, UnsupportedError for one that would be applied wrongly, IntegrityError for a damaged one.
    """
    adapter.check_files(name, directory)
    config = adapter.read_config(directory)
    adapter.check_config(name, config, WHY)
    _check_scales(name, config)
    tensors = Tensors(directory, [directory / WEIGHTS])
    found = {tensor: match[1] for tensor in tensors if (match := TENSOR.fullmatch(tensor))}
    if other := sorted(tensor for tensor in tensors if found.get(tensor) not in KINDS):
        raise UnsupportedError(
            f"The adapter {name} has tensors that TensorRT-LLM's LLM class does not take: "
            f"{', '.join(map(quoted, other[:3]))}{', ...' * (len(other) > 3)}.",
            why=f"Supported are lora_A and lora_B of {', '.join(KINDS)} (tensorrt_llm/lora_manager.py, 1.2).",
            hint=MERGE,
        )
    modules = tuple(kind for kind in KINDS if kind in found.values())
    return Adapter(name, str(config.get("base_model_name_or_path") or ""), modules)


def _check_scales(name: str, config: Mapping[str, Any]) -> None:
    if config.get("alpha_pattern"):
        raise UnsupportedError(
            f"The adapter {name} has scales of single layers (alpha_pattern), which TensorRT-LLM's LLM class ignores.",
            why="tensorrt_llm/lora_manager.py, load_from_hf, scales every layer by lora_alpha.",
            hint=f"--target engine takes it. Or: {MERGE}",
        )


def target_modules(modules: set[str]) -> list[str]:
    """TensorRT-LLM's names of the layers that adapters of these kinds change: q, k and v only together."""
    wanted = enabled(modules - {FUSED})
    return [module.name for module in MODULES if module.hf in wanted] + [FUSED_NAME] * (FUSED in modules)
