"""Attention through landmarks: the graph is the formula, long sequences only, no mask, only where it is near."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto

import lowrank_onnx
from lowrank_onnx.base import Site
from lowrank_onnx.decompositions.landmarks import approximate, exact, inverse, softmax
from lowrank_onnx.errors import TargetError
from lowrank_onnx.passes.nystrom import Landmarks, Nystrom
from lowrank_onnx.problem import Problem, pose
from lowrank_onnx.rewrite import rewrite
from lowrank_onnx.runtime import Runtime
from tests.builders import Array, answers, build, difference, falling

SCALE = 0.25
TEXT = """g (float[n,s,32] x) => (float[n,s,32] y) {
    a = MatMul(x, q)  b = Reshape(a, split)  qh = Transpose<perm=[0,2,1,3]>(b)
    c = MatMul(x, k)  d = Reshape(c, split)  kh = Transpose<perm=[0,2,3,1]>(d)
    e = MatMul(x, v)  f = Reshape(e, split)  vh = Transpose<perm=[0,2,1,3]>(f)
    s0 = MatMul(qh, kh)  s1 = Mul(s0, scale)  p = Softmax<axis=-1>(s1)
    h = MatMul(p, vh)  ht = Transpose<perm=[0,2,1,3]>(h)  hj = Reshape(ht, join)  y = MatMul(hj, o) }"""


def block(changes: str = "") -> ModelProto:
    text = TEXT
    if changes:
        old, new = changes.split(" -> ")
        assert old in text
        text = text.replace(old, new)
    constants: dict[str, Array] = {name: 2 * falling(32, 32, seed=seed) for seed, name in enumerate("qkvo")}
    constants |= {"split": np.array([0, 0, 2, 16]), "join": np.array([0, 0, 32]), "scale": np.array(SCALE, np.float32)}
    return build(text, {name: np.asarray(value) for name, value in constants.items()})


def smooth(length: int, count: int = 3) -> Array:
    """Sequences that change slowly, so that segments have means worth looking at."""
    steps = np.random.default_rng(0).standard_normal((count, length, 32))
    for place in range(1, length):
        steps[:, place] = 0.98 * steps[:, place - 1] + 0.2 * steps[:, place]
    return steps.astype(np.float32)


def posed(proto: ModelProto, length: int) -> Problem:
    return pose(proto, Runtime("cpu", 1), calibrate={"x": smooth(length)}, matrices=True)


def matrix(problem: Problem) -> Site:
    (site,) = [entry for entry in problem.sites if entry.attributes.get("half") == "matrix"]
    return site


@pytest.mark.parametrize(("length", "landmarks"), [(64, 8), (61, 8), (48, 48)])
def test_the_graph_is_the_formula(length: int, landmarks: int) -> None:
    problem = posed(block(), length)
    technique = Nystrom(shortest=16)
    site = matrix(problem)
    candidate = technique.candidate(site, Landmarks({}, {}), (landmarks,))
    made = rewrite(problem.model, technique.emit(site, candidate, {}))
    onnx.checker.check_model(made, full_check=True)
    feeds = {"x": smooth(length)}
    parts = answers(problem.model.proto, feeds, ["qh", "kh", "vh"])
    wanted = approximate(parts["qh"], parts["kh"], parts["vh"], SCALE, landmarks, technique.steps)
    assert difference(answers(made, feeds, ["h"])["h"], wanted) < 1e-4


def test_other_lengths_need_no_other_graph() -> None:
    problem = posed(block(), 64)
    site = matrix(problem)
    technique = Nystrom(shortest=16)
    candidate = technique.candidate(site, Landmarks({}, {}), (8,))
    made = rewrite(problem.model, technique.emit(site, candidate, {}))
    for length in (8, 37, 200):
        parts = answers(problem.model.proto, {"x": smooth(length)}, ["qh", "kh", "vh"])
        wanted = approximate(parts["qh"], parts["kh"], parts["vh"], SCALE, 8, technique.steps)
        assert difference(answers(made, {"x": smooth(length)}, ["h"])["h"], wanted) < 1e-4


def test_as_many_landmarks_as_positions_are_exact() -> None:
    rng = np.random.default_rng(0)
    query, key, value = (
        rng.standard_normal((2, 20, 8)),
        rng.standard_normal((2, 8, 20)),
        rng.standard_normal((2, 20, 8)),
    )
    wanted = exact(query, key, value, 0.35)
    assert difference(approximate(query, key, value, 0.35, 20, 30), wanted) < 1e-6
    assert difference(approximate(query, key, value, 0.35, 5, 30), wanted) > 1e-2


def test_the_inverse_is_one() -> None:
    small = softmax(2 * np.random.default_rng(0).standard_normal((3, 12, 12)))
    assert difference(inverse(small, 30) @ small, np.broadcast_to(np.eye(12), small.shape)) < 1e-8


def test_short_sequences_are_refused() -> None:
    assert "128 is too short" in str(Nystrom().refuse(matrix(posed(block(), 128))))
    assert Nystrom().refuse(matrix(posed(block(), 512))) is None


@pytest.mark.parametrize("mask", ["s2 = Add(s1, m)", "s2 = Where(w, s1, m)"])
def test_masks_are_refused(mask: str) -> None:
    """Causal ones above all: a landmark is a mean over positions to come."""
    text = f"s1 = Mul(s0, scale)  {mask}"
    proto = block(f"s1 = Mul(s0, scale)  p = Softmax<axis=-1>(s1) -> {text}  p = Softmax<axis=-1>(s2)")
    hidden = np.triu(np.ones((600, 600)), 1)
    proto.graph.initializer.append(onnx.numpy_helper.from_array((-1e9 * hidden).astype(np.float32), "m"))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(hidden == 0, "w"))
    assert "causal" in str(Nystrom().refuse(matrix(posed(proto, 600))))


def test_only_what_is_near_enough_is_taken() -> None:
    data = {"x": smooth(1024, 2)}
    options: dict[str, Any] = {"calibrate": data, "threads": 1, "cache": False, "keep_macs": 0.8}
    with pytest.raises(TargetError, match="cannot be met"):
        lowrank_onnx.compress(block(), technique=["nystrom:max_error=0.000001"], **options)
    made = lowrank_onnx.compress(block(), technique=["nystrom:max_error=0.3"], **options)
    assert made.report["ratio"]["macs"] <= 0.8
    (row,) = [row for row in made.plan["sites"] if row["decision"] == "factorized"]
    assert row["technique"] == "nystrom" and row["output_error"] <= 0.3
    applied = lowrank_onnx.apply(block(), made.plan, calibrate=data, threads=1)
    assert applied.model.SerializeToString(deterministic=True) == made.model.SerializeToString(deterministic=True)
