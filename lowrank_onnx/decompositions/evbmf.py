"""Variational Bayes of a matrix factorization, in closed form: how many components stand out of the noise.

    Y = B Aᵀ + E,   b_h ~ N(0, c_b,h² I),   a_h ~ N(0, c_a,h² I),   E_ij ~ N(0, σ²)

With the prior variances fitted to Y (empirical Bayes) and a posterior in which A and B are independent, the
global optimum is known from the singular values of Y alone. What E stands for in a trained weight is what
the factorization chooses to leave out: weights are no noisy data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy.optimize

from lowrank_onnx.linalg import Array, finite_svd

_SCAN = 400  # noise levels looked at before polishing: the free energy has a minimum for nearly every rank
_POLISHED = 5
ROUNDING = 1e-14  # of the mean square of the entries: less noise than this is rounding to single precision


@dataclass(frozen=True, eq=False)
class Posterior:
    """Independent Gaussians over the two factors of a matrix (m, n); component h is ``u_h v_hᵀ``.

    Attributes:
        left, right: (m, r) and (r, n) the posterior means; their product is the mean of the matrix.
        left_variance, right_variance: (r,) of every entry of a column of ``left``, of a row of ``right``.
        noise: σ², the variance of what the components leave.
    """

    left: Array
    right: Array
    left_variance: Array
    right_variance: Array
    noise: float

    @property
    def rank(self) -> int:
        """Number of components that stand out of the noise; may be 0."""
        return len(self.left_variance)

    @property
    def mean(self) -> Array:
        """(m, n) the mean of the matrix."""
        return np.asarray(self.left @ self.right)

    def variance(self) -> Array:
        """(m, n) the variance of every entry of the product, without the noise."""
        return self.output_variance(np.eye(len(self.left)))

    def output_variance(self, inputs: Array) -> Array:
        """Variance of ``x @ (left @ right)`` for rows x.

        Args:
            inputs: (rows, m).

        Returns:
            (rows, n): ``Σ_h (x·m_h)² s_r,h + |x|² s_l,h (m_r,h² + s_r,h)``, exact for this posterior.
        """
        codes = np.asarray(inputs, np.float64) @ self.left
        size = np.einsum("tm,tm->t", inputs, inputs)
        spread = self.left_variance @ self.right**2 + float(self.left_variance @ self.right_variance)  # (n,)
        return np.asarray((codes**2 @ self.right_variance)[:, None] + size[:, None] * spread)

    def draw(self, rng: np.random.Generator) -> tuple[Array, Array]:
        """One sample of both factors, (m, r) and (r, n)."""
        left = self.left + rng.standard_normal(self.left.shape) * np.sqrt(self.left_variance)
        right = self.right + rng.standard_normal(self.right.shape) * np.sqrt(self.right_variance)[:, None]
        return left, right


@dataclass(frozen=True, eq=False)
class Evidence:
    """What the singular values tell of a matrix (m, n).

    Attributes:
        rank: Components whose posterior mean is not zero; without noise those that stand out of rounding.
        noise: σ².
        shrunk: (rank,) singular values of the posterior mean, each below the one of the matrix.
    """

    rank: int
    noise: float
    shrunk: Array


def evbmf(matrix: Array, noise: float | None = None) -> Posterior:
    """Factorize a matrix by empirical variational Bayes.

    Args:
        matrix: (m, n), finite.
        noise: σ² if known; estimated if None.

    Raises:
        ValueError: No matrix, or a negative noise.

    Source: Nakajima, Sugiyama, Babacan & Tomioka 2013, JMLR 14 (global analytic solution of fully observed
    variational Bayesian matrix factorization), Theorem 2 and Corollary 1 for the posterior, Theorem 5 for σ².
    """
    matrix = np.asarray(matrix, np.float64)
    if matrix.ndim != 2:
        raise ValueError(f"expected a matrix, got shape {matrix.shape}")
    u, sigma, vt = finite_svd(matrix)
    found = evidence(sigma, matrix.shape, noise)
    return posterior_of(u, sigma, vt, found.shrunk, found.noise)


def posterior_of(u: Array, sigma: Array, vt: Array, shrunk: Array, noise: float) -> Posterior:
    """The posterior whose mean has the singular values ``shrunk`` in the singular vectors of the matrix.

    Args:
        u, sigma, vt: Singular value decomposition of the matrix (m, n), falling.
        shrunk: (r,) of the components kept, as ``evidence`` finds them.
        noise: σ².
    """
    rows, columns = len(u), vt.shape[1]
    rank = len(shrunk)
    kept = sigma[:rank]
    if noise == 0:
        root = np.sqrt(kept)
        return Posterior(u[:, :rank] * root, root[:, None] * vt[:rank], np.zeros(rank), np.zeros(rank), 0.0)
    short, long = sorted((rows, columns))
    tau = shrunk * kept / (long * noise)
    delta = np.sqrt(long * shrunk / (short * kept)) * (1 + short / long / tau)
    of_long, of_short = np.sqrt(shrunk * delta), np.sqrt(shrunk / delta)
    var_long, var_short = noise * delta / kept, noise / (kept * delta)
    wide = columns >= rows
    left, right = (of_short, of_long) if wide else (of_long, of_short)
    left_variance, right_variance = (var_short, var_long) if wide else (var_long, var_short)
    return Posterior(u[:, :rank] * left, right[:, None] * vt[:rank], left_variance, right_variance, noise)


def evidence(sigma: Array, shape: tuple[int, int], noise: float | None = None) -> Evidence:
    """Tell from the singular values how many components stand out, and how far each is shrunk.

    Args:
        sigma: (q,) singular values, falling, q = min(shape).
        shape: (m, n).
        noise: σ² if known; estimated if None.

    Raises:
        ValueError: Not all singular values are there, or the noise is negative.
    """
    sigma = np.asarray(sigma, np.float64)
    short, long = sorted(shape)
    if sigma.shape != (short,):
        raise ValueError(f"expected the {short} singular values of a matrix {tuple(shape)}, got {sigma.shape}")
    if noise is not None and not noise >= 0:
        raise ValueError(f"the noise variance must not be negative, got {noise}")
    if not sigma.any():
        return Evidence(0, 0.0 if noise is None else noise, np.zeros(0))
    level = noise_variance(sigma, shape) if noise is None else noise
    # Without noise there is still rounding: the singular values beyond the rank of a stored weight are never zero.
    rounding = ROUNDING * float(sigma @ sigma) / (short * long)
    rank = int(np.count_nonzero(sigma**2 > long * max(level, rounding) * threshold(short / long)))
    if level == 0:
        return Evidence(rank, 0.0, sigma[:rank])
    return Evidence(rank, level, shrink(sigma[:rank], shape, level))


def shrink(sigma: Array, shape: tuple[int, int], noise: float) -> Array:
    """Singular values of the posterior mean, for components that stand out of the noise σ²."""
    short, long = sorted(shape)
    ratio = noise / sigma**2
    inner = 1 - (short + long) * ratio
    return np.asarray(sigma / 2 * (inner + np.sqrt(np.maximum(inner**2 - 4 * short * long * ratio**2, 0.0))))


def threshold(alpha: float) -> float:
    """x̲(α): a component stands out where γ² / (M σ²) is above it; α = L / M in (0, 1].

    Nakajima et al. give 2.5129 √α for the root τ̲ of Φ(τ) + Φ(τ/α), Φ(z) = ln(1 + z)/z - ½; we solve for it.
    """

    def phi(z: float) -> float:
        return math.log1p(z) / z - 0.5

    guess = 2.5129 * math.sqrt(alpha)
    tau = float(scipy.optimize.brentq(lambda t: phi(t) + phi(t / alpha), guess / 10, guess * 10, xtol=1e-14))
    return (1 + tau) * (1 + alpha / tau)


def noise_variance(sigma: Array, shape: tuple[int, int]) -> float:
    """σ² with the least free energy: the global minimum, which is one among many.

    Between two levels at which a component starts to stand out the free energy is smooth; those levels are
    looked at besides a dense scan, and the best few brackets polished.

    Args:
        sigma: (q,) all singular values, falling, not all zero.
        shape: (m, n).
    """
    short, long = sorted(shape)
    alpha, squared = short / long, np.asarray(sigma, np.float64) ** 2
    limit = threshold(alpha)
    most = min(math.ceil(short / (1 + alpha)) - 1, short)
    high = float(squared.sum()) / (short * long)
    after = squared[most] / (long * limit) if most < short else 0.0
    low = max(float(after), float(squared[most:].mean()) / long if most < short else 0.0)
    if low <= ROUNDING * high:
        return 0.0  # less than full rank, without noise
    steps = squared / (long * limit)
    inside = steps[(steps > low) & (steps < high)]
    levels = np.unique(np.concatenate([np.geomspace(low, high, _SCAN), inside]))
    energies = np.array([free_energy(level, squared, short, long, limit) for level in levels])
    best, least = float(levels[energies.argmin()]), float(energies.min())
    left = np.concatenate([[True], energies[1:] <= energies[:-1]])
    right = np.concatenate([energies[:-1] <= energies[1:], [True]])
    dips = np.flatnonzero(left & right)
    for place in dips[energies[dips].argsort()][:_POLISHED]:
        bounds = (levels[max(place - 1, 0)], levels[min(place + 1, len(levels) - 1)])
        if bounds[0] < bounds[1]:
            found = scipy.optimize.minimize_scalar(
                free_energy, bounds=bounds, args=(squared, short, long, limit), method="bounded",
                options={"xatol": 1e-9 * bounds[1]},
            )  # fmt: skip
            if found.fun < least:
                best, least = float(found.x), float(found.fun)
    return best


def free_energy(noise: float, squared: Array, short: int, long: int, limit: float) -> float:
    """Ω(σ²), up to a constant and a factor: -2/M times the log evidence bound, all else at its optimum.

    Args:
        noise: σ² > 0.
        squared: (L,) squared singular values.
        short, long: L and M.
        limit: ``threshold(L / M)``.
    """
    alpha = short / long
    x = np.maximum(squared, 1e-300) / (long * noise)
    out = x > limit
    above = x[out]
    tau = 0.5 * (above - 1 - alpha + np.sqrt(np.maximum((above - 1 - alpha) ** 2 - 4 * alpha, 0.0)))
    standing = above - tau + np.log((tau + 1) / above) + alpha * np.log(tau / alpha + 1)
    # ln σ² stands in every -ln x; a singular value of exactly zero adds a constant.
    return float(x[~out].sum() - np.log(x[~out]).sum() + standing.sum())
