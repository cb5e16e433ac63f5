"""The writer's unified layouts against ModelOpt's own exports of the same model and ranges, byte for byte."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import exports
import families
import pytest
import torch

from builder.checkpoint import huggingface, layouts
from builder.checkpoint.layouts import read_json
from builder.core.errors import IntegrityError, UnsupportedError
from builder.core.safetensors_io import NewTensor, Tensors, write
from builder.formats import kv_cache, registry
from builder.formats.assignment import ModelFormats
from builder.quantize import data_free, quantizers, unified_files, unified_plan, writer
from builder.quantize.ranges import Ranges
from builder.quantize.source_weights import SourceModel
from builder.quantize.writer import Work

pytestmark = pytest.mark.filterwarnings("ignore")  # ModelOpt's own
CALIBRATED = (".input_scale", ".k_scale", ".v_scale")
# A dense model, MLA with a mixture, linear attention with stacked experts, Mamba with a renamed embedding, a parallel
# attention and MLP, and experts whose files are stacked.
FAMILIES = ["qwen3", "glm4_moe_lite", "qwen3_5_moe_text", "nemotron_h", "cohere2", "qwen3_moe"]
QWEN3 = exports.MODELS["qwen3"]


def held(directory: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """{tensor: (dtype, shape, bytes)} of all files."""
    tensors = Tensors(directory)
    return {name: (info.dtype, info.shape, tensors.read(name)) for name, info in tensors.items()}


def ranges_of(unified: Path, scale_range: float) -> Ranges:
    """The ranges that a checkpoint's scales were made of, but for their last bit."""
    tensors = Tensors(unified)
    value = {n: struct.unpack("<f", tensors.read(n))[0] for n in tensors if n.endswith(CALIBRATED)}
    inputs = {n.removesuffix(".input_scale"): v * scale_range for n, v in value.items() if n.endswith(".input_scale")}
    attention = [name.removesuffix(".k_proj.k_scale") for name in value if name.endswith(".k_proj.k_scale")]
    cache = {one: (value[f"{one}.k_proj.k_scale"] * 448, value[f"{one}.v_proj.v_scale"] * 448) for one in attention}
    return Ranges(inputs, cache)


def theirs(source: Path, name: str, directory: Path, **options: Any) -> Path:
    """ModelOpt's export, prepared and completed as the stage's worker does it."""
    one = registry.get(name)
    model = exports.quantized(source, config=str(one.modelopt_config), **options)
    if one.prepare_export:
        with torch.inference_mode():
            quantizers.share_ranges(model, ModelFormats(one))
            quantizers.round_weights(model, ModelFormats(one))
    exports.export(model, directory)
    huggingface.complete(directory, source)
    return directory


def check(source: Path, exported: Path, formats: ModelFormats, directory: Path, work: Work | None = None) -> None:
    """Writes the model with the exported checkpoint's ranges, and compares tensors and documents."""
    writer.write(
        SourceModel.open(source), formats, ranges_of(exported, formats.whole.input_range or 1.0), directory, work
    )
    made, wanted = held(directory), held(exported)
    assert made.keys() == wanted.keys()
    for name, (dtype, shape, data) in wanted.items():
        assert made[name][:2] == (dtype, shape), name
        if name.endswith(CALIBRATED):
            assert struct.unpack("<f", made[name][2]) == pytest.approx(struct.unpack("<f", data), rel=1e-6), name
        else:
            assert made[name][2] == data, name
    check_documents(directory, exported, formats)


