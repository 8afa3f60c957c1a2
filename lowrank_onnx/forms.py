"""Forms of recurrent cells: those that measured slower than what they replace, or than a rival, are dropped."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from lowrank_onnx.base import Candidate
from lowrank_onnx.cache import Cache
from lowrank_onnx.latency import measure_latencies
from lowrank_onnx.problem import Problem
from lowrank_onnx.proposals import Proposal
from lowrank_onnx.statistics import Progress


def quickest(
    problem: Problem, proposals: Sequence[Proposal], cache: Cache, progress: Progress | None, equal: bool
) -> list[Proposal]:
    """Drop forms of recurrent cells that a measurement speaks against.

    A cell spelled out in plain operators stays only where it was faster than the fused operator. Where the time
    cannot be measured, the form that keeps the operators of the model stays.

    Args:
        problem: The problem.
        proposals: What is offered, for all kinds of sites.
        cache: Of latencies.
        progress: Told of every timing.
        equal: Whether forms of the same factors count the same, as they do for parameters and bytes; then the
            quickest of them stays.
    """
    places = [place for place, entry in enumerate(proposals) if entry.site.kind == "recurrent"]
    if not places:
        return list(proposals)
    timed = [proposals[place] for place in places]
    curves = {} if problem.feeds is None else measure_latencies(problem, timed, cache, progress)
    microseconds = {
        id(candidate): curves[number].at(candidate)
        for number, entry in enumerate(timed)
        if number in curves
        for candidate in entry.candidates
    }
    dropped: set[int] = set()
    best: dict[tuple[str, tuple[int, ...]], Candidate] = {}
    for number, entry in enumerate(timed):
        for candidate in entry.candidates:
            took = microseconds.get(id(candidate))
            if entry.technique.spells_out and took is not None and took >= curves[number].dense_us:
                dropped.add(id(candidate))
                continue
            key = (candidate.site, candidate.ranks)
            if equal and key in best:
                slower = best[key] if _better(candidate, best[key], microseconds) else candidate
                dropped.add(id(slower))
                if slower is candidate:
                    continue
            best[key] = candidate
    left = [
        dataclasses.replace(entry, candidates=tuple(c for c in entry.candidates if id(c) not in dropped))
        for entry in proposals
    ]
    return [entry for entry in left if entry.candidates]


def _better(candidate: Candidate, other: Candidate, microseconds: dict[int, float]) -> bool:
    times = microseconds.get(id(candidate)), microseconds.get(id(other))
    if times[0] is None or times[1] is None:
        return candidate.nodes < other.nodes
    return times[0] < times[1]
