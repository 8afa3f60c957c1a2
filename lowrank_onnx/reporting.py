"""Put what was measured into the report dictionaries; ``report/`` shows and writes them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil

from lowrank_onnx.base import Candidate, Site
from lowrank_onnx.budget import Selection
from lowrank_onnx.cost import Cost
from lowrank_onnx.decompositions.bpmf import LEAST_EFFECTIVE, MOST_R_HAT
from lowrank_onnx.errors import ModelError
from lowrank_onnx.labels import strongest_rows
from lowrank_onnx.linalg import Array, effective_rank, energy_rank
from lowrank_onnx.memory import session_rss_bytes
from lowrank_onnx.metrics import Fidelity
from lowrank_onnx.model import Model
from lowrank_onnx.probes import Curve
from lowrank_onnx.problem import Problem
from lowrank_onnx.proposals import Proposal
from lowrank_onnx.recurrent_statistics import observable_cell
from lowrank_onnx.runtime import TF32, Runtime, gpu_libraries, left_on_cpu, onnxruntime, open_session
from lowrank_onnx.sites.attention import left_alone
from lowrank_onnx.statistics import Progress, unobserved
from lowrank_onnx.target import Target
from lowrank_onnx.validation import Accuracy, Latency, MetricResult, Ratio, Timing, benchmark, compare
from lowrank_onnx.version import __version__

SCHEMA = 1
_SPECTRUM_POINTS = 256


@dataclass(frozen=True, eq=False)
class Measured:
    """Accuracy and speed of a finished model against the original; None where there was nothing to run on.

    Memory is that of a loaded session, before and after; None where nobody asked for a small model.
    """

    accuracy: Accuracy | None
    timing: Timing | None
    on: str
    memory: tuple[int | None, int | None] | None = None


def measure(problem: Problem, selection: Selection, progress: Progress | None, memory: bool = False) -> Measured:
    """Run original and rewritten model side by side; with ``memory``, load each in a process of its own as well.

    Raises:
        ModelError: The rewritten model does not run; nothing is written then.
    """
    what, folder = "the rewritten model", problem.model.folder
    candidate = open_session(selection.built.proto, problem.runtime, folder, what=what, timed=True)
    data = problem.judged_on
    accuracy = None if data is None else compare(problem.session, candidate, data, problem.metric, progress)
    timing = None
    if problem.feeds is not None:
        timing = benchmark([problem.session, candidate], problem.feeds.values, problem.runtime, problem.seed)
    held = None
    if memory:
        folder = problem.model.folder
        old, new = session_rss_bytes(
            [(problem.model.original, folder), (selection.built.proto, folder)], problem.runtime
        )
        held = old, new
    return Measured(accuracy, timing, "evaluate" if problem.evaluate is not None else "calibrate", held)


def compress_report(
    problem: Problem,
    target: Target,
    planned: Any,
    measured: Measured,
    seconds: Mapping[str, float],
    labels: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Return the report of ``compress`` and ``apply``, schema 1; ``labels`` name the rows of components."""
    memory = measured.memory or (None, None)
    after: Cost = planned.selection.cost
    metric = None if measured.accuracy is None else measured.accuracy.metric
    latencies = (None, None) if measured.timing is None else measured.timing.latencies
    ratio = None if measured.timing is None else measured.timing.ratios[1]
    return {
        "schema": SCHEMA,
        "version": __version__,
        "model": _model(problem.model),
        "target": target.as_dict(),
        "environment": environment(problem.runtime),
        "before": _state(problem.cost, latencies[0], None if metric is None else metric.before)
        | {"session_rss_bytes": memory[0]},
        "after": _state(after, latencies[1], None if metric is None else metric.after)
        | {"session_rss_bytes": memory[1]},
        "ratio": _ratios(problem.cost, after, ratio),
        "metric": _metric(metric),
        "fidelity": _fidelity(measured),
        "seconds": dict(seconds),
        "peak_rss_bytes": peak_rss_bytes(),
        "data": _data(problem),
        "sites": _sites(problem, planned, labels),
        "warnings": [
            *_warnings(problem),
            *_blind(problem, planned),
            *_resized(planned),
            *_grown(planned, target),
            *_apart(planned),
        ],
    }


