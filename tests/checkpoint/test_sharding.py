"""Tensor and pipeline parallel: compared with ModelOpt's split, and joined again by the reference executor."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import exports
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from builder.checkpoint import layouts as checkpoint_layouts
from builder.checkpoint import sharding, validate
from builder.checkpoint.joining import Joined
from builder.checkpoint.layouts import Checkpoint
from builder.checkpoint.sharding import Parallel
from builder.core.errors import IntegrityError, UnsupportedError
from builder.core.output import Output
from builder.core.safetensors_io import NewTensor, Tensors, write
from builder.core.store import Store
from builder.reference.model import ReferenceModel

SIZES = [(2, 1), (4, 1), (1, 2), (2, 2), (4, 2)]


def split(whole: Path, tmp_path: Path, tp: int, pp: int) -> Path:
    sharding.split(whole / "tensorrt_llm", tmp_path / f"tp{tp}pp{pp}", Parallel(tp, pp))
    return tmp_path / f"tp{tp}pp{pp}"


def assert_same(ours: Tensors, theirs: Tensors) -> None:
    assert set(ours) == set(theirs)
    assert not [n for n in ours if (ours[n].dtype, ours[n].shape) != (theirs[n].dtype, theirs[n].shape)]
    assert not [n for n in ours if ours.read(n) != theirs.read(n)]


# With --tp 8 (Qwen3: 4 KV heads) and 4 (Llama, Qwen2: 2) ranks share KV heads.
MODELOPTS = [(name, tp, pp) for name in exports.MODELS for tp, pp in ((2, 1), (1, 2), (2, 2))]
MODELOPTS += [("qwen3", 8, 1), ("llama", 4, 1), ("qwen2", 4, 2), ("qwen3", 1, 3)]


@pytest.mark.parametrize(("name", "tp", "pp"), MODELOPTS)
def test_every_rank_equals_modelopts(checkpoints: dict[str, Path], tmp_path: Path, name: str, tp: int, pp: int) -> None:
    exports.export(exports.quantized(exports.MODELS[name]), tmp_path / "u", tmp_path / "modelopt", tp=tp, pp=pp)
    ours = split(checkpoints[name], tmp_path, tp, pp)
    assert checkpoint_layouts.read_json(ours / "config.json")["mapping"] == {
        "world_size": tp * pp,
        "tp_size": tp,
        "pp_size": pp,
    }
    for rank in range(tp * pp):
        file = f"rank{rank}.safetensors"
        assert_same(Tensors(ours, [ours / file]), Tensors(tmp_path, [tmp_path / "modelopt" / file]))


def logits(directory: Path) -> torch.Tensor:
    model = ReferenceModel.load(directory)
    return model.forward(torch.arange(3, 4000, 97), model.new_cache())


@pytest.mark.parametrize("name", exports.MODELS)
def test_joined_ranks_give_the_same_logits(checkpoints: dict[str, Path], tmp_path: Path, name: str) -> None:
    expected = logits(checkpoints[name] / "tensorrt_llm")
    for tp, pp in [*SIZES, (8, 1)] if name == "qwen3" else SIZES:
        directory = split(checkpoints[name], tmp_path, tp, pp)
        assert len(list(directory.glob("rank*.safetensors"))) == tp * pp
        assert torch.equal(logits(directory), expected)


@pytest.mark.parametrize("name", exports.MODELS)
def test_every_rank_passes_validation(checkpoints: dict[str, Path], tmp_path: Path, name: str) -> None:
    inspected = validate.inspect(split(checkpoints[name], tmp_path, 4, 2))
    assert not inspected.findings
    assert list(inspected.layouts) == [f"tensorrt_llm rank{rank}" for rank in range(8)]


def test_validation_detects_the_file_of_another_rank(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    directory = split(checkpoints["llama"], tmp_path, 1, 2)
    (directory / "rank0.safetensors").write_bytes((directory / "rank1.safetensors").read_bytes())
    found = {problem.tensor: problem.what for problem in validate.inspect(directory).findings}
    assert found["transformer.vocab_embedding.weight"] == "is missing"
    directory = split(checkpoints["llama"], tmp_path, 2, 1)
    weight = "transformer.layers.0.mlp.proj.weight"
    whole_one = Tensors(checkpoints["llama"] / "tensorrt_llm")
    change(directory / "rank1.safetensors", weight, whole_one.read(weight), whole_one[weight].shape)
    what = next(p.what for p in validate.inspect(directory).findings if p.tensor == weight)
    assert what.startswith(f"has the shape {list(whole_one[weight].shape)}")


def change(file: Path, name: str, data: bytes, shape: tuple[int, ...] | None = None) -> None:
    """Replaces the bytes of one tensor in a file."""
    tensors = Tensors(file.parent, [file])
    content = {n: (i.dtype, i.shape, tensors.read(n)) for n, i in tensors.items()}
    content[name] = (content[name][0], shape or content[name][1], data)
    write(file, [NewTensor(n, dtype, shape, [raw]) for n, (dtype, shape, raw) in content.items()])


@pytest.mark.parametrize(
    ("name", "tp"), [("transformer.ln_f.weight", 2), ("transformer.layers.1.attention.qkv.weight", 4)]
)
def test_ranks_that_disagree_are_rejected(checkpoints: dict[str, Path], tmp_path: Path, name: str, tp: int) -> None:
    directory = split(checkpoints["llama"], tmp_path, tp, 1)
    file = directory / "rank1.safetensors"
    change(file, name, bytes(Tensors(directory, [file])[name].nbytes))
    with pytest.raises(IntegrityError, match=f"{name} differs between ranks"):
        ReferenceModel.load(directory)


def test_missing_ranks_are_reported(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    directory = split(checkpoints["llama"], tmp_path, 2, 1)
    (directory / "rank1.safetensors").unlink()
    with pytest.raises(IntegrityError, match=r"1 rank files.*says 2"):
        ReferenceModel.load(directory)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[dict[str, Any], Parallel]:
    """An invented model, as small as its sizes allow, and a way to split it."""
    tp = draw(st.sampled_from([1, 2, 3, 4, 8]))
    size = draw(st.sampled_from([16, 32]))
    kv_heads = draw(st.sampled_from([n for n in range(1, 2 * tp + 1) if n % tp == 0 or tp % n == 0]))
    groups = [n for n in range(1, 9) if kv_heads * n % tp == 0]
    layers = draw(st.integers(1, 5))
    config = {
        "architecture": "Qwen3ForCausalLM",
        "hidden_size": 16 * tp,
        "intermediate_size": 16 * tp * draw(st.integers(1, 2)),
        "num_attention_heads": kv_heads * draw(st.sampled_from(groups)),
        "num_key_value_heads": kv_heads,
        "head_size": size,
        "num_hidden_layers": layers,
        "vocab_size": draw(st.integers(1, 20)),
        "quantization": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head"]},
        "mapping": {"world_size": 1, "tp_size": 1, "pp_size": 1},
    }
    return config, Parallel(tp, draw(st.integers(1, layers)))


def made_up(config: dict[str, Any], seed: int) -> list[NewTensor]:
    """Random bytes for every tensor of such a model, with biases everywhere."""
    from random import Random

    random, made = Random(seed), []

    def add(name: str, dtype: str, *shape: int) -> None:
        size = {"U8": 1, "F8_E4M3": 1, "BF16": 2, "F32": 4}[dtype]
        for n in shape:
            size *= n
        made.append(NewTensor(name, dtype, shape, [random.randbytes(size)]))

    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_size"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    linears = {"attention.qkv": (q + 2 * kv, hidden), "attention.dense": (hidden, q)}
    linears |= {"mlp.fc": (inner, hidden), "mlp.gate": (inner, hidden), "mlp.proj": (hidden, inner)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"transformer.layers.{layer}."
        for name, (n, k) in linears.items():
            add(f"{prefix}{name}.weight", "U8", n, k // 2)
            add(f"{prefix}{name}.weights_scaling_factor", "F8_E4M3", n, k // 16)
            add(f"{prefix}{name}.weights_scaling_factor_2", "F32")
            add(f"{prefix}{name}.activation_scaling_factor", "F32")
            add(f"{prefix}{name}.bias", "BF16", n)
        add(f"{prefix}attention.kv_cache_scaling_factor", "F32", 1)
        add(f"{prefix}input_layernorm.weight", "BF16", hidden)
        add(f"{prefix}attention.q_layernorm.weight", "BF16", head)
    add("transformer.vocab_embedding.weight", "BF16", config["vocab_size"], hidden)
    add("lm_head.weight", "BF16", config["vocab_size"], hidden)
    add("transformer.ln_f.weight", "BF16", hidden)
    return made


@settings(max_examples=40)
@given(layouts(), st.integers(0, 2**32))
def test_split_then_join_is_identity(case: tuple[dict[str, Any], Parallel], seed: int) -> None:
    config, parallel = case
    with tempfile.TemporaryDirectory() as made:
        whole, parts = Path(made) / "whole", Path(made) / "parts"
        whole.mkdir()
        write(whole / "rank0.safetensors", made_up(config, seed))
        (whole / "config.json").write_text(json.dumps(config))
        sharding.split(whole, parts, parallel)
        joined = Joined(parts, checkpoint_layouts.read_json(parts / "config.json"))
        together = [
            NewTensor(name, joined.info(name).dtype, joined.info(name).shape, [joined.data(name)])
            for name in joined.names
        ]
        write(Path(made) / "again.safetensors", together)
        assert (Path(made) / "again.safetensors").read_bytes() == (whole / "rank0.safetensors").read_bytes()
        if parallel.world_size == 1:
            assert (parts / "rank0.safetensors").read_bytes() == (whole / "rank0.safetensors").read_bytes()


def test_files_that_are_cut_while_they_are_split_or_joined_are_reported(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    whole = shutil.copytree(checkpoints["llama"] / "tensorrt_llm", tmp_path / "whole" / "tensorrt_llm").parent
    parts = split(whole, tmp_path, 2, 1)
    joined = Joined(parts, config := checkpoint_layouts.read_json(parts / "config.json"))
    tensors = sharding.rank_tensors(Tensors(whole / "tensorrt_llm"), config, Parallel(2, 1), 0)
    for file in (*parts.glob("rank*"), whole / "tensorrt_llm" / "rank0.safetensors"):
        os.truncate(file, 4096)
    weight = next(name for name in joined.names if name.endswith("qkv.weight"))
    [split_weight] = [tensor for tensor in tensors if tensor.name == weight]
    for chunks in (joined.chunks(weight), split_weight.chunks):
        with pytest.raises(IntegrityError, match="became shorter"):
            list(chunks)


@given(st.integers(1, 100), st.integers(1, 100))
def test_layers_are_divided_as_torch_does(layers: int, pp: int) -> None:
    """TensorRT-LLM's Mapping.pp_layers is torch.tensor_split."""
    theirs = [part.tolist() for part in torch.tensor_split(torch.arange(layers), pp)]
    assert [list(Parallel(1, pp).layers(rank, layers)) for rank in range(pp)] == theirs


