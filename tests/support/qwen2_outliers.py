"""A Qwen2 made of the trained Qwen3 fixture, whose keys an FP8 cache can't hold. For tests; imports torch when called.

The Qwen3 norms each head's queries and keys; here their mean norms over some texts stand in the weights instead, so
that the model works without (perplexity 50 where the Qwen3 has 42). Then each key gets a bias of 1e7 in one dimension
which no query looks at: nothing changes, but one FP8 scale for all keys now leaves the other dimensions nothing but
zeros. Real Qwen2 models have smaller outliers of the same kind.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

OUTLIER = 1e7
# Pair 15 of 32 dimensions: the rotary embedding's slowest, and the one that queries are cut off from.
DIMENSIONS = (15, 31)


def write(source: Path, rows: list[list[int]], target: Path) -> Path:
    """The model directory, with the source's tokenizer. `rows` are token ids to take the mean norms from."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    norms = _mean_norms(model, rows)
    weights = {
        n: w.clone() for n, w in model.state_dict().items() if not n.endswith(("q_norm.weight", "k_norm.weight"))
    }
    size = model.config.head_dim
    for (layer, kind), norm in norms.items():
        attention = model.model.layers[layer].self_attn
        name = f"model.layers.{layer}.self_attn.{kind}_proj.weight"
        scale = getattr(attention, f"{kind}_norm").weight.detach()[None] / norm[:, None]  # [heads, head size]
        weights[name] = (weights[name].view(len(norm), size, -1) * scale[..., None]).flatten(0, 1)
    for layer in range(model.config.num_hidden_layers):
        prefix = f"model.layers.{layer}.self_attn."
        for kind in "qkv":
            weights[f"{prefix}{kind}_proj.bias"] = torch.zeros(len(weights[f"{prefix}{kind}_proj.weight"]))
        weights[f"{prefix}q_proj.weight"].view(-1, size, model.config.hidden_size)[:, DIMENSIONS] = 0
        weights[f"{prefix}k_proj.bias"].view(-1, size)[:, DIMENSIONS[0]] = OUTLIER
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    kept += ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "bos_token_id", "eos_token_id")
    config = Qwen2Config(**{key: getattr(model.config, key) for key in kept}, tie_word_embeddings=False)
    made = Qwen2ForCausalLM(config)
    made.load_state_dict(weights)
    made.to(torch.bfloat16).save_pretrained(target)
    theta = {"rope_theta": 10000.0}
    written = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(written | theta))
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(source / name, target / name)
    return target


def _mean_norms(model: Any, rows: list[list[int]]) -> dict[tuple[int, str], Any]:
    """(layer, "q" or "k") -> root mean square [heads] of what its norm is given."""
    import torch

    seen: dict[tuple[int, str], list[Any]] = defaultdict(list)
    hooks = []
    for index, layer in enumerate(model.model.layers):
        for kind in "qk":

            def note(module: Any, inputs: Any, output: Any, key: tuple[int, str] = (index, kind)) -> None:
                seen[key].append(inputs[0].pow(2).mean(-1).sqrt().mean(dim=(0, 1)))

            hooks.append(getattr(layer.self_attn, f"{kind}_norm").register_forward_hook(note))
    with torch.inference_mode():
        for ids in rows:
            model(torch.tensor([ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return {key: torch.stack(values).mean(0).clone() for key, values in seen.items()}