def check_documents(directory: Path, exported: Path, formats: ModelFormats) -> None:
    """hf_quant_config.json is ModelOpt's (of its version 0.47), and transformers reads the same configuration."""
    from transformers import AutoConfig

    if exports.MODELOPT >= (0, 47):
        said = [read_json(at / "hf_quant_config.json") for at in (directory, exported)]
        for one in said:  # 0.47 sorts renamed modules by their old names
            one["quantization"]["exclude_modules"] = sorted(one["quantization"].get("exclude_modules") or [])
        assert said[0] == said[1]
        blocks = [read_json(at / "config.json")["quantization_config"] for at in (directory, exported)]
        for block in blocks:
            block["ignore"] = sorted(block["ignore"])
        assert blocks[0] == blocks[1]
    read = [AutoConfig.from_pretrained(at).to_dict() for at in (directory, exported)]
    for one in read:
        for key in ("_name_or_path", "quantization_config", "transformers_version", "producer"):
            one.pop(key, None)
    assert read[0] == read[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_nvfp4_checkpoint_is_modelopts(family: str, tmp_path: Path) -> None:
    try:
        families.write(family, tmp_path / "source")
    except ValueError:
        pytest.skip("this transformers does not have the family")
    exported = theirs(tmp_path / "source", "nvfp4", tmp_path / "theirs", kept=quantizers.NEVER)
    check(tmp_path / "source", exported, ModelFormats(registry.NVFP4, cache=kv_cache.FP8), tmp_path / "ours")


@pytest.mark.parametrize("name", ["w4a16_nvfp4", "fp8", "fp8_pc_pt"])
def test_every_format_that_needs_no_search_is_modelopts(name: str, tmp_path: Path) -> None:
    import modelopt.torch.quantization as mtq

    one = registry.get(name)
    if not hasattr(mtq, str(one.modelopt_config)):
        pytest.skip(f"this ModelOpt has no {one.modelopt_config}")
    exported = theirs(QWEN3, name, tmp_path / "theirs")
    check(QWEN3, exported, ModelFormats(one, cache=kv_cache.FP8), tmp_path / "ours")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ModelOpt's NVFP4 export of the tiny Qwen3."""
    return theirs(QWEN3, "nvfp4", tmp_path_factory.mktemp("theirs"))


NVFP4 = ModelFormats(registry.NVFP4, cache=kv_cache.FP8)


@pytest.mark.parametrize("shards", [1, 3])
def test_shards_of_the_source_and_of_the_checkpoint_do_not_matter(shards: int, exported: Path, tmp_path: Path) -> None:
    source = split(QWEN3, tmp_path / "source", shards)
    one, many = tmp_path / "one", tmp_path / "many"
    check(source, exported, NVFP4, one, Work(threads=3))
    files = sorted(source.glob("*.safetensors"), reverse=True)
    check(source, exported, NVFP4, many, Work(shard_bytes=2 << 20, ready=iter(files)))
    names = sorted(path.name for path in many.glob("*.safetensors"))
    assert len(names) > 2
    assert names[0] == f"model-00001-of-{len(names):05}.safetensors"
    total = sum(info.nbytes for info in Tensors(many).values())
    assert read_json(many / "model.safetensors.index.json")["metadata"] == {"total_size": total}


def split(model: Path, directory: Path, shards: int) -> Path:
    """The model with its tensors dealt to several files, so that layers that are served as one are apart."""
    stored = Tensors(model)
    shutil.copytree(model, directory, ignore=shutil.ignore_patterns("*.safetensors*"))
    index = {}
    for number in range(shards):
        name, mine = f"model-{number}.safetensors", list(stored)[number::shards]
        write(directory / name, [NewTensor(n, stored[n].dtype, stored[n].shape, [stored.place(n)]) for n in mine])
        index |= dict.fromkeys(mine, name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return directory


@pytest.mark.parametrize(("stored", "kind"), [("F32", torch.float32), ("F16", torch.float16)])
def test_a_source_in_another_type_is_rounded_first(
    stored: str, kind: torch.dtype, exported: Path, tmp_path: Path
) -> None:
    """As transformers loads it: here the values are those of BF16, plus what rounds away."""

    def changed(data: memoryview) -> bytes:
        values = torch.frombuffer(bytearray(data), dtype=torch.bfloat16).to(kind)
        return (values * 1.0003 if kind is torch.float32 else values).numpy().tobytes()

    source = rewritten(QWEN3, tmp_path / "source", lambda name, data: (stored, changed(data)))
    if stored == "F32":
        check(source, exported, NVFP4, tmp_path / "ours")
    else:  # what is too small for F16 is lost
        writer.write(SourceModel.open(source), NVFP4, ranges_of(exported, 2688.0), tmp_path / "ours")
        assert {info.dtype for info in Tensors(tmp_path / "ours").values()} == {"BF16", "U8", "F8_E4M3", "F32"}


def rewritten(model: Path, directory: Path, change: Any) -> Path:
    """The model with each tensor's (dtype, bytes) replaced by `change(name, bytes)`, None for one that stays."""
    stored = Tensors(model)
    shutil.copytree(model, directory, ignore=shutil.ignore_patterns("*.safetensors*"))
    made = []
    for name, info in stored.items():
        dtype, data = change(name, stored.read(name)) or (info.dtype, stored.read(name))
        made.append(NewTensor(name, dtype, info.shape, [data]))
    write(directory / "model.safetensors", made, {"format": "pt"})
    return directory


def test_single_layers_have_formats_of_their_own(tmp_path: Path) -> None:
    kept, fp8 = "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.o_proj"
    exported = theirs(QWEN3, "nvfp4", tmp_path / "theirs", kept=[kept], fp8=[fp8])
    layers = {registry.FP8: (fp8,), registry.BF16: (kept,)}
    formats = ModelFormats(registry.NVFP4, layers, kv_cache.FP8)
    found = ranges_of(exported, 2688.0)
    inputs = {**found.inputs, fp8: found.inputs[fp8] / 6}
    facts = writer.write(SourceModel.open(QWEN3), formats, Ranges(inputs, found.cache), tmp_path / "ours")
    made, wanted = held(tmp_path / "ours"), held(exported)
    # ModelOpt's exporter divides FP8 weights in BF16 (quantizers.round_weights prepares them).
    assert [name for name in wanted if made[name] != wanted[name] and not name.endswith(CALIBRATED)] in (
        [],
        [f"{fp8}.weight"],
    )
    assert facts["fp8_linears"] == facts["kept_linears"] == 1
    check_documents(tmp_path / "ours", exported, formats)
    assert (tmp_path / "ours" / "quant_cfg.json").is_file()


@pytest.mark.parametrize(
    ("value", "what"), [(b"\xc0\x7f", "holds NaN"), (b"\x80\xff", "holds Inf"), (b"\0\0", "is all zero")]
)
def test_a_weight_that_no_scale_can_be_made_of_is_named(
    value: bytes, what: str, exported: Path, tmp_path: Path
) -> None:
    bad = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1)]

    def change(name: str, data: memoryview) -> tuple[str, bytes] | None:
        if name not in bad:
            return None
        return "BF16", bytes(len(data)) if value == b"\0\0" else bytes(data[:-2]) + value

    source = rewritten(QWEN3, tmp_path / "source", change)
    with pytest.raises(IntegrityError) as caught:
        writer.write(SourceModel.open(source), NVFP4, ranges_of(exported, 2688.0), tmp_path / "ours")
    assert all(f"{name} {what}" in caught.value.why for name in bad)
    assert not list((tmp_path / "ours").glob("*.safetensors"))


