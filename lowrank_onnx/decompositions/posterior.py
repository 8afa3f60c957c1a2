"""Bayesian least squares of an output factor: how sure data make it, and of what it predicts.

    t = z U + noise,   U (k, N) ~ N(0, noise_j / λ) a priori,   noise_j of output j

    U | data ~ N(Ū, noise_j A⁻¹),   A = ZᵀZ + λI,   Ū = A⁻¹ ZᵀT
    Var(t_j | z) = noise_j (1 + z A⁻¹ zᵀ)

One (k, k) matrix serves all outputs. z A⁻¹ zᵀ is small where the data have been and grows away from them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg

from lowrank_onnx.linalg import Array

PRECISIONS = tuple(10.0 ** (step / 2) for step in range(-16, 9))
"""Candidates for λ, in units of the mean diagonal of ZᵀZ."""

_LEAST_NOISE = 1e-12  # of the mean square of an output: a perfect fit has no logarithm


@dataclass(frozen=True, eq=False)
class Posterior:
    """What data say about an output factor.

    Attributes:
        mean: (k, N) Ū.
        covariance: (k, k) A⁻¹; times ``noise[j]`` it is the covariance of column j.
        noise: (N,) variance of what the codes do not tell of output j.
        precision: λ.
        rows: Number of rows seen.
    """

    mean: Array
    covariance: Array
    noise: Array
    precision: float
    rows: int

    def leverage(self, codes: Array) -> Array:
        """(n,) z A⁻¹ zᵀ of codes (n, k): the share of the noise that being unsure of U adds."""
        return np.asarray(np.einsum("nk,kl,nl->n", codes, self.covariance, codes))

    def variance(self, codes: Array) -> Array:
        """(n, N) predictive variance of the outputs at codes (n, k)."""
        return np.asarray(np.outer(1 + self.leverage(codes), self.noise))

    def relative_spread(self) -> float:
        """Root of the expected ``|U - Ū|²`` over ``|Ū|²``; infinite where the mean is zero."""
        spread = float(np.trace(self.covariance)) * float(self.noise.sum())
        energy = float(np.vdot(self.mean, self.mean))
        return float(np.sqrt(spread / energy)) if energy > 0 else float("inf")

    def known(self) -> float:
        """How many of the k directions the data determine, rather than the prior: k - λ tr A⁻¹."""
        return float(len(self.covariance) - self.precision * np.trace(self.covariance))


def fit_posterior(gram: Array, cross: Array, energy: Array, rows: int, precision: float | None = None) -> Posterior:
    """Return the posterior of U in t = z U + noise.

    Args:
        gram: (k, k) sum of zᵀ z over the rows.
        cross: (k, N) sum of zᵀ t.
        energy: (N,) sum of t².
        rows: How many rows were summed, ≥ 1.
        precision: λ; chosen by the evidence among ``PRECISIONS`` if None.

    The noise is the one under which the data are likeliest once U is integrated out,
    ``(t·t - cᵀ A⁻¹ c) / rows``, which counts the fitted directions by itself.

    Source: Bishop, Pattern Recognition and Machine Learning, 2006, sections 3.3 and 3.5; a noise of its own for
    every output, and the prior in units of it, as A⁻¹ is the same for all outputs only then.
    """
    values, vectors = scipy.linalg.eigh(np.asarray(gram, np.float64))
    values = np.maximum(values, 0.0)
    turned = vectors.T @ np.asarray(cross, np.float64)  # (k, N)
    floor = _LEAST_NOISE * np.asarray(energy, np.float64) + np.finfo(np.float64).tiny

    def left(chosen: float) -> Array:
        return np.asarray(np.maximum(energy - np.sum(turned**2 / (values + chosen)[:, None], axis=0), floor))

    def evidence(chosen: float) -> float:
        spread = float(np.log1p(values / chosen).sum())
        return float(-0.5 * (rows * np.log(left(chosen)).sum() + cross.shape[1] * spread))

    if precision is None:
        scale = float(values.mean()) or 1.0
        precision = max((scale * entry for entry in PRECISIONS), key=evidence)
    shrunk = 1 / (values + precision)
    covariance = (vectors * shrunk) @ vectors.T
    return Posterior(vectors @ (shrunk[:, None] * turned), covariance, left(precision) / rows, float(precision), rows)
