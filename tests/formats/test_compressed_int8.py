"""INT8 in the compressed-tensors layout: arithmetic, bytes, configuration and outputs are the library's own.

The library is compressed-tensors; where the environment has none (TensorRT-LLM 1.2.1's), its comparisons are skipped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import exports
import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from builder import pipeline
from builder.checkpoint import validate
from builder.checkpoint.conversion import convert
from builder.checkpoint.description import describe_directory
from builder.core.errors import IntegrityError, UnsupportedError, UsageError
from builder.core.output import Output
from builder.core.safetensors_io import NewTensor, Tensors
from builder.core.store import Store
from builder.evaluate.runners import local
from builder.formats import registry
from builder.formats.arithmetic import int8
from builder.formats.arithmetic.dtypes import DTYPES
from builder.formats.kernels import integers
from builder.pipeline import Built
from builder.preflight import checks
from builder.preflight.prepare import prepare
from builder.recipe import schema
from builder.recipe.schema import Resolved

STATIC, DYNAMIC, WEIGHTS = (registry.get(name) for name in ("int8_static", "int8_dynamic", "w8a16_int8"))
SOURCE = exports.MODELS["llama"]
ROWS = {"calibration.data": "builtin:python-docs", "calibration.samples": 16, "calibration.seq_len": 64}
TYPES = {**DTYPES, "I64": torch.int64}


def resolved(name: str, **more: Any) -> Resolved:
    asked = {"model.id": str(SOURCE), "gpu": "sm90", "quantization.format": name, "quality.check": False}
    rows = ROWS if name == STATIC.name else {"calibration.samples": 0}
    return schema.resolve({**asked, **rows, **more})


def quantized(root: Path, name: str, **more: Any) -> Built:
    """What `builder quantize` makes."""
    return pipeline.build(resolved(name, **more), Store(root, Output("quiet")), until="checkpoint")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Built]:
    """The model in each of the formats, without down_proj where inputs have one scale for a layer."""
    root, kept = tmp_path_factory.mktemp("int8"), {"quantization.keep_bf16": ["*.down_proj"]}
    ways = {STATIC.name: {"quantization.memory": "low", **kept}}
    return {one.name: quantized(root, one.name, **ways.get(one.name, {})) for one in (STATIC, DYNAMIC, WEIGHTS)}


def compressed(built: Built) -> Path:
    assert built.layouts is not None
    return built.layouts.path / "compressed_tensors"


def unified(built: Built) -> Path:
    assert built.checkpoint is not None
    return built.checkpoint.unified


def tensor(tensors: Tensors, name: str) -> Tensor:
    info = tensors[name]
    return torch.frombuffer(bytearray(tensors.read(name)), dtype=TYPES[info.dtype]).reshape(info.shape)


def theirs(one: str, part: str = "weights") -> Any:
    """compressed-tensors' arguments of a format."""
    from compressed_tensors.quantization import QuantizationArgs

    scheme = registry.get(one).compressed_tensors
    assert scheme is not None
    return QuantizationArgs(**dict(scheme.weights if part == "weights" else scheme.inputs or {}))


matrices = st.tuples(st.integers(0, 2**31), st.integers(1, 6), st.integers(1, 40), st.floats(1e-20, 1e4))


def matrix(seed: int, rows: int, inputs: int, scale: float) -> Tensor:
    """Weights with a row of zeros and ties: multiples of half a step."""
    made = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed))
    made[0] = (made[0] * 20).round() / 2
    made[rows // 2, ::2] = 0
    return made * scale if seed % 7 else torch.zeros(rows, inputs)


@settings(max_examples=80, deadline=None)
@given(matrices)
def test_scales_and_codes_are_the_librarys(made_of: tuple[int, int, int, float]) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    weight, arguments = matrix(*made_of), theirs(DYNAMIC.name)
    scale, zero = calculate_qparams(weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True), arguments)
    assert torch.equal(int8.scales_of(weight.abs().amax(-1, keepdim=True)), scale)
    codes = quantize(weight, scale, zero, arguments, dtype=torch.int8)
    assert torch.equal(int8.codes(weight, scale), codes)
    assert torch.equal(int8.round_trip(weight, scale), codes * scale)
    packed = DYNAMIC.pack(weight.view(torch.int32).numpy(), "F32", 1.0, rounded_to="F32")
    assert torch.equal(torch.from_numpy(packed["weight"]).view(torch.int8), codes)
    assert torch.equal(torch.from_numpy(packed["weight_scale"]), scale[:, 0])