def test_ranges_that_are_missing_are_named_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match=r"no range for the inputs of model.layers"):
        writer.write(SourceModel.open(QWEN3), NVFP4, Ranges(), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["nvfp4", "fp8", "w4a16_nvfp4"])
@pytest.mark.parametrize("shard_bytes", [1 << 40, 2 << 20])
def test_a_layout_that_gets_other_scales_equals_one_that_is_written_with_them(
    name: str, shard_bytes: int, tmp_path: Path
) -> None:
    source, formats = SourceModel.open(QWEN3), ModelFormats(registry.get(name), cache=kv_cache.FP8)
    work, both = Work(shard_bytes=shard_bytes), {}
    made = unified_plan.plan(source.config, source.headers, source.dtype, formats)
    assumed = data_free.assumed(made, formats, source.config)
    found = Ranges(
        {layer: 1.0 + number for number, layer in enumerate(assumed.inputs)},
        {attention: (3.0 + number, 700.0 - number) for number, attention in enumerate(assumed.cache)},
    )
    for directory, ranges in ((tmp_path / "at once", found), (tmp_path / "later", assumed)):
        both[directory.name] = writer.write(source, formats, ranges, directory / "unified", work)
        layouts.write_if_served(directory / "unified", source.config, directory / "tensorrt_llm")
    later = tmp_path / "later"
    assert contents(later) != contents(tmp_path / "at once")
    facts = writer.rescale(source, formats, found, later / "unified")
    layouts.write_if_served(later / "unified", source.config, later / "tensorrt_llm", rescaled=True)
    assert contents(later) == contents(tmp_path / "at once")
    assert {**(facts or {}), "algorithm": "max"} == both["at once"]
    fewer = Ranges(found.inputs, dict(list(found.cache.items())[1:]))
    assert writer.rescale(source, formats, fewer, later / "unified") is None
    assert contents(later) == contents(tmp_path / "at once")


