"""Rejects values in a model's config.json that have the wrong type or are out of range. Pure.

Only keys that this project or the architectures it serves read are checked; transformers checks the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from builder.architectures import catalog
from builder.core.errors import UsageError

MOST_LAYERS = 10_000
# (least, most). The upper limits are far above those of any released model; larger values are mistakes, and would
# exhaust memory.
SIZES: Mapping[str, tuple[int, int]] = {
    "hidden_size": (1, 1 << 20),
    "intermediate_size": (1, 1 << 24),
    "num_hidden_layers": (1, MOST_LAYERS),
    "num_attention_heads": (1, 1 << 16),
    "num_key_value_heads": (1, 1 << 16),
    "head_dim": (1, 1 << 16),
    "head_size": (1, 1 << 16),
    "vocab_size": (1, 1 << 26),
    "max_position_embeddings": (1, 1 << 30),
    "original_max_position_embeddings": (1, 1 << 30),
    "seq_length": (1, 1 << 30),
    "sliding_window": (0, 1 << 30),
    "max_window_layers": (0, 1 << 20),
    "moe_intermediate_size": (0, 1 << 24),
    "shared_expert_intermediate_size": (0, 1 << 24),
    "moe_shared_expert_intermediate_size": (0, 1 << 24),
    "num_experts": (0, 1 << 16),
    "num_local_experts": (0, 1 << 16),
    "n_routed_experts": (0, 1 << 16),
    "num_experts_per_tok": (0, 1 << 16),
    "num_nextn_predict_layers": (0, MOST_LAYERS),
    "num_labels": (0, 1 << 26),
}
# The keys that all sizes, and all splits over GPUs, are computed from.
SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
NUMBERS: Mapping[str, tuple[float, float]] = {
    "rms_norm_eps": (0.0, 1.0),
    "layer_norm_eps": (0.0, 1.0),
    "rope_theta": (1.0, 1e15),
    "rope_local_base_freq": (1.0, 1e15),
    "partial_rotary_factor": (0.01, 1.0),
    "attention_dropout": (0.0, 1.0),
    "initializer_range": (0.0, 1e6),
}
SWITCHES = (
    "tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "is_encoder_decoder", "use_qk_norm",
)  # fmt: skip
WORDS = ("model_type", "hidden_act", "hidden_activation")
DTYPES = ("bfloat16", "float16", "float32")
ROPES = ("rope_scaling", "rope_parameters")
ROPE_NUMBERS: Mapping[str, tuple[float, float]] = {
    "rope_theta": NUMBERS["rope_theta"],
    "partial_rotary_factor": NUMBERS["partial_rotary_factor"],
    "factor": (0.0, 1e6),
    "low_freq_factor": (0.0, 1e6),
    "high_freq_factor": (0.0, 1e6),
    "attention_factor": (0.0, 1e6),
    "beta_fast": (0.0, 1e6),
    "beta_slow": (0.0, 1e6),
    "mscale": (0.0, 1e6),
    "mscale_all_dim": (0.0, 1e6),
}
# Keys without a default in transformers (modeling_rope_utils.py), for the kinds that TensorRT-LLM's engines support.
ROPE_NEEDS: Mapping[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def check(config: Mapping[str, Any], where: str) -> None:
    """UsageError that lists every value of this config.json with a wrong type or out of range.

    Absent and null keys are accepted; see `require`.
    """
    wrong = [*_keys(config), *_ropes(config)]
    refuse(wrong or list(_relations(config)), where)


def require(config: Mapping[str, Any], keys: Sequence[str], where: str) -> None:
    """UsageError if one of these keys is absent or null: sizes and layouts are computed from them."""
    refuse([f"{key} is missing" for key in keys if config.get(key) is None], where)


def refuse(wrong: Sequence[str], where: str) -> None:
    """UsageError that lists these problems, at most ten of them, if there are any."""
    if wrong:
        raise UsageError(
            f"{where}/config.json has {len(wrong)} invalid value{'s' * (len(wrong) > 1)}.",
            why="\n".join([*wrong[:10], *["..."] * (len(wrong) > 10)]),
            hint="Correct config.json, or copy it again from the original model.",
        )


def _keys(config: Mapping[str, Any]) -> Iterator[str]:
    for key, (low, high) in SIZES.items():
        yield from _unless(config, key, partial(whole, low=low, high=high), f"a whole number, {low} to {high}")
    for key, (least, most) in NUMBERS.items():
        yield from _unless(config, key, partial(number, least=least, most=most), f"a number, {least:g} to {most:g}")
    for key in (*SWITCHES, *engine_fields(bool)):
        yield from _unless(config, key, lambda v: isinstance(v, bool), "true or false")
    for key in (*WORDS, *engine_fields(str)):
        yield from _unless(config, key, _word, "a name")
    for key in ("dtype", "torch_dtype"):
        yield from _unless(config, key, lambda v: v in DTYPES if isinstance(v, str) else False, ", ".join(DTYPES))
    for key in TOKENS:
        yield from _unless(config, key, _token, "a token id or a list of token ids")
    yield from _unless(config, "architectures", _words, "a list of class names")
    yield from _unless(config, "layer_types", _words, "a list of names")
    yield from _unless(config, "text_config", lambda v: isinstance(v, Mapping), "an object")


def engine_fields(kind: type) -> list[str]:
    """Fields of TensorRT-LLM's configuration classes whose values are of this type, and which config.json may set."""
    engines = [one.engine.config for one in catalog.every() if one.engine]
    return list(dict.fromkeys(key for config in engines for key, value in config.items() if isinstance(value, kind)))


