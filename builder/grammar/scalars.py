"""Strings and numbers of a JSON schema as expressions of a grammar, and its counts. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from builder.grammar import numbers, patterns
from builder.grammar.errors import GrammarError

MOST = 100_000  # characters or items
QUOTE = '"\\""'


def string(schema: Mapping[str, Any], path: str, *, strict: bool) -> str:
    """An expression for a schema's strings. strict: GrammarError for what it does not fulfil."""
    named = [name for name in ("pattern", "format") if name in schema]
    if strict and named and (len(named) > 1 or "minLength" in schema or "maxLength" in schema):
        raise GrammarError(f"{named[0]} is supported only without other keywords for strings", path)
    least, most = count(schema, "minLength", path), count(schema, "maxLength", path)
    for name in named:
        inner = _matching(name, schema[name], path, strict)
        if inner is not None:
            return f"{QUOTE} ({inner}) {QUOTE}"
    return f"{QUOTE} character{repeat(least or 0, most, path)} {QUOTE}"


def _matching(keyword: str, value: Any, path: str, strict: bool) -> str | None:
    """The inside of a string with this pattern or format; None if it can be ignored."""
    if not isinstance(value, str):
        raise GrammarError(f"{keyword} must be a string", path)
    if keyword == "format" and value not in patterns.FORMATS:
        if strict:
            known = ", ".join(patterns.FORMATS)
            raise GrammarError(f"the format {value[:100]!r} is not supported; use {known}", path)
        return None
    try:
        return patterns.expression(patterns.FORMATS[value] if keyword == "format" else value)
    except GrammarError as error:
        if strict or error.invalid:
            raise GrammarError(error.text, path) from None
        return None


def number(schema: Mapping[str, Any], path: str, *, whole: bool) -> str:
    """An expression for a schema's numbers, or only the whole ones."""
    low = max(_bounds(schema, ("minimum", "exclusiveMinimum"), 1, path), default=None)
    high = max(_bounds(schema, ("maximum", "exclusiveMaximum"), -1, path), default=None)
    try:
        bounds = numbers.Range(
            low[0] if low else None, -high[0] if high else None, bool(low and low[1]), bool(high and high[1])
        )
        return numbers.integer(bounds) if whole else numbers.number(bounds)
    except GrammarError as error:
        raise GrammarError(error.text, path) from None


def _bounds(schema: Mapping[str, Any], keywords: Sequence[str], sign: int, path: str) -> list[tuple[Fraction, bool]]:
    """The bounds of these keywords, times `sign`, and whether each is outside of the range itself."""
    found = []
    for keyword in keywords:
        value = schema.get(keyword)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise GrammarError(f"{keyword} must be a number", path)
        if not math.isfinite(value):  # as Python reads 1e999 and Infinity
            raise GrammarError(f"{keyword} is too large", path)
        found.append((sign * Fraction(repr(value)), keyword.startswith("exclusive")))
    return found


def count(schema: Mapping[str, Any], keyword: str, path: str) -> int | None:
    """The value of a keyword that counts; None if it is absent."""
    value = schema.get(keyword)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise GrammarError(f"{keyword} must be a whole number", path)
    return value


def repeat(least: int, most: int | None, path: str) -> str:
    """How often the expression before it is repeated."""
    if most is not None and most < least:
        raise GrammarError("a minimum is above its maximum", path)
    if max(least, most or 0) > MOST:
        raise GrammarError(f"counts above {MOST} are not supported", path)
    return f"{{{least},{most}}}" if most is not None else f"{{{least},}}" if least else "*"
