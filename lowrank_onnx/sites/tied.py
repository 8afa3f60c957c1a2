"""Compound sites of kind ``tied``: a table of embeddings that is the output head as well, transposed.

    e = Gather(E, i)   and   logits = h Eᵀ (+ bias)

The weight is the table (V, D); attribute ``parts`` holds the embedding and the linear site. Exporters often
store the two apart: what counts is that the values are the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lowrank_onnx.base import Site
from lowrank_onnx.model import Model
from lowrank_onnx.sites.weights import freed_parameters


def find(model: Model, singles: Sequence[Site]) -> list[Site]:
    """Return a site for every table that one embedding and one linear site share."""
    tables = [site for site in singles if site.kind == "embedding" and site.weight.ndim == 2]
    heads = [site for site in singles if site.kind == "linear" and site.weight.ndim == 2]
    found = []
    for table in tables:
        same = [head for head in heads if _is_head(table, head)]
        if len(same) == 1:
            found.append(_join(model, table, same[0]))
    return found


def _is_head(table: Site, head: Site) -> bool:
    rows = np.moveaxis(table.weight, table.attributes["axis"], 0)
    return (
        head.weight.dtype == rows.dtype
        and head.weight.shape == rows.shape[::-1]
        and np.array_equal(head.weight[:, :1], rows.T[:, :1])  # a column tells most apart without reading it all
        and np.array_equal(head.weight, rows.T)
    )


def _join(model: Model, table: Site, head: Site) -> Site:
    uses = (*table.uses, *head.uses)
    nodes = {node.name: (scope, node) for scope in model.scopes for node in scope.graph.node}
    operands = [nodes[use.node] for use in (table.uses[0], head.uses[0])]
    constants = [model.constant(scope, name) for scope, node in operands for name in node.input[:2] if name]
    weight = np.moveaxis(table.weight, table.attributes["axis"], 0)
    freed = freed_parameters(model, [entry for entry in constants if entry], frozenset(use.node for use in uses))
    return Site(
        name=f"{table.name}+tied",
        kind="tied",
        op=table.op,
        shape=tuple(weight.shape),
        weight=weight,
        uses=uses,
        parameters=max(freed, table.parameters),
        freed=freed,
        macs=head.macs,
        attributes={"parts": (table, head)},
        parts=(table.name, head.name),
    )
