"""A table that is the output head as well: one factorization for both uses, told by agreement."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pydoc_data.topics import topics

import numpy as np
import onnx
import pytest
from onnx import ModelProto

from lowrank_onnx.decompositions.tied_rows import tied_basis
from lowrank_onnx.model import parameter_count
from lowrank_onnx.passes.tied import Tied
from lowrank_onnx.pipeline import compress
from lowrank_onnx.rewrite import rewrite
from tests.builders import Array, answers, build, difference, falling, furthest, moments, problem, root_probabilities

HEADS = {
    "MatMul": "h = MatMul(e, w)  t = Transpose<perm=[1,0]>(E)  l = MatMul(h, t)  logits = Add(l, b)",
    "Gemm": "h = MatMul(e, w)  logits = Gemm<transB=1>(h, E, b)",
}


@cache
def bigram_model(words: int = 500, width: int = 48) -> tuple[ModelProto, dict[str, Array]]:
    """A language model with tied head, trained in closed form on Python's manual: log p(j | i) ~ e_i W e_jᵀ + b_j."""
    text = re.findall(r"[a-z]+|[^a-z\s]", " ".join(topics.values()).lower())
    names, counts = np.unique(text, return_counts=True)
    known = {name: place for place, name in enumerate(names[np.argsort(-counts, kind="stable")[:words]])}
    ids = np.array([known[word] for word in text if word in known])
    pairs = np.zeros((words, words))
    np.add.at(pairs, (ids[:-1], ids[1:]), 1)
    joint = (pairs + 0.05) / (pairs + 0.05).sum()
    table = np.log(joint / np.outer(joint.sum(1), joint.sum(0)))
    u, sigma, _ = np.linalg.svd(np.concatenate([table, table.T], axis=1), full_matrices=False)
    rows = u[:, :width] * np.sqrt(sigma[:width])
    back = np.linalg.pinv(rows)
    constants = {"E": rows, "w": back @ table @ back.T, "b": np.log(joint.sum(0))}
    form = f"g (int64[n,s] i) => (float[n,s,{words}] logits) {{ e = Gather(E, i)  {HEADS['MatMul']} }}"
    proto = build(form, {name: value.astype(np.float32) for name, value in constants.items()})
    return proto, {"i": ids[: len(ids) // 32 * 32].reshape(-1, 32)[:200]}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("data", [True, False], ids=["data", "weight"])
def test_both_uses_answer_as_the_dense_table(head: str, data: bool) -> None:
    shape = "n" if head == "Gemm" else "n,s"
    text = f"g (int64[{shape}] i) => (float[{shape},40] logits) {{ e = Gather(E, i)  {HEADS[head]} }}"
    bias = np.linspace(-1, 1, 40, dtype=np.float32)
    proto = build(text, {"E": falling(40, 12), "w": falling(12, 12, seed=1), "b": bias})
    ids = np.random.default_rng(0).integers(-40, 40, 30 if head == "Gemm" else (30, 5))
    posed = problem(proto, {"i": ids} if data else None)
    (site,) = [site for site in posed.sites if site.kind == "tied"]
    technique = Tied()
    assert technique.refuse(site) is None and site.freed == site.parameters == 480
    analysis = technique.analyse(site, moments(posed).get(site.name))
    for rank in (3, 12):
        candidate = technique.candidate(site, analysis, (rank,))
        factors = technique.factorize(site, analysis, candidate)
        made = rewrite(posed.model, technique.emit(site, candidate, factors))
        onnx.checker.check_model(made, full_check=True)
        assert parameter_count(made) == parameter_count(proto) - site.freed + candidate.parameters
        dense = technique.dense_equivalent(site, candidate, factors)
        table, layer = (dense[name].weight for name in site.parts)
        assert difference(layer, table.T) == 0
        expected = build(text, {"E": table.astype(np.float32), "w": falling(12, 12, seed=1), "b": bias})
        assert furthest(answers(made, {"i": ids}), answers(expected, {"i": ids})) < 1e-4
        if rank == 12:
            assert furthest(answers(made, {"i": ids}), answers(proto, {"i": ids})) < 1e-4
        assert candidate.weight_error == pytest.approx(difference(table, site.weight), abs=1e-5)


def test_errors_told_are_those_of_lookups_and_logits() -> None:
    rng = np.random.default_rng(0)
    table, hidden = rng.standard_normal((50, 8)), rng.standard_normal((200, 8)) @ rng.standard_normal((8, 8))
    often = rng.random(50) ** 3
    basis = tied_basis((table * often[:, None]).T @ table, table.T @ table, hidden.T @ hidden / 200, 4)
    for rank in (1, 4, 8):
        made = table @ basis.into[:, :rank] @ basis.back[:rank]
        lookup = np.sqrt(often @ np.sum((table - made) ** 2, axis=1) / (often @ np.sum(table**2, axis=1)))
        assert basis.errors(rank)[0] == pytest.approx(lookup, abs=1e-6)
        assert basis.errors(rank)[1] == pytest.approx(difference(hidden @ made.T, hidden @ table.T), abs=1e-6)


def test_a_trained_model_keeps_its_best_guesses() -> None:
    proto, data = bigram_model()
    result = compress(proto, {"keep_params": 0.6}, calibrate=data, technique=["tied"], cache=False)
    (row,) = [row for row in result.report["sites"] if row["decision"] == "factorized"]
    assert row["kind"] == "tied" and row["technique"] == "tied"
    assert parameter_count(result.model) <= 0.6 * parameter_count(proto)
    agreement = result.report["fidelity"]["agreement"]
    before, after = (answers(model, {"i": data["i"]})["logits"].argmax(-1) for model in (proto, result.model))
    assert agreement == pytest.approx(float((before == after).mean()), abs=1e-6)
    assert agreement > 0.6


def test_two_copies_of_one_table_are_tied_as_well() -> None:
    text = "g (int64[n] i) => (float[n,40] y) { e = Gather(E, i)  y = MatMul(e, T) }"
    proto = build(text, {"E": falling(40, 12), "T": falling(40, 12).T})
    (site,) = [site for site in problem(proto).sites if site.kind == "tied"]
    assert site.freed == 960
    other = build(text, {"E": falling(40, 12), "T": falling(12, 40)})
    assert not [site for site in problem(other).sites if site.kind == "tied"]


def test_what_the_head_predicts_chooses_better_factors() -> None:
    proto, data = bigram_model()
    reference = answers(proto, {"i": data["i"][100:]})["logits"].astype(np.float64)
    posed = problem(proto, {"i": data["i"][:100]})
    (site,) = [site for site in posed.sites if site.kind == "tied"]
    seen = moments(posed)[site.name]
    blind = {name: replace(entry, spread=None) if hasattr(entry, "spread") else entry for name, entry in seen.items()}
    lost = []
    for entry in (seen, blind):
        analysis = Tied().analyse(site, entry)
        candidate = Tied().candidate(site, analysis, (24,))
        made = rewrite(posed.model, Tied().emit(site, candidate, Tied().factorize(site, analysis, candidate)))
        scores = answers(made, {"i": data["i"][100:]})["logits"]
        lost.append(float(np.mean(np.sum((root_probabilities(reference) - root_probabilities(scores)) ** 2, axis=-1))))
    assert lost[0] < 0.95 * lost[1]
