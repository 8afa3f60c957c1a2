"""Structures for convolutions at equal multiply-accumulates: what each keeps of the model, and how fast it is.

    python benchmarks/convolutions.py --keep 0.6,0.5 --metric top1 --threads 1 FOLDER

The folder holds model.onnx, calibrate.npz and evaluate.npz. All rows get ranks from the same probes and the
same exact allocation; "plain" factors are those of the weight alone, without refitting, as AIMET's spatial SVD
and the usual Tucker-2 make them. Linear layers may take part in every row.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from lowrank_onnx.base import Pass
from lowrank_onnx.budget import Selection, meet_budget, with_factors
from lowrank_onnx.cache import Cache
from lowrank_onnx.errors import TargetError
from lowrank_onnx.passes.channel import Channel
from lowrank_onnx.passes.cp import CP
from lowrank_onnx.passes.spatial import Spatial
from lowrank_onnx.passes.svd import SVD
from lowrank_onnx.passes.tucker import Tucker
from lowrank_onnx.probe_cache import cached_probe
from lowrank_onnx.probes import damage_of
from lowrank_onnx.problem import Problem, pose
from lowrank_onnx.proposals import propose
from lowrank_onnx.refine import refine
from lowrank_onnx.run import Run, Settings
from lowrank_onnx.runtime import Runtime, open_session
from lowrank_onnx.validation import benchmark, compare

ROWS: tuple[tuple[str, tuple[Pass, ...], bool], ...] = (
    ("plain Tucker-2", (Tucker(),), False),
    ("plain spatial SVD", (Spatial(),), False),
    ("Tucker-2", (Tucker(),), True),
    ("channel", (Channel(),), True),
    ("spatial", (Spatial(),), True),
    ("CP", (CP(),), True),
    ("all", (Spatial(), Channel(), Tucker()), True),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--keep", default="0.6")
    parser.add_argument("--metric")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--rows", default="", help="names of rows, separated by commas; all if empty")
    options = parser.parse_args()
    calibrate, evaluate = (options.folder / name for name in ("calibrate.npz", "evaluate.npz"))
    runtime = Runtime(threads=options.threads)
    problem = pose(options.folder / "model.onnx", runtime, calibrate, evaluate, options.metric)
    assert problem.feeds is not None
    moments = Run(problem, Settings((*ROWS[-1][1], SVD()))).observe()
    print("| structure | keep | MACs | metric | agreement | relative error dB | speed-up | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for name, passes, ours in ROWS:
        if options.rows and name not in options.rows.split(","):
            continue
        for cells in _row(problem, (*passes, SVD()), moments, ours, [float(part) for part in options.keep.split(",")]):
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def _row(
    problem: Problem, passes: Sequence[Pass], moments: Mapping[str, Any], ours: bool, keeps: Sequence[float]
) -> list[list[str]]:
    """One line per budget."""
    start = perf_counter()
    proposals, _ = propose(problem.sites, passes, moments if ours else {}, None)
    damage = damage_of(proposals, cached_probe(problem, proposals, None, Cache(None), None))
    common = perf_counter() - start
    lines = []
    for keep in keeps:
        start = perf_counter()
        try:
            selection = meet_budget(problem, proposals, damage, "keep_macs", keep)
        except TargetError:
            lines.append([f"{keep:g}", "out of reach", *[""] * 5])
            continue
        if ours:
            made = refine(problem, selection.choices, selection.built.factors, None, None, problem.sites)
            selection = with_factors(problem, made.choices, made.factors, made.notes, made.kept)
        lines.append(_cells(problem, selection, keep, common + perf_counter() - start))
    return lines


def _cells(problem: Problem, selection: Selection, keep: float, seconds: float) -> list[str]:
    session = open_session(selection.built.proto, problem.runtime)
    assert problem.evaluate is not None and problem.feeds is not None
    accuracy = compare(problem.session, session, problem.evaluate, problem.metric)
    ratio = benchmark([problem.session, session], problem.feeds.values, problem.runtime, seconds=5).ratios[1]
    metric, fidelity = accuracy.metric, accuracy.fidelity
    return [
        f"{keep:g}",
        f"{(selection.cost.macs or 0) / (problem.cost.macs or 1):.3f}",
        "" if metric is None else f"{metric.before:.4g} → {metric.after:.4g}",
        "" if fidelity.agreement is None else f"{100 * fidelity.agreement:.1f} %",
        "" if fidelity.sqnr_db is None else f"{-fidelity.sqnr_db:.1f}",
        f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})",
        f"{seconds:.0f}",
    ]


if __name__ == "__main__":
    main()
