"""Tensor trains: a tensor as a chain of cores, each bond cut by a truncated SVD.

    T[i, j, ..., l] ≈ G1[0, i, :] · G2[:, j, :] · ... · Gd[:, l, 0]

A core is (r_{k-1}, n_k, r_k) with r_0 = r_d = 1. A matrix (m, n) becomes a train of cores
(r_{k-1}, m_k, n_k, r_k), and a convolution a chain of smaller ones. Source of the algorithms and of the bound:
Oseledets 2011, doi:10.1137/090752286; matrices: Novikov et al. 2015, arXiv:1509.06569.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from lowrank_onnx.decompositions.output_metric import checked_weight
from lowrank_onnx.linalg import Array, finite_svd


def tensor_train(tensor: Array, ranks: int | Sequence[int] | None = None, epsilon: float | None = None) -> list[Array]:
    """Tensor train by one sweep of SVDs (TT-SVD).

    Args:
        tensor: (n_1, ..., n_d), d ≥ 2, finite.
        ranks: Largest bond ranks r_1 ... r_{d-1}, or one for all; bonds that need less get less.
        epsilon: Largest relative Frobenius error. Give ranks or epsilon, or neither for the exact train.

    Returns:
        Cores (r_{k-1}, n_k, r_k); all but the last have orthonormal columns as (r_{k-1}·n_k, r_k).
        With epsilon, ``|T - train| ≤ epsilon |T|``; with ranks, at most √(d-1) times the best train.
    """
    tensor = checked_weight(tensor)
    bonds = tensor.ndim - 1
    limits, delta = _limits(bonds, ranks, epsilon, float(np.linalg.norm(tensor)))
    cores = []
    rest = tensor.reshape(1, -1)
    for length, limit in zip(tensor.shape[:-1], limits, strict=True):
        matrix = rest.reshape(rest.shape[0] * length, -1)
        u, sigma, vt = finite_svd(matrix)
        rank = _bond_rank(sigma, limit, delta)
        cores.append(u[:, :rank].reshape(-1, length, rank))
        rest = sigma[:rank, None] * vt[:rank]
    return [*cores, rest.reshape(rest.shape[0], tensor.shape[-1], 1)]


def tt_to_tensor(cores: Sequence[Array]) -> Array:
    """The tensor a train stands for; also of matrix trains, as (m_1, n_1, m_2, n_2, ...)."""
    tensor = np.ones((1, 1))
    for core in cores:
        tensor = tensor @ core.reshape(len(core), -1)
        tensor = tensor.reshape(-1, core.shape[-1])
    return tensor.reshape([length for core in cores for length in core.shape[1:-1]])


def tt_matrix(
    weight: Array,
    row_shape: Sequence[int],
    column_shape: Sequence[int],
    ranks: int | Sequence[int] | None = None,
    epsilon: float | None = None,
) -> list[Array]:
    """Tensor train of a matrix, rows and columns split into d ≥ 2 digits each.

    Args:
        weight: (m, n).
        row_shape: m_1 ... m_d with product m.
        column_shape: n_1 ... n_d with product n.
        ranks, epsilon: As in ``tensor_train``.

    Returns:
        Cores (r_{k-1}, m_k, n_k, r_k).
    """
    weight = checked_weight(weight)
    rows, columns = tuple(row_shape), tuple(column_shape)
    if weight.shape != (prod(rows), prod(columns)) or len(rows) != len(columns) or len(rows) < 2:
        raise ValueError(
            f"a matrix {weight.shape} cannot be split into rows {rows} and columns {columns}; "
            "give two or more lengths for each, as many for both, with its sides as products"
        )
    digits = len(rows)
    order = [axis for k in range(digits) for axis in (k, digits + k)]
    pairs = weight.reshape(*rows, *columns).transpose(order)
    merged = pairs.reshape([m * n for m, n in zip(rows, columns, strict=True)])
    return [
        core.reshape(len(core), m, n, core.shape[-1])
        for core, m, n in zip(tensor_train(merged, ranks, epsilon), rows, columns, strict=True)
    ]


def tt_matrix_to_dense(cores: Sequence[Array]) -> Array:
    """The matrix (m, n) that a train of cores (r_{k-1}, m_k, n_k, r_k) stands for."""
    digits = len(cores)
    rows, columns = prod(core.shape[1] for core in cores), prod(core.shape[2] for core in cores)
    order = [*range(0, 2 * digits, 2), *range(1, 2 * digits, 2)]
    return tt_to_tensor(cores).transpose(order).reshape(rows, columns)


def tt_convolution(
    weight: Array,
    ranks: int | Sequence[int] | None = None,
    epsilon: float | None = None,
    split_kernel: bool = False,
) -> list[Array]:
    """Chain of convolutions from the train over (I, kernel, O).

    Args:
        weight: (O, I, *kernel).
        ranks: Channels between, in the order data flows; r_1, r_2, or with ``split_kernel`` one more for
            every further kernel axis.
        epsilon: Largest relative Frobenius error of the weight.
        split_kernel: One convolution per kernel axis, instead of one over all of them.

    Returns:
        Convolution weights in the order they are applied: 1 x 1 (r_1, I, 1, ...), then the kernel
        (r_2, r_1, *kernel), or k x 1 and 1 x k, then 1 x 1 (O, r_last, 1, ...). The bias belongs to the last.

    With the kernel in one piece this is Tucker-2 of ranks (r_2, r_1): the same set of weights, of which
    ``tucker2`` finds the better one as it iterates. With the kernel split it is its own: Tucker-2 with a
    separable core. The error is ``chain_weight`` against the weight.
    """
    weight = checked_weight(weight)
    dimensions = weight.ndim - 2
    if dimensions < 1:
        raise ValueError(f"expected a convolution weight (O, I, *kernel), got shape {weight.shape}")
    tensor = np.moveaxis(weight, 0, -1)  # (I, *kernel, O)
    pieces = [(axis,) for axis in range(dimensions)] if split_kernel else [tuple(range(dimensions))]
    if not split_kernel:
        tensor = tensor.reshape(len(tensor), -1, tensor.shape[-1])
    first, *middle, last = tensor_train(tensor, ranks, epsilon)
    ones = [1] * dimensions
    chain = [first[0].T.reshape(-1, len(first[0]), *ones)]
    for core, axes in zip(middle, pieces, strict=True):
        lengths = [weight.shape[2 + axis] if axis in axes else 1 for axis in range(dimensions)]
        chain.append(core.transpose(2, 0, 1).reshape(core.shape[2], len(core), *lengths))
    return [*chain, last[:, :, 0].T.reshape(-1, len(last), *ones)]


def chain_weight(chain: Sequence[Array]) -> Array:
    """The one convolution weight that a chain over disjoint kernel axes amounts to."""
    product = chain[0]
    for weight in chain[1:]:
        product = np.einsum("pr...,ri...->pi...", weight, product)  # lengths of 1 broadcast
    return np.asarray(product)


def _limits(
    bonds: int, ranks: int | Sequence[int] | None, epsilon: float | None, norm: float
) -> tuple[Sequence[int | None], float]:
    """Per bond the largest rank or None, and the error each may leave."""
    if bonds < 1:
        raise ValueError("a tensor train needs two or more axes")
    if ranks is not None and epsilon is not None:
        raise ValueError("give ranks or epsilon, not both")
    if epsilon is not None:
        if epsilon < 0:
            raise ValueError(f"epsilon must be >= 0, got {epsilon}; it is a relative error")
        # The errors of the bonds are orthogonal, so their squares add up.
        return [None] * bonds, epsilon * norm / np.sqrt(bonds)
    if ranks is None:
        return [None] * bonds, 0.0
    limits = [ranks] * bonds if isinstance(ranks, int) else list(ranks)
    if len(limits) != bonds or min(limits) < 1:
        raise ValueError(f"expected {bonds} bond ranks >= 1, got {limits}")
    return limits, 0.0


def _bond_rank(sigma: Array, limit: int | None, delta: float) -> int:
    """Smallest rank that leaves at most delta, and drops what is rounding; at least 1."""
    tails = np.sqrt(np.cumsum(np.square(sigma[::-1])))[::-1]  # tails[r]: what rank r leaves
    # A hair below delta, so that rounding in later bonds cannot break the promise.
    allowed = max(delta * (1 - 1e-9), 1e-14 * float(tails[0]))
    rank = max(int(np.count_nonzero(tails > allowed)), 1)
    return rank if limit is None else min(rank, limit)
