"""What a module or tensor is, by its name: which linear layer, which layers are one when served. Pure."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence

from builder.architectures.catalog import conventions
from builder.architectures.facts import Architecture, NormRole, Role, TensorNames

# TensorRT-LLM's linear layers and the roles that they are made of, concatenated in dim 0. GatedMLP computes
# proj(act(fc(x)) * gate(x)) (layers/mlp.py), so `fc` is the gate projection (models/model_weights_loader.py agrees).
ENGINE_LINEARS: Mapping[str, tuple[Role, ...]] = {
    "attention.qkv": ("q", "k", "v"),
    "attention.dense": ("o",),
    "mlp.fc": ("gate",),
    "mlp.gate": ("up",),
    "mlp.proj": ("down",),
}
# TensorRT-LLM's norms of a decoder layer, and their roles.
ENGINE_NORMS: Mapping[str, NormRole] = {
    "input_layernorm": "input",
    "post_layernorm": "post_attention",
    "attention.q_layernorm": "q",
    "attention.k_layernorm": "k",
}
ENGINE_LAYERS = "transformer.layers"
ENGINE_EMBEDDING, ENGINE_FINAL_NORM, ENGINE_HEAD = "transformer.vocab_embedding", "transformer.ln_f", "lm_head"
# Tensor parallelism splits the outputs of these layers, dim 0, and the inputs of the others, dim 1.
COLUMN_PARALLEL: tuple[Role, ...] = ("q", "k", "v", "qkv", "gate", "up", "gate_up")
ROW_PARALLEL: tuple[Role, ...] = ("o", "down")
MLP: tuple[Role, ...] = ("gate", "up", "gate_up", "down")
# MLPs and experts whose layers have no role: the patterns of ModelOpt's NVFP4_MLP_ONLY_CFG (0.47).
_MLP = re.compile(r"mlp|block_sparse_moe|\.experts\.|\.mixer\.(?:up|down)_proj$")
_EXPERTS = re.compile(r"(.*\.experts)\.\d+\.")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def role(architecture: Architecture, module: str) -> Role | None:
    """The role of a linear layer by its module name; None for any other module."""
    names = _table(architecture.tensors) if architecture.tensors else _conventional()
    return next((known for name, known in names if module == name or module.endswith(f".{name}")), None)


def _table(tensors: TensorNames) -> list[tuple[str, Role]]:
    return [(name, known) for known, name in tensors.linears.items()]


@functools.cache
def _conventional() -> list[tuple[str, Role]]:
    return [(name, known) for known, names in conventions().linears.items() for name in names]


def in_mlp(architecture: Architecture, module: str) -> bool:
    """Whether a linear layer belongs to an MLP or to the experts of a mixture."""
    own = role(architecture, module)
    return own in MLP if own is not None else _MLP.search(module) is not None


def in_attention(architecture: Architecture, module: str) -> bool:
    """Whether a linear layer is a projection of softmax attention: of queries, keys, values or its output."""
    own = role(architecture, module)
    return own is not None and own not in MLP


def fused_name(architecture: Architecture, module: str) -> str | None:
    """The name of the layer that servers multiply this one in together with others, `qkv_proj`; None if it is alone."""
    own = role(architecture, module)
    return next((name for name, roles in conventions().fused.items() if own in roles), None)


def same_input(architecture: Architecture, module: str) -> str:
    """A name that a linear layer has in common with those that get the same input, which ModelOpt gives one scale of
    their weights: of q_proj `...qkv_proj`; its own where it is alone."""
    for members in architecture.same_input:
        for end in members:
            if module.endswith(f".{end}"):
                return f"{module.removesuffix(end)}{members[0]}"
    fused = fused_name(architecture, module)
    return f"{module.rpartition('.')[0]}.{fused}" if fused else module


def group_of(architecture: Architecture, module: str) -> str:
    """What is quantized or excluded together: `...qkv_proj` for q_proj; the experts of a mixture are one group."""
    experts = _EXPERTS.match(module)
    if experts:
        return experts[1]
    fused = fused_name(architecture, module)
    return f"{module.rpartition('.')[0]}.{fused}" if fused else module


def experts_of(module: str) -> str | None:
    """The module that holds the experts of which this layer is a part, `...mlp.experts`; None for other layers."""
    found = _EXPERTS.match(f"{module}.")
    return found[1] if found else None


def parts(architecture: Architecture) -> dict[str, str]:
    """Words to make patterns of: names of the `attention` and `mlp` blocks, and of the linear layers by their role."""
    table = architecture.tensors
    if table is None:
        usual = conventions()
        leaves = {str(known): names[0] for known, names in usual.linears.items()}
        return leaves | {str(block): name for block, name in usual.blocks.items()}
    leaves = {str(known): name.rpartition(".")[2] for known, name in table.linears.items()}
    return {**leaves, "attention": table.attention, "mlp": table.linears["gate"].rpartition(".")[0]}


def engine_layer(architecture: Architecture, module: str) -> str:
    """TensorRT-LLM's name of the layer that a module is or is a part of: model.layers.0.self_attn.q_proj is
    transformer.layers.0.attention.qkv. Experts and modules outside of the decoder layers keep their name."""
    own, layer = role(architecture, module), layer_of(architecture, module)
    if own is None or layer is None or _EXPERTS.match(module):
        return module
    name = next((name for name, roles in ENGINE_LINEARS.items() if own in roles), None)
    return f"{ENGINE_LAYERS}.{layer}.{name}" if name else module


def layer_of(architecture: Architecture, name: str) -> int | None:
    """The number of the decoder layer that a module or tensor belongs to; None outside of them."""
    tensors = architecture.tensors
    found = (_numbered(tensors.layers) if tensors else _LAYER).search(name)
    return int(found[1][:9]) if found else None  # a longer number is a mistake, and slow to read


@functools.cache
def _numbered(layers: str) -> re.Pattern[str]:
    return re.compile(rf"^{re.escape(layers)}\.(\d+)\.")


def is_embedding(architecture: Architecture, module: str) -> bool:
    """Whether this module is the token embedding."""
    if architecture.tensors:
        return module == architecture.tensors.embedding
    return ".layers." not in module and module.rpartition(".")[2] in conventions().embeddings


def is_head(architecture: Architecture, module: str) -> bool:
    """Whether this module is the output layer, which gives the logits."""
    if architecture.tensors:
        return module == architecture.tensors.head
    return ".layers." not in module and module.rpartition(".")[2] in conventions().heads


def is_quantizable(architecture: Architecture, tensor: str, shape: Sequence[int]) -> bool:
    """Whether this tensor is the weight of a linear layer that quantizers quantize; never embedding, norm or head."""
    if not tensor.endswith(".weight") or len(shape) != 2:
        return False
    if architecture.tensors:
        return role(architecture, tensor.removesuffix(".weight")) is not None
    return not any(part in tensor for part in (*conventions().never_quantized, *architecture.never_quantized))