@settings(max_examples=60, deadline=None)
@given(matrices, st.sampled_from(["BF16", "F16", "F32"]))
def test_scales_in_the_models_type_are_numbers_of_it(made_of: tuple[int, int, int, float], kind: str) -> None:
    weight = matrix(*made_of).clamp(-6e4, 6e4).to(DTYPES[kind])
    bits = weight.view({"F32": torch.int32}.get(kind, torch.int16)).numpy()
    scales = torch.from_numpy(integers.scales_of(bits, kind, rounded_to=kind, kind=kind))
    assert torch.equal(scales, int8.scales_of(weight.abs().amax(-1), DTYPES[kind]))
    assert torch.equal(scales, scales.to(DTYPES[kind]).float())
    assert bool((scales > 0).all())


@settings(max_examples=60, deadline=None)
@given(matrices)
def test_inputs_are_rounded_as_by_the_library(made_of: tuple[int, int, int, float]) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    x = matrix(*made_of)[None]
    token = theirs(DYNAMIC.name, "inputs")
    scale, zero = compute_dynamic_scales_and_zp(x, token, torch.nn.Identity())
    assert torch.equal(DYNAMIC.round_input(x, {}), fake_quantize(x, scale, zero, token))
    stored = {"input_scale": torch.tensor([made_of[3] / 127.5])}
    whole = theirs(STATIC.name, "inputs")
    assert torch.equal(STATIC.round_input(x, stored), fake_quantize(x, stored["input_scale"], None, whole))
    assert WEIGHTS.round_input(x, {}) is x


def packed_layers(built: Built) -> Iterator[tuple[str, Any, dict[str, Tensor], dict[str, Tensor]]]:
    """(module, its format, its tensors in the unified layout, those in compressed-tensors) of each quantized layer."""
    here, there = Tensors(unified(built)), Tensors(compressed(built))
    for module, one in describe_directory(unified(built)).layers.items():
        if one is not registry.BF16:
            ours = {part.name: tensor(here, f"{module}.{part.unified}") for part in one.tensors}
            names = [name for name in there if name.startswith(f"{module}.")]
            yield module, one, ours, {name.removeprefix(f"{module}."): tensor(there, name) for name in names}


@pytest.mark.parametrize("name", [STATIC.name, DYNAMIC.name, WEIGHTS.name])
def test_the_library_compresses_to_our_bytes_and_has_our_weights(made: dict[str, Built], name: str) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    stated = json.loads((compressed(made[name]) / "config.json").read_text())["quantization_config"]
    [scheme] = QuantizationConfig(**stated).config_groups.values()
    compressor: Any = BaseCompressor.get_value_from_registry(scheme.format)
    source, compared = Tensors(SOURCE), 0
    for module, one, ours, stored in packed_layers(made[name]):
        weight = compressor.decompress(dict(stored), scheme)["weight"]
        assert torch.equal(weight, one.dequantize(ours, torch.float32)), module
        original = {"weight": tensor(source, f"{module}.weight"), "weight_scale": stored["weight_scale"]}
        for leaf, again in compressor.compress(original, scheme).items():
            assert torch.equal(again, stored[leaf]), f"{module}.{leaf}"
            assert again.dtype == stored[leaf].dtype
        compared += 1
    assert compared == (12 if name == STATIC.name else 14)


