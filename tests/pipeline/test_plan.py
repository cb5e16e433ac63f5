"""Sizes and fit: known answers, the real split's bytes, and what holds for every size."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import exports
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builder import pipeline
from builder.checkpoint import layouts, sharding
from builder.checkpoint.sharding import Parallel
from builder.cli import main
from builder.core.errors import UnsupportedError
from builder.core.output import Output
from builder.core.safetensors_io import Tensors
from builder.core.store import Store, WouldRun
from builder.formats import kv_cache
from builder.machine.gpus import Seen
from builder.preflight import checks, suggestions, ways
from builder.preflight import memory as preflight_memory
from builder.preflight.memory import Machine, Serving
from builder.preflight.model_facts import ModelFacts
from builder.preflight.prepare import check_fit, prepare
from builder.recipe import schema
from builder.trtllm import engine

GB = 10**9


def dense(layers: int, hidden: int, heads: int, kv: int, dim: int, inner: int, words: int) -> ModelFacts:
    """A Qwen3-like model of these sizes, by its shapes alone."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (words, hidden),
        "lm_head.weight": (words, hidden),
        "model.norm.weight": (hidden,),
    }
    for i in range(layers):
        p = f"model.layers.{i}"
        shapes |= {
            f"{p}.self_attn.q_proj.weight": (heads * dim, hidden),
            f"{p}.self_attn.k_proj.weight": (kv * dim, hidden),
            f"{p}.self_attn.v_proj.weight": (kv * dim, hidden),
            f"{p}.self_attn.o_proj.weight": (hidden, heads * dim),
            f"{p}.self_attn.q_norm.weight": (dim,),
            f"{p}.self_attn.k_norm.weight": (dim,),
            f"{p}.mlp.gate_proj.weight": (inner, hidden),
            f"{p}.mlp.up_proj.weight": (inner, hidden),
            f"{p}.mlp.down_proj.weight": (hidden, inner),
            f"{p}.input_layernorm.weight": (hidden,),
            f"{p}.post_attention_layernorm.weight": (hidden,),
        }
    config: dict[str, Any] = {
        "architectures": ["Qwen3ForCausalLM"],
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": dim,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "vocab_size": words,
        "max_position_embeddings": 40960,
    }
    return ModelFacts(config, {name: ("BF16", shape) for name, shape in shapes.items()})


QWEN3_8B = dense(36, 4096, 32, 8, 128, 12288, 151936)
SMALL = dense(4, 1024, 8, 4, 128, 2048, 32000)
ASKED = Serving(max_batch_size=64, max_input_len=2048, max_seq_len=4096, max_num_tokens=8192)


def test_sizes_of_qwen3_8b_are_the_known_ones() -> None:
    """Qwen3-8B in NVFP4: 6.40 GB of checkpoint, 72 KiB of FP8 KV cache a token (facts/trtllm/notes.md, section 4)."""
    sizes = preflight_memory.sizes(QWEN3_8B, ASKED)
    assert round(sizes.checkpoint / GB, 2) == 6.40
    assert round(sizes.unified / GB, 2) == 6.40
    assert round(sizes.download / GB, 2) == 16.38
    assert sizes.kv_bytes_per_token == 72 * 1024
    assert preflight_memory.kv_bytes_per_token(QWEN3_8B.config, replace(ASKED, cache=kv_cache.AUTO)) == 144 * 1024
    assert sizes.artifacts == sizes.unified + 2 * sizes.checkpoint


def test_without_fmha_the_workspace_is_quadratic_for_every_sequence_of_the_batch() -> None:
    """6 bytes x 64 x 32 heads x 2048^2 = 51.5 GB: more than an RTX 5090 has, less than an RTX PRO 6000."""
    unfused = replace(ASKED, context_fmha=False, paged_fmha=False)
    quadratic = 6 * 64 * 32 * 2048**2
    assert 0 < preflight_memory.attention_workspace(QWEN3_8B.config, unfused, 8192) - quadratic < 2 * GB
    assert not preflight_memory.memory(QWEN3_8B, unfused, "RTX 5090", 34_200_000_000).fits
    assert preflight_memory.memory(QWEN3_8B, unfused, "RTX PRO 6000", 102_600_000_000).fits
    assert preflight_memory.memory(QWEN3_8B, ASKED, "RTX 5090", 34_200_000_000).fits


