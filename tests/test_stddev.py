"""Predicted deviations: the graph against the formula by hand, the fit on real models, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
import scipy.special
from click.testing import CliRunner
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

import lowrank_onnx
from lowrank_onnx.cli import cli
from lowrank_onnx.errors import DataError, LowRankError, ModelError, PlanError, TargetError
from lowrank_onnx.judging import judge
from lowrank_onnx.problem import read_data
from lowrank_onnx.runtime import input_specs, open_session
from lowrank_onnx.stddev import Loss, Reach, Spread, Tap, add_stddev
from tests.builders import RUNTIME, answers, build, difference, falling

Array = NDArray[Any]

SCHEMA = json.loads((Path(lowrank_onnx.__file__).parent / "report" / "schema.json").read_text(encoding="utf-8"))


def reach(tap: Tap, width: int, seed: int = 0) -> Reach:
    rng = np.random.default_rng(seed)
    return Reach(tap, rng.standard_normal(width), rng.standard_normal((width, 3)), 0.7, 1.3, 4.0)


def counted(entry: Reach, rows: Array) -> Array:
    """(..., 1) what a tensor's rows count, by hand."""
    distance = np.sum(((rows - entry.mean) @ entry.root) ** 2, axis=-1, keepdims=True)
    return np.asarray(entry.weight * distance + entry.beyond * np.maximum(distance - entry.limit, 0))


def check(proto: ModelProto, spread: Spread, feeds: dict[str, Array], variance: Array) -> None:
    onnx.checker.check_model(proto, full_check=True)
    made = add_stddev(proto, [spread])
    onnx.checker.check_model(made, full_check=True)
    found, plain = answers(made, feeds), answers(proto, feeds)
    name = spread.output
    assert list(found) == [name, f"{name}_stddev"]
    assert np.array_equal(found[name], plain[name])
    assert found[f"{name}_stddev"].shape == plain[name].shape and found[f"{name}_stddev"].dtype == np.float32
    assert difference(found[f"{name}_stddev"], np.sqrt(np.broadcast_to(variance, plain[name].shape))) < 1e-4


@pytest.mark.parametrize("opset", [8, 11, 13, 17, 18, 21])
def test_rows_and_a_linear_loss(opset: int) -> None:
    proto = build("g (float[n,6] x) => (float[n,4] y) { y = MatMul(x, w) }", {"w": falling(6, 4)}, opset=opset)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((5, 6)).astype(np.float32)
    tap = Tap("x", 2, 1, 0, True)
    entry, kernel, carry, shift = (
        reach(tap, 6),
        rng.standard_normal((6, 2)),
        rng.standard_normal((2, 4)),
        np.arange(4.0),
    )
    scale = rng.uniform(0.5, 2, 4)
    spread = Spread("y", 2, 1, False, 0.3, scale, (entry,), (Loss(tap, kernel, {}),), carry, shift)
    expected = (0.3 + counted(entry, x)) * scale + (x @ kernel @ carry + shift) ** 2
    check(proto, spread, {"x": x}, expected)


@pytest.mark.parametrize("opset", [13, 18])
@pytest.mark.parametrize("aligned", [True, False])
def test_positions_of_a_sequence(aligned: bool, opset: int) -> None:
    text = "g (float[n,t,6] x) => (float[n,t,4] y) { y = MatMul(x, w) }"
    proto = build(text, {"w": falling(6, 4)}, opset=opset)
    rng = np.random.default_rng(1)
    for length in (3, 7):  # nothing may be fixed to one length
        x = rng.standard_normal((2, length, 6)).astype(np.float32)
        tap = Tap("x", 3, 2, 0, aligned)
        entry, kernel, carry = reach(tap, 6), rng.standard_normal((6, 2)), rng.standard_normal((2, 4))
        losses = (Loss(tap, kernel, {}),)
        spread = Spread("y", 3, 2, False, 0.3, np.ones(4), (entry,), losses, carry, np.ones(4))
        rows = x if aligned else x.mean(axis=1, keepdims=True)
        check(proto, spread, {"x": x}, 0.3 + counted(entry, rows) + (rows @ kernel @ carry + 1) ** 2)


