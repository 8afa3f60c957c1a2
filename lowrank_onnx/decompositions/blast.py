"""Blocks that share their bases (BLAST): block (i, j) of W is ``C_i diag(d_ij) B_j``.

All blocks of a row share C_i, all of a column B_j; with d = 1 it is plain low rank, with one d_ij a row block
diagonal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import scipy.linalg

from lowrank_onnx.decompositions.block_sum import least_squares
from lowrank_onnx.decompositions.svd import data_aware
from lowrank_onnx.linalg import Array


@dataclass(frozen=True, eq=False)
class Blast:
    """One rank r for all blocks.

    Attributes:
        first: (K, r) the C_i, one below the other.
        scales: (P, Q, r) the d_ij.
        second: (r, N) the B_j, side by side.
    """

    first: Array
    scales: Array
    second: Array

    @property
    def parameters(self) -> int:
        """Elements stored."""
        return self.first.size + self.scales.size + self.second.size

    @property
    def products(self) -> int:
        """Multiply-accumulates for one row of x."""
        return self.parameters

    def dense(self) -> Array:
        """The matrix W (K, N) it stands for, float64."""
        second = self.second.astype(np.float64)
        columns = cuts(second.shape[1], self.scales.shape[1])
        return np.concatenate(
            [self._basis(place) @ second[:, begin:end] for place, (begin, end) in enumerate(columns)], axis=1
        )

    def refitted(self, matrix: Array, gram: Array) -> Blast:
        """Fit all B_j anew for the C_i and d_ij at hand, to W (K, N) in the metric (K, K)."""
        return _with_second(self, _normal(self, gram, gram @ np.asarray(matrix, np.float64)))

    def _basis(self, column: int) -> Array:
        """(K, r): what all blocks of a column are combined from."""
        first, scales = self.first.astype(np.float64), self.scales.astype(np.float64)
        rows = cuts(len(first), len(scales))
        return np.concatenate([first[begin:end] * scales[place, column] for place, (begin, end) in enumerate(rows)])

    def arrays(self) -> dict[str, Array]:
        """The constants by role."""
        return {"first": self.first, "scales": self.scales, "second": self.second}


def blast_from_arrays(arrays: Mapping[str, Array]) -> Blast:
    """Read it back from ``Blast.arrays``."""
    return Blast(arrays["first"], arrays["scales"], arrays["second"])


def cuts(length: int, blocks: int) -> list[tuple[int, int]]:
    """Begin and end of each of a number of blocks, as even as can be."""
    ends = [length * place // blocks for place in range(blocks + 1)]
    return list(pairwise(ends))


def blast(
    matrix: Array, gram: Array, blocks: tuple[int, int], rank: int, sweeps: int = 20, tolerance: float = 1e-3
) -> Blast:
    """Fit W in the metric of its input by alternating least squares, from the best plain low rank.

    Args:
        matrix: (K, N) what is wanted.
        gram: (K, K) second moment of x with its ridge; the identity gives the weight's own error.
        blocks: Blocks of rows and of columns.
        rank: Columns of every C_i.
        sweeps: Most rounds; each solves for the d_ij and the C_i, one block after the other, and for the B_j.
        tolerance: Ends when a round takes less than this share off the squared error.

    Returns:
        A fit that is never worse than plain low rank of the same rank.

    Source: the form of Lee et al. 2024, arXiv:2410.21262 (BLAST), who fit by gradients; every step here is a linear
    least-squares problem, so the error never rises.
    """
    matrix = np.asarray(matrix, np.float64)
    weighted = gram @ matrix
    start = data_aware(matrix, gram, 0.0).factors(min(rank, *matrix.shape))
    missing = rank - start[0].shape[1]
    first = np.pad(start[0], ((0, 0), (0, missing)))
    made = Blast(first, np.ones((*blocks, rank)), np.pad(start[1], ((0, missing), (0, 0))))
    before = _squared_error(made, matrix, gram)
    limit = tolerance * before
    normal = _normal(made, gram, weighted)
    for _ in range(sweeps):
        made = _with_scales(made, normal)
        made = _with_first(made, gram, weighted)
        normal = _normal(made, gram, weighted)
        made = _with_second(made, normal)
        now = _squared_error(made, matrix, gram)
        if before - now <= limit:
            break
        before = now
    return made


@dataclass(frozen=True, eq=False)
class _Normal:
    """What the normal equations of the d_ij and of the B_j are made of, for given C_i.

    Attributes:
        inner: (P, r, P, r) ``C_iᵀ G_ii' C_i'``.
        wanted: (P, r, N) ``C_iᵀ (G W)_i``.
    """

    inner: Array
    wanted: Array


def _normal(made: Blast, gram: Array, weighted: Array) -> _Normal:
    """Every C_i by itself: as one matrix they would be mostly zeros."""
    first = made.first.astype(np.float64)
    rank = first.shape[1]
    rows = cuts(len(first), len(made.scales))
    inner = np.empty((len(rows), rank, len(rows), rank))
    for place, (begin, end) in enumerate(rows):
        brought = gram[:, begin:end] @ first[begin:end]
        for other, (b, e) in enumerate(rows):
            inner[other, :, place] = first[b:e].T @ brought[b:e]
    wanted = np.stack([first[begin:end].T @ weighted[begin:end] for begin, end in rows])
    return _Normal(inner, wanted)


def _squared_error(made: Blast, matrix: Array, gram: Array) -> float:
    lost = matrix - made.dense()
    return float(np.vdot(lost, gram @ lost))


def _with_scales(made: Blast, normal: _Normal) -> Blast:
    """Better d, one block after the other; each is a problem in r numbers."""
    inner = normal.inner
    count, columns, _ = made.scales.shape
    scales = made.scales.copy()
    for column, (begin, end) in enumerate(cuts(made.second.shape[1], columns)):
        second = made.second[:, begin:end]
        shared = second @ second.T
        right = np.einsum("prn,rn->pr", normal.wanted[:, :, begin:end], second)
        for place in range(count):
            others = [other for other in range(count) if other != place]
            left = right[place] - sum((inner[place, :, other] * shared) @ scales[other, column] for other in others)
            scales[place, column] = _solve(inner[place, :, place] * shared, left[:, None])[:, 0]
    return Blast(made.first, scales, made.second)


def _with_first(made: Blast, gram: Array, weighted: Array) -> Blast:
    """The best C_i, one after the other: ``Σ_i' G_ii' C_i' H_i'i`` must be what is wanted of row block i."""
    scales = made.scales
    rows, columns = cuts(len(made.first), len(scales)), cuts(weighted.shape[1], scales.shape[1])
    shared = np.stack([made.second[:, b:e] @ made.second[:, b:e].T for b, e in columns])  # (Q, r, r)

    def mixed(place: int, other: int) -> Array:
        """(r, r): H, with the d_ij B_j of two row blocks side by side, one times the other transposed."""
        return np.asarray(np.einsum("qr,qs,qrs->rs", scales[place], scales[other], shared, optimize=True))

    first = made.first.copy()
    for place, (begin, end) in enumerate(rows):
        second = np.concatenate(
            [scales[place, at, :, None] * made.second[:, b:e] for at, (b, e) in enumerate(columns)], axis=1
        )
        left = weighted[begin:end] @ second.T
        for other, (b, e) in enumerate(rows):
            if other != place:
                left -= gram[begin:end, b:e] @ first[b:e] @ mixed(other, place)
        half = _solve(gram[begin:end, begin:end], left)
        first[begin:end] = _solve(mixed(place, place), half.T).T
    return Blast(first, scales, made.second)


def _with_second(made: Blast, normal: _Normal) -> Blast:
    """The best B_j for the C_i and d_ij at hand."""
    second = np.empty(made.second.shape)
    for column, (begin, end) in enumerate(cuts(made.second.shape[1], made.scales.shape[1])):
        scales = made.scales[:, column].astype(np.float64)
        left = np.einsum("pr,prqs,qs->rs", scales, normal.inner, scales, optimize=True)
        second[:, begin:end] = _solve(left, np.einsum("pr,prn->rn", scales, normal.wanted[:, :, begin:end]))
    return Blast(made.first.astype(np.float64), made.scales.astype(np.float64), second)


def _solve(normal: Array, wanted: Array) -> Array:
    """Normal equations by Cholesky; by least squares where they are singular."""
    try:
        factor = scipy.linalg.cho_factor(normal, lower=True)
    except np.linalg.LinAlgError:
        return least_squares(normal, wanted)
    pivots = np.abs(np.diag(factor[0]))
    if pivots.min() < 1e-6 * pivots.max():
        return least_squares(normal, wanted)
    return np.asarray(scipy.linalg.cho_solve(factor, wanted))
