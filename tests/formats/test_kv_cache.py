"""Formats of the KV cache: equal to ModelOpt's exports in both layouts and at tp 1 and 2, run by the executor, and
planned to the byte."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import exports
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from builder.checkpoint import layouts, sharding, validate
from builder.checkpoint.sharding import Parallel
from builder.core.safetensors_io import Tensors
from builder.evaluate.runners import local
from builder.formats import kv_cache
from builder.formats.assignment import ModelFormats
from builder.formats.kv_cache import KvCacheFormat
from builder.formats.registry import NVFP4
from builder.preflight import memory
from builder.preflight.memory import Serving
from builder.preflight.model_facts import ModelFacts
from builder.quantize import worker
from builder.reference.model import ReferenceModel

CASES = [*(("qwen3", one) for one in kv_cache.FORMATS.values()), ("llama", kv_cache.NVFP4)]
ASKED = Serving(max_batch_size=2, max_input_len=64, max_seq_len=128, max_num_tokens=128)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, KvCacheFormat], Path]:
    """Checkpoints in both layouts as the stage writes them, beside ModelOpt's exports of the same calibrated model."""
    rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows.write_text("".join((exports.DATA / "eval" / "prose.jsonl").read_text().splitlines(keepends=True)[:2]))
    done: dict[tuple[str, str], Path] = {}

    def make(name: str, cache: KvCacheFormat) -> Path:
        if (name, cache.name) not in done:
            source, at = exports.MODELS[name], tmp_path_factory.mktemp(f"{name}-{cache.name}")
            job = {"model": str(source), "rows": str(rows), "seq_len": 64, "batch_size": 1, "trust_remote_code": False}
            model, batches = worker.load(job)
            formats = ModelFormats(NVFP4, {}, cache)
            worker.calibrate(model, batches, formats)
            for tp in (1, 2):
                exports.export(copy.deepcopy(model), at / f"theirs{tp}", at / f"modelopt{tp}", tp=tp)
            done[name, cache.name] = exports.written(model, source, formats, at)
        return done[name, cache.name]

    return make


@pytest.mark.parametrize(("name", "cache"), CASES, ids=lambda one: getattr(one, "name", one))
def test_both_layouts_are_modelopts_own(
    made: Callable[[str, KvCacheFormat], Path], tmp_path: Path, name: str, cache: KvCacheFormat
) -> None:
    at = made(name, cache)
    assert not exports.differ(exports.held(at / "unified"), exports.held(at / "theirs1"))
    assert exports.documents(at / "unified") == exports.documents(at / "theirs1")
    for tp in (1, 2):
        sharding.split(at / "tensorrt_llm", tmp_path / str(tp), Parallel(tp))
        for rank in range(tp):
            file = f"rank{rank}.safetensors"
            ours, theirs = (Tensors(x, [x / file]) for x in (tmp_path / str(tp), at / f"modelopt{tp}"))
            assert {n: ours.read(n) for n in ours} == {n: theirs.read(n) for n in theirs}
        said = [layouts.read_json(where / "config.json") for where in (tmp_path / str(tp), at / f"modelopt{tp}")]
        assert said[0]["quantization"]["kv_cache_quant_algo"] == cache.quant_algo
        assert said[0]["quantization"] == said[1]["quantization"]
    assert not validate.inspect(at).errors


@pytest.mark.parametrize(("name", "cache"), CASES, ids=lambda one: getattr(one, "name", one))
def test_the_plan_knows_its_bytes(
    made: Callable[[str, KvCacheFormat], Path], tmp_path: Path, name: str, cache: KvCacheFormat
) -> None:
    at, source = made(name, cache), exports.MODELS[name]
    model = ModelFacts(
        layouts.read_json(source / "config.json"), {n: (i.dtype, i.shape) for n, i in Tensors(source).items()}
    )
    for tp in (1, 2):
        found = memory.sizes(model, replace(ASKED, cache=cache, tp=tp))
        sharding.split(at / "tensorrt_llm", tmp_path / str(tp), Parallel(tp))
        assert found.unified == sum(info.nbytes for info in Tensors(at / "unified").values())
        assert found.checkpoint == sum(info.nbytes for info in Tensors(at / "tensorrt_llm").values())
        ranks = [Tensors(tmp_path / str(tp), [tmp_path / str(tp) / f"rank{rank}.safetensors"]) for rank in range(tp)]
        assert list(found.ranks) == [sum(info.nbytes for info in rank.values()) for rank in ranks]
    per_value = found.kv_bytes_per_token / memory.kv_bytes_per_token(
        model.config, replace(ASKED, cache=kv_cache.AUTO, tp=2)
    )
    assert per_value == cache.bits / 16


def test_a_smaller_cache_changes_more_and_the_executor_agrees_with_the_checkpoint_runner(
    made: Callable[[str, KvCacheFormat], Path],
) -> None:
    """Logits of the executor and of transformers over the same files. FP8 changes them less than NVFP4."""
    ids = torch.arange(5, 60)
    exact: Any = None
    errors = []
    for cache in (kv_cache.AUTO, kv_cache.FP8, kv_cache.NVFP4):
        at = made("qwen3", cache)
        executor = ReferenceModel.load(at / "tensorrt_llm")
        found = executor.forward(ids, executor.new_cache())
        job = {"unified": str(at / "unified"), "model": str(exports.MODELS["qwen3"]), "dtype": "float32"}
        job |= {"trust_remote_code": False, "batch_tokens": 512, "kv_cache_dtype": cache.name, "engine_cache": True}
        with torch.no_grad(), local.checkpoint(job) as runner:
            [other] = runner.logits([ids.numpy()])
        assert (found - other).norm() / other.norm() < 0.02
        exact = found if exact is None else exact
        errors.append(float((found - exact).norm() / exact.norm()))
    assert errors[0] == 0 < errors[1] < errors[2] < 0.5


@given(st.floats(2**-20, 2**20), st.floats(2**-20, 2**20))
def test_an_engine_has_one_fp8_scale_of_at_least_1(keys: float, values: float) -> None:
    pair = torch.tensor(keys), torch.tensor(values)
    assert torch.stack(kv_cache.FP8.engine_scales(*pair)).tolist() == [max(1.0, *map(float, pair))] * 2
    assert kv_cache.NVFP4.engine_scales(*pair) == pair


@given(st.lists(st.floats(-100, 100, width=32), min_size=16, max_size=16), st.sampled_from([4.0, 100.0, 1000.0]))
def test_nvfp4_rounds_each_block_under_its_own_scale(values: list[float], largest: float) -> None:
    """An eighth of the block's largest value is the most that E2M1 and an E4M3 scale are off by."""
    x, scale = torch.tensor([values]), torch.tensor(largest / (6 * 448))
    rounded = kv_cache.NVFP4.round(x, scale)
    top = x.abs().max()
    if 2**-6 * 6 * scale < top <= largest:  # the block's scale is a normal E4M3 number
        assert (rounded - x).abs().max() <= top * 0.25
    assert torch.equal(kv_cache.AUTO.round(x, scale), x)
