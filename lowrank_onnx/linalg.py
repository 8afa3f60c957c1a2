"""Matrix algebra of the tool: covariance roots, reduced-rank regression, error tails. Arrays only.

A linear layer is written ``y = x @ W`` with rows as samples: x (K,), W (K, N), y (N,).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from lowrank_onnx import accelerator

Array = NDArray[Any]
_CONSTANT = 1e-6  # of a mean square; variances below it are rounding of products in float32


def finite_svd(matrix: Array) -> tuple[Array, Array, Array]:
    """Return the thin SVD (u, sigma, vt) in float64, with the sign of every pair fixed.

    The divide-and-conquer driver fails now and then on hard matrices; the slow one does not.
    """
    matrix = np.asarray(matrix, np.float64)
    try:
        u, sigma, vt = scipy.linalg.svd(matrix, full_matrices=False, lapack_driver="gesdd")
    except np.linalg.LinAlgError:
        u, sigma, vt = scipy.linalg.svd(matrix, full_matrices=False, lapack_driver="gesvd")
    signs = np.sign(vt[np.arange(len(vt)), np.abs(vt).argmax(axis=1)])
    signs[signs == 0] = 1
    return u * signs, sigma, vt * signs[:, None]


def product(left: Array, right: Array) -> Array:
    """``left @ right`` of two matrices, on the GPU where that is wanted and pays."""
    return accelerator.product(left, right) if accelerator.suits(left, right) else left @ right


def psd_root(gram: Array) -> Array:
    """Return S (K, K) with ``S @ S.T = gram`` for a positive semi-definite gram (K, K).

    Cholesky where it goes through, else the eigenvalue root with negative rounding errors cut to zero.
    """
    try:
        return np.asarray(scipy.linalg.cholesky(gram, lower=True))
    except np.linalg.LinAlgError:
        values, vectors = scipy.linalg.eigh(gram)
        return np.asarray(vectors * np.sqrt(np.maximum(values, 0.0)))


def covariance(gram: Array, mean: Array) -> Array:
    """Return ``gram - mean meanᵀ`` (K, K); zeros where an input does not vary, since rounding would be left of it."""
    spread = np.asarray(gram - np.outer(mean, mean))
    still = np.diag(spread) <= _CONSTANT * np.diag(gram)
    spread[still] = 0.0
    spread[:, still] = 0.0
    return spread


def covariances(gram: Array, mean: Array, cross: Array, target_mean: Array) -> tuple[Array, Array]:
    """Return ``covariance`` (K, K) and ``cross - mean target_meanᵀ`` (K, N), zeros where an input does not vary."""
    spread, shared = covariance(gram, mean), np.asarray(cross - np.outer(mean, target_mean))
    shared[np.diag(spread) == 0.0] = 0.0
    return spread, shared


def with_ridge(gram: Array, ridge: float) -> Array:
    """Return ``gram + ridge * mean(diag) * I``: shrinkage towards plain SVD (algorithms: COALA, GPTQ).

    Of a gram of zeros, which tells no direction from another, the identity.
    """
    out = np.array(gram, np.float64)
    out[np.diag_indices_from(out)] += ridge_shift(gram, ridge)
    return out


def ridge_shift(gram: Array, ridge: float) -> float:
    """Return what ``with_ridge`` adds to the diagonal."""
    scale = float(np.trace(gram)) / len(gram)
    return ridge * scale if scale > 0 else 1.0


def right_basis(metric_root: Array, weight: Array) -> tuple[Array, Array]:
    """Return the singular values and right singular vectors of ``metric_root.T @ weight``.

    Args:
        metric_root: (K, K) S with S Sᵀ the second moment of the input.
        weight: (K, N).

    Returns:
        sigma (q,) falling, and V (N, q) with orthonormal columns; q = min(K, N).
        The best rank-r weight in that metric is ``weight @ V[:, :r] @ V[:, :r].T``.

    Source: output principal components, the form without an inverse (DRONE 2021; COALA 2025).
    A QR step first makes the SVD square, at the accuracy of the matrix and not of its Gram.
    """
    matrix = product(metric_root.T, weight)  # (K, N)
    rows, columns = matrix.shape
    if accelerator.suits(matrix):
        return accelerator.right_singular(matrix)
    if rows > columns:
        matrix = scipy.linalg.qr(matrix, mode="r", check_finite=False)[0][:columns]
    elif columns > rows:
        q, r = scipy.linalg.qr(matrix.T, mode="economic", check_finite=False)  # (N, K), (K, K)
        _, sigma, vt = finite_svd(r.T)
        return sigma, q @ vt.T
    _, sigma, vt = finite_svd(matrix)
    return sigma, vt.T


def regression(gram: Array, target_cross: Array, weight: Array, ridge: float) -> Array:
    """Return the W* (K, N) that best gives a wanted output t from x: ``(G + λI)⁻¹ (E[xᵀ t] + λ W)``.

    Args:
        gram: (K, K) E[xᵀ x].
        target_cross: (K, N) E[xᵀ t].
        weight: (K, N) what the ridge pulls to.
        ridge: λ in units of the mean diagonal of gram.
    """
    left, right = with_ridge(gram, ridge), target_cross + ridge_shift(gram, ridge) * weight
    try:
        return np.asarray(scipy.linalg.solve(left, right, assume_a="pos"))
    except (np.linalg.LinAlgError, scipy.linalg.LinAlgWarning):
        return np.asarray(scipy.linalg.lstsq(left, right)[0])


@dataclass(frozen=True)
class Tail:
    """Squared errors that truncation leaves, for every rank at once.

    Attributes:
        left: (q + 1,) ``left[r]`` is the squared error of rank r; ``left[q]`` is 0 when rank q is exact.
        total: Squared norm that the errors are relative to.
    """

    left: Array
    total: float

    def relative(self, rank: int) -> float:
        """Relative error at a rank: ``sqrt(left[rank] / total)``; 0 when there is nothing to lose."""
        return float(np.sqrt(max(self.left[rank], 0.0) / self.total)) if self.total > 0 else 0.0


def tail_sums(terms: Array, total: float, rest: float = 0.0) -> Tail:
    """Return the tail of a sum of squares ``terms`` (q,), plus ``rest`` that no rank removes."""
    left = np.concatenate([np.cumsum(terms[::-1])[::-1], [0.0]]) + rest
    return Tail(left, total)


def energy_rank(sigma: Array, energy: float) -> int:
    """Return the smallest rank that keeps a share of the squared spectrum.

    Args:
        sigma: (q,) singular values, falling, q ≥ 1.
        energy: Share of ``sum(sigma**2)`` to keep, in (0, 1].

    Returns:
        Rank r, 1 ≤ r ≤ q. 1 for an all-zero spectrum.
    """
    if not 0 < energy <= 1:
        raise ValueError(f"energy must be in (0, 1], got {energy}")
    squared = np.cumsum(np.asarray(sigma, np.float64) ** 2)
    if squared[-1] == 0:
        return 1
    # A hair below the wish: rounding in the sum must not ask for one more component.
    return int(np.searchsorted(squared, energy * squared[-1] * (1 - 1e-12)) + 1)


def effective_rank(sigma: Array) -> float:
    """Return exp of the entropy of the normalised singular values (Roy & Vetterli 2007)."""
    total = float(np.sum(sigma))
    if total <= 0:
        return 0.0
    share = np.asarray(sigma, np.float64) / total
    share = share[share > 0]
    return float(np.exp(-np.sum(share * np.log(share))))
