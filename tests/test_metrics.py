"""Metrics against plain loops and SciPy; what does not fit is refused with the reason."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import scipy.special
import scipy.stats

from lowrank_onnx import metrics
from lowrank_onnx.errors import MetricError
from lowrank_onnx.metrics import (
    METRICS,
    Fidelity,
    FidelityAccumulator,
    Metric,
    fidelity,
    relative_drop,
    resolve_metric,
)

Array = npt.NDArray[Any]


def floats(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def labels(classes: int, *shape: int) -> Array:
    return np.random.default_rng(0).integers(0, classes, shape)


def score(metric: str, outputs: dict[str, Array], **data: Array) -> float:
    return resolve_metric(metric).score(outputs, data)


def refused(*parts: str) -> Any:
    """Expects a one-line MetricError that holds all parts."""
    return pytest.raises(MetricError, match="".join(f"(?=.*{part})" for part in parts) + r"[^\n]*\Z")


@pytest.fixture(params=[metrics._BLOCK, 40], ids=["whole", "blocks"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large arrays are taken in blocks; the figures must not depend on it."""
    monkeypatch.setattr(metrics, "_BLOCK", request.param)


# Names


def test_every_name_of_the_contract_is_there_and_three_are_costs() -> None:
    names = ["top1", "top5", "agreement", "perplexity", "psnr", "mse", "mae", "spearman", "cosine", "sqnr"]
    assert set(METRICS) == set(names) and all(METRICS[name].name == name for name in names)
    assert {name for name in names if not METRICS[name].higher_is_better} == {"perplexity", "mse", "mae"}


@pytest.mark.parametrize(
    ("metric", "before", "after", "drop"),
    [
        ("top1", 0.8, 0.6, 0.25),
        ("top1", 0.8, 1.0, -0.25),
        ("mse", 2.0, 3.0, 0.5),
        ("mse", 2.0, 1.0, -0.5),
        ("sqnr", -2.0, -3.0, 0.5),
        ("top1", 0.0, -0.1, 0.1),
        ("mae", 0.0, 0.1, 0.1),
        ("mae", 0.0, 0.0, 0.0),
    ],
)
def test_a_positive_drop_is_worse_for_costs_too(metric: str, before: float, after: float, drop: float) -> None:
    assert relative_drop(before, after, METRICS[metric]) == pytest.approx(drop)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with refused("'accuracy' is unknown", "top1, top5", "path.py:function"):
        resolve_metric("accuracy")
    with refused("metric.py names a file but no function", "metric.py:function"):
        resolve_metric("metric.py")


# Labels


def counted_by_hand(scores: Array, wanted: Array, count: int) -> float:
    """Share of labels (n,) within the ``count`` highest of scores (n, C); negative labels do not count."""
    pairs = [(row, label) for row, label in zip(scores, wanted, strict=True) if label >= 0]
    return float(np.mean([label in np.argsort(-row, kind="stable")[:count] for row, label in pairs]))


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize(("metric", "count"), [("top1", 1), ("top5", 5)])
def test_top_counts_what_a_loop_counts(metric: str, count: int) -> None:
    wanted = labels(9, 60)
    wanted[::7] = -1
    scores = np.round(floats(60, 9) * 2)  # with ties
    expected = counted_by_hand(scores, wanted, count)
    assert 0.05 < expected < 0.95
    assert score(metric, {"y": scores}, labels=wanted) == pytest.approx(expected)
    assert score(metric, {"y": scores.reshape(60, 9, 1, 1)}, labels=wanted) == pytest.approx(expected)
    assert score(metric, {"y": scores.reshape(60, 1, 9)}, labels=wanted[:, None]) == pytest.approx(expected)
    assert score(metric, {"y": scores.astype(np.float16)}, label=wanted.astype(np.int32)) == pytest.approx(expected)
    assert score(metric, {"y": scores}, target=wanted) == pytest.approx(expected)
    sequences = {"y": scores.reshape(6, 10, 9)}
    assert score(metric, sequences, labels=wanted.reshape(6, 10)) == pytest.approx(expected)
    images = {"y": np.moveaxis(scores.reshape(6, 2, 5, 9), -1, 1)}  # (N, C, H, W)
    assert score(metric, images, labels=wanted.reshape(6, 2, 5)) == pytest.approx(expected)


