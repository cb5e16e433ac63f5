"""What llm-compressor writes for the bundled model without data, against our writer and reader of the same layout.

Needs llm-compressor, which has an environment of its own (make test-llmcompressor): TensorRT-LLM 1.2 excludes it.
"""

from __future__ import annotations

import json
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from builder.architectures.catalog import UNKNOWN
from builder.checkpoint import conversion, validate
from builder.checkpoint.conversion import convert
from builder.checkpoint.description import describe_directory
from builder.core.errors import UnsupportedError
from builder.core.safetensors_io import NewTensor, Tensors, write
from builder.formats import kv_cache, registry
from builder.formats.arithmetic import nvfp4
from builder.quantize.ranges import Ranges

pytest.importorskip("llmcompressor", reason="make test-llmcompressor")

SOURCE = Path(__file__).parents[1] / "data" / "tiny-qwen3"
DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn}
SCHEMES = {"NVFP4A16": "w4a16_nvfp4", "FP8_DYNAMIC": "fp8_pc_pt"}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
# llm-compressor's recipes of the builder's formats. It computes in the model's type, so the model is in float32.
INTEGERS: dict[str, dict[str, Any]] = {
    "int8_dynamic": {"targets": "Linear", "scheme": "W8A8"},
    "w8a16_int8": {"config_groups": {"group_0": {"targets": ["Linear"], "weights": INT8}}},
    "int8_static": {
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": INT8,
                "input_activations": {**INT8, "strategy": "tensor", "observer": "static_minmax"},
            }
        }
    },
}
IDS = torch.randint(3, 4000, (8, 64), generator=torch.Generator().manual_seed(0))  # calibration rows


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `oneshot` writes for each data-free scheme."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("llmcompressor")
    group = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}
    rtn = {"group_0": {"targets": ["Linear"], "weights": group}}
    recipes: dict[str, dict[str, Any]] = {
        **{name: {"targets": "Linear", "scheme": name} for name in SCHEMES},
        "W4A16": {"config_groups": rtn},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of modules that it offloaded itself
        for name, recipe in recipes.items():
            model = AutoModelForCausalLM.from_pretrained(SOURCE, dtype=torch.bfloat16)
            oneshot(model=model, recipe=QuantizationModifier(ignore=["lm_head"], **recipe), pipeline="datafree")
            model.save_pretrained(root / name, save_compressed=True)
    return root


@pytest.fixture(scope="module")
def integers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `oneshot` writes in INT8, for each of the builder's formats, of the model in float32."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("integers")
    rows = Dataset.from_dict({"input_ids": IDS.tolist(), "attention_mask": torch.ones_like(IDS).tolist()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, recipe in INTEGERS.items():
            model = AutoModelForCausalLM.from_pretrained(SOURCE, dtype=torch.bfloat16).float()
            given = {"dataset": rows, "num_calibration_samples": len(IDS)} if name == "int8_static" else {}
            pipeline = "basic" if given else "datafree"
            modifier = QuantizationModifier(ignore=["lm_head"], **recipe)
            oneshot(model=model, recipe=modifier, pipeline=pipeline, **given)
            model.save_pretrained(root / name, save_compressed=True)
    return root


def tensor(tensors: Tensors, name: str) -> torch.Tensor:
    info = tensors[name]
    return torch.frombuffer(bytearray(tensors.read(name)), dtype=DTYPES[info.dtype]).reshape(info.shape)


def quantized(scheme: str, weight: torch.Tensor, amax: torch.Tensor) -> dict[str, torch.Tensor]:
    """A layer's tensors, unified, as ModelOpt computes them."""
    if scheme == "NVFP4A16":
        packed, blocks, scale = nvfp4.quantize(weight, nvfp4.scale_of(amax))
        return {"weight": packed, "weight_scale": blocks, "weight_scale_2": scale}
    scale = weight.float().abs().amax(-1) / 448
    rounded = (weight.float() / scale[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {"weight": rounded, "weight_scale": scale}


def layers(tensors: Tensors) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(module, weight, largest magnitude of the layers that are served with it) of each linear layer."""
    fused = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
    for name in tensors:
        module, leaf = name.rpartition(".")[0], name.split(".")[-2]
        if leaf.endswith("_proj"):
            parent = module.rpartition(".")[0]
            together = next((group for group in fused if leaf in group), (leaf,))
            parts = [tensor(tensors, f"{parent}.{one}.weight").abs().amax() for one in together]
            yield module, tensor(tensors, name), torch.stack(parts).amax()


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in the same formats by our arithmetic: `<scheme>/unified`, and converted."""
    root, source = tmp_path_factory.mktemp("ours"), Tensors(SOURCE)
    for scheme, name in SCHEMES.items():
        made = {name: tensor(source, name) for name in source if name != "lm_head.weight"}
        for module, weight, amax in layers(source):
            made.pop(f"{module}.weight")
            made |= {f"{module}.{leaf}": value for leaf, value in quantized(scheme, weight, amax).items()}
        kinds = {kind: dtype for dtype, kind in DTYPES.items()}
        new = [
            NewTensor(n, kinds[t.dtype], tuple(t.shape), [t.contiguous().view(-1).view(torch.uint8).numpy().tobytes()])
            for n, t in made.items()
        ]
        unified = root / scheme / "unified"
        unified.mkdir(parents=True)
        write(unified / "model.safetensors", new, {"format": "pt"})
        (unified / "config.json").write_bytes((SOURCE / "config.json").read_bytes())
        entry = {**registry.get(name).layer_entry, "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
        (unified / "hf_quant_config.json").write_text(json.dumps({"quantization": entry}))
        convert(unified, root / scheme / "compressed", "compressed_tensors")
    return root


def stated(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "config.json").read_text())["quantization_config"]
    return found


@pytest.mark.parametrize("scheme", SCHEMES)
def test_names_types_shapes_and_configuration_are_llmcompressors(theirs: Path, ours: Path, scheme: str) -> None:
    """Two differences: our scales of channels stay in F32, as they were computed; and the version and producer."""
    one, other = Tensors(ours / scheme / "compressed"), Tensors(theirs / scheme)
    assert set(one) == set(other) - {"lm_head.weight"}
    for name, info in one.items():
        channel = scheme == "FP8_DYNAMIC" and name.endswith("weight_scale")
        assert (info.dtype, info.shape) == ("F32" if channel else other[name].dtype, other[name].shape), name
    mine, their = stated(ours / scheme / "compressed"), stated(theirs / scheme)
    assert mine.pop("producer")["name"] == "trtllm-builder"
    assert their.pop("version") == "0.19.0"
    assert mine.pop("version") == "0.18.0"
    assert mine == their


def test_the_global_scale_differs_by_its_rounding_to_bf16_and_the_weights_follow(theirs: Path, ours: Path) -> None:
    """llm-compressor computes 1 / max in the model's BF16: two roundings, 2**-8 at most."""
    one, other = Tensors(ours / "NVFP4A16" / "compressed"), Tensors(theirs / "NVFP4A16")
    differing = total = 0
    for name in (name for name in one if name.endswith("weight_global_scale")):
        here, there = (struct.unpack("<f", tensors.read(name))[0] for tensors in (one, other))
        assert abs(here / there - 1) <= 2**-7, name
        packed = name.replace("weight_global_scale", "weight_packed")
        differing += int((tensor(one, packed) != tensor(other, packed)).sum())
        total += one[packed].nbytes
    assert 0 < differing / total < 0.03


def test_fp8_weights_are_the_same_up_to_the_bf16_scale(theirs: Path, ours: Path) -> None:
    one, other = Tensors(ours / "FP8_DYNAMIC" / "compressed"), Tensors(theirs / "FP8_DYNAMIC")
    for name in (name for name in one if name.endswith("weight_scale")):
        here, there = tensor(one, name), tensor(other, name).float()
        assert bool(((here / there - 1).abs() <= 2**-8).all()), name
        weight = name.replace("weight_scale", "weight")
        mine, their = (tensor(tensors, weight).view(torch.int8).int() for tensors in (one, other))
        assert int((mine - their).abs().max()) <= 1, name  # the neighbouring E4M3 number
        assert float((mine != their).float().mean()) < 0.05


@pytest.mark.parametrize("scheme", SCHEMES)
def test_we_read_llmcompressors_output_and_give_it_back(theirs: Path, tmp_path: Path, scheme: str) -> None:
    found = describe_directory(theirs / scheme)
    assert {one.name for one in found.layers.values()} == {SCHEMES[scheme]}
    assert not found.contradictions
    convert(theirs / scheme, tmp_path / "unified", "unified")
    assert describe_directory(tmp_path / "unified").layers == found.layers
    convert(tmp_path / "unified", tmp_path / "back", "compressed_tensors")
    before, after = Tensors(theirs / scheme), Tensors(tmp_path / "back")
    assert set(before) == set(after)
    for name, info in before.items():
        assert (after[name].dtype, after[name].shape) == (info.dtype, info.shape), name
        assert after.read(name) == before.read(name), name


@pytest.mark.parametrize(
    ("scheme", "said"),
    [("W4A16", "pack-quantized, weights int4 per group 128, inputs not quantized")],
)  # fmt: skip
def test_what_we_do_not_read_is_named(theirs: Path, scheme: str, said: str) -> None:
    with pytest.raises(UnsupportedError, match=said):
        describe_directory(theirs / scheme)


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_are_llmcompressors_bytes(integers: Path, name: str) -> None:
    """Names, and every code and scale of weights that our writer packs of the same weights."""
    found, there = describe_directory(integers / name), Tensors(integers / name)
    assert {one.name for one in found.layers.values()} == {name}
    assert not found.contradictions
    one, source = registry.get(name), Tensors(SOURCE)
    stored = {part.name: part.unified if part.compressed_tensors is None else part.compressed_tensors
              for part in one.tensors}  # fmt: skip
    for module in found.layers:
        weight = source[f"{module}.weight"]
        bits = np.frombuffer(source.read(f"{module}.weight"), np.uint16).reshape(weight.shape)
        wide = (bits.astype(np.uint32) << 16).copy()
        packed = one.pack(wide, "F32", 1.0, rounded_to="F32")
        for part, data in packed.items():
            assert there.read(f"{module}.{stored[part]}") == data.tobytes(), f"{module}.{part}"
        leaves = {leaf.removeprefix(f"{module}.") for leaf in there if leaf.startswith(f"{module}.")}
        assert leaves - {"weight_shape"} == set(stored.values())
    assert validate.inspect(integers / name).findings == ()


def test_static_scales_of_inputs_are_llmcompressors(integers: Path, tmp_path: Path) -> None:
    """The largest magnitude of a layer's inputs over 127.5, of the same rows."""
    from transformers import AutoModelForCausalLM

    model, seen = AutoModelForCausalLM.from_pretrained(SOURCE, dtype=torch.float32), dict[str, float]()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(
                lambda _, given, name=name: seen.update({name: float(given[0].abs().max())})
            )
    with torch.inference_mode():
        for row in IDS:
            before = dict(seen)
            model(row[None])
            seen = {name: max(value, before.get(name, 0.0)) for name, value in seen.items()}
    there = Tensors(integers / "int8_static")
    ranges = Ranges(seen).scales(describe_directory(integers / "int8_static").layers, kv_cache.AUTO, UNKNOWN)
    for name, scale in ranges.items():
        assert struct.unpack("<f", there.read(name))[0] == pytest.approx(scale, rel=1e-5), name


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_of_llmcompressor_come_back(integers: Path, tmp_path: Path, name: str) -> None:
    made = tmp_path / "unified"
    made.mkdir()
    conversion.write(integers / name, made, "unified")
    convert(made, tmp_path / "back", "compressed_tensors")
    before, after = Tensors(integers / name), Tensors(tmp_path / "back")
    assert {n: (i.dtype, i.shape, after.read(n)) for n, i in after.items()} == {
        n: (i.dtype, i.shape, before.read(n)) for n, i in before.items()
    }
    mine, their = stated(tmp_path / "back"), stated(integers / name)
    assert {**mine, "producer": None, "version": None} == {**their, "producer": None, "version": None}
