"""A regular expression of a JSON schema as an expression of a grammar, for the inside of a JSON string. Pure.

JSON Schema searches for a pattern anywhere in a string; the grammar generates strings that match it as a whole, which
are some of those. Python's own parser reads the pattern.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from re import _constants as ops  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

from builder.grammar import strings
from builder.grammar.alternatives import alternatives
from builder.grammar.errors import GrammarError

LONGEST, MOST_REPEATS = 2000, 1000
# ASCII only: whether \d is also a digit of another script depends on who checks.
CATEGORIES: Mapping[Any, strings.Ranges] = {
    ops.CATEGORY_DIGIT: ((0x30, 0x39),),
    ops.CATEGORY_SPACE: ((0x20, 0x20),),
    ops.CATEGORY_WORD: ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)),
    ops.CATEGORY_NOT_DIGIT: ((0, 0x2F), (0x3A, 0x7F)),
    ops.CATEGORY_NOT_SPACE: ((0x21, 0x7F),),
    ops.CATEGORY_NOT_WORD: ((0, 0x2F), (0x3A, 0x40), (0x5B, 0x5E), (0x60, 0x60), (0x7B, 0x7F)),
}
_ANYTHING = ((0, 0x10FFFF),)
_OCTET = "(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_DATE = "[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])"  # a day that every month has
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?(Z|[-+]([01][0-9]|2[0-3]):[0-5][0-9])"
# The values of `format` that OpenAI documents for structured outputs. Each pattern is a subset of the format.
FORMATS: Mapping[str, str] = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "duration": "P([0-9]{1,4}D(T[0-9]{1,4}H)?|T[0-9]{1,4}[HMS]|[0-9]{1,4}[WMY])",
    "email": r"[A-Za-z0-9][A-Za-z0-9_+-]{0,30}(\.[A-Za-z0-9_+-]{1,30}){0,3}@([a-z0-9]{1,30}\.){1,4}[a-z]{2,10}",
    "hostname": r"[a-z0-9]{1,30}(\.[a-z0-9]{1,30}){0,4}",
    "ipv4": rf"{_OCTET}(\.{_OCTET}){{3}}",
    "ipv6": "[0-9a-f]{1,4}(:[0-9a-f]{1,4}){7}",
    "uuid": "[0-9a-f]{8}-[0-9a-f]{4}-[1-5][0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}",
}


def expression(pattern: str) -> str:
    """An expression for strings that match a pattern. GrammarError for what a grammar can't express."""
    if len(pattern) > LONGEST:
        raise GrammarError(f"a pattern can have at most {LONGEST} characters")
    try:
        parsed = parser.parse(pattern)
        if parsed.state.flags & ~re.UNICODE:
            raise GrammarError("flags in a pattern are not supported")
        return _sequence(list(parsed), True, True) or '""'
    except (re.error, OverflowError) as error:
        raise GrammarError(f"the pattern can't be read: {str(error)[:200]}", invalid=True) from None
    except RecursionError:
        raise GrammarError("the pattern is nested too deep") from None


def _sequence(items: Sequence[tuple[Any, Any]], left: bool, right: bool) -> str:
    """left, right: whether the sequence begins or ends the pattern, where ^ and $ mean nothing."""
    made = []
    for place, (kind, value) in enumerate(items):
        at_left, at_right = left and place == 0, right and place == len(items) - 1
        if kind is ops.AT:
            if not (value is ops.AT_BEGINNING and at_left) and not (value is ops.AT_END and at_right):
                raise GrammarError("^ and $ are supported at the ends of a pattern only, and \\b not at all")
            continue
        made.append(_one(kind, value, at_left, at_right))
    return " ".join(made)


def _one(kind: Any, value: Any, left: bool, right: bool) -> str:
    if kind is ops.LITERAL:
        return _literal(value)
    if kind in (ops.NOT_LITERAL, ops.ANY, ops.IN):
        return _class(kind, value)
    if kind is ops.BRANCH:
        branches = (_sequence(list(branch), left, right) or '""' for branch in value[1])
        return alternatives(branches)
    if kind is ops.SUBPATTERN and not value[1] and not value[2]:
        return f"({_sequence(list(value[3]), left, right) or chr(34) * 2})"
    if kind in (ops.MAX_REPEAT, ops.MIN_REPEAT):
        return _repeated(*value)
    names = {ops.ASSERT: "lookahead", ops.ASSERT_NOT: "lookahead", ops.GROUPREF: "a reference to a group"}
    raise GrammarError(f"{names.get(kind, str(kind).lower())} in a pattern is not supported")


def _repeated(least: int, most: Any, items: Any) -> str:
    bounded = most is not ops.MAXREPEAT
    if least > MOST_REPEATS or (bounded and most > MOST_REPEATS):
        raise GrammarError(f"a pattern can repeat at most {MOST_REPEATS} times")
    inner = _sequence(list(items), False, False)
    if not inner:
        return '""'
    return f"({inner}){{{least},{most if bounded else ''}}}"


def _literal(code: int) -> str:
    text = chr(code)
    if 0xD800 <= code < 0xE000:
        raise GrammarError("a pattern can't have half of a surrogate pair")
    return strings.literal(json.dumps(text, ensure_ascii=False)[1:-1])


def _class(kind: Any, value: Any) -> str:
    if kind is ops.ANY:
        ranges: strings.Ranges = _ANYTHING
    elif kind is ops.NOT_LITERAL:
        ranges = strings.complement([(value, value)])
    else:
        negated = value[0][0] is ops.NEGATE
        ranges = tuple(_members(value[1:] if negated else value))
        if negated:
            ranges = strings.complement(ranges)
            if any(kind is ops.CATEGORY for kind, _ in value):
                ranges = strings.within(ranges, ((0, 0x7F),))
    return strings.char_class(ranges)


def _members(items: Iterable[tuple[Any, Any]]) -> Iterable[tuple[int, int]]:
    for kind, value in items:
        if kind is ops.LITERAL:
            yield value, value
        elif kind is ops.RANGE:
            yield value
        elif kind is ops.CATEGORY:
            yield from CATEGORIES[value]
        else:
            raise GrammarError("a class in a pattern can't be read")
