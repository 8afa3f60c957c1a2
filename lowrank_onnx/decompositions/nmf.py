"""Factorizations with non-negative factors: NMF of non-negative matrices, semi-NMF of signed ones.

Weights are signed, so for them "NMF" means semi-NMF: one factor of free sign, one not negative. A constraint
on signs never lowers the error: at equal rank the SVD is at least as good.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lowrank_onnx.decompositions.output_metric import checked_rank, checked_weight, gentle_solve, ridged
from lowrank_onnx.linalg import Array, finite_svd, psd_root

TINY = 1e-12  # keeps multiplicative updates from dying at zero, relative to the scale of the data


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """A matrix (m, n) as ``left @ right``.

    Attributes:
        left: (m, r).
        right: (r, n).
        error: Relative Frobenius error; relative output error where a metric was given.
    """

    left: Array
    right: Array
    error: float

    def matrix(self) -> Array:
        return np.asarray(self.left @ self.right)


def nmf(matrix: Array, rank: int, iterations: int = 500, tolerance: float = 1e-6) -> Factors:
    """Both factors non-negative, by hierarchical alternating least squares.

    Args:
        matrix: (m, n), no entry negative.
        rank: 1 ≤ rank ≤ min(m, n), which is exact.
        iterations: Most rounds; the error never rises.
        tolerance: Stop when a round lowers the squared error by less than this share of itself.

    Raises:
        ValueError: An entry is negative; semi_nmf takes such a matrix.

    Source: Cichocki & Phan 2009 (HALS); start: NNDSVD, Boutsidis & Gallopoulos 2008.
    """
    matrix = _checked(matrix, rank)
    if matrix.min() < 0:
        raise ValueError(
            f"nmf needs a non-negative matrix, got {int((matrix < 0).sum())} negative entries of {matrix.size}; "
            "semi_nmf takes signed ones"
        )
    if rank == len(matrix):
        return Factors(np.eye(rank), matrix.copy(), 0.0)
    if rank == matrix.shape[1]:
        return Factors(matrix.copy(), np.eye(rank), 0.0)
    left, right = nndsvd(matrix, rank)
    before = float(np.linalg.norm(matrix - left @ right) ** 2)
    for _ in range(iterations):
        _hals(left, matrix @ right.T, right @ right.T)
        _hals(right.T, matrix.T @ left, left.T @ left)
        squared = float(np.linalg.norm(matrix - left @ right) ** 2)
        if before - squared <= tolerance * before:
            break
        before = squared
    scale = np.linalg.norm(left, axis=0) * np.linalg.norm(right, axis=1)
    order = np.argsort(-scale, kind="stable")
    return _measured(matrix, left[:, order], right[order])


def nndsvd(matrix: Array, rank: int) -> tuple[Array, Array]:
    """Non-negative start (m, r), (r, n): of each singular pair the stronger one-signed part."""
    u, sigma, vt = finite_svd(matrix)
    left, right = np.zeros((len(matrix), rank)), np.zeros((rank, matrix.shape[1]))
    for k in range(rank):
        parts = [(np.maximum(sign * u[:, k], 0), np.maximum(sign * vt[k], 0)) for sign in (1, -1)]
        norms = [np.linalg.norm(x) * np.linalg.norm(y) for x, y in parts]
        best = int(norms[1] > norms[0])
        if norms[best] > 0:
            x, y = parts[best]
            left[:, k] = np.sqrt(sigma[k] * norms[best]) * x / np.linalg.norm(x)
            right[k] = np.sqrt(sigma[k] * norms[best]) * y / np.linalg.norm(y)
    return left, right


def semi_nmf(matrix: Array, rank: int, iterations: int = 500, tolerance: float = 1e-6) -> Factors:
    """The left factor of free sign, the right one non-negative.

    Args:
        matrix: (m, n), any signs.
        rank: 1 ≤ rank ≤ min(m + 1, n), which is exact: m rays do not reach columns of all signs, m + 1 do.
        iterations, tolerance: As in ``nmf``.

    Source: Ding, Li & Jordan 2010, doi:10.1109/TPAMI.2008.277. Of two starts the better is taken: the absolute
    right singular vectors, and their positive and negative parts in turn.
    """
    matrix = checked_weight(matrix)
    checked_rank(rank, min(len(matrix) + 1, matrix.shape[1]), f"rank of a factorization of {matrix.shape}")
    if rank == matrix.shape[1]:
        return Factors(matrix.copy(), np.eye(rank), 0.0)
    if rank > len(matrix):  # the unit vectors, and one that points against all of them
        against = np.maximum(-matrix.min(axis=0), 0.0)
        right = np.concatenate([matrix + against, against[None]])
        return Factors(np.concatenate([np.eye(len(matrix)), -np.ones((len(matrix), 1))], axis=1), right, 0.0)
    _, _, vt = finite_svd(matrix)
    split = np.stack([np.maximum(vt, 0), np.maximum(-vt, 0)], axis=1).reshape(-1, matrix.shape[1])
    kept = split[np.linalg.norm(split, axis=1) > 1e-6][:rank]  # one-signed vectors have no other part
    kept = np.concatenate([kept, np.abs(vt[: rank - len(kept)])])
    found = [_ding(matrix, start.T, iterations, tolerance) for start in (np.abs(vt[:rank]), kept)]
    return min(found, key=lambda factors: factors.error)


def semi_nmf_output(
    weight: Array,
    rank: int,
    patch_gram: Array,
    ridge: float = 1e-2,
    iterations: int = 500,
    tolerance: float = 1e-6,
) -> Factors:
    """Semi-NMF of a layer ``y = W x`` in the metric of its data, the non-negative factor on the output.

    Args:
        weight: (O, F).
        rank: 1 ≤ rank ≤ min(O, F + 1), which is exact.
        patch_gram: (F, F) centred second moment of x.
        ridge: In units of the mean variance of x.
        iterations, tolerance: As in ``nmf``.

    Returns:
        left (O, r) ≥ 0 and right (r, F) of free sign, with the relative output error, without ridge.

    On the input side the signs would be lost when the metric is undone, so the signed factor is the one
    that carries it: semi-NMF of (W S)ᵀ, then least squares for the right factor. The better of this and the
    factors found without the metric is returned.
    """
    weight = checked_weight(weight)
    gram = np.asarray(patch_gram, np.float64)
    if gram.shape != (weight.shape[1],) * 2:
        raise ValueError(f"a weight {weight.shape} needs a gram {(weight.shape[1],) * 2}, got {gram.shape}")
    energy = float(np.vdot(weight @ gram, weight))
    found = []
    for root in (psd_root(ridged(gram, ridge)), np.eye(len(gram))):
        left = semi_nmf((weight @ root).T, rank, iterations, tolerance).right.T  # (O, r)
        # The metric cancels in the least squares for the right factor: no inverse of S.
        right = gentle_solve(left.T @ left, left.T @ weight)
        lost = weight - left @ right
        squared = max(float(np.vdot(lost @ gram, lost)), 0.0)
        found.append(Factors(left, right, float(np.sqrt(squared / energy)) if energy > 0 else 0.0))
    return min(found, key=lambda factors: factors.error)


def sparser(right: Array, share: float) -> Array:
    """Return a non-negative factor (r, n) of which every component keeps only its largest entries, at least one.

    Args:
        right: (r, n), not negative.
        share: Share of the entries of a component to set to zero, in [0, 1).
    """
    gone = min(int(share * right.shape[1]), right.shape[1] - 1)
    made = right.copy()
    np.put_along_axis(made, np.argsort(right, axis=1, kind="stable")[:, :gone], 0.0, axis=1)
    return made


def _checked(matrix: Array, rank: int) -> Array:
    matrix = checked_weight(matrix)
    if matrix.ndim != 2:
        raise ValueError(f"expected a matrix, got shape {matrix.shape}")
    checked_rank(rank, min(matrix.shape), f"rank of a factorization of {matrix.shape}")
    return matrix


def _hals(factor: Array, right: Array, gram: Array) -> None:
    """Improve the columns of a non-negative factor (n, r) in place, each exactly, given the others."""
    for k in range(factor.shape[1]):
        if gram[k, k] > 0:
            factor[:, k] = np.maximum(factor[:, k] + (right[:, k] - factor @ gram[:, k]) / gram[k, k], 0)


def _ding(matrix: Array, right: Array, iterations: int, tolerance: float) -> Factors:
    """Alternate the exact free-sign factor and a multiplicative step on the other; right is (n, r)."""
    right = right + 0.2 * np.abs(right).mean() + TINY
    before = float(np.vdot(matrix, matrix))
    left = _free_factor(matrix, right)
    for _ in range(iterations):
        cross, gram = matrix.T @ left, left.T @ left  # (n, r), (r, r)
        raising = np.maximum(cross, 0) + right @ np.maximum(-gram, 0)
        lowering = np.maximum(-cross, 0) + right @ np.maximum(gram, 0)
        floor = TINY * (float(lowering.max()) or 1.0)
        right = right * np.sqrt((raising + floor) / (lowering + floor))
        norms = np.linalg.norm(right, axis=0)
        right = right / np.where(norms > 0, norms, 1.0)
        left = _free_factor(matrix, right)
        squared = float(np.linalg.norm(matrix - left @ right.T) ** 2)
        if before - squared <= tolerance * before:
            break
        before = squared
    order = np.argsort(-np.linalg.norm(left, axis=0), kind="stable")
    return _measured(matrix, left[:, order], right[:, order].T)


def _free_factor(matrix: Array, right: Array) -> Array:
    return gentle_solve(right.T @ right, right.T @ matrix.T).T


def _measured(matrix: Array, left: Array, right: Array) -> Factors:
    norm = float(np.linalg.norm(matrix))
    error = float(np.linalg.norm(matrix - left @ right)) / norm if norm > 0 else 0.0
    return Factors(left, right, error)
