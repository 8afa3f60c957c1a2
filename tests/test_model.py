"""Loading, counting and saving."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto

from lowrank_onnx.errors import ModelError
from lowrank_onnx.model import check_output, from_proto, has_external_data, load, save, saved_size, serialize
from tests.builders import Array, answers, build, correlated, falling, furthest

W = falling(16, 20)
TEXT = "g (float[n,16] x) => (float[n,20] y) { y = MatMul(x, w) }"
X = {"x": correlated((3, 16))}


def constant(proto: ModelProto, name: str) -> Array | None:
    model = from_proto(proto)
    found = model.constant(model.scopes[0], name)
    return None if found is None else found.value


def test_what_is_loaded_is_what_is_there(tmp_path: Path) -> None:
    onnx.save(build(TEXT, {"w": W}), tmp_path / "m.onnx")
    model = load(tmp_path / "m.onnx")
    content = (tmp_path / "m.onnx").read_bytes()
    import hashlib

    assert model.sha256 == model.digest == hashlib.sha256(content).hexdigest()
    assert (model.size_bytes, model.opset, model.folder) == (len(content), 17, None)


def test_digest_tells_of_external_data_too(tmp_path: Path) -> None:
    for name, weight in (("a", W), ("b", 2 * W)):
        (tmp_path / name).mkdir()
        proto = build(TEXT, {"w": weight})
        onnx.save(proto, tmp_path / name / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    a, b = load(tmp_path / "a" / "m.onnx"), load(tmp_path / "b" / "m.onnx")
    assert a.sha256 == b.sha256 and a.digest != b.digest
    assert a.size_bytes == sum(path.stat().st_size for path in (tmp_path / "a").iterdir())


@pytest.mark.parametrize(
    ("body", "stored", "seen"),
    [
        ("i = Identity(w)", W, W),
        ("i = Transpose(w)", W, W.T),
        ("i = Cast<to=11>(w)", W, W.astype(np.float64)),
        ("i = Cast<to=10>(w)", W, W.astype(np.float16)),
        ("s = Constant<value_ints=[20,-1]>() i = Reshape(w, s)", W, W.reshape(20, 16)),
        ("s = Constant<value_ints=[0]>() i = Unsqueeze(w, s)", W, W[None]),
        ("s = Constant<value_ints=[1]>() i = Squeeze(w, s)", W[:, None], W),
        ("i = Flatten<axis=0>(w)", W, W.reshape(1, -1)),
        ("j = Transpose(w) i = Identity(j)", W, W.T),
    ],
)
def test_constants_are_seen_through_layout_operators(body: str, stored: Array, seen: Array) -> None:
    proto = build(f"g (float[n] x) => (float[n] y) {{ {body} y = Relu(x) }}", {"w": stored})
    value = constant(proto, "i")
    assert value is not None and value.dtype == seen.dtype and np.array_equal(value, seen)


@pytest.mark.parametrize("body", ["i = Relu(x)", "i = Transpose(x)", "i = Add(w, w)", "s = Shape(x) i = Reshape(w, s)"])
def test_what_depends_on_data_or_is_computed_is_no_constant(body: str) -> None:
    assert constant(build(f"g (float[16,20] x) => (float[n] y) {{ {body} y = Relu(x) }}", {"w": W}), "i") is None


@pytest.mark.parametrize("opset", [7, 11, 13, 17])
def test_constant_nodes_of_every_form(opset: int) -> None:
    node = onnx.helper.make_node("Constant", [], ["i"], value=onnx.numpy_helper.from_array(W))
    proto = build("g (float[n] x) => (float[n] y) { y = Relu(x) }", opset=opset)
    proto.graph.node.append(node)
    value = constant(proto, "i")
    assert value is not None and np.array_equal(value, W)


def test_external_values_are_mapped(tmp_path: Path) -> None:
    onnx.save(
        build(TEXT, {"w": W}), tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0
    )
    model = load(tmp_path / "m.onnx")
    found = model.constant(model.scopes[0], "w")
    assert found is not None and isinstance(found.value, np.memmap) and np.array_equal(found.value, W)


def test_links_in_a_store_of_models_are_followed(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    onnx.save(build(TEXT, {"w": W}), tmp_path / "blobs" / "m.onnx", save_as_external_data=True, location="w.bin",
              size_threshold=0)  # fmt: skip
    for name in ("m.onnx", "w.bin"):
        (tmp_path / "snapshot" / name).symlink_to(tmp_path / "blobs" / name)
    assert load(tmp_path / "snapshot" / "m.onnx").size_bytes > W.nbytes


def test_a_model_that_only_the_checker_dislikes_is_loaded(tmp_path: Path) -> None:
    proto = build(TEXT, {"w": W})
    proto.graph.node[0].name = "fc"
    proto.graph.name = ""  # the checker wants one
    with pytest.raises(onnx.checker.ValidationError):
        onnx.checker.check_model(proto)
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    assert load(tmp_path / "m.onnx").proto.graph.node[0].name == "fc"


def test_two_constants_of_one_name_are_refused() -> None:
    proto = build(TEXT, {"w": W})
    proto.graph.initializer.append(onnx.numpy_helper.from_array(2 * W, "w"))
    with pytest.raises(ModelError, match="'w'"):
        from_proto(proto)


def test_loading_changes_nothing_of_the_callers_model() -> None:
    proto = build(TEXT, {"w": W})
    before = serialize(proto)
    from_proto(proto)
    assert serialize(proto) == before


# --- saving ------------------------------------------------------------------------------------------


def test_saved_size_is_the_size_saved(tmp_path: Path) -> None:
    proto = build(TEXT, {"w": W})
    save(proto, tmp_path / "a.onnx", None)
    assert (tmp_path / "a.onnx").stat().st_size == saved_size(proto)
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    loaded = load(tmp_path / "m.onnx")
    save(loaded.proto, tmp_path / "b.onnx", loaded.folder)
    found = sum((tmp_path / name).stat().st_size for name in ("b.onnx", "b.onnx.data"))
    assert abs(found - saved_size(loaded.proto)) < 100  # offsets are written out, data are aligned
    assert furthest(answers(onnx.load(tmp_path / "b.onnx"), X), answers(onnx.load(tmp_path / "a.onnx"), X)) == 0


def test_external_data_are_aligned_and_sparse_in_names(tmp_path: Path) -> None:
    proto = build("g (float[n,16] x) => (float[n,20] y) { t = MatMul(x, w) y = MatMul(t, v) }",
                  {"w": W, "v": falling(20, 20)})  # fmt: skip
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    loaded = load(tmp_path / "m.onnx")
    save(loaded.proto, tmp_path / "out.onnx", loaded.folder)
    written = onnx.load(tmp_path / "out.onnx", load_external_data=False)
    for tensor in written.graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        assert tensor.data_location == TensorProto.EXTERNAL and entries["location"] == "out.onnx.data"
        assert int(entries["offset"]) % 64 == 0 and int(entries["length"]) == 4 * int(np.prod(tensor.dims))
    assert has_external_data(loaded.proto), "the model in memory still points at its own files"


def test_external_data_of_a_model_that_is_replaced_go(tmp_path: Path) -> None:
    proto = build(TEXT, {"w": W})
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    loaded = load(tmp_path / "m.onnx")
    save(loaded.proto, tmp_path / "out.onnx", loaded.folder)
    assert (tmp_path / "out.onnx.data").exists()
    save(build(TEXT, {"w": W}), tmp_path / "out.onnx", None)
    assert {path.name for path in tmp_path.iterdir()} == {"m.onnx", "w.bin", "out.onnx"}


def test_a_file_of_that_name_that_the_replaced_model_does_not_read_stays(tmp_path: Path) -> None:
    proto = build(TEXT, {"w": W})
    save(proto, tmp_path / "out.onnx", None)
    (tmp_path / "out.onnx.data").write_bytes(b"mine")
    save(proto, tmp_path / "out.onnx", None)
    assert (tmp_path / "out.onnx.data").read_bytes() == b"mine"


def test_saved_files_have_the_rights_of_ordinary_files(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        save(build(TEXT, {"w": W}), tmp_path / "a.onnx", None)
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "a.onnx").stat().st_mode) == 0o640


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.onnx").write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ModelError, match="No space left on device"):
        save(build(TEXT, {"w": W}), tmp_path / "a.onnx", None)
    assert (tmp_path / "a.onnx").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"]


def test_a_place_is_checked_without_leaving_a_trace(tmp_path: Path) -> None:
    assert check_output(tmp_path / "new.onnx", None, False) == tmp_path / "new.onnx"
    assert list(tmp_path.iterdir()) == []
