"""The one module that changes a graph: copy in, sorted and clean graph out."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import ModelProto

from lowrank_onnx.base import Replacement
from lowrank_onnx.model import from_proto, serialize
from lowrank_onnx.rewrite import rewrite
from tests.builders import answers, build, correlated, falling, furthest

A, B = falling(16, 4), falling(4, 20)
TEXT = "g (float[n,16] x) => (float[n,20] y) { i = Relu(x) t = MatMul(i, w) y = Neg(t) }"
X = {"x": correlated((3, 16))}


def base() -> ModelProto:
    return build(TEXT, {"w": A @ B, "spare": np.ones(3, np.float32)})


def chain(order: int = 1) -> Replacement:
    """Two products for MatMul_1, in either order."""
    inner, out = gs.Variable("inner"), gs.Variable("t")
    nodes = [
        gs.Node("MatMul", "one", {}, [gs.Variable("i"), gs.Constant("a", A)], [inner]),
        gs.Node("MatMul", "two", {}, [inner, gs.Constant("b", B)], [out]),
    ]
    return Replacement("", ("MatMul_1",), tuple(nodes[::order]))


def test_replacement_stands_where_the_node_stood() -> None:
    model = from_proto(base())
    before = serialize(model.proto)
    made = rewrite(model, [chain()])
    assert [node.name for node in made.graph.node] == ["Relu_0", "one", "two", "Neg_2"]
    assert {tensor.name for tensor in made.graph.initializer} == {"a", "b"}
    assert serialize(model.proto) == before
    assert furthest(answers(made, X), answers(base(), X)) < 1e-5


def test_nodes_are_sorted_whatever_their_order() -> None:
    made = rewrite(from_proto(base()), [chain(-1)])
    onnx.checker.check_model(made, full_check=True)
    assert furthest(answers(made, X), answers(base(), X)) < 1e-5


def test_no_replacement_changes_nothing_but_dead_initializers() -> None:
    made = rewrite(from_proto(base()), [])
    assert list(made.graph.node) == list(from_proto(base()).proto.graph.node)
    assert [tensor.name for tensor in made.graph.initializer] == ["w"]


def test_initializers_that_are_outputs_or_read_inside_a_body_stay() -> None:
    proto = build(
        """g (float[n,16] x, bool c) => (float[n,16] y, float[16] k) {
            y = If (c) < then_branch = a () => (float[n,16] r) { r = Add(x, inside) },
                         else_branch = b () => (float[n,16] r) { r = Neg(x) } > }""",
        {"inside": np.ones(16, np.float32), "k": np.ones(16, np.float32)},
    )
    assert {tensor.name for tensor in rewrite(from_proto(proto), []).graph.initializer} == {"inside", "k"}


def test_a_replacement_of_what_is_not_there_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="nope"):
        rewrite(from_proto(base()), [Replacement("", ("nope",), ())])


def test_a_cycle_is_our_own_mistake() -> None:
    nodes = (
        gs.Node("Add", "one", {}, [gs.Variable("p"), gs.Variable("i")], [gs.Variable("t")]),
        gs.Node("Relu", "two", {}, [gs.Variable("t")], [gs.Variable("p")]),
    )
    with pytest.raises(AssertionError, match="cycle"):
        rewrite(from_proto(base()), [Replacement("", ("MatMul_1",), nodes)])


def test_shapes_of_reshaped_tensors_are_forgotten() -> None:
    proto = onnx.shape_inference.infer_shapes(base())
    assert {value.name for value in proto.graph.value_info} == {"i", "t"}
    entry = chain()
    made = rewrite(from_proto(proto), [Replacement("", entry.remove, entry.nodes, ("t",))])
    assert {value.name for value in made.graph.value_info} == {"i"}
