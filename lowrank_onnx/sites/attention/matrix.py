"""What lies between the heads of a block that is spelled out: scores, scale and softmax, without a weight."""

from __future__ import annotations

import math

import numpy as np
from onnx import NodeProto

from lowrank_onnx.base import Site, Use
from lowrank_onnx.shapes import shape_of
from lowrank_onnx.sites.attention.look import Look
from lowrank_onnx.sites.attention.records import PASSES_ON, POINTWISE


class Matrix(Look):
    """A graph in which what lies between the heads is found."""

    def matrix(self, context: NodeProto) -> Site | None:
        """What lies between queries, keys and values and ``context``: scores, scale and softmax, no weight."""
        before = self.scope.producers.get(context.input[0])
        nodes, factor, masked = [context.name], 1.0, ""
        name = context.input[0]
        while before is not None and before.op_type != "MatMul":
            alone = self.read_once(name)
            if not alone or before.op_type not in POINTWISE | {"Softmax"}:
                return None
            nodes.append(before.name)
            scale = self.scale(before) if before.op_type in ("Mul", "Div") else None
            factor *= 1.0 if scale is None else scale.factor
            plain = before.op_type in PASSES_ON or before.op_type == "Softmax" or scale is not None
            masked = masked or ("" if plain else f"{before.op_type} '{before.name}'")
            # Of a mask and the scores, the scores come from a product.
            sources = [entry for entry in before.input if entry and self.model.constant(self.scope, entry) is None]
            name = next((entry for entry in sources if self.is_scores(entry)), "")
            before = self.scope.producers.get(name)
        softmax = [entry for entry in nodes if self.op_of(entry) == "Softmax"]
        if before is None or len(softmax) != 1:
            return None
        shapes = [shape_of(self.shapes, self.scope, entry) for entry in (*before.input, context.input[1])]
        scores = shape_of(self.shapes, self.scope, before.output[0])
        if not self.read_once(before.output[0]) or scores is None or len(scores) != 4 or None in shapes:
            return None
        query, _, value = (shape for shape in shapes if shape is not None)
        if len(query) != 4 or len(value) != 4 or not self.before_softmax(before.output[0]):
            return None
        names = (*before.input, context.input[1])
        use = Use(context.name, tuple(nodes[1:]), self.scope.path, names[0], context.output[0], context.output[0])
        name = f"{before.name}~{context.name}"
        return Site(
            name=name,
            kind="attention",
            op="MatMul",
            shape=scores,
            weight=np.zeros((0, 0), np.float32),
            uses=(use,),
            parameters=0,
            freed=0,
            macs=math.prod(scores) * (query[-1] + value[-1]),
            attributes={
                "half": "matrix",
                "nodes": (*nodes, before.name),
                "scale": factor,
                "masked": masked,
                "scores": scores,
                "lengths": (scores[2], scores[3]),
                "widths": (query[-1], value[-1]),
                "region": (names, context.output[0]),
                "opset": self.model.opset,
                "dtype": np.dtype(np.float32),
                "caches": (),
                "refusal": "it has no layers; the halves beside it do",
                "parts": (),
            },
            parts=(name,),  # itself: it is no layer to list
        )

    def is_scores(self, name: str) -> bool:
        """Whether a tensor is a product of two that depend on data, with nothing but elementwise nodes behind."""
        node = self.scope.producers.get(name)
        if node is None:
            return False
        if node.op_type == "MatMul":
            return all(self.model.constant(self.scope, entry) is None for entry in node.input)
        return node.op_type in POINTWISE and any(self.is_scores(entry) for entry in node.input if entry)
