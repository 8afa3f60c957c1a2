"""Fewer units in a recurrent cell: all of them are the original, dropped ones are made again, errors are true."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto

from lowrank_onnx.base import Factors, Moments, Site
from lowrank_onnx.model import from_proto
from lowrank_onnx.passes.recurrent_units import DirectionUnits, RecurrentUnits
from lowrank_onnx.pipeline import compress
from lowrank_onnx.recurrent_chains import fused
from lowrank_onnx.recurrent_statistics import read_cell
from lowrank_onnx.rewrite import rewrite
from lowrank_onnx.sites import find_sites
from tests.builders import Array, answers, build, correlated, furthest, moments, problem
from tests.passes.test_recurrent import CELLS, DIRECTIONS, HIDDEN, NONE, WAYS, cell, feeds, flags

TECHNIQUE = RecurrentUnits(multiple=1, ridge=0.01)
SPAN = 3
"""How many units carry all the states of ``redundant`` cells."""


def analysed(proto: ModelProto, steps: int = 30) -> tuple[Site, tuple[DirectionUnits, ...]]:
    posed = problem(proto, [feeds(proto, steps + place) for place in range(4)])
    (site,) = posed.sites
    return site, TECHNIQUE.analyse(site, moments(posed)[site.name])


def carried_out(proto: ModelProto, site: Site, factors: Factors) -> ModelProto:
    return rewrite(problem(proto).model, [fused(site, use, factors) for use in site.uses])


def without_memory(options: Mapping[str, bool]) -> dict[str, bool]:
    """The options without the last cell state, which is refused."""
    return {**options, "last": False}


@settings(max_examples=60, deadline=None)
@given(CELLS, DIRECTIONS, flags, st.sampled_from([1, 7, 200]), st.sampled_from([11, 14, 21]))
def test_all_units_are_the_original(op: str, direction: str, options: dict[str, bool], steps: int, opset: int) -> None:
    proto = cell(op, direction, options if op != "LSTM" else without_memory(options), opset)
    site, analysis = analysed(proto)
    factors = TECHNIQUE.factorize(site, analysis, TECHNIQUE.candidate(site, analysis, (HIDDEN,)))
    given_feeds = feeds(proto, steps)
    assert furthest(answers(carried_out(proto, site, factors), given_feeds), answers(proto, given_feeds)) <= 1e-5


def redundant(op: str, direction: str, options: Mapping[str, bool]) -> ModelProto:
    """A cell whose last units are copies of the first: nothing is lost when they go."""
    proto = cell(op, direction, options)
    copied = np.arange(HIDDEN) % SPAN
    for tensor in proto.graph.initializer:
        value = np.array(onnx.numpy_helper.to_array(tensor))
        if tensor.name in "wr":
            gates = value.reshape(len(value), -1, HIDDEN, value.shape[2])[:, :, copied]
            value = gates.reshape(value.shape)
        else:
            value = value.reshape(len(value), -1, HIDDEN)[:, :, copied].reshape(value.shape)
        tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
    return proto


@settings(max_examples=60, deadline=None)
@given(CELLS, DIRECTIONS, flags, st.sampled_from([1, 7, 200]))
def test_copies_of_units_go_without_a_trace(op: str, direction: str, options: dict[str, bool], steps: int) -> None:
    """Also where initial states, lengths and peepholes have to be cut: with the states of copies being equal."""
    options = without_memory(options)
    proto = redundant(op, direction, options)
    samples = [feeds(proto, 30 + place) for place in range(4)]
    given_feeds = feeds(proto, steps)
    for sample in (*samples, given_feeds):
        for name in {"h", "c"} & set(sample):
            sample[name] = sample[name][..., np.arange(HIDDEN) % SPAN]
    posed = problem(proto, samples)
    (site,) = posed.sites
    technique = RecurrentUnits(multiple=1, ridge=1e-9)
    analysis = technique.analyse(site, moments(posed)[site.name])
    factors = technique.factorize(site, analysis, technique.candidate(site, analysis, (SPAN,)))
    assert factors["state_second"].shape[2] == SPAN
    assert furthest(answers(carried_out(proto, site, factors), given_feeds), answers(proto, given_feeds)) <= 1e-3


@pytest.mark.parametrize("direction", sorted(WAYS))
@pytest.mark.parametrize("op", ["GRU", "LSTM", "RNN"])
@pytest.mark.parametrize("units", [1, 3, 4])
def test_the_error_told_is_that_of_the_states_and_what_the_recurrence_makes_of_them(
    op: str, direction: str, units: int
) -> None:
    """On the states of the original, before every step; the map comes out of the dense equivalent."""
    options = NONE | {"bias": True, "states": True, "y": True}
    proto = cell(op, direction, options)
    samples = [feeds(proto, steps) for steps in (9, 12, 7, 11)]
    posed = problem(proto, samples)
    (site,) = posed.sites
    seen: Moments = moments(posed)[site.name]["x"]
    assert seen.sensitivity is not None
    analysis = TECHNIQUE.analyse(site, {"x": seen})
    candidate = TECHNIQUE.candidate(site, analysis, (units,))
    dense = TECHNIQUE.dense_equivalent(site, candidate, TECHNIQUE.factorize(site, analysis, candidate))[site.name]
    assert dense.behind is not None
    lost = total = 0.0
    for d, reverse in enumerate(read_cell(site, site.attributes["cell"]).reverse):
        states = np.concatenate([before(answers(proto, s)["y"][:, d], s["h"][d], reverse) for s in samples])
        made = states @ dense.behind[d, :-1] + dense.behind[d, -1]
        r = site.weight[d, :, site.attributes["inputs"] :] * np.sqrt(seen.sensitivity[1, d])[:, None]
        for weight in (r.T, np.eye(HIDDEN)):
            energy = float(np.sum(((states - states.mean(axis=0)) @ weight) ** 2))
            lost += float(np.sum(((states - made) @ weight) ** 2)) / energy
            total += 1.0
    assert candidate.output_error == pytest.approx(np.sqrt(lost / total), rel=2e-2)


@pytest.mark.parametrize("op", ["GRU", "RNN"])
def test_a_unit_that_never_changes_goes_into_the_bias(op: str) -> None:
    """Nothing of the input or of the states reaches the last unit."""
    proto = cell(op, "forward", NONE | {"bias": True, "states": True, "y": True, "linear": True})
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    for name, tensor in constants.items():
        value = onnx.numpy_helper.to_array(tensor).copy()
        if name in "wr":
            value[:, HIDDEN - 1 :: HIDDEN] = 0.0
        tensor.CopyFrom(onnx.numpy_helper.from_array(value, name))
    samples = [feeds(proto, 30 + place) for place in range(4)]
    start = np.zeros((1, 3, HIDDEN), np.float32)
    for _ in range(60):  # until that unit has settled
        start = answers(proto, {"x": samples[0]["x"][:1], "h": start})["y"][0]
    for sample in samples:
        sample["h"][..., -1] = start[..., -1]
    posed = problem(proto, samples)
    (site,) = posed.sites
    technique = RecurrentUnits(multiple=1, ridge=1e-9)
    analysis = technique.analyse(site, moments(posed)[site.name])
    factors = technique.factorize(site, analysis, technique.candidate(site, analysis, (HIDDEN - 1,)))
    assert factors["chosen"].tolist() == [list(range(HIDDEN - 1))]
    assert furthest(answers(carried_out(proto, site, factors), samples[0]), answers(proto, samples[0])) <= 1e-4


def test_steps_behind_the_end_of_a_sequence_stay_zero() -> None:
    proto = cell("LSTM", "bidirectional", NONE | {"bias": True, "lengths": True, "y": True})
    site, analysis = analysed(proto)
    small = carried_out(proto, site, TECHNIQUE.factorize(site, analysis, TECHNIQUE.candidate(site, analysis, (3,))))
    given_feeds = feeds(proto, 9)
    y = answers(small, given_feeds)["y"]
    for m, length in enumerate(given_feeds["n"]):
        assert not y[length:, :, m].any()


def before(y: Array, start: Array, reverse: bool) -> Array:
    """(T * B, H) the state in front of every step."""
    turned = y[::-1] if reverse else y
    return np.concatenate([start[None], turned[:-1]]).reshape(-1, HIDDEN)


@pytest.mark.parametrize("direction", sorted(WAYS))
def test_units_that_stay_are_handed_on_as_they_are(direction: str) -> None:
    """So that a state that goes round in calls of one step each is the one of the whole sequence."""
    proto = cell("GRU", direction, NONE | {"bias": True, "states": True, "y": True, "last": True})
    site, analysis = analysed(proto)
    factors = TECHNIQUE.factorize(site, analysis, TECHNIQUE.candidate(site, analysis, (3,)))
    small = carried_out(proto, site, factors)
    given_feeds = feeds(proto, 20)
    whole = answers(small, given_feeds)
    if direction == "forward":
        state, steps = given_feeds["h"], []
        for step in given_feeds["x"]:
            made = answers(small, {"x": step[None], "h": state})
            state = made["u"]
            steps.append(made["y"])
        assert furthest({"y": np.concatenate(steps), "u": state}, whole) <= 1e-5
    else:  # what was dropped is not read
        changed = {**given_feeds, "h": given_feeds["h"].copy()}
        for d, kept in enumerate(factors["chosen"]):
            changed["h"][d][:, np.setdiff1d(np.arange(HIDDEN), kept)] = 7.0
        assert furthest(answers(small, changed), whole) == 0.0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "g (float[t,m,4] x) => (float[1,m,4] c) { a, b, c = LSTM<hidden_size=4>(x, w, w) }",
            "the last cell state is read",
        ),
        (
            "g (float[m,t,4] x) => (float[m,t,1,4] y) { y = LSTM<hidden_size=4, layout=1>(x, w, w) }",
            "the batch comes first",
        ),
        ("g (float[t,m,1] x) => (float[t,1,m,1] y) { y = LSTM<hidden_size=1>(x, w, w) }", "one hidden unit only"),
    ],
)
def test_what_has_no_fewer_units_is_refused(text: str, reason: str) -> None:
    width = 1 if "hidden_size=1" in text else 4
    proto = build(text, {"w": np.ones((1, 4 * width, width), np.float32)})
    (site,) = find_sites(from_proto(proto), {})  # onnxruntime does not run every layout
    assert reason in (RecurrentUnits().refuse(site) or "")


def test_the_ridge_is_chosen_on_samples_held_out() -> None:
    """The more steps are seen, the less the map has to be held back to suit others."""
    rng = np.random.default_rng(0)
    shapes = {"w": (1, 72, 8), "r": (1, 72, 24), "b": (1, 144)}
    constants: dict[str, Array] = {name: rng.standard_normal(shape) / 3 for name, shape in shapes.items()}
    proto = build(
        "g (float[t,m,8] x) => (float[t,1,m,24] y) { y = GRU<hidden_size=24>(x, w, r, b) }",
        {name: value.astype(np.float32) for name, value in constants.items()},
    )
    observed = []
    for steps in (8, 400):
        posed = problem(proto, {"x": rng.standard_normal((10, steps, 1, 8)).astype(np.float32)})
        (site,) = posed.sites
        observed.append(moments(posed)[site.name]["x"])
    few, many = observed
    folds = {"few seen": (few, many), "many seen": (many, few), "all seen": (many, many)}
    chosen = {
        name: RecurrentUnits().analyse(site, {"x": dataclasses.replace(many, folds=pair)})[0].ridge
        for name, pair in folds.items()
    }
    assert chosen["all seen"] == min(chosen.values())
    assert chosen["few seen"] > chosen["many seen"]


@pytest.mark.parametrize("option", ["multiple", "ridge", "outward"])
def test_negative_options_are_refused(option: str) -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        RecurrentUnits(**{option: -1})


def test_a_budget_is_met_with_fewer_units() -> None:
    rng = np.random.default_rng(0)
    constants: dict[str, Array] = {
        "w": rng.standard_normal((1, 96, 24)).astype(np.float32) / 5,
        "r": rng.standard_normal((1, 96, 32)).astype(np.float32) / 9,
        "b": rng.standard_normal((1, 192)).astype(np.float32),
        "o": rng.standard_normal((32, 10)).astype(np.float32),
    }
    proto = build(
        """g (float[t,m,24] x) => (float[t,1,m,10] y) {
            s = GRU<hidden_size=32, linear_before_reset=1>(x, w, r, b)  y = MatMul(s, o) }""",
        constants,
    )
    data = {"x": correlated((10, 12, 1, 24))}
    result = compress(proto, keep_params=0.6, technique=["recurrent_units:multiple=4"], calibrate=data, threads=1)
    (choice,) = [entry for entry in result.report["sites"] if entry["decision"] == "factorized"]
    assert choice["technique"] == "recurrent_units"
    sizes = {node.op_type: node for node in result.model.graph.node}
    (hidden,) = [entry.i for entry in sizes["GRU"].attribute if entry.name == "hidden_size"]
    assert [hidden] == choice["ranks"]
    assert hidden < 32
    assert result.report["ratio"]["parameters"] <= 0.6
