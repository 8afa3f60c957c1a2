"""The whole tool: load, find sites, observe, propose, allocate, rewrite, validate, report.

Every command of the command line is a function here, every option an argument of the same name.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

from lowrank_onnx.base import Candidate, Counts, Moments, Pass, Plan, Site, configure
from lowrank_onnx.budget import Damage, Selection, carry_out, meet_budget, reasons_for_kept, saving, with_factors
from lowrank_onnx.building import Built, Choice
from lowrank_onnx.cache import open_cache
from lowrank_onnx.cascading import LEVELS, Cascade, check_agreement, find_cascade, hold_out
from lowrank_onnx.errors import LowRankError, PlanError, TargetError
from lowrank_onnx.feeds import choose_feeds, read_shapes
from lowrank_onnx.forms import quickest
from lowrank_onnx.frontiers import FRONTIER_FILES, frontier_point, reference_points, write_frontier
from lowrank_onnx.labels import read_labels
from lowrank_onnx.latency import latency_saving, measure_latencies
from lowrank_onnx.leveling import level_rows, share_escalated
from lowrank_onnx.levels import build_levels, level_count
from lowrank_onnx.model import Model, check_output, parameter_count, save, saved_size
from lowrank_onnx.nesting import check_levels, nested_levels
from lowrank_onnx.passes import PASSES
from lowrank_onnx.plans import check_model, check_plan, chosen_rows, plan_to_dict, read_plan
from lowrank_onnx.probe_cache import cached_probe
from lowrank_onnx.probes import Curve, damage_of
from lowrank_onnx.problem import Data, Problem, Source, open_model, pose, read_data
from lowrank_onnx.proposals import Proposal, filter_sites, propose, with_work
from lowrank_onnx.refine import refine as refine_factors
from lowrank_onnx.reporting import (
    benchmark_report,
    compress_report,
    environment,
    inspect_report,
    measure,
    validate_report,
)
from lowrank_onnx.runtime import Runtime, input_specs, open_session
from lowrank_onnx.search import reach_speedup, stay_within
from lowrank_onnx.statistics import Progress, observe
from lowrank_onnx.structures import SHARE, WIDEST, errors_at
from lowrank_onnx.target import BUDGETS, OBJECTIVES, Target, read_target
from lowrank_onnx.threads import few_threads
from lowrank_onnx.validation import benchmark as time_models
from lowrank_onnx.version import __version__

__all__ = ["Result", "apply", "benchmark", "compress", "inspect", "passes", "plan", "sweep", "validate"]


@dataclass(frozen=True, eq=False)
class Result:
    """What ``compress`` and ``apply`` give.

    Attributes:
        model: The rewritten model.
        plan: The plan, as JSON has it.
        report: The report, schema 1.
        source: The original.
    """

    model: ModelProto
    plan: dict[str, Any]
    report: dict[str, Any]
    source: Model = field(repr=False)

    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Write the model, completely or not at all.

        Raises:
            ModelError: The path cannot be written, or exists without ``overwrite``.
        """
        out = check_output(path, self.source, overwrite, "path")
        save(self.model, out, self.source.folder, overwrite)
        return out


