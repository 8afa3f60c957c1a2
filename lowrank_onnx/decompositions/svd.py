"""Truncated SVD of a linear layer in the metric of its data: every rank from one decomposition.

The layer is ``y = x @ W``, W (K, N), rows of x are samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lowrank_onnx import accelerator
from lowrank_onnx.linalg import (
    Array,
    Tail,
    finite_svd,
    product,
    psd_root,
    regression,
    right_basis,
    tail_sums,
    with_ridge,
)


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
        return product(self.weight, basis), basis.T


def plain(weight: Array) -> LowRankBasis:
    """Truncated SVD of W (K, N) alone (Eckart & Young 1936)."""
    weight = np.asarray(weight, np.float64)
    if accelerator.suits(weight):
        sigma, right = accelerator.right_singular(weight)
    else:
        _, sigma, vt = finite_svd(weight)
        right = vt.T
    squared = sigma**2
    return LowRankBasis(weight, right, sigma, None, tail_sums(squared, float(squared.sum())))


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
    directions = product(weight, right)  # (K, q)
    terms = np.maximum(np.einsum("kq,kq->q", directions, product(gram, directions)), 0.0)  # without the ridge
    total = float(terms.sum()) if output_energy is None else output_energy
    squared = np.einsum("kq,kq->q", directions, directions)
    return LowRankBasis(
        weight, right, sigma, tail_sums(terms, total), tail_sums(squared, float(np.vdot(weight, weight)))
    )


def regressed(
    weight: Array,
    gram: Array,
    target_cross: Array,
    target_energy: float,
    ridge: float,
    output_energy: float | None = None,
) -> LowRankBasis:
    """Reduced-rank regression of a wanted output on the input that is delivered.

    Args:
        weight: (K, N) the original weight, which the ridge pulls to.
        gram: (K, K) of the input x.
        target_cross: (K, N) E[xᵀ t] with the wanted output t.
        target_energy: E|t|².
        ridge: In units of the mean diagonal of gram.
        output_energy: What errors are relative to; ``target_energy`` if None.

    Source: Izenman 1975; with t the output of the original model this is what SVD-LLM V2 and AA-SVD
    compute from propagated inputs.
    """
    weight = np.asarray(weight, np.float64)
    star = regression(gram, target_cross, weight, ridge)
    sigma, right = right_basis(psd_root(with_ridge(gram, ridge)), star)
    directions = star @ right  # (K, q)
    explained = 2 * np.einsum("kq,kq->q", directions, target_cross @ right)
    explained -= np.einsum("kq,kq->q", directions, gram @ directions)
    left = np.maximum(target_energy - np.concatenate([[0.0], np.cumsum(explained)]), 0.0)
    return LowRankBasis(star, right, sigma, Tail(left, target_energy if output_energy is None else output_energy), None)
