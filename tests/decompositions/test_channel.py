"""Channel splits: optimal in their metric, against brute truth, and exact at full rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from numpy.typing import NDArray

from lowrank_onnx.decompositions.channel import input_channel, output_channel
from lowrank_onnx.decompositions.separable import refit_second, separable, separable_als

Array = NDArray[Any]
MakeWeight = Callable[[str, tuple[int, ...], int], Array]
MakePatches = Callable[[int, int, int], Array]

KINDS = st.sampled_from(["random", "zeros", "constant", "one channel", "rank one"])
SHAPES = st.one_of(
    st.tuples(*[st.integers(1, 6)] * 2, st.integers(1, 4)),
    st.tuples(*[st.integers(1, 6)] * 2, *[st.integers(1, 3)] * 2),
)
steady = settings(deadline=None, max_examples=30, derandomize=True)


def relative(measured: Array, expected: Array) -> float:
    norm = np.linalg.norm(expected)
    return float(np.linalg.norm(measured - expected) / norm) if norm else float(np.linalg.norm(measured))


@given(KINDS, SHAPES, st.integers(0, 9), st.sampled_from([3, 200]), st.data())
@steady
def test_output_channel(
    make_weight: MakeWeight,
    make_patches: MakePatches,
    kind: str,
    shape: tuple[int, ...],
    seed: int,
    samples: int,
    data: st.DataObject,
) -> None:
    weight = make_weight(kind, shape, seed)
    full = min(len(weight), weight[0].size)
    rank = data.draw(st.integers(1, full))
    x = make_patches(weight[0].size, samples, seed)
    y = x @ weight.reshape(len(weight), -1).T
    plain = output_channel(weight, rank)
    assert relative(plain.weight(), weight) == pytest.approx(plain.error, abs=1e-10)
    aware = output_channel(weight, rank, y.T @ y / samples)
    assert aware.first.shape == (rank, *weight.shape[1:])
    assert aware.second.shape == (len(weight), rank, *[1] * (weight.ndim - 2))

    def simulated(approximation: Array) -> float:
        return relative(x @ approximation.reshape(len(weight), -1).T, y)

    assert simulated(aware.weight()) == pytest.approx(aware.error, abs=1e-6)
    assert aware.error <= simulated(plain.weight()) + 1e-7
    # Eckart-Young on the output itself.
    sigma = np.linalg.svd(y, compute_uv=False)
    tail = np.linalg.norm(sigma[rank:]) / np.linalg.norm(sigma) if np.linalg.norm(sigma) else 0.0
    assert aware.error == pytest.approx(tail, abs=1e-6)
    assert relative(output_channel(weight, full, y.T @ y / samples).weight(), weight) < 1e-10
    assert relative(output_channel(weight, full).weight(), weight) < 1e-10
    again = output_channel(weight.copy(), rank, y.T @ y / samples)
    assert np.array_equal(aware.first, again.first) and np.array_equal(aware.second, again.second)


@given(KINDS, SHAPES, st.integers(0, 9), st.sampled_from([3, 200]), st.data())
@steady
def test_input_channel(
    make_weight: MakeWeight,
    make_patches: MakePatches,
    kind: str,
    shape: tuple[int, ...],
    seed: int,
    samples: int,
    data: st.DataObject,
) -> None:
    weight = make_weight(kind, shape, seed)
    inputs, positions = shape[1], weight[0, 0].size
    full = min(inputs, len(weight) * positions)
    rank = data.draw(st.integers(1, full))
    # One sample per position under the kernel, uncorrelated: position by position the same covariance.
    x = make_patches(inputs, samples, seed)
    aware = input_channel(weight, rank, x.T @ x / samples)
    plain = input_channel(weight, rank)
    assert aware.first.shape == (rank, inputs, *[1] * (weight.ndim - 2))
    assert aware.second.shape == (len(weight), rank, *shape[2:])

    def outputs(approximation: Array) -> Array:
        return np.asarray(np.einsum("ni,oik->nok", x, approximation.reshape(len(weight), inputs, positions)))

    expected = outputs(weight)
    assert relative(plain.weight(), weight) == pytest.approx(plain.error, abs=1e-10)
    assert relative(outputs(aware.weight()), expected) == pytest.approx(aware.error, abs=1e-6)
    assert aware.error <= relative(outputs(plain.weight()), expected) + 1e-7
    assert relative(input_channel(weight, full, x.T @ x / samples).weight(), weight) < 1e-10
    assert relative(input_channel(weight, full).weight(), weight) < 1e-10


def test_without_data_both_are_the_separable_split() -> None:
    weight = np.random.default_rng(0).standard_normal((6, 5, 3, 2))
    assert relative(output_channel(weight, 3).weight(), separable(weight, 3, (0, 1)).weight()) < 1e-10
    assert relative(input_channel(weight, 3).weight(), separable(weight, 3, ()).weight()) < 1e-10


def test_order_on_real_patches_whitened_then_refit_then_alternating(make_patches: MakePatches) -> None:
    weight = np.random.default_rng(0).standard_normal((8, 6, 2, 2))
    x = make_patches(24, 2000, 0)
    y = x @ weight.reshape(8, -1).T
    gram = x.T @ x / len(x)
    channels = np.einsum("ikjk->ij", gram.reshape(6, 4, 6, 4)) / 4
    whitened = input_channel(weight, 3, channels)
    refit = refit_second(whitened, weight, gram, ridge=0)
    swept = separable_als(weight, 3, gram, axis=(), ridge=0)
    plain = relative(x @ whitened.weight().reshape(8, -1).T, y)
    assert swept.error <= refit.error <= plain
    # k x k then 1 x 1 is a closed form: alternating cannot improve on it.
    best = output_channel(weight, 3, y.T @ y / len(x))
    assert separable_als(weight, 3, gram, axis=(0, 1), ridge=0).error == pytest.approx(best.error, rel=1e-9)
    assert refit_second(best, weight, gram, ridge=0).error == pytest.approx(best.error, rel=1e-9)


def test_what_does_not_fit_is_told() -> None:
    weight = np.ones((4, 3, 2, 2))
    with pytest.raises(ValueError, match=r"must be in 1..4, got 5"):
        output_channel(weight, 5)
    with pytest.raises(ValueError, match=r"expected a channel covariance of shape \(3, 3\), got \(4, 4\)"):
        input_channel(weight, 1, np.eye(4))
