"""Calibration and evaluation data: read from where the user keeps them, checked against the model's inputs.

A *sample* is one feed of the model. What cannot be fed as it stands is refused with its reason; nothing is
converted in silence.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from lowrank_onnx.errors import DataError, LowRankError
from lowrank_onnx.linalg import Array

_NO_SYMBOL = {"", "?", "None"}  # exporters write these for "unknown"; two of them need not be equal


@dataclass(frozen=True)
class InputSpec:
    """One input of the model that a caller has to feed.

    Attributes:
        name: Name of the input.
        dtype: Element type; ``object`` for strings.
        shape: A number is fixed, a string is symbolic (equal names are equal sizes), None is unknown.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]

    def __str__(self) -> str:
        return f"{_dtype_name(self.dtype)} [{', '.join('?' if d is None else str(d) for d in self.shape)}]"


@dataclass(frozen=True, eq=False)
class Column:
    """One named array over all samples.

    Attributes:
        array: Rows of all samples joined on axis 0, or one entry a sample. Samples of unequal shapes that
            cannot be joined are the entries of a one-dimensional object array.
        starts: (samples + 1,) first row of each sample in ``array``; None where sample i is ``array[i]``.
    """

    array: Array
    starts: Array | None

    def __len__(self) -> int:
        return len(self.array) if self.starts is None else len(self.starts) - 1

    def sample(self, index: int) -> Array:
        """Return the array of one sample, as the model takes it."""
        if self.starts is not None:
            return self.array[self.starts[index] : self.starts[index + 1]]
        value = self.array[index]
        return value if isinstance(value, np.ndarray) else np.asarray(value, self.array.dtype)

    def take(self, indices: Sequence[int]) -> Column:
        """Return the column of these samples, in this order."""
        if self.starts is None:
            return Column(_frozen(self.array[list(indices)]), None)
        spans = [np.arange(self.starts[i], self.starts[i + 1]) for i in indices]
        return Column(_frozen(self.array[np.concatenate(spans)]), _starts([len(span) for span in spans]))

    def followed_by(self, array: Array) -> Column:
        """Return the column and, behind it, as many samples again whose rows are in ``array``."""
        joined = _frozen(np.concatenate([self.array, array]))
        if self.starts is None:
            return Column(joined, None)
        return Column(joined, _frozen(np.concatenate([self.starts, self.starts[1:] + self.starts[-1]])))