def test_time_first_and_an_answer_without_positions() -> None:
    text = "g (float[t,n,6] x) => (float[n,6] y) { y = ReduceMean <axes=[0], keepdims=0> (x) }"
    proto = build(text, {})
    x = np.random.default_rng(1).standard_normal((7, 3, 6)).astype(np.float32)
    entry = reach(Tap("x", 3, 2, 1, False), 6)
    spread = Spread("y", 2, 1, False, 0.1, np.ones(6), (entry,), (), np.zeros((0, 6)), np.zeros(6))
    check(proto, spread, {"x": x}, 0.1 + counted(entry, x.mean(axis=0)))


@pytest.mark.parametrize("opset", [8, 11, 13, 18])
@pytest.mark.parametrize("samples", [0, 2, None])
def test_single_steps_of_a_cell(opset: int, samples: int | None) -> None:
    sizes = {0: "n,t,2,6", 2: "t,2,n,6", None: "t,2,1,6"}[samples]
    time, ways = (1, 2) if samples == 0 else (0, 1)
    text = f"g (float[{sizes}] h, float[n,4] y0) => (float[n,4] y) {{ y = Identity(y0) }}"
    proto = build(text, {}, opset=opset)
    rng = np.random.default_rng(1)
    kernel, carry = rng.standard_normal((6, 2)), rng.standard_normal((2, 4))
    count = 1 if samples is None else 3
    for length in (1, 2, 5):
        shape = (count, length, 2, 6) if samples == 0 else (length, 2, count, 6)
        feeds = {"h": rng.standard_normal(shape).astype(np.float32), "y0": np.zeros((count, 4), np.float32)}
        for place in (-1, -2, 0, 1):
            tap = Tap("h", 4, 3, samples, False, picked=((time, place), (ways, 1)))
            there = -length <= place < length
            along = np.moveaxis(feeds["h"], (time, ways), (0, 1))
            rows = along[place, 1] if there else np.zeros((count, 6))
            assert np.array_equal(np.atleast_2d(tap.rows(feeds["h"])), rows)
            spread = Spread("y", 2, 1, False, 0.3, np.ones(4), (), (Loss(tap, kernel, {}),), carry, np.ones(4))
            check(proto, spread, feeds, 0.3 + (rows @ kernel @ carry + 1) ** 2)


@pytest.mark.parametrize("aligned", [True, False])
def test_maps_and_a_convolution(aligned: bool) -> None:
    text = "g (float[n,3,h,w] x) => (float[n,2,h,w] y) { y = Conv <pads=[1,1,1,1]> (x, k) }"
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((2, 3, 3, 3)).astype(np.float32)
    proto = build(text, {"k": weight})
    x = rng.standard_normal((2, 3, 5, 6)).astype(np.float32)
    tap = Tap("x", 4, 1, 0, aligned)
    entry, kernel, carry = reach(tap, 3), rng.standard_normal((4, 3, 3, 3)), rng.standard_normal((4, 2))
    loss = Loss(tap, kernel, {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}, () if aligned else (2, 3))
    scale = np.array([0.5, 2.0])
    spread = Spread("y", 4, 1, False, 0.3, scale, (entry,), (loss,), carry, np.ones(2))
    other = build(text.replace("float[n,2", "float[n,4"), {"k": kernel.astype(np.float32)})
    lost = np.moveaxis(answers(other, {"x": x})["y"], 1, -1)  # (n, h, w, 4)
    rows = np.moveaxis(x, 1, -1)
    if not aligned:
        rows, lost = rows.mean(axis=(1, 2), keepdims=True), lost.mean(axis=(1, 2), keepdims=True)
    expected = (0.3 + counted(entry, rows)) * scale + (lost @ carry + 1) ** 2
    check(proto, spread, {"x": x}, np.moveaxis(expected, -1, 1))


