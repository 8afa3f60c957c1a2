"""One side of a convolution narrowed: k x k into few channels then 1 x 1, or 1 x 1 then k x k.

    output_channel   W[o, i, k] ≈ Σ_r second[o, r] · first[r, i, k]
    input_channel    W[o, i, k] ≈ Σ_r second[o, r, k] · first[r, i]

Both are a separable convolution whose first factor covers all kernel axes, or none: they return ``Separable``,
and ``refit_second`` and ``separable_als`` (with ``axis=(0, 1)`` or ``axis=()``) work on them.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg

from lowrank_onnx.decompositions.output_metric import checked_rank, checked_weight
from lowrank_onnx.decompositions.separable import Separable, Split, balanced, full_rank
from lowrank_onnx.linalg import Array, finite_svd, psd_root


def output_channel(weight: Array, rank: int, output_cov: Array | None = None) -> Separable:
    """k x k into r channels, then 1 x 1: the leading directions of the output.

    Args:
        weight: (O, I, *kernel).
        rank: 1 ≤ rank ≤ min(O, I · prod(kernel)).
        output_cov: (O, O) centred covariance of the layer's output, with whatever ridge the caller wants in it
            (``W (G + λI) Wᵀ``); None: the weight alone.

    Returns:
        first ``Uᵀ W`` (r, I, *kernel) and second ``U`` (O, r, 1, ...), U orthonormal, most important first.
        The error is of the output on the covariance given, and no factors of this rank have a smaller one;
        without a covariance it is that of the weight.

    Source: Zhang et al. 2016, arXiv:1505.06798, linear case; DRONE (NeurIPS 2021). Directions are sought in
    the column space of W only, so that full rank gives W back even where the covariance is singular.
    """
    weight = checked_weight(weight)
    axes = tuple(range(weight.ndim - 2))
    checked_rank(rank, full_rank(weight, axes), f"rank of an output-channel split of {weight.shape}")
    split = Split(weight.shape, axes)
    matrix = split.pack(weight)[:, 0]  # (O, P)
    directions, sigma, _ = finite_svd(matrix)
    if output_cov is None:
        energies = sigma**2
    else:
        cov = _checked_metric(output_cov, len(weight), "output covariance")
        energies, turn = scipy.linalg.eigh(directions.T @ cov @ directions)
        energies, turn = np.maximum(energies[::-1], 0.0), turn[:, ::-1]
        directions = directions @ turn
    basis = directions[:, :rank]
    basis = basis * np.where(basis[np.abs(basis).argmax(axis=0), np.arange(rank)] < 0, -1.0, 1.0)
    return Separable(*split.factors((basis.T @ matrix).T, basis[:, None, :]), _tail(energies, rank))


def input_channel(weight: Array, rank: int, channel_cov: Array | None = None) -> Separable:
    """1 x 1 to r channels, then k x k: the directions of the input that matter.

    Args:
        weight: (O, I, *kernel).
        rank: 1 ≤ rank ≤ min(I, O · prod(kernel)).
        channel_cov: (I, I) centred covariance of the input channels, pooled over positions; None: identity.

    Returns:
        first (r, I, 1, ...) and second (O, r, *kernel), of even scale, nested. The error is relative, in
        the metric given: that of the output if positions under the kernel were uncorrelated. The best of
        this rank in that metric.
    """
    weight = checked_weight(weight)
    checked_rank(rank, full_rank(weight, ()), f"rank of an input-channel split of {weight.shape}")
    split = Split(weight.shape, ())
    matrix = split.pack(weight).reshape(-1, split.p)  # (O·K, I)
    if channel_cov is None:
        root = np.eye(split.p)
    else:
        root = psd_root(_checked_metric(channel_cov, split.p, "channel covariance"))
    rows, sigma, columns = finite_svd(matrix)  # rows (O·K, q)
    # Within the span of the weight, so that full rank gives W back even where the covariance is singular.
    turn, energies, _ = finite_svd((sigma[:, None] * columns) @ root)
    basis = (rows @ turn)[:, :rank]  # (O·K, r): Ŵ = basis basisᵀ W, no inverse of the root
    a, h = balanced(matrix.T @ basis, basis.reshape(len(weight), split.q, rank))
    return Separable(*split.factors(a, h), _tail(energies**2, rank))


def _checked_metric(metric: Array, size: int, what: str) -> Array:
    metric = np.asarray(metric, np.float64)
    if metric.shape != (size, size):
        raise ValueError(f"expected a {what} of shape {(size, size)}, got {metric.shape}")
    return (metric + metric.T) / 2


def _tail(energies: Array, rank: int) -> float:
    total = float(energies.sum())
    return float(np.sqrt(energies[rank:].sum() / total)) if total > 0 else 0.0