def test_the_attention_workspace_is_the_sum_of_upstreams_buffers() -> None:
    """getWorkspaceSizeForContext, buffer by buffer, for Qwen3-8B: 64 prompts of 2048 tokens, 8192 tokens a step."""
    batch, length, tokens, heads, q, kv = 64, 2048, 8192, 32, 32 * 128, 8 * 128
    unfused = {
        "cuBLAS": 33_554_432,
        "attention_mask": 2 * tokens * length,
        "q_buf_2": 2 * batch * length * q,
        "k_buf_2 and v_buf_2": 2 * 2 * batch * length * kv,
        "qk_buf": 2 * batch * heads * length**2,
        "qk_buf_float": 4 * batch * heads * length**2,
        "qkv_buf_2": 2 * tokens * q,
        "padding_offset and encoder_padding_offset": 2 * 4 * tokens,
        "tokens_info": 8 * tokens,
    }
    asked = replace(ASKED, context_fmha=False, paged_fmha=False)
    assert preflight_memory.attention_workspace(QWEN3_8B.config, asked, tokens) == sum(unfused.values())
    assert preflight_memory.attention_workspace(QWEN3_8B.config, ASKED, tokens) == 33_554_432 + tokens * q + 8 * tokens


def test_what_is_left_goes_to_the_kv_cache_in_whole_blocks() -> None:
    found = preflight_memory.memory(QWEN3_8B, ASKED, "card", 34_200_000_000)
    left = found.memory - found.weights - found.workspace
    assert found.kv_tokens % 32 == 0
    assert 0 <= left * 9 // 10 - found.kv_cache < 32 * 72 * 1024
    assert found.sequences == found.kv_tokens // 4096
    assert found.largest_batch <= found.sequences


@pytest.mark.parametrize("name", exports.MODELS)
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 1), (2, 2), (1, 2)])
def test_ranks_are_to_the_byte_what_splitting_writes(tmp_path: Path, name: str, tp: int, pp: int) -> None:
    source = exports.MODELS[name]
    exports.export(exports.quantized(source), tmp_path / "unified")
    config = layouts.read_json(source / "config.json")
    layouts.write_tensorrt_llm(tmp_path / "unified", config, tmp_path / "whole")
    sharding.split(tmp_path / "whole", tmp_path / "split", Parallel(tp, pp))
    files = [tmp_path / "split" / f"rank{n}.safetensors" for n in range(tp * pp)]
    written = [sum(info.nbytes for info in Tensors(file.parent, [file]).values()) for file in files]
    model = ModelFacts(config, {n: (i.dtype, i.shape) for n, i in Tensors(source).items()})
    assert preflight_memory.rank_bytes(model, replace(ASKED, tp=tp, pp=pp)) == written
    unified = sum(info.nbytes for info in Tensors(tmp_path / "unified").values())
    assert preflight_memory.sizes(model, ASKED).unified == unified


def test_the_llm_api_holds_tied_embeddings_once() -> None:
    """The layout on disk has both, as an engine does; so have the ranks where the model's ends are on two GPUs."""
    tied = replace(QWEN3_8B, config={**QWEN3_8B.config, "tie_word_embeddings": True})
    tied = replace(tied, tensors={name: info for name, info in tied.tensors.items() if name != "lm_head.weight"})
    llm, embedding = replace(ASKED, target="llmapi"), 2 * 151936 * 4096
    [engine_rank], [llm_rank] = preflight_memory.rank_bytes(tied, ASKED), preflight_memory.rank_bytes(tied, llm)
    assert engine_rank - llm_rank == embedding
    assert preflight_memory.weights(tied, llm) == llm_rank
    stored_twice = replace(tied, tensors={**QWEN3_8B.tensors})
    assert preflight_memory.rank_bytes(stored_twice, llm) == [llm_rank]
    assert sum(preflight_memory.rank_bytes(tied, replace(llm, pp=2))) - llm_rank == embedding
    assert preflight_memory.sizes(tied, llm).checkpoint == preflight_memory.sizes(tied, ASKED).checkpoint == engine_rank


servings = st.builds(
    Serving,
    max_batch_size=st.integers(1, 512),
    max_input_len=st.integers(1, 8192),
    max_seq_len=st.integers(2, 16384),
    max_num_tokens=st.integers(1, 32768),
    cache=st.sampled_from(list(kv_cache.FORMATS.values())),
    context_fmha=st.booleans(),
    paged_fmha=st.booleans(),
    tp=st.sampled_from([1, 2, 4]),
    pp=st.sampled_from([1, 2]),
    target=st.sampled_from(["engine", "reference"]),
)


