"""The posterior of an output factor against Monte Carlo, a long-hand solution and a planted truth."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from lowrank_onnx.decompositions.posterior import PRECISIONS, Posterior, fit_posterior
from lowrank_onnx.linalg import Array
from tests.builders import difference


def planted(rows: int, codes: int, outputs: int, seed: int = 0) -> tuple[Array, Array, Array, Array]:
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((rows, codes)) * np.linspace(2, 0.5, codes)
    noise = rng.uniform(0.1, 2.0, outputs)
    u = rng.standard_normal((codes, outputs)) * np.sqrt(noise)
    t = z @ u + rng.standard_normal((rows, outputs)) * np.sqrt(noise)
    return z, u, noise, t


def fitted(z: Array, t: Array, precision: float | None = None) -> Posterior:
    return fit_posterior(z.T @ z, z.T @ t, np.sum(t**2, axis=0), len(z), precision)


def test_mean_and_covariance_are_those_of_the_long_hand_solution() -> None:
    z, _, _, t = planted(40, 6, 3)
    made = fitted(z, t, 0.7)
    a = z.T @ z + 0.7 * np.eye(6)
    assert difference(made.mean, np.linalg.solve(a, z.T @ t)) < 1e-10
    assert difference(made.covariance, np.linalg.inv(a)) < 1e-10
    assert made.known() == pytest.approx(np.trace(z.T @ z @ np.linalg.inv(a)))


def test_predictive_variance_agrees_with_monte_carlo_within_three_percent() -> None:
    z, _, _, t = planted(25, 8, 3)
    made = fitted(z, t)
    rng = np.random.default_rng(1)
    new = np.stack([z[0], 4 * z[1], np.full(8, 3.0)])
    root = np.linalg.cholesky(made.covariance)
    draws = 40_000
    for j in range(3):
        factors = made.mean[:, j] + np.sqrt(made.noise[j]) * rng.standard_normal((draws, 8)) @ root.T
        values = factors @ new.T + np.sqrt(made.noise[j]) * rng.standard_normal((draws, 3))
        assert np.abs(values.var(axis=0) / made.variance(new)[:, j] - 1).max() < 0.03


def test_predicted_variance_is_that_of_the_error_on_new_rows_from_the_same_model() -> None:
    # Over many data sets drawn from the prior: the squared error of the prediction, in predicted variances, is 1.
    ratios, residuals = [], []
    for seed in range(300):
        z, u, noise, t = planted(30, 10, 4, seed)
        made = fitted(z, t, 1.0)
        rng = np.random.default_rng(1000 + seed)
        new = 3 * rng.standard_normal((20, 10))
        seen = new @ u + rng.standard_normal((20, 4)) * np.sqrt(noise)
        error = (seen - new @ made.mean) ** 2
        ratios.append(np.mean(error / np.outer(1 + made.leverage(new), noise)))
        residuals.append(np.mean(made.noise / noise))
    assert np.mean(ratios) == pytest.approx(1, abs=0.03)
    assert np.mean(residuals) == pytest.approx(1, abs=0.03)


def test_evidence_is_the_likelihood_of_the_data_with_the_factor_integrated_out() -> None:
    z, _, _, t = planted(12, 5, 2)
    scale = np.linalg.eigvalsh(z.T @ z).mean()
    told = []
    for step in PRECISIONS:
        made = fitted(z, t, scale * step)
        prior = np.eye(12) + z @ z.T / (scale * step)
        told.append(
            sum(scipy.stats.multivariate_normal(np.zeros(12), made.noise[j] * prior).logpdf(t[:, j]) for j in range(2))
        )
    assert fitted(z, t).precision == pytest.approx(scale * PRECISIONS[int(np.argmax(told))])


def test_more_rows_make_it_surer_and_unseen_directions_less_sure() -> None:
    z, _, _, t = planted(400, 6, 3)
    few, many = (fitted(z[:rows], t[:rows]) for rows in (20, 400))
    assert many.relative_spread() < 0.4 * few.relative_spread()
    z, _, _, t = planted(50, 6, 3)
    z[:, 5] = 0
    made = fitted(z, t)
    seen, unseen = np.eye(6)[[0, 5]]
    assert made.leverage(unseen[None])[0] > 10 * made.leverage(seen[None])[0]


def test_a_perfect_fit_and_fewer_rows_than_codes_are_finite() -> None:
    z, u, _, _ = planted(30, 6, 3)
    assert np.isfinite(fitted(z, z @ u).variance(z)).all()
    z, _, _, t = planted(4, 6, 3)
    made = fitted(z, t)
    assert np.isfinite(made.variance(z)).all() and made.known() <= 4
    nothing = fitted(z, np.zeros_like(t))
    assert np.isinf(nothing.relative_spread()) and np.isfinite(nothing.noise).all()
