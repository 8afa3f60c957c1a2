"""The fastest static model that agrees as often as a cascade has to: what a cascade must beat to be worth its file.

A static model is judged as a cascade is, by the same rule on the same samples, only that none goes on: the samples
it was fitted to and those it was not have to show so few other answers. Along every frontier, the allocations of
growing savings, the largest saving that still agrees is found by bisection. Fewer multiply-accumulates are not
always less time: all that agree on the way are timed side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowrank_onnx.budget import Selection
from lowrank_onnx.cascade import agrees, disagreement
from lowrank_onnx.data import Dataset
from lowrank_onnx.linalg import Array
from lowrank_onnx.problem import Problem
from lowrank_onnx.runtime import open_session
from lowrank_onnx.validation import Collector, Outputs, expected_timing

Frontier = Callable[[float], Selection | None]
"""Makes the finished model at a share of the largest saving, in (0, 1); None where there is none."""

_STEPS = 5  # of each bisection: to 1/32 of the largest saving
_TIMED = 64  # samples


@dataclass(frozen=True, eq=False)
class Exam:
    """Samples on which models are held against the original.

    Attributes:
        problem: Its calibration samples are those the models are fitted to.
        held: Samples they are not fitted to.
        names: Outputs that are class scores.
        agreement: The wish, in (0, 1).
        seen, reference: What the original answers to the one and the other.
    """

    problem: Problem
    held: Dataset
    names: tuple[str, ...]
    agreement: float
    seen: Mapping[str, Array]
    reference: Mapping[str, Array]

    def evaluated(self, session: Any) -> float | None:
        """Agreement with the original on the evaluation data; None without any."""
        data = self.problem.evaluate
        if data is None:
            return None
        exact, found = answers(self.problem.session, data), answers(session, data)
        return 1 - float(disagreement(exact, found, self.names).mean())


@dataclass(frozen=True, eq=False)
class Static:
    """A model that agrees as often as asked, with nothing that goes on.

    Attributes:
        made_by: The option that names it, or the unit of the frontier it is of, ``macs`` or ``latency``.
        selection: Its choices, carried out.
        session: It, opened.
        agreement: On the held-out samples.
        evaluated: On the evaluation data; None without any.
    """

    made_by: str
    selection: Selection
    session: Any
    agreement: float
    evaluated: float | None


def judge(exam: Exam, made_by: str, selection: Selection) -> Static | None:
    """The model, where it agrees as often as asked; None where it does not."""
    problem = exam.problem
    assert problem.calibrate is not None
    session = open_session(selection.built.proto, problem.runtime, problem.model.folder, what="the rewritten model")
    lost = disagreement(exam.reference, answers(session, exam.held), exam.names)
    known = disagreement(exam.seen, answers(session, problem.calibrate), exam.names)
    if not agrees((lost, known), exam.agreement):
        return None
    evaluated = exam.evaluated(session)
    if evaluated is not None and evaluated < exam.agreement:
        return None
    return Static(made_by, selection, session, 1 - float(lost.mean()), evaluated)


def find_static(
    exam: Exam, frontiers: Iterable[tuple[str, Frontier]], known: Sequence[Static]
) -> tuple[Static | None, int]:
    """The fastest model that agrees as often as asked.

    Args:
        frontiers: Each with the unit its savings are in, ``macs`` or ``latency``.
        known: Models that are known to agree; they compete.

    Returns:
        It, or None where no model agrees; and how many models were tried.
    """
    found, tried = list(known), len(known)
    for unit, frontier in frontiers:
        good, bad = 0.0, 1.0
        for _ in range(_STEPS):
            share = (good + bad) / 2
            selection = frontier(share)
            tried += 1
            static = None if selection is None else judge(exam, unit, selection)
            if static is None:
                bad = share
            else:
                found.append(static)
                good = share
    if len(found) < 2:
        return (found[0] if found else None), tried
    problem = exam.problem
    sessions = [problem.session, *(static.session for static in found)]
    timing = expected_timing(sessions, [feeds_of(exam.held, range(len(exam.held)))], [1.0], problem.seed)
    quickest = min(range(len(found)), key=lambda place: timing.latencies[place + 1].quiet)
    return found[quickest], tried


def advice(static: Static, problem: Problem, speedup: float) -> str:
    """The option that asks for such a model.

    Args:
        speedup: How many times as fast as the original it was measured.
    """
    if static.made_by == "latency":
        return f"--speedup {max(speedup, 1.01):.2f}"
    if static.made_by == "macs":
        assert problem.cost.macs and static.selection.cost.macs is not None, "they are what the frontier saves"
        return f"--keep-macs {math.ceil(1000 * static.selection.cost.macs / problem.cost.macs) / 1000:g}"
    return static.made_by


def answers(session: Any, data: Dataset) -> dict[str, Array]:
    """Outputs of all samples, joined on axis 0."""
    runs = Outputs(session, data)
    kept = Collector(len(data))
    for outputs in runs:
        kept.add(outputs, runs.size)
    return kept.take()


def feeds_of(data: Dataset, places: Iterable[int]) -> list[dict[str, Array]]:
    """Inputs of the first of some samples, for timing."""
    return [data.feeds(int(place)) for place, _ in zip(places, range(_TIMED), strict=False)]