@settings(max_examples=150)
@given(servings, st.integers(0, 64), st.integers(0, 4096), st.integers(0, 4096), st.integers(0, 8192))
def test_more_never_needs_less(asked: Serving, batch: int, prompt: int, length: int, tokens: int) -> None:
    more = replace(
        asked,
        max_batch_size=asked.max_batch_size + batch,
        max_input_len=asked.max_input_len + prompt,
        max_seq_len=asked.max_seq_len + length,
        max_num_tokens=asked.max_num_tokens + tokens,
    )
    assert preflight_memory.needed(SMALL, more) >= preflight_memory.needed(SMALL, asked)
    assert preflight_memory.needed(SMALL, replace(asked, cache=kv_cache.AUTO)) >= preflight_memory.needed(
        SMALL, replace(asked, cache=kv_cache.FP8)
    )
    assert (
        preflight_memory.memory(SMALL, more, "card", GB).sequences
        <= preflight_memory.memory(SMALL, asked, "card", GB).sequences
    )


@settings(max_examples=50)
@given(servings, st.integers(1, 10**11))
def test_fitting_is_one_whole_sequence(asked: Serving, available: int) -> None:
    found = preflight_memory.memory(SMALL, asked, "card", available)
    assert found.fits == (found.sequences >= 1)
    assert found.fits == (available >= found.needed)


@settings(max_examples=150)
@given(servings, st.integers(10**7, 10**10))
def test_the_suggested_change_fits(asked: Serving, available: int) -> None:
    asked = replace(asked, max_seq_len=max(asked.max_seq_len, asked.max_input_len + 1))
    if preflight_memory.needed(SMALL, asked) <= available:
        return
    change = suggestions.smallest(SMALL, asked, available)
    if change is None:
        return
    assert change.flags
    assert preflight_memory.needed(SMALL, change.serving) <= available
    assert preflight_memory.memory(SMALL, change.serving, "card", available).fits
    assert change.serving.max_input_len < change.serving.max_seq_len


@pytest.mark.parametrize(
    ("asked", "gigabytes", "names"),
    [
        (replace(ASKED, context_fmha=False, paged_fmha=False), 34.2, ["--max-batch-size"]),
        (replace(ASKED, max_num_tokens=65536), 10.0, ["--max-num-tokens"]),
        (replace(ASKED, max_seq_len=40960, max_batch_size=1), 9.0, ["--max-seq-len"]),
        (replace(ASKED, max_batch_size=1), 4.0, ["--tp"]),
    ],
)
def test_changes_are_tried_in_their_order(asked: Serving, gigabytes: float, names: list[str]) -> None:
    change = suggestions.smallest(QWEN3_8B, asked, int(gigabytes * GB))
    assert change is not None
    assert [flag.split()[0] for flag in change.flags] == names


@pytest.mark.parametrize("card", ["L4", "RTX 4090"])
def test_a_suggested_format_fits_with_the_kv_cache_that_its_recipe_gets(card: str) -> None:
    """INT4 weights get a KV cache in the model's own type by default, twice the bytes of FP8's."""
    model = dense(64, 5120, 64, 8, 128, 25600, 151936)
    recipe = schema.resolve({"model.id": "m", "gpu": card, "target": "llmapi", "quantization.format": "fp8"})
    part = recipe.recipe.quantization
    serving = replace(ASKED, cache=part.cache_format, target="llmapi", max_seq_len=32768)
    found = suggestions.judge(
        replace(model, number_format=part.number_format), serving, recipe.gpu, Machine(GB, GB, GB)
    )
    assert found.change is not None
    words = [word.removeprefix("--") for flag in found.change.flags for word in flag.split()]
    flags = dict(zip(words[::2], words[1::2], strict=True))
    keys = {"format": "quantization.format", "kv-cache-dtype": "quantization.kv_cache_dtype"}
    typed = {keys[name]: value for name, value in flags.items() if name in keys}
    again = schema.resolve({"model.id": "m", "gpu": card, "target": "llmapi", **typed}).recipe.quantization
    assert again.number_format.bits < 8
    change = replace(found.change.serving, cache=again.cache_format)
    memory = preflight_memory.memory(
        replace(model, number_format=again.number_format), change, card, found.cards[0].memory
    )
    assert memory.fits


