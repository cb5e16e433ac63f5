"""A model that is computed layer by layer gives the resident model's results, bit for bit on a CPU."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from builder.core.errors import IntegrityError, UnsupportedError
from builder.core.safetensors_io import Tensors
from builder.formats.arithmetic.dtypes import DTYPES
from builder.model import dense, streamed, streamed_embedding
from tests.support import exports, families

# One of each kind: dense, joined experts, stacked experts and eager attention, inputs of each layer, state spaces,
# latent attention with groups of experts, layers of two sizes.
KINDS = ("qwen3", "qwen3_moe", "gpt_oss", "gemma4_text", "granitemoehybrid", "deepseek_v3", "llama4_text")


def batches() -> list[Any]:
    torch.manual_seed(1)
    return [torch.randint(3, 4000, shape) for shape in ((2, 100), (1, 33), (2, 100))]


def resident(directory: Path, dtype: Any = torch.bfloat16) -> list[Any]:
    """The logits of the model as transformers loads it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    with torch.inference_mode():
        return [model(ids, use_cache=False).logits for ids in batches()]


def by_layer(directory: Path) -> list[Any]:
    """The same, with one layer in memory at a time."""
    model = streamed.open_model({"model": str(directory), "trust_remote_code": False})
    with torch.inference_mode():
        with model.prelude() as begin:
            states = [begin(ids) for ids in batches()]
        assert all(parameter.is_meta for parameter in model.model.parameters())
        for index in range(model.depth):
            with model.layer(index) as layer:
                assert not any(parameter.is_meta for parameter in layer.parameters())
                for state in states:
                    state.hidden = model.advance(index, state, state.hidden)
            assert all(parameter.is_meta for parameter in model.model.parameters())
        with model.head() as logits:
            found = [logits(state) for state in states]
            assert torch.equal(logits(states[0], logits_to_keep=5), found[0][:, -5:])
    return found


def check(directory: Path, dtype: Any = torch.bfloat16) -> None:
    for whole, layers in zip(resident(directory, dtype), by_layer(directory), strict=True):
        assert whole.dtype == layers.dtype  # Nemotron-H computes logits in float32
        assert torch.equal(whole, layers)


def written(family: str, directory: Path) -> dict[str, Any]:
    try:
        return families.write(family, directory)
    except ValueError as error:
        pytest.skip(f"not in this transformers: {error}")


@pytest.mark.parametrize("family", KINDS)
def test_layer_by_layer_equals_the_resident_model(family: str, tmp_path: Path) -> None:
    written(family, tmp_path)
    check(tmp_path)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "nemotron_h", "deepseek_v3"])
