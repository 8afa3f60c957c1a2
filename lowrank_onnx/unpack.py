"""Take the layers out of com.microsoft Attention, which packs query, key and value into one constant.

    Attention(x, [Q K V], [q k v], mask)   becomes   MultiHeadAttention(x Q + q, x K + k, x V + v, mask)

Both are one kernel inside onnxruntime and take the same time; outside the node the layers can be found. So too
where exporters pack the three layers into one and cut its output:

    q, k, v = Split(x [Q K V] + [q k v])   becomes   x Q + q, x K + k, x V + v
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

_KEPT = ("mask_filter_value", "num_heads", "scale", "unidirectional")
_WHOLE = (TensorProto.INT64, TensorProto.INT32)
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)


def unpack_attention(proto: ModelProto, before: Callable[[], None]) -> None:
    """Unpack the nodes of the main graph whose weights are constants inside the file. Changes ``proto``.

    Nodes with a past, rotation, or biases that are computed stay as they are.

    Args:
        before: Called before every change, never if there is none.
    """
    graph = proto.graph
    if proto.ir_version < 4:  # that old a format lists every constant among the inputs
        return
    stored = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[NodeProto] = []
    packed: set[str] = set()
    for node in graph.node:
        if node.op_type == "Attention" and node.domain == "com.microsoft" and _understood(node, stored):
            before()
            nodes += _unpacked(node, stored, proto)
            packed.update(node.input[1:3])
        else:
            nodes.append(node)
    if not packed:
        return
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
    _drop_unread(graph, packed)


def _drop_unread(graph: GraphProto, names: set[str]) -> None:
    """Take out which of these constants nobody reads any more, and what was there for them alone."""
    outputs = {value.name for value in graph.output}
    while unread := names - set(_reads(graph)) - outputs:
        unread -= {value.name for value in graph.input} - {tensor.name for tensor in graph.initializer}
        for field in (graph.initializer, graph.value_info, graph.input):
            for place in range(len(field) - 1, -1, -1):
                if field[place].name in unread:
                    del field[place]
        names = set()
        for place in range(len(graph.node) - 1, -1, -1):
            if graph.node[place].output and unread.issuperset(filter(None, graph.node[place].output)):
                names.update(_reads_of(graph.node[place]))
                del graph.node[place]


def _reads(graph: GraphProto) -> Iterator[str]:
    """Every tensor that the nodes of a graph read, and those of the bodies inside."""
    for node in graph.node:
        yield from node.input
        for entry in node.attribute:
            for inner in (*entry.graphs, *((entry.g,) if entry.HasField("g") else ())):
                yield from _reads(inner)


def _understood(node: NodeProto, stored: dict[str, TensorProto]) -> bool:
    weight = stored.get(node.input[1])
    bias = stored.get(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    given = len(node.input) > 2 and bool(node.input[2])
    here = [tensor for tensor in (weight, bias) if tensor is not None]
    attributes = {entry.name: entry.i for entry in node.attribute}
    return (
        weight is not None
        and (bias is not None) == given
        and all(tensor.data_type in _FLOATS and not tensor.external_data for tensor in here)
        and not any(name for slot, name in enumerate(node.input) if slot in (4, 6))  # the past
        and not any(node.output[1:])
        and not attributes.get("do_rotary")
        and not attributes.get("past_present_share_buffer")
    )


def _unpacked(node: NodeProto, stored: dict[str, TensorProto], proto: ModelProto) -> list[NodeProto]:
    stem = node.name or node.output[0]
    weight = numpy_helper.to_array(stored[node.input[1]])
    bias = numpy_helper.to_array(stored[node.input[2]]) if len(node.input) > 2 and node.input[2] else None
    sizes = next((list(entry.ints) for entry in node.attribute if entry.name == "qkv_hidden_sizes"), [])
    ends = np.cumsum(sizes or [weight.shape[1] // 3] * 3)
    made: list[NodeProto] = []
    heads: list[str] = []
    for role, start, end in zip(("query", "key", "value"), (0, *ends[:2]), ends, strict=True):
        name = f"{stem}/{role}"
        columns = numpy_helper.from_array(np.ascontiguousarray(weight[:, start:end]), f"{name}/weight")
        proto.graph.initializer.append(columns)
        product = f"{name}/product" if bias is not None else name
        made.append(helper.make_node("MatMul", [node.input[0], columns.name], [product], name=f"{name}/MatMul"))
        if bias is not None:
            proto.graph.initializer.append(numpy_helper.from_array(bias[start:end], f"{name}/bias"))
            made.append(helper.make_node("Add", [product, f"{name}/bias"], [name], name=f"{name}/Add"))
        heads.append(name)
    mask, addend = (node.input[slot] if slot < len(node.input) else "" for slot in (3, 5))
    inputs = [*heads, "", mask, addend]
    while not inputs[-1]:
        inputs.pop()
    block = helper.make_node("MultiHeadAttention", inputs, [node.output[0]], name=stem, domain="com.microsoft")
    block.attribute.extend(entry for entry in node.attribute if entry.name in _KEPT)
    return [*made, block]


_STEPS = 12  # nodes from a layer to its softmax, at most
_FLAT = ("Reshape", "Identity")


@dataclass(frozen=True, eq=False)
class _Packed:
    """A layer whose output is cut into queries, keys and values.

    Attributes:
        layer: MatMul or Gemm.
        add: The Add of its bias; None without one.
        weight, bias: As ``x @ weight + bias``; their tensors may serve others too.
        flat: Reshapes of rows between the layer and the cuts.
        cuts: The nodes that cut.
        parts: The tensors, and their first and last columns.
        heads: Where the heads are split before the cut, what the target of that Reshape is put together from for
            one part: then the parts are (batch, head, position, width).
    """

    layer: NodeProto
    add: NodeProto | None
    weight: np.ndarray
    bias: np.ndarray | None
    flat: tuple[NodeProto, ...]
    cuts: tuple[NodeProto, ...]
    parts: tuple[tuple[str, int, int], ...]
    heads: tuple[str | np.ndarray, ...] = ()

    @property
    def nodes(self) -> list[NodeProto]:
        """All that goes."""
        return [self.layer, *([self.add] if self.add is not None else []), *self.flat, *self.cuts]


def unpack_layers(proto: ModelProto, before: Callable[[], None]) -> None:
    """Cut packed layers of attention into three. Changes ``proto``.

    Only where the output is cut into three along its last axis, by constants, and a softmax follows.

    Args:
        before: Called before the first change, if there is any.
    """
    graph = proto.graph
    if proto.ir_version < 4:
        return
    look = _Graph(graph)
    found = [packed for node in graph.node if (packed := look.packed(node)) is not None]
    if not found:
        return
    before()
    gone: dict[int, list[NodeProto]] = {}
    for packed in found:
        old = packed.nodes
        # Behind the last of them, whatever else the Reshapes read is there.
        last = max(next(at for at, node in enumerate(graph.node) if node is entry) for entry in old)
        for at, node in enumerate(graph.node):
            if any(node is entry for entry in old):
                gone.setdefault(at, [])
        gone[last] = gone[last] + _cut(packed, look, graph)
    nodes = [made for at, node in enumerate(graph.node) for made in gone.get(at, [node])]
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
    _drop_unread(graph, {name for packed in found for node in packed.nodes for name in node.input})
    renamed = {name for packed in found for node in packed.flat for name in node.output}
    for place in range(len(graph.value_info) - 1, -1, -1):
        if graph.value_info[place].name in renamed:
            del graph.value_info[place]


class _Graph:
    """Who makes and who reads the tensors of the main graph."""

    def __init__(self, graph: GraphProto) -> None:
        self.stored = {tensor.name: tensor for tensor in graph.initializer}
        self.made = {name: node for node in graph.node for name in node.output}
        self.readers: dict[str, list[NodeProto]] = {}
        for node in graph.node:
            for name in _reads_of(node):
                self.readers.setdefault(name, []).append(node)
        self.kept = {value.name for value in graph.output} | {value.name for value in graph.input}

    def value(self, name: str) -> np.ndarray | None:
        """A constant inside the file; whole numbers also behind a Cast to such, as some exporters write shapes."""
        tensor = self.stored.get(name)
        if tensor is None:
            node = self.made.get(name)
            if node is not None and node.op_type in ("Cast", "Identity") and name not in self.kept:
                value = self.value(node.input[0])
                whole = value is not None and value.dtype.kind in "iu"
                return value if whole and next((entry.i for entry in node.attribute), _WHOLE[0]) in _WHOLE else None
            if node is None or node.op_type != "Constant" or node.attribute[0].name != "value":
                return None
            tensor = node.attribute[0].t
        return None if tensor.external_data or name in self.kept else numpy_helper.to_array(tensor)

    def readers_but_shape(self, name: str) -> list[NodeProto]:
        return [node for node in self.readers.get(name, []) if node.op_type != "Shape"]

    def packed(self, layer: NodeProto) -> _Packed | None:
        """Read a packed layer; None for any other node."""
        if layer.op_type not in ("MatMul", "Gemm") or layer.domain not in ("", "ai.onnx"):
            return None
        attributes = {entry.name: entry for entry in layer.attribute}
        numbers = {name: entry.i or entry.f for name, entry in attributes.items()}
        if numbers.get("transA") or numbers.get("alpha", 1.0) != 1 or numbers.get("beta", 1.0) != 1:
            return None
        weight = self.value(layer.input[1])
        if weight is None or weight.ndim != 2 or weight.dtype not in (np.float32, np.float16):
            return None
        weight = weight.T if numbers.get("transB") else weight
        name, add, bias = layer.output[0], None, None
        if layer.op_type == "Gemm" and len(layer.input) > 2:
            bias = self.value(layer.input[2])
            if bias is None:
                return None
        readers = self.readers_but_shape(name)
        if bias is None and len(readers) == 1 and readers[0].op_type == "Add":
            add = readers[0]
            other = add.input[1] if add.input[0] == name else add.input[0]
            bias = self.value(other)
            if bias is None or name in self.kept or self.readers.get(name, []) != [add]:
                return None
            name = add.output[0]
        if bias is not None and bias.shape != (weight.shape[1],):
            return None
        flat: list[NodeProto] = []
        while len(readers := self.readers.get(name, [])) == 1 and readers[0].op_type in _FLAT and name not in self.kept:
            if readers[0].op_type == "Reshape" and self.target(readers[0], weight.shape[1]) is None:
                break
            flat.append(readers[0])
            name = readers[0].output[0]
        cuts = self.cuts(name, weight.shape[1]) or self.stacked(name, weight.shape[1])
        if cuts is None or not all(self.before_softmax(part) for part, _, _ in cuts[1][:2]):
            return None
        return _Packed(layer, add, weight, bias, tuple(flat), *cuts)

    def stacked(
        self, name: str, width: int
    ) -> tuple[tuple[NodeProto, ...], tuple[tuple[str, int, int], ...], tuple[str | np.ndarray, ...]] | None:
        """The nodes that cut (batch, position, 3, head, width), turned to (3, batch, head, position, width)."""
        readers = self.readers.get(name, [])
        if len(readers) != 1 or readers[0].op_type != "Reshape" or name in self.kept:
            return None
        split = readers[0]
        flat = [entry for piece in self.pieces(split) for entry in ([piece] if isinstance(piece, str) else piece)]
        turns = self.readers.get(split.output[0], [])
        if len(flat) != 5 or flat[2] != 3 or len(turns) != 1 or turns[0].op_type != "Transpose":
            return None
        if any(isinstance(entry, str) for entry in flat[3:]):
            return None
        if [list(entry.ints) for entry in turns[0].attribute] != [[2, 0, 3, 1, 4]]:
            return None
        nodes, parts = [split, turns[0]], []
        ends: list[tuple[int, str]] = []  # parts that still have the axis they were cut along
        for node in self.readers.get(turns[0].output[0], []):
            nodes.append(node)
            axis = next((entry.i for entry in node.attribute if entry.name == "axis"), 0)
            index = self.value(node.input[1]) if node.op_type == "Gather" else None
            if index is not None and index.ndim == 0 and axis == 0:
                parts.append((int(index) % 3, node.output[0]))
            elif node.op_type == "Split" and len(node.output) == 3 and axis == 0:
                ends += list(enumerate(node.output))
            elif (bounds := self.sliced(node)) is not None and bounds[2] == 0 and min(bounds[1], 3) - bounds[0] == 1:
                ends.append((bounds[0], node.output[0]))
            else:
                return None
        for place, part in ends:
            after = self.readers.get(part, [])
            axes = [] if len(after) != 1 or after[0].op_type != "Squeeze" else self.squeezed(after[0])
            if axes != [0] or part in self.kept:
                return None
            nodes.append(after[0])
            parts.append((place, after[0].output[0]))
        parts.sort()
        if [place for place, _ in parts] != [0, 1, 2] or {split.output[0], turns[0].output[0]} & self.kept:
            return None
        each = width // 3
        whole = tuple(entry if isinstance(entry, str) else np.array([entry]) for entry in (*flat[:2], *flat[3:]))
        return tuple(nodes), tuple((part, place * each, place * each + each) for place, part in parts), whole

    def sliced(self, node: NodeProto) -> tuple[int, int, int] | None:
        """Start, end and axis of a Slice along one axis in steps of one; None for any other node."""
        if node.op_type != "Slice" or len(node.input) < 4:
            return None
        values = [self.value(entry) for entry in node.input[1:]]
        if any(value is None or value.size != 1 for value in values):
            return None
        start, end, axis, *step = (int(value.reshape(-1)[0]) for value in values if value is not None)
        return (start, end, axis) if step in ([], [1]) else None

    def squeezed(self, node: NodeProto) -> list[int]:
        """The axes a Squeeze takes out."""
        if len(node.input) > 1:
            axes = self.value(node.input[1])
            return [] if axes is None else [int(entry) for entry in axes.reshape(-1)]
        return [int(axis) for entry in node.attribute if entry.name == "axes" for axis in entry.ints]

    def pieces(self, node: NodeProto) -> list[str | np.ndarray]:
        """What the target of a Reshape is put together from; nothing where that cannot be told."""
        whole = self.value(node.input[1])
        if whole is not None:
            return [whole.reshape(-1)]
        joint = self.made.get(node.input[1])
        if joint is None or joint.op_type != "Concat":
            return []
        return [value.reshape(-1) if (value := self.value(name)) is not None else name for name in joint.input]

    def target(self, node: NodeProto, width: int) -> list[str | np.ndarray] | None:
        """What the target of a Reshape is put together from, if its last entry is ``width`` or -1."""
        pieces = self.pieces(node)
        if not pieces:
            return None
        last = pieces[-1]
        return pieces if not isinstance(last, str) and last.size and last[-1] in (-1, width) else None

    def cuts(self, name: str, width: int) -> tuple[tuple[NodeProto, ...], tuple[tuple[str, int, int], ...]] | None:
        """The nodes that cut a tensor into three along its last axis."""
        readers = self.readers.get(name, [])
        if name in self.kept or not readers:
            return None
        if len(readers) == 1 and readers[0].op_type == "Split" and len(readers[0].output) == 3:
            axis = next((entry.i for entry in readers[0].attribute if entry.name == "axis"), 0)
            given = next((list(entry.ints) for entry in readers[0].attribute if entry.name == "split"), None)
            if len(readers[0].input) > 1:
                sizes = self.value(readers[0].input[1])
                given = None if sizes is None else [int(entry) for entry in sizes]
                if given is None:
                    return None
            ends = np.cumsum(given or [width // 3] * 3)
            if axis not in (-1, 2) or ends[-1] != width:
                return None
            starts = (0, *ends[:2])
            return (readers[0],), tuple(
                (part, int(start), int(end)) for part, start, end in zip(readers[0].output, starts, ends, strict=True)
            )
        bounds = [self.sliced(node) for node in readers]
        if len(readers) != 3 or any(entry is None or entry[2] not in (-1, 2) for entry in bounds):
            return None
        parts = [
            (node.output[0], entry[0], min(entry[1], width))
            for node, entry in zip(readers, bounds, strict=True)
            if entry is not None
        ]
        parts.sort(key=lambda part: part[1])
        borders = [part[1] for part in parts] + [width]
        if borders[0] != 0 or [part[2] for part in parts] != borders[1:]:
            return None
        return tuple(readers), tuple(parts)

    def before_softmax(self, name: str) -> bool:
        """Whether a softmax follows within a few nodes."""
        front = {name}
        for _ in range(_STEPS):
            nodes = [node for entry in front for node in self.readers_but_shape(entry)]
            if any(node.op_type == "Softmax" for node in nodes):
                return True
            front = {entry for node in nodes for entry in node.output}
        return False


def _reads_of(node: NodeProto) -> Iterator[str]:
    yield from filter(None, node.input)
    for entry in node.attribute:
        for inner in (*entry.graphs, *((entry.g,) if entry.HasField("g") else ())):
            yield from _reads(inner)


def _cut(packed: _Packed, look: _Graph, graph: GraphProto) -> list[NodeProto]:
    """The three layers, each with the Reshapes of its own."""
    made: list[NodeProto] = []
    for role, (part, start, end) in zip(("query", "key", "value"), packed.parts, strict=True):
        stem = f"{packed.layer.name or packed.layer.output[0]}/{role}"
        columns = np.ascontiguousarray(packed.weight[:, start:end])
        graph.initializer.append(numpy_helper.from_array(columns, f"{stem}/weight"))
        inputs = [packed.layer.input[0], f"{stem}/weight"]
        whole = f"{stem}/whole" if packed.heads else part
        names = [f"{stem}/{place}" for place in range(len(packed.flat))] + [whole]
        if packed.bias is not None:
            graph.initializer.append(numpy_helper.from_array(packed.bias[start:end].copy(), f"{stem}/bias"))
        if packed.layer.op_type == "Gemm":
            inputs += [f"{stem}/bias"] if packed.bias is not None else []
            made.append(helper.make_node("Gemm", inputs, [names[0]], name=f"{stem}/Gemm"))
        elif packed.bias is None:
            made.append(helper.make_node("MatMul", inputs, [names[0]], name=f"{stem}/MatMul"))
        else:
            made.append(helper.make_node("MatMul", inputs, [f"{stem}/product"], name=f"{stem}/MatMul"))
            summed = [f"{stem}/product", f"{stem}/bias"]
            made.append(helper.make_node("Add", summed, [names[0]], name=f"{stem}/Add"))
        for place, node in enumerate(packed.flat):
            made += _reshaped(node, look, names[place : place + 2], packed.weight.shape[1], end - start, stem, graph)
        if packed.heads:
            made += _headed(packed.heads, whole, part, stem, graph)
    return made


def _headed(
    pieces: tuple[str | np.ndarray, ...], whole: str, part: str, stem: str, graph: GraphProto
) -> list[NodeProto]:
    """The heads of one part: split, and turned to (batch, head, position, width)."""
    names = []
    for place, piece in enumerate(pieces):
        names.append(piece if isinstance(piece, str) else f"{stem}/heads/{place}")
        if not isinstance(piece, str):
            graph.initializer.append(numpy_helper.from_array(piece.astype(np.int64), names[-1]))
    return [
        helper.make_node("Concat", names, [f"{stem}/heads"], name=f"{stem}/heads", axis=0),
        helper.make_node("Reshape", [whole, f"{stem}/heads"], [f"{stem}/split"], name=f"{stem}/split"),
        helper.make_node("Transpose", [f"{stem}/split"], [part], name=f"{stem}/turn", perm=[0, 2, 1, 3]),
    ]


def _reshaped(
    node: NodeProto, look: _Graph, names: list[str], before: int, after: int, stem: str, graph: GraphProto
) -> list[NodeProto]:
    """A Reshape of rows that are narrower now; ``names``: what it reads and what it makes."""
    if node.op_type != "Reshape":
        return [helper.make_node(node.op_type, names[:1], names[1:], name=f"{stem}/{node.name}")]
    pieces = look.target(node, before)
    assert pieces is not None
    last = np.array(pieces[-1])
    last[-1] = after if last[-1] != -1 else -1
    target = f"{stem}/{node.name or node.output[0]}/shape"
    made = []
    graph.initializer.append(numpy_helper.from_array(last, f"{target}/last"))
    if len(pieces) > 1:
        inputs = [*look.made[node.input[1]].input[:-1], f"{target}/last"]
        made.append(helper.make_node("Concat", inputs, [target], name=target, axis=0))
    read = target if made else f"{target}/last"
    reshape = helper.make_node("Reshape", [names[0], read], [names[1]], name=f"{stem}/{node.name or node.output[0]}")
    reshape.attribute.extend(entry for entry in node.attribute if entry.name == "allowzero")
    return [*made, reshape]
