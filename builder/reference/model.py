"""Runs a TensorRT-LLM checkpoint with torch; the reference for what the numbers of a checkpoint mean. Imports torch.

Weights are dequantized once, when they are loaded. Inputs of linear layers are rounded as the format of the layer says
(builder/formats), keys (after RoPE) and values as the format of the KV cache says. From TensorRT-LLM 1.2:
`attention.qkv` is q, k and v in this order; `mlp.fc` is the gate projection (layers/mlp.py, GatedMLP:
proj(act(fc(x)) * gate(x))). One difference: its FP8Linear rounds both scales to the model's dtype unless gemm_plugin is
fp8 (quantization/layers.py); here they are those of the checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from builder.architectures import names
from builder.checkpoint.joining import Joined
from builder.checkpoint.layouts import QUANT_CFG, read_json
from builder.core.errors import IntegrityError, UnsupportedError
from builder.formats import kv_cache
from builder.formats.arithmetic.dtypes import DTYPES
from builder.formats.base import NumberFormat
from builder.formats.declared import MIXED, DeclaredFormats, declared
from builder.formats.registry import for_tensorrt_llm
from builder.model.rope import frequencies, rotate
from builder.reference.adapters import Adapter
from builder.reference.supported import ACTIVATIONS, engine_architectures

_KINDS = {kind: name for name, kind in DTYPES.items()}
KV_CACHE_ALGOS = tuple(one.quant_algo for one in kv_cache.FORMATS.values())
_CACHE_START = 256  # tokens; a full cache doubles its capacity


@dataclass(frozen=True)
class Linear:
    """y = round_input(x) W^T + b, with the input rounded as the layer's format says.

    weight: [outputs, inputs], dequantized. stored: the other tensors of the format, by their names in it.
    """

    weight: Tensor
    bias: Tensor | None
    number_format: NumberFormat
    stored: Mapping[str, Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(self.number_format.round_input(x, self.stored), self.weight, self.bias)


Adapted = Callable[[str, Linear, Tensor], Tensor]  # the kind of layer by Hugging Face's name, the layer, its inputs


@dataclass(frozen=True)
class Norm:
    """RMS normalization over the last dimension, in float32."""

    weight: Tensor
    epsilon: float

    def __call__(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return self.weight * wide.to(x.dtype)


@dataclass(frozen=True)
class Layer:
    """One decoder layer. kv_scales: of the keys and of the values, None if the KV cache is not quantized."""

    input_norm: Norm
    qkv: Linear
    q_norm: Norm | None
    k_norm: Norm | None
    dense: Linear
    kv_scales: tuple[Tensor, Tensor] | None
    post_norm: Norm
    fc: Linear
    gate: Linear
    proj: Linear

    def mlp(self, x: Tensor, adapted: Adapted) -> Tensor:
        """The gated MLP, [n, hidden] -> [n, hidden]. adapted: runs a linear layer with what an adapter adds."""
        inner = F.silu(adapted("gate_proj", self.fc, x)) * adapted("up_proj", self.gate, x)
        return adapted("down_proj", self.proj, inner)


class KVCache:
    """Keys and values of one sequence: [KV heads, capacity, head size] per layer, of which `length` tokens are used."""

    def __init__(self, layers: int) -> None:
        self.length = 0
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * layers

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Appends [KV heads, tokens, head size] to a layer; returns all its keys and values. `length` stays."""
        end = self.length + keys.shape[1]
        held = self._layers[layer]
        if held is None or held[0].shape[1] < end:
            held = self._layers[layer] = (_grown(held and held[0], keys, end), _grown(held and held[1], values, end))
        held[0][:, self.length : end] = keys
        held[1][:, self.length : end] = values
        return held[0][:, :end], held[1][:, :end]


