"""Sites of kind ``convolution``: Conv and ConvTranspose with a constant kernel, in any number of dimensions.

The weight stays as ONNX stores it: Conv (outputs, inputs/group, *kernel); ConvTranspose (inputs,
outputs/group, *kernel).

Attributes of a site:
    transposed: True for ConvTranspose.
    group, strides, dilations, pads, auto_pad, output_padding, output_shape: As the node has them, with the
        defaults of ONNX filled in; pads are begins then ends.
    addends: By node, the name of the tensor that is its bias; empty without one.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from onnx import NodeProto

from lowrank_onnx.base import Site, Use
from lowrank_onnx.model import Constant, Model, Scope
from lowrank_onnx.shapes import Shapes, shape_of
from lowrank_onnx.sites.weights import (
    WEIGHT_DTYPES,
    attribute,
    attribute_list,
    attribute_text,
    freed_parameters,
    require_finite,
)


def find(model: Model, shapes: Shapes) -> list[Site]:
    """Return the convolution sites. Nodes that share a kernel and its geometry are one site."""
    groups: dict[tuple[Any, ...], list[tuple[Scope, NodeProto, Constant, dict[str, Any]]]] = {}
    for scope in model.scopes:
        for node in scope.graph.node:
            if node.domain not in ("", "ai.onnx") or node.op_type not in ("Conv", "ConvTranspose"):
                continue
            constant = model.constant(scope, node.input[1])
            if constant is None or constant.value.ndim < 3 or constant.value.dtype not in WEIGHT_DTYPES:
                continue
            geometry = _geometry(node, constant.value.ndim - 2)
            groups.setdefault((constant.identity, *sorted(geometry.items())), []).append(
                (scope, node, constant, geometry)
            )
    return [_site(model, shapes, group) for group in groups.values()]


def _geometry(node: NodeProto, dims: int) -> dict[str, Any]:
    ones, zeros = (1,) * dims, (0,) * dims
    return {
        "transposed": node.op_type == "ConvTranspose",
        "group": int(attribute(node, "group", 1)),
        "strides": attribute_list(node, "strides") or ones,
        "dilations": attribute_list(node, "dilations") or ones,
        "pads": attribute_list(node, "pads") or zeros + zeros,
        "auto_pad": attribute_text(node, "auto_pad", "NOTSET"),
        "output_padding": attribute_list(node, "output_padding") or zeros,
        "output_shape": attribute_list(node, "output_shape"),
    }


def _site(model: Model, shapes: Shapes, group: list[tuple[Scope, NodeProto, Constant, dict[str, Any]]]) -> Site:
    _, first, constant, geometry = group[0]
    require_finite(constant.value, first.input[1], first.name)
    uses = tuple(_use(model, shapes, scope, node) for scope, node, _, _ in group)
    kernel = constant.value.shape[2:]
    macs = [convolution_macs(use, kernel, constant.value.shape[1], bool(geometry["transposed"])) for use in uses]
    return Site(
        name=first.name,
        kind="convolution",
        op=first.op_type,
        shape=tuple(constant.value.shape),
        weight=constant.value,
        uses=uses,
        parameters=constant.value.size,
        freed=freed_parameters(model, [constant], frozenset(use.node for use in uses)),
        macs=None if any(entry is None for entry in macs) else sum(entry for entry in macs if entry is not None),
        attributes=geometry
        | {"addends": {node.name: node.input[2] if len(node.input) > 2 else "" for _, node, _, _ in group}},
    )


def convolution_macs(use: Use, kernel: tuple[int, ...], second: int, transposed: bool) -> int | None:
    """Multiply-accumulates of one run: every output (Conv) or input (ConvTranspose) element meets a patch."""
    shape = use.input_shape if transposed else use.output_shape
    return None if shape is None else math.prod(shape) * second * math.prod(kernel)


def _use(model: Model, shapes: Shapes, scope: Scope, node: NodeProto) -> Use:
    bias, dynamic = None, ""
    if len(node.input) > 2 and node.input[2]:
        stored = model.constant(scope, node.input[2])
        if stored is None:
            dynamic = node.input[2]
        else:
            bias = np.asarray(stored.value).reshape(-1)
    return Use(
        node=node.name,
        also=(),
        scope=scope.path,
        input=node.input[0],
        output=node.output[0],
        raw_output=node.output[0],
        bias=bias,
        dynamic_bias=dynamic,
        input_shape=shape_of(shapes, scope, node.input[0]),
        output_shape=shape_of(shapes, scope, node.output[0]),
    )
