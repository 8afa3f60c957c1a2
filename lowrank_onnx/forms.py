"""Techniques that make the same factors and differ in how they run: at each rank the quicker one stays."""

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
    problem: Problem, proposals: Sequence[Proposal], cache: Cache, progress: Progress | None
) -> list[Proposal]:
    """Drop every candidate of a recurrent cell that another form of the same factors beats in time.

    A budget of parameters or bytes would not tell the forms apart. Where the time cannot be measured, the
    form that keeps the operators of the model stays.
    """
    forms: dict[str, list[int]] = {}
    for place, entry in enumerate(proposals):
        if entry.site.kind == "recurrent":
            forms.setdefault(entry.site.name, []).append(place)
    places = [place for group in forms.values() if len(group) > 1 for place in group]
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
    best: dict[tuple[str, tuple[int, ...]], Candidate] = {}
    for entry in timed:
        for candidate in entry.candidates:
            key = (candidate.site, candidate.ranks)
            if key not in best or _better(candidate, best[key], microseconds):
                best[key] = candidate
    kept = {id(candidate) for candidate in best.values()}
    left = [
        dataclasses.replace(
            entry, candidates=tuple(c for c in entry.candidates if place not in places or id(c) in kept)
        )
        for place, entry in enumerate(proposals)
    ]
    return [entry for entry in left if entry.candidates]


def _better(candidate: Candidate, other: Candidate, microseconds: dict[int, float]) -> bool:
    times = microseconds.get(id(candidate)), microseconds.get(id(other))
    if times[0] is None or times[1] is None:
        return candidate.nodes < other.nodes
    return times[0] < times[1]