class Clock:
    """Seconds by step."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Add the time of a block to a step."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def total(self) -> dict[str, float]:
        """All steps, and the time since the clock was made."""
        return {"total": time.perf_counter() - self.start, **self.seconds}


@dataclass(frozen=True)
class Settings:
    """The options of a run that decide what comes out, besides model, data and target.

    Attributes:
        technique: ``name`` or ``name:option=value,...``; empty takes every technique that is on by default.
        include, exclude: Patterns of node names.
        mask: Input that marks real rows.
        jobs: Workers for decompositions.
        refine: Refit the factors on what the compressed model delivers.
        augment: Calibrate text on samples with exchanged tokens as well.
        minimize: What ``max_drop`` makes as small as it can: latency, macs, size or params.
        cache: Use and keep what was measured in earlier runs.
    """

    technique: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    mask: str | None = None
    jobs: int = 1
    refine: bool = True
    augment: bool = True
    minimize: str = "latency"
    cache: bool = True

    def passes(self) -> list[Pass]:
        """The techniques in use, configured."""
        if not self.technique:
            return [kind() for kind in PASSES if kind.default]
        return [read_technique(text) for text in self.technique]

    @property
    def matrices(self) -> bool:
        """Whether a technique takes attention without its layers."""
        return any(entry.name == "nystrom" for entry in self.passes())


def read_technique(text: str) -> Pass:
    """Read ``name`` or ``name:option=value,option=value``.

    Raises:
        LowRankError: There is no such technique or option.
    """
    name, _, rest = text.partition(":")
    known = {kind.name: kind for kind in PASSES}
    if name not in known:
        raise LowRankError(f"unknown technique '{name}'; lowrank-onnx passes lists {', '.join(known)}")
    options: dict[str, str] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise LowRankError(f"--technique {name} expects option=value, got '{part}'")
        options[key.strip()] = value.strip()
    return configure(known[name], options)


@dataclass(frozen=True, eq=False)
class Planned:
    """What was decided and carried out, and why the rest was kept."""

    selection: Selection
    refusals: Mapping[str, str]


def _observe(
    problem: Problem, settings: Settings, clock: Clock, progress: Progress | None
) -> dict[str, dict[str, Moments | Counts]]:
    if problem.training is None:
        return {}
    with clock.step("observe"):
        copies = len(problem.training) - len(problem.calibrate or ())
        return observe(problem.model, problem.sites, problem.training, problem.runtime, settings.mask, progress, copies)


def _decide(
    problem: Problem,
    target: Target,
    settings: Settings,
    clock: Clock,
    progress: Progress | None,
) -> Planned:
    """Observe, propose, probe, allocate and refine."""
    statistics = _observe(problem, settings, clock, progress)
    sites, reasons = filter_sites(problem.sites, settings.include, settings.exclude)
    searched = settings.minimize if target.kind == "max_drop" else target.kind
    if searched in ("keep_macs", "speedup", "latency", "macs"):
        sites, idle = with_work(sites)
        reasons |= idle
    with clock.step("propose"):
        proposals, refusals = propose(sites, settings.passes(), statistics, target.rank, settings.jobs)
    del statistics  # hundreds of megabytes of a large model, as the analyses of what is not chosen are further down
    reasons |= refusals
    if not proposals and target.rank is not None and target.rank.selector is not None:
        raise LowRankError(f"--rank '{target.text}' is no selector of the techniques in use ({_summary(reasons)})")
    if not proposals:
        raise TargetError(f"{target.option} cannot be met: no layer can be factorized ({_summary(reasons)})")
    if target.kind in BUDGETS and target.kind != "keep_macs":
        with clock.step("time"):
            proposals = quickest(problem, proposals, open_cache(settings.cache), progress)
    damage = _probed(problem, target, settings, proposals, clock, progress)

    def finish(selection: Selection) -> Selection:
        return _refined(problem, settings, selection, sites, clock, progress)

    if target.kind == "rank":
        selection = finish(carry_out(problem, _first_of_each(proposals)))
        kept = "another technique took it"
    elif target.kind in BUDGETS:
        with clock.step("allocate"):
            selection = meet_budget(problem, proposals, damage, target.kind, target.value)
        del proposals, damage
        selection = finish(selection)
        kept = "dense is the better use of the budget: other layers lose less"
    else:
        value = _value(problem, settings, target, proposals, clock, progress)
        with clock.step("search"):
            if target.kind == "speedup":
                selection = reach_speedup(problem, proposals, damage, value, target.value, finish, progress)
            else:
                unit = settings.minimize
                selection = stay_within(problem, proposals, damage, value, unit, target.value, finish, progress)
        kept = "dense is better: too little to gain for what it would lose"
    return Planned(selection, reasons_for_kept(problem.sites, selection.choices, reasons, kept))


def _probed(
    problem: Problem,
    target: Target,
    settings: Settings,
    proposals: Sequence[Proposal],
    clock: Clock,
    progress: Progress | None,
) -> Damage:
    """The damage of every candidate: probed on the model's output where there are data, local otherwise."""
    curves: Mapping[int, Curve] = {}
    if target.kind != "rank" and problem.calibrate is not None:
        with clock.step("probe"):
            curves = cached_probe(problem, proposals, settings.mask, open_cache(settings.cache), progress)
    return damage_of(proposals, curves)


