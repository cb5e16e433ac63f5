"""A two-layer NVFP4 model for probes: real shapes and names, random weights of a realistic scale."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from builder.architectures import catalog, shapes
from builder.checkpoint import layouts
from builder.core.safetensors_io import NewTensor, write
from builder.formats.kv_cache import KvCacheFormat

HIDDEN, INNER, WORDS, HEADS, KV_HEADS, LAYERS = 512, 1024, 512, 4, 2, 2
POSITIONS = 2048
_LARGEST = 0x7E  # 448, the largest E4M3 number: that of a layer's largest block
# The deviation of a random E2M1 code: the mean square of 0, 0.5, 1, 1.5, 2, 3, 4, 6 is 8.56.
_DEVIATION = 2.93
_INPUT_SCALE = 8 / (6 * 448)  # activations of 8 at most: normed ones are near 1


def config(*, architecture: str = "Qwen3ForCausalLM", head_size: int = 128) -> dict[str, Any]:
    """The config.json of the model in the Hugging Face layout."""
    return {
        "architectures": [architecture],
        "dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": head_size,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "vocab_size": WORDS,
        "max_position_embeddings": POSITIONS,
        "tie_word_embeddings": False,
    }


def write_checkpoint(model: Mapping[str, Any], destination: Path, cache: KvCacheFormat) -> Path:
    """Writes both layouts to `destination` and returns the TensorRT-LLM one, written by the code for real models."""
    unified = destination / "unified"
    unified.mkdir(parents=True)
    write(unified / "model.safetensors", _tensors(model, cache))
    quantization = {"quant_algo": "NVFP4", "kv_cache_quant_algo": cache.quant_algo, "group_size": 16}
    producer = {"name": "trtllm-builder"}
    layouts.write_json(unified / "hf_quant_config.json", {"producer": producer, "quantization": quantization})
    layouts.write_tensorrt_llm(unified, model, destination / "tensorrt_llm")
    return destination / "tensorrt_llm"


def _tensors(model: Mapping[str, Any], cache: KvCacheFormat) -> Iterator[NewTensor]:
    """Random linear layers in NVFP4, norms of ones, a random embedding and head."""
    random, architecture = np.random.default_rng(0), catalog.of(model)
    names = architecture.tensors
    assert names is not None, "a probe's architecture has an engine"
    for layer in range(LAYERS):
        start = f"{names.layers}.{layer}."
        for role, (outputs, inputs) in shapes.linears(model).items():
            yield from _linear(start + names.linears[role], (outputs.size, inputs.size), random)
        for norm, width in shapes.norms(model).items():
            if norm in names.norms:
                yield _bf16(f"{start}{names.norms[norm]}.weight", np.ones(width.size))
        for scale in cache.unified:
            yield _scalar(f"{start}{names.attention}.{scale}", 1.0)
    yield _bf16(f"{names.final_norm}.weight", np.ones(HIDDEN))
    for name in (names.embedding, names.head):
        yield _bf16(f"{name}.weight", random.standard_normal((WORDS, HIDDEN)) / HIDDEN**0.5)


def _linear(name: str, shape: tuple[int, int], random: np.random.Generator) -> Iterator[NewTensor]:
    """An NVFP4 layer: any byte is two E2M1 codes; the global scale gives weights a deviation of 1 / sqrt(inputs)."""
    out, inputs = shape
    packed = random.integers(0, 256, out * inputs // 2, dtype=np.uint8)
    yield NewTensor(f"{name}.weight", "U8", (out, inputs // 2), [packed.tobytes()])
    yield NewTensor(f"{name}.weight_scale", "F8_E4M3", (out, inputs // 16), [bytes([_LARGEST]) * (out * inputs // 16)])
    yield _scalar(f"{name}.weight_scale_2", 1 / (448 * _DEVIATION * inputs**0.5))
    yield _scalar(f"{name}.input_scale", _INPUT_SCALE)


def _scalar(name: str, value: float) -> NewTensor:
    return NewTensor(name, "F32", (), [struct.pack("<f", value)])


def _bf16(name: str, values: np.ndarray[Any, Any]) -> NewTensor:
    """BF16 is the upper half of a float32."""
    halves = values.astype("<f4").view("<u2").reshape(*values.shape, 2)[..., 1]
    return NewTensor(name, "BF16", values.shape, [halves.tobytes()])
