"""Stop strings end a text at the same character, however it is cut into pieces."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.gateway.stops import StopStrings

LETTERS = "ab\n🎉"
TEXT = st.text(LETTERS, max_size=30)
STOPS = st.lists(st.text(LETTERS, min_size=1, max_size=4), max_size=4)


def run(stops: Sequence[str], pieces: Sequence[str]) -> tuple[str, str | None]:
    matcher = StopStrings(stops)
    text = "".join(matcher.add(piece) for piece in pieces)
    return text + matcher.rest(), matcher.matched


def expected(stops: Sequence[str], text: str) -> tuple[str, str | None]:
    """Character by character: the first stop string that the text ends with, the longest if there are several."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(stops=STOPS, text=TEXT, cuts=st.lists(st.integers(0, 30)))
def test_the_cuts_do_not_matter(stops: list[str], text: str, cuts: list[int]) -> None:
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[start:end] for start, end in pairwise(places)]
    assert run(stops, pieces) == expected(stops, text)


@given(stops=STOPS, text=TEXT)
def test_only_the_beginning_of_a_stop_string_is_held_back(stops: list[str], text: str) -> None:
    matcher, sent, seen = StopStrings(stops), "", ""
    for letter in text:
        seen += letter
        sent += matcher.add(letter)
        if matcher.matched is not None:
            return
        held = seen[len(sent) :]
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)


@pytest.mark.parametrize(
    ("stops", "pieces", "text"),
    [
        (["\n\n"], ["one\n", "\ntwo"], "one"),
        (["</s>"], ["a <", "/", "b"], "a </b"),
        (["ab", "xab"], ["x", "ab"], ""),
        (["never"], ["all of ", "it nev"], "all of it nev"),
        ([], ["no stop"], "no stop"),
    ],
)
def test_examples(stops: list[str], pieces: list[str], text: str) -> None:
    assert run(stops, pieces)[0] == text
