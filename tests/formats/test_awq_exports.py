"""AWQ's and SmoothQuant's tensors are those of ModelOpt's own exports of the same model and calibration.

With the installed ModelOpt, 0.47 or 0.37: the stage's functions on one side, ModelOpt's configuration and exporters as
a user calls them on the other. Its search runs on this CPU with our arithmetic on both sides (quantize/simulation.py).

ModelOpt's TensorRT-LLM export of AWQ models by itself keeps the scales that its Hugging Face export averages over
layers with the same input and folds into the norm. Ours is made from the Hugging Face one, so it is compared with
ModelOpt's after that step (exports.export_resmoothed); for INT4 it has ones where ModelOpt then writes nothing.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import exports
import pytest
import torch

from builder.checkpoint import layouts, sharding, validate
from builder.checkpoint.sharding import Parallel
from builder.core.errors import UnsupportedError
from builder.core.safetensors_io import Tensors
from builder.formats import kv_cache, registry
from builder.formats.assignment import ModelFormats
from builder.formats.base import NumberFormat
from builder.formats.declared import declared
from builder.quantize import stored_model, worker
from builder.recipe.quantization import Quantization
from builder.reference.model import ReferenceModel

NAMES = ("int8_sq", "int4_awq", "int4_awq_64", "nvfp4_awq")
OTHERS = {name: exports.DATA / "arch-variants" / name for name in ("phi3", "gemma2", "gemma3_text", "qwen3_moe")}
ONES = b"\x80\x3f"
Held = Mapping[str, tuple[str, tuple[int, ...], bytes]]


def cases(models: Mapping[str, Path]) -> list[tuple[str, str]]:
    """Blocks of 128 fit tiny-qwen3 only, which is too large for more than one format with blocks."""
    return [(name, model) for name in NAMES for model in models if (name == "int4_awq") == (model == "qwen3")] + [
        ("int8_sq", model) for model in models if model == "qwen3"
    ]


def batches(model: Any) -> list[torch.Tensor]:
    return [torch.randint(0, 4000, (1, 24), generator=torch.Generator().manual_seed(0)) % model.config.vocab_size]


def load(source: Path) -> Any:
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)


def calibrated(source: Path, formats: ModelFormats) -> Any:
    """The model as the stage's worker calibrates it."""
    model = load(source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ModelOpt's own
        worker.calibrate(model, batches(model), formats)
    return model


def ours(source: Path, one: NumberFormat, directory: Path) -> Path:
    """Both layouts, as the stage's worker makes them."""
    formats = ModelFormats(one, cache=kv_cache.FP8)
    model = calibrated(source, formats)
    return exports.written(model, source, formats, directory)


def theirs(source: Path, one: NumberFormat) -> Any:
    """The model as ModelOpt calibrates it by the configuration of its own name, with its FP8 KV cache beside."""
    import modelopt.torch.quantization as mtq

    config = copy.deepcopy(getattr(mtq, str(one.modelopt_config)))
    entries, cache = config["quant_cfg"], mtq.FP8_KV_CFG["quant_cfg"]
    config["quant_cfg"] = {**entries, **cache} if isinstance(entries, dict) else [*entries, *cache]
    if one.name == "int4_awq_64":
        blocks = {"num_bits": 4, "block_sizes": {-1: 64, "type": "static"}}
        if isinstance(entries, dict):
            config["quant_cfg"]["*weight_quantizer"] = {**blocks, "enable": True}
        else:
            next(e for e in config["quant_cfg"] if e["quantizer_name"] == "*weight_quantizer")["cfg"] = blocks
    model = load(source)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        mtq.quantize(model, config, lambda model: [model(ids, use_cache=False) for ids in batches(model)])
    return model


def held(directory: Path, file: Path | None = None) -> Held:
    """{tensor: (dtype, shape, bytes)}."""
    tensors = Tensors(directory, [file]) if file else Tensors(directory)
    return {name: (info.dtype, info.shape, tensors.read(name)) for name, info in tensors.items()}


def check_unified(made: Path, model: Any, one: NumberFormat, directory: Path) -> None:
    """Compares with ModelOpt's Hugging Face export of `model`: tensors, and what the configuration says of them."""
    exports.export(model, directory)
    assert not exports.differ(held(made / "unified"), held(directory))
    said = [layouts.read_json(at / "hf_quant_config.json") for at in (made / "unified", directory)]
    assert said[0] == said[1]
    assert declared(said[0]["quantization"]).default is one
    assert not validate.inspect(made).findings


@pytest.mark.parametrize(("name", "variant"), cases(exports.MODELS))
def test_both_layouts_are_modelopts_own(tmp_path: Path, name: str, variant: str) -> None:
    one, source = registry.get(name), exports.MODELS[variant]
    made, model = ours(source, one, tmp_path / "ours"), theirs(source, one)
    for tp in (1, 2) if name != "int4_awq_64" else (1,):  # half of 64 inputs is less than a block
        modelopts = tmp_path / f"modelopt{tp}"
        if name == "int8_sq":
            exports.export(copy.deepcopy(model), tmp_path / "unused", modelopts, tp=tp)
        else:
            exports.export_resmoothed(copy.deepcopy(model), modelopts, tp=tp)
        sharding.split(made / "tensorrt_llm", tmp_path / f"tp{tp}", Parallel(tp))
        for rank in (f"rank{rank}.safetensors" for rank in range(tp)):
            mine, other = held(tmp_path, tmp_path / f"tp{tp}" / rank), held(tmp_path, modelopts / rank)
            added = {key: tensor for key, tensor in mine.items() if key not in other}
            assert {key: mine[key] for key in other if key in mine} == other
            assert all(data == ONES * shape[0] for _, shape, data in added.values())
            filled = [f".{layer}.prequant_scaling_factor" for layer in ("attention.qkv", "mlp.fc", "mlp.gate")]
            assert all(key.endswith(tuple(filled)) for key in added)
            assert bool(added) == name.startswith("int4_awq")
        said = [layouts.read_json(at / "config.json")["quantization"] for at in (tmp_path / f"tp{tp}", modelopts)]
        assert said[0] == said[1]
    check_unified(made, model, one, tmp_path / "theirs")


@pytest.mark.parametrize(("name", "variant"), cases(OTHERS))
def test_the_unified_layout_of_other_decoders_is_modelopts_own(tmp_path: Path, name: str, variant: str) -> None:
    one, source = registry.get(name), OTHERS[variant]
    if variant == "qwen3_moe" and exports.MODELOPT >= (0, 44):  # with transformers 5
        with pytest.raises(UnsupportedError, match="can't quantize the experts") as caught:
            ours(source, one, tmp_path)
        assert "--format nvfp4" in caught.value.hint
        return
    check_unified(ours(source, one, tmp_path / "ours"), theirs(source, one), one, tmp_path / "theirs")


def test_awq_changes_the_norms(tmp_path: Path) -> None:
    """So the norms of such a checkpoint are not the model's: each is the model's times what ModelOpt's other export
    keeps apart, in BF16."""
    one, source = registry.get("int4_awq_64"), exports.MODELS["llama"]
    made, model = held(ours(source, one, tmp_path / "ours") / "unified"), theirs(source, one)
    exports.export(model, tmp_path / "unused", tmp_path / "modelopt")
    apart = held(tmp_path / "modelopt")

    def vector(tensors: Held, name: str) -> torch.Tensor:
        return torch.frombuffer(bytearray(tensors[name][2]), dtype=torch.bfloat16)

    for layer in range(2):
        theirs_, mine = f"transformer.layers.{layer}", f"model.layers.{layer}"
        norm = vector(apart, f"{theirs_}.input_layernorm.weight")
        scale = vector(apart, f"{theirs_}.attention.qkv.prequant_scaling_factor")
        folded = vector(made, f"{mine}.input_layernorm.weight")
        assert torch.equal(folded, norm * scale)
        assert not torch.equal(folded, norm)


@pytest.mark.parametrize("name", ["int8_sq", "int4_awq_64", "nvfp4_awq"])
def test_the_executor_computes_what_modelopt_simulates(tmp_path: Path, name: str) -> None:
    """In float64, without a KV cache, whose scales TensorRT-LLM's layout changes. Of the weights, one in a thousand may
    get the neighbouring code: ModelOpt's exporters divide by amax / 7, its simulation multiplies by 7 / amax."""
    from modelopt.torch.export import unified_export_hf

    one, source = registry.get(name), exports.MODELS["llama"]
    formats = ModelFormats(one)
    model = calibrated(source, formats)
    exports.written(copy.deepcopy(model), source, formats, tmp_path)
    stored, ids = Tensors(tmp_path / "unified"), torch.arange(3, 4000, 97)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        unified_export_hf.requantize_resmooth_fused_llm_layers(model)
        model = model.double()
        for module_name, module in model.named_modules():
            if f"{module_name}.weight_scale" in stored:
                weight = one.dequantize(stored_model.tensors_of(stored, module_name, one), torch.float64)
                simulated = module.weight_quantizer(module.weight)
                assert (~torch.isclose(weight, simulated, rtol=1e-5, atol=1e-9)).double().mean() < 1e-3
                module.weight.copy_(weight)
                module.weight_quantizer.disable()
        expected = model(ids[None], use_cache=False).logits[0]
    reference = ReferenceModel.load(tmp_path / "tensorrt_llm", torch.float64)
    assert (reference.forward(ids, reference.new_cache()) - expected).abs().max() <= 2e-6


@pytest.mark.parametrize("name", NAMES)
def test_single_layers_stay_in_bf16_or_nothing(name: str) -> None:
    """ModelOpt searches scales for the inputs of every quantized layer, those in FP8 too."""
    assert Quantization(format=name, keep_bf16=("*.down_proj",)).keep_bf16
    with pytest.raises(ValueError, match=f"keep_fp8 can't be combined with format {name}: .*; use keep_bf16"):
        Quantization(format=name, keep_fp8=("*.down_proj",))


def test_widths_that_are_not_whole_blocks_are_rejected() -> None:
    model = load(exports.MODELS["llama"])
    with pytest.raises(UnsupportedError, match="not a multiple of 128, as INT4") as caught:
        worker.calibrate(model, batches(model), ModelFormats(registry.get("int4_awq")))
    assert "q_proj [128, 64]" in caught.value.why
    assert "int4_awq_64" in caught.value.hint
