"""What to do with every layer: observe, propose, probe, allocate or search, refine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from lowrank_onnx.allocation import Option, largest_saving
from lowrank_onnx.base import Candidate, Counts, Moments, RankWish, Site
from lowrank_onnx.budget import (
    Damage,
    Selection,
    carry_out,
    meet_budget,
    options_for,
    reasons_for_kept,
    saving,
    with_factors,
)
from lowrank_onnx.building import Choice
from lowrank_onnx.cache import open_cache
from lowrank_onnx.errors import TargetError
from lowrank_onnx.forms import quickest
from lowrank_onnx.grids import device_table, large_enough, on_grid
from lowrank_onnx.latency import latency_saving, measure_latencies
from lowrank_onnx.probe_cache import cached_probe
from lowrank_onnx.probes import Curve, damage_of
from lowrank_onnx.problem import Problem
from lowrank_onnx.proposals import UNSUITED, Proposal, filter_sites, propose, with_work
from lowrank_onnx.refine import refine as refine_factors
from lowrank_onnx.run import Run
from lowrank_onnx.search import at_saving, reach_speedup, stay_within
from lowrank_onnx.target import BUDGETS, Target
from lowrank_onnx.waves import undominated

_FUSED = (
    "cells that measured slower spelled out than fused stay fused, and a fused cell saves work in front of its "
    "recurrence only; --keep-params and --keep-size can have more"
)
_QUANTIZED = ("DequantizeLinear", "MatMulInteger", "QLinearMatMul", "MatMulNBits", "ConvInteger", "QLinearConv")


@dataclass(frozen=True, eq=False)
class Planned:
    """What was decided and carried out, and why the rest was kept."""

    selection: Selection
    refusals: Mapping[str, str]


class Prepared(NamedTuple):
    """What several budgets of one model choose from: observed, proposed and probed once."""

    sites: list[Site]
    proposals: list[Proposal]
    refusals: dict[str, str]
    damage: Damage


def prepare(run: Run, option: str) -> Prepared:
    """What budgets of multiply-accumulates choose from.

    Raises:
        TargetError: No layer can be factorized.
    """
    sites, proposals, refusals = offers(run, run.observe(), option, working=True)
    return Prepared(sites, proposals, refusals, probed(run, proposals))


def frontiers(run: Run, prepared: Prepared) -> Iterator[tuple[str, Callable[[float], Selection | None]]]:
    """Every unit of the work of a run, and what makes the model at a share of the largest saving."""
    sites, proposals, _, damage = prepared
    for unit in ("macs", "latency") if run.problem.feeds is not None else ("macs",):
        options = options_for(proposals, _value(run, unit, "--agreement", proposals), damage)
        most = largest_saving(options)
        if most > 0:
            yield unit, partial(_finished_at, run, sites, options, most)


def _finished_at(
    run: Run, sites: Sequence[Site], options: Sequence[Option], most: float, share: float
) -> Selection | None:
    selection = at_saving(run.problem, options, share * most)
    return None if selection is None else refined(run, selection, sites)


def decide(run: Run, target: Target, prepared: Prepared | None = None) -> Planned:
    """Choose candidates that meet a target, and carry them out.

    Args:
        prepared: For a budget of multiply-accumulates, what it chooses from; made anew if None.

    Raises:
        TargetError: The target cannot be met.
    """
    problem, settings = run.problem, run.settings
    searched = settings.minimize if target.kind == "max_drop" else target.kind
    working = searched in ("keep_macs", "speedup", "latency", "macs")
    timed = searched in ("speedup", "latency")
    if prepared is None:
        sites, proposals, refusals = offers(run, run.observe(), target.option, working, target.rank, timed)
        damage = probed(run, proposals) if target.kind != "rank" else damage_of(proposals, {})
    else:
        sites, proposals, refusals, damage = prepared

    def finish(selection: Selection) -> Selection:
        return refined(run, selection, sites)

    if target.kind == "rank":
        selection = finish(carry_out(problem, _first_of_each(proposals)))
        kept = "another technique took it"
    elif target.kind in BUDGETS:
        with run.clock.step("allocate"):
            try:
                selection = meet_budget(problem, proposals, damage, target.kind, target.value)
            except TargetError as error:
                if any(site.kind == "recurrent" for site in sites) and target.kind == "keep_macs":
                    raise TargetError(f"{error}; {_FUSED}") from error
                raise
        del proposals, damage  # the analyses of what is not chosen take hundreds of megabytes of a large model
        selection = finish(selection)
        kept = "dense is the better use of the budget: other layers lose less"
    else:
        unit = "latency" if target.kind == "speedup" else settings.minimize
        value = _value(run, unit, target.option, proposals)
        with run.clock.step("search"):
            if target.kind == "speedup":
                selection = reach_speedup(problem, proposals, damage, value, target.value, finish, run.progress)
            else:
                selection = stay_within(problem, proposals, damage, value, unit, target.value, finish, run.progress)
        kept = "dense is better: too little to gain for what it would lose"
    return Planned(selection, reasons_for_kept(problem.sites, selection.choices, refusals, kept))


def offers(
    run: Run,
    statistics: Mapping[str, Mapping[str, Moments | Counts]],
    option: str,
    working: bool,
    wish: RankWish | None = None,
    timed: bool = False,
) -> tuple[list[Site], list[Proposal], dict[str, str]]:
    """Ask every technique in use at every layer that may change.

    Args:
        run: The run.
        statistics: What was observed.
        option: The target as the command line spells it, for errors.
        working: Leave out what takes no multiply-accumulates.
        wish: ``--rank``; None asks for every rank on the grid.
        timed: The target speaks of time: leave out layers of a size that was never quicker on this device.

    Returns:
        The layers asked, what is offered, and why there is nothing at the others.

    Raises:
        TargetError: There is nothing at all.
    """
    settings = run.settings
    sites, reasons = filter_sites(run.problem.sites, settings.include, settings.exclude)
    if working:
        sites, idle = with_work(sites)
        reasons |= idle
    device = device_table(run.problem.runtime, open_cache(settings.cache))
    if timed:
        sites, small = large_enough(sites, device)
        reasons |= small
    with run.clock.step("propose"):
        proposals, refusals = propose(sites, settings.techniques, statistics, wish, settings.workers)
    reasons |= refusals
    if not proposals:
        raise TargetError(f"{option} cannot be met: no layer can be factorized ({_summary(run.problem, reasons)})")
    if wish is None:
        proposals = on_grid(proposals, device)
        with run.clock.step("time"):
            cache = open_cache(settings.cache)
            proposals = quickest(run.problem, proposals, cache, run.progress, equal=not working)
            proposals = undominated(run.problem, proposals, cache, run.progress)
        if not proposals:
            raise TargetError(f"{option} cannot be met: every recurrent form measured slower than the fused operator")
    return sites, proposals, reasons


def probed(run: Run, proposals: Sequence[Proposal]) -> Damage:
    """The damage of every candidate: probed on the model's output where there are data, local otherwise."""
    curves: Mapping[int, Curve] = {}
    if run.problem.calibrate is not None:
        with run.clock.step("probe"):
            cache = open_cache(run.settings.cache)
            curves = cached_probe(run.problem, proposals, run.settings.mask, cache, run.progress)
    return damage_of(proposals, curves)


