"""Weights in a byte a number: what they lose, what a runtime makes of them, and what is left as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from lowrank_onnx.coding import decode, encode


@given(st.integers(2, 40), st.integers(1, 40), st.integers(0, 99), st.booleans())
def test_no_number_is_further_away_than_half_a_step(rows: int, columns: int, seed: int, deep: bool) -> None:
    rng = np.random.default_rng(seed)
    value = rng.standard_normal((rows, columns, 3) if deep else (rows, columns)).astype(np.float32)
    code = encode(value)
    assert code is not None and code.numbers.dtype == np.int8 and code.numbers.shape == value.shape
    assert np.all(np.abs(code.decoded() - value) <= 0.5001 * code.scale)
    assert np.linalg.norm(code.decoded() - value) <= 0.02 * np.linalg.norm(value)


@pytest.mark.parametrize("axis", [0, 1])
def test_the_axis_along_which_sizes_differ_gets_the_scale(axis: int) -> None:
    """One scale for rows of a thousand and of one would round the small ones away."""
    sizes = np.logspace(0, 3, 32)
    value = (np.random.default_rng(0).standard_normal((32, 32)) * np.expand_dims(sizes, 1 - axis)).astype(np.float32)
    code = encode(value)
    assert code is not None and code.scale.shape == ((32, 1) if axis == 0 else (1, 32))
    lost = np.linalg.norm(code.decoded() - value, axis=1 - axis) / np.linalg.norm(value, axis=1 - axis)
    assert lost.max() < 0.02


def test_zeros_and_rows_of_zeros() -> None:
    value = np.zeros((4, 5), np.float32)
    value[2] = np.arange(5)
    for given_value in (value, 0 * value):
        code = encode(given_value)
        assert code is not None
        np.testing.assert_allclose(code.decoded(), given_value, atol=0.02)


def test_what_would_lose_too_much_is_left_as_it_is() -> None:
    value = np.random.default_rng(0).standard_normal((512, 512)).astype(np.float32)
    far = value + 20 * np.eye(512, dtype=np.float32)  # an outlier in every row and every column
    assert encode(value) is not None and encode(far[:, ::-1]) is None
    assert encode(value[0]) is None, "a vector has no other axis to average over"
    value[3, 4] = np.nan
    assert encode(value) is None


@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_a_runtime_multiplies_out_when_it_loads(kind: type, tmp_path: Path) -> None:
    value: NDArray[Any] = np.random.default_rng(0).standard_normal((48, 32)).astype(kind)
    code = encode(value)
    assert code is not None
    data_type = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    nodes = [*decode("q", "s", "w", data_type), helper.make_node("MatMul", ["x", "w"], ["y"])]
    values = [helper.make_tensor_value_info(n, data_type, ["n", size]) for n, size in (("x", 48), ("y", 32))]
    constants = [numpy_helper.from_array(code.numbers, "q"), numpy_helper.from_array(code.scale, "s")]
    model = helper.make_model(
        helper.make_graph(nodes, "g", values[:1], values[1:], constants),
        opset_imports=[helper.make_opsetid("", 13)],
        ir_version=8,
    )
    onnx.checker.check_model(model, full_check=True)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "m.onnx")
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    left = {node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node}
    assert "MatMul" in left and "Mul" not in left
    (found,) = session.run(None, {"x": np.eye(48, dtype=kind)})
    np.testing.assert_array_equal(found, code.decoded().astype(kind))
