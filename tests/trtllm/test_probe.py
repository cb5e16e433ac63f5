"""Asking a card which doubtful flags build: by a stand-in for the card, and what its answers do to a plan."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import source_models
from card_stand_in import machine
from hypothesis import given
from hypothesis import strategies as st

from builder.architectures import served
from builder.core.errors import BuilderError, IntegrityError, UnsupportedError
from builder.core.safetensors_io import NewTensor
from builder.formats import kv_cache
from builder.preflight import memory
from builder.recipe import schema
from builder.trtllm import flags as trtllm_flags
from builder.trtllm import probe, probe_model, probe_results, probe_store
from builder.trtllm.probe_results import FAILS, UNKNOWN, WORKS, Answer, Probe
from tests.trtllm.test_rules import FREE, LLAMA, MODELS, QWEN3_8B, notes_of

VERSION = trtllm_flags.load("1.2.1")
QUESTIONS = {found.name: found for found in probe_results.probes(VERSION, 120)}
FMHA = ("context_fmha", "use_paged_context_fmha", "use_fp8_context_fmha")
TINY = str(Path("tests/data/tiny-qwen3").absolute())


class Card:
    """A machine with a card, as tests/support/card_stand_in.py has it, and an output directory."""

    def __init__(self, directory: Path, **facts: Any) -> None:
        self.directory, self.output = directory, directory / "out"
        self.environment = machine(directory, **facts)

    def argv(self, *argv: str) -> list[str]:
        return [sys.executable, "-m", "builder", *argv, "--output", str(self.output)]

    def run(self, *argv: str, told: list[Any] | None = None) -> subprocess.CompletedProcess[str]:
        environment = {**self.environment, "CARD": json.dumps(told or [])}
        return subprocess.run(self.argv(*argv), capture_output=True, text=True, env=environment)

    def probe(self, *argv: str, told: list[Any] | None = None, code: int = 0) -> dict[str, Any]:
        """The answers by name."""
        done = self.run("probe", *argv, "--json", told=told)
        assert done.returncode == code, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found.get("answers", found)  # type: ignore[no-any-return]

    @property
    def calls(self) -> list[dict[str, Any]]:
        file = self.directory / "calls"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    @property
    def kept(self) -> Path:
        return self.output / "probes" / "tensorrt_llm-1.2.1-tensorrt-10.14.1.48-sm120.json"


@pytest.fixture
def card(tmp_path: Path) -> Card:
    return Card(tmp_path / "machine")


# ---- the questions


def test_every_question_says_all_that_is_needed() -> None:
    assert {"gemm_plugin-nvfp4", "gemm_plugin-disable", "norm_quant_fusion", "fuse_fp4_quant-128"} <= set(QUESTIONS)
    for name in ("context_fmha", "fp8_context_fmha", "paged_context_fmha", "paged_context_fmha-kv_auto"):
        assert {f"{name}-{size}" for size in (64, 128, 192)} <= set(QUESTIONS)
    for found in QUESTIONS.values():
        assert found.question.endswith(("?", "."))
        assert found.source
        assert set(found.about) <= {"head_size", "kv_cache_dtype", "architecture"}
        for flags in (found.flags, found.built_with, found.instead):
            for name, value in flags.items():
                trtllm_flags.check(VERSION, name, value)
    assert next(found.name for found in QUESTIONS.values() if found.control) == next(iter(QUESTIONS))
    assert probe_results.probes(VERSION, 100) == probe_results.probes(trtllm_flags.load("1.0.0"), 120) == []


@pytest.mark.parametrize("question", QUESTIONS.values(), ids=str)
def test_an_engine_is_built_with_the_flags_in_question(question: Probe, tmp_path: Path) -> None:
    """The rules change none of them, and no two questions are the same engine."""
    argv = probe.command(question, {"gemm_plugin": "nvfp4"}, "sm120", "1.2.1", tmp_path)
    for name, value in {**question.built_with, **question.flags}.items():
        assert argv[argv.index(f"--{name}") + 1] == value
    config = json.loads((tmp_path / "checkpoint" / "tensorrt_llm" / "config.json").read_text())
    assert config["head_size"] == question.about.get("head_size", 128)
    assert config["architecture"] == question.about.get("architecture", "Qwen3ForCausalLM")
    assert (config["quantization"]["kv_cache_quant_algo"] is None) == (question.about.get("kv_cache_dtype") == "auto")


def test_no_two_questions_are_the_same() -> None:
    asked = [json.dumps(found.asked(), sort_keys=True) for found in QUESTIONS.values()]
    assert len(set(asked)) == len(asked)


@pytest.mark.parametrize("architecture", ["Qwen3ForCausalLM", "LlamaForCausalLM"])
@pytest.mark.parametrize("head_size", [64, 128, 192, 256])
@pytest.mark.parametrize("fp8_kv", [True, False])
def test_the_two_layer_model_is_one_that_runs(architecture: str, head_size: int, fp8_kv: bool, tmp_path: Path) -> None:
    """Every tensor in its place, numbers of a sane size: the reference executor's logits are near 1."""
    import torch

    from builder.checkpoint.validate import inspect
    from builder.reference.model import ReferenceModel

    config = probe_model.config(architecture=architecture, head_size=head_size)
    layout = probe_model.write_checkpoint(config, tmp_path, kv_cache.FP8 if fp8_kv else kv_cache.AUTO)
    served.check_engine(config)
    model = ReferenceModel.load(layout)
    logits = model.forward(torch.arange(1, 40), model.new_cache())
    assert bool(torch.isfinite(logits).all())
    assert 0.1 < float(logits.std()) < 10
    assert float(logits[0].sub(logits[-1]).abs().max()) > 0.1
    inspect(layout).check()


