"""Files that hold more than one level: several budgets in one, or a small model in front of the original."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path

from onnx import ModelProto

from lowrank_onnx.budget import Selection, reasons_for_kept
from lowrank_onnx.building import Built
from lowrank_onnx.cascading import find_cascade, hold_out
from lowrank_onnx.deciding import Planned, Prepared, decide, frontiers, offers, prepare, probed, refined
from lowrank_onnx.errors import ModelError, TargetError
from lowrank_onnx.finishing import Result, finish
from lowrank_onnx.level_files import LARGER, level_openers, level_paths, save_levels
from lowrank_onnx.leveling import STATIC, against_static, level_rows
from lowrank_onnx.levels import build_levels
from lowrank_onnx.model import Model, data_file, load, parameter_count, saved_size
from lowrank_onnx.nesting import nested_levels
from lowrank_onnx.rivals import Frontier
from lowrank_onnx.run import Run
from lowrank_onnx.runtime import open_session
from lowrank_onnx.target import Target, read_target

FORMS = ("files", "switch")
"""A file a level and one of weights that all share; or one file that an input switches.

The first is the default on both providers: its levels run as fast as levels alone. The switch takes up to 40 % more
time on a CPU where a level runs for microseconds and 6 to 16 % on CUDA, where it stops the capture of graphs as
well; and a session of it holds all levels: MiniLM with three takes 281 MB and half a second to load, 19 to 36 MB
and 40 ms as files.
"""


def compress_levels(run: Run, kind: str, shares: Sequence[float], form: str) -> Result:
    """Plan all levels together, put them into one file or several, validate each and report.

    Args:
        run: The run.
        kind: What the shares are of: ``keep_macs``, ``keep_params`` or ``keep_size``.
        shares: Ascending, each in (0, 1].
        form: One of ``FORMS``; the other is measured beside it.

    Raises:
        TargetError: A level cannot be met.
        ModelError: The levels cannot be put into one file, and ``switch`` asks for it.
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
    statics = [selection.built.proto for selection in selections]
    switch: ModelProto | None = None
    try:
        switch = build_levels(statics)
    except ModelError:
        if form == "switch":
            raise
    with tempfile.TemporaryDirectory() as folder:
        paths = level_paths(Path(folder) / "levels.onnx", len(shares))
        save_levels(statics, paths[-1], problem.model.folder)
        sizes = {"files": sum(path.stat().st_size for path in [*paths, data_file(paths[-1])])}
        opens = {"files": level_openers(load(paths[-1]), problem.runtime)}
        if switch is not None:
            sizes["switch"] = saved_size(switch)
            made = Model(switch, problem.model.path, "", "", sizes["switch"])
            opens["switch"] = level_openers(made, problem.runtime)
        opens[STATIC] = [
            partial(open_session, proto, problem.runtime, problem.model.folder, what="a level") for proto in statics
        ]
        highest = selections[-1]
        proto = switch if switch is not None and form == "switch" else statics[-1]
        cost = dataclasses.replace(highest.cost, parameters=parameter_count(proto), size_bytes=sizes[form])
        built = Built(proto, highest.built.factors, sizes[form])
        kept = reasons_for_kept(problem.sites, highest.choices, reasons, "dense is the better use of the budget")
        result = finish(run, target, Planned(dataclasses.replace(highest, built=built, cost=cost), kept))
        with run.clock.step("validate"):
            forms = {form: opens.pop(form), **opens}
            rows = level_rows(problem, forms, [selection.cost for selection in selections])
    result.report["levels"] = [{"keep": share, **row} for share, row in zip(shares, rows, strict=True)]
    result.report["level_forms"] = [
        {
            "form": name,
            "chosen": name == form,
            "files": 1 if name == "switch" else len(shares) + 1,
            "size_bytes": sizes[name],
            "against_static": [against_static(row["speedups"], name) for row in rows],
        }
        for name in sorted(sizes, key=FORMS.index)
    ]
    result.plan["setting"] |= {"levels": list(shares), "levels_as": form}
    larger = sizes[form] / max(highest.cost.size_bytes, 1)
    if larger > LARGER:
        what = "file is" if form == "switch" else "files are together"
        result.report["warnings"].append(
            f"the {what} {larger:.2f} times as large as the highest level alone: some smaller levels need factors of "
            "their own, as prefixes of the larger ones lose too much there"
        )
    return result if form == "switch" else dataclasses.replace(result, levels=tuple(statics[:-1]))


def compress_cascade(run: Run, targets: Sequence[Target], agreement: float) -> Result:
    """Make a cheap level for every target, take the cascade that costs least, validate and report.

    Raises:
        TargetError: No cascade pays, or a model without one that agrees as often is as fast.
    """
    settings = run.settings
    fitted, held = hold_out(run.problem, agreement, settings.mask, settings.augment)
    run = dataclasses.replace(run, problem=fitted)
    decided: dict[str, tuple[Target, Planned]] = {}

    @cache
    def prepared() -> Prepared:
        return prepare(run, "--agreement")

    def level(target: Target) -> Selection:
        planned = decide(run, target, prepared() if target.kind == "keep_macs" else None)
        decided[target.option] = (target, planned)
        return planned.selection

    levels = [(target.option, partial(level, target)) for target in targets]

    def statics() -> Iterator[tuple[str, Frontier]]:
        try:
            ready = prepared()
        except TargetError:  # what the target of the cheap level takes saves no work
            return
        yield from frontiers(run, ready)

    found = find_cascade(fitted, levels, held, agreement, statics)
    target, planned = decided[found.label]
    return finish(run, target, Planned(found.selection, planned.refusals), cascade=found)
