"""Layers in front of a softmax: the optimum in the metric of probabilities, and what is left alone."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import onnx
import pytest
import scipy.linalg
from onnx import ModelProto

from lowrank_onnx.base import Pass
from lowrank_onnx.model import parameter_count
from lowrank_onnx.passes.logits import Logits
from lowrank_onnx.passes.svd import SVD
from lowrank_onnx.pipeline import apply, compress
from tests.builders import (
    Array,
    answers,
    build,
    correlated,
    difference,
    factorized,
    falling,
    moments,
    problem,
    root_probabilities,
)

TEXT = "g (float[n,12] x) => (float[n,60] logits) { m = MatMul(x, w)  logits = Add(m, b) }"


def model() -> tuple[ModelProto, dict[str, Array]]:
    """Sixty classes, of which a few are ever expected; the others are told apart in vain."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((12, 60)) * np.where(np.arange(60) < 10, 0.4, 1.2)
    bias = np.where(np.arange(60) < 10, 4.0, -6.0)
    data = {"x": correlated((400, 12)) / 2}
    return build(TEXT, {"w": weight.astype(np.float32), "b": bias.astype(np.float32)}), data


def lost(proto: ModelProto, made: ModelProto, x: Array) -> float:
    """Mean squared distance of root probabilities: half of KL."""
    before, after = (root_probabilities(answers(entry, {"x": x})["logits"]) for entry in (proto, made))
    return float(np.mean(np.sum((before - after) ** 2, axis=1)))


@pytest.mark.parametrize("rank", [4, 6, 8])  # below that both lose nearly everything
def test_probabilities_lose_less_than_by_truncated_svd(rank: int) -> None:
    proto, data = model()
    x = correlated((300, 12), seed=1) / 2
    techniques: tuple[Pass, ...] = (Logits(), SVD())
    made = []
    for technique in techniques:
        posed = problem(proto, data)
        made.append(lost(proto, factorized(posed, technique, posed.sites[0], (rank,)), x))
    assert made[0] < 0.75 * made[1]


def test_no_map_of_that_rank_is_nearer_in_the_metric() -> None:
    proto, data = model()
    posed = problem(proto, data)
    (site,) = posed.sites
    seen = moments(posed)[site.name]["x"]
    weight = site.weight.astype(np.float64)
    bias = site.uses[0].bias
    assert bias is not None
    scores = data["x"].astype(np.float64) @ weight + bias
    p = root_probabilities(scores) ** 2
    fisher = np.diag(p.mean(axis=0)) - p.T @ p / len(p)
    centred = seen.gram - np.outer(seen.mean, seen.mean)
    root = scipy.linalg.sqrtm(centred).real
    sides = root @ weight @ scipy.linalg.sqrtm(fisher).real
    analysis = Logits(ridge=0).analyse(site, {"x": seen})
    for rank in (1, 3, 7):
        made = analysis.into[:, :rank] @ analysis.back[:rank] @ weight
        missed = root @ (weight - made)
        measured = float(np.trace(missed @ fisher @ missed.T))
        tail = np.linalg.svd(sides, compute_uv=False)[rank:]
        assert measured == pytest.approx(float(tail @ tail), rel=1e-3)


def test_a_refit_gives_what_the_input_delivered_can_give() -> None:
    proto, data = model()
    posed = problem(proto, data)
    (site,) = posed.sites
    technique, seen = Logits(), moments(posed)[site.name]
    analysis = technique.analyse(site, seen)
    candidate = technique.candidate(site, analysis, (5,))
    factors = technique.factorize(site, analysis, candidate)
    rng = np.random.default_rng(0)
    x = data["x"].astype(np.float64)
    delivered, wanted = x + 0.3 * rng.standard_normal(x.shape) + 0.5, x @ site.weight
    given = replace(
        seen["x"],
        mean=delivered.mean(axis=0),
        gram=delivered.T @ delivered / len(x),
        target_cross=delivered.T @ wanted / len(x),
        target_mean=wanted.mean(axis=0),
        target_energy=float(np.mean(np.sum(wanted**2, axis=1))),
    )
    made = technique.refit(site, candidate, factors, given, 0.0)
    np.testing.assert_array_equal(made["first"], factors["first"])
    bias = site.uses[0].bias
    assert bias is not None
    inner = np.concatenate([delivered @ made["first"], np.ones((len(x), 1))], axis=1)
    best = inner @ np.linalg.lstsq(inner, wanted + bias, rcond=None)[0]
    answer = delivered @ made["first"] @ made["second"] + made["bias:MatMul_0"]
    assert difference(answer, best) < 1e-5


