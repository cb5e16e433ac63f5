"""The plain decoders (Llama, Mistral, Qwen2, Qwen3) with torch alone: importing one model class of transformers takes
twice as long as importing torch.

Modules and parameters have transformers' names, and each operation is the one of transformers' modules (models/llama/
modeling_llama.py, models/qwen3/modeling_qwen3.py, integrations/sdpa_attention.py; 4.57 and 5.14), so that results are
equal bit for bit. `computes` says for which models that holds; transformers computes the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from builder.architectures import attention, catalog
from builder.core.errors import BuilderError
from builder.model import multimodal, tensor_names
from builder.model.rope import frequencies, rotate

ACTIVATION = "silu"
ROPE_TYPES = ("linear", "llama3", "yarn")
LAYERS = "model.layers"
_OUTSIDE = ("model.embed_tokens", "model.norm", "lm_head")
_LINEARS = tuple(f"self_attn.{one}_proj" for one in "qkvo") + tuple(f"mlp.{one}_proj" for one in ("gate", "up", "down"))
_NORMS = ("input_layernorm", "post_attention_layernorm")
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")


def computes(config: Mapping[str, Any], tokens: int) -> bool:
    """Whether `DenseModel` computes this model as transformers does, for rows of at most `tokens` tokens."""
    architecture = catalog.of(config)
    table = architecture.tensors
    if architecture.reference is None or table is None or multimodal.MARK in config or "auto_map" in config:
        return False
    norms = {*_NORMS, *_HEAD_NORMS} if architecture.qk_norm else {*_NORMS}
    named = (table.layers, {table.embedding, table.final_norm, table.head}, {*table.linears.values()})
    if named != (LAYERS, {*_OUTSIDE}, {*_LINEARS}) or {*table.norms.values()} != norms:
        return False
    try:
        _, scaling = attention.rope(config)
    except BuilderError:
        return False
    window = attention.sliding_window(config)
    given = config.get("hidden_act") or architecture.config.defaults["hidden_act"]
    turned = scaling is None or scaling["rope_type"] in ROPE_TYPES
    return turned and given == ACTIVATION and (window is None or tokens < window)


class Linear(nn.Linear):
    """A linear layer whose weights come from files."""

    def reset_parameters(self) -> None:
        """Does nothing: to initialize weights on the meta device, torch would import its compiler (0.7 s)."""


class Embedding(nn.Embedding):
    """An embedding whose weights come from files."""

    def reset_parameters(self) -> None:
        """Does nothing, as in Linear."""


class RMSNorm(nn.Module):
    """RMS normalization over the last dimension, in float32."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(torch.empty(size)), epsilon

    def forward(self, x: Tensor) -> Tensor:
        """The same shape and dtype as x."""
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return self.weight * wide.to(x.dtype)


