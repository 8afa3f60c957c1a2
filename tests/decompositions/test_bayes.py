"""Bayesian factorizations: planted ranks are found, and what they say of their uncertainty holds."""

from __future__ import annotations

import numpy as np
import pytest

from lowrank_onnx.decompositions.ard import ard, relevance
from lowrank_onnx.decompositions.bpmf import _Chain, bpmf, diagnose
from lowrank_onnx.decompositions.evbmf import evbmf, evidence, free_energy, noise_variance, threshold
from tests.builders import Array


def planted(rows: int, columns: int, rank: int, noise: float = 1.0, seed: int = 0, low: float = 1.5) -> Array:
    """Components of 1.5 to 6 times what stands out of the noise, in random directions."""
    rng = np.random.default_rng(seed)
    u, _, vt = np.linalg.svd(rng.standard_normal((rows, columns)), full_matrices=False)
    short, long = min(rows, columns), max(rows, columns)
    values = np.sqrt(long * threshold(short / long)) * rng.uniform(low, 6, rank)
    return np.asarray(noise * ((u[:, :rank] * values) @ vt[:rank] + rng.standard_normal((rows, columns))))


def cases() -> list[tuple[Array, int, float]]:
    rng = np.random.default_rng(7)
    made = []
    for seed in range(50):
        rows, columns = (int(side) for side in rng.integers(20, 160, 2))
        rank = int(rng.integers(1, max(min(rows, columns) // 5, 2)))
        noise = float(10 ** rng.uniform(-3, 3))
        made.append((planted(rows, columns, rank, noise, seed), rank, noise))
    return made


def test_planted_ranks_are_found() -> None:
    for matrix, rank, noise in cases():
        for made in (evbmf(matrix), ard(matrix)):
            assert made.rank == rank
            assert made.noise == pytest.approx(noise**2, rel=0.15)


def test_known_noise_is_taken() -> None:
    matrix = planted(60, 90, 5, 0.1)
    assert evbmf(matrix, 0.01).rank == ard(matrix, 0.01).rank == 5
    assert evbmf(matrix, 100.0).rank == ard(matrix, 100.0).rank == 0
    assert evbmf(matrix, 0.0).rank == ard(matrix, 0.0).rank == 60


def test_noise_alone_has_no_rank() -> None:
    matrix = np.random.default_rng(0).standard_normal((50, 80))
    assert evbmf(matrix).rank == ard(matrix).rank == 0


def test_without_noise_nothing_is_shrunk() -> None:
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((30, 4)) @ rng.standard_normal((4, 40))
    for made in (evbmf(matrix), ard(matrix)):
        assert np.abs(made.mean - matrix).max() <= 1e-6 * np.abs(matrix).max()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(30, 40), (64, 48), (48, 48)])
def test_rounding_is_no_component(shape: tuple[int, int], dtype: type) -> None:
    """A weight of less than full rank has singular values of its rounding, which are not zero."""
    rng = np.random.default_rng(0)
    matrix: Array = (rng.standard_normal((shape[0], 4)) @ rng.standard_normal((4, shape[1]))).astype(dtype)
    assert evbmf(matrix).rank == ard(matrix).rank == 4
    half = np.concatenate([rng.standard_normal((shape[0] // 4, shape[1])), np.zeros((shape[0] // 2, shape[1]))])
    assert evbmf(half.astype(dtype)).rank == ard(half.astype(dtype)).rank == shape[0] // 4


@pytest.mark.parametrize("power", [0.3, 0.5, 1.0, 1.5])
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3])
def test_units_do_not_matter(scale: float, power: float) -> None:
    sigma = np.arange(1.0, 201.0) ** -power
    for rule in (evidence, relevance):
        one, other = rule(sigma, (200, 300)), rule(scale * sigma, (200, 300))
        assert one.rank == other.rank
        assert np.allclose(scale * one.shrunk, other.shrunk, rtol=1e-6)
        assert other.noise == pytest.approx(scale**2 * one.noise, rel=1e-6)
    known = evidence(sigma, (200, 300)).noise
    assert relevance(sigma, (200, 300), known).rank == relevance(scale * sigma, (200, 300), scale**2 * known).rank


def test_zeros_and_wrong_input() -> None:
    assert evbmf(np.zeros((4, 6))).rank == ard(np.zeros((4, 6))).rank == 0
    for function in (evbmf, ard):
        with pytest.raises(ValueError, match="expected a matrix"):
            function(np.zeros(4))
        with pytest.raises(ValueError, match="must not be negative"):
            function(np.ones((4, 6)), -1.0)
    with pytest.raises(ValueError, match="expected the 4 singular values"):
        evidence(np.ones(3), (4, 6))


@pytest.mark.parametrize("turned", [False, True], ids=["wide", "tall"])
def test_turning_the_matrix_turns_the_posterior(turned: bool) -> None:
    matrix = planted(30, 70, 3)
    for function in (evbmf, ard):
        made, other = function(matrix), function(matrix.T)
        assert np.allclose(made.mean, other.mean.T)
        assert np.allclose(made.variance(), other.variance().T)


@pytest.mark.parametrize("function", [evbmf, ard])
@pytest.mark.parametrize("shape", [(24, 60), (60, 24)], ids=["wide", "tall"])
def test_variance_is_that_of_draws(function: object, shape: tuple[int, int]) -> None:
    assert callable(function)
    made = function(planted(*shape, 3, low=1.1))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, shape[0]))
    outputs, entries = [], []
    for _ in range(20_000):
        left, right = made.draw(rng)
        product = left @ right
        outputs.append(x @ product)
        entries.append(product[:4, :4])
    # Each variance of 20000 draws is right within 1 %; their mean ratio much closer.
    assert np.abs(np.var(outputs, axis=0) / made.output_variance(x) - 1).mean() < 0.03
    assert np.abs(np.var(entries, axis=0) / made.variance()[:4, :4] - 1).mean() < 0.03
    assert np.abs(np.mean(entries, axis=0) - made.mean[:4, :4]).max() < 0.05 * np.sqrt(made.variance().max()) * 4


@pytest.mark.parametrize("shape", [(24, 60), (60, 24)], ids=["wide", "tall"])
def test_posterior_stands_still_under_the_variational_updates(shape: tuple[int, int]) -> None:
    matrix = planted(*shape, 3, low=1.1)
    made = evbmf(matrix)
    gamma = np.linalg.svd(matrix, compute_uv=False)[: made.rank]
    rows, columns = shape
    left, right = np.linalg.norm(made.left, axis=0), np.linalg.norm(made.right, axis=1)
    seen_left, seen_right = left**2 + rows * made.left_variance, right**2 + columns * made.right_variance
    # Empirical Bayes: the prior variance of a column is the mean square it was found to have.
    assert np.allclose(made.left_variance, made.noise / (seen_right + made.noise * rows / seen_left))
    assert np.allclose(made.right_variance, made.noise / (seen_left + made.noise * columns / seen_right))
    assert np.allclose(left, gamma * right * made.left_variance / made.noise)
    assert np.allclose(right, gamma * left * made.right_variance / made.noise)


@pytest.mark.parametrize("power", [0.1, 0.3, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("shape", [(40, 60), (64, 64), (16, 400)])
def test_noise_has_the_least_free_energy_of_all(shape: tuple[int, int], power: float) -> None:
    """The free energy has a local minimum for nearly every rank; a single descent ends in one of them."""
    short, long = shape
    sigma = np.arange(1, short + 1) ** -power
    limit, squared = threshold(short / long), sigma**2
    least = free_energy(noise_variance(sigma, shape), squared, short, long, limit)
    high = squared.sum() / (short * long)
    levels = np.geomspace(max(squared[-1] / (long * limit), 1e-6 * high), high, 5_000)
    most = min(int(np.ceil(short / (1 + short / long))) - 1, short)
    lowest = max(squared[most] / (long * limit), squared[most:].mean() / long)  # where the theory bounds the level
    assert least <= min(free_energy(level, squared, *shape, limit) for level in levels if level >= lowest) + 1e-6


def test_noise_is_found_between_clusters_of_singular_values() -> None:
    """Here the free energy has several deep valleys."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        short = int(rng.integers(10, 80))
        long = int(short * rng.uniform(1, 6))
        sizes = rng.multinomial(short, np.ones(3) / 3)
        sigma = np.sort(np.concatenate([np.full(size, 10 ** rng.uniform(-1.5, 1)) for size in sizes]))[::-1]
        limit, squared = threshold(short / long), sigma**2
        most = min(int(np.ceil(short / (1 + short / long))) - 1, short)
        lowest = max(squared[most] / (long * limit), squared[most:].mean() / long)
        found = free_energy(noise_variance(sigma, (short, long)), squared, short, long, limit)
        levels = np.geomspace(lowest, squared.sum() / (short * long), 4_000)
        assert found <= min(free_energy(level, squared, short, long, limit) for level in levels) + 1e-6


def test_relevance_leaves_out_components_that_are_not_worth_their_cost() -> None:
    """A component between the local and the global threshold is a local optimum, and not kept."""
    short, long = 40, 60
    values = np.concatenate([[40.0], np.full(1, 0.97 * np.sqrt(long * threshold(short / long))), np.full(38, 3.0)])
    assert relevance(values, (short, long), 1.0).rank == evidence(values, (short, long), 1.0).rank == 1


def test_sampling_agrees_with_the_variational_mean() -> None:
    matrix = planted(50, 70, 4, low=3.0)
    exact, made = evbmf(matrix), bpmf(matrix, 4, samples=600, seed=1)
    assert made.r_hat < 1.02 and made.effective > 200
    assert np.linalg.norm(made.mean - exact.mean) < 0.02 * np.linalg.norm(exact.mean)
    assert made.noise == pytest.approx(exact.noise, rel=0.02)
    assert made.variance.mean() == pytest.approx(exact.variance().mean(), rel=0.1)


def test_rows_without_data_follow_the_prior() -> None:
    chain = _Chain(np.ones((4, 5)), 2, np.random.default_rng(0))
    centre, precision = np.array([3.0, -2.0]), np.array([[4.0, 1.0], [1.0, 2.0]])
    chain._hyper = lambda rows: (centre, precision)  # type: ignore[method-assign]
    rows = chain._rows(np.zeros((40_000, 5)), np.zeros((5, 2)), np.zeros((40_000, 2)))
    assert np.allclose(rows.mean(axis=0), centre, atol=0.02)
    assert np.allclose(np.cov(rows.T), np.linalg.inv(precision), atol=0.02)


def test_hyperparameters_of_many_rows_are_theirs() -> None:
    rng = np.random.default_rng(0)
    rows = np.array([1.0, -1.0]) + rng.standard_normal((5_000, 2)) @ np.array([[2.0, 0.0], [1.0, 0.5]])
    chain = _Chain(np.ones((4, 5)), 2, rng)
    drawn = [chain._hyper(rows) for _ in range(200)]
    assert np.allclose(np.mean([mean for mean, _ in drawn], axis=0), rows.mean(axis=0), atol=0.02)
    precision = np.linalg.inv(np.cov(rows.T))
    assert np.allclose(np.mean([entry for _, entry in drawn], axis=0), precision, rtol=0.02, atol=0.02)
    assert np.std([mean[0] for mean, _ in drawn]) == pytest.approx(np.sqrt(np.cov(rows.T)[0, 0] / 5_000), rel=0.2)


def test_samples_are_reproducible_and_follow_the_scale() -> None:
    matrix = planted(20, 30, 2)
    one, two, large = bpmf(matrix, 2, 40), bpmf(matrix, 2, 40), bpmf(1e3 * matrix, 2, 40)
    assert np.array_equal(one.mean, two.mean) and one.samples == 40
    assert np.allclose(large.mean, 1e3 * one.mean) and np.allclose(large.variance, 1e6 * one.variance)


def test_sampling_refuses_what_it_cannot_do() -> None:
    for matrix, rank, samples in ((np.ones((4, 5)), 5, 40), (np.ones((4, 5)), 1, 4), (np.zeros((4, 5)), 1, 40)):
        with pytest.raises(ValueError):
            bpmf(matrix, rank, samples)


def test_diagnostics_tell_chains_that_have_not_met() -> None:
    rng = np.random.default_rng(0)
    apart = rng.standard_normal((2, 400)) + np.array([[0.0], [3.0]])
    assert diagnose(apart)[0] > 1.5
    assert diagnose(rng.standard_normal((2, 400)))[0] < 1.02
    slow = np.zeros((4, 4000))
    for step in range(1, 4000):
        slow[:, step] = 0.9 * slow[:, step - 1] + rng.standard_normal(4)
    assert diagnose(slow)[1] == pytest.approx(slow.size * 0.1 / 1.9, rel=0.3)  # (1 - ρ) / (1 + ρ)
    assert diagnose(np.ones((2, 10))) == (1.0, 20.0)
