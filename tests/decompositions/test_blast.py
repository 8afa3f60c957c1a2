"""Blocks with shared bases: what is planted is found, and plain low rank is never better at the same rank."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_onnx.decompositions.blast import Blast, blast, blast_from_arrays
from lowrank_onnx.decompositions.svd import data_aware
from tests.builders import Array


def squared_error(weight: Array, dense: Array, gram: Array) -> float:
    lost = weight - dense
    return float(np.vdot(lost, gram @ lost))


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(4, 24),
    columns=st.integers(4, 24),
    blocks=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    rank=st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_never_worse_than_plain_low_rank(
    rows: int, columns: int, blocks: tuple[int, int], rank: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((rows, columns))
    seen = rng.standard_normal((4 * rows, rows)) * np.arange(1, rows + 1) ** -0.5
    gram = seen.T @ seen / len(seen)
    first, second = data_aware(weight, gram, 0.0).factors(min(rank, rows, columns))
    made = blast(weight, gram, blocks, rank)
    plain = squared_error(weight, first @ second, gram)
    assert squared_error(weight, made.dense(), gram) <= plain * (1 + 1e-9) + 1e-12
    assert made.parameters == rank * (rows + columns + blocks[0] * blocks[1])


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(4, 16), columns=st.integers(4, 16), blocks=st.integers(1, 4), seed=st.integers(0, 99))
def test_full_rank_gives_the_weight_back(rows: int, columns: int, blocks: int, seed: int) -> None:
    weight = np.random.default_rng(seed).standard_normal((rows, columns))
    made = blast(weight, np.eye(rows), (blocks, blocks), min(rows, columns))
    assert np.abs(made.dense() - weight).max() <= 1e-9 * np.abs(weight).max()


def test_planted_blocks_are_found() -> None:
    """Every block has a rank of its own out of a shared basis: plain low rank at the same rank is far off."""
    rng = np.random.default_rng(3)
    planted = Blast(rng.standard_normal((32, 4)), rng.standard_normal((4, 4, 4)), rng.standard_normal((4, 32)))
    weight = planted.dense()
    made = blast(weight, np.eye(32), (4, 4), 4, sweeps=400, tolerance=0.0)
    first, second = data_aware(weight, np.eye(32), 0.0).factors(4)
    plain = np.linalg.norm(weight - first @ second) / np.linalg.norm(weight)
    assert np.linalg.norm(weight - made.dense()) / np.linalg.norm(weight) < 0.2 * plain


def test_error_of_a_gaussian_is_that_of_the_literature() -> None:
    """Four by four blocks at rank 7 store 1008 numbers of 4096, where plain low rank of rank 8 stores 1024."""
    weight = np.random.default_rng(0).standard_normal((64, 64))
    made = blast(weight, np.eye(64), (4, 4), 7)
    assert np.linalg.norm(weight - made.dense()) / np.linalg.norm(weight) == pytest.approx(0.755, abs=0.01)


def test_refit_is_the_least_squares_optimum() -> None:
    rng = np.random.default_rng(0)
    weight, other = rng.standard_normal((12, 10)), rng.standard_normal((12, 10))
    made = blast(weight, np.eye(12), (3, 2), 3)
    seen = rng.standard_normal((40, 12))
    gram = seen.T @ seen
    again = made.refitted(other, gram)
    best = squared_error(other, again.dense(), gram)
    for _ in range(20):
        moved = Blast(again.first, again.scales, again.second + 1e-3 * rng.standard_normal(again.second.shape))
        assert squared_error(other, moved.dense(), gram) > best
    assert np.array_equal(blast_from_arrays(again.arrays()).dense(), again.dense())
