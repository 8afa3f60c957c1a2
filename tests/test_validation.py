"""Accuracy and speed side by side."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from lowrank_onnx.data import load_data
from lowrank_onnx.errors import MetricError, ModelError
from lowrank_onnx.linalg import Array
from lowrank_onnx.metrics import Metric
from lowrank_onnx.runtime import Runtime, input_specs, open_session
from lowrank_onnx.validation import Collector, _latency, _ratios, benchmark, compare, expected_timing, time_kinds
from tests.builders import build

RUNTIME = Runtime(threads=1)


def scaled(factor: float, width: int = 4, repeats: int = 1) -> onnx.ModelProto:
    weight = factor * np.eye(width, dtype=np.float32)
    nodes = [
        onnx.helper.make_node("MatMul", [f"x{place}" if place else "x", "w"], [f"x{place + 1}"])
        for place in range(repeats)
    ]
    nodes.append(onnx.helper.make_node("Identity", [f"x{repeats}"], ["y"]))
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [value("x", 1, ["n", width])],
        [value("y", 1, ["n", width])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)


def test_the_worst_figure_and_the_metric_of_both_models() -> None:
    reference, candidate = (open_session(scaled(factor), RUNTIME) for factor in (1.0, 0.9))
    x = np.random.default_rng(0).standard_normal((70, 4)).astype(np.float32)
    data = load_data({"x": x, "target": x}, input_specs(reference))

    def spoils_its_outputs(outputs: dict[str, Array], arrays: object) -> float:
        value = float(np.abs(outputs["y"]).mean())
        outputs["y"][:] = 0
        return value

    found = compare(reference, candidate, data, Metric("mean", spoils_its_outputs))
    assert found.metric is not None
    assert found.metric.before == pytest.approx(np.abs(x).mean(), rel=1e-5)
    assert found.metric.after == pytest.approx(0.9 * np.abs(x).mean(), rel=1e-5)
    assert found.metric.relative_drop == pytest.approx(0.1, rel=1e-4)
    assert found.fidelity.sqnr_db == pytest.approx(20.0, abs=1e-3)
    assert found.fidelity.max_abs_error == pytest.approx(0.1 * np.abs(x).max(), rel=1e-5)


def test_outputs_are_joined_in_order_whatever_the_batches() -> None:
    rows = np.arange(14.0).reshape(7, 2)
    collector = Collector(7)
    for start in range(0, 7, 3):
        collector.add({"y": rows[start : start + 3], "s": np.array(start)}, 3)
    made = collector.take()
    assert np.array_equal(made["y"], rows)
    assert made["s"].tolist() == [0, 3, 6]


def test_samples_of_several_sizes_are_refused_by_name() -> None:
    collector = Collector(2)
    collector.add({"y": np.zeros((1, 3))}, 1)
    collector.add({"y": np.zeros((1, 4))}, 1)
    with pytest.raises(MetricError, match=r"output 'y' differs in shape.*\[3\], \[4\]"):
        collector.take()


def test_models_with_other_outputs_are_not_compared() -> None:
    other = scaled(1.0)
    other.graph.node[-1].output[0] = other.graph.output[0].name = "z"
    reference, candidate = open_session(scaled(1.0), RUNTIME), open_session(other, RUNTIME)
    data = load_data({"x": np.ones((2, 4), np.float32)}, input_specs(reference))
    with pytest.raises(ModelError, match="differ in their outputs: y and z"):
        compare(reference, candidate, data)


def test_the_slower_model_is_told_and_the_interval_holds_the_point() -> None:
    sessions = [open_session(scaled(1.0, 256, repeats), RUNTIME) for repeats in (1, 8)]
    feeds = {"x": np.ones((64, 256), np.float32)}
    timing = benchmark(sessions, feeds, RUNTIME, seconds=0.5)
    assert timing.latencies[0].runs == timing.latencies[1].runs >= 15
    slow = timing.ratios[1]
    assert slow.low <= slow.value <= slow.high < 1
    assert timing.ratios[0].value == 1


def test_models_that_read_text_are_timed() -> None:
    graph = """g (string[n] s, float[n,4] x) => (string[n] t, float[n,4] y) { t = Identity(s) y = MatMul(x, w) }"""
    session = open_session(build(graph, {"w": np.eye(4, dtype=np.float32)}), RUNTIME)
    feeds = {"s": np.array(["a", "b"], dtype=object), "x": np.ones((2, 4), np.float32)}
    timing = benchmark([session, session], feeds, RUNTIME, seconds=0.1)
    assert timing.latencies[0].median > 0


@pytest.mark.parametrize("declared", ["n", "n,7", "n,4,k"])
def test_models_that_declare_other_shapes_than_they_make_are_timed(declared: str) -> None:
    """Where the shape is computed onnxruntime finds out at run time, and then refuses the buffer it was given."""
    proto = build(f"g (float[n,4] x, int64[s] shape) => (float[{declared}] y) {{ y = Reshape(x, shape) }}", {})
    session = open_session(proto, RUNTIME)
    feeds = {"x": np.ones((2, 4), np.float32), "shape": np.array([2, 4])}
    timing = benchmark([session, session], feeds, RUNTIME, seconds=0.1)
    assert timing.latencies[0].median > 0


def test_the_quiet_time_does_not_depend_on_how_often_something_else_ran() -> None:
    """Half of the runs of one model, and a few more of the other's, were disturbed; both take the same."""
    rng = np.random.default_rng(0)
    for share in (0.3, 0.5, 0.7):
        times = np.where(rng.random(40) < share, 6.5, 2.7) + 0.05 * rng.random(40)
        assert _latency(times).quiet == pytest.approx(2.7, abs=0.1)


