"""Paley's Hadamard matrices, from the squares of a finite field (R. E. A. C. Paley, "On orthogonal matrices", 1933).

For a prime power q, the first construction has order q + 1 where q = 3 modulo 4, the second 2 (q + 1) where
q = 1 modulo 4.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
MOST_DIGITS = 3  # of a field's elements: then a polynomial without roots is irreducible


def matrix(order: int) -> Array | None:
    """A Hadamard matrix of this order, float64; None if neither construction has it."""
    if field := _prime_power(order - 1):
        return _first(*field) if (order - 1) % 4 == 3 else None
    if order % 2 == 0 and (order // 2 - 1) % 4 == 1 and (field := _prime_power(order // 2 - 1)):
        return _second(*field)
    return None


def exists(order: int) -> bool:
    """Whether `matrix` has this order."""
    if _prime_power(order - 1):
        return (order - 1) % 4 == 3
    return order % 2 == 0 and (order // 2 - 1) % 4 == 1 and _prime_power(order // 2 - 1) is not None


def _first(p: int, e: int) -> Array:
    q = p**e
    skew = np.zeros((q + 1, q + 1))
    skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, _differences(p, e)
    return skew + np.eye(q + 1)


def _second(p: int, e: int) -> Array:
    q = p**e
    symmetric = np.zeros((q + 1, q + 1))
    symmetric[0, 1:], symmetric[1:, 0], symmetric[1:, 1:] = 1, 1, _differences(p, e)
    return np.kron(symmetric, [[1, 1], [1, -1]]) + np.kron(np.eye(q + 1), [[1, -1], [-1, -1]])


def _differences(p: int, e: int) -> Array:
    """[q, q] of 1 where the difference of two elements is a square, -1 where it is not, and 0 on the diagonal."""
    elements = list(itertools.product(range(p), repeat=e))  # in the order of their digits, read as a number
    modulus = _irreducible(p, e)
    squares = {_square(one, modulus, p) for one in elements}
    character = np.array([0.0 if not any(one) else 1.0 if one in squares else -1.0 for one in elements])
    digits, places = np.array(elements), p ** np.arange(e - 1, -1, -1)
    return np.asarray(character[((digits[:, None] - digits[None, :]) % p) @ places])


def _square(one: Sequence[int], modulus: Sequence[int], p: int) -> tuple[int, ...]:
    """The square of a polynomial (highest power first), reduced by the monic polynomial x^e - modulus."""
    e = len(one)
    product = [0] * (2 * e - 1)
    for i, j in itertools.product(range(e), repeat=2):
        product[i + j] += one[i] * one[j]
    for at in range(e - 1):
        for j in range(e):
            product[at + 1 + j] += product[at] * modulus[j]
    return tuple(value % p for value in product[e - 1 :])


def _irreducible(p: int, e: int) -> tuple[int, ...]:
    """m such that x^e - m(x) has no root, which makes it irreducible, because e is at most MOST_DIGITS."""
    for found in itertools.product(range(p), repeat=e):
        if e == 1 or all((x**e - sum(c * x ** (e - 1 - k) for k, c in enumerate(found))) % p for x in range(p)):
            return found
    raise AssertionError("every finite field has an irreducible polynomial of each degree")


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, e) with q = p^e, p an odd prime and e at most MOST_DIGITS; None if there are none."""
    for e in range(1, MOST_DIGITS + 1):
        p = round(q ** (1 / e)) if q > 2 else 0
        if p > 2 and p**e == q and all(p % k for k in range(2, int(p**0.5) + 1)):
            return p, e
    return None
