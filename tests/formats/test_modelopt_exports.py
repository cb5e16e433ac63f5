"""Every format's tensors are those of ModelOpt's own exports of the same model and calibration, in both layouts.

With the installed ModelOpt, 0.47 or 0.37: the stage's functions on one side, ModelOpt's configuration and exporters as
a user calls them on the other. A format that this version of ModelOpt does not have is skipped by that reason.
"""

from __future__ import annotations

import copy
import struct
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import exports
import pytest
import torch

from builder.checkpoint import layouts, sharding, validate
from builder.checkpoint.sharding import Parallel
from builder.core.safetensors_io import Tensors
from builder.formats import kv_cache, registry
from builder.formats.assignment import ModelFormats
from builder.formats.base import NumberFormat
from builder.formats.declared import declared
from builder.preflight import checks
from builder.preflight.model_facts import ModelFacts
from builder.quantize import quantizers, worker
from builder.quantize.source_weights import SourceModel
from builder.recipe import schema
from builder.reference.model import ReferenceModel

ENGINES = dict(exports.MODELS)  # they have both layouts
OTHERS = {name: exports.DATA / "arch-variants" / name for name in ("phi3", "gemma2", "gemma3_text", "qwen3_moe")}
WHOLE = [
    one.name
    for one in registry.for_whole_model()
    if one.modelopt_config and not any(tensor.name == "pre_quant_scale" for tensor in one.tensors)
]
# ModelOpt's Hugging Face exporter leaves q, k and v with scales of their own, and divides by them in BF16
# (quantize/quantizers.py, round_weights).
PREPARED = ["fp8"]


def number_format(name: str) -> NumberFormat:
    """The format, if the installed ModelOpt has it."""
    import modelopt.torch.quantization as mtq

    one = registry.get(name)
    if not hasattr(mtq, str(one.modelopt_config)):
        pytest.skip(f"ModelOpt {'.'.join(map(str, exports.MODELOPT))} has no {one.modelopt_config}")
    return one


def ours(source: Path, formats: ModelFormats, directory: Path) -> Path:
    """Both layouts, as the stage's worker makes them."""
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ModelOpt's own
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        batches = [batch % model.config.vocab_size for batch in exports.batches()]
        worker.calibrate(model, batches, formats)
    assert worker._ranges(model, worker._plan(SourceModel.open(source), formats)) is not None  # our writer writes it
    return exports.written(model, source, formats, directory)


def check_unified(made: Path, model: Any, formats: ModelFormats, directory: Path) -> None:
    """Compares with ModelOpt's Hugging Face export of `model`; tensors, and what the configuration says of them."""
    if formats.whole.name in PREPARED:
        with torch.inference_mode():
            quantizers.share_ranges(model, formats)
            quantizers.round_weights(model, formats)
    exports.export(model, directory)
    assert not exports.differ(exports.held(made / "unified"), exports.held(directory))
    assert exports.documents(made / "unified") == exports.documents(directory)
    said = layouts.read_json(made / "unified" / "hf_quant_config.json")
    assert declared(said["quantization"]).default is formats.whole


@pytest.mark.parametrize("variant", ENGINES)
@pytest.mark.parametrize("name", WHOLE)
def test_both_layouts_are_modelopts_own(tmp_path: Path, name: str, variant: str) -> None:
    one, source = number_format(name), ENGINES[variant]
    formats = ModelFormats(one, cache=kv_cache.FP8)
    made = ours(source, formats, tmp_path / "ours")
    theirs = exports.quantized(source, config=str(one.modelopt_config))
    for tp in (1, 2):
        exports.export(copy.deepcopy(theirs), tmp_path / "unused", tmp_path / f"tp{tp}", tp=tp)
        sharding.split(made / "tensorrt_llm", tmp_path / f"split{tp}", Parallel(tp))
        for rank in range(tp):
            files = [[tmp_path / f"{at}{tp}" / f"rank{rank}.safetensors"] for at in ("split", "tp")]
            changed = exports.differ(*(exports.held(tmp_path, file) for file in files))
            # 0.47 alone has it, and lets gate and up differ in scale, unlike its other exporter.
            assert not [n for n in changed if name != "w4a16_nvfp4" or (".mlp.fc." not in n and ".mlp.gate." not in n)]
        said = [layouts.read_json(tmp_path / f"{at}{tp}" / "config.json")["quantization"] for at in ("split", "tp")]
        assert {**said[0], "exclude_modules": None} == {**said[1], "exclude_modules": None}
    check_unified(made, theirs, formats, tmp_path / "theirs")
    assert not validate.inspect(made).findings


@pytest.mark.parametrize("variant", OTHERS)
@pytest.mark.parametrize("name", WHOLE)
def test_the_unified_layout_of_other_decoders_is_modelopts_own(tmp_path: Path, name: str, variant: str) -> None:
    one, source = number_format(name), OTHERS[variant]
    formats = ModelFormats(one, cache=kv_cache.FP8)
    made = ours(source, formats, tmp_path / "ours")
    check_unified(made, exports.quantized(source, config=str(one.modelopt_config)), formats, tmp_path / "theirs")


