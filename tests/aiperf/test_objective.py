"""Objectives as people type them: metrics, comparison, times with units."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.aiperf import objective
from builder.aiperf.objective import METRICS, Objective
from builder.core.errors import UsageError


def test_limits_are_read_in_any_unit_and_order() -> None:
    found = objective.parse(" itl < 50ms, TTFT<=0.5s ,latency<=10 s")
    assert found.limits == (("ttft", 500.0), ("itl", 50.0), ("latency", 10_000.0))
    assert found.goodput == "time_to_first_token:500 inter_token_latency:50 request_latency:10000"
    assert str(found) == "ttft<=500ms,itl<=50ms,latency<=10000ms"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "'' is not a limit"),
        ("ttft<=500", "'ttft<=500' is not a limit"),
        ("ttft>=500ms", "is not a limit"),
        ("ttft<=500ms,", "'' is not a limit"),
        ("ttft<=-1ms", "is not a limit"),
        ("ttft<=500min", "is not a limit"),
        ("tpot<=50ms", "'tpot' is not a metric"),
        ("ttft<=1s,ttft<=2s", "two limits of ttft"),
        ("itl<=0ms", "must be above 0"),
        (f"itl<={'9' * 400}s", "must be above 0"),
    ],
)
def test_what_is_no_objective_is_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        objective.parse(text)
    assert said in caught.value.what
    assert objective.parse(caught.value.hint.split('"')[1]), "the hint is an objective"


limits = st.dictionaries(st.sampled_from(list(METRICS)), st.integers(1, 10**9), min_size=1)


@given(limits)
def test_an_objective_is_read_back_from_its_text_and_from_json(chosen: dict[str, int]) -> None:
    made = Objective(tuple((name, float(chosen[name])) for name in METRICS if name in chosen))
    typed = ",".join(f"{name}<={limit}ms" for name, limit in reversed(chosen.items()))
    assert objective.parse(typed) == made
    assert objective.from_list([list(limit) for limit in made.limits]) == made
