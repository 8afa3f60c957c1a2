"""Joint factors of query and key, and of value and output: optimal, exact at full rank, errors as told."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_onnx.decompositions.heads import block_diagonal, score_bases, score_error, value_factors
from tests.builders import Array


def tokens(count: int, heads: int, width: int, seed: int, lift: float = 0.0) -> Array:
    """(H, n, d) rows with a falling spectrum in every head."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((heads, width, width)) * np.arange(1, width + 1) ** -1.0
    return np.asarray(rng.standard_normal((heads, count, width)) @ np.swapaxes(mixing, 1, 2) + lift)


def moment(rows: Array, centred: bool = False) -> Array:
    rows = rows - rows.mean(axis=1, keepdims=True) if centred else rows
    return np.asarray(np.swapaxes(rows, 1, 2) @ rows / rows.shape[1])


def pairs(queries: Array, keys: Array) -> Array:
    """Every query with every key, without what all keys share."""
    scores = queries @ np.swapaxes(keys, 1, 2)
    return np.asarray(scores - scores.mean(axis=2, keepdims=True))


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_scores_are_the_best_of_that_rank(rank: int) -> None:
    q, k = tokens(40, 2, 6, 0, lift=0.7), tokens(50, 2, 6, 1, lift=0.4)
    a, b, _ = score_bases(moment(q), moment(k, True))
    a, b = a[:, :, :rank], b[:, :, :rank]
    wanted = pairs(q, k)
    lost = np.linalg.norm(pairs(q @ a, k @ b) - wanted) / np.linalg.norm(wanted)
    # No matrix of that rank is nearer to all scores at once than their truncated SVD.
    sigma = np.linalg.svd(wanted, compute_uv=False)
    assert lost == pytest.approx(np.sqrt(np.sum(sigma[:, rank:] ** 2) / np.sum(sigma**2)), rel=1e-6)
    assert score_error(moment(q), moment(k, True), a, b) == pytest.approx(lost, rel=1e-6)


def test_joint_factors_are_no_worse_than_one_side_alone() -> None:
    q, k = tokens(40, 3, 8, 0), tokens(50, 3, 8, 1)
    moments = moment(q), moment(k, True)
    a, b, _ = score_bases(*moments)
    for rank in (2, 4, 6):
        vectors = np.linalg.eigh(moments[1])[1][:, :, ::-1][:, :, :rank]
        assert score_error(*moments, a[:, :, :rank], b[:, :, :rank]) < score_error(*moments, vectors, vectors)


def test_a_head_without_scores_is_no_trouble() -> None:
    q = np.zeros((2, 4, 4))
    q[0] = np.diag([1.0, 0.0, 0.0, 0.0])
    a, b, sigma = score_bases(q, np.stack([np.eye(4), np.zeros((4, 4))]))
    assert np.isfinite(a).all() and np.isfinite(b).all() and np.isfinite(sigma).all()
    assert score_error(q, q, a[:, :, :1], b[:, :, :1]) == pytest.approx(0, abs=1e-4)


def test_all_columns_give_everything_back() -> None:
    q, k = tokens(40, 2, 5, 0), tokens(50, 2, 5, 1)
    a, b, _ = score_bases(moment(q), moment(k, True))
    assert np.allclose(a @ np.swapaxes(b, 1, 2), np.eye(5))
    rng = np.random.default_rng(0)
    weight, gram = rng.standard_normal((12, 7)), np.cov(rng.standard_normal((12, 60)))
    mixing, out = value_factors(gram, weight, 3, 4, 0.01)
    assert np.allclose(block_diagonal(mixing) @ out, weight)


def lost_of(gram: Array, weight: Array, mixing: Array, out: Array) -> float:
    lost = weight - block_diagonal(mixing) @ out
    return float(np.vdot(lost, gram @ lost))


def test_values_of_one_head_are_the_best_of_that_rank() -> None:
    rng = np.random.default_rng(0)
    weight, gram = rng.standard_normal((6, 9)), np.cov(rng.standard_normal((6, 6)) @ rng.standard_normal((6, 80)))
    root = np.linalg.cholesky(gram)
    sigma = np.linalg.svd(root.T @ weight, compute_uv=False)
    mixing, out = value_factors(gram, weight, 1, 2, 0.0)
    assert lost_of(gram, weight, mixing, out) == pytest.approx(np.sum(sigma[2:] ** 2), rel=1e-6)


def test_heads_make_up_for_each_other() -> None:
    rng = np.random.default_rng(0)
    mixed = rng.standard_normal((12, 12)) * np.arange(1, 13) ** -1.0
    weight, gram = rng.standard_normal((12, 9)), mixed @ mixed.T
    mixing, out = value_factors(gram, weight, 3, 2, 0.0)
    alone = [value_factors(gram[at : at + 4, at : at + 4], weight[at : at + 4], 1, 2, 0.0) for at in (0, 4, 8)]
    separate = np.concatenate([m for m, _ in alone]), np.concatenate([o for _, o in alone])
    assert lost_of(gram, weight, mixing, out) < 0.9 * lost_of(gram, weight, *separate)
    for nudge in rng.standard_normal((20, *out.shape)):
        assert lost_of(gram, weight, mixing, out + 1e-3 * nudge) > lost_of(gram, weight, mixing, out)


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 9), st.integers(0, 10_000), st.booleans())
def test_more_columns_never_lose_more(heads: int, width: int, outputs: int, seed: int, poor: bool) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((2 if poor else 40, heads * width))  # two rows leave the moment singular
    gram, weight = rows.T @ rows / len(rows), rng.standard_normal((heads * width, outputs))
    lost = [lost_of(gram, weight, *value_factors(gram, weight, heads, rank, 1e-6)) for rank in range(1, width + 1)]
    assert np.isfinite(lost).all()
    scale = float(np.vdot(weight, gram @ weight))
    assert lost[-1] <= 1e-9 * scale
    assert all(later <= earlier + 1e-6 * scale for earlier, later in pairwise(lost))