@pytest.mark.usefixtures("block")
def test_perplexity_reads_logits_and_probabilities() -> None:
    logits, wanted = floats(4, 10, 7) * 3 + 50, labels(7, 4, 10)
    wanted[:, :3] = -100
    log = scipy.special.log_softmax(logits.astype(np.float64), axis=-1)
    nats = [-log[i, t, wanted[i, t]] for i in range(4) for t in range(3, 10)]
    expected = np.exp(np.mean(nats))
    assert expected > 2
    assert score("perplexity", {"y": logits}, labels=wanted) == pytest.approx(expected, rel=1e-6)
    for dtype, tolerance in ((np.float32, 1e-5), (np.float16, 1e-2)):
        found = score("perplexity", {"y": np.exp(log).astype(dtype)}, labels=wanted)
        assert found == pytest.approx(expected, rel=tolerance)
    assert score("perplexity", {"y": log}, labels=wanted) == pytest.approx(expected, rel=1e-6)


def test_perplexity_of_a_ruined_model_is_finite() -> None:
    sure = np.array([[1.0, 0.0], [0.0, 1.0]], np.float32)
    assert 1e37 < score("perplexity", {"p": sure}, labels=np.array([1, 0])) < 1e39
    assert np.isfinite(score("perplexity", {"p": sure * 1e6}, labels=np.array([1, 0])))


def test_the_scores_are_found_among_several_outputs() -> None:
    wanted, good = labels(5, 20), np.eye(5, dtype=np.float32)
    outputs = {"ids": wanted, "pooled": floats(20, 64), "boxes": floats(20, 3, 4), "y": good[wanted]}
    assert score("top1", outputs | {"z": floats(20, 9)}, labels=wanted) == 1.0
    assert score("top1", {"hidden": good[wanted], "features": floats(20, 9)}, labels=wanted) == 1.0


@pytest.mark.parametrize(
    ("outputs", "data", "parts"),
    [
        (
            {"y": floats(4, 3)},
            {"x": floats(4, 2)},
            ["top1 needs an array 'labels'", r"found 'x' float32 \[4, 2\]"],
        ),
        ({"y": floats(4, 3)}, {}, ["needs an array 'labels'", "found nothing"]),
        ({"y": floats(4, 3)}, {"target": floats(4)}, ["needs an array 'labels'"]),
        ({"y": floats(4, 3)}, {"labels": floats(4)}, ["'labels' must hold whole numbers", "float32"]),
        (
            {"y": floats(4, 3)},
            {"labels": labels(3, 5)},
            [r"labels \[5\]", r"\[5, classes\]", r"'y' float32 \[4, 3\]"],
        ),
        ({"y": floats(4, 1)}, {"labels": labels(2, 4)}, ["no class scores"]),
        ({"y": labels(3, 4, 3)}, {"labels": labels(3, 4)}, ["no class scores", "float output", "'y' int64"]),
        (
            {"y": floats(4, 3)},
            {"labels": np.array([0, 3, 1, 2])},
            ["label 3 is no class of output 'y', which has 3"],
        ),
        ({"y": floats(4, 3)}, {"labels": np.full(4, -1)}, ["every label is negative"]),
        ({"y": np.full((4, 3), np.nan)}, {"labels": labels(3, 4)}, ["output 'y' holds NaN"]),
    ],
)
def test_labels_that_do_not_fit_are_refused(
    outputs: dict[str, Array], data: dict[str, Array], parts: list[str]
) -> None:
    with refused(*parts):
        score("top1", outputs, **data)


# Targets


def test_psnr_is_the_mean_over_samples_of_the_clipped_output() -> None:
    target = np.random.default_rng(0).random((3, 1, 4, 5)).astype(np.float32)
    output = target + floats(3, 1, 4, 5) * np.array([0.01, 0.1, 1.0]).reshape(3, 1, 1, 1)
    clipped = np.minimum(np.maximum(output, 0), 1)
    expected = np.mean([-20 * np.log10(np.sqrt(((y - t) ** 2).mean())) for y, t in zip(clipped, target, strict=True)])
    assert score("psnr", {"y": output}, target=target) == pytest.approx(expected, rel=1e-6)
    assert score("psnr", {"y": output}, target=target[:, 0]) == pytest.approx(expected, rel=1e-6)
    assert score("psnr", {"y": target}, target=target) == pytest.approx(300)


