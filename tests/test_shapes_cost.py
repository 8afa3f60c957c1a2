"""Multiply-accumulates against counts by hand, and shapes against the model's own answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from lowrank_onnx.cost import Cost, model_cost
from lowrank_onnx.model import from_proto, parameter_count
from lowrank_onnx.shapes import measure_shapes, static_shapes, synthetic_feeds
from tests.builders import RUNTIME, Array, build, correlated, falling, problem

W = falling(16, 20)


def cost(text: str, constants: dict[str, Array], feeds: dict[str, Array], **more: Any) -> Cost:
    model = from_proto(build(text, constants, **more))
    return model_cost(model, measure_shapes(model, feeds, RUNTIME), model.size_bytes)


def ones(*shape: int) -> Array:
    return np.ones(shape, np.float32)


BY_HAND = {
    "matmul": ("g (float[n,16] x) => (float[n,20] y) { y = MatMul(x, w) }", {"w": W}, {"x": ones(3, 16)}, 3 * 16 * 20),
    "matmul left": ("g (float[16,n] x) => (float[20,n] y) { y = MatMul(w, x) }", {"w": W.T}, {"x": ones(16, 3)},
                    3 * 320),
    "matmul tokens": (
        "g (float[n,s,16] x) => (float[n,s,20] y) { y = MatMul(x, w) }", {"w": W}, {"x": ones(2, 5, 16)}, 2 * 5 * 320),
    "attention scores": (
        "g (float[n,h,s,8] x) => (float[n,h,s,s] y) { t = Transpose<perm=[0,1,3,2]>(x) y = MatMul(x, t) }", {},
        {"x": ones(2, 3, 5, 8)}, 2 * 3 * 5 * 5 * 8),
    "gemm": ("g (float[n,16] x) => (float[n,20] y) { y = Gemm<transB=1>(x, w, b) }",
             {"w": W.T, "b": ones(20)}, {"x": ones(3, 16)}, 960),
    "gemm transA": ("g (float[16,n] x) => (float[n,20] y) { y = Gemm<transA=1>(x, w) }", {"w": W}, {"x": ones(16, 3)},
                    960),
    "conv": ("g (float[n,4,9,9] x) => (float[n,6,4,4] y) { y = Conv<strides=[2,2]>(x, w) }",
             {"w": ones(6, 4, 3, 3)}, {"x": ones(2, 4, 9, 9)}, 2 * 6 * 4 * 4 * 4 * 9),
    "conv groups": ("g (float[n,4,9] x) => (float[n,6,7] y) { y = Conv<group=2>(x, w) }",
                    {"w": ones(6, 2, 3)}, {"x": ones(1, 4, 9)}, 6 * 7 * 2 * 3),
    "conv transposed": ("g (float[n,4,5] x) => (float[n,6,11] y) { y = ConvTranspose<strides=[2]>(x, w) }",
                        {"w": ones(4, 6, 3)}, {"x": ones(1, 4, 5)}, 4 * 5 * 6 * 3),
    "lstm": ("g (float[t,n,8] x) => (float[t,1,n,5] y) { y = LSTM<hidden_size=5>(x, w, r) }",
             {"w": ones(1, 20, 8), "r": ones(1, 20, 5)}, {"x": ones(7, 2, 8)}, 7 * 2 * 20 * (8 + 5)),
    "gru both ways": (
        'g (float[t,n,8] x) => (float[t,2,n,5] y) { y = GRU<hidden_size=5, direction="bidirectional">(x, w, r) }',
        {"w": ones(2, 15, 8), "r": ones(2, 15, 5)}, {"x": ones(7, 2, 8)}, 7 * 2 * 2 * 15 * (8 + 5)),
    "einsum": ('g (float[b,i,16] x) => (float[b,i,20] y) { y = Einsum<equation="bik,kn->bin">(x, w) }',
               {"w": W}, {"x": ones(2, 3, 16)}, 2 * 3 * 320),
    "nothing that counts": ("g (float[n,4] x) => (float[n,4] y) { t = Relu(x) y = Add(t, x) }", {}, {"x": ones(2, 4)},
                            0),
    "if takes the dearer branch": (
        """g (float[n,16] x, bool c) => (float[n,20] y) { y = If (c) <
            then_branch = a () => (float[n,20] r) { r = MatMul(x, w) },
            else_branch = b () => (float[n,20] r) { t = MatMul(x, w) r = MatMul(t, v) } > }""",
        {"w": W, "v": falling(20, 20)}, {"x": ones(3, 16), "c": np.array(True)}, 3 * (320 + 400)),
    "scan takes every step": (
        """g (float[t,16] x, float[20] s) => (float[20] y, float[t,20] z) { y, z = Scan <num_scan_inputs = 1,
            body = b (float[20] h, float[16] v) => (float[20] n, float[20] o) {
                p = MatMul(v, w) n = Add(p, h) o = Identity(n) }> (s, x) }""",
        {"w": W}, {"x": ones(6, 16), "s": ones(20)}, 6 * 320),
    "scan behind a computed shape": (
        """g (float[t,16] x, float[20] s, int64[2] h) => (float[20] y, float[t,20] z) { t = Reshape(x, h)
            y, z = Scan <num_scan_inputs = 1, body = b (float[20] h, float[k] v) => (float[20] n, float[20] o) {
                u = Identity(v) p = MatMul(u, w) n = Add(p, h) o = Identity(n) }> (s, t) }""",
        {"w": W}, {"x": ones(6, 16), "s": ones(20), "h": np.array([6, 16])}, 6 * 320),
    "if behind a computed shape": (
        """g (float[t,16] x, bool c, int64[2] h) => (float[n,20] y) { t = Reshape(x, h) y = If (c) <
            then_branch = a () => (float[n,20] r) { r = MatMul(t, w) },
            else_branch = b () => (float[n,20] r) { u = Relu(t) r = MatMul(u, w) } > }""",
        {"w": W}, {"x": ones(6, 16), "c": np.array(True), "h": np.array([6, 16])}, 6 * 320),
    "sequence in a loop": (
        """g (float[n,16] x, int64 m) => (float[n,20] y) { c = Constant<value=bool {1}>() e = SequenceEmpty()
            q = Loop (m, c, e) < body = b (int64 i, bool k, seq(float[n,16]) s) => (bool o, seq(float[n,16]) r) {
                o = Identity(k) r = SequenceInsert(s, x) } >
            z = Constant<value=int64 {0}>() t = SequenceAt(q, z) y = MatMul(t, w) }""",
        {"w": W}, {"x": ones(3, 16), "m": np.array(3)}, 3 * 320),
    "loop has no known number of steps": (
        """g (float[n,16] x, int64 m) => (float[n,16] y) { c = Constant<value=bool {1}>() y = Loop (m, c, x) <
            body = b (int64 i, bool k, float[n,16] s) => (bool o, float[n,16] r) {
                o = Identity(k) r = MatMul(s, w) } > }""",
        {"w": falling(16, 16)}, {"x": ones(3, 16), "m": np.array(3)}, None),
    "loop without products": (
        """g (float[n,16] x, int64 m) => (float[n,20] y) { c = Constant<value=bool {1}>() t = Loop (m, c, x) <
            body = b (int64 i, bool k, float[n,16] s) => (bool o, float[n,16] r) { o = Identity(k) r = Relu(s) } >
            y = MatMul(t, w) }""",
        {"w": W}, {"x": ones(3, 16), "m": np.array(3)}, 3 * 320),
}  # fmt: skip


@pytest.mark.parametrize("case", BY_HAND)
def test_multiply_accumulates(case: str) -> None:
    text, constants, feeds, expected = BY_HAND[case]
    assert cost(text, constants, feeds).macs == expected


def test_products_of_other_domains_count_and_namesakes_do_not() -> None:
    text = "g (float[n,16] x) => (float[n,20] y) { y = com.microsoft.FusedMatMul(x, w) }"
    assert cost(text, {"w": W}, {"x": ones(3, 16)}, imports=', "com.microsoft": 1').macs == 960
    body = '<opset_import: ["": 17], domain: "local"> Gemm (a) => (z) { z = Relu(a) }'
    text = "g (float[n,16] x) => (float[n,16] y) { y = local.Gemm(x) }" + body
    assert cost(text, {}, {"x": ones(3, 16)}, imports=', "local": 1').macs == 0


def test_parameters_count_once_and_floats_only() -> None:
    proto = build(
        """g (float[n,16] x) => (float[n,20] y) {
            k = Constant<value_floats=[1.0, 2.0]>() f = Constant<value_float=3.0>() i = Constant<value_int=4>()
            s = MatMul(x, w) t = MatMul(x, w) u = Add(s, t) y = Mul(u, f) }""",
        {"w": W, "half": np.ones(7, np.float16), "ids": np.arange(9), "mask": np.ones(5, bool)},
    )
    assert parameter_count(proto) == 320 + 2 + 1 + 7


def test_parameters_in_branches_and_functions_count() -> None:
    body = """<opset_import: ["": 17], domain: "local"> f (a) => (z) {
        c = Constant<value=float[3] {1,2,3}>() z = Add(a, c) }"""
    proto = build("g (float[n,3] x) => (float[n,3] y) { t = local.f(x) y = local.f(t) }" + body, imports=', "local": 1')
    assert parameter_count(proto) == 3


def test_size_is_the_file() -> None:
    proto = build("g (float[n,16] x) => (float[n,20] y) { y = MatMul(x, w) }", {"w": W})
    model = from_proto(proto)
    assert model.size_bytes == len(proto.SerializeToString())


def test_shapes_are_measured_where_inference_cannot_tell() -> None:
    proto = build(
        "g (float[n,16] x, int64[2] s) => (float[a,b] y) { t = Reshape(x, s) y = MatMul(t, w) }", {"w": falling(8, 4)}
    )
    model = from_proto(proto)
    shapes = measure_shapes(model, {"x": ones(3, 16), "s": np.array([6, 8])}, RUNTIME)
    assert shapes[("", "t")] == (6, 8) and shapes[("", "y")] == (6, 4) and shapes[("", "w")] == (8, 4)
    assert ("", "y") not in static_shapes(model)


def test_a_model_whose_open_axes_nothing_fixes_is_counted_as_far_as_it_goes() -> None:
    proto = build("g (float[n,s,16] x) => (float[n,s,20] y) { y = MatMul(x, w) }", {"w": W})
    posed = problem(proto)
    assert posed.feeds is None and "--shape x=" in posed.unfed
    assert posed.cost.parameters == 320 and posed.cost.macs is None


def test_made_up_inputs() -> None:
    specs: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
        "ids": (np.dtype(np.int64), (2, 7)),
        "attention_mask": (np.dtype(np.int64), (2, 7)),
        "lengths": (np.dtype(np.int32), (2,)),
        "x": (np.dtype(np.float16), (2, 3)),
    }
    made = synthetic_feeds(specs, 0)
    assert {name: (value.dtype, value.shape) for name, value in made.items()} == specs
    assert not made["ids"].any() and made["attention_mask"].all() and (made["lengths"] == 7).all()
    assert np.array_equal(made["x"], synthetic_feeds(specs, 0)["x"])
    assert not np.array_equal(made["x"], synthetic_feeds(specs, 1)["x"])


def test_sites_count_as_the_model_does() -> None:
    proto = build(
        "g (float[n,s,16] x) => (float[n,s,20] y) { t = MatMul(x, w) h = Relu(t) u = MatMul(h, v) y = Add(u, b) }",
        {"w": W, "v": falling(20, 20), "b": ones(20)},
    )
    posed = problem(proto, {"x": correlated((4, 5, 16))})
    single = [site for site in posed.sites if not site.parts]
    assert sum(site.macs or 0 for site in single) == posed.cost.macs == 5 * (320 + 400)
    assert sum(site.parameters for site in single) == 720
    assert onnx.numpy_helper.to_array(proto.graph.initializer[0]).size == single[0].parameters
