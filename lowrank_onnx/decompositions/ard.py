"""Automatic relevance determination: every component has a precision of its own, and those without use die out.

    Y = B Aᵀ + E,   b_h ~ N(0, I/α_h),   a_h ~ N(0, I/α_h),   α_h ~ Gamma(a₀, b₀),   E_ij ~ N(0, 1/β)

Started from the singular vectors, the variational updates never leave them: each is a formula in one singular value.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lowrank_onnx.decompositions.evbmf import Posterior, evidence
from lowrank_onnx.linalg import Array, finite_svd

_SHAPE, _RATE = 1e-6, 1e-6  # a₀, b₀: hardly an opinion, on a matrix whose entries have mean square 1


@dataclass(frozen=True, eq=False)
class Relevance:
    """What the updates end at, for the components that stay.

    Attributes:
        long, short: (r,) lengths of the means along the longer and the shorter side of the matrix.
        long_variance, short_variance: (r,) variances of every entry.
        precision: (r,) α_h.
        noise: 1/β.
        rounds: Updates made.
    """

    long: Array
    short: Array
    long_variance: Array
    short_variance: Array
    precision: Array
    noise: float
    rounds: int

    @property
    def rank(self) -> int:
        """Components that stay; may be 0."""
        return len(self.long)

    @property
    def shrunk(self) -> Array:
        """(r,) singular values of the mean of the matrix."""
        return np.asarray(self.long * self.short)


def ard(matrix: Array, noise: float | None = None, rounds: int = 2000) -> Posterior:
    """Factorize a matrix with automatic relevance determination.

    Args:
        matrix: (m, n), finite.
        noise: 1/β if known; estimated if None.
        rounds: Most updates.

    Raises:
        ValueError: No matrix, or a negative noise.
    """
    matrix = np.asarray(matrix, np.float64)
    if matrix.ndim != 2:
        raise ValueError(f"expected a matrix, got shape {matrix.shape}")
    u, sigma, vt = finite_svd(matrix)
    found = relevance(sigma, matrix.shape, noise, rounds)
    kept = found.rank
    wide = matrix.shape[1] >= matrix.shape[0]
    left, right = (found.short, found.long) if wide else (found.long, found.short)
    spread = (found.short_variance, found.long_variance) if wide else (found.long_variance, found.short_variance)
    return Posterior(u[:, :kept] * left, right[:, None] * vt[:kept], *spread, found.noise)


def relevance(sigma: Array, shape: tuple[int, int], noise: float | None = None, rounds: int = 2000) -> Relevance:
    """Run the updates on the singular values alone.

    Args:
        sigma: (q,) singular values, falling, q = min(shape).
        shape: (m, n).
        noise: 1/β if known; else it starts at the level ``evbmf`` finds and follows the updates, as from a level far
            off they end at a poor local optimum.
        rounds: Most updates.

    Raises:
        ValueError: As ``evbmf.evidence``.

    Source: Babacan, Luessi, Molina & Katsaggelos 2012, doi:10.1109/TSP.2012.2197748 (sparse Bayesian low rank), for a
    fully observed matrix.
    """
    short, long = sorted(shape)
    start = evidence(sigma, shape, noise)
    gamma = np.asarray(sigma, np.float64)
    gamma = gamma[gamma > 0]
    if start.noise == 0 or not len(gamma):
        gamma = gamma[: start.rank]
        root, none = np.sqrt(gamma), np.zeros(len(gamma))
        return Relevance(root, root, none, none, 1 / gamma, 0.0, 0)
    scale = float(np.linalg.norm(gamma)) / np.sqrt(short * long)  # b₀ has a unit, the answer must not depend on it
    gamma, level = gamma / scale, start.noise / scale**2
    total = float(gamma @ gamma)
    done = 0
    while True:
        found, level, made = _updates(gamma, short, long, level, noise is None, total, rounds - done)
        done += made
        useful = _worth(gamma, short, long, found, level) < 0
        if useful.all() or done >= rounds:
            break
        gamma = gamma[useful]  # a local optimum each; without them the level of the noise is another one
    a, b, s_a, s_b, alpha = (values[useful] for values in found)
    root = np.sqrt(scale)
    return Relevance(root * a, root * b, scale * s_a, scale * s_b, alpha / scale, scale**2 * level, done)


def _updates(
    gamma: Array, short: int, long: int, level: float, estimate: bool, total: float, rounds: int
) -> tuple[tuple[Array, Array, Array, Array, Array], float, int]:
    """Coordinate updates of all components until they stand still."""
    a, b = np.sqrt(gamma), np.sqrt(gamma)
    s_a, s_b = level / np.maximum(gamma, 1e-300), level / np.maximum(gamma, 1e-300)
    alpha = (short + long) / (a**2 + b**2)
    made = 0
    while made < max(rounds, 1):
        made += 1
        before = a * b
        s_a = 1 / ((b**2 + short * s_b) / level + alpha)
        a = gamma * b * s_a / level
        s_b = 1 / ((a**2 + long * s_a) / level + alpha)
        b = gamma * a * s_b / level
        seen_a, seen_b = a**2 + long * s_a, b**2 + short * s_b
        alpha = (short + long + 2 * _SHAPE) / (seen_a + seen_b + 2 * _RATE)
        if estimate:
            level = max(total - 2 * float(gamma @ (a * b)) + float(seen_a @ seen_b), 1e-15 * total) / (short * long)
        if not len(gamma) or np.abs(a * b - before).max() <= 1e-9 * gamma[0]:
            break
    return (a, b, s_a, s_b, alpha), level, made


def _worth(gamma: Array, short: int, long: int, found: tuple[Array, Array, Array, Array, Array], level: float) -> Array:
    """(r,) what each component adds to twice the free energy, against leaving it out: below 0 it is worth having."""
    a, b, s_a, s_b, alpha = found
    fit = ((a**2 + long * s_a) * (b**2 + short * s_b) - 2 * gamma * a * b) / level
    prior = sum(
        alpha * mean**2 + length * (alpha * spread - 1 - np.log(np.maximum(alpha * spread, 1e-300)))
        for mean, spread, length in ((a, s_a, long), (b, s_b, short))
    )
    return np.asarray(fit + prior)
