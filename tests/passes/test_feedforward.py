"""The layers a feedforward keeps dense are refitted with the rest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import lowrank_onnx
from lowrank_onnx.decompositions.selection import order_units
from lowrank_onnx.passes.feedforward import Feedforward


def compressed(models: Path) -> lowrank_onnx.Result:
    folder = models / "char_transformer"
    return lowrank_onnx.compress(
        folder / "model.onnx",
        keep_macs=0.6,
        calibrate=folder / "calibrate.npz",
        evaluate=folder / "evaluate.npz",
        technique=["svd", "feedforward"],
        threads=1,
        cache=False,
    )


def test_refitting_the_layer_in_helps(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_it = compressed(models)
    monkeypatch.setattr(Feedforward, "kept_layers", lambda *arguments: ())
    without = compressed(models)
    ranks = [[row["ranks"] for row in result.report["sites"]] for result in (with_it, without)]
    assert ranks[0] == ranks[1]  # the refit comes behind every choice
    assert any(row["technique"] == "feedforward" for row in with_it.report["sites"])
    assert with_it.report["fidelity"]["sqnr_db"] > without.report["fidelity"]["sqnr_db"] + 0.05
    names = [t.name for t in with_it.model.graph.initializer if t.name.endswith("/units")]
    stored = [{t.name: t.raw_data for t in result.model.graph.initializer} for result in (with_it, without)]
    assert any(stored[0][name] != stored[1][name] for name in names)


@pytest.mark.parametrize("ridge", [0.0, 0.001])
@pytest.mark.parametrize("alive", [0, 3])
def test_units_that_never_fire_are_given_up_first(alive: int, ridge: float) -> None:
    """A block that the calibration data leave silent must not end the run."""
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((50, 12)) * (np.arange(12) < alive)
    order = order_units(rng.standard_normal((12, 5)), hidden.T @ hidden / 50, ridge, step=4)
    assert set(order.order[:4]) >= set(range(alive))
    assert order.relative(4) < 0.01
