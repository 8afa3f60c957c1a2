"""Compound sites of kind ``attention``: the two halves of an attention block, whose heads can be made narrower.

    scores = (x Q + q) (x' K + k)ᵀ · scale   per head        half ``scores``: the layers query and key
    y = (softmax(scores + mask) (x' V + v)) O + o             half ``values``: the layers value and output

Both are found from their product on, by what the nodes do and never by their names. A head's width occurs in
no other place than these weights, the shapes that split and join the heads, and the scale.
The weight is that of the query (K, H · d) or of the output (H · d, N).

Attributes of a site:
    half: ``scores`` or ``values``.
    parts: The single sites, (query, key) or (value, output).
    heads: H.
    width: d, of one head.
    resizes: Reshapes whose target holds a width that changes.
    scales: Constant factors between the projections and the softmax; of ``scores`` only.
    usual: Whether the scale is ``1 / sqrt(d)``, written down or understood.
    between: Tensors that stay and change their shape.
    region: Names of the tensors that go in, and of the one that comes out behind the last node that changes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto

from lowrank_onnx.base import Site
from lowrank_onnx.model import Model, Scope
from lowrank_onnx.shapes import Shapes, shape_of
from lowrank_onnx.sites.shared_input import is_plain
from lowrank_onnx.sites.weights import attribute, attribute_list

_PASSES_ON = frozenset(["Identity", "Cast", "Dropout"])
# What may stand between the scores and the softmax: it never sees a head's width.
_POINTWISE = _PASSES_ON | {"Add", "Sub", "Mul", "Div", "Where", "Max", "Min", "Clip"}
_SPLIT = (0, 2, 1, 3)  # (batch, position, head, width) -> (batch, head, position, width)
_SPLIT_TURNED = (0, 2, 3, 1)
_AS_USUAL = 1e-3


@dataclass(frozen=True, eq=False)
class Resize:
    """A Reshape whose target names a width.

    Attributes:
        node, input, output: Its name and tensors.
        allowzero: Its attribute.
        pieces: What its target is put together from: numbers, or names of tensors.
        piece, entry: Where among them the width stands.
        unit: What one column of every head adds to that number: 1, or all heads.
    """

    node: str
    input: str
    output: str
    allowzero: int
    pieces: tuple[str | tuple[int, ...], ...]
    piece: int
    entry: int
    unit: int


@dataclass(frozen=True, eq=False)
class Scale:
    """A product with, or quotient by, one constant number.

    Attributes:
        node, op, input, output: Its name, ``Mul`` or ``Div``, and tensors.
        value: The constant as it is stored.
    """

    node: str
    op: str
    input: str
    output: str
    value: np.ndarray

    @property
    def factor(self) -> float:
        """What the input is multiplied by."""
        number = float(self.value.reshape(-1)[0])
        return number if self.op == "Mul" else 1 / number


@dataclass(frozen=True, eq=False)
class _Branch:
    """The way from a linear layer to its heads."""

    site: Site
    heads: int
    width: int
    resizes: tuple[Resize, ...]
    scales: tuple[Scale, ...]
    between: tuple[str, ...]


def find(model: Model, shapes: Shapes, singles: Sequence[Site]) -> list[Site]:
    """Return the halves of every attention block that is understood."""
    made = {(site.uses[0].scope, site.uses[0].output): site for site in singles if is_plain(site)}
    read = {(site.uses[0].scope, site.uses[0].input): site for site in singles if is_plain(site)}
    sites = []
    for scope in model.scopes:
        look = _Look(model, shapes, scope, made, read)
        for node in scope.graph.node:
            if node.op_type == "MatMul" and node.domain in ("", "ai.onnx"):
                sites += [site for site in (look.scores(node), look.values(node)) if site is not None]
            elif fused_heads(node) is not None:
                sites += look.fused(node)
    return sites


class _Look:
    """One graph, looked at from its products."""

    def __init__(
        self,
        model: Model,
        shapes: Shapes,
        scope: Scope,
        made: Mapping[tuple[str, str], Site],
        read: Mapping[tuple[str, str], Site],
    ) -> None:
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
                if node.op_type in _POINTWISE and node.output[0] not in seen:
                    seen.add(node.output[0])
                    queue.append(node.output[0])
        return False

    def scores(self, product: NodeProto) -> Site | None:
        """The layers query and key of ``product = queries @ keysᵀ``."""
        query, key = (
            self.branch(name, turned) for name, turned in zip(product.input, (_SPLIT, _SPLIT_TURNED), strict=True)
        )
        if query is None or key is None or query.site is key.site:
            return None
        if (query.heads, query.width) != (key.heads, key.width) or not self.before_softmax(product.output[0]):
            return None
        behind = self.scales_behind(product.output[0])
        parts = (query.site, key.site)
        scales = (*query.scales, *key.scales, *behind)
        last = behind[-1].output if behind else product.output[0]
        return _half(
            "scores",
            parts,
            query,
            _work(parts, shape_of(self.shapes, self.scope, product.output[0]), query.width),
            resizes=(*query.resizes, *key.resizes),
            scales=scales,
            usual=_is_usual(scales, query.width),
            between=(*query.between, *key.between),
            region=((query.site.uses[0].input, key.site.uses[0].input), last),
        )

    def values(self, context: NodeProto) -> Site | None:
        """The layers value and output around ``context = attention @ values``, wherever the attention is from."""
        value = self.branch(context.input[1], _SPLIT)
        if value is None or value.scales:
            return None
        joined = self.joined(context.output[0], value)
        if joined is None:
            return None
        out, resizes, between = joined
        parts = (value.site, out)
        if value.site is out:
            return None
        return _half(
            "values",
            parts,
            value,
            _work(parts, shape_of(self.shapes, self.scope, context.input[0]), value.width),
            resizes=(*value.resizes, *resizes),
            scales=(),
            usual=False,
            between=(*value.between, *between),
            region=((value.site.uses[0].input, context.input[0]), out.uses[0].output),
        )

    def fused(self, node: NodeProto) -> list[Site]:
        """The halves around one node that holds the whole block but its layers."""
        heads = fused_heads(node) or 0
        query, key, value = (self.source(name, heads) for name in node.input[:3])
        shapes = [shape_of(self.shapes, self.scope, name) for name in node.input[:2]]
        lengths = [shape[-2] for shape in shapes if shape is not None and len(shape) > 2]
        scores = (shapes[0][0], heads, *lengths) if shapes[0] is not None and len(lengths) == 2 else None
        found = []
        if query is not None and key is not None and query.site is not key.site and query.width == key.width:
            parts = (query.site, key.site)
            scales = (*query.scales, *key.scales)
            given = any(entry.name == "scale" and entry.f for entry in node.attribute)
            site = _half(
                "scores",
                parts,
                query,
                _work(parts, scores, query.width),
                resizes=(*query.resizes, *key.resizes),
                scales=scales,
                usual=not given and not scales,
                between=(*query.between, *key.between),
                region=((query.site.uses[0].input, key.site.uses[0].input, node.input[2]), node.output[0]),
            )
            found.append(site)
        flat = (self.scope.path, node.input[2]) in self.made
        joined = None if value is None or value.scales else self.joined(node.output[0], value, flat)
        if value is None or joined is None or joined[0] is value.site:
            return found
        last, resizes, between = joined
        site = _half(
            "values",
            (value.site, last),
            value,
            _work((value.site, last), scores, value.width),
            resizes=(*value.resizes, *resizes),
            scales=(),
            usual=False,
            between=(*value.between, *between),
            region=((value.site.uses[0].input, *node.input[:2]), last.uses[0].output),
        )
        return [*found, site]

    def source(self, name: str, heads: int) -> _Branch | None:
        """The layer whose output a fused node reads: as it is, or split into heads."""
        site = self.made.get((self.scope.path, name))
        if site is None:
            branch = self.branch(name, _SPLIT)
            return branch if branch is not None and branch.heads == heads else None
        width = site.weight.shape[1] // heads
        if not self.read_once(name) or site.uses[0].dynamic_bias or width * heads != site.weight.shape[1] or width < 2:
            return None
        return _Branch(site, heads, width, (), (), (name, site.uses[0].raw_output))

    def branch(self, name: str, order: tuple[int, ...]) -> _Branch | None:
        """Go back from heads to the layer that makes them, if the axes end up in ``order``."""
        turned: tuple[int, ...] = (0, 1, 2, 3)
        scales: list[Scale] = []
        between: list[str] = []
        while True:
            node = self.scope.producers.get(name)
            if node is None or not self.read_once(name):
                return None
            between.append(name)
            if node.op_type == "Transpose":
                permutation = attribute_list(node, "perm")
                if len(permutation) != 4:
                    return None
                turned = tuple(permutation[axis] for axis in turned)
            elif node.op_type in ("Mul", "Div"):
                scale = self.scale(node)
                if scale is None:
                    return None
                scales.append(scale)
                name = scale.input
                continue
            elif node.op_type == "Reshape":
                return self.split(node, scales, between) if turned == order else None
            elif node.op_type not in _PASSES_ON:
                return None
            name = node.input[0]

    def split(self, node: NodeProto, scales: Sequence[Scale], between: Sequence[str]) -> _Branch | None:
        """Read the Reshape that splits a layer's output into heads."""
        name, more = node.input[0], []
        while (self.scope.path, name) not in self.made:
            before = self.scope.producers.get(name)
            if before is None or before.op_type not in (*_PASSES_ON, "Mul", "Div") or not self.read_once(name):
                return None
            between = (*between, name)
            if before.op_type in _PASSES_ON:
                name = before.input[0]
                continue
            scale = self.scale(before)
            if scale is None:
                return None
            more.append(scale)
            name = scale.input
        site = self.made[(self.scope.path, name)]
        pieces = self.pieces(node.input[1])
        shape = shape_of(self.shapes, self.scope, node.output[0])
        if not self.read_once(name) or pieces is None or site.uses[0].dynamic_bias:
            return None
        total = site.weight.shape[1]
        width, heads = _known(pieces, -1), _known(pieces, -2)
        if shape is not None and len(shape) == 4:
            heads, width = shape[2:]
        elif heads and heads > 0 and width == -1:
            width = total // heads
        if not heads or not width or heads * width != total or width < 2:
            return None
        resize = _resize(node, pieces, width, 1)
        if resize is None:
            return None
        inner = (*between, name, site.uses[0].raw_output)
        return _Branch(site, heads, width, resize, (*scales, *more), inner)

    def joined(
        self, name: str, value: _Branch, flat: bool = False
    ) -> tuple[Site, tuple[Resize, ...], tuple[str, ...]] | None:
        """Go on from the heads to the layer that reads all of them side by side; ``flat``: they are by now."""
        turned: tuple[int, ...] = (0, 1, 2, 3)
        resizes: tuple[Resize, ...] | None = () if flat else None
        between = [name]
        while True:
            site = self.read.get((self.scope.path, name))
            if site is not None and resizes is not None:
                fits = site.weight.shape[0] == value.heads * value.width and not site.uses[0].dynamic_bias
                return (site, resizes, tuple(between)) if fits and self.read_once(name) else None
            node = self.reader(name)
            if node is None:
                return None
            if node.op_type == "Transpose" and resizes is None:
                permutation = attribute_list(node, "perm")
                if len(permutation) != 4:
                    return None
                turned = tuple(turned[axis] for axis in permutation)
            elif node.op_type == "Reshape" and resizes is None and turned == _SPLIT and node.input[0] == name:
                pieces = self.pieces(node.input[1])
                resizes = None if pieces is None else _resize(node, pieces, value.heads * value.width, value.heads)
                if resizes is None:
                    return None
            elif node.op_type not in _PASSES_ON:
                return None
            name = node.output[0]
            between.append(name)

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

    def read_once(self, name: str) -> bool:
        return len(self.scope.readers.get(name, ())) == 1 and name not in self.outputs

    def reader(self, name: str) -> NodeProto | None:
        """The only node that reads a tensor."""
        readers = self.scope.readers.get(name, [])
        alone = len(readers) == 1 and readers[0].scope is self.scope and name not in self.outputs
        return readers[0].node if alone else None


