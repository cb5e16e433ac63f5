"""What a JSON string contains, as expressions of a grammar. Pure.

xgrammar 0.1.25, which TensorRT-LLM 1.2 has, reads a class with characters beyond ASCII as bytes, unless it excludes
only ASCII ([^"]); then it also accepts some sequences of bytes that are not UTF-8, which models do not write (tried
here). So classes are written with ASCII, and other characters one by one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from builder.grammar.alternatives import alternatives
from builder.grammar.errors import GrammarError

Ranges = tuple[tuple[int, int], ...]  # of code points, sorted

# What a string contains unescaped: no control character, quote or backslash, and no half of a surrogate pair.
ASCII: Ranges = ((0x20, 0x21), (0x23, 0x5B), (0x5D, 0x7F))
BEYOND: Ranges = ((0x80, 0xD7FF), (0xE000, 0x10FFFF))
MOST_SINGLE = 512  # characters beyond ASCII of one class
# A character of a string. Escapes of surrogates are left out: two of them count as one character for some readers.
CHARACTER = 'plain | "\\\\" (["\\\\/bfnrt] | "u" ([0-9A-Ca-cE-Fe-f] hex hex hex | [Dd] [0-7] hex hex))'


def literal(text: str) -> str:
    """A text as a literal of a grammar."""
    return '"' + "".join(_escaped(char, '"') for char in text) + '"'


def json_literal(value: object) -> str:
    """A JSON value as a literal of a grammar. ValueError for a number that JSON does not have: infinity, NaN."""
    return literal(json.dumps(value, ensure_ascii=False, allow_nan=False))


def char_class(ranges: Iterable[tuple[int, int]]) -> str:
    """One of these code points, without those that need an escape. GrammarError if there are none, or too many."""
    ranges = list(ranges)
    ascii, beyond = within(ranges, ASCII), within(ranges, BEYOND)
    if beyond == BEYOND:
        return f"[^{_members(within(complement(ascii), ((0, 0x7F),)))}]"
    single = sum(high - low + 1 for low, high in beyond)
    if single > MOST_SINGLE and sum(high - low + 1 for low, high in BEYOND) - single > MOST_SINGLE:
        raise GrammarError(f"a class can have at most {MOST_SINGLE} characters beyond ASCII, or all but so many")
    parts = [f"[{_members(ascii)}]"] if ascii else []
    if single <= MOST_SINGLE:
        parts += [literal(chr(code)) for low, high in beyond for code in range(low, high + 1)]
    if not parts:
        raise GrammarError("a class has no character that JSON writes unescaped")
    return alternatives(parts)


def _members(ranges: Ranges) -> str:
    return "".join(
        _escaped(chr(low), "[]-^") + (f"-{_escaped(chr(high), '[]-^')}" if high > low else "") for low, high in ranges
    )


def _escaped(char: str, special: str) -> str:
    """Escapes have a fixed length: xgrammar reads as many digits after \\x as there are."""
    code = ord(char)
    if char == "\\" or char in special or not 0x20 <= code < 0x7F:
        return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
    return char


def within(ranges: Iterable[tuple[int, int]], allowed: Ranges) -> Ranges:
    """The code points of `ranges` that are allowed, in order and without overlaps."""
    found: list[tuple[int, int]] = []
    for low, high in sorted(
        (max(low, first), min(high, last))
        for low, high in ranges
        for first, last in allowed
        if low <= last and high >= first
    ):
        before = found[-1] if found else (-2, -2)
        if low <= before[1]:
            found[-1] = (before[0], max(high, before[1]))
        else:
            found.append((low, high))
    return tuple(found)


def complement(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """All other code points."""
    found, after = [], 0
    for low, high in sorted(ranges):
        if low > after:
            found.append((after, low - 1))
        after = max(after, high + 1)
    return (*found, (after, 0x10FFFF)) if after <= 0x10FFFF else tuple(found)
