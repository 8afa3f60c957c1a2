"""Separable convolutions: against SVD by hand, against simulated outputs, and against one another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from numpy.typing import NDArray

from lowrank_onnx.decompositions import separable as module
from lowrank_onnx.decompositions.output_metric import layer_output
from lowrank_onnx.decompositions.separable import (
    Separable,
    full_rank,
    separable,
    separable_als,
)

Array = NDArray[Any]
MakeWeight = Callable[[str, tuple[int, ...], int], Array]
MakePatches = Callable[[int, int, int], Array]

KINDS = st.sampled_from(["random", "zeros", "constant", "one channel", "rank one"])
SHAPES = st.one_of(
    st.tuples(*[st.integers(1, 5)] * 2, st.integers(1, 4)),
    st.tuples(*[st.integers(1, 5)] * 2, *[st.integers(1, 3)] * 2),
    st.tuples(*[st.integers(1, 4)] * 2, *[st.integers(1, 2)] * 3),
)
steady = settings(deadline=None, max_examples=30, derandomize=True)


def relative(measured: Array, expected: Array) -> float:
    norm = np.linalg.norm(expected)
    return float(np.linalg.norm(measured - expected) / norm) if norm else float(np.linalg.norm(measured))


def convolve(x: Array, weight: Array) -> Array:
    """Valid 2-D cross-correlation of x (I, h, w), written with loops over the kernel."""
    kh, kw = weight.shape[2:]
    h, w = x.shape[1] - kh + 1, x.shape[2] - kw + 1
    out = np.zeros((len(weight), h, w))
    for a in range(kh):
        for b in range(kw):
            out += np.einsum("oi,ihw->ohw", weight[:, :, a, b], x[:, a : a + h, b : b + w])
    return out


def simulated(factors: Separable, x: Array, y: Array) -> float:
    """Relative error of the factors' output on patches x (N, F) against y (N, O)."""
    return relative(x @ factors.weight().reshape(len(factors.second), -1).T, y)


@pytest.mark.parametrize("axis", [0, 1])
def test_two_convolutions_answer_as_their_product(axis: int) -> None:
    rng = np.random.default_rng(0)
    weight, x = rng.standard_normal((5, 4, 3, 2)), rng.standard_normal((4, 8, 9))
    factors = separable(weight, 3, axis)
    kernel = (3, 1) if axis == 0 else (1, 2)
    assert factors.first.shape == (3, 4, *kernel)
    assert factors.second.shape == (5, 3, *(max(3 - kernel[0] + 1, 1), max(2 - kernel[1] + 1, 1)))
    chained = convolve(convolve(x, factors.first), factors.second)
    assert relative(chained, convolve(x, factors.weight())) < 1e-12


def test_agrees_with_the_svd_of_the_matrix_written_out() -> None:
    weight = np.random.default_rng(0).standard_normal((5, 4, 3, 2))
    matrix = weight.transpose(1, 2, 0, 3).reshape(12, 10)  # [(i, a), (o, b)]
    u, s, vt = np.linalg.svd(matrix)
    best = ((u[:, :4] * s[:4]) @ vt[:4]).reshape(4, 3, 5, 2).transpose(2, 0, 1, 3)
    factors = separable(weight, 4)
    assert relative(factors.weight(), best) < 1e-12
    assert factors.error == pytest.approx(relative(best, weight), rel=1e-10)


@given(KINDS, SHAPES, st.integers(0, 9), st.data())
@steady
def test_error_is_measured_and_full_rank_is_exact(
    make_weight: MakeWeight, kind: str, shape: tuple[int, ...], seed: int, data: st.DataObject
) -> None:
    weight = make_weight(kind, shape, seed)
    dimensions = range(len(shape) - 2)
    axis = data.draw(st.sets(st.sampled_from(dimensions)).map(tuple))
    full = full_rank(weight, axis)
    rank = data.draw(st.integers(1, full))
    factors = separable(weight, rank, axis)
    assert relative(factors.weight(), weight) == pytest.approx(factors.error, abs=1e-10)
    assert relative(separable(weight, full, axis).weight(), weight) < 1e-10
    again = separable(weight.copy(), rank, axis)
    assert np.array_equal(factors.first, again.first) and np.array_equal(factors.second, again.second)


