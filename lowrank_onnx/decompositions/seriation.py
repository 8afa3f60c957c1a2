"""An order of rows and columns that brings what is large together: near the diagonal, block by block."""

from __future__ import annotations

import numpy as np

from lowrank_onnx.decompositions.block_sum import segments
from lowrank_onnx.linalg import Array, finite_svd


def seriate(matrix: Array, depth: int) -> tuple[Array, Array]:
    """Order rows and columns together by recursive spectral co-clustering.

    Rows and columns are sorted by the second singular vectors of the scaled magnitudes ``D_r^-1/2 |W|² D_c^-1/2``,
    halved, and each half of the diagonal is sorted again. Both orders run the same way, since the two vectors
    come as a pair.

    Args:
        matrix: (K, N); rows weighted by the energy of their inputs where there are data.
        depth: Halvings, ≥ 0; 0 sorts once.

    Returns:
        rows (K,), columns (N,): ``matrix[rows][:, columns]`` is the ordered matrix.

    Source: Dhillon 2001, doi:10.1145/502512.502550 (bipartite spectral co-clustering); bisection as in
    Atkins, Boman & Hendrickson 1998 (spectral seriation).
    """
    squared = np.asarray(matrix, np.float64) ** 2
    rows, columns = np.arange(squared.shape[0]), np.arange(squared.shape[1])
    for level in range(depth + 1):
        pairs = zip(segments(len(rows), 2**level), segments(len(columns), 2**level), strict=True)
        for high, wide in pairs:
            part = squared[np.ix_(rows[high], columns[wide])]
            if min(part.shape) < 3:
                continue
            left, right = _second(part)
            if level and _flips(squared, rows, columns, high, left):
                left, right = -left, -right
            rows[high] = rows[high][np.argsort(left, kind="stable")]
            columns[wide] = columns[wide][np.argsort(right, kind="stable")]
    return rows, columns


def _second(part: Array) -> tuple[Array, Array]:
    """The second pair of singular vectors, scaled back."""
    floor = 1e-12 * max(float(part.mean()), 1e-300)
    high = 1 / np.sqrt(part.sum(axis=1) + floor)
    wide = 1 / np.sqrt(part.sum(axis=0) + floor)
    u, _, vt = finite_svd(high[:, None] * part * wide)
    return high * u[:, 1], wide * vt[1]


def _flips(squared: Array, rows: Array, columns: Array, high: slice, left: Array) -> bool:
    """Whether the half is nearer to what lies ahead of it when it is turned round."""
    if high.start == 0:
        return False
    ahead = squared[np.ix_(rows[high], columns[: max(1, len(columns) * high.start // len(rows))])].sum(axis=1)
    return bool(np.dot(left - left.mean(), ahead - ahead.mean()) > 0)
