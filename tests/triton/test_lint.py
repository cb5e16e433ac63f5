"""`builder lint`: each planted fault is named with file, line and fix, and sound repositories have none."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builder.cli import main
from builder.core import paths
from builder.core.errors import UsageError
from builder.core.output import Output
from builder.core.store import Store
from builder.llmapi import arguments as llmapi_arguments
from builder.llmapi import repository as llmapi_repository
from builder.recipe import schema
from builder.triton import model_config, repository
from builder.triton.combined import Member, combine
from builder.triton.lint import positions
from builder.triton.lint.run import lint
from tests.triton.test_combined import rendered
from tests.triton.test_repository import SNAPSHOT, write_engine

ENSEMBLE, PRE, POST = "ensemble/config.pbtxt", "preprocessing/config.pbtxt", "postprocessing/config.pbtxt"
ENGINE, BLS = "tensorrt_llm/config.pbtxt", "tensorrt_llm_bls/config.pbtxt"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of ours; its engine has no paged context FMHA."""
    directory = tmp_path_factory.mktemp("lint")
    repository.write(directory / "models", write_engine(directory / "engine"), SNAPSHOT, schema.Repository())
    return directory / "models"


@dataclass(frozen=True)
class Fault:
    """Text of a file that is replaced by other text, and the finding that this must give.

    at: text that the finding's line contains; by default the first line of the new text; "": the file as a whole; "*":
    any line. count: replacements; 0: all."""

    file: str
    old: str
    new: str
    rule: str
    said: str
    at: str | None = None
    count: int = 1


