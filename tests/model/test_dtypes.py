"""The dtype that weights are quantized and served in, and the bytes that a plan counts for it, against real exports."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from builder import plan
from builder.checkpoint.layouts import read_json
from builder.core.output import Output
from builder.core.safetensors_io import Tensors
from builder.core.store import Store
from builder.llmapi import arguments as llmapi_arguments
from builder.model import dtypes
from builder.model import loading as model_loading
from builder.preflight import checks, memory
from builder.preflight.memory import Serving
from builder.quantize import worker
from builder.recipe import schema
from builder.trtllm import flags as trtllm_flags

DATA = Path(__file__).parents[1] / "data"
LLAMA = DATA / "arch-variants" / "llama"
ASKED = Serving(max_batch_size=8, max_input_len=64, max_seq_len=128, max_num_tokens=512)
FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16


def source(target: Path, stated: str | None, *stored: torch.dtype, **changes: Any) -> Path:
    """The tiny Llama with its tensors in these dtypes, in turn, and `stated` as the dtype in its config.json."""
    shutil.copytree(LLAMA, target)
    config = json.loads((target / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")} | changes
    config |= {"dtype": stated} if stated else {}
    (target / "config.json").write_text(json.dumps(config))
    tensors = Tensors(LLAMA)
    made = {}
    for number, (name, info) in enumerate(sorted(tensors.items())):
        value = torch.frombuffer(bytearray(tensors.read(name)), dtype=BFLOAT16).reshape(info.shape)
        made[name] = value.to(stored[number % len(stored)]).clone()
    if changes.get("tie_word_embeddings"):
        made["lm_head.weight"] = made["model.embed_tokens.weight"].clone()
    made["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)  # as old checkpoints have it
    save_file(made, target / "model.safetensors", metadata={"format": "pt"})
    return target


CASES: dict[str, tuple[str | None, tuple[torch.dtype, ...], str]] = {
    "float32": ("float32", (FLOAT32,), "bfloat16"),
    "float32 without a word": (None, (FLOAT32,), "bfloat16"),
    "float32 files, bfloat16 stated": ("bfloat16", (FLOAT32,), "bfloat16"),
    "bfloat16": ("bfloat16", (BFLOAT16,), "bfloat16"),
    "bfloat16 files, float32 stated": ("float32", (BFLOAT16,), "bfloat16"),
    "float16": ("float16", (FLOAT16,), "float16"),
    "float16 without a word": (None, (FLOAT16,), "float16"),
    "float32 files, float16 stated": ("float16", (FLOAT32,), "float16"),
    "mixed without a word": (None, (FLOAT16, FLOAT32, BFLOAT16), "bfloat16"),
    "mixed, float16 stated": ("float16", (BFLOAT16, FLOAT32), "float16"),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_plan_has_the_dtype_and_bytes_that_are_written(tmp_path: Path, case: str, tied: bool) -> None:
    stated, stored, written = CASES[case]
    model = source(tmp_path / "model", stated, *stored, tie_word_embeddings=tied)
    facts = checks.read_model(schema.Model(id=str(model)), Store(tmp_path / "store", Output("quiet")))
    assert dtypes.served(facts.config) == written
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "How a text becomes tokens, and tokens become numbers."}\n')
    job = {"model": str(model), "rows": str(rows), "seq_len": 64, "batch_size": 1, "kv_cache_dtype": "fp8"}
    kept = ["model.layers.0.self_attn.o_proj"]
    worker.run(job | {"layers": {"bf16": kept}, "trust_remote_code": False, "destination": str(tmp_path / "made")})

    unified = Tensors(tmp_path / "made" / "unified")
    types = {info.dtype for name, info in unified.items() if "scale" not in name and info.dtype != "U8"}
    assert types == {"BF16" if written == "bfloat16" else "F16"}
    assert read_json(tmp_path / "made" / "unified" / "config.json")["dtype"] == written
    assert read_json(tmp_path / "made" / "tensorrt_llm" / "config.json")["dtype"] == written
    facts = replace(facts, layers={"bf16": kept})
    assert memory.sizes(facts, ASKED).unified == sum(info.nbytes for info in unified.values())
    whole = Tensors(tmp_path / "made" / "tensorrt_llm", [tmp_path / "made" / "tensorrt_llm" / "rank0.safetensors"])
    assert memory.rank_bytes(facts, ASKED) == [sum(info.nbytes for info in whole.values())]


def test_float32_weights_need_no_more_memory_to_calibrate_than_bfloat16(tmp_path: Path) -> None:
    found = []
    for name, stored in (("wide", FLOAT32), ("narrow", BFLOAT16)):
        model = source(tmp_path / name, None, stored)
        facts = checks.read_model(schema.Model(id=str(model)), Store(tmp_path / "store", Output("quiet")))
        found.append(memory.calibration_memory(facts, 2048))
    assert found[0] == found[1]


def test_flags_and_arguments_follow_the_dtype(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", Output("quiet"), dry=True)
    for stated, stored, written in CASES.values():
        model = source(tmp_path / f"{stated} {stored} {written}".replace(" ", "-"), stated, *stored)
        for target in ("engine", "llmapi"):
            resolved = schema.resolve({"model.id": str(model), "gpu": "sm100", "target": target})
            settings = {one.name: one.value for one in plan.plan(resolved, store).settings}
            assert settings["dtype" if target == "llmapi" else "gpt_attention_plugin"] in (written, "auto")
        split = schema.resolve({"model.id": str(model), "gpu": "sm100", "engine.tp": 2})
        config = checks.read_model(split.recipe.model, store).config
        assert {f.name: f.value for f in trtllm_flags.resolve(split, config)}.get("nccl_plugin", "auto") in (
            written,
            "auto",
        )
        assert {a.name: a.value for a in llmapi_arguments.resolve(_llmapi(model), config)}["dtype"] == written


def _llmapi(model: Path) -> schema.Resolved:
    return schema.resolve({"model.id": str(model), "gpu": "sm100", "target": "llmapi"})


def test_sampling_values_that_transformers_rejects_are_ignored(tmp_path: Path) -> None:
    """Vicuna's and others' generation_config.json have a temperature without do_sample: 4.57 and 5 load that, and
    refuse to save it. Of the file only the end ids are taken; the checkpoint has the file as it came."""
    model = source(tmp_path / "model", "bfloat16", BFLOAT16)
    for values in ({"temperature": 0.7, "top_k": 5}, {"pad_token_id": -3}, {"max_new_tokens": 0}):
        content = json.dumps({"do_sample": False, "eos_token_id": [1, 2], **values})
        (model / "generation_config.json").write_text(content)
        shutil.rmtree(tmp_path / "made", ignore_errors=True)
        rows = tmp_path / "rows.jsonl"
        rows.write_text('{"text": "How a text becomes tokens."}\n')
        job = {"model": str(model), "rows": str(rows), "seq_len": 64, "batch_size": 1, "kv_cache_dtype": "fp8"}
        worker.run(job | {"trust_remote_code": False, "destination": str(tmp_path / "made")})
        assert (tmp_path / "made" / "unified" / "generation_config.json").read_text() == content
    loaded = model_loading.load({"model": str(model), "trust_remote_code": False}, dtype="auto")
    assert loaded.generation_config.eos_token_id == [1, 2]
