"""`hessian` and `gptq` layer by layer: which layers are rounded, from which inputs, and killed runs that continue."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from builder.calibration.rows import Calibration, calibrate
from builder.core.errors import UnsupportedError
from builder.core.output import Output
from builder.core.safetensors_io import Tensors
from builder.core.store import Store, key_of
from builder.formats import algorithms, kv_cache, registry
from builder.formats.arithmetic import int8, nvfp4
from builder.formats.assignment import ModelFormats
from builder.hub.snapshot import Snapshot, fetch
from builder.model import streamed
from builder.quantize import (
    expert_inputs,
    streamed_calibration,
    streamed_ranges,
    streamed_states,
    streamed_worker,
    unified_plan,
)
from builder.quantize import streamed as stage
from builder.quantize.algorithms import gptq, hessian
from builder.quantize.algorithms.grids import Nvfp4Blocks
from builder.quantize.algorithms.moments import Moments
from builder.quantize.modelopt import QuantizeRequest
from builder.quantize.source_weights import SourceModel
from builder.quantize.streamed import quantize_streamed
from builder.quantize.streamed_ranges import Seen
from builder.quantize.streamed_solve import LayerSolver
from builder.recipe import schema
from builder.recipe.algorithm import Gptq
from builder.recipe.quantization import Quantization
from tests.support import exports, families

TINY = exports.MODELS["qwen3"]
GPTQ = {"scales": "hessian", "damping": 0.05, "order": "activation", "block_size": 128}
FORMATS = ModelFormats(registry.get("nvfp4"), {}, kv_cache.FP8)
INT8 = ModelFormats(registry.get("int8_static"), {}, kv_cache.AUTO)
PACKED_INT8 = ModelFormats(registry.get("w8a16_int8"), {}, kv_cache.AUTO)


def rows(vocabulary: int, batches: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, vocabulary, (2, 64), generator=generator) for _ in range(batches)]


def opened(directory: Path) -> streamed.StreamedModel:
    model = streamed.open_decoder({"model": str(directory), "trust_remote_code": False}, None, 64)
    if hasattr(model.config, "_experts_implementation"):
        model.config._experts_implementation = "eager"
    return model


def rounded(
    directory: Path,
    partial: Path,
    algorithm: str = "gptq",
    *,
    batches: int = 4,
    ids: Sequence[torch.Tensor] = (),
    formats: ModelFormats = FORMATS,
    **options: Any,
) -> tuple[dict[str, bytes], Mapping[str, Any]]:
    """{tensor: bytes} of what an algorithm rounds on the way through a model, and the facts."""
    source, model = SourceModel.open(directory), opened(directory)
    planned = unified_plan.plan(source.config, source.headers, source.dtype, formats)
    solver = LayerSolver(source, planned, {"algorithm": algorithm, "gptq": GPTQ}, model, partial)
    tensors = [f"{module}.weight" for module in planned.layers]
    ids = ids or rows(model.config.vocab_size, batches)
    _, facts = streamed_calibration.calibrate(model, ids, tensors, partial, solver=solver, **options)
    left = facts.get("left_to_mse" if formats is FORMATS else "left_to_max", {})
    assert facts["solved"].keys() | left.keys() == planned.layers.keys()
    files = sorted(set(facts["solved"].values()))
    stored = Tensors(files[0].parent, files) if files else {}
    return {name: bytes(stored.read(name)) for name in stored}, facts


@pytest.mark.parametrize("algorithm", ["hessian", "gptq"])
def test_layers_are_rounded_with_the_inputs_of_the_whole_model(algorithm: str, tmp_path: Path) -> None:
    """The same as one layer's rounding with moments of the model as transformers runs it."""
    from transformers import AutoModelForCausalLM

    found, facts = rounded(TINY, tmp_path / "checkpoint-0", algorithm, batches=8)
    assert facts["rounded_linears"] == 6 * 7
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.bfloat16)
    names = [f"model.layers.4.mlp.{name}_proj" for name in ("gate", "up")]
    seen: list[torch.Tensor] = []
    model.get_submodule(names[0]).register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, 256)))
    with torch.inference_mode():
        for ids in rows(model.config.vocab_size, 8):
            model(ids, use_cache=False)
    x = torch.cat(seen).double()
    matrix = (x.T @ x / len(x)).float()
    weights = [model.get_submodule(name).weight.detach().float() for name in names]
    scale = nvfp4.scale_of(torch.cat(weights).abs().amax())
    options = gptq.Options.of_job(GPTQ)
    factored = gptq.factor(matrix.clone(), options)
    assert factored is not None
    blocks = torch.stack([matrix[i : i + 16, i : i + 16] for i in range(0, 256, 16)])
    for name, weight in zip(names, weights, strict=True):
        if algorithm == "gptq":
            codes, scales = gptq.round_rows(weight, factored, Nvfp4Blocks(scale), options)
        else:
            codes, scales = hessian.round_rows(weight, blocks, scale)
        stored = torch.frombuffer(bytearray(found[f"{name}.weight"]), dtype=torch.uint8).view(codes.shape)
        assert (nvfp4.unpack(stored) == nvfp4.unpack(codes)).float().mean() > 0.97
        kept = torch.frombuffer(bytearray(found[f"{name}.block_scale"]), dtype=torch.float8_e4m3fn).view(scales.shape)
        assert (kept.float() == scales.float()).float().mean() > 0.97


