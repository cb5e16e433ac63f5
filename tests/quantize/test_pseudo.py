"""--save-pseudo and `convert --to pseudo`: the dequantized weights as an ordinary model, and its scales.

What is checked: transformers loads it, its weights are those that the checkpoint stands for, and quantizing it again
gives the same codes.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import rewrite
from hypothesis import given, settings
from hypothesis import strategies as st

from builder import pipeline
from builder.checkpoint.conversion import Options, convert
from builder.checkpoint.layouts import Checkpoint, hf_quant_config
from builder.core.errors import BuilderError, UnsupportedError, UsageError
from builder.core.output import Output
from builder.core.safetensors_io import NewTensor, Tensors
from builder.core.store import Store
from builder.formats.arithmetic import int8, nvfp4
from builder.formats.arithmetic.dtypes import read
from builder.formats.declared import declared
from builder.quantize import stored_model
from builder.quantize.pseudo import LEAST_SCALE, write_pseudo
from builder.quantize.pseudo_stage import DIRECTORY, convert_to_pseudo
from builder.recipe import schema
from builder.recipe.schema import Resolved

TINY = Path(__file__).parents[1] / "data" / "tiny-qwen3"
QUIET = Output("quiet")
WEIGHTS = "pseudo_quantized_model-4bit-16g.safetensors"
SCALES = "pseudo_quantized_model-4bit-16g_scales.safetensors"


def resolve(**more: Any) -> Resolved:
    flags = {"model.id": str(TINY), "gpu": "cpu", "calibration.samples": 0, "quality.check": False}
    return schema.resolve({**flags, **{key.replace("__", "."): value for key, value in more.items()}})


def quantized(store: Store, **more: Any) -> pipeline.Built:
    return pipeline.build(resolve(**more), store, until="checkpoint")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("pseudo") / "artifacts", QUIET)


@pytest.fixture(scope="module")
def built(store: Store) -> pipeline.Built:
    return quantized(store, quantization__save_pseudo="bf16", quantization__keep_fp8=["*.layers.1.mlp.down_proj"])


@pytest.fixture(scope="module")
def checkpoint(built: pipeline.Built) -> Checkpoint:
    assert built.checkpoint is not None
    return built.checkpoint


@pytest.fixture(scope="module")
def pseudo(built: pipeline.Built) -> Path:
    assert built.pseudo is not None
    return built.pseudo.path / DIRECTORY


def tensors(directory: Path, file: str) -> dict[str, torch.Tensor]:
    stored = Tensors(directory, [directory / file])
    return {name: read(stored, name) for name in stored}


def codes(weight: torch.Tensor, block_scale: torch.Tensor, scale_2: torch.Tensor) -> torch.Tensor:
    """The codes of weights under stored scales; -0 counts as 0, which is the same value."""
    scales = (block_scale.float() * scale_2).unsqueeze(-1)
    found = nvfp4.encode(weight.float().reshape(*block_scale.shape, nvfp4.BLOCK) / scales)
    return torch.where(found == 8, 0, found).reshape(weight.shape)


def plain(packed: torch.Tensor) -> torch.Tensor:
    found = nvfp4.unpack(packed)
    return torch.where(found == 8, 0, found)


def test_it_is_an_ordinary_model(pseudo: Path, checkpoint: Checkpoint) -> None:
    """transformers loads it without knowing of a quantization, and finds the weights that the checkpoint stands for."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert "quantization_config" not in json.loads((pseudo / "config.json").read_text())
    model, info = AutoModelForCausalLM.from_pretrained(pseudo, dtype="auto", output_loading_info=True)
    assert not [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    assert model.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(pseudo)("x = 1").input_ids
    formats = declared(hf_quant_config(checkpoint.unified)["quantization"])
    theirs = stored_model.Dequantized(Tensors(checkpoint.unified), formats, torch.bfloat16)
    ours = model.state_dict()
    assert {name for name in theirs} <= set(ours)
    for name in theirs:
        assert torch.equal(ours[name], theirs.tensor(name)), name


def test_the_scales_are_beside_it(pseudo: Path, checkpoint: Checkpoint) -> None:
    found, stored = tensors(pseudo, SCALES), Tensors(checkpoint.unified)
    layer = "model.layers.0.self_attn.q_proj"
    for name, theirs in (("per_block_scale", "weight_scale"), ("scale_2", "weight_scale_2")):
        assert torch.equal(found[f"{layer}.{name}"].float(), read(stored, f"{layer}.{theirs}").float())
    assert found[f"{layer}.per_block_scale"].shape == (256, 16)
    assert torch.equal(
        found["model.layers.1.mlp.down_proj.scale"],
        read(stored, "model.layers.1.mlp.down_proj.weight_scale"),
    )
    assert not [name for name in found if name.endswith("g_idx")]
    # scale_2 is the largest magnitude over 6 x 448, of all layers that are multiplied as one.
    source = Tensors(TINY)
    group = [read(source, f"model.layers.0.self_attn.{one}_proj.weight") for one in "qkv"]
    largest = max(one.abs().max() for one in group).float()
    assert found[f"{layer}.scale_2"] == largest / (6 * 448)


def test_quantize_config_says_what_it_is(pseudo: Path) -> None:
    config = json.loads((pseudo / "quantize_config.json").read_text())
    same = {"bits": 4, "group_size": 16, "desc_act": False, "format": "nvfp4", "algorithm": "max", "dtype": "bfloat16"}
    assert same.items() <= config.items()
    assert config["values"] == {"nvfp4": "code x per_block_scale x scale_2", "fp8": "code x scale"}
    assert config["layers"]["fp8"] == ["model.layers.1.mlp.down_proj"]
    assert config["producer"]["name"] == "modelopt"
    assert (pseudo / f"{config['model_file_base_name']}.safetensors").is_file()


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_stored_scales_give_the_same_codes(dtype: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    written = write_pseudo(checkpoint.unified, tmp_path, dtype)
    assert not written.inexact
    weights, scales, stored = tensors(tmp_path, WEIGHTS), tensors(tmp_path, SCALES), Tensors(checkpoint.unified)
    layers = [name.removesuffix(".scale_2") for name in scales if name.endswith(".scale_2")]
    assert len(layers) == 41
    for layer in layers:
        again = codes(weights[f"{layer}.weight"], scales[f"{layer}.per_block_scale"], scales[f"{layer}.scale_2"])
        assert torch.equal(again, plain(read(stored, f"{layer}.weight"))), layer


def test_quantizing_it_again_gives_the_same_checkpoint(pseudo: Path, checkpoint: Checkpoint, store: Store) -> None:
    """With scales by max, which the largest magnitudes of the dequantized weights give again."""
    again = quantized(store, model__id=str(pseudo), quantization__keep_fp8=["*.layers.1.mlp.down_proj"]).checkpoint
    assert again is not None
    ours, theirs = Tensors(again.unified), Tensors(checkpoint.unified)
    assert set(ours) == set(theirs)
    for name in theirs:
        one, other = (read(side, name) for side in (ours, theirs))
        if one.dtype == torch.uint8:
            one, other = plain(one), plain(other)
        assert torch.equal(one.float(), other.float()), name


values = st.floats(-4, 4, width=32) | st.sampled_from([0.0, -0.0, 0.25, 1e-4, -1e-6])


@settings(max_examples=40, deadline=None)
@given(st.lists(values, min_size=64, max_size=64), st.integers(-40, 10), st.sampled_from(["bf16", "fp16"]))
def test_codes_are_found_again(numbers: list[float], exponent: int, dtype: str) -> None:
    """In BF16 under any scales, in FP16 where they are not below LEAST_SCALE."""
    weight = (torch.tensor(numbers) * 2.0**exponent).reshape(2, 32)
    if not weight.any() or not torch.isfinite(nvfp4.scale_of(weight.abs().max()) * 448 * 6):
        return
    packed, block_scale, scale_2 = nvfp4.quantize(weight)
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    made = nvfp4.dequantize(packed, block_scale, scale_2, kind)
    scales = (block_scale.float() * scale_2).repeat_interleave(nvfp4.BLOCK, -1)
    held = torch.ones_like(scales, dtype=torch.bool) if dtype == "bf16" else scales >= LEAST_SCALE
    assert torch.equal(codes(made, block_scale, scale_2)[held], plain(packed)[held])


@settings(max_examples=40, deadline=None)
@given(st.lists(values, min_size=64, max_size=64), st.integers(-20, 10))
def test_max_finds_its_own_scales_again(numbers: list[float], exponent: int) -> None:
    """`max` gives the largest weight of a block the code 6, whose value in BF16 gives the same scale. What another
    algorithm chose is not found so: a block whose largest code is 4 would get a smaller scale."""
    weight = (torch.tensor(numbers) * 2.0**exponent).bfloat16().reshape(2, 32)
    if not weight.any():
        return
    packed, block_scale, scale_2 = nvfp4.quantize(weight)
    made = nvfp4.dequantize(packed, block_scale, scale_2, torch.bfloat16)
    again, scales, whole = nvfp4.quantize(made)
    assert whole == scale_2
    assert torch.equal(plain(again), plain(packed))
    used = plain(packed).reshape(*block_scale.shape, -1).bool().any(-1)
    assert torch.equal(scales.float()[used], block_scale.float()[used])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 15), min_size=32, max_size=32),
    st.lists(st.integers(1, 126), min_size=2, max_size=2),
    st.integers(-30, 10),
)
def test_any_codes_under_any_scales_are_found_again(chosen: list[int], scales: list[int], exponent: int) -> None:
    """Whatever an algorithm chooses, BF16 is precise enough for its values."""
    packed = nvfp4.pack(torch.tensor([chosen], dtype=torch.uint8))
    block_scale = torch.tensor([scales], dtype=torch.uint8).view(torch.float8_e4m3fn)
    scale_2 = torch.tensor(2.0**exponent)
    made = nvfp4.dequantize(packed, block_scale, scale_2, torch.bfloat16)
    assert torch.equal(codes(made, block_scale, scale_2), plain(packed))


