"""What is told of every kind of layer, against the models themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from lowrank_onnx import compress
from lowrank_onnx.data import Dataset
from lowrank_onnx.spread import hold_out
from tests.builders import Array, answers, build, correlated, falling, problem
from tests.passes.test_recurrent import WIDTH, cell
from tests.passes.test_tied import bigram_model

PLAIN = dict.fromkeys(("bias", "linear", "y", "last"), True) | dict.fromkeys(
    ("lengths", "states", "peepholes", "relu", "clip", "coupled"), False
)


def told(proto: onnx.ModelProto, data: dict[str, Array], **options: Any) -> tuple[Any, dict[str, Any], Dataset]:
    """The result, what it tells by layer, and the samples held out."""
    held = hold_out(problem(proto, data), "--uncertainty", None, True)[1]
    result = compress(proto, calibrate=data, uncertainty=True, refine=False, cache=False, **options)
    section = result.report["uncertainty"]
    return result, {row["name"]: row for row in section["layers"]} | section["without"], held


def residual(target: Array, given: Array) -> float:
    """Error relative to the spread of the target, over all rows."""
    target, given = (value.reshape(-1, value.shape[-1]).astype(np.float64) for value in (target, given))
    return float(np.linalg.norm(target - given) / np.linalg.norm(target - target.mean(axis=0)))


def constants(proto: onnx.ModelProto) -> dict[str, Array]:
    return {entry.name: onnx.numpy_helper.to_array(entry) for entry in proto.graph.initializer}


def is_variance(arrays: Any, place: int, target: Array, given: Array, x: Array) -> None:
    """The stored posterior tells the mean squared error on the samples it was measured on."""
    z = x.reshape(-1, x.shape[-1]) @ arrays[f"{place}/encoder"]
    z = np.concatenate([np.ones((len(z), 1)), z], axis=1)
    variance = np.outer(1 + np.einsum("nk,kl,nl->n", z, arrays[f"{place}/covariance"], z), arrays[f"{place}/noise"])
    lost = (target - given).reshape(len(z), -1)
    assert np.mean(lost**2, axis=0).sum() == pytest.approx(variance.mean(axis=0).sum(), rel=1e-3)


@pytest.mark.parametrize(
    ("op", "direction", "linear"),
    [("LSTM", "forward", True), ("LSTM", "bidirectional", True), ("GRU", "reverse", True), ("GRU", "forward", False)],
)
def test_cells_have_a_map_of_inputs_and_one_of_states(op: str, direction: str, linear: bool) -> None:
    proto = cell(op, direction, PLAIN | {"linear": linear}, steps=7)
    data = {"x": correlated((80, 7, 1, WIDTH))}
    result, rows, held = told(proto, data, rank=3, technique=["recurrent_stored"])
    ways = 2 if direction == "bidirectional" else 1
    names = ["cell (W)", *(["cell (R)"] if ways == 1 else ["cell (R, direction 0)", "cell (R, direction 1)"])]
    assert list(rows) == names
    before, after = constants(proto), constants(result.model)
    made_r = after["cell/state_second"] @ after["cell/state_first"]
    made_w = after["cell/second"] @ after["cell/first"].T
    states: list[list[Array]] = [[], []]
    for place in range(len(held)):
        feeds = held.feeds(place)
        for side, model in enumerate((proto, result.model)):
            states[side].append(answers(model, feeds)["y"])
    x = np.stack([held.feeds(place)["x"] for place in range(len(held))])
    size = before["r"].shape[1]
    t, y = (
        np.concatenate([x @ w[d].T + b[d, :size] for d in range(ways)], axis=-1)
        for w, b in ((before["w"], before["b"]), (made_w, after["cell/bias"]))
    )
    assert rows["cell (W)"]["residual"] == pytest.approx(residual(t, y), rel=1e-3)
    is_variance(result.posteriors, 0, t, y, x)
    kept = size if linear or op != "GRU" else size * 2 // 3
    for d in range(ways):
        early, backwards = np.zeros_like(states[0][0][:1]), direction == "reverse" or d == 1
        shifted = [
            np.stack([np.concatenate([one[1:], early] if backwards else [early, one[:-1]])[:, d] for one in side])
            for side in states
        ]
        t, y = (
            h @ r[d, :kept].T + b[d, size : size + kept]
            for h, r, b in zip(shifted, (before["r"], made_r), (before["b"], after["cell/bias"]), strict=True)
        )
        assert rows[names[1 + d]]["residual"] == pytest.approx(residual(t, y), rel=1e-3)
        is_variance(result.posteriors, 1 + d, t, y, shifted[1])


def test_a_weight_that_stays_and_states_that_are_not_seen_are_told() -> None:
    data = {"x": correlated((80, 7, 1, WIDTH))}
    rows = told(cell("LSTM", "forward", PLAIN, steps=7), data, rank=3, technique=["recurrent_input"])[1]
    assert rows["cell (W)"]["codes"] == 4 and rows["cell (R)"]["codes"] == 6  # R is fitted anew to make up for W
    rows = told(cell("LSTM", "forward", PLAIN, steps=7), data, rank=6, technique=["recurrent_stored"])[1]
    assert rows == dict.fromkeys(("cell (W)", "cell (R)"), "its weight is still that of the original")
    blind = cell("LSTM", "forward", PLAIN | {"y": False}, steps=7)
    rows = told(blind, data, rank=3, technique=["recurrent_stored"])[1]
    assert rows == {"cell": "its states of every step are no output of the cell"}
    rows = told(cell("GRU", "forward", PLAIN, steps=7), data, keep_params=0.8, technique=["recurrent_units"])[1]
    assert rows == {"cell": "it keeps other states than the original's, which no map tells of"}


def test_rows_of_a_table() -> None:
    table = falling(60, 16)
    proto = build("g (int64[n,s] i) => (float[n,s,16] y) { y = Gather(E, i) }", {"E": table})
    ids = np.random.default_rng(0).integers(-60, 60, (80, 5))
    result, rows, held = told(proto, {"i": ids}, rank=4, technique=["embedding"])
    (row,) = rows.values()
    ids = np.concatenate([held.feeds(place)["i"] for place in range(len(held))])
    exact, made = (answers(model, {"i": ids})["y"] for model in (proto, result.model))
    assert row["residual"] == pytest.approx(residual(exact, made), rel=1e-3) and row["codes"] == 5
    is_variance(result.posteriors, 0, exact, made, made)
    assert str(result.posteriors["0/input"]) == "y"


def test_a_tied_table_has_a_lookup_and_a_head() -> None:
    proto, data = bigram_model()
    result, rows, held = told(proto, data, keep_params=0.6, technique=["tied"])
    assert [name.rpartition(" ")[2] for name in rows] == ["(lookup)", "(head)"]
    ids = {"i": np.concatenate([held.feeds(place)["i"] for place in range(len(held))])}
    tensors = [str(result.posteriors[f"{place}/input"]) for place in range(2)]
    exact, made = (answers(model, ids, tensors) for model in (proto, result.model))
    lookup, head = rows.values()
    assert lookup["residual"] == pytest.approx(residual(exact[tensors[0]], made[tensors[0]]), rel=1e-3)
    assert head["residual"] == pytest.approx(residual(exact["logits"], made["logits"]), rel=1e-3)
    is_variance(result.posteriors, 1, exact["logits"], made["logits"], made[tensors[1]])


@pytest.mark.parametrize("variant", ["evbmf", "gibbs"])
def test_layers_that_are_not_refitted(variant: str) -> None:
    proto = build("g (float[n,24] x) => (float[n,16] y) { y = MatMul(x, w) }", {"w": falling(24, 16)})
    data = {"x": correlated((120, 24))}
    result, rows, held = told(proto, data, rank=5, technique=[f"bayesian:variant={variant}"])
    x = np.concatenate([held.feeds(place)["x"] for place in range(len(held))])
    (row,) = rows.values()
    exact, made = (answers(model, {"x": x})["y"] for model in (proto, result.model))
    assert row["residual"] == pytest.approx(residual(exact, made), rel=1e-3) and row["codes"] == 6
    is_variance(result.posteriors, 0, exact, made, x)


def test_factors_without_codes_are_told() -> None:
    proto = build("g (float[n,24] x) => (float[n,24] y) { y = MatMul(x, w) }", {"w": falling(24, 24)})
    rows = told(proto, {"x": correlated((120, 24))}, keep_params=0.7, technique=["block"])[1]
    assert all(isinstance(row, dict) or "full rank, which has no codes" in row for row in rows.values()) and rows
