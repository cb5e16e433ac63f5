"""Conversions between layouts: real ModelOpt exports there and back, and what the compressed-tensors library reads."""

from __future__ import annotations

import json
import os
import shutil
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import exports
import fabricated
import pytest
import torch

from builder.checkpoint import conversion, sharding
from builder.checkpoint.conversion import Options, convert
from builder.checkpoint.description import describe_directory
from builder.core.errors import IntegrityError, StageError, UnsupportedError, UsageError
from builder.core.safetensors_io import NewTensor, Tensors, read_metadata
from builder.formats import registry
from builder.formats.base import NumberFormat

MIXED = ("model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj")
KEPT = ("model.layers.1.self_attn.o_proj",)
DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ModelOpt's export of each fixture model, `<model>/unified`; of llama in three formats."""
    root = tmp_path_factory.mktemp("exports")
    for name, source in exports.MODELS.items():
        mixed = {"fp8": MIXED, "kept": KEPT} if name == "llama" else {}
        exports.export(exports.quantized(source, **mixed), root / name / "unified")
        for file in ("tokenizer.json", "tokenizer_config.json"):
            if (source / file).is_file():
                shutil.copyfile(source / file, root / name / "unified" / file)
        convert(root / name / "unified", root / name / "compressed_tensors", "compressed_tensors")
    return root


def tensor(tensors: Tensors, name: str) -> torch.Tensor:
    info = tensors[name]
    return torch.frombuffer(bytearray(tensors.read(name)), dtype=DTYPES[info.dtype]).reshape(info.shape)


def dequantized(unified: Path) -> Iterator[tuple[str, NumberFormat, torch.Tensor]]:
    """(module, format, our BF16 weight) of each linear layer."""
    tensors = Tensors(unified)
    for module, one in describe_directory(unified).layers.items():
        stored = {part.name: tensor(tensors, f"{module}.{part.unified}") for part in one.tensors}
        yield module, one, one.dequantize(stored, torch.bfloat16)


