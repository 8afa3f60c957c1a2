"""Run a model piece by piece over a data set, keeping only the tensors that the rest still needs.

Two streams, one of the original and one of the compressed model, can stop at the same tensor; a copy of a
stream can be run to the end again and again, so that a probe costs only what lies behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto, NodeProto, TensorProto

from lowrank_onnx.base import Site
from lowrank_onnx.data import Dataset
from lowrank_onnx.errors import ModelError
from lowrank_onnx.linalg import Array
from lowrank_onnx.model import reads
from lowrank_onnx.runtime import Runtime, fit_empty, open_session, run


class Stream:
    """A model part of which has been run on every batch of a data set.

    Attributes:
        values: One dictionary per batch: the live tensors by name.
    """

    def __init__(
        self,
        proto: ModelProto,
        dataset: Dataset,
        batches: Sequence[Sequence[int]],
        runtime: Runtime,
        folder: Path | None,
    ) -> None:
        self._runtime, self._folder, self._proto = runtime, folder, proto
        self._initializers = {tensor.name: tensor for tensor in proto.graph.initializer}
        self._pending: list[NodeProto] = list(proto.graph.node)
        # A constant that is given out as well is not computed, and nothing changes it.
        self._outputs = [value.name for value in proto.graph.output if value.name not in self._initializers]
        single = all(len(indices) == 1 for indices in batches)
        shapes = {
            value.name: tuple(dim.dim_value or None for dim in value.type.tensor_type.shape.dim)
            for value in proto.graph.input
        }
        self.values: list[dict[str, Array]] = [
            fit_empty(dataset.feeds(indices[0]) if single else dataset.batch(indices), shapes) for indices in batches
        ]

    def fork(self) -> Stream:
        """A copy that goes on by itself; tensors are shared, not copied."""
        copy = Stream.__new__(Stream)
        copy.__dict__.update(self.__dict__)
        copy._pending = list(self._pending)
        copy.values = [dict(entry) for entry in self.values]
        copy._initializers = dict(self._initializers)
        return copy

    def set_initializers(self, values: Mapping[str, Array]) -> None:
        """Change constants that have not been used yet."""
        for name, array in values.items():
            self._initializers[name] = onnx.numpy_helper.from_array(array, name)

    def advance(self, targets: Iterable[str]) -> None:
        """Run whatever the targets need; afterwards they are among ``values``.

        Raises:
            ModelError: A piece does not run, or a live value is no tensor.
        """
        wanted = [name for name in dict.fromkeys(targets) if name not in self.values[0]]
        if not wanted:
            return
        segment, rest = self._split(wanted)
        if not segment:
            return
        needed_later = {name for node in rest for name in reads(node)} | set(self._outputs)
        made = [name for node in segment for name in node.output if name]
        fetch = [name for name in made if name in needed_later or name in wanted]
        session, inputs = self._open(segment, fetch)
        for entry in self.values:
            got = run(session, {name: entry[name] for name in inputs}, fetch)
            entry.update(got)
            for name in list(entry):
                if name not in needed_later and name not in wanted:
                    del entry[name]
        self._pending = rest

    def suffix(self, varied: Sequence[str]) -> Any:
        """Open everything that has not run yet, with some constants as inputs.

        Returns:
            A call that takes the varied constants by name and yields the outputs of every batch in turn.
        """
        outputs = [name for name in self._outputs if name not in self.values[0]]
        session, inputs = self._open(self._pending, outputs, frozenset(varied))

        def call(constants: Mapping[str, Array]) -> Iterable[dict[str, Array]]:
            for entry in self.values:
                feeds = {name: entry[name] for name in inputs if name in entry}
                yield run(session, {**feeds, **constants}, outputs)

        return call

    def behind(self, name: str) -> Callable[[int, Array], dict[str, Array]] | None:
        """Open everything that has not run yet, with one live tensor to be varied.

        Returns:
            A call that takes the number of a batch and the tensor there, and returns the outputs that come behind;
            None where there are none.
        """
        outputs = [output for output in self._outputs if output not in self.values[0]]
        if not outputs:
            return None
        session, inputs = self._open(self._pending, outputs)

        def call(batch: int, value: Array) -> dict[str, Array]:
            entry = self.values[batch]
            return run(session, {key: value if key == name else entry[key] for key in inputs}, outputs)

        return call if name in inputs else None

    def finish(self) -> list[dict[str, Array]]:
        """Run the rest and return the outputs of every batch."""
        self.advance(self._outputs)
        return [{name: entry[name] for name in self._outputs} for entry in self.values]

    def upstream(self, targets: Iterable[str]) -> set[str]:
        """Names of the pending tensors that the targets depend on, themselves included.

        All outputs of a node count, also those nobody reads: a cell is known by the first it has.
        """
        producers = {name: node for node in self._pending for name in node.output if name}
        found: set[str] = set()
        stack = [name for name in targets if name in producers]
        while stack:
            name = stack.pop()
            if name not in found:
                found.update(filter(None, producers[name].output))
                stack += [source for source in reads(producers[name]) if source in producers]
        return found

    def _split(self, wanted: Sequence[str]) -> tuple[list[NodeProto], list[NodeProto]]:
        upstream = self.upstream(wanted)
        segment = [node for node in self._pending if any(name in upstream for name in node.output)]
        chosen = {id(node) for node in segment}
        return segment, [node for node in self._pending if id(node) not in chosen]

    def _open(
        self, nodes: Sequence[NodeProto], fetch: Sequence[str], varied: frozenset[str] = frozenset()
    ) -> tuple[Any, list[str]]:
        """Open a session of some nodes; returns it and the live tensors it reads."""
        made = {name for node in nodes for name in node.output if name}
        read = list(dict.fromkeys(name for node in nodes for name in reads(node) if name not in made))
        first = self.values[0]
        inputs = [name for name in read if name in first]
        constants = [self._initializers[name] for name in read if name not in first and name in self._initializers]
        values = [_value_info(name, first[name]) for name in inputs]
        values += [
            onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            for tensor in constants
            if tensor.name in varied
        ]
        graph = onnx.helper.make_graph(
            list(nodes), "segment", values, [onnx.helper.make_empty_tensor_value_info(name) for name in fetch]
        )
        graph.initializer.extend(tensor for tensor in constants if tensor.name not in varied)
        model = onnx.helper.make_model(graph, opset_imports=list(self._proto.opset_import))
        # Constants are no inputs here, which the oldest format does not know.
        model.ir_version = max(self._proto.ir_version, 4)
        model.functions.extend(self._proto.functions)
        return open_session(model, self._runtime, self._folder, what="a piece of the model"), inputs


def levels(stream: Stream, items: Sequence[tuple[int, tuple[Site, ...]]]) -> list[list[tuple[int, tuple[Site, ...]]]]:
    """Group numbered sites so that no input in a group depends on an output of the same or a later group."""
    outputs = {part.name: part.uses[0].output for _, members in items for part in members}
    above = {
        place: {name for name, output in outputs.items() if output in upstream}
        for place, members in items
        for upstream in [stream.upstream([use.input for part in members for use in part.uses])]
    }
    grouped: dict[int, list[tuple[int, tuple[Site, ...]]]] = {}
    depths: dict[str, int] = {}
    for place, members in sorted(items, key=lambda item: len(above[item[0]])):
        depth = 1 + max((depths.get(name, 0) for name in above[place]), default=0)
        for part in members:
            depths[part.name] = max(depth, depths.get(part.name, 0))
        grouped.setdefault(depth, []).append((place, members))
    return [grouped[depth] for depth in sorted(grouped)]


def _value_info(name: str, value: Any) -> onnx.ValueInfoProto:
    if not hasattr(value, "dtype"):
        raise ModelError(f"'{name}' is no tensor; the model cannot be run piece by piece")
    element = TensorProto.STRING if value.dtype == object else onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
    return onnx.helper.make_tensor_value_info(name, element, [None] * value.ndim)
