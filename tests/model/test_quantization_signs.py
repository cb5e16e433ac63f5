"""Checkpoints of other quantizers are refused by name, before a weight is downloaded, with what works instead."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hub_server import Hub
from source_models import LLAMA, MOE, SHARDED, WEIGHTS, copy, flags, zeros

from builder import plan
from builder.core.errors import UnsupportedError
from builder.core.output import Output
from builder.core.safetensors_io import NewTensor
from builder.core.store import Store
from builder.hub.snapshot import fetch, open_source
from builder.model import quantization_signs
from builder.recipe import schema
from builder.recipe.schema import Model

Q = "model.layers.0.self_attn.q_proj"
Parts = Mapping[str, tuple[str, tuple[int, ...]]]


def replacing(parts: Parts, module: str = Q) -> Callable[[NewTensor], list[NewTensor]]:
    """Other tensors, {name after the module's: (dtype, shape)}, in the place of a layer's weight."""

    def change(tensor: NewTensor) -> list[NewTensor]:
        if tensor.name != f"{module}.weight":
            return [tensor]
        return [
            NewTensor(f"{module}{name}", dtype, shape, [zeros(dtype, shape)]) for name, (dtype, shape) in parts.items()
        ]

    return change


def of_tensors(parts: Parts, **config: Any) -> Callable[[Path], Path]:
    return lambda target: copy(LLAMA, target, replacing(parts), **config)


def of_config(**block: Any) -> Callable[[Path], Path]:
    return lambda target: copy(LLAMA, target, quantization_config=block)


def with_file(name: str) -> Callable[[Path], Path]:
    def make(target: Path) -> Path:
        copy(LLAMA, target)
        (target / name).write_text('{"bits": 4}')
        return target

    return make


def gguf(target: Path) -> Path:
    copy(LLAMA, target)
    (target / WEIGHTS).rename(target / "model-Q4_K_M.gguf")
    return target


GPTQ: Parts = {
    ".qweight": ("I32", (8, 64)), ".qzeros": ("I32", (1, 8)), ".scales": ("F16", (1, 64)), ".g_idx": ("I32", (64,)),
}  # fmt: skip
AWQ: Parts = {".qweight": ("I32", (64, 8)), ".qzeros": ("I32", (1, 8)), ".scales": ("F16", (1, 64))}
BNB4: Parts = {
    ".weight": ("U8", (2048, 1)), ".weight.absmax": ("U8", (64,)), ".weight.quant_map": ("F32", (16,)),
    ".weight.quant_state.bitsandbytes__nf4": ("U8", (80,)),
}  # fmt: skip
MLX: Parts = {".weight": ("U32", (64, 8)), ".scales": ("F16", (64, 1)), ".biases": ("F16", (64, 1))}

# One tiny directory for each: how it is made, what its refusal says.
FOREIGN: dict[str, tuple[Callable[[Path], Path], str]] = {
    "GPTQ": (of_config(quant_method="gptq", bits=4, group_size=128), "GPTQ"),
    "GPTQ by tensors": (of_tensors(GPTQ), "GPTQ.*qweight|GPTQ.*g_idx"),
    "GPTQ by a file": (with_file("quantize_config.json"), "GPTQ"),
    "AutoAWQ": (of_config(quant_method="awq", bits=4, group_size=128, version="gemm"), "AutoAWQ"),
    "AutoAWQ by tensors": (of_tensors(AWQ), "AutoAWQ"),
    "AutoAWQ by a file": (with_file("quant_config.json"), "AutoAWQ"),
    "bitsandbytes, 4 bits": (of_config(quant_method="bitsandbytes", load_in_4bit=True), "bitsandbytes in 4 bits"),
    "bitsandbytes, 8 bits": (of_config(quant_method="bitsandbytes", load_in_8bit=True), "bitsandbytes in 8 bits"),
    "bitsandbytes, 4 bits, by tensors": (of_tensors(BNB4), "bitsandbytes in 4 bits"),
    "bitsandbytes, 8 bits, by tensors": (
        of_tensors({".weight": ("I8", (64, 64)), ".SCB": ("F32", (64,))}), "bitsandbytes in 8 bits",
    ),
    "MXFP4 (gpt-oss)": (of_config(quant_method="mxfp4", modules_to_not_convert=["lm_head"]), "MXFP4.*never published"),
    "MXFP4 by tensors": (
        of_tensors({"_proj_blocks": ("U8", (2, 64, 4, 16)), "_proj_scales": ("U8", (2, 64, 4))}), "MXFP4",
    ),
    "FP8 blocks (DeepSeek, Qwen3-FP8)": (
        of_config(quant_method="fp8", fmt="e4m3", activation_scheme="dynamic", weight_block_size=[128, 128]),
        "scale for each block.*never published",
    ),
    "FP8 blocks by tensors": (
        of_tensors({".weight": ("F8_E4M3", (64, 64)), ".weight_scale_inv": ("F32", (1, 1))}), "scale for each block",
    ),
    "FP8 of transformers": (of_config(quant_method="fp8", activation_scheme="static"), "quant_method fp8"),
    "FP8 of FBGEMM": (of_config(quant_method="fbgemm_fp8", activation_scale_ub=1200.0), "FBGEMM"),
    "MLX": (lambda target: copy(LLAMA, target, quantization={"group_size": 64, "bits": 4}), "MLX"),
    "MLX by tensors": (of_tensors(MLX), "MLX"),
    "GGUF": (gguf, "GGUF.*Q4_K_M"),
    "torchao": (of_config(quant_method="torchao", quant_type={"default": {}}), "torchao"),
    "torchao by tensors": (
        of_tensors({"._weight_qdata": ("I8", (64, 64)), "._weight_scale": ("F32", (64,))}), "torchao",
    ),
    "HQQ": (of_config(quant_method="hqq", quant_config={"weight_quant_params": {}}), "HQQ"),
    "HQQ by tensors": (of_tensors({".W_q": ("U8", (32, 64)), ".meta": ("U8", (8,))}), "HQQ"),
    "EXL2": (of_config(quant_method="exl2", bits=4.0, version="0.2.4"), "EXL2"),
    "EXL2 by tensors": (of_tensors({".q_weight": ("I32", (8, 64)), ".q_scale_max": ("F16", (4,))}), "EXL2"),
    "EXL3": (of_config(quant_method="exl3", bits=4, codebook="mcg"), "EXL3"),
    "EXL3 by tensors": (of_tensors({".trellis": ("I16", (4, 4, 64)), ".suh": ("F16", (64,))}), "EXL3"),
    "SVDQuant": (of_tensors({".qweight": ("I8", (64, 32)), ".wscales": ("F16", (1, 64))}), "SVDQuant"),
    "AQLM": (of_config(quant_method="aqlm", num_codebooks=1), "AQLM"),
    "AQLM by tensors": (of_tensors({".codes": ("I16", (64, 8, 1)), ".codebooks": ("F16", (1, 16, 1, 8))}), "AQLM"),
    "quanto": (of_config(quant_method="quanto", weights="int8"), "quanto"),
    "quanto by tensors": (
        of_tensors({".weight._data": ("I8", (64, 64)), ".weight._scale": ("F32", (64, 1))}), "quanto",
    ),
    "an unknown method": (of_config(quant_method="quantomatic"), r"tool.*\(quantomatic\)"),
    "a part of config.json": (
        lambda target: copy(LLAMA, target, text_config={"compression_config": {"format": "int"}}),
        "by a tool.*text_config",
    ),
    "scales without a description": (
        of_tensors({".weight": ("BF16", (64, 64)), ".weight_scale": ("F32", ())}), "by a tool",
    ),
    "FP8 weights without a description": (of_tensors({".weight": ("F8_E4M3", (64, 64))}), "by a tool.*F8_E4M3"),
    "two quantizations": (
        lambda target: _also(with_hf_quant_config(target), quant_method="gptq", bits=4), "GPTQ",
    ),
}  # fmt: skip


def with_hf_quant_config(target: Path) -> Path:
    copy(LLAMA, target)
    (target / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4"}}')
    return target


def _also(target: Path, **block: Any) -> Path:
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "quantization_config": block}))
    return target


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_quantization_is_refused_by_name_and_alike_by_plan_and_fetch(
    name: str, tmp_path: Path, store: Store
) -> None:
    make, says = FOREIGN[name]
    model = make(tmp_path / "model")
    with pytest.raises(UnsupportedError, match="(?s)" + says) as planned:
        plan.plan(schema.resolve(flags(model)), Store(tmp_path / "out", Output("quiet"), dry=True))
    with pytest.raises(UnsupportedError) as fetched:
        fetch(Model(id=str(model)), store=store)
    assert str(planned.value) == str(fetched.value)
    assert "original model" in planned.value.hint


@pytest.mark.parametrize("name", ["GPTQ", "FP8 blocks by tensors", "two quantizations"])
def test_on_the_hub_it_is_refused_before_a_weight_is_downloaded(
    name: str, hub: Hub, store: Store, tmp_path: Path
) -> None:
    make, says = FOREIGN[name]
    hub.add("tiny/model", make(tmp_path / "model"))
    with pytest.raises(UnsupportedError, match="(?s)" + says):
        open_source(Model(id="tiny/model"), store=store)
    assert not [r for r in hub.requests if r.path.startswith("/cdn/") and r.method == "GET" and not r.header]


def test_each_method_of_transformers_has_a_name() -> None:
    methods = pytest.importorskip("transformers.utils.quantization_config").QuantizationMethod
    known = {*quantization_signs.METHODS, "compressed-tensors"}
    assert not {str(method.value) for method in methods} - known


def test_hints_name_no_format_because_not_every_card_runs_it() -> None:
    """Without --format, the original gets the card's best."""
    tools = [*quantization_signs.METHODS.values(), *quantization_signs.FILES.values(), quantization_signs.GGUF, None]
    for tool in tools:
        hint = quantization_signs.foreign("somebody/something", tool, "It says so.").hint
        assert "original model, which is quantized to the best format that the card runs" in hint
        assert "--format" not in hint


@pytest.mark.parametrize("source", [SHARDED, MOE], ids=lambda path: path.name)
def test_an_unquantized_model_has_no_signs(source: Path, store: Store) -> None:
    found = open_source(Model(id=str(source)), store=store)
    assert not found.quantized
    assert not re.search("quantiz", " ".join(found.config))
