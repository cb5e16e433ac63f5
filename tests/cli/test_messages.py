"""Messages for what is refused: they name it correctly, and their advice does not lead to the next error."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from builder.architectures import catalog, served
from builder.cli import main
from builder.core.errors import BuilderError, UnsupportedError, UsageError
from builder.core.output import Output
from builder.core.store import Store
from builder.hub.snapshot import open_source
from builder.model import files as model_files
from builder.preflight import advice, checks
from builder.recipe import schema
from builder.targets.base import Inputs
from builder.trtllm import flags as trtllm_flags
from builder.trtllm import rules
from builder.trtllm.versions import versions

TINY = Path(__file__).parents[1] / "data" / "tiny-qwen3"
CONFIG: dict[str, Any] = json.loads((TINY / "config.json").read_text())


def refusal(*argv: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and stderr of a command in this process."""
    try:
        code = main.main(list(argv))
    except SystemExit as ended:
        code = int(ended.code or 0)
    return code, capsys.readouterr().err


@pytest.mark.parametrize("value", ["120", "[sm120]", "{a: b}", "1.5", "true", "sm999"])
def test_a_value_that_names_no_gpu(value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"model: {{id: {TINY}}}\ngpu: {value}\n")
    for argv in (["--model", str(TINY), "--set", f"gpu={value}"], ["--recipe", str(file)]):
        code, said = refusal("plan", *argv, "--output", str(tmp_path), capsys=capsys)
        assert code in (2, 3)
        assert "gpu" in said.lower()
        assert "Traceback" not in said


@pytest.mark.parametrize("port", ["70000", "0", "-1", "8000.0", "http", "", "99999999999999999999", "²"])
@pytest.mark.parametrize("flag", ["--http-port", "--grpc-port", "--metrics-port"])
def test_an_invalid_port(flag: str, port: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("serve", "smoke", "bench", "load"):
        code, said = refusal(command, f"{flag}={port}", capsys=capsys)
        assert code == 2
        assert "is not a port: give a number from 1 to 65535" in said


def test_a_directory_among_the_tokenizer_files(tmp_path: Path) -> None:
    """transformers keeps additional templates in a directory; other directories may be named like a tokenizer file."""
    model = shutil.copytree(TINY, tmp_path / "model")
    for name in ("chat_templates", "additional_chat_templates", "old.model", "chat_template_backup", "vocab.txt"):
        (model / name).mkdir()
        (model / name / "default.jinja").write_text("x")
    store = Store(tmp_path / "store", Output("quiet"))
    names = [open_source(schema.Model(id=str(path)), store=store).times.keys() for path in (model, TINY)]
    assert names[0] == names[1]
    assert all(path.is_file() for path in model_files.tokenizer_files(model))


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "llava": ({"architectures": ["LlavaForConditionalGeneration"], "vision_config": {"depth": 2}}, "multimodal"),
    "qwen2.5-vl": ({"architectures": ["Qwen2_5_VLForConditionalGeneration"], "vision_config": {"a": 1}}, "multimodal"),
    "gemma3": ({"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {}}, "multimodal"),
    "phi4-mm": ({"architectures": ["Phi4MMForCausalLM"], "embd_layer": {"a": 1}, "auto_map": {"A": "m.A"}}, "multimod"),
    "llava by its authors": ({"architectures": ["LlavaLlamaForCausalLM"], "mm_vision_tower": "clip"}, "multimodal"),
    "internvl": (
        {"architectures": ["InternVLChatModel"], "vision_config": {"a": 1}, "auto_map": {"A": "m.A"}},
        "multi",
    ),
    "whisper": ({"architectures": ["WhisperForConditionalGeneration"], "is_encoder_decoder": True}, "encoder-decoder"),
    "t5": ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "encoder-decoder"),
    "classifier": ({"architectures": ["Qwen3ForSequenceClassification"]}, "it classifies texts"),
    "embeddings": ({"architectures": ["Qwen3Model"]}, "no language model head"),
    "bert": ({"architectures": ["BertForMaskedLM"]}, "it fills gaps"),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("trust", [False, True])
def test_unsupported_kinds_of_models_are_named_correctly(name: str, trust: bool) -> None:
    changes, said = OTHERS[name]
    with pytest.raises(UnsupportedError, match=said) as caught:
        model_files.check_config({**CONFIG, **changes, "model_type": "new"}, "it", trust_remote_code=trust)
    assert "trust" not in str(caught.value)


@pytest.mark.parametrize("model", [*sorted(p.name for p in (TINY.parent / "arch-variants").iterdir()), "tiny-qwen3"])
def test_text_models_are_not_taken_for_another_kind(model: str) -> None:
    directory = TINY if model == "tiny-qwen3" else TINY.parent / "arch-variants" / model
    model_files.check_config(json.loads((directory / "config.json").read_text()), "it", trust_remote_code=False)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], "adapter \\(LoRA\\).*merge_and_unload"),
        (["adapter_config.json", "adapter_model.safetensors", "config.json"], "adapter \\(LoRA\\).*merge_and_unload"),
        (["model_index.json"], "a diffusers pipeline"),
        (["model-Q4_K_M.gguf", "README.md"], "a GGUF model"),
        (["params.json", "consolidated.safetensors"], "the format of its publisher"),
        (["README.md"], "has no config.json"),
    ],
)
def test_directories_that_hold_something_else(names: list[str], said: str) -> None:
    with pytest.raises(BuilderError) as caught:
        model_files.check_names(names, "it")
    assert re.search(said, str(caught.value), re.DOTALL)


