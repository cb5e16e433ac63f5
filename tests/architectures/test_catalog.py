"""The files in configs/architectures: strict, sourced, and what the rest of the project reads from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from source_models import ALL, LLAMA, MOE, PHI3

from builder.architectures import attention, catalog, names, served, shapes
from builder.core.errors import IntegrityError, UnsupportedError

FILES = sorted(Path("configs/architectures").glob("*.yaml"))
ENGINES = ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"]


def config_of(model: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((model / "config.json").read_text())
    return config


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_every_part_names_its_source(file: Path) -> None:
    content = yaml.safe_load(file.read_text())
    assert content["source"]
    for part in ("tensors", "engine", "llmapi", "reference", "sliding_window"):
        assert part not in content or content[part]["source"], part


def write(folder: Path, **changes: Any) -> Path:
    """A folder with Llama's file, changed."""
    content = yaml.safe_load(Path("configs/architectures/llama.yaml").read_text())
    folder.mkdir()
    (folder / "llama.yaml").write_text(yaml.safe_dump({**content, **changes}))
    return folder


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"engin": {}}, "engin"),
        ({"tensors": None}, "need the table of tensors"),
        ({"qk_norm": True}, "disagree"),
        ({"biases": {"w1": "always"}}, "biases"),
        ({"config": {}}, "config.defaults"),
        ({"llmapi": {"since": "1.2.1"}}, "source"),
    ],
)
def test_a_file_with_a_mistake_is_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(IntegrityError) as caught:
        catalog.read(write(tmp_path / "folder", **changes))
    assert says in str(caught.value)


def test_a_table_must_be_complete(tmp_path: Path) -> None:
    table = yaml.safe_load(Path("configs/architectures/llama.yaml").read_text())["tensors"]
    linears = {role: name for role, name in table["linears"].items() if role != "v"}
    with pytest.raises(IntegrityError, match="linears must name exactly"):
        catalog.read(write(tmp_path / "folder", tensors={**table, "linears": linears}))


def test_two_files_with_one_name_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "folder")
    (folder / "again.yaml").write_text((folder / "llama.yaml").read_text())
    with pytest.raises(IntegrityError, match="twice"):
        catalog.read(folder)


def test_who_is_served() -> None:
    assert catalog.served_by("engine") == catalog.served_by("reference") == ENGINES
    assert set(ENGINES) < set(catalog.served_by("llmapi"))
    assert catalog.served_by("llmapi", "1.0.0") == []


def test_an_engine_older_than_the_support_of_its_architecture_is_refused() -> None:
    served.check_engine(config_of(LLAMA), "1.0.0")
    with pytest.raises(UnsupportedError, match=r"since 1\.0\.0") as caught:
        served.check_engine(config_of(LLAMA), "0.9.0")
    assert caught.value.hint == "--set engine.tensorrt_llm=1.0.0"


def test_an_unknown_architecture_follows_conventions() -> None:
    other = catalog.of({"architectures": ["OtherForCausalLM"]})
    assert (other.name, other.tensors, other.engine) == ("OtherForCausalLM", None, None)
    assert names.group_of(other, "model.layers.0.attn.k_proj") == "model.layers.0.attn.qkv_proj"
    assert names.is_quantizable(other, "model.layers.0.attn.k_proj.weight", (8, 8))
    assert not names.is_quantizable(other, "lm_head.weight", (8, 8))


@pytest.mark.parametrize("odd", [None, 5, [], "", {}])
def test_a_config_without_a_name_is_unknown(odd: Any) -> None:
    assert catalog.name_of({"architectures": odd}) == "unknown"


@pytest.mark.parametrize(
    ("model", "module", "role", "group", "engine"),
    [
        (LLAMA, "model.layers.1.self_attn.q_proj", "q", "model.layers.1.self_attn.qkv_proj", "attention.qkv"),
        (LLAMA, "model.layers.1.mlp.up_proj", "up", "model.layers.1.mlp.gate_up_proj", "mlp.gate"),
        (LLAMA, "model.layers.1.mlp.down_proj", "down", "model.layers.1.mlp.down_proj", "mlp.proj"),
        (LLAMA, "lm_head", None, "lm_head", None),
        (PHI3, "model.layers.1.self_attn.qkv_proj", "qkv", "model.layers.1.self_attn.qkv_proj", None),
        (MOE, "model.layers.1.mlp.experts.3.up_proj", "up", "model.layers.1.mlp.experts", None),
    ],
)
def test_what_a_module_is(model: Path, module: str, role: str | None, group: str, engine: str | None) -> None:
    architecture = catalog.of(config_of(model))
    assert names.role(architecture, module) == role
    assert names.group_of(architecture, module) == group
    assert names.engine_layer(architecture, module) == (f"transformer.layers.1.{engine}" if engine else module)


def test_words_for_patterns_are_the_familys_own() -> None:
    for model in ALL:
        words = names.parts(catalog.of(config_of(model)))
        assert (words["attention"], words["mlp"], words["down"]) == ("self_attn", "mlp", "down_proj")


def test_shapes_say_how_config_json_comes_to_them() -> None:
    outputs, inputs = shapes.linears(config_of(LLAMA))["k"]
    assert (outputs.size, outputs.by, inputs.size, inputs.by) == (64, "KV heads x head size", 64, "hidden_size")
    assert attention.kv_heads({"num_attention_heads": 4}) == 4


def test_keys_follow_the_facts_that_change_an_output_and_no_others() -> None:
    llama = catalog.of(config_of(LLAMA))
    kept = catalog.ingredients(llama)
    assert llama.engine is not None
    assert catalog.ingredients(llama.model_copy(update={"title": "x", "source": "y", "llmapi": None})) == kept
    other = llama.engine.model_copy(update={"rope_types": ("linear",)})
    assert catalog.ingredients(llama.model_copy(update={"engine": other})) != kept