@dataclass(frozen=True, eq=False)
class Dataset:
    """Samples that fit the model's inputs, and the arrays that belong to them. Arrays are read-only.

    Attributes:
        source: Where the data come from, as the user named it.
        inputs: The model's inputs, in the model's order.
        per_sample: Arrays that are no input and have rows for every sample.
        loose: Arrays that are no input and do not count the samples on axis 0 (one score for two samples).
        batchable: Whether the arrays *could* be joined: each input has one row a sample, its first dimension
            is not fixed, all samples have equal shapes. Only a run tells whether the model agrees.
        lengths: (samples,) real positions of each, where padding behind them is left out; None keeps it.
        cut: The inputs whose axis 1 ends at the longest of the samples that run together.
    """

    source: str
    inputs: Mapping[str, Column]
    per_sample: Mapping[str, Column]
    loose: Mapping[str, Array]
    batchable: bool
    lengths: Array | None = None
    cut: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def feeds(self, index: int) -> dict[str, Array]:
        """Return one sample by input name.

        Raises:
            IndexError: ``index`` is not in [0, len).
        """
        self._require([index])
        return self._trim({name: column.sample(index) for name, column in self.inputs.items()}, [index])

    def batch(self, indices: Sequence[int]) -> dict[str, Array]:
        """Return samples joined on axis 0 by input name.

        Raises:
            DataError: The samples cannot be joined: scalars, or unequal shapes.
            IndexError: An index is not in [0, len), or there is none.
        """
        self._require(indices)
        joined = {}
        for name, column in self.inputs.items():
            try:
                joined[name] = np.concatenate([column.sample(index) for index in indices])
            except ValueError as error:
                raise DataError(f"samples of input '{name}' cannot be joined on axis 0: {error}") from error
        return self._trim(joined, indices)

    @property
    def untrimmed(self) -> Dataset:
        """The same samples with all their padding."""
        return self if self.lengths is None else dataclasses.replace(self, lengths=None, cut=())

    def _trim(self, feeds: dict[str, Array], indices: Sequence[int]) -> dict[str, Array]:
        if self.lengths is None:
            return feeds
        end = int(self.lengths[list(indices)].max())
        return {name: value[:, :end] if name in self.cut else value for name, value in feeds.items()}

    def subset(self, indices: Sequence[int]) -> Dataset:
        """Return the data set of these samples, in this order.

        Arrays in ``loose`` cannot be divided among samples: they stay only if every sample does, in order.

        Raises:
            IndexError: An index is not in [0, len), or there is none.
        """
        self._require(indices)
        if list(indices) == list(range(len(self))):
            return self
        return Dataset(
            self.source,
            MappingProxyType({name: column.take(indices) for name, column in self.inputs.items()}),
            MappingProxyType({name: column.take(indices) for name, column in self.per_sample.items()}),
            MappingProxyType({}),
            self.batchable,
            None if self.lengths is None else self.lengths[list(indices)],
            self.cut,
        )

    def doubled(self, changed: Mapping[str, Array]) -> Dataset:
        """Return the samples followed by the same samples once more, with other rows for some inputs.

        Arrays that are no input are left out: they belong to the samples as they were.
        """
        inputs = {name: column.followed_by(changed.get(name, column.array)) for name, column in self.inputs.items()}
        lengths = None if self.lengths is None else np.concatenate([self.lengths, self.lengths])
        nothing: Mapping[str, Any] = MappingProxyType({})
        return Dataset(self.source, MappingProxyType(inputs), nothing, nothing, self.batchable, lengths, self.cut)

    @cached_property
    def extra(self) -> Mapping[str, Array]:
        """Arrays that are no input: labels, target, score."""
        return MappingProxyType({name: c.array for name, c in self.per_sample.items()} | dict(self.loose))

    @cached_property
    def arrays(self) -> Mapping[str, Array]:
        """Everything, for a metric: of a ``.npz`` the content of the file, of feeds the joined arrays."""
        return MappingProxyType({name: c.array for name, c in self.inputs.items()} | dict(self.extra))

    @cached_property
    def sha256(self) -> str:
        """Digest of names, element types, shapes, sample boundaries and bytes."""
        digest = hashlib.sha256()
        for name in sorted(self.arrays):
            digest.update(name.encode() + b"\0")
            _hash(digest, self.arrays[name])
        for column in self.inputs.values():
            _hash(digest, np.zeros(0, np.int64) if column.starts is None else column.starts)
        return digest.hexdigest()

    def _require(self, indices: Sequence[int]) -> None:
        for index in indices:
            if not 0 <= index < len(self):
                raise IndexError(f"sample {index} of a data set with {len(self)} samples")
        if len(indices) == 0:
            raise IndexError("no sample is named; a data set needs one at least")