def _value(
    problem: Problem,
    settings: Settings,
    target: Target,
    proposals: Sequence[Proposal],
    clock: Clock,
    progress: Progress | None,
) -> Callable[[Site, Candidate], float]:
    """What a candidate is worth to a search: microseconds, or a unit of a budget."""
    unit = "latency" if target.kind == "speedup" else settings.minimize
    if unit == "latency":
        problem.require_feeds(target.option)
        with clock.step("time"):
            curves = measure_latencies(problem, proposals, open_cache(settings.cache), progress)
        return latency_saving(proposals, curves)
    return lambda site, candidate: saving(site, candidate, f"keep_{unit}")


def _refined(
    problem: Problem,
    settings: Settings,
    selection: Selection,
    sites: Sequence[Site],
    clock: Clock,
    progress: Progress | None,
) -> Selection:
    """Refit; of the layers that were kept, those among ``sites`` may get other weights."""
    if not settings.refine or problem.calibrate is None:
        return selection
    with clock.step("refine"):
        refined = refine_factors(problem, selection.choices, selection.built.factors, settings.mask, progress, sites)
        return with_factors(problem, refined.choices, refined.factors, refined.notes, refined.kept)


def _first_of_each(proposals: Sequence[Proposal]) -> list[Choice]:
    """For a fixed rank: at every site the technique with the least error."""
    best: dict[str, Choice] = {}
    for entry in proposals:
        choice = Choice(entry, entry.candidates[0])
        name = entry.site.name
        if not entry.site.parts and (name not in best or choice.candidate.error < best[name].candidate.error):
            best[name] = choice
    return list(best.values())


def _summary(reasons: Mapping[str, str]) -> str:
    """The reasons for keeping layers, the frequent ones first."""
    counts: dict[str, int] = {}
    for text in reasons.values():
        counts[text] = counts.get(text, 0) + 1
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    told = "; ".join(f"{count} × {text}" if count > 1 else text for text, count in ranked[:3])
    return told or "the model has no weights of a kind the techniques know"


