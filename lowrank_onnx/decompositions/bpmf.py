"""Bayesian probabilistic matrix factorization by Gibbs sampling: the posterior itself, no independence assumed.

    Y = B Aᵀ + E,   rows of B ~ N(μ_B, Λ_B⁻¹),   rows of A ~ N(μ_A, Λ_A⁻¹),   E_ij ~ N(0, 1/β)
    (μ, Λ) ~ Normal-Wishart,   β ~ Gamma

A weight has no gaps, so that all rows of a side share one precision: a sweep is two Cholesky factors of the rank and
a few products.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg

from lowrank_onnx.linalg import Array, finite_svd

MOST_R_HAT, LEAST_EFFECTIVE = 1.1, 20.0  # beyond them the chains have not met; Gelman et al., section 11.5
_CHAINS = 2
_WATCHED = 5  # singular values of the product that the diagnostics look at, besides the noise


@dataclass(frozen=True, eq=False)
class Sampled:
    """What the chains tell.

    Attributes:
        mean: (m, n) mean of B Aᵀ over the samples.
        variance: (m, n) variance of every entry over the samples.
        noise: Mean of 1/β.
        r_hat: Largest split R̂ over what does not change with the basis: the noise, the leading singular values of
            the product. Near 1 where the chains have met; above ``MOST_R_HAT`` take more samples.
        effective: Least number of independent samples that the chains are worth for one of these.
        samples: Of all chains together, after burn-in.
    """

    mean: Array
    variance: Array
    noise: float
    r_hat: float
    effective: float
    samples: int


def bpmf(matrix: Array, rank: int, samples: int = 200, burn_in: int = 50, seed: int = 0) -> Sampled:
    """Sample the posterior of a factorization.

    Args:
        matrix: (m, n), finite, not all zero.
        rank: Columns of B and A.
        samples: Sweeps that count, over all chains.
        burn_in: Sweeps before them, in each chain.
        seed: Of the random numbers.

    Raises:
        ValueError: A rank or a number of samples out of range, or a matrix of zeros.

    Source: Salakhutdinov & Mnih 2008, doi:10.1145/1390156.1390267, with a Gamma prior on the noise; R̂ and the
    effective number of samples as in Gelman et al., Bayesian Data Analysis, 3rd edition, section 11.4 and 11.5.
    """
    matrix = np.asarray(matrix, np.float64)
    if matrix.ndim != 2 or not 1 <= rank <= min(matrix.shape):
        raise ValueError(f"expected a matrix and a rank from 1 to its shorter side, got {matrix.shape} and {rank}")
    if samples < 8 or burn_in < 0:
        raise ValueError(f"expected at least 8 samples and no negative burn-in, got {samples} and {burn_in}")
    scale = float(np.sqrt(np.mean(matrix**2)))
    if scale == 0:
        raise ValueError("the matrix is all zeros")
    length = -(-samples // _CHAINS)
    watched = np.empty((_CHAINS, length, 1 + min(_WATCHED, rank)))
    total, squares = np.zeros(matrix.shape), np.zeros(matrix.shape)
    for chain, spawned in enumerate(np.random.SeedSequence(seed).spawn(_CHAINS)):
        state = _Chain(matrix / scale, rank, np.random.default_rng(spawned))
        for sweep in range(burn_in + length):
            state.sweep()
            if sweep >= burn_in:
                total += state.product
                squares += state.product**2
                watched[chain, sweep - burn_in] = state.watched()
    count = _CHAINS * length
    mean = total / count
    variance = np.maximum(squares / count - mean**2, 0.0) * count / (count - 1)
    diagnosed = [diagnose(watched[:, :, place]) for place in range(watched.shape[2])]
    return Sampled(
        scale * mean,
        scale**2 * variance,
        scale**2 * float(watched[:, :, 0].mean()),
        max(r_hat for r_hat, _ in diagnosed),
        min(effective for _, effective in diagnosed),
        count,
    )


class _Chain:
    """One chain, of a matrix whose entries have mean square 1."""

    def __init__(self, matrix: Array, rank: int, rng: np.random.Generator) -> None:
        self.matrix, self.rng = matrix, rng
        u, sigma, vt = finite_svd(matrix)
        root = np.sqrt(sigma[:rank])
        # Chains that start apart show by meeting that they have forgotten where they began.
        self.left = u[:, :rank] * root * (1 + 0.2 * rng.standard_normal(rank))
        self.right = vt[:rank].T * root * (1 + 0.2 * rng.standard_normal(rank))
        self.product = self.left @ self.right.T
        self.noise = max(float(np.mean((matrix - self.product) ** 2)), 1e-12)

    def sweep(self) -> None:
        """Draw both factors and the noise once."""
        self.left = self._rows(self.matrix, self.right, self.left)
        self.right = self._rows(self.matrix.T, self.left, self.right)
        self.product = self.left @ self.right.T
        lost = self.matrix - self.product
        shape, rate = 1e-3 + lost.size / 2, 1e-3 + float(np.vdot(lost, lost)) / 2
        self.noise = rate / self.rng.gamma(shape)

    def _rows(self, matrix: Array, other: Array, present: Array) -> Array:
        """Draw the hyperparameters of one side given its rows, then its rows given the other side."""
        mean, precision = self._hyper(present)
        precision_of_rows = precision + other.T @ other / self.noise
        wanted = matrix @ other / self.noise + precision @ mean
        lower = np.linalg.cholesky(precision_of_rows)
        centre = scipy.linalg.cho_solve((lower, True), wanted.T)
        spread = scipy.linalg.solve_triangular(lower.T, self.rng.standard_normal(centre.shape), lower=False)
        return np.asarray((centre + spread).T)

    def _hyper(self, rows: Array) -> tuple[Array, Array]:
        """(μ, Λ) given the rows of one side: Normal-Wishart with mean 0, one prior row, as many degrees as columns."""
        count, rank = rows.shape
        mean = rows.mean(axis=0)
        centred = rows - mean
        inverse = np.eye(rank) + centred.T @ centred + count / (1 + count) * np.outer(mean, mean)
        lower = np.linalg.cholesky(np.linalg.inv(inverse))
        # Bartlett: a Wishart draw from a triangle of normals and chi-squares.
        triangle = np.tril(self.rng.standard_normal((rank, rank)), -1)
        triangle[np.diag_indices(rank)] = np.sqrt(self.rng.chisquare(rank + count - np.arange(rank)))
        root = lower @ triangle
        precision = root @ root.T
        centre = count * mean / (1 + count)
        upper = np.linalg.cholesky((1 + count) * precision).T
        return centre + scipy.linalg.solve_triangular(upper, self.rng.standard_normal(rank), lower=False), precision

    def watched(self) -> Array:
        """What does not change with the basis: the noise, and the leading singular values of the product."""
        left, right = (np.asarray(np.linalg.qr(side)[1]) for side in (self.left, self.right))
        return np.concatenate([[self.noise], np.linalg.svd(left @ right.T, compute_uv=False)[:_WATCHED]])


def diagnose(values: Array) -> tuple[float, float]:
    """Split R̂ and the effective number of samples of one quantity.

    Args:
        values: (chains, samples).
    """
    half = values.shape[1] // 2
    split = np.concatenate([values[:, :half], values[:, -half:]])
    length = split.shape[1]
    within = float(split.var(axis=1, ddof=1).mean())
    between = float(split.mean(axis=1).var(ddof=1))
    if within <= 0:
        return (1.0 if between <= 0 else np.inf), float(split.size)
    pooled = (length - 1) / length * within + between
    centred = split - split.mean(axis=1, keepdims=True)
    correlations = np.empty(length)
    for lag in range(length):
        covariance = float(np.mean(np.sum(centred[:, : length - lag] * centred[:, lag:], axis=1) / length))
        correlations[lag] = 1 - (within - covariance * length / (length - 1)) / pooled
    tau, lag = 1.0, 1
    while lag + 1 < length and correlations[lag] + correlations[lag + 1] > 0:  # Geyer's pairs
        tau += 2 * (correlations[lag] + correlations[lag + 1])
        lag += 2
    return float(np.sqrt(pooled / within)), min(float(split.size), split.size / tau)