def test_one_number_a_sample_and_half_precision() -> None:
    text = "g (float16[n,6] x) => (float16[n] y) { y = ReduceMean <axes=[1], keepdims=0> (x) }"
    x = np.random.default_rng(1).standard_normal((5, 6)).astype(np.float16)
    entry = reach(Tap("x", 2, 1, 0, False, True), 6)
    spread = Spread("y", 2, 1, True, 0.1, np.ones(1), (entry,), (), np.zeros((0, 1)), np.zeros(1))
    expected = 0.1 + counted(entry, x.astype(np.float64))[:, 0]
    made = add_stddev(build(text, {}), [spread])
    assert made.graph.output[1].type.tensor_type.elem_type == TensorProto.FLOAT
    check(build(text, {}), spread, {"x": x}, expected)


@pytest.mark.parametrize("kind, dtype", [("Softmax", "float"), ("Sigmoid", "float"), ("Softmax", "float16")])
def test_an_operator_behind_which_the_variance_is_told(kind: str, dtype: str) -> None:
    proto = build(f"g ({dtype}[n,5] x) => ({dtype}[n,5] y) {{ y = {kind}(x) }}", {})
    x = np.random.default_rng(1).standard_normal((7, 5)).astype("float32" if dtype == "float" else "float16")
    entry, scale = reach(Tap("x", 2, 1, 0, True, dtype == "float16"), 5), np.arange(1.0, 6.0)
    spread = Spread("y", 2, 1, False, 0.3, scale, (entry,), (), np.zeros((0, 5)), np.zeros(5), kind, 0.01)
    inner = (0.3 + counted(entry, x.astype(np.float64))) * scale
    p = scipy.special.softmax(x.astype(np.float64), axis=1) if kind == "Softmax" else scipy.special.expit(x)
    slopes = [np.diag(row) - np.outer(row, row) if kind == "Softmax" else np.diag(row * (1 - row)) for row in p]
    expected = np.stack([slope**2 @ row for slope, row in zip(slopes, inner, strict=True)]) + 0.01
    made = add_stddev(proto, [spread])
    assert difference(answers(made, {"x": x})["y_stddev"], np.sqrt(expected)) < 1e-4


def test_taken_names_and_old_operator_sets_are_refused() -> None:
    text = "g (float[n,4] x) => (float[n,4] y) { y_stddev = Relu(x) y = Relu(y_stddev) }"
    spread = Spread("y", 2, 1, False, 0.1, np.ones(4), (), (), np.zeros((0, 4)), np.zeros(4))
    with pytest.raises(ModelError, match="has a tensor 'y_stddev' already"):
        add_stddev(build(text, {}), [spread])
    with pytest.raises(ModelError, match="needs operator set 8 or newer, the model has 7"):
        add_stddev(build(text, {}, opset=7), [spread])


# --- the whole way ------------------------------------------------------------------------------------


def digits(models: Path, kind: str) -> tuple[Path, str, dict[str, Array], dict[str, Array]]:
    folder = models / f"digits_{kind}"
    name = {"cnn": "image", "mlp": "pixels", "gru": "rows"}[kind]
    calibrate, evaluate = (dict(np.load(folder / f"{part}.npz")) for part in ("calibrate", "evaluate"))
    return folder / "model.onnx", name, {name: calibrate[name]}, {name: evaluate[name]}


@pytest.fixture(scope="module")
def emitted(models: Path) -> tuple[lowrank_onnx.Result, Path, str, dict[str, Array]]:
    path, name, calibrate, evaluate = digits(models, "cnn")
    result = lowrank_onnx.compress(
        path, keep_macs=0.6, calibrate=calibrate, evaluate=evaluate, emit_uncertainty=(), uncertainty=True, threads=1,
        cache=False,
    )  # fmt: skip
    return result, path, name, evaluate


Emitted = tuple[lowrank_onnx.Result, Path, str, dict[str, Array]]