def test_where_the_heads_do_not_divide_the_layers_do() -> None:
    seven = dense(32, 896 * 4, 28, 7, 128, 11008, 32000)
    needed = preflight_memory.needed(seven, replace(ASKED, max_batch_size=1, max_num_tokens=2048))
    change = suggestions.smallest(seven, replace(ASKED, max_batch_size=1), needed * 2 // 3)
    assert change is not None
    assert [flag for flag in change.flags if "-batch-" not in flag and "-tokens " not in flag] == ["--pp 2"]


def test_where_nothing_helps_the_refusal_says_so() -> None:
    found = preflight_memory.memory(QWEN3_8B, ASKED, "a watch", 10**6)
    error, change = suggestions.refusal(QWEN3_8B, ASKED, found)
    assert (change, error.exit_code, error.hint) == (None, 3, "Use a smaller model.")
    assert "weights 6.40 GB" in error.why


def test_the_verdict_is_for_the_card_that_is_here_or_the_largest() -> None:
    resolved, host = schema.resolve({"model.id": "m", "gpu": "sm120"}), Machine(GB, GB, GB)
    assert preflight_memory.cards(ASKED, resolved.gpu, host)[1] == "RTX PRO 6000 Blackwell"
    assert preflight_memory.cards(ASKED, resolved.gpu, host, ["NVIDIA GeForce RTX 5090"])[1] == "RTX 5090"
    assert preflight_memory.cards(ASKED, resolved.gpu, host, ["NVIDIA GeForce RTX 5060 Ti"])[1] == "RTX 5060 Ti 8 GB"
    cpu = schema.resolve({"model.id": "m", "gpu": "cpu"})
    assert preflight_memory.cards(replace(ASKED, target="reference"), cpu.gpu, host) == (
        [("this machine", GB)],
        "this machine",
    )


def test_a_profile_shows_one_card_of_each_size_and_a_named_card_alone() -> None:
    host = Machine(GB, GB, GB)
    sm120 = schema.resolve({"model.id": "m", "gpu": "sm120"})
    found, _ = preflight_memory.cards(ASKED, sm120.gpu, host)
    sizes = [memory for _, memory in found]
    assert sizes == sorted({int(card.memory_gb * 10**9) for card in sm120.gpu.cards if card.memory_gb})
    assert ("RTX 5080", 16 * GB) in found
    here, verdict = preflight_memory.cards(ASKED, sm120.gpu, host, ["NVIDIA GeForce RTX 5070 Ti"])
    assert verdict == "RTX 5070 Ti"
    assert ("RTX 5070 Ti", 16 * GB) in here
    assert len(here) == len(found)
    named = schema.resolve({"model.id": "m", "gpu": "rtx5070ti"})
    alone = ([("RTX 5070 Ti", 16 * GB)], "RTX 5070 Ti")
    assert preflight_memory.cards(ASKED, named.gpu, host, ["NVIDIA GeForce RTX 5090"]) == alone


def test_too_small_a_disk_is_refused_with_what_is_missing() -> None:
    sizes = preflight_memory.sizes(QWEN3_8B, ASKED)
    assert suggestions.disk_refusal(sizes.disk, Machine(sizes.artifacts, 0, 0), sizes.artifacts) is None
    refused = suggestions.disk_refusal(sizes.disk, Machine(10**10, 0, 0), sizes.artifacts)
    assert refused
    assert refused.exit_code == 3
    assert "need 19.19 GB" in refused.what


def sparse(model: ModelFacts, directory: Path) -> Path:
    """A model directory whose weights are a hole: reading them all would take hours."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({**model.config, "model_type": "qwen3"}))
    for file in Path("tests/data/tiny-qwen3").glob("*token*"):
        shutil.copy(file, directory)
    header, at = {}, 0
    for name, (dtype, shape) in model.tensors.items():
        end = at + 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    with open(directory / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    return directory


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "builder", *argv], capture_output=True, text=True)


@pytest.fixture(scope="module")
def huge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """140 billion parameters: nothing to run on one card, or on this machine."""
    return sparse(dense(160, 8192, 64, 8, 128, 28672, 152064), tmp_path_factory.mktemp("sparse") / "huge")


def test_a_plan_that_does_not_fit_is_shown_and_ends_with_3_and_its_change_fits(huge: Path, tmp_path: Path) -> None:
    argv = ["plan", "--model", str(huge), "--gpu", "sm120-fmha", "--output", str(tmp_path), "--set"]
    argv += ["engine.max_batch_size=256", "--max-seq-len", "40000", "--max-num-tokens", "65536"]
    refused = run(*argv, "--json")
    plan = json.loads(refused.stdout)
    assert refused.returncode == 3, refused.stderr
    assert "It does not fit on RTX PRO 6000 Blackwell" in refused.stderr
    assert plan["verdict"]["fits"] is False
    assert {"RTX 5090", "RTX PRO 6000 Blackwell"} <= {m["card"] for m in plan["memory"]}
    named = json.loads(run(*argv, "--json", "--gpu", "rtx-5090").stdout)
    assert [m["card"] for m in named["memory"]] == ["RTX 5090"]
    assert (named["gpu"], named["verdict"]["card"]) == ("sm120", "RTX 5090")
    change = [word for flag in plan["verdict"]["change"] for word in flag.split()]
    assert run(*argv, *change, "--json").returncode == 0
    assert "lacks" in run(*argv).stdout


def test_a_build_that_does_not_fit_reads_no_weight(huge: Path, tmp_path: Path) -> None:
    argv = ["--model", str(huge), "--gpu", "cpu", "--output", str(tmp_path)]
    done = run("build", *argv)
    assert (done.returncode, "It does not fit on this machine" in done.stderr) == (3, True), done.stderr
    assert not list((tmp_path / "snapshot").glob("[0-9a-f]*"))


def test_a_build_for_the_engine_target_refuses_too(huge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is a trtllm-build, before it or anything else runs."""
    (tmp_path / "trtllm-build").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "trtllm-build").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(engine, "visible", lambda: [Seen("NVIDIA GeForce RTX 5090", 12, 0, "590.44.01")])
    resolved = schema.resolve({"model.id": str(huge), "gpu": "sm120"})
    with pytest.raises(UnsupportedError, match="It does not fit on RTX PRO 6000 Blackwell"):
        pipeline.build(resolved, Store(tmp_path / "out", Output("quiet")))
    assert not list((tmp_path / "out" / "snapshot").glob("[0-9a-f]*"))


