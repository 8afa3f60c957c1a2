"""Truncated SVD of a linear layer in the metric of its data: every rank from one decomposition.

The layer is ``y = x @ W``, W (K, N), rows of x are samples. Where a compressed prefix delivers x̂ instead
of x, the layer is asked to give from x̂ what the original gave from x.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lowrank_onnx.linalg import Array, Tail, finite_svd, psd_root, regression, right_basis, tail_sums, with_ridge


@dataclass(frozen=True, eq=False)
class LowRankBasis:
    """All best approximations of a layer, nested: rank r uses the first r directions.

    Attributes:
        weight: (K̂, N) the full-rank weight that is truncated; W itself, or its regression on x̂.
        right: (N, q) orthonormal output directions, most important first.
        sigma: (q,) singular values in the metric of the (ridged) data; of W itself without data.
        output: Squared output errors by rank; None without data.
        weights: Squared weight errors by rank; None where ``weight`` is not W.
    """

    weight: Array
    right: Array
    sigma: Array
    output: Tail | None
    weights: Tail | None

    def factors(self, rank: int) -> tuple[Array, Array]:
        """Return (K̂, r) and (r, N), the second with orthonormal rows."""
        basis = self.right[:, :rank]
        return self.weight @ basis, basis.T


def plain(weight: Array) -> LowRankBasis:
    """Truncated SVD of W (K, N) alone (Eckart & Young 1936)."""
    weight = np.asarray(weight, np.float64)
    _, sigma, vt = finite_svd(weight)
    squared = sigma**2
    return LowRankBasis(weight, vt.T, sigma, None, tail_sums(squared, float(squared.sum())))


def data_aware(weight: Array, gram: Array, ridge: float, output_energy: float | None = None) -> LowRankBasis:
    """Truncation by the output covariance: W V Vᵀ with V the leading eigenvectors of Wᵀ (G + λI) W.

    Args:
        weight: (K, N).
        gram: (K, K) second moment of x, centred or not.
        ridge: λ in units of the mean diagonal of gram; falls back to plain SVD as it grows.
        output_energy: E|x W|², which errors are relative to; that of gram itself if None.

    Source: DRONE (NeurIPS 2021) and COALA (2025); same optimum as SVD-LLM's Cholesky form, without an inverse.
    """
    weight = np.asarray(weight, np.float64)
    sigma, right = right_basis(psd_root(with_ridge(gram, ridge)), weight)
    directions = weight @ right  # (K, q)
    terms = np.maximum(np.einsum("kq,kq->q", directions, gram @ directions), 0.0)  # without the ridge
    total = float(terms.sum()) if output_energy is None else output_energy
    squared = np.einsum("kq,kq->q", directions, directions)
    return LowRankBasis(
        weight, right, sigma, tail_sums(terms, total), tail_sums(squared, float(np.vdot(weight, weight)))
    )


def propagated(
    weight: Array, gram: Array, cross: Array, source_gram: Array, ridge: float, output_energy: float | None = None
) -> LowRankBasis:
    """Reduced-rank regression of the original output on the inputs a compressed prefix delivers.

    Args:
        weight: (K, N).
        gram: (K̂, K̂) of x̂.
        cross: (K̂, K) E[x̂ᵀ x].
        source_gram: (K, K) of x.
        ridge: In units of the mean diagonal of gram.
        output_energy: E|x W|²; that of source_gram if None.

    Source: objective ``min |x W − x̂ Ŵ|`` (SVD-LLM V2, AA-SVD call it obj4); Izenman 1975 for the regression.
    """
    weight = np.asarray(weight, np.float64)
    star = regression(cross, gram, weight, ridge)  # (K̂, N)
    sigma, right = right_basis(psd_root(with_ridge(gram, ridge)), star)
    directions = star @ right  # (K̂, q)
    explained = 2 * np.einsum("kq,kq->q", directions, cross @ (weight @ right))
    explained -= np.einsum("kq,kq->q", directions, gram @ directions)
    energy = float(np.einsum("kn,kn->", weight, source_gram @ weight))
    left = np.maximum(energy - np.concatenate([[0.0], np.cumsum(explained)]), 0.0)
    return LowRankBasis(star, right, sigma, Tail(left, energy if output_energy is None else output_energy), None)
