"""Hadamard matrices and the rotations that are made of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builder.transform import goethals_seidel, hadamard, rotation

# Hidden sizes and head sizes of published models, among them those with the odd factors 3, 5, 7, 9, 11, 13, 15, 21, 25.
SIZES = (64, 80, 96, 112, 128, 256, 576, 640, 896, 960, 1152, 1408, 1536, 2048, 2304, 2560, 2688, 2880, 3072, 3200,
         3328, 3584, 4096, 4608, 5120, 5376, 6144, 6656, 7168, 8192, 12288, 16384)  # fmt: skip
# Orders below 200 that are multiples of 4 and that no construction here has.
MISSING = {188}


@pytest.mark.parametrize("part", range(4))
def test_every_order_below_400_that_can_be_is_a_hadamard_matrix(part: int) -> None:
    for n in [1, 2, *range(4 + 4 * part, 400, 16)]:
        if hadamard.orders(n).rest == 1:
            made = hadamard.matrix(n)
            assert made.shape == (n, n)
            assert (np.abs(made) == 1).all()
            assert (made @ made.T == n * np.eye(n)).all(), n


def test_the_orders_that_are_missing_are_known() -> None:
    assert {n for n in range(4, 200, 4) if hadamard.orders(n).rest > 1} == MISSING
    with pytest.raises(ValueError, match="no Hadamard matrix of order 188"):
        hadamard.matrix(188)


def test_every_models_size_has_one() -> None:
    assert [n for n in SIZES if hadamard.orders(n).rest > 1] == []
    assert hadamard.orders(576).factors == (16, 36)
    assert hadamard.orders(4992).factors == (32, 156), "four circulant matrices of order 39"
    assert hadamard.orders(11008).factors == (64, 172), "four circulant matrices of order 43"


def test_widths_without_one_have_a_large_prime_factor() -> None:
    """Widths in use are multiples of 64 with small factors, and head sizes multiples of 16."""
    lacking = [n for n in range(64, 16385, 64) if hadamard.orders(n).rest > 1]
    assert len(lacking) == 18
    assert all(any(n % p == 0 for p in (59, 73, 101, 107, 109, 113, 127, 179, 191, 241)) for n in lacking)
    assert [n for n in range(16, 513, 16) if hadamard.orders(n).rest > 1] == []


@pytest.mark.parametrize("n", [23, 29, 39, 43])
def test_four_circulant_matrices_make_a_hadamard_matrix(n: int) -> None:
    made = goethals_seidel.matrix(4 * n)
    assert (np.abs(made) == 1).all()
    assert (made @ made.T == 4 * n * np.eye(4 * n)).all()


@settings(deadline=None, max_examples=25)
@given(n=st.integers(1, 300), seed=st.integers(0, 2**31 - 1), kind=st.sampled_from(["hadamard", "orthogonal"]))
def test_a_rotation_of_any_size_is_orthogonal_and_the_product_with_its_matrix(n: int, seed: int, kind: str) -> None:
    made = rotation.random(n, kind, seed, "r1")  # type: ignore[arg-type]
    whole = made.matrix()
    assert np.abs(whole @ whole.T - np.eye(n)).max() < 1e-12
    rows = np.arange(3.0 * n).reshape(3, n) / n
    assert np.abs(made.rotate(rows) - rows @ whole).max() < 1e-11


def test_a_size_without_one_gets_an_orthogonal_factor_and_says_so() -> None:
    made = rotation.random(188, "hadamard", 0, "r1")
    assert made.title == "random Hadamard matrix of order 4 times a random orthogonal one of order 47"
    assert [len(one) for one in made.factors] == [4, 47]
    assert rotation.random(576, "hadamard", 0, "r1").title == "random Hadamard matrix of order 576"


def test_the_entries_of_a_random_hadamard_matrix_are_of_one_magnitude() -> None:
    assert np.allclose(np.abs(rotation.random(576, "hadamard", 3, "r1").matrix()), 576**-0.5)


def test_seed_and_name_make_another_rotation_and_the_same_ones_the_same() -> None:
    def signs(seed: int, name: str) -> list[int]:
        return rotation.random(16, "hadamard", seed, name).signs.astype(int).tolist()

    expected = [-1, -1, 1, -1, 1, -1, 1, 1, 1, -1, 1, -1, -1, -1, -1, 1]
    assert signs(0, "r1") == signs(0, "r1") == expected
    assert signs(0, "r1") != signs(1, "r1")
    assert signs(0, "r2.0") != signs(0, "r2.1")
