"""Damage curves, remembered: they depend on the model, the data and the technique, never on the target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lowrank_onnx.cache import Cache
from lowrank_onnx.probes import PROBES, SAMPLES, Curve, curve_owner, probe
from lowrank_onnx.problem import Problem
from lowrank_onnx.proposals import Proposal
from lowrank_onnx.runtime import onnxruntime
from lowrank_onnx.statistics import Progress
from lowrank_onnx.version import __version__


def cached_probe(
    problem: Problem, proposals: Sequence[Proposal], mask: str | None, cache: Cache, progress: Progress | None
) -> dict[int, Curve]:
    """Return the damage curves of proposals by position; only those not known yet are measured."""
    genuine = problem.genuine
    assert problem.calibrate is not None and genuine is not None
    shared = {
        "what": f"damage 3 {__version__}",
        "model": problem.model.digest,
        "data": problem.calibrate.sha256,
        "augmented": len(problem.training or ()) > len(genuine),
        "mask": mask,
        "seed": problem.seed,
        "samples": SAMPLES,
        "probes": PROBES,
        "onnxruntime": onnxruntime().__version__,
    }
    keys = [{**shared, "site": entry.site.name, "technique": curve_owner(proposals, entry)} for entry in proposals]
    known: dict[int, Curve] = {}
    for place, key in enumerate(keys):
        value = cache.get(key)
        if value is not None:
            known[place] = _read(value)
    curves = probe(
        problem.model,
        problem.session,
        proposals,
        genuine,
        problem.runtime,
        mask,
        problem.seed,
        known,
        progress,
    )
    for place, curve in curves.items():
        if place not in known:
            cache.put(keys[place], [list(map(list, curve.ranks)), list(curve.errors), list(curve.damages)])
    return curves


def _read(value: Any) -> Curve:
    ranks, errors, damages = value
    return Curve(tuple(tuple(entry) for entry in ranks), tuple(errors), tuple(damages))