def test_experts_are_joined_matrix_by_matrix(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by transformers' stacks of all matrices, which take more than the layer's memory again."""
    loading = pytest.importorskip("transformers.core_model_loading")
    written(family, tmp_path)
    whole = resident(tmp_path)
    monkeypatch.setattr(loading.MergeModulelist, "convert", None)
    for one, other in zip(whole, by_layer(tmp_path), strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("family", [one for one in families.MODELS if one not in KINDS])
def test_layer_by_layer_equals_the_resident_model_of_every_family(family: str, tmp_path: Path) -> None:
    written(family, tmp_path)
    check(tmp_path)


@pytest.mark.parametrize(("stored", "named"), [("float32", "float32"), ("float16", "float16"), ("float32", "float16")])
def test_weights_have_the_dtypes_of_a_model_that_was_loaded_whole(stored: str, named: str, tmp_path: Path) -> None:
    config = families.write("qwen3_moe", tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({n: t.to(getattr(torch, stored)) for n, t in load_file(file).items()}, file, {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": named}))
    check(tmp_path, torch.float16 if named == "float16" else torch.bfloat16)


def test_a_tied_output_layer_has_the_embedding_s_weights(tmp_path: Path) -> None:
    config = families.write("qwen3", tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if n != "lm_head.weight"}, file, {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    check(tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_logits_need_the_embedding_only_if_it_is_the_output_layer(tied: bool, tmp_path: Path) -> None:
    config = families.write("qwen3", tmp_path)
    file = tmp_path / "model.safetensors"
    kept = {n: t for n, t in load_file(file).items() if not (tied and n == "lm_head.weight")}
    save_file(kept, file, {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": tied}))
    model = streamed.open_model({"model": str(tmp_path), "trust_remote_code": False})
    with model.head():
        assert model.model.get_input_embeddings().weight.is_meta == (not tied)
        assert not model.model.get_output_embeddings().weight.is_meta


def test_batches_of_one_shape_share_what_layers_are_called_with(tmp_path: Path) -> None:
    written("gemma3_text", tmp_path)  # masks of two kinds
    model = streamed.open_model({"model": str(tmp_path), "trust_remote_code": False})
    with torch.inference_mode(), model.prelude() as begin:
        first, other, again = map(begin, batches())
    assert first.calls is again.calls
    assert other.calls is not first.calls


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_a_layer_with_other_tensors_is_refused_by_name(change: str, tmp_path: Path) -> None:
    families.write("qwen3_moe", tmp_path)
    file, name = tmp_path / "model.safetensors", "model.layers.1.mlp.experts.2.up_proj.weight"
    tensors = load_file(file)
    if change == "unexpected":
        tensors["model.layers.1.mlp.experts.2.up_proj.bias"] = torch.zeros(32)
    else:
        tensors[name] = tensors[name][:, :-1].contiguous()
    if change == "missing":
        name = "model.layers.1.self_attn.o_proj.weight"
        tensors = {key: tensor for key, tensor in load_file(file).items() if key != name}
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(IntegrityError) as caught:
        by_layer(tmp_path)
    assert "1." in caught.value.why
    assert ("o_proj" if change == "missing" else "experts") in caught.value.why


def test_layers_that_read_keys_of_earlier_ones_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers.models.gemma4")
    shared = {"num_kv_shared_layers": 2, "num_hidden_layers": 4, "layer_types": LAYER_TYPES}
    changed = {**families.MODELS, "gemma4_text": {**families.MODELS["gemma4_text"], **shared}}
    monkeypatch.setattr(families, "MODELS", changed)
    families.write("gemma4_text", tmp_path)
    with pytest.raises(UnsupportedError, match="layer by layer") as caught:
        by_layer(tmp_path)
    assert "earlier ones" in caught.value.why


LAYER_TYPES: Sequence[str] = ["sliding_attention", "full_attention"] * 2


def last_states(model: streamed.StreamedModel) -> list[Any]:
    """The states of all batches after each layer."""
    found = []
    with torch.inference_mode():
        with model.prelude() as begin:
            states = [begin(ids) for ids in [*batches(), torch.tensor([[5]])]]
        for index in range(model.depth):
            with model.layer(index):
                for state in states:
                    state.hidden = model.advance(index, state, state.hidden)
            found += [state.hidden for state in states]
    return found


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", [*exports.MODELS, "random llama", "random mistral", "random qwen2", "random qwen3"])
def test_torch_alone_computes_plain_decoders_as_transformers_does(family: str, dtype: str, tmp_path: Path) -> None:
    directory, own = tmp_path / "model", family.removeprefix("random ")
    if family in exports.MODELS:
        shutil.copytree(exports.MODELS[family], directory)
    else:
        families.write(own, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "dtype": dtype}))
    job = {"model": str(directory), "trust_remote_code": False}
    alone = streamed.open_decoder(job, None, 100)
    assert isinstance(alone.model, dense.DenseModel)
    for one, other in zip(last_states(alone), last_states(streamed.open_model(job)), strict=True):
        assert one.dtype == getattr(torch, dtype)
        assert torch.equal(one, other)


SCALED = {"factor": 4.0, "original_max_position_embeddings": 128}
TURNED: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "llama3": {**SCALED, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": SCALED,
}


@pytest.mark.parametrize("kind", TURNED)
def test_torch_alone_scales_the_rotary_embedding_as_transformers_does(kind: str, tmp_path: Path) -> None:
    config = families.write("llama", tmp_path)
    config = {key: value for key, value in config.items() if key != "rope_parameters"}
    config |= {"rope_theta": 500000.0, "rope_scaling": {"rope_type": kind, **TURNED[kind]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    job = {"model": str(tmp_path), "trust_remote_code": False}
    alone = streamed.open_decoder(job, None, 100)
    assert isinstance(alone.model, dense.DenseModel)
    for one, other in zip(last_states(alone), last_states(streamed.open_model(job)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "changed",
    [
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "unknown"}},
        {"hidden_act": "gelu"},
        {"sliding_window": 64, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 6},
        {"partial_rotary_factor": 0.5},
        {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}},
        {"architectures": ["Qwen3MoeForCausalLM"]},
        {"architectures": ["UnknownForCausalLM"]},
    ],
)
def test_transformers_computes_what_torch_alone_does_not(changed: dict[str, Any]) -> None:
    config = json.loads((exports.MODELS["qwen3"] / "config.json").read_text())
    assert dense.computes(config, 64)
    assert not dense.computes({**config, **changed}, 64)


def test_a_plain_decoder_with_other_tensors_is_refused_by_name(tmp_path: Path) -> None:
    families.write("qwen3", tmp_path)
    file, name = tmp_path / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(file)
    tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(IntegrityError) as caught:
        last_states(streamed.open_decoder({"model": str(tmp_path), "trust_remote_code": False}, None, 100))
    assert name in caught.value.why


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_a_model_that_is_cut_while_it_is_read_ends_with_a_message(family: str, tmp_path: Path) -> None:
    """Instead of a SIGBUS, which ends the process."""
    families.write(family, tmp_path)
    model = streamed.open_model({"model": str(tmp_path), "trust_remote_code": False})
    with model.layer(0):
        os.truncate(tmp_path / "model.safetensors", 100_000)
    with pytest.raises(IntegrityError, match="became shorter"), model.layer(1):
        pass
    assert all(parameter.is_meta for parameter in model.model.parameters())


@given(st.lists(st.integers(0, 39), min_size=1, max_size=30), st.sampled_from(["BF16", "F32"]))
@settings(max_examples=30)
def test_an_embedding_reads_the_rows_that_it_needs(ids: list[int], dtype: str) -> None:
    kind = DTYPES[dtype]
    weight, whole = torch.randn(40, 6).to(kind), nn.Embedding(40, 6, padding_idx=39, dtype=torch.bfloat16)
    whole.weight.data = weight.to(torch.bfloat16)
    with tempfile.TemporaryDirectory() as directory:
        save_file({"first": torch.zeros(5), "weight": weight}, Path(directory, "model.safetensors"))
        stored = Tensors(Path(directory))
        made = nn.Embedding(40, 6, padding_idx=39, dtype=torch.bfloat16, device="meta")
        with streamed_embedding.by_rows(
            made, lambda numbers: streamed_embedding.read_rows(stored, "weight", numbers), torch.device("cpu")
        ):
            assert torch.equal(made(torch.tensor([ids])), whole(torch.tensor([ids])))
            assert len(made.weight) == len(set(ids))
        assert (made.weight.is_meta, made.padding_idx) == (True, 39)
        with pytest.raises(IndexError, match="no row 40"):
            streamed_embedding.read_rows(stored, "weight", [3, 40])