def _unless(config: Mapping[str, Any], key: str, valid: Callable[[Any], bool], needed: str) -> Iterator[str]:
    value = config.get(key)
    if value is not None and not valid(value):
        yield f"{key} is {shown(value)}; expected: {needed}"


def shown(value: Any) -> str:
    """A JSON value, short enough for a message and safe to print."""
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    text = {True: "true", False: "false"}[value] if isinstance(value, bool) else ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


def whole(value: Any, low: int, high: int) -> bool:
    """Whether this is an integer (not a boolean) from low to high."""
    return type(value) is int and low <= value <= high


def number(value: Any, least: float, most: float) -> bool:
    """Whether this is a finite number (not a boolean) from least to most."""
    return type(value) in (int, float) and least <= value <= most and math.isfinite(value)


def _word(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 200 and value.isascii() and value.isprintable()


def _words(value: Any) -> bool:
    return isinstance(value, list) and 0 < len(value) <= MOST_LAYERS and all(map(_word, value))


def _token(value: Any) -> bool:
    ids = value if isinstance(value, list) else [value]
    return len(ids) <= 10_000 and all(whole(one, -1, 1 << 31) for one in ids)


def _ropes(config: Mapping[str, Any]) -> Iterator[str]:
    """Problems in rope_scaling (transformers 4) and rope_parameters (5), which may have parts for kinds of layers."""
    for key in ROPES:
        value = config.get(key)
        if value is None:
            continue
        if not isinstance(value, Mapping):
            yield f"{key} is {shown(value)}; expected: an object"
            continue
        yield from _rope(key, value)
        for kind, part in value.items():
            if isinstance(part, Mapping) and kind not in ROPE_NUMBERS:
                yield from _rope(f"{key}.{ascii(kind)[1:-1][:60]}", part)


def _rope(name: str, part: Mapping[str, Any]) -> Iterator[str]:
    for key, (least, most) in ROPE_NUMBERS.items():
        for problem in _unless(part, key, partial(number, least=least, most=most), f"{least:g} to {most:g}"):
            yield f"{name}.{problem}"
    original, most_positions = "original_max_position_embeddings", SIZES["max_position_embeddings"][1]
    for problem in _unless(part, original, lambda v: number(v, 1, most_positions), "a number, at least 1"):
        yield f"{name}.{problem}"
    for key in ("rope_type", "type"):
        for problem in _unless(part, key, _word, "a name"):
            yield f"{name}.{problem}"
    kind = part.get("rope_type") or part.get("type") or "default"
    if isinstance(kind, str):
        yield from (f"{name}.{key} is missing for {kind!r}" for key in ROPE_NEEDS.get(kind, ()) if not part.get(key))


def routed_experts(config: Mapping[str, Any]) -> int:
    """The experts of a layer among which tokens are routed; 0 without experts."""
    return int(config.get("num_experts") or config.get("num_local_experts") or config.get("n_routed_experts") or 0)


def _relations(config: Mapping[str, Any]) -> Iterator[str]:
    """Values that contradict each other."""
    hidden, heads, kv_heads = (config.get(k) for k in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    if hidden and heads and not (config.get("head_dim") or config.get("head_size")) and hidden % heads:
        yield f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}, and head_dim is missing"
    if heads and kv_heads and heads % kv_heads:
        yield f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
    if (config.get("head_dim") or 0) % 2:
        yield f"head_dim {config['head_dim']} is odd; rotary embeddings rotate pairs of values"
    experts = routed_experts(config)
    if experts and (config.get("num_experts_per_tok") or 0) > experts:
        yield f"num_experts_per_tok {config['num_experts_per_tok']} is more than the number of experts, {experts}"
    vocab, pad = config.get("vocab_size"), config.get("pad_token_id")
    # torch.nn.Embedding: "Padding_idx must be within num_embeddings".
    if vocab and whole(pad, vocab, 1 << 62):
        yield f"pad_token_id {pad} is outside of the vocabulary of vocab_size {vocab}"
