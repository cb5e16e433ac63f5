"""Every planted fault is found and named: its kind, and the tensor or file. Sound checkpoints raise no alarm.

A fault is planted into a copy of a sound checkpoint, in any layout. `test_no_false_alarm` inspects checkpoints of more
architectures and of every format.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import exports
import planted
import pytest
from planted import (
    INDEX,
    alias,
    append,
    bf16,
    both,
    copied,
    cut,
    document,
    each,
    edit,
    end,
    gone,
    header,
    listed,
    new,
    number,
    smaller,
    start,
    text,
    times,
    weights_of,
    without,
)

from builder.checkpoint import conversion, huggingface, validate
from builder.checkpoint.inspection.findings import KINDS
from builder.core.errors import IntegrityError

L = "model.layers."
E = "transformer.layers."
UNIFIED, ENGINE, COMPRESSED, MIXED, SHARDED = "unified", "tensorrt_llm", "compressed", "mixed", "sharded"
FP8_LAYERS = tuple(f"{L}{n}.mlp.down_proj" for n in range(6))
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@dataclass(frozen=True)
class Fault:
    """What is done to a checkpoint in one of the layouts above, and what the inspection must say of it."""

    layout: str
    plant: Callable[[Path], None]
    kind: str
    tensor: str


def move(folder: Path) -> None:
    """A tensor is written into the other shard; the index is left as it was."""
    planted.add(folder, SHARDS[1], MOVED)
    planted.remove(folder, SHARDS[0], MOVED)


def twice(folder: Path) -> None:
    planted.add(folder, SHARDS[1], MOVED)


MOVED = f"{L}0.mlp.up_proj.input_scale"  # in the first shard
IN, GLOBAL, BLOCKS, WEIGHT = "input_scale", "weight_scale_2", "weight_scale", "weight"
UP, DOWN, Q, OUT = "mlp.up_proj", "mlp.down_proj", "self_attn.q_proj", "self_attn.o_proj"


def name(layer: int, module: str, leaf: str) -> str:
    return f"{L}{layer}.{module}.{leaf}"


def one(layout: str, tensor: str, change: Any, kind: str) -> Fault:
    return Fault(layout, edit((tensor, change)), kind, tensor)


def said(layout: str, file: str, change: Callable[[Any], None], kind: str, tensor: str = "") -> Fault:
    return Fault(layout, document(file, change), kind, tensor or file)


def quantization(change: Callable[[dict[str, Any]], Any]) -> Callable[[Any], None]:
    return lambda content: change(content["quantization"])


def as_fp8(said: dict[str, Any]) -> None:
    said["quantized_layers"][f"{L}1.{UP}"] = {"quant_algo": "FP8"}


NAN, INF = float("nan"), float("inf")
ZEROS, ONE = bytes(1 << 16), b"\0\0\x80\x3f"

FAULTS: dict[str, Fault] = {
    # Scales that are not numbers, or that no calibration filled.
    "NaN input scale": one(UNIFIED, name(1, UP, IN), number(NAN), "input-scale"),
    "infinite input scale": one(UNIFIED, name(1, UP, IN), number(INF), "input-scale"),
    "negative input scale": one(UNIFIED, name(1, UP, IN), number(-1.3e-5), "input-scale"),
    "zero input scale": one(UNIFIED, name(1, DOWN, IN), number(0.0), "input-scale"),
    "denormal input scale": one(UNIFIED, name(1, DOWN, IN), number(1e-44), "input-scale"),
    "absurd input scale": one(UNIFIED, name(1, DOWN, IN), number(1.8e25), "input-scale"),
    "NaN global scale": one(UNIFIED, name(2, OUT, GLOBAL), number(NAN), "weight-scale"),
    "negative global scale": one(UNIFIED, name(2, OUT, GLOBAL), number(-1e-4), "weight-scale"),
    "denormal global scale": one(UNIFIED, name(2, OUT, GLOBAL), number(1e-40), "weight-scale"),
    "NaN KV scale": one(UNIFIED, name(3, "self_attn.k_proj", "k_scale"), number(NAN), "kv-scale"),
    "zero KV scale": one(UNIFIED, name(3, "self_attn.v_proj", "v_scale"), number(0.0), "kv-scale"),
    "NaN FP8 weight scale": one(MIXED, f"{FP8_LAYERS[2]}.weight_scale", number(NAN), "weight-scale"),
    "NaN FP8 input scale": one(MIXED, f"{FP8_LAYERS[2]}.input_scale", number(NAN), "input-scale"),
    "uninitialized divisor": one(COMPRESSED, name(1, DOWN, "input_global_scale"), number(1e-44), "input-scale"),
    "infinite divisor": one(COMPRESSED, name(1, DOWN, "weight_global_scale"), number(INF), "weight-scale"),
    "negative divisor": one(COMPRESSED, name(1, UP, "input_global_scale"), number(-9.5e24), "input-scale"),
    "engine: NaN scale": one(ENGINE, f"{E}1.mlp.gate.activation_scaling_factor", number(NAN), "input-scale"),
    "engine: infinite KV scale": one(ENGINE, f"{E}1.attention.kv_cache_scaling_factor", number(INF), "kv-scale"),
    # Scales that can't be right for their weights or their neighbours.
    "global scale x 1e-6": one(UNIFIED, name(2, OUT, GLOBAL), times(1e-6), "weight-outlier"),
    "global scale x 1e8": one(UNIFIED, name(2, OUT, GLOBAL), times(1e8), "weight-outlier"),
    "divisor x 1e8": one(COMPRESSED, name(2, OUT, "weight_global_scale"), times(1e8), "weight-outlier"),
    "FP8 weight scale x 1e-6": one(MIXED, f"{FP8_LAYERS[3]}.weight_scale", times(1e-6), "weight-outlier"),
    "engine: global scale x 1e-6": one(
        ENGINE, f"{E}2.attention.dense.weights_scaling_factor_2", times(1e-6), "weight-outlier"
    ),
    "input scale x 1e-6": one(UNIFIED, name(2, OUT, IN), times(1e-6), "input-outlier"),
    "input scale x 1e8": one(UNIFIED, name(2, DOWN, IN), times(1e8), "input-outlier"),
    "input scale x 1e4": one(UNIFIED, name(2, OUT, IN), times(1e4), "input-wide"),
    "KV scale x 1e-6": one(UNIFIED, name(2, "self_attn.k_proj", "k_scale"), times(1e-6), "kv-outlier"),
    "KV scale x 1e8": one(UNIFIED, name(2, "self_attn.v_proj", "v_scale"), times(1e8), "kv-outlier"),
    "block scales halved six times": one(
        UNIFIED, name(4, DOWN, BLOCKS), smaller(6), "unused-range"
    ),
    "codes that never reach the largest": one(
        UNIFIED, name(4, DOWN, WEIGHT), each(lambda byte: byte & 0xBB), "unused-range"
    ),
    "FP8 weights in the lowest range": one(
        MIXED, f"{FP8_LAYERS[1]}.weight", smaller(8), "unused-range"
    ),
    # Scales that must be equal.
    "q's global scale differs": one(UNIFIED, name(1, Q, GLOBAL), times(2), "unequal"),
    "up's input scale differs": Fault(
        UNIFIED, edit((name(1, UP, IN), times(1.5))), "unequal-input", name(1, UP, IN)
    ),
    "v's input scale differs": Fault(
        COMPRESSED, edit((name(0, "self_attn.v_proj", "input_global_scale"), times(0.5))), "unequal-input",
        name(0, "self_attn.v_proj", "input_global_scale"),
    ),
    # Values.
    "NaN block scales": one(UNIFIED, name(0, UP, BLOCKS), start(b"\x7f\xff"), "block-scales"),
    "negative block scale": one(UNIFIED, name(0, UP, BLOCKS), start(b"\x90"), "block-scales"),
    "block scales of zero": one(UNIFIED, name(0, UP, BLOCKS), each(lambda byte: 0), "block-scales"),
    "engine: NaN block scales": one(ENGINE, f"{E}0.mlp.proj.weights_scaling_factor", end(b"\x7f"), "block-scales"),
    "weights of zero": one(UNIFIED, name(0, UP, WEIGHT), each(lambda byte: 0), "zero"),
    "weights of minus zero": one(COMPRESSED, name(0, UP, "weight_packed"), each(lambda byte: 0x88), "zero"),
    "a hole in a weight": one(UNIFIED, name(0, DOWN, WEIGHT), end(ZEROS), "hole"),
    "NaN in an FP8 weight": one(MIXED, f"{FP8_LAYERS[0]}.weight", start(b"\x7f"), "not-finite"),
    "NaN in the embedding": one(UNIFIED, "model.embed_tokens.weight", start(b"\xc0\x7f"), "not-finite"),
    "Inf in a norm": one(UNIFIED, f"{L}2.input_layernorm.weight", end(b"\x80\xff"), "not-finite"),
    "an embedding of zeros": one(ENGINE, "transformer.vocab_embedding.weight", each(lambda byte: 0), "zero"),
    # Names, shapes, dtypes.
    "missing input scale": one(UNIFIED, name(0, UP, IN), gone, "missing-scale"),
    "missing block scales": one(COMPRESSED, name(0, UP, BLOCKS), gone, "missing"),
    "missing norm": one(UNIFIED, f"{L}3.self_attn.q_norm.weight", gone, "missing"),
    "missing KV scale of one layer": one(UNIFIED, name(3, "self_attn.k_proj", "k_scale"), gone, "missing-scale"),
    "engine: missing KV scale": one(ENGINE, f"{E}3.attention.k_cache_scaling_factor", gone, "missing"),
    "input scale in BF16": one(UNIFIED, name(0, UP, IN), new("BF16", (), b"\x80\x3c"), "dtype"),
    "block scales as bytes": one(UNIFIED, name(0, UP, BLOCKS), lambda i, o: ("U8", i.shape, o), "dtype"),
    "unquantized weight": one(UNIFIED, name(0, UP, WEIGHT), bf16(), "dtype"),
    "two input scales": one(UNIFIED, name(0, UP, IN), new("F32", (2,), ONE + ONE), "shape"),
    "transposed weight": one(UNIFIED, name(0, UP, WEIGHT), lambda i, o: (i.dtype, i.shape[::-1], o), "shape"),
    "a norm of another width": one(
        UNIFIED, f"{L}2.input_layernorm.weight", lambda i, o: (i.dtype, (i.shape[0] // 2,), o[: len(o) // 2]), "shape"
    ),
    "quantized output layer": one(
        ENGINE, "lm_head.weight", lambda i, o: ("U8", (i.shape[0], i.shape[1] * 2), o), "quantized-head"
    ),
    # Tensors that belong to nothing, scales without weights.
    "a tensor of no layer": one(UNIFIED, f"{L}0.adapter.weight", new("BF16", (2, 2), b"\x80\x3f" * 4), "unexpected"),
    "an FP8 scale without its weight": one(
        MIXED, f"{L}0.adapter.down_proj.input_scale", new("F32", (), ONE), "orphan-scale"
    ),
    "a scale whose weight is gone": Fault(
        UNIFIED, edit((f"{L}9.mlp.down_proj.weight_scale", new("F8_E4M3", (4, 4), b"\x30" * 16))), "orphan-scale",
        f"{L}9.mlp.down_proj.weight_scale",
    ),
    # Duplicates.
    "a layer that is another's copy": Fault(
        UNIFIED, copied(f"{L}1.{DOWN}", f"{L}4.{DOWN}"), "identical", name(4, DOWN, WEIGHT)
    ),
    "a tensor in two shards": Fault(SHARDED, twice, "duplicate", MOVED),
    "aliased offsets": Fault(
        UNIFIED, header("model.safetensors", alias(name(1, DOWN, WEIGHT), name(0, DOWN, WEIGHT))), "overlap", DOWN
    ),
    # Files and index.
    "truncated file": Fault(UNIFIED, cut("model.safetensors", 100_000), "truncated", "model.safetensors"),
    "truncated shard": Fault(SHARDED, cut(SHARDS[1], 10), "truncated", SHARDS[1]),
    "truncated rank": Fault(ENGINE, cut("rank0.safetensors", 10), "truncated", "rank0.safetensors"),
    "bytes after the end": Fault(UNIFIED, append("model.safetensors", b"\0" * 8), "damaged", "model.safetensors"),
    "an HTML page": Fault(
        UNIFIED, text("model.safetensors", "<html>not found</html>"), "damaged",
        "model.safetensors",
    ),
    "a missing shard": Fault(SHARDED, without(SHARDS[1]), "missing-file", SHARDS[1]),
    "a wrong shard": Fault(SHARDED, listed(MOVED, SHARDS[1]), "index", MOVED),
    "a moved tensor": Fault(SHARDED, move, "index", MOVED),
    "an unlisted tensor": Fault(SHARDED, listed(MOVED, None), "index", MOVED),
    "a tensor that no file has": Fault(SHARDED, listed("ghost.weight", SHARDS[0]), "index", "ghost.weight"),
    "another total_size": Fault(
        SHARDED, document(INDEX, lambda i: i["metadata"].update(total_size=7)), "index-size", INDEX
    ),
    "an index that is none": Fault(SHARDED, text(INDEX, "{}"), "damaged", INDEX),
    # Configuration.
    "two KV formats": said(
        UNIFIED, "hf_quant_config.json", quantization(lambda q: q.update(kv_cache_quant_algo=None)), "configuration"
    ),
    "a layer excluded in one file": said(
        UNIFIED, "hf_quant_config.json", quantization(lambda q: q["exclude_modules"].append(f"{L}1.{DOWN}")),
        "configuration",
    ),
    "a layer that quant_cfg.json forgot": said(
        MIXED, "quant_cfg.json", lambda c: c["quantized_layers"].pop(f"{L}1.{UP}"), "configuration", ".json"
    ),
    "an exclusion that matches nothing": said(
        UNIFIED, "hf_quant_config.json", quantization(lambda q: q["exclude_modules"].append(f"{L}77.{DOWN}")),
        "excludes-nothing", f"{L}77.{DOWN}",
    ),
    "a layer declared FP8 that is NVFP4": Fault(
        MIXED,
        both(
            document("hf_quant_config.json", quantization(as_fp8)),
            document("quant_cfg.json", as_fp8),
        ),
        "dtype", name(1, UP, WEIGHT),
    ),
    "too few layers": said(UNIFIED, "config.json", lambda c: c.update(num_hidden_layers=5), "layer-count"),
    "too many layers": said(
        UNIFIED, "config.json", lambda c: c.update(num_hidden_layers=7), "missing", f"{L}6.{UP}.weight"
    ),
    "a tied head that differs": said(
        UNIFIED, "config.json", lambda c: c.update(tie_word_embeddings=True), "tied-head", "lm_head.weight"
    ),
    "another vocabulary": said(
        UNIFIED, "config.json", lambda c: c.update(vocab_size=99), "shape", "model.embed_tokens.weight"
    ),
    "FP8 KV cache without scales": Fault(
        UNIFIED,
        edit(*((f"{L}{n}.self_attn.{x}_proj.{x}_scale", gone) for n in range(6) for x in "kv")),
        "kv-scales-absent", "k_scale",
    ),
    "nothing is quantized": Fault(
        UNIFIED, weights_of(exports.MODELS["qwen3"]), "unquantized", "every linear layer",
    ),
}  # fmt: skip


@pytest.fixture(scope="session")
def sound(checkpoints: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The checkpoint of tiny-qwen3 in each layout, in shards, and with layers in FP8."""
    made, work = checkpoints["qwen3"], tmp_path_factory.mktemp("sound")
    conversion.convert(made / "unified", work / COMPRESSED, "compressed_tensors")
    planted.shards(made / "unified", work / SHARDED, MOVED, SHARDS)
    exports.export(exports.quantized(exports.MODELS["qwen3"], fp8=FP8_LAYERS), work / MIXED)
    huggingface.complete(work / MIXED, exports.MODELS["qwen3"])
    return {
        UNIFIED: made / "unified",
        ENGINE: made / "tensorrt_llm",
        **{n: work / n for n in (COMPRESSED, SHARDED, MIXED)},
    }