def test_mean_errors_take_target_or_the_array_of_the_outputs_name() -> None:
    a, b, near, far = floats(6, 3), floats(6, 4, seed=1), floats(6, 3, seed=2), floats(6, 4, seed=3) * 9
    squared, absolute = float(((a - near) ** 2).mean()), float(abs(b - far).mean())
    assert score("mse", {"a": a, "b": b}, target=near) == pytest.approx(squared)
    assert score("mse", {"a": a, "b": b}, a=near) == pytest.approx(squared)
    assert score("mse", {"a": a, "b": b}, output_0=near) == pytest.approx(squared)
    assert score("mae", {"a": a, "b": b}, target=far) == pytest.approx(absolute)
    assert score("mae", {"a": a, "b": b}, a=near, b=far) == pytest.approx(absolute)  # of the worst output
    assert score("mae", {"a": a, "b": b}, output_1=far) == pytest.approx(absolute)


def test_targets_are_never_broadcast() -> None:
    assert score("mse", {"y": floats(5, 1)}, target=floats(5)) == 0
    with refused("no float output has the shape of 'target'", r"\[1\]", r"'y' float32 \[5, 1\]"):
        score("mse", {"y": floats(5, 1)}, target=floats(1))
    with refused(r"output 'y' has shape \[5, 2\]", r"reference 'y' float32 \[5, 1\]"):
        score("mse", {"y": floats(5, 2)}, y=floats(5, 1))
    with refused("psnr needs an array 'target', or one named as an output .y.", "found 'labels' int64"):
        score("psnr", {"y": floats(5, 2)}, labels=labels(2, 5))
    with refused("output 'y' holds NaN"):
        score("mae", {"y": np.full((5, 2), np.nan)}, target=floats(5, 2))


def test_spearman_is_that_of_scipy_with_ties() -> None:
    value, wanted = np.round(floats(40, 1)), np.round(floats(40, seed=1) + floats(40))
    expected = scipy.stats.spearmanr(value[:, 0], wanted).statistic
    assert 0.2 < expected < 0.95
    outputs = {"embedding": floats(40, 8), "y": value}
    assert score("spearman", outputs, score=wanted) == pytest.approx(expected)
    assert score("spearman", outputs, target=wanted[:, None]) == pytest.approx(expected)
    assert score("spearman", {"y": np.ones((40, 1), np.float32)}, score=wanted) == 0
    with refused("spearman needs an array 'score'"):
        score("spearman", outputs, labels=wanted)
    with refused("one number for each of 20 scores", r"'y' float32 \[40, 1\]"):
        score("spearman", outputs, score=wanted[:20])
    with refused("all of 'score' are 2"):
        score("spearman", outputs, score=np.full(40, 2))


def test_fidelity_figures_are_metrics_against_a_reference() -> None:
    wanted, y = floats(20, 6), floats(20, 6) + 0.5 * floats(20, 6, seed=1)
    expected = fidelity({"y": wanted}, {"y": y})
    assert score("cosine", {"y": y}, target=wanted) == expected.cosine
    assert score("sqnr", {"y": y}, y=wanted) == expected.sqnr_db
    assert score("agreement", {"y": y}, target=wanted) == expected.agreement
    with refused("agreement: no output with a reference looks like class scores"):
        score("agreement", {"hidden": y}, target=wanted)


# Fidelity


@pytest.mark.usefixtures("block")
def test_fidelity_is_what_the_formulas_say_and_the_worst_output_counts() -> None:
    before = {"y": floats(30, 5), "hidden": floats(30, 4, 6, seed=1)}
    after = {name: value + 0.3 * floats(*value.shape, seed=2) for name, value in before.items()}
    found = fidelity(before, after)
    cosines, ratios, largest = [], [], []
    for name in before:
        a, b = before[name].reshape(30, -1).astype(np.float64), after[name].reshape(30, -1)
        cosines.append(np.mean([x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(a, b, strict=True)]))
        ratios.append(20 * np.log10(np.linalg.norm(a) / np.linalg.norm(a - b)))
        largest.append(abs(a - b).max())
    assert found.cosine == pytest.approx(min(cosines), rel=1e-9)
    assert found.sqnr_db == pytest.approx(min(ratios), rel=1e-9)
    assert found.max_abs_error == pytest.approx(max(largest), rel=1e-9)
    assert found.agreement == np.mean(before["y"].argmax(1) == after["y"].argmax(1)) < 1
    sums = FidelityAccumulator()
    for start in range(0, 30, 7):
        part = slice(start, start + 7)
        sums.update({n: v[part] for n, v in before.items()}, {n: v[part] for n, v in after.items()})
    streamed = sums.result()
    assert streamed.agreement == found.agreement
    assert streamed.cosine == pytest.approx(found.cosine) and streamed.sqnr_db == pytest.approx(found.sqnr_db)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_equal_outputs_have_a_finite_ceiling(dtype: npt.DTypeLike) -> None:
    y = floats(8, 5).astype(dtype)
    found = fidelity({"y": y}, {"y": y.copy()})
    assert found.cosine == pytest.approx(1, abs=1e-12) and found.cosine is not None and found.cosine <= 1
    assert (found.sqnr_db, found.max_abs_error, found.agreement) == (300, 0, 1)


