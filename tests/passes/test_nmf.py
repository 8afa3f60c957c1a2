"""Factors without negative numbers: in the file, sparse on request, read by name."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import numpy as np
import onnx
import pytest
from onnx import ModelProto

import lowrank_onnx
from lowrank_onnx.decompositions.nmf import semi_nmf, sparser
from lowrank_onnx.decompositions.rows import pseudo_count
from lowrank_onnx.errors import LowRankError
from lowrank_onnx.labels import read_labels, strongest_rows
from lowrank_onnx.memory import session_rss_bytes
from lowrank_onnx.passes.nmf import NMF
from lowrank_onnx.pipeline import compress
from lowrank_onnx.runtime import Runtime
from tests.builders import Array, build, correlated, falling, moments, problem

SCHEMA = json.loads((Path(lowrank_onnx.__file__).parent / "report" / "schema.json").read_text(encoding="utf-8"))
TEXT = "g (int64[n,s] i) => (float[n,s,20] y) { e = Gather(t, i)  y = MatMul(e, w) }"


def model() -> tuple[ModelProto, dict[str, Array]]:
    """A table of 40 rows and a layer of 20 outputs."""
    ids = np.minimum(np.random.default_rng(0).zipf(1.5, (60, 6)) - 1, 39)
    return build(TEXT, {"t": falling(40, 16), "w": falling(16, 20, seed=1)}), {"i": ids}


def constant(proto: ModelProto, ending: str) -> Array:
    (found,) = [entry for entry in proto.graph.initializer if entry.name.endswith(ending)]
    return np.asarray(onnx.numpy_helper.to_array(found))


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize("data", [True, False], ids=["data", "weight"])
def test_factors_in_the_file_are_not_negative(sparsity: float, data: bool, tmp_path: Path) -> None:
    proto, ids = model()
    technique = [f"nmf:sparsity={sparsity}"]
    result = compress(proto, rank=5, technique=technique, calibrate=ids if data else None, cache=False)
    result.save(tmp_path / "m.onnx")
    made = onnx.load(tmp_path / "m.onnx")
    table, layer = constant(made, "Gather_0/first"), constant(made, "MatMul_1/second")
    assert table.shape == (40, 5) and layer.shape == (5, 20)
    for factor in (table.T, layer):
        assert factor.min() >= 0 and factor.max() > 0
        assert (factor == 0).sum(axis=1).min() >= int(sparsity * factor.shape[1])
    assert constant(made, "Gather_0/second").min() < 0


def test_a_weight_without_negative_numbers_gives_two_such_factors() -> None:
    weight = np.abs(falling(16, 20))
    proto = build("g (float[n,16] x) => (float[n,20] y) { y = MatMul(x, w) }", {"w": weight})
    made = compress(proto, rank=4, technique=["nmf"], calibrate={"x": correlated((80, 16))}, cache=False).model
    assert constant(made, "/first").min() >= 0 and constant(made, "/second").min() >= 0


def test_one_component_more_than_rows_is_always_exact() -> None:
    weight = np.random.default_rng(0).standard_normal((6, 30))
    made = semi_nmf(weight, 7)
    assert made.right.min() >= 0 and np.abs(made.matrix() - weight).max() < 1e-12
    assert semi_nmf(weight, 6).error > 0.01


def test_components_are_told_by_name(tmp_path: Path) -> None:
    proto, ids = model()
    file = tmp_path / "names.txt"
    file.write_text("".join(f"token{place}\n" for place in range(40)))
    result = compress(proto, rank=5, technique=["nmf"], calibrate=ids, labels=file, cache=False)
    jsonschema.validate(result.report, SCHEMA)
    table, layer = result.report["sites"]
    assert "components" not in layer and len(table["components"]) == 5
    factor = constant(result.model, "Gather_0/first")
    for entry in table["components"]:
        column = factor[:, entry["component"]]
        assert entry["rows"][0] == {"name": f"token{int(column.argmax())}", "strength": 1.0}
        strengths = [row["strength"] for row in entry["rows"]]
        assert strengths == sorted(strengths, reverse=True) and strengths[-1] > 0


def test_outputs_of_a_layer_are_told_by_name_too(tmp_path: Path) -> None:
    proto, ids = model()
    file = tmp_path / "names.txt"
    file.write_text("".join(f"output{place}\n" for place in range(20)))
    result = compress(proto, rank=5, technique=["nmf"], calibrate=ids, labels=file, cache=False)
    table, layer = result.report["sites"]
    factor = constant(result.model, "MatMul_1/second")
    assert "components" not in table and len(layer["components"]) == 5
    for entry in layer["components"]:
        assert entry["rows"][0]["name"] == f"output{int(factor[entry['component']].argmax())}"


def test_the_ten_strongest_rows_are_told() -> None:
    (entry,) = strongest_rows(np.arange(1.0, 16.0)[:, None], [str(place) for place in range(15)])
    assert [row["name"] for row in entry["rows"]] == [str(place) for place in range(14, 4, -1)]


def test_zeros_asked_for_are_made_up_for_by_the_other_factor() -> None:
    proto, ids = model()
    posed = problem(proto, ids)
    site = next(site for site in posed.sites if site.kind == "embedding")
    technique, table = NMF(sparsity=0.5), site.weight.astype(np.float64)
    seen = moments(posed)[site.name]
    analysis = technique.analyse(site, seen)
    factors = technique.factorize(site, analysis, technique.candidate(site, analysis, (5,)))
    first, second = factors["first"].astype(np.float64), factors["second"].astype(np.float64)
    weights = (seen["i"].total + 1)[:, None]
    best = np.linalg.lstsq(np.sqrt(weights) * first, np.sqrt(weights) * table, rcond=None)[0]
    np.testing.assert_allclose(second, best, rtol=1e-3, atol=1e-5)


def test_sparse_components_keep_their_largest_entries_and_never_none() -> None:
    factor = np.array([[3.0, 1.0, 2.0, 4.0], [0.0, 5.0, 0.0, 1.0]])
    assert sparser(factor, 0.5).tolist() == [[3, 0, 0, 4], [0, 5, 0, 1]]
    assert sparser(factor, 0.99).tolist() == [[0, 0, 0, 4], [0, 5, 0, 0]]
    assert np.array_equal(sparser(factor[:, :1], 0.99), factor[:, :1])
    assert np.array_equal(sparser(factor, 1.0), sparser(factor, 0.99))


def test_smoothing_is_chosen_where_it_is_not_given() -> None:
    proto, ids = model()
    posed = problem(proto, ids)
    site = next(site for site in posed.sites if site.kind == "embedding")
    seen = moments(posed)[site.name]
    chosen = NMF(smoothing=0).analyse(site, seen).weights - seen["i"].total
    np.testing.assert_allclose(chosen, pseudo_count(seen["i"].total, seen["i"].held))
    assert chosen[0] not in (0.0, 1.0)


def test_components_are_largest_first_and_hold_no_zero_rows() -> None:
    factor = np.array([[0.0, 3.0, 0.0], [1.0, 4.0, 0.0]])
    assert strongest_rows(factor, ["a", "b"]) == [
        {"component": 1, "rows": [{"name": "b", "strength": 1.0}, {"name": "a", "strength": 0.75}]},
        {"component": 0, "rows": [{"name": "b", "strength": 1.0}]},
        {"component": 2, "rows": []},
    ]


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"a\nb\n", "holds 2 names"), (b"\xff\xfe\x00", "no UTF-8 text"), (b"a\0b\n", "no text"), (None, "cannot be read"),
     (b"", "no text")],
)  # fmt: skip
def test_bad_labels_are_told_in_one_line(content: bytes | None, told: str, tmp_path: Path) -> None:
    proto, _ = model()
    file = tmp_path / "names.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(LowRankError, match=told) as caught:
        compress(proto, rank=5, technique=["nmf"], labels=file, cache=False)
    assert "\n" not in str(caught.value)


def test_labels_need_a_technique_that_has_components(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("x\n" * 40)
    with pytest.raises(LowRankError, match="add a technique"):
        compress(model()[0], rank=5, labels=tmp_path / "names.txt", cache=False)


def test_a_label_may_hold_any_mark_but_the_end_of_a_line(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_bytes("a\u2028b\r\n\nc".encode())
    assert read_labels(tmp_path / "names.txt") == ["a\u2028b", "", "c"]


def test_loaded_memory_follows_the_table() -> None:
    def table(rows: int) -> ModelProto:
        return build("g (int64[n] i) => (float[n,256] y) { y = Gather(t, i) }", {"t": np.ones((rows, 256), np.float32)})

    large, small = session_rss_bytes([(table(65536), None), (table(256), None)], Runtime(threads=1))
    assert large is not None and small is not None
    assert 60e6 < large - small < 200e6  # the table is 67 MB


def test_memory_is_reported_where_size_is_asked_for() -> None:
    proto, ids = model()
    report = compress(proto, keep_params=0.8, calibrate=ids, cache=False).report
    assert report["before"]["session_rss_bytes"] is not None and report["after"]["session_rss_bytes"] is not None
