"""ONNX files: load, look up constants in every scope, count, save completely or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
import onnx.inliner
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator

from lowrank_onnx.errors import ModelError
from lowrank_onnx.unpack import unpack_attention, unpack_layers

Array = NDArray[Any]

FLOAT_TYPES = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16})

SMALLER_KEY = "lowrank_onnx.smaller_levels"
"""Metadata of a model file: the names of the files of its smaller levels, the smallest first, as a JSON list."""

# Operators through which a weight may pass on its way to the node that uses it.
TRANSPARENT = frozenset(
    {"Identity", "Transpose", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Concat"}
)

# Weight operators worth looking for inside model-local functions.
_WEIGHT_OPS = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose", "LSTM", "GRU", "RNN", "Gather"})

_SINGLE_FILE_LIMIT = 2**31 - 2**24  # protobuf refuses 2 GiB; leave room for the graph itself
EXTERNAL_FROM = 1024  # bytes; smaller tensors stay in the model file, where shape inference needs them


@dataclass(frozen=True, eq=False)
class Reader:
    """One input slot that reads a tensor."""

    scope: Scope
    node: NodeProto
    slot: int


@dataclass(eq=False)
class Scope:
    """One graph or subgraph, and what it defines.

    Attributes:
        path: Empty for the main graph; ``node/attribute`` of the owner below it.
        readers: For each tensor defined here, who reads it, in this scope or in one nested inside.
    """

    path: str
    graph: GraphProto
    parent: Scope | None
    producers: dict[str, NodeProto] = field(default_factory=dict)
    initializers: dict[str, TensorProto] = field(default_factory=dict)
    inputs: set[str] = field(default_factory=set)
    readers: dict[str, list[Reader]] = field(default_factory=dict)

    def owner(self, name: str) -> Scope | None:
        """The scope that defines a tensor, searched outwards; None if nobody does."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope.producers or name in scope.initializers or name in scope.inputs:
                return scope
            scope = scope.parent
        return None


@dataclass(frozen=True, eq=False)
class Constant:
    """A value known before any data come.

    Attributes:
        value: The array as the reading node sees it.
        identity: Same text, same weight: the stored tensor and the operators it passed through.
        roots: (scope path, tensor name) of every tensor it was made from, itself included.
    """

    value: Array
    identity: str
    roots: frozenset[tuple[str, str]]


@dataclass(frozen=True, eq=False)
class Model:
    """A loaded model. ``proto`` is never changed after loading; a rewrite works on a copy.

    Attributes:
        proto: Every node has a name that is unique over all scopes.
        path: The file; None for a model that came from memory.
        sha256: Digest of the model file.
        digest: Digest of the model file and of its external data.
        size_bytes: Model file and external data.
        given: The model before attention in it was unpacked, which may run at another speed; None if none was.
        smaller: Names of the files of its smaller levels, which lie beside it; empty for an ordinary model.
    """

    proto: ModelProto
    path: Path | None
    sha256: str
    digest: str
    size_bytes: int
    given: ModelProto | None = None
    smaller: tuple[str, ...] = ()

    @property
    def original(self) -> ModelProto:
        """What the user gave, to measure against."""
        return self.proto if self.given is None else self.given

    @property
    def folder(self) -> Path | None:
        """Where external data lie; None without any."""
        return self.path.parent.resolve() if self.path is not None and has_external_data(self.proto) else None

    @property
    def opset(self) -> int:
        """Version of the default operator set."""
        return next((entry.version for entry in self.proto.opset_import if entry.domain in ("", "ai.onnx")), 1)

    @cached_property
    def scopes(self) -> tuple[Scope, ...]:
        """The main graph first, then every subgraph, outer before inner."""
        return tuple(index_scopes(self.proto))

    @cached_property
    def _constants(self) -> dict[tuple[str, str], Constant | None]:
        return {}

    def constant(self, scope: Scope, name: str) -> Constant | None:
        """Return the constant behind a tensor name, or None where it depends on data."""
        owner = scope.owner(name) if name else None
        if owner is None:
            return None
        key = (owner.path, name)
        if key not in self._constants:
            self._constants[key] = self._resolve(owner, name)
        return self._constants[key]

    def _resolve(self, scope: Scope, name: str) -> Constant | None:
        root = (scope.path, name)
        if name in scope.initializers:
            value = self.array(scope.initializers[name])
            return Constant(value, f"{scope.path}:{name}", frozenset([root]))
        node = scope.producers.get(name)
        if node is None or node.domain not in ("", "ai.onnx"):
            return None
        if node.op_type == "Constant":
            made = _constant_value(node)
            return None if made is None else Constant(made, f"{scope.path}:{name}", frozenset([root]))
        if node.op_type not in TRANSPARENT:
            return None
        inputs = [self.constant(scope, source) for source in node.input if source]
        if not inputs or any(entry is None for entry in inputs):
            return None
        known = [entry for entry in inputs if entry is not None]
        value = _evaluate(node, [entry.value for entry in known], self.proto)
        attributes = ",".join(sorted(str(onnx.helper.printable_attribute(entry)) for entry in node.attribute))
        identity = f"{node.op_type}({', '.join(entry.identity for entry in known)}; {attributes})"
        return Constant(value, identity, frozenset([root]).union(*(entry.roots for entry in known)))

    def array(self, tensor: TensorProto) -> Array:
        """The values of a stored tensor; external data are mapped, not read."""
        if not uses_external_data(tensor):
            return numpy_helper.to_array(tensor)
        assert self.path is not None
        file, offset, _ = external_location(tensor, self.path.parent)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        if not math.prod(tensor.dims):
            return np.zeros(tuple(tensor.dims), dtype)
        return np.memmap(file, dtype=dtype, mode="r", offset=offset, shape=tuple(tensor.dims))


