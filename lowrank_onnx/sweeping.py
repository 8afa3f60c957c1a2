"""The frontier: one model at several budgets, with what else a user would try beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowrank_onnx.budget import meet_budget
from lowrank_onnx.deciding import offers, probed, refined
from lowrank_onnx.errors import LowRankError, TargetError
from lowrank_onnx.frontiers import FRONTIER_FILES, frontier_point, reference_points, write_frontier
from lowrank_onnx.model import check_output, save
from lowrank_onnx.problem import Problem
from lowrank_onnx.reporting import environment, measure
from lowrank_onnx.run import Run
from lowrank_onnx.target import Target
from lowrank_onnx.version import __version__


def write_sweep(run: Run, place: Path, targets: Sequence[Target], by: str, overwrite: bool) -> dict[str, Any]:
    """Write the model at every target that can be met, and the frontier; layers are seen and probed once for all.

    Args:
        run: The run.
        place: The folder; made where it is missing.
        targets: Budgets of one kind, the largest first.
        by: What the budgets are shares of.
        overwrite: Replace files that exist.

    Returns:
        The frontier, as ``frontier.json`` has it.

    Raises:
        LowRankError: The folder or a file in it cannot be written.
        TargetError: No budget can be met.
    """
    made = not place.exists()
    try:
        return _write(run, place, targets, by, overwrite)
    except LowRankError:
        if made and place.is_dir() and not any(place.iterdir()):
            place.rmdir()
        raise


def _write(run: Run, place: Path, targets: Sequence[Target], by: str, overwrite: bool) -> dict[str, Any]:
    problem = run.problem
    names = [f"keep_{target.value:.2f}.onnx" for target in targets]
    _prepare_folder(place, [*names, *FRONTIER_FILES], problem, overwrite)
    sites, proposals, _ = offers(run, run.observe(), "--budgets", targets[0].kind == "keep_macs")
    damage = probed(run, proposals)
    points, missed = [], []
    for target, name in zip(targets, names, strict=True):
        try:
            chosen = meet_budget(problem, proposals, damage, target.kind, target.value)
        except TargetError as error:
            missed.append(str(error))
            continue
        selection = refined(run, chosen, sites)
        measured = measure(problem, selection, run.progress)
        save(selection.built.proto, place / name, problem.model.folder)
        points.append(frontier_point(problem, selection.cost, measured, f"keep {target.value:.2f}", target.value, name))
    if not points:
        raise TargetError(missed[0])
    reference, left_out = reference_points(problem)
    frontier = {
        "version": __version__,
        "model": str(problem.model.path or ""),
        "by": by,
        "environment": environment(problem.runtime),
        "points": points,
        "reference": reference,
        "warnings": [*missed, *left_out],
        "seconds": run.clock.total(),
    }
    write_frontier(frontier, place)
    return frontier


def _prepare_folder(place: Path, names: Sequence[str], problem: Problem, overwrite: bool) -> None:
    """Make the folder, and find out now whether all files can be written."""
    if place.exists() and not place.is_dir():
        raise LowRankError(f"-o '{place}' is no folder; sweep writes several files, name a folder")
    if not place.parent.is_dir():
        raise LowRankError(f"folder '{place.parent}' of -o '{place.name}' does not exist; create it first")
    try:
        place.mkdir(exist_ok=True)
    except OSError as error:
        raise LowRankError(f"folder '{place}' cannot be made: {error.strerror}") from error
    for name in names:
        check_output(place / name, problem.model, overwrite)
