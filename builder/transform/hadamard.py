"""Hadamard matrices of many orders, as Kronecker products of small ones: Sylvester's 2 x 2, Paley's, and those of four
circulant matrices."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from builder.transform import goethals_seidel, paley

Array = np.ndarray[Any, Any]
WIDEST = 64  # of the factors that are powers of two: a matrix product with one is quicker than with two smaller ones


@dataclass(frozen=True)
class Orders:
    """The orders of Hadamard matrices whose Kronecker product has the wanted order, but for a factor `rest`, an odd
    number for which none was found; 1 where the product has it."""

    factors: tuple[int, ...]
    rest: int = 1


@functools.cache
def orders(n: int) -> Orders:
    """How a matrix of order n is composed: with the smallest known matrix that has n's odd factor, or two of them,
    and powers of two."""
    odd = n // (n & -n)
    if odd == 1:
        return Orders(_twos(n))
    if (one := _smallest(odd, n)) is not None:
        return Orders((*_twos(n // one), one))
    for part in range(3, int(odd**0.5) + 1, 2):
        if odd % part == 0 and (first := _smallest(part, n)) and (second := _smallest(odd // part, n // first)):
            return Orders((*_twos(n // first // second), first, second))
    return Orders(_twos(n // odd), odd)


def matrix(n: int) -> Array:
    """A Hadamard matrix of order n, float64, with entries 1 and -1. ValueError if none is known here."""
    found = orders(n)
    if found.rest != 1:
        raise ValueError(f"no Hadamard matrix of order {n} is known here")
    return functools.reduce(np.kron, map(factor, found.factors), np.ones((1, 1)))


def factor(order: int) -> Array:
    """A matrix of one of the orders that `orders` names."""
    if order & (order - 1) == 0:
        made = np.ones((1, 1))
        while len(made) < order:
            made = np.kron([[1.0, 1.0], [1.0, -1.0]], made)
        return made
    made_by_paley = paley.matrix(order)
    return goethals_seidel.matrix(order) if made_by_paley is None else made_by_paley


def _smallest(odd: int, n: int) -> int | None:
    """The smallest order with a construction that is this odd number times a power of two, and divides n."""
    order = 4 * odd
    while n % order == 0:
        if paley.exists(order) or goethals_seidel.exists(order):
            return order
        order *= 2
    return None


def _twos(n: int) -> tuple[int, ...]:
    """A power of two as factors of at most WIDEST, as equal as possible."""
    exponent = n.bit_length() - 1
    most = WIDEST.bit_length() - 1
    count = -(-exponent // most)
    return tuple(2 ** (exponent // count + (at < exponent % count)) for at in range(count))
