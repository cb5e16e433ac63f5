"""Small models with random weights of the families in configs/architectures that transformers has.

The sizes are the smallest that every number format divides; each kind of layer and of expert is there.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from builder.architectures.facts import StackedExperts
from builder.core.safetensors_io import NewTensor, Tensors
from builder.core.safetensors_io import write as write_tensors

SIZES: Mapping[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
ROUTED = {
    "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
LATENT = {
    "head_dim": None, "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16,
    "v_head_dim": 16, "num_key_value_heads": 4,
}  # fmt: skip
GATED_DELTA = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
SLIDING = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}
SHARED = {"shared_expert_intermediate_size": 32}
NO_HEAD: Mapping[str, Any] = {"head_dim": None}

# {model_type: what differs from SIZES}
MODELS: Mapping[str, Mapping[str, Any]] = {
    "afmoe": {**EXPERTS, **SLIDING, "num_shared_experts": 1, "num_dense_layers": 1},
    "cohere2": {**NO_HEAD, **SLIDING},
    "deepseek_v3": {**ROUTED, **LATENT},
    "ernie4_5": {},
    "ernie4_5_moe": {"moe_intermediate_size": 32, "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1,
                     "moe_layer_start_index": 1},
    "exaone4": {**NO_HEAD, **SLIDING},
    "exaone_moe": {**EXPERTS, **SLIDING, "num_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1,
                   "topk_group": 1},
    "gemma3_text": SLIDING,
    "gemma4_text": {**SLIDING, "vocab_size_per_layer_input": 4096, "hidden_size_per_layer_input": 16,
                    "global_head_dim": 32, "num_kv_shared_layers": 0, "enable_moe_block": True, "num_experts": 4,
                    "top_k_experts": 2, "moe_intermediate_size": 32},
    "glm4_moe": ROUTED,
    "glm4_moe_lite": {**ROUTED, **LATENT},
    "gpt_oss": {**SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2},
    "granite": NO_HEAD,
    "granitemoehybrid": {**NO_HEAD, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 32,
                         "layer_types": ["mamba", "attention"], "mamba_n_heads": 4, "mamba_d_head": 32,
                         "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 32},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "moe_intermediate_size": [32, 32]},
    "laguna": {**EXPERTS, **SHARED},
    "llama": {},
    "llama4_text": {"intermediate_size_mlp": 128, "num_local_experts": 4, "num_experts_per_tok": 1,
                    "interleave_moe_layer_step": 2, "layer_types": ["chunked_attention", "full_attention"]},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "mistral": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "nemotron": {},
    "nemotron_h": {"num_hidden_layers": None, "layers_block_type": ["mamba", "attention", "moe", "mlp"],
                   "mamba_num_heads": 4, "mamba_head_dim": 32, "ssm_state_size": 16, "n_groups": 2, "chunk_size": 32,
                   "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                   "moe_shared_expert_intermediate_size": 32, "n_group": 1, "topk_group": 1},
    "olmo2": NO_HEAD,
    "olmo3": {**NO_HEAD, **SLIDING},
    "phi3": NO_HEAD,
    "qwen2": NO_HEAD,
    "qwen2_moe": {**EXPERTS, **SHARED, **NO_HEAD},
    "qwen3": {},
    "qwen3_5_moe_text": {**EXPERTS, **SHARED, **GATED_DELTA, "intermediate_size": None},
    "qwen3_5_text": GATED_DELTA,
    "qwen3_moe": EXPERTS,
    "qwen3_next": {**EXPERTS, **SHARED, **GATED_DELTA},
    "seed_oss": {},
    "smollm3": NO_HEAD,
    "starcoder2": {**NO_HEAD, "sliding_window": 64},
}  # fmt: skip


def config(model_type: str) -> Any:
    """The transformers configuration of a small model. ValueError if this transformers does not have the family."""
    from transformers import AutoConfig

    merged = {**SIZES, **MODELS[model_type]}
    return AutoConfig.for_model(model_type, **{key: value for key, value in merged.items() if value is not None})


def write(model_type: str, directory: Path) -> dict[str, Any]:
    """Writes the model in BF16, as transformers saves it. Returns its config.json."""
    import torch
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config(model_type), dtype=torch.bfloat16)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() > 1:
                    weight.normal_(0, 0.05)
                weight.nan_to_num_(neginf=-1.0)  # A_log of linear attention may be the logarithm of 0
        model.save_pretrained(directory)
    found: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return found


def stack_experts(directory: Path, experts: StackedExperts) -> None:
    """Rewrites a model whose experts transformers saved one by one, with them stacked, as its publisher does. A model
    that is saved stacked stays as it is."""
    tensors = Tensors(directory)
    single = re.compile(rf"(.*\.)?{re.escape(experts.module)}\.(\d+)\.(gate|up|down)_proj\.weight")
    found = {name: match for name in tensors if (match := single.fullmatch(name))}
    made = []
    for parent in dict.fromkeys(match[1] for match in found.values()):
        count = 1 + max(int(match[2]) for match in found.values() if match[1] == parent)
        for stacked, projections in ((experts.gate_up, ("gate", "up")), (experts.down, ("down",))):
            parts = [f"{parent}{experts.module}.{n}.{one}_proj.weight" for n in range(count) for one in projections]
            info = tensors[parts[0]]
            shape = (count, len(projections) * info.shape[0], info.shape[1])
            made.append(NewTensor(f"{parent}{stacked}", info.dtype, shape, [tensors.read(part) for part in parts]))
    if made:
        rest = [
            NewTensor(name, one.dtype, one.shape, [tensors.read(name)])
            for name, one in tensors.items()
            if name not in found
        ]
        write_tensors(tensors.files[0], [*rest, *made], {"format": "pt"})