def test_half_precision_sums_do_not_overflow() -> None:
    y = np.full((4, 2000), 300, np.float16)  # 300 squared is no float16
    found = fidelity({"h": y}, {"h": y / 2})
    assert found.sqnr_db == pytest.approx(20 * np.log10(2)) and found.cosine == pytest.approx(1)


@np.errstate(all="raise")
def test_zero_references_are_worst_or_equal() -> None:
    zero, one = np.zeros((2, 3), np.float32), np.ones((2, 3), np.float32)
    assert fidelity({"h": zero}, {"h": zero}).cosine == 1
    assert fidelity({"h": zero}, {"h": zero}).sqnr_db == 300
    assert fidelity({"h": zero}, {"h": one}).cosine == 0
    assert fidelity({"h": zero}, {"h": one}).sqnr_db == -300
    half = np.stack([zero[0], one[0]])
    assert fidelity({"h": half}, {"h": half}).cosine == pytest.approx(1)
    assert fidelity({"h": one}, {"h": half}).cosine == pytest.approx(0.5)


def votes(name: str, value: Array) -> bool:
    """Whether an output counts as class scores."""
    return fidelity({name: value}, {name: value}).agreement is not None


def test_what_looks_like_class_scores() -> None:
    spread = scipy.special.softmax(floats(4, 6, 384), axis=-1)
    assert votes("y", floats(4, 10)) and votes("y", floats(4, 10, 1, 1))
    assert votes("logits", floats(4, 6, 384)) and votes("class_head", floats(4, 3, 8, 8))
    assert votes("y", spread) and votes("y", spread.astype(np.float16))
    assert votes("y", scipy.special.softmax(floats(4, 2000), axis=-1))
    assert not votes("y", floats(4, 1)) and not votes("y", floats(4)) and not votes("prob", floats(4, 1))
    assert not votes("y", floats(4, 6, 384)) and not votes("y", floats(4, 3, 8, 8)) and not votes("y", floats(4, 1001))
    for name in ("embedding", "last_hidden_state", "pooler_output", "Features"):
        assert not votes(name, floats(4, 384))


@pytest.mark.parametrize("scales", [(1, 1), (1, 2), (2, 1)])
def test_rows_must_be_distributions_in_every_batch(scales: tuple[float, ...]) -> None:
    spread = scipy.special.softmax(floats(4, 6, 5), axis=-1)
    sums = FidelityAccumulator()
    for scale in scales:
        sums.update({"y": scale * spread}, {"y": scale * spread})
    assert sums.result().agreement == (1 if scales == (1, 1) else None)


def test_agreement_follows_the_class_axis_of_the_worst_scores() -> None:
    before, after = floats(6, 3, 4, 4), floats(6, 3, 4, 4) + 0.8 * floats(6, 3, 4, 4, seed=1)
    expected = np.mean(before.argmax(1) == after.argmax(1))
    found = fidelity({"logits": before, "y": floats(6, 9)}, {"logits": after, "y": floats(6, 9)})
    assert found.agreement == pytest.approx(expected) and expected < 0.95


def test_outputs_without_floats_count_into_agreement_only() -> None:
    ids, other = np.array([[1, 2], [3, 4]]), np.array([[1, 2], [3, 5]])
    assert fidelity({"ids": ids}, {"ids": other}) == Fidelity(None, None, None, 0.75)
    hidden, logits = floats(2, 3, 8), floats(2, 5)
    assert fidelity({"h": hidden, "ids": ids}, {"h": hidden, "ids": other}).agreement == 0.75
    assert fidelity({"logits": logits, "ids": ids}, {"logits": logits, "ids": other}).agreement == 1
    with_bool = fidelity({"b": np.array([True, False])}, {"b": np.array([True, True])})
    assert with_bool.agreement == 0.5


def test_a_scalar_output_is_one_sample() -> None:
    sums = FidelityAccumulator()
    for value in (1.0, -2.0):
        sums.update({"y": np.float32(value)}, {"y": np.float32(abs(value))})  # type: ignore[dict-item]
    found = sums.result()
    assert (found.cosine, found.max_abs_error, found.agreement) == (0, 4, None)
    assert found.sqnr_db == pytest.approx(10 * np.log10(5 / 16))