def load(path: str | os.PathLike[str]) -> Model:
    """Load a model file.

    Model-local functions that hold layers are inlined, so that their layers are found; nodes without a
    name, or with a name another node has, get a stable one.

    Raises:
        ModelError: There is no such file, it is no ONNX model, or its external data are missing.
    """
    file = Path(path)
    if not file.exists():
        raise ModelError(f"model '{file}' does not exist")
    if not file.is_file():
        raise ModelError(f"model '{file}' is no file")
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ModelError(f"model '{file}' cannot be read: {error.strerror}") from error
    proto = ModelProto()
    try:
        proto.ParseFromString(content)
    except DecodeError as error:
        raise ModelError(f"'{file}' is not an ONNX model, or was cut off: {error}") from error
    if not proto.ir_version or not (proto.graph.node or proto.graph.output):
        raise ModelError(f"'{file}' is not an ONNX model: it holds no graph")
    sha256 = hashlib.sha256(content)
    digest, size_bytes = sha256.copy(), len(content)
    del content
    smaller = take_smaller(proto)
    for extra in _external_files(proto, file):
        with extra.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
        size_bytes += extra.stat().st_size
    prepared, given = prepare(proto)
    return Model(prepared, file, sha256.hexdigest(), digest.hexdigest(), size_bytes, given, smaller)


def from_proto(proto: ModelProto) -> Model:
    """Wrap a model that is in memory; the caller's object is left alone.

    Raises:
        ModelError: Its values are not all in memory.
    """
    if has_external_data(proto):
        raise ModelError(
            "the model in memory has external data, and no folder to find them in; give the path of its file, or "
            "load it with onnx.load(path)"
        )
    content = proto.SerializeToString(deterministic=True)
    copy = ModelProto()
    copy.CopyFrom(proto)
    digest = hashlib.sha256(content).hexdigest()
    take_smaller(copy)
    prepared, given = prepare(copy)
    return Model(prepared, None, digest, digest, len(content), given)


def take_smaller(proto: ModelProto) -> tuple[str, ...]:
    """Take the names of the smaller levels out of the metadata: what is made of a model has other levels, or none."""
    for place, entry in enumerate(proto.metadata_props):
        if entry.key == SMALLER_KEY:
            try:
                names = json.loads(entry.value)
            except ValueError:
                names = None
            if not isinstance(names, list) or not all(isinstance(n, str) and Path(n).name == n for n in names):
                raise ModelError(
                    f"metadata '{SMALLER_KEY}' must be a JSON list of names of files beside the model, found "
                    f"'{entry.value[:100]}'; take the entry out, or write the levels again"
                )
            del proto.metadata_props[place]
            return tuple(names)
    return ()


