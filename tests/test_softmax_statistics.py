"""What is asked of layers in front of a softmax: the covariance of their columns under what they predict."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from onnx import ModelProto

from lowrank_onnx.softmax_statistics import SpreadSums, is_scores, rows_of
from tests.builders import Array, answers, build, correlated, falling, moments, problem

HEAD = "g (float[n,s,12] x) => (float[n,s,30] {name}) {{ m = MatMul(x, w)  {name} = Add(m, b) }}"


def head(name: str = "logits") -> ModelProto:
    rng = np.random.default_rng(0)
    constants = {"w": 3 * falling(12, 30), "b": rng.standard_normal(30).astype(np.float32)}
    return build(HEAD.format(name=name), constants)


def softmax(scores: Array) -> Array:
    raised = np.exp(scores.astype(np.float64) - scores.max(axis=-1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=-1, keepdims=True))


def test_the_spread_is_the_mean_covariance_of_the_columns() -> None:
    x = correlated((20, 5, 12))
    posed = problem(head(), {"x": x})
    (site,) = posed.sites
    seen = moments(posed)[site.name]["x"]
    expected = np.zeros((12, 12))
    weight = site.weight.astype(np.float64)
    for p in softmax(answers(head(), {"x": x})["logits"].reshape(-1, 30)):
        apart = weight - (weight @ p)[:, None]
        expected += (apart * p) @ apart.T / 100
    assert np.linalg.norm(seen.spread - expected) < 1e-4 * np.linalg.norm(expected)


def test_the_spread_tells_what_a_small_error_costs() -> None:
    rng = np.random.default_rng(0)
    weight, x = rng.standard_normal((6, 9)), rng.standard_normal((1, 6))
    sums = SpreadSums(weight.astype(np.float32), 0.0)
    sums.add(x, 1)
    spread, wrong = sums.spread(), 0.003 * rng.standard_normal((6, 6))
    assert spread is not None
    p, q = softmax(x @ weight), softmax(x @ (weight + wrong @ weight))
    kl = float(np.sum(p * np.log(p / q)))
    assert kl == pytest.approx((x @ wrong @ spread @ wrong.T @ x.T).item() / 2, rel=0.05)


def test_a_few_rows_of_many_are_looked_at_and_padding_is_not() -> None:
    rows = np.arange(10.0)[:, None]
    sums = SpreadSums(np.ones((1, 2), np.float32), 0.0)
    sums.add(rows, 4)
    assert sums.rows == 4 and rows_of(1, 10**6) == 1 and rows_of(5, 5) == 2048
    text = """g (float[n,s,12] x, int64[n,s] mask) => (float[n,s,30] logits, int64[n,s] k) {
        logits = MatMul(x, w)  k = Identity(mask) }"""
    x, mask = correlated((8, 5, 12)), np.ones((8, 5), np.int64)
    mask[:, 2:] = 0
    spoiled = np.where(mask[..., None] == 1, x, 50).astype(np.float32)
    proto = build(text, {"w": falling(12, 30)})
    first, second = (moments(problem(proto, {"x": e, "mask": mask}))["MatMul_0"]["x"].spread for e in (x, spoiled))
    np.testing.assert_array_equal(first, second)


def test_no_spread_of_what_is_not_finite_or_not_seen() -> None:
    assert SpreadSums(np.ones((2, 3), np.float32), 0.0).spread() is None
    sums = SpreadSums(np.ones((2, 3), np.float32), 0.0)
    sums.add(np.full((4, 2), np.inf), 4)
    assert sums.spread() is None


@pytest.mark.parametrize(
    ("form", "told"),
    [
        ("(float[n,30] logits) { logits = MatMul(x, w) }", True),
        ("(float[n,30] y) { y = MatMul(x, w) }", False),
        ("(float[n,30] y) { m = MatMul(x, w)  y = Softmax<axis=-1>(m) }", True),
        ("(float[n,30] y) { m = MatMul(x, w)  y = Softmax<axis=1>(m) }", True),
        ("(float[n,30] y) { m = MatMul(x, w)  y = LogSoftmax(m) }", True),
        ("(float[n,30] y) { m = MatMul(x, w)  y = Softmax<axis=0>(m) }", False),
        ("(float[n,30] y) { m = MatMul(x, w)  p = Softmax(m)  y = Mul(p, m) }", False),
        ("(float[n,30] logits) { logits = Gemm(x, w, c) }", False),
    ],
)
def test_which_layers_give_scores(form: str, told: bool) -> None:
    extra = ", float[30] c" if " c)" in form else ""
    posed = problem(build(f"g (float[n,12] x{extra}) => {form}", {"w": falling(12, 30)}))
    (site,) = posed.sites
    assert is_scores(site, site.uses[0]) == told


def test_scores_that_overflow_are_left_out_without_a_warning() -> None:
    sums = SpreadSums(np.ones((12, 30), np.float32), 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sums.add(np.full((4, 12), 1e38, np.float32), 4)
    assert sums.spread() is None
