"""Nodes that carry out a lookup in a factorized table, and the table as rows.

    Gather(W, i) along an axis   becomes   Gather(A, i) @ B   with A (V, r), B (r, F)

The rows of the table lie along the axis looked up, whatever the other axes are; they are put back behind.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from lowrank_onnx.base import Counts, Replacement, Site, Use
from lowrank_onnx.linalg import Array


def as_rows(site: Site) -> Array:
    """The table of an embedding site as (V, F): one row for every index."""
    axis = site.attributes["axis"]
    return np.moveaxis(site.weight, axis, 0).reshape(site.weight.shape[axis], -1)


def as_table(site: Site, rows: Array) -> Array:
    """The inverse of ``as_rows``."""
    axis = site.attributes["axis"] % site.weight.ndim
    others = np.delete(site.weight.shape, axis)
    return np.ascontiguousarray(np.moveaxis(rows.reshape(len(rows), *others), 0, axis))


def is_plain(site: Site) -> bool:
    """Whether the rows need no rearranging behind the product: a matrix looked up along its first axis."""
    return site.weight.ndim == 2 and site.attributes["axis"] % 2 == 0


def lookups(site: Site) -> int | None:
    """Lookups in one run, of all uses; None where the shape of the indices is unknown."""
    shapes = [use.input_shape for use in site.uses]
    return None if any(shape is None for shape in shapes) else sum(math.prod(shape or ()) for shape in shapes)


def pooled_counts(site: Site, counts: Mapping[str, Counts]) -> Counts:
    """Counts over all uses of a table."""
    parts = [counts[use.input] for use in site.uses]
    total, held = (np.sum([getattr(part, name) for part in parts], axis=0) for name in ("total", "held"))
    return Counts(sum(part.rows for part in parts), total, held)


def dense_lookup(site: Site, use: Use, name: str) -> Replacement:
    """The same lookup in a table of its own, constant ``name``."""
    table = gs.Constant(name, site.weight)
    inputs = [table, gs.Variable(use.input)]
    node = gs.Node("Gather", f"{use.node}/dense", {"axis": site.attributes["axis"]}, inputs, [gs.Variable(use.output)])
    return Replacement(use.scope, (use.node,), (node,))


def gathered(use: Use, name: str, table: Array, indices: gs.Tensor, suffix: str) -> tuple[gs.Node, gs.Variable]:
    """A Gather of rows of a constant, and what it gives."""
    made = gs.Variable(f"{use.node}/{suffix}")
    inputs = [gs.Constant(name, table), indices]
    return gs.Node("Gather", f"{use.node}/gather_{suffix}", {"axis": 0}, inputs, [made]), made


def rearranged(site: Site, use: Use, rows: gs.Variable, last: gs.Node) -> list[gs.Node]:
    """``last`` computes ``rows`` (*indices, F); the nodes that bring them to the shape Gather gave."""
    if is_plain(site):
        last.outputs = [gs.Variable(use.output)]
        return [last]
    assert use.input_shape is not None, "refused"
    axis, count = site.attributes["axis"] % site.weight.ndim, len(use.input_shape)
    others = np.delete(site.weight.shape, axis).tolist()
    nodes, current = [last], rows
    last.outputs = [rows]
    if len(others) > 1:
        shape = gs.Constant(f"{use.node}/shape", np.array([0] * count + others, np.int64))  # 0 keeps an axis
        split = gs.Variable(f"{use.node}/split")
        nodes.append(gs.Node("Reshape", f"{use.node}/reshape", {}, [current, shape], [split]))
        current = split
    order = _order(axis, count, len(others))
    if order == sorted(order):
        nodes[-1].outputs = [gs.Variable(use.output)]
        return nodes
    nodes.append(gs.Node("Transpose", f"{use.node}/transpose", {"perm": order}, [current], [gs.Variable(use.output)]))
    return nodes


def _order(axis: int, indices: int, others: int) -> list[int]:
    """Where the axes (*indices, *others) go: the indices take the place of ``axis``."""
    behind: Sequence[int] = range(indices, indices + others)
    return [*behind[:axis], *range(indices), *behind[axis:]]