def sdpa(module: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention, [rows, heads, tokens, size] -> [rows, tokens, heads, size]."""
    found = F.scaled_dot_product_attention(
        query, key, value, is_causal=query.shape[2] > 1, scale=module.scaling, enable_gqa=module.groups > 1
    )
    return found.transpose(1, 2).contiguous()


# As transformers' modules do, Attention looks its function up here, so that it can be replaced by one that observes.
ALL_ATTENTION_FUNCTIONS: dict[str, Any] = {"sdpa": sdpa}


class Attention(nn.Module):
    """Grouped-query attention with rotary embedding."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.config = SimpleNamespace(_attn_implementation="sdpa")
        self.head_size, self.groups = sizes.head_size, sizes.groups
        self.scaling = self.head_size**-0.5
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = map(sizes.linear, _LINEARS[:4])
        self.q_norm = self.k_norm = None
        if sizes.qk_norm:
            self.q_norm = RMSNorm(self.head_size, sizes.epsilon)
            self.k_norm = RMSNorm(self.head_size, sizes.epsilon)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """x: [rows, tokens, hidden size]; turn: cosine and sine, [1, 1, tokens, head size]."""
        shape = (*x.shape[:-1], -1, self.head_size)
        q, k, v = (layer(x).view(shape) for layer in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (self.q_norm(q), self.k_norm(k)) if self.q_norm and self.k_norm else (q, k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out = ALL_ATTENTION_FUNCTIONS["sdpa"](self, rotate(q, *turn), rotate(k, *turn), v)
        made: Tensor = self.o_proj(out.reshape(*x.shape[:-1], -1))
        return made


class MLP(nn.Module):
    """The gated MLP."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = map(sizes.linear, _LINEARS[4:])

    def forward(self, x: Tensor) -> Tensor:
        """The same shape as x."""
        made: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return made


class Layer(nn.Module):
    """A decoder layer."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(sizes), MLP(sizes)
        self.input_layernorm = RMSNorm(sizes.hidden, sizes.epsilon)
        self.post_attention_layernorm = RMSNorm(sizes.hidden, sizes.epsilon)

    def forward(self, hidden_states: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """The hidden states after the layer; turn: see Attention."""
        middle = hidden_states + self.self_attn(self.input_layernorm(hidden_states), turn)
        made: Tensor = middle + self.mlp(self.post_attention_layernorm(middle))
        return made


class Decoder(nn.Module):
    """Embedding, decoder layers and final norm."""

    def __init__(self, sizes: Sizes, depth: int) -> None:
        super().__init__()
        self.embed_tokens = Embedding(sizes.vocabulary, sizes.hidden)
        self.layers = nn.ModuleList([Layer(sizes) for _ in range(depth)])
        self.norm = RMSNorm(sizes.hidden, sizes.epsilon)
        self._rope = sizes.head_size, sizes.rope_base, sizes.rope_scaling

    def forward(self, ids: Tensor, use_cache: bool = False) -> Tensor:
        """The hidden states of token ids [rows, tokens]."""
        hidden: Tensor = self.embed_tokens(ids)
        angles, factor = frequencies(*self._rope)
        positions = torch.arange(ids.shape[1], dtype=torch.float32, device=ids.device)
        both = torch.outer(positions, angles.to(ids.device)).repeat(1, 2)[None, None]
        turn = ((both.cos() * factor).to(hidden.dtype), (both.sin() * factor).to(hidden.dtype))
        for layer in self.layers:
            hidden = layer(hidden, turn)
        normed: Tensor = self.norm(hidden)
        return normed


class DenseModel(nn.Module):
    """A causal language model without an output layer, as calibration needs it. Parameters are on the meta device.

    config: of a model that `computes` accepts.
    """

    base_model_prefix = "model"
    name_or_path = ""

    def __init__(self, config: Mapping[str, Any], dtype: torch.dtype) -> None:
        super().__init__()
        self.config = _Config(config)
        with torch.device("meta"):
            self.model = Decoder(Sizes(config), config["num_hidden_layers"]).to(dtype)

    def get_input_embeddings(self) -> Embedding:
        """The embedding."""
        return self.model.embed_tokens

    def tie_weights(self) -> None:
        """There is no output layer to tie."""


class _Config(SimpleNamespace):
    """config.json with attributes, as transformers' configurations have them."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(**config)
        self.tie_word_embeddings = bool(config.get("tie_word_embeddings"))

    def to_dict(self) -> dict[str, Any]:
        """config.json."""
        return dict(self.__dict__)


class Sizes:
    """Sizes of a model's parts, by its config.json."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        architecture = catalog.of(config)
        self._expected = tensor_names.expected(config)
        self.hidden, self.vocabulary = config["hidden_size"], config["vocab_size"]
        self.head_size = attention.head_size(config)
        self.groups = config["num_attention_heads"] // attention.kv_heads(config)
        self.qk_norm = architecture.qk_norm
        epsilon = config.get("rms_norm_eps")
        self.epsilon = float(architecture.config.defaults["rms_norm_eps"] if epsilon is None else epsilon)
        self.rope_base, self.rope_scaling = attention.rope(config)

    def linear(self, name: str) -> Linear:
        """A linear layer of the first decoder layer; all others have the same sizes."""
        outputs, inputs = self._expected[f"{LAYERS}.0.{name}.weight"].shape
        return Linear(inputs, outputs, bias=f"{LAYERS}.0.{name}.bias" in self._expected)