def test_modelopts_own_fp8_scales_are_a_warning(tmp_path: Path) -> None:
    """Its exporter leaves q, k and v with scales of their own; servers round such weights a second time."""
    fp8 = [f"{L}0.self_attn.{x}_proj" for x in "qkv"]
    exports.export(exports.quantized(exports.MODELS["llama"], fp8=fp8), tmp_path / "u")
    huggingface.complete(tmp_path / "u", exports.MODELS["llama"])
    found = validate.inspect(tmp_path / "u")
    assert {one.kind for one in found.findings} == {"unequal-fp8"}
    assert {one.tensor for one in found.findings} <= {f"{module}.weight_scale" for module in fp8}
    found.check()


def test_there_are_many_faults_of_every_kind() -> None:
    assert len(FAULTS) >= 40
    tested = {fault.kind for fault in FAULTS.values()} | {"unequal-fp8"}  # ModelOpt writes it, see above
    assert tested == set(KINDS)


@pytest.mark.parametrize("layout", [UNIFIED, ENGINE, COMPRESSED, MIXED, SHARDED])
def test_the_checkpoints_are_sound_before(sound: Mapping[str, Path], layout: str) -> None:
    assert validate.inspect(sound[layout]).findings == ()


@pytest.mark.parametrize("case", FAULTS)
def test_a_planted_fault_is_named(sound: Mapping[str, Path], tmp_path: Path, case: str) -> None:
    fault = FAULTS[case]
    folder = tmp_path / "checkpoint"
    shutil.copytree(sound[fault.layout], folder)
    fault.plant(folder)
    found = validate.inspect(folder)
    of_kind = [finding for finding in found.findings if finding.kind == fault.kind]
    assert any(fault.tensor in finding.tensor for finding in of_kind), [f"{f.kind}: {f}" for f in found.findings]
    assert all(finding.effect and finding.fix for finding in found.findings)
    if KINDS[fault.kind].severity == "error":
        with pytest.raises(IntegrityError) as caught:
            found.check(folder)
        assert KINDS[fault.kind].title in caught.value.why
        assert caught.value.hint
    else:
        found.check()
