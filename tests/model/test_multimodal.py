"""A multimodal model: its language model is taken out, quantized and served alone; without one it is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import exports
import families
import pytest

from builder.architectures import catalog
from builder.checkpoint import huggingface
from builder.core.errors import IntegrityError, UnsupportedError
from builder.core.output import Output
from builder.core.safetensors_io import NewTensor, Tensors
from builder.core.store import Store
from builder.evaluate.sensitivity import stage as sensitivity_stage
from builder.hub.snapshot import fetch, open_source
from builder.model import loading, multimodal, source_tensors
from builder.model.files import check_config, parse_config
from builder.preflight.prepare import prepare
from builder.preflight.zero_layers import keep_zeros
from builder.quantize import modelopt, unquantized
from builder.recipe.schema import Model, resolve

TOKENIZER = Path(__file__).parents[1] / "data" / "tiny-qwen3"
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


def write(model_type: str, text_type: str, directory: Path) -> Path:
    """A small multimodal model around a small language model, as transformers saves it, with a tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    text = families.config(text_type)
    vision = (
        VISION if model_type != "qwen3_5" else {"depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 64}
    )
    config = AutoConfig.for_model(model_type, text_config=text.to_dict(), vision_config=vision)
    config.tie_word_embeddings = False
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / file, directory)
    return directory


@pytest.mark.parametrize(
    ("model_type", "text_type", "name"),
    [
        ("gemma3", "gemma3_text", "Gemma3ForCausalLM"),
        ("mistral3", "mistral", "MistralForCausalLM"),
        pytest.param("qwen3_5", "qwen3_5_text", "Qwen3_5ForCausalLM", marks=pytest.mark.skipif(
            exports.MODELOPT < (0, 44), reason="transformers 4.57 does not have Qwen3.5")),
    ],
)  # fmt: skip
def test_the_language_model_is_taken_out(model_type: str, text_type: str, name: str, tmp_path: Path) -> None:

    source = write(model_type, text_type, tmp_path / "source")
    found = open_source(Model(id=str(source)), store=Store(tmp_path / "out", Output("quiet"), dry=True))
    assert catalog.of(found.config).name == name
    whole = Tensors(source)
    assert 0 < len(found.tensors) < len(whole)
    assert not [tensor for tensor in found.tensors if "vision" in tensor or "visual" in tensor]
    model = loading.to_quantize({"model": str(source), "trust_remote_code": False})
    assert type(model).__name__ == name
    stored = {multimodal.language_name(tensor): tensor for tensor in whole}
    mine = model.state_dict()
    for tensor in found.tensors:
        assert mine[tensor].view(-1).view(__import__("torch").uint8).numpy().tobytes() == bytes(
            whole.read(stored[tensor])
        )
    check_saved(model, found.tensors, source, tmp_path / "unified", name)
    check_unexpected(source, next(stored for stored in whole if stored.endswith("1.self_attn.o_proj.weight")))


@pytest.mark.skipif(exports.MODELOPT < (0, 44), reason="transformers 4.57 does not have Qwen3.5")
def test_its_export_has_the_names_of_the_language_model(tmp_path: Path) -> None:
    """ModelOpt and transformers 5 undo the renaming of loading when they write, but for that of the language model."""
    source = write("qwen3_5", "qwen3_5_text", tmp_path / "source")
    found = open_source(Model(id=str(source)), store=Store(tmp_path / "out", Output("quiet"), dry=True))
    model = loading.to_quantize({"model": str(source), "trust_remote_code": False})
    exports.export(exports.quantized(model), tmp_path / "unified")
    written = {name for name in Tensors(tmp_path / "unified") if not name.endswith(("_scale", "_scale_2"))}
    assert written == set(found.tensors)
    said = json.loads((tmp_path / "unified" / "hf_quant_config.json").read_text())
    excluded = said["quantization"]["exclude_modules"]
    assert not [name for name in excluded if "language_model" in name]


