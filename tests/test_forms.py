"""Forms of recurrent cells: what measured slower is dropped, whatever the budget is of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lowrank_onnx import compress, forms
from lowrank_onnx.cache import Cache
from lowrank_onnx.errors import TargetError
from lowrank_onnx.latency import LatencyCurve
from lowrank_onnx.passes.recurrent_cell import RecurrentCell
from lowrank_onnx.passes.recurrent_input import RecurrentInput
from lowrank_onnx.passes.recurrent_stored import RecurrentStored
from lowrank_onnx.proposals import Proposal, propose
from tests.builders import Array, build, falling, problem

RNN = """g (float[t,m,32] x) => (float[t,1,m,32] y) { y = GRU<hidden_size=32, linear_before_reset=1>(x, w, r) }"""
WEIGHTS = {"w": falling(96, 32)[None], "r": falling(96, 32, seed=2)[None]}
DATA: dict[str, Array] = {"x": np.random.default_rng(0).standard_normal((12, 9, 1, 32)).astype(np.float32)}


def offered(monkeypatch: pytest.MonkeyPatch, times: dict[str, float], equal: bool) -> dict[str, int]:
    """How many candidates of each technique are left, when each takes a time and the fused operator 100."""
    posed = problem(build(RNN, WEIGHTS), DATA)
    proposals = propose(posed.sites, [RecurrentInput(), RecurrentStored(), RecurrentCell()], {}, None)[0]

    def timed(posed: Any, proposals: list[Proposal], *rest: Any) -> dict[int, LatencyCurve]:
        return {
            place: LatencyCurve(100.0, (0.0, 1e9), (times[entry.technique.name],) * 2)
            for place, entry in enumerate(proposals)
            if entry.technique.name in times
        }

    monkeypatch.setattr(forms, "measure_latencies", timed)
    left = forms.quickest(posed, proposals, Cache(None), None, equal)
    assert all(entry.candidates for entry in left)
    return {entry.technique.name: len(entry.candidates) for entry in left}


@pytest.mark.parametrize("equal", [True, False])
def test_a_cell_spelled_out_stays_only_where_it_was_faster(monkeypatch: pytest.MonkeyPatch, equal: bool) -> None:
    slow = offered(monkeypatch, {"recurrent_input": 90, "recurrent_stored": 120, "recurrent_cell": 100}, equal)
    assert "recurrent_cell" not in slow and slow["recurrent_stored"] > 0
    fast = offered(monkeypatch, {"recurrent_input": 90, "recurrent_stored": 120, "recurrent_cell": 80}, equal)
    assert fast["recurrent_cell"] > 0


def test_equal_factors_stay_in_the_quickest_form(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"recurrent_input": 90.0, "recurrent_stored": 120.0, "recurrent_cell": 80.0}
    assert "recurrent_stored" not in offered(monkeypatch, times, True)
    assert "recurrent_stored" in offered(monkeypatch, times, False)
    assert "recurrent_cell" not in offered(monkeypatch, {**times, "recurrent_stored": 70.0}, True)


def test_what_cannot_be_timed_keeps_the_operators_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    left = offered(monkeypatch, {}, True)
    assert left["recurrent_stored"] > 0 and "recurrent_cell" not in left


def test_a_budget_that_only_slower_forms_could_meet_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        forms,
        "measure_latencies",
        lambda posed, proposals, *rest: {place: LatencyCurve(1.0, (0.0,), (2.0,)) for place in range(len(proposals))},
    )
    with pytest.raises(TargetError, match="every recurrent form measured slower than the fused operator"):
        compress(build(RNN, WEIGHTS), keep_macs=0.5, calibrate=DATA, technique=["recurrent_cell"])