@pytest.mark.parametrize("model", exports.MODELS)
def test_there_and_back_gives_the_same_file(made: Path, tmp_path: Path, model: str) -> None:
    found = convert(made / model / "compressed_tensors", tmp_path / "unified", "unified")
    assert found.files == ("model.safetensors",)
    assert not found.suspicious
    before, after = (root / "model.safetensors" for root in (made / model / "unified", tmp_path / "unified"))
    assert after.read_bytes() == before.read_bytes()
    convert(tmp_path / "unified", tmp_path / "again", "compressed_tensors")
    again = tmp_path / "again" / "model.safetensors"
    assert again.read_bytes() == (made / model / "compressed_tensors" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("model", exports.MODELS)
def test_both_layouts_are_described_alike(made: Path, tmp_path: Path, model: str) -> None:
    convert(made / model / "compressed_tensors", tmp_path / "unified", "unified")
    one, other, back = (
        describe_directory(root)
        for root in (made / model / "unified", made / model / "compressed_tensors", tmp_path / "unified")
    )
    assert one.layers == other.layers == back.layers
    assert one.cache == other.cache == back.cache
    assert one.producer == other.producer == back.producer
    assert not (*one.contradictions, *other.contradictions, *back.contradictions)


def test_configuration_and_companions(made: Path, tmp_path: Path) -> None:
    source, there = made / "llama" / "unified", made / "llama" / "compressed_tensors"
    stated = json.loads((there / "config.json").read_text())["quantization_config"]
    assert not (there / "hf_quant_config.json").exists()
    assert (there / "generation_config.json").read_bytes() == (source / "generation_config.json").read_bytes()
    assert stated["quant_method"] == "compressed-tensors"
    assert stated["format"] == "mixed-precision"
    targets = {group["format"]: group["targets"] for group in stated["config_groups"].values()}
    assert targets["float-quantized"] == [*MIXED]
    assert "Linear" not in targets["nvfp4-pack-quantized"]
    assert stated["ignore"] == sorted(["lm_head", *KEPT])
    convert(there, tmp_path / "unified", "unified")
    listed = json.loads((tmp_path / "unified" / "hf_quant_config.json").read_text())["quantization"]
    assert listed["quantized_layers"][MIXED[0]] == {"quant_algo": "FP8"}
    # As ModelOpt says the same in config.json, up to the order of the layers.
    ours, theirs = (
        json.loads((root / "config.json").read_text())["quantization_config"] for root in (tmp_path / "unified", source)
    )
    if exports.MODELOPT >= (0, 47):
        groups = [sorted(map(str, one["config_groups"].values())) for one in (ours, theirs)]
        assert groups[0] == groups[1]
        assert ours["quantized_layers"] == theirs["quantized_layers"]


@pytest.mark.parametrize("model", exports.MODELS)
def test_the_library_has_our_weights(made: Path, model: str) -> None:
    """Bit for bit in BF16, but for the one significand of a global scale that scales.py names: its last bit there."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    directory = made / model / "compressed_tensors"
    stated = json.loads((directory / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig(**stated)
    theirs = Tensors(directory)
    compared = 0
    for module, one, ours in dequantized(made / model / "unified"):
        if one.quant_algo is None:
            assert module in config.ignore
            continue
        scheme = _scheme(config, module)
        prefix = f"{module}."
        local = {n.removeprefix(prefix): tensor(theirs, n) for n in theirs if n.startswith(prefix)}
        local.pop("bias", None)
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        weight = compressor.decompress(local, scheme)["weight"].to(torch.bfloat16)
        if _halfway(local):
            assert bool(((weight.view(torch.int16) - ours.view(torch.int16)).abs() <= 1).all()), module
        else:
            assert torch.equal(weight.view(torch.int16), ours.view(torch.int16)), module
            compared += 1
    assert compared > 10


def _scheme(config: Any, module: str) -> Any:
    from compressed_tensors.utils.match import match_name

    found = [
        group
        for group in config.config_groups.values()
        if any(target == "Linear" or match_name(module, target) for target in group.targets)
    ]
    assert len(found) == 1, module
    return found[0]


def _halfway(local: dict[str, torch.Tensor]) -> bool:
    scale = 1 / local.get("weight_global_scale", torch.ones(1)).double()
    return abs(float(torch.frexp(scale).mantissa * 2) - 1.75) < 1e-6


def test_transformers_loads_it_and_gives_our_logits(made: Path) -> None:
    """With the weights alone quantized, as the library would also round the inputs: the logits of a model that holds
    our dequantized weights, exactly. FP8 layers are left out: transformers rounds their float32 scales to BF16."""
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = AutoModelForCausalLM.from_pretrained(made / "mistral" / "compressed_tensors", dtype=torch.bfloat16)
        ours = AutoModelForCausalLM.from_pretrained(exports.MODELS["mistral"], dtype=torch.bfloat16)
    weights = {f"{module}.weight": weight for module, _, weight in dequantized(made / "mistral" / "unified")}
    ours.load_state_dict(weights, strict=False)
    for module in theirs.modules():
        module.quantization_enabled = False
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        assert torch.equal(theirs(ids, use_cache=False).logits, ours(ids, use_cache=False).logits)


@pytest.mark.parametrize(("model", "parallel"), [("qwen3", (1, 1)), ("llama", (1, 1)), ("qwen2", (2, 2))])
def test_every_pair_of_layouts(made: Path, tmp_path: Path, model: str, parallel: tuple[int, int]) -> None:
    """Around the star from TensorRT-LLM's layout, split over ranks: all but the scales of the KV cache are the same."""
    source, one, two = made / model / "unified", tmp_path / "one", tmp_path / "two"
    cache = [name for name in Tensors(source) if name.endswith(("k_scale", "v_scale"))]
    below = any(struct.unpack("<f", Tensors(source).read(name))[0] < 1 for name in cache)  # not from ModelOpt 0.37
    assert bool(convert(made / model / "compressed_tensors", one, "tensorrt_llm").lost) == below
    convert(source, two, "tensorrt_llm")
    assert (one / "rank0.safetensors").read_bytes() == (two / "rank0.safetensors").read_bytes()
    assert json.loads((one / "config.json").read_text()) == json.loads((two / "config.json").read_text())
    ranks = one
    if parallel != (1, 1):
        ranks = tmp_path / "ranks"
        sharding.split(one, ranks, sharding.Parallel(*parallel))
    options = Options(model=exports.MODELS[model])
    convert(ranks, tmp_path / "compressed", "compressed_tensors", options)
    found = convert(ranks, tmp_path / "unified", "unified", options)
    assert "KV cache scales" in found.lost[0]
    convert(tmp_path / "compressed", tmp_path / "back", "unified")
    before = Tensors(source)
    for root in (tmp_path / "unified", tmp_path / "back"):
        after = Tensors(root)
        assert set(after) == set(before)
        for name, info in before.items():
            if not name.endswith(("k_scale", "v_scale")):
                assert (after[name].dtype, after[name].shape) == (info.dtype, info.shape), name
                assert after.read(name) == before.read(name), name
        assert describe_directory(root).layers == describe_directory(source).layers
        assert not describe_directory(root).contradictions
    assert (tmp_path / "back" / "generation_config.json").is_file()


def test_a_layout_without_the_models_own_files_asks_for_them(made: Path, tmp_path: Path) -> None:
    convert(made / "qwen2" / "unified", tmp_path / "one", "tensorrt_llm")
    with pytest.raises(UsageError, match="and tokenizer of the model"):
        convert(tmp_path / "one", tmp_path / "two", "unified")
    with pytest.raises(IntegrityError, match="not of this model"):
        convert(tmp_path / "one", tmp_path / "two", "unified", Options(model=exports.MODELS["qwen3"]))


def test_a_description_in_config_json_alone_is_enough(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "qwen2" / "unified", tmp_path / "bare")
    (tmp_path / "bare" / "hf_quant_config.json").unlink()
    for layout, weights in (("tensorrt_llm", "rank0.safetensors"), ("compressed_tensors", "model.safetensors")):
        convert(tmp_path / "bare", tmp_path / layout, layout)
        convert(made / "qwen2" / "unified", tmp_path / f"{layout}-2", layout)
        assert (tmp_path / layout / weights).read_bytes() == (tmp_path / f"{layout}-2" / weights).read_bytes()
        assert not list((tmp_path / layout).glob(".*"))


@pytest.mark.parametrize("number_format", ["nvfp4", "w4a16_nvfp4", "fp8", "fp8_pc_pt"])
def test_every_format_of_a_mixture_whose_routers_stay_as_they_are(tmp_path: Path, number_format: str) -> None:
    source = fabricated.unified(
        exports.DATA / "arch-variants" / "qwen3_moe", registry.get(number_format), tmp_path / "unified"
    )
    convert(source, tmp_path / "there", "compressed_tensors")
    stated = json.loads((tmp_path / "there" / "config.json").read_text())["quantization_config"]
    assert stated["config_groups"]["group_0"]["targets"] == ["Linear"]
    routers = [n.removesuffix(".weight") for n in Tensors(source) if n.endswith(".mlp.gate.weight")]
    assert routers
    assert {"lm_head", *routers} == set(stated["ignore"])
    convert(tmp_path / "there", tmp_path / "back", "unified")
    before, after = (root / "model.safetensors" for root in (source, tmp_path / "back"))
    assert after.read_bytes() == before.read_bytes()
    listed = json.loads((tmp_path / "back" / "hf_quant_config.json").read_text())["quantization"]
    assert set(listed["exclude_modules"]) == {"lm_head", *routers}


def test_shards(made: Path, tmp_path: Path) -> None:
    source = made / "qwen3" / "unified"
    sharded, whole = tmp_path / "sharded", tmp_path / "whole"
    counted: list[int] = []
    found = convert(source, sharded, "compressed_tensors", Options(shard_bytes=2_000_000, done=counted.append))
    assert len(found.files) > 3
    assert all((sharded / name).stat().st_size < 2_100_000 or name == found.files[0] for name in found.files)
    tensors = Tensors(sharded)  # reads the index and compares it with the files
    assert sum(counted) == sum(info.nbytes for info in tensors.values())
    assert json.loads((sharded / "model.safetensors.index.json").read_text())["metadata"]["total_size"] == sum(counted)
    convert(sharded, whole, "unified")
    assert (whole / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_a_repaired_scale_is_not_undone_by_an_old_record(made: Path, tmp_path: Path) -> None:
    """The record of a scale counts only while it still leads to the scale beside it."""
    there = made / "qwen2" / "compressed_tensors"
    record = json.loads(read_metadata(there / "model.safetensors")["converted_from"])
    name = next(name for name in record if name.endswith("input_global_scale"))
    new = NewTensor(name, "F32", (1,), [struct.pack("<f", 8.0)])
    tensors = Tensors(there)
    shutil.copytree(there, tmp_path / "there")
    kept = [NewTensor(n, i.dtype, i.shape, [tensors.place(n)]) for n, i in tensors.items() if n != name]
    from builder.core.safetensors_io import write

    write(tmp_path / "there" / "model.safetensors", [*kept, new], read_metadata(there / "model.safetensors"))
    convert(tmp_path / "there", tmp_path / "unified", "unified")
    back = name.replace("input_global_scale", "input_scale")
    assert struct.unpack("<f", Tensors(tmp_path / "unified").read(back))[0] == 0.125


def test_what_is_refused(made: Path, tmp_path: Path) -> None:
    source = made / "qwen2" / "unified"
    with pytest.raises(UsageError, match="already"):
        convert(source, tmp_path / "new", "unified")
    with pytest.raises(UsageError, match="exists"):
        convert(source, made / "qwen2", "compressed_tensors")
    cut = tmp_path / "cut"
    shutil.copytree(source, cut)
    with open(cut / "model.safetensors", "r+b") as file:
        file.truncate(300_000)
    with pytest.raises(IntegrityError, match="complete"):
        convert(cut, tmp_path / "new", "compressed_tensors")
    extra = NewTensor("model.layers.0.mlp.up_proj.pre_quant_scale", "BF16", (64,), [bytes(128)])
    exports.rewrite(source, tmp_path / "extra", {extra.name: extra})
    with pytest.raises(UnsupportedError, match=r"up_proj\.pre_quant_scale has no place"):
        convert(tmp_path / "extra", tmp_path / "new", "compressed_tensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "extra"]


def test_a_full_disk_leaves_nothing(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(StageError, match="is full"):
        convert(made / "qwen2" / "unified", tmp_path / "new", "compressed_tensors")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(StageError, match=r"0 B are free"):
        convert(made / "qwen2" / "unified", tmp_path / "new", "compressed_tensors")


def test_what_a_killed_conversion_left_is_removed(made: Path, tmp_path: Path) -> None:
    stale = tmp_path / ".new.999999999.converting"
    stale.mkdir()
    (stale / "model.safetensors").write_bytes(b"1")
    convert(made / "qwen2" / "unified", tmp_path / "new", "compressed_tensors")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_source_that_contradicts_itself_is_not_converted(made: Path, tmp_path: Path) -> None:
    source = shutil.copytree(made / "llama" / "unified", tmp_path / "source")
    said = json.loads((source / "hf_quant_config.json").read_text())
    said["quantization"] |= {"kv_cache_quant_algo": None}
    (source / "hf_quant_config.json").write_text(json.dumps(said))
    with pytest.raises(IntegrityError, match="contradict"):
        convert(source, tmp_path / "new", "compressed_tensors")
    assert not (tmp_path / "new").exists()
