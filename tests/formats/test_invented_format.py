"""A format that no module of the builder knows goes all the way: recipe, plan, both layouts, ranks, gate, executor.

It is NVFP4 with blocks of 32 and weights alone, and a scale of each output beside: three things that no format of the
builder has (another group, nothing calibrated, a scale per channel).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import exports
import pytest
import torch
from torch import Tensor

from builder.checkpoint import layouts, sharding, validate
from builder.checkpoint.sharding import Parallel
from builder.core.errors import UnsupportedError, UsageError
from builder.core.safetensors_io import NewTensor, Tensors, write
from builder.evaluate.sensitivity.weight_error import weight_errors
from builder.formats import registry
from builder.formats.arithmetic import nvfp4
from builder.formats.base import IN, OUT, Dim, NumberFormat, StoredTensor
from builder.preflight import memory
from builder.preflight.memory import Serving
from builder.preflight.model_facts import ModelFacts
from builder.quantize import modelopt
from builder.recipe import schema
from builder.reference.model import ReferenceModel
from builder.trtllm import flags as trtllm_flags

BLOCK = 32
SOURCE = exports.MODELS["qwen3"]
ASKED = Serving(max_batch_size=1, max_input_len=64, max_seq_len=128, max_num_tokens=128)


class WeightOnly(NumberFormat):
    """E2M1 weights, an E4M3 scale for 32 of them, a float32 scale for each output; inputs are not quantized."""

    def dequantize(self, stored: Mapping[str, Tensor], kind: torch.dtype) -> Tensor:
        values = _values(nvfp4.unpack(stored["weight"])).view(-1, BLOCK)
        blocks = values * stored["block_scale"].float().view(-1, 1)
        return (blocks.view(len(stored["weight"]), -1) * stored["channel_scale"][:, None]).to(kind)

    def round_input(self, x: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
        return x

    def round_weight(self, weight: Tensor, amax: Tensor) -> Tensor:
        scale = (weight.abs().amax(-1, keepdim=True) / 6).clamp(min=1e-9)
        return nvfp4.fake_quantize_static(weight, scale)


FORMAT = WeightOnly(
    name="w4a16_block32",
    title="W4A16 in blocks of 32",
    quant_algo="W4A16_BLOCK32",
    bits=4.25,
    tensors=(
        StoredTensor("weight", "weight", "weight", ("U8",), (OUT, Dim("in", 2)), "codes", "w4_weights"),
        StoredTensor("block_scale", "weight_scale", "weights_scaling_factor", ("F8_E4M3",),
                     (OUT, Dim("in", BLOCK)), "block_scales", "w4_scales"),
        StoredTensor("channel_scale", "channel_scale", "per_channel_scale", ("F32",), (OUT,), "floats", "w4_channels"),
        StoredTensor("pre_quant_scale", "pre_quant_scale", "prequant_scaling_factor", ("F32",), (IN,), "floats",
                     "w4_inputs", calibrated=True),
    ),
    label="w4",
    group_size=BLOCK,
    whole_model=True,
    modelopt_config="NVFP4_DEFAULT_CFG",
    gpu_format="nvfp4",
)  # fmt: skip


def _values(codes: Tensor) -> Tensor:
    table = torch.tensor(nvfp4.E2M1_VALUES + tuple(-value for value in nvfp4.E2M1_VALUES))
    return table[codes.int()]


@pytest.fixture(autouse=True)
def invented(monkeypatch: pytest.MonkeyPatch) -> None:
    """The only step that a module in builder/formats would not need: it is found there."""
    monkeypatch.setitem(registry.all_formats(), FORMAT.name, FORMAT)


def model() -> ModelFacts:
    tensors = {name: (info.dtype, info.shape) for name, info in Tensors(SOURCE).items()}
    return ModelFacts(layouts.read_json(SOURCE / "config.json"), tensors, number_format=FORMAT)


def quantized(name: str, weight: Tensor, bits: torch.Generator) -> list[NewTensor]:
    """A layer's tensors: the blocks' scales are those of the weight, the channels' are 1, 2 or 0.5."""
    module = name.removesuffix(".weight")
    outputs, inputs = weight.shape
    channel = 2.0 ** torch.randint(-1, 2, (outputs, 1), generator=bits).float()
    blocks = (weight.float() / channel).view(-1, BLOCK)
    scale = (blocks.abs().amax(-1, keepdim=True) / 6).clamp(2**-9, 448).to(torch.float8_e4m3fn)
    packed = nvfp4.pack(nvfp4.encode(blocks / scale.float())).view(outputs, -1)
    raw = {
        "weight": packed,
        "weight_scale": scale.view(outputs, -1).view(torch.uint8),
        "channel_scale": channel[:, 0],
        "pre_quant_scale": torch.ones(inputs),
    }
    return [
        NewTensor(
            f"{module}.{one.unified}", one.dtypes[0], one.shape(weight.shape), [raw[one.unified].numpy().tobytes()]
        )
        for one in FORMAT.tensors
    ]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Both layouts of the model: all its linear layers in the invented format but one, which stays in BF16."""
    tensors, bits = Tensors(SOURCE), torch.Generator().manual_seed(0)
    made: list[NewTensor] = []
    for name, info in tensors.items():
        if model().quantizes(name, info.shape) and "layers.1.mlp.down_proj" not in name:
            weight = torch.frombuffer(bytearray(tensors.read(name)), dtype=torch.bfloat16).reshape(info.shape)
            made += quantized(name, weight, bits)
        else:
            made.append(NewTensor(name, info.dtype, info.shape, tensors.chunks(name)))
    layers = range(model().config["num_hidden_layers"])
    scales = [f"model.layers.{n}.self_attn.{x}_proj.{x}_scale" for n in layers for x in "kv"]
    made += [NewTensor(name, "F32", (), [struct.pack("<f", 1.0)]) for name in scales]
    unified = tmp_path / "unified"
    unified.mkdir()
    write(unified / "model.safetensors", made)
    layouts.write_json(unified / "config.json", model().config)
    quantization = {**FORMAT.layer_entry, "kv_cache_quant_algo": "FP8"}
    quantization["exclude_modules"] = ["lm_head", "model.layers.1.mlp.down_proj"]
    (unified / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
    layouts.write_tensorrt_llm(unified, model().config, tmp_path / "tensorrt_llm")
    return tmp_path


def resolved(**flags: Any) -> schema.Resolved:
    return schema.resolve({"model.id": "m", "quantization.format": FORMAT.name, **flags})


def test_a_recipe_can_choose_it_and_nothing_else() -> None:
    assert resolved(gpu="cpu").recipe.quantization.number_format is FORMAT
    assert schema.schema()["$defs"]["Quantization"]["properties"]["format"]["default"] == "nvfp4"
    with pytest.raises(UsageError, match=r"Input should be 'nvfp4' or .* or 'w4a16_block32'"):
        schema.resolve({"model.id": "m", "gpu": "cpu", "quantization.format": "w4a16"})


@pytest.mark.parametrize(("gpu", "runs"), [("sm120", True), ("sm89", False), ("cpu", True)])
def test_its_gpus_are_those_that_it_names(gpu: str, runs: bool) -> None:
    if runs:
        trtllm_flags.check_format(resolved(gpu=gpu))
        return
    with pytest.raises(UnsupportedError, match="W4A16 in blocks of 32 runs on sm100"):
        trtllm_flags.check_format(resolved(gpu=gpu))


def test_the_plan_knows_its_bytes(checkpoint: Path) -> None:
    stored = {n: i for n, i in Tensors(checkpoint / "unified").items()}
    kept = ModelFacts(
        model().config, model().tensors, {"bf16": ("model.layers.1.mlp.down_proj",)}, number_format=FORMAT
    )
    sizes = memory.sizes(kept, ASKED)
    assert sizes.unified == sum(info.nbytes for info in stored.values())
    assert sizes.checkpoint == sum(info.nbytes for info in Tensors(checkpoint / "tensorrt_llm").values())
    assert sizes.unified > memory.sizes(model(), ASKED).unified


def test_the_second_layout_has_its_tensors(checkpoint: Path) -> None:
    config = layouts.read_json(checkpoint / "tensorrt_llm" / "config.json")["quantization"]
    assert (config["quant_algo"], config["group_size"]) == ("W4A16_BLOCK32", BLOCK)
    assert config["exclude_modules"] == ["lm_head", "transformer.layers.1.mlp.proj"]
    theirs, ours = Tensors(checkpoint / "unified"), Tensors(checkpoint / "tensorrt_llm")
    qkv = [f"model.layers.0.self_attn.{x}_proj.channel_scale" for x in "qkv"]
    assert ours.read("transformer.layers.0.attention.qkv.per_channel_scale") == b"".join(
        theirs.read(name) for name in qkv
    )
    shared = ours["transformer.layers.0.attention.qkv.prequant_scaling_factor"]
    assert shared.shape == (model().config["hidden_size"],)  # one for q, k and v


def test_the_gate_knows_it(checkpoint: Path) -> None:
    found = validate.inspect(checkpoint)
    assert not found.findings
    layers = model().config["num_hidden_layers"]
    assert found.layouts["unified"].linears == {"nvfp4": 0, "fp8": 0, "kept": 1, "w4": 7 * layers - 1}
    assert found.facts()["layouts"]["unified"]["w4_linears"] == 7 * layers - 1
    assert 4.25 < found.layouts["unified"].bits_per_weight < 5.5  # the tiny model's channels weigh much
    unified = Tensors(checkpoint / "unified")
    name = "model.layers.0.mlp.up_proj.channel_scale"
    data = struct.pack("<f", float("nan")) + unified.read(name)[4:]
    damaged = exports.rewrite(
        checkpoint / "unified", checkpoint / "u", {name: NewTensor(name, "F32", unified[name].shape, [data])}
    )
    assert [str(p) for p in validate.inspect(damaged).findings if p.tensor == name]


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (2, 2)])
def test_ranks_hold_their_shares_and_compute_the_same(checkpoint: Path, tmp_path: Path, tp: int, pp: int) -> None:
    whole, parts = checkpoint / "tensorrt_llm", tmp_path / "parts"
    excluded = layouts.read_json(whole / "config.json")
    if pp > 1:  # the kept layer would be another in each stage
        with pytest.raises(UnsupportedError, match="not the same in all 2 pipeline stages"):
            sharding.split(whole, parts, Parallel(tp, pp))
        return
    sharding.split(whole, parts, Parallel(tp, pp))
    assert not validate.inspect(parts).findings
    hidden, inner = excluded["hidden_size"], excluded["intermediate_size"]
    rank = Tensors(parts, [parts / "rank1.safetensors"])
    assert rank["transformer.layers.0.mlp.proj.prequant_scaling_factor"].shape == (inner // tp,)
    assert rank["transformer.layers.0.mlp.proj.per_channel_scale"].shape == (hidden,)
    assert rank["transformer.layers.0.mlp.fc.per_channel_scale"].shape == (inner // tp,)
    assert rank["transformer.layers.0.mlp.fc.prequant_scaling_factor"].shape == (hidden,)
    ids = torch.arange(3, 400, 7)
    one, other = ReferenceModel.load(whole), ReferenceModel.load(parts)
    assert torch.equal(one.forward(ids, one.new_cache()), other.forward(ids, other.new_cache()))


def test_a_split_must_not_cut_its_blocks() -> None:
    config = {**model().config, "intermediate_size": 16 * 33}
    sharding.check({**config, "hidden_size": 64}, 1, 1, number_format=FORMAT)
    with pytest.raises(UnsupportedError, match="W4A16 in blocks of 32 has one scale for 32 inputs"):
        sharding.check(config, 2, 1, number_format=FORMAT)


def test_the_executor_dequantizes_it(checkpoint: Path) -> None:
    executor = ReferenceModel.load(checkpoint / "tensorrt_llm")
    original = Tensors(SOURCE)
    name = "model.layers.0.mlp.down_proj.weight"
    weight = torch.frombuffer(bytearray(original.read(name)), dtype=torch.bfloat16).reshape(original[name].shape)
    error = (executor.layers[0].proj.weight - weight.float()).norm() / weight.float().norm()
    assert 0.01 < error < 0.15
    assert executor.layers[0].proj.number_format is FORMAT
    kept = executor.layers[1].proj
    assert kept.number_format is registry.BF16
    assert kept.weight.dtype == torch.float32


def test_its_weight_errors_can_be_compared_with_nvfp4s() -> None:
    groups = {"down": ["model.layers.0.mlp.down_proj"]}
    tensors = Tensors(SOURCE)
    assert 0.05 < weight_errors(tensors, groups, FORMAT)["down"] < 0.2
    assert weight_errors(tensors, groups)["down"] != weight_errors(tensors, groups, FORMAT)["down"]


def test_modelopt_is_told_its_configuration() -> None:
    modelopt.check_sizes({"a.weight": (8, 64)}, FORMAT)
    with pytest.raises(UnsupportedError, match="not a multiple of 32, as W4A16 in blocks of 32 requires"):
        modelopt.check_sizes({"a.weight": (8, 48)}, FORMAT)