def _grown(old: Tensor | None, like: Tensor, tokens: int) -> Tensor:
    """A larger copy of a layer's cache: at least `tokens`, and at least twice the old capacity."""
    capacity = max(tokens, _CACHE_START if old is None else 2 * old.shape[1])
    new = like.new_zeros(like.shape[0], capacity, like.shape[2])
    if old is not None:
        new[:, : old.shape[1]] = old
    return new


class ReferenceModel:
    """A loaded checkpoint. max_seq_len: of the engine; of the model if the directory holds a checkpoint."""

    def __init__(self, config: Mapping[str, Any], max_seq_len: int, tensors: _Tensors) -> None:
        self.config, self.max_seq_len, self.dtype = config, max_seq_len, tensors.dtype
        self.heads, self.head_size = config["num_attention_heads"], config["head_size"]
        self.kv_heads = config["num_key_value_heads"]
        self._cache = kv_cache.of_checkpoint(config["quantization"].get("kv_cache_quant_algo"))
        self.embedding = tensors.plain(f"{names.ENGINE_EMBEDDING}.weight")
        self.layers = [tensors.layer(f"{names.ENGINE_LAYERS}.{i}") for i in range(config["num_hidden_layers"])]
        self.norm = tensors.norm(names.ENGINE_FINAL_NORM)
        self.head = tensors.linear(names.ENGINE_HEAD)
        self._angles, self._rope_factor = frequencies(self.head_size, config["rotary_base"], config["rotary_scaling"])

    @classmethod
    def load(cls, directory: Path, dtype: torch.dtype = torch.float32) -> ReferenceModel:
        """Loads `config.json` (of a checkpoint or an engine) and `rank*.safetensors`. dtype: of the arithmetic.

        Several ranks are joined, so that one process runs the model. UnsupportedError for an architecture, activation
        or format that the executor does not support, IntegrityError if tensors are missing.
        """
        from safetensors import safe_open

        engine = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        config = engine.get("pretrained_config", engine)
        _check(config)
        formats = _formats(directory, config["quantization"])
        length = engine.get("build_config", {}).get("max_seq_len") or config["max_position_embeddings"]
        if config.get("mapping", {}).get("world_size", 1) > 1:
            return cls(config, int(length), _Tensors(_Ranks(directory, config), config, formats, dtype))
        with safe_open(directory / "rank0.safetensors", framework="pt") as file:
            return cls(config, int(length), _Tensors(file, config, formats, dtype))

    def new_cache(self) -> KVCache:
        """An empty cache for one sequence."""
        return KVCache(len(self.layers))

    @torch.no_grad()
    def forward(self, ids: Tensor, cache: KVCache, adapter: Adapter | None = None) -> Tensor:
        """Logits [n, vocab] float32 of the next n token ids of the cache's sequence. The cache grows by n.

        adapter: a LoRA adapter, whose part is computed on the inputs of a layer before they are rounded, as in
        TensorRT-LLM (quantization/layers.py, FP8Linear.forward: lora_hidden_state).
        ValueError for no token, one outside of the vocabulary, or a sequence longer than max_seq_len.
        """
        self._check_ids(ids, cache)
        x = F.embedding(ids, self.embedding).to(self.dtype)
        positions = torch.arange(cache.length, cache.length + len(ids))
        angles = torch.outer(positions.float(), self._angles).repeat(1, 2)
        turn = [(f(angles) * self._rope_factor).to(self.dtype) for f in (torch.cos, torch.sin)]
        mask = None if len(ids) == 1 else torch.arange(cache.length + len(ids)) <= positions[:, None]
        for index, layer in enumerate(self.layers):
            adapted = _adapted(adapter, index)
            heads = self._attend(layer, index, self._qkv(layer, adapter, index, layer.input_norm(x)), turn, mask, cache)
            x = x + adapted("o_proj", layer.dense, heads)
            x = x + layer.mlp(layer.post_norm(x), adapted)
        cache.length += len(ids)
        return self.head(self.norm(x)).float()

    def _qkv(self, layer: Layer, adapter: Adapter | None, index: int, x: Tensor) -> Tensor:
        """Queries, keys and values of x [n, hidden], beside each other."""
        found = layer.qkv(x)
        if adapter is None:
            return found
        widths = {"q_proj": self.heads, "k_proj": self.kv_heads, "v_proj": self.kv_heads}
        added = [adapter.added(index, kind, x, heads * self.head_size) for kind, heads in widths.items()]
        return found + torch.cat(added, dim=-1)

    def _attend(
        self, layer: Layer, index: int, qkv: Tensor, turn: list[Tensor], mask: Tensor | None, cache: KVCache
    ) -> Tensor:
        """Grouped-query attention of queries, keys and values over the cache and themselves -> [n, heads * head size].

        turn: cosine and sine [n, head size]. mask: [n, tokens], None if every token is visible.
        """
        size = self.head_size
        heads = qkv.reshape(len(qkv), -1, size).transpose(0, 1)
        q, k, v = torch.split(heads, [self.heads, self.kv_heads, self.kv_heads])
        q = layer.q_norm(q) if layer.q_norm else q
        k = layer.k_norm(k) if layer.k_norm else k
        q, k = rotate(q, *turn), rotate(k, *turn)
        if layer.kv_scales is not None:
            k, v = (self._cache.round(part, scale) for part, scale in zip((k, v), layer.kv_scales, strict=True))
        k, v = cache.append(index, k, v)
        groups = self.heads // self.kv_heads
        out = F.scaled_dot_product_attention(
            q[None], k.repeat_interleave(groups, dim=0)[None], v.repeat_interleave(groups, dim=0)[None], attn_mask=mask
        )
        return out[0].transpose(0, 1).flatten(1)

    def _check_ids(self, ids: Tensor, cache: KVCache) -> None:
        if not len(ids):
            raise ValueError("no token ids")
        if int(ids.min()) < 0 or int(ids.max()) >= len(self.embedding):
            raise ValueError(f"a token id is outside of the vocabulary (0 to {len(self.embedding) - 1})")
        if cache.length + len(ids) > self.max_seq_len:
            raise ValueError(f"{cache.length} + {len(ids)} tokens exceed max_seq_len {self.max_seq_len}")