@given(KINDS, st.tuples(*[st.integers(1, 4)] * 2, *[st.integers(1, 3)] * 2), st.integers(0, 9), st.data())
@steady
def test_data_aware_error_is_simulated_error_and_beats_weight_only(
    make_weight: MakeWeight,
    make_patches: MakePatches,
    kind: str,
    shape: tuple[int, ...],
    seed: int,
    data: st.DataObject,
) -> None:
    weight = make_weight(kind, shape, seed)
    features = weight[0].size
    x = make_patches(features, data.draw(st.sampled_from([3, 200])), seed)  # 3 samples: a singular gram
    gram = x.T @ x / len(x)
    y = x @ weight.reshape(len(weight), -1).T
    axis = data.draw(st.sampled_from([0, 1]))
    rank = data.draw(st.integers(1, full_rank(weight, axis)))
    factors = separable_als(weight, rank, gram, axis, sweeps=3, ridge=0)
    assert simulated(factors, x, y) == pytest.approx(factors.error, abs=1e-6)
    assert factors.error <= simulated(separable(weight, rank, axis), x, y) + 1e-7
    assert all(after <= before + 1e-7 for before, after in zip(factors.history, factors.history[1:], strict=False))
    full = separable_als(weight, full_rank(weight, axis), gram, axis, sweeps=1, ridge=0)
    assert relative(full.weight(), weight) < 1e-10


@pytest.mark.parametrize("unknowns", [0, 10**6], ids=["conjugate gradients", "direct"])
@pytest.mark.parametrize("axis", [0, 1])
def test_sweeps_lower_the_error(
    make_patches: MakePatches, monkeypatch: pytest.MonkeyPatch, unknowns: int, axis: int
) -> None:
    monkeypatch.setattr(module, "DIRECT_UNKNOWNS", unknowns)
    weight = np.random.default_rng(0).standard_normal((8, 6, 3, 3))
    x = make_patches(54, 2000, 0)
    gram = x.T @ x / len(x)
    factors = separable_als(weight, 6, gram, axis, sweeps=8, ridge=0, tolerance=0)
    assert len(factors.history) == 9
    assert np.all(np.diff(factors.history) < 1e-12)
    assert factors.history[-1] < 0.97 * factors.history[0]
    assert factors.history[0] < simulated(separable(weight, 6, axis), x, x @ weight.reshape(8, -1).T)