def reason(text: str, weight: Array | None = None) -> str | None:
    (site,) = problem(build(text, {"w": falling(12, 60) if weight is None else weight})).sites
    return Logits().refuse(site)


def test_what_is_no_head_is_refused() -> None:
    told = "what the layer gives are not the scores of a softmax"
    assert reason("g (float[n,12] x) => (float[n,60] y) { y = MatMul(x, w) }") == told
    assert reason("g (float[n,60] x) => (float[60,12] y) { y = MatMul(w, x) }", falling(60, 60)) == told
    two = "g (float[n,12] x, float[n,12] u) => (float[n,60] logits, float[n,60] scores) "
    assert reason(two + "{ logits = MatMul(x, w)  scores = MatMul(u, w) }") == told
    assert reason("g (float[n,12] x) => (float[n,60] logits) { logits = MatMul(x, w) }") is None


def test_a_budget_keeps_more_of_the_best_classes_than_with_svd() -> None:
    proto, data = model()
    kept = {
        technique: compress(proto, {"keep_params": 0.7}, technique=[technique], calibrate=data, cache=False).report[
            "fidelity"
        ]["agreement"]
        for technique in ("svd", "logits")
    }
    assert kept["logits"] > max(0.9, kept["svd"])


FORMS = {
    "matmul": "(float[n,s,60] logits) { m = MatMul(x, w)  logits = Add(m, b) }",
    "matmul of a turned table": "(float[n,s,60] logits) { t = Transpose(e)  m = MatMul(x, t)  logits = Add(m, b) }",
    "without bias": "(float[n,s,60] logits) { t = Transpose<perm=[1,0]>(e)  logits = MatMul(x, t) }",
    "tied": """(float[n,s,60] logits, float[n,s,12] y) {
        t = Transpose<perm=[1,0]>(e)  logits = MatMul(x, t)  k = ArgMax<axis=-1, keepdims=0>(x)  y = Gather(e, k) }""",
    "gemm": "(float[n,60] logits) { logits = Gemm<transB=1>(x, e, b) }",
    "gemm alpha": "(float[n,60] logits) { logits = Gemm<transB=1, alpha=0.5, beta=2.0>(x, e, b) }",
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [2, 12])
def test_the_best_classes_get_the_scores_they_had(form: str, rank: int) -> None:
    base, data = model()
    weight, bias = (onnx.numpy_helper.to_array(tensor) for tensor in base.graph.initializer)
    flat = form.startswith("gemm")
    x = data["x"] if flat else data["x"].reshape(50, 8, 12)
    text = f"g (float[{'n' if flat else 'n,s'},12] x) => {FORMS[form]}"
    proto = build(text, {"w": weight, "b": bias, "e": weight.T})
    unused = {tensor.name for tensor in proto.graph.initializer} - set(re.findall(r"\b[web]\b", FORMS[form]))
    for tensor in [tensor for tensor in proto.graph.initializer if tensor.name in unused]:
        proto.graph.initializer.remove(tensor)
    posed = problem(proto, {"x": x})
    site = next(site for site in posed.sites if site.kind == "linear")
    technique = Logits(rerank=5)
    assert technique.refuse(site) is None
    candidate = technique.candidate(site, technique.analyse(site, moments(posed)[site.name]), (rank,))
    made = factorized(posed, technique, site, (rank,))
    onnx.checker.check_model(made, full_check=True)
    assert parameter_count(made) == parameter_count(proto) - site.freed + candidate.parameters
    before, after = (answers(entry, {"x": x})["logits"].reshape(-1, 60) for entry in (proto, made))
    screen = answers(factorized(posed, Logits(), site, (rank,)), {"x": x})["logits"].reshape(-1, 60)
    best = np.argsort(-screen, axis=1)[:, :5]
    np.testing.assert_allclose(
        np.take_along_axis(after, best, 1), np.take_along_axis(before, best, 1), rtol=1e-4, atol=1e-4
    )
    others = np.ones_like(screen, bool)
    np.put_along_axis(others, best, False, 1)
    np.testing.assert_allclose(after[others], screen[others], rtol=1e-5, atol=1e-5)


def test_re_ranking_keeps_the_best_guess_at_less_work() -> None:
    proto, data = model()
    told = {}
    for rerank in (0, 8):
        result = compress(proto, rank=4, technique=[f"logits:rerank={rerank}"], calibrate=data, cache=False)
        told[rerank] = result.report["fidelity"]["agreement"]
        again = apply(proto, result.plan, calibrate=data)
        assert again.model.SerializeToString() == result.model.SerializeToString()
    assert told[8] > 0.98 > told[0]
    assert "more than the 60 to re-rank" in str(Logits(rerank=60).refuse(problem(proto).sites[0]))
