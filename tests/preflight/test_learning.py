"""What learning rotations takes: it grows with the model and its rows, and is refused where it does not fit."""

from __future__ import annotations

from typing import Any

from builder.preflight.learning import Learning, learning
from builder.preflight.model_facts import ModelFacts
from builder.preflight.ways import Device
from builder.recipe import schema

GB = 1_000_000_000
HOST = Device("this machine", 16 * GB, 16 * GB, 2, False)


def model(layers: int, hidden: int) -> ModelFacts:
    shapes = {"self_attn.q_proj": (hidden, hidden), "mlp.gate_proj": (4 * hidden, hidden)}
    tensors = {"model.embed_tokens.weight": ("BF16", (50_000, hidden))}
    for layer in range(layers):
        tensors |= {f"model.layers.{layer}.{name}.weight": ("BF16", shape) for name, shape in shapes.items()}
    config = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": layers, "hidden_size": hidden,
              "vocab_size": 50_000, "intermediate_size": 4 * hidden, "num_attention_heads": hidden // 64}  # fmt: skip
    return ModelFacts(config, tensors)


def cost(facts: ModelFacts, on: Device = HOST, **values: Any) -> Learning:
    flags = {"model.id": "tests/data/tiny-qwen3", "gpu": "sm120", "transform.name": "spinquant",
             "transform.kind": "learned", **values}  # fmt: skip
    found = learning(schema.resolve(flags).recipe, facts, on)
    assert found is not None
    return found


def test_none_are_learned_without_asking() -> None:
    recipe = schema.resolve({"model.id": "tests/data/tiny-qwen3", "gpu": "sm120"}).recipe
    assert learning(recipe, model(2, 512), HOST) is None


def test_it_holds_the_weights_in_float32_and_takes_time_by_tokens() -> None:
    small, deep = cost(model(2, 512)), cost(model(20, 512))
    more = 4 * 18 * 5 * 512**2
    assert more < deep.memory - small.memory < 2 * more
    assert deep.seconds is not None
    few = cost(model(20, 512), **{"transform.learning.steps": 10})
    assert few.seconds is not None
    assert deep.seconds == 10 * few.seconds
    assert cost(model(20, 512), **{"calibration.seq_len": 512}).memory < deep.memory
    assert cost(model(20, 512), **{"transform.rotations": "r1"}).memory <= deep.memory


def test_what_does_not_fit_is_refused_with_what_to_do() -> None:
    large = model(40, 8192)
    found = cost(large)
    assert found.refusal is not None
    assert "this machine has 16.00 GB" in found.refusal.what
    assert "transform.kind=hadamard" in found.refusal.hint
    assert cost(model(2, 512)).refusal is None


def test_a_gpus_time_is_not_known_and_one_card_must_hold_it() -> None:
    cards = Device("two cards", 48 * GB, 24 * GB, 16, True)
    found = cost(model(24, 4096), cards)
    assert found.seconds is None
    assert found.memory < 48 * GB
    assert (found.refusal is not None) == (found.memory > 24 * GB)
    assert cost(model(40, 8192), Device("a GB10", None, None, 20, True)).refusal is None
