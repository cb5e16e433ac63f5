"""Flags of trtllm-build: what a recipe comes to, each with a reason; what the version does not have is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from builder.architectures import attention
from builder.cli import explain
from builder.core.errors import UnsupportedError, UsageError
from builder.recipe import schema
from builder.trtllm import flags as trtllm_flags

QWEN3_8B = {"architectures": ["Qwen3ForCausalLM"], "max_position_embeddings": 40960}


def resolved(*sets: str, gpu: str = "sm120", **flags: object) -> schema.Resolved:
    return schema.resolve({"model.id": "Qwen/Qwen3-8B", "gpu": gpu, **flags}, sets=sets)


def values(*sets: str, config: dict[str, object] = QWEN3_8B, gpu: str = "sm120") -> dict[str, str]:
    return {flag.name: flag.value for flag in trtllm_flags.resolve(resolved(*sets, gpu=gpu), config)}


def test_the_profile_that_users_of_sm120_ask_for() -> None:
    assert values() == {
        "max_batch_size": "16",
        "max_input_len": "2048",
        "max_seq_len": "4096",
        "max_num_tokens": "8192",
        "gpt_attention_plugin": "bfloat16",
        "gemm_plugin": "nvfp4",
        "kv_cache_type": "paged",
        "remove_input_padding": "enable",
        "context_fmha": "disable",
        "use_paged_context_fmha": "disable",
        "use_fp8_context_fmha": "disable",
    }


def test_each_flag_has_a_reason_and_a_source() -> None:
    for flag in trtllm_flags.resolve(resolved(), QWEN3_8B):
        assert flag.reason
        assert flag.source
    # A "#" that no quotes protect is YAML's comment.
    assert "#2855" in {flag.name: flag.source for flag in trtllm_flags.resolve(resolved(), QWEN3_8B)}["context_fmha"]


def test_the_cpu_profile_has_the_same_flags() -> None:
    sizes = ("max_batch_size", "max_input_len", "max_seq_len", "max_num_tokens")
    on_cpu, on_card = values(gpu="cpu"), values()
    assert {k: v for k, v in on_cpu.items() if k not in sizes} == {k: v for k, v in on_card.items() if k not in sizes}


def test_the_attention_plugin_computes_in_the_models_type() -> None:
    assert values(config={**QWEN3_8B, "torch_dtype": "float16"})["gpt_attention_plugin"] == "float16"
    assert values(config={**QWEN3_8B, "dtype": "bfloat16"})["gpt_attention_plugin"] == "bfloat16"


def test_fmha_off_takes_paged_and_fp8_fmha_with_it() -> None:
    found = values("engine.flags.use_paged_context_fmha=enable", "engine.flags.use_fp8_context_fmha=enable")
    assert (found["use_paged_context_fmha"], found["use_fp8_context_fmha"]) == ("disable", "disable")


@pytest.mark.parametrize(("kv", "fp8"), [("fp8", "enable"), ("auto", "disable")])
def test_paged_fmha_reads_the_kv_cache_in_its_own_type(kv: str, fp8: str) -> None:
    sets = ["engine.flags.context_fmha=enable", "engine.flags.use_paged_context_fmha=enable"]
    found = values(*sets, "engine.flags.use_fp8_context_fmha=enable", f"quantization.kv_cache_dtype={kv}")
    assert found["use_fp8_context_fmha"] == fp8


def test_tokens_of_an_iteration_fit_prompt_and_batch() -> None:
    assert values("engine.max_num_tokens=100")["max_num_tokens"] == "2048"
    assert values("engine.max_batch_size=1", "engine.max_num_tokens=9999")["max_num_tokens"] == "4096"


def test_a_default_length_shrinks_to_the_model_and_an_asked_one_is_refused() -> None:
    short = {**QWEN3_8B, "max_position_embeddings": 1024}
    found = values(config=short)
    assert (found["max_seq_len"], found["max_input_len"]) == ("1024", "768")
    with pytest.raises(UnsupportedError, match="1024 positions"):
        trtllm_flags.resolve(resolved(**{"engine.max_seq_len": 4096}), short)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("contxt_fmha=enable", "Did you mean --context_fmha"),
        ("context_fmha=on", "takes one of enable, disable"),
        ("gemm_plugin=fp4", "takes one of"),
        ("tokens_per_block=many", "takes a number"),
    ],
)
def test_a_flag_that_this_version_does_not_take_is_refused(flag: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        trtllm_flags.resolve(resolved(f"engine.flags.{flag}"), QWEN3_8B)
    assert message in str(caught.value)


def test_versions_without_an_engine_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"1\.3\.0 builds no engines"):
        trtllm_flags.resolve(resolved("engine.tensorrt_llm=1.3.0"), QWEN3_8B)


def test_several_gpus_build_in_parallel() -> None:
    def workers(*sets: str) -> list[str]:
        return [flag.value for flag in trtllm_flags.resolve(resolved(*sets), QWEN3_8B) if flag.name == "workers"]

    assert workers() == []
    assert workers("engine.tp=2", "engine.pp=2") == ["4"]
    assert workers("engine.tp=2", "engine.flags.workers=1") == ["1"]


def test_the_command_line_keeps_the_timing_cache_out_of_the_working_directory() -> None:
    flags = trtllm_flags.resolve(resolved(), QWEN3_8B)
    argv = trtllm_flags.command(flags, checkpoint=Path("/c"), output=Path("/e"), timing_cache=Path("/t/model.cache"))
    assert argv[:3] == ["trtllm-build", "--max_batch_size", "16"]
    assert argv[argv.index("--output_timing_cache") + 1] == "/t/model.cache"
    assert argv[argv.index("--checkpoint_dir") + 1] == "/c"


def test_build_config_is_what_the_builder_would_write() -> None:
    flags = trtllm_flags.resolve(resolved(), QWEN3_8B)
    config = trtllm_flags.build_config(
        trtllm_flags.load("1.2.1"), flags, {"dtype": "bfloat16", "mapping": {"world_size": 1}}
    )
    assert (config["max_batch_size"], config["max_seq_len"], config["opt_num_tokens"]) == (16, 4096, 16)
    assert config["kv_cache_type"] == "PAGED"
    plugins = config["plugin_config"]
    assert (plugins["gemm_plugin"], plugins["gpt_attention_plugin"], plugins["nccl_plugin"]) == (
        "nvfp4",
        "bfloat16",
        None,
    )
    assert (plugins["context_fmha"], plugins["use_paged_context_fmha"], plugins["remove_input_padding"]) == (
        False,
        False,
        True,
    )
    assert plugins["tokens_per_block"] == 32
    assert plugins["lora_plugin"] is None


def built_config(*sets: str, world_size: int = 1) -> dict[str, object]:
    flags = trtllm_flags.resolve(resolved(*sets), QWEN3_8B)
    pretrained = {"dtype": "bfloat16", "mapping": {"world_size": world_size}}
    return trtllm_flags.build_config(trtllm_flags.load("1.2.1"), flags, pretrained)


def test_a_plugin_that_follows_the_models_type_is_spelled_auto() -> None:
    """Upstream dumps what was given; only PluginConfig's attributes resolve "auto" (plugin.py@c20322ff)."""
    plugins = built_config()["plugin_config"]
    assert isinstance(plugins, dict)
    auto = ("bert_attention_plugin", "moe_plugin", "mamba_conv1d_plugin")
    assert [plugins[name] for name in auto] == ["auto"] * 3
    assert (plugins["gpt_attention_plugin"], plugins["dtype"], plugins["fp8_rowwise_gemm_plugin"]) == (
        "bfloat16", "bfloat16", None,
    )  # fmt: skip
    given = built_config("engine.flags.gpt_attention_plugin=auto")["plugin_config"]
    assert isinstance(given, dict)
    assert given["gpt_attention_plugin"] == "auto"


