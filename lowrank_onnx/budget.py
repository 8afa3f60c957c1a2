"""Meet a budget of parameters, bytes or multiply-accumulates with the least damage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from lowrank_onnx.allocation import Option, allocate, largest_saving
from lowrank_onnx.base import Candidate, Factors, Site
from lowrank_onnx.building import Built, Choice, build, factorize
from lowrank_onnx.cost import Cost, model_cost
from lowrank_onnx.errors import DataError, TargetError
from lowrank_onnx.model import Model
from lowrank_onnx.problem import Problem
from lowrank_onnx.proposals import Proposal
from lowrank_onnx.shapes import measure_shapes, static_shapes

UNITS = {"keep_params": "parameters", "keep_macs": "multiply-accumulates", "keep_size": "bytes"}
_NODE_BYTES = 200  # of a node with its names, about; the finished file is measured anyway
_ATTEMPTS = 8

Damage = Callable[[Candidate], float]
"""What a candidate does to the output; compared across sites."""


@dataclass(frozen=True, eq=False)
class Selection:
    """Choices that were carried out, what the model weighs with them, and what refining did to each.

    Attributes:
        kept: Layers without a choice whose dense weights refining changed.
    """

    choices: tuple[Choice, ...]
    built: Built
    cost: Cost
    notes: Mapping[str, str] = field(default_factory=dict)
    kept: tuple[Choice, ...] = ()


def carry_out(problem: Problem, choices: Sequence[Choice]) -> Selection:
    """Factorize, rewrite and weigh; in the order of the model, so that the same choices give the same bytes."""
    order = {site.name: place for place, site in enumerate(problem.sites)}
    ordered = sorted(choices, key=lambda choice: order[choice.proposal.site.name])
    return with_factors(problem, ordered, factorize(ordered))


def with_factors(
    problem: Problem,
    choices: Sequence[Choice],
    factors: Mapping[str, Factors],
    notes: Mapping[str, str] | None = None,
    kept: Sequence[Choice] = (),
) -> Selection:
    """Rewrite with factors that exist already, and weigh."""
    built = build(problem.model, [*choices, *kept], factors)
    return Selection(tuple(choices), built, weigh(problem, built), notes or {}, tuple(kept))


def weigh(problem: Problem, built: Built) -> Cost:
    """Count a rewritten model at the shapes of the problem."""
    rewritten = Model(built.proto, problem.model.path, "", "", built.size_bytes)
    if problem.feeds is None:
        return model_cost(rewritten, static_shapes(rewritten), built.size_bytes)
    return model_cost(rewritten, measure_shapes(rewritten, problem.feeds.values, problem.runtime), built.size_bytes)


def saving(site: Site, candidate: Candidate, kind: str) -> float:
    """How much of a budget's unit a candidate takes off."""
    if kind == "keep_macs":
        return 0.0 if site.macs is None or candidate.macs is None else float(site.macs - candidate.macs)
    elements = float(site.freed - candidate.parameters)
    return elements if kind == "keep_params" else elements * site.weight.itemsize - _NODE_BYTES * candidate.nodes


def amount(cost: Cost, kind: str) -> float:
    """The total of a budget's unit.

    Raises:
        DataError: Multiply-accumulates are not known.
    """
    if kind != "keep_macs":
        return float(cost.parameters if kind == "keep_params" else cost.size_bytes)
    if cost.macs is None:
        raise DataError("the multiply-accumulates are not known, as a shape inside a loop is open; use --keep-params")
    return float(cost.macs)


def options_for(
    proposals: Sequence[Proposal], value: Callable[[Site, Candidate], float], damage: Damage
) -> list[Option]:
    """Turn candidates into options of the allocation; among equals the larger rank wins."""
    options = []
    for entry in proposals:
        for candidate in entry.candidates:
            saved = value(entry.site, candidate)
            if saved > 0:
                key = Choice(entry, candidate)
                options.append(Option(key, frozenset(entry.site.covers), saved, damage(candidate)))
    return options


def meet_budget(problem: Problem, proposals: Sequence[Proposal], damage: Damage, kind: str, wish: float) -> Selection:
    """Choose ranks so that the finished model keeps at most ``wish`` of a cost.

    The allocation works with the costs of the parts; the finished model is counted, and whatever is still
    missing is asked for on top.

    Raises:
        TargetError: Even everything at its smallest rank keeps more; the message tells how much.
    """
    if kind == "keep_macs":
        problem.require_feeds("--keep-macs")
    before = amount(problem.cost, kind)
    allowed = wish * before
    options = options_for(proposals, lambda site, candidate: saving(site, candidate, kind), damage)
    needed = before - allowed
    for _ in range(_ATTEMPTS):
        allocation = allocate(options, needed)
        if allocation is None:
            break
        selection = carry_out(problem, [entry.key for entry in allocation.chosen if isinstance(entry.key, Choice)])
        excess = amount(selection.cost, kind) - allowed
        if excess <= 0:
            return selection
        needed += excess
    raise TargetError(
        f"--{kind.replace('_', '-')} {wish:g} cannot be met: {1 - largest_saving(options) / before:.3f} of the "
        f"{UNITS[kind]} is the least the techniques in use can keep"
    )


def reasons_for_kept(
    sites: Sequence[Site], selection: Sequence[Choice], given: Mapping[str, str], default: str
) -> dict[str, str]:
    """A reason for every site that no choice covers."""
    covered = {name for choice in selection for name in choice.proposal.site.covers}
    return {site.name: given.get(site.name, default) for site in sites if site.name not in covered and not site.parts}
