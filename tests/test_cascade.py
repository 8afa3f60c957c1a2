"""Cascades: the graph against both of its models by hand, the threshold against brute force, and the refusals."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto

import lowrank_onnx
from lowrank_onnx.cascade import (
    CONFIDENCES,
    COUNT,
    DOUBT,
    Gate,
    build_cascade,
    choose_threshold,
    common_threshold,
    confidence,
    fewest_samples,
    most_telling,
    separation,
)
from lowrank_onnx.errors import DataError, LowRankError, ModelError, TargetError
from lowrank_onnx.model import from_proto, parameter_count
from tests.builders import answers, build, falling, furthest

GRAPH = "g (float[n,16] x) => (float[n,5] y) { t = MatMul(x, w) u = Relu(t) y = MatMul(u, v) }"


def classifier(noise: float = 0.0, graph: str = GRAPH, opset: int = 17) -> ModelProto:
    rng = np.random.default_rng(3)
    w, v = falling(16, 24), rng.standard_normal((24, 5)).astype(np.float32)
    changed = v + noise * rng.standard_normal(v.shape).astype(np.float32)
    return from_proto(build(graph, {"w": w, "v": changed}, opset=opset)).proto


def samples(count: int = 40) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(0).standard_normal((count, 16)).astype(np.float32)}


def middle(cheap: ModelProto, kind: str, normalized: bool = False, names: tuple[str, ...] = ("y",)) -> Gate:
    """A gate that about half of the samples pass."""
    gate = Gate(names, kind, 0.0, normalized)
    sure = np.sort(confidence(answers(cheap, samples()), gate))
    return Gate(names, kind, float((sure[19] + sure[20]) / 2), normalized)


@pytest.mark.parametrize("opset", [11, 13, 17, 18, 21])
@pytest.mark.parametrize("kind", CONFIDENCES)
@pytest.mark.parametrize("rows", [True, False])
def test_unsure_samples_get_the_answer_of_the_full_model(kind: str, rows: bool, opset: int) -> None:
    full, cheap = classifier(opset=opset), classifier(0.5, opset=opset)
    gate = middle(cheap, kind)
    cascade = build_cascade(full, cheap, gate, {"y": 2}, rows)
    onnx.checker.check_model(cascade, full_check=True)
    whole = samples()
    exact, rough = answers(full, whole)["y"], answers(cheap, whole)["y"]
    unsure = confidence({"y": rough}, gate) < gate.threshold
    assert unsure.sum() == 20 and np.abs(exact - rough).max() > 0.1
    expected = np.where(unsure[:, None], exact, rough) if rows else exact
    assert furthest(answers(cascade, whole), {"y": expected}) < 1e-6
    alone = [answers(cascade, {"x": whole["x"][place : place + 1]})["y"] for place in range(40)]
    assert furthest({"y": np.concatenate(alone)}, {"y": np.where(unsure[:, None], exact, rough)}) < 1e-5


@pytest.mark.parametrize(
    "threshold, runs", [(-math.inf, 0), (math.inf, 40)], ids=["nothing goes on", "everything goes on"]
)
def test_the_ends_are_the_two_models(threshold: float, runs: int) -> None:
    full, cheap = classifier(), classifier(0.5)
    cascade = build_cascade(full, cheap, Gate(("y",), "margin", threshold, False), {"y": 2}, True)
    found = answers(cascade, samples(), [COUNT])
    assert found[COUNT] == runs
    assert furthest({"y": found["y"]}, answers(full if runs else cheap, samples())) < 1e-6


def test_weights_both_models_have_are_stored_once() -> None:
    full, cheap = classifier(), classifier(0.5)
    cascade = build_cascade(full, cheap, middle(cheap, "margin"), {"y": 2}, True)
    shared = 16 * 24
    assert parameter_count(cascade) == parameter_count(full) + parameter_count(cheap) - shared + 1  # the threshold
    assert {tensor.name for tensor in full.graph.initializer} <= {t.name for t in cascade.graph.initializer}


def test_scores_of_several_outputs_and_axes_are_all_watched() -> None:
    graph = """g (float[n,16] x) => (float[n,5] y, float[n,4,6] logits, float[n,3,2,4] map_scores) {
        t = MatMul(x, w) u = Relu(t) y = MatMul(u, v)
        logits = Reshape(t, s) map_scores = Reshape(t, m) }"""
    models = []
    for noise in (0.0, 0.5):
        proto = classifier(noise, graph)
        for name, shape in (("s", [-1, 4, 6]), ("m", [-1, 3, 2, 4])):
            proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(shape, np.int64), name))
        models.append(proto)
    full, cheap = models
    names = ("y", "logits", "map_scores")
    for kind in CONFIDENCES:
        gate = middle(cheap, kind, names=names)
        cascade = build_cascade(full, cheap, gate, {"y": 2, "logits": 3, "map_scores": 4}, True)
        assert answers(cascade, samples(), [COUNT])[COUNT] == 20


def test_bodies_keep_their_own_names() -> None:
    graph = """g (float[n,16] x) => (float[n,5] y) {
        t = MatMul(x, w) r = ReduceSum(t) c = Greater(r, r)
        u = If (c) <then_branch = a () => (float[n,24] p) { p = Relu(t) },
                    else_branch = b () => (float[n,24] p2) { q = Relu(t) p2 = Identity(q) }>
        y = MatMul(u, v) }"""
    full, cheap = classifier(graph=graph), classifier(0.5, graph)
    cascade = build_cascade(full, cheap, Gate(("y",), "margin", math.inf, False), {"y": 2}, True)
    onnx.checker.check_model(cascade, full_check=True)
    assert furthest(answers(cascade, samples()), answers(full, samples())) < 1e-6


def test_an_operator_set_without_scatter_is_refused() -> None:
    full = classifier(opset=9)
    with pytest.raises(ModelError, match="operator set 11"):
        build_cascade(full, full, Gate(("y",), "margin", 0.0, False), {"y": 2}, True)


@given(
    st.lists(st.tuples(st.integers(0, 6), st.sampled_from([0.0, 0.0, 0.0, 0.5, 1.0])), min_size=1, max_size=25),
    st.sampled_from([0.5, 0.7, 0.9]),
)
def test_the_threshold_is_the_smallest_that_keeps_the_wish(entries: list[tuple[int, float]], wish: float) -> None:
    sure = np.array([value for value, _ in entries], float)
    losses = np.array([loss for _, loss in entries])
    found = choose_threshold(sure, losses, wish)

    count = len(sure)
    chances = np.cumsum([math.comb(count, k) * (1 - wish) ** k * wish ** (count - k) for k in range(count + 1)])
    few = max((k for k in range(count + 1) if chances[k] < DOUBT), default=0)

    def within(threshold: float) -> bool:
        lost = losses[sure >= threshold].sum()
        return bool((lost + 1) / (count + 1) <= 1 - wish + 1e-12 and lost <= few)

    if len(entries) < fewest_samples(wish):
        assert found is None
        return
    assert found is not None and within(found)
    fewer = [value for value in (-math.inf, *(np.unique(sure) - 0.25)) if (sure < value).sum() < (sure < found).sum()]
    assert not any(within(value) for value in fewer)


def test_new_samples_keep_the_wish_four_times_of_five() -> None:
    rng = np.random.default_rng(0)
    missed: list[float] = []
    twice: list[float] = []
    for _ in range(1000):
        parts = []
        for _ in range(2):
            sure = rng.random(150)
            parts.append((sure, (rng.random(150) < 0.3 * (1 - sure) ** 2).astype(float)))
        for used, told in ((parts[:1], missed), (parts, twice)):
            threshold = common_threshold(used, 0.97)
            told.append(0.1 * (1 - max(threshold, 0.0)) ** 3)  # of all samples, exactly: the others agree
    assert 0.015 < np.mean(missed) <= 0.03
    assert 0.1 < np.mean(np.array(missed) > 0.03) <= DOUBT
    assert np.mean(np.array(twice) > 0.03) <= 1.3 * DOUBT**2, "two sets of samples are seldom lucky both"


def test_a_set_too_small_for_a_threshold_does_not_count() -> None:
    few, many = (np.arange(3.0), np.ones(3)), (np.arange(30.0), np.zeros(30))
    assert common_threshold([few, many], 0.9) == choose_threshold(*many, 0.9) == -math.inf


@given(st.lists(st.tuples(st.integers(0, 6), st.sampled_from([0.0, 0.25, 1.0])), min_size=1, max_size=25))
def test_separation_counts_pairs(entries: list[tuple[int, float]]) -> None:
    won = total = 0.0
    for low, loss in entries:
        for high, other in entries:
            total += loss * (1 - other)
            won += loss * (1 - other) * ((low < high) + (low == high) / 2)
    found = separation(*(np.array(column, float) for column in zip(*entries, strict=True)))
    assert found == pytest.approx(won / total if total else 0.5)


@pytest.mark.parametrize("kind", CONFIDENCES)
def test_the_confidence_that_tells_more_is_watched(kind: str) -> None:
    """A lead of two over one is sure or not by what the third class has; a probability says it, a margin does not."""
    scores = np.array([[2.0, 1.0, -9.0], [2.0, 1.0, 0.9], [4.0, 3.2, 0.0], [4.0, 3.2, 3.1]], np.float32)
    by_margin, by_probability = np.array([0.0, 0, 1, 1]), np.array([0.0, 1, 0, 1])
    gate = most_telling({"y": scores}, by_margin if kind == "margin" else by_probability, ["y"])
    assert gate.kind == kind and gate.threshold == -math.inf and not gate.normalized


def test_the_confidence_is_not_chosen_on_the_samples_of_the_threshold() -> None:
    """Of two thresholds for the same samples the one that sends fewer on misses the wish in every third run."""
    rng = np.random.default_rng(0)
    missed: dict[str, list[bool]] = {"fewest": [], "told before": []}
    for _ in range(400):
        losses = (rng.random(600) < 0.05).astype(float)
        # Two confidences, equally good, that see each sample differently.
        views = [np.where(losses > 0, 0.5, 1.0) * rng.random(600) ** 0.5 for _ in range(2)]
        known, held, new = slice(0, 150), slice(150, 300), slice(300, 600)
        thresholds = [common_threshold([(view[held], losses[held])], 0.97) for view in views]
        fewest = min((0, 1), key=lambda which: float((views[which][held] < thresholds[which]).mean()))
        best = max((0, 1), key=lambda which: separation(views[which][known], losses[known]))
        for name, which in (("fewest", fewest), ("told before", best)):
            lost = losses[new][views[which][new] >= thresholds[which]].sum() / 300
            missed[name].append(lost > 0.03)
    assert np.mean(missed["told before"]) < np.mean(missed["fewest"])


# --- the whole way ------------------------------------------------------------------------------------


def test_a_level_that_agrees_alone_needs_no_cascade(models: Path) -> None:
    folder = models / "digits_mlp"
    with pytest.raises(TargetError, match=r"agrees on 1\.0000 alone and needs no cascade"):
        lowrank_onnx.compress(
            folder / "model.onnx",
            keep_macs=0.5,
            agreement=0.95,
            calibrate=folder / "calibrate.npz",
            threads=1,
            cache=False,
        )


def test_without_class_scores_there_is_nothing_to_watch() -> None:
    proto = build("g (float[n,32] x) => (float[n,9] embedding) { embedding = MatMul(x, w) }", {"w": falling(32, 9)})
    data = {"x": np.random.default_rng(0).standard_normal((300, 32)).astype(np.float32)}
    with pytest.raises(TargetError, match="no output looks like class scores"):
        lowrank_onnx.compress(proto, keep_macs=0.5, agreement=0.9, calibrate=data)


@pytest.mark.parametrize("scores", ["y", "r"])
def test_an_output_that_is_not_a_row_a_sample_is_no_score(scores: str) -> None:
    """A stored table that is given out as well, and rows of a reshape."""
    proto = classifier()
    proto.graph.output.append(onnx.helper.make_tensor_value_info("v", onnx.TensorProto.FLOAT, (24, 5)))
    if scores == "r":
        proto.graph.node.append(onnx.helper.make_node("Concat", ["y", "y"], ["r"], axis=0))
        proto.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("r", onnx.TensorProto.FLOAT, (None, 5)))
    with pytest.raises(TargetError, match=r"no cascade pays|needs no cascade|use that target|one row of class scores"):
        lowrank_onnx.compress(proto, keep_macs=0.6, agreement=0.9, calibrate=samples(400), threads=1)


def test_too_few_samples_are_told() -> None:
    with pytest.raises(DataError, match="needs 248 calibration samples, found 40"):
        lowrank_onnx.compress(classifier(), keep_macs=0.5, agreement=0.99, calibrate=samples())
    with pytest.raises(DataError, match="--calibrate"):
        lowrank_onnx.compress(classifier(), keep_macs=0.5, agreement=0.99)
    with pytest.raises(LowRankError, match=r"in \(0, 1\), got 1.5"):
        lowrank_onnx.compress(classifier(), keep_macs=0.5, agreement=1.5, calibrate=samples())


WIDE = 1024
SCHEMA = json.loads((Path(lowrank_onnx.__file__).parent / "report" / "schema.json").read_text(encoding="utf-8"))


def planted(rank: int, least: float, flat: float, hard: float) -> tuple[ModelProto, dict[str, np.ndarray]]:
    """A wide layer of a rank, and beside it a flat spectrum that only a share of the samples ever touch.

    Args:
        rank: Of what the usual samples touch.
        least: The last of its singular values, the first being 1.
        flat: Size of the other singular values.
        hard: Share of samples that touch only those.
    """
    rng = np.random.default_rng(5)
    left, right = (np.linalg.qr(rng.standard_normal((WIDE, WIDE)))[0] for _ in range(2))
    sigma = np.concatenate([np.geomspace(1, least, rank), np.full(WIDE - rank, flat)])
    w = ((left * sigma) @ right).astype(np.float32)
    v = rng.standard_normal((WIDE, 5)).astype(np.float32)
    codes = rng.standard_normal((600, WIDE))
    is_hard = rng.random(600) < hard
    codes[np.ix_(~is_hard, np.arange(WIDE) >= rank)] = 0
    codes[np.ix_(is_hard, np.arange(WIDE) < rank)] = 0
    graph = f"g (float[n,{WIDE}] x) => (float[n,5] y) {{ t = MatMul(x, w) u = Relu(t) y = MatMul(u, v) }}"
    return build(graph, {"w": w, "v": v}), {"x": (codes @ left.T).astype(np.float32)}


def cascade_of(proto: ModelProto, data: dict[str, np.ndarray], keep_macs: float) -> dict[str, Any]:
    """What the report tells of a cascade."""
    made = lowrank_onnx.compress(
        proto,
        keep_macs=keep_macs,
        agreement=0.97,
        calibrate=data,
        technique=("svd",),
        refine=False,
        threads=1,
        cache=False,
    )
    told = made.report["cascade"]
    jsonschema.validate(made.report, SCHEMA)
    assert isinstance(told, dict)
    return told


def test_a_cascade_is_refused_where_a_static_model_of_its_agreement_is_as_fast() -> None:
    """Of rank 64 all samples agree; a cheap level of less sends most of them on."""
    with pytest.raises(TargetError) as refused:
        cascade_of(*planted(64, 0.1, 0.0, 0.0), 0.07)
    told = str(refused.value)
    assert "the best cascade" in told and "but a model without one" in told, told
    assert "agrees on 1.0000 of the same samples" in told
    assert re.search(r"takes [\d.]+ ms: the cascade is 0\.\d+ times as fast as that \(", told)
    assert re.search(r"use --(keep-macs|speedup) [\d.]+ without --agreement$", told)


def test_a_cascade_that_beats_original_and_static_models_is_written() -> None:
    """What the unusual samples need takes nearly full rank: no static model may save much."""
    told = cascade_of(*planted(8, 1.0, 0.05, 0.08), 0.05)
    assert 0.02 < told["escalated"] < 0.5 and told["static_tried"] == 10
    assert told["expected_ms"] < told["original_ms"]
    assert told["static"] is None or told["static"]["cascade_speedup_low"] > 1
