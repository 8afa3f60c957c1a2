"""Whether a block structure beats plain low rank anywhere, over all linear layers of some models.

    python benchmarks/structures.py MODEL [MODEL ...]

Calibration data are looked for beside each model (calibrate.npz). Two tables for each model:

* the least error each structure reaches at half of the layer's parameters, on the data where there are any;
* for each form at a quarter, a half and three quarters of the layer's work, its measured time (one thread, as a share
  of the dense layer's) and error, beside the error of plain low rank at the rank that takes as long. The form shown is
  the one with the smallest ratio of the two errors among those quicker than the dense layer.

A form is told to win where its error is smaller although plain low rank is given 3 % more time, in each of three
measurements.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_onnx.base import Candidate, Pass, Site
from lowrank_onnx.cache import open_cache
from lowrank_onnx.latency import LatencyCurve, measure_latencies
from lowrank_onnx.passes.blast import BlastPass
from lowrank_onnx.passes.block import Block
from lowrank_onnx.passes.hierarchical import Hierarchical
from lowrank_onnx.passes.kronecker import Kronecker
from lowrank_onnx.passes.monarch import Monarch
from lowrank_onnx.passes.svd import SVD
from lowrank_onnx.problem import Problem, pose
from lowrank_onnx.proposals import Proposal
from lowrank_onnx.runtime import Runtime
from lowrank_onnx.statistics import observe
from lowrank_onnx.structures import SHARE, STRUCTURES, WIDEST, errors_at
from lowrank_onnx.threads import few_threads

TIMED: tuple[Pass, ...] = (
    *(Block(form=form, order=order) for form in ("rows", "columns", "grid", "diagonal") for order in ("no", "yes")),
    Monarch(), Kronecker(), Hierarchical(), BlastPass(),
)  # fmt: skip
SHARES = (0.25, 0.5, 0.75)
SLACK = 1.03  # of time, for plain low rank
REPEATS = 3


@dataclass(frozen=True)
class Duel:
    """One form against plain low rank in the time that the form takes; times as shares of the dense layer's."""

    form: str
    parameters: float
    time: float
    error: float
    plain: float

    @property
    def ratio(self) -> float:
        """Below 1 the form is better."""
        return self.error / self.plain if self.plain > 0 else float("inf")


@few_threads
def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    for path in parser.parse_args().models:
        _table(path)


def _table(path: Path) -> None:
    data = path.parent / "calibrate.npz"
    problem = pose(path, Runtime("cpu", 1), calibrate=data if data.exists() else None)
    sites = [
        site
        for site in problem.sites
        if site.kind == "linear" and site.weight.ndim == 2 and max(site.weight.shape) <= WIDEST
    ]
    seen = {} if problem.calibrate is None else observe(problem.model, sites, problem.calibrate, problem.runtime)
    print(f"\n## {path.parent.name}: {len(sites)} linear layers\n")
    print("| layer | shape |", " | ".join(STRUCTURES), "| best form: parameters, time, error | svd in that time | wins |")
    print("|---" * (len(STRUCTURES) + 5) + "|")
    for site in sites:
        moments = seen.get(site.name)
        gram = np.eye(len(site.weight)) if moments is None else moments[site.uses[0].input].gram
        errors = errors_at(site.weight, gram, int(SHARE * site.weight.size))
        told = " | ".join("-" if error is None else f"{error:.3f}" for error in errors.values())
        print(f"| {site.name} | {site.weight.shape[0]} x {site.weight.shape[1]} | {told} |", end=" ", flush=True)
        print(_verdict(problem, site, moments), flush=True)


def _verdict(problem: Problem, site: Site, moments: Mapping[str, Any] | None) -> str:
    if SVD().refuse(site) is not None:
        return f"{SVD().refuse(site)} | - | - |"
    forms = list(_forms(site, moments))
    plain = _plain(site, moments)
    if not forms or not plain.candidates:
        return "too small for any | - | - |"
    duels = _duels(problem, plain, forms)
    if duels is None:
        return "cannot be timed alone | - | - |"
    if not duels:
        return "all slower than dense | - | - |"
    best = min(duels, key=lambda place: duels[place].ratio)
    shown = duels[best]
    again = shown.ratio < 1 and all(
        other is not None and best in other and other[best].ratio < 1
        for other in (_duels(problem, plain, forms) for _ in range(REPEATS - 1))
    )
    against = f"{shown.plain:.3f}" if shown.plain < 1 else "too slow at any rank"
    return (
        f"{shown.form}: {shown.parameters:.2f}, {shown.time:.2f}, {shown.error:.3f} | "
        f"{against} | {'yes' if again else 'no'} |"
    )


def _forms(site: Site, moments: Mapping[str, Any] | None) -> Iterator[Proposal]:
    """Every form at every share of the work, a proposal each."""
    for technique in TIMED:
        if technique.refuse(site) is not None:
            continue
        analysis = technique.analyse(site, moments)
        ranks = technique.ranks(site, analysis)
        made: dict[tuple[int, ...], Candidate] = {}
        for share in SHARES:
            place = _last_within(site, technique, analysis, made, share * site.weight.size, ranks)
            if place is not None:
                yield Proposal(site, technique, analysis, (place,))


def _last_within(
    site: Site,
    technique: Pass,
    analysis: Any,
    made: dict[tuple[int, ...], Candidate],
    budget: float,
    ranks: Any,
) -> Candidate | None:
    """The candidate of the largest rank within a budget of parameters; every rank tried is a fit, so few are."""
    low, high = -1, len(ranks) - 1
    while low < high:
        middle = (low + high + 1) // 2
        rank = ranks[middle]
        if rank not in made:
            made[rank] = technique.candidate(site, analysis, rank)
        low, high = (middle, high) if made[rank].parameters <= budget else (low, middle - 1)
    return None if low < 0 else made[ranks[low]]


def _plain(site: Site, moments: Mapping[str, Any] | None) -> Proposal:
    technique = SVD()
    analysis = technique.analyse(site, moments)
    every = technique.ranks(site, analysis)
    return Proposal(site, technique, analysis, tuple(technique.candidate(site, analysis, ranks) for ranks in every))


def _duels(problem: Problem, plain: Proposal, forms: list[Proposal]) -> dict[int, Duel] | None:
    """By place in ``forms``, those that are quicker than the dense layer; None where nothing can be timed."""
    curves = measure_latencies(problem, [plain, *forms], open_cache(False), None)
    if 0 not in curves:
        return None
    line = curves[0]
    duels = {}
    for place, proposal in enumerate(forms):
        (candidate,) = proposal.candidates
        time = _share(curves[place + 1], candidate)
        if time >= 1:
            continue
        within = [entry.error for entry in plain.candidates if _share(line, entry) <= SLACK * time]
        form = f"{candidate.technique} {candidate.options.get('form', '')}"
        size = candidate.parameters / proposal.site.weight.size
        duels[place] = Duel(form, size, time, candidate.error, min(within, default=1.0))
    return duels


def _share(curve: LatencyCurve, candidate: Candidate) -> float:
    return curve.at(candidate) / curve.dense_us


if __name__ == "__main__":
    main()
