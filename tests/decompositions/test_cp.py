"""CP: against planted factors, least squares by hand, and what is known of degenerate tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import tensorly
from hypothesis import given, settings
from numpy.typing import NDArray
from tensorly.decomposition import parafac

from lowrank_onnx.decompositions.cp import component_norms, cp, cp_tensor, khatri_rao, sensitivity

Array = NDArray[Any]
MakeWeight = Callable[[str, tuple[int, ...], int], Array]
MakePatches = Callable[[int, int, int], Array]

KINDS = st.sampled_from(["random", "zeros", "constant", "one channel", "rank one"])
SHAPES = st.one_of(
    st.tuples(*[st.integers(1, 5)] * 2, st.integers(1, 4)),
    st.tuples(*[st.integers(1, 5)] * 2, *[st.integers(1, 3)] * 2),
    st.tuples(*[st.integers(1, 4)] * 2, *[st.integers(1, 2)] * 3),
)
steady = settings(deadline=None, max_examples=25, derandomize=True)


def relative(measured: Array, expected: Array) -> float:
    norm = np.linalg.norm(expected)
    return float(np.linalg.norm(measured - expected) / norm) if norm else float(np.linalg.norm(measured))


@given(KINDS, SHAPES, st.integers(0, 9), st.integers(1, 6), st.booleans())
@steady
def test_error_is_measured_and_runs_repeat(
    make_weight: MakeWeight, kind: str, shape: tuple[int, ...], seed: int, rank: int, split: bool
) -> None:
    weight = make_weight(kind, shape, seed)
    found = cp(weight, rank, split, iterations=30)
    assert [factor.shape for factor in found.factors] == [
        (length, rank) for length in (shape if split else (*shape[:2], int(np.prod(shape[2:]))))
    ]
    product = np.zeros(weight.shape)
    for r in range(rank):  # the sum of outer products, written out
        term = found.factors[0][:, r]
        for factor in found.factors[1:]:
            term = np.multiply.outer(term, factor[:, r])
        product += term.reshape(weight.shape)
    assert relative(product, weight) == pytest.approx(found.error, abs=1e-10)
    assert found.error <= 1 + 1e-9
    assert np.isfinite(found.max_component_norm)
    norm = np.linalg.norm(weight)
    assert component_norms(found.factors)[0] == pytest.approx(found.max_component_norm * norm, abs=1e-9)
    assert np.all(np.diff(component_norms(found.factors)) <= 1e-9 * norm)
    again = cp(weight.copy(), rank, split, iterations=30)
    assert all(np.array_equal(one, other) for one, other in zip(found.factors, again.factors, strict=True))
    if kind in ("constant", "rank one") and (kind == "constant" or shape[1] * np.prod(shape[2:]) == 1):
        assert found.error < 1e-6


@pytest.mark.parametrize("shape", [(7, 3, 2, 2), (4, 3, 3), (5, 2, 2, 1, 2)])
def test_full_rank_is_exact(shape: tuple[int, ...]) -> None:
    weight = np.random.default_rng(0).standard_normal(shape)
    found = cp(weight, int(np.prod(shape[1:])))
    assert found.error < 1e-10
    assert relative(found.tensor().reshape(shape), weight) < 1e-10


@pytest.mark.parametrize("shape", [(12, 10, 9), (8, 7, 3, 3), (6, 5, 2, 2, 3)])
def test_planted_factors_are_found(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    planted = [rng.standard_normal((length, 3)) for length in shape]
    tensor = (planted[0] @ khatri_rao(planted[1:]).T).reshape(shape)
    noise = rng.standard_normal(shape)
    found = cp_tensor(tensor + 0.01 * noise * np.linalg.norm(tensor) / np.linalg.norm(noise), 3)
    assert relative(found.tensor(), tensor) < 0.01
    for ours, theirs in zip(found.factors, planted, strict=True):  # up to order, sign and scale
        cosines = np.abs((ours / np.linalg.norm(ours, axis=0)).T @ (theirs / np.linalg.norm(theirs, axis=0)))
        assert np.all(cosines.max(axis=0) > 0.99)


def test_not_worse_than_tensorly() -> None:
    weight = np.random.default_rng(0).standard_normal((10, 8, 9))
    theirs = parafac(tensorly.tensor(weight), 6, n_iter_max=200, init="random", random_state=0, tol=1e-10)
    ours = cp(weight, 6, iterations=400, tolerance=1e-8, slack=1)
    assert ours.error <= relative(tensorly.cp_to_tensor(theirs), weight) * 1.01


def test_every_factor_is_least_squares_given_the_others() -> None:
    weight = np.random.default_rng(0).standard_normal((6, 5, 4))
    found = cp(weight, 3, iterations=3000, tolerance=0, slack=1)
    for mode, factor in enumerate(found.factors):
        others = [other for index, other in enumerate(found.factors) if index != mode]
        unfolded = np.moveaxis(weight, mode, 0).reshape(len(factor), -1)
        best = np.linalg.lstsq(khatri_rao(others), unfolded.T, rcond=None)[0].T
        assert relative(factor, best) < 1e-4


def test_more_iterations_and_more_terms_lower_the_error() -> None:
    weight = np.random.default_rng(0).standard_normal((12, 10, 3, 3))
    by_iterations = [cp(weight, 10, iterations=n, slack=1).error for n in (10, 30, 100)]
    assert np.all(np.diff(by_iterations) < 0)
    by_rank = [cp(weight, rank).error for rank in (5, 20, 40)]
    assert np.all(np.diff(by_rank) < 0)


def test_correction_lowers_the_norms_at_the_error_allowed() -> None:
    weight = np.random.default_rng(0).standard_normal((24, 20, 3, 3))
    free = cp(weight, 60, slack=1)
    bounded = cp(weight, 60, slack=1.005)
    assert free.error < bounded.error <= 1.005 * free.error * (1 + 1e-9)
    assert sensitivity(bounded.factors) < 0.8 * sensitivity(free.factors)
    assert bounded.max_component_norm < 0.8 * free.max_component_norm


def test_terms_of_a_border_rank_tensor_stay_bounded() -> None:
    tensor = np.zeros((2, 2, 2))
    tensor[0, 0, 1] = tensor[0, 1, 0] = tensor[1, 0, 0] = 1  # rank 3, but limits of rank 2 reach it
    free = cp_tensor(tensor, 2, iterations=1000, tolerance=0, slack=1)
    bounded = cp_tensor(tensor, 2, iterations=1000, tolerance=0, slack=5)
    assert free.max_component_norm > 2  # diverging terms that cancel
    assert bounded.error <= 5 * free.error * (1 + 1e-9)
    assert bounded.max_component_norm < 0.6 * free.max_component_norm


def test_sensitivity_is_the_expected_change_under_noise() -> None:
    rng = np.random.default_rng(0)
    factors = [rng.standard_normal((length, 3)) for length in (4, 3, 5)]
    clean = factors[0] @ khatri_rao(factors[1:]).T
    changes = []
    for _ in range(4000):
        noisy = [factor + 1e-4 * rng.standard_normal(factor.shape) for factor in factors]
        changes.append(np.sum((noisy[0] @ khatri_rao(noisy[1:]).T - clean) ** 2) / 1e-8)
    assert np.mean(changes) == pytest.approx(sensitivity(factors), rel=0.05)


def test_what_does_not_fit_is_told() -> None:
    with pytest.raises(ValueError, match="rank of a CP must be >= 1, got 0"):
        cp(np.ones((2, 2, 2)), 0)
    with pytest.raises(ValueError, match=r"slack must be >= 1, got 0\.5"):
        cp(np.ones((2, 2, 2)), 1, slack=0.5)
