"""Validation accepts real exports in both layouts, and names the tensor for every kind of damage."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import exports
import pytest

from builder.checkpoint import layouts
from builder.checkpoint.inspection import documents
from builder.checkpoint.inspection.layout import Layout
from builder.checkpoint.validate import Inspection, inspect
from builder.core.errors import IntegrityError, UnsupportedError, UsageError
from builder.core.safetensors_io import NewTensor, TensorInfo, Tensors

Change = Callable[[str, TensorInfo, bytes], NewTensor | None]
THEIRS, OURS = "model.layers.1.", "transformer.layers.1."
PARTS = {
    "weight": ("weight", "weight"),
    "block": ("weight_scale", "weights_scaling_factor"),
    "global": ("weight_scale_2", "weights_scaling_factor_2"),
    "input": ("input_scale", "activation_scaling_factor"),
}


def data(content: bytes) -> Change:
    """The same dtype and shape with its first bytes replaced."""
    return lambda name, info, old: NewTensor(name, info.dtype, info.shape, [content + old[len(content) :]])


def value(number: float) -> Change:
    return data(struct.pack("<f", number))


def zero(name: str, info: TensorInfo, old: bytes) -> NewTensor:
    return NewTensor(name, info.dtype, info.shape, [bytes(len(old))])


def minus_zero(name: str, info: TensorInfo, old: bytes) -> NewTensor:
    return NewTensor(name, info.dtype, info.shape, [b"\x88" * len(old)])


def missing(name: str, info: TensorInfo, old: bytes) -> None:
    return None


def dtype(new: str, itemsize: int) -> Change:
    return lambda name, info, old: NewTensor(name, new, (len(old) // itemsize,), [old])


def bfloat16(name: str, info: TensorInfo, old: bytes) -> NewTensor:
    shape = (info.shape[0], info.shape[1] * 2)
    return NewTensor(name, "BF16", shape, [b"\x80\x3f" * (shape[0] * shape[1])])


def transposed(name: str, info: TensorInfo, old: bytes) -> NewTensor:
    return NewTensor(name, info.dtype, info.shape[::-1], [old])


def halved(name: str, info: TensorInfo, old: bytes) -> NewTensor:
    return NewTensor(name, info.dtype, (info.shape[0], info.shape[1] // 2), [old[: len(old) // 2]])


def damaged(directory: Path, destination: Path, tensor: str, change: Change) -> Inspection:
    tensors = Tensors(directory)
    new = change(tensor, tensors[tensor], tensors.read(tensor))
    return inspect(exports.rewrite(directory, destination, {tensor: new}))


def test_a_file_that_is_cut_while_it_is_inspected_is_reported(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Instead of a SIGBUS, which ends the process."""
    directory = exports.rewrite(checkpoints["llama"] / "unified", tmp_path / "cut", {})
    check = documents.check

    def cut(layout: Layout) -> None:
        check(layout)
        for file in layout.tensors.files:  # all of them are open by now
            os.truncate(file, file.stat().st_size // 2)

    monkeypatch.setattr(documents, "check", cut)
    with pytest.raises(IntegrityError, match="became shorter"):
        inspect(directory)


@pytest.mark.parametrize("name", exports.MODELS)
def test_real_checkpoints_pass(checkpoints: dict[str, Path], name: str) -> None:
    inspection = inspect(checkpoints[name])
    assert inspection.findings == ()
    inspection.check()
    layers = layouts.read_json(exports.MODELS[name] / "config.json")["num_hidden_layers"]
    unified, tensorrt_llm = inspection.layouts["unified"], inspection.layouts["tensorrt_llm"]
    assert (unified.linears["nvfp4"], tensorrt_llm.linears["nvfp4"]) == (7 * layers, 5 * layers)
    assert unified.decoder_layers == tensorrt_llm.decoder_layers == layers
    assert 4.5 < tensorrt_llm.bits_per_weight < unified.bits_per_weight < 4.52
    for folder, summary in inspection.layouts.items():
        assert sum(summary.nbytes.values()) == sum(info.nbytes for info in Tensors(checkpoints[name] / folder).values())
    assert unified.nbytes["nvfp4_weights"] == tensorrt_llm.nbytes["nvfp4_weights"] == 8 * unified.nbytes["block_scales"]
    assert inspection.summary["unified.nbytes.kv_scales"] == 8 * layers
    assert json.loads(json.dumps(inspection.facts()))["findings"] == []


@pytest.mark.parametrize("folder", ["unified", "tensorrt_llm"])
def test_one_layout_alone_is_enough(checkpoints: dict[str, Path], folder: str) -> None:
    inspection = inspect(checkpoints["llama"] / folder)
    assert list(inspection.layouts) == [folder]
    assert not inspection.findings


def test_the_config_of_an_engine_directory_is_unwrapped(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    engine = exports.rewrite(checkpoints["qwen3"] / "tensorrt_llm", tmp_path / "engine", {})
    config = {"version": "1.2.1", "pretrained_config": layouts.read_json(engine / "config.json"), "build_config": {}}
    (engine / "config.json").write_text(json.dumps(config))
    assert not inspect(engine).findings


NAN, INFINITY = float("nan"), float("inf")


def up(part: str) -> tuple[str, str]:
    """A tensor of up_proj by its names in the unified layout and in TensorRT-LLM's."""
    return f"{THEIRS}mlp.up_proj.{PARTS[part][0]}", f"{OURS}mlp.gate.{PARTS[part][1]}"


def two_elements(name: str, info: TensorInfo, old: bytes) -> NewTensor:
    return NewTensor(name, info.dtype, (2,), [old * 2])


KV = (f"{THEIRS}self_attn.v_proj.v_scale", f"{OURS}attention.kv_cache_scaling_factor")
NORM = (f"{THEIRS}self_attn.q_norm.weight", f"{OURS}attention.q_layernorm.weight")
EMBEDDING = ("model.embed_tokens.weight", "transformer.vocab_embedding.weight")
HEAD = ("lm_head.weight", "lm_head.weight")
DAMAGE: dict[str, tuple[tuple[str, str], Change, str]] = {
    "a NaN scale": (up("global"), value(NAN), "is nan"),
    "an infinite scale": (up("input"), value(INFINITY), "is inf"),
    "a negative scale": (up("input"), value(-1.3e-05), "is -1.3e-05"),
    "a denormal scale": (up("input"), value(1e-44), "a denormal"),
    "a zero scale": (up("input"), value(0.0), "is 0;"),
    "an absurd scale": (up("input"), value(1.8e25), "is 1.8e+25"),
    "a missing scale": (up("input"), missing, "is missing"),
    "missing block scales": (up("block"), missing, "is missing"),
    "a missing KV scale": (KV, missing, "is missing"),
    "a NaN KV scale": (KV, value(NAN), "is nan"),
    "a missing weight": (up("weight"), missing, "is missing"),
    "a missing norm": (NORM, missing, "is missing"),
    "a scale of wrong dtype": (up("input"), dtype("BF16", 2), "is BF16, not F32"),
    "a scale of wrong shape": (up("input"), two_elements, "has the shape [2], not []"),
    "block scales with NaN": (up("block"), data(b"\x7f\xff"), "has 2 NaN and 1 negative"),
    "negative block scales": (up("block"), data(b"\x90"), "has 0 NaN and 1 negative"),
    "block scales of zero": (up("block"), zero, "is all zero"),
    "block scales as bytes": (up("block"), dtype("U8", 1), "is U8, not F8_E4M3"),
    "half the block scales": (up("block"), halved, "has the shape [768, 8], not [768, 16]"),
    "weights of zero": (up("weight"), zero, "is all zero"),
    "weights of minus zero": (up("weight"), minus_zero, "is all zero"),
    "transposed weights": (up("weight"), transposed, "has the shape [128, 768], not [768, 128]"),
    "unquantized weights": (up("weight"), bfloat16, "is BF16, not U8"),
    "NaN in the embedding": (EMBEDDING, data(b"\xc0\x7f"), "has 1 NaN and 0 Inf"),
    "Inf in a norm": (NORM, data(b"\x80\xff"), "has 0 NaN and 1 Inf"),
    "an embedding of zeros": (EMBEDDING, zero, "is all zero"),
    "a quantized head": (HEAD, dtype("U8", 1), "the output layer must not be quantized"),
}


@pytest.mark.parametrize("folder", ["unified", "tensorrt_llm"])
@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_found_and_named(checkpoints: dict[str, Path], tmp_path: Path, case: str, folder: str) -> None:
    names, change, said = DAMAGE[case]
    tensor = names[folder == "tensorrt_llm"]
    inspection = damaged(checkpoints["qwen3"] / folder, tmp_path / folder, tensor, change)
    assert any(problem.tensor == tensor and said in problem.what for problem in inspection.findings)
    # Without its block scales a weight has too few bits: the one other tensor that may be named.
    assert {problem.tensor for problem in inspection.findings} <= {tensor, tensor.rpartition(".")[0] + ".weight"}
    with pytest.raises(IntegrityError) as caught:
        inspection.check()
    assert caught.value.exit_code == 6
    assert f"{folder}: {tensor} " in caught.value.why


@pytest.mark.parametrize("folder", ["unified", "tensorrt_llm"])
def test_bits_per_weight(checkpoints: dict[str, Path], tmp_path: Path, folder: str) -> None:
    tensor = up("weight")[folder == "tensorrt_llm"]
    for change, bits in ((bfloat16, "16.50"), (halved, "2.50")):
        inspection = damaged(checkpoints["qwen3"] / folder, tmp_path / bits / folder, tensor, change)
        assert any(f"takes {bits} bits per weight" in problem.what for problem in inspection.findings)


def test_the_first_ten_problems_and_their_number(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    directory = checkpoints["qwen3"] / "unified"
    names = [name for name in Tensors(directory) if name.endswith(".input_scale")]
    changed = {name: NewTensor(name, "F32", (), [struct.pack("<f", NAN)]) for name in names}
    with pytest.raises(IntegrityError, match=r"42 problems") as caught:
        inspect(exports.rewrite(directory, tmp_path / "unified", changed)).check()
    assert caught.value.why.count("is nan") == 10
    assert caught.value.why.endswith("...")


def test_an_isolated_zero_block_scale_is_an_underflow(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    directory = checkpoints["qwen3"] / "unified"
    assert not damaged(directory, tmp_path / "u", f"{THEIRS}mlp.up_proj.weight_scale", data(b"\x00")).findings


def test_nothing_quantized_at_all(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """config.json says NVFP4, but the weights are those of the source model."""
    directory = exports.rewrite(checkpoints["llama"] / "unified", tmp_path / "u", {})
    (directory / "model.safetensors").write_bytes((exports.MODELS["llama"] / "model.safetensors").read_bytes())
    found = {problem.tensor: problem.what for problem in inspect(directory).findings}
    assert (
        found["model.layers.0.self_attn.q_proj.weight"] == "takes 16.00 bits per weight with its block scales, not 4.5"
    )
    assert found["model.layers.1.mlp.down_proj.weight_scale"] == "is missing"
    assert sum(what == "is missing" for what in found.values()) == 2 * 7 * 3


def test_a_layer_missing_altogether(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    directory = checkpoints["llama"] / "tensorrt_llm"
    gone = {name: None for name in Tensors(directory) if ".layers.1." in name}
    problems = inspect(exports.rewrite(directory, tmp_path / "t", gone)).findings
    assert {p.tensor for p in problems} == set(gone)
    assert {p.what for p in problems} == {"is missing"}


def test_an_excluded_layer_may_stay_unquantized(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    unified = checkpoints["llama"] / "unified"
    tensors, module = Tensors(unified), f"{THEIRS}mlp.down_proj"
    changes: dict[str, NewTensor | None] = {
        f"{module}.{scale}": None for scale in ("weight_scale", "weight_scale_2", "input_scale")
    }
    changes[f"{module}.weight"] = bfloat16(f"{module}.weight", tensors[f"{module}.weight"], b"")
    directory = exports.rewrite(unified, tmp_path / "u", changes)
    assert inspect(directory).findings
    config = layouts.read_json(directory / "hf_quant_config.json")
    config["quantization"]["exclude_modules"].append("model.layers.1.mlp.down*")
    (directory / "hf_quant_config.json").write_text(json.dumps(config))
    [contradiction] = inspect(directory).findings
    assert (contradiction.tensor, contradiction.kind) == ("hf_quant_config.json", "configuration")
    model_config = layouts.read_json(directory / "config.json")
    model_config["quantization_config"]["ignore"].append("model.layers.1.mlp.down*")
    (directory / "config.json").write_text(json.dumps(model_config))
    assert not inspect(directory).findings
    source = layouts.read_json(exports.MODELS["llama"] / "config.json")
    layouts.write_tensorrt_llm(directory, source, tmp_path / "t")
    assert not inspect(tmp_path / "t").findings


@pytest.mark.parametrize("name", ["phi3", "gemma2", "gemma3_text", "qwen3_moe"])
def test_other_decoders_are_validated_by_their_tensors(tmp_path: Path, name: str) -> None:
    exports.export(exports.quantized(exports.DATA / "arch-variants" / name), tmp_path / "u")
    inspection = inspect(tmp_path / "u")
    assert inspection.findings == ()
    assert inspection.layouts["unified"].linears["nvfp4"] >= 8
    linear = next(name for name in Tensors(tmp_path / "u") if name.endswith("o_proj.input_scale"))
    assert damaged(tmp_path / "u", tmp_path / "a", linear, value(1e-44)).findings[0].tensor == linear
    assert damaged(tmp_path / "u", tmp_path / "b", linear, missing).findings[0].tensor == linear
    weight = linear.replace("input_scale", "weight")
    assert weight in {problem.tensor for problem in damaged(tmp_path / "u", tmp_path / "c", weight, bfloat16).findings}
    k_scale = next(name for name in Tensors(tmp_path / "u") if name.endswith("k_scale"))
    assert damaged(tmp_path / "u", tmp_path / "d", k_scale, missing).findings[0].tensor == k_scale


def test_directories_without_a_checkpoint_are_rejected(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no quantized checkpoint"):
        inspect(exports.MODELS["llama"])
    with pytest.raises(UsageError, match="no quantized checkpoint"):
        inspect(tmp_path / "absent")
    directory = exports.rewrite(checkpoints["llama"] / "tensorrt_llm", tmp_path / "t", {})
    config = layouts.read_json(directory / "config.json")
    (directory / "config.json").write_text(json.dumps(config | {"quantization": {"quant_algo": "W1A1"}}))
    with pytest.raises(UnsupportedError, match="W1A1"):
        inspect(directory)
    (directory / "config.json").write_text(json.dumps(config | {"mapping": {"world_size": 2}}))
    with pytest.raises(IntegrityError, match=r"1 rank files.*says 2"):
        inspect(directory)


def test_a_git_lfs_pointer_is_named(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    directory = exports.rewrite(checkpoints["llama"] / "unified", tmp_path / "u", {})
    (directory / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(IntegrityError, match="Git LFS"):
        inspect(directory).check()


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "vocab_size"])
def test_a_configuration_without_sizes_is_named(checkpoints: dict[str, Path], tmp_path: Path, key: str) -> None:
    unified = exports.rewrite(checkpoints["qwen3"] / "unified", tmp_path / "unified", {})
    config = layouts.read_json(unified / "config.json")
    del config[key]
    (unified / "config.json").write_text(json.dumps(config))
    with pytest.raises(IntegrityError, match=key):
        inspect(unified)
