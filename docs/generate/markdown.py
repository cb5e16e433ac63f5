"""Markdown out of values: escaped text, code spans, paragraphs, tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any


def text(value: Any) -> str:
    """A value as one line of Markdown: special characters escaped outside of code spans."""
    words = " ".join(str(value).split())
    if words.count("`") % 2:
        words = words.replace("`", "'")
    parts = words.split("`")
    outside = [re.sub(r"([\\*_\[\]<>|#~])", r"\\\1", part) for part in parts[::2]]
    inside = [part.replace("|", "\\|") for part in parts[1::2]]
    joined = [piece for pair in zip(outside, [f"`{part}`" for part in inside] + [""], strict=True) for piece in pair]
    return "".join(joined)


def code(value: Any) -> str:
    """A value as a code span; nothing for an empty one."""
    words = " ".join(str(value).split()).replace("`", "'").replace("|", "\\|")
    return f"`{words}`" if words else ""


def say(*paragraphs: str) -> Iterator[str]:
    """Headings and paragraphs, each followed by an empty line."""
    for paragraph in paragraphs:
        yield from (paragraph, "")


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """A Markdown table; the cells are Markdown already."""
    yield "| " + " | ".join(headers) + " |"
    yield "| " + " | ".join("---" for _ in headers) + " |"
    for row in rows:
        yield "| " + " | ".join(cell or " " for cell in row) + " |"
    yield ""