FAULTS = [
    # What a template tool left.
    Fault(ENGINE, "max_batch_size: 8", "max_batch_size: ${triton_max_batch_size}", "unfilled", "is not filled"),
    Fault(ENGINE, 'backend: "tensorrtllm"', 'backend: "${triton_backend}"', "unfilled", "is not filled"),
    Fault(ENGINE, "decoupled: true", "decoupled: ${decoupled_mode}", "unfilled", "is not filled"),
    Fault(PRE, "count: 1", "count: ${preprocessing_instance_count}", "unfilled", "is not filled"),
    Fault(PRE, 'name: "preprocessing"', 'name: "{{ name }}"', "unfilled", "is not filled"),
    Fault(POST, "max_batch_size: 8", "{% if batch %}\nmax_batch_size: 8", "unfilled", "is not filled", "{% if"),
    Fault(POST, "count: 1", "count: 1 ==SUPPRESS==", "unfilled", "is not filled"),
    Fault(ENSEMBLE, 'value: "text_input"', 'value: "${text}"', "unfilled", "is not filled"),
    Fault(PRE, "preprocessing/1/tokenizer", "${tokenizer_dir}", "parameter", "tokenizer_dir has no value"),
    Fault(ENGINE, "inflight_fused_batching", "${batching_strategy}", "parameter", "gpt_model_type has no value"),
    Fault(BLS, 'key: "engine_decoupled" value: { string_value: "true" }',
          'key: "my_own" value: { string_value: "${x}" }', "unfilled", "my_own is ${x}"),
    # Fields and their types.
    Fault(ENGINE, "max_batch_size: 8", "max_batchsize: 8", "unknown-field", "no field 'max_batchsize'"),
    Fault(ENGINE, "model_transaction_policy {", "model_transaction_polic {", "unknown-field", "no field"),
    Fault(ENGINE, "decoupled: true", "decouple: true", "unknown-field", "ModelTransactionPolicy has no field"),
    Fault(ENGINE, "max_queue_delay_microseconds", "max_queue_delay_ms", "unknown-field", "ModelDynamicBatching"),
    Fault(PRE, "data_type", "datatype", "unknown-field", "ModelInput has no field 'datatype'"),
    Fault(PRE, "dims", "dim", "unknown-field", "ModelInput has no field 'dim'"),
    Fault(ENSEMBLE, "input_map", "inputs_map", "unknown-field", "no field 'inputs_map'"),
    Fault(ENSEMBLE, "step [", "steps [", "unknown-field", "ModelEnsembling has no field 'steps'"),
    Fault(ENGINE, "instance_group", "instance_groups", "unknown-field", "no field 'instance_groups'"),
    Fault(ENGINE, "TYPE_INT32", "TYPE_INT23", "unknown-value", "no value TYPE_INT23"),
    Fault(ENGINE, "TYPE_INT32", "INT32", "unknown-value", "no value INT32"),
    Fault(ENGINE, "KIND_CPU", "CPU", "unknown-value", "kind has no value CPU"),
    Fault(ENGINE, "max_batch_size: 8", 'max_batch_size: "8"', "wrong-type", "should be an integer"),
    Fault(ENGINE, "max_batch_size: 8", "max_batch_size: 8.5", "wrong-type", "should be an integer"),
    Fault(ENGINE, "decoupled: true", "decoupled: yes", "wrong-type", "should be true or false"),
    Fault(ENGINE, 'name: "tensorrt_llm"', "name: tensorrt_llm", "wrong-type", "should be a string in quotes"),
    Fault(ENGINE, "max_queue_delay_microseconds: 0", "max_queue_delay_microseconds: -1", "wrong-type", "0 or more"),
    Fault(ENGINE, "model_transaction_policy { decoupled: true }", "model_transaction_policy: true", "wrong-type",
          "not a message"),
    Fault(ENGINE, "max_batch_size: 8", "max_batch_size: 8\nmax_batch_size: 4", "repeated-field", "given twice",
          "max_batch_size: 4"),
    Fault(PRE, 'backend: "python"', 'backend: "python', "syntax", "does not parse"),
    Fault(PRE, "dynamic_batching {", "dynamic_batching", "syntax", "does not parse", "*"),
    Fault(POST, "instance_group [", "instance_group ", "syntax", "does not parse", "*"),
    # One model.
    Fault(ENGINE, 'name: "tensorrt_llm"', 'name: "tensorrt-llm"', "name", "unlike its directory's"),
    Fault(ENGINE, 'backend: "tensorrtllm"', 'backend: "tensorrt_llm"', "backend", "no backend 'tensorrt_llm'"),
    Fault(PRE, 'backend: "python"', 'backend: "pyton"', "backend", "no backend 'pyton'"),
    Fault(PRE, 'backend: "python"', "", "backend", "names no backend", ""),
    Fault(ENSEMBLE, 'platform: "ensemble"', 'backend: "python"', "backend", "has steps and is no ensemble",
          "ensemble_scheduling"),
    Fault(PRE, 'backend: "python"', 'platform: "ensemble"', "backend", "ensemble without steps"),
    Fault(PRE, 'backend: "python"', 'backend: "python"\ndefault_model_filename: "main.py"', "code", "without 1/main.py",
          "default_model_filename"),
    Fault(PRE, 'backend: "python"', 'backend: "python"\nversion_policy { specific { versions: [ 3 ] } }', "version",
          "version 3 has no directory", "version_policy"),
    Fault(PRE, "dims: [ 1 ]", "dims: [ 0 ]", "tensor", "has the size 0"),
    Fault(PRE, "dims: [ 1 ]", "dims: [ -2 ]", "tensor", "has the size -2"),
    Fault(PRE, "dims: [ 1 ]", "", "tensor", "has no dims", "{"),
    Fault(PRE, "data_type: TYPE_STRING", "", "tensor", "has no data_type", "{"),
    Fault(PRE, 'name: "QUERY"', "", "tensor", "has no name", "{"),
    Fault(ENGINE, "reshape: { shape: [  ] }", "reshape: { shape: [ 2 ] }", "tensor", "is reshaped from [1] to [2]"),
    Fault(PRE, 'name: "REQUEST_OUTPUT_LEN"', 'name: "QUERY"', "duplicate", "QUERY is declared twice", "{"),
    Fault(ENGINE, "max_batch_size: 8", "max_batch_size: -8", "batch", "max_batch_size is -8"),
    Fault(PRE, "max_batch_size: 8", "max_batch_size: 0", "batch", "max_batch_size is 0", "dynamic_batching"),
    Fault(ENGINE, "preferred_batch_size: [ 8 ]", "preferred_batch_size: [ 16 ]", "batch", "not within max_batch"),
    Fault(ENGINE, "preferred_batch_size: [ 8 ]", "preferred_batch_size: [ 0 ]", "batch", "preferred_batch_size 0"),
    Fault(ENGINE, "preferred_batch_size: [ 8 ]", "preferred_batch_size: [ 4, 4 ]", "batch", "a size twice"),
    Fault(ENGINE, "count: 1", "count: 0", "instances", "it has 0 instances"),
    Fault(BLS, "count: 1", "count: -1", "instances", "it has -1 instances"),
    Fault(PRE, "kind: KIND_CPU", "kind: KIND_CPU gpus: [ 0 ]", "instances", "name gpus"),
    Fault(ENSEMBLE, 'platform: "ensemble"', 'platform: "ensemble"\ninstance_group [ { count: 1 } ]', "instances",
          "an ensemble has no instances", "instance_group"),
    Fault(BLS, "max_batch_size: 1", "max_batch_size: 1\nresponse_cache { enable: true }", "cache", "response cache",
          "response_cache"),
    Fault(ENGINE, 'key: "max_beam_width"', 'key: "gpt_model_type"', "duplicate", "gpt_model_type is given twice"),
    # Parameters.
    Fault(ENGINE, 'key: "gpt_model_path"', 'key: "gpt_model_paht"', "parameter", "gpt_model_paht is not read"),
    Fault(ENGINE, 'key: "gpt_model_type"', 'key: "model_type"', "parameter", "gpt_model_type is missing", ""),
    Fault(ENGINE, 'key: "kv_cache_free_gpu_mem_fraction"', 'key: "kv_cache_free_gpu_memory_fraction"', "parameter",
          "is not read"),
    Fault(ENGINE, 'string_value: "0.9"', 'string_value: "90"', "parameter", "kv_cache_free_gpu_mem_fraction is '90'"),
    Fault(ENGINE, 'string_value: "guaranteed_no_evict"', 'string_value: "no_evict"', "parameter", "'no_evict'"),
    Fault(ENGINE, 'key: "max_beam_width" value: { string_value: "1" }',
          'key: "max_beam_width" value: { string_value: "one" }', "parameter", "max_beam_width is 'one'"),
    Fault(ENGINE, 'key: "enable_chunked_context" value: { string_value: "false" }',
          'key: "enable_chunked_context" value: { string_value: "off" }', "parameter", "is 'off'"),
    Fault(ENGINE, "inflight_fused_batching", "inflight", "parameter", "gpt_model_type is 'inflight'"),
    Fault(POST, 'key: "skip_special_tokens" value: { string_value: "true" }',
          'key: "skip_special_tokens" value: { string_value: "skip" }', "parameter", "is 'skip'"),
    Fault(POST, "preprocessing/1/tokenizer", "other/tokenizer", "tokenizer", "that of preprocessing"),
    *(Fault(ENGINE, 'key: "max_beam_width" value: { string_value: "1" }',
            f'key: "{key}" value: {{ string_value: "{value}" }}', "parameter", said)
      for key, value, said in (
          ("lora_cache_gpu_memory_fraction", "5", "lora_cache_gpu_memory_fraction is '5'"),
          ("lora_cache_max_adapter_size", "eight", "lora_cache_max_adapter_size is 'eight'"),
          ("lora_cache_host_memory_byte", "1024", "lora_cache_host_memory_byte is not read"),
      )),
    # Ensembles.
    Fault(ENSEMBLE, 'model_name: "postprocessing"', 'model_name: "postprocesing"', "step", "not a model of the repo"),
    Fault(ENSEMBLE, 'model_name: "postprocessing"', 'model_name: "ensemble"', "step", "a step of itself"),
    Fault(ENSEMBLE, "model_version: -1", "model_version: 7", "step", "version 7 of preprocessing"),
    Fault(ENSEMBLE, 'key: "QUERY"', 'key: "PROMPT"', "map", "preprocessing has no input 'PROMPT'"),
    Fault(ENSEMBLE, 'output_map { key: "OUTPUT"', 'output_map { key: "OUT"', "map", "has no output 'OUT'"),
    Fault(ENSEMBLE, 'input_map { key: "TOKENS_BATCH" value: "_OUTPUT_IDS" }', "", "map",
          "TOKENS_BATCH of postprocessing is needed", "{"),
    Fault(ENSEMBLE, 'input_map { key: "QUERY" value: "text_input" }',
          'input_map { key: "QUERY" value: "text_input" } input_map { key: "QUERY" value: "text_input" }', "duplicate",
          "is mapped twice"),
    Fault(ENSEMBLE, 'key: "QUERY" value: "text_input"', 'key: "QUERY" value: "txt_input"', "tensor",
          "makes tensor 'txt_input'"),
    Fault(ENSEMBLE, 'key: "OUTPUT" value: "text_output"', 'key: "OUTPUT" value: "text"', "tensor",
          "makes tensor 'text_output'", "{"),
    Fault(ENSEMBLE, 'key: "sequence_length" value: "_SEQUENCE_LENGTH"', 'key: "sequence_length" value: "text_input"',
          "tensor", "has two sources"),
    Fault(ENSEMBLE, "max_batch_size: 8", "max_batch_size: 9", "batch", "more than preprocessing's, 8"),
    Fault(POST, "max_batch_size: 8", "max_batch_size: 4", "batch", "more than postprocessing's, 4", None),
    Fault(POST, "data_type: TYPE_INT32", "data_type: TYPE_INT64", "type", "TYPE_INT32 where it is made"),
    Fault(POST, "dims: [ -1, -1 ]", "dims: [ -1 ]", "shape", "where it is made"),
    # Streaming.
    Fault(ENGINE, "decoupled: true", "decoupled: false", "streaming", "streams from it"),
    Fault(BLS, "decoupled: true", "decoupled: false", "streaming", "it can't stream"),
    Fault(BLS, 'key: "tensorrt_llm_model_name" value: { string_value: "tensorrt_llm" }',
          'key: "tensorrt_llm_model_name" value: { string_value: "llm" }', "step", "calls llm"),
    Fault(BLS, 'key: "preprocessing_model_name" value: { string_value: "preprocessing" }',
          'key: "preprocessing_model_name" value: { string_value: "pre" }', "step", "calls pre, which is not a model"),
    # The engine.
    Fault(ENGINE, "max_batch_size: 8", "max_batch_size: 16", "engine", "the engine was built for 8"),
    Fault(ENGINE, 'key: "max_beam_width" value: { string_value: "1" }',
          'key: "max_beam_width" value: { string_value: "4" }', "engine", "the engine was built for 1"),
    Fault(ENGINE, "TYPE_FP16", "TYPE_BF16", "engine", "the engine's logits are float16", "{", 0),
    Fault(ENGINE, 'key: "enable_chunked_context" value: { string_value: "false" }',
          'key: "enable_chunked_context" value: { string_value: "true" }', "engine", "no paged context FMHA"),
]  # fmt: skip


