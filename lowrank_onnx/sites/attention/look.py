"""One graph, and the small questions that reading an attention block asks of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnx import NodeProto

from lowrank_onnx.base import Site
from lowrank_onnx.model import Model, Scope
from lowrank_onnx.shapes import Shapes, shape_of
from lowrank_onnx.sites.attention.records import POINTWISE, Resize, Scale
from lowrank_onnx.sites.weights import attribute, attribute_list
from lowrank_onnx.sites.widths import Widths


class Look:
    """One graph, looked at from its products."""

    def __init__(
        self,
        model: Model,
        shapes: Shapes,
        scope: Scope,
        made: Mapping[tuple[str, str], Site],
        read: Mapping[tuple[str, str], Site],
        allow_io_change: bool,
    ) -> None:
        self.allow_io_change = allow_io_change
        self.stuck = ""  # the node that was not understood last
        self.inputs = {value.name for value in scope.graph.input} - set(scope.initializers)
        self.model, self.shapes, self.scope, self.made, self.read = model, shapes, scope, made, read
        self.outputs = {value.name for value in scope.graph.output}

    def before_softmax(self, name: str) -> bool:
        """Whether a softmax over the last axis follows, with nothing but elementwise nodes in between."""
        seen, queue = {name}, [name]
        while queue:
            for reader in self.scope.readers.get(queue.pop(), ()):
                node = reader.node
                if node.op_type == "Softmax":
                    axis = int(attribute(node, "axis", -1 if self.model.opset >= 13 else 1))
                    return axis in (-1, 3)
                if node.op_type in POINTWISE and node.output[0] not in seen:
                    seen.add(node.output[0])
                    queue.append(node.output[0])
        return False

    def is_attention(self, product: NodeProto, half: str) -> bool:
        """Whether a product of two tensors that depend on data goes into a softmax, or reads one."""
        if any(self.model.constant(self.scope, name) is not None for name in product.input):
            return False
        if half != "values":
            return self.before_softmax(product.output[0])
        before = self.scope.producers.get(product.input[0])
        return before is not None and before.op_type == "Softmax"

    def only(self, name: str, known: set[str], stays: bool = False) -> bool:
        """Whether nobody reads a tensor but known nodes, one at most where none is named, and those that ask its shape.

        ``stays``: it may be an output of the model.
        """
        readers = [entry for entry in self.scope.readers.get(name, ()) if not self.asks(entry.node)]
        here = all(entry.scope is self.scope for entry in readers)
        others = {entry.node.name for entry in readers} - known
        return here and (not others or (not known and len(readers) == 1)) and (stays or name not in self.outputs)

    def asks(self, node: NodeProto) -> bool:
        """Whether a node reads nothing of a tensor but its shape."""
        if node.op_type == "Shape":
            return True
        readers = self.scope.readers.get(node.output[0], [])
        turned = node.op_type == "Transpose" and node.output[0] not in self.outputs
        return turned and bool(readers) and all(entry.node.op_type == "Shape" for entry in readers)

    def read_once(self, name: str) -> bool:
        return len(self.scope.readers.get(name, ())) == 1 and name not in self.outputs

    def reader(self, name: str) -> NodeProto | None:
        """The only node that reads a tensor, but for those that ask its shape."""
        readers = [entry for entry in self.scope.readers.get(name, ()) if not self.asks(entry.node)]
        alone = len(readers) == 1 and readers[0].scope is self.scope and name not in self.outputs
        return readers[0].node if alone else None

    def op_of(self, name: str) -> str:
        """The operator of a node of this graph."""
        return next(str(node.op_type) for node in self.scope.graph.node if node.name == name)

    def numbers(self, name: str) -> tuple[int, ...]:
        """The whole numbers of a constant; none of anything else."""
        stored = self.model.constant(self.scope, name)
        return () if stored is None else tuple(int(entry) for entry in stored.value.reshape(-1))

    def scale(self, node: NodeProto) -> Scale | None:
        """Read a Mul or Div by one constant number."""
        constants = [self.model.constant(self.scope, name) for name in node.input]
        slots = [slot for slot, constant in enumerate(constants) if constant is not None]
        if len(slots) != 1 or (node.op_type == "Div" and slots[0] == 0):
            return None
        constant = constants[slots[0]]
        assert constant is not None
        if constant.value.size != 1 or constant.value.dtype.kind != "f" or not constant.value.reshape(-1)[0]:
            return None
        return Scale(node.name, node.op_type, node.input[1 - slots[0]], node.output[0], constant.value)

    def scales_behind(self, name: str) -> tuple[Scale, ...]:
        """Constant factors right behind a product."""
        found = []
        while (node := self.reader(name)) is not None and node.op_type in ("Mul", "Div"):
            scale = self.scale(node)
            if scale is None or scale.input != name:
                break
            found.append(scale)
            name = scale.output
        return tuple(found)

    def pieces(self, name: str) -> tuple[str | tuple[int, ...], ...] | None:
        """What the target of a Reshape is put together from."""
        whole = self.model.constant(self.scope, name)
        if whole is not None:
            return (tuple(int(entry) for entry in whole.value.reshape(-1)),)
        node = self.scope.producers.get(name)
        if node is None or node.op_type != "Concat":
            return None
        found: list[str | tuple[int, ...]] = []
        for source in node.input:
            constant = self.model.constant(self.scope, source)
            found.append(source if constant is None else tuple(int(entry) for entry in constant.value.reshape(-1)))
        return tuple(found)

    def is_number(self, name: str) -> bool:
        """Whether a tensor is computed from shapes alone, as far as can be told."""
        node = self.scope.producers.get(name)
        while node is not None and node.op_type in ("Cast", "Sqrt", "Div", "Reciprocal", "Identity"):
            data = [entry for entry in node.input if self.model.constant(self.scope, entry) is None]
            node = self.scope.producers.get(data[0]) if len(data) == 1 else None
        return node is not None and node.op_type in ("Slice", "Gather")

    def columns(self, name: str) -> int | None:
        """The size of the last axis of a table; None where that cannot be told."""
        stored = self.model.constant(self.scope, name)
        if stored is not None:
            return int(stored.value.shape[-1]) if stored.value.ndim else 1
        shape = shape_of(self.shapes, self.scope, name)
        if shape is not None:
            return shape[-1] if shape else 1
        node = self.scope.producers.get(name)
        if node is None or not node.input:
            return None
        first = self.columns(node.input[0])
        if node.op_type == "Unsqueeze":
            axes = attribute_list(node, "axes") if self.model.opset < 13 else self.numbers(node.input[1])
            return 1 if -1 in axes else first  # a later axis than the last makes a column of 1 as well
        if node.op_type in ("Cos", "Sin", "Cast", "Identity"):
            return first
        others = [self.columns(source) for source in node.input[1:]]
        if node.op_type == "Mul" and first is not None and others[0] is not None:
            return max(first, others[0])
        if node.op_type == "Concat" and int(attribute(node, "axis", 0)) == -1 and None not in (first, *others):
            return sum(entry for entry in (first, *others) if entry is not None)
        return None

    def is_flat(self, node: NodeProto) -> bool:
        """Whether a Reshape leaves the last axis as it is: rows of a batch, or all rows."""
        if node.op_type != "Reshape":
            return False
        shapes = [shape_of(self.shapes, self.scope, name) for name in (node.input[0], node.output[0])]
        return bool(shapes[0] and shapes[1] and shapes[0][-1] == shapes[1][-1])

    def resize(self, node: NodeProto, number: int, unit: int) -> tuple[Resize, ...] | None:
        """How the target of a Reshape follows the width."""
        pieces = self.pieces(node.input[1])
        if pieces is None:
            return None
        shape = shape_of(self.shapes, self.scope, node.input[0])
        if isinstance(pieces[-1], str) and shape is not None:
            widths = Widths(self.model, self.scope, {node.input[0]: (len(shape), len(shape) - 1)})
            asked = [(tried, widths.at(pieces[-1], tried)) for tried in (number, 2 * number)]
            if all(found is not None and found[-1] == tried for tried, found in asked):
                return ()
            made = shape_of(self.shapes, self.scope, node.output[0])
            entries = sum(1 if isinstance(piece, str) else len(piece) for piece in pieces)
            if made is None or len(made) != entries or made[-1] != number:
                return None
            pieces = (*pieces[:-1], (number,))  # asked of another tensor, such as the input of the layer
        return follow(node, pieces, number, unit)


def known(pieces: Sequence[str | tuple[int, ...]], place: int) -> int | None:
    """An entry of a target, counted from behind; None where it is computed."""
    flat: list[int | None] = []
    for piece in reversed(pieces):
        if isinstance(piece, str):
            flat.append(None)  # one entry at least
            break
        flat += reversed(piece)
    return flat[-place - 1] if len(flat) >= -place else None


def follow(
    node: NodeProto, pieces: tuple[str | tuple[int, ...], ...], number: int, unit: int
) -> tuple[Resize, ...] | None:
    """How the last entry of a target follows the width: not at all if it is -1; None where it is computed."""
    last = pieces[-1]
    if isinstance(last, str) or not last or last[-1] not in (-1, number):
        return None
    if last[-1] == -1:
        return ()
    allowzero = int(attribute(node, "allowzero", 0))
    piece, entry = len(pieces) - 1, len(last) - 1
    return (Resize(node.name, node.input[0], node.output[0], allowzero, pieces, piece, entry, unit),)
