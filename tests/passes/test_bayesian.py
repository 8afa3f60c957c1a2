"""Shrinking by the noise: never more than all, nothing at full rank, and the two models agree where they should."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_onnx import apply, compress, plan
from lowrank_onnx.decompositions import sampling
from lowrank_onnx.decompositions.ard import relevance
from lowrank_onnx.decompositions.bpmf import bpmf
from lowrank_onnx.decompositions.evbmf import noise_variance
from lowrank_onnx.errors import LowRankError
from lowrank_onnx.linalg import with_ridge
from lowrank_onnx.passes.bayesian import LARGEST, Bayesian, shares
from lowrank_onnx.passes.svd import SVD
from lowrank_onnx.report import wording
from tests.builders import build, correlated, falling, problem
from tests.decompositions.test_bayes import planted

each = pytest.mark.parametrize("variant", ["evbmf", "ard"])


def spectrum(matrix: np.ndarray) -> np.ndarray:
    return np.asarray(np.linalg.svd(matrix, compute_uv=False))


@each
@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**16), rows=st.integers(2, 40), columns=st.integers(2, 40), exact=st.booleans())
def test_shares_are_shares_at_every_rank(variant: str, seed: int, rows: int, columns: int, exact: bool) -> None:
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal((rows, columns))
    if exact:  # singular values that are nothing but rounding
        matrix = matrix[:, :2] @ rng.standard_normal((2, columns))
    sigma = spectrum(matrix)
    for rank in range(1, len(sigma) + 1):
        found = shares(sigma, matrix.shape, rank, variant)
        assert found.shape == (rank,) and (found >= 0).all() and (found <= 1 + 1e-9).all()
    assert np.array_equal(found, np.ones(len(sigma)))


@each
def test_weak_components_are_shrunk_more(variant: str) -> None:
    sigma = spectrum(planted(64, 48, 5))
    found = shares(sigma, (64, 48), 5, variant)
    assert (np.diff(found) < 0).all() and found[0] < 1


def test_at_the_same_noise_the_updates_end_at_the_closed_form() -> None:
    """Five components take all but the noise, so that both variants know its level: what is left out."""
    sigma = spectrum(planted(64, 48, 5))
    assert np.allclose(shares(sigma, (64, 48), 5, "ard"), shares(sigma, (64, 48), 5), rtol=2e-4)


def test_the_variants_differ_where_they_find_another_noise() -> None:
    sigma = np.arange(1, 49.0) ** -1
    levels = relevance(sigma, (64, 48)).noise, noise_variance(sigma, (64, 48))
    found = [shares(sigma, (64, 48), 4, variant)[-1] for variant in ("ard", "evbmf")]
    assert levels[0] < 0.99 * levels[1] and found[0] > found[1] + 1e-3  # less noise, less shrinking


def test_unknown_variants_are_refused() -> None:
    with pytest.raises(ValueError, match="variant must be one of evbmf, ard, gibbs, got 'map'"):
        Bayesian(variant="map")
    proto = build("g (float[n,64] x) => (float[n,48] y) { y = MatMul(x, w) }", {"w": falling(64, 48)})
    with pytest.raises(LowRankError, match="variant must be one of evbmf, ard, gibbs"):
        compress(proto, rank=8, technique=["bayesian:variant=map"])


def test_the_option_reaches_the_model() -> None:
    proto = build("g (float[n,64] x) => (float[n,48] y) { y = MatMul(x, w) }", {"w": planted(64, 48, 8).astype("f4")})
    made = compress(proto, rank=5, technique=["bayesian:variant=ard"])
    (site,) = made.report["sites"]
    assert site["technique"] == "bayesian" and site["ranks"] == [5]


def layer(weight: np.ndarray) -> onnx.ModelProto:
    rows, columns = weight.shape
    text = f"g (float[n,{rows}] x) => (float[n,{columns}] y) {{ y = MatMul(x, w) }}"
    return build(text, {"w": weight.astype("f4")})


def gibbs(weight: np.ndarray, rank: int, samples: int = 40, **options: Any) -> Any:
    return compress(layer(weight), rank=rank, technique=["bayesian:variant=gibbs"], samples=samples, **options)


def test_sampled_factors_are_the_best_of_their_rank_for_the_posterior_mean() -> None:
    weight, x = planted(24, 16, 4), correlated((200, 24))
    gram = x.T.astype(np.float64) @ x
    made = sampling.posterior_map(weight, gram, 0.01, 4, 60)
    root = scipy.linalg.sqrtm(with_ridge(gram, 0.01)).real
    mean = bpmf(root @ weight, 4, 60, sampling.BURN_IN).mean
    u, sigma, vt = np.linalg.svd(mean)
    assert sigma[4] > 1e-6 * sigma[0]  # products of one rank have a mean of another
    assert np.allclose(root @ made.first @ made.second, (u[:, :4] * sigma[:4]) @ vt[:4], atol=1e-8 * sigma[0])


def test_what_no_sample_shows_of_the_weight_is_kept() -> None:
    weight, x = planted(24, 16, 4), correlated((200, 24))
    x[:, 20:] = 0
    made = sampling.posterior_map(weight, x.T.astype(np.float64) @ x, 0.0, 8, 40)
    assert np.allclose(made.first[20:], weight[20:] @ made.second.T)


def test_the_posterior_mean_is_nearer_to_what_was_planted_than_truncation() -> None:
    rng = np.random.default_rng(3)
    truth = rng.standard_normal((60, 4)) @ rng.standard_normal((4, 50))
    noisy = truth + 2.0 * rng.standard_normal(truth.shape)
    made = sampling.posterior_map(noisy, None, 0.0, 4, 200)
    u, sigma, vt = np.linalg.svd(noisy)
    shrunk = u[:, :4] * (sigma[:4] * shares(sigma, noisy.shape, 4)) @ vt[:4]
    errors = [np.linalg.norm(truth - each) for each in (made.first @ made.second, (u[:, :4] * sigma[:4]) @ vt[:4])]
    assert errors[0] < 0.97 * errors[1]
    assert np.linalg.norm(made.first @ made.second - shrunk) < 0.1 * np.linalg.norm(shrunk)  # independence costs little


def test_a_rank_that_leaves_nothing_out_is_not_sampled() -> None:
    (site,) = gibbs(planted(24, 4, 4) @ planted(4, 16, 4), 4).report["sites"]
    assert "diagnostics" not in site and site["weight_error"] < 1e-6


def test_the_report_and_the_plan_tell_of_the_chains() -> None:
    weight = planted(64, 48, 5)
    made = gibbs(weight, 5, 200, calibrate={"x": correlated((100, 64))})
    (site,), (row,) = made.report["sites"], made.plan["sites"]
    assert site["diagnostics"] == row["diagnostics"]
    assert site["diagnostics"]["samples"] == 200 and site["diagnostics"]["r_hat"] < 1.1
    assert not any("converged" in text for text in made.report["warnings"])
    assert "R-hat at most" in wording.chains(made.report["sites"])
    assert row["technique"] == "bayesian" and "samples=200" in made.plan["setting"]["techniques"][0]


def test_chains_that_have_not_met_are_warned_of() -> None:
    made = gibbs(np.asarray(np.diag(np.arange(1, 33.0) ** -0.3)), 16, 8)
    assert any("chains of one layer have not converged" in text for text in made.report["warnings"])


def test_sampling_gives_the_same_bytes_twice() -> None:
    one, two = (gibbs(planted(24, 16, 4), 4).model.SerializeToString() for _ in range(2))
    assert one == two


def test_the_proposed_error_of_samples_is_the_measured_one() -> None:
    weight, x = planted(64, 48, 5).astype("f4"), correlated((300, 64))
    made = gibbs(weight, 5, calibrate={"x": x})
    (site,) = made.report["sites"]
    session = onnxruntime.InferenceSession(made.model.SerializeToString())
    exact = x.astype(np.float64) @ weight
    (found,) = session.run(None, {"x": x})
    told = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert site["output_error"] == pytest.approx(told, rel=1e-3)


def test_time_and_memory_are_bounded() -> None:
    large = layer(np.ones((2049, 2048)))
    with pytest.raises(LowRankError, match=f"too large to sample: 4196352 elements, more than {LARGEST}"):
        compress(large, rank=2, technique=["bayesian:variant=gibbs"])
    wide = layer(falling(768, 1024))
    with pytest.raises(LowRankError, match=r"20000 samples at rank 400 take .* more than 5.0e[+]11; ask for fewer"):
        compress(wide, rank=400, technique=["bayesian:variant=gibbs"], samples=20_000)
    made = Bayesian(variant="gibbs", samples=8)
    posed = problem(layer(falling(128, 96)))
    (site,) = posed.sites
    every = SVD().ranks(site, made.analyse(site, None))
    offered = made.ranks(site, made.analyse(site, None))
    assert len(offered) == 4 < len(every) and offered[-1] == every[-1] and set(offered) <= set(every)
    assert list(offered) == sorted(offered)


def test_samples_without_a_technique_that_samples_are_refused() -> None:
    with pytest.raises(LowRankError, match="--samples is of a technique that samples; add --technique bayesian:var"):
        compress(layer(falling(24, 16)), rank=4, samples=100)
    with pytest.raises(LowRankError, match="samples must be from 8 to 20000, got 7"):
        compress(layer(falling(24, 16)), rank=4, samples=7, technique=["bayesian:variant=gibbs"])


def test_a_plan_of_samples_is_applied() -> None:
    proto = layer(planted(24, 16, 4))
    made = plan(proto, rank=4, technique=["bayesian:variant=gibbs"], samples=24)
    again = apply(proto, made)
    assert again.model.SerializeToString() == gibbs(planted(24, 16, 4), 4, 24).model.SerializeToString()