def test_predicted_deviation_tells_the_real_one(emitted: Emitted) -> None:
    result, _, _, _ = emitted
    jsonschema.validate(result.report, SCHEMA)
    (row,) = result.report["uncertainty"]["outputs"]
    figures = row["evaluate"]
    assert figures["rank_correlation"] > 0.5 and 0.9 < figures["within_two"] < 0.98
    assert figures["predicted"] == pytest.approx(figures["deviation"], rel=0.2)
    assert result.report["ratio"]["macs"] <= 0.6  # what is added is part of the budget


@pytest.mark.parametrize("kind", ["mlp", "gru"])
def test_other_networks(models: Path, kind: str) -> None:
    path, name, calibrate, evaluate = digits(models, kind)
    result = lowrank_onnx.compress(
        path,
        {"keep_params" if kind == "gru" else "keep_macs": 0.6},
        calibrate=calibrate,
        evaluate=evaluate,
        emit_uncertainty=("logits",),
        threads=1,
        cache=False,
    )
    figures = result.report["uncertainty"]["outputs"][0]["evaluate"]
    assert figures["rank_correlation_elements"] > (0.3 if kind == "gru" else 0.15)
    assert figures["rank_correlation"] > 0.5 and 0.9 < figures["within_two"] < 0.98
    # Sequences of noise are far from any digit: the real deviation is many times the usual one.
    noise = np.random.default_rng(0).uniform(0, 1, evaluate[name].shape) * evaluate[name].max()
    original, session = open_session(onnx.load(path), RUNTIME), open_session(result.model, RUNTIME)
    data = read_data({name: noise.astype(np.float32)}, input_specs(original), "noise")
    assert data is not None
    assert judge(original, session, data, "logits", None)["within_two"] > 0.85


@pytest.mark.parametrize("kind", ["Softmax", "Sigmoid"])
def test_probabilities(models: Path, kind: str) -> None:
    path, _, calibrate, evaluate = digits(models, "cnn")
    proto = onnx.load(path)
    proto.graph.node.append(onnx.helper.make_node(kind, ["logits"], ["probability"], "last"))
    proto.graph.output[0].name = "probability"
    result = lowrank_onnx.compress(
        proto, keep_macs=0.6, calibrate=calibrate, evaluate=evaluate, emit_uncertainty=(), threads=1, cache=False
    )
    figures = result.report["uncertainty"]["outputs"][0]["evaluate"]
    assert figures["rank_correlation"] > 0.6 and figures["rank_correlation_elements"] > 0.6
    assert 0.9 < figures["within_two"] < 0.98
    assert answers(result.model, evaluate)["probability_stddev"].max() < 1


def test_a_certain_answer_is_not_told_to_be_exact(models: Path) -> None:
    # A probability that is 1 in float32 has no slope; the original may be less certain all the same.
    path, _, calibrate, evaluate = digits(models, "cnn")
    proto = onnx.load(path)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(5, np.float32), "five"))
    proto.graph.node.append(onnx.helper.make_node("Mul", ["logits", "five"], ["sharp"], "sharpen"))
    proto.graph.node.append(onnx.helper.make_node("Softmax", ["sharp"], ["probability"], "last"))
    proto.graph.output[0].name = "probability"
    result = lowrank_onnx.compress(
        proto, keep_macs=0.6, calibrate=calibrate, emit_uncertainty=(), threads=1, cache=False
    )
    found = answers(result.model, evaluate)
    assert (found["probability"] == 1).any() and found["probability_stddev"].min() > 0


def test_it_rises_on_inputs_of_another_kind(emitted: Emitted) -> None:
    result, path, name, evaluate = emitted
    noise = np.random.default_rng(0).uniform(0, 1, evaluate[name].shape) * evaluate[name].max()
    original, session = open_session(onnx.load(path), RUNTIME), open_session(result.model, RUNTIME)
    data = read_data({name: noise.astype(np.float32)}, input_specs(original), "noise")
    assert data is not None
    figures = judge(original, session, data, "logits", None)
    usual = result.report["uncertainty"]["outputs"][0]["evaluate"]
    assert figures["predicted"] > 1.5 * usual["predicted"]
    assert figures["within_two"] > 0.85