def test_conjugate_gradients_reach_the_direct_solution(
    make_patches: MakePatches, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = np.random.default_rng(0).standard_normal((8, 6, 3, 3))
    x = make_patches(54, 2000, 0)
    gram = x.T @ x / len(x)
    errors = []
    for unknowns in (0, 10**6):
        monkeypatch.setattr(module, "DIRECT_UNKNOWNS", unknowns)
        errors.append(separable_als(weight, 6, gram, sweeps=10, tolerance=0).error)
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


def test_ridged_error_never_rises(make_patches: MakePatches) -> None:
    weight = np.random.default_rng(0).standard_normal((6, 5, 3, 3))
    matrix = weight.reshape(6, -1)
    x = make_patches(45, 60, 0)
    gram = x.T @ x / len(x)
    ridged = gram + 0.1 * np.trace(gram) / 45 * np.eye(45)
    errors = []
    for sweeps in range(5):
        lost = separable_als(weight, 5, gram, sweeps=sweeps, ridge=0.1, tolerance=0).weight().reshape(6, -1) - matrix
        errors.append(np.trace(lost @ ridged @ lost.T))
    assert np.all(np.diff(errors) < 0)


@pytest.mark.parametrize("unknowns", [0, 10**6], ids=["conjugate gradients", "direct"])
def test_nothing_is_wanted(make_patches: MakePatches, monkeypatch: pytest.MonkeyPatch, unknowns: int) -> None:
    monkeypatch.setattr(module, "DIRECT_UNKNOWNS", unknowns)
    x = make_patches(12, 100, 0)
    start = separable(np.random.default_rng(0).standard_normal((4, 3, 2, 2)), 3)
    start = dataclasses.replace(start, second=np.zeros_like(start.second))
    made = separable_als(np.zeros((4, 3, 2, 2)), 3, x.T @ x, start=start)
    assert made.error == 0 and not made.second.any() and np.isfinite(made.first).all()


def test_no_other_factors_nearby_are_better(make_patches: MakePatches) -> None:
    weight = np.random.default_rng(0).standard_normal((4, 3, 2, 2))
    x = make_patches(12, 500, 0)
    output = layer_output(weight, x.T @ x / len(x))
    best = separable_als(weight, 3, output.gram, sweeps=200, ridge=0, tolerance=1e-12)
    rng = np.random.default_rng(1)
    for _ in range(20):
        moved = Separable(
            best.first + 1e-3 * rng.standard_normal(best.first.shape),
            best.second + 1e-3 * rng.standard_normal(best.second.shape),
            0.0,
        )
        assert output.error(moved.weight().reshape(4, -1)) > best.error


def test_from_other_inputs_the_original_output_is_matched(make_patches: MakePatches) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((8, 4, 3, 3))
    x = make_patches(36, 3000, 0)
    delivered = x @ (np.eye(36) + 0.1 * rng.standard_normal((36, 36))) + 0.1 * rng.standard_normal(x.shape)
    delivered -= delivered.mean(axis=0)
    y = x @ weight.reshape(8, -1).T
    gram, cross, energy = delivered.T @ delivered / 3000, y.T @ delivered / 3000, float(np.vdot(y, y)) / 3000
    aware = separable_als(weight, 8, gram, ridge=0, cross=cross, energy=energy)
    blind = separable_als(weight, 8, gram, ridge=0)
    assert simulated(aware, delivered, y) == pytest.approx(aware.error, rel=1e-8)
    assert aware.error < 0.9 * simulated(blind, delivered, y)
    # At full rank nothing but least squares is left.
    full = separable_als(weight, 12, gram, ridge=0, cross=cross, energy=energy)
    fitted = delivered @ np.linalg.lstsq(delivered, y, rcond=None)[0]
    assert full.error == pytest.approx(relative(fitted, y), rel=1e-8)


def test_the_same_streams_are_a_special_case(make_patches: MakePatches) -> None:
    weight = np.random.default_rng(0).standard_normal((6, 3, 3, 2))
    x = make_patches(18, 400, 0)
    output = layer_output(weight, x.T @ x / len(x))
    given_cross = separable_als(weight, 4, output.gram, cross=output.weight @ output.gram, energy=output.energy)
    assert relative(given_cross.weight(), separable_als(weight, 4, output.gram).weight()) < 1e-6


def test_all_of_the_kernel_first_is_a_closed_form(make_patches: MakePatches) -> None:
    weight = np.random.default_rng(0).standard_normal((8, 6, 2, 2))
    x = make_patches(24, 2000, 0)
    sigma = np.linalg.svd(x @ weight.reshape(8, -1).T, compute_uv=False)  # the best rank of the output itself
    swept = separable_als(weight, 3, x.T @ x / len(x), axis=(0, 1), ridge=0)
    assert swept.error == pytest.approx(np.linalg.norm(sigma[3:]) / np.linalg.norm(sigma), rel=1e-9)


def test_half_precision_in_double_out(make_patches: MakePatches) -> None:
    weight = np.random.default_rng(0).standard_normal((4, 3, 2, 2)).astype(np.float16)
    x = make_patches(12, 100, 0)
    assert separable(weight, 3).first.dtype == np.float64
    assert separable_als(weight, 3, (x.T @ x).astype(np.float32)).second.dtype == np.float64


def test_start_survives_a_pooled_covariance_that_misleads() -> None:
    rng = np.random.default_rng(12)
    weight, patches = rng.standard_normal((3, 2, 2, 2)), rng.standard_normal((50, 2, 2, 2))
    patches[..., 1] = 0.2 * patches[..., 1] - patches[..., 0]  # neighbours cancel; one covariance hides it
    x = patches.reshape(50, 8)
    y = x @ weight.reshape(3, -1).T
    factors = separable_als(weight, 2, x.T @ x / 50, sweeps=0, ridge=0)
    assert factors.error <= simulated(separable(weight, 2), x, y)


def test_what_does_not_fit_is_told() -> None:
    weight = np.ones((4, 3, 2, 2))
    with pytest.raises(ValueError, match=r"rank of a separable .* must be in 1..6, got 7"):
        separable(weight, 7)
    with pytest.raises(ValueError, match=r"kernel axes in 0\.\.1 once each, got 2"):
        separable(weight, 1, axis=2)
    with pytest.raises(ValueError, match=r"needs a patch gram \(12, 12\), got \(3, 3\)"):
        separable_als(weight, 1, np.eye(3))
    with pytest.raises(ValueError, match="belong together"):
        separable_als(weight, 1, np.eye(12), cross=np.ones((4, 12)))
    with pytest.raises(ValueError, match="2 values that are not finite"):
        separable(np.array([[[1.0, np.nan, np.inf]]]), 1)
