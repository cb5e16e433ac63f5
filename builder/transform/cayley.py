"""Cayley SGD on orthogonal matrices (J. Li, L. Fuxin, S. Todorovic, "Efficient Riemannian optimization on the Stiefel
manifold via the Cayley transform", arXiv 2002.01113), without momentum, as SpinQuant uses it, in float64. Imports
torch.

The gradient G at X gives the skew-symmetric W = (X G^T - G X^T) / 2, and a step along it ends in
Y = (I - a/2 W)^-1 (I + a/2 W) X, which is orthogonal if X is. The paper approximates Y by a few fixed-point iterations;
here the linear equations are solved, which takes about as long for matrices of these sizes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Q = 0.5  # 2 Q / |W| is the largest step (algorithm 1 of the paper)


def rate_of(step: int, steps: int, rate: float) -> float:
    """The learning rate of a step, from 0 on: a cosine from `rate` to 0."""
    return rate * (1 + math.cos(math.pi * step / steps)) / 2


def step(x: Tensor, gradient: Tensor, rate: float) -> Tensor:
    """The next orthogonal matrix. x, gradient: [n, n], float64."""
    product = x @ gradient.T
    skew = (product - product.T) / 2
    largest = float(skew.abs().sum(0).max())
    if largest == 0:
        return x
    half = min(rate, 2 * Q / largest) / 2 * skew
    one = torch.eye(len(x), dtype=x.dtype, device=x.device)
    # In the order of rows, so that a matrix that was read back gives the same bits as one that was not.
    return orthogonal(torch.linalg.solve(one - half, x + half @ x).contiguous())


def orthogonal(x: Tensor) -> Tensor:
    """The orthogonal matrix next to one that is orthogonal but for rounding: a step of Newton's iteration for the polar
    factor."""
    return 1.5 * x - 0.5 * x @ (x.T @ x)
