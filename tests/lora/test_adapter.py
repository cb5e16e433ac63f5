"""PEFT's directories: what is read, what is refused, and the tensors that TensorRT-LLM's backend gets of them."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import adapters
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from builder.core.errors import BuilderError, IntegrityError, UnsupportedError, UsageError
from builder.lora import cache, model_checks, modules, tensors
from builder.lora.adapter import Adapter, open_adapter

CONFIG = json.loads((Path(__file__).parents[1] / "data" / "tiny-qwen3" / "config.json").read_text())
FIRST = "base_model.model.model.layers.0.self_attn.q_proj"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def opened(directory: Path, name: str = "sql", **options: Any) -> Adapter:
    return open_adapter(name, adapters.write(directory, **options))


def converted(adapter: Adapter, dtype: str, directory: Path) -> dict[str, torch.Tensor]:
    file = directory / "made" / "adapter.safetensors"
    tensors.write(adapter, dtype, file)
    return load_file(file)


# ---- conversion


@pytest.mark.parametrize(
    ("stored", "dtype", "digest"),
    [
        (torch.float32, "float16", "13be46e797e766d1"),
        (torch.float32, "bfloat16", "0191f761beb3b48b"),
        (torch.bfloat16, "float16", "47f8f4a1c8a6c11a"),
        (torch.float16, "float32", "d8e21a00ddbff329"),
    ],
)
def test_the_tensors_are_those_of_tensorrt_llms_own_converter(
    stored: torch.dtype, dtype: str, digest: str, tmp_path: Path
) -> None:
    """Digests: of what convert_hf_model of examples/hf_lora_convert.py@05316d33 made of this adapter, with its rows
    sorted by layer and module (its own order is that of the file, and the backend takes any)."""
    adapter = opened(tmp_path, kinds=adapters.ALL, rank=3, dtype=stored, use_rslora=True, lora_alpha=13)
    made = converted(adapter, dtype, tmp_path)
    assert made["lora_weights"].dtype is DTYPES[dtype]
    bits = made["lora_config"].numpy().tobytes() + made["lora_weights"].view(torch.uint8).numpy().tobytes()
    assert hashlib.sha256(bits).hexdigest()[:16] == digest


@given(
    kinds=st.sets(st.sampled_from(adapters.ALL), min_size=1), rank=st.integers(1, 9), alpha=st.integers(1, 64),
    rslora=st.booleans(), dtype=st.sampled_from(sorted(DTYPES)), stored=st.sampled_from(sorted(DTYPES)),
)  # fmt: skip
def test_each_row_is_one_layer(
    tmp_path_factory: pytest.TempPathFactory, kinds: set[str], rank: int, alpha: int, rslora: bool, dtype: str,
    stored: str,
) -> None:  # fmt: skip
    """Whatever the adapter, a row holds A, then the scaled B, then zeros, each rounded as torch rounds."""
    directory = tmp_path_factory.mktemp("adapter")
    options = {"kinds": sorted(kinds), "rank": rank, "lora_alpha": alpha, "use_rslora": rslora}
    adapter = opened(directory, dtype=DTYPES[stored], **options)
    made, source = converted(adapter, dtype, directory), load_file(directory / "adapter_model.safetensors")
    assert made["lora_config"].shape == (len(kinds) * adapters.LAYERS, 3)
    scale = alpha / math.sqrt(rank) if rslora else alpha / rank
    for (number, layer, size), row in zip(made["lora_config"].tolist(), made["lora_weights"], strict=True):
        name = f"base_model.model.{adapters.module(layer, modules.BY_ID[number].hf)}"
        a, b = source[f"{name}.lora_A.weight"], source[f"{name}.lora_B.weight"] * scale
        wanted = torch.cat([a.flatten(), b.flatten()]).to(DTYPES[dtype])
        assert size == rank
        assert torch.equal(row[: len(wanted)], wanted)
        assert not row[len(wanted) :].any()
    assert tensors.nbytes(adapter, made["lora_weights"].element_size()) == made["lora_weights"].nbytes


def test_ranks_and_scales_of_single_layers_are_pefts(tmp_path: Path) -> None:
    """Those by which merge_and_unload of PEFT 0.21.2 changed this model's weights, when the two were compared."""
    patterns = {"q_proj": 3, "layers.1.mlp.down_proj": 5.5, ".*up_proj": 7}
    found = opened(tmp_path, kinds=adapters.ALL, rank=4, lora_alpha=8, alpha_pattern=patterns).pairs
    assert {found[layer, "q_proj"].scale for layer in range(adapters.LAYERS)} == {3 / 4}
    assert found[0, "up_proj"].scale == 7 / 4
    assert (found[1, "down_proj"].scale, found[0, "down_proj"].scale) == (5.5 / 4, 2)
    wide = {
        f"{FIRST}.lora_A.weight": torch.ones(6, 256), f"{FIRST}.lora_B.weight": torch.ones(256, 6),
    }  # fmt: skip
    adapter = opened(tmp_path / "two", changed=wide, rank_pattern={r"model\.layers\.0\.self_attn\.q_proj": 6})
    assert (adapter.pairs[0, "q_proj"].rank, adapter.pairs[1, "q_proj"].rank, adapter.rank) == (6, 4, 6)


