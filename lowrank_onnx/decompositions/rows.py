"""Low rank of a table whose rows are not equally often read: Eckart-Young with a weight for every row.

    minimise  Σ_i f_i |e_i - ê_i|²,   ê_i = e_i B Bᵀ,   B the leading eigenvectors of Σ_i f_i e_iᵀ e_i

Counted lookups are smoothed before they become weights: a row that was never seen has some too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import scipy.linalg

from lowrank_onnx.linalg import Array, Tail, finite_svd, tail_sums

PSEUDO_COUNTS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_CHUNK = 16384  # rows turned to float64 at one time


@dataclass(frozen=True, eq=False)
class RowBasis:
    """All best projections of the rows of a table, nested: rank r uses the first r directions.

    Attributes:
        table: (V, F) as it is stored.
        right: (F, q) orthonormal directions, most important first; q = min(V, F).
        sigma: (q,) singular values of the weighted table.
        weighted: Squared errors by rank in the metric asked about; None without one.
        plain: Squared errors by rank with every row counted once.
    """

    table: Array
    right: Array
    sigma: Array
    weighted: Tail | None
    plain: Tail

    def factors(self, rank: int) -> tuple[Array, Array]:
        """Return the thin table (V, r) and the map back (r, F), whose rows are orthonormal."""
        basis = self.right[:, :rank]
        return np.concatenate([chunk @ basis for chunk, _ in _chunks(self.table)]), basis.T


def weighted_rows(table: Array, weights: Array | None = None, asked: Array | None = None) -> RowBasis:
    """Return the best projections of the rows of a table.

    Args:
        table: (V, F), any float type.
        weights: (V,) f, above zero; every row alike if None.
        asked: (V,) weights of the errors that are told; none are if None.

    Source: Eckart & Young 1936 on D^½ E, as GroupReduce (Chen et al. 2018, arXiv:1806.06950) uses it.
    """
    rows, width = table.shape
    if weights is None:
        weights = np.ones(rows)
    if rows < width:
        _, sigma, vt = finite_svd(np.sqrt(weights)[:, None] * table)
        right = vt.T
    else:
        values, vectors = scipy.linalg.eigh(gram_of(table, weights))
        sigma, right = np.sqrt(np.maximum(values[::-1], 0.0)), _signed(vectors[:, ::-1])
    return RowBasis(
        table,
        right,
        sigma,
        None if asked is None else _tail(table, asked, right),
        _tail(table, np.ones(rows), right),
    )


def gram_of(table: Array, weights: Array) -> Array:
    """(F, F) Σ_i f_i e_iᵀ e_i in float64."""
    total = np.zeros((table.shape[1],) * 2)
    for chunk, place in _chunks(table):
        total += (chunk * weights[place, None]).T @ chunk
    return total


def pseudo_count(total: Array, held: Array) -> float:
    """Return the c of ``count + c`` that best foretells the lookups held out.

    Args:
        total: (V,) lookups by row.
        held: (V,) those of them that were held out.

    Returns:
        The entry of ``PSEUDO_COUNTS`` with the greatest likelihood; 1 where there is nothing to compare.

    Source: additive (Lidstone) smoothing with the parameter chosen on held-out data, Jelinek & Mercer 1980.
    """
    seen = total - held
    if not held.any() or not seen.any():
        return 1.0
    told = [float(held @ np.log((seen + c) / (seen.sum() + c * len(seen)))) for c in PSEUDO_COUNTS]
    return PSEUDO_COUNTS[int(np.argmax(told))]


def _tail(table: Array, weights: Array, right: Array) -> Tail:
    terms = np.zeros(right.shape[1])
    total = 0.0
    for chunk, place in _chunks(table):
        terms += weights[place] @ (chunk @ right) ** 2
        total += float(weights[place] @ np.einsum("vf,vf->v", chunk, chunk))
    return tail_sums(terms, total)


def _signed(vectors: Array) -> Array:
    """Fix the sign of every column, so that the same table gives the same factors."""
    signs = np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(vectors.shape[1])])
    return np.asarray(vectors * np.where(signs == 0, 1.0, signs))


def _chunks(table: Array) -> Iterator[tuple[Array, slice]]:
    """The table in float64, some rows at a time."""
    for start in range(0, len(table), _CHUNK):
        place = slice(start, start + _CHUNK)
        yield np.asarray(table[place], np.float64), place
