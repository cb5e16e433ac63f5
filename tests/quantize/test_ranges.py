"""Ranges of calibration: what a file holds of them, and the scales that they give."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.architectures import catalog
from builder.core.errors import IntegrityError
from builder.formats import kv_cache
from builder.formats.registry import BF16, FP8, NVFP4
from builder.quantize.ranges import Ranges

MAGNITUDES = st.floats(min_value=0, allow_nan=False)
NAMES = st.text(max_size=8)


@given(st.dictionaries(NAMES, MAGNITUDES), st.dictionaries(NAMES, st.tuples(MAGNITUDES, MAGNITUDES)))
def test_a_file_holds_them_bit_by_bit(
    tmp_path_factory: pytest.TempPathFactory, inputs: dict[str, float], cache: dict[str, tuple[float, float]]
) -> None:
    file, made = tmp_path_factory.getbasetemp() / "ranges.json", Ranges(inputs, cache)
    made.save(file)
    assert Ranges.load(file) == made


def test_layers_that_are_served_as_one_share_the_widest_range() -> None:
    architecture = catalog.of({"architectures": ["LlamaForCausalLM"]})
    attention = "model.layers.0.self_attn"
    layers = {f"{attention}.{x}_proj": NVFP4 for x in "qkv"} | {"model.layers.0.mlp.down_proj": FP8}
    layers["model.layers.0.mlp.up_proj"] = BF16
    inputs = dict(zip(layers, (1.0, 2.0, 4.0, 7.0), strict=False))
    made = Ranges(inputs, {attention: (448.0, 1.0)}).scales(layers, kv_cache.FP8, architecture)
    assert made == {
        **{f"{attention}.{x}_proj.input_scale": 4 / (6 * 448) for x in "qkv"},
        "model.layers.0.mlp.down_proj.input_scale": 7 / 448,
        f"{attention}.k_proj.k_scale": 1.0,
        f"{attention}.v_proj.v_scale": 1 / 448,
    }
    with pytest.raises(IntegrityError, match=r"no range for the inputs of model.layers.0.mlp.down_proj"):
        Ranges().scales({"model.layers.0.mlp.down_proj": FP8}, kv_cache.AUTO, architecture)
    with pytest.raises(IntegrityError, match=r"no range for the inputs of model.layers.0.mlp.down_proj") as caught:
        Ranges({"model.layers.0.mlp.down_proj": -0.0}).scales(
            {"model.layers.0.mlp.down_proj": FP8}, kv_cache.AUTO, architecture
        )
    assert "was 0," in caught.value.why
    assert "--keep-bf16 model.layers.0.mlp.down_proj" in caught.value.hint
