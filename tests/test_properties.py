"""Linear layers of every shape, drawn at random: the factors answer as the weight they multiply out to."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
from hypothesis import given, settings

from lowrank_onnx.base import RankWish
from lowrank_onnx.chains import balanced
from lowrank_onnx.linalg import effective_rank, energy_rank, psd_root, regression, right_basis, with_ridge
from lowrank_onnx.model import parameter_count
from lowrank_onnx.passes.svd import SVD
from lowrank_onnx.rewrite import rewrite
from tests.builders import Array, answers, build, difference, furthest, moments, problem

quick = settings(deadline=None, max_examples=40, derandomize=True)

WEIGHTS = st.sampled_from(["random", "rank one", "one row", "constant", "tiny", "huge", "orthogonal"])
DATA = st.sampled_from(["random", "constant", "zeros", "one feature", "few rows"])


def weight_of(kind: str, rows: int, columns: int, rng: np.random.Generator) -> Array:
    weight = rng.standard_normal((rows, columns))
    if kind == "rank one":
        return np.outer(weight[:, 0], weight[0])
    if kind == "one row":
        weight[1:] = 0
    if kind == "constant":
        return np.full((rows, columns), 0.3)
    if kind == "orthogonal":
        return np.asarray(np.linalg.qr(rng.standard_normal((max(rows, columns),) * 2))[0][:rows, :columns])
    return weight * {"tiny": 1e-8, "huge": 1e8}.get(kind, 1.0)


def data_of(kind: str, rows: int, width: int, rng: np.random.Generator) -> Array:
    x = rng.standard_normal((2 if kind == "few rows" else rows, width))
    if kind == "constant":
        x[:] = x[0]
    if kind == "zeros":
        x[:] = 0
    if kind == "one feature":
        x[:, 1:] = 0
    return x


@quick
@given(st.data(), WEIGHTS, DATA, st.booleans(), st.integers(2, 24), st.integers(2, 24))
def test_any_layer_at_any_rank(draw: Any, weights: str, data: str, aware: bool, rows: int, columns: int) -> None:
    rng = np.random.default_rng(rows * 31 + columns)
    weight = weight_of(weights, rows, columns, rng).astype(np.float32)
    x = {"x": data_of(data, 30, rows, rng).astype(np.float32)}
    spelling = draw.draw(st.sampled_from(["MatMul(x, w)", "Gemm(x, w, b)", "Gemm<transB=1, alpha=0.5>(x, w)"]))
    stored = {"w": np.ascontiguousarray(weight.T) if "transB" in spelling else weight}
    if "b)" in spelling:
        stored["b"] = rng.standard_normal(columns).astype(np.float32)
    proto = build(f"g (float[n,{rows}] x) => (float[n,{columns}] y) {{ y = {spelling} }}", stored)
    posed = problem(proto, x if aware else None)
    (site,) = posed.sites
    technique = SVD()
    assert technique.refuse(site) is None
    analysis = technique.analyse(site, moments(posed).get(site.name))
    rank = draw.draw(st.integers(1, min(rows, columns)))
    candidate = technique.candidate(site, analysis, (rank,))
    factors = technique.factorize(site, analysis, candidate)
    made = rewrite(posed.model, technique.emit(site, candidate, factors))
    assert parameter_count(made) == parameter_count(proto) - site.freed + candidate.parameters
    assert candidate.weight_error is not None and np.isfinite(candidate.error) and candidate.error >= -1e-6
    dense = technique.dense_equivalent(site, candidate, factors)[site.name]
    bias = dense.biases.get(site.uses[0].node, stored.get("b", np.zeros(columns, np.float32)))
    expected = x["x"].astype(np.float64) @ dense.weight + bias
    answer = answers(made, x)["y"]
    scale = float(np.linalg.norm(x["x"].astype(np.float64)) * np.linalg.norm(weight)) + float(np.linalg.norm(bias))
    assert np.linalg.norm(answer - expected) <= 1e-4 * scale + 1e-30
    if rank == min(rows, columns):
        assert np.linalg.norm(answer - answers(proto, x)["y"]) <= 1e-4 * scale + 1e-30
    if not aware:
        exact = np.linalg.svd(weight_as_read(site.weight), compute_uv=False)
        best = float(np.sqrt(np.sum(exact[rank:] ** 2) / np.sum(exact**2)))
        assert abs(candidate.weight_error - best) <= 1e-6
        assert difference(dense.weight, site.weight) <= best + 1e-5


def weight_as_read(weight: Array) -> Array:
    return weight.astype(np.float64)


@quick
@given(st.integers(2, 12), st.integers(2, 12), st.integers(0, 10_000))
def test_data_aware_factors_are_the_best_on_the_data(rows: int, columns: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((rows, columns))
    x = rng.standard_normal((60, rows)) @ rng.standard_normal((rows, rows)) + rng.standard_normal(rows)
    text = f"g (double[n,{rows}] x) => (double[n,{columns}] y) {{ y = Gemm(x, w, b) }}"
    posed = problem(build(text, {"w": weight, "b": np.zeros(columns)}), {"x": x})
    (site,) = posed.sites
    technique = SVD(ridge=0.0)
    analysis = technique.analyse(site, moments(posed)[site.name])
    rank = max(min(rows, columns) // 2, 1)
    candidate = technique.candidate(site, analysis, (rank,))
    # The best approximation of the centred output by r dimensions, whatever the map, is its own truncated SVD.
    output = x @ weight
    sigma = np.linalg.svd(output - output.mean(axis=0), compute_uv=False)
    best = np.sqrt(np.sum(sigma[rank:] ** 2)) / np.linalg.norm(output)
    assert candidate.output_error is not None
    assert abs(candidate.output_error - best) <= 1e-5 + 1e-3 * best


@quick
@given(st.sampled_from(["1", "8", "100", "0.5", "1.0", "0.01"]), st.integers(2, 40))
def test_rank_wishes_stay_between_one_and_full(text: str, full: int) -> None:
    wish = RankWish(absolute=int(text)) if "." not in text else RankWish(fraction=float(text))
    rank = wish.ranks(full)
    assert 1 <= rank <= full
    assert rank == (min(int(text), full) if "." not in text else max(1, min(full, round(float(text) * full))))


@quick
@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=20), st.floats(0.01, 1.0))
def test_energy_rank_is_the_smallest_that_keeps_the_share(values: list[float], energy: float) -> None:
    sigma = np.sort(np.array(values))[::-1]
    rank = energy_rank(sigma, energy)
    squared = sigma**2
    if squared.sum() > 0:
        assert squared[:rank].sum() >= energy * squared.sum() * (1 - 1e-9)
        assert rank == 1 or squared[: rank - 1].sum() <= energy * squared.sum() * (1 + 1e-9)
    else:
        assert rank == 1


@quick
@given(st.integers(1, 10), st.integers(1, 10), st.integers(1, 10), st.integers(0, 999))
def test_psd_root_and_basis(size: int, columns: int, rank: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    half = rng.standard_normal((size, min(rank, size)))
    gram = half @ half.T
    root = psd_root(gram)
    assert difference(root @ root.T, gram) <= 1e-7
    weight = rng.standard_normal((size, columns))
    sigma, right = right_basis(root, weight)
    assert np.allclose(right.T @ right, np.eye(right.shape[1]), atol=1e-9)
    values = np.sort(np.linalg.eigvalsh(weight.T @ gram @ weight))[::-1][: len(sigma)]
    assert np.allclose(sigma**2, np.maximum(values, 0), rtol=1e-6, atol=1e-7 * float(np.trace(gram) + 1))


def test_regression_recovers_the_map_and_shrinks_to_the_prior() -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((200, 6)), rng.standard_normal((6, 4))
    gram, cross = x.T @ x / 200, x.T @ (x @ weight) / 200
    assert difference(regression(gram, cross, np.zeros((6, 4)), 0.0), weight) < 1e-10
    prior = rng.standard_normal((6, 4))
    assert difference(regression(gram, cross, prior, 1e9), prior) < 1e-6


def test_ridge_is_in_units_of_the_mean_diagonal() -> None:
    gram = np.diag([1.0, 3.0])
    assert np.array_equal(with_ridge(gram, 0.5), np.diag([2.0, 4.0]))
    assert np.array_equal(gram, np.diag([1.0, 3.0]))


def test_effective_rank_counts_equal_values() -> None:
    assert abs(effective_rank(np.ones(7)) - 7) < 1e-12
    assert effective_rank(np.array([1.0, 0.0])) == 1.0


def test_balancing_keeps_the_product() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((3, 8, 4)) * 1e6, rng.standard_normal((3, 4, 5))
    first[:, :, 2] = 0
    left, right = balanced(first, second)
    assert difference(left @ right, first @ second) < 1e-12
    assert np.abs(left).max() < 1e5 and furthest({"a": left[:, :, 2]}, {"a": first[:, :, 2]}) == 0
