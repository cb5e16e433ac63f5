"""The rendered Triton repository: its contents, its consistency, and that invalid ones are rejected."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2

from builder.core import paths
from builder.core.errors import IntegrityError, UnsupportedError, UsageError
from builder.core.output import Output
from builder.core.store import Store
from builder.model.hashed_files import SourceFiles
from builder.recipe import schema
from builder.triton import model_config, repository

SNAPSHOT = Path(__file__).parents[1] / "data" / "tiny-qwen3"
TENSORS = json.loads(paths.data("configs", "trtllm", "1.2.1", "triton-tensors.json").read_text())


def write_engine(directory: Path, *, paged: bool = False, **changes: Any) -> Path:
    """An engine directory with the part of its config.json that the repository reads."""
    pretrained = {"logits_dtype": "float16", "vocab_size": 4096} | changes.pop("pretrained", {})
    build = {"max_batch_size": 8, "max_input_len": 128, "max_seq_len": 256, "max_beam_width": 1}
    config = {
        "version": "1.2.1",
        "pretrained_config": pretrained,
        "build_config": build | {"plugin_config": {"use_paged_context_fmha": paged}},
    } | changes
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def configs(models: Path) -> dict[str, Any]:
    return {
        path.parent.name: text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
        for path in models.glob("*/config.pbtxt")
    }


def parameters(config: Any) -> dict[str, str]:
    return {key: value.string_value for key, value in config.parameters.items()}


def written(tmp_path: Path, engine: Path | None = None, **part: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    models = tmp_path / "models"
    facts = repository.write(models, engine or write_engine(tmp_path / "engine"), SNAPSHOT, schema.Repository(**part))
    return configs(models), facts


def test_an_engines_repository_has_six_models(tmp_path: Path) -> None:
    found, facts = written(tmp_path)
    assert sorted(found) == [
        "ensemble", "ensemble_infer", "postprocessing", "preprocessing", "tensorrt_llm", "tensorrt_llm_bls",
    ]  # fmt: skip
    assert facts["models"]["infer"] == "ensemble_infer"
    assert facts["end_ids"] == [4089, 4087]
    assert (facts["end_id"], facts["pad_id"], facts["vocab_size"]) == (4089, 4087, 4096)
    assert {name for name, config in found.items() if config.model_transaction_policy.decoupled} == {
        "tensorrt_llm", "tensorrt_llm_bls",
    }  # fmt: skip
    models = tmp_path / "models"
    assert (models / "preprocessing/1/tokenizer/tokenizer.json").read_bytes() == (
        SNAPSHOT / "tokenizer.json"
    ).read_bytes()
    assert all((models / name / "1").is_dir() for name in found)
    assert parameters(found["tensorrt_llm"])["gpt_model_path"] == "../../engine"


def test_without_streaming_the_ensemble_serves_infer(tmp_path: Path) -> None:
    found, facts = written(tmp_path, decoupled=False)
    assert "ensemble_infer" not in found
    assert facts["models"]["infer"] == "ensemble"
    assert not any(config.model_transaction_policy.decoupled for config in found.values())


def test_the_engine_model_has_every_tensor_of_the_cpp_backend(tmp_path: Path) -> None:
    engine = written(tmp_path)[0]["tensorrt_llm"]
    assert engine.backend == "tensorrtllm"
    for kind in ("input", "output"):
        assert [entry.name for entry in getattr(engine, kind)] == [
            entry["name"] for entry in TENSORS["tensorrt_llm"][kind]
        ]
    by_name = {entry.name: entry for entry in engine.input}
    assert by_name["input_lengths"].HasField("reshape")
    assert list(by_name["stop_words_list"].dims) == [2, -1]
    assert by_name["draft_logits"].data_type == model_config_pb2.TYPE_FP16


def tensor_types(config: Any, kind: str) -> dict[str, tuple[int, tuple[int, ...]]]:
    return {entry.name: (entry.data_type, tuple(entry.dims)) for entry in getattr(config, kind)}


def test_the_ensemble_connects_tensors_of_the_same_type(tmp_path: Path) -> None:
    found, _ = written(tmp_path)
    ensemble = found["ensemble"]
    wires, used = tensor_types(ensemble, "input"), set()
    for step in ensemble.ensemble_scheduling.step:
        model = found[step.model_name]
        inputs, outputs = tensor_types(model, "input"), tensor_types(model, "output")
        required = {entry.name for entry in model.input if not entry.optional}
        assert required <= set(step.input_map)
        for name, wire in step.input_map.items():
            assert inputs[name] == wires[wire], (step.model_name, name)
            used.add(wire)
        wires |= {wire: outputs[name] for name, wire in step.output_map.items()}
    assert set(tensor_types(ensemble, "input")) <= used
    assert all(wires[name] == end for name, end in tensor_types(ensemble, "output").items())


def test_the_maps_of_bls_name_existing_tensors(tmp_path: Path) -> None:
    found, _ = written(tmp_path)
    values = parameters(found["tensorrt_llm_bls"])
    request, engine = tensor_types(found["tensorrt_llm_bls"], "input"), tensor_types(found["tensorrt_llm"], "input")
    made = tensor_types(found["preprocessing"], "output")
    for name, source in json.loads(values["tensorrt_llm_from_request"]).items():
        assert engine[name] == request[source]
    for name, source in json.loads(values["tensorrt_llm_from_preprocessing"]).items():
        assert engine[name] == made[source]
    assert tensor_types(found["ensemble_infer"], "input") == request == tensor_types(found["ensemble"], "input")


def test_parameters_without_a_default_in_the_cpp_backend_are_set(tmp_path: Path) -> None:
    values = parameters(written(tmp_path)[0]["tensorrt_llm"])
    assert values["tokenizer_dir"] == ""
    assert values["gpt_model_type"] == "inflight_fused_batching"
    assert values["exclude_input_in_output"] == "true"
    assert values["FORCE_CPU_ONLY_INPUT_TENSORS"] == "no"


GUIDED = {"guided_decoding_backend": "xgrammar", "xgrammar_tokenizer_info_path": "1/xgrammar_tokenizer_info.json"}


def test_guided_decoding_gets_its_file_and_stops_where_the_chat_template_does(tmp_path: Path) -> None:
    found, facts = written(tmp_path)
    assert parameters(found["tensorrt_llm"]).items() >= GUIDED.items()
    assert facts["guided_decoding"] == {"file": GUIDED["xgrammar_tokenizer_info_path"], "stop_token_ids": [4089, 4087]}
    content = json.loads((tmp_path / "models/tensorrt_llm/1/xgrammar_tokenizer_info.json").read_text())
    assert content["stop_token_ids"] == [4089, 4087]
    assert len(content["encoded_vocab"]) <= 4096


@pytest.mark.parametrize("change", [{"pretrained": {"logits_dtype": "bfloat16"}}, {"build_config": {"mode": "eagle"}}])
def test_guided_decoding_is_off_where_the_engine_cant(tmp_path: Path, change: dict[str, Any]) -> None:
    if "build_config" in change:
        build = {"max_batch_size": 8, "max_input_len": 128, "max_seq_len": 256, "plugin_config": {}}
        change = {"build_config": {**build, "speculative_decoding_mode": 8}}
    engine = write_engine(tmp_path / "engine", **change)
    found, facts = written(tmp_path, engine)
    for name in ("tokenizer_dir", *GUIDED):
        assert parameters(found["tensorrt_llm"])[name] == ""
    assert "guided_decoding" not in facts
    with pytest.raises(UsageError, match="guided_decoding can't be used with this engine"):
        written(tmp_path / "asked", engine, guided_decoding=True)


def test_guided_decoding_can_be_turned_off(tmp_path: Path) -> None:
    found, facts = written(tmp_path, guided_decoding=False)
    assert parameters(found["tensorrt_llm"])["guided_decoding_backend"] == ""
    assert "guided_decoding" not in facts
    assert not (tmp_path / "models/tensorrt_llm/1/xgrammar_tokenizer_info.json").exists()


@pytest.mark.parametrize("paged", [True, False])
def test_kv_reuse_and_chunked_context_follow_the_engine(tmp_path: Path, paged: bool) -> None:
    found, _ = written(tmp_path, write_engine(tmp_path / "engine", paged=paged))
    values = parameters(found["tensorrt_llm"])
    assert values["enable_kv_cache_reuse"] == values["enable_chunked_context"] == str(paged).lower()


def test_kv_reuse_without_paged_fmha_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="enable_kv_cache_reuse needs an engine with paged context FMHA"):
        written(tmp_path, enable_kv_cache_reuse=True)


def test_kv_reuse_can_be_disabled_and_queues_limited(tmp_path: Path) -> None:
    engine = write_engine(tmp_path / "engine", paged=True)
    found, _ = written(tmp_path, engine, enable_kv_cache_reuse=False, max_queue_size=7, bls_instances=3)
    assert parameters(found["tensorrt_llm"])["enable_kv_cache_reuse"] == "false"
    assert found["tensorrt_llm"].dynamic_batching.default_queue_policy.max_queue_size == 7
    assert found["tensorrt_llm"].dynamic_batching.default_queue_policy.default_timeout_microseconds == 600_000_000
    assert parameters(found["tensorrt_llm_bls"])["max_queue_size"] == "7"
    assert found["tensorrt_llm_bls"].instance_group[0].count == 3


@pytest.mark.parametrize(("dtype", "expected"), [("float32", "TYPE_FP32"), ("bfloat16", "TYPE_BF16")])
def test_logits_type_follows_the_engine(tmp_path: Path, dtype: str, expected: str) -> None:
    found, _ = written(tmp_path, write_engine(tmp_path / "engine", pretrained={"logits_dtype": dtype}))
    for name in ("tensorrt_llm", "ensemble", "tensorrt_llm_bls"):
        assert tensor_types(found[name], "output")["context_logits"][0] == model_config_pb2.DataType.Value(expected)


def test_logits_without_a_type_and_versions_without_templates(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="logits are float8"):
        written(tmp_path, write_engine(tmp_path / "engine", pretrained={"logits_dtype": "float8"}))
    with pytest.raises(UnsupportedError, match=r"no Triton templates for TensorRT-LLM 1\.3\.0"):
        written(tmp_path, write_engine(tmp_path / "engine", version="1.3.0"))


@given(st.text())
def test_any_text_survives_as_a_parameter(text: str) -> None:
    text = text.encode("utf-8", "ignore").decode()
    config = text_format.Parse(f"name: {model_config.quote(text)}", model_config_pb2.ModelConfig())
    assert config.name == text


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    tmp = tmp_path_factory.mktemp("rendered")
    written(tmp)
    return tmp / "models"


@pytest.mark.parametrize(
    ("model", "old", "new", "message"),
    [
        ("ensemble", "max_batch_size: 8", "max_batch_size: 4", "max_batch_size is 4 instead of 8"),
        ("tensorrt_llm_bls", "max_batch_size: 1", "max_batch_size: 8", "max_batch_size is 8 instead of 1"),
        ("tensorrt_llm", "decoupled: true", "decoupled: false", "decoupled is False instead of True"),
        ("tensorrt_llm", '"beam_width"', '"end_id"', "input end_id is declared twice"),
        ("postprocessing", "count: 1", "count: 0", "it has no instance"),
        ("postprocessing", '"postprocessing"', '"post"', "its name is 'post'"),
        ("preprocessing", "TYPE_INT32", "TYPE_INT31", "it does not parse: 21:"),
        ("preprocessing", "TYPE_INT32", "${type}", "it still contains ${"),
        ("preprocessing", '"true"', '"{{ add }}"', "it still contains {{"),
        ("ensemble", "ensemble_scheduling", "scheduling", "no field named"),
    ],
)
def test_an_invalid_model_is_rejected(
    rendered: Path, tmp_path: Path, model: str, old: str, new: str, message: str
) -> None:
    shutil.copytree(rendered, tmp_path / "models")
    model_config.check(tmp_path / "models", max_batch_size=8, decoupled=True)
    path = tmp_path / "models" / model / "config.pbtxt"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(IntegrityError) as caught:
        model_config.check(tmp_path / "models", max_batch_size=8, decoupled=True)
    assert message in caught.value.why
    assert caught.value.why.startswith(f"{model}: ")


def test_a_template_name_without_a_value_is_an_error() -> None:
    from jinja2 import UndefinedError

    with pytest.raises(UndefinedError, match="max_batch_size"):
        model_config.render(paths.data("triton_templates", "1.2", "postprocessing"), {})


def stage(tmp_path: Path, engine: Path, snapshot: Path = SNAPSHOT) -> repository.Repository:
    config = json.loads((engine / "config.json").read_text())
    store = Store(tmp_path / "store", Output("quiet"))
    return repository.render(
        SimpleNamespace(path=engine, digest="engine", config=config),  # type: ignore[arg-type]
        SimpleNamespace(path=snapshot, digest="snapshot", source=SourceFiles(snapshot, {}, {})),  # type: ignore[arg-type]
        schema.Repository(),
        store=store,
    )


def test_rendering_is_cached_per_engine(tmp_path: Path) -> None:
    first = stage(tmp_path, write_engine(tmp_path / "engine"))
    again = stage(tmp_path, tmp_path / "engine")
    moved = stage(tmp_path, write_engine(tmp_path / "moved"))
    assert first == again
    assert moved.path != first.path
    assert (first.models / "ensemble" / "1").is_dir()
    link = tmp_path / "link"
    link.symlink_to(first.path)
    assert repository.open_repository(link) == first
    with pytest.raises(UsageError, match="not a finished repository"):
        repository.open_repository(first.models)


def test_nothing_is_cached_for_a_snapshot_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "snapshot").mkdir()
    with pytest.raises(UnsupportedError, match=r"no tokenizer\.json"):
        stage(tmp_path, write_engine(tmp_path / "engine"), tmp_path / "snapshot")
    assert not list((tmp_path / "store" / "repository").iterdir())


def test_the_only_repository_is_the_default_and_several_need_a_choice(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="contains no repository"):
        repository.find(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "a").symlink_to("../repository/1")
    (tmp_path / "models" / ".a.123").symlink_to("../repository/2")  # a link that is being replaced
    for named in (None, "", "a"):
        assert repository.find(tmp_path, named) == tmp_path / "models" / "a"
    (tmp_path / "models" / "b").symlink_to("../repository/2")
    assert repository.find(tmp_path, "b").name == "b"
    for named in (None, "c"):
        with pytest.raises(UsageError, match="It contains a, b") as caught:
            repository.find(tmp_path, named)
        assert "MODEL_REPOSITORY=a" in caught.value.hint


def test_the_import_is_light() -> None:
    heavy = "{'torch', 'transformers', 'jinja2', 'tritonclient', 'numpy'}"
    code = f"import sys, builder.triton.repository, builder.serving.server; print({heavy} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"
