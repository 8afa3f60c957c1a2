"""Levels as files of their own: every one against its own model, weights stored once, all files written or none."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import lowrank_onnx
from lowrank_onnx import level_files
from lowrank_onnx.cli import cli
from lowrank_onnx.errors import LowRankError, ModelError
from lowrank_onnx.level_files import level_openers, level_paths, save_levels
from lowrank_onnx.levels import is_leading
from lowrank_onnx.linalg import Array
from lowrank_onnx.model import SMALLER_KEY, data_file, from_proto, load, save, saved_size, write_files
from lowrank_onnx.runtime import Runtime
from tests.builders import answers, build, falling, furthest

RANKS = (16, 32, 48)
ARGUMENTS: dict[str, Any] = {"threads": 1, "cache": False, "augment": False}


def at_rank(rank: int, opset: int = 17) -> onnx.ModelProto:
    """A chain of that rank, a prefix of the one of rank 48, its core smaller along two axes; a layer all share."""
    u, core, v = falling(64, 48, seed=1), falling(48, 48, seed=4), falling(48, 80, seed=2)
    graph = """g (float[n,64] x) => (float[n,48] y) {
        a = MatMul(x, first) b = MatMul(a, core) c = MatMul(b, second) d = Add(c, bias)
        e = Relu(d) y = MatMul(e, head) }"""
    bias = np.full(80, rank, np.float32)
    constants = {"first": u[:, :rank], "core": core[:rank, :rank], "second": v[:rank], "bias": bias}
    return from_proto(build(graph, constants | {"head": falling(80, 48, seed=3)}, opset)).proto


def samples(count: int = 7) -> dict[str, Array]:
    return {"x": np.random.default_rng(0).standard_normal((count, 64)).astype(np.float32)}


def answers_of(path: Path) -> dict[str, Array]:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return dict(zip(["y"], session.run(None, samples()), strict=True))


@pytest.fixture
def written(tmp_path: Path) -> Path:
    out = tmp_path / "m.onnx"
    save_levels([at_rank(rank) for rank in RANKS], out, None)
    return out


def test_every_file_answers_as_its_own_model(written: Path) -> None:
    for rank, path in zip(RANKS, level_paths(written, 3), strict=True):
        onnx.checker.check_model(str(path), full_check=True)
        assert furthest(answers_of(path), answers(at_rank(rank), samples())) < 1e-6
    assert sorted(path.name for path in written.parent.iterdir()) == [
        "m.level_0.onnx",
        "m.level_1.onnx",
        "m.onnx",
        "m.onnx.data",
    ]


def test_every_weight_is_stored_once(written: Path) -> None:
    floats = sum(tensor.nbytes for tensor in map(onnx.numpy_helper.to_array, at_rank(48).graph.initializer))
    data = data_file(written).stat().st_size
    assert data <= floats + 64 * 5, "more than the weights of the highest level"


def test_rows_are_told_by_length_and_columns_cut(written: Path) -> None:
    lowest = onnx.load(written.with_name("m.level_0.onnx"), load_external_data=False)
    stored = {tuple(t.dims): {e.key: e.value for e in t.external_data} for t in lowest.graph.initializer}
    assert stored.keys() >= {(16, 80), (64, 48), (48, 48)}, "second as long as it is, first and core whole"
    assert sum(node.op_type == "Slice" for node in lowest.graph.node) == 2
    highest = onnx.load(written, load_external_data=False)
    assert not [node for node in highest.graph.node if node.op_type == "Slice"], "the highest level pays for nothing"
    starts = {t.name: {e.key: e.value for e in t.external_data} for t in highest.graph.initializer}
    assert stored[16, 80]["offset"] == starts["second"]["offset"]
    assert int(stored[16, 80]["length"]) == 16 * 80 * 4


@pytest.mark.parametrize("name", ["first", "second"])
@pytest.mark.parametrize("own", [(0, 1), (1,), (0,), (2,)])
def test_what_is_no_prefix_is_stored_beside(own: tuple[int, ...], name: str, tmp_path: Path) -> None:
    """Some levels have a factor of their own, of which the smaller one may be a prefix of the larger."""
    other = np.random.default_rng(9).standard_normal((64, 48) if name == "first" else (48, 80)).astype(np.float32)

    def cut(value: Array, level: int) -> Array:
        return value[:, : RANKS[level]] if name == "first" else value[: RANKS[level]]

    models = [at_rank(rank) for rank in RANKS]
    for level in own:
        _put(models[level], name, cut(other, level))
    out = tmp_path / "m.onnx"
    save_levels(models, out, None)
    # Without the highest one as a whole to be a prefix of, the middle one is the first of its kind.
    coded = {0, 1} if own == (2,) else set(own)
    for level, path in enumerate(level_paths(out, 3)):
        onnx.checker.check_model(str(path), full_check=True)
        found, wanted = answers_of(path)["y"], answers(models[level], samples())["y"]
        _put(models[level], name, cut(0 * other, level))
        effect = np.linalg.norm(wanted - answers(models[level], samples())["y"])
        apart = np.linalg.norm(found - wanted) / effect
        assert 1e-4 < apart < 0.05 if level in coded else apart < 1e-5
    save_levels([at_rank(rank) for rank in RANKS], tmp_path / "n.onnx", None)
    more = data_file(out).stat().st_size - data_file(tmp_path / "n.onnx").stat().st_size
    assert more == cut(other, max(coded)).size


@pytest.mark.parametrize(("larger", "packed"), [(1.35, True), (1.0, False), (9.0, False)])
def test_less_than_a_byte_a_number_where_that_is_what_it_takes(
    larger: float, packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both smaller levels have factors of their own: 1.37 times as large in bytes, 1.32 packed."""
    monkeypatch.setattr(level_files, "LARGER", larger)
    models = [at_rank(40), at_rank(44), at_rank(48)]
    rng = np.random.default_rng(3)
    for level, rank in ((0, 40), (1, 44)):
        for name, shape in (("first", (64, rank)), ("second", (rank, 80)), ("core", (rank, rank))):
            _put(models[level], name, rng.standard_normal(shape).astype(np.float32) / 8)
    out = tmp_path / "m.onnx"
    save_levels(models, out, None)
    kinds = {tensor.data_type for tensor in onnx.load(level_paths(out, 3)[0]).graph.initializer}
    assert (onnx.TensorProto.INT8 in kinds) != packed
    for path, model in zip(level_paths(out, 3), models, strict=True):
        onnx.checker.check_model(str(path), full_check=True)
        found, wanted = answers_of(path)["y"], answers(model, samples())["y"]
        apart = np.linalg.norm(found - wanted) / np.linalg.norm(wanted - wanted.mean(0))
        assert apart == 0 if path == out else (0.02 if packed else 0.004) < apart < (0.08 if packed else 0.02)
    size = sum(path.stat().st_size for path in (*level_paths(out, 3), data_file(out)))
    assert (size <= 1.35 * saved_size(models[-1])) == packed


