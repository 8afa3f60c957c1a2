"""Several levels as a model file each, over one file of weights in which a prefix is stored once.

    OUT.onnx              the highest level: whoever knows of no levels opens it
    OUT.level_0.onnx ...  the smaller ones
    OUT.onnx.data         the weights of all

A file refers to its weights by offset and length, so leading rows of a larger factor are a shorter length at the
same offset. Leading columns lie apart from each other: the file refers to the whole factor and takes a Slice of
it, which onnxruntime folds when it loads the file. Storing such factors transposed makes their prefixes leading
rows too, but takes as long to load and as much memory then, and makes the highest level transpose them back.

What a smaller level shares with none, a layer that is dense above or has another form there, is stored in a byte a
number and folded as well (see ``coding``); where that takes too much room, and less does not, in less (see
``packing``). The highest level has every weight as it is.

In the smaller levels only inputs, outputs and nodes keep their names: half of what such a file takes is the others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from lowrank_onnx import coding, packing
from lowrank_onnx.coding import CODED, Code, decode, encode
from lowrank_onnx.composing import take_prefix
from lowrank_onnx.errors import ModelError
from lowrank_onnx.levels import LevelSession, is_leading, level_count
from lowrank_onnx.linalg import Array
from lowrank_onnx.model import (
    EXTERNAL_FROM,
    FLOAT_TYPES,
    SMALLER_KEY,
    Model,
    check_data_file,
    check_output,
    data_file,
    external_files,
    external_location,
    levels_beside,
    load,
    saved_size,
    serialize,
    stored_tensors,
    subgraphs,
    uses_external_data,
    write_files,
)
from lowrank_onnx.runtime import Runtime, open_session
from lowrank_onnx.short_names import shorten_names

LARGER = 1.15
"""How many times as large as their highest level a set of levels should be at most."""

_FIRST_SLICE = 10  # operator set in which Slice takes its ends as inputs, as ``take_prefix`` writes it
_ALIGNED = 64  # bytes, so that a runtime may map a weight


def level_paths(out: Path, count: int) -> list[Path]:
    """The files of the levels, the smallest first; the highest is ``out`` itself."""
    return [*(out.with_name(f"{out.stem}.level_{level}{out.suffix}") for level in range(count - 1)), out]


def check_level_outputs(out: Path, model: Model, count: int, overwrite: bool) -> None:
    """Find out before the work that the files of the levels can be written.

    Raises:
        ModelError: One of them cannot, is the model or its external data, or exists without ``overwrite``.
    """
    for path in level_paths(out, count):
        check_output(path, model, overwrite)
    check_data_file(data_file(out), [] if model.path is None else external_files(model.path), overwrite)


def save_levels(models: Sequence[ModelProto], out: Path, folder: Path | None, overwrite: bool = True) -> None:
    """Write all levels, completely or not at all.

    Args:
        models: The smallest first; tensors with external data still point into ``folder``.
        out: The file of the highest level; see ``level_paths`` for the others.
        folder: Where the external data of ``models`` lie now.
        overwrite: Whether the files may exist.

    Raises:
        ModelError: Writing failed; nothing is left behind.
    """
    data = data_file(out)
    sources = [
        external_location(tensor, folder)[0]
        for tensor in stored_tensors(models[-1])
        if folder is not None and uses_external_data(tensor)
    ]
    check_data_file(data, sources, overwrite)
    paths = level_paths(out, len(models))
    smaller = json.dumps([path.name for path in paths[:-1]])
    store, packed = _stored(models, _Store(data.name, folder), smaller)
    allowed = LARGER * saved_size(models[-1])
    if _bytes(store, packed) > allowed:
        narrow = _stored(models, _Store(data.name, folder, _free_prefix(models)), smaller)
        # Where even that is too large, what it loses buys nothing.
        if _bytes(*narrow) <= allowed:
            store, packed = narrow
    left = set(levels_beside(out)) - set(paths)  # of a set with more levels, whose weights are replaced now
    write_files(
        [
            (data, store.write),
            *(
                (path, lambda stream, p=proto: stream.write(serialize(p)))
                for path, proto in zip(paths, packed, strict=True)
            ),
        ],
        sorted(left),
    )


def level_openers(model: Model, runtime: Runtime) -> list[Callable[[], Any]]:
    """What opens a session of each level, the smallest first, whichever way a file has them; empty without levels.

    Raises:
        ModelError: A file is missing, or onnxruntime does not accept it.
    """
    what = f"model '{model.path}'"
    if model.path is not None and model.smaller:
        paths = [model.path.with_name(name) for name in model.smaller]
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise ModelError(
                f"'{missing[0]}' is missing beside '{model.path}', whose levels are {len(paths) + 1} files and one of "
                "weights; keep them together, under the names they were written with"
            )
        highest = partial(open_session, model.original, runtime, model.folder, what=what)
        return [*(partial(_open_file, path, runtime) for path in paths), highest]
    count = level_count(model.proto)
    if count is None:
        return []
    session = open_session(model.proto, runtime, model.folder, what=what)
    return [partial(LevelSession, session, level) for level in range(count)]


def _open_file(path: Path, runtime: Runtime) -> Any:
    model = load(path)
    return open_session(model.original, runtime, model.folder, what=f"level '{path}'")


def _stored(models: Sequence[ModelProto], store: _Store, smaller: str) -> tuple[_Store, list[ModelProto]]:
    """The store with all levels in it, and the levels that refer to it."""
    packed = [store.take_in(model) for model in reversed(models)][::-1]
    packed[-1].metadata_props.add(key=SMALLER_KEY, value=smaller)
    return store, packed


def _bytes(store: _Store, packed: Iterable[ModelProto]) -> int:
    return store.size + sum(int(model.ByteSize()) for model in packed)


def _free_prefix(models: Iterable[ModelProto]) -> str:
    """A short beginning that no tensor's name has."""
    names = {name for model in models for name in _names(model.graph)}
    prefix = "q"
    while any(name.startswith(prefix) for name in names):
        prefix += "q"
    return prefix


