"""The ways between heads and layers: back from heads to the layer that makes them, on to the one that reads them."""

from __future__ import annotations

from dataclasses import replace

from onnx import NodeProto

from lowrank_onnx.base import Site
from lowrank_onnx.shapes import shape_of
from lowrank_onnx.sites.attention.look import follow, known
from lowrank_onnx.sites.attention.records import PASSES_ON, SPLIT, Branch, Cache, Resize, Way
from lowrank_onnx.sites.attention.rotary import Rotary
from lowrank_onnx.sites.weights import attribute, attribute_list
from lowrank_onnx.sites.widths import Widths


class Ways(Rotary):
    """A graph in which heads are followed to their layers."""

    def branch(self, name: str, order: tuple[int, ...]) -> Branch | None:
        """Go back from heads to the layer that makes them, if the axes end up in ``order``."""
        way = Way(order)
        met: set[str] = set()  # nodes that were understood
        while True:
            node = self.scope.producers.get(name)
            self.stuck = f"'{name}'" if node is None else f"{node.op_type} '{node.name}'"
            if node is None:
                return None
            way.axes[name] = (4, way.place(3))
            if node.op_type == "Concat" and self.is_cache(node, way):
                past, name = node.input
                way.caches += [Cache(past, way.place(3)), Cache(node.output[0], way.place(3))]
                way.axes[past] = (4, way.place(3))
                if not self.only(node.output[0], met, stays=True) or not self.only(past, {node.name}):
                    return None
                met = {node.name}
                way.between.append(node.output[0])
                continue
            if not self.only(name, met):
                return None
            met = {node.name}
            way.between.append(name)
            if node.op_type == "Transpose":
                permutation = attribute_list(node, "perm")
                if len(permutation) != 4:
                    return None
                way.turned = tuple(permutation[axis] for axis in way.turned)
            elif node.op_type in ("Mul", "Div"):
                scale = self.scale(node)
                if scale is not None:
                    way.scales.append(scale)
                    name = scale.input
                    continue
                if node.op_type == "Div" or not self.is_number(node.input[1]):
                    return None
                way.computed.append(node.input[1])
            elif node.op_type == "Add":
                turned = self.rotated(node, way)
                if turned is None:
                    return None
                name, met = turned
                continue
            elif node.op_type == "Reshape" and (repeated := self.repeated(node, way)) is not None:
                name, met = repeated
                continue
            elif node.op_type == "Reshape" and (flattened := self.flattened(node, way)) is not None:
                name, met = flattened
                continue
            elif node.op_type == "Reshape":
                return self.split(node, way) if way.turned == order else None
            elif node.op_type not in PASSES_ON:
                return None
            name = node.input[0]

    def is_cache(self, node: NodeProto, way: Way) -> bool:
        """Whether a Concat puts the past, an input of the model, in front along the positions."""
        axis = int(attribute(node, "axis", 0)) % 4
        return len(node.input) == 2 and axis == way.place(2) and node.input[0] in self.inputs

    def repeated(self, node: NodeProto, way: Way) -> tuple[str, set[str]] | None:
        """Read (batch, group, 1, position, width) spread over heads and joined again; where it comes from."""
        spread = self.scope.producers.get(node.input[0])
        if spread is None or spread.op_type != "Expand" or not way.straight:
            return None
        inner = self.scope.producers.get(spread.input[0])
        if inner is None or inner.op_type != "Unsqueeze" or not self.only(inner.output[0], {spread.name}):
            return None
        axes = attribute_list(inner, "axes") if self.model.opset < 13 else self.numbers(inner.input[1])
        shapes = [shape_of(self.shapes, self.scope, name) for name in (spread.output[0], node.output[0])]
        if axes != (2,) or not self.only(spread.output[0], {node.name}):
            return None
        if shapes[0] is None or shapes[1] is None or len(shapes[0]) != 5 or len(shapes[1]) != 4:
            return None
        batch, groups, shared, length, width = shapes[0]
        if shapes[1] != (batch, groups * shared, length, width):
            return None
        way.axes |= {spread.output[0]: (5, 4), inner.output[0]: (5, 4), inner.input[0]: (4, 3)}
        # Said without the width, or the batch and the positions, which may be open.
        spelled = (((1, 1, shared, 1, 1), -1, spread), ((0, groups * shared, -1, width), 0, node))
        way.resizes += [
            Resize(entry.name, entry.input[0], entry.output[0], 0, (target,), piece, 3, 1, entry.op_type)
            for target, piece, entry in spelled
        ]
        way.shared *= shared
        way.between += [spread.output[0], inner.output[0]]
        return inner.input[0], {inner.name}

    def flattened(self, node: NodeProto, way: Way) -> tuple[str, set[str]] | None:
        """Read heads whose last axes are exchanged while batch and head are one axis; where it comes from.

        Both Reshapes have to follow the width by themselves: they ask its tensor for the shape.
        """
        turn = self.scope.producers.get(node.input[0])
        if turn is None or turn.op_type != "Transpose" or attribute_list(turn, "perm") != (0, 2, 1):
            return None
        flat = self.scope.producers.get(turn.input[0])
        if flat is None or flat.op_type != "Reshape" or not all(map(self.read_once, (turn.output[0], turn.input[0]))):
            return None
        name = flat.input[0]
        shapes = [shape_of(self.shapes, self.scope, entry) for entry in (name, flat.output[0], node.output[0])]
        if shapes[0] is None or len(shapes[0]) != 4:
            return None
        batch, heads, rows, columns = shapes[0]
        if shapes[1] != (batch * heads, rows, columns) or shapes[2] != (batch, heads, columns, rows):
            return None
        turned = tuple((0, 1, 3, 2)[axis] for axis in way.turned)
        axis = replace(way, turned=turned).place(3)
        widths = Widths(self.model, self.scope, {name: (4, axis)})
        for target, place in ((flat, axis - 1), (node, 5 - axis)):
            for tried in (shapes[0][axis], 2 * shapes[0][axis]):
                asked = widths.at(target.input[1], tried)
                if asked is None or asked[place] != tried:
                    return None
        way.turned = turned
        way.between += [turn.output[0], flat.output[0]]
        return name, {flat.name}

    def split(self, node: NodeProto, way: Way) -> Branch | None:
        """Read the Reshape that splits a layer's output into heads."""
        name, flat = node.input[0], []
        while (self.scope.path, name) not in self.made:
            before = self.scope.producers.get(name)
            if before is None or not self.only(name, set()):
                return None
            way.between.append(name)
            if self.is_flat(before):
                flat.append(before)
                name = before.input[0]
                continue
            if before.op_type not in (*PASSES_ON, "Mul", "Div"):
                return None
            if before.op_type in PASSES_ON:
                name = before.input[0]
                continue
            scale = self.scale(before)
            if scale is None:
                return None
            way.scales.append(scale)
            name = scale.input
        site = self.made[(self.scope.path, name)]
        pieces = self.pieces(node.input[1])
        shape = shape_of(self.shapes, self.scope, node.output[0])
        if not self.only(name, set()) or pieces is None or site.uses[0].dynamic_bias:
            return None
        total = site.weight.shape[1]
        width, heads = known(pieces, -1), known(pieces, -2)
        if shape is not None and len(shape) == 4:
            heads, width = shape[2:]
        elif heads and heads > 0 and width == -1:
            width = total // heads
        if not heads or not width or heads * width != total or width < 2:
            return None
        resize = follow(node, pieces, width, 1)
        more = [self.resize(entry, total, heads) for entry in flat]
        if resize is None or None in more or any(self.columns(table.table) != width for table in way.tables):
            return None
        inner = (*way.between, name, site.uses[0].raw_output)
        return Branch(
            site,
            heads,
            width,
            (*way.resizes, *resize, *(one for entry in more for one in entry or ())),
            tuple(way.scales),
            inner,
            way.shared,
            tuple(way.tables),
            tuple(way.caches),
            tuple(way.computed),
            way.axes,
        )

    def joined(
        self, name: str, value: Branch, flat: bool = False
    ) -> tuple[Site, tuple[Resize, ...], tuple[str, ...]] | None:
        """Go on from the heads to the layer that reads all of them side by side; ``flat``: they are by now."""
        turned: tuple[int, ...] = (0, 1, 2, 3)
        resizes: tuple[Resize, ...] | None = () if flat else None
        between = [name]
        while True:
            site = self.read.get((self.scope.path, name))
            if site is not None and resizes is not None:
                fits = (
                    site.weight.shape[0] == value.heads * value.shared * value.width and not site.uses[0].dynamic_bias
                )
                return (site, resizes, tuple(between)) if fits and self.only(name, set()) else None
            node = self.reader(name)
            if node is None:
                return None
            if node.op_type == "Transpose" and resizes is None:
                permutation = attribute_list(node, "perm")
                if len(permutation) != 4:
                    return None
                turned = tuple(turned[axis] for axis in permutation)
            elif node.op_type == "Reshape" and resizes is None and turned == SPLIT and node.input[0] == name:
                heads = value.heads * value.shared
                resizes = self.resize(node, heads * value.width, heads)
                if resizes is None:
                    return None
            elif resizes is not None and self.is_flat(node) and node.input[0] == name:
                heads = value.heads * value.shared
                more = self.resize(node, heads * value.width, heads)
                if more is None:
                    return None
                resizes = (*resizes, *more)
            elif node.op_type not in PASSES_ON:
                return None
            name = node.output[0]
            between.append(name)
