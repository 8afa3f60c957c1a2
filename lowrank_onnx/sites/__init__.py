"""Where weights meet data, one kind a file."""

from __future__ import annotations

from lowrank_onnx.base import Site
from lowrank_onnx.model import Model
from lowrank_onnx.shapes import Shapes
from lowrank_onnx.sites import (
    attention,
    convolution,
    embedding,
    feedforward,
    linear,
    recurrent,
    shared_input,
    shared_layers,
    tied,
)

_FINDERS = (linear.find, convolution.find, embedding.find, recurrent.find)


def find_sites(model: Model, shapes: Shapes, allow_io_change: bool = False, matrices: bool = False) -> list[Site]:
    """Return every site of the model, in the order of its nodes; compound ones beside the single ones.

    With ``matrices`` also what lies between the heads of attention blocks, which holds no weight.

    Raises:
        ModelError: A weight holds NaN or Inf.
    """
    order = {node.name: place for place, node in enumerate(n for scope in model.scopes for n in scope.graph.node)}
    found = [site for finder in _FINDERS for site in finder(model, shapes)]
    found.sort(key=lambda site: order[site.uses[0].node])
    singles = list(found)
    found += shared_input.find(singles) + feedforward.find(model, singles)
    found += shared_layers.find(model, found)
    found += attention.find(model, shapes, [site for site in found if not site.parts], allow_io_change)
    found += attention.find_matrices(model, shapes) if matrices else []
    found += tied.find(model, [site for site in found if not site.parts])
    return sorted(found, key=lambda site: order[site.uses[0].node])