def validate_report(
    problem: Problem, other: Problem, seconds: Callable[[], Mapping[str, float]], progress: Progress | None
) -> dict[str, Any]:
    """Compare two models that exist already; the same report without sites."""
    data = problem.judged_on
    accuracy = None if data is None else compare(problem.session, other.session, data, problem.metric, progress)
    timing = None
    if problem.feeds is not None and other.feeds is not None:
        feeds = [problem.feeds.values, other.feeds.values]
        timing = benchmark([problem.session, other.session], feeds, problem.runtime, problem.seed)
    if accuracy is None and timing is None:
        raise ModelError(f"nothing to compare on: {problem.unfed or other.unfed}")
    measured = Measured(accuracy, timing, "evaluate")
    metric = None if accuracy is None else accuracy.metric
    latencies = (None, None) if timing is None else timing.latencies
    return {
        "schema": SCHEMA,
        "version": __version__,
        "model": _model(problem.model),
        "candidate": _model(other.model),
        "target": {},
        "environment": environment(problem.runtime),
        "before": _state(problem.cost, latencies[0], None if metric is None else metric.before),
        "after": _state(other.cost, latencies[1], None if metric is None else metric.after),
        "ratio": _ratios(problem.cost, other.cost, None if timing is None else timing.ratios[1]),
        "metric": _metric(metric),
        "fidelity": _fidelity(measured),
        "seconds": dict(seconds()),
        "peak_rss_bytes": peak_rss_bytes(),
        "sites": [],
        "warnings": [
            *_fallen_back(problem.session),
            *([] if data is not None else ["no data given: only cost and speed were compared"]),
        ],
    }


def benchmark_report(
    models: Sequence[Model], feeds: Sequence[Mapping[str, Array]], timing: Timing, runtime: Runtime
) -> dict[str, Any]:
    """Latency of every model, and its ratio to the first."""
    rows = []
    for model, values, latency, ratio in zip(models, feeds, timing.latencies, timing.ratios, strict=True):
        rows.append(
            {
                **_model(model),
                "shapes": {name: list(value.shape) for name, value in values.items()},
                "latency_ms": latency.as_dict(),
                "speedup": ratio.value,
                "speedup_low": ratio.low,
                "speedup_high": ratio.high,
            }
        )
    return {"schema": SCHEMA, "version": __version__, "environment": environment(runtime), "models": rows}


def inspect_report(
    problem: Problem, proposals: Sequence[Proposal], reasons: Mapping[str, str], curves: Mapping[int, Curve]
) -> dict[str, Any]:
    """What a model is made of; the form is described in ``report/inspection.py``."""
    offered: dict[str, list[Proposal]] = {}
    damages: dict[str, Curve] = {}
    for place, entry in enumerate(proposals):
        offered.setdefault(entry.site.name, []).append(entry)
        if place in curves and not entry.site.parts:
            damages.setdefault(entry.site.name, curves[place])
    rows = []
    for site in problem.sites:
        if site.parts:
            continue
        row: dict[str, Any] = {
            "name": site.name,
            "kind": site.kind,
            "op": site.op,
            "shape": list(site.shape),
            "parameters": site.parameters,
            "macs": site.macs,
            "reason": reasons.get(site.name),
            "techniques": [entry.technique.name for entry in offered.get(site.name, ())],
            "break_even_rank": None,
            "rank_90": None,
            "rank_99": None,
            "effective_rank": None,
        }
        for entry in offered.get(site.name, ())[:1]:
            sigma = getattr(entry.analysis, "sigma", None)
            if sigma is not None:
                row |= {
                    "break_even_rank": max(candidate.ranks[0] for candidate in entry.candidates),
                    "rank_90": energy_rank(sigma, 0.9),
                    "rank_99": energy_rank(sigma, 0.99),
                    "effective_rank": effective_rank(sigma),
                    "spectrum": _spectrum(sigma, problem.calibrate is not None),
                }
        if site.name in damages:
            curve = damages[site.name]
            row["damage"] = {"ranks": [ranks[0] for ranks in curve.ranks], "values": list(curve.damages)}
        rows.append(row)
    return {
        "schema": SCHEMA,
        "version": __version__,
        "model": _model(problem.model),
        "target": {},
        "environment": environment(problem.runtime),
        "before": _state(problem.cost, None, None),
        "data": _data(problem),
        "sites": rows,
        "blocks": [
            {
                "name": site.name,
                "kind": site.kind,
                "techniques": [entry.technique.name for entry in offered[site.name]],
            }
            for site in problem.sites
            if site.parts and site.name in offered
        ],
    }


def environment(runtime: Runtime) -> dict[str, Any]:
    """Where it ran."""
    import platform

    return {
        "onnxruntime": onnxruntime().__version__,
        "provider": runtime.provider,
        "device": runtime.device,
        "threads": runtime.used_threads,
        "python": platform.python_version(),
        "numpy": np.__version__,
        **({"versions": gpu_libraries(), "tf32": TF32} if runtime.on_gpu else {}),
    }


def peak_rss_bytes() -> int:
    """The most memory this process has held."""
    try:
        import resource
    except ImportError:  # Windows tells it elsewhere
        return int(psutil.Process().memory_info().peak_wset)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def _model(model: Model) -> dict[str, Any]:
    return {"path": str(model.path or ""), "sha256": model.sha256, "opset": model.opset}


