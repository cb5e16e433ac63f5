"""The checkpoint on disk, read by us, against ModelOpt's simulation of the same calibration."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from builder.core.errors import IntegrityError
from builder.core.safetensors_io import NewTensor, Tensors, write
from builder.evaluate.runners import local
from builder.quantize import worker as quantizer

DATA = Path(__file__).parents[1] / "data"
IDS = [np.random.default_rng(0).integers(0, 4000, n).astype(np.int32) for n in (60, 41)]


@pytest.fixture
def job(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """What a runner is told of a model quantized just now: `llama`, or `llama int8_sq` for another format."""
    name, _, number_format = request.param.partition(" ")
    model = DATA / "arch-variants" / name
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join((DATA / "eval" / "prose.jsonl").read_text().splitlines(keepends=True)[:4]))
    calibration = {"rows": str(rows), "seq_len": 64, "batch_size": 1, "format": number_format or "nvfp4"}
    common = {"model": str(model), "trust_remote_code": False}
    made = {"kv_cache_dtype": "fp8", "destination": str(tmp_path / "made")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantizer.run({**common, **calibration, **made})
    layouts = {"unified": str(tmp_path / "made" / "unified"), "calibration": calibration}
    return {**common, **layouts, "dtype": "float32", "batch_tokens": 4096, "kv_cache_dtype": "fp8"}


def logits(name: str, job: dict[str, Any]) -> torch.Tensor:
    with torch.inference_mode(), getattr(local, name)(job) as runner:
        return torch.cat([row.clone() for row in runner.logits(IDS)])


@pytest.mark.parametrize("job", ["qwen2", "phi3", "gemma3_text", "qwen3_moe", "qwen3_moe fp8"], indirect=True)
def test_the_checkpoint_on_disk_has_the_simulations_logits(job: dict[str, Any]) -> None:
    """Equal to the bit where it was measured: the same roundings of the same numbers, in float32. Another order of
    sums may make a rounding fall otherwise; leaving the cache or the inputs unquantized does far more."""
    simulated, ours = logits("simulated", job), logits("checkpoint", job)
    loss = (logits("bf16", job) - simulated).pow(2).mean().sqrt()
    assert (ours - simulated).pow(2).mean().sqrt() < 0.1 * loss
    without = logits("checkpoint", {**job, "kv_cache_dtype": "auto"})
    assert (without - simulated).pow(2).mean().sqrt() > 0.1 * loss


@pytest.mark.parametrize("job", ["llama int8_sq", "llama int4_awq_64", "llama nvfp4_awq"], indirect=True)
def test_scales_of_inputs_are_applied(job: dict[str, Any]) -> None:
    """Some codes of ModelOpt's simulation are the neighbours of its exporter's (tests/formats/test_awq_exports.py)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ModelOpt's, of lm_head and of what it can't fold
        simulated = logits("simulated", job)
    loss = (logits("bf16", job) - simulated).pow(2).mean().sqrt()
    assert (logits("checkpoint", job) - simulated).pow(2).mean().sqrt() < 0.2 * loss


@pytest.mark.parametrize("job", ["qwen3_moe"], indirect=True)
def test_a_mixture_s_checkpoint_has_the_same_logits_layer_by_layer(job: dict[str, Any]) -> None:
    assert torch.equal(logits("checkpoint", job), logits("checkpoint", {**job, "memory": "low"}))


def test_a_layer_with_one_of_its_two_cache_scales_is_refused(tmp_path: Path) -> None:
    name, one = "model.layers.1.self_attn", np.ones(1, "<f4").tobytes()
    write(tmp_path / "made", [NewTensor(f"{name}.v_proj.v_scale", "F32", (1,), [one])])
    stored = Tensors(tmp_path, [tmp_path / "made"])
    with pytest.raises(IntegrityError, match=f"only v_scale of k_scale and v_scale of {name}"):
        local.cache_scales(stored, {"kv_cache_quant_algo": "FP8"}, {"kv_cache_dtype": "fp8"})
