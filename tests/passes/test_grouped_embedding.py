"""Tables in groups: budgets held, rows where they are cheapest, edges of Gather as before."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from lowrank_onnx.decompositions.row_groups import by_frequency, grouped_rows
from lowrank_onnx.decompositions.rows import weighted_rows
from lowrank_onnx.passes.grouped_embedding import GroupedEmbedding
from tests.builders import answers, build, factorized, furthest, problem


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(2, 4), st.integers(1, 11), st.integers(0, 99))
def test_a_budget_is_held_and_used_better_than_by_one_group(groups: int, rank: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    table, weights = rng.standard_normal((300, 12)), np.arange(1, 301) ** -1.5
    start = by_frequency(weights, groups)
    assert start.max() < groups and (np.diff(start) >= 0).all()
    numbers = rank * (300 + 12)
    fit = grouped_rows(table, weights, start, numbers, 3)
    assert fit.numbers <= max(numbers, 300 + 13)
    stored = sum((np.sum(fit.member == g) + 1) * r + 12 * r for g, r in enumerate(fit.ranks))
    assert stored == fit.numbers
    lost = float(weights @ np.sum((table - fit.restored(table)) ** 2, axis=1))
    basis = weighted_rows(table, weights, weights)
    assert basis.weighted is not None
    assert lost <= 1.001 * basis.weighted.left[rank]
    once = grouped_rows(table, weights, start, numbers, 0)
    assert lost <= float(weights @ np.sum((table - once.restored(table)) ** 2, axis=1)) + 1e-12


def test_rows_of_one_count_are_not_parted() -> None:
    weights = np.array([9.0, 1, 5, 1, 1, 1, 5, 1, 1, 1])
    assert by_frequency(weights, 2).tolist() == [0, 1, 1, 1, 1, 1, 1, 1, 1, 1]


def test_indices_mean_what_they_meant() -> None:
    rng = np.random.default_rng(0)
    ids = np.minimum(rng.zipf(1.4, (40, 5)) - 1, 49)
    table = rng.standard_normal((50, 12)).astype(np.float32)
    proto = build("g (int64[n,s] i) => (float[n,s,12] y) { y = Gather(t, i) }", {"t": table})
    posed = problem(proto, {"i": ids})
    made = factorized(posed, GroupedEmbedding(groups=3), posed.sites[0], (12,))
    every = {"i": np.arange(-50, 50)[None]}
    assert furthest(answers(made, every), answers(proto, every)) < 1e-5
    for index in (50, -51):
        with pytest.raises(Exception, match="out of data bounds"):
            answers(made, {"i": np.full((1, 1), index)})


@pytest.mark.parametrize("count", [40, 600, 5000])
def test_more_groups_than_rows(count: int) -> None:
    weights = np.arange(30, 0, -1.0)
    assert np.unique(by_frequency(weights, count)).size == np.unique(by_frequency(weights, 30)).size
