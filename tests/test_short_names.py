"""Short names: the same answers, fewer bytes, and nothing that meets another of its name."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from lowrank_onnx.linalg import Array
from lowrank_onnx.short_names import shorten_names
from tests.builders import build, falling

BRANCHES = """g (float[n,8] first_input, bool choice) => (float[n,4] the_answer) {
  hidden_layer = MatMul(first_input, weight_of_the_layer)
  hidden_activation = Relu(hidden_layer)
  the_answer = If (choice) <
    then_branch = yes () => (float[n,4] result_here) {
      doubled = Add(hidden_activation, hidden_activation)
      result_here = Add(doubled, shift_of_the_answer)
    },
    else_branch = no () => (float[n,4] result_here) { result_here = Neg(hidden_layer) }
  >
}"""


def branching() -> onnx.ModelProto:
    shift = np.arange(4, dtype=np.float32)
    proto = build(BRANCHES, {"weight_of_the_layer": falling(8, 4), "shift_of_the_answer": shift})
    proto.graph.value_info.append(helper.make_tensor_value_info("hidden_layer", TensorProto.FLOAT, ["n", 4]))
    for place, node in enumerate(proto.graph.node):
        node.name = f"node_{place}"
    return proto


def answers(proto: onnx.ModelProto, choice: bool) -> Array:
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {"first_input": np.ones((3, 8), np.float32), "choice": np.array(choice)}
    return np.asarray(session.run(["the_answer"], feeds)[0])


def test_answers_stay_and_bytes_go() -> None:
    """Branches read tensors from around them, and both call their own by one name."""
    proto, before = branching(), branching()
    shorten_names(proto)
    onnx.checker.check_model(proto, full_check=True)
    for choice in (True, False):
        np.testing.assert_array_equal(answers(proto, choice), answers(before, choice))
    assert not np.array_equal(answers(proto, True), answers(proto, False))
    assert proto.ByteSize() < before.ByteSize()
    assert all(len(tensor.name) == 1 for tensor in proto.graph.initializer)


def test_inputs_outputs_and_nodes_keep_their_names() -> None:
    proto = branching()
    shorten_names(proto)
    assert [value.name for value in (*proto.graph.input, *proto.graph.output)] == [
        "first_input",
        "choice",
        "the_answer",
    ]
    assert [node.name for node in proto.graph.node] == ["node_0", "node_1", "node_2"]
    assert proto.graph.value_info[0].name == proto.graph.node[0].output[0], "shapes still tell of their tensor"


def test_no_short_name_meets_an_input_of_that_name() -> None:
    text = "g (float[n,4] b, float[n,4] a) => (float[n,4] c) { long = Add(a, b) longer = Neg(long) c = Relu(longer) }"
    proto = build(text, {})
    shorten_names(proto)
    onnx.checker.check_model(proto, full_check=True)
    names = [name for node in proto.graph.node for name in node.output]
    assert len(set(names)) == 3 and set(names).isdisjoint({"a", "b"}) and names[-1] == "c"


def test_an_output_left_out_stays_out() -> None:
    text = "g (float[n,4] x) => (float[n,2] y) { y, places = TopK <axis = -1> (x, two) }"
    proto = build(text, {"two": np.array([2], np.int64)})
    proto.graph.node[0].output[1] = ""
    shorten_names(proto)
    assert list(proto.graph.node[0].output) == ["y", ""]