def copied(sound: Path, directory: Path) -> Path:
    """The repository and its engine in another directory: the repository refers to it by a relative path."""
    shutil.copytree(sound.parent, directory, dirs_exist_ok=True)
    return directory / sound.name


def plant(sound: Path, directory: Path, fault: Fault) -> Path:
    models = copied(sound, directory)
    file = models / fault.file
    text = file.read_text()
    assert fault.old in text, "the templates changed: write the fault anew"
    file.write_text(text.replace(fault.old, fault.new, *([fault.count] if fault.count else [])))
    return models


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models of a repository of `a` and `b`."""
    store = Store(tmp_path_factory.mktemp("both") / "store", Output("quiet"))
    models = combine({name: Member(rendered(store, name), name) for name in ("a", "b")}, store=store).models
    assert lint(models).findings == ()
    return models


COMBINED = [
    ("b_ensemble", 'model_name: "b_preprocessing"', 'model_name: "a_preprocessing"', "step", "to another model"),
    ("b_ensemble", 'model_name: "b_tensorrt_llm"', 'model_name: "a_tensorrt_llm"', "step", "to another model"),
    ("a_ensemble", 'model_name: "a_postprocessing"', 'model_name: "b_postprocessing"', "step", "Write a_postproc"),
    ("b_ensemble", 'model_name: "b_postprocessing"', 'model_name: "postprocessing"', "step", "not a model of the rep"),
    ("b_tensorrt_llm_bls", 'string_value: "b_tensorrt_llm"', 'string_value: "a_tensorrt_llm"', "step",
     "it calls a_tensorrt_llm, which belongs to another model"),
    ("b_tensorrt_llm_bls", 'string_value: "b_tensorrt_llm"', 'string_value: "tensorrt_llm"', "step", "not a model"),
    ("a_ensemble_infer", 'string_value: "a_preprocessing"', 'string_value: "b_preprocessing"', "step",
     "it calls b_preprocessing, which belongs to another model"),
    ("b_tensorrt_llm", "decoupled: true", "decoupled: false", "streaming", "b_tensorrt_llm_bls streams from it"),
    ("b_tensorrt_llm", 'name: "b_tensorrt_llm"', 'name: "a_tensorrt_llm"', "name", "unlike its directory's"),
    ("b_tensorrt_llm", "max_batch_size: 8", "max_batch_size: 16", "engine", "the engine was built for 8"),
    ("b_postprocessing", "b_preprocessing/1/tokenizer", "a_preprocessing/1/tokenizer", "tokenizer", "a_preprocessing"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "old", "new", "rule", "said"), COMBINED)
def test_a_fault_between_several_models_is_named(
    model: str, old: str, new: str, rule: str, said: str, both: Path, tmp_path: Path
) -> None:
    depth = tmp_path / "x" / "y"  # the engines are found from there as from the store
    models = shutil.copytree(both, depth / "z" / "models")
    for engine in ("engine-a", "engine-b"):
        shutil.copytree(both.parents[3] / engine, tmp_path / engine)
    assert lint(models).findings == ()
    file = models / model / "config.pbtxt"
    assert old in file.read_text(), "the templates changed: write the fault anew"
    file.write_text(file.read_text().replace(old, new, 1))
    found = [one for one in lint(models).findings if one.rule == rule and said in f"{one.what} {one.fix}"]
    assert found, [f"{one.place} {one.rule} {one.what}" for one in lint(models).findings]
    assert found[0].line > 0


def test_at_least_sixty_faults_and_every_rule_of_the_guide_are_planted() -> None:
    assert len(FAULTS) + len(DIRECTORIES) + len(YAML) + len(COMBINED) >= 120
    assert len({(one.file, one.old, one.new) for one in FAULTS}) == len(FAULTS)
    guide = (Path(__file__).parents[2] / "docs" / "guides" / "lint.md").read_text()
    rows = [line.split("|")[1] for line in guide.split("\n") if line.startswith("| `")]
    planted = {one.rule for one in FAULTS} | {rule for rule, _, _ in DIRECTORIES} | {rule for _, _, rule, _, _ in YAML}
    assert set(re.findall("`(.*?)`", " ".join(rows))) == planted


@pytest.mark.parametrize("fault", FAULTS, ids=lambda one: f"{one.rule}: {one.said}")
def test_a_planted_fault_is_named_with_its_line_and_a_fix(fault: Fault, sound: Path, tmp_path: Path) -> None:
    models = plant(sound, tmp_path, fault)
    found = [one for one in lint(models).findings if one.rule == fault.rule and fault.said in one.what]
    assert found, [f"{one.place} {one.rule} {one.what}" for one in lint(models).findings]
    [first, *_] = found
    assert first.fix
    if fault.at == "":
        assert first.line == 0
    elif fault.at == "*":
        assert first.line > 0
    elif first.file == fault.file:
        expected = fault.new.split("\n")[0] if fault.at is None else fault.at
        assert expected in (models / first.file).read_text().split("\n")[first.line - 1]
    else:
        assert first.line > 0


DIRECTORIES: list[tuple[str, str, Callable[[Path], Any]]] = [
    ("version", "no version directory", lambda models: shutil.rmtree(models / "ensemble" / "1")),
    ("code", "without 1/model.py", lambda models: (models / "preprocessing/1/model.py").unlink()),
    ("config", "no config.pbtxt", lambda models: (models / ENGINE).rename(models / "tensorrt_llm/config.pbtxt.bak")),
    ("config", "no config.pbtxt", lambda models: (models / "other" / "1").mkdir(parents=True)),
    ("encoding", "not UTF-8", lambda models: (models / POST).write_bytes(b'name: "\xff"')),
    ("step", "not a model of the repository", lambda models: shutil.rmtree(models / "postprocessing")),
    ("step", "which is not a model", lambda models: shutil.rmtree(models / "tensorrt_llm")),
]


@pytest.mark.parametrize(("rule", "said", "change"), DIRECTORIES)
def test_a_fault_of_directories_is_named(
    rule: str, said: str, change: Callable[[Path], Any], sound: Path, tmp_path: Path
) -> None:
    models = tmp_path / "models"
    shutil.copytree(sound, models)
    change(models)
    assert any(one.rule == rule and said in one.what and one.fix for one in lint(models).findings)


@pytest.mark.parametrize("text", ["a {" * 20_000, "a [" * 20_000, "a <" * 70 + ">" * 70])
def test_messages_that_nest_without_end_are_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.pbtxt").write_text(text)
    [found] = lint(tmp_path).findings
    assert (found.rule, found.file) == ("syntax", "m/config.pbtxt")
    assert "nest more than 64 deep" in found.what


@pytest.mark.parametrize("text", ["[" * 1500, "model: 2001-99-99", "model: !!int x"])
def test_a_model_yaml_that_yaml_can_not_read_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "m" / "1").mkdir(parents=True)
    (tmp_path / "m" / "config.pbtxt").write_text('backend: "python"\n')
    (tmp_path / "m" / "1" / "model.yaml").write_text(text)
    assert ("syntax", "m/1/model.yaml") in {(one.rule, one.file) for one in lint(tmp_path).findings}


def test_ensembles_that_are_steps_of_each_other_are_named(tmp_path: Path) -> None:
    for one, other in (("a", "b"), ("b", "a")):
        (tmp_path / one / "1").mkdir(parents=True)
        tensors = "".join(
            f'{kind} [ {{ name: "x{kind}" data_type: TYPE_FP32 dims: [ 1 ] }} ]\n' for kind in ("input", "output")
        )
        maps = 'input_map { key: "xinput" value: "xinput" } output_map { key: "xoutput" value: "xoutput" }'
        step = f'ensemble_scheduling {{ step [ {{ model_name: "{other}" model_version: -1 {maps} }} ] }}\n'
        (tmp_path / one / "config.pbtxt").write_text(f'name: "{one}"\nplatform: "ensemble"\n{tensors}{step}')
    found = lint(tmp_path).findings
    assert [(one.rule, one.file) for one in found] == [("step", "a/config.pbtxt"), ("step", "b/config.pbtxt")]


STREAMED = {
    "tensorrt_llm": 'backend: "tensorrtllm"\nmax_batch_size: 4\nmodel_transaction_policy { decoupled: true }\n'
    'input [ { name: "input_ids" data_type: TYPE_INT32 dims: [ -1 ] }, '
    '{ name: "streaming" data_type: TYPE_BOOL dims: [ 1 ] optional: true } ]\n'
    'output [ { name: "output_ids" data_type: TYPE_INT32 dims: [ -1, -1 ] } ]\n'
    'parameters { key: "gpt_model_type" value: { string_value: "inflight_fused_batching" } }\n'
    'parameters { key: "gpt_model_path" value: { string_value: "/engines/1" } }\n'
    'parameters { key: "max_beam_width" value: { string_value: "${max_beam_width}" } }\n',
    "postprocessing": 'backend: "python"\nmax_batch_size: 4\ndynamic_batching { }\n'
    'input [ { name: "TOKENS_BATCH" data_type: TYPE_INT32 dims: [ -1, -1 ] } ]\n'
    'output [ { name: "OUTPUT" data_type: TYPE_STRING dims: [ -1 ] } ]\n'
    'parameters { key: "tokenizer_dir" value: { string_value: "/models/1" } }\n'
    "instance_group [ { count: 2 kind: KIND_CPU } ]\n",
    "ensemble": 'platform: "ensemble"\nmax_batch_size: 4\n'
    'input [ { name: "ids" data_type: TYPE_INT32 dims: [ -1 ] }, '
    '{ name: "stream" data_type: TYPE_BOOL dims: [ 1 ] optional: true } ]\n'
    'output [ { name: "text_output" data_type: TYPE_STRING dims: [ -1 ] } ]\n'
    'ensemble_scheduling { step [\n{ model_name: "tensorrt_llm" model_version: -1\n'
    'input_map { key: "input_ids" value: "ids" } input_map { key: "streaming" value: "stream" }\n'
    'output_map { key: "output_ids" value: "_TOKENS" } },\n{ model_name: "postprocessing" model_version: -1\n'
    'input_map { key: "TOKENS_BATCH" value: "_TOKENS" } output_map { key: "OUTPUT" value: "text_output" } }\n] }\n',
}  # the shape of NVIDIA's repository: an ensemble that streams, and optional parameters left unfilled


def streamed(directory: Path, **changes: str) -> Path:
    for name, text in STREAMED.items():
        (directory / name / "1").mkdir(parents=True)
        (directory / name / "1" / "model.py").write_text("")
        changed = changes.get(name, text)
        (directory / name / "config.pbtxt").write_text(f'name: "{name}"\n{changed}')
    return directory


def test_several_instances_behind_a_streaming_engine_need_their_order_preserved(tmp_path: Path) -> None:
    [found] = lint(streamed(tmp_path / "two")).findings
    assert (found.rule, found.place) == ("streaming", "postprocessing/config.pbtxt:8")
    assert "preserve_ordering: true" in found.fix
    post = STREAMED["postprocessing"]
    ordered = post.replace("dynamic_batching { }", "dynamic_batching { preserve_ordering: true }")
    for name, other in (("one", post.replace("count: 2", "count: 1")), ("ordered", ordered)):
        assert lint(streamed(tmp_path / name, postprocessing=other)).findings == ()
    whole = STREAMED["tensorrt_llm"].replace("decoupled: true", "decoupled: false")
    assert lint(streamed(tmp_path / "whole", tensorrt_llm=whole)).findings == ()


LLMAPI = "model: /models/qwen3\nbackend: pytorch\ntriton_config:\n  max_batch_size: 0\n  decoupled: true\n"


YAML = [
    ("model: /models/qwen3", "model: ${model}", "unfilled", "is not filled", 1),
    ("model: /models/qwen3\n", "", "llmapi", "names no model", 0),
    ("triton_config:", "triton_cfg:", "llmapi", "has no triton_config", 3),
    ("  max_batch_size: 0\n", "", "llmapi", "triton_config has no max_batch_size", 3),
    ("  decoupled: true\n", "", "llmapi", "triton_config has no decoupled", 3),
    ("decoupled: true", "decoupled: 'yes'", "llmapi", "triton_config.decoupled is 'yes'", 5),
    ("decoupled: true", "decoupled: false", "llmapi", "decoupled is false, and tensorrt_llm/config.pbtxt", 5),
    ("backend: pytorch", "tensor_parallel_size: two", "llmapi", "tensor_parallel_size is 'two'", 2),
    ("backend: pytorch", "kv_cache_config: {free_gpu_memory_fraction: 90}", "llmapi", "is 90", 0),
    ("decoupled: true", "decoupled: true\n  cancellation_check_period_ms: 0", "llmapi", "check_period_ms is 0", 6),
    ("backend: pytorch", "tensor_paralel_size: 2", "llmapi", "tensor_paralel_size is not an argument", 2),
    (
        "backend: pytorch",
        "kv_cache_config: {\nenable_block_reuze: true}",
        "llmapi",
        "kv_cache_config.enable_block_reuze",
        3,
    ),
    ("backend: pytorch", "lora_confg: {lora_dir: [/a]}", "llmapi", "lora_confg is not an argument", 2),
    ("backend: pytorch", "lora_config:\n  max_lora_rnk: 8", "llmapi", "lora_config.max_lora_rnk is not", 3),
    ("backend: pytorch", "max_num_tokens: 0", "llmapi", "max_num_tokens is 0", 2),
    ("max_batch_size: 0", "max_batch_size: many", "llmapi", "triton_config.max_batch_size is 'many'", 4),
    ("backend: pytorch", "backend: [", "syntax", "it is no YAML", 4),
    (LLMAPI, "- model", "llmapi", "not a mapping", 0),
]


@pytest.mark.parametrize(("old", "new", "rule", "said", "line"), YAML)
def test_a_fault_of_model_yaml_is_named(old: str, new: str, rule: str, said: str, line: int, tmp_path: Path) -> None:
    directory = tmp_path / "tensorrt_llm"
    (directory / "1").mkdir(parents=True)
    (directory / "1" / "model.py").write_text("")
    (directory / "config.pbtxt").write_text(
        'name: "tensorrt_llm"\nbackend: "python"\nmodel_transaction_policy { decoupled: true }\n'
    )
    yaml = directory / "1" / "model.yaml"
    yaml.write_text(LLMAPI)
    assert lint(tmp_path).findings == ()
    assert old in LLMAPI
    yaml.write_text(LLMAPI.replace(old, new))
    found = [one for one in lint(tmp_path).findings if one.rule == rule and said in one.what]
    assert [(one.file, one.line) for one in found] == [("tensorrt_llm/1/model.yaml", line)]


@pytest.mark.parametrize(
    "part",
    [{}, {"decoupled": False}, {"postprocessing_instances": 3, "preprocessing_instances": 2},
     {"max_queue_size": 7, "exclude_input_in_output": False}],
)  # fmt: skip
@pytest.mark.parametrize("paged", [False, True])
def test_our_repositories_have_no_finding(part: dict[str, Any], paged: bool, tmp_path: Path) -> None:
    engine = write_engine(tmp_path / "engine", paged=paged)
    repository.write(tmp_path / "models", engine, SNAPSHOT, schema.Repository(**part))
    found = lint(tmp_path)
    assert found.findings == ()
    assert found.engine == engine
    assert len(found.models) >= 5


@pytest.mark.parametrize("preset", sorted(path.stem for path in paths.data("configs", "presets").glob("*.yaml")))
@pytest.mark.parametrize("decoupled", [True, False])
def test_no_preset_has_a_finding(preset: str, decoupled: bool, tmp_path: Path) -> None:
    """Of its part `repository`; engines and formats do not reach these files."""
    flags = {"model.id": str(SNAPSHOT), "gpu": "sm120", "target": "engine", "repository.decoupled": decoupled}
    part = schema.resolve(flags, preset=preset).recipe.repository
    repository.write(tmp_path / "models", write_engine(tmp_path / "engine", paged=True), SNAPSHOT, part)
    assert lint(tmp_path).findings == ()


@pytest.mark.parametrize("decoupled", [True, False])
def test_our_llmapi_repository_has_no_finding(decoupled: bool, tmp_path: Path) -> None:
    asked = schema.resolve(
        {"model.id": str(SNAPSHOT), "gpu": "sm120", "target": "llmapi", "repository.decoupled": decoupled}
    )
    arguments = llmapi_arguments.resolve(asked, json.loads((SNAPSHOT / "config.json").read_text()))
    tensors = json.loads(llmapi_repository.TENSORS.read_text())
    directory = tmp_path / "tensorrt_llm" / "1"
    directory.mkdir(parents=True)
    values = {"decoupled": decoupled, "tensors": tensors, "parameters": {"vocab_size": "4096", "end_ids": "[0]"}}
    text = model_config.render(llmapi_repository.TEMPLATE, values)
    (tmp_path / "tensorrt_llm" / "config.pbtxt").write_text(text)
    shutil.copy(llmapi_repository.TEMPLATE / "1" / "model.py", directory)
    yaml = llmapi_repository.model_yaml("../unified", arguments, asked.recipe.repository)
    (directory / "model.yaml").write_text(yaml)
    assert lint(tmp_path).findings == ()


NVIDIA = os.environ.get("NVIDIA_TEMPLATES", "")
FILLED = {
    "triton_max_batch_size": "8", "decoupled_mode": "true", "preprocessing_instance_count": "2",
    "postprocessing_instance_count": "1", "bls_instance_count": "4", "logits_datatype": "TYPE_FP32",
    "encoder_input_features_data_type": "TYPE_FP16", "prompt_embedding_table_data_type": "TYPE_FP16",
    "max_queue_delay_microseconds": "0", "max_queue_size": "0", "triton_backend": "tensorrtllm",
    "engine_dir": "/engines", "batching_strategy": "inflight_fused_batching", "tokenizer_dir": "/tokenizer",
}  # fmt: skip


@pytest.mark.skipif(not NVIDIA, reason="NVIDIA_TEMPLATES names no directory such as all_models/inflight_batcher_llm")
@pytest.mark.parametrize("decoupled", ["true", "false"])
def test_nvidias_templates_have_no_error(decoupled: str, tmp_path: Path) -> None:
    """Filled as its fill_template.py does. v0.19.0 declares one output of its ensemble twice, which is a warning."""
    shutil.copytree(NVIDIA, tmp_path / "models")
    values = FILLED | {"decoupled_mode": decoupled}
    for file in (tmp_path / "models").glob("*/config.pbtxt"):
        file.write_text(re.sub(r"\$\{(\w+)\}", lambda found: values.get(found[1], found[0]), file.read_text()))
    found = lint(tmp_path)
    assert found.errors == 0
    assert {one.what for one in found.findings} <= {"ensemble: output kv_cache_alloc_total_blocks is declared twice"}


def test_the_command_prints_places_and_fixes_and_ends_with_6(
    sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = plant(sound, tmp_path, FAULTS[0])
    assert main.main(["lint", str(models)]) == 6
    said = capsys.readouterr()
    [line] = [line for line in said.out.split("\n") if "tensorrt_llm/config.pbtxt" in line]
    assert re.fullmatch(r"tensorrt_llm/config\.pbtxt:\d+: error: .* \[unfilled\]", line)
    assert "has 1 error in" in said.err
    assert main.main(["lint", str(models), "--json"]) == 6
    [first] = json.loads(capsys.readouterr().out)["findings"]
    assert first.keys() == {"rule", "file", "line", "what", "fix", "severity"}
    assert main.main(["lint", str(sound)]) == 0
    assert "no problem in 6 models, compared with the engine" in capsys.readouterr().err


def test_an_engine_elsewhere_is_compared_and_one_that_is_none_refused(sound: Path, tmp_path: Path) -> None:
    small = write_engine(tmp_path / "small")
    config = json.loads((small / "config.json").read_text())
    config["build_config"]["max_batch_size"] = 2
    (small / "config.json").write_text(json.dumps(config))
    assert any("built for 2" in one.what for one in lint(sound, engine=small).findings)
    with pytest.raises(UsageError, match="holds no engine"):
        lint(sound, engine=tmp_path)
    with pytest.raises(UsageError, match="no Triton model repository"):
        lint(tmp_path)


def test_an_engine_is_named_as_compared_beside_a_draft_engine_that_is_not(sound: Path, tmp_path: Path) -> None:
    models = copied(sound, tmp_path)
    shutil.copytree(models / "tensorrt_llm", models / "tensorrt_llm_draft")
    config = models / "tensorrt_llm_draft" / "config.pbtxt"
    config.write_text(config.read_text().replace('name: "tensorrt_llm"', 'name: "tensorrt_llm_draft"'))
    found = lint(models)
    assert (found.findings, found.engine) == ((), tmp_path / "engine")


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="ab_{}[]<>:;,#\"'\\\n 0-${%}", max_size=60))
def test_the_reader_of_positions_takes_any_text(text: str) -> None:
    lines = text.count("\n") + 1
    assert all(1 <= one.line <= lines for one in positions.read(text).walk())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["a", "b"]), st.integers(0, 99), st.integers(0, 3)), max_size=8))
def test_positions_are_those_of_the_lines(fields: list[tuple[str, int, int]]) -> None:
    lines: list[str] = []
    expected = []
    for name, value, blank in fields:
        lines += ["# comment"] * blank
        lines.append(f"{name}: {value}")
        expected.append((name, len(lines), str(value)))
    assert [(one.name, one.line, one.value) for one in positions.read("\n".join(lines)).fields] == expected
