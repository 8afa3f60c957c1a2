"""What each level of a file is worth, and how often a cascade runs its full model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper

from lowrank_onnx.cascade import COUNT, is_cascade
from lowrank_onnx.cost import Cost
from lowrank_onnx.data import Dataset
from lowrank_onnx.model import Model
from lowrank_onnx.problem import Problem
from lowrank_onnx.runtime import Runtime, open_session, run
from lowrank_onnx.validation import compare, expected_timing

Openers = Sequence[Callable[[], Any]]
"""For every level, the smallest first, what opens a session of it: not all need memory at once."""

STATIC = "static"
"""The form every level has as a model of its own."""


def level_rows(problem: Problem, forms: Mapping[str, Openers], costs: Sequence[Cost] = ()) -> list[dict[str, Any]]:
    """Run every level against the original.

    Args:
        problem: The original and its data.
        forms: What opens each level, the smallest first, by what the report calls the form; the first form is
            judged, the others are timed beside it, those of ``STATIC`` to compare it with.
        costs: What each level costs alone, where it is known.

    Returns:
        A row a level, the smallest first; empty where the file has no levels.
    """
    rows = []
    for level in range(len(next(iter(forms.values())))):
        sessions = {form: openers[level]() for form, openers in forms.items()}
        held = next(iter(sessions.values()))
        accuracy = (
            None if problem.judged_on is None else compare(problem.session, held, problem.judged_on, problem.metric)
        )
        ratio = None
        medians: dict[str, float] = {}
        speedups: dict[str, float] = {}
        if problem.feeds is not None:
            timed = [problem.session, *sessions.values()]
            timing = expected_timing(timed, [[problem.feeds.values]], [1.0], problem.seed, 3.0)
            ratio = timing.ratios[1]
            names = ("original", *sessions)
            medians = {name: latency.median for name, latency in zip(names, timing.latencies, strict=True)}
            speedups = {name: entry.value for name, entry in zip(names, timing.ratios, strict=True)}
        macs = costs[level].macs if costs else None
        metric = None if accuracy is None else accuracy.metric
        rows.append(
            {
                "level": level,
                "macs_ratio": None if macs is None or not problem.cost.macs else macs / problem.cost.macs,
                "size_bytes_alone": costs[level].size_bytes if costs else None,
                "speedup": None if ratio is None else ratio.value,
                "speedup_low": None if ratio is None else ratio.low,
                "speedup_high": None if ratio is None else ratio.high,
                "latency_ms": medians,
                "speedups": speedups,
                "against_static": against_static(speedups, next(iter(sessions))),
                "metric": None if metric is None else metric.after,
                "metric_drop": None if metric is None else metric.relative_drop,
                "cosine": None if accuracy is None else accuracy.fidelity.cosine,
                "sqnr_db": None if accuracy is None else accuracy.fidelity.sqnr_db,
                "agreement": None if accuracy is None else accuracy.fidelity.agreement,
            }
        )
    return rows


def against_static(speedups: Mapping[str, float], form: str) -> float | None:
    """Speed of a form against the same level as a model of its own; None where that was not timed."""
    return speedups[form] / speedups[STATIC] if STATIC in speedups else None


def share_escalated(model: Model, data: Dataset, runtime: Runtime) -> float | None:
    """Share of the samples, one at a time, for which a cascade runs its full model; None for other models."""
    if not is_cascade(model.proto):
        return None
    probe = ModelProto()
    probe.CopyFrom(model.proto)
    probe.graph.output.append(helper.make_tensor_value_info(COUNT, TensorProto.INT64, []))
    session = open_session(probe, runtime, model.folder)
    counts = [run(session, data.feeds(place), [COUNT])[COUNT] > 0 for place in range(len(data))]
    return float(np.mean(counts))