def _put(model: onnx.ModelProto, name: str, value: Array) -> None:
    for tensor in model.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(value), name))


def test_the_highest_level_has_every_weight_as_it_is(tmp_path: Path) -> None:
    models = [at_rank(16), at_rank(48)]
    _put(models[1], "head", np.random.default_rng(5).standard_normal((80, 48)).astype(np.float32))
    out = tmp_path / "m.onnx"
    save_levels(models, out, None)
    assert np.array_equal(answers_of(out)["y"], answers(models[1], samples())["y"])
    smaller, highest = (onnx.load(path) for path in level_paths(out, 2))
    assert not {tensor.name for tensor in highest.graph.initializer} - {"first", "core", "second", "bias", "head"}
    kinds = [tensor.data_type for tensor in smaller.graph.initializer if tuple(tensor.dims) == (80, 48)]
    assert kinds == [onnx.TensorProto.INT8]
    assert max(len(tensor.name) for tensor in smaller.graph.initializer) == 1, "names take room as well"


def test_an_operator_set_whose_slice_has_no_inputs(tmp_path: Path) -> None:
    out = tmp_path / "m.onnx"
    models = [at_rank(rank, opset=9) for rank in RANKS]
    save_levels(models, out, None)
    for path, model in zip(level_paths(out, 3), models, strict=True):
        assert furthest(answers_of(path), answers(model, samples())) < 1e-6