def test_several_ranks_have_the_nccl_plugin_in_the_models_type() -> None:
    for asked in ((), ("engine.flags.nccl_plugin=disable",)):
        plugins = built_config("engine.tp=2", *asked, world_size=2)["plugin_config"]
        assert isinstance(plugins, dict)
        assert plugins["nccl_plugin"] == "bfloat16"


def test_the_engines_config_holds_upstreams_values() -> None:
    config = built_config()
    assert config["speculative_decoding_mode"] == 1  # SpeculativeDecodingMode.NONE
    assert config["lora_config"] == {
        "lora_dir": [], "lora_ckpt_source": "hf", "max_lora_rank": 64, "lora_target_modules": [],
        "trtllm_modules_to_hf_modules": {}, "max_loras": None, "max_cpu_loras": None,
        "swap_gate_up_proj_lora_b_weight": True,
    }  # fmt: skip
    mode = "engine.flags.speculative_decoding_mode=lookahead_decoding"
    assert built_config(mode)["speculative_decoding_mode"] == 8


def test_the_flags_of_one_run_are_not_the_engines() -> None:
    config = built_config("engine.flags.visualize_network=/onnx", "engine.flags.fast_build=enable")
    plugins = config["plugin_config"]
    assert isinstance(plugins, dict)
    assert not {"visualize_network", "dry_run"} & set(config)
    assert plugins["manage_weights"] is True
    gathered = built_config("engine.flags.gather_all_token_logits=enable")
    assert (gathered["gather_context_logits"], gathered["gather_generation_logits"]) == (True, True)


# ---- versions, removed flags, explain