def test_masked_logits_compare_and_broken_outputs_do_not() -> None:
    y = floats(4, 5)
    masked = np.where(np.arange(5) < 2, -np.inf, y).astype(np.float32)
    assert fidelity({"y": masked}, {"y": masked + 0}).sqnr_db == 300
    for reference, candidate, parts in (
        (y, np.where(y > 1, np.nan, y), ["output 'y' of the rewritten model holds NaN"]),
        (np.where(y > 1, np.nan, y), y, ["output 'y' of the original model holds NaN"]),
        (y, masked, ["output 'y' is infinite in one model"]),
        (masked, -masked, ["output 'y' is infinite in one model"]),
        (y, y[:, :4], ["'y'", r"\[4, 4\]", r"\[4, 5\]"]),
        (y, y.astype(np.int64), ["'y'", "int64", "float32"]),
    ):
        with refused(*parts):
            fidelity({"y": reference}, {"y": candidate})
    with refused("differ in their outputs", "y", "z"):
        fidelity({"y": y}, {"z": y})
    with refused("no outputs to compare"):
        FidelityAccumulator().result()


# A user's own function


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], str]:
    def write_file(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return str(path)

    return write_file


def test_a_function_of_a_file_is_a_metric(
    write: Callable[[str, str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)  # whatever the environment says
    text = """
import sys
def metric(outputs, data):
    return sys.modules[__name__].SIGN * (outputs['y'] == data['labels']).mean()
"""
    one, two = write("one/metric.py", "SIGN = 1" + text), write("two/metric.py", "SIGN = -1" + text)
    chosen = [resolve_metric(f"{place}:metric") for place in (one, two)]
    y, wanted = labels(2, 10), np.zeros(10, int)
    share = float((y == 0).mean())
    assert [metric.score({"y": y}, {"labels": wanted}) for metric in chosen] == [share, -share]
    assert chosen[0].higher_is_better and chosen[0].name == f"{one}:metric"
    assert not list(tmp_path.rglob("__pycache__"))


def test_a_function_of_a_module_is_a_metric(
    write: Callable[[str, str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("lowrank_test_metric.py", "def rows(outputs, data): return len(outputs['y'])")
    monkeypatch.chdir(tmp_path)
    assert resolve_metric("lowrank_test_metric:rows").score({"y": floats(4)}, {}) == 4


@pytest.mark.parametrize(
    ("value", "expected"), [("3", 3), ("np.float32(0.5)", 0.5), ("np.array(2.0)", 2), ("np.int64(-1)", -1)]
)
def test_any_one_number_is_a_result(value: str, expected: float, write: Callable[[str, str], str]) -> None:
    name = write("m.py", f"import numpy as np\ndef metric(outputs, data): return {value}") + ":metric"
    found = resolve_metric(name).score({}, {})
    assert found == expected and type(found) is float


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        ("return None", ["returned a NoneType", "expected one number"]),
        ("return 'high'", ["returned a str"]),
        ("return True", ["returned a bool"]),
        ("return [[1], [1, 2]]", ["returned a list"]),
        ("import numpy; return numpy.ones(2)", ["returned a ndarray"]),
        ("return float('nan')", ["returned nan", "finite"]),
        ("return float('inf')", ["returned inf"]),
        ("raise KeyError('logits')", ["raised KeyError: 'logits'"]),
        ("raise SystemExit(0)", ["raised SystemExit: 0"]),
        ("return data()", ["raised TypeError"]),
    ],
)
def test_a_function_that_returns_no_number_is_refused(
    body: str, parts: list[str], write: Callable[[str, str], str]
) -> None:
    metric = resolve_metric(write("m.py", f"def metric(outputs, data): {body}") + ":metric")
    with refused("m.py:metric", *parts):
        metric.score({}, {})


def test_functions_that_are_missing_are_named(write: Callable[[str, str], str], tmp_path: Path) -> None:
    with refused("--metric", "no such file", "gone.py"):
        resolve_metric(f"{tmp_path}/gone.py:metric")
    with refused("no function 'metric'", "it has score"):
        resolve_metric(write("m.py", "def score(outputs, data): return 1.0") + ":metric")
    with refused("cannot be imported: SyntaxError"):
        resolve_metric(write("n.py", "def metric(") + ":metric")
    with refused("cannot be imported: ModuleNotFoundError"):
        resolve_metric("lowrank_no_such_module:metric")


def test_a_metric_can_be_made_from_a_function() -> None:
    assert Metric("rows", lambda outputs, data: len(outputs["y"])).score({"y": floats(4)}, {}) == 4