def test_external_data_of_the_original_are_taken_along(tmp_path: Path) -> None:
    """Both models point into the file of the original, which lies elsewhere under the name the new one gets."""
    folder = tmp_path / "original"
    folder.mkdir()
    onnx.save(at_rank(48), folder / "m.onnx", save_as_external_data=True, location="m.onnx.data", size_threshold=0)
    original = load(folder / "m.onnx")
    smaller = onnx.ModelProto()
    smaller.CopyFrom(original.proto)
    out = tmp_path / "m.onnx"
    save_levels([smaller, original.proto], out, original.folder)
    for path in level_paths(out, 2):
        assert furthest(answers_of(path), answers(at_rank(48), samples())) < 1e-6
    assert data_file(out).stat().st_size <= (folder / "m.onnx.data").stat().st_size + 64 * 5
    with pytest.raises(ModelError, match="holds external data of the model itself"):
        save_levels([smaller, original.proto], folder / "m.onnx", original.folder)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.lists(st.integers(0, 2), min_size=3, max_size=3))
def test_leading_parts(shape: list[int], more: list[int]) -> None:
    whole = np.random.default_rng(0).standard_normal([a + b for a, b in zip(shape, more, strict=False)])
    part = whole[tuple(slice(size) for size in shape)]
    assert is_leading(part, whole) and not is_leading(part.astype(np.float32), whole)
    assert not is_leading(part + 1, whole)
    assert is_leading(whole, part) == (part.shape == whole.shape)


# --- all files or none --------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("fails", range(4))
def test_what_stood_there_comes_back_where_a_file_cannot_be_placed(
    written: Path, fails: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(written.parent)
    places = [data_file(written), *level_paths(written, 3)]
    replace = Path.replace

    def failing(self: Path, target: Path) -> Path:
        if target == places[fails] and self.suffix == ".tmp":
            raise OSError(errno.EIO, "it broke")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(ModelError, match="it broke; nothing was left behind"):
        save_levels([at_rank(rank) for rank in (8, 24, 48)], written, None)
    assert contents(written.parent) == before


def test_nothing_new_stays_where_a_file_cannot_be_placed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = Path.replace

    def failing(self: Path, target: Path) -> Path:
        if target.name == "m.onnx":
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(KeyboardInterrupt):
        save_levels([at_rank(rank) for rank in RANKS], tmp_path / "m.onnx", None)
    assert contents(tmp_path) == {}


def test_a_file_that_cannot_be_filled_leaves_nothing(tmp_path: Path) -> None:
    def full(stream: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ModelError, match="No space left"):
        write_files([(tmp_path / "a", lambda stream: stream.write(b"a")), (tmp_path / "b", full)])
    assert contents(tmp_path) == {}


def test_levels_of_a_larger_set_go(written: Path) -> None:
    """They would read the weights of the new set at the places of the old one."""
    save_levels([at_rank(rank) for rank in (8, 48)], written, None)
    assert sorted(contents(written.parent)) == ["m.level_0.onnx", "m.onnx", "m.onnx.data"]


def test_all_files_of_levels_go_where_one_model_replaces_them(written: Path) -> None:
    save(at_rank(8), written, None)
    assert sorted(contents(written.parent)) == ["m.onnx"]


def test_a_file_that_only_metadata_name_as_a_level_stays(written: Path) -> None:
    (written.parent / "mine.txt").touch()
    proto = onnx.load(written, load_external_data=False)
    for entry in proto.metadata_props:
        entry.value = json.dumps(["mine.txt"])
    onnx.save(proto, written)
    save_levels([at_rank(rank) for rank in (8, 48)], written, None)
    assert (written.parent / "mine.txt").exists()


# --- the whole way ------------------------------------------------------------------------------------


def test_a_file_that_is_missing_is_told(written: Path) -> None:
    written.with_name("m.level_1.onnx").unlink()
    with pytest.raises(ModelError, match=r"'m.level_1.onnx' is missing beside .* 3 files and one of weights"):
        level_openers(load(written), Runtime(threads=1))


@pytest.mark.parametrize("names", ['["../m.onnx"]', "{}", "[1]", "?"])
def test_names_that_are_none(written: Path, names: str) -> None:
    proto = onnx.load(written, load_external_data=False)
    next(entry for entry in proto.metadata_props if entry.key == SMALLER_KEY).value = names
    written.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match="must be a JSON list of names of files beside the model"):
        load(written)


