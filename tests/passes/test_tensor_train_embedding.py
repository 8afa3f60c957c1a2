"""Tables as tensor trains: digits, order of rows, errors, edges of Gather as before."""

from __future__ import annotations

from math import prod
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from lowrank_onnx.decompositions.table_train import full_ranks, sorted_rows, split_table, table_train
from lowrank_onnx.passes.tensor_train import TensorTrain
from lowrank_onnx.pipeline import compress
from tests.builders import answers, build, difference, factorized, falling, furthest, moments, problem

TOKENS = "g (int64[n,s] i) => (float[n,s,12] y) { y = Gather(t, i) }"


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(16, 60_000), st.integers(2, 1100), st.integers(2, 4))
def test_digits_hold_every_row_and_just_the_features(rows: int, columns: int, count: int) -> None:
    heights, widths = split_table(rows, columns, count)
    assert len(heights) == len(widths) == count and min(*heights, *widths) >= 1
    assert prod(widths) == columns and rows <= prod(heights)
    assert prod(heights[:-1]) * (heights[-1] - 1) < rows, "a digit that no row has"
    assert prod(heights) <= rows * 1.05 + 8 * count**2 or rows < 8**count
    assert list(widths) == sorted(widths)


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize(("rows", "columns"), [(50, 12), (81, 7), (16, 24)])
def test_full_rank_is_the_table(count: int, rows: int, columns: int) -> None:
    rng = np.random.default_rng(0)
    table, weights = rng.standard_normal((rows, columns)), rng.random(rows) + 0.1
    train = table_train(table, weights, count)
    assert train.full() == full_ranks(train.rows, train.columns)
    cores = train.cores(train.full())
    bonds = (1, *train.full(), 1)
    shapes = zip(bonds, train.rows, train.columns, bonds[1:], strict=False)
    assert [core.shape for core in cores] == list(shapes)
    assert difference(train.restored(cores), table) < 1e-12


