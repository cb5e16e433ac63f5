"""Measures `builder convert` against its goals: python benchmarks/convert.py [--rounds 3] [--directory DIR]

- time relative to a plain read and write of the same bytes, in alternating runs; the start of both processes counts
- peak memory, for a random model in Qwen3-0.6B's shape and for one with a quarter of its layers
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from builder.core.safetensors_io import NewTensor, byte_size, write

# Qwen/Qwen3-0.6B, config.json
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072,
    "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 40960, "tie_word_embeddings": True,
    "hidden_act": "silu", "torch_dtype": "bfloat16",
}  # fmt: skip
LINEARS = {
    "self_attn.q_proj": (2048, 1024), "self_attn.k_proj": (1024, 1024), "self_attn.v_proj": (1024, 1024),
    "self_attn.o_proj": (1024, 2048), "mlp.gate_proj": (3072, 1024), "mlp.up_proj": (3072, 1024),
    "mlp.down_proj": (1024, 3072),
}  # fmt: skip
NORMS = {"input_layernorm": 1024, "post_attention_layernorm": 1024, "self_attn.q_norm": 128, "self_attn.k_norm": 128}
# The project's goals: a ratio, bytes, and how much more memory a model of four times the layers may take.
GOALS = {"convert / copy": 2.0, "peak memory": 300e6, "growth": 1.1}
CHUNK = 1 << 20
COPY = """
import sys
source, target = sys.argv[1:]
with open(source, "rb", buffering=0) as a, open(target, "wb", buffering=0) as b:
    while chunk := a.read(1 << 24):
        b.write(chunk)
"""


def random_bytes(nbytes: int) -> Iterator[bytes]:
    """Random bytes, a block repeated: what is in them does not matter."""
    block = os.urandom(CHUNK)
    for start in range(0, nbytes, CHUNK):
        yield block[: nbytes - start]


def scale(value: float) -> list[bytes]:
    """The bytes of an F32."""
    return [struct.pack("<f", value)]


def layer(number: int) -> Iterator[NewTensor]:
    """The tensors of one decoder layer."""
    prefix = f"model.layers.{number}."
    for name, size in NORMS.items():
        yield NewTensor(f"{prefix}{name}.weight", "BF16", (size,), random_bytes(2 * size))
    for name, (rows, columns) in LINEARS.items():
        for leaf, dtype, shape in (
            ("weight", "U8", (rows, columns // 2)),
            ("weight_scale", "F8_E4M3", (rows, columns // 16)),
        ):
            yield NewTensor(f"{prefix}{name}.{leaf}", dtype, shape, random_bytes(byte_size(dtype, shape)))
        yield NewTensor(f"{prefix}{name}.weight_scale_2", "F32", (), scale(1e-4 * (1 + number / 100)))
        yield NewTensor(f"{prefix}{name}.input_scale", "F32", (), scale(1e-2 * (1 + number / 100)))
    for x in "kv":
        yield NewTensor(f"{prefix}self_attn.{x}_proj.{x}_scale", "F32", (), scale(1.0))


def make(directory: Path, layers: int) -> Path:
    """A unified NVFP4 checkpoint with so many layers."""
    directory.mkdir()
    embedding = NewTensor("model.embed_tokens.weight", "BF16", (151936, 1024), random_bytes(2 * 151936 * 1024))
    tensors = [embedding, NewTensor("model.norm.weight", "BF16", (1024,), random_bytes(2048))]
    write(directory / "model.safetensors", [*tensors, *(t for n in range(layers) for t in layer(n))], {"format": "pt"})
    quantization = {
        "quant_algo": "NVFP4",
        "kv_cache_quant_algo": "FP8",
        "group_size": 16,
        "exclude_modules": ["lm_head"],
    }
    stated = {"producer": {"name": "modelopt", "version": "0.47.0"}, "quantization": quantization}
    (directory / "hf_quant_config.json").write_text(json.dumps(stated))
    (directory / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    return directory


def run(argv: list[str]) -> tuple[float, int]:
    """Wall seconds and peak resident bytes of a command."""
    start = time.perf_counter()
    child = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{argv} failed with {child.returncode}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def converted(source: Path, target: Path, layout: str) -> tuple[float, int]:
    """A conversion; `target` is removed before."""
    shutil.rmtree(target, ignore_errors=True)
    return run([sys.executable, "-m", "builder", "convert", str(source), str(target), "--to", layout, "-q"])


def main() -> int:
    """Exit code 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="where to work (default: the temporary directory)")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.directory) as name:
        root = Path(name)
        large, small = make(root / "large", 28), make(root / "small", 7)
        results = [
            measure(root, large, small, layout, asked.rounds) for layout in ("compressed-tensors", "tensorrt_llm")
        ]
        converted(large, root / "between", "compressed-tensors")
        converted(small, root / "between-small", "compressed-tensors")
        results.append(measure(root, root / "between", root / "between-small", "unified", asked.rounds))
    return 0 if all(results) else 1


def measure(root: Path, large: Path, small: Path, layout: str, rounds: int) -> bool:
    """Prints one layout's ratio and memory; returns whether the goals are met."""
    weights, pairs = large / "model.safetensors", []
    for _ in range(rounds + 1):  # the first warms the page cache
        copied = run([sys.executable, "-c", COPY, str(weights), str(root / "copy")])
        made = converted(large, root / "new", layout)
        pairs.append((made[0] / copied[0], made[0], copied[0], made[1]))
    (root / "copy").unlink()
    ratio = statistics.median(pair[0] for pair in pairs[1:])
    peak, little = max(pair[3] for pair in pairs), converted(small, root / "new", layout)[1]
    shutil.rmtree(root / "new")
    met = ratio <= GOALS["convert / copy"] and peak <= GOALS["peak memory"] and peak / little <= GOALS["growth"]
    times = ", ".join(f"{made:.2f} / {copied:.2f} s" for _, made, copied, _ in pairs[1:])
    print(f"{layout:<18} convert / copy {ratio:.2f} ({times}), goal {GOALS['convert / copy']}; peak memory "
          f"{peak / 1e6:.0f} MB, with 7 of 28 layers {little / 1e6:.0f} MB, goal 300 MB and flat: {met}")  # fmt: skip
    return met


if __name__ == "__main__":
    sys.exit(main())
