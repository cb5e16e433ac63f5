"""The LLM arguments that a recipe comes to: facts, rules, refusals, and what a model.yaml makes of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from builder.core.errors import IntegrityError, UnsupportedError, UsageError
from builder.formats import kv_cache
from builder.llmapi import arguments as llmapi_arguments
from builder.llmapi import repository as llmapi_repository
from builder.llmapi import versions as llmapi_versions
from builder.llmapi.arguments import Argument
from builder.machine import gpus
from builder.preflight import checks
from builder.recipe import schema
from builder.targets.base import Inputs
from tests.pipeline.test_plan import dense, sparse

QWEN3_8B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
}
MOE = {**QWEN3_8B, "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 128, "moe_intermediate_size": 768}


def resolved(*sets: str, gpu: str = "sm120", **flags: Any) -> schema.Resolved:
    return schema.resolve({"model.id": "m", "gpu": gpu, "target": "llmapi", **flags}, sets=sets)


def resolve(*sets: str, gpu: str = "sm120", config: dict[str, Any] = QWEN3_8B, **flags: Any) -> dict[str, Argument]:
    asked = resolved(*sets, gpu=gpu, **flags)
    arguments = llmapi_arguments.resolve(asked, config)
    llmapi_arguments.check_model(asked, config)
    return {argument.name: argument for argument in arguments}


def values(*sets: str, **more: Any) -> dict[str, Any]:
    return {name: argument.value for name, argument in resolve(*sets, **more).items()}


def test_the_recipe_comes_to_these_arguments_for_qwen3_8b() -> None:
    assert llmapi_arguments.tree(list(resolve().values())) == {
        "dtype": "bfloat16",
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "max_batch_size": 64,
        "max_input_len": 2048,
        "max_seq_len": 4096,
        "max_num_tokens": 8192,
        "enable_chunked_prefill": True,
        "attn_backend": "TRTLLM",
        "disable_overlap_scheduler": False,
        "kv_cache_config": {
            "dtype": "fp8",
            "free_gpu_memory_fraction": 0.9,
            "tokens_per_block": 32,
            "enable_block_reuse": True,
        },
        "scheduler_config": {"capacity_scheduler_policy": "GUARANTEED_NO_EVICT"},
        "cuda_graph_config": {"max_batch_size": 64, "enable_padding": True},
        "trust_remote_code": False,
    }


def test_every_argument_has_a_reason_and_a_source_and_is_one_of_the_version() -> None:
    for config in (QWEN3_8B, MOE):
        for version in ("1.2.1", "1.3.0rc22", "1.3.0rc29", "1.4.0rc1"):
            facts = llmapi_versions.load(version)
            for argument in resolve(f"engine.tensorrt_llm='{version}'", config=config).values():
                assert argument.reason
                assert argument.source
                llmapi_versions.check(facts, argument.name, argument.value)


def test_the_recipes_own_keys_reach_the_arguments() -> None:
    found = values(
        "repository.kv_cache_free_gpu_mem_fraction=0.8", "repository.batch_scheduler_policy=max_utilization",
        "repository.enable_kv_cache_reuse=false", "quantization.kv_cache_dtype=auto", "engine.max_batch_size=8",
        "engine.tp=2", "model.trust_remote_code=true",
    )  # fmt: skip
    assert found["kv_cache_config.free_gpu_memory_fraction"] == 0.8
    assert found["scheduler_config.capacity_scheduler_policy"] == "MAX_UTILIZATION"
    assert not found["kv_cache_config.enable_block_reuse"]
    assert found["kv_cache_config.dtype"] == "auto"
    assert (found["max_batch_size"], found["cuda_graph_config.max_batch_size"]) == (8, 8)
    assert (found["tensor_parallel_size"], found["trust_remote_code"]) == (2, True)


def test_the_profiles_small_batch_is_for_engines_without_fmha() -> None:
    assert resolved().recipe.engine.max_batch_size == 16
    found = resolve()["max_batch_size"]
    assert found.value == schema.Engine().max_batch_size
    assert "context FMHA" in found.reason
    assert values("engine.max_batch_size=16")["max_batch_size"] == 16


def test_a_prompt_that_may_not_be_cut_fits_in_one_iteration() -> None:
    asked = ["engine.max_num_tokens=1024", "repository.enable_chunked_context=false"]
    found = resolve(*asked)
    assert found["max_num_tokens"].value == 2048
    assert "at once" in found["max_num_tokens"].reason
    assert values(asked[0])["max_num_tokens"] == 1024


def test_a_length_beyond_the_model_is_refused_and_a_default_one_shrinks() -> None:
    short = {**QWEN3_8B, "max_position_embeddings": 1024}
    assert (values(config=short)["max_seq_len"], values(config=short)["max_input_len"]) == (1024, 768)
    with pytest.raises(UnsupportedError, match="1024 positions"):
        values("engine.max_seq_len=4096", config=short)


def test_cuda_graphs_hold_no_batch_that_cannot_come() -> None:
    assert values("llmapi.args.cuda_graph_config.max_batch_size=999")["cuda_graph_config.max_batch_size"] == 64
    found = values("llmapi.args.cuda_graph_config.batch_sizes=[128, 8, 2]")
    assert found["cuda_graph_config.batch_sizes"] == [2, 8]
    assert "cuda_graph_config.max_batch_size" not in found
    off = llmapi_arguments.tree(list(resolve("llmapi.args.cuda_graph_config=null").values()))
    assert off["cuda_graph_config"] is None


def test_pipeline_stages_have_no_overlap_scheduler() -> None:
    assert values("engine.pp=2")["disable_overlap_scheduler"]


def test_experts_get_a_backend_that_runs_on_the_card() -> None:
    assert values(config=MOE)["moe_config.backend"] == "CUTLASS"
    assert values("llmapi.args.moe_config.backend=TRTLLM", config=MOE, gpu="sm100")["moe_config.backend"] == "TRTLLM"
    with pytest.raises(UnsupportedError, match="does not run NVFP4 experts on sm120"):
        values("llmapi.args.moe_config.backend=TRTLLM", config=MOE)
    with pytest.raises(UsageError, match="has none"):
        values("llmapi.args.moe_config.backend=CUTLASS")
    parts = ["engine.tp=4", "llmapi.args.moe_expert_parallel_size=2"]
    assert values(*parts, "llmapi.args.moe_tensor_parallel_size=2", config=MOE)["moe_expert_parallel_size"] == 2
    with pytest.raises(UsageError, match="must be 4"):
        values(*parts, "llmapi.args.moe_tensor_parallel_size=4", config=MOE)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("max_batchsize=3", "Did you mean max_batch_size?"),
        ("free_gpu_memory_fraction=0.5", "Did you mean kv_cache_config.free_gpu_memory_fraction?"),
        ("kv_cache_config.max_batch_size=3", "Did you mean max_batch_size or cuda_graph_config.max_batch_size?"),
        ("kv_cache_config=3", "holds arguments, and is none itself"),
        ("attn_backend=TRTLM", "Did you mean 'TRTLLM'?"),
        ("stream_interval=fast", "takes a value of type int"),
        ("stream_interval=true", "takes a value of type int"),
        ("stream_interval=0", "takes 1 or more"),
        ("batch_wait_max_tokens_ratio=2", "takes 0 to 1"),
        ("cuda_graph_config.batch_sizes=[1, two]", "a list of numbers"),
        ("cuda_graph_config.batch_sizes=[]", "a list of numbers"),
        ("env_overrides.token=abc", "secrets"),
        ("speculative_config.decoding_type=Eagle3", "need a draft model"),
        ("speculative_config.speculative_model=gpt2", "NGram and SA need none"),
        ("model=gpt2", "the build sets its own checkpoint"),
        ("kv_cache_config.sink_token_length=4", "silently ignores it"),
        ("max_beam_width=2", "one answer"),
    ],
)
def test_an_argument_that_is_none_is_refused_with_the_right_one(setting: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        values(f"llmapi.args.{setting}")
    assert message in str(caught.value)


def test_what_the_recipe_says_elsewhere_is_not_said_otherwise() -> None:
    assert values("llmapi.args.max_seq_len=4096")["max_seq_len"] == 4096
    for setting, hint in (
        ("max_seq_len=8192", "--set engine.max_seq_len=8192"),
        ("kv_cache_config.dtype=auto", "--set quantization.kv_cache_dtype=auto"),
        ("trust_remote_code=true", "--set model.trust_remote_code=true"),
    ):
        with pytest.raises(UsageError, match="set twice") as caught:
            values(f"llmapi.args.{setting}")
        assert hint in caught.value.hint
    policy = "llmapi.args.scheduler_config.capacity_scheduler_policy=GUARANTEED_NO_EVICT"
    assert values(policy)["scheduler_config.capacity_scheduler_policy"] == "GUARANTEED_NO_EVICT"


@pytest.mark.parametrize("setting", ["engine.flags.gemm_plugin=nvfp4", "repository.bls_instances=2"])
def test_what_only_engines_have_is_refused(setting: str) -> None:
    with pytest.raises(UsageError):
        values(setting)


def test_presets_speak_to_every_target() -> None:
    asked = schema.resolve({"model.id": "m", "gpu": "sm120", "target": "llmapi"}, preset="throughput")
    assert {a.name: a.value for a in llmapi_arguments.resolve(asked, QWEN3_8B)}["max_batch_size"] == 256


@pytest.mark.parametrize("target", ["engine", "reference"])
def test_other_targets_have_no_llm_arguments(target: str) -> None:
    asked = resolved("llmapi.args.stream_interval=4", target=target)
    with pytest.raises(UsageError, match="does not use"):
        checks.check_model(Inputs(asked, QWEN3_8B), layouts=False)


def test_a_batch_larger_than_an_iteration_is_refused() -> None:
    with pytest.raises(UsageError, match="max_num_tokens 32"):
        values("engine.max_num_tokens=32")


@pytest.mark.parametrize("version", ["1.0.0", "1.1.0", "1.2.0", "1.2.0rc8"])
def test_older_versions_are_refused_with_the_first_that_works(version: str) -> None:
    with pytest.raises(UnsupportedError, match=r"needs TensorRT-LLM 1\.2\.1 or later") as caught:
        values(f"engine.tensorrt_llm='{version}'")
    assert caught.value.hint == "--set engine.tensorrt_llm=1.2.1"


@pytest.mark.parametrize("version", ["1.3.0rc3", "1.4.0rc2", "1.4.0", "2.0"])
def test_versions_that_were_not_read_are_refused(version: str) -> None:
    with pytest.raises(UnsupportedError, match="are not known here") as caught:
        values(f"engine.tensorrt_llm='{version}'")
    assert "1.3.0rc22 to 1.4.0rc1" in caught.value.why


@pytest.mark.parametrize("gpu", ["sm80", "sm89", "sm90"])
def test_a_card_without_nvfp4_is_refused(gpu: str) -> None:
    with pytest.raises(UnsupportedError, match="can't run NVFP4"):
        values("quantization.format=nvfp4", gpu=gpu)


def test_the_cpu_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="needs a GPU"):
        values(gpu="cpu")


def test_models_that_the_backend_is_not_known_to_serve_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="Gemma2ForCausalLM is not an architecture"):
        values(config={**QWEN3_8B, "architectures": ["Gemma2ForCausalLM"]})
    assert values(config={**QWEN3_8B, "architectures": ["Phi3ForCausalLM"]})
    with pytest.raises(UnsupportedError, match="32 attention heads are not divisible by 3"):
        values("engine.tp=3")


def test_a_machine_without_tensorrt_llm_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedError, match="not installed on this machine") as caught:
        llmapi_arguments.check_machine(resolved())
    assert "builder render" in caught.value.hint
    assert "Triton 26.04 to 26.07" in caught.value.why
    monkeypatch.setattr(llmapi_arguments.shutil, "which", lambda name: f"/usr/bin/{name}")
    llmapi_arguments.check_machine(resolved())
    monkeypatch.setattr(llmapi_arguments, "library_versions", lambda name: {name: "1.3.0rc25"})
    with pytest.raises(IntegrityError, match=r"1\.3\.0rc25 is installed"):
        llmapi_arguments.check_machine(resolved())
    monkeypatch.setattr(llmapi_arguments, "library_versions", lambda name: {name: "1.2.1"})
    monkeypatch.setattr(llmapi_arguments, "gpus", lambda: ["NVIDIA B200"])
    with pytest.raises(UnsupportedError, match="needs 2 GPUs"):
        llmapi_arguments.check_machine(resolved("engine.tp=2"))


# tests/unittest/api_stability/references_committed/sampling_params.yaml@020a7393: those that model.py may pass.
SAMPLING = {
    "best_of", "max_tokens", "min_tokens", "seed", "temperature", "top_k", "top_p", "repetition_penalty",
    "presence_penalty", "frequency_penalty", "stop", "logprobs",
}  # fmt: skip


def test_the_models_inputs_are_upstreams_parameters() -> None:
    tensors = json.loads(llmapi_repository.TENSORS.read_text())
    names = {entry["name"] for entry in tensors["input"]}
    parameters = {name.removeprefix("sampling_param_") for name in names if name.startswith("sampling_param_")}
    # The model itself puts the prompt in front; logprobs come with return_cumulative_logprob.
    assert parameters - {"exclude_input_from_output"} | {"logprobs"} == SAMPLING
    assert set(tensors["names"].values()) <= names
    code = (llmapi_repository.TEMPLATE / "1" / "model.py").read_text()
    assert all(f'"{name}"' in code for name in SAMPLING - {"logprobs"})


SIZES = st.integers(1, 20000)
OWN = st.fixed_dictionaries(
    {},
    optional={
        "cuda_graph_config.max_batch_size": st.integers(0, 300),
        "cuda_graph_config.batch_sizes": st.lists(st.integers(1, 300), min_size=1, max_size=4),
        "cuda_graph_config": st.none(),
        "disable_overlap_scheduler": st.booleans(),
        "moe_config.backend": st.sampled_from(["CUTLASS", "TRTLLM", "DEEPGEMM", "CUTEDSL"]),
        "moe_expert_parallel_size": st.sampled_from([1, 2, 4]),
        "attn_backend": st.sampled_from(["TRTLLM", "FLASHINFER", "VANILLA"]),
        "kv_cache_config.max_tokens": SIZES,
        "max_stats_len": st.integers(-2, 3),
        "enable_early_first_token_response": st.booleans(),
        "speculative_config.decoding_type": st.sampled_from(["NGram", "SA"]),
        "speculative_config.max_concurrency": st.integers(1, 9),
        "torch_compile_config.enable_piecewise_cuda_graph": st.booleans(),
        "torch_compile_config.capture_num_tokens": st.lists(st.integers(1, 300), min_size=1, max_size=4),
        "prefill_cuda_graph_backend": st.sampled_from(["disabled", "piecewise"]),
    },
)


@given(
    gpu=st.sampled_from(gpus.names()),
    config=st.sampled_from(
        [QWEN3_8B, MOE, {**QWEN3_8B, "head_dim": 256}, {**QWEN3_8B, "max_position_embeddings": 512}]
    ),
    batch=SIZES,
    tokens=SIZES,
    chunked=st.sampled_from([None, True, False]),
    parallel=st.sampled_from([(1, 1), (2, 1), (2, 2), (3, 1)]),
    kv=st.sampled_from(["fp8", "auto"]),
    version=st.sampled_from(["1.2.1", "1.3.0rc24"]),
    own=OWN,
)
def test_settling_twice_is_settling_once_and_yaml_holds_it(
    gpu: str,
    config: dict[str, Any],
    batch: int,
    tokens: int,
    chunked: bool | None,
    parallel: tuple[int, int],
    kv: str,
    version: str,
    own: dict[str, Any],
) -> None:
    flags: dict[str, Any] = {
        "model.id": "m", "gpu": gpu, "target": "llmapi", "quantization.kv_cache_dtype": kv,
        "engine.max_batch_size": batch, "engine.max_num_tokens": tokens, "engine.tensorrt_llm": version,
        "engine.tp": parallel[0], "engine.pp": parallel[1], "repository.enable_chunked_context": chunked,
    }  # fmt: skip
    asked = schema.resolve(flags)
    args = llmapi_arguments.tree([Argument(*pair, "", "") for pair in own.items() if pair[0] != "cuda_graph_config"])
    args |= {"cuda_graph_config": None} if "cuda_graph_config" in own else {}
    parts = asked.recipe.model_copy(update={"llmapi": schema.LlmApi(args=args)})
    asked = schema.Resolved(parts, asked.gpu, asked.origins)
    try:
        once = llmapi_arguments.resolve(asked, config)
    except (UsageError, UnsupportedError):
        return
    subject = llmapi_arguments._subject(asked, config)
    again = llmapi_arguments.settle(subject, {argument.name: argument for argument in once})
    assert list(again.values()) == once
    for argument in once:
        llmapi_versions.check(subject.facts, argument.name, argument.value)
    nested = llmapi_arguments.tree(once)
    assert yaml.safe_load(yaml.safe_dump(nested)) == nested == json.loads(json.dumps(nested))
    assert {**llmapi_arguments._flatten(nested)} == {argument.name: argument.value for argument in once}


# ---- what the plan says


@pytest.fixture(scope="module")
def qwen3_8b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sparse(dense(36, 4096, 32, 8, 128, 12288, 151936), tmp_path_factory.mktemp("sparse") / "qwen3-8b")


def planned(model: Path, output: Path, *argv: str, code: int = 0) -> dict[str, Any]:
    line = [sys.executable, "-X", "importtime", "-m", "builder", "plan", "--model", str(model), "--target", "llmapi"]
    done = subprocess.run([*line, "--output", str(output), "--json", *argv], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    imported = {row.rpartition("|")[2].strip() for row in done.stderr.splitlines() if "import time" in row}
    assert not {"torch", "transformers", "modelopt", "jinja2"} & imported
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_plan_shows_arguments_and_yaml_and_makes_no_engine(qwen3_8b: Path, tmp_path: Path) -> None:
    plan = planned(qwen3_8b, tmp_path, "--gpu", "sm120")
    stages = ["snapshot", "calibration", "checkpoint", "quality", "repository", "smoke"]
    assert [row["stage"] for row in plan["stages"]] == stages
    found = {argument["name"]: argument["value"] for argument in plan["arguments"]}
    content = yaml.safe_load(plan["model_yaml"])
    assert content["model"] == "CHECKPOINT/unified"
    assert content["kv_cache_config"]["dtype"] == found["kv_cache_config.dtype"] == "fp8"
    assert plan["command"] is None
    assert plan["flags"] == []
    assert "not installed" in plan["blocked"]
    assert plan["sizes"]["disk"]["engine"] == 0
    assert any("does not include CUDA graphs" in note["text"] for note in plan["notes"])
    assert not any("engine.flags" in note["text"] for note in plan["notes"])
    assert any("ignores repetition" in note["text"] for note in plan["notes"])
    assert list(tmp_path.iterdir()) == []


def test_without_the_quadratic_workspace_a_batch_of_64_fits(qwen3_8b: Path, tmp_path: Path) -> None:
    """Context FMHA is always on: what the sm120 profile's engines pay for a batch is no matter here."""
    plan = planned(qwen3_8b, tmp_path, "--gpu", "sm120")
    [small] = [m for m in plan["memory"] if m["card"] == "RTX 5090"]
    assert small["fits"]
    assert small["workspace"] < 2e9
    assert small["kv_cache"] == small["kv_tokens"] * 36 * 2 * 8 * 128