def test_a_pattern_for_each_layer_is_read_once(tmp_path: Path) -> None:
    """As rank_pattern of trained ranks has them; more than the 512 patterns that Python's `re` caches."""
    patterns = {f"layers.{layer}.self_attn.{kind}": 3 for layer in range(150) for kind in adapters.ALL[:4]}
    found = opened(tmp_path, kinds=adapters.ALL, rank=4, lora_alpha=8, alpha_pattern=patterns).pairs
    assert {pair.scale for (_, kind), pair in found.items() if kind in adapters.ALL[:4]} == {3 / 4}
    assert {pair.scale for (_, kind), pair in found.items() if kind in adapters.ALL[4:]} == {2}


def test_a_task_id_follows_from_the_content(tmp_path: Path) -> None:
    one, same = opened(tmp_path / "one").digest, opened(tmp_path / "two").digest
    other = opened(tmp_path / "three", lora_alpha=9).digest
    ids = [tensors.task_id(one, "float16"), tensors.task_id(one, "bfloat16"), tensors.task_id(other, "float16")]
    assert one == same
    assert len(set(ids)) == 3
    assert all(0 < id < 1 << 53 for id in ids)


# ---- what is refused

DAMAGED: list[tuple[dict[str, Any], type[BuilderError], str]] = [
    ({"peft_type": "IA3"}, UnsupportedError, "is 'IA3', and TensorRT-LLM serves LoRA only"),
    ({"use_dora": True}, UnsupportedError, "DoRA scales"),
    ({"modules_to_save": ["lm_head"]}, UnsupportedError, "whole layers are replaced"),
    ({"bias": "lora_only"}, UnsupportedError, "biases of the model are changed"),
    ({"lora_bias": True}, UnsupportedError, "second matrices have a bias"),
    ({"fan_in_fan_out": True}, UnsupportedError, "stored transposed"),
    ({"init_lora_weights": "pissa_niter_4"}, UnsupportedError, "pissa_niter_4, which changes the model's own weights"),
    ({"alpha_pattern": {"(a+)+b": 3}}, UnsupportedError, "alpha_pattern .* has the pattern"),
    ({"alpha_pattern": {"a*" * 9: 3}}, UnsupportedError, "alpha_pattern .* has the pattern"),
    ({"alpha_pattern": {f"{n}.*": 3 for n in range(200)}}, UnsupportedError, "alpha_pattern .* has the pattern"),
    ({"alpha_pattern": ["q_proj"]}, IntegrityError, "alpha_pattern of adapter_config.json is no object"),
    ({"rank_pattern": {"[a": 3}}, IntegrityError, r"has the pattern '\[a', which is no regular expression"),
    ({"lora_alpha": 10**400}, IntegrityError, "lora_alpha of the adapter sql is '1000"),
    ({"lora_alpha": math.nan}, IntegrityError, "lora_alpha of the adapter sql is 'nan'"),
    ({"lora_alpha": "much"}, IntegrityError, "lora_alpha of the adapter sql is 'much', not a number"),
    ({"r": 5}, IntegrityError, "ranks of .*q_proj .* lora_A has 4, lora_B 4, and adapter_config.json says 5"),
    ({"changed": {f"{FIRST}.lora_B.weight": None}}, IntegrityError, "only one of the two matrices of .*q_proj"),
    ({"changed": {f"{FIRST}.lora_B.weight": torch.ones(256, 3)}}, IntegrityError, "contradict each other"),
    ({"changed": {f"{FIRST}.lora_A.weight": torch.ones(4)}}, UnsupportedError, "tensors that no engine takes"),
    ({"changed": {f"{FIRST}.lora_magnitude_vector": torch.ones(256)}}, UnsupportedError, "lora_magnitude_vector"),
    (
        {"changed": {f"{FIRST}.lora_A.weight".replace("model.model.model", "model.model"): torch.ones(4, 256)}},
        UnsupportedError,
        "'base_model.model.(model.)?layers.0.self_attn.q_proj.lora_A.weight'",
    ),
    ({"changed": {"base_model.model.lm_head.weight": torch.ones(4, 4)}}, UnsupportedError, "lm_head"),
    (
        {"changed": {"base_model.model.model.layers.0.self_attn.qkv_proj.lora_A.weight": torch.ones(4, 256)}},
        UnsupportedError,
        "qkv_proj",
    ),
    ({"changed": dict.fromkeys(adapters.tensors(("q_proj", "v_proj"), 4, 1))}, IntegrityError, "has no tensors"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "kind", "says"), DAMAGED)