QWEN3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_hidden_layers": 36,
}


@pytest.mark.parametrize("sizes", [(1, 1), (2, 1), (8, 1), (16, 1), (32, 1), (1, 36), (8, 5)])
def test_sizes_that_a_model_can_be_split_over(sizes: tuple[int, int]) -> None:
    sharding.check(QWEN3_8B, *sizes)


REJECTED: list[tuple[dict[str, Any], int, int, str, str]] = [
    ({}, 3, 1, "32 attention heads are not divisible by 3", "--tp 2"),
    ({"num_key_value_heads": 12, "num_attention_heads": 48}, 8, 1, "12 KV heads can be neither", "--tp 4"),
    (
        {"intermediate_size": 1104, "hidden_size": 1024},
        2,
        1,
        "intermediate_size 1104 is not a multiple of 16 x 2",
        "--tp 1",
    ),
    ({"hidden_size": 1040}, 2, 1, "hidden_size 1040 is not a multiple", "--pp"),
    ({"head_dim": 20, "num_attention_heads": 4, "num_key_value_heads": 4}, 2, 1, "heads x head size 80", "--tp 1"),
    ({}, 1, 37, "--pp 37 is more than this model's 36 layers", "--pp 36"),
]


@pytest.mark.parametrize(("change", "tp", "pp", "why", "hint"), REJECTED)
def test_sizes_that_a_model_cannot_be_split_over(change: dict[str, Any], tp: int, pp: int, why: str, hint: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        sharding.check({**QWEN3_8B, **change}, tp, pp)
    assert why in str(caught.value)
    assert hint in caught.value.hint
    assert caught.value.exit_code == 3


def test_the_gemm_needs_a_multiple_of_32_inputs_per_rank() -> None:
    odd = {**QWEN3_8B, "intermediate_size": 16 * 4 * 3}
    sharding.check(odd, 4, 1)
    with pytest.raises(UnsupportedError, match="intermediate_size 192 is not a multiple of 32 x 4: its GEMM") as caught:
        sharding.check(odd, 4, 1, gemm=True)
    assert "--tp 2" in caught.value.hint


def test_unquantized_layers_must_be_the_same_in_all_stages() -> None:
    def exclusions(*layers: int) -> list[str]:
        names = ["lm_head", *(f"transformer.layers.{layer}.mlp.proj" for layer in layers)]
        return list(sharding.local_layers(dict.fromkeys(names, "excluded"), {"num_hidden_layers": 5}, Parallel(1, 2)))

    assert exclusions() == ["lm_head"]
    assert exclusions(0, 3) == ["lm_head", "transformer.layers.0.mlp.proj"]
    assert exclusions(2) == ["lm_head", "transformer.layers.2.mlp.proj"]  # the second stage has two layers
    with pytest.raises(UnsupportedError, match="not the same in all 2 pipeline stages"):
        exclusions(0)


def test_an_unknown_tensor_is_rejected() -> None:
    with pytest.raises(UnsupportedError, match=r"transformer\.layers\.0\.mlp\.router\.weight can't be split"):
        sharding.shard("transformer.layers.0.mlp.router.weight", (8, 64), QWEN3_8B, 2, 0)


def test_one_checkpoint_feeds_every_split(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    store = Store(tmp_path / "out", Output("quiet"))
    source = Checkpoint(checkpoints["qwen3"], "0" * 64)
    assert sharding.split_checkpoint(source, Parallel(), store=store) is source
    made = [sharding.split_checkpoint(source, Parallel(*sizes), store=store) for sizes in ((2, 1), (1, 2), (2, 1))]
    assert made[0].path == made[2].path != made[1].path
    assert [done.cached for done in store.done] == [False, False, True]
    assert made[0].facts == {"world_size": 2, "tp_size": 2, "pp_size": 1}
    assert sorted(path.name for path in made[0].tensorrt_llm.iterdir()) == [
        "config.json",
        "rank0.safetensors",
        "rank1.safetensors",
    ]
