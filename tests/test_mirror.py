"""Mirrored copies: only of images, only where the model takes them for alike and the images show few positions."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import ModelProto

from lowrank_onnx import compress
from lowrank_onnx.linalg import Array
from lowrank_onnx.problem import Problem, pose
from tests.builders import RUNTIME, build

SAMPLES, WIDTH = 20, 12
SCORES = "p = GlobalAveragePool(h) y = Flatten(p)"


def kernel(even: bool) -> Array:
    """(24, 8, 3, 3), the same read from the right if ``even``."""
    values = np.random.default_rng(0).standard_normal((24, 8, 3, 3)).astype(np.float32)
    return values + values[..., ::-1] if even else values - values[..., ::-1]


def model(
    even: bool = True, behind: str = "y = Relu(h)", outputs: str = f"float[n,24,{WIDTH},{WIDTH}] y"
) -> ModelProto:
    text = f"g (float[n,8,{WIDTH},{WIDTH}] x) => ({outputs}) {{ [conv] h = Conv<pads=[1,1,1,1]>(x, w) {behind} }}"
    return build(text, {"w": kernel(even)})


def images(count: int = SAMPLES) -> Array:
    return np.random.default_rng(1).standard_normal((count, 8, WIDTH, WIDTH)).astype(np.float32) + 1


def posed(proto: ModelProto, x: Array, augment: bool = True) -> Problem:
    return pose(proto, RUNTIME, {"x": x}, augment=augment)


def copies(problem: Problem) -> int:
    assert problem.calibrate is not None and problem.training is not None
    return len(problem.training) - len(problem.calibrate)


def test_the_copies_are_the_samples_read_from_the_right() -> None:
    x = images()
    problem = posed(model(), x)
    assert problem.training is not None and problem.genuine is not None
    assert np.array_equal(problem.training.inputs["x"].array, np.concatenate([x, x[..., ::-1]]))
    assert np.array_equal(problem.training.feeds(SAMPLES + 3)["x"], x[3:4, ..., ::-1])
    assert np.array_equal(problem.genuine.inputs["x"].array, x)


@pytest.mark.parametrize(
    ("even", "behind", "outputs", "taken"),
    [
        (True, "y = Relu(h)", f"float[n,24,{WIDTH},{WIDTH}] y", True),  # a map turns around
        (False, "y = Relu(h)", f"float[n,24,{WIDTH},{WIDTH}] y", False),
        (True, SCORES, "float[n,24] y", True),  # scores stay
        (False, SCORES, "float[n,24] y", False),
        # One of two outputs minds.
        (True, f"{SCORES} z = Slice(h, a, b, c)", f"float[n,24] y, float[n,24,{WIDTH},4] z", False),
    ],
)
def test_the_model_is_asked(even: bool, behind: str, outputs: str, taken: bool) -> None:
    proto = model(even, behind, outputs)
    if "Slice" in behind:
        for name, value in {"a": 0, "b": 4, "c": 3}.items():
            proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([value], np.int64), name))
    assert copies(posed(proto, images())) == (SAMPLES if taken else 0)


def test_nothing_is_made_where_it_is_not_wanted() -> None:
    proto = model()
    assert copies(posed(proto, images(), augment=False)) == 0
    assert copies(posed(proto, images(1))) == 0  # of one sample nothing tells what is usual
    # 72 numbers a patch and 144 positions a sample
    assert copies(posed(proto, images(49))) == 49
    assert copies(posed(proto, images(50))) == 0


def test_a_narrow_last_axis_is_no_row_of_pixels() -> None:
    proto = build(
        "g (float[n,8,12,3] x) => (float[n,24,12,3] y) { y = Conv<pads=[1,1,1,1]>(x, w) }", {"w": kernel(True)}
    )
    assert copies(posed(proto, images()[..., :3])) == 0


def test_two_inputs_may_belong_together() -> None:
    size = f"float[n,8,{WIDTH},{WIDTH}]"
    text = (
        f"g ({size} x, {size} z) => (float[n,24,{WIDTH},{WIDTH}] y) {{ s = Add(x, z) y = Conv<pads=[1,1,1,1]>(s, w) }}"
    )
    problem = pose(build(text, {"w": kernel(True)}), RUNTIME, {"x": images(), "z": images()})
    assert copies(problem) == 0


def test_the_report_tells() -> None:
    made = compress(model(), {"keep_macs": 0.7}, calibrate={"x": images()}, threads=1, cache=False)
    assert "as many copies mirrored" in made.report["data"]["note"]
    alone = compress(model(), {"keep_macs": 0.7}, calibrate={"x": images()}, threads=1, cache=False, augment=False)
    assert alone.report["data"]["note"] == ""
    assert made.plan["setting"]["augment"] and not alone.plan["setting"]["augment"]
