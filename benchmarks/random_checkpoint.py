"""For the benchmarks of `convert` and `inspect`: a random NVFP4 checkpoint in Qwen3-0.6B's shape.

The weights are random, but numbers that a quantizer could have written, so that an inspection finds nothing.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from random_model import linears, norms, shape

from builder.core.safetensors_io import NewTensor, write

CONFIG = shape("qwen3-0.6b")
ROWS = 4096  # of the embedding at a time


def floats(random: np.random.Generator, *shape: int) -> Iterator[bytes]:
    """BF16 numbers below 2."""
    rows = ROWS if len(shape) == 2 else shape[0]
    for start in range(0, shape[0], rows):
        size = (min(rows, shape[0] - start), *shape[1:])
        yield random.integers(0, 0x4000, size, np.uint16).tobytes()


def blocks(random: np.random.Generator, rows: int, columns: int) -> Iterator[bytes]:
    """Positive E4M3 scales of blocks of 16, 448 among them. Made when they are written, so that none is kept."""
    yield random.integers(1, 0x7F, (rows, columns // 16), np.uint8).tobytes()


def codes(random: np.random.Generator, rows: int, columns: int) -> Iterator[bytes]:
    """Packed E2M1 values."""
    yield random.bytes(rows * columns // 2)


def layer(number: int, random: np.random.Generator) -> Iterator[NewTensor]:
    """The tensors of one decoder layer; the largest block scale of each weight is 448."""
    prefix = f"model.layers.{number}."
    for name, size in norms(CONFIG).items():
        yield NewTensor(f"{prefix}{name}.weight", "BF16", (size,), floats(random, size))
    for name, (rows, columns) in linears(CONFIG).items():
        yield NewTensor(f"{prefix}{name}.weight_scale", "F8_E4M3", (rows, columns // 16), blocks(random, rows, columns))
        yield NewTensor(f"{prefix}{name}.weight", "U8", (rows, columns // 2), codes(random, rows, columns))
        yield NewTensor(f"{prefix}{name}.weight_scale_2", "F32", (), scale(1e-4 * (1 + number / 100)))
        yield NewTensor(f"{prefix}{name}.input_scale", "F32", (), scale(1e-2 * (1 + number / 100)))
    for x in "kv":
        yield NewTensor(f"{prefix}self_attn.{x}_proj.{x}_scale", "F32", (), scale(1.0))


def make(directory: Path, layers: int) -> Path:
    """A unified NVFP4 checkpoint with so many layers."""
    directory.mkdir()
    random, vocabulary = np.random.default_rng(0), (CONFIG["vocab_size"], CONFIG["hidden_size"])
    embedding = NewTensor("model.embed_tokens.weight", "BF16", vocabulary, floats(random, *vocabulary))
    tensors = [embedding, NewTensor("model.norm.weight", "BF16", (1024,), floats(random, 1024))]
    write(directory / "model.safetensors", [*tensors, *(t for n in range(layers) for t in layer(n, random))])
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


def scale(value: float) -> list[bytes]:
    """The bytes of an F32."""
    return [struct.pack("<f", value)]
