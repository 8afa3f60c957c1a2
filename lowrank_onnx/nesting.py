"""Plans for several budgets that share their factors: a smaller one takes prefixes of what a larger one stores.

The smallest budget is met as it would be alone. Above it a layer may only gain rank, or stay dense: going down
instead, from the largest, a small level inherits techniques that were chosen where nearly nothing had to be saved,
and loses most of its quality to them. The largest level is refined. The factors of a smaller rank are
the leading columns of the larger ones (Eckart and Young: of one spectrum every prefix is the best layer of its
rank), and each level has biases of its own, which give the mean of the output back. Where the levels would store
more beside the largest one than a file may, those between the smallest and the largest store nothing: each of their
layers is the one or the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from lowrank_onnx.allocation import Option, allocate
from lowrank_onnx.base import Candidate, Counts, Factors, Moments, Site
from lowrank_onnx.budget import Damage, Selection, amount, meet_budget, saving, with_factors
from lowrank_onnx.building import Choice
from lowrank_onnx.errors import LowRankError
from lowrank_onnx.level_files import LARGER
from lowrank_onnx.levels import is_leading
from lowrank_onnx.linalg import Array
from lowrank_onnx.patches import as_linear
from lowrank_onnx.problem import Problem
from lowrank_onnx.proposals import Proposal

Statistics = Mapping[str, Mapping[str, Moments | Counts]]

_SPENT = 0.9
"""Of what a level costs, how much one made of the layers of two others has to cost: few layers come in large steps."""

_WORSE = 1.05
"""A prefix may lose this much more than factors of the level's own would, before the level gets its own."""


def check_levels(levels: Sequence[float]) -> tuple[float, ...]:
    """Return the budgets, rising.

    Raises:
        LowRankError: There are fewer than two, equal ones, or one is not in (0, 1].
    """
    try:
        rising = tuple(sorted(float(level) for level in levels))
    except (TypeError, ValueError) as error:
        raise LowRankError(f"levels must be several numbers, such as (0.3, 0.5, 0.7); got {levels!r}") from error
    if len(rising) < 2 or len(set(rising)) < len(rising) or not 0 < rising[0] <= rising[-1] <= 1:
        told = ",".join(f"{level:g}" for level in levels)
        raise LowRankError(f"--levels must be two or more different shares in (0, 1], such as 0.3,0.5,0.7; got {told}")
    return rising


def nested_levels(
    problem: Problem,
    proposals: Sequence[Proposal],
    damage: Damage,
    kind: str,
    shares: Sequence[float],
    statistics: Statistics,
    finish: Callable[[Selection], Selection],
) -> list[Selection]:
    """Meet several budgets with nested ranks.

    Args:
        kind: ``keep_macs``, ``keep_params`` or ``keep_size``.
        shares: Rising.
        statistics: Moments of the sites; for biases, and to judge prefixes.
        finish: Refinement of the largest level.

    Returns:
        A selection a share, in the order of ``shares``.

    Raises:
        TargetError: A budget cannot be met.
    """
    offered: Sequence[Proposal] = proposals
    plans: list[Selection] = []
    for share in shares:
        plans.append(meet_budget(problem, offered, damage, kind, share))
        offered = [replaced for entry in proposals for replaced in _above(entry, plans[-1].choices)]
    largest = finish(plans[-1])
    levels = [largest]
    for made in reversed(plans[:-1]):
        cut = _with_prefixes(problem, made, levels[-1], largest, statistics)
        # One layer that has no ranks in order of importance, and refitting has to put all of the level right.
        levels.append(finish(made) if cut is None else cut)
    levels.reverse()
    if _beside(levels) > (LARGER - 1) * largest.cost.size_bytes:
        ends = (plans[0], levels[0]), (plans[-1], largest)
        for place, share in list(enumerate(shares))[1:-1]:
            made = _between(problem, *ends, damage, kind, share)
            if amount(made.cost, kind) >= _SPENT * amount(levels[place].cost, kind):
                levels[place] = made
    return levels


def _beside(levels: Sequence[Selection]) -> int:
    """Bytes that the smaller levels store beside the highest one, a byte a number; see ``coding``."""
    known: dict[str, list[Array]] = {}
    total = 0
    for level in reversed(levels):
        for site, factors in level.built.factors.items():
            for role, value in factors.items():
                stored = known.setdefault(f"{site}/{role}", [])
                if value.dtype.kind != "f" or any(is_leading(value, whole) for whole in stored):
                    continue
                stored.append(value)
                total += 0 if level is levels[-1] else value.size
    return total


def _between(
    problem: Problem,
    low: tuple[Selection, Selection],
    high: tuple[Selection, Selection],
    damage: Damage,
    kind: str,
    share: float,
) -> Selection:
    """A level made of the layers of two others as they stand there: it stores nothing of its own.

    Args:
        low, high: Each as it was planned and as it was finished.
    """
    above = {choice.proposal.site.name: choice.candidate for choice in high[0].choices}
    options = []
    for choice in low[0].choices:
        site, candidate = choice.proposal.site, choice.candidate
        saved, lost = saving(site, candidate, kind), damage(candidate)
        if site.name in above:
            saved -= saving(site, above[site.name], kind)
            lost -= damage(above[site.name])
        if saved > 0:
            options.append(Option(site.name, frozenset(site.covers), saved, max(lost, 0.0)))
    smaller, larger = ({choice.proposal.site.name: choice for choice in end[1].choices} for end in (low, high))
    allowed = share * amount(problem.cost, kind)
    needed = amount(high[1].cost, kind) - allowed
    while (allocation := allocate(options, needed)) is not None:
        taken = {option.key for option in allocation.chosen}
        parts = [(low[1] if name in taken else high[1], name) for name in smaller if name in taken or name in larger]
        choices = [smaller[name] if part is low[1] else larger[name] for part, name in parts]
        factors = {name: part.built.factors[name] for part, name in parts}
        covered = {name for choice in choices for name in choice.proposal.site.covers}
        kept = [choice for choice in high[1].kept if choice.proposal.site.name not in covered]
        factors |= {choice.proposal.site.name: high[1].built.factors[choice.proposal.site.name] for choice in kept}
        selection = with_factors(problem, choices, factors, {}, kept)
        excess = amount(selection.cost, kind) - allowed
        if excess <= 0:
            return selection
        needed += excess
    return low[1]