ALGORITHMS = ["mse", *(pytest.param(name, marks=pytest.mark.slow) for name in ("hessian", "gptq"))]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_codes_of_another_algorithm_need_the_stored_scales(algorithm: str, store: Store) -> None:
    """What another algorithm chose is found again with its scales, and not by `max` from the weights alone."""
    rows = {} if algorithm == "mse" else {"calibration__samples": 8, "calibration__seq_len": 128}
    made = quantized(store, quantization__algorithm=algorithm, quantization__save_pseudo="bf16", **rows)
    assert made.pseudo is not None
    assert made.checkpoint is not None
    directory, stored = made.pseudo.path / DIRECTORY, Tensors(made.checkpoint.unified)
    assert json.loads((directory / "quantize_config.json").read_text())["algorithm"] == algorithm
    weights, scales = tensors(directory, WEIGHTS), tensors(directory, SCALES)
    differing = 0
    for layer in [name.removesuffix(".scale_2") for name in scales if name.endswith(".scale_2")]:
        weight, block_scale = weights[f"{layer}.weight"], scales[f"{layer}.per_block_scale"]
        again = codes(weight, block_scale, scales[f"{layer}.scale_2"])
        assert torch.equal(again, plain(read(stored, f"{layer}.weight"))), layer
        by_max = nvfp4.quantize(weight, scales[f"{layer}.scale_2"])[1]
        differing += int((by_max.float() != block_scale.float()).sum())
    assert differing > 1000


