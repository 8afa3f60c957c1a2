"""Data are read as samples that fit the model, or refused with the reason."""

import io
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest

from lowrank_onnx.data import Dataset, InputSpec, load_data
from lowrank_onnx.errors import DataError

Array = npt.NDArray[Any]


def spec(name: str, *shape: int | str | None, dtype: npt.DTypeLike = np.float32) -> InputSpec:
    return InputSpec(name, np.dtype(dtype), shape)


X = spec("x", "batch", 3)
TOKENS = [spec("ids", "batch", "time", dtype=np.int64), spec("mask", "batch", "time", dtype=np.int64)]


def floats(*shape: int) -> Array:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def integers(*shape: int) -> Array:
    return np.random.default_rng(0).integers(0, 9, shape)


def saved(path: Path, **arrays: Array) -> Path:
    np.savez(path, allow_pickle=True, **arrays)
    return path


def refused(*parts: str) -> Any:
    """Expects a one-line DataError that holds all parts."""
    return pytest.raises(DataError, match="".join(f"(?=.*{part})" for part in parts) + r"[^\n]*\Z")


# npz


def test_a_sample_is_one_row_and_a_batch_joins_rows(tmp_path: Path) -> None:
    x, labels = floats(5, 3), np.arange(5)
    data = load_data(saved(tmp_path / "d.npz", x=x, labels=labels), [X])
    assert len(data) == 5 and data.batchable
    assert {name: value.tolist() for name, value in data.feeds(3).items()} == {"x": [x[3].tolist()]}
    np.testing.assert_array_equal(data.batch([4, 0, 1])["x"], np.stack([x[4], x[0], x[1]]))
    assert set(data.extra) == {"labels"} and set(data.arrays) == {"x", "labels"}
    np.testing.assert_array_equal(data.arrays["x"], x)
    np.testing.assert_array_equal(data.extra["labels"], labels)


def test_an_array_with_one_axis_more_gives_whole_samples() -> None:
    state, rate, x = floats(4, 2, 1, 3), np.array([8, 16, 8, 16]), floats(4, 3)
    inputs = [X, spec("state", 2, "batch", 3), spec("rate", dtype=np.int64)]
    data = load_data({"x": x, "state": state, "rate": rate}, inputs)
    sample = data.feeds(1)
    assert {name: value.shape for name, value in sample.items()} == {
        "x": (1, 3),
        "state": (2, 1, 3),
        "rate": (),
    }
    assert isinstance(sample["rate"], np.ndarray) and sample["rate"] == 16
    np.testing.assert_array_equal(sample["state"], state[1])
    assert not data.batchable
    np.testing.assert_array_equal(data.arrays["state"], state)
    with refused("'rate'", "joined"):
        data.batch([0, 1])


def test_a_fixed_first_dimension_is_fed_but_never_batched() -> None:
    data = load_data({"h": floats(6, 1, 8)}, [spec("h", 1, "batch", 8)])
    assert data.feeds(5)["h"].shape == (1, 1, 8) and not data.batchable
    with refused("'h'", "fixed to 4", r"one axis more, \[samples, 4, 8\]", r"found \[6, 8\]"):
        load_data({"h": floats(6, 8)}, [spec("h", 4, 8)])
    assert load_data({"h": floats(6, 4, 8)}, [spec("h", 4, 8)]).feeds(0)["h"].shape == (4, 8)


def test_a_subset_slices_what_counts_samples_and_drops_what_does_not() -> None:
    x, target, score = floats(6, 3), floats(6, 2), floats(3)
    data = load_data({"x": x, "target": target, "score": score}, [X])
    part = data.subset([4, 1])
    assert len(part) == 2 and part.batchable and set(part.arrays) == {"x", "target"}
    np.testing.assert_array_equal(part.feeds(0)["x"], x[4:5])
    np.testing.assert_array_equal(part.extra["target"], target[[4, 1]])
    np.testing.assert_array_equal(data.subset(range(6)).extra["score"], score)
    assert "score" not in data.subset([1, 0, 2, 3, 4, 5]).extra  # the pairs would no longer fit


def test_a_dataset_cannot_be_changed_or_overrun() -> None:
    data = load_data({"x": floats(4, 3), "labels": np.arange(4)}, [X])
    for array in (data.feeds(0)["x"], data.arrays["x"], data.extra["labels"]):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
    with pytest.raises(TypeError):
        data.extra["more"] = np.zeros(1)  # type: ignore[index]
    for index in (-1, 4):
        with pytest.raises(IndexError, match="4 samples"):
            data.feeds(index)
    with pytest.raises(IndexError, match="no sample"):
        data.subset([])


