"""The layers a feedforward keeps dense are refitted with the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

import lowrank_onnx
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
