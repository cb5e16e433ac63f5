"""Models in their real sizes that take no disk: config.json, tensor headers, and files of the right length with a hole
for the weights. Enough for everything that reads headers alone, such as `builder plan`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

TOKENIZER = Path(__file__).parents[1] / "data" / "tiny-qwen3"
COMMON = {"torch_dtype": "bfloat16", "hidden_act": "silu", "rms_norm_eps": 1e-6, "vocab_size": 151936}
QWEN3_8B: Mapping[str, Any] = {
    **COMMON, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "max_position_embeddings": 40960,
    "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False, "rope_theta": 1000000,
}  # fmt: skip
QWEN3_32B: Mapping[str, Any] = {
    **QWEN3_8B, "hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64,
}  # fmt: skip
LLAMA_70B: Mapping[str, Any] = {
    **COMMON, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "max_position_embeddings": 131072,
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False, "rope_theta": 500000, "vocab_size": 128256,
}  # fmt: skip


def tensors(config: Mapping[str, Any]) -> Iterator[tuple[str, list[int]]]:
    """(name, shape) of every tensor of a dense Llama or Qwen3."""
    hidden, wide, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, groups = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    linears = {
        "self_attn.q_proj": [heads, hidden],
        "self_attn.k_proj": [groups, hidden],
        "self_attn.v_proj": [groups, hidden],
        "self_attn.o_proj": [hidden, heads],
        "mlp.gate_proj": [wide, hidden],
        "mlp.up_proj": [wide, hidden],
        "mlp.down_proj": [hidden, wide],
        "input_layernorm": [hidden],
        "post_attention_layernorm": [hidden],
    }
    if config["model_type"] == "qwen3":
        linears |= {"self_attn.q_norm": [head], "self_attn.k_norm": [head]}
    yield "model.embed_tokens.weight", [config["vocab_size"], hidden]
    for layer in range(config["num_hidden_layers"]):
        for name, shape in linears.items():
            yield f"model.layers.{layer}.{name}.weight", shape
    yield "model.norm.weight", [hidden]
    yield "lm_head.weight", [config["vocab_size"], hidden]


def write(config: Mapping[str, Any], directory: Path) -> Path:
    """The model in `directory`, in BF16, with the tokenizer of the bundled model."""
    directory.mkdir(parents=True, exist_ok=True)
    for file in TOKENIZER.iterdir():
        if file.suffix in (".json", ".txt") and file.name not in ("config.json", "model.safetensors.index.json"):
            shutil.copy(file, directory)
    (directory / "config.json").write_text(json.dumps(config))
    header, offset = {}, 0
    for name, shape in tensors(config):
        end = offset + 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with open(directory / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    return directory