def _adapted(adapter: Adapter | None, index: int) -> Adapted:
    """Runs a linear layer of the layer with this index, with what the adapter adds."""
    if adapter is None:
        return lambda kind, linear, x: linear(x)

    def run(kind: str, linear: Linear, x: Tensor) -> Tensor:
        return linear(x) + adapter.added(index, kind, x, len(linear.weight))

    return run


class _Ranks:
    """Several rank files, with the two methods of safetensors' `safe_open` that are used here."""

    def __init__(self, directory: Path, config: Mapping[str, Any]) -> None:
        self._joined = Joined(directory, config)

    def keys(self) -> list[str]:
        return self._joined.names

    def get_tensor(self, name: str) -> Tensor:
        info = self._joined.info(name)
        return torch.frombuffer(self._joined.data(name), dtype=DTYPES[info.dtype]).reshape(info.shape)


class _Tensors:
    """The tensors of a checkpoint by name, converted to what the model computes with."""

    def __init__(self, file: Any, config: Mapping[str, Any], formats: DeclaredFormats, dtype: torch.dtype) -> None:
        self._file, self._names, self._config, self.dtype = file, set(file.keys()), config, dtype
        self._formats = formats

    def plain(self, name: str) -> Tensor:
        """A tensor as it is stored, a view of the mapped file. IntegrityError if it is missing."""
        if name not in self._names:
            raise IntegrityError(f"The checkpoint has no tensor {name}.", hint="Quantize again.")
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def maybe(self, name: str) -> Tensor | None:
        """A tensor in the arithmetic's dtype; None if it is missing."""
        return self.plain(name).to(self.dtype) if name in self._names else None

    def linear(self, name: str) -> Linear:
        """A linear layer with its weight dequantized."""
        kind = _KINDS[self.plain(f"{name}.weight").dtype]
        number_format = self._formats.of_weight(name, kind)
        leaves = {one.name: f"{name}.{one.tensorrt_llm}" for one in number_format.tensors}
        lacking = [one.name for one in number_format.tensors if one.optional and leaves[one.name] not in self._names]
        stored = {key: self.plain(leaf) for key, leaf in leaves.items() if key not in lacking}
        weight = number_format.dequantize(stored, self.dtype)
        del stored["weight"]
        return Linear(weight, self.maybe(f"{name}.bias"), number_format, stored)

    def norm(self, name: str) -> Norm:
        """An RMS norm."""
        return Norm(self.plain(f"{name}.weight").to(self.dtype), self._config["norm_epsilon"])

    def maybe_norm(self, name: str) -> Norm | None:
        """An RMS norm; None if the model does not have it."""
        return self.norm(name) if f"{name}.weight" in self._names else None

    def layer(self, name: str) -> Layer:
        """A decoder layer."""
        attention, mlp = f"{name}.attention", f"{name}.mlp"
        return Layer(
            input_norm=self.norm(f"{name}.input_layernorm"),
            qkv=self.linear(f"{attention}.qkv"),
            q_norm=self.maybe_norm(f"{attention}.q_layernorm"),
            k_norm=self.maybe_norm(f"{attention}.k_layernorm"),
            dense=self.linear(f"{attention}.dense"),
            kv_scales=self._kv_scales(attention),
            post_norm=self.norm(f"{name}.post_layernorm"),
            fc=self.linear(f"{mlp}.fc"),
            gate=self.linear(f"{mlp}.gate"),
            proj=self.linear(f"{mlp}.proj"),
        )

    def _kv_scales(self, attention: str) -> tuple[Tensor, Tensor] | None:
        """The scales of keys and values. An engine takes the larger of the two for both (TensorRT-LLM,
        models/modeling_utils.py, process_kv_scaling_factor)."""
        cache = kv_cache.of_checkpoint(self._config["quantization"].get("kv_cache_quant_algo"))
        if not cache.quantized:
            return None
        if f"{attention}.k_cache_scaling_factor" not in self._names:
            both = self.plain(f"{attention}.kv_cache_scaling_factor")
            return both, both
        keys, values = (self.plain(f"{attention}.{part}_cache_scaling_factor") for part in "kv")
        if not cache.one_scale:
            return keys, values  # as the PyTorch backend does (_torch/modules/linear.py, kv_scales)
        both = torch.maximum(keys, values)
        return both, both


