"""Levels: every one against its own model, prefixes stored once, ranks nested; sessions that choose among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lowrank_onnx
from lowrank_onnx import nesting
from lowrank_onnx.errors import LowRankError, ModelError, PlanError, TargetError
from lowrank_onnx.levels import LEVEL_INPUT, LevelSession, build_levels, level_count
from lowrank_onnx.linalg import Array
from lowrank_onnx.model import from_proto, parameter_count
from lowrank_onnx.nesting import check_levels
from tests.builders import answers, build, falling, furthest

RANKS = (4, 8, 12)
ARGUMENTS: dict[str, Any] = {"threads": 1, "cache": False, "augment": False}


def at_rank(rank: int) -> onnx.ModelProto:
    """A chain of that rank: a prefix of the one of rank 12, with a bias of its own, and a layer all share."""
    u, v = falling(32, 12, seed=1), falling(12, 48, seed=2)
    graph = """g (float[n,32] x) => (float[n,5] y) {
        a = MatMul(x, first) c = MatMul(a, second) d = Add(c, bias) e = Relu(d) y = Gemm(e, head) }"""
    constants = {"first": u[:, :rank], "second": v[:rank], "bias": np.full(48, rank, np.float32)}
    return from_proto(build(graph, constants | {"head": falling(48, 5, seed=3)})).proto


def samples(count: int = 7) -> dict[str, Array]:
    return {"x": np.random.default_rng(0).standard_normal((count, 32)).astype(np.float32)}


@pytest.mark.parametrize("count", [2, 3])
def test_every_level_answers_as_its_own_model(count: int) -> None:
    models = [at_rank(rank) for rank in RANKS[:count]]
    whole = build_levels(models)
    onnx.checker.check_model(whole, full_check=True)
    assert level_count(whole) == count
    for level, model in enumerate(models):
        for rows in (1, 7):
            found = answers(whole, samples(rows) | {LEVEL_INPUT: np.array(level, np.int64)})
            assert furthest(found, answers(model, samples(rows))) < 1e-6
    highest = answers(models[-1], samples())
    assert furthest(answers(whole, samples()), highest) < 1e-6, "callers that know no levels get the highest"
    beyond = answers(whole, samples() | {LEVEL_INPUT: np.array(99, np.int64)})
    below = answers(whole, samples() | {LEVEL_INPUT: np.array(-1, np.int64)})
    assert furthest(beyond, highest) < 1e-6 and furthest(below, answers(models[0], samples())) < 1e-6


def test_prefixes_and_shared_layers_are_stored_once() -> None:
    whole = build_levels([at_rank(rank) for rank in RANKS])
    assert parameter_count(whole) == parameter_count(at_rank(12)) + 2 * 48  # the biases of the two smaller levels


def test_what_is_no_prefix_is_stored_beside() -> None:
    other = at_rank(4)
    for tensor in other.graph.initializer:
        if tensor.name == "first":
            tensor.CopyFrom(onnx.numpy_helper.from_array(falling(32, 4, seed=9), "first"))
    whole = build_levels([other, at_rank(12)])
    assert parameter_count(whole) == parameter_count(at_rank(12)) + 48 + 32 * 4
    found = answers(whole, samples() | {LEVEL_INPUT: np.array(0, np.int64)})
    assert furthest(found, answers(other, samples())) < 1e-6


def test_an_ordinary_model_has_no_levels() -> None:
    assert level_count(at_rank(4)) is None


def test_a_session_held_at_a_level() -> None:
    whole = build_levels([at_rank(4), at_rank(12)])
    session = ort.InferenceSession(whole.SerializeToString(), providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == ["x"], "the level must not be asked of callers"
    for level, rank in enumerate((4, 12)):
        (found,) = LevelSession(session, level).run(None, samples())
        assert furthest({"y": found}, answers(at_rank(rank), samples())) < 1e-6


@given(st.lists(st.floats(-0.5, 1.5), max_size=4))
def test_levels_are_shares_that_differ(levels: list[float]) -> None:
    fits = len(levels) >= 2 and len(set(levels)) == len(levels) and all(0 < level <= 1 for level in levels)
    if fits:
        assert check_levels(levels) == tuple(sorted(levels))
    else:
        with pytest.raises(LowRankError, match="two or more different shares"):
            check_levels(levels)


# --- the whole way ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def leveled(models: Path) -> lowrank_onnx.Result:
    folder = models / "digits_mlp"
    settings = ARGUMENTS | {"calibrate": folder / "calibrate.npz", "levels_as": "switch"}
    return lowrank_onnx.compress(folder / "model.onnx", levels=[0.5, 0.2, 0.3], **settings)


def test_budgets_are_met_and_the_smaller_levels_share(leveled: lowrank_onnx.Result) -> None:
    rows = leveled.report["levels"]
    assert [row["keep"] for row in rows] == [0.2, 0.3, 0.5]
    assert all(row["macs_ratio"] <= row["keep"] for row in rows)
    cosines = [row["cosine"] for row in rows]
    assert cosines == sorted(cosines) and cosines[0] > 0.9
    assert leveled.report["after"]["size_bytes"] <= 1.15 * rows[-1]["size_bytes_alone"]


def test_a_plan_of_levels_is_not_applied_as_one(leveled: lowrank_onnx.Result, models: Path) -> None:
    with pytest.raises(PlanError, match="run compress --levels again"):
        lowrank_onnx.apply(models / "digits_mlp" / "model.onnx", leveled.plan)


@pytest.mark.parametrize("levels", ["0.3,0.5", 0.5, ["a", "b"]])
def test_levels_that_are_no_numbers(models: Path, levels: Any) -> None:
    with pytest.raises(LowRankError, match="levels must be several numbers"):
        lowrank_onnx.compress(models / "digits_mlp" / "model.onnx", levels=levels)


def test_validate_tells_every_level(leveled: lowrank_onnx.Result, models: Path, tmp_path: Path) -> None:
    folder = models / "digits_mlp"
    path = leveled.save(tmp_path / "levels.onnx")
    report = lowrank_onnx.validate(folder / "model.onnx", path, evaluate=folder / "evaluate.npz", threads=1)
    assert [row["level"] for row in report["levels"]] == [0, 1, 2]
    assert report["fidelity"]["cosine"] == pytest.approx(report["levels"][-1]["cosine"])


def test_a_level_the_techniques_cannot_reach_is_told(models: Path) -> None:
    with pytest.raises(TargetError, match="is the least the techniques in use can keep"):
        lowrank_onnx.compress(models / "digits_mlp" / "model.onnx", levels=[0.01, 0.5], **ARGUMENTS)
    with pytest.raises(LowRankError, match="leave --agreement and the other targets out"):
        lowrank_onnx.compress(models / "digits_mlp" / "model.onnx", levels=[0.3, 0.5], keep_macs=0.5)


def test_a_model_without_levels_cannot_adapt(models: Path) -> None:
    with pytest.raises(ModelError, match="compress --levels"):
        lowrank_onnx.AdaptiveSession(models / "digits_mlp" / "model.onnx", latency_ms=1)


def test_factors_that_are_no_prefix_are_refitted_not_cut(models: Path) -> None:
    """Units of a feed-forward pair come in no order: cutting them gave a fifth of the output's energy away."""
    folder = models / "char_transformer"
    settings = ARGUMENTS | {"calibrate": folder / "calibrate.npz", "technique": ("feedforward",)}
    both = lowrank_onnx.compress(folder / "model.onnx", levels=[0.7, 0.9], **settings)
    alone = lowrank_onnx.compress(folder / "model.onnx", keep_macs=0.7, **settings)
    assert 1 - both.report["levels"][0]["cosine"] <= 2 * (1 - alone.report["fidelity"]["cosine"]) + 1e-4


