"""A model that is measured layer by layer has the resident model's scores, bit for bit on a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from builder.core.errors import UnsupportedError
from builder.evaluate.datasets import Sequences
from builder.evaluate.runners import local, scoring, worker
from builder.evaluate.runners.layered import Layered
from builder.formats import kv_cache, registry
from builder.formats.assignment import ModelFormats
from builder.formats.base import NumberFormat
from builder.model import streamed
from builder.quantize import exclude, writer
from builder.quantize.ranges import Ranges
from builder.quantize.source_weights import SourceModel
from tests.support import families
from tests.support.peak_memory import growth

LENGTHS = (60, 41, 200, 33, 17, 120, 150, 41)
# Dense, joined experts, stacked experts and eager attention, two kinds of masks, latent attention.
KINDS = ("qwen3", "qwen3_moe", "gpt_oss", "gemma3_text", "deepseek_v3")


def texts() -> Sequences:
    random = np.random.default_rng(0)
    return Sequences([random.integers(3, 4000, length).astype(np.int32) for length in LENGTHS], len(LENGTHS), 0, 0)


def job(directory: Path, memory: str, **more: Any) -> dict[str, Any]:
    common = {"model": str(directory), "trust_remote_code": False, "dtype": "auto", "batch_tokens": 256}
    return {**common, "memory": memory, **more}


def scored(runner: scoring.Runner, directory: Path, **options: Any) -> dict[str, Any]:
    """All that is measured of a runner: columns, counts, and the check of the language."""
    directory.mkdir()
    counts = worker.score_set(runner, texts(), directory, top=32, **options)
    columns = {file.stem: np.load(file) for file in directory.iterdir()}
    return {**columns, **counts, **worker.check_language(runner, texts().ids, seed=0)}


def check_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    assert one.keys() == other.keys()
    assert {"nll", "top_ids", "rest_logp", "checked_nll"} <= one.keys()
    assert [name for name in one if not np.array_equal(one[name], other[name])] == []


@pytest.mark.parametrize("family", KINDS)
def test_layer_by_layer_has_the_scores_of_the_resident_model(family: str, tmp_path: Path) -> None:
    try:
        families.write(family, tmp_path / "model")
    except ValueError as error:
        pytest.skip(f"not in this transformers: {error}")
    found = {}
    for memory in ("whole", "low"):
        with torch.inference_mode(), local.bf16(job(tmp_path / "model", memory)) as runner:
            assert isinstance(runner, Layered) == (memory == "low")
            found[memory] = scored(runner, tmp_path / memory)
    check_same(found["whole"], found["low"])


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("qwen3")
    families.write("qwen3", directory)
    return directory


def layered(directory: Path, tokens: int = 256, **options: Any) -> Layered:
    return Layered(streamed.open_model(job(directory, "low"), dtype=torch.float32), tokens, **options)


@torch.inference_mode()
def test_texts_whose_states_do_not_fit_together_take_several_passes(
    qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    layer = streamed.StreamedModel.layer

    def noted(self: Any, index: int) -> Any:
        read.append(index)
        return layer(self, index)

    monkeypatch.setattr(streamed.StreamedModel, "layer", noted)
    whole = scored(layered(qwen3), tmp_path / "one")
    assert read == [0, 1] * 2  # for the set, and for the texts of the check and the same shuffled
    read.clear()
    check_same(whole, scored(layered(qwen3, states=100_000), tmp_path / "several"))
    assert len(read) > 6
    assert read[:2] == [0, 1]


@torch.inference_mode()
def test_what_is_measured_together_reads_the_weights_once(qwen3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, told = layered(qwen3), []
    means = [worker.MeanNll(texts().ids), worker.MeanNll(texts().ids[:3])]
    scoring.measure(runner, [one.work for one in means], lambda *step: told.append(step))
    assert [one.value() for one in means] == [worker.mean_nll(runner, one.work.ids) for one in means]
    total = sum(one.work.tokens for one in means)
    assert {step[1] for step in told} == {total}
    assert [step[0] for step in told] == sorted(step[0] for step in told)
    where = list(dict.fromkeys(step[2].split(",")[0] for step in told))
    assert where == ["embedding", "layer 1 of 2", "layer 2 of 2", "logits"]


@torch.inference_mode()
def test_a_long_text_s_logits_are_never_in_memory_together(qwen3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, whole, pieces = texts().ids[2], layered(qwen3), layered(qwen3, tokens=64)
    [expected] = whole.logits([ids])
    seen: list[tuple[int, int]] = []
    work = scoring.Work([ids], lambda _, start, logits: seen.append((start, len(logits))))
    pieces.together([work])
    assert seen == [(0, 64), (64, 64), (128, 64), (192, 8)]
    [found] = pieces.logits([ids])
    assert torch.allclose(found, expected, atol=1e-5)  # another shape, so another order of sums
    assert worker.mean_nll(pieces, [ids]) == pytest.approx(worker.mean_nll(whole, [ids]), abs=1e-6)


@torch.inference_mode()
def test_batches_that_do_not_fit_are_halved(qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advance, limit = streamed.StreamedModel.advance, 200

    def tight(self: Any, index: int, state: Any, hidden: torch.Tensor) -> torch.Tensor:
        if index == 1 and hidden.shape[0] * hidden.shape[1] > limit:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return advance(self, index, state, hidden)

    expected = scored(layered(qwen3, tokens=120), tmp_path / "small")
    monkeypatch.setattr(streamed.StreamedModel, "advance", tight)
    runner = layered(qwen3)
    check_same(expected, scored(runner, tmp_path / "halved"))
    assert runner.batch_tokens == 120
    limit = 199
    with pytest.raises(UnsupportedError, match="A text of 200 tokens") as caught:
        worker.mean_nll(layered(qwen3), texts().ids)
    assert "evaluation.max_tokens=100" in caught.value.hint


def quantize(family: str, directory: Path, whole: NumberFormat) -> dict[str, Any]:
    """A small model of a family and its checkpoint, with an FP8 KV cache, experts too. Returns its job."""
    try:
        families.write(family, directory / "model")
    except ValueError as error:
        pytest.skip(f"not in this transformers: {error}")
    source = SourceModel.open(directory / "model")
    layers = exclude.linears({name: (info.dtype, info.shape) for name, info in source.tensors.items()})
    attention = {name.rpartition(".")[0]: (3.0, 4.0) for name in layers if name.endswith(".k_proj")}
    ranges = Ranges({name: 2.5 + index / 8 for index, name in enumerate(layers)}, attention)
    formats = ModelFormats(whole, {}, kv_cache.FP8)
    writer.write(source, formats, ranges, directory / "unified")
    return job(directory / "model", "whole", unified=str(directory / "unified"), kv_cache_dtype="fp8")


@pytest.mark.parametrize(
    ("family", "whole"),
    [
        ("qwen3", registry.NVFP4),
        ("gemma3_text", registry.FP8),
        ("qwen3_moe", registry.NVFP4),
        ("nemotron_h", registry.FP8),
        ("deepseek_v3", registry.NVFP4),
    ],
    ids=["qwen3", "gemma3_text", "qwen3_moe", "nemotron_h", "deepseek_v3"],
)
def test_a_checkpoint_that_is_dequantized_layer_by_layer_has_the_scores_of_the_resident_one(
    family: str, whole: NumberFormat, tmp_path: Path
) -> None:
    made, found = quantize(family, tmp_path, whole), {}
    with torch.inference_mode(), local.bf16(made) as runner:
        original = scored(runner, tmp_path / "bf16")
    for memory in ("whole", "low"):
        with torch.inference_mode(), local.checkpoint({**made, "memory": memory}) as runner:
            assert isinstance(runner, Layered) == (memory == "low")
            found[memory] = scored(runner, tmp_path / memory, reference=tmp_path / "bf16")
    check_same(found["whole"], found["low"])
    assert found["low"]["kl"].mean() > 1e-6
    assert not np.array_equal(original["nll"], found["low"]["nll"])


DEEP = """
import numpy as np, torch
from builder.evaluate.runners import local, worker
job = {"model": sys.argv[1], "trust_remote_code": False, "dtype": "auto", "batch_tokens": 256, "memory": sys.argv[2]}
with torch.inference_mode(), local.bf16({**job, "memory": "low"}) as runner:
    before = peak()
with torch.inference_mode(), local.bf16(job) as runner:
    worker.mean_nll(runner, [np.arange(3, 67, dtype=np.int32)] * 2)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 4096, "vocab_size": 512}
    grown, layer = {}, 4 * (3 * 512 * 4096 + 512 * 16 * 12)
    for depth in (4, 24):
        monkeypatch.setattr(families, "MODELS", {"qwen3": {**sizes, "num_hidden_layers": depth}})
        families.write("qwen3", tmp_path / str(depth))
        for memory in ("low", "whole"):
            grown[memory, depth] = growth(DEEP, tmp_path / str(depth), memory)
    assert grown["low", 24] - grown["low", 4] < layer
    assert grown["whole", 24] - grown["whole", 4] > 15 * layer
