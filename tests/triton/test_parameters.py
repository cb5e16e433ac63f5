"""`repository.parameters`: every parameter of NVIDIA's models, by its name, validated and explained."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from builder.cli import main
from builder.core import paths
from builder.core.errors import UsageError
from builder.llmapi import arguments as llmapi_arguments
from builder.recipe import schema, triton_parameters
from builder.triton import engine_parameters
from builder.triton.lint.run import lint
from builder.trtllm import compatibility
from tests.triton.test_repository import SNAPSHOT, parameters, write_engine, written

# What NVIDIA's templates of 1.2 have (triton_backend/all_models/inflight_batcher_llm).
NVIDIAS = """
    triton_max_batch_size logits_datatype preprocessing_instance_count max_queue_delay_microseconds
    max_queue_size tokenizer_dir add_special_tokens multimodal_model_path engine_dir max_num_images
    hf_model_path postprocessing_instance_count skip_special_tokens decoupled_mode bls_instance_count
    prompt_embedding_table_data_type accumulate_tokens tensorrt_llm_model_name tensorrt_llm_draft_model_name
    multimodal_encoders_name triton_backend encoder_input_features_data_type batching_strategy max_beam_width
    encoder_engine_dir max_tokens_in_paged_kv_cache max_attention_window_size sink_token_length
    batch_scheduler_policy kv_cache_free_gpu_mem_fraction cross_kv_cache_fraction kv_cache_host_memory_bytes
    kv_cache_onboard_blocks enable_trt_overlap exclude_input_in_output cancellation_check_period_ms
    stats_check_period_ms recv_poll_period_ms iter_stats_max_iterations request_stats_max_iterations
    enable_kv_cache_reuse normalize_log_probs enable_chunked_context gpu_device_ids participant_ids num_nodes
    lora_cache_optimal_adapter_size lora_cache_max_adapter_size lora_cache_gpu_memory_fraction
    lora_cache_host_memory_bytes lora_prefetch_dir decoding_mode lookahead_window_size lookahead_ngram_size
    lookahead_verification_set_size medusa_choices eagle_choices gpu_weights_percent
    enable_context_fmha_fp32_acc multi_block_mode cuda_graph_mode cuda_graph_cache_size
    speculative_decoding_fast_logits guided_decoding_backend xgrammar_tokenizer_info_path