def test_a_cut_is_the_best_for_weights_of_first_digits() -> None:
    rng = np.random.default_rng(0)
    rows, columns = split_table(48, 12, 2)
    assert prod(rows) == 48
    weights = np.repeat(4.0 ** np.arange(rows[0], 0, -1), rows[1])  # already in falling steps of two
    table = rng.standard_normal((48, 12))
    train = table_train(table, weights, 2)
    assert (train.place // rows[1] == np.arange(48) // rows[1]).all()
    for rank in (1, 5, train.full()[0] - 1):
        lost = float(weights @ np.sum((table - train.restored(train.cores((rank,)))) ** 2, axis=1))
        sorted_table = np.empty_like(table)
        sorted_table[train.place] = table
        scaled = sorted_table * np.sqrt(weights)[:, None]
        unfolded = scaled.reshape(*rows, *columns).transpose(0, 2, 1, 3).reshape(rows[0] * columns[0], -1)
        tail = np.linalg.svd(unfolded, compute_uv=False)[rank:]
        assert lost == pytest.approx(float(tail @ tail), rel=1e-9)


def test_heavy_rows_come_first_and_alike_ones_together() -> None:
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((4, 8)) * 5
    kind = rng.integers(0, 4, 400)
    table = centres[kind] + 0.01 * rng.standard_normal((400, 8))
    weights = np.where(np.arange(400) % 8 == 0, 64.0, 1.0)
    order = sorted_rows(table, weights, 40)
    assert sorted(order.tolist()) == list(range(400))
    assert (weights[order[:50]] == 64).all()
    blocks = kind[order[50:]].reshape(-1, 10)  # four kinds meet at three places, so three blocks may hold two
    assert np.count_nonzero(np.ptp(blocks, axis=1)) <= 3


def test_sorting_pays() -> None:
    rng = np.random.default_rng(0)
    table = rng.standard_normal((20, 16))[rng.integers(0, 20, 600)] + 0.3 * rng.standard_normal((600, 16))
    train = table_train(table, np.ones(600), 2)
    rank = train.full()[0] // 4
    lost = difference(train.restored(train.cores((rank,))), table)
    unsorted = np.zeros((prod(train.rows), 16))
    unsorted[:600] = table
    matrix = unsorted.reshape(*train.rows, *train.columns).transpose(0, 2, 1, 3).reshape(len(train.left), -1)
    sigma = np.linalg.svd(matrix, compute_uv=False)
    assert lost < 0.8 * float(np.sqrt(np.sum(sigma[rank:] ** 2) / np.sum(sigma**2)))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_any_gather_at_full_rank_is_the_original(draw: Any) -> None:
    cores = draw.draw(st.integers(2, 3))
    size = draw.draw(st.integers(8, 30))
    others = draw.draw(st.lists(st.integers(2, 5), min_size=1, max_size=2))
    axis = draw.draw(st.integers(0, len(others)))
    shape = [*others[:axis], size, *others[axis:]]
    where = tuple(draw.draw(st.lists(st.integers(0, 3), max_size=3)))
    dtype, name = draw.draw(st.sampled_from([(np.int32, "int32"), (np.int64, "int64")]))
    rng = np.random.default_rng(draw.draw(st.integers(0, 99)))
    indices = np.asarray(rng.integers(-size, size, where), dtype)
    table = rng.standard_normal(shape).astype(np.float32)
    ends = [*others[:axis], *where, *others[axis:]]
    text = f"g ({name}{list(where) or ''} i) => (float{ends} y) {{ y = Gather<axis={axis - len(shape)}>(t, i) }}"
    proto = build(text, {"t": table})
    posed = problem(proto)
    technique = TensorTrain(cores=cores)
    rows = np.moveaxis(table, axis, 0).reshape(size, -1)
    made = factorized(posed, technique, posed.sites[0], full_ranks(*split_table(*rows.shape, cores)))
    assert furthest(answers(made, {"i": indices}), answers(proto, {"i": indices})) < 1e-5


@pytest.mark.parametrize("index", [20, -21, 2**31 - 1])
@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_indices_out_of_range_fail_as_before(index: int, dtype: str) -> None:
    proto = build(TOKENS.replace("int64", dtype), {"t": falling(20, 12)})
    posed = problem(proto)
    made = factorized(posed, TensorTrain(), posed.sites[0], (5,))
    for model in (proto, made):
        with pytest.raises(Exception, match="out of data bounds"):
            answers(model, {"i": np.full((1, 2), index, dtype)})


def test_three_cores_err_by_what_they_say() -> None:
    rng = np.random.default_rng(0)
    ids = np.minimum(rng.zipf(1.5, (40, 5)) - 1, 63)
    proto = build(TOKENS, {"t": falling(64, 12)})
    posed = problem(proto, {"i": ids})
    (site,), technique = posed.sites, TensorTrain(cores=3)
    analysis = technique.analyse(site, moments(posed)[site.name])
    for ranks in technique.ranks(site, analysis):
        candidate = technique.candidate(site, analysis, ranks)
        made = factorized(posed, technique, site, ranks)
        lost = difference(answers(made, {"i": ids})["y"], answers(proto, {"i": ids})["y"])
        assert candidate.output_error == pytest.approx(lost, rel=1e-3, abs=1e-5)
        every = {"i": np.arange(64)[None]}
        assert candidate.weight_error == pytest.approx(
            difference(answers(made, every)["y"], answers(proto, every)["y"]), rel=1e-3, abs=1e-5
        )


def test_too_few_rows_for_the_digits_are_refused() -> None:
    (site,) = problem(build("g (int64[n] i) => (float[n,12] y) { y = Gather(t, i) }", {"t": falling(7, 12)})).sites
    assert TensorTrain(cores=3).refuse(site) == "the table has 7 rows, too few for 3 digits"
    assert TensorTrain(cores=2).refuse(site) is None


def test_a_table_shrinks_by_name() -> None:
    ids = np.minimum(np.random.default_rng(0).zipf(1.4, (60, 8)) - 1, 399)
    text = "g (int64[n,s] i) => (float[n,s,32] y) { e = Gather(t, i)  y = MatMul(e, w) }"
    proto = build(text, {"t": falling(400, 32), "w": falling(32, 32, seed=3)})
    result = compress(proto, {"keep_params": 0.6}, calibrate={"i": ids}, technique=["tensor_train"], cache=False)
    (row,) = [row for row in result.report["sites"] if row["decision"] == "factorized"]
    assert row["technique"] == "tensor_train" and result.report["ratio"]["parameters"] <= 0.6