def test_plan_and_build_say_that_the_sliding_window_is_not_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree("tests/data/arch-variants/mistral", model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "sliding_window": 128}))
    argv = ["--model", str(model), "--gpu", "cpu", "--output", str(tmp_path / "out"), "--max-seq-len", "256"]
    argv += ["--max-input-len", "128"]
    assert "The model attends to its last 128 tokens" in run("plan", *argv).stdout
    assert run("fetch", *argv).returncode == 0
    asked = {"model.id": str(model), "gpu": "cpu", "engine.max_seq_len": 256, "engine.max_input_len": 128}
    with pytest.raises(WouldRun, match="calibration"):
        pipeline.build(schema.resolve(asked), Store(tmp_path / "out", Output("human"), dry=True))
    assert "warning     The model attends to its last 128 tokens" in capsys.readouterr().err


# ---- this machine's own disk and memory

LLAMA = "tests/data/arch-variants/llama"
SHORT = {"engine.max_seq_len": 256, "engine.max_input_len": 128, "calibration.samples": 2, "calibration.seq_len": 32}


def asked(model: str = LLAMA, gpu: str = "cpu", **values: object) -> schema.Resolved:
    return schema.resolve({"model.id": model, "gpu": gpu, **SHORT, **values})


def this_machine(monkeypatch: pytest.MonkeyPatch, *, disk: int = 10**15, memory: int = 10**15, free: int = 0) -> None:
    monkeypatch.setattr(preflight_memory, "machine", lambda output: Machine(disk, memory, free or memory))


def test_too_little_disk_is_refused_as_long_as_something_is_to_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "out", Output("quiet"))
    this_machine(monkeypatch, disk=1000)
    with pytest.raises(UnsupportedError, match=r"has 1\.00 kB free"):
        pipeline.build(asked(), store)
    assert not list(tmp_path.glob("out/snapshot/[0-9a-f]*"))
    pipeline.build(asked(), store, until="snapshot")  # nothing is written there: the model is a directory
    with pytest.raises(UnsupportedError, match=r"has 1\.00 kB free"):
        pipeline.build(asked(), store)
    this_machine(monkeypatch)
    pipeline.build(asked(), store, until="engine")
    this_machine(monkeypatch, disk=1000)
    pipeline.build(asked(), store, until="engine")
    assert pipeline.build(asked(), store, until="repository").repository
    with pytest.raises(UnsupportedError, match=r"has 1\.00 kB free"):
        pipeline.build(asked(), Store(store.root, Output("quiet"), force=["checkpoint"]), until="repository")