def load_data(
    source: str | os.PathLike[str] | Mapping[str, Array] | Iterable[Mapping[str, Array]],
    inputs: Sequence[InputSpec],
    option: str = "--calibrate",
) -> Dataset:
    """Read data and check them against the model's inputs.

    Args:
        source: One of

            * a ``.npz`` or a mapping of arrays, named as the inputs, axis 0 counts samples: sample i is
              ``array[i:i+1]``, or ``array[i]`` where the array has one axis more than the input;
            * a folder of ONNX ``test_data_set_N`` folders, or one of them: ``input_K.pb`` is the input that
              its tensor names, else the K-th; ``output_K.pb`` is kept as ``output_K`` and under its name;
            * ``module:function`` or ``path.py:function`` that returns an iterable of feeds, or that iterable.

            Every array that is no input is kept for metrics; of feeds those that every feed has, joined on
            axis 0 as outputs are (a scalar is one row).
        inputs: What the model takes; each needs an array.
        option: The option an error message names.

    Raises:
        DataError: The data cannot be read or do not fit; the message names the array.
    """
    if not inputs:
        raise DataError(f"{option} cannot be used: the model has no inputs to feed")
    if isinstance(source, Mapping):
        where = f"{option} arrays"
        arrays = {str(name): np.asarray(value) for name, value in source.items()}
        return _from_arrays(arrays, inputs, where, "arrays")
    if not isinstance(source, str | os.PathLike):
        return _from_feeds(source, inputs, f"{option} feeds", "feeds")
    name = os.fspath(source)
    path, where = Path(name), f"{option} {name}"
    if path.is_dir():
        return _from_feeds(list(_read_sets(path, inputs, where)), inputs, where, name)
    if path.is_file():
        return _from_arrays(_read_npz(path, where), inputs, where, name)
    if not is_function(name):
        raise DataError(
            f"{where}: no such file or folder; expected .npz, a folder of test_data_set_N or module:function"
        )
    return _from_feeds(_call(load_function(name, option, DataError), where), inputs, where, name)


def is_function(reference: str) -> bool:
    """Whether a string has the form ``module:function`` or ``path.py:function``."""
    place, _, name = reference.rpartition(":")
    return bool(place) and name.isidentifier()


def load_function(reference: str, option: str, error: type[LowRankError]) -> Callable[..., Any]:
    """Import a function that the user named.

    A ``path.py`` gets a module name of its own, so that two files of one name do not meet, and no bytecode is
    written beside it. Modules are looked for in the current folder too, files beside ``path.py``.

    Args:
        reference: ``module:function`` or ``path.py:function``; see ``is_function``.
        option: The option an error message names.
        error: The class to raise.

    Raises:
        LowRankError: Of class ``error``: nothing there, the module raises, or it has no such function.
    """
    place, _, name = reference.rpartition(":")
    where = f"{option} {reference}"
    if place.endswith(".py") and not Path(place).is_file():
        raise error(f"{where}: no such file '{place}'; expected path.py:function or module:function")
    try:
        module = _load_file(Path(place).resolve()) if place.endswith(".py") else _load_module(place)
    except (Exception, SystemExit) as failure:
        raise error(f"{where}: '{place}' cannot be imported: {describe(failure)}") from failure
    function = getattr(module, name, None)
    if not callable(function):
        offered = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        shown = ", ".join(offered[:10]) + (f" and {len(offered) - 10} more" if len(offered) > 10 else "")
        raise error(f"{where}: '{place}' has no function '{name}'; it has {shown or 'none'}")
    return function  # type: ignore[no-any-return]


def describe(failure: BaseException) -> str:
    """Class and message of an exception in one line."""
    text = " ".join(str(failure).split())
    return f"{type(failure).__name__}: {text}" if text else type(failure).__name__


def _load_file(path: Path) -> ModuleType:
    name = f"_lowrank_onnx_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _importing(path.parent):
        sys.modules[name] = module  # dataclasses look their module up there
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return module


def _load_module(name: str) -> ModuleType:
    with _importing(Path.cwd()):
        importlib.invalidate_caches()
        return importlib.import_module(name)


@contextmanager
def _importing(folder: Path) -> Iterator[None]:
    before, path = sys.dont_write_bytecode, str(folder)
    sys.dont_write_bytecode = True
    sys.path.append(path)  # last, so that a user's random.py does not hide Python's
    try:
        yield
    finally:
        sys.dont_write_bytecode = before
        sys.path.remove(path)


def _call(function: Callable[..., Any], where: str) -> Any:
    try:
        return function()
    except (Exception, SystemExit) as failure:
        raise DataError(f"{where}: the function raised {describe(failure)}") from failure


