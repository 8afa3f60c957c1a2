"""What predicted deviations are worth against the real ones, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.stats

from lowrank_onnx.budget import Selection
from lowrank_onnx.data import Dataset
from lowrank_onnx.linalg import Array
from lowrank_onnx.problem import Problem
from lowrank_onnx.runtime import open_session, run
from lowrank_onnx.statistics import padding_mask
from lowrank_onnx.stddev import SUFFIX, Spread
from lowrank_onnx.validation import benchmark

_JUDGED = 500  # samples, of the data the figures are for


def judge(original: Any, session: Any, data: Dataset, name: str, mask: str | None) -> dict[str, float]:
    """How well the predicted deviation of one output tells the real one.

    Returns:
        ``rank_correlation`` over samples, of their root mean squares; ``rank_correlation_elements``;
        ``within_two``, the share of elements within two predicted deviations; ``deviation`` and ``predicted``, root
        mean squares; ``samples``.
    """
    real, told, inside = [], [], 0
    elements: list[tuple[Array, Array]] = []
    for place in np.unique(np.linspace(0, len(data) - 1, _JUDGED).round().astype(int)).tolist():
        feeds = data.feeds(place)
        got = run(session, feeds, [name, f"{name}{SUFFIX}"])
        apart = np.abs(run(original, feeds, [name])[name].astype(np.float64) - got[name])
        stddev = got[f"{name}{SUFFIX}"].astype(np.float64)
        keep = padding_mask(feeds, mask)
        if keep is not None and apart.shape[:2] == keep.shape:
            apart, stddev = apart[keep], stddev[keep]
        real.append(np.sqrt(np.mean(apart**2)))
        told.append(np.sqrt(np.mean(stddev**2)))
        elements.append((apart.ravel(), stddev.ravel()))
        inside += int(np.sum(apart <= 2 * stddev))
    apart, stddev = (np.concatenate(part) for part in zip(*elements, strict=True))
    chosen = np.random.default_rng(0).permutation(len(apart))[:200_000]
    return {
        "rank_correlation": _correlation(told, real),
        "rank_correlation_elements": _correlation(stddev[chosen], apart[chosen]),
        "within_two": inside / len(apart),
        "deviation": float(np.sqrt(np.mean(apart**2))),
        "predicted": float(np.sqrt(np.mean(stddev**2))),
        "samples": len(real),
    }


def _correlation(a: Any, b: Any) -> float:
    """Spearman's; 0 where one of them is all the same."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(scipy.stats.spearmanr(a, b)[0])


def stddev_report(
    problem: Problem, plain: Selection, whole: Selection, spreads: Sequence[Spread], held: Dataset, mask: str | None
) -> dict[str, Any]:
    """What the predicted deviations are worth, and what they cost: the section ``uncertainty`` of the report.

    Args:
        plain, whole: The compressed model without them and with them.
    """
    folder = problem.model.folder
    bare, session = (
        open_session(entry.built.proto, problem.runtime, folder, what="the rewritten model") for entry in (plain, whole)
    )
    factor = None
    if problem.feeds is not None:
        timing = benchmark([bare, session], problem.feeds.values, problem.runtime, problem.seed, 3.0)
        factor = timing.latencies[1].median / timing.latencies[0].median
    rows = []
    for spread in spreads:
        parts = {"held_out": held} | ({} if problem.evaluate is None else {"evaluate": problem.evaluate})
        figures = {key: judge(problem.session, session, data, spread.output, mask) for key, data in parts.items()}
        watched = [entry.tap.name for entry in spread.reaches]
        rows.append({"output": spread.output, "stddev": f"{spread.output}{SUFFIX}", "watched": watched, **figures})
    return {
        "outputs": rows,
        "latency_factor": factor,
        "parameters": whole.cost.parameters - plain.cost.parameters,
    }