"""
VALUES = {"count": 3, "number": 0, "counts": [1, 2], "switch": True, "fraction": 0.5, "devices": "0", "text": "x"}


def resolve(**more: Any) -> schema.Resolved:
    return schema.resolve({"model.id": str(SNAPSHOT), "gpu": "cpu", **more})


def config(**build: Any) -> dict[str, Any]:
    plugins = {"use_paged_context_fmha": False, "lora_plugin": None, "streamingllm": False}
    known = {"max_seq_len": 256, "max_beam_width": 1, "speculative_decoding_mode": 1, "weight_streaming": False}
    return {"build_config": {**known, **build, "plugin_config": plugins | build.get("plugin_config", {})}}


@pytest.mark.parametrize("name", NVIDIAS.split())
def test_each_of_nvidias_is_set_by_its_name_or_has_a_reason(name: str) -> None:
    spec = triton_parameters._specs()[name]
    if "fixed" in spec:
        with pytest.raises(UsageError, match=f"{name} can't be set: "):
            resolve(**{"repository.parameters": {name: "x"}})
        return
    kind = spec.get("kind")
    value = kind[-1] if isinstance(kind, list) else VALUES.get(str(kind), 7)
    if name == "decoupled_mode":
        value = False
    part = resolve(**{"repository.parameters": {name: value}}).recipe.repository
    if "key" in spec:
        assert getattr(part, spec["key"].removeprefix("repository.")) == value
        assert part.parameters == {}
    else:
        assert part.parameters == {name: triton_parameters.text(value)}


def test_the_table_says_one_thing_of_each() -> None:
    table = yaml.safe_load(paths.data("configs", "triton", "parameters.yaml").read_text())
    keys = {"repository." + name for name in schema.Repository.model_fields}
    for model in (*triton_parameters.MODELS, "placeholders"):
        for name, spec in table[model].items():
            if isinstance(spec, dict):
                assert len(spec.keys() & {"key", "fixed"}) == 1, name
                assert spec.get("key", "repository.decoupled") in keys, name
                assert "kind" in spec or model == "placeholders"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("kv_cache_free_gpu_memory", 0.5, "did you mean 'kv_cache_free_gpu_mem_fraction'"),
        ("max_beam_width", 0, "max_beam_width is '0'; it must be a number of 1 or more"),
        ("num_nodes", 1 << 31, "it must be a number below 2147483648"),
        ("gpu_weights_percent", 1.5, "it must be a number from 0 to 1"),
        ("multi_block_mode", "yes", "it must be true or false"),
        ("decoding_mode", "topk", "it must be top_k or "),
        ("kv_cache_free_gpu_mem_fraction", 1.5, "less than or equal to 1"),
        ("max_attention_window_size", "1;2", "numbers with commas between them"),
    ],
)
def test_a_wrong_one_is_named_with_what_it_should_be(name: str, value: Any, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(**{"repository.parameters": {name: value}})
    assert message in f"{caught.value.what} {caught.value.why}"


def test_sources_keep_their_order_and_one_source_says_a_value_once(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("repository: {kv_cache_free_gpu_mem_fraction: 0.7, parameters: {multi_block_mode: false}}\n")
    sets = ["repository.parameters.kv_cache_free_gpu_mem_fraction=0.8"]
    found = schema.resolve({"model.id": str(SNAPSHOT), "gpu": "cpu"}, sets=sets, recipe_file=recipe)
    part = found.recipe.repository
    assert (part.kv_cache_free_gpu_mem_fraction, part.parameters) == (0.8, {"multi_block_mode": "false"})
    assert found.origins["repository.kv_cache_free_gpu_mem_fraction"] == f"--set {sets[0]}"
    recipe.write_text("repository: {max_queue_size: 4, parameters: {max_queue_size: 5}}\n")
    with pytest.raises(UsageError, match=r"max_queue_size is 4, and repository\.parameters\.max_queue_size is 5"):
        schema.resolve({"model.id": str(SNAPSHOT), "gpu": "cpu"}, recipe_file=recipe)


CONTRADICTIONS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"max_beam_width": 2}, {}, "max_beam_width is 2, and the engine is built for 1"),
    ({"kv_cache_host_memory_bytes": 1}, {}, "kv_cache_host_memory_bytes needs enable_kv_cache_reuse"),
    ({"max_tokens_in_paged_kv_cache": 255}, {}, "is 255, and the engine takes sequences of 256"),
    ({"sink_token_length": 4}, {}, "built without streamingllm"),
    ({"decoding_mode": "explicit_draft_tokens"}, {}, "decoding_mode is explicit_draft_tokens"),
    ({"decoding_mode": "medusa"}, {}, "decoding_mode is medusa, and the engine was not built for it"),
    ({"decoding_mode": "beam_search"}, {}, "the engine was built for one beam"),
    ({"decoding_mode": "lookahead", "lookahead_ngram_size": 2}, {"speculative_decoding_mode": 8},
     "lookahead_window_size and lookahead_verification_set_size are not set"),
    ({"eagle_choices": "{{0}}"}, {}, "eagle_choices needs decoding_mode eagle"),
    ({"lora_cache_max_adapter_size": 8}, {}, "lora_cache_max_adapter_size needs an engine with LoRA"),
    ({"gpu_weights_percent": 0.5}, {}, "built without weight_streaming"),
    ({"cuda_graph_cache_size": 4}, {}, "cuda_graph_cache_size needs cuda_graph_mode"),
    ({"gpu_device_ids": "0,1"}, {}, "gpu_device_ids is 0,1, and the engine has 1 rank"),
]  # fmt: skip
FITTING: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"max_beam_width": 2, "decoding_mode": "beam_search"}, {"max_beam_width": 2}),
    ({"kv_cache_host_memory_bytes": 1}, {"plugin_config": {"use_paged_context_fmha": True}}),
    ({"max_tokens_in_paged_kv_cache": 256}, {}),
    ({"sink_token_length": 4}, {"plugin_config": {"streamingllm": True}}),
    ({"decoding_mode": "medusa", "medusa_choices": "{{0}}"}, {"speculative_decoding_mode": 4}),
    ({"lora_cache_max_adapter_size": 8}, {"plugin_config": {"lora_plugin": "auto"}}),
    ({"gpu_weights_percent": 0.5}, {"weight_streaming": True}),
    ({"cuda_graph_cache_size": 4, "cuda_graph_mode": True, "gpu_device_ids": "1"}, {}),
    ({"cuda_graph_cache_size": "0" * 5000}, {}),
]


@pytest.mark.parametrize(("asked", "build", "message"), CONTRADICTIONS)
def test_what_the_engine_contradicts_is_refused(asked: dict[str, Any], build: dict[str, Any], message: str) -> None:
    part = schema.Repository(parameters=asked)
    with pytest.raises(UsageError) as caught:
        engine_parameters.resolve(config(**build), part)
    assert message in caught.value.what
    assert caught.value.hint


@pytest.mark.parametrize(("asked", "build"), FITTING)
def test_what_fits_is_taken(asked: dict[str, Any], build: dict[str, Any]) -> None:
    found = engine_parameters.values(engine_parameters.resolve(config(**build), schema.Repository(parameters=asked)))
    assert found.items() >= {name: triton_parameters.text(value) for name, value in asked.items()}.items()


@given(st.sampled_from(["count", "number", "counts", "devices", "fraction"]), st.text("019_ .,;-+e\u0663", max_size=5))
def test_no_number_passes_that_the_backend_would_read_otherwise(kind: str, value: str) -> None:
    """The backend takes its default for a value that it can't read, so each kind is what it reads."""
    if triton_parameters.wrong(kind, value):
        return
    for number in re.split("[,;]", value):
        assert number.isascii()
        assert not set("_ ") & set(number)
        assert float(number) >= (kind == "count")
        assert kind == "fraction" or number.isdecimal()


