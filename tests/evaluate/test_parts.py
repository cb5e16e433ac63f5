"""`builder sensitivity --parts`: what a checkpoint loses by weights, by inputs of layers and by the KV cache.

The recipe is data-free, so that nothing is calibrated; the worker runs in this process.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from source_models import MOE

from builder import pipeline
from builder.core.errors import BuilderError, UnsupportedError, UsageError
from builder.core.output import Output
from builder.core.store import Store
from builder.evaluate import memory
from builder.evaluate import stage as evaluate_stage
from builder.evaluate.parts import advice, stage, worker
from builder.evaluate.parts.figures import PARTS, Figure, Losses
from builder.evaluate.runners import worker as runners
from builder.preflight.memory import Machine
from builder.recipe import schema
from builder.recipe.schema import Recipe, Resolved

DATA = Path(__file__).parents[1] / "data"
TINY = DATA / "tiny-qwen3"
PROSE = str(DATA / "eval" / "prose.jsonl")
TEXTS, TOKENS = 4, 48


def resolve(**more: Any) -> Resolved:
    flags = {
        "model.id": str(TINY),
        "gpu": "cpu",
        "calibration.samples": 0,
        "quality.check": False,
        "sensitivity.data": PROSE,
        "sensitivity.texts": TEXTS,
        "sensitivity.max_tokens": TOKENS,
        "evaluation.data": [PROSE],
        "evaluation.texts": TEXTS,
        "evaluation.max_tokens": TOKENS,
        **{key.replace("__", "."): value for key, value in more.items()},
    }
    return schema.resolve(flags)


JOBS: list[dict[str, Any]] = []


def run_here(job: dict[str, Any], store: Store) -> dict[str, Any]:
    JOBS.append(job)
    found: dict[str, Any] = json.loads(json.dumps(worker.run(json.loads(json.dumps(job)))))
    return found


@pytest.fixture(scope="module", autouse=True)
def here() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "_run", run_here)
        patch.setattr(evaluate_stage, "_run", lambda job, store: runners.run(json.loads(json.dumps(job))))
        yield


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("parts") / "artifacts", Output("quiet"))


@pytest.fixture(scope="module")
def found(store: Store) -> Losses:
    return pipeline.measure_parts(resolve(), store)


def test_everything_is_what_the_runner_checkpoint_measures(found: Losses, store: Store) -> None:
    """The same tokens and the same arithmetic, in another process that loads the checkpoint as a whole."""
    theirs = pipeline.measure(resolve(), store).measured["checkpoint"]["prose"]["kl"]
    assert found.whole.kl == pytest.approx(theirs.value, rel=1e-4)
    assert (found.whole.low, found.whole.high) == pytest.approx((theirs.low, theirs.high), rel=1e-4)


def test_each_part_loses_less_than_all(found: Losses) -> None:
    assert list(found.alone) == list(found.without) == list(PARTS)
    for part in PARTS:
        assert 0 < found.alone[part].kl < found.whole.kl
        assert found.without[part].kl < 1.1 * found.whole.kl
    assert found.alone["cache"].kl < found.alone["weights"].kl
    assert found.alone["cache"].kl < found.alone["inputs"].kl
    assert found.without["inputs"].kl < found.without["cache"].kl


def test_every_layer_has_all_parts(found: Losses) -> None:
    assert list(found.layers) == list(range(6))
    assert all(list(parts) == list(PARTS) for parts in found.layers.values())
    assert found.modules[3] == "model.layers.3"
    for part in PARTS:
        assert max(parts[part] for parts in found.layers.values()) < found.alone[part].kl * 1.2


def test_a_second_run_measures_nothing(found: Losses, store: Store) -> None:
    before = len(JOBS)
    assert pipeline.measure_parts(resolve(), Store(store.root, Output("quiet"))) == found
    assert len(JOBS) == before


def test_an_interrupted_run_resumes(found: Losses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """BF16 is measured again, because its scores are too large to keep; nothing else is."""
    job = {**JOBS[0], "results": str(tmp_path / "results.jsonl"), "scratch": str(tmp_path)}
    scored: list[str] = []
    score = worker.Meter._score

    def counted(meter: worker.Meter, label: str, directory: Path, **how: Any) -> None:
        if len(scored) == 4:
            scored.append(label)
            raise KeyboardInterrupt
        scored.append(label)
        score(meter, label, directory, **how)

    monkeypatch.setattr(worker.Meter, "_score", counted)
    with pytest.raises(KeyboardInterrupt):
        worker.run(job)
    summary = worker.run(job)
    first, again = scored[:5], scored[5:]
    assert first[0] == again[0] == "BF16"
    assert again[1] == first[4]  # the one that was interrupted
    assert not set(again[1:]) & set(first[1:4])
    assert len(first[1:4]) + len(again[1:]) == len(summary["results"])
    assert summary["results"]["everything"]["kl"] == found.whole.kl


def test_the_model_is_as_before_after_each_measurement(found: Losses) -> None:
    model = worker.Model(JOBS[0])
    before = {name: value.clone() for name, value in model.runner.model.state_dict().items()}
    ids = torch.arange(40).reshape(1, -1)
    with torch.no_grad():
        logits = model.runner.model(ids).logits
        for what in worker._wanted(model).values():
            with model.quantized(what):
                changed = model.runner.model(ids).logits
            assert not torch.equal(changed, logits)
        assert torch.equal(model.runner.model(ids).logits, logits)
    assert all(torch.equal(value, before[name]) for name, value in model.runner.model.state_dict().items())


def test_weights_alone_lose_nothing_by_inputs(store: Store) -> None:
    """W4A16: layers are not measured where the model loses nothing. Without a quantized cache that part is absent."""
    only = {"quantization__format": "w4a16_nvfp4", "quantization__kv_cache_dtype": "auto"}
    served = {"target": "llmapi", "gpu": "sm120", "engine__tensorrt_llm": "1.3.0rc26"}
    found = pipeline.measure_parts(resolve(**only, **served), store)
    assert list(found.alone) == ["weights", "inputs"]
    assert found.alone["inputs"].kl == found.without["weights"].kl == 0
    assert {parts["inputs"] for parts in found.layers.values()} == {0.0}
    assert found.alone["weights"].kl == found.whole.kl


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"quantization__format": "int4_awq", "calibration__samples": 4}, "can't be divided into weights and inputs"),
        ({"quantization__format": "bf16", "quantization__kv_cache_dtype": "auto"}, "Nothing is quantized"),
        ({"sensitivity__data": None}, "names no texts"),
        ({"quantization__memory": "low"}, "--memory low excludes that"),
    ],
)
def test_what_can_not_be_divided_is_refused_before_the_work(more: dict[str, Any], words: str, store: Store) -> None:
    with pytest.raises(BuilderError, match=words):
        pipeline.measure_parts(resolve(**more), store)


def test_a_mixture_whose_experts_are_joined_is_refused_before_the_work(store: Store) -> None:
    if int(version("transformers").partition(".")[0]) < stage.JOINING:
        pytest.skip("this transformers has a module for each expert")
    before = len(list(store.root.glob("checkpoint/*")))
    with pytest.raises(UnsupportedError, match=r"experts\.0\.\w+ is not a linear layer of its own"):
        pipeline.measure_parts(resolve(model__id=str(MOE)), store)
    assert len(list(store.root.glob("checkpoint/*"))) == before


def test_an_imported_checkpoint_needs_its_original(tmp_path: Path, store: Store) -> None:
    """Also where the runners alone would not."""
    checkpoint = pipeline.build(resolve(), store, until="checkpoint").checkpoint
    assert checkpoint is not None
    copy = shutil.copytree(checkpoint.unified, tmp_path / "Tiny-NVFP4")
    more = {"model__id": str(copy), "calibration__samples": 512, "evaluation__runners": ["checkpoint"]}
    with pytest.raises(UsageError, match="no original to compare it with"):
        pipeline.measure_parts(resolve(**more), store)
    found = pipeline.measure_parts(resolve(**more, model__original=str(TINY)), store)
    assert found.whole.kl > 0.01


def test_a_model_that_does_not_fit_is_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "machine", lambda root: Machine(memory=10**8, available=10**8, disk=10**12))
    with pytest.raises(UnsupportedError, match="it does not fit"):
        pipeline.measure_parts(resolve(), store)


def losses(whole: float, without: dict[str, float], layers: dict[int, float]) -> Losses:
    def figure(kl: float) -> Figure:
        return Figure(kl, kl, kl)

    return Losses(
        figure(whole),
        {part: figure(whole - kl) for part, kl in without.items()},
        {part: figure(kl) for part, kl in without.items()},
        {layer: {"weights": kl} for layer, kl in layers.items()},
        {layer: f"model.layers.{layer}" for layer in layers},
        1000,
    )


EVEN = dict.fromkeys(range(8), 0.01)


def recipe(**more: Any) -> Recipe:
    return resolve(calibration__samples=512, **more).recipe


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.001, 0.1), min_size=3, max_size=3, unique=True))
def test_the_part_that_leaves_least_is_named_first(left: list[float]) -> None:
    without = dict(zip(PARTS, left, strict=True))
    first = advice.advise(losses(0.2, without, EVEN), recipe())[0]
    worst = min(without, key=lambda part: without[part])
    assert first.startswith(f"Most is lost by {PARTS[worst]}:")
    assert f"{without[worst]:.3g}, not 0.2" in first


def test_advice_names_what_helps_and_only_that() -> None:
    inputs = advice.advise(losses(0.1, {"weights": 0.09, "inputs": 0.02, "cache": 0.099}, EVEN), recipe())
    assert len(inputs) == 3
    assert inputs[-1].startswith("builder recommend --max-kl 0.05 ")
    assert "--format w4a16_nvfp4" in inputs[1]
    assert "--target llmapi" in inputs[1]
    cache = advice.advise(losses(0.1, {"weights": 0.09, "inputs": 0.09, "cache": 0.01}, EVEN), recipe())
    assert "--kv-cache-dtype auto" in cache[1]
    few = advice.advise(losses(0.1, {"weights": 0.01, "inputs": 0.09, "cache": 0.09}, {**EVEN, 5: 0.2}), recipe())
    assert few[-2] == "Layer 5: 74 % of the sum over 8 layers. Try --keep-fp8 'model.layers.5.*'."
    fp8 = advice.advise(losses(0.1, {"weights": 0.01, "inputs": 0.09, "cache": 0.09}, {**EVEN, 5: 0.2}),
                        recipe(quantization__format="fp8"))  # fmt: skip
    assert "--keep-bf16 'model.layers.5.*'" in fp8[-2]
    assert advice.advise(losses(1e-4, {}, EVEN), recipe()) == ["The KL is 0.0001: there is little to win."]


def test_flags_in_the_advice_exist(found: Losses) -> None:
    from builder.recipe.flags import LIST_FLAGS, RECIPE_FLAGS

    known = {option for option, *_ in (*RECIPE_FLAGS, *LIST_FLAGS)}
    for part in PARTS:
        without = {**dict.fromkeys(PARTS, 0.09), part: 0.01}
        for name in ("nvfp4", "fp8"):
            for sentence in advice.advise(losses(0.1, without, {**EVEN, 1: 1.0}), recipe(quantization__format=name)):
                assert {word.strip("().,") for word in sentence.split() if word.startswith(("--", "(--"))} <= known


def test_one_part_alone_has_advice_too(found: Losses) -> None:
    only = replace(found, alone={"weights": found.whole}, without={}, layers={})
    assert advice.advise(only, recipe())[0] == "All is lost by weights."


def test_advice_names_no_flag_that_would_be_refused() -> None:
    found = losses(0.1, {"weights": 0.01, "inputs": 0.02, "cache": 0.03}, {**EVEN, 5: 0.2})
    rows = " ".join(advice.advise(found, recipe()))
    assert "--algorithm mse, hessian or gptq rounds" in rows
    data_free = " ".join(advice.advise(found, resolve().recipe))
    assert "--algorithm mse rounds" in data_free
    imported = advice.advise(found, recipe(model__original="some/original"))
    assert [sentence for sentence in imported if "--" in sentence] == [
        "A quantized model is served as it is. To change it, quantize its original: --model some/original"
    ]
    assert any(sentence == "Layer 5: 74 % of the sum over 8 layers." for sentence in imported)