# ---- asking


def test_every_question_is_asked_once_and_kept(card: Card) -> None:
    found = card.probe("--gpu", "sm120")
    assert list(found) == list(QUESTIONS)
    assert {record["outcome"] for record in found.values()} == {"works"}
    assert len(card.calls) == len(QUESTIONS)
    kept = json.loads(card.kept.read_text())
    assert (kept["tensorrt_llm"], kept["tensorrt"], kept["sm"]) == ("1.2.1", "10.14.1.48", 120)
    assert kept["answers"] == found
    record = found["paged_context_fmha-128"]
    assert (record["card"], record["driver"]) == ("NVIDIA GeForce RTX 5090", "590.44.01")
    assert Path(record["log"]).read_text().startswith("$ trtllm-build")
    assert {path.name for path in (card.output / "probes").iterdir()} == {card.kept.name}  # no checkpoint, no engine
    # a second time there is nothing to ask
    assert card.probe("--gpu", "auto") == found
    assert len(card.calls) == len(QUESTIONS)
    card.probe("--only", "norm_quant_fusion", "--force")
    assert len(card.calls) == len(QUESTIONS) + 2  # with its control
    done = card.run("probe")
    assert "built, not run" in done.stderr
    assert f"kept       {card.kept}" in done.stdout
    assert "paged_context_fmha-128\tworks" in done.stdout


TOLD = [
    [{"head_size": 256, "context_fmha": "enable"}, "unfused"],
    [{"fuse_fp4_quant": "enable"}, "assert"],
    [{"norm_quant_fusion": "enable"}, "fail"],
    [{"gemm_plugin": "disable"}, "segv"],
    [{"use_paged_context_fmha": "enable", "head_size": 64}, "oom"],
    [{"use_paged_context_fmha": "enable", "head_size": 192}, "empty"],
]