def _read_npz(path: Path, where: str) -> dict[str, Array]:
    try:
        with path.open("rb") as file:
            magic = file.read(6)
    except OSError as error:
        raise DataError(f"{where}: cannot be read: {describe(error)}") from error
    if magic == b"\x93NUMPY":
        raise DataError(f"{where}: holds one array without a name; save it with np.savez(path, input_name=array)")
    if path.suffix == ".py":
        raise DataError(f"{where}: names a Python file but no function; expected {path}:function")
    if not magic.startswith(b"PK"):
        raise DataError(f"{where}: is no .npz file; expected one that np.savez wrote")
    arrays: dict[str, Array] = {}
    name = ""
    try:
        with np.load(path, allow_pickle=False) as file:
            for name in file.files:
                arrays[name] = file[name]
    except Exception as error:  # zip, zlib and the array header each have classes of their own
        if "allow_pickle" in str(error):
            raise DataError(
                f"{where}: array '{name}' holds Python objects, which only pickle reads; save plain numbers"
            ) from error
        part = f" at array '{name}'" if name else ""
        raise DataError(f"{where}: the file is damaged or cut off{part} ({describe(error)}); write it again") from error
    for name, value in arrays.items():
        if not isinstance(value, np.ndarray):
            raise DataError(f"{where}: entry '{name}' is no array; expected a file that np.savez wrote")
    return arrays


def _read_sets(folder: Path, inputs: Sequence[InputSpec], where: str) -> Iterator[dict[str, Array]]:
    """Yield one feed, outputs included, for each test_data_set folder."""
    sets = [folder] if any(folder.glob("input_*.pb")) else _numbered(folder, r"test_data_set_(\d+)")
    if not sets:
        raise DataError(f"{where}: the folder has neither test_data_set_N folders nor input_0.pb")
    known = [spec.name for spec in inputs]
    for place in sets:
        feed: dict[str, Array] = {}
        for file in _numbered(place, r"input_(\d+)\.pb"):
            tensor, number = _read_tensor(file, where), _number(file)
            name = tensor[0] if tensor[0] in known else known[number] if number < len(known) else None
            if name is None:
                raise DataError(
                    f"{where}: {place.name}/{file.name} is no input of the model; inputs: {', '.join(known)}"
                )
            if name in feed:
                raise DataError(f"{where}: {place.name}/{file.name} is a second array for input '{name}'")
            feed[name] = tensor[1]
        for file in _numbered(place, r"output_(\d+)\.pb"):
            name, value = _read_tensor(file, where)
            feed |= {key: value for key in (file.stem, name) if key and key not in known}
        yield feed


def _read_tensor(file: Path, where: str) -> tuple[str, Array]:
    tensor = TensorProto()
    try:
        tensor.ParseFromString(file.read_bytes())
        return tensor.name, onnx.numpy_helper.to_array(tensor, base_dir=str(file.parent))
    except Exception as error:  # protobuf and onnx have classes of their own for a damaged tensor
        raise DataError(f"{where}: {file.parent.name}/{file.name} is no ONNX tensor ({describe(error)})") from error


def _numbered(folder: Path, pattern: str) -> list[Path]:
    return sorted((p for p in folder.iterdir() if re.fullmatch(pattern, p.name)), key=_number)


def _number(path: Path) -> int:
    return int(re.findall(r"\d+", path.name)[-1])


def _from_arrays(arrays: Mapping[str, Array], inputs: Sequence[InputSpec], where: str, source: str) -> Dataset:
    _check_names(arrays, inputs, where)
    arrays = {**arrays, **_checked_dtypes(arrays, inputs, where)}
    for spec in inputs:
        _check_rank(arrays[spec.name], spec, where)
    lengths = {spec.name: len(arrays[spec.name]) for spec in inputs}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"'{name}' {length}" for name, length in lengths.items())
        raise DataError(f"{where}: axis 0 counts samples and must be equal in every input, found {told}")
    count = next(iter(lengths.values()))
    if count == 0:
        raise DataError(f"{where}: the arrays hold 0 samples; at least one is needed")
    rows = _starts([1] * count)
    columns = {
        spec.name: Column(_frozen(arrays[spec.name]), rows if arrays[spec.name].ndim == len(spec.shape) else None)
        for spec in inputs
    }
    _check_shapes({name: column.sample(0).shape for name, column in columns.items()}, inputs, where)
    rest = {name: _frozen(value) for name, value in arrays.items() if name not in columns}
    per_sample = {name: Column(value, rows) for name, value in rest.items() if value.shape[:1] == (count,)}
    loose = {name: value for name, value in rest.items() if name not in per_sample}
    return _dataset(source, columns, per_sample, loose, inputs, where)


