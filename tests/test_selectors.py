"""``--rank evbmf`` and ``--rank ard`` on models: a planted rank is found, and what has none is kept with the reason."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lowrank_onnx import compress
from lowrank_onnx.errors import TargetError
from tests.builders import build
from tests.decompositions.test_bayes import planted

TWO = "g (float[n,48] x) => (float[n,48] y) { h = MatMul(x, v)  r = Relu(h)  y = MatMul(r, w) }"
NOISE = np.random.default_rng(1).standard_normal((64, 48)).astype(np.float32)


def model(second: np.ndarray[Any, Any]) -> Any:
    return build(TWO, {"v": planted(48, 64, 5).astype(np.float32), "w": second})


def ranks(report: dict[str, Any]) -> list[Any]:
    return [site["ranks"] for site in report["sites"]]


@pytest.mark.parametrize("rule", ["evbmf", "ard"])
@pytest.mark.parametrize("technique", ["svd", "bayesian"])
def test_planted_ranks(rule: str, technique: str) -> None:
    made = compress(model(planted(64, 48, 3, seed=1).astype(np.float32)), rank=rule, technique=[technique])
    assert ranks(made.report) == [[5], [3]]


def test_on_data_the_spectrum_is_that_of_the_outputs() -> None:
    """A weight without rank has one on inputs that lie in four directions."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((400, 4)) @ rng.standard_normal((4, 64)) + 0.1 * rng.standard_normal((400, 64))
    proto = build("g (float[n,64] x) => (float[n,48] y) { y = MatMul(x, w) }", {"w": NOISE})
    made = compress(proto, rank="evbmf", technique=["svd"], calibrate={"x": values.astype(np.float32)})
    assert ranks(made.report) == [[4]]
    with pytest.raises(TargetError, match="evbmf finds rank 0"):
        compress(proto, rank="evbmf", technique=["svd"])


def test_layers_without_rank_are_kept_with_the_reason() -> None:
    made = compress(model(NOISE), rank="evbmf", technique=["svd"])
    kept = made.report["sites"][1]
    assert kept["decision"] == "kept" and "evbmf finds rank 0" in kept["reason"]


@pytest.mark.parametrize("rule", ["evbmf", "ard"])
def test_a_weight_of_exactly_low_rank_keeps_it(rule: str) -> None:
    rng = np.random.default_rng(0)
    exact = (rng.standard_normal((64, 4)) @ rng.standard_normal((4, 48))).astype(np.float32)
    assert ranks(compress(model(exact), rank=rule, technique=["svd"]).report) == [[5], [4]]


def test_weakening_and_the_floor() -> None:
    second = planted(64, 48, 3, seed=1).astype(np.float32)
    weak = compress(model(second), rank="evbmf:weaken=0.25", technique=["svd"])
    assert ranks(weak.report) == [[5 + 11], [3 + 12]]  # rounded up: a quarter of the way to 48
    with pytest.raises(TargetError, match=r"rank 5 of evbmf keeps \d+ % of the energy, below the floor of 99"):
        compress(model(second), rank="evbmf:floor=0.99", technique=["svd"])


def test_techniques_without_a_spectrum_say_so() -> None:
    with pytest.raises(TargetError, match="nmf offers no selector 'evbmf'"):
        compress(model(NOISE), rank="evbmf", technique=["nmf"])


@pytest.mark.parametrize(("technique", "expected"), [("channel", [3]), ("tucker", [3, 4])])
def test_convolutions(technique: str, expected: list[int]) -> None:
    rng = np.random.default_rng(0)
    core = rng.standard_normal((3, 4, 3, 3))
    sides = rng.standard_normal((32, 3)), rng.standard_normal((24, 4))
    kernel = np.einsum("oa,ib,abkl->oikl", *sides, core) + 0.05 * rng.standard_normal((32, 24, 3, 3))
    proto = build("g (float[n,24,h,w] x) => (float[n,32,p,q] y) { y = Conv(x, k) }", {"k": kernel.astype(np.float32)})
    made = compress(proto, rank="evbmf", technique=[technique], shape=["x=1,24,9,9"])
    assert made.report["sites"][0]["ranks"] == expected


def test_convolutions_on_data() -> None:
    """A kernel without rank has one on maps whose channels are mixtures of two."""
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((64, 16, 1, 3)).astype(np.float32)
    maps = np.einsum("nahw,ai->nihw", rng.standard_normal((40, 2, 1, 12)), rng.standard_normal((2, 16)))
    maps += 0.05 * rng.standard_normal(maps.shape)
    proto = build("g (float[n,16,h,w] x) => (float[n,64,p,q] y) { y = Conv(x, k) }", {"k": kernel})
    made = compress(proto, rank="evbmf", technique=["channel"], calibrate={"x": maps.astype(np.float32)})
    assert ranks(made.report) == [[6]]  # two channels at three positions
    with pytest.raises(TargetError, match="evbmf finds rank 0"):
        compress(proto, rank="evbmf", technique=["channel"], shape=["x=1,16,1,12"])


@pytest.mark.parametrize("rule", ["evbmf", "ard"])
def test_rank_one_is_refused_with_what_it_would_keep(rule: str) -> None:
    rng = np.random.default_rng(0)
    one = np.outer(rng.standard_normal(64), rng.standard_normal(48)).astype(np.float32)
    proto = build("g (float[n,64] x) => (float[n,48] y) { y = MatMul(x, w) }", {"w": one})
    with pytest.raises(TargetError, match=rf"{rule} gives rank 1, which keeps 100 % of the energy; .* --rank 1"):
        compress(proto, rank=rule, technique=["svd"])
    assert ranks(compress(proto, rank=1, technique=["svd"]).report) == [[1]]
