"""A layer at the mean of a sampled posterior: the best map of a rank, as the mean itself has a higher one.

    Y = S W = B Aᵀ + E,   S² = G + ridge,   M = E[B Aᵀ | Y],   W ≈ S⁻¹ M V Vᵀ

V the leading right singular vectors of M: what is nearest to M among all products of the rank, in the metric of the
data. What the data never show of W stays in its projection on V.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg

from lowrank_onnx.decompositions.bpmf import bpmf
from lowrank_onnx.linalg import Array, finite_svd, with_ridge

BURN_IN = 50  # sweeps of each of two chains
_SEEN = 1e-12  # of the largest eigenvalue; what is below is rounding


@dataclass(frozen=True, eq=False)
class Drawn:
    """Factors, and what the chains tell of themselves.

    Attributes:
        first, second: (K, r) and (r, N), the second with orthonormal rows.
        samples, r_hat, effective: As ``bpmf.Sampled`` has them.
    """

    first: Array
    second: Array
    samples: int
    r_hat: float
    effective: float


def posterior_map(weight: Array, gram: Array | None, ridge: float, rank: int, samples: int) -> Drawn:
    """Sample the posterior of a layer y = x W, and take the best map of a rank from its mean.

    Args:
        weight: (K, N), not of this rank already: that would leave no noise to speak of.
        gram: (K, K) second moment of x; None samples W itself.
        ridge: In units of the mean diagonal of gram.
        rank: Of the model that is sampled, and of the map.
        samples: As ``bpmf`` takes them.

    Raises:
        ValueError: As ``bpmf``.
    """
    weight = np.asarray(weight, np.float64)
    if gram is None:
        found = bpmf(weight, rank, samples, BURN_IN)
        _, _, vt = finite_svd(found.mean)
        return Drawn(found.mean @ vt[:rank].T, vt[:rank], found.samples, found.r_hat, found.effective)
    values, vectors = scipy.linalg.eigh(with_ridge(gram, ridge))
    seen = values > _SEEN * values[-1]
    root, axes = np.sqrt(values[seen]), vectors[:, seen]
    wanted = (axes * root) @ (axes.T @ weight)  # the rows of the symmetric root are more alike than principal axes
    found = bpmf(wanted, rank, samples, BURN_IN)
    _, _, vt = finite_svd(found.mean)
    kept = vt[:rank].T
    change = axes @ ((axes.T @ (found.mean - wanted) @ kept) / root[:, None])
    return Drawn(weight @ kept + change, kept.T, found.samples, found.r_hat, found.effective)


def operations(shape: tuple[int, int], rank: int, samples: int) -> float:
    """Multiply-accumulates of the products that ``posterior_map`` takes."""
    return 3.0 * shape[0] * shape[1] * rank * (samples + 2 * BURN_IN)
