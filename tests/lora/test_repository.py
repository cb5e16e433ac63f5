"""Adapters in a rendered repository: their files, the input's type, and what lint and the gateway make of both."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import adapters
import pytest
from safetensors.torch import load_file

from builder.core.errors import IntegrityError
from builder.core.output import Output
from builder.core.store import Store
from builder.gateway.settings import places, read_models
from builder.gateway.tensors import read_adapter
from builder.lora import cache
from builder.lora.adapter import open_adapter
from builder.lora.modules import MODULES
from builder.recipe import schema
from builder.triton import repository
from builder.triton.combined import Member, adapters_of, combine
from builder.triton.lint.run import lint
from builder.trtllm import compatibility
from tests.triton.test_repository import SNAPSHOT, configs, parameters, write_engine

SHAPE = json.loads((SNAPSHOT / "config.json").read_text())
BUILD = {
    "max_batch_size": 8, "max_input_len": 128, "max_seq_len": 256, "max_beam_width": 1,
    "plugin_config": {"use_paged_context_fmha": False, "lora_plugin": "auto"},
    "lora_config": {"lora_target_modules": [one.name for one in MODULES], "max_lora_rank": 8},
}  # fmt: skip


def rendered(tmp_path: Path, dtype: str = "bfloat16", *, store: Store | None = None) -> repository.Repository:
    """A repository with two adapters, for an engine that computes in this dtype."""
    pretrained = {**SHAPE, "dtype": dtype, "logits_dtype": "float16"}
    engine = write_engine(tmp_path / "engine", pretrained=pretrained, build_config=BUILD)
    named = [open_adapter(name, adapters.write(tmp_path / name, seed=len(name))) for name in ("sql", "poet")]

    def make(directory: Path) -> dict[str, Any]:
        return repository.write(directory / "models", engine, SNAPSHOT, schema.Repository(), named)

    store = store or Store(tmp_path / "store", Output("quiet"))
    return repository.open_repository(store.stage("repository", {"dtype": dtype}, make).path)


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", "TYPE_BF16"), ("float16", "TYPE_FP16")])
def test_the_input_has_the_engines_type_everywhere(dtype: str, kind: str, tmp_path: Path) -> None:
    made = rendered(tmp_path, dtype)
    for name in ("tensorrt_llm", "ensemble", "ensemble_infer", "tensorrt_llm_bls"):
        text = (made.models / name / "config.pbtxt").read_text()
        assert f'name: "lora_weights"\n    data_type: {kind}' in text, name
    assert not lint(made.models).findings
    found = parameters(configs(made.models)["tensorrt_llm"])
    assert (found["lora_cache_max_adapter_size"], found["lora_cache_optimal_adapter_size"]) == ("8", "8")


def test_another_type_than_the_engines_is_found(tmp_path: Path) -> None:
    """Upstream's template says TYPE_FP16, whatever the engine."""
    made = rendered(tmp_path)
    models = shutil.copytree(made.models, tmp_path / "copy" / "x" / "models")
    file = models / "tensorrt_llm" / "config.pbtxt"
    text = re.sub(r'("lora_weights"\n    data_type: )TYPE_BF16', r"\g<1>TYPE_FP16", file.read_text())
    own = parameters(configs(models)["tensorrt_llm"])["gpt_model_path"]
    file.write_text(text.replace(own, str(tmp_path / "engine")))
    (tmp_path / "engine" / "rank0.safetensors").touch()
    with pytest.raises(IntegrityError, match="declares lora_weights TYPE_FP16, and the engine computes in bfloat16"):
        compatibility.check(models)
    assert any("lora_weights TYPE_FP16" in one.what for one in lint(models).findings)


def test_an_engine_without_adapters_keeps_upstreams_type(tmp_path: Path) -> None:
    models = tmp_path / "models"
    facts = repository.write(models, write_engine(tmp_path / "engine"), SNAPSHOT, schema.Repository())
    assert '"lora_weights"\n    data_type: TYPE_FP16' in (models / "tensorrt_llm" / "config.pbtxt").read_text()
    assert not {"adapters", "adapter_files"} & facts.keys()


def test_combine_counts_the_adapters_share_of_the_card(tmp_path: Path) -> None:
    found = adapters_of(Member(rendered(tmp_path), "a"))
    assert found == (0.05, cache.largest(BUILD, {**SHAPE, "dtype": "bfloat16"}))
    models = tmp_path / "plain" / "models"
    facts = repository.write(models, write_engine(tmp_path / "without"), SNAPSHOT, schema.Repository())
    assert adapters_of(Member(repository.Repository(models.parent, "", facts), "b")) == (0.0, 0)


def test_adapters_of_one_of_several_models_have_its_name(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", Output("quiet"))
    one = rendered(tmp_path / "a", store=store)
    both = combine({"chat": Member(one, "a"), "code": Member(one, "b")}, store=store)
    found = places(both, {"chat": "chat", "code": "code"}, "host:1")
    assert [place.name for place in found] == ["chat", "chat:sql", "chat:poet", "code", "code:sql", "code:poet"]
    models = dict(zip((place.name for place in found), (model for _, model in read_models(found)), strict=True))
    assert models["code:poet"].name == "code_tensorrt_llm"
    sent = {tensor.name: tensor for tensor in read_adapter(models["code:poet"])}
    file = models["code:poet"].adapters["poet"].file
    assert file == both.models / "code_tensorrt_llm" / "1" / "adapters" / "poet.safetensors"
    wanted = load_file(file)
    assert sent["lora_weights"].kind == "BF16"
    assert sent["lora_weights"].shape == tuple(wanted["lora_weights"].shape)
    assert len(sent["lora_weights"].content) == wanted["lora_weights"].nbytes
    assert models["code:poet"].adapters["poet"].task_id != models["code:sql"].adapters["sql"].task_id
