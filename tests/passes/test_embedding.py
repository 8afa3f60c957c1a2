"""Factorized tables: Gather's edges as before, rows weighted by what the data look up, no cost for nothing."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from onnx import ModelProto

from lowrank_onnx.base import Counts
from lowrank_onnx.decompositions.rows import PSEUDO_COUNTS, pseudo_count, weighted_rows
from lowrank_onnx.errors import TargetError
from lowrank_onnx.model import parameter_count
from lowrank_onnx.passes.embedding import Embedding
from lowrank_onnx.passes.grouped_embedding import GroupedEmbedding
from lowrank_onnx.passes.nmf import NMF
from lowrank_onnx.passes.tensor_train import TensorTrain
from lowrank_onnx.pipeline import compress
from tests.builders import Array, answers, build, difference, factorized, falling, furthest, moments, problem

FLAT = "g (int64[n,s] i) => (float[n,s,12] y) { y = Gather(t, i) }"


def gather(table: Array, axis: int, indices: Array) -> ModelProto:
    """A model of one Gather, all shapes fixed."""
    shape = np.take(table, indices, axis).shape
    types = {np.dtype(np.int32): onnx.TensorProto.INT32, np.dtype(np.int64): onnx.TensorProto.INT64}
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Gather", ["t", "i"], ["y"], "look", axis=axis)],
        "g",
        [onnx.helper.make_tensor_value_info("i", types[indices.dtype], indices.shape)],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, shape)],
        [onnx.numpy_helper.from_array(np.ascontiguousarray(table), "t")],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_any_gather_at_full_rank_is_the_original(draw: Any) -> None:
    shape = tuple(draw.draw(st.lists(st.integers(2, 5), min_size=2, max_size=4)))
    axis = draw.draw(st.integers(-len(shape), len(shape) - 1))
    size = shape[axis]
    where = tuple(draw.draw(st.lists(st.integers(0, 3), max_size=3)))
    rng = np.random.default_rng(draw.draw(st.integers(0, 99)))
    dtype = draw.draw(st.sampled_from([np.int32, np.int64]))
    indices = np.asarray(rng.integers(-size, size, where), dtype)
    table = rng.standard_normal(shape).astype(np.float32)
    proto = gather(table, axis, indices)
    posed = problem(proto, {"i": np.stack([indices] * 3)} if indices.size else None)
    (site,) = posed.sites
    rows = np.moveaxis(table, axis, 0).reshape(size, -1)
    technique = draw.draw(st.sampled_from([Embedding(), GroupedEmbedding()])) if indices.size else Embedding()
    made = factorized(posed, technique, site, (min(rows.shape),))
    onnx.checker.check_model(made, full_check=True)
    feeds = {"i": indices}
    assert furthest(answers(made, feeds), answers(proto, feeds)) < 1e-5


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_one_index_out_of_range_fails_in_any_gather(draw: Any) -> None:
    technique = draw.draw(st.sampled_from([Embedding(), GroupedEmbedding(), NMF(), TensorTrain()]))
    shape = tuple(draw.draw(st.lists(st.integers(4, 6), min_size=2, max_size=3)))
    axis = draw.draw(st.integers(-len(shape), len(shape) - 1))
    size = shape[axis]
    where = tuple(draw.draw(st.lists(st.integers(1, 3), max_size=3)))
    dtype = draw.draw(st.sampled_from([np.int32, np.int64]))
    rng = np.random.default_rng(draw.draw(st.integers(0, 99)))
    indices = np.asarray(rng.integers(-size, size, where), dtype)
    proto = gather(rng.standard_normal(shape).astype(np.float32), axis, indices)
    posed = problem(proto, {"i": np.stack([indices] * 3)})
    (site,) = posed.sites
    made = factorized(posed, technique, site, (1,))
    for model in (proto, made):
        answers(model, {"i": indices})
    wrong = indices.copy()
    wrong.reshape(-1)[draw.draw(st.integers(0, indices.size - 1))] = draw.draw(
        st.sampled_from([size, -size - 1, 2**31 - 1, -(2**31)])
    )
    for model in (proto, made):
        with pytest.raises(Exception, match="out of data bounds"):
            answers(model, {"i": wrong})


@pytest.mark.parametrize("index", [20, -21, 2**31 - 1])
def test_indices_out_of_range_fail_as_before(index: int) -> None:
    proto = build(FLAT, {"t": falling(20, 12)})
    posed = problem(proto, {"i": np.zeros((4, 3), np.int64)})
    made = factorized(posed, Embedding(), posed.sites[0], (4,))
    for model in (proto, made):
        with pytest.raises(Exception, match="out of data bounds"):
            answers(model, {"i": np.full((1, 2), index)})


def test_lookups_are_counted_without_padding() -> None:
    ids = np.array([[3, -1, 7, 7], [5, 5, 7, 0], [3, 3, 3, 3]])
    mask = np.array([[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]])
    text = """g (int64[n,4] i, int64[n,4] attention_mask) => (float[n,4,12] y, int64[n,4] m) {
        y = Gather(t, i)  m = Identity(attention_mask) }"""
    posed = problem(build(text, {"t": falling(20, 12)}), {"i": ids, "attention_mask": mask})
    seen = moments(posed)["Gather_0"]["i"]
    assert isinstance(seen, Counts) and seen.rows == 9
    expected = {3: 5, 19: 1, 5: 2, 7: 1}
    assert {int(place): int(seen.total[place]) for place in np.flatnonzero(seen.total)} == expected
    assert 0 < seen.held.sum() < 9 and (seen.held <= seen.total).all()


def test_weights_make_the_best_table_for_what_is_looked_up() -> None:
    rng = np.random.default_rng(0)
    table, weights = rng.standard_normal((60, 12)), rng.random(60) ** 4 + 1e-3
    basis = weighted_rows(table, weights, weights)
    sigma = np.linalg.svd(np.sqrt(weights)[:, None] * table, compute_uv=False)
    assert basis.weighted is not None
    for rank in (1, 5, 12):
        first, second = basis.factors(rank)
        lost = float(weights @ np.sum((table - first @ second) ** 2, axis=1))
        assert lost == pytest.approx(float(np.sum(sigma[rank:] ** 2)), rel=1e-6, abs=1e-12)
        assert lost == pytest.approx(basis.weighted.left[rank], rel=1e-6, abs=1e-12)


def test_a_table_of_more_columns_than_rows_has_the_same_optimum() -> None:
    rng = np.random.default_rng(1)
    table, weights = rng.standard_normal((7, 30)), rng.random(7) + 0.1
    first, second = weighted_rows(table, weights).factors(3)
    u, sigma, vt = np.linalg.svd(np.sqrt(weights)[:, None] * table, full_matrices=False)
    best = (u[:, :3] * sigma[:3]) @ vt[:3] / np.sqrt(weights)[:, None]
    assert difference(first @ second, best) < 1e-9


def test_smoothing_is_what_the_held_out_lookups_ask_for() -> None:
    rng = np.random.default_rng(0)
    even, steep = np.full(500, 1 / 500), np.arange(1, 501) ** -3.0
    for share, small in ((even, False), (steep / steep.sum(), True)):
        seen, held = rng.multinomial(400, share), rng.multinomial(100, share)
        chosen = pseudo_count(seen + held, held)
        assert chosen <= 0.1 if small else chosen == PSEUDO_COUNTS[-1]
    assert pseudo_count(np.zeros(9), np.zeros(9)) == 1.0


def model_with_a_large_table() -> tuple[ModelProto, dict[str, Array]]:
    """A table that holds nearly all parameters, and a layer behind it."""
    text = "g (int64[n,s] i) => (float[n,s,32] y) { e = Gather(t, i)  y = MatMul(e, w) }"
    ids = np.minimum(np.random.default_rng(0).zipf(1.4, (60, 8)) - 1, 399)
    return build(text, {"t": falling(400, 32), "w": falling(32, 32, seed=3)}), {"i": ids}


def test_a_budget_of_parameters_takes_the_table() -> None:
    proto, data = model_with_a_large_table()
    for target in ("keep_params", "keep_size"):
        result = compress(proto, {target: 0.6}, calibrate=data, cache=False)
        rows = {row["name"]: row for row in result.report["sites"]}
        assert rows["Gather_0"]["technique"] == "embedding"
        assert parameter_count(result.model) <= 0.6 * parameter_count(proto) or target == "keep_size"
        assert result.report["ratio"]["size"] <= 0.6 or target == "keep_params"


def test_what_only_costs_multiply_accumulates_is_not_taken() -> None:
    proto, data = model_with_a_large_table()
    result = compress(proto, {"keep_macs": 0.6}, calibrate=data, cache=False)
    assert {row["kind"] for row in result.report["sites"] if row["decision"] == "factorized"} == {"linear"}
    for options in ({"keep_macs": 0.6}, {"speedup": 1.5}, {"max_drop": 0.2}):
        with pytest.raises(TargetError):
            compress(proto, options, calibrate=data, technique=["embedding"], cache=False)


def test_two_lookups_in_one_table_share_the_factors() -> None:
    text = """g (int64[n,s] i, int64[n,s] j) => (float[n,s,12] y) {
        a = Gather(t, i)  b = Gather(t, j)  y = Sub(a, b) }"""
    ids = {"i": np.arange(20)[None].repeat(3, 0), "j": np.arange(20)[::-1][None].repeat(3, 0).copy()}
    posed = problem(build(text, {"t": falling(20, 12)}), ids)
    made = factorized(posed, Embedding(), posed.sites[0], (4,))
    assert [list(tensor.dims) for tensor in made.graph.initializer] == [[20, 4], [4, 12]]


def test_rows_read_often_lose_less_with_data_than_without() -> None:
    rng = np.random.default_rng(0)
    ids = np.minimum(rng.zipf(2.0, (50, 6)) - 1, 99)
    table = rng.standard_normal((100, 12)).astype(np.float32)
    proto = build(FLAT, {"t": table})
    original = answers(proto, {"i": ids})["y"]
    lost = []
    for data in ({"i": ids}, None):
        posed = problem(proto, data)
        made = factorized(posed, Embedding(), posed.sites[0], (4,))
        lost.append(difference(answers(made, {"i": ids})["y"], original))
    assert lost[0] < 0.6 * lost[1]
