"""Where linear layers hide in a graph, and what is left of the graph when they are rewritten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto

from lowrank_onnx import compress
from lowrank_onnx.base import RankWish, Replacement, Site
from lowrank_onnx.errors import ModelError
from lowrank_onnx.model import from_proto, load, parameter_count, stored_tensors, uses_external_data
from lowrank_onnx.passes.svd import SVD
from lowrank_onnx.rewrite import rewrite
from tests.builders import Array, answers, build, correlated, falling, furthest, moments, problem

W, WT = falling(16, 20), falling(20, 16)
B = np.linspace(-1, 1, 20, dtype=np.float32)
X = {"x": correlated((24, 16))}
HEAD = "g (float[n,16] x) => (float[n,20] y)"


def linear(proto: ModelProto) -> list[Site]:
    return [site for site in problem(proto).sites if site.kind == "linear"]


def rewritten(
    proto: ModelProto, data: Mapping[str, Array] | None = None, fraction: float = 1.0, only: Sequence[str] = ()
) -> ModelProto:
    """The model with every linear site rewritten, at full rank unless told."""
    posed = problem(proto, data)
    statistics = moments(posed)
    replacements: list[Replacement] = []
    for site in posed.sites:
        if site.kind == "linear" and (not only or site.name in only):
            analysis = SVD().analyse(site, statistics.get(site.name))
            ranks = SVD().spell_rank(site, analysis, RankWish(fraction=fraction))
            assert isinstance(ranks, tuple)
            candidate = SVD().candidate(site, analysis, ranks)
            replacements += SVD().emit(site, candidate, SVD().factorize(site, analysis, candidate))
    assert replacements, "no site was found"
    return rewrite(posed.model, replacements)


def assert_same_answers(proto: ModelProto, feeds: Mapping[str, Array], tolerance: float = 1e-5) -> ModelProto:
    """Full rank gives the original back, by the weight alone and on data."""
    expected = answers(proto, feeds)
    for data in (None, {name: value[None] for name, value in feeds.items()}):
        made = rewritten(proto, data)
        assert furthest(answers(made, feeds), expected) <= tolerance
        assert_clean(proto, made)
    return made


def assert_clean(before: ModelProto, after: ModelProto) -> None:
    """Interface, metadata and operator sets are those of before, names are unique, nothing is dead."""
    assert list(after.graph.output) == list(before.graph.output)
    assert list(after.opset_import) == list(before.opset_import)
    assert after.ir_version == before.ir_version
    for field in ("producer_name", "producer_version", "domain", "model_version", "doc_string"):
        assert getattr(after, field) == getattr(before, field)
    assert list(after.metadata_props) == list(before.metadata_props)
    assert (after.graph.name, after.graph.doc_string) == (before.graph.name, before.graph.doc_string)
    stored = {tensor.name for tensor in (*before.graph.initializer, *after.graph.initializer)}
    inputs = [[value for value in proto.graph.input if value.name not in stored] for proto in (before, after)]
    assert inputs[0] == inputs[1]
    scopes = from_proto(after).scopes
    names = [node.name for scope in scopes for node in scope.graph.node]
    assert all(names) and len(names) == len(set(names))
    for scope in scopes:
        outputs = {value.name for value in scope.graph.output}
        for name in (*scope.initializers, *scope.producers):
            if name in scope.initializers or not scope.producers[name].output[1:]:
                assert name in outputs or scope.readers.get(name), f"nobody reads '{name}'"


# --- where constants hide ----------------------------------------------------------------------------

HIDDEN = {
    "identity": ("i = Identity(w) y = MatMul(x, i)", W),
    "transpose": ("i = Transpose<perm=[1,0]>(w) y = MatMul(x, i)", WT),
    "transpose default": ("i = Transpose(w) y = MatMul(x, i)", WT),
    "cast": ("i = Cast<to=1>(w) y = MatMul(x, i)", W.astype(np.float64)),
    "cast from half": ("i = Cast<to=1>(w) y = MatMul(x, i)", W.astype(np.float16)),
    "reshape": ("s = Constant<value_ints=[16,20]>() i = Reshape(w, s) y = MatMul(x, i)", W.reshape(-1)),
    "chain": ("i = Identity(w) j = Transpose(i) k = Identity(j) y = MatMul(x, k)", WT),
    "gemm behind transpose": ("i = Transpose(w) y = Gemm<transB=1>(x, i)", W),
}


@pytest.mark.parametrize("spelling", HIDDEN)
def test_weight_behind_another_node(spelling: str) -> None:
    body, weight = HIDDEN[spelling]
    proto = build(f"{HEAD} {{ {body} }}", {"w": weight})
    made = assert_same_answers(proto, X)
    assert [node.op_type for node in made.graph.node if node.op_type not in ("MatMul", "Add", "Gemm")] == []
    assert parameter_count(rewritten(proto, fraction=0.25)) == 4 * 36


def test_weight_in_a_constant_node() -> None:
    proto = build(HEAD + "{ y = MatMul(x, w) }")
    tensor = onnx.numpy_helper.from_array(W, "w")
    proto.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["w"], value=tensor))
    made = assert_same_answers(proto, X)
    assert not [node for node in made.graph.node if node.op_type == "Constant"]


def test_weight_that_another_branch_of_its_chain_reads_stays() -> None:
    proto = build(HEAD + "{ i = Transpose(w) t = MatMul(x, i) s = ReduceSum<keepdims=0>(w) y = Add(t, s) }", {"w": WT})
    (site,) = linear(proto)
    assert site.freed == 0
    assert_same_answers(proto, X)


@pytest.mark.parametrize("opset", [7, 8])
def test_initializers_that_are_inputs_too(opset: int) -> None:
    proto = build(HEAD + "{ y = Gemm(x, w, b) }", {"w": W, "b": B}, opset=opset)
    assert [value.name for value in proto.graph.input] == ["x", "w", "b"]
    made = assert_same_answers(proto, X)
    onnx.checker.check_model(made, full_check=True)
    assert made.graph.input[0].name == "x"
    assert {value.name for value in made.graph.input} == {"x", *(tensor.name for tensor in made.graph.initializer)}


@pytest.mark.parametrize("opset", range(7, 24))
def test_every_operator_set(opset: int) -> None:
    body = "{ s = Transpose<perm=[1,0]>(v) t = MatMul(x, w) u = Add(t, b) r = Relu(u) y = Gemm(r, s, b) }"
    proto = build(HEAD + body, {"w": W, "v": falling(20, 20, seed=3), "b": B}, opset=opset)
    made = assert_same_answers(proto, X)
    onnx.checker.check_model(made, full_check=True)


def test_newest_operator_set_that_onnxruntime_takes() -> None:
    for opset in range(onnx.defs.onnx_opset_version(), 20, -1):
        proto = build(HEAD + "{ y = Gemm(x, w, b) }", {"w": W, "b": B}, opset=opset, ir=10)
        try:
            answers(proto, X)
        except Exception:
            continue
        assert_same_answers(proto, X)
        return
    raise AssertionError("onnxruntime takes no operator set above 20")


def test_external_data(tmp_path: Path) -> None:
    proto = build(HEAD + "{ t = MatMul(x, w) u = MatMul(t, v) y = Add(u, b) }", {"w": W, "v": falling(20, 20), "b": B})
    expected = answers(proto, X)
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    before = (tmp_path / "weights.bin").read_bytes()
    result = compress(tmp_path / "m.onnx", rank=1.0, technique=["svd"], include=["MatMul_0"])
    out = result.save(tmp_path / "out.onnx")
    saved = onnx.load(out, load_external_data=False)
    assert [t.name for t in stored_tensors(saved) if uses_external_data(t)]
    assert furthest(answers(onnx.load(out), X), expected) < 1e-5
    assert (tmp_path / "weights.bin").read_bytes() == before
    assert load(out).size_bytes == out.stat().st_size + (tmp_path / "out.onnx.data").stat().st_size


def test_external_data_of_the_model_are_never_overwritten(tmp_path: Path) -> None:
    proto = build(HEAD + "{ t = MatMul(x, w) y = MatMul(t, v) }", {"w": W, "v": falling(20, 20)})
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="out.onnx.data", size_threshold=0)
    before = (tmp_path / "out.onnx.data").read_bytes()
    result = compress(tmp_path / "m.onnx", rank=4, include=["MatMul_0"])
    for overwrite in (False, True):
        with pytest.raises(ModelError, match=r"out\.onnx\.data"):
            result.save(tmp_path / "out.onnx", overwrite=overwrite)
        assert (tmp_path / "out.onnx.data").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "out.onnx.data"]


def test_a_model_in_memory_with_external_data_is_refused(tmp_path: Path) -> None:
    proto = build(HEAD + "{ y = MatMul(x, w) }", {"w": W})
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    with pytest.raises(ModelError, match="external data"):
        compress(onnx.load(tmp_path / "m.onnx", load_external_data=False), rank=4)


# --- Gemm --------------------------------------------------------------------------------------------

C_FORMS: dict[str, tuple[int, ...] | None] = {
    "none": None, "scalar": (), "one": (1,), "row": (20,), "row2": (1, 20), "column": (24, 1), "matrix": (24, 20),
    "one2": (1, 1),
}  # fmt: skip


@pytest.mark.parametrize("c", C_FORMS)
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("trans_a", "trans_b"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_every_form_of_gemm(side: str, trans_a: int, trans_b: int, c: str) -> None:
    rng = np.random.default_rng(0)
    a, b = correlated((24, 16)), falling(16, 20)
    if side == "left":
        a, b = falling(24, 16), correlated((16, 20), axis=0)
    a, b = (a.T if trans_a else a), (b.T if trans_b else b)
    data = a if side == "right" else b
    constants = {"w": b if side == "right" else a}
    names = ("x", "w") if side == "right" else ("w", "x")
    shape = C_FORMS[c]
    if shape is not None:
        constants["c"] = rng.standard_normal(shape).astype(np.float32)
    text = (
        f"g (float[{data.shape[0]},{data.shape[1]}] x) => (float[24,20] y) {{ y = Gemm<transA={trans_a}, "
        f"transB={trans_b}, alpha=0.5, beta=-2.0>({', '.join(names)}{'' if shape is None else ', c'}) }}"
    )
    assert_same_answers(build(text, constants), {"x": data})


def test_gemm_with_a_bias_that_depends_on_data() -> None:
    proto = build(
        "g (float[n,16] x, float[n,20] z) => (float[n,20] y) { c = Relu(z) y = Gemm<beta=0.5>(x, w, c) }", {"w": W}
    )
    assert_same_answers(proto, X | {"z": correlated((24, 20), seed=5)})


def test_both_operands_constant_or_none_is_no_site() -> None:
    proto = build("g (float[n,16] x, float[16,20] z) => (float[n,20] y) { y = MatMul(x, z) }")
    posed = build(HEAD + "{ c = MatMul(v, w) t = MatMul(x, w) y = Add(t, c) }", {"v": np.ones((1, 16), "f4"), "w": W})
    assert [site.kind for site in from_sites(proto)] == []
    assert [site.uses[0].input for site in linear(posed)] == ["x"]


def from_sites(proto: ModelProto) -> Sequence[Site]:
    feeds = {"x": correlated((2, 16)), "z": falling(16, 20)}
    return problem(proto, {name: value[None] for name, value in feeds.items()}).sites


# --- MatMul ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["t, b", "b, t"])
@pytest.mark.parametrize("shape", [(20,), (1, 20), (1, 1), (1,), ()])
def test_add_behind_matmul_is_its_bias(order: str, shape: tuple[int, ...]) -> None:
    bias = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    proto = build(HEAD + f"{{ t = MatMul(x, w) y = Add({order}) }}", {"w": W, "b": bias})
    (site,) = linear(proto)
    assert site.uses[0].bias is not None and len(site.uses[0].also) == 1
    assert_same_answers(proto, X)


@pytest.mark.parametrize("shape", [(24, 20), (24, 1), (2, 1, 20), (1, 1, 20)])
def test_add_of_more_than_a_vector_is_no_bias(shape: tuple[int, ...]) -> None:
    rank = "float[2,n,20]" if shape[0] == 2 else "float[1,n,20]" if len(shape) == 3 else "float[n,20]"
    proto = build(
        f"g (float[n,16] x) => ({rank} y) {{ t = MatMul(x, w) y = Add(t, b) }}",
        {"w": W, "b": np.random.default_rng(0).standard_normal(shape).astype(np.float32)},
    )
    (site,) = linear(proto)
    assert site.uses[0].bias is None and not site.uses[0].also
    assert_same_answers(proto, X)


def test_matmul_whose_output_is_read_twice_keeps_it() -> None:
    proto = build(HEAD + "{ t = MatMul(x, w) u = Add(t, b) y = Mul(t, u) }", {"w": W, "b": B})
    assert linear(proto)[0].uses[0].also == ()
    assert_same_answers(proto, X)


def test_matmul_whose_output_is_an_output_keeps_it() -> None:
    proto = build(
        "g (float[n,16] x) => (float[n,20] t, float[n,20] y) { t = MatMul(x, w) y = Add(t, b) }", {"w": W, "b": B}
    )
    assert linear(proto)[0].uses[0].also == ()
    assert_same_answers(proto, X)


def test_matmul_added_to_itself() -> None:
    assert_same_answers(build(HEAD + "{ t = MatMul(x, w) y = Add(t, t) }", {"w": W}), X)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("bias", [True, False])
def test_matmul_with_a_vector(side: str, bias: bool) -> None:
    operands = "x, w" if side == "right" else "w, x"
    end = "t = MatMul({}) y = Add(t, b)" if bias else "y = MatMul({})"
    constants = {"w": W if side == "right" else WT} | ({"b": B} if bias else {})
    proto = build(f"g (float[16] x) => (float[20] y) {{ {end.format(operands)} }}", constants)
    assert_same_answers(proto, {"x": correlated((16,), axis=0)})


BATCHED = {
    "one slice a head": ("float[n,3,s,16] x", "float[n,3,s,20] y", (3, 16, 20), (2, 3, 5, 16), "x, w"),
    "broadcast over data": ("float[s,16] x", "float[3,s,20] y", (3, 16, 20), (5, 16), "x, w"),
    "two lead axes": ("float[n,2,3,s,16] x", "float[n,2,3,s,20] y", (2, 3, 16, 20), (2, 2, 3, 5, 16), "x, w"),
    "one slice": ("float[n,s,16] x", "float[n,s,20] y", (1, 16, 20), (4, 5, 16), "x, w"),
    "left": ("float[n,3,16,s] x", "float[n,3,20,s] y", (3, 20, 16), (2, 3, 16, 5), "w, x"),
}


@pytest.mark.parametrize("form", BATCHED)
def test_batched_constants(form: str) -> None:
    ins, outs, shape, data, order = BATCHED[form]
    count = int(np.prod(shape[:-2]))
    weight = np.stack([falling(shape[-2], shape[-1], seed=seed) for seed in range(count)]).reshape(shape)
    proto = build(f"g ({ins}) => ({outs}) {{ y = MatMul({order}) }}", {"w": weight})
    assert_same_answers(proto, {"x": correlated(data, axis=-2 if form == "left" else -1)})


def test_integer_matmul_and_gather_constants_are_no_linear_sites() -> None:
    proto = build("g (int32[n,4] x) => (int32[n,3] y) { y = MatMul(x, w) }", {"w": np.ones((4, 3), np.int32)})
    assert not linear(proto)


# --- shared weights ----------------------------------------------------------------------------------

SHARED = {
    "two matmuls": "s = MatMul(x, w) t = MatMul(z, w) y = Add(s, t)",
    "two matmuls with biases": "p = MatMul(x, w) s = Add(p, b) q = MatMul(z, w) t = Add(q, c) y = Mul(s, t)",
    "one with bias": "p = MatMul(x, w) s = Add(p, b) t = MatMul(z, w) y = Mul(s, t)",
    "two gemms": "s = Gemm(x, w, b) t = Gemm(z, w, c) y = Mul(s, t)",
    "gemm first, matmul next": "s = Gemm(x, w, b) p = MatMul(z, w) t = Add(p, c) y = Mul(s, t)",
    "matmul first, gemm next": "p = MatMul(x, w) s = Add(p, b) t = Gemm(z, w, c) y = Mul(s, t)",
    "gemm with bias, matmul without": "s = Gemm(x, w, b) t = MatMul(z, w) y = Mul(s, t)",
    "same data twice": "s = MatMul(x, w) t = MatMul(x, w) u = Mul(s, t) q = MatMul(z, w) y = Add(u, q)",
    "behind one transpose": "i = Transpose(v) s = MatMul(x, i) t = MatMul(z, i) y = Add(s, t)",
    "behind two transposes": "i = Transpose(v) j = Transpose(v) s = MatMul(x, i) t = MatMul(z, j) y = Add(s, t)",
    "plain and transposed": "s = MatMul(x, w) t = Gemm<transB=1>(z, r) u = MatMul(s, r) y = Add(t, u)",
}


@pytest.mark.parametrize("spelling", SHARED)
def test_weight_read_by_several_nodes(spelling: str) -> None:
    body = SHARED[spelling]
    constants = {"w": W, "v": WT, "b": B, "c": B[::-1], "r": falling(20, 20)}
    wide = "z" if spelling != "plain and transposed" else "z0"
    head = f"g (float[n,16] x, float[n,{16 if wide == 'z' else 20}] z) => (float[n,20] y)"
    read = {name: value for name, value in constants.items() if f"{name})" in body or f"{name}," in body}
    proto = build(f"{head} {{ {body} }}", read)
    made = assert_same_answers(proto, X | {"z": correlated((24, 16 if wide == "z" else 20), seed=2)})
    if spelling != "plain and transposed":
        firsts = [tensor for tensor in made.graph.initializer if tensor.name.endswith("/first")]
        assert len(firsts) == 1, "factorized once, stored once"
        assert linear(proto)[0].freed == 320


def test_weight_tied_with_a_lookup_frees_nothing() -> None:
    text = """g (int64[n,s] ids) => (float[n,s,40] y) {
        e = Gather(table, ids)  h = MatMul(e, w)  t = Transpose<perm=[1,0]>(table)  y = MatMul(h, t) }"""
    proto = build(text, {"table": falling(40, 16), "w": falling(16, 16, seed=1)})
    sites = {site.uses[0].input: site for site in linear(proto)}
    assert (sites["h"].freed, sites["e"].freed) == (0, 256)
    feeds = {"ids": np.random.default_rng(0).integers(0, 40, (3, 5))}
    assert_same_answers(proto, feeds)
    result = compress(proto, keep_params=0.95, technique=["svd"])
    assert [row["name"] for row in result.report["sites"] if row["decision"] == "factorized"] == [sites["e"].name]


# --- subgraphs, functions, other domains -------------------------------------------------------------

IF = """g (float[n,16] x, bool c) => (float[n,20] y) {
    y = If (c) <
        then_branch = yes () => (float[n,20] r) { t = MatMul(x, %s)  r = Relu(t) },
        else_branch = no () => (float[n,20] r) { t = MatMul(x, %s)  r = Neg(t) }
    > }"""


@pytest.mark.parametrize("weights", [("w", "w"), ("w", "v")])
def test_bodies_of_if_with_the_same_names_in_both_branches(weights: tuple[str, str]) -> None:
    constants = {"w": W, "v": falling(16, 20, seed=4)}
    proto = build(IF % weights, {name: constants[name] for name in set(weights)})
    for place, body in enumerate(attribute.g for attribute in proto.graph.node[0].attribute):
        body.node[0].name = "fc"  # in both branches
        del place
    assert len(linear(proto)) == len(set(weights))
    for chosen in (True, False):
        assert_same_answers(proto, X | {"c": np.array(chosen)})


def test_constants_stored_inside_the_branches() -> None:
    proto = build(IF % ("inner", "inner"))
    for place, attribute in enumerate(proto.graph.node[0].attribute):
        attribute.g.initializer.append(onnx.numpy_helper.from_array(falling(16, 20, seed=place), "inner"))
    assert len(linear(proto)) == 2
    for chosen in (True, False):
        assert_same_answers(proto, X | {"c": np.array(chosen)})
    assert parameter_count(rewritten(proto, fraction=0.25)) == 2 * 4 * 36


def test_body_of_loop() -> None:
    proto = build(
        """g (float[n,16] x, int64 m) => (float[n,16] y) {
            c = Constant<value=bool {1}>()
            y = Loop (m, c, x) <
                body = b (int64 i, bool k, float[n,16] s) => (bool o, float[n,16] r) {
                    o = Identity(k)  t = MatMul(s, w)  u = Add(t, b)  r = Tanh(u) } > }""",
        {"w": falling(16, 16), "b": B[:16]},
    )
    assert_same_answers(proto, X | {"m": np.array(3)})


def test_body_of_scan() -> None:
    proto = build(
        """g (float[t,16] x, float[20] s) => (float[20] y, float[t,20] z) {
            y, z = Scan <num_scan_inputs = 1,
                body = b (float[20] h, float[16] v) => (float[20] n, float[20] o) {
                    p = MatMul(v, w)  q = MatMul(h, u)  a = Add(p, q)  n = Tanh(a)  o = Identity(n) }> (s, x) }""",
        {"w": W, "u": falling(20, 20, seed=1)},
    )
    assert_same_answers(proto, {"x": correlated((6, 16)), "s": np.zeros(20, np.float32)})


def test_weight_shared_between_the_main_graph_and_a_branch() -> None:
    proto = build(
        """g (float[n,16] x, bool c) => (float[n,20] y) {
            a = MatMul(x, w)
            y = If (c) <
                then_branch = yes () => (float[n,20] r) { t = MatMul(x, w)  r = Add(t, a) },
                else_branch = no () => (float[n,20] r) { r = Neg(a) }
            > }""",
        {"w": W},
    )
    (site,) = linear(proto)
    assert [use.scope == "" for use in site.uses] == [True, False] and site.freed == 320
    for chosen in (True, False):
        assert_same_answers(proto, X | {"c": np.array(chosen)})


def test_a_node_before_a_branch_that_only_a_removed_node_read_goes() -> None:
    proto = build(
        """g (float[n,16] x, bool c) => (float[n,20] y) {
            i = Transpose(w)
            y = If (c) <
                then_branch = yes () => (float[n,20] r) { r = MatMul(x, i) },
                else_branch = no () => (float[n,20] r) { t = MatMul(x, i)  r = Neg(t) }
            > }""",
        {"w": WT},
    )
    made = assert_same_answers(proto, X | {"c": np.array(True)})
    assert [node.op_type for node in made.graph.node] == ["If"]


def test_nodes_of_another_domain_are_carried_through() -> None:
    proto = build(
        HEAD + "{ t = MatMul(x, w) u = com.microsoft.BiasGelu(t, b) v = com.microsoft.FusedMatMul(u, r) y = Relu(v) }",
        {"w": W, "b": B, "r": falling(20, 20)},
        imports=', "com.microsoft": 1',
    )
    assert [site.uses[0].output for site in linear(proto)] == ["t"]
    made = assert_same_answers(proto, X)
    kept = [node.SerializeToString() for node in proto.graph.node if node.domain]
    assert len(kept) == 2
    assert [node.SerializeToString() for node in made.graph.node if node.domain] == [
        node.SerializeToString() for node in from_proto(proto).proto.graph.node if node.domain
    ]


FUNCTION = """
    <opset_import: ["": 17], domain: "local"> layer (a, m, c) => (z) { p = MatMul(a, m)  q = Add(p, c)  z = Relu(q) }
