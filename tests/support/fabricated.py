"""Checkpoints in any format without ModelOpt: the tensors have the right types and shapes, and plausible values.

For tests that move tensors between layouts, where the values only have to be told apart.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from builder.architectures import catalog, names
from builder.checkpoint.layouts import read_json
from builder.core.safetensors_io import NewTensor, Tensors, write
from builder.formats.base import NumberFormat, StoredTensor
from builder.formats.declared import MIXED


def unified(
    source: Path,
    one: NumberFormat,
    destination: Path,
    *,
    excluded: Sequence[str] = (),
    attention: NumberFormat | None = None,
) -> Path:
    """Writes the model in the Hugging Face layout, its linear layers in a format but for the `excluded` ones and, where
    it gets a format of its own, `attention`."""
    config = read_json(source / "config.json")
    architecture, tensors = catalog.of(config), Tensors(source)
    made: list[NewTensor] = []
    formats: dict[str, NumberFormat] = {}
    for name, info in tensors.items():
        module = name.removesuffix(".weight")
        if names.is_quantizable(architecture, name, info.shape) and module not in excluded:
            formats[module] = kind = attention if attention and names.in_attention(architecture, module) else one
            role = names.role(architecture, module)
            group = names.group_of(architecture, module)
            for tensor in (tensor for tensor in kind.tensors if tensor.held(role, unified=True)):
                made.append(_tensor(f"{module}.{tensor.unified}", tensor, info.shape, group))
        elif name != "lm_head.weight" or not config.get("tie_word_embeddings"):
            made.append(NewTensor(name, info.dtype, info.shape, tensors.chunks(name)))
    for layer in range(config["num_hidden_layers"]):
        scales = [f"model.layers.{layer}.self_attn.{x}_proj.{x}_scale" for x in "kv"]
        made += [NewTensor(name, "F32", (), [np.float32(2 + n).tobytes()]) for n, name in enumerate(scales)]
    destination.mkdir(parents=True)
    write(destination / "model.safetensors", made, {"format": "pt"})
    (destination / "config.json").write_text(json.dumps(config))
    quantization = {**one.layer_entry, "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head", *excluded]}
    if attention:
        listed = {module: kind.layer_entry for module, kind in formats.items()}
        quantization |= {"quant_algo": MIXED, "quantized_layers": listed}
    said = {"producer": {"name": "modelopt", "version": "0.47.0"}, "quantization": quantization}
    (destination / "hf_quant_config.json").write_text(json.dumps(said))
    return destination


def _tensor(name: str, tensor: StoredTensor, weight: Sequence[int], group: str) -> NewTensor:
    """Values of its own, or of its group for what the projections of a layer share."""
    seed = name if tensor.per_output else f"{group}.{tensor.unified}"
    bits = np.random.default_rng(list(seed.encode()))
    dtype, shape = tensor.dtypes[0], tensor.shape(weight)
    if dtype in ("U8", "I8"):
        data = bits.integers(0, 256, shape, dtype=np.uint8)
    elif dtype == "F8_E4M3":
        data = bits.integers(0x30, 0x7F, shape, dtype=np.uint8)
    else:
        values = bits.uniform(0.5, 2, shape).astype(np.float32)
        data = values if dtype == "F32" else (values.view(np.uint32) >> 16).astype(np.uint16)
    return NewTensor(name, dtype, shape, [data.tobytes()])