@pytest.mark.parametrize("version", trtllm_flags.versions())
def test_a_version_has_all_its_facts(version: str) -> None:
    known = trtllm_flags.load(version)
    assert known.facts["version"] == version
    assert known.facts["engine"] is True
    assert len(known.rules) == 53
    assert not set(known.flags) & set(known.removed)
    flags = trtllm_flags.resolve(resolved(f"engine.tensorrt_llm={version}"), QWEN3_8B)
    config = trtllm_flags.build_config(known, flags, {"dtype": "bfloat16", "mapping": {"world_size": 1}})
    assert config["plugin_config"]["gemm_plugin"] == "nvfp4"


def test_the_plugin_flags_and_defaults_of_the_three_versions_are_the_same() -> None:
    def plugins(version: str) -> dict[str, object]:
        return {n: f["default"] for n, f in trtllm_flags.load(version).flags.items() if f["group"] == "plugin"}

    first, *others = map(plugins, trtllm_flags.versions())
    assert all(other == first for other in others)


@pytest.mark.parametrize("version", ["1.3.0rc21", "1.3.0rc22", "1.3.0", "1.4.0rc1", "2.0"])
def test_a_version_without_an_engine_path_is_refused_with_the_way_out(version: str) -> None:
    with pytest.raises(UnsupportedError, match="builds no engines") as caught:
        trtllm_flags.resolve(resolved(f"engine.tensorrt_llm='{version}'"), QWEN3_8B)
    assert "1.2.1 is the last stable version" in caught.value.why
    assert "--target llmapi" in caught.value.hint


@pytest.mark.parametrize("version", ["0.20.0", "1.2.0", "1.3.0rc15"])
def test_a_version_without_facts_is_refused_with_those_that_are_known(version: str) -> None:
    with pytest.raises(UnsupportedError, match="is not known here") as caught:
        trtllm_flags.resolve(resolved(f"engine.tensorrt_llm={version}"), QWEN3_8B)
    assert "1.0.0, 1.1.0, 1.2.1" in caught.value.why


def test_what_is_no_version_at_all() -> None:
    with pytest.raises(UsageError, match="'latest' is not a TensorRT-LLM version"):
        trtllm_flags.resolve(resolved("engine.tensorrt_llm=latest"), QWEN3_8B)


@pytest.mark.parametrize(
    ("flag", "parts"),
    [
        ("max_output_len=5", ("removed in 0.12", "max_seq_len")),
        ("enable_xqa=enable", ("removed in 0.16", "automatic")),
        ("tp_size=2", ("removed in 0.12", "--tp and --pp")),
        ("auto_parallel=2", ("removed in 1.2 ", "#8329", "--tp and --pp")),
        ("builder_opt=3", ("removed in 0.14", "nothing")),
        ("max_decoder_seq_len=5", ("another name of --max_seq_len",)),
        ("max_multimodal_len=5", ("another name of --max_prompt_embedding_table_size",)),
        ("use-paged-context-fmha=enable", ("no flag", "Did you mean --use_paged_context_fmha")),
        ("gemm_plugin=nvfp8", ("not 'nvfp8'", "Did you mean 'nvfp4'")),
        ("kv_cache_type=page", ("continuous, paged, disabled", "Did you mean 'paged'")),
        ("strip_plan=maybe", ("takes one of enable, disable",)),
        ("max_batch_size=8", ("max_batch_size is set twice", "--set engine.max_batch_size=8")),
        ("output_dir=/x", ("set by the builder",)),
    ],
)
def test_a_wrong_flag_is_answered_with_the_right_one(flag: str, parts: tuple[str, ...]) -> None:
    name, _, value = flag.partition("=")
    asked = schema.resolve({"model.id": "Qwen/Qwen3-8B", "gpu": "sm120", "engine.flags": {name: value}})
    with pytest.raises(UsageError) as caught:
        trtllm_flags.resolve(asked, QWEN3_8B)
    for part in parts:
        assert part in str(caught.value)


def test_a_flag_that_an_older_version_still_had_is_taken_there() -> None:
    sets = ["engine.tensorrt_llm=1.1.0", "engine.flags.auto_parallel=1"]
    assert values(*sets)["auto_parallel"] == "1"


def test_switches_are_passed_bare_and_sizes_may_be_repeated() -> None:
    flags = trtllm_flags.resolve(resolved("engine.flags.strip_plan=true", "engine.flags.max_batch_size=16"), QWEN3_8B)
    argv = trtllm_flags.command(flags, checkpoint=Path("/c"), output=Path("/e"), timing_cache=Path("/t"))
    assert argv[argv.index("--strip_plan") + 1].startswith("--")
    assert argv.count("--max_batch_size") == 1
    config = trtllm_flags.build_config(
        trtllm_flags.load("1.2.1"), flags, {"dtype": "bfloat16", "mapping": {"world_size": 1}}
    )
    assert config["use_strip_plan"] is True