def test_an_adapter_that_no_engine_can_serve_is_refused(
    options: dict[str, Any], kind: type[BuilderError], says: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=says) as caught:
        opened(tmp_path, **options)
    assert caught.value.hint


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e6])
def test_values_that_the_engines_dtype_cannot_hold_are_refused(value: float, tmp_path: Path) -> None:
    bad = torch.ones(4, 256)
    bad[2, 3] = value
    adapter = opened(tmp_path, changed={f"{FIRST}.lora_A.weight": bad})
    with pytest.raises(IntegrityError, match="q_proj of layer 0 that are NaN, infinite or beyond F16"):
        converted(adapter, "float16", tmp_path)
    assert not (tmp_path / "made" / "adapter.safetensors").exists()


def test_a_directory_that_is_no_adapter_says_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no adapter_config.json and no adapter_model.safetensors"):
        open_adapter("sql", tmp_path)
    adapters.write(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(UsageError, match=r"no adapter_model\.safetensors") as caught:
        open_adapter("sql", tmp_path)
    assert "pickle" in caught.value.why
    (tmp_path / "adapter_model.bin").rename(tmp_path / "adapter_model.safetensors")
    for text in ("{", "[]", ""):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(IntegrityError, match=r"adapter_config.json can't be read"):
            open_adapter("sql", tmp_path)


# ---- the model and the engine


def test_an_adapter_must_fit_the_model(tmp_path: Path) -> None:
    one = opened(tmp_path, kinds=adapters.ALL, base_model_name_or_path="org/Other-7B")
    model_checks.check_fits([one], CONFIG)
    model_checks.check_engine([one], CONFIG)
    with pytest.raises(UsageError, match="sql does not fit this model") as caught:
        model_checks.check_fits([one], {**CONFIG, "num_hidden_layers": 4})
    assert "changes layer 4" in caught.value.why
    with pytest.raises(UsageError) as caught:
        model_checks.check_fits([one], {**CONFIG, "num_key_value_heads": 2})
    assert "k_proj of layer 0 has 256 inputs and 64 outputs, in the adapter 256 and 128" in caught.value.why
    assert "trained on 'org/Other-7B'" in caught.value.why
    assert "trained on 'org/Other-7B'" in model_checks.notes([one], "org/tiny-qwen3")[0]
    assert not model_checks.notes([one], "elsewhere/other-7b/")


def test_o_proj_of_wide_attention_is_refused(tmp_path: Path) -> None:
    """The C++ backend takes it for a square layer (Qwen3-0.6B: 2048 inputs, hidden_size 1024)."""
    wide = {**CONFIG, "head_dim": 64}
    one = opened(tmp_path, kinds=["q_proj", "o_proj"])
    with pytest.raises(UnsupportedError, match=r"changes o_proj, which has 512 inputs .* as many as hidden_size, 256"):
        model_checks.check_engine([one], wide)
    model_checks.check_engine([opened(tmp_path / "two", kinds=["q_proj"])], wide)


def test_an_adapter_that_no_request_can_bring_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the engine only: TensorRT-LLM's LLM class reads the files itself."""
    one = opened(tmp_path)
    monkeypatch.setattr(tensors, "LARGEST", tensors.nbytes(one) - 1)
    with pytest.raises(UnsupportedError, match=r"The adapter sql takes .* as an input"):
        model_checks.check_engine([one], CONFIG)


def test_an_engine_has_q_k_and_v_together() -> None:
    assert modules.enabled(["v_proj"]) == ["q_proj", "k_proj", "v_proj"]
    assert modules.enabled(["down_proj", "gate_proj"]) == ["gate_proj", "down_proj"]


def test_the_caches_hold_an_adapter_of_the_largest_rank() -> None:
    config = {"hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "num_key_value_heads": 8,
              "head_dim": 128, "num_hidden_layers": 36, "dtype": "bfloat16"}  # fmt: skip
    names = [module.name for module in modules.MODULES]
    build = {
        "plugin_config": {"lora_plugin": "auto"},
        "lora_config": {"lora_target_modules": names, "max_lora_rank": 64},
    }
    assert cache.largest(build, config) == 36 * 64 * 2 * (2 * 8192 + 2 * 5120 + 3 * 16384)
    found = {name: value for name, value, _ in cache.parameters(build, config)}
    assert found["lora_cache_max_adapter_size"] == "64"
    assert int(found["lora_cache_host_memory_bytes"]) == 8 * cache.largest(build, config)
    small = {**build, "lora_config": {"lora_target_modules": ["attn_q"], "max_lora_rank": 4}}
    assert "lora_cache_host_memory_bytes" not in {name for name, _, _ in cache.parameters(small, config)}
    assert not cache.parameters({**build, "plugin_config": {"lora_plugin": None}}, config)
