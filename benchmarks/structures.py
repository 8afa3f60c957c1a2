"""Error of every structure at half of the parameters, over all linear layers of some models.

    python benchmarks/structures.py MODEL [MODEL ...]

Calibration data are looked for beside each model (calibrate.npz). Two lines a layer, weight-only and data-aware.
With --latency also the time of the layer dense, as plain SVD and as each structure at half of its work, side by
side on one thread.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from lowrank_onnx.base import Pass
from lowrank_onnx.cache import open_cache
from lowrank_onnx.latency import measure_latencies
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

TIMED: tuple[Pass, ...] = (
    SVD(), Block(form="rows"), Block(form="columns"), Block(form="diagonal"), Monarch(), Kronecker(),
    Hierarchical(), BlastPass(),
)  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--latency", action="store_true")
    options = parser.parse_args()
    print("layer | shape | by |", " | ".join(STRUCTURES))
    for path in options.models:
        data = path.parent / "calibrate.npz"
        problem = pose(path, Runtime("cpu", 1), calibrate=data if data.exists() else None)
        sites = [
            site
            for site in problem.sites
            if site.kind == "linear" and site.weight.ndim == 2
            if min(site.weight.shape) >= 16 and max(site.weight.shape) <= WIDEST
        ]  # fmt: skip
        seen = {} if problem.calibrate is None else observe(problem.model, sites, problem.calibrate, problem.runtime)
        for site in sites:
            grams = {"weight": np.eye(len(site.weight))}
            if site.name in seen:
                grams["data"] = seen[site.name][site.uses[0].input].gram
            for by, gram in grams.items():
                errors = errors_at(site.weight, gram, int(SHARE * site.weight.size))
                told = " | ".join("-" if error is None else f"{error:.3f}" for error in errors.values())
                print(f"{path.parent.name} {site.name} | {site.weight.shape} | {by} | {told}", flush=True)
            if options.latency:
                _time(problem, site.name, seen.get(site.name))


def _time(problem: Problem, name: str, moments: object) -> None:
    site = problem.by_name[name]
    proposals = []
    for technique in TIMED:
        if technique.refuse(site) is None:
            analysis = technique.analyse(site, moments)  # type: ignore[arg-type]
            every = [technique.candidate(site, analysis, ranks) for ranks in technique.ranks(site, analysis)]
            half = [entry for entry in every if entry.parameters <= SHARE * site.weight.size]
            if half:
                proposals.append(Proposal(site, technique, analysis, (half[-1],)))
    for place, curve in measure_latencies(problem, proposals, open_cache(False), None).items():
        (candidate,) = proposals[place].candidates
        form = candidate.options.get("form", "")
        print(
            f"    {candidate.technique} {form}: error {candidate.error:.3f}, "
            f"{candidate.parameters / site.weight.size:.2f} of the parameters, "
            f"{curve.times_us[0]:.0f} us of {curve.dense_us:.0f} us dense",
            flush=True,
        )


if __name__ == "__main__":
    main()