def test_it_is_the_same_alone_and_in_a_batch(emitted: Emitted) -> None:
    result, _, name, evaluate = emitted
    together = answers(result.model, {name: evaluate[name][:7]})["logits_stddev"]
    alone = [answers(result.model, {name: evaluate[name][place : place + 1]})["logits_stddev"] for place in range(7)]
    assert difference(together, np.concatenate(alone)) < 1e-4


def test_the_same_seed_gives_the_same_bytes(emitted: Emitted, models: Path) -> None:
    result, path, _, _ = emitted
    calibrate = digits(models, "cnn")[2]
    again = lowrank_onnx.compress(path, keep_macs=0.6, calibrate=calibrate, emit_uncertainty=(), threads=1, cache=False)
    assert again.model.SerializeToString(deterministic=True) == result.model.SerializeToString(deterministic=True)


def test_validate_and_benchmark_pass_over_the_added_outputs(emitted: Emitted, tmp_path: Path) -> None:
    result, path, _, evaluate = emitted
    made = result.save(tmp_path / "small.onnx")
    for pair in ((path, made), (made, path), (made, made)):
        report = lowrank_onnx.validate(*pair, evaluate=evaluate, threads=1)
        assert report["fidelity"]["cosine"] > 0.99
    fidelity = lowrank_onnx.validate(path, made, evaluate=evaluate, threads=1)["fidelity"]
    assert fidelity["max_abs_error"] == pytest.approx(result.report["fidelity"]["max_abs_error"], rel=1e-4)
    rows = lowrank_onnx.benchmark([path, made], evaluate=evaluate, threads=1, seconds=0.1)["models"]
    assert len(rows) == 2


def test_two_models_with_other_outputs_still_differ(models: Path, tmp_path: Path) -> None:
    proto = build("g (float[n,4] x) => (float[n,4] y, float[n,4] z_stddev) { y = Relu(x) z_stddev = Relu(x) }", {})
    other = build("g (float[n,4] x) => (float[n,4] y) { y = Relu(x) }", {})
    with pytest.raises(ModelError, match="differ in their outputs"):
        lowrank_onnx.validate(other, proto, evaluate={"x": np.ones((4, 4), np.float32)})


def test_the_plan_is_not_applied_without_what_was_held_out(emitted: Emitted) -> None:
    result, path, _, _ = emitted
    with pytest.raises(PlanError, match="--emit-uncertainty"):
        lowrank_onnx.apply(path, result.plan)


def test_a_budget_that_only_the_added_outputs_break_is_told(models: Path) -> None:
    path, _, calibrate, _ = digits(models, "mlp")
    with pytest.raises(TargetError, match="the added outputs take"):
        lowrank_onnx.compress(path, keep_macs=0.1, calibrate=calibrate, emit_uncertainty=(), threads=1, cache=False)


SMALL = "g (float[n,24] x) => (float[n,20] y, int64[n] k) { y = MatMul(x, w) k = ArgMax <axis=1, keepdims=0> (y) }"


def small(count: int = 64) -> tuple[ModelProto, dict[str, Array]]:
    rng = np.random.default_rng(0)
    return build(SMALL, {"w": falling(24, 20)}), {"x": rng.standard_normal((count, 24)).astype(np.float32)}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"emit_uncertainty": ("z",)}, "names 'z', which is no output of the model; outputs: 'y'"),
        ({"emit_uncertainty": ("k",)}, r"output 'k' is tensor\(int64\), not float"),
        ({"emit_uncertainty": (), "levels": (0.5, 0.8)}, "--levels puts several into the file"),
        ({"uncertainty": True, "agreement": 0.9, "rank": 4}, "--agreement puts several into the file"),
        ({"emit_uncertainty": (), "rank": 4, "calibrate": None}, "--emit-uncertainty needs samples"),
        ({"uncertainty": True, "rank": 4, "calibrate": None}, "--uncertainty needs samples"),
    ],
)
def test_bad_wishes_are_refused(options: dict[str, Any], message: str) -> None:
    proto, data = small()
    with pytest.raises(LowRankError, match=message):
        lowrank_onnx.compress(proto, **{"calibrate": data, **options})