def test_what_is_made_of_a_level_has_no_levels(written: Path) -> None:
    assert load(written).smaller == ("m.level_0.onnx", "m.level_1.onnx")
    assert not load(written).proto.metadata_props
    assert not from_proto(onnx.load(written)).proto.metadata_props
    assert load(written.with_name("m.level_0.onnx")).smaller == ()


def test_the_whole_way(models: Path, tmp_path: Path) -> None:
    folder, out, told = models / "digits_mlp", tmp_path / "m.onnx", tmp_path / "m.json"
    arguments = ["compress", str(folder / "model.onnx"), "-o", str(out), "--levels", "0.3,0.5"]
    arguments += ["--calibrate", str(folder / "calibrate.npz"), "--threads", "1", "--no-cache", "--json", str(told)]
    answer = CliRunner().invoke(cli, arguments)
    assert answer.exit_code == 0, answer.output
    files = [out, tmp_path / "m.level_0.onnx", data_file(out)]
    assert answer.output.splitlines()[-3:] == [f"wrote {file}" for file in files]
    report = json.loads(told.read_text())
    forms = {entry["form"]: entry for entry in report["level_forms"]}
    assert forms["files"]["chosen"] and not forms["switch"]["chosen"]
    # Every tensor names the file of weights, whose name is another where the files were measured.
    assert forms["files"]["size_bytes"] == pytest.approx(sum(file.stat().st_size for file in files), rel=1e-3)
    assert (
        report["after"]["size_bytes"] == forms["files"]["size_bytes"] <= 1.15 * report["levels"][1]["size_bytes_alone"]
    )
    assert len(forms["switch"]["against_static"]) == 2

    seen = lowrank_onnx.validate(folder / "model.onnx", out, evaluate=folder / "evaluate.npz", threads=1)
    assert [row["level"] for row in seen["levels"]] == [0, 1]
    assert seen["levels"][1]["cosine"] == pytest.approx(seen["fidelity"]["cosine"])
    assert seen["levels"][0]["cosine"] < seen["levels"][1]["cosine"]

    session = lowrank_onnx.AdaptiveSession(out, latency_ms=1000, threads=1)
    feeds = _feeds(session, folder)
    assert session.levels == 2
    for level, path in enumerate(level_paths(out, 2)):
        alone = ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, feeds)
        np.testing.assert_allclose(session.sessions[level].run(None, feeds)[0], alone[0], atol=1e-6)

    again = CliRunner().invoke(cli, arguments)
    assert again.exit_code == 1 and "exists; use --overwrite" in str(again.exception)
    out.unlink()
    beside = CliRunner().invoke(cli, arguments)
    assert beside.exit_code == 1 and "m.level_0.onnx' exists; use --overwrite" in str(beside.exception)


def _feeds(session: Any, folder: Path) -> dict[str, Array]:
    data = np.load(folder / "evaluate.npz")
    return {value.name: data[value.name][:3] for value in session.get_inputs()}


def test_a_form_needs_levels(models: Path) -> None:
    with pytest.raises(LowRankError, match="--levels-as switch needs levels"):
        lowrank_onnx.compress(models / "digits_mlp" / "model.onnx", levels_as="switch")
    with pytest.raises(LowRankError, match="must be files or switch"):
        lowrank_onnx.compress(models / "digits_mlp" / "model.onnx", levels=[0.3, 0.5], levels_as="file")