def test_a_ratio_is_of_runs_side_by_side() -> None:
    """Other work in most of the rounds, now and then from between two runs on: medians fall on either side of it."""
    modes = np.repeat([[2.0, 2.0], [2.0, 1.0], [1.0, 1.0]], [45, 10, 45], axis=0)  # how much slower each model ran
    table = np.array([6.0, 3.0]) * modes  # milliseconds
    assert np.divide(*np.median(table, axis=0)) == 4
    (_, half) = _ratios(table, np.random.default_rng(0))
    assert (half.value, half.low, half.high) == (2, 2, 2)


class Served:
    """A session that takes so many milliseconds of its own clock, and four more behind another model."""

    now = 0.0
    last: Any = None

    def __init__(self, *costs: float) -> None:
        self.costs = costs

    def get_inputs(self) -> list[Any]:
        return []

    def get_outputs(self) -> list[Any]:
        return []

    def run(self, names: list[str], feeds: dict[str, Array]) -> None:
        cold = Served.last is not self
        Served.last = self
        Served.now += (self.costs[int(feeds["kind"])] + 4 * cold) / 1000


def test_the_expected_time_is_that_of_a_model_behind_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowrank_onnx.validation.time.perf_counter", lambda: Served.now)
    sessions = [Served(2, 2), Served(1, 3)]
    kinds = [[{"kind": np.array(0)}], [{"kind": np.array(1)}], []]
    timing = expected_timing(sessions, kinds, [0.75, 0.25, 0.0], seconds=1.0)
    assert [latency.quiet for latency in timing.latencies] == pytest.approx([2, 1.5])
    assert [timing.ratios[1].low, timing.ratios[1].value, timing.ratios[1].high] == pytest.approx([4 / 3] * 3)
    against = time_kinds(sessions, kinds, [0.75, 0.25, 0.0], seconds=1.0).against(1)
    assert [ratio.value for ratio in against.ratios] == pytest.approx([3 / 4, 1])
    assert [against.ratios[0].low, against.ratios[0].high] == pytest.approx([3 / 4] * 2)
    assert [latency.quiet for latency in against.latencies] == pytest.approx([2, 1.5])
