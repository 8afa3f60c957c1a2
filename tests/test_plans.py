"""Plans: the same bytes again, edits by hand carried out, and everything they say checked."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from lowrank_onnx import apply, compress
from lowrank_onnx.errors import LowRankError, PlanError
from lowrank_onnx.model import parameter_count, serialize
from lowrank_onnx.plans import read_plan
from tests.builders import build, correlated, falling

TEXT = """g (float[n,32] x) => (float[n,24] y) {
    t = MatMul(x, w) u = Add(t, b) h = Relu(u) y = Gemm(h, v) }"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    constants = {"w": falling(32, 48), "b": np.ones(48, np.float32), "v": falling(48, 24, seed=1)}
    onnx.save(build(TEXT, constants), tmp_path / "m.onnx")
    np.savez(tmp_path / "c.npz", x=correlated((60, 32)))
    return tmp_path


def planned(folder: Path, **target: Any) -> dict[str, Any]:
    """A plan as its file has it."""
    made = compress(folder / "m.onnx", calibrate=str(folder / "c.npz"), **(target or {"keep_params": 0.6}))
    return copy.deepcopy(json.loads(json.dumps(made.plan)))


@pytest.mark.parametrize("target", [{"keep_params": 0.6}, {"keep_macs": 0.7}, {"rank": 8}, {"rank": "energy=0.8"}])
@pytest.mark.parametrize("data", [True, False], ids=["data", "weight"])
def test_apply_gives_the_bytes_of_compress(folder: Path, target: dict[str, Any], data: bool) -> None:
    calibrate = str(folder / "c.npz") if data else None
    result = compress(folder / "m.onnx", target, calibrate=calibrate, technique=["svd"])
    again = apply(folder / "m.onnx", json.loads(json.dumps(result.plan)))
    assert serialize(again.model) == serialize(result.model)
    assert again.report["ratio"]["parameters"] == result.report["ratio"]["parameters"]


def test_an_option_that_may_repeat_can_be_one_text(folder: Path) -> None:
    """Letter by letter, the star of a pattern took every layer."""
    one = planned(folder, keep_params=0.9, technique="svd", exclude="Gemm_*", shape="x=3,32")
    several = planned(folder, keep_params=0.9, technique=["svd"], exclude=["Gemm_*"], shape=["x=3,32"])
    assert one["sites"] == several["sites"]


def test_a_plan_file_reads_back(folder: Path) -> None:
    content = planned(folder)
    (folder / "p.json").write_text(json.dumps(content))
    assert read_plan(folder / "p.json") == content
    assert serialize(apply(folder / "m.onnx", folder / "p.json").model) == serialize(
        apply(folder / "m.onnx", content).model
    )


def test_every_single_site_has_a_row_with_a_decision(folder: Path) -> None:
    content = compress(folder / "m.onnx", rank=8, technique=["svd"], exclude=["Gemm*"]).plan
    rows = {row["site"]: row for row in content["sites"]}
    assert {name: row["decision"] for name, row in rows.items()} == {"MatMul_0": "factorized", "Gemm_3": "kept"}
    assert rows["Gemm_3"]["reason"]


def test_an_edited_rank_is_carried_out(folder: Path) -> None:
    content = compress(folder / "m.onnx", rank=8, technique=["svd"]).plan
    content = json.loads(json.dumps(content))
    content["sites"][0]["ranks"] = [3]
    made = apply(folder / "m.onnx", content).model
    shapes = {tensor.name: list(tensor.dims) for tensor in made.graph.initializer}
    assert shapes["MatMul_0/first"] == [32, 3] and shapes["Gemm_3/first"] == [48, 8]


def test_a_row_set_to_kept_or_taken_out_stays_dense(folder: Path) -> None:
    content = json.loads(json.dumps(compress(folder / "m.onnx", rank=8, technique=["svd"]).plan))
    kept, without = copy.deepcopy(content), copy.deepcopy(content)
    kept["sites"][0]["decision"] = "kept"
    del without["sites"][0]
    for edited in (kept, without):
        result = apply(folder / "m.onnx", edited)
        assert parameter_count(result.model) == 32 * 48 + 48 + 8 * 72
        rows = {row["name"]: row for row in result.report["sites"]}
        assert rows["MatMul_0"]["decision"] == "kept" and rows["MatMul_0"]["reason"]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown site": ({"site": "nope"}, "nope"),
    "no site": ({"site": None}, "site"),
    "site that is a list": ({"site": ["MatMul_0"]}, "site"),
    "decision": ({"decision": "maybe"}, "maybe"),
    "no ranks": ({"ranks": []}, "ranks"),
    "rank zero": ({"ranks": [0]}, "ranks"),
    "rank too large": ({"ranks": [33]}, "33"),
    "two ranks": ({"ranks": [3, 3]}, "3"),
    "rank that is no number": ({"ranks": ["3"]}, "ranks"),
    "rank that is a bool": ({"ranks": [True]}, "ranks"),
    "unknown technique": ({"technique": "magic"}, "magic"),
    "technique for another kind": ({"technique": "feedforward"}, "feedforward"),
}


@pytest.mark.parametrize("edit", WRONG)
def test_a_wrong_row_is_told(folder: Path, edit: str) -> None:
    changes, says = WRONG[edit]
    content = json.loads(json.dumps(compress(folder / "m.onnx", rank=8, technique=["svd"]).plan))
    content["sites"][0] |= changes
    with pytest.raises(LowRankError, match=says):
        apply(folder / "m.onnx", content)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"seed": "x"}, "seed"),
        ({"techniques": "svd"}, "techniques"),
        ({"techniques": [5]}, "techniques"),
        ({"calibrate": "c.npz"}, "calibrate"),
        ({"calibrate": {"source": "c.npz"}}, "calibrate"),
        ({"target": 5}, "target"),
        ({"provider": "tpu"}, "tpu"),
    ],
)
def test_a_wrong_setting_is_told(folder: Path, setting: dict[str, Any], says: str) -> None:
    content = json.loads(json.dumps(compress(folder / "m.onnx", rank=8, technique=["svd"]).plan))
    content["setting"] |= setting
    with pytest.raises(LowRankError, match=says):
        apply(folder / "m.onnx", content)


def test_a_site_named_twice_is_told(folder: Path) -> None:
    content = json.loads(json.dumps(compress(folder / "m.onnx", rank=8, technique=["svd"]).plan))
    content["sites"].append(content["sites"][0])
    with pytest.raises(PlanError, match="twice"):
        apply(folder / "m.onnx", content)


def test_other_calibration_data_are_told(folder: Path) -> None:
    content = planned(folder)
    with pytest.raises(PlanError, match="other calibration data"):
        apply(folder / "m.onnx", content, calibrate={"x": correlated((60, 32), seed=9)})
    (folder / "c.npz").unlink()
    with pytest.raises(PlanError, match="missing"):
        apply(folder / "m.onnx", content)


def test_a_plan_that_keeps_everything_has_nothing_to_apply(folder: Path) -> None:
    content = planned(folder)
    for row in content["sites"]:
        row["decision"] = "kept"
    with pytest.raises(PlanError, match="nothing to apply"):
        apply(folder / "m.onnx", content)
