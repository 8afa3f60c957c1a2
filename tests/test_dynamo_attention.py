"""Attention as the dynamo exporter of PyTorch spells it: parts cut by Slice, keys turned with batch and head joined."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto

from lowrank_onnx.passes.heads import Heads
from lowrank_onnx.sites.attention import left_alone
from tests.builders import answers, build, correlated, difference, factorized, falling, problem

TEXT = """g (float[n,s,32] x) => (float[n,s,32] y) {
    z = MatMul(x, w)  zb = Add(z, b)
    batch = Shape<start=0, end=1>(x)  length = Shape<start=1, end=2>(x)
    target = Concat<axis=0>(batch, length, three, four, eight)
    five = Reshape<allowzero=1>(zb, target)  turned = Transpose<perm=[2,0,3,1,4]>(five)
    q0 = Slice(turned, zero, one, zero)  q = Squeeze(q0, zero)
    k0 = Slice(turned, one, two, zero)  k = Squeeze(k0, zero)
    v0 = Slice(turned, two, three, zero)  v = Squeeze(v0, zero)
    shape = Shape<start=0>(k)
    rows = Slice(shape, before_last, last)  width = Slice(shape, last, end)  front = Slice(shape, zero, before_last)
    flat = Concat<axis=0>(last, rows, width)  kf = Reshape(k, flat)  kt = Transpose<perm=[0,2,1]>(kf)
    back = Concat<axis=0>(front, width, rows)  kb = Reshape(kt, back)
    qs = Mul(q, c)  ks = Mul(kb, c)  a = MatMul(qs, ks)  p = Softmax<axis=-1>(a)  o = MatMul(p, v)
    ot = Transpose<perm=[0,2,1,3]>(o)  oj = Reshape(ot, join)  y = MatMul(oj, wo)
}"""
NUMBERS = {
    "zero": 0,
    "one": 1,
    "two": 2,
    "three": 3,
    "four": 4,
    "eight": 8,
    "last": -1,
    "before_last": -2,
    "end": 2**31,
}


def model(text: str = TEXT) -> ModelProto:
    values = {name: np.array([number], np.int64) for name, number in NUMBERS.items() if name in text}
    return build(
        text,
        {
            **values,
            "w": falling(32, 96),
            "b": np.linspace(-1, 1, 96, dtype=np.float32),
            "wo": falling(32, 32),
            "join": np.array([0, 0, 32], np.int64),
            "c": np.array(8**-0.25, np.float32),
        },
    )


@pytest.mark.parametrize("half", ["scores", "values"])
@pytest.mark.parametrize("width", [8, 4])
def test_both_halves_are_found_and_narrowed(half: str, width: int) -> None:
    proto, x = model(), correlated((6, 5, 32))
    posed = problem(proto, {"x": x})
    assert left_alone(posed.model, posed.shapes, [site for site in posed.sites if not site.parts], False) == []
    (site,) = [entry for entry in posed.sites if entry.kind == "attention" and entry.attributes["half"] == half]
    made = factorized(posed, Heads(), site, (width,))
    for data in (x, correlated((3, 7, 32), seed=2)):  # other sizes than those it was found at
        apart = difference(answers(made, {"x": data})["y"], answers(proto, {"x": data})["y"])
        assert apart < (1e-5 if width == 8 else 0.5)
    if width == 4 and half == "scores":
        stored = {tensor.name: list(tensor.dims) for tensor in made.graph.initializer}
        assert sum(dims == [32, 16] for dims in stored.values()) == 2


def test_a_turn_that_does_not_follow_the_width_is_left_alone() -> None:
    text = TEXT.replace("flat = Concat<axis=0>(last, rows, width)", "flat = Concat<axis=0>(last, rows, eight)")
    posed = problem(model(text), {"x": correlated((6, 5, 32))})
    halves = [entry.attributes["half"] for entry in posed.sites if entry.kind == "attention"]
    assert halves == ["values"]