def test_too_few_samples_and_no_output_of_numbers() -> None:
    proto, data = small(20)
    with pytest.raises(DataError, match="needs 32 calibration samples, found 20"):
        lowrank_onnx.compress(proto, rank=4, calibrate=data, emit_uncertainty=())
    only = build(
        "g (float[n,24] x) => (int64[n] k) { y = MatMul(x, w) k = ArgMax <axis=1, keepdims=0> (y) }",
        {"w": falling(24, 20)},
    )
    with pytest.raises(LowRankError, match="needs an output of type float"):
        lowrank_onnx.compress(only, rank=4, calibrate=small()[1], emit_uncertainty=())


def test_nothing_lost_is_nothing_to_tell() -> None:
    proto, data = small()
    weight = onnx.numpy_helper.to_array(proto.graph.initializer[0])
    u, s, vt = np.linalg.svd(weight)
    exact = (u[:, :4] * s[:4]) @ vt[:4]
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(exact.astype(np.float32), "w"))
    made = lowrank_onnx.compress(proto, rank=4, calibrate=data, emit_uncertainty=("y",), cache=False)
    assert np.abs(answers(made.model, data)["y_stddev"]).max() < 1e-4


# --- layers -------------------------------------------------------------------------------------------


def test_posterior_of_a_layer_describes_what_compression_lost(emitted: Emitted) -> None:
    result = emitted[0]
    arrays = result.posteriors
    assert list(arrays["sites"]) == [row["name"] for row in result.report["uncertainty"]["layers"]]
    assert arrays["sites"].size and not any(value.dtype == object for value in arrays.values())


def test_the_noise_of_a_layer_is_what_new_samples_show(models: Path) -> None:
    # On the samples of the fit the error of this layer is half of what it is elsewhere.
    path, _, calibrate, evaluate = digits(models, "mlp")
    result = lowrank_onnx.compress(path, keep_macs=0.6, calibrate=calibrate, uncertainty=True, threads=1, cache=False)
    made = result.posteriors
    (row,) = result.report["uncertainty"]["layers"]
    inner = "/fc2/Gemm_output_0"
    original, small = (
        answers(proto, evaluate, [inner, str(made["0/input"])]) for proto in (onnx.load(path), result.model)
    )
    lost = original[inner] - small[inner]
    z = np.concatenate([np.ones((len(lost), 1)), small[str(made["0/input"])] @ made["0/encoder"]], axis=1)
    told = np.outer(1 + np.einsum("nk,kl,nl->n", z, made["0/covariance"], z), made["0/noise"])
    assert np.mean(lost**2) == pytest.approx(np.mean(told), rel=0.2)
    assert row["residual_fitted"] < 0.7 * row["residual"] < 0.05


def test_predicted_variance_of_a_linear_layer_on_new_samples() -> None:
    """Its posterior tells the error on new samples, more on unusual ones, and is spread as draws of it are."""
    proto, data = small(400)
    result = lowrank_onnx.compress(proto, rank=6, calibrate=data, uncertainty=True, refine=False, cache=False)
    made = {key: np.asarray(value) for key, value in result.posteriors.items()}
    new = {"x": 1.5 * np.random.default_rng(5).standard_normal((4000, 24)).astype(np.float32)}
    lost = answers(proto, new)["y"] - answers(result.model, new)["y"]
    z = np.concatenate([np.ones((4000, 1)), new["x"] @ made["0/encoder"]], axis=1)
    leverage = np.einsum("nk,kl,nl->n", z, made["0/covariance"], z)
    usual = {"x": np.random.default_rng(6).standard_normal((4000, 24)).astype(np.float32)}
    error = answers(proto, usual)["y"] - answers(result.model, usual)["y"]
    y = np.concatenate([np.ones((4000, 1)), usual["x"] @ made["0/encoder"]], axis=1)
    told = (1 + np.einsum("nk,kl,nl->n", y, made["0/covariance"], y)).mean() * made["0/noise"]
    assert np.mean(error**2, axis=0).sum() == pytest.approx(told.sum(), rel=0.1)
    assert leverage.mean() > 1.5 * np.einsum("nk,kl,nl->n", y, made["0/covariance"], y).mean()
    assert np.mean(lost**2) > np.mean(error**2)
    mean = z @ made["0/mean"]
    assert difference(mean, answers(proto, new)["y"]) < difference(np.zeros_like(mean), answers(proto, new)["y"]) * 0.9
    # Draws of the factor and the noise spread as told.
    rng = np.random.default_rng(2)
    root = np.linalg.cholesky(made["0/covariance"].astype(np.float64))
    factors = np.sqrt(made["0/noise"][3]) * rng.standard_normal((40_000, len(root))) @ root.T
    values = factors @ z[0] + np.sqrt(made["0/noise"][3]) * rng.standard_normal(40_000)
    assert values.var() == pytest.approx(made["0/noise"][3] * (1 + leverage[0]), rel=0.03)