def test_int8_is_rounded_under_a_scale_for_each_output(tmp_path: Path) -> None:
    """As one layer's rounding with moments of the model as transformers runs it."""
    found, facts = rounded(TINY, tmp_path / "checkpoint-0", batches=8, formats=INT8)
    packed, _ = rounded(TINY, tmp_path / "checkpoint-1", batches=8, formats=PACKED_INT8)
    assert facts["rounded_linears"] == 6 * 7
    name = "model.layers.0.self_attn.v_proj"
    source, number_format = Tensors(TINY), registry.get("int8_static")
    bits = torch.frombuffer(bytearray(source.read(f"{name}.weight")), dtype=torch.bfloat16)
    weight = bits.view(source[f"{name}.weight"].shape).float()
    stored = {key: found[f"{name}.{key}"] for key in ("weight", "weight_scale")}
    codes = torch.frombuffer(bytearray(stored["weight"]), dtype=torch.int8).view(weight.shape)
    scales = torch.frombuffer(bytearray(stored["weight_scale"]), dtype=torch.float32)
    values = number_format.dequantize({"weight": codes, "weight_scale": scales}, torch.float32)
    assert bool(((values - weight).abs() <= 8 * scales[:, None]).all())
    assert not torch.equal(codes, int8.codes(weight, scales[:, None])), "nothing was corrected"
    same = torch.frombuffer(bytearray(packed[f"{name}.weight"]), dtype=torch.uint8).view(weight.shape)
    assert ((same ^ 128).view(torch.int8) == codes).float().mean() > 0.7  # scales are rounded to BF16
    kept = torch.frombuffer(bytearray(packed[f"{name}.weight_scale"]), dtype=torch.float32)
    assert torch.equal(kept, kept.bfloat16().float())


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_an_expert_s_moments_are_those_of_its_own_tokens(family: str, tmp_path: Path) -> None:
    """Each token goes to two experts, so over all experts the moments add up to twice those of the block's input. In
    both kinds of transformers: experts that are modules, and joined ones."""
    families.write(family, tmp_path)
    model, source = opened(tmp_path), SourceModel.open(tmp_path)
    planned = unified_plan.plan(source.config, source.headers, source.dtype, FORMATS)
    place_of = expert_inputs.places(model.model)
    groups = [group for group in planned.groups if ".layers.0." in group[0].module and len(group) == 2]
    wanted = {place_of(group[0].module): 64 for group in groups if ".experts." in group[0].module}
    assert len(wanted) == 4
    seen, inputs, ids = Moments(wanted, blocks=False), list[torch.Tensor](), rows(4096)
    with torch.inference_mode(), model.prelude() as begin:
        states = [begin(batch) for batch in ids]
    with torch.inference_mode(), model.layer(0) as layer:
        block = next(module for name, module in layer.named_modules() if name.rpartition(".")[2] in ("mlp", BLOCK))
        hook = block.register_forward_pre_hook(lambda _, args: inputs.append(args[0].reshape(-1, 64)))
        with streamed_ranges.observed(layer, f"{model.path}.0", Seen(seen)) as routed:
            for state in states:
                model.advance(0, state, state.hidden)
        hook.remove()
    assert sorted(seen.tokens.values()) == sorted(next(iter(routed.layers.values())))
    x = torch.cat(inputs).double()[: sum(batch.numel() for batch in ids)]
    with torch.inference_mode():
        total = sum(seen.tokens[place] * seen.take(place).double() for place in wanted)  # type: ignore[union-attr]
        assert torch.allclose(total, 2 * x.T @ x, rtol=1e-3, atol=1e-3)