@pytest.mark.parametrize("name", ["context_fmha", "--context_fmha", "context-fmha"])
def test_explain_tells_all_of_a_flag(name: str) -> None:
    found = explain.explain(name)
    assert found["flag"] == "--context_fmha"
    assert found["meaning"]
    assert {version: said["default"] for version, said in found["versions"].items()} == {
        "1.0.0": "enable", "1.1.0": "enable", "1.2.1": "enable",
    }  # fmt: skip
    assert {"R18", "R20", "R26", "R43", "R44"} <= {rule["id"] for rule in found["rules"]}
    assert found["profiles"]["sm120"] == "disable"
    assert found["profiles"]["sm120-fmha"] == "enable"
    assert any("plugin.py" in source for source in found["sources"])


def test_explain_knows_aliases_removed_and_versioned_flags() -> None:
    assert explain.explain("max_decoder_seq_len")["flag"] == "--max_seq_len"
    assert explain.explain("max_output_len")["removed"]["since"] == "0.12"
    gone = explain.explain("auto_parallel")
    assert (gone["versions"]["1.2.1"], gone["versions"]["1.1.0"]["default"]) == (None, 1)
    assert gone["removed"]["since"] == "1.2"
    with pytest.raises(UsageError, match="Did you mean --context_fmha"):
        explain.explain("contxt_fmha")
    for version in map(trtllm_flags.load, trtllm_flags.versions()):
        for name in (*version.flags, *version.removed):
            assert explain.explain(name)["flag"] == f"--{name}"


# ---- what the NVFP4 GEMM takes

WHOLE = {
    **QWEN3_8B, "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128,
}  # fmt: skip


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ({"intermediate_size": 12304}, "12304 inputs \\(intermediate_size \\(into mlp.down_proj\\)\\)"),
        ({"hidden_size": 4112}, "4112 inputs \\(hidden_size\\)"),
        ({"num_attention_heads": 33, "num_key_value_heads": 11, "head_dim": 80}, "2640 inputs \\(heads x head size"),
        (
            {"num_attention_heads": 16, "num_key_value_heads": 1, "head_dim": 98},
            "1764 outputs \\(q, k and v together\\)",
        ),
    ],
)
def test_sizes_that_the_nvfp4_gemm_does_not_take_are_refused_on_one_gpu_too(odd: dict[str, int], message: str) -> None:
    """Multiples of 16 are enough for the format, not for the kernel; the reference executor needs no more."""
    config: dict[str, object] = {**WHOLE, **odd}
    with pytest.raises(UnsupportedError, match=message) as caught:
        trtllm_flags.resolve(resolved(), config)
    assert "--set engine.flags.gemm_plugin=disable" in caught.value.hint
    assert trtllm_flags.resolve(resolved("engine.flags.gemm_plugin=disable"), config)
    assert trtllm_flags.resolve(resolved(gpu="cpu"), config)
    assert trtllm_flags.resolve(resolved(), WHOLE)


# ---- models that attend to their last tokens alone

MISTRAL = {"architectures": ["MistralForCausalLM"], "num_hidden_layers": 32, "max_position_embeddings": 32768}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "num_hidden_layers": 28, "sliding_window": 2048}


@pytest.mark.parametrize(
    ("config", "window"),
    [
        ({**MISTRAL, "sliding_window": 2048}, 2048),
        ({**MISTRAL, "sliding_window": None}, None),
        (MISTRAL, None),
        ({**MISTRAL, "sliding_window": 2048, "use_sliding_window": False}, None),
        ({**QWEN2, "use_sliding_window": False}, None),
        (QWEN2, None),
        ({**QWEN2, "use_sliding_window": True}, 2048),
        ({**QWEN2, "use_sliding_window": True, "max_window_layers": 28}, None),
        ({**QWEN2, "use_sliding_window": True, "max_window_layers": 21}, 2048),
        ({**QWEN2, "use_sliding_window": True, "layer_types": ["full_attention"] * 28}, None),
        ({**QWEN2, "use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]}, 2048),
        ({"architectures": ["LlamaForCausalLM"]}, None),
    ],
)
def test_a_sliding_window_is_said_where_sequences_are_longer(config: dict[str, object], window: int | None) -> None:
    assert attention.sliding_window(config) == window
    found = trtllm_flags.window_notes(config, trtllm_flags.resolve(resolved(), config))
    assert bool(found) == (window is not None)
    if found:
        assert "last 2048 tokens" in found[0].text
        assert "to all of up to 4096" in found[0].text
        short = trtllm_flags.resolve(resolved(**{"engine.max_seq_len": 2048, "engine.max_input_len": 1024}), config)
        assert trtllm_flags.window_notes(config, short) == []