def test_a_limit_of_the_cache_limits_what_it_holds(qwen3_8b: Path, tmp_path: Path) -> None:
    limit = ["--gpu", "sm120", "--set", "llmapi.args.kv_cache_config.max_tokens=12288"]
    [small] = [m for m in planned(qwen3_8b, tmp_path, *limit)["memory"] if m["card"] == "RTX 5090"]
    assert (small["kv_tokens"], small["sequences"], small["largest_batch"]) == (12288, 3, 3)
    with pytest.raises(UsageError, match="no room for one sequence"):
        values("llmapi.args.kv_cache_config.max_tokens=4000")


def test_what_does_not_fit_is_refused_with_what_would(qwen3_8b: Path, tmp_path: Path) -> None:
    asked = ["--gpu", "sm120", "--max-batch-size", "20000", "--max-num-tokens", "3000000", "--max-seq-len", "40000"]
    plan = planned(qwen3_8b, tmp_path, *asked, code=3)
    assert plan["verdict"]["change"]


def test_ranks_need_no_files_of_their_own(qwen3_8b: Path, tmp_path: Path) -> None:
    plan = planned(qwen3_8b, tmp_path, "--gpu", "sm120", "--tp", "2")
    assert plan["sizes"]["disk"]["ranks"] == 0
    assert len(plan["sizes"]["ranks"]) == 2
    assert max(plan["sizes"]["ranks"]) < 0.6 * plan["sizes"]["checkpoint"]


