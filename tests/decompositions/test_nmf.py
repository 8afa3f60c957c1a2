"""Non-negative factorizations: signs kept, error measured, near the SVD, never above the plain fit on data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from numpy.typing import NDArray

from lowrank_onnx.decompositions.nmf import nmf, nndsvd, semi_nmf, semi_nmf_output

Array = NDArray[Any]
MakeWeight = Callable[[str, tuple[int, ...], int], Array]
MakePatches = Callable[[int, int, int], Array]

KINDS = st.sampled_from(["random", "zeros", "constant", "one channel", "rank one"])
steady = settings(deadline=None, max_examples=30, derandomize=True)


def relative(measured: Array, expected: Array) -> float:
    norm = np.linalg.norm(expected)
    return float(np.linalg.norm(measured - expected) / norm) if norm else float(np.linalg.norm(measured))


def svd_error(matrix: Array, rank: int) -> float:
    sigma = np.linalg.svd(matrix, compute_uv=False)
    return float(np.linalg.norm(sigma[rank:]) / np.linalg.norm(sigma)) if sigma.any() else 0.0


@given(KINDS, st.tuples(st.integers(1, 8), st.integers(1, 8)), st.integers(0, 9), st.data())
@steady
def test_signs_and_errors(
    make_weight: MakeWeight,
    make_patches: MakePatches,
    kind: str,
    shape: tuple[int, int],
    seed: int,
    data: st.DataObject,
) -> None:
    matrix = make_weight(kind, shape, seed)
    rank = data.draw(st.integers(1, min(shape)))
    both, one = nmf(np.abs(matrix), rank), semi_nmf(matrix, rank)
    assert both.left.min() >= 0 and both.right.min() >= 0 and one.right.min() >= 0
    assert both.left.shape == one.left.shape == (shape[0], rank)
    assert both.right.shape == one.right.shape == (rank, shape[1])
    assert relative(both.left @ both.right, np.abs(matrix)) == pytest.approx(both.error, abs=1e-10)
    assert relative(one.left @ one.right, matrix) == pytest.approx(one.error, abs=1e-10)
    assert svd_error(np.abs(matrix), rank) - 1e-10 <= both.error <= 1 + 1e-10
    assert svd_error(matrix, rank) - 1e-10 <= one.error <= 1 + 1e-10
    x = make_patches(shape[1], data.draw(st.sampled_from([3, 100])), seed)
    y = x @ matrix.T
    aware = semi_nmf_output(matrix, rank, x.T @ x / len(x))
    assert aware.left.min() >= 0
    assert relative(x @ aware.matrix().T, y) == pytest.approx(aware.error, abs=1e-6)
    plain = semi_nmf(matrix.T, rank)
    assert aware.error <= relative(x @ plain.matrix(), y) + 1e-6
    for found, again in (
        (both, nmf(np.abs(matrix), rank)),
        (one, semi_nmf(matrix.copy(), rank)),
        (aware, semi_nmf_output(matrix.copy(), rank, x.T @ x / len(x))),
    ):
        assert np.array_equal(found.left, again.left) and np.array_equal(found.right, again.right)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 5)])
def test_full_rank_is_exact(make_patches: MakePatches, shape: tuple[int, int]) -> None:
    matrix = np.random.default_rng(0).standard_normal(shape)
    assert relative(nmf(np.abs(matrix), min(shape)).matrix(), np.abs(matrix)) < 1e-10
    if shape[1] <= shape[0]:
        assert relative(semi_nmf(matrix, shape[1]).matrix(), matrix) < 1e-10
    if shape[0] <= shape[1]:
        x = make_patches(shape[1], 100, 0)
        found = semi_nmf_output(matrix, shape[0], x.T @ x / 100)
        assert relative(found.matrix(), matrix) < 1e-10 and found.error < 1e-10


def test_planted_parts_are_found() -> None:
    rng = np.random.default_rng(0)
    parts = rng.random((30, 4)) * (rng.random((30, 4)) < 0.4)
    coefficients = rng.random((4, 40)) * (rng.random((4, 40)) < 0.4)
    assert nmf(parts @ coefficients, 4, iterations=2000, tolerance=0).error < 1e-3
    signed = rng.standard_normal((30, 4)) @ coefficients
    assert semi_nmf(signed, 4, iterations=5000, tolerance=0).error < 0.02


def test_errors_near_the_svd_and_falling_with_rounds() -> None:
    matrix = np.random.default_rng(0).standard_normal((60, 80))
    assert semi_nmf(matrix, 16).error < 1.05 * svd_error(matrix, 16)
    assert nmf(np.abs(matrix), 16).error < 1.10 * svd_error(np.abs(matrix), 16)
    for method, source in ((semi_nmf, matrix), (nmf, np.abs(matrix))):
        errors = [method(source, 16, iterations=n, tolerance=0).error for n in (1, 3, 10, 30, 100)]
        assert np.all(np.diff(errors) < 0)


def test_nmf_ends_where_no_entry_can_move() -> None:
    """At the end no single entry of the non-negative factors can move and lower the error."""
    matrix = np.abs(np.random.default_rng(0).standard_normal((12, 10)))
    found = nmf(matrix, 3, iterations=5000, tolerance=0)
    gradient = (found.matrix() - matrix) @ found.right.T
    scale = np.abs(matrix @ found.right.T).max()
    assert np.all(np.abs(gradient[found.left > 1e-6]) < 1e-4 * scale)  # inside: flat
    assert np.all(gradient[found.left <= 1e-6] > -1e-4 * scale)  # at the bound: pushes outwards


@pytest.mark.parametrize("seed", range(4))
def test_start_keeps_the_stronger_part_of_a_pair(seed: int) -> None:
    matrix = np.abs(np.random.default_rng(seed).standard_normal((6, 5)))
    left, right = nndsvd(matrix, 3)
    assert left.min() >= 0 and right.min() >= 0
    u, s, vt = np.linalg.svd(matrix)
    assert relative(np.outer(left[:, 0], right[0]), s[0] * np.outer(u[:, 0], vt[0])) < 1e-12
    for k in (1, 2):  # the best non-negative rank-one part of either sign
        parts = [
            np.linalg.norm(np.maximum(sign * u[:, k], 0)) * np.linalg.norm(np.maximum(sign * vt[k], 0))
            for sign in (1, -1)
        ]
        assert np.linalg.norm(left[:, k]) * np.linalg.norm(right[k]) == pytest.approx(s[k] * max(parts))
    assert np.linalg.norm(left[:, 1]) == pytest.approx(np.linalg.norm(right[1]))


def test_data_pays(make_patches: MakePatches) -> None:
    weight = np.random.default_rng(0).standard_normal((24, 30))
    x = make_patches(30, 1000, 0)
    y = x @ weight.T
    aware = semi_nmf_output(weight, 8, x.T @ x / 1000, ridge=1e-3)
    assert aware.error < 0.8 * relative(x @ semi_nmf(weight.T, 8).matrix(), y)
    assert svd_error(y, 8) <= aware.error < 1.2 * svd_error(y, 8)


def test_data_never_cost_even_where_their_own_start_ends_badly() -> None:
    rng = np.random.default_rng(9)
    weight, x = rng.standard_normal((5, 6)), rng.standard_normal((50, 6)) * [1, 1, 1, 1, 1.5, 2]
    y = x @ weight.T
    aware = semi_nmf_output(weight, 3, x.T @ x / 50, ridge=0)
    assert aware.error <= relative(x @ semi_nmf(weight.T, 3).matrix(), y) + 1e-12


def test_semi_nmf_stops_where_its_update_is_still() -> None:
    """Where G > 0 the gradient vanishes; where G = 0 it points outwards (Ding et al. 2010, Prop. 5)."""
    matrix = np.random.default_rng(0).standard_normal((12, 10))
    found = semi_nmf(matrix, 3, iterations=20000, tolerance=0)
    gradient = found.left.T @ (found.matrix() - matrix)
    scale = np.abs(found.left.T @ matrix).max()
    assert np.all(np.abs(gradient[found.right > 1e-3]) < 1e-2 * scale)
    assert np.all(gradient[found.right <= 1e-3] > -1e-2 * scale)


def test_what_does_not_fit_is_told() -> None:
    with pytest.raises(ValueError, match="got 2 negative entries of 4; semi_nmf takes signed ones"):
        nmf(np.array([[1.0, -1.0], [-1.0, 1.0]]), 1)
    with pytest.raises(ValueError, match=r"must be in 1\.\.3, got 4"):
        semi_nmf(np.ones((2, 5)), 4)
    with pytest.raises(ValueError, match=r"needs a gram \(3, 3\), got \(2, 2\)"):
        semi_nmf_output(np.ones((2, 3)), 1, np.eye(2))