def test_every_layout_gives_the_same_files(pseudo: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    convert(checkpoint.unified, tmp_path / "ct", "compressed_tensors")
    sources = {"unified": checkpoint.unified, "ct": tmp_path / "ct", "trt": checkpoint.tensorrt_llm}
    for name, source in sources.items():
        made = tmp_path / f"from-{name}"
        facts = convert_to_pseudo(source, made, "bf16", Options(model=TINY), QUIET)
        assert facts["files"] == [WEIGHTS, SCALES]
        assert {path.name for path in made.iterdir()} >= {
            "config.json",
            "tokenizer.json",
            "model.safetensors.index.json",
        }
        for file in (WEIGHTS, SCALES):
            ours, theirs = tensors(made, file), tensors(pseudo, file)
            assert set(ours) == set(theirs)
            assert all(torch.equal(ours[key].float(), theirs[key].float()) for key in theirs), name


def test_several_files_have_an_index(checkpoint: Checkpoint, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    made = write_pseudo(checkpoint.unified, tmp_path, "bf16", largest=5_000_000)
    assert len(made.files) > 3
    assert made.files[0].startswith("pseudo_quantized_model-4bit-16g-00001-of-")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert model.lm_head.weight.any()


def test_a_second_build_writes_nothing(built: pipeline.Built, store: Store) -> None:
    again = Store(store.root, QUIET)
    quantized(again, quantization__save_pseudo="bf16", quantization__keep_fp8=["*.layers.1.mlp.down_proj"])
    assert all(artifact.cached for artifact in again.done)


def test_it_does_not_change_the_checkpoint(built: pipeline.Built, store: Store) -> None:
    """To save it later needs no calibration: the checkpoint is the same one."""
    plain_build = quantized(store, quantization__keep_fp8=["*.layers.1.mlp.down_proj"])
    assert plain_build.pseudo is None
    assert plain_build.checkpoint == built.checkpoint


@pytest.mark.parametrize("format_name", ["int8_dynamic", "w8a16_int8"])
def test_int8_is_code_times_the_scale_of_its_output(format_name: str, store: Store, tmp_path: Path) -> None:
    more = {"quantization__kv_cache_dtype": "auto", "quantization__save_pseudo": "bf16"}
    built = quantized(store, quantization__format=format_name, **more)
    assert built.pseudo is not None
    assert built.checkpoint is not None
    name, made = "model.layers.1.mlp.up_proj", built.pseudo.path / DIRECTORY
    stored = Tensors(built.checkpoint.unified)
    expected = read(stored, f"{name}.weight")
    expected = expected if format_name == "int8_dynamic" else int8.unpack(expected)
    write_pseudo(built.checkpoint.unified, tmp_path, "fp16")
    for directory in (made, tmp_path):
        weights, scales = (
            tensors(directory, f"pseudo_quantized_model-8bit{end}.safetensors") for end in ("", "_scales")
        )
        assert torch.equal(scales[f"{name}.scale"], read(stored, f"{name}.weight_scale"))
        assert torch.equal(int8.codes(weights[f"{name}.weight"], scales[f"{name}.scale"][:, None]), expected)
    config = json.loads((made / "quantize_config.json").read_text())
    assert {"bits": 8, "group_size": -1, "desc_act": False, "format": format_name}.items() <= config.items()
    assert config["values"] == {format_name: "code x scale"}


@pytest.mark.parametrize("format_name", ["int4_awq", "bf16"])
def test_formats_without_such_a_model_are_refused_before_the_work(format_name: str, store: Store) -> None:
    more = {"calibration__samples": 4} if format_name == "int4_awq" else {"quantization__kv_cache_dtype": "auto"}
    with pytest.raises(BuilderError, match="no pseudo-quantized model"):
        quantized(store, quantization__format=format_name, quantization__save_pseudo="bf16", **more)


def test_weights_beyond_fp16_are_refused_and_leave_nothing(checkpoint: Checkpoint, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight_scale_2"
    large = NewTensor(name, "F32", (), [torch.tensor(1e3).numpy().tobytes()])
    source = rewrite(checkpoint.unified, tmp_path / "large", {name: large})
    with pytest.raises(UnsupportedError, match=r"FP16 can't hold the weights of model.layers.0.mlp.up_proj"):
        convert_to_pseudo(source, tmp_path / "made", "fp16", Options(), QUIET)
    assert not [path for path in tmp_path.iterdir() if "made" in path.name]
    convert_to_pseudo(source, tmp_path / "made", "bf16", Options(), QUIET)
    with pytest.raises(UsageError, match="exists"):
        convert_to_pseudo(source, tmp_path / "made", "bf16", Options(), QUIET)


def test_layers_that_fp16_can_not_hold_exactly_are_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight_scale_2"
    tiny = NewTensor(name, "F32", (), [torch.tensor(1e-9).numpy().tobytes()])
    source = rewrite(checkpoint.unified, tmp_path / "tiny", {name: tiny})
    for dtype, layers in (("fp16", ["model.layers.0.mlp.up_proj"]), ("bf16", [])):
        (tmp_path / dtype).mkdir()
        assert write_pseudo(source, tmp_path / dtype, dtype).inexact == layers


def test_other_gptq_models_are_still_refused(tmp_path: Path, store: Store) -> None:
    other = shutil.copytree(TINY, tmp_path / "gptq")
    (other / "quantize_config.json").write_text("{}")
    with pytest.raises(UnsupportedError, match="GPTQ"):
        quantized(store, model__id=str(other))
