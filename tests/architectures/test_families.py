"""Each family in configs/architectures that transformers has, as a small model that ModelOpt really quantizes.

What this project says of a family before any weight is read (which layers are quantized, bytes, layers with a KV cache)
is compared with what ModelOpt's exporter writes.
"""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import exports
import families
import pytest

from builder.architectures import catalog, names
from builder.architectures.attention import attention_layers
from builder.architectures.facts import Architecture
from builder.checkpoint import huggingface, validate
from builder.core.safetensors_io import NewTensor, Tensors
from builder.formats import kv_cache
from builder.formats.registry import NVFP4
from builder.model import completeness
from builder.model.completeness import Header
from builder.preflight import memory
from builder.preflight.memory import Serving
from builder.preflight.model_facts import ModelFacts
from builder.quantize import calibrated, data_free, exclude, quantizers
from builder.quantize.ranges import Ranges

EVERY = {one.model_types[0]: one for one in catalog.every()}
VERSION = ".".join(map(str, exports.MODELOPT))
FEW = ("qwen3_next", "glm4_moe", "gpt_oss", "nemotron_h", "qwen3_5_moe_text")  # a kind of layer or expert each
CASES = [
    pytest.param(name, marks=() if name in FEW else pytest.mark.slow)
    for name in families.MODELS
    if VERSION in EVERY[name].quantized_with
]


def test_each_family_says_whether_it_was_quantized_here() -> None:
    assert {name for name, one in EVERY.items() if one.quantized_with} == set(families.MODELS)
    assert all(one.quantized_with or one.not_quantized for one in EVERY.values())
    assert {version for one in EVERY.values() for version in one.quantized_with} == {"0.37", "0.47"}


@pytest.mark.parametrize("model_type", CASES)
def test_what_is_said_of_a_family_is_what_modelopt_writes(model_type: str, tmp_path: Path) -> None:
    config = catalog.with_common_keys(families.write(model_type, tmp_path / "source"))
    assert catalog.of(config) == EVERY[model_type]
    model = ModelFacts(config, checked_headers(config, tmp_path / "source"))
    if model.architecture.experts and model.architecture.experts.apart:
        model = published(model, tmp_path / "source")
    quantized = exports.quantized(tmp_path / "source", kept=quantizers.NEVER)
    ranges = calibrated.ranges(quantized, model.written)
    exports.export(quantized, tmp_path / "unified")
    tensors = Tensors(tmp_path / "unified")
    check_layers(model, tensors)
    check_ranges(model, ranges, tensors)
    check_bytes(model, tensors)
    huggingface.complete(tmp_path / "unified", tmp_path / "source")
    check_completed(EVERY[model_type], tmp_path / "unified")
    inspection = validate.inspect(tmp_path / "unified")
    assert not inspection.findings, inspection.findings
    broken(tmp_path / "unified")
    assert validate.inspect(tmp_path / "unified").findings


def checked_headers(config: dict[str, Any], source: Path) -> dict[str, Header]:
    headers = {name: (info.dtype, info.shape) for name, info in Tensors(source).items()}
    completeness.check(config, {"model.safetensors": headers}, None, "the model")
    return headers


def published(saved: ModelFacts, source: Path) -> ModelFacts:
    """The same model with its experts stacked, as they are published; transformers 5 saves some of them one by one."""
    experts = saved.architecture.experts
    assert experts is not None
    families.stack_experts(source, experts)
    stacked = ModelFacts(saved.config, checked_headers(saved.config, source))
    assert any(name.endswith(f".{experts.gate_up}") for name in stacked.tensors)
    assert stacked.written == saved.written
    return stacked


def broken(unified: Path) -> None:
    """Makes the first scale of a layer in the middle of the file infinite."""
    tensors = Tensors(unified)
    name = [one for one in tensors if one.endswith("weight_scale_2")][-1]
    changed = {name: NewTensor(name, "F32", tensors[name].shape, [b"\x00\x00\x80\x7f"])}
    exports.rewrite(unified, unified.with_name("broken"), changed)
    shutil.rmtree(unified)
    unified.with_name("broken").rename(unified)


def check_layers(model: ModelFacts, tensors: Tensors) -> None:
    """The layers that are quantized, by the model's headers and in the export."""
    written = {name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")}
    assert set(exclude.linears(model.written, model.architecture)) == written
    scaled = {name for name in tensors if name.endswith("_weight_scale")}  # experts that are stacked in one parameter
    experts = model.architecture.experts
    assert bool(scaled) == bool(experts and not experts.apart)


def check_ranges(model: ModelFacts, ranges: Ranges, tensors: Tensors) -> None:
    """The ranges that are read from ModelOpt's quantizers give the scales that its exporter writes."""
    modules = [name.removesuffix(".weight") for name in model.written if name.endswith(".weight")]
    assert set(data_free.attention_modules(modules, model.architecture)) == set(ranges.cache)
    layers = dict.fromkeys(exclude.linears(model.written, model.architecture), NVFP4)
    made = ranges.scales(layers, kv_cache.FP8, model.architecture)
    if exports.MODELOPT < (0, 40):  # it raises the cache's scales to 1
        made = {name: max(scale, float(name.endswith(kv_cache.UNIFIED))) for name, scale in made.items()}
    scales = [name for name in tensors if name.endswith((".input_scale", *kv_cache.UNIFIED))]
    written = {name: struct.unpack("<f", tensors.read(name))[0] for name in scales}
    assert {name: struct.unpack("<f", struct.pack("<f", scale))[0] for name, scale in made.items()} == written


def check_bytes(model: ModelFacts, tensors: Tensors) -> None:
    asked = Serving(1, 1, 1, 1, cache=kv_cache.FP8, target="llmapi")
    sizes = memory.sizes(model, asked)
    assert sizes.unified == sum(info.nbytes for info in tensors.values())
    scales = sum(name.endswith((".k_scale", ".v_scale")) for name in tensors)
    assert scales * 4 == kv_cache.FP8.scale_bytes(unified=True) * attention_layers(model.config)


def check_completed(known: Architecture, unified: Path) -> None:
    """The finished layout: TensorRT-LLM's name of the architecture, and excluded modules that exist."""
    config: dict[str, Any] = json.loads((unified / "config.json").read_text())
    assert config["architectures"] == [known.name]
    tensors = Tensors(unified)
    assert not known.renamed.keys() & tensors.keys()
    quantization = json.loads((unified / "hf_quant_config.json").read_text())["quantization"]
    modules = {name.rpartition(".")[0] for name in tensors}
    for excluded in quantization["exclude_modules"]:
        start = excluded.rstrip("*")
        tied = names.is_head(known, excluded) or names.is_embedding(known, excluded)
        assert tied or any(module.startswith(start) for module in modules), excluded
