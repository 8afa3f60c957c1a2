"""Shrinking by the noise: never more than all, nothing at full rank, and the two models agree where they should."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_onnx import compress
from lowrank_onnx.decompositions.ard import relevance
from lowrank_onnx.decompositions.evbmf import noise_variance
from lowrank_onnx.errors import LowRankError
from lowrank_onnx.passes.bayesian import VARIANTS, Bayesian, shares
from tests.builders import build, falling
from tests.decompositions.test_bayes import planted

each = pytest.mark.parametrize("variant", VARIANTS)


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
    with pytest.raises(ValueError, match="variant must be one of evbmf, ard, got 'gibbs'"):
        Bayesian(variant="gibbs")
    proto = build("g (float[n,64] x) => (float[n,48] y) { y = MatMul(x, w) }", {"w": falling(64, 48)})
    with pytest.raises(LowRankError, match="variant must be one of evbmf, ard"):
        compress(proto, rank=8, technique=["bayesian:variant=gibbs"])


def test_the_option_reaches_the_model() -> None:
    proto = build("g (float[n,64] x) => (float[n,48] y) { y = MatMul(x, w) }", {"w": planted(64, 48, 8).astype("f4")})
    made = compress(proto, rank=5, technique=["bayesian:variant=ard"])
    (site,) = made.report["sites"]
    assert site["technique"] == "bayesian" and site["ranks"] == [5]
