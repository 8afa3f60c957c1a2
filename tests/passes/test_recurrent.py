"""Recurrent cells: every attribute, every length, true factors at full rank, errors that are what they say."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto

from lowrank_onnx.base import Factors, Site
from lowrank_onnx.decompositions.gates import Preactivations, sensitivity
from lowrank_onnx.errors import DataError, LowRankError, ModelError
from lowrank_onnx.model import from_proto
from lowrank_onnx.passes.recurrent import RecurrentPass
from lowrank_onnx.passes.recurrent_cell import RecurrentCell
from lowrank_onnx.passes.recurrent_input import RecurrentInput
from lowrank_onnx.passes.recurrent_stored import RecurrentStored
from lowrank_onnx.pipeline import compress
from lowrank_onnx.quantized import dynamic_int8
from lowrank_onnx.recurrent_chains import fused, spelled, unspoken
from lowrank_onnx.rewrite import rewrite
from lowrank_onnx.runtime import open_session
from lowrank_onnx.sites.recurrent import GATES
from tests.builders import RUNTIME, Array, answers, build, correlated, difference, falling, furthest, moments, problem

WIDTH, HIDDEN = 6, 5
WAYS = {"forward": 1, "reverse": 1, "bidirectional": 2}


def cell(op: str, direction: str, options: Mapping[str, bool], opset: int = 17, steps: int | str = "t") -> ModelProto:
    """A model of one cell; ``options`` says which inputs, outputs and attributes it has."""
    rng = np.random.default_rng(3)
    ways, rows = WAYS[direction], GATES[op] * HIDDEN
    lstm = op == "LSTM"
    inputs = ["x", "w", "r", "b" * options["bias"], "n" * options["lengths"], "h" * options["states"]]
    inputs += ["c" * (options["states"] and lstm), "p" * (options["peepholes"] and lstm)]
    outputs = ["y" * options["y"], "u" * (options["last"] or not options["y"]), "v" * (options["last"] and lstm)]
    for names in (inputs, outputs):
        while not names[-1]:
            names.pop()
    shape: dict[str, list[int | str]] = {
        "y": [steps, ways, "m", HIDDEN],
        "u": [ways, "m", HIDDEN],
        "v": [ways, "m", HIDDEN],
    }
    attributes: dict[str, Any] = {"hidden_size": HIDDEN, "direction": direction}
    if op == "GRU":
        attributes["linear_before_reset"] = int(options["linear"])
    if options["relu"]:
        functions = {"LSTM": ["Sigmoid", "Tanh", "Relu"], "GRU": ["Sigmoid", "Relu"], "RNN": ["Relu"]}
        attributes["activations"] = functions[op] * ways
    if options["clip"]:
        attributes["clip"] = 0.5
    if options["coupled"] and lstm:
        attributes["input_forget"] = 1
    value = onnx.helper.make_tensor_value_info
    given_inputs = [value("x", 1, [steps, "m", WIDTH])]
    given_inputs += [value("n", 6, ["m"])] * options["lengths"]
    given_inputs += [
        value(name, 1, [ways, "m", HIDDEN]) for name in ("h", "c"[: int(lstm)]) if options["states"] and name
    ]
    # Contractions: with Relu a state would grow without bound, and rounding with it.
    states = rng.standard_normal((ways, GATES[op], HIDDEN, HIDDEN))
    states *= 0.9 / np.linalg.norm(states, ord=2, axis=(2, 3), keepdims=True)
    constants = {
        "w": rng.standard_normal((ways, rows, WIDTH)),
        "r": states.reshape(ways, rows, HIDDEN),
        "b": rng.standard_normal((ways, 2 * rows)),
        "p": rng.standard_normal((ways, 3 * HIDDEN)),
    }
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(op, inputs, outputs, name="cell", **attributes)],
        "g",
        given_inputs,
        [value(name, 1, shape[name]) for name in outputs if name],
        [onnx.numpy_helper.from_array(v.astype(np.float32), k) for k, v in constants.items() if k in inputs],
    )
    made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    made.ir_version = 8
    return made


def feeds(proto: ModelProto, steps: int, batch: int = 3) -> dict[str, Array]:
    """Random inputs; lengths from 1 to all."""
    rng = np.random.default_rng(steps)
    made: dict[str, Array] = {}
    for entry in proto.graph.input:
        if entry.name == "x":
            made["x"] = rng.standard_normal((steps, batch, WIDTH)).astype(np.float32)
        elif entry.name == "n":
            made["n"] = np.array([steps, max(steps // 2, 1), 1], np.int32)
        else:
            made[entry.name] = rng.uniform(
                -1, 1, (entry.type.tensor_type.shape.dim[0].dim_value, batch, HIDDEN)
            ).astype(np.float32)
    return made


def rotated(site: Site) -> Factors:
    """True factors of full rank: each weight through an orthogonal matrix."""
    rng = np.random.default_rng(0)
    weight = site.weight.astype(np.float64)
    turn, other = (np.linalg.qr(rng.standard_normal((size, size)))[0] for size in (WIDTH, HIDDEN))
    factors = {
        "first": turn,
        "second": weight[:, :, :WIDTH] @ turn,
        "state_first": np.stack([other.T] * len(weight)),
        "state_second": weight[:, :, WIDTH:] @ other,
    }
    if site.attributes["bias"] is not None:
        factors["bias"] = site.attributes["bias"]
    return {name: value.astype(np.float32) for name, value in factors.items()}


flags = st.fixed_dictionaries(
    {
        name: st.booleans()
        for name in ("bias", "lengths", "states", "peepholes", "y", "last", "linear", "relu", "clip", "coupled")
    }
)
plain_flags = st.fixed_dictionaries(
    {name: st.booleans() for name in ("bias", "states", "y", "last", "linear", "relu")}
    | {name: st.just(False) for name in ("lengths", "peepholes", "clip", "coupled")}
)
CELLS = st.sampled_from(sorted(GATES))
DIRECTIONS = st.sampled_from(sorted(WAYS))


@settings(max_examples=60, deadline=None)
@given(CELLS, DIRECTIONS, flags, st.sampled_from([1, 7, 200]), st.sampled_from([11, 14, 21]))
def test_the_fused_form_carries_every_attribute(
    op: str, direction: str, options: dict[str, bool], steps: int, opset: int
) -> None:
    proto = cell(op, direction, options, opset)
    posed = problem(proto)
    (site,) = posed.sites
    made = rewrite(posed.model, [fused(site, use, rotated(site)) for use in site.uses])
    given_feeds = feeds(proto, steps)
    assert furthest(answers(made, given_feeds), answers(proto, given_feeds)) <= 1e-5


@settings(max_examples=60, deadline=None)
@given(CELLS, DIRECTIONS, plain_flags, st.sampled_from([1, 7, 200]), st.sampled_from([9, 12, 13, 21]))
def test_the_explicit_form_is_the_same_cell(
    op: str, direction: str, options: dict[str, bool], steps: int, opset: int
) -> None:
    proto = cell(op, direction, options, opset)
    posed = problem(proto)
    (site,) = posed.sites
    assert unspoken(site) is None
    made = rewrite(posed.model, [spelled(site, use, rotated(site)) for use in site.uses])
    onnx.checker.check_model(made, full_check=True)
    given_feeds = feeds(proto, steps)
    assert furthest(answers(made, given_feeds), answers(proto, given_feeds)) <= 1e-5


@settings(max_examples=30, deadline=None)
@given(CELLS, DIRECTIONS, plain_flags, st.sampled_from([11, 17]))
def test_one_step_needs_no_scan(op: str, direction: str, options: dict[str, bool], opset: int) -> None:
    proto = cell(op, direction, options, opset, steps=1)
    posed = problem(proto)
    (site,) = posed.sites
    assert site.attributes["single_step"]
    made = rewrite(posed.model, [spelled(site, use, rotated(site)) for use in site.uses])
    assert "Scan" not in {node.op_type for node in made.graph.node}
    given_feeds = feeds(proto, 1)
    assert furthest(answers(made, given_feeds), answers(proto, given_feeds)) <= 1e-5


NONE = dict.fromkeys(
    ("bias", "lengths", "states", "peepholes", "y", "last", "linear", "relu", "clip", "coupled"), False
)


@pytest.mark.parametrize("option", ["lengths", "peepholes", "clip", "coupled"])
def test_what_cannot_be_spelled_out_is_refused(option: str) -> None:
    (site,) = problem(cell("LSTM", "forward", NONE | {"y": True, option: True})).sites
    reason = RecurrentCell().refuse(site)
    assert reason and "\n" not in reason
    assert RecurrentStored().refuse(site) is None and RecurrentInput().refuse(site) is None


# --- errors ------------------------------------------------------------------------------------------


def gates_of(site: Site, weight: Array, bias: Array, d: int, x: Array, before: Array) -> tuple[Array, Array]:
    """W x + Wb and R h + Rb of one direction, computed by hand."""
    rows = weight.shape[1]
    return x @ weight[d, :, :WIDTH].T + bias[d, :rows], before @ weight[d, :, WIDTH:].T + bias[d, rows:]


@pytest.mark.parametrize("direction", sorted(WAYS))
@pytest.mark.parametrize("op", ["LSTM", "RNN"])
def test_the_error_told_is_that_of_the_gates_on_the_data(op: str, direction: str) -> None:
    """Of cells whose gates add up; the weights of the rows are those of the moments."""
    proto = cell(op, direction, NONE | {"bias": True, "lengths": True, "states": True, "y": True})
    samples = [feeds(proto, steps) for steps in (9, 12, 7, 11)]
    posed = problem(proto, samples)
    (site,) = posed.sites
    seen = moments(posed)[site.name]
    technique = RecurrentStored(multiple=1)
    analysis = technique.analyse(site, seen)
    candidate = technique.candidate(site, analysis, (3, 3))
    factors = technique.factorize(site, analysis, candidate)
    dense = technique.dense_equivalent(site, candidate, factors)[site.name]
    told = analysis.basis.moments
    assert told is not None
    lost, total, count = 0.0, 0.0, 0
    gates: list[tuple[int, Array, Array]] = []
    for sample in samples:
        y = answers(proto, sample)["y"]
        for m, length in enumerate(sample["n"]):
            x = sample["x"][:length, m]
            for d in range(WAYS[direction]):
                turn = -1 if direction == "reverse" or d == 1 else 1
                states = [sample["h"][d, m], *y[:length, d, m][::turn][:-1]]
                before = np.array(states)[::turn]
                old = sum(gates_of(site, site.weight, site.attributes["bias"], d, x, before))
                new = sum(gates_of(site, dense.weight, dense.biases["cell"], d, x, before))
                gates.append((d, np.asarray(old), np.asarray(new)))
            count += int(length)
    for d in range(WAYS[direction]):
        weights = told.input_rows[d]
        old = np.concatenate([entry[1] for entry in gates if entry[0] == d])
        new = np.concatenate([entry[2] for entry in gates if entry[0] == d])
        lost += float(np.sum(weights * (old - new) ** 2))
        total += float(np.sum(weights * (old - old.mean(axis=0)) ** 2))
    assert candidate.output_error == pytest.approx(np.sqrt(lost / total), rel=1e-3)
    assert seen["x"].rows == count


def test_sensitivity_is_the_squared_derivative_of_what_follows() -> None:
    """Against finite differences of an LSTM whose recurrent weight is zero: only the memory carries on."""
    rng = np.random.default_rng(0)
    steps, width = 4, 1
    pre = rng.standard_normal((steps, 1, 4 * width))
    start = rng.standard_normal((1, width))

    def states(gates: Array) -> Array:
        i, o, f, g = (gates[..., place] for place in range(4))
        c, made = start[0, 0], []
        for t in range(steps):
            c = c / (1 + np.exp(-f[t, 0])) + np.tanh(g[t, 0]) / (1 + np.exp(-i[t, 0]))
            made.append(np.tanh(c) / (1 + np.exp(-o[t, 0])))
        return np.array(made)

    zeros = np.zeros_like(pre)
    told, _ = sensitivity("LSTM", Preactivations(pre, zeros, np.zeros((steps, 1, width)), start), False)
    for t in range(steps):
        for gate in range(4):
            step = np.zeros_like(pre)
            step[t, 0, gate] = 1e-5
            slope = (states(pre + step) - states(pre - step)) / 2e-5
            assert told[t, 0, gate] == pytest.approx(float(slope @ slope), rel=1e-5)


def test_data_and_weighted_rows_beat_the_weights_alone() -> None:
    proto = cell("LSTM", "forward", NONE | {"bias": True, "y": True})
    data = {"x": correlated((12, 30, 1, WIDTH))}
    posed = problem(proto, data)
    (site,) = posed.sites
    expected = answers(proto, {"x": data["x"][0]})["y"]
    errors = []
    for seen in (moments(posed)[site.name], None):
        technique = RecurrentStored(multiple=1, ridge=0.001)
        analysis = technique.analyse(site, seen)
        candidate = technique.candidate(site, analysis, (2, 3))
        made = rewrite(posed.model, technique.emit(site, candidate, technique.factorize(site, analysis, candidate)))
        errors.append(difference(answers(made, {"x": data["x"][0]})["y"], expected))
    assert errors[0] < errors[1]


# --- where weights hide, and bad input ---------------------------------------------------------------


def test_equal_cells_in_both_branches_are_one_site() -> None:
    """Weights stored once in another gate order, sliced and joined anew in every branch."""
    branch = """{{ a{0} = Slice(w, zero, eight, axis)  b{0} = Slice(w, eight, all, axis)
        s{0} = Concat<axis=0>(b{0}, a{0})
        v{0} = Unsqueeze(s{0}, axis) q{0}, y{0} = RNN<hidden_size=16>(x, v{0}, r) }}"""
    text = "g (float[t,m,16] x, bool c) => (float[1,m,16] y) { y = If (c) "
    text += f"<then_branch = t () => (float[1,m,16] y1) {branch.format(1)}, "
    text += f"else_branch = e () => (float[1,m,16] y2) {branch.format(2)}> }}"
    constants = {"w": falling(16, 16), "r": falling(16, 16, seed=1)[None]}
    constants |= {name: np.array([value]) for name, value in (("zero", 0), ("eight", 8), ("all", 16), ("axis", 0))}
    proto = build(text, constants)
    posed = problem(proto)
    (site,) = [entry for entry in posed.sites if entry.kind == "recurrent"]
    assert len(site.uses) == 2 and site.freed == 512
    np.testing.assert_array_equal(site.weight[0, :8, :16], constants["w"][8:])
    technique = RecurrentStored()
    analysis = technique.analyse(site, None)
    candidate = technique.candidate(site, analysis, (4, 4))
    made = rewrite(posed.model, technique.emit(site, candidate, technique.factorize(site, analysis, candidate)))
    stored = {tensor.name: list(tensor.dims) for tensor in made.graph.initializer}
    assert "w" not in stored and "r" not in stored
    x = correlated((5, 2, 16))
    for way in (True, False):
        given_feeds = {"x": x, "c": np.array(way)}
        apart = difference(answers(made, given_feeds)["y"], answers(proto, given_feeds)["y"])
        assert 0 < apart < 1


def test_a_hidden_size_that_contradicts_the_weights_is_told() -> None:
    proto = build(
        "g (float[t,m,6] x) => (float[t,1,m,5] y) { y = GRU<hidden_size=7>(x, w, r) }",
        {"w": falling(15, 6)[None], "r": falling(15, 5)[None]},
    )
    with pytest.raises(ModelError, match="hidden_size 7"):
        problem(proto)


def test_sequences_without_a_step_are_told() -> None:
    proto = cell("GRU", "forward", NONE | {"bias": True, "y": True})
    with pytest.raises(DataError, match="no step"):
        problem(proto, [{"x": np.zeros((steps, 3, WIDTH), np.float32)} for steps in (2, 0)])


@pytest.mark.parametrize("kind", [RecurrentInput, RecurrentStored, RecurrentCell])
def test_negative_options_are_refused(kind: type[RecurrentPass]) -> None:
    with pytest.raises(ValueError, match="negative"):
        kind(ridge=-1.0)


# --- real models -------------------------------------------------------------------------------------


def heard(model: ModelProto, chunks: Array) -> tuple[Array, Array]:
    """Scores (n,) and states (n, 2, 1, 128) of a voice detector that reads its own last state."""
    session = open_session(model, RUNTIME)
    state, scores, states = np.zeros((2, 1, 128), np.float32), [], []
    for chunk in chunks:
        score, state = session.run(None, {"input": chunk[None], "state": state, "sr": np.array(16000)})
        scores.append(score[0, 0])
        states.append(state)
    return np.array(scores), np.array(states)


@pytest.mark.parametrize("technique", [RecurrentStored, RecurrentInput, RecurrentCell])
def test_a_state_that_goes_round_stays_right_over_200_chunks(zoo: Path, technique: type[RecurrentPass]) -> None:
    """An LSTM inside the branches of an If, at full rank: no step may lose or mix up the state."""
    folder = zoo / "silero_vad"
    posed = problem(onnx.load(folder / "model.onnx"), folder / "calibrate.npz")
    (site,) = [entry for entry in posed.sites if entry.kind == "recurrent"]
    made = technique()
    analysis = made.analyse(site, None)
    candidate = made.candidate(site, analysis, analysis.basis.full)
    replacements = made.emit(site, candidate, made.factorize(site, analysis, candidate))
    chunks = np.load(folder / "evaluate.npz")["input"][:200]
    before, after = heard(posed.model.proto, chunks), heard(rewrite(posed.model, replacements), chunks)
    assert difference(after[0], before[0]) <= 1e-4 and difference(after[1], before[1]) <= 1e-4


def test_the_error_of_a_compressed_state_does_not_grow_over_200_chunks(zoo: Path) -> None:
    folder = zoo / "silero_vad"
    result = compress(
        folder / "model.onnx",
        keep_params=0.8,
        calibrate=folder / "calibrate.npz",
        technique=["recurrent_stored", "svd", "channel"],
        threads=1,
        cache=False,
    )
    assert result.report["ratio"]["parameters"] <= 0.8
    chunks = np.load(folder / "evaluate.npz")["input"][:200]
    before, after = heard(onnx.load(folder / "model.onnx"), chunks), heard(result.model, chunks)
    halves = [difference(after[1][part], before[1][part]) for part in (slice(0, 100), slice(100, 200))]
    assert halves[1] < 2 * halves[0] + 0.05


def test_a_cell_that_was_observed_is_not_said_to_be_judged_by_its_weight_alone() -> None:
    proto = cell("GRU", "forward", NONE | {"bias": True, "y": True})
    samples = [feeds(proto, 20, batch=1) for _ in range(6)]
    report = compress(proto, rank=2, calibrate=samples, threads=1, technique=["recurrent_stored"]).report
    assert not [text for text in report["warnings"] if "weight alone" in text]


def test_a_layer_behind_the_second_output_of_a_cell() -> None:
    """The cell is known by its first output; what reads another one lies behind it all the same."""
    text = """g (float[s,n,8] x) => (float[n,12] y) {
        states, last = GRU<hidden_size=16>(x, w, r)  h = Squeeze(last, zero)  y = MatMul(h, v) }"""
    constants = {"w": falling(48, 8)[None], "r": falling(48, 16, seed=1)[None], "v": falling(16, 12, seed=2)}
    proto = build(text, constants | {"zero": np.array([0])})
    samples = [{"x": correlated((7, 1, 8), seed=place)} for place in range(6)]
    report = compress(proto, keep_params=0.7, calibrate=samples, threads=1, cache=False).report
    assert report["ratio"]["parameters"] <= 0.7


@pytest.mark.parametrize(("lengths", "reason"), [([9, 4], "'m' is 2 here and 3"), ([9, 4, 12], "sequence_lens")])
def test_lengths_that_do_not_fit_the_tensor_are_told(lengths: list[int], reason: str) -> None:
    """Two lengths for three sequences; a length beyond the nine steps there are."""
    proto = cell("LSTM", "forward", NONE | {"bias": True, "lengths": True, "y": True})
    sample = feeds(proto, 9) | {"n": np.array(lengths, np.int32)}
    with pytest.raises(LowRankError, match=reason):
        problem(proto, [sample, sample])


def test_steps_behind_the_end_of_a_sequence_are_not_observed() -> None:
    """Sequences shorter than the tensor: what stands behind them changes nothing."""
    proto = cell("GRU", "bidirectional", NONE | {"bias": True, "lengths": True, "y": True})
    sample = feeds(proto, 9)
    seen = moments(problem(proto, [sample] * 2))["cell"]["x"]
    for m, length in enumerate(sample["n"]):
        sample["x"][length:, m] = 1e3
    other = moments(problem(proto, [sample] * 2))["cell"]["x"]
    assert seen.rows == other.rows == 2 * int(sample["n"].sum())
    np.testing.assert_allclose(other.gram, seen.gram, rtol=1e-6)


def test_the_int8_model_beside_ours_has_an_int8_cell() -> None:
    """What onnxruntime has for LSTM, and has not for GRU."""
    options = NONE | {"bias": True, "y": True}
    made = dynamic_int8(from_proto(cell("LSTM", "forward", options)))
    assert [node.op_type for node in made.graph.node] == ["DynamicQuantizeLSTM"]
    with pytest.raises(ModelError, match="nothing to quantize"):
        dynamic_int8(from_proto(cell("GRU", "forward", options)))
