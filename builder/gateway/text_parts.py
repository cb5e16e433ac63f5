"""The parts of an answer: content, reasoning and tool calls. They do not depend on how its text is cut into pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Part(NamedTuple):
    """A piece of an answer.

    kind: "content" and "reasoning": `text` is appended to either. "call": a tool call begins; `text` is the function's
    name. "arguments": appended to those of the call. "dropped": the call was malformed; its text follows as content.
    number, id: of the tool call.
    """

    kind: str
    text: str
    number: int = 0
    id: str = ""


def beginning_at_end(text: str, strings: Sequence[str]) -> int:
    """The length of the longest end of the text that is the beginning of one of the strings, but not all of it."""
    longest = max((len(string) for string in strings), default=0)
    for length in range(min(longest - 1, len(text)), 0, -1):
        if any(string.startswith(text[-length:]) for string in strings):
            return length
    return 0
