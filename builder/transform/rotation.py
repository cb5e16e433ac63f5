"""Rotations: orthogonal matrices as a product of random signs and small orthogonal factors, in float64.

A product with a Kronecker product is one with each factor in turn, so that a matrix of order 4096 costs as much as
two of order 64. The same seed gives the same signs on every machine.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import numpy as np

from builder.transform import hadamard

Array = np.ndarray[Any, Any]
Kind = Literal["hadamard", "orthogonal"]


@dataclass(frozen=True)
class Rotation:
    """diag(signs) times the Kronecker product of `factors`, each of which is orthogonal. title: what it is."""

    signs: Array
    factors: tuple[Array, ...]
    title: str

    def rotate(self, rows: Array) -> Array:
        """rows [..., n] times this matrix, in float64."""
        shape = rows.shape
        made = rows * self.signs
        right = len(self.signs)
        for one in self.factors:
            right //= len(one)
            made = made.reshape(-1, len(one), right) if right > 1 else made.reshape(-1, len(one))
            made = np.matmul(one.T, made) if right > 1 else made @ one
        return np.asarray(made.reshape(shape))

    def matrix(self) -> Array:
        """The whole matrix, [n, n]."""
        return self.rotate(np.eye(len(self.signs)))


def of_matrix(matrix: Array, title: str) -> Rotation:
    """The rotation that an orthogonal matrix [n, n] is."""
    return Rotation(np.ones(len(matrix)), (matrix,), title)


def random(n: int, kind: Kind, seed: int, name: str) -> Rotation:
    """A random rotation of order n. name: makes it another one than those of the same seed."""
    if kind == "orthogonal":
        return Rotation(np.ones(n), (_haar(n, seed, name),), f"random orthogonal matrix of order {n}")
    found = hadamard.orders(n)
    factors = tuple(hadamard.factor(order) / order**0.5 for order in found.factors)
    title = f"random Hadamard matrix of order {n}"
    if found.rest > 1:
        factors = (*factors, _haar(found.rest, seed, name))
        title = f"random Hadamard matrix of order {n // found.rest} times a random orthogonal one of order {found.rest}"
    assert prod(map(len, factors)) == n
    return Rotation(_signs(n, seed, name), factors, title)


def _signs(n: int, seed: int, name: str) -> Array:
    """n random signs. From a hash, because NumPy does not promise the same stream in later versions."""
    digest = hashlib.shake_256(f"{seed}:{name}".encode()).digest(-(-n // 8))
    return 1.0 - 2.0 * np.unpackbits(np.frombuffer(digest, np.uint8))[:n]


def _haar(n: int, seed: int, name: str) -> Array:
    """An orthogonal matrix, uniformly distributed (F. Mezzadri, "How to generate random matrices from the classical
    compact groups", 2007: QR of normal numbers, with the signs of R's diagonal)."""
    start = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest(), "little")
    q, r = np.linalg.qr(np.random.default_rng(start).standard_normal((n, n)))
    return np.asarray(q * np.sign(np.diag(r)))
