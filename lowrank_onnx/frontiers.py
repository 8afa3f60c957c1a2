"""The points of a sweep: what each model is worth, beside the original and the plain int8 model."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowrank_onnx.cost import Cost, model_cost
from lowrank_onnx.errors import LowRankError
from lowrank_onnx.model import Model, saved_size
from lowrank_onnx.problem import Problem
from lowrank_onnx.quantized import dynamic_int8
from lowrank_onnx.report import write_frontier_html, write_json
from lowrank_onnx.report.files import write_text
from lowrank_onnx.reporting import Measured
from lowrank_onnx.runtime import open_session
from lowrank_onnx.shapes import measure_shapes
from lowrank_onnx.validation import benchmark, compare

FRONTIER_FILES = ("frontier.csv", "frontier.json", "frontier.html")


def frontier_point(
    problem: Problem, cost: Cost, measured: Measured, label: str, keep: float, file: str | None
) -> dict[str, Any]:
    """One row of the frontier."""
    ratio = None if measured.timing is None else measured.timing.ratios[1]
    accuracy = measured.accuracy
    before = problem.cost
    macs = None if not before.macs or cost.macs is None else cost.macs / before.macs
    return {
        "label": label,
        "keep": keep,
        "macs_ratio": macs,
        "parameters_ratio": cost.parameters / max(before.parameters, 1),
        "size_ratio": cost.size_bytes / max(before.size_bytes, 1),
        "speedup": None if ratio is None else ratio.value,
        "speedup_low": None if ratio is None else ratio.low,
        "speedup_high": None if ratio is None else ratio.high,
        "metric": None if accuracy is None or accuracy.metric is None else accuracy.metric.after,
        "metric_drop": None if accuracy is None or accuracy.metric is None else accuracy.metric.relative_drop,
        "cosine": None if accuracy is None else accuracy.fidelity.cosine,
        "sqnr_db": None if accuracy is None else accuracy.fidelity.sqnr_db,
        "agreement": None if accuracy is None else accuracy.fidelity.agreement,
        "file": file,
    }


def reference_points(problem: Problem) -> tuple[list[dict[str, Any]], list[str]]:
    """The original, and the int8 model where onnxruntime can make one; with the reason where it cannot."""
    original = {
        "label": "original",
        "keep": 1.0,
        "macs_ratio": 1.0 if problem.cost.macs else None,
        "parameters_ratio": 1.0,
        "size_ratio": 1.0,
        "speedup": 1.0,
        "speedup_low": 1.0,
        "speedup_high": 1.0,
        "metric": None,
        "metric_drop": None if problem.metric is None else 0.0,
        "cosine": 1.0,
        "sqnr_db": None,
        "agreement": None,
        "file": None,
    }
    try:
        proto = dynamic_int8(problem.model)
        session = open_session(proto, problem.runtime, what="the int8 model")
        data = problem.judged_on
        accuracy = None if data is None else compare(problem.session, session, data, problem.metric)
        timing = None
        if problem.feeds is not None:
            timing = benchmark([problem.session, session], problem.feeds.values, problem.runtime, problem.seed)
        size = saved_size(proto)
        shapes = (
            {}
            if problem.feeds is None
            else measure_shapes(Model(proto, None, "", "", size), problem.feeds.values, problem.runtime)
        )
        cost = model_cost(Model(proto, None, "", "", size), shapes, size)
        # int8 weights are no floating-point elements, but they are parameters all the same.
        counted = Cost(problem.cost.parameters, size, problem.cost.macs if cost.macs is not None else None)
        point = frontier_point(problem, counted, Measured(accuracy, timing, "evaluate"), "int8", 1.0, None)
    except LowRankError as error:
        return [original], [f"no int8 model to compare with: {error}"]
    return [original, point], []


def write_frontier(frontier: Mapping[str, Any], folder: Path) -> None:
    """Write the table as CSV and JSON, and the page with its plot."""
    rows = [*frontier["reference"], *frontier["points"]]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_text(text.getvalue(), folder / "frontier.csv")
    write_json(frontier, folder / "frontier.json")
    write_frontier_html(frontier, folder / "frontier.html")
