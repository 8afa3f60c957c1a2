"""Tucker-2: against TensorLy, against the HOSVD table, and against simulated outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.linalg
import tensorly
from hypothesis import given, settings
from numpy.typing import NDArray
from tensorly.decomposition import partial_tucker

from lowrank_onnx.decompositions.tucker import Tucker2, refit_output, refit_tucker2, tucker2

Array = NDArray[Any]
MakeWeight = Callable[[str, tuple[int, ...], int], Array]
MakePatches = Callable[[int, int, int], Array]

KINDS = st.sampled_from(["random", "zeros", "constant", "one channel", "rank one"])
SHAPES = st.one_of(
    st.tuples(*[st.integers(1, 6)] * 2, st.integers(1, 4)),
    st.tuples(*[st.integers(1, 6)] * 2, *[st.integers(1, 3)] * 2),
    st.tuples(*[st.integers(1, 4)] * 2, *[st.integers(1, 2)] * 3),
)
steady = settings(deadline=None, max_examples=30, derandomize=True)


def relative(measured: Array, expected: Array) -> float:
    norm = np.linalg.norm(expected)
    return float(np.linalg.norm(measured - expected) / norm) if norm else float(np.linalg.norm(measured))


def simulated(factors: Tucker2, x: Array, y: Array) -> float:
    return relative(x @ factors.weight().reshape(y.shape[1], -1).T, y)


def test_agrees_with_tensorly() -> None:
    weight = np.random.default_rng(0).standard_normal((12, 10, 3, 3))
    (core, (u, v)), _ = partial_tucker(tensorly.tensor(weight), rank=[5, 4], modes=[0, 1], n_iter_max=200, tol=1e-10)
    expected = np.einsum("pqab,op,iq->oiab", core, u, v)
    ours = tucker2(weight, (5, 4), sweeps=200, tolerance=1e-12)
    assert ours.error == pytest.approx(relative(expected, weight), rel=1e-4)
    assert relative(ours.weight(), weight) == pytest.approx(ours.error, rel=1e-10)
    assert ours.output_factor is not None and ours.input_factor is not None
    assert (ours.output_factor.shape, ours.core.shape, ours.input_factor.shape) == ((12, 5), (5, 4, 3, 3), (4, 10))


@given(KINDS, SHAPES, st.integers(0, 9), st.data())
@steady
def test_error_is_measured_and_full_rank_is_exact(
    make_weight: MakeWeight, kind: str, shape: tuple[int, ...], seed: int, data: st.DataObject
) -> None:
    weight = make_weight(kind, shape, seed)
    ranks = data.draw(st.tuples(st.integers(1, shape[0]), st.integers(1, shape[1])))
    factors = tucker2(weight, ranks)
    assert relative(factors.weight(), weight) == pytest.approx(factors.error, abs=1e-10)
    assert (factors.output_factor is None) == (ranks[0] == shape[0])
    assert (factors.input_factor is None) == (ranks[1] == shape[1])
    bound = tucker2(weight, ranks, sweeps=0).error  # the truncated HOSVD
    assert bound / np.sqrt(2) - 1e-7 <= factors.error <= bound + 1e-7
    full = tucker2(weight, (shape[0], shape[1]))
    assert np.array_equal(full.core, weight)
    for one_side in ((shape[0], ranks[1]), (ranks[0], shape[1])):
        factors = tucker2(weight, one_side)
        assert relative(factors.weight(), weight) == pytest.approx(factors.error, abs=1e-10)
    again = tucker2(weight.copy(), one_side)
    assert np.array_equal(factors.core, again.core)


def test_iteration_improves_on_the_hosvd() -> None:
    weight = np.random.default_rng(0).standard_normal((16, 12, 3, 3))
    errors = [tucker2(weight, (6, 5), sweeps=sweeps, tolerance=0).error for sweeps in range(6)]
    assert np.all(np.diff(errors) < 0)


@given(KINDS, SHAPES, st.integers(0, 9), st.sampled_from([3, 200]), st.data())
@steady
def test_in_the_metric_of_the_input(
    make_weight: MakeWeight,
    make_patches: MakePatches,
    kind: str,
    shape: tuple[int, ...],
    seed: int,
    samples: int,
    data: st.DataObject,
) -> None:
    weight = make_weight(kind, shape, seed)
    outputs, inputs = shape[:2]
    ranks = data.draw(st.tuples(st.integers(1, outputs), st.integers(1, inputs)))
    # Positions under the kernel share a covariance and are uncorrelated: the output error is the metric's.
    x = make_patches(inputs, samples, seed)

    def responses(approximation: Array) -> Array:
        return np.asarray(np.einsum("ni,oik->nok", x, approximation.reshape(outputs, inputs, -1)))

    aware = tucker2(weight, ranks, input_metric=x.T @ x / samples)
    expected = responses(weight)
    norm = float(np.linalg.norm(expected)) / np.sqrt(samples)
    # The ridge is 1e-9 of the variance: 3e-5 of the weight in amplitude.
    slack = 1e-4 * (1 + float(np.linalg.norm(weight)) / norm) if norm > 1e-9 else np.inf
    assert relative(responses(aware.weight()), expected) == pytest.approx(aware.error, abs=slack)
    assert aware.error <= relative(responses(tucker2(weight, ranks).weight()), expected) + slack
    full = tucker2(weight, (outputs, inputs), input_metric=x.T @ x / samples)
    assert relative(full.weight(), weight) < 1e-10


def test_metric_pays(make_patches: MakePatches) -> None:
    weight = np.random.default_rng(0).standard_normal((10, 8, 3, 3))
    x = make_patches(8, 500, 0)
    cov = x.T @ x / 500
    root = scipy.linalg.sqrtm(cov)

    def error(factors: Tucker2) -> float:
        return relative(np.einsum("oikl,ij->ojkl", factors.weight(), root), np.einsum("oikl,ij->ojkl", weight, root))

    aware = tucker2(weight, (5, 3), input_metric=cov)
    assert aware.error == pytest.approx(error(aware), rel=1e-6)
    assert aware.error < 0.9 * error(tucker2(weight, (5, 3)))


def test_metric_never_costs_even_where_its_own_start_ends_badly() -> None:
    rng = np.random.default_rng(33)
    weight, samples = rng.standard_normal((4, 4, 3)), rng.standard_normal((30, 4)) * [1, 1, 1.3, 1.3]
    cov = samples.T @ samples / 30
    root = scipy.linalg.cholesky(cov, lower=True)
    expected = np.einsum("oik,ij->ojk", weight, root)
    plain = np.einsum("oik,ij->ojk", tucker2(weight, (1, 1)).weight(), root)
    assert tucker2(weight, (1, 1), input_metric=cov).error <= relative(plain, expected)


def test_refit_output_is_ridge_regression_and_its_best_truncation(make_patches: MakePatches) -> None:
    rng = np.random.default_rng(0)
    z, mapping = make_patches(9, 400, 0), rng.standard_normal((9, 6))
    y = z @ mapping + rng.standard_normal((400, 6))
    y -= y.mean(axis=0)
    gram, cross = z.T @ z / 400, z.T @ y / 400
    plain, none = refit_output(gram, cross, ridge=0)
    assert none is None
    assert relative(plain.T, np.linalg.lstsq(z, y, rcond=None)[0]) < 1e-9
    ridged, _ = refit_output(gram, cross, ridge=0.1)
    shift = 0.1 * np.trace(gram) / 9
    assert relative(ridged.T, np.linalg.solve(gram + shift * np.eye(9), cross)) < 1e-9
    first, second = refit_output(gram, cross, 2, ridge=0)
    assert second is not None and first.shape == (2, 9) and second.shape == (6, 2)
    fitted = z @ plain.T
    u, s, vt = np.linalg.svd(fitted, full_matrices=False)
    assert relative(z @ (second @ first).T, (u[:, :2] * s[:2]) @ vt[:2]) < 1e-9


def test_refit_is_least_squares_behind_the_input_factor(make_patches: MakePatches) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((7, 5, 2, 2))
    x = make_patches(20, 600, 0)
    y = x @ weight.reshape(7, -1).T
    gram = x.T @ x / 600
    channels = np.einsum("ikjk->ij", gram.reshape(5, 4, 5, 4)) / 4
    factors = tucker2(weight, (3, 2), input_metric=channels)
    fitted = refit_tucker2(factors, weight, gram, ridge=0)
    assert factors.input_factor is not None
    z = np.einsum("nik,qi->nqk", x.reshape(600, 5, 4), factors.input_factor).reshape(600, -1)
    full = z @ np.linalg.lstsq(z, y, rcond=None)[0]
    u, s, vt = np.linalg.svd(full, full_matrices=False)
    best = (u[:, :3] * s[:3]) @ vt[:3]
    assert fitted.error == pytest.approx(relative(best, y), rel=1e-8)
    assert simulated(fitted, x, y) == pytest.approx(fitted.error, rel=1e-9)
    assert fitted.error < simulated(factors, x, y) < simulated(tucker2(weight, (3, 2)), x, y)
    # From other inputs, against the original output.
    delivered = x @ (np.eye(20) + 0.1 * rng.standard_normal((20, 20)))
    moments = {"cross": y.T @ delivered / 600, "energy": float(np.vdot(y, y)) / 600}
    moved = refit_tucker2(factors, weight, delivered.T @ delivered / 600, ridge=0, **moments)  # type: ignore[arg-type]
    assert simulated(moved, delivered, y) == pytest.approx(moved.error, rel=1e-8)
    assert moved.error < simulated(fitted, delivered, y)


@pytest.mark.parametrize("ranks", [(7, 2), (3, 5), (6, 1), (7, 5)])
def test_refit_keeps_dropped_sides_dropped(make_patches: MakePatches, ranks: tuple[int, int]) -> None:
    weight = np.random.default_rng(0).standard_normal((7, 5, 2, 2))
    x = make_patches(20, 600, 0)
    factors = tucker2(weight, ranks)
    fitted = refit_tucker2(factors, weight, x.T @ x / 600, ridge=0)
    assert fitted.weight().shape == weight.shape
    assert (fitted.input_factor is None) == (ranks[1] == 5)
    assert fitted.output_factor is None or ranks[0] == 3
    assert fitted.error <= simulated(factors, x, x @ weight.reshape(7, -1).T) + 1e-7


def test_what_does_not_fit_is_told() -> None:
    weight = np.ones((4, 3, 2))
    with pytest.raises(ValueError, match=r"output rank must be in 1..4, got 5"):
        tucker2(weight, (5, 1))
    with pytest.raises(ValueError, match=r"expected an input metric of shape \(3, 3\), got \(4, 4\)"):
        tucker2(weight, (1, 1), input_metric=np.eye(4))
    with pytest.raises(ValueError, match=r"expected a cross moment \(6, O\), got \(4, 6\)"):
        refit_output(np.eye(6), np.ones((4, 6)))