@few_threads
def compress(
    model: Source,
    target: Mapping[str, Any] | None = None,
    *,
    rank: str | int | float | None = None,
    keep_params: float | None = None,
    keep_macs: float | None = None,
    keep_size: float | None = None,
    speedup: float | None = None,
    max_drop: float | None = None,
    agreement: float | None = None,
    levels: Sequence[float] | None = None,
    by: str = "macs",
    calibrate: Data | None = None,
    evaluate: Data | None = None,
    metric: str | None = None,
    technique: Sequence[str] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    mask: str | None = None,
    provider: str = "cpu",
    threads: int = 0,
    shape: Sequence[str] = (),
    seed: int = 0,
    jobs: int = 1,
    refine: bool = True,
    augment: bool = True,
    minimize: str = "latency",
    cache: bool = True,
    labels: str | Path | None = None,
    allow_io_change: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Make a model smaller or faster by low-rank factorization; nothing is written.

    Args:
        model: A file, or a model in memory.
        target: ``{"keep_macs": 0.5}``; the same as the keyword. Exactly one target, ``max_drop=0.01`` if none.
        rank: An integer, a fraction of full rank, ``energy=0.95``, or a selector of a technique, at every site.
        keep_params, keep_macs, keep_size: Share of the whole model to keep, in (0, 1].
        speedup: Measured latency before / after to reach.
        max_drop: Relative loss of the metric to stay within, at the least latency.
        agreement: Share of samples whose best class must stay that of the original. Makes a cascade: the target
            names its cheap level (several are tried without one), and what that is unsure of goes on to the
            original inside the same file.
        levels: Several shares to keep, in one file: the input ``rank_level`` chooses among them, the highest by
            default. Instead of a target.
        by: What the levels are shares of: ``macs``, ``params`` or ``size``.
        calibrate, evaluate: Data: a file, a folder, ``module:function``, arrays by name, or feeds.
        metric: A name, ``path.py:function`` or ``module:function``; fidelity to the original without one.
        technique: ``name:option=value,...``; every default technique if empty.
        include, exclude: Patterns of node names.
        mask: Input whose non-zero values mark real rows; looked for if None.
        provider, threads: Where the model runs; 0 threads leaves the number to onnxruntime.
        shape: ``NAME=1,128``, for shapes and timing.
        seed: Same seed, same bytes.
        jobs: Workers for decompositions.
        refine: Refit the factors on what the compressed model delivers; needs calibration data.
        augment: Where the data show little of a vocabulary, calibrate on copies with exchanged tokens as well.
        minimize: What ``max_drop`` makes as small as it can: ``latency``, ``macs``, ``size`` or ``params``.
        cache: Use and keep what was measured in earlier runs.
        labels: A file of names, one a line, of the rows of non-negative factors; the report lists the strongest.
        allow_io_change: Let inputs and outputs that hold a cache of keys or values get narrower.
        progress: Called with (step, done, total).

    Raises:
        TargetError: The target cannot be met; the message tells the best that was reached.
        LowRankError: A wrong input.
    """
    clock = Clock()
    wishes = {
        "rank": rank,
        "keep_params": keep_params,
        "keep_macs": keep_macs,
        "keep_size": keep_size,
        "speedup": speedup,
        "max_drop": max_drop,
    }
    given = {**wishes, **{name: value for name, value in (target or {}).items()}}
    wish = read_target(given)
    searching = all(value is None for value in given.values())
    if agreement is not None:
        check_agreement(agreement)
    if levels is not None and (not searching or agreement is not None):
        raise LowRankError("--levels is a target of its own: leave --agreement and the other targets out")
    if f"keep_{by}" not in BUDGETS:
        raise LowRankError(f"--by must be macs, params or size, got '{by}'")
    shares = None if levels is None else check_levels(levels)
    settings = Settings(tuple(technique), tuple(include), tuple(exclude), mask, jobs, refine, augment, minimize, cache)
    if minimize not in OBJECTIVES:
        raise LowRankError(f"minimize must be one of {', '.join(OBJECTIVES)}, got '{minimize}'")
    techniques = settings.passes()  # a typing error must not wait for the data
    names = None if labels is None else read_labels(labels)
    with clock.step("load"):
        problem = pose(
            model,
            Runtime(provider, threads),
            calibrate,
            evaluate,
            metric,
            shape,
            seed,
            mask,
            augment,
            allow_io_change,
            settings.matrices,
        )
    if names is not None:
        _check_labels(problem, techniques, names)
    if agreement is not None:
        wishes_tried = [read_target({"keep_macs": share}) for share in LEVELS] if searching else [wish]
        return _cascaded(problem, wishes_tried, settings, agreement, clock, progress)
    if shares is not None:
        return _leveled(problem, f"keep_{by}", shares, settings, clock, progress)
    planned = _decide(problem, wish, settings, clock, progress)
    return _finish(problem, wish, settings, planned, clock, progress, names)


def _check_labels(problem: Problem, techniques: Sequence[Pass], names: Sequence[str]) -> None:
    """Find out that nothing has as many rows before the work, not after it."""
    if not any(type(entry).components is not Pass.components for entry in techniques):
        raise LowRankError("--labels names the rows of non-negative factors; add a technique that has them: nmf")
    sizes = {site.weight.shape[site.attributes["axis"]] for site in problem.sites if site.kind == "embedding"}
    sizes |= {site.weight.shape[-1] for site in problem.sites if site.kind == "linear"}
    if len(names) not in sizes:
        known = ", ".join(str(size) for size in sorted(sizes))
        raise LowRankError(
            f"--labels holds {len(names)} names, but no table has as many rows and no layer as many outputs "
            f"(there are {known}); give one name a line"
        )


def _leveled(
    problem: Problem,
    kind: str,
    shares: Sequence[float],
    settings: Settings,
    clock: Clock,
    progress: Progress | None,
) -> Result:
    """Plan all levels, put them into one file, validate each and report."""
    target = read_target({kind: shares[-1]})
    statistics = _observe(problem, settings, clock, progress)
    sites, reasons = filter_sites(problem.sites, settings.include, settings.exclude)
    if kind == "keep_macs":
        sites, idle = with_work(sites)
        reasons |= idle
    with clock.step("propose"):
        proposals, refusals = propose(sites, settings.passes(), statistics, None, settings.jobs)
    reasons |= refusals
    if not proposals:
        raise TargetError(f"--levels cannot be met: no layer can be factorized ({_summary(reasons)})")
    damage = _probed(problem, target, settings, proposals, clock, progress)
    with clock.step("allocate"):
        selections = nested_levels(
            problem,
            proposals,
            damage,
            kind,
            shares,
            statistics,
            lambda selection: _refined(problem, settings, selection, sites, clock, progress),
        )
    del proposals, statistics
    proto = build_levels([selection.built.proto for selection in selections])
    highest = dataclasses.replace(selections[-1], built=Built(proto, selections[-1].built.factors, saved_size(proto)))
    cost = dataclasses.replace(
        selections[-1].cost, parameters=parameter_count(proto), size_bytes=highest.built.size_bytes
    )
    highest = dataclasses.replace(highest, cost=cost)
    kept = reasons_for_kept(problem.sites, highest.choices, reasons, "dense is the better use of the budget")
    result = _finish(problem, target, settings, Planned(highest, kept), clock, progress)
    with clock.step("validate"):
        statics = [selection.built for selection in selections]
        made = Model(proto, problem.model.path, "", "", saved_size(proto))
        rows = level_rows(problem, made, [selection.cost for selection in selections], statics)
    result.report["levels"] = [{"keep": share, **row} for share, row in zip(shares, rows, strict=True)]
    result.plan["setting"]["levels"] = list(shares)
    share = highest.built.size_bytes / max(selections[-1].cost.size_bytes, 1)
    if share > 1.15:
        result.report["warnings"].append(
            f"the file is {share:.2f} times as large as its highest level alone: some smaller levels need factors of "
            "their own, as prefixes of the larger ones lose too much there"
        )
    return result


def _cascaded(
    problem: Problem,
    targets: Sequence[Target],
    settings: Settings,
    agreement: float,
    clock: Clock,
    progress: Progress | None,
) -> Result:
    """Make the cheap levels, take the cascade that costs least, validate and report."""
    fitted, held = hold_out(problem, agreement, settings.mask, settings.augment)
    decided: dict[str, tuple[Target, Planned]] = {}

    def level(target: Target) -> Selection:
        planned = _decide(fitted, target, settings, clock, progress)
        decided[target.option] = (target, planned)
        return planned.selection

    levels = [(target.option, functools.partial(level, target)) for target in targets]
    found = find_cascade(fitted, levels, held, agreement)
    target, planned = decided[found.label]
    return _finish(fitted, target, settings, Planned(found.selection, planned.refusals), clock, progress, cascade=found)


def _finish(
    problem: Problem,
    target: Target,
    settings: Settings,
    planned: Planned,
    clock: Clock,
    progress: Progress | None,
    labels: Sequence[str] | None = None,
    cascade: Cascade | None = None,
) -> Result:
    """Validate and report."""
    selection = planned.selection
    with clock.step("validate"):
        small = target.kind in ("keep_params", "keep_size") or settings.minimize in ("params", "size")
        small = small or any(choice.proposal.site.kind in ("embedding", "tied") for choice in selection.choices)
        measured = measure(problem, selection, progress, memory=small)
    content = plan_to_dict(_as_plan(problem, target, settings, planned), problem.sites)
    if cascade is not None:
        # One sample tells one of two costs.
        measured = dataclasses.replace(measured, timing=cascade.timing)
    report = compress_report(problem, target, planned, measured, clock.total(), labels)
    if cascade is not None:
        content["setting"]["cascade"] = cascade.told
        report["cascade"] = cascade.told
    return Result(selection.built.proto, content, report, problem.model)


def _as_plan(problem: Problem, target: Target, settings: Settings, planned: Planned) -> Plan:
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


def plan(model: Source, target: Mapping[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """Return the plan ``compress`` would carry out; same arguments."""
    return compress(model, target, **options).plan


@few_threads
def apply(
    model: Source,
    plan: str | Path | Mapping[str, Any],
    *,
    calibrate: Data | None = None,
    evaluate: Data | None = None,
    metric: str | None = None,
    threads: int = 0,
    shape: Sequence[str] = (),
    jobs: int = 1,
    progress: Progress | None = None,
) -> Result:
    """Carry out a plan, as ``compress`` did or as somebody edited it.

    Args:
        plan: A plan file, or its content.
        calibrate: The calibration data; what the plan names if None.

    Raises:
        PlanError: The plan does not fit the model, or its calibration data are missing or others.
    """
    clock = Clock()
    content = read_plan(plan) if isinstance(plan, str | Path) else check_plan(plan, "the plan")
    setting = content["setting"]
    several = [f"--{option}" for key, option in (("cascade", "agreement"), ("levels", "levels")) if setting.get(key)]
    if several:
        raise PlanError(
            f"the plan tells of the model that compress {several[0]} made, which takes more than one plan; run "
            f"compress {several[0]} again, or take the entry out of 'setting' to apply this one level alone"
        )
    opened = open_model(model)
    check_model(content, opened.digest)
    source = setting.get("calibrate")
    if calibrate is None and source is not None:
        calibrate = source["source"]
        if not Path(source["source"]).exists() and ":" not in source["source"]:
            raise PlanError(
                f"the plan needs its calibration data '{source['source']}', which are missing; give --calibrate"
            )
    techniques, refining = tuple(setting.get("techniques", ())), bool(setting.get("refine", True))
    settings = Settings(
        techniques, mask=setting.get("mask"), jobs=jobs, refine=refining, augment=bool(setting.get("augment", True))
    )
    with clock.step("load"):
        runtime = Runtime(setting.get("provider", "cpu"), threads)
        seed = int(setting.get("seed", 0))
        augment, io_change = settings.augment, bool(setting.get("allow_io_change", False))
        problem = pose(
            opened,
            runtime,
            calibrate,
            evaluate,
            metric,
            shape,
            seed,
            settings.mask,
            augment,
            io_change,
            settings.matrices,
        )
    if source is not None and problem.calibrate is not None and problem.calibrate.sha256 != source["sha256"]:
        raise PlanError(
            f"the plan was made with other calibration data (digest {source['sha256'][:12]}…, found "
            f"{problem.calibrate.sha256[:12]}…); give the same data with --calibrate, or make a new plan"
        )
    rows = chosen_rows(content, problem.by_name)
    statistics = _observe(problem, settings, clock, progress)
    with clock.step("propose"):
        choices = [_choice_of(row, problem.by_name, settings, statistics) for row in rows]
    if not choices:
        raise PlanError("the plan keeps every layer; there is nothing to apply")
    with clock.step("rewrite"):
        selection = carry_out(problem, choices)
    refits = [
        problem.by_name[row["site"]] for row in content["sites"] if row["decision"] == "kept" and row.get("refit")
    ]
    selection = _refined(problem, settings, selection, refits, clock, progress)
    reasons = {row["site"]: row.get("reason") or "kept by hand" for row in content["sites"] if row not in rows}
    kept = reasons_for_kept(problem.sites, choices, reasons, "the plan does not name it")
    planned = Planned(selection, kept)
    target = read_target(setting.get("target", {}))
    return _finish(problem, target, settings, planned, clock, progress)


def _choice_of(
    row: Mapping[str, Any], sites: Mapping[str, Site], settings: Settings, statistics: Mapping[str, Mapping[str, Any]]
) -> Choice:
    site, name, ranks = sites[row["site"]], str(row.get("technique")), tuple(row["ranks"])
    named = [entry for entry in settings.passes() if entry.name == name]
    technique = named[0] if named else read_technique(name)
    if site.kind not in technique.kinds:
        raise PlanError(f"technique '{name}' does not take site '{site.name}' of kind {site.kind}")
    refusal = technique.refuse(site) or technique.check_ranks(site, ranks)
    if refusal:
        raise PlanError(f"plan gives site '{site.name}' {list(site.shape)} {name} at ranks {list(ranks)}: {refusal}")
    analysis = technique.analyse(site, statistics.get(site.name))
    candidate = technique.candidate(site, analysis, ranks)
    return Choice(Proposal(site, technique, analysis, (candidate,)), candidate)


@few_threads
def inspect(
    model: Source,
    *,
    calibrate: Data | None = None,
    technique: Sequence[str] = (),
    mask: str | None = None,
    provider: str = "cpu",
    threads: int = 0,
    shape: Sequence[str] = (),
    seed: int = 0,
    jobs: int = 1,
    augment: bool = True,
    cache: bool = True,
    structure: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Tell what the model is made of and how compressible each layer is; nothing is changed.

    With calibration data, also what factorizing each layer alone does to the model's output. With ``structure``,
    the error that each structure reaches at every linear layer with half of its parameters.
    """
    clock = Clock()
    settings = Settings(tuple(technique), mask=mask, jobs=jobs)
    passes = settings.passes()
    runtime = Runtime(provider, threads)
    problem = pose(model, runtime, calibrate, None, None, shape, seed, mask, augment, matrices=settings.matrices)
    statistics = _observe(problem, settings, clock, progress)
    proposals, reasons = propose(problem.sites, passes, statistics, None, jobs)
    curves: Mapping[int, Curve] = {}
    if problem.calibrate is not None:
        curves = cached_probe(problem, proposals, mask, open_cache(cache), progress)
    report = inspect_report(problem, proposals, reasons, curves)
    if structure:
        _compare_structures(problem, statistics, report, progress)
    return report


def _compare_structures(
    problem: Problem, statistics: Mapping[str, Mapping[str, Any]], report: dict[str, Any], progress: Progress | None
) -> None:
    """Add to every linear layer of an inspection what each structure reaches at equal parameters."""
    rows = [row for row in report["sites"] if row["kind"] == "linear"]
    for place, row in enumerate(rows):
        site = problem.by_name[row["name"]]
        if site.weight.ndim == 2 and min(site.weight.shape) >= 4 and max(site.weight.shape) <= WIDEST:
            entry = statistics.get(site.name)
            gram = np.eye(len(site.weight)) if entry is None else entry[site.uses[0].input].gram
            row["structures"] = errors_at(site.weight, gram, int(SHARE * site.weight.size))
        if progress is not None:
            progress("compare structures", place + 1, len(rows))


def validate(
    reference: Source,
    candidate: Source,
    *,
    evaluate: Data | None = None,
    metric: str | None = None,
    provider: str = "cpu",
    threads: int = 0,
    shape: Sequence[str] = (),
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare two models on accuracy and speed, side by side.

    Without data the inputs are made up: speed counts, fidelity is on noise and says so.
    """
    clock = Clock()
    runtime = Runtime(provider, threads)
    problem = pose(reference, runtime, None, evaluate, metric, shape, seed)
    other = pose(candidate, runtime, None, evaluate, metric, shape, seed)
    report = validate_report(problem, other, clock.total, progress)
    rows = level_rows(problem, other.model) if level_count(other.model.proto) else []
    if rows:
        report["levels"] = rows
    share = None if problem.evaluate is None else share_escalated(other.model, problem.evaluate, runtime)
    if share is not None:
        report["cascade"] = {"escalated": share}
    return report


def benchmark(
    models: Sequence[Source],
    *,
    evaluate: Data | None = None,
    provider: str = "cpu",
    threads: int = 0,
    shape: Sequence[str] = (),
    seed: int = 0,
    seconds: float = 6.0,
) -> dict[str, Any]:
    """Time models side by side; ratios are to the first."""
    runtime = Runtime(provider, threads)
    opened = [open_model(source) for source in models]
    sessions = [open_session(entry.original, runtime, entry.folder, what=f"model '{entry.path}'") for entry in opened]
    feeds = []
    for session in sessions:
        specs = input_specs(session)
        data = read_data(evaluate, specs, "--evaluate")
        feeds.append(choose_feeds(specs, read_shapes(shape, specs), data, seed).values)
    timing = time_models(sessions, feeds, runtime, seed, seconds, 1000)
    return benchmark_report(opened, feeds, timing, runtime)


def passes() -> list[dict[str, Any]]:
    """The techniques: name, kinds, default or not, reference, options with their defaults, first line of help."""
    return [
        {
            "name": kind.name,
            "kinds": list(kind.kinds),
            "default": kind.default,
            "reference": kind.reference,
            "options": {entry.name: entry.default for entry in dataclasses.fields(kind)},
            "summary": (kind.__doc__ or "").strip().splitlines()[0],
        }
        for kind in PASSES
    ]


SWEEP = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)


@few_threads
def sweep(
    model: Source,
    folder: str | Path,
    *,
    budgets: Sequence[float] = SWEEP,
    by: str = "macs",
    calibrate: Data | None = None,
    evaluate: Data | None = None,
    metric: str | None = None,
    technique: Sequence[str] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    mask: str | None = None,
    provider: str = "cpu",
    threads: int = 0,
    shape: Sequence[str] = (),
    seed: int = 0,
    jobs: int = 1,
    refine: bool = True,
    augment: bool = True,
    cache: bool = True,
    allow_io_change: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the model at several budgets, and a table and a plot of what each is worth.

    Data are seen, layers decomposed and probed once for all budgets.

    Args:
        folder: Gets ``keep_0.50.onnx`` for every budget that can be met, ``frontier.csv``, ``.json``, ``.html``.
        budgets: Shares to keep, each in (0, 1].
        by: What they are shares of: ``macs``, ``params`` or ``size``.

    Returns:
        The frontier, as ``frontier.json`` has it.

    Raises:
        TargetError: No budget can be met.
    """
    clock = Clock()
    targets = [read_target({f"keep_{by}": budget}) for budget in sorted(set(budgets), reverse=True)]
    settings = Settings(tuple(technique), tuple(include), tuple(exclude), mask, jobs, refine, augment, cache=cache)
    place = Path(folder)
    problem = pose(
        model,
        Runtime(provider, threads),
        calibrate,
        evaluate,
        metric,
        shape,
        seed,
        mask,
        augment,
        allow_io_change,
        settings.matrices,
    )
    names = [f"keep_{target.value:.2f}.onnx" for target in targets]
    _prepare_folder(place, [*names, *FRONTIER_FILES], problem, overwrite)
    statistics = _observe(problem, settings, clock, progress)
    sites, reasons = filter_sites(problem.sites, settings.include, settings.exclude)
    if targets[0].kind == "keep_macs":
        sites, idle = with_work(sites)
        reasons |= idle
    proposals, refusals = propose(sites, settings.passes(), statistics, None, jobs)
    if not proposals:
        raise TargetError(f"nothing to sweep: no layer can be factorized ({_summary(reasons | refusals)})")
    damage = _probed(problem, targets[0], settings, proposals, clock, progress)
    points, missed = [], []
    for target, name in zip(targets, names, strict=True):
        try:
            chosen = meet_budget(problem, proposals, damage, target.kind, target.value)
        except TargetError as error:
            missed.append(str(error))
            continue
        selection = _refined(problem, settings, chosen, sites, clock, progress)
        measured = measure(problem, selection, progress)
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
        "seconds": clock.total(),
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