def test_what_a_card_says_is_judged(card: Card) -> None:
    """A fallback that builds is no success; a crash, too little memory and half an engine are no answer."""
    card.environment["TLLM_LOG_LEVEL"] = "ERROR"  # a user's, under which no warning would be heard
    done = card.run("probe", "--json", told=TOLD)
    assert done.returncode == 1
    found = json.loads(done.stdout)["answers"]
    outcomes = {name: record["outcome"] for name, record in found.items()}
    assert outcomes["context_fmha-256"] == FAILS
    assert "Fall back to unfused MHA" in found["context_fmha-256"]["reason"]
    assert outcomes["fuse_fp4_quant-128"] == FAILS
    assert "only supports SM100f" in found["fuse_fp4_quant-128"]["reason"]
    assert outcomes["norm_quant_fusion"] == FAILS
    assert "Engine building failed" in found["norm_quant_fusion"]["reason"]
    assert outcomes["gemm_plugin-disable"] == UNKNOWN
    assert "SIGSEGV" in found["gemm_plugin-disable"]["reason"]
    assert outcomes["paged_context_fmha-64"] == UNKNOWN
    assert "out of memory" in found["paged_context_fmha-64"]["reason"]
    assert outcomes["paged_context_fmha-192"] == UNKNOWN
    assert "did not write config.json" in found["paged_context_fmha-192"]["reason"]
    assert outcomes["paged_context_fmha-128"] == outcomes["context_fmha-64"] == WORKS
    assert "probes have no answer" in done.stderr
    # what has no answer is asked again, and nothing else
    before, open_ones = len(card.calls), [name for name, outcome in outcomes.items() if outcome == UNKNOWN]
    assert card.probe()["gemm_plugin-disable"]["outcome"] == WORKS
    assert len(card.calls) - before == len(open_ones)


def test_an_engine_that_takes_too_long_is_stopped_and_no_answer(card: Card) -> None:
    told = [[{"norm_quant_fusion": "enable"}, "slow"]]
    argv = ["--only", "norm_quant_fusion", "--only", "gemm_plugin-nvfp4"]
    card.probe("--only", "gemm_plugin-nvfp4")
    start = time.monotonic()
    found = card.probe(*argv, "--time-limit", "5", told=told, code=1)
    assert found["norm_quant_fusion"]["outcome"] == UNKNOWN
    assert "took more than 5 s" in found["norm_quant_fusion"]["reason"]
    assert time.monotonic() - start < 100  # the stand-in would sleep for 120


@pytest.mark.parametrize("how", ["fail", "no tactic"])
def test_where_one_fp4_gemm_fails_the_other_carries_the_questions(card: Card, how: str) -> None:
    told = [[{"gemm_plugin": "nvfp4"}, how]]
    found = card.probe("--only", "context_fmha-128", told=told)
    assert found["context_fmha-128"]["outcome"] == WORKS
    assert [call["gemm_plugin"] for call in card.calls] == ["nvfp4", "disable", "disable"]
    kept = json.loads(card.kept.read_text())["answers"]
    assert {name: record["outcome"] for name, record in kept.items()} == {
        "gemm_plugin-nvfp4": FAILS, "gemm_plugin-disable": WORKS, "context_fmha-128": WORKS,
    }  # fmt: skip