"""


def test_layers_inside_model_local_functions() -> None:
    proto = build(
        HEAD + "{ t = local.layer(x, w, b) y = local.layer(t, v, b) }" + FUNCTION,
        {"w": W, "v": falling(20, 20, seed=1), "b": B},
        imports=', "local": 1',
    )
    assert len(linear(proto)) == 2
    expected = answers(proto, X)
    assert furthest(answers(rewritten(proto), X), expected) < 1e-5


def test_a_function_that_holds_its_own_weight_is_not_stored_twice() -> None:
    values = ", ".join(f"{value:.4f}" for value in falling(16, 16).reshape(-1))
    body = f"""<opset_import: ["": 17], domain: "local"> layer (a) => (z) {{
        w = Constant<value = float[16,16] {{{values}}}>() z = MatMul(a, w) }}"""
    proto = build(
        "g (float[n,16] x) => (float[n,16] y) { t = local.layer(x) y = local.layer(t) }" + body, imports=', "local": 1'
    )
    assert parameter_count(proto) == 256
    assert parameter_count(from_proto(proto).proto) == 256


# --- names, metadata, size ---------------------------------------------------------------------------


def test_unnamed_and_duplicate_node_names_become_unique_and_stay_the_same_every_time() -> None:
    proto = build(HEAD + "{ t = MatMul(x, w) u = MatMul(t, v) s = MatMul(u, v) y = Relu(s) }", {"w": W, "v": W.T @ W})
    for node, name in zip(proto.graph.node, ("", "fc", "fc", "MatMul_0"), strict=True):
        node.name = name
    first, second = (from_proto(proto).proto for _ in range(2))
    names = [node.name for node in first.graph.node]
    # onnxruntime does not take two nodes of one name in one graph; the model as it was loaded runs.
    assert len(set(names)) == 4 and names[1] == "fc" and names[3] == "MatMul_0" and all(names)
    assert names == [node.name for node in second.graph.node]
    assert furthest(answers(rewritten(proto), X), answers(first, X)) < 1e-5


@pytest.mark.parametrize("taken", ["MatMul_0/rank", "MatMul_0/product"])
def test_names_of_new_tensors_and_nodes_give_way_to_old_ones(taken: str) -> None:
    body = "{ o = Relu(x) t = MatMul(x, w) u = Add(t, b) m = ReduceMax<keepdims=1, axes=[1]>(o) y = Add(u, m) }"
    proto = build(HEAD + body, {"w": W, "b": B})
    for node in proto.graph.node:
        for field in (node.input, node.output):
            for place, name in enumerate(field):
                if name == "o":
                    field[place] = taken
    proto.graph.node[0].name = "MatMul_0/factor0"
    proto.graph.node[1].name = "MatMul_0"
    assert_same_answers(proto, X)


def test_data_that_have_the_name_of_a_new_tensor() -> None:
    proto = build("g (float[n,16] x) => (float[n,20] y) { o = Relu(x) y = MatMul(o, w) }", {"w": W})
    proto.graph.node[0].output[0] = proto.graph.node[1].input[0] = "MatMul_1/rank"
    assert_same_answers(proto, X)


def test_a_name_that_a_factor_needs_is_an_error_that_tells_it() -> None:
    proto = build(HEAD + "{ o = Relu(x) y = MatMul(o, w) }", {"w": W})
    proto.graph.node[0].output[0] = proto.graph.node[1].input[0] = "MatMul_1/first"
    with pytest.raises(ModelError, match="'MatMul_1/first'"):
        rewritten(proto)


def test_the_result_can_be_compressed_again() -> None:
    once = compress(build(HEAD + "{ y = Gemm(x, w, b) }", {"w": W, "b": B}), rank=8).model
    twice = compress(once, rank=4).model
    assert parameter_count(twice) < parameter_count(once)
    onnx.checker.check_model(twice, full_check=True)
    assert_clean(once, twice)


def test_everything_beside_the_layer_is_unchanged() -> None:
    proto = build(HEAD + "{ t = MatMul(x, w) u = Add(t, b) y = Softmax(u) }", {"w": W, "b": B})
    proto.producer_name, proto.producer_version, proto.doc_string = "maker", "1.2", "what it is"
    proto.domain, proto.model_version, proto.graph.doc_string = "org.example", 7, "the graph"
    entry = proto.metadata_props.add()
    entry.key, entry.value = "author", "somebody"
    proto.graph.node[2].doc_string = "the last"
    proto.graph.output[0].doc_string = "probabilities"
    made = assert_same_answers(proto, X)
    kept = next(node for node in made.graph.node if node.op_type == "Softmax")
    assert kept.doc_string == "the last" and list(kept.input) == ["u"]


def test_initializers_nobody_read_before_are_gone_too() -> None:
    proto = build(HEAD + "{ y = MatMul(x, w) }", {"w": W, "unread": falling(50, 50)})
    assert {tensor.name for tensor in rewritten(proto).graph.initializer} == {"MatMul_0/first", "MatMul_0/second"}


def test_file_shrinks(tmp_path: Path) -> None:
    proto = build("g (float[n,256] x) => (float[n,256] y) { y = MatMul(x, w) }", {"w": falling(256, 256)})
    onnx.save(proto, tmp_path / "m.onnx")
    result = compress(tmp_path / "m.onnx", rank=32)
    out = result.save(tmp_path / "out.onnx")
    assert out.stat().st_size < 0.26 * (tmp_path / "m.onnx").stat().st_size
    assert result.report["after"]["size_bytes"] == out.stat().st_size
    assert result.report["before"]["size_bytes"] == (tmp_path / "m.onnx").stat().st_size


def test_value_info_of_removed_tensors_goes_and_the_rest_stays() -> None:
    proto = onnx.shape_inference.infer_shapes(
        build(HEAD + "{ i = Transpose(w) t = MatMul(x, i) u = Add(t, b) y = Relu(u) }", {"w": WT, "b": B})
    )
    assert {value.name for value in proto.graph.value_info} >= {"i", "t", "u"}
    assert {value.name for value in rewritten(proto, {"x": X["x"]}).graph.value_info} == {"u"}


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("body", ["y = MatMul(x, w)", "y = Gemm(x, w, b)", "t = MatMul(x, w) y = Add(t, b)"])
def test_nan_in_a_weight_is_an_error_that_names_it(value: float, body: str) -> None:
    weight = W.copy()
    weight[3, 5] = value
    with pytest.raises(ModelError, match=r"'w'.* 1 NaN or Inf"):
        compress(build(f"{HEAD} {{ {body} }}", {"w": weight, "b": B} if "b)" in body else {"w": weight}), rank=4)


def test_half_precision_overflow_is_avoided() -> None:
    weight = (3e4 * (1 + 0.1 * falling(16, 20))).astype(np.float16)  # a row has norm 1.3e5, half ends at 6.5e4
    data = (correlated((24, 16)) * 1e-2).astype(np.float16)
    proto = build("g (float16[n,16] x) => (float16[n,20] y) { y = MatMul(x, w) }", {"w": weight})
    made = rewritten(proto, {"x": data}, fraction=0.5)
    assert all(np.isfinite(value).all() for value in answers(made, {"x": data}).values())


def test_models_with_sequences_and_loops_are_not_refused() -> None:
    proto = build(
        HEAD + "{ q = SequenceConstruct(x, x) o = Constant<value_int=0>() e = SequenceAt(q, o) y = MatMul(e, w) }",
        {"w": W},
    )
    assert_same_answers(proto, X)


def test_loops_that_carry_sequences_are_not_refused() -> None:
    proto = build(
        """g (float[n,16] x, int64 m) => (float[n,20] y) {
            c = Constant<value=bool {1}>()  z = Constant<value_int=0>()
            e = SequenceEmpty<dtype=1>()
            q = Loop (m, c, e) <
                body = b (int64 i, bool k, seq(float[n,16]) s) => (bool o, seq(float[n,16]) r) {
                    o = Identity(k)  r = SequenceInsert(s, x) } >
            t = SequenceAt(q, z)  y = MatMul(t, w) }""",
        {"w": W},
    )
    assert_same_answers(proto, X | {"m": np.array(2)})


def test_operators_only_onnxruntime_knows_do_not_hinder(tmp_path: Path) -> None:
    proto = build(
        HEAD + "{ t = com.microsoft.QuickGelu(x) y = MatMul(t, w) }", {"w": W}, imports=', "com.microsoft": 1'
    )
    entry: Any = proto.graph.node[0].attribute.add()
    entry.name, entry.type, entry.f = "alpha", onnx.AttributeProto.FLOAT, 1.0
    del proto.graph.output[0].type.tensor_type.shape.dim[:]  # the checker wants a shape here, onnxruntime does not
    proto.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT
    onnx.save(proto, tmp_path / "m.onnx")
    assert compress(tmp_path / "m.onnx", rank=4).report["ratio"]["parameters"] < 1