BLOCK = "block_sparse_moe"  # Mixtral's mixture in transformers 4


def test_experts_with_few_tokens_are_left_to_mse_and_counted(tmp_path: Path) -> None:
    families.write("qwen3_moe", tmp_path / "model")
    _, facts = rounded(tmp_path / "model", tmp_path / "checkpoint-0", batches=4)
    left = facts["left_to_mse"]
    assert left
    assert set(left.values()) <= {"few tokens", "no token"}
    assert all(".experts." in module for module in left)
    assert facts["rounded_linears"] == 32 - len(left)
    _, facts = rounded(tmp_path / "model", tmp_path / "checkpoint-3", batches=4, formats=INT8)
    assert facts["left_to_max"] == left, "the same experts, which INT8 leaves to max"
    _, facts = rounded(tmp_path / "model", tmp_path / "checkpoint-1", "hessian", batches=4)
    assert "few tokens" not in facts.get("left_to_mse", {}).values()
    _, facts = rounded(tmp_path / "model", tmp_path / "checkpoint-2", "hessian", ids=[torch.arange(20)[None]])
    assert "few tokens" in facts["left_to_mse"].values()
    assert facts["rounded_linears"] >= 4 * 2, "attention has seen all 20 tokens"


@pytest.mark.parametrize("family", ["deepseek_v3", "nemotron_h", "qwen3_next", "phi3", "gemma4_text"])
def test_other_kinds_of_layers_are_rounded_too(family: str, tmp_path: Path) -> None:
    try:
        families.write(family, tmp_path / "model")
    except ValueError as error:
        pytest.skip(f"not in this transformers: {error}")
    found, facts = rounded(tmp_path / "model", tmp_path / "checkpoint-0", "hessian")
    assert all(name.rpartition(".")[2] in ("weight", "block_scale") for name in found)
    assert len(facts.get("left_to_mse", {})) <= 1  # Gemma 4's projection before the first layer


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dense model of 4 small layers."""
    monkeypatch.setattr(families, "MODELS", {"qwen3": {"num_hidden_layers": 4}})
    families.write("qwen3", tmp_path / "model")
    return tmp_path / "model"


def test_a_layer_whose_moments_do_not_fit_runs_its_rows_several_times(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = rounded(small, tmp_path / "whole")
    monkeypatch.setattr(algorithms, "MOMENTS_SHARE", 0)
    parts, facts = rounded(small, tmp_path / "parts")
    assert parts == whole
    assert len(set(facts["solved"].values())) == 4 * 4  # qkv, o, gate and up, down


class Killed(BaseException):
    """Stands in for a kill: nothing after it runs."""


@pytest.mark.parametrize(
    ("damage", "on_disk", "formats"),
    [
        ("", False, FORMATS),
        ("", True, FORMATS),
        ("file", False, FORMATS),
        ("missing", False, FORMATS),
        ("", True, INT8),
    ],
)
def test_a_killed_run_continues_to_the_same_bytes(
    damage: str, on_disk: bool, formats: ModelFormats, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, facts = rounded(small, tmp_path / "whole", on_disk=on_disk, formats=formats)
    monkeypatch.setattr(streamed_states, "SAVE_SHARE", 0)
    partial, solve, ran = tmp_path / "killed", LayerSolver.solve, list[int]()

    def dying(self: Any, index: int, *rest: Any) -> Any:
        ran.append(index)
        if ran == [0, 1, 2]:
            raise Killed
        return solve(self, index, *rest)

    monkeypatch.setattr(LayerSolver, "solve", dying)
    with pytest.raises(Killed):
        rounded(small, partial, on_disk=on_disk, formats=formats)
    file = partial.with_name("killed-0001-0000.safetensors")
    if damage == "file":
        data = file.read_bytes()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage:
        file.unlink()
    again, found = rounded(small, partial, on_disk=on_disk, formats=formats)
    assert again == whole
    assert {**found, "solved": 0} == {**facts, "solved": 0}
    assert ran[3:] == ([0, 1, 2, 3] if damage else [2, 3])
    assert not list(tmp_path.glob(".*"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store", Output("quiet"))


def inputs(store: Store, **values: Any) -> tuple[Snapshot, Calibration, QuantizeRequest]:
    part = schema.Calibration(data=str(exports.DATA / "eval" / "prose.jsonl"), samples=8, seq_len=64)
    asked = QuantizeRequest(Quantization.model_validate({"algorithm": "gptq", **values}), part)
    return fetch(schema.Model(id=str(TINY)), store=store), calibrate(part, store=store), asked


def test_a_checkpoint_has_what_was_rounded_and_ranges_of_any_other(store: Store) -> None:
    made = quantize_streamed(*inputs(store, algorithm="gptq"), store=store)
    plain = quantize_streamed(*inputs(store, algorithm="max"), store=store)
    assert (made.facts["algorithm"], made.facts["rounded_linears"], plain.facts["algorithm"]) == ("gptq", 42, "max")
    ours, theirs = exports.held(made.path / "unified"), exports.held(plain.path / "unified")
    changed = {name.rpartition(".")[2] for name in ours if ours[name] != theirs[name]}
    assert ours.keys() == theirs.keys()
    assert changed == {"weight", "weight_scale"}
    assert not list((store.root / "partial").iterdir())


def test_int8_by_gptq_has_the_tensors_and_ranges_of_int8_by_max(store: Store) -> None:
    more = {"format": "int8_static", "kv_cache_dtype": "auto", "layouts": "compressed-tensors"}
    made, plain = (quantize_streamed(*inputs(store, algorithm=name, **more), store=store) for name in ("gptq", "max"))
    assert (made.facts["algorithm"], made.facts["rounded_linears"]) == ("gptq", 42)
    ours, theirs = exports.held(made.path / "unified"), exports.held(plain.path / "unified")
    assert ours.keys() == theirs.keys()
    assert {name.rpartition(".")[2] for name in ours if ours[name] != theirs[name]} == {"weight", "weight_scale"}


def test_a_killed_stage_continues_to_the_same_checkpoint(store: Store, tmp_path: Path) -> None:
    made = quantize_streamed(*inputs(store), store=store)
    job = json.loads(Path(made.facts["job"]).read_text())
    partial = tmp_path / "partial" / "checkpoint-0"
    again = {**job, "destination": str(tmp_path / "again"), "partial": str(partial)}
    (tmp_path / "job.json").write_text(json.dumps(again))
    worker = [sys.executable, "-m", "builder.quantize.streamed_worker", str(tmp_path / "job.json")]
    with subprocess.Popen(worker, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        while child.poll() is None and not partial.with_name("checkpoint-0-0002-0000.safetensors").exists():
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    subprocess.run(worker, check=True, capture_output=True)
    assert exports.held(tmp_path / "again" / "unified") == exports.held(made.path / "unified")


def test_every_value_of_gptq_is_in_the_key(store: Store) -> None:
    other = {"scales": "max", "damping": 0.5, "order": "none", "block_size": 16}
    assert other.keys() == Gptq.model_fields.keys()
    keys = {key_of("checkpoint", stage._ingredients(*inputs(store, gptq={name: other[name]}))) for name in other}
    keys.add(key_of("checkpoint", stage._ingredients(*inputs(store))))
    assert len(keys) == 5


def test_too_few_tokens_for_the_widest_layer_are_refused_before_anything_is_computed() -> None:
    source = SourceModel.open(TINY)
    planned = unified_plan.plan(source.config, source.headers, source.dtype, FORMATS)
    streamed_worker._check_enough(rows(4000, 3), planned, FORMATS)
    for formats, instead in ((FORMATS, "hessian"), (INT8, "max")):
        planned = unified_plan.plan(source.config, source.headers, source.dtype, formats)
        with pytest.raises(UnsupportedError, match="256 calibration tokens are too few for algorithm gptq") as caught:
            streamed_worker._check_enough(rows(4000, 2), planned, formats)
        assert "768 inputs and needs 384 tokens" in caught.value.why
        assert f"--algorithm {instead}" in caught.value.hint
