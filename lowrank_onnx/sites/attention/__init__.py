"""Compound sites of kind ``attention``: the two halves of an attention block, whose heads can be made narrower.

    scores = (x Q + q) (x' K + k)ᵀ · scale   per head        half ``scores``: the layers query and key
    y = (softmax(scores + mask) (x' V + v)) O + o             half ``values``: the layers value and output

Both are found from their product on, by what the nodes do and never by their names. A head's width occurs in
no other place than these weights, the shapes that split and join the heads, and the scale.
The weight is that of the query (K, H · d) or of the output (H · d, N).

Attributes of a site:
    half: ``scores`` or ``values``; ``whole`` where one node wants both at one width (see ``Fused.whole``);
        ``matrix`` is what lies between them, without a layer (see ``Matrix.matrix``).
    parts: The single sites, (query, key) or (value, output).
    heads: H, of the queries.
    groups: Heads of the keys, or of the values; each serves H / groups heads of the queries.
    width: d, of one head.
    resizes: Reshapes whose target holds a width that changes.
    scales: Constant factors between the projections and the softmax; of ``scores`` only.
    usual: Whether the scale is ``1 / sqrt(d)``, written down or understood.
    between: Tensors that stay and change their shape.
    region: Names of the tensors that go in, and of the one that comes out behind the last node that changes.
    tables: Products with the cosines and sines of rotary positions, or the node that holds those: columns are chosen,
        never mixed.
    caches: Inputs and outputs of the model that hold keys or values and change their width with the heads.
    refusal: Why the half has to stay as it is; empty if it need not.
"""

from __future__ import annotations

from collections.abc import Sequence

from lowrank_onnx.base import Site
from lowrank_onnx.model import Model
from lowrank_onnx.shapes import Shapes
from lowrank_onnx.sites.attention.fused import Fused
from lowrank_onnx.sites.attention.matrix import Matrix
from lowrank_onnx.sites.attention.nodes import FUSED, fused_heads, not_taken
from lowrank_onnx.sites.shared_input import is_plain


def find(model: Model, shapes: Shapes, singles: Sequence[Site], allow_io_change: bool = False) -> list[Site]:
    """Return the halves of every attention block that is understood.

    Args:
        allow_io_change: Whether the width of a cache, which is an input of the model, may change.
    """
    return _found(model, shapes, singles, allow_io_change)[0]


def find_matrices(model: Model, shapes: Shapes) -> list[Site]:
    """Return what lies between the heads of every block that is spelled out: half ``matrix``."""
    sites = []
    for scope in model.scopes:
        look = Matrix(model, shapes, scope, {}, {}, False)
        products = [node for node in scope.graph.node if node.op_type == "MatMul" and look.is_attention(node, "values")]
        sites += [site for site in map(look.matrix, products) if site is not None]
    return sites


def left_alone(model: Model, shapes: Shapes, singles: Sequence[Site], allow_io_change: bool = False) -> list[str]:
    """Tell of every half that is left alone, and why."""
    sites, notes = _found(model, shapes, singles, allow_io_change)
    held = [f"heads of '{site.name}' are left alone: {site.attributes['refusal']}" for site in sites]
    return [
        *notes,
        *(
            note
            for note, site in zip(held, sites, strict=True)
            if site.attributes["caches"] and site.attributes["refusal"]
        ),
    ]


def _found(
    model: Model, shapes: Shapes, singles: Sequence[Site], allow_io_change: bool
) -> tuple[list[Site], list[str]]:
    made = {(site.uses[0].scope, site.uses[0].output): site for site in singles if is_plain(site)}
    read = {(site.uses[0].scope, site.uses[0].input): site for site in singles if is_plain(site)}
    sites, notes = [], []
    for scope in model.scopes:
        look = Fused(model, shapes, scope, made, read, allow_io_change)
        for node in scope.graph.node:
            if node.op_type == "MatMul" and node.domain in ("", "ai.onnx"):
                for half, found in (("queries and keys", look.scores(node)), ("values", look.values(node))):
                    if found is not None:
                        sites.append(found)
                    elif look.is_attention(node, half):
                        notes.append(f"{half} of '{node.name}' are left alone: not understood at {look.stuck}")
            elif fused_heads(node) is not None:
                found_here = look.whole(node) if node.op_type == "GroupQueryAttention" else look.fused(node)
                sites += found_here
                if not found_here:
                    notes.append(
                        f"heads of {node.op_type} '{node.name}' are left alone: the layers around it, or what "
                        "becomes of its cache, are not understood"
                    )
            elif node.op_type in FUSED:
                notes.append(f"heads of {node.op_type} '{node.name}' are left alone: {not_taken(node)}")
    return sites, notes
