"""Ten integers in one: what a runtime takes apart is what was put in."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from lowrank_onnx.linalg import Array
from lowrank_onnx.packing import LARGEST, constants, pack, part, unpack


def taken_apart(numbers: list[Array], opset: int) -> list[Array]:
    """What onnxruntime makes of packed arrays."""
    nodes, told = unpack("p", [entry.size for entry in numbers], "z", opset)
    stored = [numpy_helper.from_array(pack(numbers), "p"), *constants("z"), *told]
    outputs = [
        helper.make_tensor_value_info(part("p", place), TensorProto.FLOAT, None) for place in range(len(numbers))
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [], outputs, stored), opset_imports=[helper.make_opsetid("", opset)], ir_version=7
    )
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [np.asarray(value) for value in session.run(None, {})]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 47), min_size=1, max_size=5), st.integers(0, 99), st.sampled_from([10, 12, 13, 18]))
def test_a_runtime_takes_apart_what_was_packed(sizes: list[int], seed: int, opset: int) -> None:
    rng = np.random.default_rng(seed)
    numbers = [rng.integers(-LARGEST, LARGEST + 1, (size, 1)).astype(np.int8) for size in sizes]
    found = taken_apart(numbers, opset)
    assert all(np.array_equal(a, b.ravel()) for a, b in zip(found, numbers, strict=True))


@pytest.mark.parametrize("extreme", [-LARGEST, LARGEST])
def test_the_largest_numbers_fit(extreme: int) -> None:
    numbers = np.full((3, 10), extreme, np.int8)
    assert (pack([numbers]) >= 0).all(), "nothing ran over"
    assert np.array_equal(taken_apart([numbers], 13)[0], numbers.ravel())


def test_ten_numbers_take_eight_bytes() -> None:
    numbers = [np.zeros((20, 5), np.int8), np.zeros(51, np.int8)]
    packed = pack(numbers)
    assert packed.dtype == np.int64 and packed.shape == (16, 1)
