"""Hidden units are ordered by what a refit without the others loses, and the loss is told as it is."""

from __future__ import annotations

import numpy as np
import pytest

from lowrank_onnx.decompositions import selection
from lowrank_onnx.decompositions.selection import order_units, refit_selected
from lowrank_onnx.linalg import with_ridge
from tests.builders import Array


def alike(units: int, rows: int) -> Array:
    """Rectified units (rows, units) of a few common causes, stronger ones first."""
    rng = np.random.default_rng(0)
    mixed = rng.standard_normal((rows, units // 3)) @ rng.standard_normal((units // 3, units))
    return np.asarray(np.maximum(mixed * np.arange(1, units + 1) ** -0.5, 0.0))


@pytest.mark.parametrize("ridge", [1e-6, 1e-3, 0.3])
@pytest.mark.parametrize("share", [96, 2])  # 2: many units a step, as in very wide layers
def test_the_error_told_is_that_of_the_refit(ridge: float, share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_SHARE", share)
    hidden = alike(150, 400)
    gram = hidden.T @ hidden / len(hidden)
    weight = np.random.default_rng(1).standard_normal((150, 40))
    made = order_units(weight, gram, ridge, step=25)
    assert sorted(made.order) == list(range(150)) and made.counts == (25, 50, 75, 100, 125, 150)
    for count in made.counts:
        chosen = made.order[:count]
        lost = hidden[:, chosen] @ refit_selected(weight, gram, chosen, ridge) - hidden @ weight
        measured = np.linalg.norm(lost) / np.linalg.norm(hidden @ weight)
        assert made.relative(count) == pytest.approx(measured, rel=1e-6, abs=1e-7)


def test_few_units_at_a_time_choose_as_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = alike(120, 300)
    gram, weight = hidden.T @ hidden / len(hidden), np.random.default_rng(1).standard_normal((120, 30))
    told = order_units(weight, gram, 1e-3, step=24)
    monkeypatch.setattr(selection, "_BLOCK", 1)
    best = order_units(weight, gram, 1e-3, step=24)
    rest = with_ridge(gram, 1e-3)
    for unit in best.order[:-1]:
        scores = np.sum((rest @ weight) ** 2, axis=1) / np.maximum(np.diag(rest), 1e-12)
        assert unit == np.argmax(scores)
        rest = rest - np.outer(rest[unit], rest[unit]) / rest[unit, unit]
    for count in told.counts[:-1]:
        assert told.relative(count) < 1.1 * best.relative(count)
