"""Models of several convolutions through the whole tool: probes, refit, samples that differ in size."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto

from lowrank_onnx.pipeline import Result, apply, compress
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
        difference(
            answers(run(net(), data, 0.5, refine=refine, technique=["spatial"]).model, {"x": unseen})["y"], expected
        )
        for refine in (True, False)
    ]
    assert errors[0] < 0.98 * errors[1]


@pytest.mark.parametrize("refine", [True, False])
def test_fitting_to_what_is_felt_brings_the_answers_nearer(refine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    data, unseen = {"x": images(40)}, images(80)[40:]
    expected = answers(net(), {"x": unseen})["y"]
    felt = run(net(), data, 0.5, refine=refine)
    monkeypatch.setattr("lowrank_onnx.run.felt_of", lambda *_: {})
    even = run(net(), data, 0.5, refine=refine)
    errors = [difference(answers(made.model, {"x": unseen})["y"], expected) for made in (felt, even)]
    assert errors[0] < 0.95 * errors[1]


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


SPREAD = """{
    a = Conv<pads=[1,1,1,1], group=2>(x, u)   b = Relu(a)
    d = ConvTranspose<pads=[1,1,0,1], strides=[2,2], group=2>(b, v)   e = Relu(d)
    y = ConvTranspose<strides=[2,1], output_padding=[1,0]>(e, w, c) }"""


def spread() -> ModelProto:
    """Groups, transposed convolutions, and both."""
    constants = {"u": kernel(32, 8, 3, 3), "v": kernel(32, 8, 3, 3), "w": kernel(16, 16, 3, 3)}
    constants["c"] = np.linspace(-0.1, 0.1, 16, dtype=np.float32)
    return build(f"g (float[n,16,h,w] x) => (float[n,16,p,q] y) {SPREAD}", constants)


def test_groups_and_transposed_convolutions_are_fitted_to_data() -> None:
    data, unseen = {"x": images(40)}, images(60)[40:]
    expected = answers(spread(), {"x": unseen})["y"]
    blind = compress(spread(), rank=0.2, technique=["spatial"], threads=1, cache=False)
    first, refitted = (
        compress(spread(), rank=0.2, technique=["spatial"], calibrate=data, threads=1, cache=False, refine=refine)
        for refine in (False, True)
    )
    errors = [difference(answers(made.model, {"x": unseen})["y"], expected) for made in (blind, first, refitted)]
    assert errors[1] < 0.8 * errors[0]
    assert errors[2] < 0.98 * errors[1]
    assert str(refitted.report["sites"][-1]["refined"]).startswith("refitted")
    assert all(row["output_error"] is not None for row in first.report["sites"])
    assert not [text for text in first.report["warnings"] if "weight alone" in text]


def test_layers_that_were_not_looked_at_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowrank_onnx.patches.WIDEST", 100)
    told = compress(spread(), rank=0.5, calibrate={"x": images(4)}, threads=1, cache=False).report["warnings"]
    assert any("weight alone" in text and "wider than 100" in text for text in told)


HEAD = """{
    a = Conv<pads=[1,1,1,1]>(x, u, c)   b = Relu(a)   d = Conv<pads=[1,1,1,1]>(b, v)   e = Relu(d)
    f = GlobalAveragePool(e)   g = Flatten(f)   y = Gemm(g, w, c) }"""


def classifier() -> ModelProto:
    """Two convolutions and a layer that spatial does not take."""
    constants = {"u": kernel(16, 16, 3, 3), "v": 2 * kernel(16, 16, 3, 3), "w": kernel(16, 16, 1, 1)[..., 0, 0]}
    constants["c"] = np.linspace(-0.1, 0.1, 16, dtype=np.float32)
    return build(f"g (float[n,16,h,w] x) => (float[n,16] y) {HEAD}", constants)


def test_a_layer_that_stays_dense_takes_over_what_others_lost() -> None:
    data, unseen = {"x": images(80)}, images(120)[80:]
    expected = answers(classifier(), {"x": unseen})["y"]

    def made(**options: Any) -> Result:
        return run(classifier(), data, 0.4, technique=["spatial"], **options)

    whole = made()
    kept = whole.report["sites"][-1]
    assert kept["decision"] == "kept" and kept["weight_error"] > 0 and "refitted" in kept["reason"]
    assert kept["parameters_after"] == kept["parameters_before"]
    assert whole.plan["sites"][-1]["refit"] is True
    untouched = made(exclude=[kept["name"]])
    assert untouched.report["sites"][-1]["weight_error"] is None
    assert "refit" not in untouched.plan["sites"][-1]
    assert difference(stored_head(untouched.model), stored_head(classifier())) == 0
    errors = [difference(answers(entry.model, {"x": unseen})["y"], expected) for entry in (whole, untouched)]
    assert errors[0] < 0.95 * errors[1]


def stored_head(proto: ModelProto) -> Array:
    """The matrix of the last layer."""
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    return constants[proto.graph.node[-1].input[1]]


def test_a_plan_with_refitted_dense_layers_gives_the_same_bytes() -> None:
    data = {"x": images(40)}
    first = run(classifier(), data, 0.4, technique=["spatial"])
    again = apply(classifier(), first.plan, calibrate=data, threads=1)
    assert again.model.SerializeToString(deterministic=True) == first.model.SerializeToString(deterministic=True)
    by_hand = {**first.plan, "sites": [{**row, "refit": False} for row in first.plan["sites"]]}
    assert (
        difference(
            stored_head(apply(classifier(), by_hand, calibrate=data, threads=1).model), stored_head(classifier())
        )
        == 0
    )
