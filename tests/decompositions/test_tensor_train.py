"""Tensor trains: the promised error, against TensorLy, and as chains of convolutions."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import tensorly
from hypothesis import given, settings
from numpy.typing import NDArray
from tensorly.decomposition import tensor_train as tensorly_train

from lowrank_onnx.decompositions.tensor_train import (
    chain_weight,
    tensor_train,
    tt_convolution,
    tt_matrix,
    tt_matrix_to_dense,
    tt_to_tensor,
)
from lowrank_onnx.decompositions.tucker import tucker2

Array = NDArray[Any]
MakeWeight = Callable[[str, tuple[int, ...], int], Array]

KINDS = st.sampled_from(["random", "zeros", "constant", "one channel", "rank one"])
SHAPES = st.lists(st.integers(1, 5), min_size=2, max_size=5).map(tuple)
steady = settings(deadline=None, max_examples=40, derandomize=True)


def relative(measured: Array, expected: Array) -> float:
    norm = np.linalg.norm(expected)
    return float(np.linalg.norm(measured - expected) / norm) if norm else float(np.linalg.norm(measured))


@given(KINDS, SHAPES, st.integers(0, 9), st.floats(0, 1))
@steady
def test_error_stays_below_epsilon(
    make_weight: MakeWeight, kind: str, shape: tuple[int, ...], seed: int, epsilon: float
) -> None:
    tensor = make_weight(kind, shape, seed)
    cores = tensor_train(tensor, epsilon=epsilon)
    assert [core.shape[1] for core in cores] == list(shape)
    assert all(left.shape[2] == right.shape[0] for left, right in itertools.pairwise(cores))
    assert relative(tt_to_tensor(cores), tensor) <= epsilon + 1e-13
    exact = tensor_train(tensor)
    assert relative(tt_to_tensor(exact), tensor) < 1e-10
    again = tensor_train(tensor.copy(), epsilon=epsilon)
    assert all(np.array_equal(one, other) for one, other in zip(cores, again, strict=True))
    if kind in ("constant", "zeros"):
        assert all(core.shape[0] == 1 for core in exact)


def test_a_looser_error_gives_smaller_ranks() -> None:
    tensor = np.random.default_rng(0).standard_normal((6, 5, 4, 6))
    sizes = [sum(core.size for core in tensor_train(tensor, epsilon=epsilon)) for epsilon in (0.1, 0.4, 0.8)]
    assert sizes[0] > sizes[1] > sizes[2]


def test_agrees_with_tensorly() -> None:
    tensor = np.random.default_rng(0).standard_normal((6, 5, 4, 6))
    theirs = tensorly.tt_to_tensor(tensorly_train(tensorly.tensor(tensor), rank=[1, 3, 5, 2, 1]))
    assert relative(tt_to_tensor(tensor_train(tensor, [3, 5, 2])), theirs) < 1e-10


def test_two_axes_are_the_svd() -> None:
    matrix = np.random.default_rng(0).standard_normal((7, 5))
    sigma = np.linalg.svd(matrix, compute_uv=False)
    error = relative(tt_to_tensor(tensor_train(matrix, 2)), matrix)
    assert error == pytest.approx(np.linalg.norm(sigma[2:]) / np.linalg.norm(sigma))


@given(st.integers(0, 9), st.data())
@steady
def test_matrix_trains(seed: int, data: st.DataObject) -> None:
    digits = data.draw(st.integers(2, 3))
    rows, columns = (data.draw(st.tuples(*[st.integers(1, 4)] * digits)) for _ in range(2))
    weight = np.random.default_rng(seed).standard_normal((int(np.prod(rows)), int(np.prod(columns))))
    cores = tt_matrix(weight, rows, columns)
    assert [core.shape[1:3] for core in cores] == list(zip(rows, columns, strict=True))
    assert relative(tt_matrix_to_dense(cores), weight) < 1e-10
    # A row vector through the train, digit by digit, as a runtime would.
    x: Array = np.asarray(np.random.default_rng(seed + 1).standard_normal((weight.shape[0],)))
    state: Array = x.reshape(1, *rows, 1)  # (n so far, m_k ... m_d, r)
    for core in cores:
        product: Array = np.asarray(np.tensordot(state, core, axes=((1, state.ndim - 1), (1, 0))))
        moved = np.moveaxis(product, -2, 1)
        state = moved.reshape(-1, *moved.shape[2:])  # (n · n_k, m_{k+1} ..., r)
    assert relative(state.ravel(), x @ weight) < 1e-10


def test_kronecker_products_have_rank_one() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((3, 4)), rng.standard_normal((2, 5))
    cores = tt_matrix(np.kron(a, b), (3, 2), (4, 5))
    assert cores[0].shape == (1, 3, 4, 1)
    assert relative(tt_matrix_to_dense(cores), np.kron(a, b)) < 1e-12


@pytest.mark.parametrize("shape", [(6, 5, 3), (6, 5, 3, 2), (5, 4, 2, 3, 2)])
@pytest.mark.parametrize("split", [False, True])
def test_convolution_chain(shape: tuple[int, ...], split: bool) -> None:
    weight = np.random.default_rng(0).standard_normal(shape)
    exact = tt_convolution(weight, split_kernel=split)
    assert len(exact) == 2 + (len(shape) - 2 if split else 1)
    assert relative(chain_weight(exact), weight) < 1e-10
    assert relative(chain_weight(tt_convolution(weight, epsilon=0.4, split_kernel=split)), weight) <= 0.4
    chain = tt_convolution(weight, ranks=3, split_kernel=split)
    assert chain[0].shape == (3, shape[1], *[1] * (len(shape) - 2))
    assert chain[-1].shape == (shape[0], 3, *[1] * (len(shape) - 2))
    for index in np.ndindex(shape[2:]):
        matrix = np.eye(shape[1])
        for one in chain:
            matrix = one[(slice(None), slice(None), *np.minimum(index, np.array(one.shape[2:]) - 1))] @ matrix
        assert np.allclose(matrix, chain_weight(chain)[(slice(None), slice(None), *index)], atol=1e-12)


def test_whole_kernel_is_tucker_which_is_no_worse() -> None:
    weight = np.random.default_rng(0).standard_normal((8, 7, 3, 3))
    chain = tt_convolution(weight, ranks=(4, 5))
    error = relative(chain_weight(chain), weight)
    best = tucker2(weight, (5, 4), sweeps=100)
    assert best.error <= error <= np.sqrt(2) * best.error
    assert chain[1].shape == best.core.shape


def test_what_does_not_fit_is_told() -> None:
    with pytest.raises(ValueError, match="ranks or epsilon, not both"):
        tensor_train(np.ones((2, 2)), 1, 0.1)
    with pytest.raises(ValueError, match=r"expected 2 bond ranks >= 1, got \[1\]"):
        tensor_train(np.ones((2, 2, 2)), [1])
    with pytest.raises(ValueError, match=r"a matrix \(6, 6\) cannot be split"):
        tt_matrix(np.ones((6, 6)), (2, 3), (2, 2))
