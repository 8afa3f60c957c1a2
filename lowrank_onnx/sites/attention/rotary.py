"""Rotary positions that are spelled out: products with cosines and sines, and halves put in each other's place."""

from __future__ import annotations

from onnx import NodeProto

from lowrank_onnx.shapes import shape_of
from lowrank_onnx.sites.attention.look import Look, follow
from lowrank_onnx.sites.attention.records import Resize, Swap, Table, Way
from lowrank_onnx.sites.weights import attribute, attribute_list
from lowrank_onnx.sites.widths import Widths


class Rotary(Look):
    """A graph in which rotary positions are understood."""

    def rotated(self, node: NodeProto, way: Way) -> tuple[str, set[str]] | None:
        """Read ``x * cos + swapped(x) * sin``; where x comes from."""
        products = [self.scope.producers.get(name) for name in node.input]
        if way.tables or way.place(3) != 3 or any(entry is None or entry.op_type != "Mul" for entry in products):
            return None
        pairs = [entry for entry in products if entry is not None]
        for first, second in (pairs, reversed(pairs)):
            for place in (0, 1):
                swap = self.swapped(second.input[place])
                if swap is None or swap.front.input[0] not in first.input:
                    continue
                x = swap.front.input[0]
                if not all(self.only(entry.output[0], set()) for entry in (*swap.nodes, first, second)):
                    continue
                way.axes[x] = (4, 3)
                tables = (first.input[1 - list(first.input).index(x)], second.input[1 - place])
                width = self.columns(tables[0])
                if width is None or width != self.columns(tables[1]) or not self.halves(swap, way, width):
                    continue
                way.tables = [
                    Table(first.name, x, first.output[0], tables[0], swap.interleaved),
                    Table(second.name, second.input[place], second.output[0], tables[1], swap.interleaved),
                ]
                way.resizes += swap.resizes
                way.between += [entry.output[0] for entry in (*swap.nodes, first, second)]
                return x, {first.name, swap.back.name, swap.front.name}
        return None

    def swapped(self, name: str) -> Swap | None:
        """Read ``concat(-x[half:], x[:half])``, or of pairs ``stack(-x[1::2], x[::2])`` with the last axes joined."""
        last = self.scope.producers.get(name)
        interleaved = last is not None and last.op_type == "Reshape"
        joined = self.scope.producers.get(last.input[0]) if interleaved and last is not None else last
        if last is None or joined is None or joined.op_type != "Concat" or len(joined.input) != 2:
            return None
        rank = 5 if interleaved else 4
        if int(attribute(joined, "axis", 0)) % rank != rank - 1:
            return None
        nodes, parts = [last, joined], [self.scope.producers.get(source) for source in joined.input]
        if interleaved:
            lifted = [part for part in parts if part is not None and self.is_lifted(part)]
            nodes, parts = nodes + lifted, [self.scope.producers.get(part.input[0]) for part in lifted]
        resizes = self.joined_pairs(last) if interleaved else ()
        if len(parts) != 2 or parts[0] is None or parts[0].op_type != "Neg" or resizes is None:
            return None
        back, front = self.scope.producers.get(parts[0].input[0]), parts[1]
        if (
            back is None
            or front is None
            or {back.op_type, front.op_type} != {"Slice"}
            or back.input[0] != front.input[0]
        ):
            return None
        return Swap(back, front, (*nodes, parts[0], back, front), interleaved, resizes)

    def is_lifted(self, node: NodeProto) -> bool:
        """Whether an Unsqueeze puts an axis of one behind the four there are."""
        if node.op_type != "Unsqueeze":
            return False
        axes = attribute_list(node, "axes") if self.model.opset < 13 else self.numbers(node.input[1])
        return axes in ((-1,), (4,))

    def joined_pairs(self, node: NodeProto) -> tuple[Resize, ...] | None:
        """How the Reshape follows the width that makes (..., d) of (..., d / 2, 2); None for any other."""
        made = shape_of(self.shapes, self.scope, node.output[0])
        pieces = self.pieces(node.input[1])
        if made is None or len(made) != 4 or pieces is None:
            return None
        if shape_of(self.shapes, self.scope, node.input[0]) != (*made[:3], made[3] // 2, 2):
            return None
        return follow(node, pieces, made[3], 1)

    def halves(self, swap: Swap, way: Way, width: int) -> bool:
        """Whether two Slices of the last axis take one half of the columns each, whatever the width is."""
        widths = Widths(self.model, self.scope, way.axes)
        for tried in (width, width - 2, 2 * width):
            parts = [[widths.at(name, tried) for name in node.input[1:]] for node in (swap.back, swap.front)]
            if any(entry is None or len(entry) != 1 for part in parts for entry in part) or len(parts[0]) < 3:
                return False
            (start, end, *axes), (first, stop, *same) = ([float(entry[0]) for entry in part if entry is not None]
                                                         for part in parts)  # fmt: skip
            step = 2 if swap.interleaved else 1
            if any(entry[0] not in (3, -1) or (entry[1:] or [1]) != [step] for entry in (axes, same)):
                return False
            if swap.interleaved:
                known = (start, first) == (1, 0) and stop >= tried - 1
            else:
                known = (start, first, stop) == (tried // 2, 0, tried // 2)
            if not known or end < tried:
                return False
        return True