def check_saved(model: Any, tensors: Any, source: Path, unified: Path, name: str) -> None:
    """What is saved is a text model: its names, its class, nothing of the multimodal one."""
    model.save_pretrained(unified)
    (unified / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4"}}')
    huggingface.complete(unified, source)
    assert Tensors(unified).keys() == tensors.keys()
    config = json.loads((unified / "config.json").read_text())
    assert config["architectures"] == [name]
    assert not config.keys() & {"vision_config", "text_config", multimodal.MARK}


def check_unexpected(source: Path, beside: str) -> None:
    """A tensor that the language model does not have is named; those of the vision part are not."""
    planted = beside.replace("o_proj.weight", "o_proj.planted")
    exports.rewrite(source, source.with_name("planted"), {planted: NewTensor(planted, "BF16", (1,), [b"\0\0"])})
    with pytest.raises(IntegrityError) as caught:
        loading.to_quantize({"model": str(source.with_name("planted")), "trust_remote_code": False})
    assert caught.value.why == f"Unexpected, which transformers ignores: {multimodal.language_name(planted)}."


def test_it_is_written_unquantized_under_its_own_names(tmp_path: Path) -> None:
    source = write("gemma3", "gemma3_text", tmp_path / "source")
    store = Store(tmp_path / "out", Output("quiet"))
    snapshot = fetch(Model(id=str(source)), store=store)
    made = unquantized.write_checkpoint(snapshot, store=store)
    found = open_source(Model(id=str(source)), store=store)
    whole, stored = source_tensors.open_tensors(source), Tensors(made.unified)
    assert stored.keys() == whole.keys() == found.tensors.keys()
    assert all(stored.read(name) == whole.read(name) for name in stored)
    config = json.loads((made.unified / "config.json").read_text())
    assert config["architectures"] == ["Gemma3ForCausalLM"]
    assert not config.keys() & {"vision_config", "text_config", multimodal.MARK}
    own = open_source(Model(id=str(made.unified)), store=store)  # and it can be opened as a model
    assert own.tensors == found.tensors


def test_every_reader_of_its_weights_knows_them_by_their_own_names(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    source = write("gemma3", "gemma3_text", tmp_path / "source")
    store = Store(tmp_path / "out", Output("quiet"))
    tensors = load_file(source / "model.safetensors")
    [down] = [name for name in tensors if name.endswith(".layers.1.mlp.down_proj.weight")]
    tensors |= {name: torch.zeros_like(tensors[name]) for name in tensors if name == down or "vision" in name}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    prepared = prepare(resolve({"model.id": str(source), "gpu": "sm120", "target": "llmapi"}), store, layouts=False)
    snapshot = fetch(Model(id=str(source)), store=store)
    kept = keep_zeros(prepared, snapshot, store.out)
    assert kept.zero_layers == ("model.layers.1.mlp.down_proj",)
    assert kept.model.layers == {"bf16": kept.zero_layers}
    modelopt.check(source_tensors.open_tensors(source), kept.model.architecture, kept.model.layers)
    losses = sensitivity_stage.weight_errors(snapshot, kept.model, store).losses
    assert all(0 < one.weight_error < 0.2 for one in losses)
    assert not [one.name for one in losses if one.name in kept.zero_layers]


def test_it_is_said(tmp_path: Path) -> None:
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34, "intermediate_size": 10240}
    outer = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": text,
        "vision_config": {},
        "dtype": "bfloat16",
    }
    config = multimodal.language_config(outer)
    assert (config["num_attention_heads"], config["head_dim"], config["vocab_size"]) == (8, 256, 262208)
    said = multimodal.note(config) or ""
    assert "multimodal model (Gemma3ForConditionalGeneration)" in said
    assert "images, video and audio are not" in said
    assert multimodal.note(outer) is None


@pytest.mark.parametrize(
    "outer",
    [
        {"architectures": ["Llama4ForConditionalGeneration"], "vision_config": {"a": 1}, "text_config": {}},
        # A part that is not the usual one of this class.
        {"architectures": ["Mistral3ForConditionalGeneration"], "vision_config": {"a": 1},
         "text_config": {"model_type": "ministral3"}},
    ],
)  # fmt: skip
def test_one_without_a_known_language_model_is_called_multimodal_and_refused(outer: dict[str, Any]) -> None:
    config = parse_config(json.dumps(outer).encode(), "it")
    with pytest.raises(UnsupportedError, match="is a multimodal model") as caught:
        check_config(config, "it", trust_remote_code=False)
    assert "Gemma3ForConditionalGeneration" in caught.value.why


def test_signs_of_quantization_are_kept() -> None:
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {"model_type": "gemma3_text"},
             "quantization_config": {"quant_method": "modelopt"}}  # fmt: skip
    assert multimodal.language_config(outer)["quantization_config"] == {"quant_method": "modelopt"}


def test_a_null_is_kept_because_it_may_differ_from_the_default() -> None:
    """A Mistral without a sliding window says null; its class takes 4096 for what config.json leaves out."""
    text = {"model_type": "mistral", "sliding_window": None, "dtype": None}
    outer = {"architectures": ["Mistral3ForConditionalGeneration"], "text_config": text, "dtype": "bfloat16"}
    config = multimodal.language_config(outer)
    assert config["sliding_window"] is None
    assert config["dtype"] == "bfloat16"