def _from_feeds(feeds: Iterable[Any], inputs: Sequence[InputSpec], where: str, source: str) -> Dataset:
    samples: list[dict[str, Array]] = []
    for index, feed in enumerate(_iterate(feeds, where)):
        place = f"{where}: feed {index}"
        if not isinstance(feed, Mapping):
            raise DataError(f"{place} is a {type(feed).__name__}; expected a dict of arrays by input name")
        arrays = {str(name): np.asarray(value) for name, value in feed.items()}
        _check_names(arrays, inputs, place)
        arrays.update(_checked_dtypes(arrays, inputs, place))
        _check_shapes({spec.name: arrays[spec.name].shape for spec in inputs}, inputs, place)
        samples.append(arrays)
    if not samples:
        raise DataError(f"{where}: no feed was given; at least one is needed")
    known = [spec.name for spec in inputs]
    columns = {name: _join([sample[name] for sample in samples]) for name in known}
    common = [name for name in samples[0] if name not in known and all(name in sample for sample in samples)]
    per_sample = {name: _join([sample[name] for sample in samples]) for name in common}
    return _dataset(source, columns, per_sample, {}, inputs, where)


def _dataset(
    source: str,
    columns: Mapping[str, Column],
    per_sample: Mapping[str, Column],
    loose: Mapping[str, Array],
    inputs: Sequence[InputSpec],
    where: str,
) -> Dataset:
    for name, column in columns.items():
        _check_finite(name, column, where)
    one_row = all(c.starts is not None and bool((np.diff(c.starts) == 1).all()) for c in columns.values())
    batchable = one_row and not any(isinstance(dim, int) for spec in inputs for dim in spec.shape[:1])
    return Dataset(
        source,
        MappingProxyType(dict(columns)),
        MappingProxyType(dict(per_sample)),
        MappingProxyType(dict(loose)),
        batchable,
    )


def _iterate(feeds: Any, where: str) -> Iterator[Any]:
    if isinstance(feeds, Mapping) or not isinstance(feeds, Iterable):
        raise DataError(
            f"{where}: got a {type(feeds).__name__}; expected an iterable of feeds (yield one dict a sample)"
        )
    try:
        yield from feeds
    except (Exception, SystemExit) as failure:  # of the iterable: the consumer's errors do not come by here
        raise DataError(f"{where}: reading the feeds raised {describe(failure)}") from failure


def _join(parts: Sequence[Array]) -> Column:
    """Join on axis 0 where the other axes agree; scalars become rows, all else an array of arrays."""
    if all(part.ndim == 0 for part in parts):
        return Column(_frozen(np.stack(parts)), None)
    if all(part.ndim > 0 and part.shape[1:] == parts[0].shape[1:] for part in parts):
        return Column(_frozen(np.concatenate(parts)), _starts([len(part) for part in parts]))
    apart = np.empty(len(parts), object)
    for index, part in enumerate(parts):
        apart[index] = _frozen(part)
    return Column(_frozen(apart), None)


def _check_names(arrays: Mapping[str, Array], inputs: Sequence[InputSpec], where: str) -> None:
    known = {spec.name for spec in inputs}
    for spec in inputs:
        if spec.name in arrays:
            continue
        found = ", ".join(f"'{name}' {_told(value)}" for name, value in arrays.items()) or "no array at all"
        alike = [
            name
            for name, value in arrays.items()
            if name not in known and value.dtype == spec.dtype and value.ndim - len(spec.shape) in (0, 1)
        ]
        hint = f"; is '{alike[0]}' meant? rename it to '{spec.name}'" if len(alike) == 1 else ""
        raise DataError(f"{where}: no array for input '{spec.name}' {spec}; found {found}{hint}")