@pytest.mark.parametrize("name", ["int4_awq", "nvfp4_awq", "int8_sq"])
def test_formats_with_searched_scales_are_left_to_modelopt(name: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="can't be written without calibration data"):
        writer.write(SourceModel.open(QWEN3), ModelFormats(registry.get(name)), Ranges(), tmp_path / "ours")


def test_a_failure_stops_all_threads_and_leaves_no_weights(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> Mapping[str, Any]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(registry.NVFP4), "pack", fails)
    with pytest.raises(OSError, match="No space left"):
        writer.write(SourceModel.open(QWEN3), NVFP4, ranges_of(exported, 2688.0), tmp_path / "ours")
    assert not list((tmp_path / "ours").iterdir())


def test_a_disk_that_is_full_from_the_start_leaves_no_file_and_no_descriptor(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(unified_files, "write_at", fails)
    with pytest.raises(OSError, match="No space left"):
        writer.write(SourceModel.open(QWEN3), NVFP4, ranges_of(exported, 2688.0), tmp_path / "ours")
    # By name: other tests' descriptors are closed whenever Python collects them.
    descriptors = (Path(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd"))
    assert not [fd for fd in descriptors if str(tmp_path) in (os.readlink(fd) if fd.is_symlink() else "")]
    assert not list((tmp_path / "ours").iterdir())


def test_a_download_that_fails_stops_the_writer(exported: Path, tmp_path: Path) -> None:
    source = split(QWEN3, tmp_path / "source", 3)

    def arriving() -> Iterator[Path]:
        yield source / "model-1.safetensors"
        raise ConnectionError("the server went away")

    with pytest.raises(ConnectionError):
        writer.write(
            SourceModel.open(source), NVFP4, ranges_of(exported, 2688.0), tmp_path / "ours", Work(ready=arriving())
        )
    assert not list((tmp_path / "ours").iterdir())


def test_a_bias_that_is_kept_in_float32_is_widened(tmp_path: Path) -> None:
    values, config = torch.tensor([1.5, -2.0]), {"architectures": ["Glm4MoeForCausalLM"], "num_hidden_layers": 2}
    name = "a.e_score_correction_bias"
    narrow = values.bfloat16().view(torch.int16).numpy().tobytes()
    write(tmp_path / "model.safetensors", [NewTensor(name, "BF16", (2,), [narrow])])
    (tmp_path / "config.json").write_text(json.dumps(config))
    writer.write(SourceModel.open(tmp_path), ModelFormats(registry.BF16), Ranges(), tmp_path / "ours")
    assert held(tmp_path / "ours") == {name: ("F32", (2,), values.numpy().tobytes())}
