"""What is said about calibration that saw little, in a build and in its report."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from builder.calibration import coverage
from builder.calibration.coverage import EXPERT_TOKENS, experts_few, shortfalls, summary

ENOUGH = {"rows": 64, "tokens": 20_000, "cut": 0, "limit": 2048}


def facts(**coverage: int) -> dict[str, Any]:
    return {"coverage": {**ENOUGH, **coverage}}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"rows": 8}, "only 8 rows of text"),
        ({"tokens": 2047}, "only 2,047 tokens"),
        ({"cut": 33, "limit": 128}, r"33 of 64 rows were cut at 128 tokens"),
    ],
)
def test_each_shortfall_is_a_sentence(changed: dict[str, int], said: str) -> None:
    [sentence] = shortfalls(facts(**changed))
    assert said in sentence


@pytest.mark.parametrize(
    "enough",
    [
        {"coverage": ENOUGH},
        facts(rows=32, tokens=2048),
        facts(cut=64, limit=512),  # as long as anybody's rows
        facts(cut=32, limit=64),  # half of them whole
        {},  # a checkpoint of an older version, or one that was imported
        {"coverage": {}, "experts": {"mlp.experts": [0, 1]}},  # weights alone are quantized
        {"coverage": ENOUGH, "experts": {"mlp.experts": [EXPERT_TOKENS, 9999]}},
        {"coverage": ENOUGH, "experts": {"mlp.experts": [0, 9999]}, "experts_see_all": True},
    ],
)
def test_nothing_is_said_of_what_is_enough(enough: dict[str, Any]) -> None:
    assert shortfalls(enough) == []


def test_layers_with_the_most_rare_experts_are_named() -> None:
    few = EXPERT_TOKENS - 1
    experts = {f"layers.{n}.mlp.experts": [few] * n + [1000] * (8 - n) for n in range(6)}
    [sentence] = experts_few(experts)
    assert sentence == (
        "5 of 8 experts of layers.5.mlp.experts, 4 of 8 experts of layers.4.mlp.experts, "
        f"3 of 8 experts of layers.3.mlp.experts and those of 2 more layers saw fewer than {EXPERT_TOKENS} tokens"
    )


def test_the_summary_names_the_least_used_expert() -> None:
    assert summary({}) == ""
    assert summary(facts()) == "64 rows, 20,000 tokens"
    experts = {"a.experts": [5, 300], "b.experts": [1200, 400]}
    assert summary({**facts(), "experts": experts}) == (
        "64 rows, 20,000 tokens; 2 experts in 2 layers, the least used saw 5 tokens"
    )


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 9)), min_size=1, max_size=8))
def test_rows_are_counted_by_batches(shapes: list[tuple[int, int]]) -> None:
    limit = 6
    batches = [torch.zeros(rows, min(tokens, limit), dtype=torch.int64) for rows, tokens in shapes]
    found = coverage.of_batches(batches, limit)
    assert found["rows"] == sum(rows for rows, _ in shapes)
    assert found["tokens"] == sum(rows * min(tokens, limit) for rows, tokens in shapes)
    assert found["cut"] == sum(rows for rows, tokens in shapes if tokens >= limit)


def test_only_what_is_read_from_rows_counts_as_calibrated() -> None:
    from builder.formats import kv_cache
    from builder.formats.assignment import ModelFormats
    from builder.formats.registry import BF16, FP8, NVFP4

    assert ModelFormats(NVFP4).calibrated
    assert ModelFormats(BF16, {FP8: ("a",)}).calibrated
    assert ModelFormats(BF16, cache=kv_cache.FP8).calibrated
    assert not ModelFormats(BF16, {FP8: ()}).calibrated
