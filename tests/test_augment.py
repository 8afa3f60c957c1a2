"""Copies with exchanged tokens: only words change, and only where the data show little of the vocabulary."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from lowrank_onnx.augment import SHARE, exchange_tokens
from lowrank_onnx.data import Dataset
from lowrank_onnx.problem import pose
from lowrank_onnx.runtime import Runtime

CLS, SEP, PAD = 1, 2, 0
SAMPLES, LENGTH = 40, 24


def reader(vocabulary: int) -> onnx.ModelProto:
    """Tokens looked up in a table, times the mask."""
    table = np.random.default_rng(0).standard_normal((vocabulary, 4)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"], "look_up"),
        helper.make_node("Cast", ["attention_mask"], ["weights"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["weights", "last"], ["wide"]),
        helper.make_node("Mul", ["rows", "wide"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "reader",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["N", LENGTH]) for name in ("ids", "attention_mask")],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", LENGTH, 4])],
        [numpy_helper.from_array(table, "table"), numpy_helper.from_array(np.array([2], np.int64), "last")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def sentences(vocabulary: int) -> dict[str, np.ndarray]:
    """CLS, words below 200, SEP, padding."""
    rng = np.random.default_rng(1)
    ids, mask = np.zeros((SAMPLES, LENGTH), np.int64), np.zeros((SAMPLES, LENGTH), np.int64)
    for row, length in enumerate(rng.integers(6, LENGTH + 1, SAMPLES)):
        ids[row, :length] = rng.integers(3, min(vocabulary, 200), length)
        ids[row, 0], ids[row, length - 1], mask[row, :length] = CLS, SEP, 1
    return {"ids": ids, "attention_mask": mask}


def training(vocabulary: int, augment: bool = True) -> tuple[Dataset, Dataset]:
    problem = pose(reader(vocabulary), Runtime(threads=1), sentences(vocabulary), augment=augment)
    assert problem.calibrate is not None and problem.training is not None
    return problem.calibrate, problem.training


def test_words_are_exchanged_and_nothing_else() -> None:
    given, made = training(1000)
    assert len(made) == 2 * len(given)
    old, new = given.inputs["ids"].array, made.inputs["ids"].array
    np.testing.assert_array_equal(new[:SAMPLES], old)
    np.testing.assert_array_equal(made.inputs["attention_mask"].array[SAMPLES:], given.inputs["attention_mask"].array)
    changed = new[SAMPLES:] != old
    assert not changed[np.isin(old, (CLS, SEP, PAD))].any()
    words = ~np.isin(old, (CLS, SEP, PAD))
    assert abs(changed[words].mean() - SHARE) < 0.05
    assert new.min() >= 0 and new.max() < 1000
    assert (new[SAMPLES:][changed] >= 200).mean() > 0.7  # drawn from the whole vocabulary


def test_samples_stay_in_step() -> None:
    given, made = training(1000)
    for place in (0, SAMPLES - 1):
        kept = np.isin(given.feeds(place)["ids"], (CLS, SEP, PAD))
        np.testing.assert_array_equal(made.feeds(SAMPLES + place)["ids"][kept], given.feeds(place)["ids"][kept])


@pytest.mark.parametrize(("vocabulary", "augment"), [(220, True), (1000, False)])
def test_nothing_is_made_where_it_is_not_wanted(vocabulary: int, augment: bool) -> None:
    given, made = training(vocabulary, augment)
    assert made is given


def test_same_seed_same_tokens() -> None:
    problem = pose(reader(1000), Runtime(threads=1), sentences(1000))
    assert problem.calibrate is not None and problem.training is not None
    again = exchange_tokens(problem.calibrate, problem.sites, None, problem.seed)
    other = exchange_tokens(problem.calibrate, problem.sites, None, problem.seed + 1)
    assert again is not None and other is not None
    np.testing.assert_array_equal(again.inputs["ids"].array, problem.training.inputs["ids"].array)
    assert (other.inputs["ids"].array != again.inputs["ids"].array).any()