def refined(run: Run, selection: Selection, sites: Sequence[Site]) -> Selection:
    """Refit; of the layers that were kept, those among ``sites`` may get other weights."""
    problem, settings = run.problem, run.settings
    if not settings.refine or problem.calibrate is None:
        return selection
    with run.clock.step("refine"):
        factors = selection.built.factors
        found = refine_factors(problem, selection.choices, factors, settings.mask, run.progress, sites)
        return with_factors(problem, found.choices, found.factors, found.notes, found.kept)


def _value(run: Run, unit: str, option: str, proposals: Sequence[Proposal]) -> Callable[[Site, Candidate], float]:
    """What a candidate is worth to a search: microseconds, or a unit of a budget."""
    if unit == "latency":
        run.problem.require_feeds(option)
        with run.clock.step("time"):
            curves = measure_latencies(run.problem, proposals, open_cache(run.settings.cache), run.progress)
        return latency_saving(proposals, curves)
    return lambda site, candidate: saving(site, candidate, f"keep_{unit}")


def _first_of_each(proposals: Sequence[Proposal]) -> list[Choice]:
    """For a fixed rank: at every site the technique with the least error."""
    best: dict[str, Choice] = {}
    for entry in proposals:
        choice = Choice(entry, entry.candidates[0])
        name = entry.site.name
        if not entry.site.parts and (name not in best or choice.candidate.error < best[name].candidate.error):
            best[name] = choice
    return list(best.values())


def _summary(problem: Problem, reasons: Mapping[str, str]) -> str:
    """The reasons for keeping layers, the frequent ones first; those of blocks of layers where layers have none."""
    singles = {site.name for site in problem.sites if not site.parts}
    telling = {name: text for name, text in reasons.items() if not text.startswith(UNSUITED)}
    shown = [text for name, text in telling.items() if name in singles] or list(telling.values())
    counts: dict[str, int] = {}
    for text in shown or [text for name, text in reasons.items() if name in singles]:
        counts[text] = counts.get(text, 0) + 1
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    told = "; ".join(f"{count} × {text}" if count > 1 else text for text, count in ranked[:3])
    if told:
        return told
    if any(node.op_type in _QUANTIZED for scope in problem.model.scopes for node in scope.graph.node):
        return "its weights are quantized; factorize the model it was made from, and quantize the result"
    return "the model has no weights of a kind the techniques know"