def _state(cost: Cost, latency: Latency | None, metric: float | None) -> dict[str, Any]:
    return {
        "parameters": cost.parameters,
        "macs": cost.macs,
        "size_bytes": cost.size_bytes,
        "latency_ms": None if latency is None else latency.as_dict(),
        "metric": metric,
    }


def _ratios(before: Cost, after: Cost, ratio: Ratio | None) -> dict[str, Any]:
    macs = None if not before.macs or after.macs is None else after.macs / before.macs
    return {
        "parameters": after.parameters / max(before.parameters, 1),
        "macs": macs,
        "size": after.size_bytes / max(before.size_bytes, 1),
        "speedup": None if ratio is None else ratio.value,
        "speedup_low": None if ratio is None else ratio.low,
        "speedup_high": None if ratio is None else ratio.high,
    }


def _metric(metric: MetricResult | None) -> dict[str, Any] | None:
    if metric is None:
        return None
    return {
        "name": metric.name,
        "before": metric.before,
        "after": metric.after,
        "relative_drop": metric.relative_drop,
        "samples": metric.samples,
    }


def _fidelity(measured: Measured) -> dict[str, Any] | None:
    if measured.accuracy is None:
        return None
    fidelity: Fidelity = measured.accuracy.fidelity
    return {
        "cosine": fidelity.cosine,
        "sqnr_db": fidelity.sqnr_db,
        "max_abs_error": fidelity.max_abs_error,
        "agreement": fidelity.agreement,
        "data": measured.on,
    }


def _data(problem: Problem) -> dict[str, Any]:
    calibrate, evaluate = problem.calibrate, problem.evaluate
    note = ""
    if calibrate is None:
        note = "no calibration data: every layer was judged by its weight alone; give --calibrate for better factors"
    elif problem.training is not None and len(problem.training) > len(calibrate):
        images = all(column.array.dtype.kind == "f" for column in calibrate.inputs.values())
        made = "mirrored: the images show few positions" if images else "with some tokens exchanged: the data show "
        made += "" if images else "a small part of the vocabulary"
        note = (
            f"calibrated on the {len(calibrate)} samples and as many copies {made} (--no-augment leaves the copies out)"
        )
    return {
        "calibrate": None if calibrate is None else calibrate.source,
        "evaluate": None if evaluate is None else evaluate.source,
        "samples": 0 if calibrate is None else len(calibrate),
        "errors": "weight" if calibrate is None else "output",
        "note": note,
    }


def _warnings(problem: Problem) -> list[str]:
    found = []
    if problem.feeds is None:
        found.append(f"not timed, multiply-accumulates not counted: {problem.unfed}")
    elif not problem.feeds.real and problem.judged_on is None:
        found.append("timed on made-up inputs")
    found += _fallen_back(problem.session)
    if problem.evaluate is None and problem.calibrate is not None:
        found.append("fidelity was measured on the calibration data; give --evaluate for a figure on unseen data")
    singles = [site for site in problem.sites if not site.parts]
    return [*found, *left_alone(problem.model, problem.shapes, singles, problem.allow_io_change)]


def _resized(planned: Any) -> list[str]:
    """Inputs and outputs that changed their shape."""
    told = []
    for choice in planned.selection.choices:
        site, (width, *_) = choice.proposal.site, choice.candidate.ranks
        for cache in site.attributes.get("caches", ()):
            told.append(f"'{cache.name}' changed its shape: axis {cache.axis} is {width} instead of "
                        f"{site.attributes['width']}")  # fmt: skip
    return told


def _grown(planned: Any, target: Target) -> list[str]:
    """Layers that store more than before: a rank that was asked for may be past break-even."""
    names = [
        choice.proposal.site.name
        for choice in planned.selection.choices
        if target.kind == "rank" and choice.candidate.parameters > choice.proposal.site.parameters
    ]
    if not names:
        return []
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    layers = "layer stores" if len(names) == 1 else "layers store"
    return [
        f"{len(names)} {layers} more than before, past break-even: {shown}; lower --rank, or leave out with --exclude"
    ]


def _apart(planned: Any) -> list[str]:
    """Sampled layers whose chains have not met."""
    found = {
        choice.proposal.site.name: choice.candidate.diagnostics
        for choice in planned.selection.choices
        if choice.candidate.diagnostics
        and (
            choice.candidate.diagnostics["r_hat"] > MOST_R_HAT
            or choice.candidate.diagnostics["effective_samples"] < LEAST_EFFECTIVE
        )
    }
    if not found:
        return []
    shown = ", ".join(
        f"{name} (split R-hat {entry['r_hat']:.2f}, {entry['effective_samples']:.0f} effective samples)"
        for name, entry in list(found.items())[:3]
    ) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
    layers = "one layer" if len(found) == 1 else f"{len(found)} layers"
    return [f"the chains of {layers} have not converged: {shown}; ask for more --samples"]


