"""com.microsoft Attention with its layers taken out answers as before; what cannot be taken out stays."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import ModelProto

from lowrank_onnx.base import Replacement
from lowrank_onnx.model import from_proto, parameter_count
from lowrank_onnx.passes.heads import Heads
from lowrank_onnx.problem import pose
from lowrank_onnx.rewrite import rewrite
from lowrank_onnx.runtime import Runtime
from tests.builders import Array, answers, build, correlated, difference, falling, moments, problem

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


def test_speed_is_measured_against_the_model_as_given() -> None:
    model = from_proto(packed())
    assert model.original.SerializeToString(deterministic=True) == packed().SerializeToString(deterministic=True)
    plain = from_proto(build("g (float[n,4] x) => (float[n,4] y) { y = Tanh(x) }"))
    assert plain.original is plain.proto


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


# --- one layer for queries, keys and values -----------------------------------------------------------

DECODER = """g (float[n,s,16] x, float[n,4,p,4] past_key, float[n,4,p,4] past_value)
    => (float[n,s,16] y, float[n,4,t,4] present_key, float[n,4,t,4] present_value) {
    dims = Shape(x)  batch = Slice(dims, zero, one)  length = Slice(dims, one, two)
    PACKED
    QSPLIT  qh = Transpose<perm=[0,2,1,3]>(qs)
    ks = Reshape(k, heads)  kt = Transpose<perm=[0,2,1,3]>(ks)
    vs = Reshape(v, heads)  vt = Transpose<perm=[0,2,1,3]>(vs)
    present_key = Concat<axis=-2>(past_key, kt)  present_value = Concat<axis=-2>(past_value, vt)
    kh = Transpose<perm=[0,1,3,2]>(present_key)
    a = MatMul(qh, kh)  b = Div(a, scale)
    keys = Shape(present_key)  count = Slice(keys, two, three)  before = Sub(count, length)
    c0 = Squeeze(count)  b0 = Squeeze(before)  all = Range(zero0, c0, one0)  now = Slice(all, before, count)
    n1 = Unsqueeze(now, one)  seen = LessOrEqual(all, n1)  c = Where(seen, b, low)
    w = Softmax<axis=-1>(c)  h = MatMul(w, present_value)  ht = Transpose<perm=[0,2,1,3]>(h)
    JOINED }"""
SIMPLE = "m = MatMul(x, w0)  z = Add(m, b0_)"
PACKED = {
    "split": (SIMPLE + "  q, k, v = Split<axis=2>(z, sizes)", "hj = Reshape(ht, join)  y = MatMul(hj, o)"),
    "slices": (
        SIMPLE + "  q = Slice(z, zero, e1, two)  k = Slice(z, e1, e2, two)  v = Slice(z, e2, e3, two)",
        "hj = Reshape(ht, join)  y = MatMul(hj, o)",
    ),
    "rows": (
        "xr = Reshape(x, rows)  g0 = Gemm(xr, w0, b0_)  t0 = Concat<axis=0>(batch, length, wide)  z = Reshape(g0, t0)"
        "  q, k, v = Split<axis=2>(z, sizes)",
        "hj = Reshape(ht, join)  hr = Reshape(hj, rows)  yr = Gemm(hr, o, bo)"
        "  t1 = Concat<axis=0>(batch, length, width)  y = Reshape(yr, t1)",
    ),
}


def decoder(spelling: str) -> ModelProto:
    packed, joined = PACKED[spelling]
    text = DECODER.replace("PACKED", packed).replace("JOINED", joined).replace("QSPLIT", "qs = Reshape(q, heads)")
    numbers = {"zero": [0], "one": [1], "two": [2], "three": [3], "e1": [16], "e2": [32], "e3": [48], "rows": [-1, 16]}
    numbers |= {"sizes": [16, 16, 16], "heads": [0, 0, 4, 4], "join": [0, 0, 16], "wide": [48], "width": [16]}
    constants: dict[str, Array] = {name: np.array(value) for name, value in numbers.items()}
    constants |= {"zero0": np.array(0), "one0": np.array(1), "scale": np.array(2, np.float32)}
    constants |= {"low": np.array(-1e9, np.float32)}
    constants |= {"w0": np.concatenate([2 * falling(16, 16, seed=seed) for seed in range(3)], axis=1)}
    constants |= {"b0_": np.linspace(-1, 1, 48, dtype=np.float32), "o": falling(16, 16, seed=3)}
    constants |= {"bo": np.linspace(0, 1, 16, dtype=np.float32)}
    words = set(text.replace("(", " ").replace(")", " ").replace(",", " ").split())
    return build(text, {name: np.asarray(value) for name, value in constants.items() if name in words})


def steps(past: int = 3) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    cache = {f"past_{name}": rng.standard_normal((5, 4, past, 4)).astype(np.float32) for name in ("key", "value")}
    return {"x": correlated((5, 7, 16)), **cache}


@pytest.mark.parametrize("spelling", PACKED)
def test_packed_layers_answer_as_before(spelling: str) -> None:
    before = decoder(spelling)
    after = from_proto(before).proto
    onnx.checker.check_model(after, full_check=True)
    assert not {"Split", "Gemm/Split"} & {node.op_type for node in after.graph.node}
    assert parameter_count(after) == parameter_count(before)
    for name, value in answers(before, steps()).items():
        assert difference(answers(after, steps())[name], value) < 1e-5


@pytest.mark.parametrize("spelling", PACKED)
@pytest.mark.parametrize("width", [4, 2])
def test_halves_of_packed_decoders(spelling: str, width: int) -> None:
    """At full width the original; at any width a cache holds what reading everything again gives."""
    data = {name: value for name, value in steps(0).items()}
    posed = pose(decoder(spelling), Runtime("cpu", 1), calibrate=data, allow_io_change=True)
    found = [site for site in posed.sites if site.kind == "attention"]
    assert [site.attributes["half"] for site in found] == ["scores", "values"]
    seen = moments(posed)
    replacements: list[Replacement] = []
    for site in found:
        analysis = Heads().analyse(site, seen[site.name])
        candidate = Heads().candidate(site, analysis, (width,))
        replacements += Heads().emit(site, candidate, Heads().factorize(site, analysis, candidate))
    made = rewrite(posed.model, replacements)
    onnx.checker.check_model(made, full_check=True)
    empty = {f"past_{name}": np.zeros((5, 4, 0, width), np.float32) for name in ("key", "value")}
    whole = answers(made, {"x": data["x"], **empty})
    if width == 4:
        assert difference(whole["y"], answers(posed.model.proto, data)["y"]) < 1e-5
    first = answers(made, {"x": data["x"][:, :4], **empty})
    past = {f"past_{name}": first[f"present_{name}"] for name in ("key", "value")}
    assert difference(answers(made, {"x": data["x"][:, 4:], **past})["y"], whole["y"][:, 4:]) < 1e-5


def test_a_split_that_leads_to_no_softmax_stays() -> None:
    text = "g (float[n,16] x) => (float[n,16] y) { z = MatMul(x, w0)  q, k, v = Split<axis=1>(z)  y = Sum(q, k, v) }"
    proto = build(text, {"w0": falling(16, 48)})
    assert "Split" in {node.op_type for node in from_proto(proto).proto.graph.node}


# --- the operator of opset 23, with fewer heads of keys and a cache -------------------------------------


@pytest.mark.parametrize("width", [8, 4])
def test_the_standard_operator_with_a_cache(width: int) -> None:
    text = """g (float[n,s,16] x, float[n,2,p,8] past_key, float[n,2,p,8] past_value)
        => (float[n,s,16] y, float[n,2,t,8] present_key, float[n,2,t,8] present_value) {
        q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)
        h, present_key, present_value = Attention<q_num_heads=4, kv_num_heads=2, is_causal=1>(
            q, k, v, , past_key, past_value)
        y = MatMul(h, wo) }"""
    weights = {"wq": falling(16, 32), "wk": falling(16, 16, seed=1), "wv": falling(16, 16, seed=2)}
    proto = build(text, {**weights, "wo": falling(32, 16, seed=3)}, opset=23)
    data = {"x": correlated((5, 7, 16)), **{f"past_{n}": np.zeros((5, 2, 0, 8), np.float32) for n in ("key", "value")}}
    posed = pose(proto, Runtime("cpu", 1), calibrate=data, allow_io_change=True)
    found = [site for site in posed.sites if site.kind == "attention"]
    told = [(site.attributes["half"], site.attributes["heads"], site.attributes["groups"]) for site in found]
    assert told == [("scores", 4, 2), ("values", 4, 2)]
    held = pose(proto, Runtime("cpu", 1), calibrate=data)
    assert all(Heads().refuse(site) for site in held.sites if site.kind == "attention")
    seen = moments(posed)
    replacements: list[Replacement] = []
    for site in found:
        analysis = Heads().analyse(site, seen[site.name])
        candidate = Heads().candidate(site, analysis, (width,))
        replacements += Heads().emit(site, candidate, Heads().factorize(site, analysis, candidate))
    made = rewrite(posed.model, replacements)
    onnx.checker.check_model(made, full_check=True)
    empty = {f"past_{name}": np.zeros((5, 2, 0, width), np.float32) for name in ("key", "value")}
    whole = answers(made, {"x": data["x"], **empty})
    if width == 8:
        assert difference(whole["y"], answers(proto, data)["y"]) < 1e-5
    assert whole["present_key"].shape == (5, 2, 7, width)
