"""Hadamard matrices of four circulant matrices (J. M. Goethals and J. J. Seidel, "A skew Hadamard matrix of order 36",
1970), for orders that Paley's constructions lack. Symmetric circulants are Williamson's case (1944).

Four n x n circulants A, B, C, D of 1 and -1 with A A^T + B B^T + C C^T + D D^T = 4 n I give one of order 4 n. The rows
below were found by a search of our own over rows that are constant on the orbits of a group of multipliers, two pairs
at a time; any other rows with that property would do as well.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

# By n: the first rows of A, B, C and D.
ROWS = {
    23: (
        "+--++-+-+-++++-+-+-++--",
        "+--+-+-++++++++++-+-+--",
        "+++---++--++++--++---++",
        "+--+--+++------+++--+--",
    ),
    29: (
        "+--++----+-+-++++-+-+----++--",
        "+--+-+-+++++++--+++++++-+-+--",
        "+--+++--++-+--++--+-++--+++--",
        "+++-+++-+----++++----+-+++-++",
    ),
    39: (
        "++--+-----+-+++-+-----+--+---++----++--",
        "++-++-+-+++++-+++-+-+-+--+-+-++----++--",
        "++----+-+--+---++++++++++---+--+-+----+",
        "++++-+--++-+-+--+--++-+---+++--++------",
    ),
    43: (
        "++++--+---+-++--+++--++--+---+-----++-+-+--",
        "+-++++-+++-++-++--+-+-+++----++++-+--+---++",
        "+-+-+--+-+++++++++---+-+++---+-+---+-++-+++",
        "+-+-++-++++++-++++--+--++----++++-+--+---++",
    ),
}


def exists(order: int) -> bool:
    """Whether `matrix` has this order."""
    return order % 4 == 0 and order // 4 in ROWS


def matrix(order: int) -> Array:
    """The Hadamard matrix of this order, float64. KeyError for an order that is not here."""
    a, b, c, d = map(_circulant, ROWS[order // 4])
    r = np.eye(order // 4)[::-1]
    br, cr, dr = b @ r, c @ r, d @ r
    return np.block(
        [
            [a, br, cr, dr],
            [-br, a, d.T @ r, -c.T @ r],
            [-cr, -d.T @ r, a, b.T @ r],
            [-dr, c.T @ r, -b.T @ r, a],
        ]
    )


def _circulant(signs: str) -> Array:
    row = np.array([1.0 if sign == "+" else -1.0 for sign in signs])
    return np.array([np.roll(row, shift) for shift in range(len(row))])