def fused_heads(node: NodeProto) -> int | None:
    """The number of heads of a node that holds a block but its layers; None for any other node.

    Left alone: key and value with fewer heads, biases inside the node, key and value that come from outside,
    anything bent between scores and softmax.
    """
    standard = node.op_type == "Attention" and node.domain in ("", "ai.onnx")
    if not standard and (node.op_type != "MultiHeadAttention" or node.domain != "com.microsoft"):
        return None
    heads = int(attribute(node, "q_num_heads" if standard else "num_heads", 0))
    held = (4, 5, 6) if standard else (3, 6, 7, 8, 9)  # past, and lengths of it; the biases of the layers
    unknown = any(node.input[slot] for slot in held if slot < len(node.input)) or any(node.output[1:])
    bent = attribute(node, "softcap", 0.0) != 0
    fewer = standard and int(attribute(node, "kv_num_heads", 0)) != heads
    return None if heads < 1 or unknown or bent or fewer or len(node.input) < 3 or not all(node.input[:3]) else heads


def _work(parts: Sequence[Site], scores: Sequence[int] | None, width: int) -> int | None:
    """Multiply-accumulates of two layers and of the product that gives, or takes, scores of that shape."""
    macs = [site.macs for site in parts]
    if scores is None or any(entry is None for entry in macs):
        return None
    return sum(entry for entry in macs if entry is not None) + math.prod(scores) * width


