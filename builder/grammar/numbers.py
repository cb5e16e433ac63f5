"""Ranges of integers and decimals as expressions of a grammar. Pure.

A range becomes alternatives of digit ranges: 7 to 120 is [7-9] | [1-9][0-9] | "1" [0-1] [0-9] | "12" "0".
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from builder.grammar.alternatives import alternatives
from builder.grammar.errors import GrammarError

DIGITS = 18  # of a number without a bound: integers that 64 bits hold
LARGEST = 10**20  # of a bound
EXTRA_DIGITS = 6  # decimals behind those of a bound
PRECISE = 15  # digits of two numbers that a double always tells apart (DBL_DIG of C's float.h)
INTEGER = '"-"? ("0" | [1-9] [0-9]{0,17})'
NUMBER = f'{INTEGER} ("." [0-9]{{1,17}})? ([eE] [-+]? [0-9]{{1,2}})?'

Digits = list[tuple[int, int]]  # the lowest and the highest digit at each place


@dataclass(frozen=True)
class Range:
    """Bounds of a number; None is unbounded. open_low, open_high: the bound itself is outside."""

    low: Fraction | None = None
    high: Fraction | None = None
    open_low: bool = False
    open_high: bool = False

    def __post_init__(self) -> None:
        for bound in (self.low, self.high):
            if bound is not None and abs(bound) > LARGEST:
                raise GrammarError(f"a bound beyond {LARGEST:.0e} is not supported")

    @property
    def mirrored(self) -> Range:
        """The same range of the negated numbers."""
        low, high = (None if bound is None else -bound for bound in (self.high, self.low))
        return Range(low, high, self.open_high, self.open_low)

    def scaled(self, places: int) -> tuple[int, int | None]:
        """The numbers of the range that are not negative and have so many decimals, as integers: the first and the last
        (None: unbounded)."""
        low = Fraction(0) if self.low is None or self.low < 0 else self.low * 10**places
        first = math.ceil(low)
        if self.open_low and self.low is not None and self.low >= 0 and first == low:
            first += 1
        if self.high is None:
            return first, None
        high = self.high * 10**places
        last = math.floor(high)
        return first, last - 1 if self.open_high and last == high else last


def integer(bounds: Range) -> str:
    """An expression for the integers of a range. GrammarError if there are none."""
    if bounds.low is None and bounds.high is None:
        return INTEGER
    return _signed(bounds, [0], extra=0)


def number(bounds: Range) -> str:
    """An expression for the decimals of a range, which may leave out some close to an open bound."""
    if bounds.low is None and bounds.high is None:
        return NUMBER
    places = max(_decimals(bound) for bound in (bounds.low, bounds.high) if bound is not None)
    exact = places
    if bounds.open_low or bounds.open_high:
        places += 3
    most = min([_precise(bounds.low, bounds.open_low), _precise(bounds.high, bounds.open_high)])
    places = min(places, most)
    return _signed(bounds, list(range(places + 1)), extra=min(EXTRA_DIGITS, most - places) if places >= exact else 0)


def _precise(bound: Fraction | None, is_open: bool) -> int:
    """With how many decimals a number beside a bound is still beside it once a reader has made it a double.

    Rounding keeps the order, so it can't cross a bound that is a double, nor reach one that is in the range anyway.
    """
    if bound is None or not (is_open or (bound.denominator == 1 and Fraction(float(bound)) != bound)):
        return DIGITS + EXTRA_DIGITS
    return max(PRECISE - (len(str(int(abs(bound)))) if abs(bound) >= 1 else 0), 0)


def _signed(bounds: Range, places: list[int], *, extra: int) -> str:
    found = list(_unsigned(bounds, places, extra))
    below = bounds.mirrored
    if below.high is None or below.high > 0:
        found += [f'"-" ({one})' for one in _unsigned(below, places, extra)]
    if not found:
        raise GrammarError("no number is within the bounds")
    return alternatives(found)


def _unsigned(bounds: Range, places: list[int], extra: int) -> Iterator[str]:
    """Alternatives for the numbers of the range that are not negative, with each number of decimals."""
    for count in places:
        first, last = bounds.scaled(count)
        yield from _written(first, last, count, "")
    if extra:  # any further digits stay below the next number
        first, last = bounds.scaled(places[-1])
        exact = last is not None and bounds.high is not None and last == bounds.high * 10 ** places[-1]
        more = f"[0-9]{{1,{extra}}}"
        yield from _written(first, last - 1 if last is not None and exact else last, places[-1], more)


def _written(first: int, last: int | None, places: int, more: str) -> Iterator[str]:
    """The integers from first to last, written with so many decimals, and `more` behind them."""
    behind = "" if not more else f" {more}" if places else f' "." {more}'
    if last is None:
        last = 10 ** max(len(str(first)), places + 1) - 1
        point = f' "." [0-9]{{{places}}}' if places else ""
        shortest = len(str(last)) - places
        if shortest < DIGITS:
            yield f"[1-9] [0-9]{{{shortest},{DIGITS - 1}}}{point}{behind}"
    for digits in _ranges(first, last, places + 1):
        whole, part = digits[: len(digits) - places], digits[len(digits) - places :]
        yield " ".join([*map(_digit, whole), *(['"."', *map(_digit, part)] if part else [])]) + behind


def _ranges(first: int, last: int, width: int) -> Iterator[Digits]:
    """Digit ranges of the integers from first to last, padded with zeros to at least so many digits."""
    low = first
    while low <= last:
        digits = max(len(str(low)), width)
        high = min(last, 10**digits - 1)
        yield from _same_length(str(low).zfill(digits), str(high).zfill(digits))
        low = high + 1


def _same_length(low: str, high: str) -> Iterator[Digits]:
    first, last, rest = int(low[0]), int(high[0]), len(low) - 1
    if not rest:
        yield [(first, last)]
    elif first == last:
        yield from ([(first, first), *others] for others in _same_length(low[1:], high[1:]))
    else:
        if low[1:] != "0" * rest:
            yield from ([(first, first), *others] for others in _same_length(low[1:], "9" * rest))
            first += 1
        if high[1:] != "9" * rest:
            yield from ([(last, last), *others] for others in _same_length("0" * rest, high[1:]))
            last -= 1
        if first <= last:
            yield [(first, last), *[(0, 9)] * rest]


def _digit(places: tuple[int, int]) -> str:
    low, high = places
    return f'"{low}"' if low == high else f"[{low}-{high}]"


def _decimals(bound: Fraction) -> int:
    """Decimals of a bound, which a JSON number wrote."""
    count = 0
    while (bound * 10**count).denominator != 1:
        count += 1
        if count > DIGITS:
            raise GrammarError("a bound with more than 18 decimals is not supported")
    return count