def test_the_digest_tells_names_types_shapes_and_bytes_apart() -> None:
    x = floats(4, 3)
    changed = x.copy()
    changed[3, 2] += 1
    inputs = [spec("x", None, None)]
    digests = [
        load_data({"x": x}, inputs).sha256,
        load_data({"y": x}, [spec("y", None, None)]).sha256,
        load_data({"x": x.view(np.int32)}, [spec("x", None, None, dtype=np.int32)]).sha256,
        load_data({"x": x.reshape(6, 2)}, inputs).sha256,
        load_data({"x": changed}, inputs).sha256,
        load_data({"x": x, "labels": np.arange(4)}, inputs).sha256,
    ]
    assert len(set(digests)) == len(digests)
    assert load_data({"x": x.copy(order="F")}, inputs).sha256 == digests[0]
    assert load_data([{"x": row[None]} for row in x], inputs).sha256 == digests[0]


def test_byte_order_is_no_type_and_strings_are_objects() -> None:
    data = load_data({"x": floats(2, 3).astype(">f4")}, [X])
    assert data.feeds(0)["x"].dtype == np.dtype("float32") and data.feeds(0)["x"].dtype.isnative
    words = load_data({"w": np.array(["a", "bc"])}, [spec("w", dtype=object)])
    assert words.feeds(1)["w"].shape == () and words.feeds(1)["w"].dtype == object


# What does not fit


@pytest.mark.parametrize(
    ("arrays", "inputs", "parts"),
    [
        ({"y": integers(4, 2)}, [X], ["no array for input 'x' float32", r"found 'y' int64 \[4, 2\]"]),
        ({"image": floats(4, 3)}, [X], ["is 'image' meant.* rename it to 'x'"]),
        ({}, [X], ["no array for input 'x'", "found no array at all"]),
        ({"x": floats(4, 3).astype(np.float64)}, [X], ["'x' expects float32", "holds float64"]),
        ({"x": floats(4)}, [X], [r"'x'", "needs 2 or 3 axes", r"found 1: \[4\]"]),
        ({"x": floats(4, 1, 1, 3)}, [X], ["needs 2 or 3 axes", "found 4"]),
        ({"r": floats(4, 3)}, [spec("r")], ["'r'", "needs 1 axes", r"found 2: \[4, 3\]"]),
        ({"r": np.float32(1)}, [spec("r")], ["'r'", "needs 1 axes", "found 0"]),
        ({"x": floats(4, 5)}, [X], ["'x'", r"\[1, 5\]", "dimension 1 must be 3, not 5"]),
        (
            {"ids": integers(4, 7), "mask": integers(4, 8)},
            TOKENS,
            ["'time' is 8 here and 7 in input 'ids'", "input 'mask'"],
        ),
        ({"ids": integers(4, 7), "mask": integers(5, 7)}, TOKENS, ["axis 0", "'ids' 4, 'mask' 5"]),
        ({"x": floats(0, 3)}, [X], ["0 samples"]),
    ],
)
def test_arrays_that_do_not_fit_are_named(
    arrays: dict[str, Array], inputs: list[InputSpec], parts: list[str], tmp_path: Path
) -> None:
    for source in (arrays, saved(tmp_path / "d.npz", **arrays)):
        with refused("--evaluate", *parts):
            load_data(source, inputs, "--evaluate")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    x = floats(4, 3)
    x[2, 1] = bad
    with refused("'x' holds 1 NaN or infinite"):
        load_data({"x": x}, [X])
    with refused("'x' holds 1 NaN or infinite"):
        load_data([{"x": x[:1]}, {"x": x[1:].reshape(1, 9)}], [spec("x", None, None)])
    assert len(load_data({"x": floats(4, 3), "target": x}, [X])) == 4


def test_names_that_exporters_give_to_unknown_sizes_need_not_agree() -> None:
    inputs = [spec("a", "None", "None"), spec("b", "None", "None")]
    assert len(load_data({"a": floats(2, 3), "b": floats(2, 5)}, inputs)) == 2


def test_a_model_without_inputs_takes_no_data() -> None:
    with refused("no inputs"):
        load_data({"x": floats(4, 3)}, [])


def npz_bytes(**arrays: Array) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=True, **arrays)
    return buffer.getvalue()


def npy_bytes() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, floats(4, 3))
    return buffer.getvalue()


