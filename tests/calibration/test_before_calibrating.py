"""What is refused before the first calibration batch (weights of zeros, too few tokens), and how to ask for it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from builder.calibration.rows import Calibration, calibrate, required_tokens
from builder.checkpoint import validate
from builder.checkpoint.layouts import Checkpoint
from builder.checkpoint.validate import Inspection, Problem
from builder.core.errors import IntegrityError, UnsupportedError, UsageError
from builder.core.output import Output
from builder.core.store import Store
from builder.hub.snapshot import fetch
from builder.model import quantization_signs
from builder.preflight import checks, memory
from builder.quantize import exclude, quantizers
from builder.quantize.modelopt import QuantizeRequest, quantize
from builder.recipe import schema
from builder.recipe.quantization import Quantization

LLAMA = Path(__file__).parents[1] / "data" / "arch-variants" / "llama"
ZERO = "model.layers.1.self_attn.o_proj"
TEXT = "How a text becomes tokens, and tokens become numbers that a model multiplies."


def rows(directory: Path, count: int, text: str = TEXT) -> Path:
    file = directory / f"{count}.jsonl"
    file.write_text("".join(json.dumps({"text": f"{n} {text}"}) + "\n" for n in range(count)))
    return file


def with_zeros(directory: Path, *names: str, changes: Any = torch.zeros_like) -> Path:
    shutil.copytree(LLAMA, directory)
    tensors = load_file(directory / "model.safetensors")
    tensors |= {name: changes(tensors[name]) for name in names}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def quantized(model: Path, part: schema.Calibration, store: Store, **more: Any) -> Checkpoint:
    snapshot = fetch(schema.Model(id=str(model)), store=store)
    made: Calibration = calibrate(part, store=store)
    return quantize(snapshot, made, QuantizeRequest(Quantization(), part, **more), store=store)


def test_a_layer_of_zeros_is_refused_with_a_way_that_works(tmp_path: Path) -> None:
    """Blocks that are added to a model begin so (LLaMA Pro: o_proj and down_proj): they add nothing until trained."""
    model = with_zeros(tmp_path / "model", f"{ZERO}.weight")
    store = Store(tmp_path / "out", Output("quiet"))
    part = schema.Calibration(data=str(rows(tmp_path, 2)), samples=2, seq_len=64)
    with pytest.raises(UnsupportedError, match=f"nothing but zeros: {re.escape(ZERO)}") as caught:
        quantized(model, part, store)
    [advised] = re.findall(r"--keep-bf16 '([^']+)'", caught.value.hint)
    facts = checks.read_model(schema.Model(id=str(model)), store)
    kept = exclude.keep([advised], exclude.linears(facts.tensors))
    made = quantized(model, part, store, layers={"bf16": kept})
    found = validate.inspect(made.path)
    assert not found.findings
    assert all(layout.linears["kept"] == 1 for layout in found.layouts.values())
    with pytest.raises(UnsupportedError, match="nothing but zeros"):
        quantized(model, part, store, layers={"fp8": [ZERO]})


def test_one_weight_that_is_not_zero_is_enough() -> None:
    lone = torch.zeros(64, 64)
    lone[-1, -1] = 1e-30
    quantizers._check_not_zero({"a": lone, "b": -lone})
    with pytest.raises(UnsupportedError, match=r"1 linear layers.*: c"):
        quantizers._check_not_zero({"a": lone, "c": -torch.zeros(64, 64)})


@pytest.mark.parametrize(
    ("tensor", "says", "not_said"),
    [
        ("model.layers.0.mlp.up_proj.weight", "the cause is the model", "calib-data"),
        ("model.embed_tokens.weight", "the cause is the model", "calib-data"),
        ("model.layers.0.mlp.up_proj.input_scale", "other --calib-data", "the model"),
        ("transformer.layers.0.attention.kv_cache_scaling_factor", "other --calib-data", "the model"),
    ],
)
def test_other_rows_are_advised_for_what_is_read_from_rows(tensor: str, says: str, not_said: str) -> None:
    with pytest.raises(IntegrityError) as caught:
        Inspection(Path("x"), (Problem("unified", tensor, "is all zero"),), {}).check()
    assert says in caught.value.hint
    assert not_said not in caught.value.hint


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


def test_many_short_rows_are_too_few_too(tmp_path: Path) -> None:
    store = Store(tmp_path / "out", Output("quiet"))
    file = rows(tmp_path, 40, "a")
    with pytest.raises(UsageError, match="too few") as caught:
        quantized(LLAMA, schema.Calibration(data=str(file)), store)
    [samples] = re.findall(r"--calib-samples (\d+)", caught.value.hint)
    assert quantized(LLAMA, schema.Calibration(data=str(file), samples=int(samples)), store)


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