def test_a_plan_that_this_machine_has_no_room_for_ends_with_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where it is the machine that builds; another one's disk is not known here."""
    argv = ["plan", "--model", LLAMA, "--output", str(tmp_path), "--max-seq-len", "256", "--max-input-len", "128"]
    this_machine(monkeypatch, disk=1000)
    assert main.main([*argv, "--gpu", "cpu"]) == 3
    said = capsys.readouterr()
    assert "has 1.00 kB free" in said.err
    assert "will run" in said.out
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main.main([*argv, "--gpu", "sm120"]) == 0
    this_machine(monkeypatch)
    assert main.main([*argv, "--gpu", "cpu"]) == 0


def test_calibrating_in_more_memory_than_there_is_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    long = asked(**{"calibration.seq_len": 10**9, "calibration.batch_size": 4})
    store = Store(tmp_path / "out", Output("human"))
    model = checks.read_model(long.recipe.model, store)
    needed = preflight_memory.calibration_memory(model, 4 * 10**9)
    needed += ways.LIBRARIES["whole"]
    this_machine(monkeypatch, memory=needed - 1)
    monkeypatch.setattr(preflight_memory, "streamed_memory", preflight_memory.calibration_memory)  # nor layer by layer
    monkeypatch.setitem(ways.LIBRARIES, "low", ways.LIBRARIES["whole"])
    with pytest.raises(UnsupportedError, match="Calibrating takes about") as caught:
        pipeline.build(long, store)
    assert "Fits here: --data-free" in caught.value.hint
    assert "--set calibration.batch_size=3" in caught.value.hint
    assert not list(tmp_path.glob("out/snapshot/[0-9a-f]*"))
    # less free than that, but enough in all, is a warning; and what is made already needs none
    this_machine(monkeypatch, memory=needed, free=needed - 1)
    prepared = prepare(long, store)
    check_fit(prepared, store)
    assert "warning     quantizing takes about" in capsys.readouterr().err
    found, host = prepared.sizes, Machine(10**15, needed - 1, needed - 1)
    assert checks.host_refusal(prepared.way(host), found, host, ["engine", "repository"]) is None
    assert checks.host_refusal(prepared.way(host), found, host, ["checkpoint"])
    monkeypatch.setattr(ways.modelopt, "calibrating", lambda: ["NVIDIA GeForce RTX 5090"])
    prepared = prepare(long, store)  # which looks at the machine once
    assert checks.host_refusal(prepared.way(host), found, host, ["checkpoint"]) is None


@settings(max_examples=50)
@given(st.integers(1, 64), st.integers(1, 8192), st.integers(10**6, 10**10), st.booleans())
def test_what_is_said_to_fit_while_calibrating_fits(batch: int, length: int, memory: int, layers: bool) -> None:
    rows = schema.Calibration.model_validate({"batch_size": batch, "seq_len": length})
    refused = suggestions.calibration_refusal(SMALL, rows, memory, layers=layers)
    needed = preflight_memory.streamed_memory if layers else preflight_memory.calibration_memory
    assert (refused is None) == (needed(SMALL, batch * length) <= memory)
    if refused is None:
        return
    assert refused.exit_code == 3
    said = dict(re.findall(r"(batch_size=|--calib-seq-len )(\d+)", refused.hint))
    if said:
        tokens = int(said.get("batch_size=", batch)) * int(said.get("--calib-seq-len ", length))
        assert needed(SMALL, tokens) <= memory
    else:
        assert needed(SMALL, min(length, suggestions.SHORTEST)) > memory


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
    ],
)
@pytest.mark.parametrize("more", [["--gpu", "cpu"], ["--gpu", "sm120", "--runner", "bf16", "--runner", "reference"]])
def test_what_the_reference_executor_cannot_run_is_refused_in_the_plan(
    tmp_path: Path, change: dict[str, object], named: str, more: list[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree("tests/data/arch-variants/mistral", model)
    config = json.loads((model / "config.json").read_text())
    config.pop("rope_parameters", None)
    (model / "config.json").write_text(json.dumps({**config, **change}))
    refused = run("plan", "--model", str(model), "--output", str(tmp_path / "out"), *more)
    assert refused.returncode == 3
    assert f"The reference executor can't run this model: {named}" in refused.stderr
    assert run("plan", "--model", str(model), "--gpu", "sm120", "--output", str(tmp_path / "out")).returncode == 0
