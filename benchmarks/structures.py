"""Whether a block structure beats plain low rank anywhere, over all linear layers of some models.

    python benchmarks/structures.py MODEL [MODEL ...]

Calibration data are looked for beside each model (calibrate.npz). Two tables for each model:

* the least error each structure reaches at half of the layer's parameters, on the data where there are any;
* each form at shares of the layer's work, with its time as a share of the dense layer's (one thread) and its error,
  beside the error of plain low rank at the rank that takes as long, and the time of plain low rank at the same error.
  Shown is the form with the smallest ratio of the two errors among those quicker than the dense layer.

A form is told to win where, in each of three measurements side by side, it takes 3 % less time than the dense layer and
than plain low rank of the same error (upper end of the 95 % interval).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_onnx.base import Candidate, Site
from lowrank_onnx.cache import open_cache
from lowrank_onnx.latency import LatencyCurve, measure_latencies, race
from lowrank_onnx.passes.blast import BlastPass
from lowrank_onnx.passes.block_linear import BlockLinear
from lowrank_onnx.passes.hierarchical import Hierarchical
from lowrank_onnx.passes.kronecker import Kronecker
from lowrank_onnx.passes.monarch import Monarch
from lowrank_onnx.passes.structured import StructuredPass
from lowrank_onnx.passes.svd import SVD
from lowrank_onnx.problem import Problem, pose
from lowrank_onnx.proposals import Proposal
from lowrank_onnx.runtime import Runtime
from lowrank_onnx.statistics import observe
from lowrank_onnx.structures import SHARE, STRUCTURES, WIDEST, errors_at
from lowrank_onnx.threads import few_threads

TIMED: tuple[StructuredPass, ...] = (
    *(BlockLinear(form=form, order=order)
      for form in ("rows", "columns", "grid", "diagonal") for order in ("no", "yes")),
    Monarch(), Kronecker(), Hierarchical(), BlastPass(),
)  # fmt: skip
SLACK = 1.03  # of time, that plain low rank has to take beyond the form's
STEPS = (1, 8, 16, 32)  # a rank that fills the tiles of a kernel may be quicker than a smaller one
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
    parser.add_argument("--shares", default="0.25,0.5,0.75", help="of the work of a layer, for the forms timed")
    options = parser.parse_args()
    for path in options.models:
        _table(path, [float(share) for share in options.shares.split(",")])


def _table(path: Path, shares: list[float]) -> None:
    data = path.parent / "calibrate.npz"
    problem = pose(path, Runtime("cpu", 1), calibrate=data if data.exists() else None)
    sites = [
        site
        for site in problem.sites
        if site.kind == "linear" and site.weight.ndim == 2 and max(site.weight.shape) <= WIDEST
    ]
    seen = {} if problem.calibrate is None else observe(problem.model, sites, problem.calibrate, problem.runtime)
    print(f"\n## {path.parent.name}: {len(sites)} linear layers\n")
    print(
        "| layer | shape |",
        " | ".join(STRUCTURES),
        "| best form: parameters, time, error | svd: error in that time, time at that error | wins |",
    )
    print("|---" * (len(STRUCTURES) + 5) + "|")
    for site in sites:
        moments = seen.get(site.name)
        gram = np.eye(len(site.weight)) if moments is None else moments[site.uses[0].input].gram
        errors = errors_at(site.weight, gram, int(SHARE * site.weight.size))
        told = " | ".join("-" if error is None else f"{error:.3f}" for error in errors.values())
        print(f"| {site.name} | {site.weight.shape[0]} x {site.weight.shape[1]} | {told} |", end=" ", flush=True)
        print(_verdict(problem, site, moments, shares), flush=True)


def _verdict(problem: Problem, site: Site, moments: Mapping[str, Any] | None, shares: list[float]) -> str:
    refusal = SVD().refuse(site)
    if refusal is not None:
        return f"{refusal} | - | - |"
    forms, plain = list(_forms(site, moments, shares)), _plain(site, moments)
    if not forms:
        return "too small for any | - | - |"
    duels = _duels(problem, plain, forms)
    if duels is None:
        return "cannot be timed alone | - | - |"
    if not duels:
        return "all slower than dense | - | - |"
    best = min(duels, key=lambda place: duels[place].ratio)
    shown = duels[best]
    races = [_at_equal_error(problem, plain, forms[best]) for _ in range(REPEATS)]
    own, other = (float(np.median([entry[place] for entry in races])) for place in range(2))
    wins = all(entry[2] for entry in races)
    return (
        f"{shown.form}: {shown.parameters:.2f}, {own:.2f}, {shown.error:.3f} | "
        f"{shown.plain:.3f}, {other:.2f} | {'yes' if wins else 'no'} |"
    )


def _forms(site: Site, moments: Mapping[str, Any] | None, shares: list[float]) -> Iterator[Proposal]:
    """Every form at every share of the work, a proposal each."""
    for technique in TIMED:
        if technique.refuse(site) is not None:
            continue
        analysis = technique.analyse(site, moments)
        budgets = [int(share * site.weight.size) for share in shares]
        for rank in sorted({technique.rank_within(site, analysis.form, budget) for budget in budgets}):
            yield Proposal(site, technique, analysis, (technique.candidate(site, analysis, (rank,)),))


def _plain(site: Site, moments: Mapping[str, Any] | None) -> Proposal:
    """Plain low rank at every rank below break-even, not only at those the technique would offer."""
    technique = SVD()
    analysis = technique.analyse(site, moments)
    most = max((site.weight.size - 1) // sum(site.weight.shape), 1)
    every = range(1, most + 1)
    return Proposal(site, technique, analysis, tuple(technique.candidate(site, analysis, (rank,)) for rank in every))


def _at_equal_error(problem: Problem, plain: Proposal, form: Proposal) -> tuple[float, float, bool]:
    """Time of a form and the least of plain low rank without a larger error, side by side, and whether the form wins.

    Times are shares of the dense layer's, which is a rival as well.
    """
    (candidate,) = form.candidates
    least = next((entry.ranks[0] for entry in plain.candidates if entry.error <= candidate.error), None)
    ranks = set() if least is None else {-(-least // step) * step for step in STEPS}
    rivals = [
        Proposal(plain.site, plain.technique, plain.analysis, (entry,))
        for entry in plain.candidates
        if entry.ranks[0] in ranks
    ]
    timing = race(problem, [form, *rivals])
    assert timing is not None
    own, *others, dense = (latency.quiet for latency in timing.latencies)
    wins = all(SLACK * ratio.high < 1 for ratio in timing.ratios[1:])
    return own / dense, min([*others, dense]) / dense, wins


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
        within = [entry.error for entry in plain.candidates if _share(line, entry) <= time]
        form = f"{candidate.technique} {candidate.options.get('form', '')}"
        size = candidate.parameters / proposal.site.weight.size
        duels[place] = Duel(form, size, time, candidate.error, min(within, default=1.0))
    return duels


def _share(curve: LatencyCurve, candidate: Candidate) -> float:
    return curve.at(candidate) / curve.dense_us


if __name__ == "__main__":
    main()
