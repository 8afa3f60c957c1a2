"""Ranks that a GPU has to offer: those that no higher rank beats in time.

A product is cut into tiles, and as many run at once as there are multiprocessors. A rank with a few tiles more
than fill the GPU costs another round of all of them: a much higher one would take no longer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from lowrank_onnx.base import Candidate
from lowrank_onnx.cache import Cache
from lowrank_onnx.grids import GRID_KINDS
from lowrank_onnx.latency import TIMED_RANKS_GPU, measure_latencies
from lowrank_onnx.problem import Problem
from lowrank_onnx.proposals import Proposal
from lowrank_onnx.statistics import Progress

_FLAT = 1.3  # a layer whose slowest rank takes so little longer than its quickest waits for launches, not for work
_NOISE = 1.01


def undominated(
    problem: Problem, proposals: Sequence[Proposal], cache: Cache, progress: Progress | None
) -> list[Proposal]:
    """Thin out the ranks of every layer that a GPU computes, and leave out those that a higher one beats.

    Nothing changes on a CPU, and where the shapes of a run are not known. The lowest rank always stays: a budget
    may need it.
    """
    if not problem.runtime.on_gpu or problem.feeds is None:
        return list(proposals)
    thinned = [
        dataclasses.replace(entry, candidates=_thinned(entry.candidates)) if entry.site.kind in GRID_KINDS else entry
        for entry in proposals
    ]
    places = [place for place, entry in enumerate(thinned) if entry.site.kind in GRID_KINDS]
    curves = measure_latencies(problem, [thinned[place] for place in places], cache, progress)
    for number, curve in curves.items():
        entry = thinned[places[number]]
        times = {id(candidate): curve.at(candidate) for candidate in entry.candidates}
        thinned[places[number]] = dataclasses.replace(entry, candidates=unbeaten(entry.candidates, times))
    return thinned


def unbeaten(candidates: Sequence[Candidate], times: Mapping[int, float]) -> tuple[Candidate, ...]:
    """Return the lowest candidate, and those that take less time than every one of more work.

    Args:
        candidates: Rising in work.
        times: By ``id`` of the candidate.
    """
    taken = [times[id(entry)] for entry in candidates]
    if max(taken) < _FLAT * min(taken):
        return tuple(candidates)
    return tuple(
        entry
        for place, entry in enumerate(candidates)
        if place == 0 or all(_NOISE * taken[place] < later for later in taken[place + 1 :])
    )


def _thinned(candidates: tuple[Candidate, ...]) -> tuple[Candidate, ...]:
    """Every second rank, and again, until all can be timed; the even multiples of a grid stay."""
    while len(candidates) > TIMED_RANKS_GPU:
        candidates = candidates[1::2]
    return candidates
