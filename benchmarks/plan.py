"""Measures time and memory of planning for large models: python benchmarks/plan.py

The models are synthetic, with the shapes of Qwen2.5-72B and Qwen3-235B-A22B: safetensors files with a header and sparse
data. The first one is planned. The second has no TensorRT-LLM layout here, so only its sizes are computed.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SECONDS, MEGABYTES = 2.0, 300
SHARD_TENSORS = 400
TOKENIZER = Path("tests/data/tiny-qwen3")
QWEN25_72B = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 8192, "intermediate_size": 29568,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 152064,
    "max_position_embeddings": 131072, "torch_dtype": "bfloat16", "tie_word_embeddings": False, "rms_norm_eps": 1e-6,
    "hidden_act": "silu", "rope_theta": 1000000.0,
}  # fmt: skip
QWEN3_235B = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 4096, "head_dim": 128,
    "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_experts": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 94, "num_attention_heads": 64, "num_key_value_heads": 4, "vocab_size": 151936,
    "max_position_embeddings": 40960, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
}  # fmt: skip
SIZES = """
import sys
from pathlib import Path
from builder.preflight import memory as fit
from builder.preflight import checks as preflight
from builder.core.output import Output
from builder.recipe.schema import Model
from builder.core.store import Store
model = preflight.read_model(Model(id=sys.argv[1]), Store(Path(sys.argv[2]), Output("quiet"), dry=True))
limits = fit.Serving(max_batch_size=64, max_input_len=2048, max_seq_len=4096, max_num_tokens=8192, tp=4)
print(fit.sizes(model, limits).parameters)
print(fit.memory(model, limits, "B200", 193_300_000_000))
"""


def shapes(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of a configuration by name, with their shapes, as transformers saves them."""
    hidden, kv = c["hidden_size"], c["num_key_value_heads"]
    dim = c.get("head_dim") or hidden // c["num_attention_heads"]
    q = c["num_attention_heads"] * dim
    found: dict[str, tuple[int, ...]] = {"model.norm.weight": (hidden,)}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        found[name] = (c["vocab_size"], hidden)
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        for name, out in (("q", q), ("k", kv * dim), ("v", kv * dim)):
            found[f"{p}self_attn.{name}_proj.weight"] = (out, hidden)
            if c["model_type"] == "qwen2":
                found[f"{p}self_attn.{name}_proj.bias"] = (out,)
        found[f"{p}self_attn.o_proj.weight"] = (hidden, q)
        experts = [f"mlp.experts.{n}." for n in range(c["num_experts"])] if "num_experts" in c else ["mlp."]
        inner = c.get("moe_intermediate_size") or c["intermediate_size"]
        for mlp in experts:
            found |= {f"{p}{mlp}{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
            found[f"{p}{mlp}down_proj.weight"] = (hidden, inner)
        if len(experts) > 1:
            found[f"{p}mlp.gate.weight"] = (len(experts), hidden)
            found |= {f"{p}self_attn.{name}_norm.weight": (dim,) for name in "qk"}
        found |= {f"{p}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    return found


def make(config: dict[str, Any], directory: Path) -> Path:
    """Creates a model directory whose weights are sparse files."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    for file in TOKENIZER.glob("*token*"):
        shutil.copy(file, directory)
    tensors = list(shapes(config).items())
    parts = [tensors[i : i + SHARD_TENSORS] for i in range(0, len(tensors), SHARD_TENSORS)]
    weight_map = {}
    for number, part in enumerate(parts, 1):
        name, header, at = f"model-{number:05}-of-{len(parts):05}.safetensors", {}, 0
        for tensor, shape in part:
            end = at + 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
            header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
            at, weight_map[tensor] = end, name
        text = json.dumps(header).encode()
        with open(directory / name, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + at)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def measured(name: str, argv: list[str], codes: tuple[int, ...] = (0,)) -> bool:
    """Runs a command and prints its wall time and the maximum memory of all commands so far.

    Returns whether the goals are met. `codes` are the expected exit codes.
    """
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *argv], capture_output=True, text=True)
    elapsed = time.perf_counter() - start
    if done.returncode not in codes:
        raise SystemExit(f"{name}: exit code {done.returncode}\n{done.stderr}")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6
    met = elapsed <= SECONDS and peak <= MEGABYTES
    print(f"{name:<34} {elapsed:5.2f} s  {peak:4.0f} MB  goal {SECONDS} s, {MEGABYTES} MB: {met}")
    return met


def main() -> int:
    """Exit code 1 if a goal is missed."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        large = str(make(QWEN25_72B, work / "72b"))
        moe = str(make(QWEN3_235B, work / "235b"))
        plan = ["-m", "builder", "plan", "--model", large, "--output", str(work / "out")]
        met = [
            measured("plan, 72B, fits", [*plan, "--gpu", "sm120-fmha", "--kv-cache-dtype", "auto"]),
            measured("plan, 72B, refused with a change", [*plan, "--gpu", "sm120", "--max-batch-size", "64"], (3,)),
            measured("sizes, 235B MoE", ["-c", SIZES, moe, str(work / "out")]),
        ]
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
