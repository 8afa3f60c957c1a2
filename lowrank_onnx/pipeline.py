"""The whole tool: every command of the command line is a function here, every option an argument of the same name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_onnx.accelerator import gpu_algebra
from lowrank_onnx.base import Pass, Site, configure
from lowrank_onnx.budget import carry_out, reasons_for_kept
from lowrank_onnx.building import Choice
from lowrank_onnx.cache import open_cache
from lowrank_onnx.cascading import LEVELS, check_agreement
from lowrank_onnx.crossovers import calibrate as calibrate_on
from lowrank_onnx.deciding import Planned, decide, refined
from lowrank_onnx.errors import LowRankError, ModelError, PlanError
from lowrank_onnx.feeds import choose_feeds, read_shapes, texts
from lowrank_onnx.finishing import Result, finish
from lowrank_onnx.grids import remember
from lowrank_onnx.labels import read_labels
from lowrank_onnx.level_files import level_openers
from lowrank_onnx.leveling import level_rows, share_escalated
from lowrank_onnx.levels import LEVEL_INPUT
from lowrank_onnx.multilevel import FORMS, compress_cascade, compress_levels
from lowrank_onnx.nesting import check_levels
from lowrank_onnx.passes import PASSES
from lowrank_onnx.plans import check_model, check_plan, chosen_rows, read_plan
from lowrank_onnx.probe_cache import cached_probe
from lowrank_onnx.probes import Curve
from lowrank_onnx.problem import Data, Problem, Source, open_model, pose, read_data
from lowrank_onnx.proposals import Proposal, decompose, propose
from lowrank_onnx.reporting import benchmark_report, environment, inspect_report, validate_report
from lowrank_onnx.run import Clock, Run, Settings
from lowrank_onnx.runtime import Runtime, input_specs, open_session
from lowrank_onnx.statistics import Progress
from lowrank_onnx.structures import SHARE, WIDEST, errors_at
from lowrank_onnx.sweeping import write_sweep
from lowrank_onnx.target import BUDGETS, OBJECTIVES, read_target
from lowrank_onnx.threads import few_threads
from lowrank_onnx.unsure import compress_unsure
from lowrank_onnx.validation import benchmark as time_models
from lowrank_onnx.version import __version__
from lowrank_onnx.workers import Workers

__all__ = [
    "Result",
    "apply",
    "benchmark",
    "calibrate_device",
    "compress",
    "inspect",
    "passes",
    "plan",
    "sweep",
    "validate",
]


def techniques_of(given: str | Sequence[str]) -> tuple[Pass, ...]:
    """The techniques that ``--technique`` names, configured; those that are on by default without any."""
    if not given:
        return tuple(kind() for kind in PASSES if kind.default)
    return tuple(read_technique(text) for text in texts(given))


def _sampling(techniques: tuple[Pass, ...], samples: int | None) -> tuple[Pass, ...]:
    """The techniques, those that sample with this many samples.

    Raises:
        LowRankError: None of them samples, or the number is out of range.
    """
    if samples is None:
        return techniques
    if not any(getattr(entry, "variant", "") == "gibbs" for entry in techniques):
        raise LowRankError("--samples is of a technique that samples; add --technique bayesian:variant=gibbs")
    try:
        return tuple(
            dataclasses.replace(entry, samples=samples)  # type: ignore[call-arg]
            if getattr(entry, "variant", "") == "gibbs"
            else entry
            for entry in techniques
        )
    except ValueError as error:
        raise LowRankError(f"--samples: {error}") from error


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
    levels_as: str = FORMS[0],
    calibrate: Data | None = None,
    evaluate: Data | None = None,
    metric: str | None = None,
    technique: Sequence[str] = (),
    samples: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    mask: str | None = None,
    provider: str = "cpu",
    threads: int = 0,
    shape: Sequence[str] = (),
    seed: int = 0,
    jobs: int = 1,
    scheduler: str | None = None,
    refine: bool = True,
    augment: bool = True,
    minimize: str = "latency",
    cache: bool = True,
    labels: str | Path | None = None,
    allow_io_change: bool = False,
    uncertainty: bool = False,
    emit_uncertainty: Sequence[str] | None = None,
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
        levels: Several shares to keep. Instead of a target.
        by: What the levels are shares of: ``macs``, ``params`` or ``size``.
        levels_as: ``files``: a model file a level, the highest the named one, over one file of weights.
            ``switch``: one file whose input ``rank_level`` chooses among the levels, the highest by default.
        calibrate, evaluate: Data: a file, a folder, ``module:function``, arrays by name, or feeds.
        metric: A name, ``path.py:function`` or ``module:function``; fidelity to the original without one.
        technique: ``name:option=value,...``; every default technique if empty.
        samples: Of ``bayesian:variant=gibbs``, for each layer and rank.
        include, exclude: Patterns of node names.
        mask: Input whose non-zero values mark real rows; looked for if None.
        provider, threads: Where the model runs; 0 threads leaves the number to onnxruntime.
        shape: ``NAME=1,128``, for shapes and timing.
        seed: Same seed, same bytes.
        jobs: Processes that decompose.
        scheduler: Address of a Dask scheduler whose workers decompose instead, ``tcp://host:8786``.
        refine: Refit the factors on what the compressed model delivers; needs calibration data.
        augment: Where the data show little of a vocabulary, calibrate on copies with exchanged tokens as well; where
            images show few positions and the model takes mirrored ones for alike, on those too.
        minimize: What ``max_drop`` makes as small as it can: ``latency``, ``macs``, ``size`` or ``params``.
        cache: Use and keep what was measured in earlier runs.
        labels: A file of names, one a line, of the rows of non-negative factors; the report lists the strongest.
        allow_io_change: Let inputs and outputs that hold a cache of keys or values get narrower.
        uncertainty: Tell of every factorized layer how sure the data make its factors, in the report and in
            ``Result.posteriors``. Holds a quarter of the calibration data out of the fit.
        emit_uncertainty: Give the model an output ``NAME_stddev`` for each of these outputs, for every
            floating-point one if empty: the standard deviation that the compression is predicted to cause. Holds
            a quarter of the calibration data out of the fit as well.
        progress: Called with (step, done, total).

    Raises:
        TargetError: The target cannot be met; the message tells the best that was reached.
        LowRankError: A wrong input.
    """
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
    if allow_io_change and (levels is not None or agreement is not None):
        raise LowRankError("--allow-io-change gives each level a cache of its own width; leave it or the levels out")
    if f"keep_{by}" not in BUDGETS:
        raise LowRankError(f"--by must be macs, params or size, got '{by}'")
    if levels_as not in FORMS:
        raise LowRankError(f"--levels-as must be {' or '.join(FORMS)}, got '{levels_as}'")
    if levels is None and levels_as != FORMS[0]:
        raise LowRankError(f"--levels-as {levels_as} needs levels; give --levels 0.3,0.5,0.7, or leave it out")
    shares = None if levels is None else check_levels(levels)
    unsure = "--emit-uncertainty" if emit_uncertainty is not None else "--uncertainty" if uncertainty else ""
    if unsure and (agreement is not None or levels is not None):
        several = "--agreement" if agreement is not None else "--levels"
        raise LowRankError(
            f"{unsure} tells of one compressed model, {several} puts several into the file: leave one out"
        )
    if minimize not in OBJECTIVES:
        raise LowRankError(f"minimize must be one of {', '.join(OBJECTIVES)}, got '{minimize}'")
    # A typing error must not wait for the data.
    settings = Settings(
        _sampling(techniques_of(technique), samples),
        texts(include),
        texts(exclude),
        mask,
        Workers(jobs, scheduler),
        refine,
        augment,
        minimize,
        cache,
    )
    names = None if labels is None else read_labels(labels)
    clock = Clock()
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
        _check_labels(problem, settings.techniques, names)
    run = Run(problem, settings, clock, progress)
    with gpu_algebra(run.problem.runtime.on_gpu):
        if agreement is not None:
            tried = [read_target({"keep_macs": share}) for share in LEVELS] if searching else [wish]
            return compress_cascade(run, tried, agreement)
        if shares is not None:
            return compress_levels(run, f"keep_{by}", shares, levels_as)
        if unsure:
            return compress_unsure(run, wish, unsure, uncertainty, emit_uncertainty, names)
        return finish(run, wish, decide(run, wish), names)


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
    scheduler: str | None = None,
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
    if setting.get("held_out"):
        raise PlanError(
            f"the plan tells of a model that compress {setting['held_out']} fitted to a part of the calibration data; "
            f"run compress {setting['held_out']} again, or make a plan without it"
        )
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
    settings = Settings(
        techniques_of(setting.get("techniques", ())),
        mask=setting.get("mask"),
        workers=Workers(jobs, scheduler),
        refine=bool(setting.get("refine", True)),
        augment=bool(setting.get("augment", True)),
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
    run = Run(problem, settings, clock, progress)
    statistics = run.observe()
    with clock.step("propose"):
        choices = _choices_of(rows, problem.by_name, settings, statistics)
    if not choices:
        raise PlanError("the plan keeps every layer; there is nothing to apply")
    with clock.step("rewrite"):
        selection = carry_out(problem, choices)
    refits = [
        problem.by_name[row["site"]] for row in content["sites"] if row["decision"] == "kept" and row.get("refit")
    ]
    selection = refined(run, selection, refits)
    reasons = {row["site"]: row.get("reason") or "kept by hand" for row in content["sites"] if row not in rows}
    kept = reasons_for_kept(problem.sites, choices, reasons, "the plan does not name it")
    return finish(run, read_target(setting.get("target", {})), Planned(selection, kept))


def _choices_of(
    rows: Sequence[Mapping[str, Any]],
    sites: Mapping[str, Site],
    settings: Settings,
    statistics: Mapping[str, Mapping[str, Any]],
) -> list[Choice]:
    """The choices a plan names, checked before anything is decomposed."""
    calls = []
    for row in rows:
        site, name, ranks = sites[row["site"]], str(row.get("technique")), tuple(row["ranks"])
        named = [entry for entry in settings.techniques if entry.name == name]
        technique = named[0] if named else read_technique(name)
        if site.kind not in technique.kinds:
            raise PlanError(f"technique '{name}' does not take site '{site.name}' of kind {site.kind}")
        refusal = technique.refuse(site) or technique.check_ranks(site, ranks)
        if refusal:
            raise PlanError(
                f"plan gives site '{site.name}' {list(site.shape)} {name} at ranks {list(ranks)}: {refusal}"
            )
        calls.append((site, technique, statistics.get(site.name), ranks))
    answers = settings.workers.run(decompose, calls)
    return [
        Choice(Proposal(site, technique, analysis, (candidate,)), candidate)
        for (site, technique, _, _), (analysis, candidate) in zip(calls, answers, strict=True)
    ]


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
    scheduler: str | None = None,
    augment: bool = True,
    cache: bool = True,
    structure: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Tell what the model is made of and how compressible each layer is; nothing is changed.

    With calibration data, also what factorizing each layer alone does to the model's output. With ``structure``,
    the error that each structure reaches at every linear layer with half of its parameters.
    """
    settings = Settings(techniques_of(technique), mask=mask, workers=Workers(jobs, scheduler))
    runtime = Runtime(provider, threads)
    problem = pose(model, runtime, calibrate, None, None, shape, seed, mask, augment, matrices=settings.matrices)
    statistics = Run(problem, settings, progress=progress).observe()
    proposals, reasons = propose(problem.sites, settings.techniques, statistics, None, settings.workers)
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
    _check_same_inputs(problem, other)
    report = validate_report(problem, other, clock.total, progress)
    openers = level_openers(other.model, runtime)
    if openers:
        report["levels"] = level_rows(problem, {"files" if other.model.smaller else "switch": openers})
    share = None if problem.evaluate is None else share_escalated(other.model, problem.evaluate, runtime)
    if share is not None:
        report["cascade"] = {"escalated": share}
    return report


def _check_same_inputs(problem: Problem, other: Problem) -> None:
    """Refuse to compare models that are not made for the same data.

    Raises:
        ModelError: An input of one is missing in the other.
    """
    names, found = ({spec.name for spec in input_specs(posed.session)} - {LEVEL_INPUT} for posed in (problem, other))
    if names != found:
        raise ModelError(
            f"the models differ in their inputs: {', '.join(sorted(names)) or 'none'} and "
            f"{', '.join(sorted(found)) or 'none'}; compare a model with one made from it"
        )


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
    """Time models side by side; ratios are to the first.

    Args:
        seconds: Time to spend at most, from 0.1 to 3600.
    """
    if not 0.1 <= seconds <= 3600:  # NaN is not between either
        raise LowRankError(f"--seconds must be from 0.1 to 3600, got {seconds:g}")
    if not models:
        raise LowRankError("there is no model to time; name at least one")
    runtime = Runtime(provider, threads)
    opened = [open_model(source) for source in models]
    sessions = [
        open_session(entry.original, runtime, entry.folder, what=f"model '{entry.path}'", timed=True)
        for entry in opened
    ]
    feeds = []
    for session in sessions:
        specs = input_specs(session)
        data = read_data(evaluate, specs, "--evaluate")
        feeds.append(choose_feeds(specs, read_shapes(shape, specs), data, seed).values)
    timing = time_models(sessions, feeds, runtime, seed, seconds, 1000)
    return benchmark_report(opened, feeds, timing, runtime)


def calibrate_device(
    *, provider: str = "cpu", threads: int = 0, cache: bool = True, progress: Progress | None = None
) -> dict[str, Any]:
    """Measure which ranks and layers are worth a try on a device; later runs on it find that in the local table.

    Args:
        cache: Keep what was measured; False only shows it.

    Returns:
        ``environment``, ``steps`` by dtype, and ``crossovers``: a layer's shape, its time and its speed-ups.
    """
    runtime = Runtime(provider, threads)
    table = calibrate_on(runtime, progress)
    remember(runtime, table, open_cache(cache))
    return {"version": __version__, "environment": environment(runtime), **table.as_dict()}


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
    samples: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    mask: str | None = None,
    provider: str = "cpu",
    threads: int = 0,
    shape: Sequence[str] = (),
    seed: int = 0,
    jobs: int = 1,
    scheduler: str | None = None,
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
    if not budgets or not all(0 < budget <= 1 for budget in budgets):
        told = ",".join(f"{budget:g}" for budget in budgets)
        raise LowRankError(f"--budgets must be one or more shares in (0, 1], such as 0.7,0.5; got '{told}'")
    targets = [read_target({f"keep_{by}": budget}) for budget in sorted(set(budgets), reverse=True)]
    settings = Settings(
        _sampling(techniques_of(technique), samples),
        texts(include),
        texts(exclude),
        mask,
        Workers(jobs, scheduler),
        refine,
        augment,
        cache=cache,
    )
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
    with gpu_algebra(problem.runtime.on_gpu):
        return write_sweep(Run(problem, settings, clock, progress), Path(folder), targets, by, overwrite)
