"""Working models that must pass the smoke test: untrained ones, tight limits, answers without text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import exports
import pytest
from tokenizers_of_kinds import llama2

from builder.serving import smoke
from builder.serving.server import serve
from tests.serving.test_smoke import QUIET, SNAPSHOT, broken, render, render_checkpoint

# An engine whose model generates only <|im_start|>, a special token that ends no answer, unless a bias is larger.
SPECIAL_TOKENS_ONLY = """
from dataclasses import replace
import torch
from builder.reference import backend

read = backend.read

def special(tensors, limits, **more):
    bias = torch.zeros(limits.vocab_size)
    bias[4088] = 100
    def pushed(how):
        return replace(how, bias=bias if how.bias is None else bias + how.bias)
    return [replace(wish, sampling=pushed(wish.sampling)) for wish in read(tensors, limits, **more)]

backend.read = special
TritonPythonModel = backend.TritonPythonModel
"""
# The same, but no bias is large enough.
MUTE = SPECIAL_TOKENS_ONLY.replace("= 100", "= 1e6")


def untrained(directory: Path, name: str, *, tokenizer: str = "") -> Path:
    """A snapshot of this architecture with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    source = exports.DATA / "arch-variants" / name if name != "qwen3" else SNAPSHOT
    shutil.copytree(source, directory)
    config = AutoConfig.from_pretrained(source)
    if tokenizer == "llama2":
        llama2().save(str(directory / "tokenizer.json"))
        config.update({"eos_token_id": 2, "pad_token_id": 2, "bos_token_id": 1})
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "pad_token_id": 2}))
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    for file in directory.glob("*.safetensors*"):
        file.unlink()
    model.save_pretrained(directory)
    return directory


def smoked(models: Path, facts: dict, log: Path) -> smoke.SmokeReport:
    with serve(models, out=QUIET, log=log) as server:
        return smoke.smoke(server.http_url, server.grpc_url, facts, out=QUIET, timeout=60)


def check(report: smoke.SmokeReport, unchecked: int = 0) -> None:
    report.check()
    assert len(report.unchecked) <= unchecked, report.unchecked
    assert len(report.checks) == 16


SLOW = pytest.mark.slow


@pytest.mark.parametrize("name", ["qwen3", *(pytest.param(name, marks=SLOW) for name in ("llama", "mistral", "qwen2"))])
def test_an_untrained_model(tmp_path: Path, name: str) -> None:
    models, facts = render(tmp_path, untrained(tmp_path / "snapshot", name))
    check(smoked(models, facts, tmp_path / "log"))


def test_an_untrained_model_with_a_llama2_tokenizer(tmp_path: Path) -> None:
    models, facts = render(tmp_path, untrained(tmp_path / "snapshot", "llama", tokenizer="llama2"))
    check(smoked(models, facts, tmp_path / "log"))


@pytest.fixture(scope="module")
def unified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sound") / "unified"
    exports.export(exports.quantized(SNAPSHOT), directory)
    return directory


@pytest.mark.parametrize(
    ("longest", "total", "unchecked"),
    [(16, 18, 0), (4, 5, 4), *(pytest.param(*limits, marks=SLOW) for limits in ((48, 96, 0), (16, 32, 0), (4, 6, 2)))],
)
def test_tight_limits(tmp_path: Path, unified: Path, longest: int, total: int, unchecked: int) -> None:
    limits = {"max_input_len": longest, "max_seq_len": total, "max_num_tokens": 64}
    models, facts = render_checkpoint(tmp_path, SNAPSHOT, unified, **limits)
    check(smoked(models, facts, tmp_path / "log"), unchecked)


def test_a_model_that_generates_special_tokens_only(tmp_path: Path, unified: Path) -> None:
    rendered = render_checkpoint(tmp_path, SNAPSHOT, unified)
    with broken(rendered, tmp_path / "broken", {}, SPECIAL_TOKENS_ONLY) as server:
        report = smoke.smoke(server.http_url, server.grpc_url, rendered[1], out=QUIET, timeout=60)
    check(report)
    assert report.sample is None


def test_a_server_whose_answers_are_always_empty_fails(tmp_path: Path, unified: Path) -> None:
    """Such as an engine that ignores biases, or a detokenizer that loses all text."""
    rendered = render_checkpoint(tmp_path, SNAPSHOT, unified)
    with broken(rendered, tmp_path / "broken", {}, MUTE) as server:
        report = smoke.smoke(server.http_url, server.grpc_url, rendered[1], out=QUIET, timeout=60)
    failed = {check.name: check.detail for check in report.failed}
    assert failed["HTTP infer"] == "the answer is empty, also with a bias towards a word"


def test_checks_that_were_not_made_are_counted() -> None:
    report = smoke.SmokeReport(
        (smoke.Check("a", True, "", 0.0), smoke.Check("b", None, "not possible", 0.0), smoke.Check("c", True, "", 0.0))
    )
    report.check()
    assert report.counts == "2 of 3 passed, 1 not checked"
    assert smoke.SmokeReport.from_dict(json.loads(json.dumps(report.as_dict()))) == report


def test_the_detail_of_a_failed_check_is_shortened(tmp_path: Path) -> None:
    from builder.serving.smoke_prompts import CheckFailed

    def fails() -> str:
        raise CheckFailed("x" * 5000)

    assert len(smoke._run("a", fails).detail) == smoke.DETAIL
