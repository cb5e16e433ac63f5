"""A family that differs from a known one only in names is one YAML file, from headers to the input of the engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import exports
import pytest
from source_models import LLAMA, copy, flags, without

from builder import plan
from builder.architectures import catalog
from builder.checkpoint import layouts, validate
from builder.core.errors import IntegrityError
from builder.core.output import Output
from builder.core.safetensors_io import NewTensor, Tensors, write
from builder.core.store import Store
from builder.model import completeness
from builder.preflight import checks
from builder.quantize import exclude
from builder.recipe import schema
from builder.recipe.schema import Model

INVENTED = """
name: InventedForCausalLM
title: a Llama under other names
model_types: [invented]
source: this test
config:
  keys: {num_hidden_layers: depth}
  defaults: {hidden_act: silu, rms_norm_eps: 1.0e-6, rope_theta: 10000.0}
tensors:
  source: this test
  embedding: net.words
  layers: net.stack
  attention: mixer
  final_norm: net.last_scale
  head: to_words
  linears:
    q: mixer.query
    k: mixer.key
    v: mixer.value
    o: mixer.merge
    gate: feed.open
    up: feed.wide
    down: feed.narrow
  norms: {input: before_mixer, post_attention: before_feed}
engine:
  source: this test
  architecture: LlamaForCausalLM
  model_class: LLaMAForCausalLM
  since: 1.0.0
  output_bias: true
  rope_types: [linear]
  config: {residual_mlp: false, remove_duplicated_kv_heads: false, has_partial_lora_mask: false}
llmapi: {since: 1.2.1, source: this test}
reference: {source: this test}
"""
NAMES = {
    "model.embed_tokens": "net.words",
    "model.norm": "net.last_scale",
    "lm_head": "to_words",
    "model.layers.": "net.stack.",
    "self_attn.q_proj": "mixer.query",
    # The exporter of ModelOpt names the scales of the KV cache itself, below the attention's own name.
    "self_attn.k_proj.k_scale": "mixer.k_proj.k_scale",
    "self_attn.v_proj.v_scale": "mixer.v_proj.v_scale",
    "self_attn.k_proj": "mixer.key",
    "self_attn.v_proj": "mixer.value",
    "self_attn.o_proj": "mixer.merge",
    "mlp.gate_proj": "feed.open",
    "mlp.up_proj": "feed.wide",
    "mlp.down_proj": "feed.narrow",
    "input_layernorm": "before_mixer",
    "post_attention_layernorm": "before_feed",
}
CONFIG = {"architectures": ["InventedForCausalLM"], "model_type": "invented", "depth": 2, "num_hidden_layers": None}


def invented(name: str) -> str:
    """The invented name of one of Llama's tensors."""
    for old, new in NAMES.items():
        name = name.replace(old, new)
    return name


def rename(tensor: NewTensor) -> list[NewTensor]:
    return [NewTensor(invented(tensor.name), tensor.dtype, tensor.shape, tensor.chunks)]


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of architectures, with the invented one."""
    folder = tmp_path / "architectures"
    shutil.copytree("configs/architectures", folder)
    (folder / "invented.yaml").write_text(INVENTED)
    monkeypatch.setattr(catalog, "directory", lambda: folder)
    return folder


@pytest.fixture
def model(family: Path, tmp_path: Path) -> Path:
    return copy(LLAMA, tmp_path / "invented", rename, **CONFIG)


def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "out", Output("quiet"), dry=True)


def test_its_headers_are_checked_by_name_and_shape(model: Path, tmp_path: Path) -> None:
    facts = checks.read_model(Model(id=str(model)), store(tmp_path))
    assert facts.config["num_hidden_layers"] == 2
    assert facts.architecture.title == "a Llama under other names"
    broken = copy(model, tmp_path / "broken", without("net.stack.1.feed.wide.weight"))
    with pytest.raises(IntegrityError, match=r"net\.stack\.1\.feed\.wide\.weight") as caught:
        checks.read_model(Model(id=str(broken)), store(tmp_path))
    assert "InventedForCausalLM" in str(caught.value)
    headers = {name: (info.dtype, info.shape) for name, info in Tensors(model).items()}
    whole = {"model.safetensors": headers}
    with pytest.raises(IntegrityError, match="no tensor of layer 2"):
        completeness.check({**facts.config, "num_hidden_layers": 3}, whole, None, "it")


def test_its_plan_is_that_of_the_known_family(model: Path, tmp_path: Path) -> None:
    for gpu, target in (("cpu", "reference"), ("sm120", "engine"), ("sm100", "llmapi")):
        recipes = [schema.resolve(flags(path, gpu=gpu, target=target)) for path in (model, LLAMA)]
        mine, known = (plan.plan(resolved, store(tmp_path)) for resolved in recipes)
        assert mine.sizes == known.sizes, target
        assert [(s.name, s.value) for s in mine.settings] == [(s.name, s.value) for s in known.settings]


def test_its_layers_are_grouped_as_the_known_familys(model: Path, tmp_path: Path) -> None:
    mine, known = (checks.read_model(Model(id=str(path)), store(tmp_path)) for path in (model, LLAMA))
    groups = exclude.groups(exclude.linears(known.tensors, known.architecture), known.architecture)
    own = exclude.groups(exclude.linears(mine.tensors, mine.architecture), mine.architecture)
    assert [tuple(map(invented, members)) for members in groups.values()] == list(own.values())
    kept = exclude.keep(
        ["*.query"], list(exclude.linears(mine.tensors, mine.architecture)), architecture=mine.architecture
    )
    assert kept[:3] == ("net.stack.0.mixer.key", "net.stack.0.mixer.query", "net.stack.0.mixer.value")


def test_its_checkpoint_is_laid_out_validated_and_run_as_the_known_familys(family: Path, tmp_path: Path) -> None:
    """A real export of ModelOpt's under other names becomes the same bytes for TensorRT-LLM."""
    exports.export(exports.quantized(LLAMA, kept=["model.layers.0.mlp.down_proj"]), tmp_path / "known" / "unified")
    config = json.loads((LLAMA / "config.json").read_text())
    layouts.write_tensorrt_llm(tmp_path / "known" / "unified", config, tmp_path / "known" / "tensorrt_llm")
    own_config = catalog.with_common_keys({k: v for k, v in {**config, **CONFIG}.items() if v is not None})
    unified = renamed_export(tmp_path / "known" / "unified", tmp_path / "own" / "unified", own_config)
    layouts.write_tensorrt_llm(unified, own_config, tmp_path / "own" / "tensorrt_llm")
    for file in ("config.json", "rank0.safetensors"):
        mine, known = (tmp_path / which / "tensorrt_llm" / file for which in ("own", "known"))
        assert mine.read_bytes() == known.read_bytes(), file
    found = validate.inspect(tmp_path / "own")
    assert not found.findings
    assert found.layouts == validate.inspect(tmp_path / "known").layouts


def renamed_export(source: Path, target: Path, config: dict[str, object]) -> Path:
    """A copy of an export with invented names of tensors and of excluded layers."""
    target.mkdir(parents=True)
    tensors = Tensors(source)
    made = [NewTensor(invented(n), i.dtype, i.shape, tensors.chunks(n)) for n, i in tensors.items()]
    write(target / "model.safetensors", made, {"format": "pt"})
    quantization = json.loads((source / "hf_quant_config.json").read_text())
    excluded = quantization["quantization"]["exclude_modules"]
    quantization["quantization"]["exclude_modules"] = [invented(name) for name in excluded]
    (target / "hf_quant_config.json").write_text(json.dumps(quantization))
    (target / "config.json").write_text(json.dumps(config))
    return target