def _fallen_back(session: Any) -> list[str]:
    """Tells of nodes of the original that a session for the GPU leaves to the CPU."""
    told = left_on_cpu(session)
    if told is None or not told[0]:
        return []
    counts = {operator: told[0].count(operator) for operator in sorted(told[0])}
    spelled = ", ".join(f"{count} × {operator}" for operator, count in counts.items())
    return [f"{len(told[0])} of {told[1]} nodes of the original run on the CPU, not the GPU: {spelled}"]


def _blind(problem: Problem, planned: Any) -> list[str]:
    """Factorized layers that were judged by their weight alone though there are data, and why."""
    reasons: dict[str, list[str]] = {}
    for choice in planned.selection.choices:
        site = choice.proposal.site
        reason = None if observable_cell(site) else unobserved(site)
        if problem.calibrate is not None and reason is not None:
            reasons.setdefault(reason, []).append(choice.proposal.site.name)
    return [f"factorized by weight alone, {reason}: {', '.join(names)}" for reason, names in reasons.items()]


def _components(planned: Any, site: Site, labels: Sequence[str] | None) -> dict[str, Any]:
    """What the components of a site are made of, where its factor has a row for every label."""
    if labels is None:
        return {}
    (technique,) = [c.proposal.technique for c in planned.selection.choices if c.proposal.site is site]
    factor = technique.components(site, planned.selection.built.factors[site.name])
    return {} if factor is None or len(factor) != len(labels) else {"components": strongest_rows(factor, labels)}


def _sites(problem: Problem, planned: Any, labels: Sequence[str] | None) -> list[dict[str, Any]]:
    chosen = {choice.proposal.site.name: choice for choice in planned.selection.choices}
    covered = {name for choice in planned.selection.choices for name in choice.proposal.site.parts}
    changed = {choice.proposal.site.name: choice.candidate for choice in planned.selection.kept}
    rows = []
    for site in problem.sites:
        if site.name in chosen:
            choice = chosen[site.name]
            row = _factorized(choice.proposal, choice.candidate, problem.calibrate is not None)
            row |= _components(planned, site, labels)
            rows.append({**row, "refined": planned.selection.notes.get(site.name)})
        elif not site.parts and site.name not in covered:
            row = _kept(site, planned.refusals[site.name], changed.get(site.name))
            rows.append({**row, "refined": planned.selection.notes.get(site.name)})
    return rows


def _site(site: Site) -> dict[str, Any]:
    return {
        "name": site.name,
        "kind": site.kind,
        "op": site.op,
        "shape": list(site.shape),
        "parameters_before": site.parameters,
        "macs_before": site.macs,
        "latency_before_us": None,
        "latency_after_us": None,
    }


def _factorized(proposal: Proposal, candidate: Candidate, data: bool) -> dict[str, Any]:
    row = _site(proposal.site) | {
        "decision": "factorized",
        "technique": candidate.technique,
        "ranks": list(candidate.ranks),
        "reason": None,
        "weight_error": candidate.weight_error,
        "output_error": candidate.output_error,
        "parameters_after": candidate.parameters + proposal.site.parameters - proposal.site.freed,
        "macs_after": candidate.macs,
    }
    if candidate.diagnostics:
        row["diagnostics"] = dict(candidate.diagnostics)
    sigma = getattr(proposal.analysis, "sigma", None)
    return row if sigma is None else row | {"spectrum": _spectrum(sigma, data and candidate.output_error is not None)}


def _kept(site: Site, reason: str, refitted: Candidate | None) -> dict[str, Any]:
    """A layer that stays dense; ``refitted`` where its weights are others now."""
    if refitted is not None:
        reason = f"{reason}; its weights were refitted to what the compressed layers before it deliver"
    return _site(site) | {
        "decision": "kept",
        "technique": None,
        "ranks": None,
        "reason": reason,
        "weight_error": None if refitted is None else refitted.weight_error,
        "output_error": None if refitted is None else refitted.output_error,
        "parameters_after": site.parameters,
        "macs_after": site.macs,
    }


def _spectrum(sigma: Array, whitened: bool) -> dict[str, Any]:
    index = np.unique(np.linspace(0, len(sigma) - 1, min(len(sigma), _SPECTRUM_POINTS)).round().astype(int))
    return {
        "values": [float(sigma[place]) for place in index],
        "index": [int(place) + 1 for place in index],
        "kind": "whitened" if whitened else "weight",
    }