def test_where_nothing_builds_no_flag_is_blamed(card: Card) -> None:
    done = card.run("probe", told=[[{}, "fail"]])
    assert done.returncode == 1
    assert "Even a plain two-layer engine" in done.stderr
    assert "Engine building failed" in done.stderr
    assert not card.kept.exists()
    assert len(card.calls) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_killed_probe_keeps_what_was_answered_and_goes_on_there(card: Card, number: signal.Signals) -> None:
    told = [[{"norm_quant_fusion": "enable"}, "slow"]]
    environment = {**card.environment, "CARD": json.dumps(told)}
    argv = card.argv("probe", "--only", "norm_quant_fusion", "--only", "gemm_plugin-disable")
    child = subprocess.Popen(argv, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(card.calls) < 3:
        assert child.poll() is None
        time.sleep(0.05)
    child.send_signal(number)
    assert child.wait(60) in (130, -signal.SIGKILL)
    assert {name for name in json.loads(card.kept.read_text())["answers"]} == {
        "gemm_plugin-nvfp4", "gemm_plugin-disable",
    }  # fmt: skip
    assert card.probe("--only", "norm_quant_fusion")["norm_quant_fusion"]["outcome"] == WORKS
    assert len(card.calls) == 4
    assert [path.name for path in (card.output / "probes").iterdir()] == [card.kept.name]


def test_two_probes_at_once_ask_each_question_once_and_lose_none(card: Card) -> None:
    argv = card.argv("probe", "--quiet")
    both = [subprocess.Popen(argv, env=card.environment, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [child.wait(300) for child in both] == [0, 0]
    assert list(json.loads(card.kept.read_text())["answers"]) == list(QUESTIONS)
    assert len(card.calls) == len(QUESTIONS)


def test_another_question_under_the_same_name_is_asked_again(card: Card) -> None:
    card.probe("--only", "context_fmha-128")
    content = json.loads(card.kept.read_text())
    content["answers"]["context_fmha-128"]["asked"]["flags"]["context_fmha"] = "disable"
    card.kept.write_text(json.dumps(content))
    before = len(card.calls)
    card.probe("--only", "context_fmha-128")
    assert len(card.calls) == before + 1


@pytest.mark.parametrize(
    ("facts", "argv", "code", "message"),
    [
        ({"capability": (9, 0), "name": "NVIDIA H200"}, ["--gpu", "sm120"], 3, "this machine's NVIDIA H200 is sm90"),
        ({"capability": (7, 5), "name": "Tesla T4"}, [], 3, "Tesla T4 is sm75, and there is no profile"),
        ({}, ["--gpu", "cpu"], 3, "cpu has no probes"),
        ({}, ["--gpu", "sm42"], 3, "no GPU profile or card named 'sm42'"),
        ({"build": False}, ["--gpu", "sm120"], 3, "trtllm-build is not on this machine's PATH"),
        ({"tensorrt": None}, [], 3, "does not have tensorrt"),
        ({"tensorrt_llm": "1.3.0"}, [], 3, "builds no engines"),
        ({}, ["--only", "context_fmha"], 2, "no probe 'context_fmha' for sm120"),
        ({}, ["--time-limit", "-1"], 2, "can't be built in -1 s"),
    ],
)
def test_a_machine_that_can_not_answer_says_why(
    tmp_path: Path, facts: dict[str, Any], argv: list[str], code: int, message: str
) -> None:
    card = Card(tmp_path / "machine", **facts)
    done = card.run("probe", *argv)
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
    assert message in done.stderr
    assert not card.calls


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    card = Card(tmp_path / "machine", capability=None)
    done = card.run("probe", "--gpu", "sm120")
    assert done.returncode == 3
    assert "No GPU is visible" in done.stderr


def test_a_card_without_doubts_is_asked_nothing(tmp_path: Path) -> None:
    card = Card(tmp_path / "machine", capability=(10, 0), name="NVIDIA B200")
    assert card.probe() == {}
    assert not card.calls


def test_answers_that_are_none_are_refused(card: Card) -> None:
    card.kept.parent.mkdir(parents=True)
    for content in ("", "[]", '{"answers": {"context_fmha-128": {}}}', '{"answers": {"a": {"outcome": 1}}}'):
        card.kept.write_text(content)
        with pytest.raises(IntegrityError, match="is not a file of probe answers"):
            probe_store.read(card.kept)
    assert card.run("plan", "--model", TINY, "--gpu", "sm120").returncode == 6


# ---- what the answers do


def answers(**outcomes: str) -> list[Answer]:
    """Answers of an sm120 card, by question ("_" for "-"), in the order of the questions."""
    said = {name.replace("__", "-"): outcome for name, outcome in outcomes.items()}
    assert set(said) <= set(QUESTIONS)
    return [Answer(QUESTIONS[n], 120, said[n], "no kernel", "RTX 5090", "FILE") for n in QUESTIONS if n in said]


def resolved(*flags: str, gpu: str = "sm120", **values: object) -> schema.Resolved:
    return schema.resolve({"model.id": "m", "gpu": gpu, **values}, sets=[f"engine.flags.{flag}" for flag in flags])


def fmha(*flags: str, said: list[Answer], config: dict[str, Any] = QWEN3_8B, **kwargs: Any) -> list[str]:
    found = {flag.name: flag.value for flag in trtllm_flags.resolve(resolved(*flags, **kwargs), config, said)}
    return [found[name] for name in FMHA]


OFF, CONTEXT, FP8, ALL, AUTO = (
    ["disable"] * 3, ["enable", "disable", "disable"], ["enable", "disable", "enable"], ["enable"] * 3,
    ["enable", "enable", "disable"],
)  # fmt: skip


def test_a_proved_flag_takes_the_place_of_what_the_profile_has_off() -> None:
    assert fmha(said=[]) == OFF
    assert fmha(said=answers(context_fmha__128=WORKS)) == CONTEXT
    assert fmha(said=answers(context_fmha__128=WORKS, fp8_context_fmha__128=WORKS)) == FP8
    assert fmha(said=answers(context_fmha__128=WORKS, paged_context_fmha__128=WORKS)) == ALL
    assert fmha(said=answers(context_fmha__128=FAILS, paged_context_fmha__128=UNKNOWN)) == OFF
    kv = {"quantization.kv_cache_dtype": "auto"}
    proved = answers(paged_context_fmha__128=WORKS)
    assert fmha(said=proved, **kv) == OFF
    proved = answers(context_fmha__128=WORKS, fp8_context_fmha__128=WORKS, paged_context_fmha__kv_auto__128=WORKS)
    assert fmha(said=proved, **kv) == AUTO
    found = {flag.name: flag for flag in trtllm_flags.resolve(resolved(), QWEN3_8B, answers(context_fmha__128=WORKS))}
    assert found["context_fmha"].reason == "probe: built on RTX 5090; built, not run"
    assert found["context_fmha"].source == "FILE"


def test_an_answer_is_about_its_card_and_head_size_and_type() -> None:
    proved = answers(paged_context_fmha__128=WORKS)
    assert fmha(said=proved, config={**QWEN3_8B, "head_dim": 64}) == OFF
    assert fmha(said=proved, config={**QWEN3_8B, "dtype": "float16"}) == OFF
    assert fmha(said=[dataclasses.replace(a, sm=121) for a in proved]) == OFF
    assert fmha(said=proved, gpu="cpu") == OFF
    failed = answers(paged_context_fmha__128=FAILS)
    assert fmha(said=failed, gpu="sm120-fmha", config={**QWEN3_8B, "head_dim": 64}) == ALL


def test_what_a_recipe_asks_for_stays() -> None:
    proved = answers(context_fmha__128=WORKS, fp8_context_fmha__128=WORKS, paged_context_fmha__128=WORKS)
    assert fmha("context_fmha=disable", said=proved) == OFF
    assert fmha("use_paged_context_fmha=disable", said=proved) == FP8
    assert fmha("use_paged_context_fmha=disable", "use_fp8_context_fmha=disable", said=proved) == CONTEXT


def test_a_profile_loses_nothing_by_a_smaller_proof() -> None:
    assert fmha(said=answers(context_fmha__128=WORKS), gpu="sm120-fmha") == ALL


@pytest.mark.parametrize("gpu", ["sm120", "sm120-fmha"])
def test_a_flag_that_failed_on_the_card_is_refused_with_what_to_ask_for(gpu: str) -> None:
    failed = answers(paged_context_fmha__128=FAILS)
    on = [f"{name}=enable" for name in FMHA]
    with pytest.raises(UnsupportedError, match="probe paged_context_fmha-128") as caught:
        trtllm_flags.resolve(resolved(*on, gpu=gpu), QWEN3_8B, failed)
    assert "no kernel" in caught.value.why
    assert "--set engine.flags.use_paged_context_fmha=disable" in caught.value.hint
    assert fmha("use_paged_context_fmha=disable", said=failed, gpu="sm120-fmha") == FP8
    assert fmha(said=failed) == OFF
    with pytest.raises(UnsupportedError, match="gemm_plugin=nvfp4 failed"):
        trtllm_flags.resolve(resolved(gpu=gpu), QWEN3_8B, answers(gemm_plugin__nvfp4=FAILS))
    assert trtllm_flags.resolve(resolved("gemm_plugin=disable"), QWEN3_8B, answers(gemm_plugin__nvfp4=FAILS))


def test_a_failure_without_proof_refuses_nothing() -> None:
    assert fmha(said=answers(paged_context_fmha__128=UNKNOWN), gpu="sm120-fmha") == ALL


def test_a_proof_goes_before_the_table_of_head_sizes() -> None:
    gemma = {**QWEN3_8B, "head_dim": 256}
    with pytest.raises(UnsupportedError, match="heads of 256"):
        fmha(said=[], gpu="sm120-fmha", config=gemma)
    assert fmha(said=answers(paged_context_fmha__256=WORKS), gpu="sm120-fmha", config=gemma) == ALL
    with pytest.raises(UnsupportedError, match="heads of 256"):
        fmha(said=answers(paged_context_fmha__128=WORKS), gpu="sm120-fmha", config=gemma)


def test_only_llama_is_told_about_its_fusion() -> None:
    failed = answers(norm_quant_fusion=FAILS)
    with pytest.raises(UnsupportedError, match="norm_quant_fusion=enable failed"):
        trtllm_flags.resolve(resolved("norm_quant_fusion=enable"), LLAMA, failed)
    assert trtllm_flags.resolve(resolved(), LLAMA, failed)


def test_the_workspace_follows_the_proof() -> None:
    """6 bytes x batch x heads x prompt^2 are saved without unfused attention: the estimate uses the resolved flags."""
    proved = answers(paged_context_fmha__128=WORKS)
    config = {**QWEN3_8B, "vocab_size": 151936}
    before, after = (
        memory.workspace(config, memory.serving(resolved().recipe, trtllm_flags.resolve(resolved(), config, said)))
        for said in ([], proved)
    )
    assert before - after > 6 * 16 * 32 * 2048**2


def test_the_plan_says_what_was_proved_and_what_was_not() -> None:
    def said(found: list[Answer], **kwargs: Any) -> str:
        asked = resolved(**kwargs)
        flags = trtllm_flags.resolve(asked, QWEN3_8B, found)
        return "\n".join(f"{n.rule} {n.text}" for n in trtllm_flags.notes(asked, QWEN3_8B, flags, found))

    text = said(answers(paged_context_fmha__128=WORKS))
    assert "context_fmha=enable, use_paged_context_fmha=enable, use_fp8_context_fmha=enable" in text
    assert "its output was not checked" in text
    assert "--set engine.flags.context_fmha=disable" in text
    assert "no KV cache reuse" not in text
    assert "sm120-fmha avoids both" in said([])
    failed = said(answers(paged_context_fmha__128=FAILS))
    assert "probe paged_context_fmha-128 failed (RTX 5090): no kernel" in failed
    assert "sm120-fmha avoids both" not in failed
    assert "probe" not in notes_of(gpu="sm120")


def test_plan_and_build_go_by_the_kept_answers(card: Card) -> None:
    shapes = {"q_proj": (512, 64), "k_proj": (256, 64), "v_proj": (256, 64), "o_proj": (64, 512)}

    def of_heads_of_128(t: NewTensor) -> list[NewTensor]:
        shape = shapes.get(t.name.split(".")[-2], t.shape)
        return [NewTensor(t.name, t.dtype, shape, [source_models.zeros(t.dtype, shape)])]

    directory = source_models.copy(source_models.LLAMA, card.directory / "model", of_heads_of_128, head_dim=128)
    argv = ["plan", "--model", str(directory), "--gpu", "sm120", "--json"]
    before = json.loads(card.run(*argv).stdout)
    card.probe("--only", "paged_context_fmha-128")
    after = json.loads(card.run(*argv).stdout)
    flags = [{flag["name"]: flag for flag in plan["flags"]} for plan in (before, after)]
    assert [found["use_paged_context_fmha"]["value"] for found in flags] == ["disable", "enable"]
    assert flags[1]["use_paged_context_fmha"]["source"] == str(card.kept)
    assert "NVIDIA GeForce RTX 5090 with TensorRT-LLM 1.2.1, TensorRT 10.14.1.48" in flags[1]["context_fmha"]["reason"]


def test_a_build_with_a_flag_that_failed_ends_before_any_work(card: Card) -> None:
    card.probe("--only", "gemm_plugin-disable", told=[[{"gemm_plugin": "nvfp4"}, "no tactic"]])
    done = card.run("build", "--model", TINY, "--gpu", "sm120")
    assert done.returncode == 3, done.stderr
    assert "gemm_plugin=nvfp4 failed on this kind of card" in done.stderr
    assert "Have not found any valid GEMM config" in done.stderr
    assert "--set engine.flags.gemm_plugin=disable" in done.stderr
    assert not list(card.output.glob("snapshot/[0-9a-f]*"))


def test_a_trtllm_build_of_another_version_is_seen(card: Card) -> None:
    card.environment["STAND_IN"] = "other-version"
    done = card.run("probe")
    assert (done.returncode, "built by TensorRT-LLM 1.1.0" in done.stderr) == (6, True), done.stderr
    assert not card.kept.exists()


def test_answers_are_of_the_container_at_hand_or_of_the_versions_own(
    card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    card.probe("--only", "paged_context_fmha-128")
    names = [a.probe.name for a in probe_store.answers(resolved(), card.output)]
    assert names == ["gemm_plugin-nvfp4", "paged_context_fmha-128"]
    assert probe_store.answers(resolved(gpu="cpu"), card.output) == []
    assert probe_store.answers(resolved(gpu="sm121"), card.output) == []
    assert probe_store.answers(resolved(**{"engine.tensorrt_llm": "1.1.0"}), card.output) == []
    monkeypatch.setattr(probe_store, "library_versions", lambda *names: {"tensorrt": "10.13.3"})
    assert probe_store.answers(resolved(), card.output) == []
    [kept] = card.kept.parent.iterdir()
    kept.rename(kept.with_name(kept.name.replace("10.14.1.48", "10.13.3")))
    assert len(probe_store.answers(resolved(), card.output)) == 2
    monkeypatch.undo()
    assert probe_store.answers(resolved(), card.output) == []


@given(
    model=MODELS,
    gpu=st.sampled_from(["sm120", "sm120-fmha"]),
    kv=st.sampled_from(["fp8", "auto"]),
    free=st.fixed_dictionaries({}, optional=FREE),
    outcomes=st.fixed_dictionaries({}, optional={n: st.sampled_from([WORKS, FAILS, UNKNOWN]) for n in QUESTIONS}),
)
def test_with_answers_too_resolving_twice_equals_resolving_once(
    model: dict[str, Any], gpu: str, kv: str, free: dict[str, str], outcomes: dict[str, str]
) -> None:
    said = answers(**{name.replace("-", "__"): outcome for name, outcome in outcomes.items()})
    asked = {"quantization.kv_cache_dtype": kv}
    try:
        once = trtllm_flags.resolve(resolved(*(f"{n}={v}" for n, v in free.items()), gpu=gpu, **asked), model, said)
    except BuilderError as error:
        if not error.hint:
            raise
        return
    sizes = {f"engine.{flag.name}": int(flag.value) for flag in once if flag.name in trtllm_flags.SIZES}
    flags = [f"{flag.name}={flag.value or 'enable'}" for flag in once if flag.name not in trtllm_flags.SIZES]
    again = trtllm_flags.resolve(resolved(*flags, gpu=gpu, **asked, **sizes), model, said)
    assert {f.name: f.value for f in again} == {f.name: f.value for f in once}
    values = {flag.name: flag.value for flag in once}
    for answer in said:  # nothing that failed for all models is emitted
        if answer.outcome == FAILS and not answer.probe.about and model["dtype"] == "bfloat16":
            assert any(values[name] != value for name, value in answer.probe.flags.items())
