"""Pick at most one candidate for every site under a budget: multiple-choice knapsack, solved exactly.

The cost axis is cut into cells; costs are rounded up, so a budget is never exceeded. Dense is one of the
options of every site. Sites that overlap (a compound site and the single ones inside it) form one group,
whose options are all ways to cover it without touching a weight twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from lowrank_onnx.linalg import Array

CELLS = 20_000


@dataclass(frozen=True, slots=True)
class Option:
    """One way to treat one site.

    Attributes:
        key: What the caller knows it by; None stays dense.
        covers: Single sites it rewrites.
        saving: How much it takes off the cost, against dense; negative where it costs more.
        damage: What it does to the model's output, ≥ 0. Options that save nothing are never taken.
    """

    key: object
    covers: frozenset[str]
    saving: float
    damage: float


@dataclass(frozen=True, slots=True)
class Allocation:
    """Options chosen, with what they save and damage in all."""

    chosen: tuple[Option, ...]
    saving: float
    damage: float


def allocate(options: Sequence[Option], needed: float, cells: int = CELLS) -> Allocation | None:
    """Return the least total damage whose savings reach ``needed``; None if none reaches it.

    Deterministic; the optimum up to the width of one of ``cells`` cells of the savings needed.
    """
    if needed <= 0:
        return Allocation((), 0.0, 0.0)
    groups = [_pareto(entry) for entry in _groups(options)]
    if sum(max(entry.saving for entry in group) for group in groups) < needed:
        return None
    unit = needed / cells
    best = np.full(cells + 1, np.inf)  # least damage for savings of at least that many cells
    best[0] = 0.0
    picks: list[Array] = []
    for group in groups:
        new = np.full(cells + 1, np.inf)
        pick = np.zeros(cells + 1, np.int32)
        for number, entry in enumerate(group):
            # Rounded down: what the cells promise, the real savings keep.
            steps = int(np.floor(entry.saving / unit + 1e-9))
            moved = _shifted(best, steps) + entry.damage
            better = moved < new
            new[better] = moved[better]
            pick[better] = number
        best = new
        picks.append(pick)
    if not np.isfinite(best[cells]):
        return _most_saving(groups, needed)
    chosen: list[Option] = []
    cell = cells
    for group, pick in zip(reversed(groups), reversed(picks), strict=True):
        entry = group[pick[cell]]
        chosen.append(entry)
        steps = int(np.floor(entry.saving / unit + 1e-9))
        cell = max(cell - steps, 0)
    return _summed(list(reversed(chosen)))


def largest_saving(options: Sequence[Option]) -> float:
    """The most an allocation of these options can save."""
    return float(sum(max(entry.saving for entry in group) for group in _groups(options)))


def _shifted(best: Array, steps: int) -> Array:
    """``out[c] = best[c - steps]``; an option that saves more than c cells leaves nothing to be saved before."""
    out = np.full_like(best, best[0])
    if steps < len(best):
        out[steps:] = best[: len(best) - steps]
    return out


def _most_saving(groups: Sequence[Sequence[Option]], needed: float) -> Allocation | None:
    """What is left when rounding hides the only solution: everything at its largest saving."""
    made = _summed([max(group, key=lambda entry: (entry.saving, -entry.damage)) for group in groups])
    return made if made.saving >= needed else None


def _summed(chosen: Sequence[Option]) -> Allocation:
    real = tuple(entry for entry in chosen if entry.key is not None)
    flat: list[Option] = []
    for entry in real:
        flat.extend(entry.key if isinstance(entry.key, _Bundle) else [entry])
    return Allocation(tuple(flat), sum(entry.saving for entry in flat), sum(entry.damage for entry in flat))


class _Bundle(tuple[Option, ...]):
    """Several options of one group that are taken together."""


def _groups(options: Sequence[Option]) -> list[list[Option]]:
    """Options by connected sets of sites, each with dense and with every way to combine them."""
    parent: dict[str, str] = {}

    def find(name: str) -> str:
        while parent.setdefault(name, name) != name:
            name = parent[name]
        return name

    for entry in options:
        names = sorted(entry.covers)
        for other in names[1:]:
            parent[find(other)] = find(names[0])
        find(names[0])
    members: dict[str, list[Option]] = {}
    for entry in options:
        members.setdefault(find(min(entry.covers)), []).append(entry)
    return [_combined(group) for group in members.values()]


def _combined(group: Sequence[Option]) -> list[Option]:
    """All disjoint combinations of the options of one group, thinned to those worth having."""
    by_cover: dict[frozenset[str], list[Option]] = {}
    for entry in group:
        by_cover.setdefault(entry.covers, []).append(entry)
    if len(by_cover) == 1:
        return [_dense(), *group]
    results: list[Option] = []
    covers = sorted(by_cover, key=lambda names: (len(names), sorted(names)))
    for mask in _disjoint(covers):
        combined: list[Option] = [_dense()]
        for cover in mask:
            following = [
                Option(_Bundle((*_parts(a), *_parts(b))), a.covers | b.covers, a.saving + b.saving, a.damage + b.damage)
                for a, b in product(combined, _pareto(by_cover[cover]))
            ]
            combined = _thin(_pareto(following))
        results.extend(combined)
    return [_dense(), *results]


def _parts(entry: Option) -> tuple[Option, ...]:
    if entry.key is None:
        return ()
    return tuple(entry.key) if isinstance(entry.key, _Bundle) else (entry,)


def _disjoint(covers: Sequence[frozenset[str]]) -> list[tuple[frozenset[str], ...]]:
    """Every non-empty set of covers that do not touch each other."""
    found: list[tuple[frozenset[str], ...]] = [()]
    for cover in covers:
        found += [(*entry, cover) for entry in found if not any(cover & other for other in entry)]
    return found[1:]


def _dense() -> Option:
    return Option(None, frozenset(), 0.0, 0.0)


def _pareto(options: Sequence[Option]) -> list[Option]:
    """Without options that save no more and damage no less than another."""
    kept: list[Option] = []
    least = np.inf
    for entry in sorted(options, key=lambda entry: (-entry.saving, entry.damage)):
        if entry.damage < least:
            kept.append(entry)
            least = entry.damage
    return kept[::-1]


def _thin(options: Sequence[Option]) -> list[Option]:
    """At most a few hundred points of a frontier, evenly by saving."""
    limit = 400
    if len(options) <= limit:
        return list(options)
    places = np.unique(np.linspace(0, len(options) - 1, limit).round().astype(int))
    return [options[place] for place in places]
