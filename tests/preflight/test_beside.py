"""Models beside each other on one card: what is accepted fits, whichever of them is loaded first."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.core.errors import UnsupportedError
from builder.preflight import beside
from builder.preflight.beside import Share

GB = 10**9
SHARES = st.lists(
    st.tuples(
        st.integers(0, 60 * GB), st.integers(0, 20 * GB), st.floats(0.01, 0.99),
        st.sampled_from([0.0, 0.05, 0.5]), st.integers(0, GB),
    ).map(lambda part: part if part[3] else (*part[:4], 0)),
    min_size=1, max_size=4,
)  # fmt: skip


def caches(memory: int, shares: list[Share]) -> list[int]:
    """The KV caches if the models are loaded one after the other, as TensorRT-LLM allocates them: adapters first."""
    taken, found = 0, []
    for share in shares:
        assert share.fraction is not None
        taken += share.weights
        room = int(share.adapter_fraction * (memory - taken))
        assert room >= share.adapter - 1  # rounded
        taken += room
        found.append(int(share.fraction * (memory - taken)))
        taken += found[-1]
        assert taken <= memory
    return found


@given(st.integers(1 * GB, 200 * GB), SHARES)
def test_what_is_accepted_fits_in_any_order(memory: int, parts: list[tuple[int, int, float, float, int]]) -> None:
    shares = [Share(str(i), *part) for i, part in enumerate(parts)]
    if not beside.problem(memory, shares):
        for order in permutations(shares):
            for share, cache in zip(order, caches(memory, list(order)), strict=True):
                assert cache >= share.sequence - 2  # rounded


@given(st.integers(1 * GB, 200 * GB), SHARES)
def test_what_is_suggested_is_accepted(memory: int, parts: list[tuple[int, int, float, float, int]]) -> None:
    shares = [Share(str(i), *part) for i, part in enumerate(parts)]
    fractions = beside.suggested(memory, shares)
    typed = [replace(s, fraction=fractions[s.name]) for s in shares if fractions]
    assert beside.problem(memory, typed) == ""


THOUSANDTHS = st.integers(1, 999).map(lambda n: n / 1000)


@given(st.integers(1 * GB, 200 * GB), SHARES, st.lists(THOUSANDTHS, min_size=4, max_size=4))
def test_fractions_are_found_where_there_are_some(
    memory: int, parts: list[tuple[int, int, float, float, int]], fractions: list[float]
) -> None:
    shares = [Share(str(i), *part) for i, part in enumerate(parts)]
    shares = [replace(share, fraction=fraction) for share, fraction in zip(shares, fractions, strict=False)]
    taken = sum(share.taken(memory) for share in shares)
    if not beside.problem(memory, shares) and taken <= beside.USABLE * memory:
        assert beside.suggested(memory, shares)
        assert beside.suggested(memory, shares, fixed=[shares[0].name])[shares[0].name] == shares[0].fraction


def test_a_model_that_needs_more_gets_a_larger_fraction() -> None:
    """Equal ones would leave the first with 5 GB if it is loaded last."""
    shares = [Share("long", 10 * GB, 9 * GB, 0.9), Share("short", 10 * GB, GB, 0.9)]
    equal = beside.problem(48 * GB, [replace(share, fraction=0.33) for share in shares])
    assert "long may get" in equal
    found = beside.suggested(48 * GB, shares)
    assert found["long"] > found["short"]
    assert beside.suggested(48 * GB, shares, fixed=["short"]) == {}
    assert beside.suggested(48 * GB, [shares[0], replace(shares[1], fraction=0.1)], fixed=["short"])["short"] == 0.1


def test_two_models_with_the_default_fraction_do_not_fit() -> None:
    """The first would take nine tenths of the card, and the second would find no room for its weights."""
    shares = [Share("chat", 16 * GB, GB, 0.9), Share("code", 16 * GB, GB, 0.9)]
    with pytest.raises(UnsupportedError, match="The 2 models do not fit beside each other on H100") as caught:
        beside.check({"H100": (80 * GB, shares)})
    assert (
        caught.value.hint == "Divide the memory with `builder combine`: --kv-fraction chat=0.34 --kv-fraction code=0.34"
    )
    assert "chat: 16.00 GB of weights and workspace, up to 57.60 GB of KV cache" in caught.value.why
    beside.check({"H100": (80 * GB, [Share(s.name, s.weights, s.sequence, 0.34) for s in shares])})


def test_lora_adapters_are_counted() -> None:
    """Their memory is taken before the KV cache, and an engine is not loaded if it does not hold one of them."""
    one = Share("chat", 20 * GB, GB, 0.5, 0.1, GB)
    assert (one.adapters(80 * GB), one.most(80 * GB), one.taken(80 * GB)) == (6 * GB, 27 * GB, 53 * GB)
    large = replace(one, adapter=7 * GB)
    assert beside.problem(80 * GB, [large]) == "chat may get 6.00 GB for LoRA adapters; one takes 7.00 GB."
    with pytest.raises(UnsupportedError) as caught:
        beside.check({"H100": (80 * GB, [large])})
    assert "chat: 20.00 GB of weights and workspace, up to 6.00 GB for LoRA adapters, up to 27.00" in caught.value.why


def test_models_that_no_fraction_helps() -> None:
    shares = [Share("chat", 50 * GB, GB, 0.9), Share("code", 40 * GB, GB, 0.9)]
    with pytest.raises(UnsupportedError, match="do not fit") as caught:
        beside.check({"H100": (80 * GB, shares)})
    assert "another card" in caught.value.hint


def test_a_cpu_needs_what_the_models_need() -> None:
    shares = [Share("a", 3 * GB, GB, None), Share("b", 3 * GB, GB, None)]
    assert beside.problem(8 * GB, shares) == ""
    assert "Together they may take 8.00 GB" in beside.problem(7 * GB, shares)


def test_one_card_that_fits_is_enough() -> None:
    shares = [Share("a", 3 * GB, GB, None)]
    beside.check({"small": (GB, shares), "large": (8 * GB, shares)})