def _above(entry: Proposal, below: Sequence[Choice]) -> Iterable[Proposal]:
    """A proposal with the candidates a larger level may take; none where the smaller one took another."""
    for choice in below:
        if choice.proposal.site is entry.site and choice.proposal.technique == entry.technique:
            fitting = tuple(candidate for candidate in entry.candidates if is_nested(choice.candidate, candidate))
            yield dataclasses.replace(entry, candidates=fitting)


def is_nested(smaller: Candidate, larger: Candidate) -> bool:
    """Whether one candidate is made like another, and no rank of it is larger."""
    return (
        smaller.technique == larger.technique
        and smaller.options == larger.options
        and len(smaller.ranks) == len(larger.ranks)
        and all(low <= high for low, high in zip(smaller.ranks, larger.ranks, strict=True))
    )


def _with_prefixes(
    problem: Problem, made: Selection, above: Selection, largest: Selection, statistics: Statistics
) -> Selection | None:
    """Put prefixes of the factors of the level above in place of the level's own; None where one does not serve."""
    factors = dict(made.built.factors)
    taken = {choice.proposal.site.name: choice for choice in above.choices}
    for choice in made.choices:
        site = choice.proposal.site
        present = taken.get(site.name)
        if present is None:
            continue  # dense above: nothing to share
        shared = _shared(choice, factors[site.name], present, above.built.factors[site.name], statistics)
        if shared is None:
            return None
        factors[site.name] = shared
    covered = {name for choice in made.choices for name in choice.proposal.site.covers}
    kept = [choice for choice in largest.kept if choice.proposal.site.name not in covered]
    factors |= {choice.proposal.site.name: largest.built.factors[choice.proposal.site.name] for choice in kept}
    return with_factors(problem, made.choices, factors, {}, kept)


def _shared(choice: Choice, own: Factors, present: Choice, larger: Factors, statistics: Statistics) -> Factors | None:
    """The factors of a choice out of those of the level above; None where own ones are better, or nothing tells."""
    if choice.candidate.ranks == present.candidate.ranks:
        return larger
    cut = {name: _prefix(larger.get(name), value) for name, value in own.items()}
    whole = {name: value for name, value in cut.items() if value is not None}
    if whole.keys() != own.keys() or whole.keys() != larger.keys():
        return None
    balanced = _balanced(choice, whole, present, larger, statistics)
    lost, alone = (_loss(choice, factors, statistics) for factors in (balanced, own))
    return balanced if lost is not None and alone is not None and lost <= _WORSE * alone else None


def _prefix(larger: Array | None, like: Array) -> Array | None:
    """The leading part of an array that has the shape of another; None where there is none."""
    if larger is None or larger.ndim != like.ndim:
        return None
    if any(high < low for high, low in zip(larger.shape, like.shape, strict=True)):
        return None
    return np.ascontiguousarray(larger[tuple(slice(size) for size in like.shape)])


def _balanced(
    choice: Choice, factors: Factors, present: Choice, larger: Factors, statistics: Statistics
) -> dict[str, Array]:
    """The factors with biases that give back what the columns left out give on average."""
    technique, site = choice.proposal.technique, choice.proposal.site
    moments = _moments(site, choice, statistics)
    biases = [name for name in factors if name.startswith("bias:")]
    if moments is None or not biases:
        return dict(factors)
    before, _ = technique.effective(site, present.candidate, larger)
    after, _ = technique.effective(site, choice.candidate, factors)
    shift = moments.mean @ (before - after)  # (N,)
    made = dict(factors)
    start = 0
    for part in technique.targets(site):
        width = as_linear(part).weight.shape[1]
        for use in part.uses:
            name = f"bias:{use.node}"
            if name in made and made[name].size == width:
                change = shift[start : start + width].reshape(made[name].shape)
                made[name] = (made[name].astype(np.float64) + change).astype(made[name].dtype)
        start += width
    return made


def _loss(choice: Choice, factors: Factors, statistics: Statistics) -> float | None:
    """E|x (W - M)|² around the mean, of the map M the factors make; without data |W - M|².

    None where the factors make another map than the weights, as with fewer units or other heads.
    """
    technique, site = choice.proposal.technique, choice.proposal.site
    parts = [as_linear(part).weight.astype(np.float64) for part in technique.targets(site)]
    if not parts:
        return None
    product, _ = technique.effective(site, choice.candidate, factors)
    wanted = np.concatenate(parts, axis=1)
    if product.shape != wanted.shape:
        return None
    moments = _moments(site, choice, statistics)
    apart = wanted - product
    if moments is None:
        return float(np.vdot(apart, apart))
    return float(np.vdot(apart, (moments.gram - np.outer(moments.mean, moments.mean)) @ apart))


def _moments(site: Site, choice: Choice, statistics: Statistics) -> Moments | None:
    targets = choice.proposal.technique.targets(site)
    found = statistics.get(site.name, {}).get(targets[0].uses[0].input) if targets else None
    return found if isinstance(found, Moments) and found.gram.ndim == 2 else None
