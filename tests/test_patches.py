"""Patches against onnxruntime: rows times the kernel are what the convolution gives at those positions."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from onnx import ModelProto

from lowrank_onnx.base import Moments
from lowrank_onnx.patches import WIDEST, Window, as_linear, unseen, window
from lowrank_onnx.statistics import choose_rows, observe, row_layout, unobserved
from tests.builders import Array, answers, build, difference, problem
from tests.passes.convolutions import Convolution, convolutions, model_of


@settings(max_examples=100, deadline=None, derandomize=True)
@given(convolutions() | convolutions(transposed=True))
def test_patches_times_the_kernel_are_the_convolution(given_: Convolution) -> None:
    proto, x = model_of(given_)
    (site,) = problem(proto).sites
    if unseen(site):
        return
    moved = window(site)
    places = moved.draw(x.shape, 50, (0,))
    flat = as_linear(site)
    expected = places.rows(answers(proto, {"x": x})["y"])
    made = moved.patches(x, places) @ flat.weight
    if given_.bias:
        made = made + site.uses[0].bias
    assert difference(made, expected) < 1e-5
    assert places.grid == (len(x), *expected_grid(proto, x))


def expected_grid(proto: ModelProto, x: Array) -> tuple[int, ...]:
    """The size of the map that onnxruntime gives."""
    return tuple(answers(proto, {"x": x})["y"].shape[2:])


def test_every_position_is_drawn_where_they_are_few() -> None:
    places = Window((3,), (2,), (1,), (1, 1), "NOTSET").draw((4, 2, 9), 20, (0,))
    assert places.grid == (4, 5)
    spots = sorted(zip(places.sample, places.coordinates[0], strict=True))
    assert spots == [(i, j) for i in range(4) for j in range(5)]


def test_a_sample_is_drawn_without_repeats_and_again_the_same() -> None:
    moved = Window((3, 3), (1, 1), (1, 1), (1, 1, 1, 1), "NOTSET")
    first, again, other = (moved.draw((4, 2, 9, 9), 50, seed) for seed in ((1,), (1,), (2,)))
    spots = set(zip(first.sample, *first.coordinates, strict=True))
    assert len(spots) == 50
    assert spots == set(zip(again.sample, *again.coordinates, strict=True))
    assert spots != set(zip(other.sample, *other.coordinates, strict=True))


def test_padding_of_a_sequence_is_left_out() -> None:
    keep = np.arange(7) < np.array([[7], [3]])
    places = Window((3,), (1,), (1,), (1, 1), "NOTSET").draw((2, 4, 7), 100, (0,), keep)
    assert len(places.sample) == 10
    assert keep[places.sample, places.coordinates[0]].all()


def test_moments_are_those_of_all_patches() -> None:
    x = np.random.default_rng(0).standard_normal((6, 3, 5, 4)).astype(np.float32)
    proto = build(
        "g (float[n,3,h,w] x) => (float[n,2,p,q] y) { y = Conv<pads=[1,0,1,2]>(x, w) }",
        {"w": np.ones((2, 3, 3, 2), np.float32)},
    )
    posed = problem(proto, {"x": x})
    (site,) = posed.sites
    assert posed.calibrate is not None
    seen = observe(posed.model, posed.sites, posed.calibrate, posed.runtime)[site.name]["x"]
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (0, 2))).astype(np.float64)
    rows = np.stack([padded[b, :, i : i + 3, j : j + 2].ravel() for b in range(6) for i in range(5) for j in range(5)])
    assert isinstance(seen, Moments) and seen.rows == len(rows)
    assert difference(seen.gram, rows.T @ rows / len(rows)) < 1e-6
    assert difference(seen.mean, rows.mean(axis=0)) < 1e-6


def test_large_maps_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowrank_onnx.statistics.POSITIONS", 100)
    x = np.zeros((5, 3, 20, 20), np.float32)
    proto = build(
        "g (float[n,3,h,w] x) => (float[n,2,p,q] y) { y = Conv(x, w) }", {"w": np.ones((2, 3, 3, 3), np.float32)}
    )
    posed = problem(proto, {"x": x})
    assert posed.calibrate is not None
    seen = observe(posed.model, posed.sites, posed.calibrate, posed.runtime)
    assert seen[posed.sites[0].name]["x"].rows == 100


def test_what_is_not_seen_says_why() -> None:
    def site(**changes: Any) -> Any:
        proto = build(
            "g (float[n,4,h,w] x) => (float[n,4,p,q] y) { y = Conv(x, w) }", {"w": np.ones((4, 4, 3, 3), np.float32)}
        )
        (found,) = problem(proto).sites
        return dataclasses.replace(found, attributes={**found.attributes, **changes})

    assert all(unseen(entry) is None for entry in (site(), site(group=2), site(transposed=True)))
    assert unseen(site(group=4, transposed=True)) == "depthwise"
    assert "size of the map" in str(unseen(site(transposed=True, auto_pad="SAME_UPPER")))
    wide = dataclasses.replace(site(), weight=np.ones((1, WIDEST, 3, 1), np.float32))
    assert str(WIDEST) in str(unseen(wide))
    assert unobserved(site()) is None
    inside = dataclasses.replace(site(), uses=tuple(dataclasses.replace(use, scope="if/then") for use in site().uses))
    assert unobserved(inside) == "inside a subgraph"


def test_rows_of_input_and_output_belong_together() -> None:
    rng = np.random.default_rng(0)
    x: Array = rng.standard_normal((3, 4, 8, 8)).astype(np.float32)
    proto = build(
        "g (float[n,4,h,w] x) => (float[n,2,p,q] y) { y = Conv<strides=[2,2]>(x, w) }",
        {"w": rng.standard_normal((2, 4, 3, 3)).astype(np.float32)},
    )
    (site,) = problem(proto).sites
    rows = choose_rows(row_layout(site), x.shape, None, 5, 0)
    made = rows.of_input(x) @ as_linear(site).weight
    assert difference(made, rows.of_output(answers(proto, {"x": x})["y"])) < 1e-5
