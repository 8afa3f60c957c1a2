"""One first factor for layers of neighbouring blocks: which are joined, that it is stored once, its optimum."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto

import lowrank_onnx
from lowrank_onnx.base import Site
from lowrank_onnx.decompositions.shared_basis import shared_basis
from lowrank_onnx.decompositions.svd import data_aware
from lowrank_onnx.linalg import with_ridge
from lowrank_onnx.passes.shared_layers import SharedLayers
from tests.builders import Array, answers, build, correlated, difference, factorized, falling, moments, problem

WIDTH, BLOCKS, RANK = 24, 5, 6


def stack(changes: str = "", blocks: int = BLOCKS) -> ModelProto:
    """Blocks of two layers that read one tensor, and one that reads their product; all look at much the same inputs."""
    body, before, looked_at = "", "x", falling(WIDTH, WIDTH, seed=100)
    held: dict[str, Array] = {}
    for block in range(blocks):
        body += f"""
            a{block} = MatMul({before}, wa{block})  b{block} = MatMul({before}, wb{block})
            c{block} = Add(b{block}, f{block})  s{block} = Sigmoid(c{block})  p{block} = Mul(a{block}, s{block})
            o{block} = MatMul(p{block}, wo{block})  r{block} = Add(o{block}, {before})"""
        before = f"r{block}"
        for seed, name in enumerate(("wa", "wb", "wo")):
            held[f"{name}{block}"] = 3 * looked_at @ falling(WIDTH, WIDTH, seed=3 * block + seed)
        held[f"f{block}"] = np.asarray(0.3 * np.random.default_rng(block).standard_normal(WIDTH), np.float32)
    for change in filter(None, changes.split(" && ")):
        old, new = change.split(" -> ")
        assert old in body, old
        body = body.replace(old, new)
    text = f"g (float[n,s,{WIDTH}] x) => (float[n,s,{WIDTH}] y) {{ {body}  y = Identity({before}) }}"
    return build(text, held)


def data() -> dict[str, Array]:
    return {"x": correlated((24, 7, WIDTH))}


def pairs(proto: ModelProto) -> list[Site]:
    return [site for site in problem(proto, data()).sites if site.kind == "shared_layers"]


def layers(site: Site) -> list[list[str]]:
    """Names of the outputs of the layers of every unit."""
    return [[use.raw_output for use in unit.uses] for unit in site.attributes["units"]]


def test_neighbours_of_one_shape_are_joined() -> None:
    """The fifth block is left over."""
    found = [layers(site) for site in pairs(stack())]
    assert found == [[["a0", "b0"], ["a1", "b1"]], [["o0"], ["o1"]], [["a2", "b2"], ["a3", "b3"]], [["o2"], ["o3"]]]


def test_blocks_side_by_side_are_not_neighbours() -> None:
    """Nothing of the first block goes into the second."""
    both = stack("MatMul(r0, wa1) -> MatMul(x, wa1) && MatMul(r0, wb1) -> MatMul(x, wb1) && Add(o1, r0) -> Add(o1, x)")
    assert [["o0"], ["o1"]] not in [layers(site) for site in pairs(both)]


def test_the_common_factor_is_stored_once() -> None:
    posed = problem(stack(), data())
    site = next(site for site in posed.sites if site.kind == "shared_layers")
    made = factorized(posed, SharedLayers(), site, (RANK,))
    readers = [node for node in made.graph.node if f"{site.name}/first" in node.input]
    stored = [tensor for tensor in made.graph.initializer if tensor.name.endswith("/first")]
    assert len(readers) == 2 and [tuple(tensor.dims) for tensor in stored] == [(WIDTH, RANK)]
    assert answers(made, data())["y"].shape == answers(stack(), data())["y"].shape


def test_inputs_alike_give_the_best_there_is() -> None:
    """With one metric the common directions are those of the weights side by side."""
    rows = correlated((200, 16)).astype(np.float64)
    gram = rows.T @ rows / len(rows)
    weights = [falling(16, 12, np.float64, seed) for seed in range(3)]
    both = np.concatenate(weights, axis=1)
    best = data_aware(both, gram, 0.0)
    found = shared_basis(weights, [gram] * 3, 0.0)
    energy = [float(np.vdot(weight, gram @ weight)) for weight in weights]
    assert best.output is not None
    for rank in (1, 4, 9):
        lost = sum(float(errors[rank]) * size for errors, size in zip(found.errors, energy, strict=True))
        assert np.sqrt(lost / sum(energy)) == pytest.approx(best.output.relative(rank), rel=1e-6)


@pytest.mark.parametrize("ridge", [0.0, 0.01])
def test_every_layer_makes_the_best_of_the_common_factor(ridge: float) -> None:
    """In its own metric; and the errors of all ranks are those of the factors."""
    grams = [rows.T @ rows / len(rows) for rows in (correlated((200, 16), np.float64, seed=seed) for seed in (1, 7))]
    weights = [falling(16, 12, np.float64, seed) for seed in range(2)]
    found = shared_basis(weights, grams, ridge)
    for layer, (weight, gram) in enumerate(zip(weights, grams, strict=True)):
        metric = with_ridge(gram, ridge)
        for rank in (1, 5, 16):
            first, second = found.first(rank), found.second(layer, rank)
            left = weight - first @ second
            assert np.abs(first.T @ metric @ left).max() < 1e-6 * np.abs(metric @ weight).max()
            lost = np.vdot(left, gram @ left) / np.vdot(weight, gram @ weight)
            assert found.errors[layer][rank] == pytest.approx(lost, rel=1e-6, abs=1e-12)


def test_from_end_to_end() -> None:
    """Smaller than each layer with a factor of its own at the same rank; no weight is covered twice."""
    options: dict[str, Any] = {"calibrate": data(), "threads": 1, "cache": False}
    techniques = ["svd", "shared_input", "shared_layers"]
    made = lowrank_onnx.compress(stack(), keep_params=0.5, technique=techniques, **options)
    assert made.report["ratio"]["parameters"] <= 0.5
    chosen = [row for row in made.plan["sites"] if row["decision"] == "factorized"]
    assert "shared_layers" in {row["technique"] for row in chosen}
    posed = problem(stack(), data())
    covered = [name for row in chosen for name in posed.by_name[row["site"]].covers]
    assert len(set(covered)) == len(covered)
    again = json.loads(json.dumps(made.plan))
    applied = lowrank_onnx.apply(stack(), again, calibrate=data(), threads=1)
    assert applied.model.SerializeToString(deterministic=True) == made.model.SerializeToString(deterministic=True)
    assert difference(answers(made.model, data())["y"], answers(stack(), data())["y"]) < 0.5


def test_a_refit_to_what_was_delivered_before_changes_nothing_much() -> None:
    """Nor does it touch the common factor."""
    posed = problem(stack(), data())
    site, technique = next(site for site in posed.sites if site.kind == "shared_layers"), SharedLayers()
    seen = moments(posed)[site.name]
    analysis = technique.analyse(site, seen)
    candidate = technique.candidate(site, analysis, (RANK,))
    factors = technique.factorize(site, analysis, candidate)
    fitted = factors
    for unit, (stage, told) in zip(site.attributes["units"], technique.stages(site, analysis), strict=True):
        entry = seen[unit.uses[0].input]
        weight = unit.weight.astype(np.float64)
        delivered = dataclasses.replace(
            entry, target_cross=entry.gram @ weight, target_mean=entry.mean @ weight, target_energy=1.0
        )
        alone = technique.factorize(stage, told, candidate)
        again = technique.refit(stage, candidate, alone, delivered, 0.0)
        fitted = technique.with_kept(site, fitted, unit.name, again)
    assert fitted.keys() == factors.keys() and fitted["first"] is factors["first"]
    wanted, got = (technique.dense_equivalent(site, candidate, entry) for entry in (factors, fitted))
    for name, entry in wanted.items():
        assert difference(got[name].weight, entry.weight) < 0.05  # the ridge of the first fit
        assert all(difference(got[name].biases[node], bias) < 0.05 for node, bias in entry.biases.items())


def test_refits_reach_every_layer() -> None:
    """What a rank too low loses in front, the layers behind it are fitted to."""
    options: dict[str, Any] = {"calibrate": data(), "threads": 1, "cache": False, "technique": ["shared_layers"]}
    plain, fitted = (
        lowrank_onnx.compress(stack(), keep_params=0.4, refine=refine, **options) for refine in (False, True)
    )
    wanted = answers(stack(), data())["y"]
    lost = [difference(answers(made.model, data())["y"], wanted) for made in (plain, fitted)]
    assert lost[1] < 0.9 * lost[0]
    stored = [{tensor.name: tensor.raw_data for tensor in made.model.graph.initializer} for made in (plain, fitted)]
    behind = [f"{name}/second" for name in pairs(stack())[-1].covers]
    assert len(behind) == 2 and all(stored[0][name] != stored[1][name] for name in behind)
    told = [row for row in fitted.plan["sites"] if row.get("technique") == "shared_layers"]
    assert told and all(0 < row["output_error"] < 1 for row in told)
