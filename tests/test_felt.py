"""What is felt of an error: the measured matrix, and convolutions fitted in it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto

from lowrank_onnx import compress, felt
from lowrank_onnx.base import Moments, Pass, RankWish
from lowrank_onnx.decompositions.output_metric import Felt
from lowrank_onnx.felt import agreed, felt_of
from lowrank_onnx.linalg import Array
from lowrank_onnx.passes import PASSES
from lowrank_onnx.patches import as_linear
from lowrank_onnx.pipeline import techniques_of
from lowrank_onnx.problem import Problem
from lowrank_onnx.rewrite import rewrite
from tests.builders import answers, build, difference, moments, problem

TECHNIQUES = [kind for kind in PASSES if "convolution" in kind.kinds]
each_technique = pytest.mark.parametrize("technique", TECHNIQUES, ids=lambda kind: kind.name)


def mixed(mix: Array, behind: str = "", seed: int = 0) -> tuple[ModelProto, Array]:
    """A convolution whose channels a 1 x 1 with weights (outputs, channels) mixes, and an input."""
    rng = np.random.default_rng(seed)
    channels = mix.shape[1]
    proto = build(
        f"g (float[n,6,12,12] x) => (float[n,{len(mix)},12,12] y)"
        f"{{ [first] h = Conv<pads=[1,1,1,1]>(x, w) {behind or 'r = Identity(h)'} [second] y = Conv(r, m) }}",
        {
            "w": rng.standard_normal((channels, 6, 3, 3)).astype(np.float32),
            "m": mix.reshape(*mix.shape, 1, 1).astype(np.float32),
        },
    )
    return proto, rng.standard_normal((24, 6, 12, 12)).astype(np.float32)


def alike(a: Array, b: Array) -> float:
    return float(np.linalg.norm(a / np.trace(a) - b / np.trace(b)) / np.linalg.norm(b / np.trace(b)))


def test_of_a_linear_rest_it_is_the_square_of_the_matrix() -> None:
    mix = np.random.default_rng(3).standard_normal((3, 8))
    proto, x = mixed(mix)
    posed = problem(proto, {"x": x})
    found = felt_of(posed, posed.sites, None)
    assert list(found) == ["first"]  # behind the second there is nothing
    assert alike(found["first"], mix.T @ mix) < 1e-3


def test_what_a_relu_cuts_off_is_not_felt() -> None:
    mix = np.random.default_rng(3).standard_normal((3, 8))
    proto, x = mixed(mix, "c = Add(h, b) r = Relu(c)")
    shift = np.zeros((1, 8, 1, 1), np.float32)
    shift[0, :4] = -1e3
    proto.graph.initializer.append(onnx.numpy_helper.from_array(shift, "b"))
    posed = problem(proto, {"x": x})
    found = felt_of(posed, posed.sites, None)["first"]
    assert not found[:4].any()
    assert np.diag(found)[4:].min() > 0


def test_noise_off_the_diagonal_is_cut_and_what_is_there_stays() -> None:
    rng = np.random.default_rng(0)
    noise = np.stack([part @ part.T for part in rng.standard_normal((2, 40, 60))])
    made = agreed(noise)
    assert made is not None
    assert np.array_equal(np.diag(made), np.diag(noise.sum(axis=0)))
    assert alike(made, np.eye(40)) < 0.5 * alike(noise.sum(axis=0), np.eye(40))
    truth = rng.standard_normal((40, 5))
    same = agreed(np.stack([truth @ truth.T] * 2))
    assert same is not None
    assert np.allclose(same, 2 * truth @ truth.T)


def test_nothing_is_measured_that_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    proto, x = mixed(np.ones((3, 8)))
    posed = problem(proto, {"x": x})
    monkeypatch.setattr(felt, "_MACS", 1.0)
    assert felt_of(posed, posed.sites, None) == {}
    assert felt_of(problem(proto), posed.sites, None) == {}


def test_the_report_tells_what_was_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    proto, x = mixed(np.random.default_rng(3).standard_normal((3, 16)), "r = Relu(h)")

    def note(count: int) -> str:
        options: dict[str, Any] = {"technique": ["channel"], "threads": 1, "cache": False, "augment": False}
        made = compress(proto, {"rank": 4}, calibrate={"x": x[:count]}, **options)
        return str(made.report["data"]["note"])

    assert note(24) == ""
    assert "alike in first, second: " in note(3) and "at least, and there are 3" in note(3)
    monkeypatch.setattr(felt, "_MACS", 1.0)
    assert "alike in first, second: " in note(24) and "too long" in note(24)


def test_the_change_of_basis() -> None:
    rng = np.random.default_rng(0)
    half = rng.standard_normal((5, 9))
    made = Felt.of(half @ half.T)
    error = rng.standard_normal(5)
    metric = 0.9 * half @ half.T * 5 / np.trace(half @ half.T) + 0.1 * np.eye(5)
    assert float(np.sum(made.turn(error) ** 2)) == pytest.approx(float(error @ metric @ error), rel=1e-12)
    weight = rng.standard_normal((5, 3, 2))
    assert np.allclose(made.back(made.turn(weight)), weight, rtol=1e-12)
    assert np.array_equal(Felt.of(np.zeros((5, 5))).root, np.eye(5))


def layer(group: int) -> tuple[ModelProto, Array]:
    rng = np.random.default_rng(1)
    proto = build(
        f"g (float[n,16,7,7] x) => (float[n,16,7,7] y) {{ [conv] y = Conv<pads=[1,1,1,1], group={group}>(x, w, b) }}",
        {
            "w": rng.standard_normal((16, 16 // group, 3, 3)).astype(np.float32),
            "b": rng.standard_normal(16).astype(np.float32),
        },
    )
    return proto, rng.standard_normal((40, 16, 7, 7)).astype(np.float32) + 1


def told(posed: Problem, matrix: Array) -> dict[str, Moments]:
    """The moments of the one site, as if that matrix had been measured."""
    (seen,) = moments(posed).values()
    return {name: dataclasses.replace(entry, felt=matrix) for name, entry in seen.items()}


def skewed(group: int) -> Array:
    """(16, 16) of four directions in every group."""
    half = np.random.default_rng(2).standard_normal((16, 4 * group))
    return np.asarray(half @ half.T * np.kron(np.eye(group), np.ones((16 // group, 16 // group))))


def felt_loss(made: Array, given: Array, matrix: Array, group: int) -> float:
    """The error of outputs (n, 16, h, w), relative to their spread, each group counted by its block of the matrix."""
    lost = spread = 0.0
    width = 16 // group
    for start in range(0, 16, width):
        block = slice(start, start + width)
        root = Felt.of(matrix[block, block]).root
        right = given[:, block].swapaxes(0, 1).reshape(width, -1).astype(np.float64)
        wrong = made[:, block].swapaxes(0, 1).reshape(width, -1)
        lost += float(np.sum((root @ (wrong - right)) ** 2))
        spread += float(np.sum((root @ (right - right.mean(axis=1, keepdims=True))) ** 2))
    return float(np.sqrt(lost / spread))


@each_technique
@pytest.mark.parametrize("group", [1, 2])
def test_the_error_told_is_the_one_felt(technique: type[Pass], group: int) -> None:
    proto, x = layer(group)
    posed = problem(proto, {"x": x})
    (site,) = posed.sites
    matrix, given = skewed(group), answers(proto, {"x": x})["y"]
    entry = technique()
    if group > 1 and (refusal := entry.refuse(site)):
        pytest.skip(f"{entry.name}: {refusal}")
    analysis = entry.analyse(site, told(posed, matrix))
    assert np.array_equal(np.asarray(entry.felt(analysis)), matrix)
    full = entry.spell_rank(site, analysis, RankWish(fraction=1.0))
    assert not isinstance(full, str)
    for ranks in (entry.ranks(site, analysis)[0], full):
        candidate = entry.candidate(site, analysis, ranks)
        factors = entry.factorize(site, analysis, candidate)
        made = answers(rewrite(posed.model, entry.emit(site, candidate, factors)), {"x": x})["y"]
        assert candidate.error == candidate.felt_error
        assert candidate.felt_error == pytest.approx(felt_loss(made, given, matrix, group), rel=1e-3, abs=1e-5)
        assert ranks != full or difference(made, given) < 1e-5


@pytest.mark.parametrize("name", ["spatial", "channel", "tucker"])
def test_a_chain_is_fitted_to_what_is_felt_when_refitted_too(name: str) -> None:
    proto, x = layer(1)
    posed = problem(proto, {"x": x})
    (site,) = posed.sites
    matrix, given = skewed(1), answers(proto, {"x": x})["y"]
    (entry,) = techniques_of([name])
    (seen,) = moments(posed).values()
    losses = {}
    for key, statistics in {"even": seen, "felt": told(posed, matrix)}.items():
        analysis = entry.analyse(site, statistics)
        ranks = entry.ranks(site, entry.analyse(site, seen))[0]
        form = entry.candidate(site, entry.analyse(site, seen), ranks).options
        candidate = dataclasses.replace(entry.candidate(site, analysis, ranks), options=form)
        factors = entry.factorize(site, analysis, candidate)
        (use,) = site.uses
        again = entry.refit(site, candidate, factors, statistics[use.input], 1e-3)
        for step, made in {"first": factors, "again": again}.items():
            values = answers(rewrite(posed.model, entry.emit(site, candidate, made)), {"x": x})["y"]
            losses[key, step] = felt_loss(values, given, matrix, 1)
    assert losses["felt", "first"] < 0.97 * losses["even", "first"]
    assert losses["felt", "again"] < 0.97 * losses["even", "again"]


@each_technique
def test_a_wanted_output_is_turned_like_the_weight(technique: type[Pass]) -> None:
    proto, x = layer(1)
    posed = problem(proto, {"x": x})
    (site,) = posed.sites
    entry = technique()
    (seen,) = told(posed, skewed(1)).values()
    analysis = entry.analyse(site, {site.uses[0].input: seen})
    candidate = entry.candidate(site, analysis, entry.ranks(site, analysis)[0])
    factors = entry.factorize(site, analysis, candidate)
    flat = as_linear(site).weight.astype(np.float64)
    energy = float(np.vdot(flat, seen.gram @ flat))
    own = dataclasses.replace(
        seen, target_cross=seen.gram @ flat, target_mean=seen.mean @ flat, target_energy=energy
    )  # what the weight gives anyway
    products = [
        entry.effective(site, candidate, entry.refit(site, candidate, factors, m, 0.01))[0] for m in (seen, own)
    ]
    assert difference(products[1], products[0]) < 1e-5


def test_a_run_measures_it_and_refining_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    proto, x = mixed(np.random.default_rng(3).standard_normal((3, 16)), "r = Relu(h)")
    asked = []
    plain = type(techniques_of(["channel"])[0]).refit

    def refit(*arguments: Any) -> Any:
        asked.append(arguments[-2].felt)
        return plain(*arguments)

    monkeypatch.setattr(type(techniques_of(["channel"])[0]), "refit", refit)
    compress(proto, {"keep_macs": 0.7}, calibrate={"x": x}, technique=["channel"], threads=1, cache=False)
    assert asked
    assert all(entry is not None and entry.shape == (16, 16) for entry in asked)