def _formats(directory: Path, quantization: Mapping[str, Any]) -> DeclaredFormats:
    """The format of each layer, as the checkpoint's configuration declares it."""
    listed = read_json(directory / QUANT_CFG) if quantization["quant_algo"] == MIXED else {}
    return declared({**quantization, **listed})


def _check(config: Mapping[str, Any]) -> None:
    """UnsupportedError for a checkpoint that this executor would silently compute wrongly."""
    quantization = config["quantization"]
    wrong = [
        f"{name} {found!r}"
        for name, found, known in (
            ("architecture", config["architecture"], engine_architectures()),
            ("hidden_act", config["hidden_act"], ACTIVATIONS),
            ("position_embedding_type", config["position_embedding_type"], ("rope_gpt_neox", "yarn")),
            ("quant_algo", quantization["quant_algo"], (*(one.quant_algo for one in for_tensorrt_llm()), MIXED)),
            ("kv_cache_quant_algo", quantization.get("kv_cache_quant_algo"), KV_CACHE_ALGOS),
        )
        if found not in known
    ]
    if wrong:
        raise UnsupportedError(
            f"The reference executor can't run this checkpoint: {', '.join(wrong)}.",
            why=f"It runs checkpoints of {', '.join(engine_architectures())} in "
            f"{', '.join(one.title for one in for_tensorrt_llm())}.",
        )
