"""The allocation against brute force, against a Lagrangian, and against its own promises."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import hypothesis.strategies as st
import numpy as np
from hypothesis import given, settings

from lowrank_onnx.allocation import CELLS, Option, allocate

steady = settings(deadline=None, max_examples=80, derandomize=True)


@st.composite
def instances(draw: st.DrawFn) -> tuple[list[Option], float]:
    """Up to five sites with up to four options each, some compound ones over them, and a wish."""
    sites = [f"s{place}" for place in range(draw(st.integers(1, 5)))]
    options = []
    savings, damages = st.integers(1, 100), st.integers(0, 50)
    for name in sites:
        for number in range(draw(st.integers(0, 4))):
            options.append(Option((name, number), frozenset([name]), draw(savings), draw(damages) / 7))
    for number in range(draw(st.integers(0, 3))):
        covers = frozenset(draw(st.lists(st.sampled_from(sites), min_size=min(2, len(sites)), unique=True)))
        options.append(Option(("compound", number), covers, 2 * draw(savings), draw(damages) / 7))
    total = sum(entry.saving for entry in options) or 1
    return options, draw(st.floats(0.01, 1.1)) * total


def selections(options: Sequence[Option]) -> Iterator[tuple[Option, ...]]:
    """Every set of options that rewrites no site twice."""
    found: list[tuple[Option, ...]] = [()]
    for entry in options:
        found += [(*chosen, entry) for chosen in found if not any(entry.covers & other.covers for other in chosen)]
    yield from found


def least(options: Sequence[Option], needed: float) -> float:
    """The least damage of any selection that saves enough; infinite if none does."""
    fitting = [chosen for chosen in selections(options) if sum(entry.saving for entry in chosen) >= needed]
    return min((sum(entry.damage for entry in chosen) for chosen in fitting), default=np.inf)


@steady
@given(instances())
def test_the_least_damage_that_saves_enough(instance: tuple[list[Option], float]) -> None:
    options, needed = instance
    best = least(options, needed)
    found = allocate(options, needed)
    if found is None:
        assert best == np.inf
        return
    covered = [name for entry in found.chosen for name in entry.covers]
    assert len(covered) == len(set(covered)), "a site is rewritten twice"
    assert set(found.chosen) <= set(options)
    assert found.saving >= needed * (1 - 1e-12)
    assert np.isclose(found.saving, sum(entry.saving for entry in found.chosen))
    assert np.isclose(found.damage, sum(entry.damage for entry in found.chosen))
    # The cost axis is cut into cells: a solution may be missed that meets the wish by less than a cell a site.
    cells = sum(1 for _ in {name for entry in options for name in entry.covers})
    assert (
        best - 1e-9 <= found.damage <= least(options, needed * (1 + cells / CELLS)) + 1e-9
        or found.damage <= best + 1e-9
    )


@steady
@given(instances())
def test_deterministic_and_indifferent_to_order(instance: tuple[list[Option], float]) -> None:
    options, needed = instance
    first, second = allocate(options, needed), allocate(list(options), needed)
    assert first == second
    turned = allocate(options[::-1], needed)
    assert (first is None) == (turned is None)
    if first is not None and turned is not None:
        assert np.isclose(first.damage, turned.damage)


def lagrangian(sites: Sequence[Sequence[Option]], needed: float) -> tuple[Option, ...] | None:
    """For a price of saving every site by itself takes what is best; the price by bisection, from both ends."""
    dense = Option(None, frozenset(), 0.0, 0.0)
    found = None
    low, high = 0.0, 1e6
    for _ in range(200):
        price = (low + high) / 2
        chosen = tuple(
            min((dense, *options), key=lambda entry: entry.damage - price * entry.saving) for options in sites
        )
        if sum(entry.saving for entry in chosen) >= needed:
            found, high = chosen, price
        else:
            low = price
    return found


def test_never_worse_than_a_lagrangian() -> None:
    rng = np.random.default_rng(0)
    better = 0
    for _ in range(60):
        sites = []
        for place in range(12):
            ranks = np.arange(1, 9)
            full = rng.integers(100, 1000)
            tail = np.cumsum(rng.random(9) ** 2)[::-1][1:] * rng.random()
            sites.append(
                [Option((place, int(r)), frozenset([str(place)]), float(full * (9 - r) / 9), float(d))
                 for r, d in zip(ranks, tail, strict=True)]
            )  # fmt: skip
        whole = sum(max(entry.saving for entry in options) for options in sites)
        needed = float(rng.uniform(0.1, 0.95)) * whole
        theirs = lagrangian(sites, needed)
        ours = allocate([entry for options in sites for entry in options], needed)
        assert ours is not None and theirs is not None and ours.saving >= needed
        damage = sum(entry.damage for entry in theirs)
        assert ours.damage <= damage + 1e-9
        better += ours.damage < 0.99 * damage
    assert better > 10, "the exact solution should win now and then"


def test_nothing_needed_is_nothing_done() -> None:
    option = Option("a", frozenset(["a"]), 5.0, 0.0)
    found = allocate([option], 0.0)
    assert found is not None and found.chosen == () and found.damage == 0


def test_no_option_reaches_nothing() -> None:
    assert allocate([], 1.0) is None


def test_one_compound_option_that_saves_most() -> None:
    options = [
        Option("a", frozenset(["a"]), 10.0, 1.0),
        Option("b", frozenset(["b"]), 10.0, 1.0),
        Option("ab", frozenset(["a", "b"]), 15.0, 1.5),
        Option("bc", frozenset(["b", "c"]), 30.0, 9.0),
    ]
    for needed, keys in ((12.0, {"ab"}), (20.0, {"a", "b"}), (40.0, {"a", "bc"})):
        found = allocate(options, needed)
        assert found is not None and {entry.key for entry in found.chosen} == keys
    assert allocate(options, 40.5) is None


def test_a_hundred_sites_take_less_than_seconds() -> None:
    rng = np.random.default_rng(0)
    options = [
        Option((site, rank), frozenset([str(site)]), float(100 - rank), float(rng.random() * (100 - rank)))
        for site, rank in product(range(100), range(0, 100, 4))
    ]
    found = allocate(options, 5000.0)
    assert found is not None and found.saving >= 5000
