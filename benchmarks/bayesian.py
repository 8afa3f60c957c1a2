"""Bayesian factorizations: what they take on one large layer, and how well they choose ranks.

    python benchmarks/bayesian.py                                    time and memory on 768 x 3072
    python benchmarks/bayesian.py --keep 0.7,0.5 --metric NAME FOLDER [FOLDER ...]

A folder holds model.onnx, calibrate.npz and evaluate.npz. Every chooser gives ranks to plain SVD, on the same data and
without refitting, at equal multiply-accumulates of the linear layers: the selectors by ``weaken``, energy by its share,
the probed allocation by its budget.
"""

from __future__ import annotations

import argparse
import functools
import math
import multiprocessing
import resource
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from lowrank_onnx.budget import Selection, carry_out, meet_budget
from lowrank_onnx.building import Choice
from lowrank_onnx.cache import open_cache
from lowrank_onnx.decompositions.ard import ard
from lowrank_onnx.decompositions.bpmf import bpmf
from lowrank_onnx.decompositions.evbmf import evbmf
from lowrank_onnx.decompositions.sampling import posterior_map
from lowrank_onnx.linalg import energy_rank, finite_svd
from lowrank_onnx.passes.svd import SVD
from lowrank_onnx.probe_cache import cached_probe
from lowrank_onnx.probes import damage_of
from lowrank_onnx.problem import Problem, pose
from lowrank_onnx.proposals import Proposal, propose
from lowrank_onnx.runtime import Runtime, open_session
from lowrank_onnx.selectors import RULES
from lowrank_onnx.statistics import observe
from lowrank_onnx.validation import compare

METHODS: Mapping[str, Callable[[Any], Any]] = {
    "SVD": finite_svd,
    "evbmf": evbmf,
    "ard": ard,
    "bpmf, rank 64, 100 samples": lambda matrix: bpmf(matrix, 64, samples=100, burn_in=20),
    "bayesian:variant=gibbs, rank 64": lambda matrix: posterior_map(matrix, np.eye(768), 0.01, 64, 200),
    "bayesian:variant=gibbs, rank 256": lambda matrix: posterior_map(matrix, np.eye(768), 0.01, 256, 200),
}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--keep", default="0.7,0.5")
    parser.add_argument("--metric")
    options = parser.parse_args()
    if not options.folders:
        print("| method | seconds | peak memory MB |\n|---|---|---|")
        for name in METHODS:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                seconds, peak = pool.apply(_timed, (name,))
            print(f"| {name} | {seconds:.1f} | {peak:.0f} |", flush=True)
        return
    print("| model | keep | evbmf | ard | energy | probed |\n|---|---|---|---|---|---|")
    for folder in options.folders:
        problem = pose(
            folder / "model.onnx", Runtime(threads=1), folder / "calibrate.npz", folder / "evaluate.npz",
            options.metric, augment=False,
        )  # fmt: skip
        for keep in map(float, options.keep.split(",")):
            cells = [_told(problem, choose(problem, _offered(problem), keep)) for choose in CHOOSERS]
            print(f"| {folder.name} | {keep:g} | " + " | ".join(cells) + " |", flush=True)


def _timed(name: str) -> tuple[float, float]:
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((768, 64)) @ rng.standard_normal((64, 3072)) + 4 * rng.standard_normal((768, 3072))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = perf_counter()
    METHODS[name](matrix)
    return perf_counter() - begin, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


@functools.cache
def _offered(problem: Problem) -> Sequence[Proposal]:
    sites = [site for site in problem.sites if site.kind == "linear"]
    assert problem.training is not None
    moments = observe(problem.model, sites, problem.training, problem.runtime)
    return propose(sites, [SVD()], moments, None)[0]


def _at(proposals: Sequence[Proposal], ranks: Sequence[int]) -> list[Choice]:
    """The ranks carried to candidates; where they cost more than the layer it stays dense."""
    choices = []
    for entry, rank in zip(proposals, ranks, strict=True):
        candidate = entry.technique.candidate(entry.site, entry.analysis, (max(rank, 1),))
        if candidate.macs is not None and entry.site.macs is not None and candidate.macs < entry.site.macs:
            choices.append(Choice(Proposal(entry.site, entry.technique, entry.analysis, (candidate,)), candidate))
    return choices


def _within(
    problem: Problem, proposals: Sequence[Proposal], keep: float, ranks: Callable[[float], Sequence[int]]
) -> Selection | None:
    """The choices of the least restraint (a number in [0, 1), more is more rank) that meet a budget."""
    total = sum(entry.site.macs or 0 for entry in proposals)

    def cost(choices: Sequence[Choice]) -> float:
        saved = sum((choice.proposal.site.macs or 0) - (choice.candidate.macs or 0) for choice in choices)
        return 1 - saved / total

    # Ranks past break-even leave layers dense: the cost first falls, then jumps. The best step below the budget counts.
    tried = [_at(proposals, ranks(step / 100)) for step in range(100)]
    found = max((choices for choices in tried if cost(choices) <= keep), key=cost, default=None)
    return None if found is None else carry_out(problem, found)


def _selector(rule: str) -> Callable[[Problem, Sequence[Proposal], float], Selection | None]:
    def choose(problem: Problem, proposals: Sequence[Proposal], keep: float) -> Selection | None:
        spectra = [entry.analysis.slices[0].sigma for entry in proposals]
        shapes = [entry.site.weight.shape[-2:] for entry in proposals]
        found = [RULES[rule](sigma, shape) for sigma, shape in zip(spectra, shapes, strict=True)]
        return _within(
            problem, proposals, keep,
            lambda weaken: [
                math.ceil(rank + weaken * (len(sigma) - rank)) for rank, sigma in zip(found, spectra, strict=True)
            ],
        )  # fmt: skip

    return choose


def _energy(problem: Problem, proposals: Sequence[Proposal], keep: float) -> Selection | None:
    def ranks(at: float) -> list[int]:
        return [energy_rank(entry.analysis.slices[0].sigma, 1 - 0.9 * (1 - at) ** 4) for entry in proposals]

    return _within(problem, proposals, keep, ranks)


def _probed(problem: Problem, proposals: Sequence[Proposal], keep: float) -> Selection:
    mine, whole = sum(entry.site.macs or 0 for entry in proposals), problem.cost.macs or 1
    curves = cached_probe(problem, proposals, None, open_cache(False), None)
    return meet_budget(problem, proposals, damage_of(proposals, curves), "keep_macs", 1 - (1 - keep) * mine / whole)


CHOOSERS = (_selector("evbmf"), _selector("ard"), _energy, _probed)


def _told(problem: Problem, selection: Selection | None) -> str:
    if selection is None:
        return "out of reach"
    assert problem.evaluate is not None
    session = open_session(selection.built.proto, problem.runtime)
    accuracy = compare(problem.session, session, problem.evaluate, problem.metric)
    fidelity = f"{accuracy.fidelity.sqnr_db:.1f} dB"
    return fidelity if accuracy.metric is None else f"{100 * accuracy.metric.relative_drop:+.2f} %, {fidelity}"


if __name__ == "__main__":
    main()