def _checked_dtypes(arrays: Mapping[str, Array], inputs: Sequence[InputSpec], where: str) -> dict[str, Array]:
    """Return the input arrays in native byte order; any other difference of type is an error."""
    checked = {}
    for spec in inputs:
        value = arrays[spec.name]
        strings = spec.dtype.kind == "O" and value.dtype.kind in "OU"
        if not strings and value.dtype.newbyteorder("=") != spec.dtype:
            wanted = _dtype_name(spec.dtype)
            raise DataError(
                f"{where}: input '{spec.name}' expects {wanted}, the array holds {_dtype_name(value.dtype)}; "
                f"save it with array.astype('{wanted}')"
            )
        checked[spec.name] = value.astype(spec.dtype, copy=False)
    return checked


def _check_rank(array: Array, spec: InputSpec, where: str) -> None:
    rank, found = len(spec.shape), list(array.shape)
    if array.ndim not in {rank, rank + 1} or array.ndim == 0:
        choice = f"{rank} or {rank + 1}" if rank else "1"
        raise DataError(
            f"{where}: input '{spec.name}' is {spec}, so its array needs {choice} axes, "
            f"the samples first, found {array.ndim}: {found}"
        )
    first = spec.shape[0] if array.ndim == rank else None
    if isinstance(first, int) and first != 1:
        shape = ", ".join("?" if dim is None else str(dim) for dim in spec.shape)
        raise DataError(
            f"{where}: the first dimension of input '{spec.name}' is fixed to {first}, so its array needs "
            f"one axis more, [samples, {shape}], found {found}"
        )


def _check_shapes(shapes: Mapping[str, tuple[int, ...]], inputs: Sequence[InputSpec], where: str) -> None:
    """Compare the shapes of one sample with the inputs."""
    seen: dict[str, tuple[int, str]] = {}
    for spec in inputs:
        shape = shapes[spec.name]
        told = f"{where}: a sample of input '{spec.name}' has shape {list(shape)}, expected {spec}"
        if len(shape) != len(spec.shape):
            raise DataError(f"{told}: {len(shape)} axes instead of {len(spec.shape)}")
        for axis, (size, wanted) in enumerate(zip(shape, spec.shape, strict=True)):
            if isinstance(wanted, int) and size != wanted:
                raise DataError(f"{told}: dimension {axis} must be {wanted}, not {size}")
            if isinstance(wanted, str) and wanted not in _NO_SYMBOL:
                before, owner = seen.setdefault(wanted, (size, spec.name))
                if size != before:
                    raise DataError(f"{told}: '{wanted}' is {size} here and {before} in input '{owner}'")


def _check_finite(name: str, column: Column, where: str) -> None:
    ragged = column.starts is None and column.array.dtype.kind == "O"
    for part in column.array if ragged else [column.array]:
        kind = getattr(part, "dtype", np.dtype(object)).kind
        if kind in "fc" and not np.isfinite(part).all():
            bad = int(part.size - np.isfinite(part).sum())
            raise DataError(
                f"{where}: the array for input '{name}' holds {bad} NaN or infinite values; expected finite numbers"
            )


def _starts(lengths: Sequence[int]) -> Array:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _frozen(array: Array) -> Array:
    view = array.view()
    view.flags.writeable = False
    return view


def _hash(digest: Any, array: Array) -> None:
    digest.update(f"{array.dtype.str}{array.shape}".encode())
    if array.dtype.kind != "O":
        digest.update(array.tobytes())
        return
    for value in array.reshape(-1):
        if isinstance(value, np.ndarray):
            _hash(digest, value)
        else:
            digest.update(repr(value).encode() + b"\0")


def _dtype_name(dtype: np.dtype[Any]) -> str:
    return "string" if dtype.kind in "OU" else dtype.name


def _told(array: Array) -> str:
    return f"{_dtype_name(array.dtype)} {list(array.shape)}"