@pytest.mark.parametrize("name", [STATIC.name, DYNAMIC.name, WEIGHTS.name])
def test_transformers_loads_it_and_computes_what_the_evaluation_does(made: dict[str, Built], name: str) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    ids = torch.arange(3, 400, 9)
    job = {
        "model": str(SOURCE), "unified": str(unified(made[name])), "kv_cache_dtype": "auto", "dtype": "float32",
        "trust_remote_code": False, "batch_tokens": 256,
    }  # fmt: skip
    with torch.inference_mode(), local.checkpoint(job) as runner:
        [ours] = runner.logits([ids.numpy()])
        model = AutoModelForCausalLM.from_pretrained(compressed(made[name]), dtype=torch.float32)
        library = model(ids[None], use_cache=False).logits[0]
        original = AutoModelForCausalLM.from_pretrained(SOURCE, dtype=torch.float32)(ids[None]).logits[0]
    loss = (ours - original).norm() / original.norm()
    # A last bit of an input, where sums differ, decides a code now and then.
    assert (ours - library).norm() / original.norm() < 0.2 * loss
    assert 1e-4 < loss < 0.1


@pytest.mark.parametrize("name", [STATIC.name, DYNAMIC.name, WEIGHTS.name])
def test_both_layouts_are_sound_and_lead_to_each_other(made: dict[str, Built], name: str, tmp_path: Path) -> None:
    built = made[name]
    assert built.checkpoint is not None
    assert not built.checkpoint.tensorrt_llm.exists()
    for path in (built.checkpoint.path, compressed(built)):
        assert not validate.inspect(path).findings
    one, other = describe_directory(unified(built)), describe_directory(compressed(built))
    assert one.layers == other.layers
    assert {format.name for format in one.layers.values()} == {name, *(["bf16"] if name == STATIC.name else [])}
    assert one.producer == other.producer
    assert one.producer.name == "trtllm-builder"
    with pytest.raises(UnsupportedError, match="TensorRT-LLM has no layout for INT8"):
        convert(compressed(built), tmp_path / "unified", "unified")
    convert(unified(built), tmp_path / "there", "compressed_tensors")
    assert (tmp_path / "there" / "model.safetensors").read_bytes() == (
        compressed(built) / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("name", [STATIC.name, DYNAMIC.name, WEIGHTS.name])
def test_the_bytes_are_those_that_were_foretold(made: dict[str, Built], name: str) -> None:
    built = made[name]
    assert built.prepared is not None
    sizes = checks.sizes(built.prepared.recipe, built.prepared.model, built.prepared.serving)
    there, here = (sum(i.nbytes for i in Tensors(one(built)).values()) for one in (compressed, unified))
    assert (sizes.disk["checkpoint"], sizes.disk["layouts"]) == (here, there)
    assert (sizes.checkpoint, sizes.disk["engine"], sizes.disk["ranks"]) == (0, 0, 0)


def test_the_whole_model_in_memory_gives_the_same_bytes_and_a_kv_cache_beside(
    made: dict[str, Built], tmp_path: Path
) -> None:
    asked = {"quantization.keep_bf16": ["*.down_proj"], "quantization.kv_cache_dtype": "fp8"}
    whole = quantized(tmp_path, STATIC.name, **{"quantization.memory": "whole", **asked})
    ours, other = (Tensors(compressed(one)) for one in (whole, made[STATIC.name]))
    assert {name: ours.read(name) for name in other} == {name: other.read(name) for name in other}
    assert {name.rpartition(".")[2] for name in ours if name not in other} == {"k_scale", "v_scale"}
    stated = json.loads((compressed(whole) / "config.json").read_text())["quantization_config"]
    assert stated["kv_cache_scheme"]["num_bits"] == 8
    assert not validate.inspect(compressed(whole)).findings


@pytest.mark.parametrize("name", [STATIC.name, DYNAMIC.name, WEIGHTS.name])
def test_a_model_in_this_form_is_taken_over(made: dict[str, Built], name: str, tmp_path: Path) -> None:
    """As one of llm-compressor: described, converted, and measured in the builder's own layout."""
    asked = {"model.id": str(compressed(made[name])), "gpu": "cpu", "model.original": str(SOURCE)}
    store = Store(tmp_path, Output("quiet"))
    built = pipeline.build(schema.resolve(asked), store, until="checkpoint")
    assert built.checkpoint is not None
    assert not built.checkpoint.tensorrt_llm.exists()
    ours, other = Tensors(built.checkpoint.unified), Tensors(unified(made[name]))
    assert {n: ours.read(n) for n in ours} == {n: other.read(n) for n in other}
    with pytest.raises(UnsupportedError, match="TensorRT-LLM does not serve INT8") as refused:
        pipeline.build(schema.resolve(asked), store)
    assert "builder eval" in refused.value.hint


@pytest.mark.parametrize("gpu", ["cpu", "sm90", "sm120"])
@pytest.mark.parametrize("until", ["engine", "repository", "smoke"])
def test_what_would_serve_it_is_refused_before_any_work(gpu: str, until: str, tmp_path: Path) -> None:
    store = Store(tmp_path, Output("quiet"))
    with pytest.raises(UnsupportedError, match=r"TensorRT-LLM does not serve INT8 W8A8 \(dynamic\)") as refused:
        prepare(resolved(DYNAMIC.name, gpu=gpu), store, layouts="engine" in pipeline.stages_until(until))
    assert f"builder quantize --model {SOURCE} --gpu {gpu} --format int8_dynamic --data-free`" in refused.value.hint
    with pytest.raises(UnsupportedError) as refused:
        prepare(resolved(STATIC.name, gpu=gpu), store, layouts="engine" in pipeline.stages_until(until))
    assert "--format int8_static`" in refused.value.hint, "its ranges need rows"
    assert not any(tmp_path.iterdir())


def test_its_only_layout_is_its_default() -> None:
    found = resolved(DYNAMIC.name)
    assert found.recipe.quantization.layouts == ("compressed-tensors",)
    assert found.origins["quantization.layouts"] == "format int8_dynamic: its only layout"
    assert found.recipe.quantization.kv_cache_dtype == "auto"
    for asked in ("unified", "tensorrt_llm,compressed-tensors"):
        with pytest.raises(UsageError, match=f"has the compressed-tensors layout alone, and layouts is {asked};"):
            resolved(DYNAMIC.name, **{"quantization.layouts": asked})
    assert resolved(DYNAMIC.name, **{"quantization.layouts": "unified,compressed-tensors"})


def test_ranges_of_inputs_are_not_assumed() -> None:
    with pytest.raises(UsageError, match="integers would round most inputs to zero; use format int8_dynamic"):
        resolved(STATIC.name, **{"calibration.samples": 0})


def test_what_it_packs_must_be_whole(made: dict[str, Built], tmp_path: Path) -> None:
    assert WEIGHTS.fits((8, 64))
    assert "not a multiple of 4" in WEIGHTS.misfit((8, 66))
    name, built = "model.layers.0.mlp.up_proj.weight_shape", made[WEIGHTS.name]
    shape = tensor(Tensors(compressed(built)), name)
    wrong = NewTensor(name, "I64", (2,), [(shape - torch.tensor([0, 2])).numpy().tobytes()])
    damaged = exports.rewrite(compressed(built), tmp_path / "wrong", {name: wrong})
    assert [found.tensor for found in validate.inspect(damaged).findings] == [name]
    with pytest.raises(IntegrityError, match="packs weights without padding"):
        pipeline.build(
            schema.resolve({"model.id": str(damaged), "gpu": "cpu"}), Store(tmp_path, Output("quiet")),
            until="checkpoint",
        )  # fmt: skip
