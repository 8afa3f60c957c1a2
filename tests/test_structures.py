"""Structure that was planted is found: each matrix is fitted best by its own form at equal parameters."""

from __future__ import annotations

import numpy as np
import pytest

from lowrank_onnx.structures import STRUCTURES, errors_at
from tests.builders import Array, falling

SIDE = 64
QUARTER = SIDE * SIDE // 4


def block_heavy() -> Array:
    """Eight blocks of one on a floor of a tenth, rows and columns shuffled."""
    rng = np.random.default_rng(0)
    matrix = 0.1 * rng.standard_normal((SIDE, SIDE))
    for place in range(0, SIDE, 8):
        matrix[place : place + 8, place : place + 8] += rng.standard_normal((8, 8))
    return np.asarray(matrix[rng.permutation(SIDE)][:, rng.permutation(SIDE)])


def kronecker_sum() -> Array:
    """Four terms of 8 x 8 and two hundredths of noise."""
    rng = np.random.default_rng(0)
    matrix = sum(np.kron(rng.standard_normal((8, 8)), rng.standard_normal((8, 8))) for _ in range(4))
    return np.asarray(matrix + 0.02 * np.std(matrix) * rng.standard_normal((SIDE, SIDE)))


def decaying() -> Array:
    """1 / (1 + |i - j|), rows shuffled."""
    places = np.arange(SIDE)
    matrix = 1 / (1 + np.abs(places[:, None] - places))
    return np.asarray(matrix[np.random.default_rng(0).permutation(SIDE)])


@pytest.mark.parametrize(
    ("planted", "own", "margin"),
    [
        (falling(SIDE, SIDE, np.float64), "svd", 1.05),
        (block_heavy(), "block", 1.0),
        (kronecker_sum(), "kronecker", 20.0),
        (decaying(), "hierarchical", 1.5),
    ],
    ids=["low rank", "block", "kronecker", "hierarchical"],
)
def test_planted_structure_is_found(planted: Array, own: str, margin: float) -> None:
    errors = errors_at(planted, np.eye(SIDE), QUARTER)
    assert set(errors) == set(STRUCTURES)
    others = [error for name, error in errors.items() if name != own and error is not None]
    found = errors[own]
    assert found is not None and margin * found < min(others), errors
    if own == "block":
        plain, strided = errors["svd"], errors["monarch"]
        assert plain is not None and strided is not None and 3 * found < plain and 2 * found < strided


def test_errors_are_those_of_the_metric() -> None:
    rng = np.random.default_rng(0)
    weight, rows = rng.standard_normal((32, 48)), rng.standard_normal((200, 32)) * np.arange(1, 33) ** -1.0
    aware, blind = (errors_at(weight, gram, 32 * 48 // 2) for gram in (rows.T @ rows / 200, np.eye(32)))
    for name, error in aware.items():
        other = blind[name]
        assert error is not None and other is not None and error < other, name


def test_what_does_not_fit_is_none() -> None:
    assert errors_at(np.ones((5, 7)), np.eye(5), 3)["svd"] is None
