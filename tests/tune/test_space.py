"""What can be searched, and the recipe that a search writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from builder.aiperf import measured
from builder.aiperf.measured import Measurement
from builder.aiperf.workload import Load, Workload
from builder.core.errors import UsageError
from builder.core.output import Output
from builder.core.store import Store
from builder.recipe import schema
from builder.recipe.schema import Resolved
from builder.tune import recipe_file, search
from builder.tune.search import Request, Trial
from builder.tune.space import KEYS, OF_LLM, Parameter, flags, settings_of, space

EXPORT = json.loads(Path("tests/data/aiperf/profile_export_aiperf.json").read_text())
LLMAPI = {"gpu": "sm120", "target": "llmapi"}
WORKLOAD = Workload((Load(concurrency=2),), input_tokens=24, output_tokens=8)


def resolved(**flags: object) -> Resolved:
    return schema.resolve({"model.id": "tests/data/tiny-qwen3", "gpu": "cpu", **flags})


def trial(settings: dict[str, int | float], goodput: float | None) -> Trial:
    if goodput is None:
        return Trial(settings, error="it did not start")
    export = {**EXPORT, "goodput": {"avg": goodput}}
    asked = {**WORKLOAD.as_dict(), "objective": [["ttft", 500.0]]}
    return Trial(settings, Measurement(asked, (measured.point(Load(concurrency=2), export),), "0.13.0"))


def test_values_are_read_in_order_and_once() -> None:
    found = space(resolved().recipe, ["max_batch_size=8,2,8", "queue_delay=0,500"])
    assert found == (Parameter("max_batch_size", (8, 2)), Parameter("queue_delay", (0, 500)))
    assert [one.key for one in found] == ["engine.max_batch_size", "repository.max_queue_delay_microseconds"]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["max_batch=8"], "--search can't vary 'max_batch'."),
        (["queue_delay"], "--search queue_delay: give the values"),
        (["queue_delay="], "--search queue_delay=: give the values"),
        (["queue_delay=1.5"], "give the values"),
        (["queue_delay=1,,2"], "give the values"),
        (["queue_delay=1", "queue_delay=2"], "--search names queue_delay twice."),
        (["kv_fraction=0.8,0.9"], "kv_fraction has no effect on the reference executor."),
    ],
)
def test_what_can_t_be_searched_is_refused(asked: list[str], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        space(resolved().recipe, asked)
    assert said in caught.value.what


def test_every_name_is_a_key_of_the_recipe() -> None:
    recipe = resolved().recipe
    every = [Parameter(name, (1,)) for name in KEYS if name not in OF_LLM]
    assert {*settings_of(recipe, every), *OF_LLM} == set(KEYS)
    assert resolved(**flags(settings_of(recipe, every))).recipe == recipe
    asked = resolved(**LLMAPI, **{"llmapi.args": {"stream_interval": 3}})
    arguments = [Parameter(name, (1,)) for name in OF_LLM]
    assert settings_of(asked.recipe, arguments) == {"batch_wait_ms": 0, "stream_interval": 3}
    changed = asked.changed(flags({"batch_wait_ms": 2.5, "stream_interval": 4})).recipe.llmapi.args
    assert changed == {"batch_wait_timeout_ms": 2.5, "stream_interval": 4}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["queue_delay=0,1"], "queue_delay has no effect with the llmapi target"),
        (["bls_instances=1"], "bls_instances has no effect with the llmapi target"),
    ],
)
def test_what_an_llm_class_does_not_have_is_refused(asked: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        space(resolved(**LLMAPI).recipe, asked)
    assert "stream_interval" in caught.value.hint
    with pytest.raises(UsageError, match="stream_interval is an argument of TensorRT-LLM's LLM class"):
        space(resolved().recipe, ["stream_interval=1,2"])


def test_the_kv_cache_is_searched_on_a_gpu_only() -> None:
    on_gpu = schema.resolve({"model.id": "tests/data/tiny-qwen3", "gpu": "sm120"}).recipe
    assert [one.name for one in space(on_gpu, [])] == ["max_batch_size", "queue_delay", "kv_fraction"]
    assert [one.name for one in space(resolved().recipe, [])] == ["max_batch_size", "queue_delay"]
    llm = [one.name for one in space(resolved(**LLMAPI).recipe, [])]
    assert llm == ["max_batch_size", "max_num_tokens", "kv_fraction"]


def test_the_best_trial_has_the_highest_goodput_and_failed_ones_never_win() -> None:
    one, two, failed = trial({"x": 1}, 1.5), trial({"x": 2}, 2.0), trial({"x": 3}, None)
    assert search.best([one, failed, two]) is two
    assert search.best([trial({"x": 1}, 0.0), failed]).error == ""
    assert search.best([two, trial({"x": 4}, 2.0)]) is two, "of equal ones the first"


def test_the_file_that_is_written_is_the_recipe_with_the_best_settings(tmp_path: Path) -> None:
    user = resolved(**{"calibration.samples": 7})
    best, first = trial({"max_batch_size": 2, "queue_delay": 500}, 2.0), trial({"max_batch_size": 8}, 1.0)
    recipe_file.write(best, first, user, tmp_path / "tuned.yaml")
    text = (tmp_path / "tuned.yaml").read_text()
    assert (
        "# By `builder tune` with AIPerf 0.13.0: 2.000 requests/s within ttft<=500ms;\n# the recipe before: 1.0" in text
    )
    assert yaml.safe_load(text) == recipe_file.values(best, user)
    again = schema.resolve({}, recipe_file=tmp_path / "tuned.yaml").recipe
    assert again == user.changed(flags(best.settings)).recipe
    assert (again.engine.max_batch_size, again.repository.max_queue_delay_microseconds) == (2, 500)


@pytest.mark.parametrize(
    ("changes", "trials", "said"),
    [
        ({}, 0, "--trials must be at least 1 (got 0)."),
        ({"engine.max_input_len": 23}, 3, "Each request has 24 input"),
        ({"repository.decoupled": False}, 3, "does not stream"),
    ],
)
def test_a_search_that_can_t_run_is_refused_before_anything_is_installed(
    changes: dict[str, object], trials: int, said: str, tmp_path: Path
) -> None:
    asked = resolved(**changes)
    request = Request((Parameter("queue_delay", (0, 1)),), WORKLOAD, trials, lambda one, _: one)
    with pytest.raises(UsageError) as caught:
        search.check(asked, request, Store(tmp_path, Output("quiet")))
    assert said in caught.value.what


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({}, Parameter("max_batch_size", (1, 0))),
        ({}, Parameter("kv_fraction", (0.9, float("nan"), 0.8))),
        (LLMAPI, Parameter("stream_interval", (1, 0))),
        (LLMAPI, Parameter("batch_wait_ms", (0, -1.5))),
    ],
)
def test_a_value_that_no_recipe_has_is_refused_before_anything_is_built(
    changes: dict[str, object], wrong: Parameter, tmp_path: Path
) -> None:
    request = Request((wrong,), WORKLOAD, 3, lambda one, _: one)
    with pytest.raises(UsageError, match=wrong.key):
        search.check(resolved(**changes), request, Store(tmp_path, Output("quiet")))
