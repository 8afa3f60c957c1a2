"""Files that hold more than one level: several budgets in one, or a small model in front of the original."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from lowrank_onnx.budget import Selection, reasons_for_kept
from lowrank_onnx.building import Built
from lowrank_onnx.cascading import find_cascade, hold_out
from lowrank_onnx.deciding import Planned, decide, offers, probed, refined
from lowrank_onnx.finishing import Result, finish
from lowrank_onnx.leveling import level_rows
from lowrank_onnx.levels import build_levels
from lowrank_onnx.model import Model, parameter_count, saved_size
from lowrank_onnx.nesting import nested_levels
from lowrank_onnx.run import Run
from lowrank_onnx.target import Target, read_target

LARGER = 1.15  # times its highest level: how large a file of levels may be before the report warns


def compress_levels(run: Run, kind: str, shares: Sequence[float]) -> Result:
    """Plan all levels together, put them into one file, validate each and report.

    Args:
        run: The run.
        kind: What the shares are of: ``keep_macs``, ``keep_params`` or ``keep_size``.
        shares: Ascending, each in (0, 1].

    Raises:
        TargetError: A level cannot be met.
    """
    problem = run.problem
    target = read_target({kind: shares[-1]})
    statistics = run.observe()
    sites, proposals, reasons = offers(run, statistics, "--levels", kind == "keep_macs")
    damage = probed(run, proposals)
    with run.clock.step("allocate"):
        selections = nested_levels(
            problem, proposals, damage, kind, shares, statistics, lambda selection: refined(run, selection, sites)
        )
    del proposals, statistics
    proto = build_levels([selection.built.proto for selection in selections])
    highest = dataclasses.replace(selections[-1], built=Built(proto, selections[-1].built.factors, saved_size(proto)))
    cost = dataclasses.replace(
        selections[-1].cost, parameters=parameter_count(proto), size_bytes=highest.built.size_bytes
    )
    highest = dataclasses.replace(highest, cost=cost)
    kept = reasons_for_kept(problem.sites, highest.choices, reasons, "dense is the better use of the budget")
    result = finish(run, target, Planned(highest, kept))
    with run.clock.step("validate"):
        statics = [selection.built for selection in selections]
        made = Model(proto, problem.model.path, "", "", saved_size(proto))
        rows = level_rows(problem, made, [selection.cost for selection in selections], statics)
    result.report["levels"] = [{"keep": share, **row} for share, row in zip(shares, rows, strict=True)]
    result.plan["setting"]["levels"] = list(shares)
    larger = highest.built.size_bytes / max(selections[-1].cost.size_bytes, 1)
    if larger > LARGER:
        result.report["warnings"].append(
            f"the file is {larger:.2f} times as large as its highest level alone: some smaller levels need factors of "
            "their own, as prefixes of the larger ones lose too much there"
        )
    return result


def compress_cascade(run: Run, targets: Sequence[Target], agreement: float) -> Result:
    """Make a cheap level for every target, take the cascade that costs least, validate and report.

    Raises:
        TargetError: No cascade pays.
    """
    settings = run.settings
    fitted, held = hold_out(run.problem, agreement, settings.mask, settings.augment)
    run = dataclasses.replace(run, problem=fitted)
    decided: dict[str, tuple[Target, Planned]] = {}

    def level(target: Target) -> Selection:
        planned = decide(run, target)
        decided[target.option] = (target, planned)
        return planned.selection

    levels = [(target.option, functools.partial(level, target)) for target in targets]
    found = find_cascade(fitted, levels, held, agreement)
    target, planned = decided[found.label]
    return finish(run, target, Planned(found.selection, planned.refusals), cascade=found)
