"""For the benchmarks of quantization: random models in real shapes, with a tokenizer and rows to calibrate on.

    python benchmarks/random_model.py qwen3-8b DIRECTORY [--layers 8] [--shards 4]

The weights are random bits within a range of exponents, which costs a tenth of a normal distribution. The first number
of each weight is larger and differs, so that shared scales are put to the test.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from builder.core.safetensors_io import NewTensor, byte_size, write

DATA = Path(__file__).parents[1] / "tests" / "data" / "tiny-qwen3"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")
TEXTS = Path(__file__).parents[1] / "configs" / "calibration" / "python-docs.jsonl"
# What both have in their config.json
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128, "vocab_size": 151936,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 40960,
    "hidden_act": "silu", "attention_bias": False, "torch_dtype": "bfloat16", "bos_token_id": 4087,
    "eos_token_id": 4089,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    # Qwen/Qwen3-0.6B, config.json
    "qwen3-0.6b": QWEN3
    | {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    # Qwen/Qwen3-8B, config.json
    "qwen3-8b": QWEN3
    | {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
}
CHUNK = 1 << 22  # numbers made at a time
# BF16 bits: a random sign, one of four exponents and a random mantissa; 2**-9 to 2**-5, a deviation of 0.014 as that of
# trained weights. LARGEST is 2**-4 times 1 to 2.
RANDOM_BITS, SMALLEST, LARGEST = np.uint16(0x81FF), np.uint16(0x3B00), 0x3D80


def shape(name: str, layers: int | None = None) -> dict[str, Any]:
    """The config.json of a shape; layers: another number than the model has."""
    return SHAPES[name] | ({} if layers is None else {"num_hidden_layers": layers})


def linears(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """[outputs, inputs] of the linear layers of each decoder layer."""
    hidden, inner, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    return {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }


def norms(config: dict[str, Any]) -> dict[str, int]:
    """The sizes of the norms of each decoder layer."""
    hidden, size = config["hidden_size"], config["head_dim"]
    return {
        "input_layernorm": hidden,
        "post_attention_layernorm": hidden,
        "self_attn.q_norm": size,
        "self_attn.k_norm": size,
    }


def layer_bytes(config: dict[str, Any]) -> int:
    """Bytes of one decoder layer in BF16."""
    return 2 * (sum(rows * columns for rows, columns in linears(config).values()) + sum(norms(config).values()))


def embedding_bytes(config: dict[str, Any]) -> int:
    """Bytes of the embedding, and of the output projection where it is a tensor of its own."""
    return int(2 * config["vocab_size"] * config["hidden_size"] * (1 if config["tie_word_embeddings"] else 2))


def weight(random: np.random.Generator, count: int) -> Iterator[bytes]:
    """BF16 numbers of a weight."""
    for start in range(0, count, CHUNK):
        bits = random.integers(0, 1 << 16, min(CHUNK, count - start), np.uint16)
        np.bitwise_and(bits, RANDOM_BITS, out=bits)
        bits += SMALLEST
        if not start:
            bits[0] = LARGEST + int(random.integers(0x80))
        yield bits.tobytes()


def norm(size: int) -> Iterator[bytes]:
    """BF16 ones."""
    yield np.full(size, 0x3F80, np.uint16).tobytes()


def tensors(config: dict[str, Any], random: np.random.Generator) -> Iterator[NewTensor]:
    """All tensors of a model, in the order of its layers. Their numbers are made when they are written."""
    vocabulary = (config["vocab_size"], config["hidden_size"])
    yield NewTensor("model.embed_tokens.weight", "BF16", vocabulary, weight(random, vocabulary[0] * vocabulary[1]))
    for number in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{number}."
        for name, size in norms(config).items():
            yield NewTensor(f"{prefix}{name}.weight", "BF16", (size,), norm(size))
        for name, (rows, columns) in linears(config).items():
            yield NewTensor(f"{prefix}{name}.weight", "BF16", (rows, columns), weight(random, rows * columns))
    yield NewTensor("model.norm.weight", "BF16", (vocabulary[1],), norm(vocabulary[1]))
    if not config["tie_word_embeddings"]:
        yield NewTensor("lm_head.weight", "BF16", vocabulary, weight(random, vocabulary[0] * vocabulary[1]))


def make(directory: Path, config: dict[str, Any], shards: int = 1) -> Path:
    """A model as on the Hub, its tensors divided among so many files of about the same size."""
    directory.mkdir(parents=True)
    named = list(tensors(config, np.random.default_rng(0)))
    sizes = [byte_size(one.dtype, one.shape) for one in named]
    begins = [sum(sizes[:n]) for n in range(len(sizes))]
    parts = [[one for one, begin in zip(named, begins, strict=True) if begin * shards // sum(sizes) == n]
             for n in range(shards)]  # fmt: skip
    index: dict[str, str] = {}
    for n, part in enumerate(parts, 1):
        name = f"model-{n:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors"
        write(directory / name, part, {"format": "pt"})
        index |= {one.name: name for one in part}
    if shards > 1:
        stated = {"metadata": {"total_size": sum(sizes)}, "weight_map": index}
        (directory / "model.safetensors.index.json").write_text(json.dumps(stated))
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    for name in TOKENIZER:
        shutil.copy(DATA / name, directory)
    return directory


def make_rows(path: Path, rows: int, tokens: int) -> Path:
    """Rows of English text of at least so many tokens each, to be cut to this length."""
    known = [json.loads(line) for line in TEXTS.read_text(encoding="utf-8").splitlines()]
    whole, size = "\n".join(row.get("text", "") for row in known), 8 * tokens  # a token has fewer characters than 8
    whole *= 1 + rows * size // len(whole)
    path.write_text("".join(json.dumps({"text": whole[n * size : (n + 1) * size]}) + "\n" for n in range(rows)))
    return path


def main() -> None:
    """Makes a model to try things with."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, help="another number of layers than the model has")
    parser.add_argument("--shards", type=int, default=1)
    asked = parser.parse_args()
    make(asked.directory, shape(asked.shape, asked.layers), asked.shards)


if __name__ == "__main__":
    main()