def _names(graph: GraphProto) -> Iterable[str]:
    for named in (*graph.input, *graph.initializer):
        yield named.name
    for node in graph.node:
        yield from node.output
        for _, inner in subgraphs(node):
            yield from _names(inner)


@dataclass(frozen=True, eq=False)
class _Stored:
    """Where a tensor begins and how many bytes it takes; its scale where it is coded.

    Attributes:
        part: Where it is packed with others: in which pack, and at which place.
    """

    start: int
    length: int
    scale: Array | None
    part: tuple[int, int] | None = None


@dataclass(eq=False)
class _Pack:
    """The numbers that one level stores for itself, and where they lie once all are known."""

    numbers: list[Array] = field(default_factory=list)
    start: int = 0
    length: int = 0


class _Store:
    """The weights of all levels as one file; the larger levels have to be taken in first.

    Args:
        location: Name of the file.
        folder: Where external data of the models lie now.
        prefix: How the names of what is packed begin; "" stores a byte a number.
    """

    def __init__(self, location: str, folder: Path | None, prefix: str = "") -> None:
        self._location, self._folder, self._prefix = location, folder, prefix
        self._packs: list[_Pack] = []  # one a level
        self._used: set[int] = set()  # those the level being taken in refers to
        self._contents: list[Array] = []  # in the order of the file
        self._end = 0  # bytes
        self._known: dict[object, int] = {}  # what tells equal contents, and where they begin
        self._named: dict[str, list[tuple[Array, _Stored]]] = {}  # what levels call by one name, and how it is stored
        self._alike: dict[bytes, _Stored] = {}  # how equal contents are stored
        self._has_highest = False

    def take_in(self, model: ModelProto) -> ModelProto:
        """A copy of a level whose large weights lie in the store."""
        copy = ModelProto()
        copy.CopyFrom(model)
        for tensor in stored_tensors(copy):
            if uses_external_data(tensor):
                assert self._folder is not None
                file, start, length = external_location(tensor, self._folder)
                # An empty file cannot be mapped.
                content = np.memmap(file, np.uint8, "r", start, (length,)) if length else np.zeros(0, np.uint8)
                self._refer(tensor, self._add(content, (file, start, length)), length)
        opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1)
        replaceable = {value.name for value in model.graph.input}  # by a caller: no node may make them
        made: list[NodeProto] = []
        highest, self._has_highest = not self._has_highest, True
        self._packs.append(_Pack())
        self._used.clear()
        for tensor in list(copy.graph.initializer):
            if not uses_external_data(tensor):
                may_make = opset >= _FIRST_SLICE and tensor.name not in replaceable
                made += self._take_tensor(copy.graph, tensor, may_make, highest)
        nodes = [*self._unpacked(copy.graph, opset), *made, *copy.graph.node]
        del copy.graph.node[:]
        copy.graph.node.extend(nodes)
        if not highest:
            shorten_names(copy)
        return copy

    def _take_tensor(self, graph: GraphProto, tensor: TensorProto, may_make: bool, highest: bool) -> list[NodeProto]:
        """Let a tensor refer to the store, where it is large; return the nodes that make it of what it refers to.

        Args:
            graph: What the tensor belongs to.
            may_make: Whether nodes may make it at all.
            highest: Whether the level is the highest, whose weights are stored as they are.
        """
        if tensor.data_type not in FLOAT_TYPES and not tensor.raw_data:
            return []
        floating = tensor.data_type in FLOAT_TYPES
        value = numpy_helper.to_array(tensor) if floating else np.frombuffer(tensor.raw_data, np.uint8)
        if value.nbytes < EXTERNAL_FROM:
            return []
        name = tensor.name
        for larger, stored in self._named.get(name, ()):
            if not is_leading(value, larger) or (not may_make and stored.scale is not None):
                continue
            if value.shape == larger.shape:
                return self._refer_to(graph, tensor, stored)
            if value.shape[1:] == larger.shape[1:] and stored.scale is None:
                self._refer(tensor, stored.start, value.nbytes)
                return []
            if may_make:
                tensor.name = f"{name}/whole"
                tensor.dims[:] = larger.shape
                return [*self._refer_to(graph, tensor, stored), *take_prefix(f"{name}/whole", name, value.shape)]
        key = hashlib.sha256(str((tensor.data_type, value.shape)).encode() + value.tobytes()).digest()
        if key not in self._alike or (not may_make and self._alike[key].scale is not None):
            may_code = may_make and not highest and tensor.data_type in CODED
            code = encode(value, packing.LARGEST if self._prefix else coding.LARGEST) if may_code else None
            self._alike[key] = self._store(value, code)
        self._named.setdefault(name, []).append((value, self._alike[key]))
        return self._refer_to(graph, tensor, self._alike[key])

    def _store(self, value: Array, code: Code | None) -> _Stored:
        if code is None:
            return _Stored(self._add(value, hashlib.sha256(value.tobytes()).digest()), value.nbytes, None)
        if self._prefix:
            pack = self._packs[-1]
            pack.numbers.append(code.numbers)
            return _Stored(0, 0, code.scale, (len(self._packs) - 1, len(pack.numbers) - 1))
        key = hashlib.sha256(code.numbers.tobytes()).digest()
        return _Stored(self._add(code.numbers, key), code.numbers.nbytes, code.scale)

    def _refer_to(self, graph: GraphProto, tensor: TensorProto, stored: _Stored) -> list[NodeProto]:
        """Let a tensor refer to all of what is stored; return the nodes that decode it."""
        if stored.scale is None:
            self._refer(tensor, stored.start, stored.length)
            return []
        target, data_type = tensor.name, tensor.data_type
        if stored.part is not None:
            return self._refer_to_part(graph, tensor, stored.scale, *stored.part)
        tensor.name, tensor.data_type = f"{target}/numbers", TensorProto.INT8
        self._refer(tensor, stored.start, stored.length)
        graph.initializer.append(numpy_helper.from_array(stored.scale, f"{target}/scale"))
        return list(decode(tensor.name, f"{target}/scale", target, data_type))

    def _refer_to_part(
        self, graph: GraphProto, tensor: TensorProto, scale: Array, pack: int, place: int
    ) -> list[NodeProto]:
        """Let a tensor be made of its part of a pack; return the nodes that make it."""
        self._used.add(pack)
        target, data_type, shape = tensor.name, tensor.data_type, list(tensor.dims)
        flat = packing.part(self._pack_name(pack), place)
        graph.initializer.remove(tensor)
        sizes = f"{self._prefix}{'x'.join(map(str, shape))}"
        if all(known.name != sizes for known in graph.initializer):
            graph.initializer.append(numpy_helper.from_array(np.array(shape, np.int64), sizes))
        graph.initializer.append(numpy_helper.from_array(scale, f"{flat}s"))
        whole = f"{flat}n"
        return [
            helper.make_node("Reshape", [flat, sizes], [whole]),
            *decode(whole, f"{flat}s", target, data_type, wide=True),
        ]

    def _unpacked(self, graph: GraphProto, opset: int) -> list[NodeProto]:
        """Store what the level packed, and return the nodes that take apart all it refers to."""
        latest = self._packs[-1]
        if latest.numbers:
            content = packing.pack(latest.numbers)
            latest.start, latest.length = self._add(content, latest), content.nbytes
        if self._used:
            graph.initializer.extend(packing.constants(self._prefix))
        nodes: list[NodeProto] = []
        for place in sorted(self._used):
            pack, name = self._packs[place], self._pack_name(place)
            tensor = TensorProto(name=name, data_type=TensorProto.INT64, dims=[pack.length // 8, 1])
            self._refer(tensor, pack.start, pack.length)
            graph.initializer.append(tensor)
            made, constants = packing.unpack(name, [entry.size for entry in pack.numbers], self._prefix, opset)
            nodes += made
            graph.initializer.extend(constants)
        return nodes

    def _pack_name(self, pack: int) -> str:
        return f"{self._prefix}{pack}"

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._end

    def _add(self, content: Array, key: object) -> int:
        """Store a content, equal ones once; return where it begins."""
        if key not in self._known:
            self._known[key] = self._end + -self._end % _ALIGNED
            self._end = self._known[key] + content.nbytes
            self._contents.append(content)
        return self._known[key]

    def _refer(self, tensor: TensorProto, start: int, length: int) -> None:
        kept = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        kept.doc_string = tensor.doc_string
        kept.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self._location), ("offset", start), ("length", length)):
            kept.external_data.add(key=key, value=str(value))
        tensor.CopyFrom(kept)

    def write(self, stream: BinaryIO) -> None:
        """Write the file."""
        for content in self._contents:
            stream.write(b"\0" * (-stream.tell() % _ALIGNED))
            stream.write(np.ascontiguousarray(content).tobytes())
