"""Nodes that change when the heads of an attention block get narrower: shapes and scales.

None is added, but those that choose columns of the tables of rotary positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from lowrank_onnx.base import Replacement, Site
from lowrank_onnx.linalg import Array
from lowrank_onnx.sites.attention.nodes import Turned
from lowrank_onnx.sites.attention.records import Resize, Scale, Table


def narrowed(site: Site, width: int, chains: Sequence[Replacement], columns: Array | None = None) -> Replacement:
    """Join the chains of the layers of a site with its shapes and scales, for heads of another width.

    Args:
        columns: (width,) the columns that are kept of the tables of rotary positions.
    """
    nodes = [node for chain in chains for node in chain.nodes]
    remove = [name for chain in chains for name in chain.remove]
    for resize in site.attributes["resizes"]:
        nodes += _reshape(resize, width)
        remove.append(resize.node)
    share = query_gain(site, width) ** (1 / max(len(site.attributes["scales"]), 1))
    if share != 1:
        for scale in site.attributes["scales"]:
            nodes.append(_scale(scale, share))
            remove.append(scale.node)
    for place, table in enumerate(site.attributes["tables"]):
        kept = np.asarray(columns, np.int64)
        if isinstance(table, Turned):
            nodes += _turned_inside(site, table, kept)
            remove.append(table.node.name)
            continue
        nodes += _turned(site, place, table, kept)
        remove.append(table.node)
    (scope,) = {chain.scope for chain in chains}
    resized = tuple((cache.name, cache.axis, width) for cache in site.attributes["caches"])
    return Replacement(scope, tuple(remove), tuple(nodes), reshaped=tuple(site.attributes["between"]), resized=resized)


def query_gain(site: Site, width: int) -> float:
    """What the queries are multiplied by, and the scale is divided by, for heads of a new width.

    1 where the scale is not the usual ``1 / sqrt(width)``. Where it is, it stays the usual one of the new
    width: optimizers that fuse attention drop it and take the usual one of the width they find.
    """
    return float(np.sqrt(width / site.attributes["width"])) if site.attributes["usual"] else 1.0


def _reshape(resize: Resize, width: int) -> list[gs.Node]:
    pieces: list[gs.Tensor] = []
    for place, piece in enumerate(resize.pieces):
        if isinstance(piece, str):
            pieces.append(gs.Variable(piece))
            continue
        numbers = np.array(piece, np.int64)
        if place == resize.piece:
            numbers[resize.entry] = resize.unit * width
        pieces.append(gs.Constant(f"{resize.node}/heads_shape{place or ''}", numbers))
    nodes = []
    target = pieces[0]
    if len(pieces) > 1:
        target = gs.Variable(f"{resize.node}/heads_target")
        nodes.append(gs.Node("Concat", f"{resize.node}/heads_target", {"axis": 0}, pieces, [target]))
    attributes = {"allowzero": resize.allowzero} if resize.allowzero else {}
    output = gs.Variable(resize.output)
    return [
        *nodes,
        gs.Node(resize.op, f"{resize.node}/heads", attributes, [gs.Variable(resize.input), target], [output]),
    ]


def _turned(site: Site, place: int, table: Table, columns: Array) -> list[gs.Node]:
    """The product with some columns of a table, which queries and keys read alike."""
    first = next(at for at, entry in enumerate(site.attributes["tables"]) if entry.table == table.table)
    chosen = gs.Variable(f"{site.name}/table{first}")
    index = gs.Constant(f"{site.name}/columns", columns)
    gather = gs.Node("Gather", f"{site.name}/table{first}", {"axis": -1}, [gs.Variable(table.table), index], [chosen])
    product = gs.Node("Mul", f"{table.node}/heads", {}, [gs.Variable(table.input), chosen], [gs.Variable(table.output)])
    return [*([gather] if first == place else []), product]


def _turned_inside(site: Site, table: Turned, columns: Array) -> list[gs.Node]:
    """The node that turns positions, with some columns of its tables: one for every pair of columns of a head."""
    pairs = columns[::2] // 2 if table.interleaved else columns[: len(columns) // 2]
    inputs: list[gs.Tensor] = [gs.Variable(name) for name in table.node.input]
    index = gs.Constant(f"{site.name}/pairs", pairs)
    nodes = []
    for slot in table.slots:
        chosen = gs.Variable(f"{site.name}/table{slot}")
        nodes.append(gs.Node("Gather", chosen.name, {"axis": 1}, [inputs[slot], index], [chosen]))
        inputs[slot] = chosen
    attributes = {entry.name: onnx.helper.get_attribute_value(entry) for entry in table.node.attribute}
    outputs = [gs.Variable(name) for name in table.node.output]
    same = gs.Node(table.node.op_type, f"{table.node.name}/heads", attributes, inputs, outputs, table.node.domain)
    return [*nodes, same]


def _scale(scale: Scale, share: float) -> gs.Node:
    # The queries were multiplied by the share: take it out of the factor again.
    value = scale.value.astype(np.float64) * (share if scale.op == "Div" else 1 / share)
    constant = gs.Constant(f"{scale.node}/heads_scale", np.asarray(value, scale.value.dtype))
    return gs.Node(
        scale.op, f"{scale.node}/heads", {}, [gs.Variable(scale.input), constant], [gs.Variable(scale.output)]
    )
