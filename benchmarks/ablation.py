"""What each step brings: the same budgets with one step after another switched on.

    python benchmarks/ablation.py MODEL CALIBRATE EVALUATE --metric NAME --keep 0.7,0.5,0.3 \
        --of-sites --pool attention_mask --shape input_ids=1,128 --shape attention_mask=1,128

``--of-sites`` reads the budgets as shares of the layers that can change, not of the whole model.
``--pool MASK`` compares the mean of the first output over the positions of a mask (sentence embeddings)
with that of the original, by cosine.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import rich.console
import rich.table

from lowrank_onnx.base import Pass
from lowrank_onnx.batches import batches
from lowrank_onnx.budget import Selection, carry_out, meet_budget, with_factors
from lowrank_onnx.building import Choice
from lowrank_onnx.cache import open_cache
from lowrank_onnx.metrics import resolve_metric
from lowrank_onnx.passes.feedforward import Feedforward
from lowrank_onnx.passes.heads import Heads
from lowrank_onnx.passes.shared_input import SharedInput
from lowrank_onnx.passes.svd import SVD
from lowrank_onnx.probe_cache import cached_probe
from lowrank_onnx.probes import damage_of
from lowrank_onnx.problem import Problem, pose
from lowrank_onnx.proposals import Proposal, propose
from lowrank_onnx.refine import refine
from lowrank_onnx.runtime import Runtime, open_session, run
from lowrank_onnx.statistics import observe
from lowrank_onnx.validation import benchmark, compare


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("calibrate")
    parser.add_argument("evaluate")
    parser.add_argument("--metric")
    parser.add_argument("--keep", default="0.7,0.5,0.3")
    parser.add_argument("--of-sites", action="store_true")
    parser.add_argument("--pool")
    parser.add_argument("--shape", action="append", default=[])
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--steps", default="", help="names of steps to run, separated by commas; all if empty")
    options = parser.parse_args()
    runtime = Runtime(threads=options.threads)
    problem = pose(options.model, runtime, options.calibrate, options.evaluate, options.metric, augment=False)
    augmented = pose(options.model, runtime, options.calibrate, options.evaluate, options.metric)
    timed = pose(options.model, runtime, options.calibrate, options.evaluate, None, options.shape)
    assert timed.feeds is not None
    mine = sum(site.macs or 0 for site in problem.sites if site.kind == "linear")
    whole = problem.cost.macs or 1
    table = rich.table.Table("step", "keep", "MACs", "metric", "drop", "cosine", "pooled", "speed-up")
    reference = _pooled(problem, problem.session, options.pool)
    for name, decide in _steps(problem, augmented):
        if options.steps and name not in options.steps.split(","):
            continue
        for keep in map(float, options.keep.split(",")):
            share = (whole - (1 - keep) * mine) / whole if options.of_sites else keep
            selection = decide(share)
            session = open_session(selection.built.proto, runtime)
            metric = resolve_metric(options.metric) if options.metric else None
            assert problem.evaluate is not None
            accuracy = compare(problem.session, session, problem.evaluate, metric)
            ratio = benchmark([problem.session, session], timed.feeds.values, runtime, seconds=5).ratios[1]
            pooled = _pooled(problem, session, options.pool)
            cells = [
                name,
                f"{keep:g}",
                f"{(selection.cost.macs or 0) / whole:.3f}",
                "" if accuracy.metric is None else f"{accuracy.metric.after:.4f}",
                "" if accuracy.metric is None else f"{100 * accuracy.metric.relative_drop:.2f} %",
                f"{accuracy.fidelity.cosine:.4f}",
                "" if pooled is None or reference is None else f"{float((pooled * reference).sum(1).mean()):.4f}",
                f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})",
            ]
            print("| " + " | ".join(cells) + " |", flush=True)
            table.add_row(*cells)
    rich.console.Console(file=sys.stderr, width=120).print(table)


def _steps(problem: Problem, augmented: Problem) -> list[tuple[str, Callable[[float], Selection]]]:
    """The steps, each a function from the share to keep to a model."""
    kinds = ("linear", "shared_input", "feedforward", "attention")
    sites = [site for site in problem.sites if site.kind in kinds]
    cache = open_cache(True)

    @functools.cache
    def moments(of: Problem) -> Mapping[str, Any]:
        assert of.training is not None and of.calibrate is not None
        copies = len(of.training) - len(of.calibrate)
        chosen = [site for site in of.sites if site.kind in kinds]
        return observe(of.model, chosen, of.training, of.runtime, None, None, copies)

    @functools.cache
    def offered(*passes: Pass, of: Problem = problem, data: bool = True) -> list[Proposal]:
        chosen = [site for site in of.sites if site.kind in kinds]
        return propose(chosen, list(passes), moments(of) if data else {}, None)[0]

    def allocated(*passes: Pass, probed: bool = True, of: Problem = problem) -> Callable[[float], Selection]:
        def decide(share: float) -> Selection:
            proposals = offered(*passes, of=of)
            curves = cached_probe(of, proposals, None, cache, None) if probed else {}
            return meet_budget(of, proposals, damage_of(proposals, curves), "keep_macs", share)

        return decide

    def refined(of: Problem) -> Callable[[float], Selection]:
        def decide(share: float) -> Selection:
            selection = allocated(*every, of=of)(share)
            made = refine(of, selection.choices, selection.built.factors, None, None, sites)
            return with_factors(of, made.choices, made.factors, made.notes, made.kept)

        return decide

    every = (SVD(), Feedforward(), SharedInput(), Heads())
    return [
        ("uniform, weight only", lambda share: _uniform(problem, offered(SVD(), data=False), share)),
        ("uniform", lambda share: _uniform(problem, offered(SVD()), share)),
        ("local error", allocated(SVD(), probed=False)),
        ("probed", allocated(SVD())),
        ("+ feedforward", allocated(SVD(), Feedforward())),
        ("+ shared_input", allocated(SVD(), Feedforward(), SharedInput())),
        ("+ heads", allocated(*every)),
        ("+ refine", refined(problem)),
        ("+ augment", refined(augmented)),
    ]


def _uniform(problem: Problem, proposals: Sequence[Proposal], share: float) -> Selection:
    """The same share of break-even at every layer, the largest that fits."""
    whole = problem.cost.macs or 1
    for part in np.linspace(1, 0, 101):
        choices = [
            Choice(entry, entry.candidates[max(round(part * len(entry.candidates)) - 1, 0)]) for entry in proposals
        ]
        saved = sum((entry.proposal.site.macs or 0) - (entry.candidate.macs or 0) for entry in choices)
        if whole - saved <= share * whole:
            return carry_out(problem, choices)
    raise SystemExit(f"no uniform rank keeps only {share:.2f}")


def _pooled(problem: Problem, session: Any, mask: str | None) -> np.ndarray[Any, Any] | None:
    if mask is None or problem.evaluate is None:
        return None
    rows = []
    for indices in batches(len(problem.evaluate), 32):
        feeds = problem.evaluate.batch(indices)
        hidden = next(iter(run(session, feeds).values()))
        keep = feeds[mask][..., None].astype(np.float32)
        rows.append((hidden * keep).sum(1) / keep.sum(1))
    vectors = np.concatenate(rows)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


if __name__ == "__main__":
    main()