def test_the_command_line_writes_arrays_that_need_no_pickle(models: Path, tmp_path: Path) -> None:
    folder = models / "digits_mlp"
    arguments = ["compress", str(folder / "model.onnx"), "--keep-macs", "0.6", "--calibrate",
                 str(folder / "calibrate.npz"), "--threads", "1", "--no-cache", "--overwrite"]  # fmt: skip
    files = []
    for place in range(2):
        file, out = tmp_path / f"{place}.npz", tmp_path / f"{place}.onnx"
        extra = ["-o", str(out), "--uncertainty", str(file), "--emit-uncertainty", "logits", "--report",
                 str(tmp_path / "page.html")]  # fmt: skip
        done = CliRunner().invoke(cli, [*arguments, *extra], catch_exceptions=False)
        assert done.exit_code == 0 and "How sure this is" in done.output
        files.append(file.read_bytes())
    assert files[0] == files[1]
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "How sure this is" in page and "logits_stddev" in page
    with np.load(tmp_path / "0.npz", allow_pickle=False) as arrays:
        assert {f"0/{key}" for key in ("input", "encoder", "mean", "covariance", "noise", "rows")} < set(arrays)
    session = open_session(onnx.load(tmp_path / "0.onnx"), RUNTIME)
    assert [output.name for output in session.get_outputs()] == ["logits", "logits_stddev"]


def test_a_file_that_exists_is_not_written_over(models: Path, tmp_path: Path) -> None:
    folder, file = models / "digits_mlp", tmp_path / "sure.npz"
    file.write_bytes(b"mine")
    arguments = ["compress", str(folder / "model.onnx"), "-o", str(tmp_path / "o.onnx"), "--calibrate",
                 str(folder / "calibrate.npz"), "--uncertainty", str(file)]  # fmt: skip
    with pytest.raises(LowRankError, match="exists; use --overwrite"):
        CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert file.read_bytes() == b"mine" and not (tmp_path / "o.onnx").exists()


@pytest.mark.zoo
def test_positions_of_a_sentence_encoder(zoo: Path) -> None:
    folder = zoo / "minilm"
    calibrate, evaluate = (dict(np.load(folder / f"{part}.npz")) for part in ("calibrate", "evaluate"))
    names = ("input_ids", "attention_mask", "token_type_ids")
    result = lowrank_onnx.compress(
        folder / "model.onnx", rank=0.3, calibrate={name: calibrate[name][:64] for name in names},
        evaluate={name: evaluate[name][::40] for name in names}, emit_uncertainty=(), refine=False, augment=False,
        technique=("svd",), threads=1, cache=False,
    )  # fmt: skip
    figures = result.report["uncertainty"]["outputs"][0]["evaluate"]
    assert figures["rank_correlation"] > 0.5 and 0.9 < figures["within_two"] < 0.98
    assert result.report["uncertainty"]["latency_factor"] < 1.3
    for length in (5, 9):
        feeds = {name: evaluate[name][:2, :length] for name in names}
        assert answers(result.model, feeds)["last_hidden_state_stddev"].shape == (2, length, 384)
