"""What is refused before the first calibration batch (weights of zeros, too few tokens), and how to ask for it."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from builder import pipeline
from builder.architectures import catalog
from builder.calibration.rows import Calibration, calibrate, required_tokens
from builder.checkpoint import layouts, validate
from builder.checkpoint.inspection.findings import finding
from builder.checkpoint.layouts import Checkpoint
from builder.checkpoint.validate import Inspection
from builder.core.errors import IntegrityError, UnsupportedError, UsageError
from builder.core.output import Output
from builder.core.safetensors_io import Tensors
from builder.core.store import Store
from builder.hub.snapshot import fetch
from builder.model import quantization_signs
from builder.plan import plan
from builder.preflight import checks, memory
from builder.preflight.prepare import prepare
from builder.preflight.zero_layers import keep_zeros
from builder.quantize import exclude, quantizers, zeros
from builder.quantize.modelopt import QuantizeRequest, quantize
from builder.recipe import schema
from builder.recipe.quantization import Quantization

LLAMA = Path(__file__).parents[1] / "data" / "arch-variants" / "llama"
MOE = LLAMA.parent / "qwen3_moe"
ZERO = "model.layers.1.self_attn.o_proj"
TEXT = "How a text becomes tokens, and tokens become numbers that a model multiplies."


def rows(directory: Path, count: int, text: str = TEXT) -> Path:
    file = directory / f"{count}.jsonl"
    file.write_text("".join(json.dumps({"text": f"{n} {text}"}) + "\n" for n in range(count)))
    return file


def with_zeros(directory: Path, *names: str, source: Path = LLAMA) -> Path:
    shutil.copytree(source, directory)
    tensors = load_file(directory / "model.safetensors")
    tensors |= {name: torch.zeros_like(tensors[name]) for name in names}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def quantized(model: Path, part: schema.Calibration, store: Store, **more: Any) -> Checkpoint:
    snapshot = fetch(schema.Model(id=str(model)), store=store)
    made: Calibration = calibrate(part, store=store)
    return quantize(snapshot, made, QuantizeRequest(Quantization(), part, **more), store=store)


def asked(model: Path, data: Path, **more: Any) -> schema.Resolved:
    values = {"model.id": str(model), "gpu": "cpu", "calibration.data": str(data), "calibration.seq_len": 64}
    return schema.resolve({**values, "calibration.samples": 2, **more})


@pytest.mark.any_version
def test_a_layer_of_zeros_stays_in_bf16_with_those_that_are_served_with_it(tmp_path: Path) -> None:
    """Blocks that are added to a model begin so (LLaMA Pro: o_proj and down_proj): they add nothing until trained."""
    model = with_zeros(tmp_path / "model", f"{ZERO}.weight", "model.layers.0.self_attn.q_proj.weight")
    store = Store(tmp_path / "out", Output("human"))
    recipe = asked(model, rows(tmp_path, 2), **{"quantization.keep_fp8": ZERO})
    built = pipeline.build(recipe, store, until="checkpoint")
    made = built.checkpoint
    assert made is not None
    assert built.prepared is not None
    qkv = [f"model.layers.0.self_attn.{x}_proj" for x in "qkv"]
    assert sorted(made.facts["layers"]["bf16"]) == sorted([*qkv, ZERO])
    assert sorted(built.prepared.model.modules("bf16")) == sorted([*qkv, ZERO])
    assert made.facts["zero_layers"] == [qkv[0], ZERO]
    found = validate.inspect(made.path)
    assert not found.findings
    assert found.layouts["unified"].linears["kept"] == 4
    assert set(layouts.read_json(made.unified / "hf_quant_config.json")["quantization"]["exclude_modules"]) >= {ZERO}
    assert zeros.find(Tensors(model), catalog.UNKNOWN, {"bf16": [*qkv, ZERO]}) == ()
    dry = Store(tmp_path / "out", Output("quiet"), dry=True)
    states = {stage: state for stage, state, _ in plan(recipe, dry).stages}
    assert states["checkpoint"] == "cached"


def test_zeros_that_a_target_cant_keep_are_refused_before_calibration(tmp_path: Path) -> None:
    model = with_zeros(tmp_path / "model", f"{ZERO}.weight")
    store, data = Store(tmp_path / "out", Output("quiet")), rows(tmp_path, 2)
    recipe = asked(model, data, gpu="sm100", target="engine")
    for run in (
        lambda: pipeline.build(recipe, store, until="checkpoint"),
        lambda: pipeline.measure_layers(recipe, store, proxy=True),
    ):
        with pytest.raises(UnsupportedError, match=f"{ZERO} can't stay in BF16") as caught:
            run()
        assert "are all zero in the model's own files" in caught.value.why
        assert "Keep other layers" not in caught.value.hint
    assert not list((tmp_path / "out" / "store").glob("calibration-*"))
    other = prepare(asked(model, data, gpu="sm100", target="llmapi"), store)
    assert keep_zeros(other, fetch(other.recipe.model, store=store), store.out).zero_layers == (ZERO,)


def test_zeros_that_no_checkpoint_has_keep_nothing(tmp_path: Path) -> None:
    """Layers after the last predict further tokens, and are not loaded."""
    model, store = with_zeros(tmp_path / "model", f"{ZERO}.weight"), Store(tmp_path / "out", Output("quiet"))
    prepared = prepare(asked(model, rows(tmp_path, 2)), store)
    snapshot = fetch(prepared.recipe.model, store=store)
    assert keep_zeros(prepared, snapshot, store.out).zero_layers == (ZERO,)
    config = {**prepared.model.config, "num_hidden_layers": 1}
    fewer = replace(prepared, model=replace(prepared.model, config=config))
    assert keep_zeros(fewer, snapshot, store.out) is fewer


@pytest.mark.any_version
def test_sensitivity_measures_no_layer_of_zeros(tmp_path: Path) -> None:
    model = with_zeros(tmp_path / "model", f"{ZERO}.weight")
    found = pipeline.measure_layers(
        asked(model, rows(tmp_path, 2)), Store(tmp_path / "out", Output("quiet")), proxy=True
    )
    assert found.losses
    assert ZERO not in [one.name for one in found.losses]


def test_all_experts_of_a_layer_stay_in_bf16_if_one_is_zero(tmp_path: Path) -> None:
    model = with_zeros(tmp_path / "moe", "model.layers.1.mlp.experts.2.down_proj.weight", source=MOE)
    recipe = asked(model, rows(tmp_path, 2), gpu="sm120", target="llmapi")
    made = pipeline.build(recipe, Store(tmp_path / "out", Output("quiet")), until="checkpoint").checkpoint
    assert made is not None
    experts = layouts.read_json(MOE / "config.json")["num_experts"]
    assert len(made.facts["layers"]["bf16"]) == 3 * experts
    found = validate.inspect(made.path)
    assert not found.findings
    assert found.layouts["unified"].linears["kept"] >= 3 * experts


def test_a_model_of_zeros_is_refused(tmp_path: Path) -> None:
    every = [f"{module}.weight" for module in exclude.linears(checks_of(LLAMA))]
    model = with_zeros(tmp_path / "model", *every)
    zero = zeros.find(Tensors(model), catalog.UNKNOWN, {})
    assert len(zero) == len(every)
    with pytest.raises(UnsupportedError, match="nothing is left to quantize"):
        zeros.keep({}, zero, [name.removesuffix(".weight") for name in every], catalog.UNKNOWN)


def checks_of(model: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (info.dtype, info.shape) for name, info in Tensors(model).items()}


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32])
def test_zeros_of_both_signs_are_zeros_and_the_smallest_number_is_none(tmp_path: Path, kind: torch.dtype) -> None:
    lone = torch.zeros(64, 4096, dtype=kind)
    lone[-1, -1] = torch.finfo(kind).tiny
    tensors = {"a.q_proj.weight": lone, "b.q_proj.weight": -torch.zeros_like(lone), "c.q_proj.weight": 0 * lone}
    save_file(tensors, tmp_path / "model.safetensors")
    assert zeros.find(Tensors(tmp_path), catalog.UNKNOWN, {}) == ("b.q_proj", "c.q_proj")


def test_one_weight_that_is_not_zero_is_enough() -> None:
    lone = torch.zeros(64, 64)
    lone[-1, -1] = 1e-30
    quantizers._check_not_zero({"a": lone, "b": -lone})
    with pytest.raises(UnsupportedError, match=r"1 linear layers.*: c"):
        quantizers._check_not_zero({"a": lone, "c": -torch.zeros(64, 64)})


@pytest.mark.parametrize(
    ("kind", "says", "not_said"),
    [
        ("not-finite", "the source model", "calib-data"),
        ("weight-scale", "the source model", "calib-data"),
        ("input-scale", "--calib-data", "the source model"),
        ("kv-scale", "--calib-data", "the source model"),
    ],
)
def test_other_rows_are_advised_for_what_is_read_from_rows(kind: str, says: str, not_said: str) -> None:
    with pytest.raises(IntegrityError) as caught:
        Inspection(Path("x"), (finding("unified", "a.weight", "is wrong", kind, here=True),), {}).check()
    assert says in caught.value.hint
    assert not_said not in caught.value.hint


@pytest.mark.any_version
def test_two_rows_are_too_few_unless_asked_for(tmp_path: Path) -> None:
    store = Store(tmp_path / "out", Output("quiet"))
    file = rows(tmp_path, 2)
    with pytest.raises(UsageError, match=r"rows \(2\) have \d\d tokens, too few: at least 2,048") as caught:
        quantized(LLAMA, schema.Calibration(data=str(file)), store)
    [samples] = re.findall(r"--calib-samples (\d+)", caught.value.hint)
    asked = schema.Calibration(data=str(file), samples=int(samples))
    made = quantized(LLAMA, asked, store)
    assert made.facts["calibration_tokens"] < 100
    with pytest.raises(UsageError, match="too few"):  # the one that is in the store now was asked for
        quantized(LLAMA, schema.Calibration(data=str(file)), store)


@pytest.mark.any_version
def test_many_short_rows_are_too_few_too(tmp_path: Path) -> None:
    store = Store(tmp_path / "out", Output("quiet"))
    file = rows(tmp_path, 40, "a")
    with pytest.raises(UsageError, match="too few") as caught:
        quantized(LLAMA, schema.Calibration(data=str(file)), store)
    [samples] = re.findall(r"--calib-samples (\d+)", caught.value.hint)
    assert required_tokens(schema.Calibration(data=str(file), samples=int(samples))) == 0


def test_what_counts_as_asked_for() -> None:
    def least(**values: int) -> int:
        return required_tokens(schema.Calibration(data="builtin:python-docs", **values))

    assert least() == least(samples=32, seq_len=64) == 2048
    assert least(samples=31) == least(samples=100, seq_len=16) == 0


@pytest.mark.parametrize(
    ("config", "native"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, True),
        ({"quantization_config": {"quant_method": "mxfp4"}}, True),
        ({"quantization_config": {"quant_method": "gptq"}}, False),
        ({"quantization_config": {"quant_method": "awq"}}, False),
    ],
)
def test_a_bf16_model_is_asked_for_where_there_is_one(config: dict[str, Any], native: bool) -> None:
    with pytest.raises(UnsupportedError) as caught:
        quantization_signs.check_config(config, "it")
    assert ("never published in BF16" in caught.value.hint) is native


@pytest.mark.parametrize(
    ("tensor", "native"),
    [
        ("model.layers.0.mlp.up_proj.weight_scale_inv", True),
        ("model.layers.0.mlp.experts.gate_up_proj_blocks", True),
        ("model.layers.0.mlp.up_proj.qweight", False),
    ],
)
def test_tensors_tell_the_same(tensor: str, native: bool) -> None:
    with pytest.raises(UnsupportedError) as caught:
        quantization_signs.check_tensors({tensor: ("U8", (4, 4))}, "it")
    assert ("never published in BF16" in caught.value.hint) is native


def test_the_estimate_of_memory_is_that_of_16_bits() -> None:
    facts = checks.read_model(schema.Model(id=str(LLAMA)), Store(Path("/nowhere"), Output("quiet"), dry=True))
    wide = memory.ModelFacts(facts.config, {name: ("F32", shape) for name, (_, shape) in facts.tensors.items()})
    assert memory.calibration_memory(wide, 64) == memory.calibration_memory(facts, 64)
