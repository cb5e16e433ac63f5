"""The linear layers that an adapter can change: Hugging Face's names, TensorRT-LLM's names and numbers, sizes. Pure.

Numbers: LoraManager.LORA_MODULE_IDS, tensorrt_llm/lora_manager.py@30e6fb55. Names: lora_helper.py@037d4ba1,
get_default_trtllm_modules_to_hf_modules. The llama and qwen models of the engine path take these seven.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from builder.architectures import shapes


class Module(NamedTuple):
    """A kind of layer: Hugging Face's last word for it, TensorRT-LLM's name, and its number in `lora_config`."""

    hf: str
    name: str
    id: int


MODULES = (
    Module("q_proj", "attn_q", 1),
    Module("k_proj", "attn_k", 2),
    Module("v_proj", "attn_v", 3),
    Module("o_proj", "attn_dense", 4),
    Module("gate_proj", "mlp_h_to_4h", 5),
    Module("down_proj", "mlp_4h_to_h", 6),
    Module("up_proj", "mlp_gate", 7),
)
BY_HF = {module.hf: module for module in MODULES}
BY_ID = {module.id: module for module in MODULES}
QKV = ("q_proj", "k_proj", "v_proj")


def sizes(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """{Hugging Face's name: (inputs, outputs)} of the layers of a model, by its config.json or that of a checkpoint."""
    return {f"{role}_proj": (wide.size, high.size) for role, (high, wide) in shapes.linears(config).items()}


def enabled(found: Iterable[str]) -> list[str]:
    """The layers that an engine is built with so that it takes adapters of these: q, k and v only together
    (lora_helper.py@037d4ba1, get_missing_qkv_modules_from_lora_modules)."""
    wanted = set(found)
    if wanted & set(QKV):
        wanted |= set(QKV)
    return [module.hf for module in MODULES if module.hf in wanted]
