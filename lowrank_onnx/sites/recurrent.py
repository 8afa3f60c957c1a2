"""Sites of kind ``recurrent``: LSTM, GRU and RNN nodes with constant weights.

The weight is R (directions, gates * hidden, hidden); attribute ``input_weight`` is W (directions,
gates * hidden, inputs). Weights that are computed from others, beyond a change of layout, are not seen.
"""

from __future__ import annotations

import math

from lowrank_onnx.base import Site, Use
from lowrank_onnx.model import Model
from lowrank_onnx.shapes import Shapes, shape_of
from lowrank_onnx.sites.weights import WEIGHT_DTYPES, freed_parameters, require_finite


def find(model: Model, shapes: Shapes) -> list[Site]:
    """Return one site per recurrent node."""
    sites = []
    for scope in model.scopes:
        for node in scope.graph.node:
            if node.domain not in ("", "ai.onnx") or node.op_type not in ("LSTM", "GRU", "RNN"):
                continue
            w, r = model.constant(scope, node.input[1]), model.constant(scope, node.input[2])
            if w is None or r is None or w.value.dtype not in WEIGHT_DTYPES or w.value.ndim != 3:
                continue
            require_finite(w.value, node.input[1], node.name)
            require_finite(r.value, node.input[2], node.name)
            shape = shape_of(shapes, scope, node.input[0])
            use = Use(
                node=node.name,
                also=(),
                scope=scope.path,
                input=node.input[0],
                output=node.output[0],
                raw_output=node.output[0],
                input_shape=shape,
            )
            size = w.value.size + r.value.size
            sites.append(
                Site(
                    name=node.name,
                    kind="recurrent",
                    op=node.op_type,
                    shape=tuple(r.value.shape),
                    weight=r.value,
                    uses=(use,),
                    parameters=size,
                    freed=freed_parameters(model, [w, r], frozenset([node.name])),
                    macs=None if shape is None else math.prod(shape[:2]) * size,
                    attributes={"input_weight": w.value},
                )
            )
    return sites
