"""The halves around one node that holds a whole block but its layers."""

from __future__ import annotations

from dataclasses import replace

from onnx import NodeProto

from lowrank_onnx.base import Site
from lowrank_onnx.shapes import shape_of
from lowrank_onnx.sites.attention.halves import Halves, half_site, work
from lowrank_onnx.sites.attention.nodes import PAST_AT, Turned, fused_heads, key_heads, keys_seen, turned_inside
from lowrank_onnx.sites.attention.records import SPLIT, Branch, Cache
from lowrank_onnx.sites.weights import attribute


class Fused(Halves):
    """A graph in which the halves around fused nodes are found as well."""

    def fused(self, node: NodeProto) -> list[Site]:
        """The halves around one node that holds the whole block but its layers."""
        heads = fused_heads(node) or 0
        groups = key_heads(node)
        query = self.source(node.input[0], heads)
        key, value = (self.source(name, groups) for name in node.input[1:3])
        caches = self.held_in(node)
        if caches is None:
            return []
        asked = shape_of(self.shapes, self.scope, node.input[0])
        keys = keys_seen(node, lambda name: shape_of(self.shapes, self.scope, name))
        scores = None if asked is None or keys is None or len(asked) < 3 else (asked[0], heads, asked[-2], keys)
        found = []
        if query is not None and key is not None and query.site is not key.site and query.width == key.width:
            parts = (query.site, key.site)
            scales = (*query.scales, *key.scales)
            given = any(entry.name == "scale" and entry.f for entry in node.attribute)
            site = half_site(
                "scores",
                parts,
                query,
                work(parts, scores, query.width),
                resizes=(*query.resizes, *key.resizes),
                scales=scales,
                usual=not given and not scales,
                between=(*query.between, *key.between),
                region=((query.site.uses[0].input, key.site.uses[0].input, node.input[2]), node.output[0]),
                groups=groups,
                caches=caches[0],
                refusal=self.refusal(caches[0]),
            )
            found.append(site)
        flat = (self.scope.path, node.input[2]) in self.made
        value = None if value is None else replace(value, shared=heads // groups)
        joined = None if value is None or value.scales else self.joined(node.output[0], value, flat)
        if value is None or joined is None or joined[0] is value.site:
            return found
        last, resizes, between = joined
        site = half_site(
            "values",
            (value.site, last),
            value,
            work((value.site, last), scores, value.width),
            resizes=(*value.resizes, *resizes),
            scales=(),
            usual=False,
            between=(*value.between, *between),
            region=((value.site.uses[0].input, *node.input[:2]), last.uses[0].output),
            groups=groups,
            caches=caches[1],
            refusal=self.refusal(caches[1]),
        )
        return [*found, site]

    def whole(self, node: NodeProto) -> list[Site]:
        """Both halves around a node that wants queries, keys and values of one width; none if one is not understood."""
        halves = self.fused(node)
        if len(halves) != 2 or halves[0].attributes["width"] != halves[1].attributes["width"]:
            return []
        tables: tuple[Turned, ...] = ()
        if attribute(node, "do_rotary", 0):
            turned = turned_inside(node)
            if self.columns(turned.cosines) != self.columns(turned.sines):
                return []
            if self.columns(turned.cosines) != halves[0].attributes["width"] // 2:  # the others stay as they are
                return []
            tables = (turned,)
            halves[0] = replace(halves[0], attributes={**halves[0].attributes, "tables": tables})
        scores, values = halves
        parts = (*scores.attributes["parts"], *values.attributes["parts"])
        caches = (*scores.attributes["caches"], *values.attributes["caches"])
        return [
            replace(
                values,
                name=f"{parts[0].name}~{parts[3].name}",
                uses=(*scores.uses, *values.uses),
                parameters=sum(part.parameters for part in parts),
                freed=sum(part.freed for part in parts),
                macs=None if scores.macs is None or values.macs is None else scores.macs + values.macs,
                attributes={
                    **values.attributes,
                    "half": "whole",
                    "halves": (scores, values),
                    "parts": parts,
                    "step": 16 if tables else 8,
                    "between": (*scores.attributes["between"], *values.attributes["between"]),
                    "region": (tuple({part.uses[0].input: None for part in parts[:3]}), parts[3].uses[0].output),
                    "tables": tables,
                    "caches": caches,
                    "refusal": self.refusal(caches),
                },
                parts=tuple(part.name for part in parts),
            )
        ]

    def held_in(self, node: NodeProto) -> tuple[tuple[Cache, ...], tuple[Cache, ...]] | None:
        """The caches of keys and of values of a fused node; None where they are no input and output of the model."""
        found: list[tuple[Cache, ...]] = []
        for slot, place in zip(PAST_AT[node.op_type], (1, 2), strict=True):
            past = node.input[slot] if slot < len(node.input) else ""
            present = node.output[place] if place < len(node.output) else ""
            if past and (past not in self.inputs or not self.only(past, {node.name}) or present not in self.outputs):
                return None
            if any(entry.node.op_type != "Shape" for entry in self.scope.readers.get(present, ()) if present):
                return None
            names = [name for name in (past, present) if name in self.inputs or name in self.outputs]
            found.append(tuple(Cache(name, 3) for name in names))
        return found[0], found[1]

    def source(self, name: str, heads: int) -> Branch | None:
        """The layer whose output a fused node reads: as it is, or split into heads."""
        site = self.made.get((self.scope.path, name))
        if site is None:
            branch = self.branch(name, SPLIT)
            return branch if branch is not None and branch.heads == heads else None
        width = site.weight.shape[1] // heads
        if not self.read_once(name) or site.uses[0].dynamic_bias or width * heads != site.weight.shape[1] or width < 2:
            return None
        return Branch(site, heads, width, (), (), (name, site.uses[0].raw_output))
