"""com.microsoft Attention with its layers taken out answers as before; what cannot be taken out stays."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import ModelProto

from lowrank_onnx.model import from_proto, parameter_count
from tests.builders import Array, answers, build, correlated, difference, falling, problem

OURS = ', "com.microsoft": 1'
HEAD = "g (float[n,s,16] x, int32[n,s] m) => (float[n,s,10] y) {"


def packed(attributes: str = "", inputs: str = "x, w, b, m", width: int = 16) -> ModelProto:
    text = f"{HEAD} c = com.microsoft.Attention<num_heads=4{attributes}>({inputs}) y = MatMul(c, o) }}"
    constants = {
        "w": np.concatenate([falling(16, 16), falling(16, 16, seed=1), falling(16, width, seed=2)], axis=1),
        "b": np.linspace(-1, 1, 32 + width, dtype=np.float32),
        "o": falling(width, 10),
    }
    return build(
        text, {name: value for name, value in constants.items() if name in inputs or name == "o"}, imports=OURS
    )


def feeds() -> dict[str, Array]:
    mask = np.ones((5, 7), np.int32)
    mask[1:3, 4:] = 0
    return {"x": correlated((5, 7, 16)), "m": mask}


CASES = {
    "mask": packed(),
    "no mask": packed(inputs="x, w, b"),
    "no bias": packed(inputs="x, w, , m"),
    "scale": packed(", scale=0.8"),
    "mask value": packed(", mask_filter_value=-5.0"),
    "causal": packed(", unidirectional=1"),
    "wider values": packed(", qkv_hidden_sizes=[16, 16, 24]", width=24),
}


@pytest.mark.parametrize("case", CASES)
def test_answers_as_before(case: str) -> None:
    before = CASES[case]
    content = before.SerializeToString(deterministic=True)
    after = from_proto(before).proto
    assert [node.op_type for node in after.graph.node if node.domain] == ["MultiHeadAttention"]
    onnx.checker.check_model(after)
    assert difference(answers(after, feeds())["y"], answers(before, feeds())["y"]) < 1e-5
    assert parameter_count(after) == parameter_count(before)
    assert before.SerializeToString(deterministic=True) == content


def test_both_halves_are_found() -> None:
    found = [site for site in problem(packed(), feeds()).sites if site.kind == "attention"]
    assert [(site.attributes["half"], site.attributes["width"]) for site in found] == [("scores", 4), ("values", 4)]


def test_a_constant_that_others_read_stays() -> None:
    proto = packed()
    proto.graph.node.append(onnx.helper.make_node("Identity", ["w"], ["z"]))
    proto.graph.output.append(onnx.helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, [16, 48]))
    after = from_proto(proto).proto
    assert "w" in {tensor.name for tensor in after.graph.initializer}


def test_weights_that_come_from_outside_are_left_alone() -> None:
    text = """g (float[n,s,16] x, float[16,48] w, float[48] b) => (float[n,s,16] y) {
        y = com.microsoft.Attention<num_heads=4>(x, w, b) }"""
    after = from_proto(build(text, imports=OURS)).proto
    assert [node.op_type for node in after.graph.node] == ["Attention"]


def test_a_past_is_left_alone() -> None:
    text = """g (float[n,s,16] x, float[2,n,4,t,4] p) => (float[n,s,16] y, float[2,n,4,u,4] q) {
        y, q = com.microsoft.Attention<num_heads=4, unidirectional=1>(x, w, b, , p) }"""
    constants = {"w": falling(16, 48), "b": np.zeros(48, np.float32)}
    after = from_proto(build(text, constants, imports=OURS)).proto
    assert [node.op_type for node in after.graph.node] == ["Attention"]
