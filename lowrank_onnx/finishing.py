"""The end of every run: validate what was made, write the plan down, and report."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onnx import ModelProto

from lowrank_onnx.base import Pass, Plan
from lowrank_onnx.cascading import Cascade
from lowrank_onnx.deciding import Planned
from lowrank_onnx.level_files import check_level_outputs, save_levels
from lowrank_onnx.linalg import Array
from lowrank_onnx.model import Model, check_output, save
from lowrank_onnx.plans import plan_to_dict
from lowrank_onnx.reporting import compress_report, measure
from lowrank_onnx.run import Run
from lowrank_onnx.target import Target


@dataclass(frozen=True, eq=False)
class Result:
    """What ``compress`` and ``apply`` give.

    Attributes:
        model: The rewritten model.
        plan: The plan, as JSON has it.
        report: The report, schema 1.
        source: The original.
        posteriors: How sure each layer's factors are, as arrays by key; empty where nobody asked.
        levels: The smaller levels, the smallest first, where they get files of their own.
    """

    model: ModelProto
    plan: dict[str, Any]
    report: dict[str, Any]
    source: Model = field(repr=False)
    posteriors: dict[str, Array] = field(default_factory=dict, repr=False)
    levels: tuple[ModelProto, ...] = field(default=(), repr=False)

    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Write the model, completely or not at all.

        Raises:
            ModelError: The path cannot be written, or exists without ``overwrite``.
        """
        out = check_output(path, self.source, overwrite, "path")
        if self.levels:
            check_level_outputs(out, self.source, len(self.levels) + 1, overwrite)
            save_levels([*self.levels, self.model], out, self.source.folder, overwrite)
        else:
            save(self.model, out, self.source.folder, overwrite)
        return out


def finish(
    run: Run, target: Target, planned: Planned, labels: Sequence[str] | None = None, cascade: Cascade | None = None
) -> Result:
    """Validate and report."""
    problem, selection = run.problem, planned.selection
    with run.clock.step("validate"):
        small = target.kind in ("keep_params", "keep_size") or run.settings.minimize in ("params", "size")
        small = small or any(choice.proposal.site.kind in ("embedding", "tied") for choice in selection.choices)
        measured = measure(problem, selection, run.progress, memory=small)
    content = plan_to_dict(_as_plan(run, target, planned), problem.sites)
    if cascade is not None:
        # One sample tells one of two costs.
        measured = dataclasses.replace(measured, timing=cascade.timing)
    report = compress_report(problem, target, planned, measured, run.clock.total(), labels)
    report["data"]["note"] = "; ".join(filter(None, [report["data"]["note"], *run.notes]))
    if cascade is not None:
        content["setting"]["cascade"] = cascade.told
        report["cascade"] = cascade.told
    return Result(selection.built.proto, content, report, problem.model)


def _as_plan(run: Run, target: Target, planned: Planned) -> Plan:
    problem, settings = run.problem, run.settings
    data = problem.calibrate
    setting = {
        "target": target.as_dict(),
        "calibrate": None if data is None else {"source": data.source, "sha256": data.sha256},
        "mask": settings.mask,
        "techniques": sorted({_spelled(choice.proposal.technique) for choice in planned.selection.choices}),
        "provider": problem.runtime.provider,
        "seed": problem.seed,
        "refine": settings.refine,
        "augment": settings.augment,
        "allow_io_change": problem.allow_io_change,
    }
    choices = tuple(choice.candidate for choice in planned.selection.choices)
    refits = planned.selection.notes.keys() - {candidate.site for candidate in choices}
    return Plan(problem.model.digest, choices, planned.refusals, setting, frozenset(refits))


def _spelled(technique: Pass) -> str:
    """A technique with its options, as ``--technique`` reads it."""
    options = ",".join(f"{name}={value}" for name, value in vars(technique).items())
    return f"{technique.name}:{options}" if options else technique.name
