"""What each level of a file is worth, and how often a cascade runs its full model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper

from lowrank_onnx.building import Built
from lowrank_onnx.cascade import COUNT, is_cascade
from lowrank_onnx.cost import Cost
from lowrank_onnx.data import Dataset
from lowrank_onnx.levels import LevelSession, level_count
from lowrank_onnx.model import Model
from lowrank_onnx.problem import Problem
from lowrank_onnx.runtime import Runtime, open_session, run
from lowrank_onnx.validation import compare, expected_timing


def level_rows(
    problem: Problem, model: Model, costs: Sequence[Cost] = (), statics: Sequence[Built] = ()
) -> list[dict[str, Any]]:
    """Run every level of a file against the original.

    Args:
        problem: The original and its data.
        model: A file with levels.
        costs: What each level costs alone, where it is known.
        statics: The same levels as models of their own, to compare the speed with.

    Returns:
        A row a level, the smallest first; empty where the file has no levels.
    """
    session = open_session(model.proto, problem.runtime, model.folder, what="the model with levels")
    rows = []
    for level in range(level_count(model.proto) or 0):
        held = LevelSession(session, level)
        accuracy = (
            None if problem.judged_on is None else compare(problem.session, held, problem.judged_on, problem.metric)
        )
        ratio, against = None, None
        if problem.feeds is not None:
            sessions = [problem.session, held]
            if statics:
                sessions.append(open_session(statics[level].proto, problem.runtime, model.folder, what="a level"))
            timing = expected_timing(sessions, [[problem.feeds.values]], [1.0], problem.seed, 3.0)
            ratio = timing.ratios[1]
            if statics:
                against = timing.latencies[2].median / timing.latencies[1].median
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
                "against_static": against,
                "metric": None if metric is None else metric.after,
                "metric_drop": None if metric is None else metric.relative_drop,
                "cosine": None if accuracy is None else accuracy.fidelity.cosine,
                "sqnr_db": None if accuracy is None else accuracy.fidelity.sqnr_db,
                "agreement": None if accuracy is None else accuracy.fidelity.agreement,
            }
        )
    return rows


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