def test_trust_remote_code_is_advised_only_where_it_helps() -> None:
    own = {**CONFIG, "model_type": "new", "auto_map": {"AutoModelForCausalLM": "m.A"}}
    for name in {*catalog.served_by("engine"), *catalog.served_by("llmapi")}:
        with pytest.raises(UnsupportedError) as caught:
            model_files.check_config({**own, "architectures": [name]}, "it", trust_remote_code=False)
        assert caught.value.hint == "Read that code, then add --trust-remote-code."
    with pytest.raises(UnsupportedError) as caught:
        model_files.check_config({**own, "architectures": ["OwnForCausalLM"]}, "it", trust_remote_code=False)
    assert "no target serves OwnForCausalLM" in caught.value.hint


@pytest.mark.parametrize("name", [*catalog.served_by("llmapi"), "GPT2LMHeadModel", "FalconForCausalLM"])
def test_the_llm_api_is_advised_only_for_what_it_serves(name: str) -> None:
    """For every architecture without an engine: following the advice gives a plan, or there is no advice."""
    config = {**CONFIG, "architectures": [name]}
    try:
        served.check_engine(config)
        return
    except UnsupportedError as error:
        advised = advice.settings(error.hint)
    resolved = schema.resolve({"model.id": "m", "target": "llmapi", **advised, "gpu": "sm100"})
    if "target" in advised:
        checks.check_model(Inputs(resolved, config))
    else:
        with pytest.raises(UnsupportedError):
            checks.check_model(Inputs(resolved, config))


def test_qwen3_with_attention_bias_is_refused_by_its_config() -> None:
    biased = {**CONFIG, "attention_bias": True}
    for gpu in ("cpu", "sm120"):
        with pytest.raises(UnsupportedError, match="attention_bias") as caught:
            checks.check_model(Inputs(schema.resolve({"model.id": "m", "gpu": gpu}), biased), layouts=True)
        assert "--target llmapi" in caught.value.hint
    resolved = schema.resolve({"model.id": "m", "gpu": "sm100", "target": "llmapi"})
    checks.check_model(Inputs(resolved, biased))
    checks.check_model(Inputs(schema.resolve({"model.id": "m", "gpu": "cpu"}), biased), layouts=False)  # the checkpoint


# Flags that break each rule that refuses something.
FLAGS: dict[str, dict[str, str]] = {
    "R02": {"max_draft_len": "2", "gather_context_logits": "enable"},
    "R03": {"multiple_profiles": "enable", "opt_num_tokens": "8"},
    "R04": {"model_cls_file": "a.py"},
    "R05": {"streamingllm": "enable"},
    "R06": {"pp_reduce_scatter": "enable"},
    "R41": {"lora_plugin": "bfloat16"},
    "R52": {"remove_input_padding": "disable"},
    "R38": {"speculative_decoding_mode": "eagle", "context_fmha": "disable"},
    "R39": {"gemm_swiglu_plugin": "fp8"},
}


@pytest.mark.parametrize(("rule", "version"), [*itertools.product(FLAGS, versions())])
def test_refusals_of_flags_contain_no_exception_names(rule: str, version: str) -> None:
    flags = {"engine.flags": FLAGS[rule], "engine.tensorrt_llm": version}
    with pytest.raises((UsageError, UnsupportedError)) as caught:
        trtllm_flags.resolve(schema.resolve({"model.id": "m", "gpu": "sm100", **flags}), CONFIG)
    assert not re.search(r"[A-Z]\w*Error\b", str(caught.value)), str(caught.value)


@pytest.mark.parametrize("version", versions())
def test_no_rule_is_worded_as_an_exception(version: str) -> None:
    loaded = trtllm_flags.load(version)
    settings = rules.Settings(rules.Subject(loaded, 120), {})
    for rule in loaded.rules:
        text = rules._reason(settings, rule)
        assert not re.search(r"\b\w+Error\b", text), text
