"""Sites of kind ``embedding``: Gather on a constant floating-point table.

The weight is the table as the node reads it; attribute ``axis`` is the axis looked up.
"""

from __future__ import annotations

from lowrank_onnx.base import Site, Use
from lowrank_onnx.model import Model
from lowrank_onnx.shapes import Shapes, shape_of
from lowrank_onnx.sites.weights import WEIGHT_DTYPES, attribute, freed_parameters, require_finite


def find(model: Model, shapes: Shapes) -> list[Site]:
    """Return the embedding sites: tables of two axes or more, each with its Gather nodes."""
    groups: dict[tuple[str, int], list[Use]] = {}
    tables = {}
    for scope in model.scopes:
        for node in scope.graph.node:
            if node.domain not in ("", "ai.onnx") or node.op_type != "Gather":
                continue
            constant = model.constant(scope, node.input[0])
            if constant is None or constant.value.ndim < 2 or constant.value.dtype not in WEIGHT_DTYPES:
                continue
            if model.constant(scope, node.input[1]) is not None:
                continue  # a constant row is no lookup
            require_finite(constant.value, node.input[0], node.name)
            key = (constant.identity, int(attribute(node, "axis", 0)))
            tables[key] = constant
            groups.setdefault(key, []).append(
                Use(
                    node=node.name,
                    also=(),
                    scope=scope.path,
                    input=node.input[1],
                    output=node.output[0],
                    raw_output=node.output[0],
                    input_shape=shape_of(shapes, scope, node.input[1]),
                    output_shape=shape_of(shapes, scope, node.output[0]),
                )
            )
    return [
        Site(
            name=uses[0].node,
            kind="embedding",
            op="Gather",
            shape=tuple(tables[key].value.shape),
            weight=tables[key].value,
            uses=tuple(uses),
            parameters=tables[key].value.size,
            freed=freed_parameters(model, [tables[key]], frozenset(use.node for use in uses)),
            macs=0,
            attributes={"axis": key[1]},
        )
        for key, uses in groups.items()
    ]
