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
        second = np.empty(self.second.shape)
        for place, (begin, end) in enumerate(cuts(matrix.shape[1], self.scales.shape[1])):
            basis = self._basis(place)
            weighted = gram @ basis
            second[:, begin:end] = _solve(basis.T @ weighted, weighted.T @ matrix[:, begin:end])
        return Blast(self.first.astype(np.float64), self.scales.astype(np.float64), second)

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
    start = data_aware(matrix, gram, 0.0).factors(min(rank, *matrix.shape))
    missing = rank - start[0].shape[1]
    first = np.pad(start[0], ((0, 0), (0, missing)))
    made = Blast(first, np.ones((*blocks, rank)), np.pad(start[1], ((0, missing), (0, 0))))
    before = _squared_error(made, matrix, gram)
    limit = tolerance * before
    for _ in range(sweeps):
        made = _with_scales(made, matrix, gram)
        made = _with_first(made, matrix, gram)
        made = made.refitted(matrix, gram)
        now = _squared_error(made, matrix, gram)
        if before - now <= limit:
            break
        before = now
    return made


def _squared_error(made: Blast, matrix: Array, gram: Array) -> float:
    lost = matrix - made.dense()
    return float(np.vdot(lost, gram @ lost))


def _with_scales(made: Blast, matrix: Array, gram: Array) -> Blast:
    """Better d, one block after the other; each is a problem in r numbers."""
    rows = cuts(len(made.first), len(made.scales))
    _, columns, rank = made.scales.shape
    # (P, r) directions of x, each C_i by itself
    spread = np.zeros((len(made.first), len(rows) * rank))
    for place, (begin, end) in enumerate(rows):
        spread[begin:end, place * rank : (place + 1) * rank] = made.first[begin:end]
    weighted = gram @ spread
    inner = (spread.T @ weighted).reshape(len(rows), rank, len(rows), rank)
    wanted = (weighted.T @ matrix).reshape(len(rows), rank, -1)
    scales = made.scales.copy()
    for column, (begin, end) in enumerate(cuts(matrix.shape[1], columns)):
        second = made.second[:, begin:end]
        shared = second @ second.T
        right = np.einsum("prn,rn->pr", wanted[:, :, begin:end], second)
        for place in range(len(rows)):
            others = [other for other in range(len(rows)) if other != place]
            left = right[place] - sum((inner[place, :, other] * shared) @ scales[other, column] for other in others)
            scales[place, column] = _solve(inner[place, :, place] * shared, left[:, None])[:, 0]
    return Blast(made.first, scales, made.second)


def _with_first(made: Blast, matrix: Array, gram: Array) -> Blast:
    """The best C_i, one after the other: ``Σ_i' G_ii' C_i' H_i'i`` must be what is wanted of row block i."""
    rows, columns = cuts(len(made.first), len(made.scales)), cuts(matrix.shape[1], made.scales.shape[1])
    mixed = np.concatenate(  # (P, r, N): d_ij B_j, side by side
        [made.scales[:, place, :, None] * made.second[None, :, b:e] for place, (b, e) in enumerate(columns)], axis=2
    )
    first = made.first.copy()
    weighted = gram @ matrix
    for place, (begin, end) in enumerate(rows):
        left = weighted[begin:end] @ mixed[place].T
        for other, (b, e) in enumerate(rows):
            if other != place:
                left -= gram[begin:end, b:e] @ first[b:e] @ (mixed[other] @ mixed[place].T)
        half = _solve(gram[begin:end, begin:end], left)
        first[begin:end] = _solve(mixed[place] @ mixed[place].T, half.T).T
    return Blast(first, made.scales, made.second)


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
