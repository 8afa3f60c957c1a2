"""Models of several convolutions through the whole tool: probes, refit, samples that differ in size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import ModelProto

from lowrank_onnx.pipeline import Result, compress
from tests.builders import Array, answers, build, difference, problem
from tests.test_contract import kernel

NET = """{
    a = Conv<pads=[1,1,1,1]>(x, u, c)   b = Relu(a)
    d = Conv<pads=[1,1,1,1]>(b, v)      e = Add(b, d)   f = Relu(e)
    g = Conv<strides=[2,2], auto_pad="SAME_UPPER">(f, w)   y = Tanh(g) }"""


def net(batch: str = "n") -> ModelProto:
    """Three convolutions with a residual sum."""
    constants = {"u": kernel(16, 16, 3, 3), "v": 2 * kernel(16, 16, 3, 3), "w": kernel(16, 16, 3, 3)}
    constants["c"] = np.linspace(-0.1, 0.1, 16, dtype=np.float32)
    return build(f"g (float[{batch},16,h,w] x) => (float[{batch},16,p,q] y) {NET}", constants)


def images(samples: int, height: int = 9, width: int = 8) -> Array:
    """Smooth over the channels."""
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((16, 16)) * np.arange(1, 17) ** -1.0
    noise = rng.standard_normal((samples, 16, height, width))
    return np.asarray(np.einsum("ij,njhw->nihw", mixing, noise), np.float32)


def run(proto: ModelProto, data: Any, keep_macs: float = 0.55, **options: Any) -> Result:
    return compress(proto, keep_macs=keep_macs, calibrate=data, threads=1, cache=False, **options)


def test_refitting_brings_the_answers_nearer() -> None:
    data, unseen = {"x": images(40)}, images(50)[40:]
    expected = answers(net(), {"x": unseen})["y"]
    errors = [
        difference(answers(run(net(), data, 0.4, refine=refine).model, {"x": unseen})["y"], expected)
        for refine in (True, False)
    ]
    assert errors[0] < 0.98 * errors[1]


def test_every_layer_that_pays_takes_part() -> None:
    result = run(net(), {"x": images(20)})
    assert result.report["after"]["macs"] <= 0.55 * result.report["before"]["macs"]
    assert {row["technique"] for row in result.plan["sites"] if row["decision"] == "factorized"} <= {
        "spatial",
        "channel",
        "tucker",
    }


def test_samples_that_cannot_be_joined() -> None:
    data = [{"x": images(1, 6 + place, 7)} for place in range(6)]
    expected = answers(net(), data[0])["y"]
    assert difference(answers(run(net(), data).model, data[0])["y"], expected) < 0.5


def test_a_fixed_batch_of_one() -> None:
    data = {"x": images(8)}
    expected = answers(net("1"), {"x": data["x"][:1]})["y"]
    assert difference(answers(run(net("1"), data).model, {"x": data["x"][:1]})["y"], expected) < 0.5


def test_two_samples_are_enough_to_refit() -> None:
    rows = run(net(), {"x": images(2, 24, 24)}, 0.4).report["sites"]
    assert any(str(row["refined"]).startswith("refitted") for row in rows)


def test_without_data_only_the_weight_counts() -> None:
    result = compress(net(), keep_params=0.6, threads=1, cache=False)
    assert result.report["after"]["parameters"] <= 0.6 * result.report["before"]["parameters"]


def test_the_same_bytes_twice() -> None:
    first, second = (run(net(), {"x": images(12)}).model.SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("technique", ["cp", "tensor_train"])
def test_techniques_asked_for_by_name(technique: str) -> None:
    result = run(net(), {"x": images(12)}, technique=[technique])
    chosen = [row for row in result.plan["sites"] if row["decision"] == "factorized"]
    assert chosen and all(row["technique"] == technique for row in chosen)


def test_dense_probes_give_the_original() -> None:
    """The model that probes feed with weights answers as the original does with the original weights."""
    from lowrank_onnx.probes import _with_dense

    posed = problem(net(), {"x": images(4)})
    proto, _ = _with_dense(posed.model, list(posed.sites))
    assert difference(answers(proto, {"x": images(4)})["y"], answers(net(), {"x": images(4)})["y"]) < 1e-6