def zip_bytes() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("x", "text")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", ["no .npz"]),
        (b"name,value\n1,2\n", ["no .npz"]),
        (npz_bytes(x=floats(400, 3))[:900], ["damaged or cut off"]),
        (
            npz_bytes(x=floats(400, 3)).replace(floats(400, 3).tobytes()[64:96], bytes(32)),
            ["damaged", "array 'x'"],
        ),
        (npz_bytes(x=np.array([{}, {}])), ["'x' holds Python objects", "pickle"]),
        (npy_bytes(), ["np.savez"]),
        (zip_bytes(), ["entry 'x' is no array"]),
    ],
    ids=["empty", "text", "truncated", "flipped", "objects", "npy", "zip"],
)
def test_a_file_that_is_no_sound_npz_is_refused(content: bytes, parts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    path.write_bytes(content)
    with refused("d.npz", *parts):
        load_data(path, [X])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with refused("--calibrate .*gone.npz", "no such file"):
        load_data(tmp_path / "gone.npz", [X])


# Feeds


def test_feeds_of_unequal_length_stay_apart() -> None:
    feeds = [{"ids": integers(1, n), "mask": integers(1, n), "labels": integers(1, n)} for n in (5, 7, 5)]
    data = load_data(iter(feeds), TOKENS)
    assert [data.feeds(i)["ids"].shape for i in range(3)] == [(1, 5), (1, 7), (1, 5)]
    assert len(data) == 3 and not data.batchable
    assert [part.shape for part in data.extra["labels"]] == [(1, 5), (1, 7), (1, 5)]
    assert [part.shape for part in data.subset([1, 2]).arrays["ids"]] == [(1, 7), (1, 5)]
    assert data.batch([0, 2])["ids"].shape == (2, 5)
    with refused("'ids'", "joined"):
        data.batch([0, 1])
    other = [*feeds[:2], {**feeds[2], "labels": feeds[2]["labels"] + 1}]
    assert load_data(other, TOKENS).sha256 != data.sha256 == load_data(feeds, TOKENS).sha256


def test_feeds_of_one_shape_are_like_arrays() -> None:
    x, labels = floats(4, 3), np.arange(4)
    data = load_data([{"x": x[i : i + 1], "labels": labels[i]} for i in range(4)], [X])
    same = load_data({"x": x, "labels": labels}, [X])
    assert data.batchable and data.sha256 == same.sha256
    np.testing.assert_array_equal(data.arrays["x"], x)
    np.testing.assert_array_equal(data.subset([3, 1]).extra["labels"], [3, 1])


def test_feeds_of_several_rows_are_joined_for_the_metric_as_outputs_are() -> None:
    x, labels = floats(5, 3), np.arange(5)
    data = load_data([{"x": x[:3], "labels": labels[:3]}, {"x": x[3:], "labels": labels[3:]}], [X])
    assert len(data) == 2 and not data.batchable
    assert [data.feeds(i)["x"].shape for i in range(2)] == [(3, 3), (2, 3)]
    np.testing.assert_array_equal(data.arrays["x"], x)
    np.testing.assert_array_equal(data.subset([1]).extra["labels"], [3, 4])


def test_only_what_every_feed_has_is_kept_for_the_metric() -> None:
    feed = {"x": floats(1, 3), "labels": np.array([1])}
    data = load_data([{**feed, "hint": floats(1)}, feed, {**feed, "other": floats(1)}], [X])
    assert set(data.extra) == {"labels"} and len(data.extra["labels"]) == 3


@pytest.mark.parametrize(
    ("feeds", "parts"),
    [
        ([], ["no feed"]),
        ([floats(1, 3)], ["feed 0 is a ndarray", "dict"]),
        ([{"x": floats(1, 3)}, {"y": floats(1, 3)}], ["feed 1", "no array for input 'x'"]),
        ([{"x": floats(3)}], ["feed 0", "'x'", r"\[3\]", "1 axes instead of 2"]),
        ([{"x": floats(1, 4)}], ["feed 0", "must be 3, not 4"]),
        ([{"x": integers(1, 3)}], ["feed 0", "expects float32", "int64"]),
        (7, ["a int", "iterable"]),
    ],
)
def test_feeds_that_do_not_fit_are_named(feeds: Any, parts: list[str]) -> None:
    with refused(*parts):
        load_data(feeds, [X])


# Functions


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    def write_file(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return path

    return write_file


FEEDS = """
import numpy as np
def feeds():
    for _ in range(3):
        yield {'x': np.full((1, 3), VALUE, np.float32)}
"""


def test_a_function_of_a_file_yields_feeds_and_leaves_no_trace(
    write: Callable[[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)  # whatever the environment says
    one = write("one/source.py", "from lowrank_test_beside import VALUE\n" + FEEDS)
    write("one/lowrank_test_beside.py", "VALUE = 1\n")
    two = write("two/source.py", "VALUE = 2\n" + FEEDS)
    path = list(sys.path)
    data = [load_data(f"{place}:feeds", [X]) for place in (one, two, one)]
    assert [part.feeds(2)["x"][0, 0] for part in data] == [1, 2, 1]
    assert data[0].source == f"{one}:feeds"
    assert not list(tmp_path.rglob("__pycache__")) and sys.path == path and not sys.dont_write_bytecode


def test_a_module_of_the_current_folder_is_found(
    write: Callable[[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("lowrank_test_source.py", "VALUE = 3\n" + FEEDS)
    monkeypatch.chdir(tmp_path)
    assert load_data("lowrank_test_source:feeds", [X]).feeds(0)["x"][0, 0] == 3


@pytest.mark.parametrize(
    ("text", "function", "parts"),
    [
        ("1 / 0", "feeds", ["cannot be imported", "ZeroDivisionError: division by zero"]),
        ("import sys; sys.exit(0)", "feeds", ["cannot be imported", "SystemExit"]),
        ("def other(): pass", "feeds", ["no function 'feeds'", "it has other"]),
        ("def feeds(): raise KeyError('lost')", "feeds", ["raised KeyError: 'lost'"]),
        ("def feeds():\n    yield {}\n    raise OSError('disk\\nfull')", "feeds", ["no array for input 'x'"]),
        ("def feeds():\n    raise OSError('disk\\nfull')\n    yield", "feeds", ["raised OSError: disk full"]),
        ("def feeds(): return None", "feeds", ["a NoneType", "iterable of feeds"]),
        ("def feeds(): return {'x': 1}", "feeds", ["a dict", "iterable of feeds"]),
        ("def feeds(): return []", "feeds", ["no feed"]),
        ("def feeds(): return ['x']", "feeds", ["feed 0 is a str"]),
    ],
)
def test_a_function_that_fails_is_quoted(
    text: str, function: str, parts: list[str], write: Callable[[str, str], Path]
) -> None:
    path = write("source.py", text)
    with refused(f"source.py:{function}", *parts):
        load_data(f"{path}:{function}", [X])


def test_missing_modules_and_files_are_named(write: Callable[[str, str], Path], tmp_path: Path) -> None:
    with refused("'lowrank_no_such_module' cannot be imported: ModuleNotFoundError"):
        load_data("lowrank_no_such_module:feeds", [X])
    with refused("no such file", "gone.py"):
        load_data(f"{tmp_path}/gone.py:feeds", [X])
    with refused("no function", "source.py:function"):
        load_data(write("source.py", FEEDS), [X])


def test_an_interrupt_passes_through() -> None:
    def feeds() -> Iterator[dict[str, Array]]:
        yield {"x": floats(1, 3)}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_data(feeds(), [X])


# Folders of test_data_set_N


def tensor(path: Path, array: Array, name: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(onnx.numpy_helper.from_array(array, name).SerializeToString())


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    """Eleven sets; the inputs of set 10 are swapped and named."""
    for index in range(11):
        place = tmp_path / f"test_data_set_{index}"
        swapped = index == 10
        value, other = np.full((1, 3), index, np.float32), np.full((1, 3), -index, np.float32)
        tensor(place / f"input_{int(swapped)}.pb", value, "x" if swapped else "")
        tensor(place / f"input_{int(not swapped)}.pb", other, "z" if swapped else "unknown")
        tensor(place / "output_0.pb", value * 2, "y")
    return tmp_path


INPUTS = [X, spec("z", "batch", 3)]


def values(data: Dataset, name: str) -> list[float]:
    return [float(data.feeds(i)[name][0, 0]) for i in range(len(data))]


def test_test_data_sets_are_read_in_numeric_order_by_name_or_place(sets: Path) -> None:
    data = load_data(sets, INPUTS)
    assert values(data, "x") == list(range(11)) and values(data, "z") == [-i for i in range(11)]
    assert set(data.extra) == {"output_0", "y"} and data.batchable
    np.testing.assert_array_equal(data.extra["y"], data.arrays["x"] * 2)
    np.testing.assert_array_equal(data.subset([10]).extra["output_0"], np.full((1, 3), 20))


def test_one_test_data_set_is_a_folder_too(sets: Path) -> None:
    assert values(load_data(sets / "test_data_set_7", INPUTS), "x") == [7]


def test_folders_that_hold_no_sets_or_damaged_tensors_are_named(sets: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with refused("empty", "neither test_data_set_N"):
        load_data(tmp_path / "empty", INPUTS)
    with refused("test_data_set_0/input_1.pb is no input of the model; inputs: x"):
        load_data(sets, [X])
    with refused("feed 0", "no array for input 'w'"):
        load_data(sets, [*INPUTS, spec("w", "batch", 3)])
    tensor(sets / "test_data_set_10" / "input_0.pb", floats(1, 3), "x")
    with refused("test_data_set_10/input_1.pb is a second array for input 'x'"):
        load_data(sets, INPUTS)
    (sets / "test_data_set_4" / "input_0.pb").write_bytes(b"\xff\xff")
    with refused("test_data_set_4/input_0.pb is no ONNX tensor"):
        load_data(sets, INPUTS)