def prepare(proto: ModelProto) -> tuple[ModelProto, ModelProto | None]:
    """Inline functions and unpack attention that hold layers, give every node a name. Changes ``proto``.

    Returns:
        The prepared model, and a copy from before attention was unpacked, if it was.

    Raises:
        ModelError: Two constants of a graph have one name.
    """
    for scope in index_scopes(proto):
        counts = Counter(tensor.name for tensor in scope.graph.initializer)
        if twice := [name for name, count in counts.items() if count > 1]:
            raise ModelError(  # runtimes do not agree on which of them counts
                f"the model stores a constant '{twice[0]}' {counts[twice[0]]} times; give each a name of its own"
            )
    given: list[ModelProto] = []

    def remember() -> None:
        if not given:
            given.append(ModelProto())
            given[0].CopyFrom(proto)

    if any(node.op_type in _WEIGHT_OPS for function in proto.functions for node in function.node):
        inlined = onnx.inliner.inline_local_functions(proto)
        # A function called twice would store its own constants twice.
        if parameter_count(inlined) <= parameter_count(proto):
            proto = inlined
    unpack_attention(proto, remember)
    unpack_layers(proto, remember)
    taken = {node.name for scope in index_scopes(proto) for node in scope.graph.node if node.name}
    seen: set[str] = set()
    for scope in index_scopes(proto):
        for position, node in enumerate(scope.graph.node):
            if not node.name or node.name in seen:
                stem = node.name or f"{scope.path + '/' if scope.path else ''}{node.op_type}_{position}"
                name, suffix = stem, 1
                while name in taken or name in seen:
                    name, suffix = f"{stem}_{suffix}", suffix + 1
                node.name = name
            seen.add(node.name)
    return proto, given[0] if given else None


def index_scopes(proto: ModelProto) -> list[Scope]:
    """Return the scopes of a model, outer before inner, with producers and readers filled in."""
    scopes = list(_walk(proto.graph, None, ""))
    for scope in scopes:
        for node in scope.graph.node:
            for slot, name in enumerate(node.input):
                owner = scope.owner(name) if name else None
                if owner is not None:
                    owner.readers.setdefault(name, []).append(Reader(scope, node, slot))
    return scopes


def _walk(graph: GraphProto, parent: Scope | None, path: str) -> Iterator[Scope]:
    scope = Scope(path, graph, parent)
    scope.initializers = {tensor.name: tensor for tensor in graph.initializer}
    scope.inputs = {value.name for value in graph.input} | {t.values.name for t in graph.sparse_initializer}
    scope.producers = {name: node for node in graph.node for name in node.output if name}
    yield scope
    for position, node in enumerate(graph.node):
        for name, inner in subgraphs(node):
            below = f"{path + '/' if path else ''}{node.name or f'{node.op_type}_{position}'}/{name}"
            yield from _walk(inner, scope, below)


