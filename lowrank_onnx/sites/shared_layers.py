"""Compound sites of kind ``shared_layers``: layers of one shape in neighbouring blocks, each with an input of its own.

Attribute ``units`` holds what reads one tensor: sites of kind ``shared_input``, such as query, key and value, or
single linear layers; ``parts`` all single sites in that order. The weight is that of the first unit alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from lowrank_onnx.base import Site
from lowrank_onnx.model import Model, Scope
from lowrank_onnx.sites.shared_input import is_plain


def find(model: Model, found: Sequence[Site]) -> list[Site]:
    """Return one site per pair of neighbours: the first and second of a shape, the third and fourth, and so on.

    Args:
        found: Single sites, and those of kind ``shared_input``; both in the order of the graph.
    """
    joined = [site for site in found if site.kind == "shared_input"]
    covered = {name for site in joined for name in site.parts}
    order = {site.name: place for place, site in enumerate(found) if not site.parts}
    units = [*joined, *(site for site in found if site.name not in covered and not site.parts and is_plain(site))]
    rows: dict[tuple[object, ...], list[Site]] = {}
    for unit in sorted(units, key=lambda unit: order[unit.covers[0]]):
        if not unit.uses[0].scope:
            widths = tuple(part.weight.shape[1] for part in parts_of(unit))
            rows.setdefault((unit.weight.shape[0], widths, unit.weight.dtype.str), []).append(unit)
    main = model.scopes[0]
    pairs = [pair for row in rows.values() for pair in zip(row[::2], row[1::2], strict=False)]
    return [_join(pair) for pair in pairs if _follows(main, *pair)]


def parts_of(unit: Site) -> tuple[Site, ...]:
    """The single sites of a unit."""
    return tuple(unit.attributes["parts"]) if unit.kind == "shared_input" else (unit,)


def _follows(scope: Scope, first: Site, second: Site) -> bool:
    """Whether the input of one unit depends on the outputs of the other: neighbours, not twins."""
    wanted, seen, stack = {use.output for use in first.uses}, {""}, [second.uses[0].input]
    while stack:
        name = stack.pop()
        if name in wanted:
            return True
        if name not in seen:
            seen.add(name)
            node = scope.producers.get(name)
            stack += [] if node is None else list(node.input)
    return False


def _join(units: tuple[Site, Site]) -> Site:
    first = units[0]
    parts = tuple(part for unit in units for part in parts_of(unit))
    macs = [unit.macs for unit in units]
    return Site(
        name=f"{first.name}&{units[1].name}",
        kind="shared_layers",
        op=first.op,
        shape=(first.weight.shape[0], sum(unit.weight.shape[1] for unit in units)),
        weight=first.weight,
        uses=tuple(part.uses[0] for part in parts),
        parameters=sum(unit.parameters for unit in units),
        freed=sum(unit.freed for unit in units),
        macs=None if None in macs else sum(entry for entry in macs if entry is not None),
        attributes={"units": units, "parts": parts},
        parts=tuple(part.name for part in parts),
    )