@pytest.mark.parametrize("wish", [{"levels": [0.5, 0.7]}, {"agreement": 0.9, "keep_macs": 0.5}])
def test_levels_share_inputs_and_outputs(models: Path, wish: dict[str, Any]) -> None:
    folder = models / "char_decoder"
    settings = ARGUMENTS | wish | {"calibrate": folder / "calibrate.npz", "allow_io_change": True}
    with pytest.raises(LowRankError, match="--allow-io-change gives each level a cache of its own width"):
        lowrank_onnx.compress(folder / "model.onnx", **settings)


def test_a_name_that_is_taken_is_told(leveled: lowrank_onnx.Result) -> None:
    with pytest.raises(ModelError, match="has a tensor 'rank_level' of its own"):
        build_levels([leveled.model, leveled.model])


def test_levels_between_store_nothing_where_a_file_would_be_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """The middle level is made of layers of the others as they are, and is within its budget."""
    nodes = " ".join(f"m{i} = MatMul(r{i}, w{i}) r{i + 1} = Relu(m{i})" for i in range(9))
    graph = f"g (float[n,48] r0) => (float[n,48] y) {{ {nodes} y = MatMul(r9, w9) }}"
    proto = build(graph, {f"w{i}": falling(48, 48, seed=i) for i in range(10)})
    data = {"r0": np.random.default_rng(0).standard_normal((64, 48)).astype(np.float32)}
    settings = ARGUMENTS | {"calibrate": data, "levels": [0.3, 0.5, 0.7], "technique": ("svd",)}
    own = lowrank_onnx.compress(proto, **settings)
    monkeypatch.setattr(nesting, "LARGER", 0.0)
    made = lowrank_onnx.compress(proto, **settings)
    low, middle, high = (
        {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in level.graph.initializer}
        for level in (*made.levels, made.model)
    )
    ends = [
        tuple(end is not None and np.array_equal(value, end) for end in (low.get(name), high.get(name)))
        for name, value in middle.items()
    ]
    assert (False, False) not in ends, "a constant of its own"
    assert (True, False) in ends and (False, True) in ends, "layers of both"
    assert [name for name in middle if name in low and low[name].size < middle[name].size], "of two ranks the larger"
    before, after = (result.report["levels"][1]["macs_ratio"] for result in (own, made))
    assert 0.9 * before <= after <= 0.5

    # One layer: there is nothing between the ends, and the level keeps what it has.
    one = build("g (float[n,48] r0) => (float[n,48] y) { y = MatMul(r0, w) }", {"w": falling(48, 48)})
    made = lowrank_onnx.compress(one, **settings)
    costs = [row["macs_ratio"] for row in made.report["levels"]]
    assert costs[0] < costs[1] < costs[2]