def test_a_model_without_tensorrt_llms_layout_can_be_planned(tmp_path: Path) -> None:
    plan = planned(Path("tests/data/arch-variants/phi3"), tmp_path, "--gpu", "sm100")
    assert (plan["sizes"]["checkpoint"], plan["verdict"]["fits"]) == (0, True)


@pytest.mark.parametrize("cache", ["fp8", "nvfp4", "auto"])
@pytest.mark.parametrize("declared", ["FP8", "NVFP4", None])
def test_the_kv_cache_is_the_one_that_the_checkpoint_declares(tmp_path: Path, cache: str, declared: str | None) -> None:
    document = {"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": declared}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(document))
    arguments = [Argument("kv_cache_config.dtype", cache, "", "")]
    if kv_cache.get(cache).quant_algo == declared:
        llmapi_repository.check_checkpoint(tmp_path, arguments)
    else:
        with pytest.raises(IntegrityError, match=f"is in {declared}, and kv_cache_config.dtype is {cache}"):
            llmapi_repository.check_checkpoint(tmp_path, arguments)


def test_heads_without_a_kernel_are_refused_by_the_title_of_the_cache() -> None:
    asked = resolved(**{"quantization.kv_cache_dtype": "nvfp4"})
    with pytest.raises(UnsupportedError, match="heads of 256 with an NVFP4 KV cache"):
        llmapi_arguments.check_model(asked, {**QWEN3_8B, "head_dim": 256})
