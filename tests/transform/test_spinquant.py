"""A rotated model computes what the model computed, for every family that can be rotated. Others are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rotated_models import NO_R2, ROTATED, model_of
from source_models import SHARDED, VARIANTS

from builder.architectures import catalog
from builder.core.errors import UnsupportedError
from builder.core.output import Output
from builder.core.safetensors_io import Tensors
from builder.recipe.transform import Transform
from builder.transform import spinquant, writing
from builder.transform.rotations import random_rotations

torch = pytest.importorskip("torch")
QUIET = Output("quiet")


def logits(model: Any) -> Any:
    with torch.inference_mode():
        return model(torch.arange(40).reshape(2, 20) * 7 % 4096).logits


def rotated(source: Path, to: Path, **part: Any) -> Any:
    from transformers import AutoModelForCausalLM

    to.mkdir()
    names = [path.name for path in source.iterdir()]
    config = json.loads((source / "config.json").read_text())
    rotations = random_rotations(config, Transform(name="spinquant", **part))
    writing.write(source, names, rotations, to, QUIET)
    return AutoModelForCausalLM.from_pretrained(to, dtype=torch.float32).eval()


@pytest.mark.parametrize("architecture", ROTATED, ids=lambda one: one.model_types[0])
def test_the_logits_of_every_family_stay_and_its_weights_do_not(architecture: Any, tmp_path: Path) -> None:
    [kind, *_] = architecture.model_types
    model = model_of(kind, tmp_path / "model")
    part = {"rotations": NO_R2[kind]} if kind in NO_R2 else {}
    made = rotated(tmp_path / "model", tmp_path / "rotated", **part)
    before, after = logits(model), logits(made)
    assert (before - after).abs().max() < 2e-5 * before.abs().max()
    old, new = Tensors(tmp_path / "model"), Tensors(tmp_path / "rotated")
    assert set(old) == set(new)
    kept = [name for name in old if old.read(name) == new.read(name)]
    bias = ("q_proj.bias", "k_proj.bias", "gate_proj.bias", "up_proj.bias")
    assert all("norm" in name or name.endswith(bias) for name in kept), kept


@pytest.mark.parametrize("part", [{"rotations": "r1"}, {"rotations": "r2"}, {"kind": "orthogonal"}, {"seed": 7}])
@pytest.mark.parametrize("tie", [False, True])
def test_each_rotation_alone_and_tied_embeddings(part: dict[str, Any], tie: bool, tmp_path: Path) -> None:
    model = model_of("qwen2", tmp_path / "model", tie_word_embeddings=tie)
    assert ("lm_head.weight" in Tensors(tmp_path / "model")) != tie
    made = rotated(tmp_path / "model", tmp_path / "rotated", **part)
    before, after = logits(model), logits(made)
    assert (before - after).abs().max() < 2e-5 * before.abs().max()
    untied = not tie or part.get("rotations") != "r2"
    assert ("lm_head.weight" in Tensors(tmp_path / "rotated")) == untied
    assert json.loads((tmp_path / "rotated" / "config.json").read_text())["tie_word_embeddings"] != untied


@pytest.mark.parametrize("kind", ["smollm3", "ernie4_5"])
def test_a_family_that_ties_by_default_is_untied_in_words(kind: str, tmp_path: Path) -> None:
    """transformers 4.57 would drop the rotated output layer, and say nothing."""
    model = model_of(kind, tmp_path / "model", tie_word_embeddings=False)
    file = tmp_path / "model" / "config.json"
    stated = json.loads(file.read_text())
    stated.pop("tie_word_embeddings", None)
    file.write_text(json.dumps(stated))
    made = rotated(tmp_path / "model", tmp_path / "rotated")
    assert json.loads((tmp_path / "rotated" / "config.json").read_text())["tie_word_embeddings"] is False
    before, after = logits(model), logits(made)
    assert (before - after).abs().max() < 2e-5 * before.abs().max()


def test_outliers_are_spread(tmp_path: Path) -> None:
    """What rotations are for: a channel of the stream that is a hundred times larger than the others."""
    model = model_of("llama", tmp_path / "model")
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 3] *= 100
    model.save_pretrained(tmp_path / "model")
    made = rotated(tmp_path / "model", tmp_path / "rotated")

    def ratio(one: Any) -> float:
        weight = one.model.embed_tokens.weight.detach()
        return float(weight.abs().max() / weight.abs().mean())

    assert ratio(model) > 100
    assert ratio(made) < 10


def headers(model: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    found = {name: (info.dtype, info.shape) for name, info in Tensors(model).items()}
    return json.loads((model / "config.json").read_text()), found


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (
            "gemma3_text",
            "Gemma 3 (text): a norm with weights of its own lies between each block and the residual stream",
        ),
        ("gemma2", "Gemma2ForCausalLM: its tensors are not described in configs/architectures"),
        ("phi3", "Phi-3 stores queries, keys and values as one tensor"),
    ],
)
def test_a_family_that_does_not_fit_is_refused_by_name(model: str, why: str) -> None:
    with pytest.raises(UnsupportedError) as error:
        spinquant.plan(*headers(VARIANTS / model), ("r1", "r2"), "some/model")
    assert error.value.why == f"{why}."


def test_every_family_is_decided_about() -> None:
    """A new one needs `rotation` or `not_rotated` in its file."""
    assert [one.name for one in catalog.every() if not (one.rotation or one.not_rotated)] == []


def test_a_tensor_that_the_family_is_not_known_to_have_is_refused() -> None:
    config, found = headers(SHARDED)
    for name in ("model.layers.0.input_layernorm.bias", "model.layers.1.mlp.extra.weight", "model.extra"):
        with pytest.raises(UnsupportedError, match="tensors that Qwen3") as error:
            spinquant.plan(config, {**found, name: ("BF16", (256,))}, ("r1",), "some/model")
        assert name in error.value.why


def test_sizes_that_are_not_of_the_stream_are_refused() -> None:
    config, found = headers(SHARDED)
    with pytest.raises(UnsupportedError) as error:
        spinquant.plan({**config, "hidden_size": 255}, found, ("r1",), "some/model")
    assert error.value.why.endswith("columns instead of 255.")
    with pytest.raises(UnsupportedError, match="not follow from"):
        spinquant.plan({**config, "head_dim": 48}, found, ("r2",), "some/model")


def test_a_multimodal_model_is_refused() -> None:
    from builder.model.multimodal import MARK

    config, found = headers(SHARDED)
    with pytest.raises(UnsupportedError) as error:
        spinquant.plan({**config, MARK: "x"}, found, ("r1",), "some/model")
    assert "multimodal" in error.value.why