@pytest.mark.parametrize("variant", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("name", [name for name in WHOLE if not ModelFormats(registry.get(name)).calibrated])
def test_what_is_read_from_weights_alone_runs_no_row(
    tmp_path: Path, name: str, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ModelOpt's own export is of a model that saw the rows."""
    one, source = number_format(name), {**ENGINES, **OTHERS}[variant]
    formats, shown = ModelFormats(one), list[Any]()
    monkeypatch.setattr(worker, "emit", lambda progress: shown.append(progress["label"]))
    made = ours(source, formats, tmp_path / "ours")
    assert "calibrating" not in shown
    ours(source, ModelFormats(registry.NVFP4), tmp_path / "calibrated")
    assert "calibrating" in shown
    theirs = exports.quantized(source, config=str(one.modelopt_config), kv_cache=False)
    check_unified(made, theirs, formats, tmp_path / "theirs")


def test_what_is_prepared_for_the_exporter_differs_from_its_own_export_by_one_step(tmp_path: Path) -> None:
    """Layers that are served as one get one scale, the largest of theirs; and one code of fifty is the neighbour."""
    source = exports.MODELS["llama"]
    ours(source, ModelFormats(registry.FP8), tmp_path)
    exports.export(exports.quantized(source, config="FP8_DEFAULT_CFG", kv_cache=False), tmp_path / "theirs")
    made, own = (Tensors(tmp_path / at) for at in ("unified", "theirs"))
    assert {n: (i.dtype, i.shape) for n, i in made.items()} == {n: (i.dtype, i.shape) for n, i in own.items()}
    scales = {n: [struct.unpack("<f", t.read(n)) for t in (made, own)] for n in made if n.endswith("_scale")}
    changed = {n for n, (mine, theirs) in scales.items() if mine != theirs}
    fused = tuple(f"{x}_proj.weight_scale" for x in ("q", "k", "v", "gate", "up"))
    assert changed
    assert all(name.endswith(fused) for name in changed)
    assert all(mine >= theirs for mine, theirs in scales.values())
    for name in (f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)):
        codes, others = (torch.frombuffer(bytearray(t.read(name)), dtype=torch.uint8).int() for t in (made, own))
        assert 0.005 < (codes != others).float().mean() < 0.05
        assert (codes - others).abs().max() == 1


@pytest.mark.parametrize("name", WHOLE)
def test_the_executor_computes_what_modelopt_simulates(tmp_path: Path, name: str) -> None:
    """In float64, without a KV cache, whose scales TensorRT-LLM's layout changes."""
    from modelopt.torch.export import unified_export_hf
    from transformers import AutoModelForCausalLM

    from builder.quantize.simulation import enable_cpu_simulation

    one, source = number_format(name), exports.MODELS["qwen3"]
    formats = ModelFormats(one)
    made = ours(source, formats, tmp_path)
    ids = torch.arange(3, 4000, 97)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        worker.calibrate(model, exports.batches(), formats)
    for module in model.modules():  # a checkpoint has amax / 448, from which amax comes back but for its last bit
        if getattr(module, "num_bits", None) == (4, 3) and getattr(module, "amax", None) is not None:
            module._amax = module.amax.float() / 448 * 448
    enable_cpu_simulation()
    with torch.inference_mode():
        quantizers.round_weights(model, formats)
        unified_export_hf.requantize_resmooth_fused_llm_layers(model)
        theirs = model.double()(ids[None], use_cache=False).logits[0].float()
    reference = ReferenceModel.load(made / "tensorrt_llm", torch.float64)
    assert (reference.forward(ids, reference.new_cache()) - theirs).abs().max() <= 1e-5


@pytest.mark.parametrize("variant", ["llama", "qwen3_moe"])
def test_a_scheme_without_attention_is_modelopts_own(tmp_path: Path, variant: str) -> None:
    source = exports.DATA / "arch-variants" / variant
    layers = scheme_layers(source, "nvfp4_mlp_only")
    assert {name.rpartition(".")[2] for name in layers["bf16"]} == {f"{x}_proj" for x in "qkvo"}
    formats = ModelFormats(registry.NVFP4, {registry.BF16: layers["bf16"]}, kv_cache.FP8)
    made = ours(source, formats, tmp_path / "ours")
    check_unified(made, exports.quantized(source, config="NVFP4_MLP_ONLY_CFG"), formats, tmp_path / "theirs")


@pytest.mark.parametrize("variant", ["llama", "qwen3"])
def test_a_scheme_with_attention_in_fp8_is_modelopts_mixed_precision(tmp_path: Path, variant: str) -> None:
    source = exports.MODELS[variant]
    layers = scheme_layers(source, "nvfp4-fp8_attention")
    formats = ModelFormats(registry.NVFP4, {registry.FP8: layers["fp8"]}, kv_cache.FP8)
    made = ours(source, formats, tmp_path / "ours")
    theirs = exports.quantized(source, fp8=layers["fp8"])
    with torch.inference_mode():
        quantizers.share_ranges(theirs, formats)
        quantizers.round_weights(theirs, formats)
    exports.export(theirs, tmp_path / "theirs")
    assert not exports.differ(exports.held(made / "unified"), exports.held(tmp_path / "theirs"))
    assert exports.documents(made / "unified") == exports.documents(tmp_path / "theirs")
    said = layouts.read_json(made / "unified" / "hf_quant_config.json")
    assert said["quantization"]["quant_algo"] == "MIXED_PRECISION"
    found = validate.inspect(made)
    assert not found.findings
    assert found.layouts["unified"].linears["fp8"] == len(layers["fp8"])
    reference = ReferenceModel.load(made / "tensorrt_llm")
    assert reference.layers[0].qkv.number_format is registry.FP8
    assert reference.layers[0].fc.number_format is registry.NVFP4


def scheme_layers(source: Path, name: str) -> Mapping[str, Sequence[str]]:
    """What preflight makes of a scheme for a model."""
    tensors = {one: (info.dtype, info.shape) for one, info in Tensors(source).items()}
    model = ModelFacts(layouts.read_json(source / "config.json"), tensors)
    asked = schema.resolve({"model.id": str(source), "gpu": "cpu", "quantization.format": name})
    return checks.keep_patterns(asked.recipe, model, []).layers
