"""Each rule of trtllm-build by its id: refused, rewritten, or said. A rule without a test here is a failure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from model_configs import QWEN3_8B

from builder.core.errors import BuilderError, UnsupportedError, UsageError
from builder.machine import gpus
from builder.preflight import checks
from builder.recipe import schema
from builder.targets.base import Inputs
from builder.trtllm import engine, rules
from builder.trtllm import flags as trtllm_flags
from builder.trtllm import versions as trtllm_versions
from builder.trtllm.rules import Flag, Subject

LLAMA = {**QWEN3_8B, "architectures": ["LlamaForCausalLM"]}
covers = pytest.mark.rule


def resolved(*flags: str, gpu: str = "sm120-fmha", sets: tuple[str, ...] = (), **values: object) -> schema.Resolved:
    """A recipe with these flags of trtllm-build (`name=value`)."""
    asked = [f"engine.flags.{flag}" for flag in flags]
    return schema.resolve({"model.id": "Qwen/Qwen3-8B", "gpu": gpu, **values}, sets=[*sets, *asked])


def flags_of(*flags: str, config: dict[str, Any] = QWEN3_8B, **kwargs: Any) -> dict[str, Flag]:
    return {flag.name: flag for flag in trtllm_flags.resolve(resolved(*flags, **kwargs), config)}


def notes_of(*flags: str, config: dict[str, Any] = QWEN3_8B, **kwargs: Any) -> dict[str, str]:
    asked = resolved(*flags, **kwargs)
    return {note.rule: note.text for note in trtllm_flags.notes(asked, config, trtllm_flags.resolve(asked, config))}


def subject(**facts: Any) -> Subject:
    """What no recipe can say yet: other weights, other KV caches, other cards."""
    version = trtllm_flags.load(facts.pop("tensorrt_llm", "1.2.1"))
    return dataclasses.replace(Subject(version=version, sm=120, architecture="Qwen3ForCausalLM"), **facts)


def rewritten(about: Subject, **asked: str) -> dict[str, Flag]:
    sizes = {"max_batch_size": "64", "max_input_len": "2048", "max_seq_len": "4096", "max_num_tokens": "8192"}
    flags = {name: Flag(name, value, "asked for", "recipe") for name, value in {**sizes, **asked}.items()}
    return rules.rewrite(about, flags)


def was_rewritten(flag: Flag, value: str, rule: str) -> None:
    assert flag.value == value
    assert flag.source.endswith(f"rule {rule}")
    assert flag.reason != "asked for"


def is_refused(rule: str, kind: type[BuilderError], message: str, act: Callable[[], object]) -> None:
    with pytest.raises(kind, match=message) as caught:
        act()
    assert caught.value.hint
    assert f"rule {rule}" in str(caught.value)


def test_every_rule_has_a_test() -> None:
    marks = [mark for test in globals().values() for mark in getattr(test, "pytestmark", [])]
    covered = {rule for mark in marks if mark.name == "rule" for rule in mark.args}
    for version in trtllm_flags.versions():
        assert set(trtllm_flags.load(version).rules) == covered, version


def test_every_flag_that_a_rule_names_is_a_flag() -> None:
    for version in map(trtllm_flags.load, trtllm_flags.versions()):
        for rule in version.rules.values():
            assert set(rule["flags"]) <= set(version.flags), rule["id"]
            assert rule["where"]
            assert rule["effect"]


# ---- what trtllm-build would fail on


@covers("R01")
@pytest.mark.parametrize("flag", ["checkpoint_dir=/c", "model_config=/c/config.json"])
def test_the_checkpoint_is_always_named_and_only_by_us(flag: str) -> None:
    argv = trtllm_flags.command([], checkpoint=Path("/c"), output=Path("/e"), timing_cache=Path("/t"))
    assert argv[argv.index("--checkpoint_dir") + 1] == "/c"
    is_refused("R01", UsageError, "set by the builder", lambda: flags_of(flag))


@covers("R02")
@pytest.mark.parametrize("flag", ["gather_context_logits=enable", "gather_all_token_logits=true"])
def test_context_logits_and_draft_tokens(flag: str) -> None:
    is_refused("R02", UsageError, "draft tokens", lambda: flags_of(flag, "max_draft_len=4"))
    assert flags_of(flag)["gather_context_logits"].value == ""
    assert "gather_context_logits" not in flags_of("gather_context_logits=disable", "max_draft_len=4")


@covers("R03")
def test_multiple_profiles_and_opt_num_tokens() -> None:
    is_refused("R03", UsageError, "itself", lambda: flags_of("multiple_profiles=enable", "opt_num_tokens=8"))


@covers("R04")
def test_a_model_class_file_needs_a_name() -> None:
    is_refused("R04", UsageError, "needs --model_cls_name", lambda: flags_of("model_cls_file=/m.py"))
    assert "model_cls_file" in flags_of("model_cls_file=/m.py", "model_cls_name=Mine")


@covers("R05")
def test_streamingllm_is_no_streaming() -> None:
    old = ("engine.tensorrt_llm=1.1.0",)
    on = "streamingllm=enable"
    is_refused("R05", UsageError, "it adds attention sinks", lambda: flags_of(on, config=LLAMA))
    is_refused("R05", UsageError, "it adds attention sinks", lambda: flags_of(on, sets=old))
    was_rewritten(flags_of(on, config=LLAMA, sets=old)["use_paged_context_fmha"], "disable", "R05")


@covers("R06")
def test_pp_reduce_scatter_is_for_mixtral() -> None:
    is_refused("R06", UsageError, "Mixtral", lambda: flags_of("pp_reduce_scatter=enable"))
    about = subject(architecture="MixtralForCausalLM")
    rules.refuse(about, {"pp_reduce_scatter": Flag("pp_reduce_scatter", "enable", "", "")})


@covers("R07")
def test_an_unknown_architecture_is_refused_before_any_work() -> None:
    with pytest.raises(UnsupportedError, match="GPT9ForCausalLM has no TensorRT-LLM layout"):
        checks.check_model(Inputs(resolved(), {**QWEN3_8B, "architectures": ["GPT9ForCausalLM"]}))


@covers("R09")
def test_a_build_config_file_would_replace_the_recipe() -> None:
    is_refused("R09", UsageError, "set by the builder", lambda: flags_of("build_config=/b.json"))


@covers("R11")
def test_plugins_that_sm100_does_not_have() -> None:
    is_refused(
        "R11", UnsupportedError, "sm100 does not support", lambda: flags_of("fp8_rowwise_gemm_plugin=auto", gpu="sm100")
    )
    is_refused("R11", UnsupportedError, "sm100", lambda: flags_of("bert_context_fmha_fp32_acc=enable", gpu="sm100"))
    for gpu in ("sm103", "sm120", "sm121"):
        assert flags_of("fp8_rowwise_gemm_plugin=auto", gpu=gpu)


@covers("R12")
def test_the_deprecated_name_of_the_kv_cache_type() -> None:
    is_refused("R12", UsageError, "contradicts", lambda: flags_of("paged_kv_cache=disable"))
    is_refused("R12", UsageError, "contradicts", lambda: flags_of("paged_kv_cache=enable", "kv_cache_type=continuous"))
    assert "paged_kv_cache" not in flags_of("paged_kv_cache=enable")


@covers("R32")
@pytest.mark.parametrize(
    "facts", [{"quant_algo": "W8A16"}, {"quant_algo": "W8A8_SQ_PER_CHANNEL"}, {"kv_cache_algo": "INT8"}]
)
def test_integer_formats_on_sm100_to_sm119(facts: dict[str, str]) -> None:
    is_refused("R32", UnsupportedError, "does not support", lambda: rules.refuse(subject(sm=103, **facts), {}))
    rules.refuse(subject(sm=120, **facts), {})


@covers("R38")
def test_eagle_needs_paged_fmha_and_has_limits() -> None:
    eagle = "speculative_decoding_mode=eagle"
    found = flags_of(eagle, "use_paged_context_fmha=disable")
    was_rewritten(found["use_paged_context_fmha"], "enable", "R38")
    assert found["use_fp8_context_fmha"].value == "enable"
    is_refused("R38", UsageError, "context FMHA is off", lambda: flags_of(eagle, gpu="sm120"))
    is_refused("R38", UsageError, "up to 512", lambda: flags_of(eagle, **{"engine.max_batch_size": 513}))
    is_refused("R38", UsageError, "up to 256", lambda: flags_of(eagle, "max_draft_len=257"))


@covers("R39")
@pytest.mark.parametrize("flag", ["gemm_swiglu_plugin=fp8", "low_latency_gemm_swiglu_plugin=fp8"])
def test_swiglu_plugins_are_for_fp8_models(flag: str) -> None:
    is_refused("R39", UsageError, "an FP8 model", lambda: flags_of(flag))
    name = flag.partition("=")[0]
    rules.refuse(subject(quant_algo="FP8"), {name: Flag(name, "fp8", "", "")})


@covers("R41")
def test_nvfp4_needs_blocks_of_16_and_takes_no_lora() -> None:
    odd = {**QWEN3_8B, "intermediate_size": 12280}
    is_refused("R41", UnsupportedError, r"intermediate_size \(into mlp.down_proj\) 12280", lambda: flags_of(config=odd))
    is_refused("R41", UnsupportedError, "do not support LoRA", lambda: flags_of("lora_plugin=auto"))
    is_refused("R41", UnsupportedError, "do not support LoRA", lambda: flags_of("lora_dir=/lora"))


@covers("R53")
def test_fp8_per_token_takes_no_lora() -> None:
    per_token = {"gpu": "sm89", "quantization.format": "fp8_pc_pt"}
    is_refused("R53", UnsupportedError, "do not support LoRA", lambda: flags_of("lora_plugin=auto", **per_token))
    assert flags_of(**per_token)
    assert flags_of("lora_plugin=auto", **{**per_token, "quantization.format": "fp8"})["lora_plugin"].value == "auto"


# ---- what trtllm-build would silently rewrite or ignore


@covers("R08")
def test_workers_are_no_more_than_ranks() -> None:
    was_rewritten(flags_of("workers=8")["workers"], "1", "R08")


@covers("R13")
def test_an_unset_kv_cache_is_paged() -> None:
    assert flags_of()["kv_cache_type"].value == "paged"
    found = rewritten(subject())["kv_cache_type"]
    assert (found.value, found.source.endswith("rule R13")) == ("paged", True)


@covers("R14")
def test_paged_state_is_for_recurrent_models() -> None:
    was_rewritten(flags_of("paged_state=enable")["paged_state"], "disable", "R14")
    assert "paged_state" not in flags_of()


@covers("R15", "R16")
def test_the_length_is_always_said_and_never_beyond_the_model() -> None:
    assert flags_of()["max_seq_len"].value == "4096"
    short = {**QWEN3_8B, "max_position_embeddings": 1024}
    assert flags_of(config=short)["max_seq_len"].value == "1024"
    is_refused(
        "R16", UnsupportedError, "1024 positions", lambda: flags_of(config=short, **{"engine.max_seq_len": 4096})
    )


@covers("R15", "R16")
@pytest.mark.parametrize(("kind", "longest"), [("yarn", 4096), ("linear", 4096), ("llama3", 1024), ("longrope", 1024)])
def test_rotary_scaling_lengthens_a_model_as_upstream_counts_it(kind: str, longest: int) -> None:
    config = {**QWEN3_8B, "max_position_embeddings": 1024, "rope_scaling": {"rope_type": kind, "factor": 4.0}}
    fits = {"engine.max_seq_len": longest, "engine.max_input_len": 512}
    assert flags_of(config=config, **fits)["max_seq_len"].value == str(longest)
    too_long = {**fits, "engine.max_seq_len": longest + 1}
    is_refused("R16", UnsupportedError, f"{longest} positions", lambda: flags_of(config=config, **too_long))


@covers("R15", "R16")
@pytest.mark.parametrize("kind", ["yarn", "linear", "dynamic"])
def test_a_length_that_is_scaled_already_is_not_scaled_again(kind: str) -> None:
    scaling = {"rope_type": kind, "factor": 4.0, "original_max_position_embeddings": 1024}
    config = {**QWEN3_8B, "max_position_embeddings": 4096, "rope_scaling": scaling}
    fits = {"engine.max_seq_len": 4096, "engine.max_input_len": 512}
    assert flags_of(config=config, **fits)["max_seq_len"].value == "4096"
    too_long = {**fits, "engine.max_seq_len": 4097}
    is_refused("R16", UnsupportedError, "4096 positions", lambda: flags_of(config=config, **too_long))


@covers("R17")
def test_a_prompt_is_no_longer_than_prompt_and_answer() -> None:
    was_rewritten(rewritten(subject(), max_input_len="9999")["max_input_len"], "4096", "R17")
    with pytest.raises(UsageError, match="no room for an answer"):
        resolved(sets=("engine.max_input_len=9999",))


@covers("R19")
def test_padded_batches_take_all_tokens() -> None:
    found = rewritten(subject(), remove_input_padding="disable")
    was_rewritten(found["max_num_tokens"], str(64 * 4096), "R19")


@covers("R20")
def test_without_fmha_an_iteration_holds_a_whole_prompt() -> None:
    short = {"engine.max_num_tokens": 100}
    was_rewritten(flags_of(gpu="sm120", **short)["max_num_tokens"], "2048", "R20")
    assert flags_of(**short)["max_num_tokens"].value == "100"


@covers("R21")
def test_with_fmha_an_iteration_holds_a_block() -> None:
    was_rewritten(flags_of(**{"engine.max_num_tokens": 3})["max_num_tokens"], "32", "R21")
    was_rewritten(flags_of("tokens_per_block=64", **{"engine.max_num_tokens": 3})["max_num_tokens"], "64", "R21")


@covers("R22")
def test_an_iteration_holds_no_more_than_the_batch() -> None:
    was_rewritten(flags_of(**{"engine.max_batch_size": 1})["max_num_tokens"], "4096", "R22")


@covers("R25")
def test_opt_num_tokens_is_within_max_num_tokens() -> None:
    was_rewritten(flags_of("opt_num_tokens=99999")["opt_num_tokens"], "8192", "R25")
    assert flags_of("opt_num_tokens=128")["opt_num_tokens"].reason == "asked for"


@covers("R26")
def test_fmha_off_takes_paged_and_fp8_fmha_with_it() -> None:
    found = flags_of("use_paged_context_fmha=enable", "use_fp8_context_fmha=enable", gpu="sm120")
    was_rewritten(found["use_paged_context_fmha"], "disable", "R26")
    was_rewritten(found["use_fp8_context_fmha"], "disable", "R26")
    assert "no KV cache reuse" in notes_of(gpu="sm120")["R26"]


@covers("R27")
@pytest.mark.parametrize(("kv", "paged"), [("FP8", "disable"), (None, "enable")])
def test_fp8_fmha_comes_with_fp8_weights(kv: str | None, paged: str) -> None:
    found = rewritten(subject(quant_algo="W4A16_AWQ", kv_cache_algo=kv), use_paged_context_fmha="enable")
    was_rewritten(found["use_fp8_context_fmha"], "disable", "R27")
    assert found["use_paged_context_fmha"].value == paged


@covers("R28")
@pytest.mark.parametrize(("kv", "paged"), [("FP8", "disable"), (None, "enable")])
def test_cards_before_ada_have_no_fp8_fmha(kv: str | None, paged: str) -> None:
    found = rewritten(subject(sm=86, kv_cache_algo=kv), use_paged_context_fmha="enable")
    was_rewritten(found["use_fp8_context_fmha"], "disable", "R28")
    assert found["use_paged_context_fmha"].value == paged


@covers("R29")
def test_paged_fmha_reads_a_kv_cache_that_is_not_fp8() -> None:
    found = flags_of(**{"quantization.kv_cache_dtype": "auto"})
    was_rewritten(found["use_fp8_context_fmha"], "disable", "R29")
    assert found["use_paged_context_fmha"].value == "enable"


@covers("R30")
def test_fp8_kv_with_paged_fmha_forces_fp8_fmha() -> None:
    was_rewritten(flags_of("use_fp8_context_fmha=disable")["use_fp8_context_fmha"], "enable", "R30")
    both = flags_of("use_fp8_context_fmha=disable", "use_paged_context_fmha=disable")
    assert both["use_fp8_context_fmha"].value == "disable"


@covers("R31")
def test_int8_kv_and_paged_fmha() -> None:
    about = subject(kv_cache_algo="INT8")
    was_rewritten(rewritten(about)["use_paged_context_fmha"], "disable", "R31")
    asked = {"use_paged_context_fmha": Flag("use_paged_context_fmha", "enable", "", "")}
    is_refused("R31", UsageError, "INT8 KV cache does not work", lambda: rules.refuse(about, asked))
    with pytest.raises(UsageError, match="INT8 KV cache does not work with paged context FMHA"):
        resolved(**{"quantization.kv_cache_dtype": "int8"})


@covers("R33")
@pytest.mark.parametrize("asked", ["bfloat16", "fp8", "auto"])
def test_an_nvfp4_checkpoint_sets_the_gemm_plugin(asked: str) -> None:
    was_rewritten(flags_of(f"gemm_plugin={asked}")["gemm_plugin"], "nvfp4", "R33")
    was_rewritten(rewritten(subject())["gemm_plugin"], "nvfp4", "R33")
    assert flags_of("gemm_plugin=disable")["gemm_plugin"].value == "disable"


@covers("R34")
def test_norm_quant_fusion_is_for_llama() -> None:
    was_rewritten(flags_of("norm_quant_fusion=enable")["norm_quant_fusion"], "disable", "R34")
    assert flags_of("norm_quant_fusion=enable", config=LLAMA)["norm_quant_fusion"].value == "enable"
    both = {"norm_quant_fusion": "enable", "reduce_fusion": "enable"}
    found = rewritten(subject(architecture="LlamaForCausalLM", tp=2), **both)
    was_rewritten(found["norm_quant_fusion"], "disable", "R34")


@covers("R35")
def test_reduce_fusion_is_for_llama_on_several_gpus() -> None:
    was_rewritten(flags_of("reduce_fusion=enable", config=LLAMA)["reduce_fusion"], "disable", "R35")
    assert rewritten(subject(architecture="LlamaForCausalLM", tp=2), reduce_fusion="enable")["reduce_fusion"].value == (
        "enable"
    )


@covers("R36")
def test_user_buffer_needs_reduce_fusion() -> None:
    was_rewritten(flags_of("user_buffer=enable")["user_buffer"], "disable", "R36")


@covers("R37")
def test_one_gpu_has_no_nccl() -> None:
    was_rewritten(flags_of("nccl_plugin=bfloat16")["nccl_plugin"], "disable", "R37")
    kept = rewritten(subject(tp=2, dtype="bfloat16"), nccl_plugin="bfloat16")["nccl_plugin"]
    assert (kept.value, kept.reason) == ("bfloat16", "asked for")


@covers("R37")
@pytest.mark.parametrize("asked", ["disable", "float32", "float16"])
def test_several_gpus_use_nccl_whatever_is_asked(asked: str) -> None:
    model = {**QWEN3_8B, "dtype": "bfloat16"}
    was_rewritten(flags_of(f"nccl_plugin={asked}", config=model, **{"engine.tp": 2})["nccl_plugin"], "bfloat16", "R37")
    was_rewritten(rewritten(subject(pp=2), nccl_plugin=asked)["nccl_plugin"], "auto", "R37")
    assert "nccl_plugin" not in flags_of(**{"engine.tp": 2})
    assert flags_of("nccl_plugin=auto", **{"engine.tp": 2})["nccl_plugin"].reason == "asked for"


@covers("R49")
def test_all_token_logits_are_those_of_context_and_generation() -> None:
    found = flags_of("gather_all_token_logits=enable")
    assert "gather_all_token_logits" not in found
    for name in ("gather_context_logits", "gather_generation_logits"):
        was_rewritten(found[name], "", "R49")
    assert not {name for name in flags_of("gather_all_token_logits=disable") if name.startswith("gather_")}
    reuse = {"repository.enable_kv_cache_reuse": True}
    is_refused("R47", UsageError, "KV cache reuse", lambda: flags_of("gather_all_token_logits=enable", **reuse))


@covers("R49")
def test_a_gate_on_what_is_served_accepts_all_token_logits() -> None:
    gate = {"evaluation.min_score": 90.0, "evaluation.runners": ["bf16", "served"]}
    asked = resolved("gather_all_token_logits=enable", **gate)
    checks.check_gate(asked.recipe, trtllm_flags.resolve(asked, QWEN3_8B))
    with pytest.raises(BuilderError, match="gather_context_logits"):
        checks.check_gate(resolved(**gate).recipe, trtllm_flags.resolve(resolved(**gate), QWEN3_8B))


@covers("R50", "R51")
def test_what_fast_build_and_visualize_network_leave_is_said() -> None:
    said = notes_of("fast_build=enable", "visualize_network=/onnx")
    assert "managed_weights.safetensors" in said["R50"]
    assert "/onnx" in said["R51"]
    assert not {"R50", "R51"} & set(notes_of())


@covers("R52")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("remove_input_padding=disable",), "remove_input_padding disable makes an engine"),
        (("gpt_attention_plugin=disable",), "gpt_attention_plugin disable makes an engine"),
        (("kv_cache_type=continuous",), "kv_cache_type continuous makes an engine"),
        (("kv_cache_type=continuous", "paged_kv_cache=disable"), "kv_cache_type continuous makes an engine"),
        (("kv_cache_type=disabled",), "generates no tokens"),
    ],
)
def test_engines_that_in_flight_batching_does_not_serve_are_refused(flags: tuple[str, ...], message: str) -> None:
    for gpu in ("sm120-fmha", "sm120", "cpu"):
        is_refused("R52", UsageError, message, lambda gpu=gpu: flags_of(*flags, gpu=gpu))  # type: ignore[misc]


@covers("R40")
def test_use_fused_mlp_has_no_effect_under_nvfp4() -> None:
    found = flags_of("use_fused_mlp=enable")["use_fused_mlp"]
    was_rewritten(found, "disable", "R40")
    assert "no effect with NVFP4" in found.reason


# ---- what the C++ side and the runtime would refuse, fall back from, or turn off


def checked(about: Subject, **asked: str) -> None:
    rules.check_kernels(about, {name: Flag(name, value, "", "") for name, value in asked.items()})


@covers("R42")
def test_fp8_fmha_has_its_cards() -> None:
    is_refused("R42", UnsupportedError, "this is sm110", lambda: checked(subject(sm=110)))
    off = {"context_fmha": "disable", "use_paged_context_fmha": "disable", "use_fp8_context_fmha": "enable"}
    is_refused("R42", UnsupportedError, "needs context FMHA", lambda: checked(subject(), **off))
    checked(subject(sm=103))
    is_refused("R42", UnsupportedError, "sm103", lambda: checked(subject(sm=103, tensorrt_llm="1.1.0")))


@covers("R43")
def test_fuse_fp4_quant_needs_fmha_and_a_card() -> None:
    assert flags_of("fuse_fp4_quant=enable")["fuse_fp4_quant"].value == "enable"
    is_refused("R43", UnsupportedError, "needs context FMHA", lambda: flags_of("fuse_fp4_quant=enable", gpu="sm120"))
    on, old = "fuse_fp4_quant=enable", ("engine.tensorrt_llm=1.0.0",)
    is_refused("R43", UnsupportedError, "one of sm100, sm120", lambda: flags_of(on, sets=old, gpu="sm121"))
    assert flags_of(on, sets=old)
    assert flags_of(on, sets=("engine.tensorrt_llm=1.1.0",), gpu="sm121")


@covers("R44")
@pytest.mark.parametrize("gpu", ["sm120-fmha", "sm121"])
def test_heads_without_an_fmha_kernel(gpu: str) -> None:
    gemma = {**QWEN3_8B, "head_dim": 256}
    is_refused("R44", UnsupportedError, "heads of 256", lambda: flags_of(config=gemma, gpu=gpu))
    on = "context_fmha=enable"
    is_refused("R44", UnsupportedError, "heads of 256", lambda: flags_of(on, config=gemma, gpu="sm120"))
    assert flags_of(config=gemma, gpu="sm120")
    assert flags_of("context_fmha=disable", config=gemma, gpu=gpu)
    for size in (64, 128, 192):
        assert flags_of(config={**QWEN3_8B, "head_dim": size}, gpu=gpu)
    assert "sm120-fmha avoids both" in notes_of(gpu="sm120")["R44"]


@covers("R45")
def test_an_nvfp4_kv_cache() -> None:
    for sm in (120, 121):
        about = subject(sm=sm, kv_cache_algo="NVFP4")
        is_refused("R45", UnsupportedError, "no NVFP4 KV cache", lambda about=about: rules.refuse(about, {}))  # type: ignore[misc]
    off = {"use_fp8_context_fmha": "disable", "use_paged_context_fmha": "disable"}
    is_refused("R45", UnsupportedError, "needs FP8", lambda: checked(subject(sm=100, kv_cache_algo="NVFP4"), **off))
    with pytest.raises(UnsupportedError, match="sm120-fmha can't run NVFP4 KV cache"):
        flags_of(**{"quantization.kv_cache_dtype": "nvfp4"})


@covers("R46")
def test_fp8_kv_and_fp8_fmha_go_together() -> None:
    apart = {"use_fp8_context_fmha": "disable"}
    is_refused("R46", UnsupportedError, "go together", lambda: checked(subject(), **apart))
    is_refused("R46", UnsupportedError, "go together", lambda: checked(subject(kv_cache_algo=None)))
    checked(subject(kv_cache_algo=None), **apart)


@covers("R47")
def test_kv_reuse_needs_paged_fmha_and_no_context_logits() -> None:
    for name in ("enable_kv_cache_reuse", "enable_chunked_context"):
        wanted = {f"repository.{name}": True}
        is_refused("R47", UsageError, f"{name} needs", lambda w=wanted: flags_of(gpu="sm120", **w))  # type: ignore[misc]
        assert flags_of(**wanted)
    reuse = {"repository.enable_kv_cache_reuse": True}
    is_refused("R47", UsageError, "turns KV cache reuse off", lambda: flags_of("gather_context_logits=enable", **reuse))
    assert "no KV cache reuse" in notes_of("use_paged_context_fmha=disable")["R47"]


@covers("R48")
def test_a_debug_override_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUILDER_FORCE_NUM_PROFILES", "3")
    is_refused("R48", UsageError, "BUILDER_FORCE_NUM_PROFILES", lambda: engine.check_machine(resolved()))


# ---- what is only said


@covers("R10", "R18", "R23", "R24")
def test_what_is_only_said() -> None:
    said = notes_of(**{"engine.max_num_tokens": 20000})
    assert "gather_generation_logits" in said["R10"]
    assert "max_input_len has no effect" in said["R18"]
    assert "16384" in said["R23"]
    assert "64 tokens" in said["R24"]
    assert "R23" not in notes_of()
    assert "R18" not in notes_of(gpu="sm120")
    assert "R24" not in notes_of("multiple_profiles=enable")


def test_the_plan_says_what_context_fmha_off_costs() -> None:
    said = trtllm_flags.notes(resolved(gpu="sm120"), QWEN3_8B, trtllm_flags.resolve(resolved(gpu="sm120"), QWEN3_8B))
    text = "\n".join(note.text for note in said)
    for cost in (
        "no KV cache reuse",
        "no chunked context",
        "quadratic workspace: 12.9 GB for 16 prompts of 2048 tokens",
    ):
        assert cost in text
    assert "no Triton templates" in notes_of(sets=("engine.tensorrt_llm=1.1.0",))["version"]
    assert "version" not in notes_of()
    assert trtllm_flags.notes(resolved(gpu="cpu"), QWEN3_8B, trtllm_flags.resolve(resolved(gpu="cpu"), QWEN3_8B)) == []


# ---- what we emit passes through the rules unchanged

SWITCH = st.sampled_from(["enable", "disable"])
SIZE = st.integers(1, 1 << 17)
FREE = {
    **dict.fromkeys(
        ("context_fmha", "use_paged_context_fmha", "use_fp8_context_fmha", "remove_input_padding", "norm_quant_fusion",
         "reduce_fusion", "user_buffer", "use_fused_mlp", "paged_state", "multiple_profiles", "fuse_fp4_quant",
         "gather_context_logits", "streamingllm", "strip_plan"), SWITCH),
    "gemm_plugin": st.sampled_from(["auto", "bfloat16", "fp8", "nvfp4", "disable"]),
    "nccl_plugin": st.sampled_from(["auto", "bfloat16", "disable"]),
    "tokens_per_block": st.sampled_from(["16", "32", "64", "128"]),
    "opt_num_tokens": SIZE.map(str),
    "workers": st.integers(1, 9).map(str),
    "speculative_decoding_mode": st.sampled_from(["eagle", "lookahead_decoding"]),
    "max_draft_len": st.integers(0, 300).map(str),
    "kv_cache_type": st.sampled_from(["paged", "continuous"]),
    "paged_kv_cache": SWITCH,
}  # fmt: skip
MODELS = st.fixed_dictionaries(
    {
        "architectures": st.sampled_from(["Qwen3ForCausalLM", "LlamaForCausalLM"]).map(lambda name: [name]),
        "num_attention_heads": st.sampled_from([16, 32]),
        "num_key_value_heads": st.sampled_from([1, 8, 16]),
        "head_dim": st.sampled_from([64, 128, 192, 256]),
        "hidden_size": st.sampled_from([1024, 4096]),
        "dtype": st.sampled_from(["bfloat16", "float16"]),
        "max_position_embeddings": st.sampled_from([None, 2048, 40960]),
    }
)
GPUS = st.sampled_from(gpus.names())


@given(
    model=MODELS,
    gpu=GPUS,
    version=st.sampled_from(trtllm_flags.versions()),
    sizes=st.tuples(SIZE, SIZE, SIZE),
    kv=st.sampled_from(["fp8", "auto"]),
    free=st.fixed_dictionaries({}, optional=FREE),
)
def test_what_we_emit_passes_through_the_rules_unchanged(
    model: dict[str, Any], gpu: str, version: str, sizes: tuple[int, int, int], kv: str, free: dict[str, str]
) -> None:
    """Over random recipes, cards and models: refused with a hint, or resolving twice equals resolving once."""
    batch, length, tokens = sizes
    chosen = {
        "engine.max_batch_size": batch,
        "engine.max_seq_len": length + 1,
        "engine.max_input_len": length,
        "engine.max_num_tokens": tokens,
        "engine.tensorrt_llm": version,
        "quantization.kv_cache_dtype": kv,
    }
    try:
        once = flags_of(*(f"{name}={value}" for name, value in free.items()), config=model, gpu=gpu, **chosen)
    except (UsageError, UnsupportedError) as error:
        if not error.hint:
            raise
        return
    names = [name for name in once if name not in trtllm_flags.SIZES]
    for name in trtllm_flags.SIZES:
        chosen[f"engine.{name}"] = int(once[name].value)
    again = flags_of(*(f"{n}={once[n].value or 'enable'}" for n in names), config=model, gpu=gpu, **chosen)
    assert {n: f.value for n, f in again.items()} == {n: f.value for n, f in once.items()}
    for flag in once.values():
        trtllm_versions.check(trtllm_flags.load(version), flag.name, flag.value)
        assert flag.reason
        assert flag.source