def test_the_config_and_the_facts_have_them_with_reason_and_source(tmp_path: Path) -> None:
    configs, facts = written(tmp_path, parameters={"cancellation_check_period_ms": 20, "multi_block_mode": False})
    rendered = parameters(configs["tensorrt_llm"])
    assert (rendered["cancellation_check_period_ms"], rendered["multi_block_mode"]) == ("20", "false")
    rows = {row["name"]: row for row in facts["parameters"]}
    assert rows["multi_block_mode"] == {
        "name": "multi_block_mode", "value": "false", "reason": "repository.parameters.multi_block_mode",
        "source": "recipe",
    }  # fmt: skip
    assert all(row["reason"] and row["source"] and row["value"] for row in rows.values())
    assert {name: row["value"] for name, row in rows.items()}.items() <= rendered.items()
    assert "executor_worker_path" not in rendered, "the backend's default, and an absolute path"


def test_reuse_follows_gathered_logits(tmp_path: Path) -> None:
    build = {"plugin_config": {"use_paged_context_fmha": True}, "gather_context_logits": True}
    found = {one.name: one for one in engine_parameters.resolve(config(**build), schema.Repository())}
    assert (found["enable_kv_cache_reuse"].value, found["enable_chunked_context"].value) == ("false", "true")
    with pytest.raises(UsageError, match="gather_context_logits"):
        engine_parameters.resolve(config(**build), schema.Repository(enable_kv_cache_reuse=True))


def test_serve_and_lint_find_the_same_contradiction(tmp_path: Path) -> None:
    written(tmp_path)
    file = tmp_path / "models" / "tensorrt_llm" / "config.pbtxt"
    file.write_text(file.read_text() + 'parameters { key: "cuda_graph_cache_size" value: { string_value: "4" } }\n')
    served = compatibility.read_served(tmp_path / "models")
    assert served is not None
    found = compatibility.mismatches(served, compatibility.read_engine(write_engine(tmp_path / "engine")),
                                     compatibility.Runtime())  # fmt: skip
    assert [one.what for one in found] == ["cuda_graph_cache_size needs cuda_graph_mode."]
    assert found[0].hint.endswith(compatibility.RENDER)


@pytest.mark.parametrize(
    ("name", "value"),
    [("gpu_weights_percent", "abc"), ("sink_token_length", "9" * 5000), ("max_tokens_in_paged_kv_cache", "-1")],
)
def test_a_value_of_another_kind_in_a_file_is_a_finding_and_no_crash(tmp_path: Path, name: str, value: str) -> None:
    written(tmp_path)
    file = tmp_path / "models" / "tensorrt_llm" / "config.pbtxt"
    file.write_text(file.read_text() + f'parameters {{ key: "{name}" value: {{ string_value: "{value}" }} }}\n')
    engine = tmp_path / "engine" / "config.json"
    content = json.loads(engine.read_text())
    content["build_config"] |= {"weight_streaming": False, "plugin_config": {"streamingllm": False}}
    engine.write_text(json.dumps(content))
    assert [one.rule for one in lint(tmp_path / "models").findings] == ["parameter"]


def test_the_llmapi_model_takes_its_own_and_no_others() -> None:
    found = llmapi_arguments.triton_config(schema.Repository(parameters={"cancellation_check_period_ms": 20}))
    assert found[-1].value == "20"
    assert found[-1].reason == "repository.parameters.cancellation_check_period_ms"
    with pytest.raises(UsageError, match="num_nodes is a parameter of an engine's models") as caught:
        llmapi_arguments.triton_config(schema.Repository(parameters={"num_nodes": 2}))
    assert "llmapi.args" in caught.value.hint


def test_the_plan_shows_them_and_refuses_contradictions_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["plan", "--model", str(SNAPSHOT), "--gpu", "cpu", "--output", str(tmp_path), "--set"]
    assert main.main([*asked, "repository.parameters.num_nodes=1", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["parameters"]}
    assert rows["num_nodes"]["source"] == "recipe"
    assert rows["max_beam_width"]["reason"] == "what the engine was built for"
    assert main.main([*asked, "repository.parameters.cuda_graph_cache_size=4"]) == 2
    assert "cuda_graph_cache_size needs cuda_graph_mode" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        ("count", ["1", "2147483647"], ["0", "01", "\u0663", "1_0", "2147483648", "9" * 5000]),
        ("number", ["0", "007", "0" * 5000], ["-1", "\u0663", "9" * 5000]),
        ("counts", ["1,2"], ["1,", "\u0663"]),
        ("fraction", ["0", ".5", "1.0", "5e-1"], ["0_1", "\u0661", " 0.5", "nan", "1.5", "-0.1", ""]),
    ],
)
def test_numbers_are_those_that_the_backend_reads(kind: str, good: list[str], bad: list[str]) -> None:
    assert [value for value in good if triton_parameters.wrong(kind, value)] == []
    assert [value for value in bad if not triton_parameters.wrong(kind, value)] == []
