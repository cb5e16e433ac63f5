"""Every module of builder/formats with a FORMAT is found, and the formats agree where files are read by names alone."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from builder.core.errors import UnsupportedError
from builder.formats import base, kv_cache, registry
from builder.formats.declared import MIXED, declared
from builder.formats.registry import BF16, FP8, NVFP4

PACKAGE = Path(base.__file__).parent


def test_every_module_with_a_format_is_found() -> None:
    modules = [importlib.import_module(f"builder.formats.{path.stem}") for path in PACKAGE.glob("[a-z]*.py")]
    defined = {module.FORMAT for module in modules if hasattr(module, "FORMAT")}
    assert defined == set(registry.all_formats().values()) >= {NVFP4, FP8, BF16}
    assert registry.for_whole_model()[0] is NVFP4


def test_nothing_heavy_is_imported() -> None:
    code = "import sys; from builder.formats import registry; registry.all_formats(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize(
    ("name", "own", "shared"),
    [
        ("nvfp4", 8 * 64 + 8 * 8, 8),
        ("fp8", 1024, 8),
        ("bf16", 2048, 0),
        ("int8_sq", 1024 + 8 * 4, 4 + 256),
        ("int4_awq", 512 + 8 * 4, 256),
        ("int4_awq_64", 512 + 8 * 2 * 4, 256),
        ("nvfp4_awq", 8 * 64 + 8 * 8, 8 + 256),
    ],
)
def test_bytes_of_a_layer(name: str, own: int, shared: int) -> None:
    one, weight = registry.get(name), (8, 128)
    assert (one.own_bytes(weight), one.shared_bytes(weight)) == (own, shared)
    assert one.weight.weight_shape(one.weight.shape(weight)) == weight
    bits = [8 * tensor.nbytes(weight) / 1024 for tensor in one.tensors if len(tensor.dims) == 2]
    assert sum(bits) == one.bits


def test_a_scale_that_is_folded_into_a_norm_takes_no_bytes() -> None:
    """AWQ: q has none in the Hugging Face layout, o has; an engine's layers all have, in INT4."""
    int4, nvfp4 = registry.get("int4_awq"), registry.get("nvfp4_awq")
    sizes = {
        (one.name, role, unified): one.shared_bytes((8, 128), role, unified=unified)
        for one in (int4, nvfp4)
        for role in ("q", "o")
        for unified in (True, False)
    }
    assert [sizes["int4_awq", "q", True], sizes["int4_awq", "q", False]] == [0, 256]
    assert [sizes["nvfp4_awq", "q", True], sizes["nvfp4_awq", "q", False]] == [8, 8]
    assert {size for (name, role, _), size in sizes.items() if role == "o"} == {256, 264}


def test_a_tensors_axes_are_known_by_its_name_and_rank() -> None:
    assert registry.axes("weight", (8, 4)) == ("out", "in")
    assert registry.axes("weights_scaling_factor", (8, 4)) == ("out", "in")
    assert registry.axes("weights_scaling_factor", (1,)) == registry.axes("activation_scaling_factor", ()) == ()
    assert registry.axes("bias", (8,)) == ("out",)
    with pytest.raises(KeyError):
        registry.axes("zeros", (8, 4))


def test_formats_must_agree_on_the_axes_of_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    turned = base.StoredTensor("weight", "weight", "weight", ("I8",), (base.IN, base.OUT), "codes", "turned")
    other = base.NumberFormat("turned", "Turned", "TURNED", 8.0, (turned,), "turned")
    monkeypatch.setitem(registry.all_formats(), "turned", other)
    with pytest.raises(ValueError, match="turned: weight with 2 dimensions has other axes"):
        registry.axes("weight", (8, 4))


def test_what_a_configuration_declares() -> None:
    plain = declared({"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head", "*.0.mlp.*"]})
    assert plain.of("model.layers.1.mlp.up_proj") is NVFP4
    assert plain.of("model.layers.0.mlp.up_proj") is BF16
    assert plain.stored("model.layers.1.mlp.up_proj", "BF16") is BF16
    layers = {"a": {"quant_algo": "NVFP4", "group_size": 16}, "b": {"quant_algo": "FP8"}}
    mixed = declared({"quant_algo": MIXED, "quantized_layers": layers})
    assert [mixed.of(name) for name in "abc"] == [NVFP4, FP8, BF16]
    assert mixed.stored("c", "F8_E4M3") is FP8
    assert mixed.used == (NVFP4, FP8)
    plain = declared({"quant_algo": None, "kv_cache_quant_algo": "FP8"})
    assert (plain.of("a"), plain.used) == (BF16, ())


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_algo": "NVFP4", "group_size": 32},
        {"quant_algo": "W8A16"},
        {"quant_algo": MIXED, "quantized_layers": {"a": {"quant_algo": "W4A8_AWQ"}}},
    ],
)
def test_unknown_formats_are_rejected(quantization: dict[str, object]) -> None:
    with pytest.raises(UnsupportedError, match="not supported"):
        declared(quantization)


def test_formats_of_the_kv_cache() -> None:
    assert kv_cache.of_checkpoint("FP8") is kv_cache.FP8
    assert kv_cache.of_checkpoint(None) is kv_cache.AUTO
    assert (kv_cache.FP8.scale_bytes(unified=True), kv_cache.FP8.scale_bytes(unified=False)) == (8, 12)
    with pytest.raises(UnsupportedError, match="INT8"):
        kv_cache.of_checkpoint("INT8")