def _is_usual(scales: Sequence[Scale], width: int) -> bool:
    total = math.prod(scale.factor for scale in scales)
    return bool(scales) and abs(total * math.sqrt(width) - 1) < _AS_USUAL


def _known(pieces: Sequence[str | tuple[int, ...]], place: int) -> int | None:
    """An entry of a target, counted from behind; None where it is computed."""
    flat: list[int | None] = []
    for piece in reversed(pieces):
        if isinstance(piece, str):
            flat.append(None)  # one entry at least
            break
        flat += reversed(piece)
    return flat[-place - 1] if len(flat) >= -place else None


def _resize(
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


def _half(
    half: str,
    parts: tuple[Site, Site],
    branch: _Branch,
    macs: int | None,
    *,
    resizes: tuple[Resize, ...],
    scales: tuple[Scale, ...],
    usual: bool,
    between: tuple[str, ...],
    region: tuple[tuple[str, ...], str],
) -> Site:
    main = parts[0] if half == "scores" else parts[1]
    return Site(
        name=f"{parts[0].name}~{parts[1].name}",
        kind="attention",
        op=main.op,
        shape=main.weight.shape,
        weight=main.weight,
        uses=tuple(part.uses[0] for part in parts) if half == "scores" else main.uses,
        parameters=sum(part.parameters for part in parts),
        freed=sum(part.freed for part in parts),
        macs=macs,
        attributes={
            "half": half,
            "parts": parts,
            "heads": branch.heads,
            "width": branch.width,
            "resizes": resizes,
            "scales": scales,
            "usual": usual,
            "between": between,
            "region": region,
        },
        parts=tuple(part.name for part in parts),
    )
