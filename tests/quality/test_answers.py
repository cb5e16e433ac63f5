"""The answers of the quality check: whether they name what BF16's do, and that they are those of what is served."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.quality.answers import PROMPTS, Answer, lost
from builder.quality.check import Quality

CAPITAL, COLORS, LENGTH = (one["fact"] for one in PROMPTS)
PARIS = "The capital of France is Paris."


@pytest.mark.parametrize(
    ("fact", "bf16", "quantized", "expected"),
    [
        (CAPITAL, PARIS, "La Famille-Rollier, the capital of France is Paris.", ""),
        (CAPITAL, PARIS, "La femme, la femme, la femme, la femme, la femme,", "Paris"),
        (CAPITAL, PARIS, "PARIS", ""),
        (CAPITAL, PARIS, "Cparis", "Paris"),
        (CAPITAL, "It is Rome.", "La femme", ""),
        (COLORS, "Red, blue and yellow.", "1. Green: the color of grass", ""),
        (COLORS, "Red, blue and yellow.", "The primary colours are tired", "red"),
        (LENGTH, "The length of an object", "The number of its items.", ""),
        (LENGTH, "The length of an object", "", "length"),
    ],
)
def test_a_fact_is_lost_if_bf16_names_it_and_the_quantized_model_does_not(
    fact: tuple[str, ...], bf16: str, quantized: str, expected: str
) -> None:
    assert lost(fact, bf16, quantized) == expected


@given(st.text(), st.text(), st.lists(st.text(min_size=1), min_size=1, max_size=3))
def test_an_equal_answer_has_lost_nothing_and_any_text_is_an_answer(text: str, other: str, fact: list[str]) -> None:
    assert lost(fact, text, text) == ""
    assert lost(fact, text, other) in ("", fact[0])


def test_what_the_answers_lack_in_words() -> None:
    found = Quality(answers=(Answer("Why?", "because", "no", "because"), Answer("When?", "now", "now")))
    assert found.lost == "it answers 'Why?' without because"
    assert Quality().lost == ""