def subgraphs(node: NodeProto) -> Iterator[tuple[str, GraphProto]]:
    """The bodies of If, Loop, Scan and of whatever else holds graphs."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.name, attribute.g
        for position, inner in enumerate(attribute.graphs):
            yield f"{attribute.name}{position}", inner


def reads(node: NodeProto) -> list[str]:
    """Every tensor a node reads, those its bodies take from outside included."""
    names = [name for name in node.input if name]
    for _, inner in subgraphs(node):
        made = {name for entry in inner.node for name in entry.output}
        made |= {value.name for value in inner.input} | {tensor.name for tensor in inner.initializer}
        for entry in inner.node:
            names += [name for name in reads(entry) if name not in made]
        names += [value.name for value in inner.output if value.name not in made]
    return names


def stored_tensors(proto: ModelProto) -> Iterator[TensorProto]:
    """Every tensor the model stores: initializers and Constant values, of graphs, subgraphs and functions."""

    def of_nodes(nodes: Any) -> Iterator[TensorProto]:
        for node in nodes:
            for attribute in node.attribute:
                if attribute.type == AttributeProto.TENSOR:
                    yield attribute.t
                yield from attribute.tensors
            for _, inner in subgraphs(node):
                yield from of_graph(inner)

    def of_graph(graph: GraphProto) -> Iterator[TensorProto]:
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield sparse.values
        yield from of_nodes(graph.node)

    yield from of_graph(proto.graph)
    for function in proto.functions:
        yield from of_nodes(function.node)


def parameter_count(proto: ModelProto) -> int:
    """Floating-point weight elements in the graph, its subgraphs and functions, each stored one once."""
    total: int = sum(math.prod(tensor.dims) for tensor in stored_tensors(proto) if tensor.data_type in FLOAT_TYPES)
    for scope in _walk(proto.graph, None, ""):
        total += sum(_loose_floats(node) for node in scope.graph.node)
    return total + sum(_loose_floats(node) for function in proto.functions for node in function.node)


def _loose_floats(node: NodeProto) -> int:
    if node.op_type != "Constant":
        return 0
    return sum(1 if entry.name == "value_float" else len(entry.floats) for entry in node.attribute)


def uses_external_data(tensor: TensorProto) -> bool:
    """True where the values lie in another file."""
    return bool(tensor.data_location == TensorProto.EXTERNAL)


def has_external_data(proto: ModelProto) -> bool:
    """True where any tensor lies in another file."""
    return any(uses_external_data(tensor) for tensor in stored_tensors(proto))


def external_location(tensor: TensorProto, folder: Path) -> tuple[Path, int, int]:
    """Return (file, offset, length in bytes) of a tensor's external data.

    Raises:
        ModelError: The location leaves the model's folder, or the file is missing or too short.
    """
    entries = {entry.key: entry.value for entry in tensor.external_data}
    # By name only: stores of models keep links in a folder and the files themselves elsewhere.
    folder = folder.absolute()
    file = Path(os.path.normpath(folder / entries.get("location", "")))
    if folder not in file.parents:
        raise ModelError(
            f"external data of '{tensor.name}' lie at '{entries.get('location', '')}', outside the folder of "
            "the model; move them beside it"
        )
    if not file.is_file():
        raise ModelError(f"external data file '{file.name}' of '{tensor.name}' is missing beside the model")
    itemsize = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    try:
        offset = int(entries.get("offset", 0))
        length = int(entries.get("length", math.prod(tensor.dims) * itemsize))
    except ValueError as error:
        raise ModelError(f"external data of '{tensor.name}' have no readable offset or length") from error
    if offset < 0 or offset + length > file.stat().st_size:
        raise ModelError(
            f"external data file '{file.name}' is cut off: '{tensor.name}' needs {offset + length} bytes, "
            f"found {file.stat().st_size}"
        )
    return file, offset, length


def external_files(path: Path) -> list[Path]:
    """The files with external data of a model on disk; empty for a file that is no model."""
    proto = ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
        return _external_files(proto, path)
    except (DecodeError, OSError, ModelError):
        return []


def _external_files(proto: ModelProto, path: Path) -> list[Path]:
    files = {
        external_location(tensor, path.parent)[0] for tensor in stored_tensors(proto) if uses_external_data(tensor)
    }
    return sorted(files)


def _constant_value(node: NodeProto) -> Array | None:
    for entry in node.attribute:
        if entry.name == "value" and not uses_external_data(entry.t):
            return numpy_helper.to_array(entry.t)
        if entry.name == "value_float":
            return np.array(entry.f, np.float32)
        if entry.name == "value_floats":
            return np.array(entry.floats, np.float32)
        if entry.name == "value_int":
            return np.array(entry.i, np.int64)
        if entry.name == "value_ints":
            return np.array(entry.ints, np.int64)
    return None


def _evaluate(node: NodeProto, values: list[Array], proto: ModelProto) -> Array:
    """Run one transparent node on constants, at the operator set of the model."""
    copy = NodeProto()
    copy.CopyFrom(node)
    del copy.input[:]
    copy.input.extend(f"x{position}" for position in range(len(values)))
    inputs = [
        onnx.helper.make_tensor_value_info(
            f"x{position}", onnx.helper.np_dtype_to_tensor_dtype(value.dtype), value.shape
        )
        for position, value in enumerate(values)
    ]
    outputs = [onnx.helper.make_empty_tensor_value_info(name) for name in copy.output]
    graph = onnx.helper.make_graph([copy], "constant", inputs, outputs)
    opsets = [entry for entry in proto.opset_import if entry.domain in ("", "ai.onnx")]
    model = onnx.helper.make_model(graph, opset_imports=opsets)
    feeds: dict[str, Any] = {f"x{position}": np.asarray(value) for position, value in enumerate(values)}
    answer: Any = ReferenceEvaluator(model).run(None, feeds)
    return np.asarray(answer[0])


# --- writing -----------------------------------------------------------------------------------------


def check_output(out: str | os.PathLike[str], model: Model | None, overwrite: bool, option: str = "-o") -> Path:
    """Return OUT as a path that can be written, before any work is done.

    Raises:
        ModelError: OUT or the external data beside it are the model, exist without ``overwrite``, or the folder
            cannot be written.
    """
    path = Path(out)
    if model is not None and model.path is not None and path.exists() and path.samefile(model.path):
        raise ModelError(f"{option} '{path}' is the model itself; the input is never overwritten, name another file")
    if path.is_dir():
        raise ModelError(f"{option} '{path}' is a folder; name a file in it")
    if not path.parent.is_dir():
        raise ModelError(f"folder '{path.parent}' of {option} '{path.name}' does not exist; create it first")
    if path.exists() and not path.is_file():
        raise ModelError(f"{option} '{path}' is no ordinary file; name a file that can be replaced")
    if path.exists() and not overwrite:
        raise ModelError(f"{option} '{path}' exists; use --overwrite to replace it, or name another file")
    if model is not None and model.path is not None and has_external_data(model.proto):
        check_data_file(data_file(path), _external_files(model.proto, model.path), overwrite)
    try:  # os.access says yes to root on a read-only file system
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name[:100]}."):
            pass
    except OSError as error:
        raise ModelError(f"folder '{path.parent}' of {option} cannot be written: {error.strerror}") from error
    return path


def data_file(out: Path) -> Path:
    """Where a model that is written to ``out`` keeps its external data."""
    return out.with_name(out.name + ".data")


def check_data_file(data: Path, sources: Sequence[Path], overwrite: bool) -> None:
    """Refuse a file for external data that is a source, or exists without ``overwrite``."""
    if not data.exists():
        return
    if any(data.samefile(source) for source in sources):
        raise ModelError(f"'{data}' holds external data of the model itself; name another file for the output")
    if not overwrite:
        raise ModelError(f"'{data}' exists; use --overwrite to replace it, or name another file")


def serialize(proto: ModelProto) -> bytes:
    """Same model, same bytes."""
    return bytes(proto.SerializeToString(deterministic=True))


def saved_size(proto: ModelProto) -> int:
    """Bytes a save would write: the model and the external data it refers to."""
    external = 0
    for tensor in stored_tensors(proto):
        if uses_external_data(tensor):
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            external += math.prod(tensor.dims) * dtype.itemsize
    return int(proto.ByteSize()) + external


def save(proto: ModelProto, out: Path, folder: Path | None, overwrite: bool = True) -> None:
    """Write a model so that it appears complete or not at all.

    Args:
        proto: The model; tensors with external data still point into ``folder``.
        out: The file. A model with external data, or one too large for one file, gets ``out`` and
            ``out.data`` beside it; with any other, the ``out.data`` of a model that is replaced goes.
        folder: Where the external data of ``proto`` lie now.
        overwrite: Whether ``out.data`` may exist; files that ``proto`` points into are never replaced.

    Raises:
        ModelError: Writing failed, for instance on a full disk; nothing is left behind.
    """
    external = has_external_data(proto) or proto.ByteSize() > _SINGLE_FILE_LIMIT
    data = data_file(out)
    copy = proto
    files: list[tuple[Path, Callable[[BinaryIO], object]]] = []
    if external:
        check_data_file(data, [] if folder is None else _external_files(proto, folder / "model"), overwrite)
        copy = ModelProto()
        copy.CopyFrom(proto)
        files.append((data, lambda stream: _write_external(copy, stream, folder, data.name)))
    files.append((out, lambda stream: stream.write(serialize(copy))))
    write_files(files, [] if external else _orphans(out))


def _orphans(out: Path) -> list[Path]:
    """What only the model that stands at ``out`` now needs: its external data, and smaller levels over the same."""
    data = data_file(out)
    if not data.is_file() or not out.is_file() or not any(data.samefile(entry) for entry in external_files(out)):
        return []
    return [data, *levels_beside(out)]


def levels_beside(out: Path) -> list[Path]:
    """The files of the smaller levels of a model on disk, if they still have the names they were written with."""
    try:
        names = load(out).smaller if out.is_file() else ()
    except ModelError:
        return []
    return [out.with_name(name) for name in names if name.startswith(f"{out.stem}.level_")]  # never another's file


def write_files(files: Sequence[tuple[Path, Callable[[BinaryIO], object]]], stale: Sequence[Path] = ()) -> None:
    """Write files such that all of them appear complete, or none does.

    Args:
        files: Where each one goes and what writes it, in order. The last is the one the others belong to: it is
            put in its place when they are there.
        stale: Files that go when these have come.

    Raises:
        ModelError: Writing failed, for instance on a full disk; nothing is left behind.
    """
    out = files[-1][0]
    with contextlib.ExitStack() as stack:
        try:
            written: list[tuple[Path, Path]] = []
            for path, fill in files:
                temporary = stack.enter_context(_temporary(path))
                with temporary.open("wb") as stream:
                    fill(stream)
                    _sync(stream)
                written.append((temporary, path))
            _replace_all(written, stale)
        except OSError as error:
            raise ModelError(f"'{out}' could not be written: {error.strerror}; nothing was left behind") from error


def _replace_all(written: Sequence[tuple[Path, Path]], stale: Sequence[Path]) -> None:
    """Put finished files in their places; where one cannot be, what stood in all of them comes back."""
    if len(written) == 1 and not stale:  # one name changes hands at once: nothing has to come back
        source, target = written[0]
        source.replace(target)
        return
    aside: list[tuple[Path, Path]] = []
    placed: list[Path] = []
    try:
        # The last one first: while the files are exchanged, none is there that could be read with the wrong others.
        for target in [*reversed([target for _, target in written]), *stale]:
            if target.exists():
                place = target.with_name(f".{target.name[:100]}.{os.getpid()}.old")
                aside.append((place, target))
                target.replace(place)
        for source, target in written:
            placed.append(target)
            source.replace(target)
    except BaseException:
        for target in placed:
            target.unlink(missing_ok=True)
        for place, target in aside:
            if place.exists():
                place.replace(target)
        raise
    for place, _ in aside:
        place.unlink(missing_ok=True)


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A name beside ``path`` that is gone afterwards unless it was renamed."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.", suffix=".tmp")
    os.close(handle)
    mask = os.umask(0)
    os.umask(mask)
    Path(name).chmod(0o666 & ~mask)  # mkstemp makes private files; a model is an ordinary one
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _sync(stream: Any) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def _write_external(proto: ModelProto, stream: Any, folder: Path | None, location: str) -> None:
    movable = {tensor.name for tensor in proto.graph.initializer}
    for tensor in stored_tensors(proto):
        if uses_external_data(tensor):
            assert folder is not None
            file, offset, length = external_location(tensor, folder)
            content: Any = np.memmap(file, dtype=np.uint8, mode="r", offset=offset, shape=(length,)) if length else b""
        elif tensor.name in movable and len(tensor.raw_data) >= EXTERNAL_FROM:
            content = tensor.raw_data
        else:
            continue
        stream.write(b"\0" * (-stream.tell() % 64))  # aligned, so that a runtime may map it
        start = stream.tell()
        stream.write(content)
        length = stream.tell() - start
        tensor.ClearField("raw_data")
        tensor.ClearField("external_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", start), ("length", length)):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, str(value)
