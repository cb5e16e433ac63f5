"""What the LLM class takes in each version, what it changes by itself, and what the plan says of both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from builder.cli import explain
from builder.core.errors import UnsupportedError, UsageError
from builder.llmapi import arguments as llmapi_arguments
from builder.llmapi import lora
from builder.llmapi import versions as llmapi_versions
from builder.recipe import schema
from tests.llmapi.test_arguments import MOE, QWEN3_8B, resolve, resolved, values

FIRST, NEW, LAST = "1.2.1", "1.3.0rc22", "1.4.0rc1"
V2 = "kv_cache_config.use_kv_cache_manager_v2=true"


def taken(version: str, *args: str, **more: Any) -> dict[str, Any]:
    return values(f"engine.tensorrt_llm='{version}'", *(f"llmapi.args.{arg}" for arg in args), **more)


def noted(version: str, *args: str, **more: Any) -> str:
    asked = resolved(f"engine.tensorrt_llm='{version}'", *(f"llmapi.args.{arg}" for arg in args), **more)
    return "\n".join(note.text for note in llmapi_arguments.notes(asked, llmapi_arguments.resolve(asked, QWEN3_8B)))


def refusal(version: str, *args: str, kind: type[Exception] = UsageError, **more: Any) -> str:
    with pytest.raises(kind) as caught:
        taken(version, *args, **more)
    return "\n".join(str(part) for part in (caught.value, *vars(caught.value).values()))


def test_the_facts_are_whole() -> None:
    raw = llmapi_versions.read()
    states = list(raw["states"])
    keys = {"type", "choices", "of", "or", "default", "least", "most", "above", "needs", "others"}
    for name, spec in raw["arguments"].items():
        assert set(spec) <= keys | {"since", "until", "then", "gone", "no_effect"}, name
        assert {"type", "default"} <= spec.keys(), name
        assert spec["type"] in llmapi_versions.TYPES
        assert {spec.get("since", states[0]), spec.get("until", states[-1])} <= set(states)
        assert ("until" in spec) == ("gone" in spec), name
        for state, changes in spec.get("then", {}).items():
            assert states.index(state) > states.index(spec.get("since", states[0])), name
            assert set(changes) <= keys, name
        assert spec.get("needs", name) in raw["arguments"]
    assert not set(raw["arguments"]) & set(raw["refused"])
    assert llmapi_arguments.SAID.keys() <= raw["arguments"].keys()
    known = set(schema.known_keys())
    assert set(llmapi_arguments.SAID.values()) | set(llmapi_arguments.UNUSED) <= known


def test_every_default_is_a_value_that_its_version_takes() -> None:
    for row in llmapi_versions.read()["versions"]:
        facts = llmapi_versions.load(row["first"])
        for name, spec in facts.arguments.items():
            if spec["default"] not in ([], None):
                llmapi_versions.check(facts, name, spec["default"])


def test_every_backend_for_experts_has_a_row() -> None:
    for row in llmapi_versions.read()["versions"]:
        facts = llmapi_versions.load(row["first"])
        assert set(facts.arguments["moe_config.backend"]["choices"]) <= facts.moe_sms.keys()


# ---- values


@pytest.mark.parametrize(
    ("version", "setting"),
    [
        (NEW, "scheduler_config.context_chunking_policy=FORCE_CHUNK"),
        (NEW, "scheduler_config.waiting_queue_policy=priority"),
        (NEW, "nvfp4_gemm_config.allowed_backends=[marlin]"),
        (NEW, "kv_cache_config.use_kv_cache_manager_v2=auto"),
        (NEW, V2),
        (NEW, "iter_stats_max_iterations=-1"),
        (NEW, "request_stats_max_iterations=-1"),
        (NEW, "max_stats_len=-1"),
        (NEW, "generation_config=auto"),
        (NEW, "telemetry_config.usage_context=cli_serve"),
        (NEW, "prefill_cuda_graph_backend=breakable"),
        (NEW, "sampler_type=auto"),
        (NEW, "perf_metrics_max_requests=4"),
        (FIRST, "sampler_type=TRTLLMSampler"),
        (FIRST, "kv_cache_config.onboard_blocks=false"),
        (FIRST, "attn_backend=FLASHINFER"),
        (NEW, "attn_backend=FLASHINFER"),
    ],
)
def test_what_the_class_takes_is_taken(version: str, setting: str) -> None:
    name, _, value = setting.partition("=")
    found = taken(version, setting)[name]
    assert (json.dumps(found).strip('"'), str(found))[isinstance(found, list)].replace("'", "") == value


@pytest.mark.parametrize(
    ("version", "setting", "message"),
    [
        (FIRST, "scheduler_config.context_chunking_policy=FORCE_CHUNK", "FIRST_COME_FIRST_SERVED, EQUAL_PROGRESS"),
        (FIRST, "scheduler_config.waiting_queue_policy=priority", "not a known argument"),
        (FIRST, "generation_config=auto", "not a known argument"),
        (FIRST, "telemetry_config.disabled=true", "not a known argument"),
        (FIRST, "nvfp4_gemm_config.allowed_backends=[cutlass]", "not a known argument"),
        (NEW, "iter_stats_max_iterations=-2", "takes -1 or more"),
        (NEW, "request_stats_max_iterations=-2", "takes -1 or more"),
        (NEW, "max_stats_len=-2", "takes -1 or more"),
        (NEW, "attn_backend=null", "takes a value of type str"),
        (NEW, "nvfp4_gemm_config.allowed_backends=null", "takes a value of type list"),
        (NEW, "nvfp4_gemm_config.allowed_backends=[cutlas]", "a list of cutlass"),
        (NEW, "nvfp4_gemm_config.allowed_backends=[]", "a list of cutlass"),
        (NEW, "prefill_cuda_graph_backend=null", "takes a value of type str"),
        (NEW, "sampler_type=TRTLLMSampler", "takes one of auto, TorchSampler"),
        (NEW, "kv_cache_config.use_kv_cache_manager_v2=always", "of type bool or 'auto'"),
        (NEW, "kv_cache_config.max_util_for_resume=0", "more than 0, up to 1"),
        (NEW, "kv_cache_config.dtype=nvfp4", "does not agree with the checkpoint"),
    ],
)
def test_what_the_class_refuses_is_refused(version: str, setting: str, message: str) -> None:
    kind = UnsupportedError if "dtype" in setting else UsageError
    args = [setting, V2] if "max_util" in setting else [setting]
    assert message in refusal(version, *args, kind=kind)


def test_an_argument_of_another_version_is_refused_and_told_so() -> None:
    assert "It was removed: blocks are always onboarded" in refusal(NEW, "kv_cache_config.onboard_blocks=true")
    assert "came later" in refusal(FIRST, "pp_partition=[20, 16]", **{"engine.pp": 2})
    assert taken(NEW, "pp_partition=[20, 16]", **{"engine.pp": 2})["pp_partition"] == [20, 16]
    # One that a later state of main moved elsewhere has been removed; one that the version still has is not.
    assert "use kv_cache_config.block_reuse_config.policy" in refusal(
        NEW, "kv_cache_config.block_reuse_policy=per_request"
    )
    assert "removed" not in refusal(FIRST, "kv_cache_config.block_reuse_policy=per_request")


@pytest.mark.parametrize(
    ("backend", "runs"),
    [
        ("AUTO", ["sm100", "sm103", "sm120", "sm121"]),
        ("CUTLASS", ["sm100", "sm103", "sm120", "sm121"]),
        ("VANILLA", ["sm100", "sm103", "sm120", "sm121"]),
        ("CUTEDSL", ["sm100", "sm103", "sm120", "sm121"]),
        ("TRTLLM", ["sm100", "sm103"]),
        ("DENSEGEMM", ["sm100", "sm103"]),
        ("MEGAMOE_CUTEDSL", ["sm100", "sm103"]),
        ("DEEPGEMM", []),
        ("TRITON", []),
        ("MARLIN", []),
        ("MEGAMOE_DEEPGEMM", []),
    ],
)
def test_a_backend_for_experts_runs_where_it_has_kernels_for_nvfp4(backend: str, runs: list[str]) -> None:
    llmapi_versions.check(llmapi_versions.load(NEW), "moe_config.backend", backend)  # the class takes the word
    for gpu in ("sm100", "sm103", "sm120", "sm121"):
        asked = f"moe_config.backend={backend}"
        if gpu in runs:
            assert taken(NEW, asked, config=MOE, gpu=gpu)["moe_config.backend"] == backend
        else:
            assert f"does not run NVFP4 experts on {gpu}" in refusal(
                NEW, asked, kind=UnsupportedError, config=MOE, gpu=gpu
            )


def test_a_backend_for_experts_is_one_of_the_version() -> None:
    assert "takes one of AUTO, CUTLASS" in refusal(NEW, "moe_config.backend=WIDEEP", config=MOE, gpu="sm100")
    assert "takes a value of type str" in refusal(NEW, "moe_config.backend=null", config=MOE)
    assert taken(FIRST, "moe_config.backend=WIDEEP", config=MOE, gpu="sm100")["moe_config.backend"] == "WIDEEP"
    assert "takes one of CUTLASS" in refusal(FIRST, "moe_config.backend=AUTO", config=MOE)
    assert "takes one of CUTLASS" in refusal(FIRST, "moe_config.backend=DENSEGEMM", config=MOE)
    assert "sm120" in refusal(FIRST, "moe_config.backend=CUTEDSL", kind=UnsupportedError, config=MOE)
    assert taken(FIRST, "moe_config.backend=CUTEDSL", config=MOE, gpu="sm103")["moe_config.backend"] == "CUTEDSL"


def test_heads_without_a_kernel_for_an_fp8_cache_are_refused() -> None:
    wide = {**QWEN3_8B, "head_dim": 256}
    said = refusal(FIRST, kind=UnsupportedError, config=wide)
    assert "heads of 256" in said
    assert "#17911" in said
    assert "no kernel of its own" not in said
    assert values("quantization.kv_cache_dtype=auto", config=wide)
    assert values(config=wide, gpu="sm100")


# ---- what the class changes by itself, and what it would take and not heed


@pytest.mark.parametrize("gpu", ["sm100", "sm103", "sm120"])
def test_pipeline_stages_take_cute_dsl_on_sm100(gpu: str) -> None:
    names = ("use_cute_dsl_bf16_bmm", "use_cute_dsl_bf16_gemm")
    found = resolve(f"engine.tensorrt_llm='{NEW}'", "engine.pp=2", gpu=gpu)
    assert found["disable_overlap_scheduler"].value
    if gpu == "sm120":
        assert not set(names) & found.keys()
    else:
        assert [found[name].value for name in names] == [True, True]
        assert "pipeline stages" in found[names[0]].reason
    assert not set(names) & resolve(f"engine.tensorrt_llm='{NEW}'", gpu=gpu).keys()
    assert not set(names) & resolve("engine.pp=2", gpu=gpu).keys()  # 1.2.1 has no such argument


def test_flashinfer_turns_block_reuse_off() -> None:
    found = resolve("llmapi.args.attn_backend=FLASHINFER")["kv_cache_config.enable_block_reuse"]
    assert found.value is False
    assert "FLASHINFER" in found.reason
    with pytest.raises(UsageError, match="reuses no KV cache blocks"):
        values("llmapi.args.attn_backend=FLASHINFER", "repository.enable_kv_cache_reuse=true")


def test_vanilla_attention_has_one_block() -> None:
    assert values("llmapi.args.attn_backend=VANILLA")["kv_cache_config.tokens_per_block"] == 8192


def test_an_empty_buffer_of_statistics_becomes_the_smallest() -> None:
    assert taken(NEW, "max_stats_len=0")["max_stats_len"] == 1


def test_an_early_first_token_comes_from_the_overlap_scheduler() -> None:
    early = "enable_early_first_token_response=true"
    assert taken(NEW, early)["enable_early_first_token_response"] is True
    assert taken(NEW, early, "disable_overlap_scheduler=true")["enable_early_first_token_response"] is False


def test_prefill_graphs_and_torch_compile_agree() -> None:
    old = "torch_compile_config.enable_piecewise_cuda_graph=true"
    assert taken(NEW, old)["prefill_cuda_graph_backend"] == "piecewise"
    found = taken(NEW, old, "torch_compile_config.capture_num_tokens=[8, 64, 8]")
    assert found["torch_compile_config.capture_num_tokens"] == found["prefill_capture_num_tokens"] == [64, 8]
    assert "prefill_cuda_graph_backend" not in taken(FIRST, old)
    assert taken(NEW, "prefill_cuda_graph_backend=piecewise")["prefill_capture_num_tokens"][:3] == [1, 2, 4]
    assert "contradicts" in refusal(NEW, old, "prefill_cuda_graph_backend=disabled")
    assert "does not work with torch_compile_config" in refusal(
        NEW, "torch_compile_config.enable_inductor=true", "prefill_cuda_graph_backend=breakable"
    )
    sizes = ["torch_compile_config.capture_num_tokens=[8]", "prefill_capture_num_tokens=[16]"]
    assert "contradicts" in refusal(NEW, *sizes, "prefill_cuda_graph_backend=piecewise")


def test_what_only_the_second_cache_manager_heeds_needs_it() -> None:
    disk = ["kv_cache_config.disk_cache_size=1000000", "kv_cache_config.disk_cache_path=/disk"]
    policy = "kv_cache_config.block_reuse_config.policy=per_conversation"
    assert taken(NEW, V2, *disk)["kv_cache_config.disk_cache_path"] == "/disk"
    assert taken(NEW, V2, policy)["kv_cache_config.block_reuse_config.policy"] == "per_conversation"
    for given in (disk, [policy], ["kv_cache_config.block_reuse_config.max_num_turns=3"]):
        assert "has no effect unless kv_cache_config.use_kv_cache_manager_v2" in refusal(NEW, *given)
    assert "needs a directory" in refusal(NEW, V2, disk[0])


# ---- speculation without a draft model


def test_ngrams_are_drafted_without_the_overlap_scheduler() -> None:
    found = resolve("llmapi.args.speculative_config.decoding_type=NGram")
    assert found["disable_overlap_scheduler"].value is True
    assert "n-grams" in found["disable_overlap_scheduler"].reason
    assert found["speculative_config.max_draft_len"].value == 4
    assert found["speculative_config.max_matching_ngram_size"].value == 2
    assert "needs no draft model" in noted(FIRST, "speculative_config.decoding_type=NGram")


def test_suffixes_are_drafted_beside_it() -> None:
    found = taken(NEW, "speculative_config.decoding_type=SA", "speculative_config.max_draft_len=8")
    assert found["disable_overlap_scheduler"] is False
    assert found["speculative_config.max_draft_len"] == 8
    assert found["speculative_config.max_matching_ngram_size"] == -1
    pool = ["speculative_config.enable_global_pool=true", "speculative_config.global_pool_size=64"]
    assert taken(NEW, "speculative_config.decoding_type=SA", *pool)["speculative_config.global_pool_size"] == 64
    assert "takes one of NGram" in refusal(FIRST, "speculative_config.decoding_type=SA")


@pytest.mark.parametrize(
    ("kind", "setting", "message"),
    [
        ("NGram", "max_matching_ngram_size=-1", "NGram takes 1 or more"),
        ("SA", "max_matching_ngram_size=0", "or -1 for the longest match"),
        ("NGram", "enable_global_pool=true", "not a field of NGram"),
        ("SA", "is_keep_all=false", "not a field of SA"),
        ("SA", "global_pool_size=4", "needs enable_global_pool"),
        (None, "max_draft_len=3", "decoding_type is missing"),
    ],
)
def test_a_field_of_the_other_kind_is_refused(kind: str | None, setting: str, message: str) -> None:
    args = [f"speculative_config.{setting}", *([f"speculative_config.decoding_type={kind}"] if kind else [])]
    assert message in refusal(NEW, *args)


# ---- LoRA


def adapter(directory: Path, rank: int = 8) -> Path:
    directory.mkdir(parents=True)
    (directory / lora.CONFIG).write_text(json.dumps({"r": rank, "target_modules": ["q_proj"]}))
    (directory / lora.WEIGHTS[0]).write_bytes(b"weights")
    return directory


def test_adapters_are_checked_and_named(tmp_path: Path) -> None:
    one = adapter(tmp_path / "one")
    found = taken(FIRST, f"lora_config.lora_dir=[{one}]", "lora_config.max_loras=2")
    assert (found["lora_config.lora_dir"], found["lora_config.max_loras"]) == ([str(one)], 2)
    assert "LoRA on NVFP4 layers was not tested" in noted(FIRST, f"lora_config.lora_dir=[{one}]")
    before = lora.digests({lora.DIRECTORIES: [str(one)]})
    (one / lora.WEIGHTS[0]).write_bytes(b"others")
    assert lora.digests({lora.DIRECTORIES: [str(one)]}) != before


def test_an_adapter_that_cannot_be_served_is_refused(tmp_path: Path) -> None:
    one, wide = adapter(tmp_path / "one"), adapter(tmp_path / "wide", rank=128)
    also = adapter(tmp_path / "other" / "one")
    empty = tmp_path / "empty"
    empty.mkdir()
    for directories, message in (
        ([empty], "is no LoRA adapter: it has no adapter_config.json and no adapter_model.safetensors"),
        ([wide], "has rank 128, and max_lora_rank is 64"),
        ([one, also], "Two LoRA adapters are called one"),
        ([Path("one")], "by its whole path"),
    ):
        assert message in refusal(FIRST, f"lora_config.lora_dir=[{', '.join(map(str, directories))}]")
    raised = taken(FIRST, f"lora_config.lora_dir=[{wide}]", "lora_config.max_lora_rank=128")
    assert raised["lora_config.max_lora_rank"] == 128
    assert "needs the adapters' directories" in refusal(FIRST, "lora_config.max_lora_rank=8")
    assert "needs the adapters' directories" in refusal(FIRST, "peft_cache_config.host_cache_size=8")
    assert "list the adapters" in refusal(FIRST, "enable_lora=true")
    breakable = "prefill_cuda_graph_backend=breakable"
    assert "does not work with lora_config" in refusal(NEW, f"lora_config.lora_dir=[{one}]", breakable)


# ---- what is said


def test_usage_data_is_off_unless_it_is_asked_for() -> None:
    for version in (NEW, LAST):
        found = resolve(f"engine.tensorrt_llm='{version}'")["telemetry_config.disabled"]
        assert found.value is True
        assert "by default" in found.reason
    assert "telemetry_config.disabled" not in taken(FIRST)
    assert "Usage data" not in noted(FIRST)
    assert "Usage data is not sent" in noted(NEW)
    asked = "telemetry_config.disabled=false"
    assert taken(NEW, asked)["telemetry_config.disabled"] is False
    assert "Usage data is sent to NVIDIA" in noted(NEW, asked)


def test_the_plan_says_where_a_value_is_not_certain_or_has_no_effect() -> None:
    assert "an early release candidate" in noted(NEW, "generation_config=auto")
    assert "an early release candidate" in noted(NEW, "kv_cache_config.use_kv_cache_manager_v2=auto")
    assert "an early release candidate" not in noted(NEW, "scheduler_config.waiting_queue_policy=priority")
    assert "sampler_type has no effect in TensorRT-LLM 1.3.0rc22" in noted(NEW, "sampler_type=TorchSampler")
    assert "perf_metrics_max_requests has no effect" in noted(NEW, "perf_metrics_max_requests=3")
    assert "no effect" not in noted(FIRST, "sampler_type=TorchSampler")


def test_the_plan_says_where_upstreams_documents_contradict_each_other() -> None:
    one, two = noted(FIRST), noted(FIRST, **{"engine.tp": 2})
    assert "MPI_ERR_SPAWN" in one
    assert "BUILDER_LLMAPI_LAUNCH=1 builder serve" in one
    assert "2 ranks are started by mpirun" in two
    assert all("contradict each other" in said and "test_triton_llmapi.py@222982db" in said for said in (one, two))


def test_arguments_are_explained() -> None:
    found = explain.explain("kv_cache_config.dtype")
    assert found["versions"]["1.2.1"] == {"default": "auto", "takes": ["auto", "fp8"]}
    assert explain.explain("llmapi.args.max_batch_size")["versions"]["1.2.1"]["default"] == 2048
    assert explain.explain("--max_batch_size")["flag"] == "--max_batch_size"
    assert explain.explain("pp_partition")["versions"]["1.2.1"] is None
    streams = explain.explain("torch_compile_config.max_num_streams")["versions"]
    assert {row["default"] for row in streams.values()} == {1, 3}
    assert explain.explain("lora_config.lora_dir")["versions"]["1.2.1"]["takes"] == "a list of paths"
    assert "TorchSampler" in explain.explain("sampler_type")["note"]
    assert "only the engine path" in explain.explain("quant_config")["note"]
    with pytest.raises(UsageError) as caught:
        explain.explain("kv_cache_config.dtypes")
    assert "kv_cache_config.dtype" in caught.value.why
