"""The halves of a block whose products are spelled out."""

from __future__ import annotations

import math
from collections.abc import Sequence

from onnx import NodeProto

from lowrank_onnx.base import Site
from lowrank_onnx.shapes import shape_of
from lowrank_onnx.sites.attention.nodes import Turned
from lowrank_onnx.sites.attention.records import SPLIT, SPLIT_TURNED, Branch, Cache, Resize, Scale, Table
from lowrank_onnx.sites.attention.ways import Ways
from lowrank_onnx.sites.widths import Widths

_AS_USUAL = 1e-3


class Halves(Ways):
    """A graph in which the halves around a product are found."""

    def scores(self, product: NodeProto) -> Site | None:
        """The layers query and key of ``product = queries @ keysᵀ``."""
        query, key = (
            self.branch(name, turned) for name, turned in zip(product.input, (SPLIT, SPLIT_TURNED), strict=True)
        )
        if query is None or key is None or query.site is key.site:
            return None
        if query.heads != key.heads * key.shared or query.width != key.width or query.caches or query.shared > 1:
            return None
        turned = [{table.interleaved for table in branch.tables} for branch in (query, key)]
        if not self.before_softmax(product.output[0]) or turned[0] != turned[1]:
            return None
        behind = self.scales_behind(product.output[0])
        computed = bool(query.computed or key.computed)
        if computed and (query.scales or key.scales or behind or not self.is_usual(query, key)):
            return None
        parts = (query.site, key.site)
        scales = (*query.scales, *key.scales, *behind)
        last = behind[-1].output if behind else product.output[0]
        return half_site(
            "scores",
            parts,
            query,
            work(parts, shape_of(self.shapes, self.scope, product.output[0]), query.width),
            resizes=(*query.resizes, *key.resizes),
            scales=scales,
            usual=computed or _is_usual(scales, query.width),
            between=(*query.between, *key.between),
            region=((query.site.uses[0].input, key.site.uses[0].input), last),
            groups=key.heads,
            tables=(*query.tables, *key.tables),
            caches=key.caches,
            refusal=self.refusal(key.caches),
        )

    def is_usual(self, query: Branch, key: Branch) -> bool:
        """Whether the computed factors are ``1 / sqrt(width)`` together, whatever the width is."""
        widths = Widths(self.model, self.scope, {**query.axes, **key.axes})
        for tried in (query.width, query.width + 2, 2 * query.width):
            factors = [widths.at(name, tried) for name in (*query.computed, *key.computed)]
            if any(factor is None or factor.size != 1 for factor in factors):
                return False
            total = math.prod(float(factor[0]) for factor in factors if factor is not None)
            if not abs(total * math.sqrt(tried) - 1) < _AS_USUAL:
                return False
        return True

    def refusal(self, caches: Sequence[Cache]) -> str:
        """Why caches hold a half back."""
        if not caches or self.allow_io_change:
            return ""
        return f"input '{caches[0].name}' would change its width with the heads; allow it with --allow-io-change"

    def values(self, context: NodeProto) -> Site | None:
        """The layers value and output around ``context = attention @ values``, wherever the attention is from."""
        value = self.branch(context.input[1], SPLIT)
        if value is None or value.scales or value.tables or value.computed:
            return None
        joined = self.joined(context.output[0], value)
        if joined is None:
            return None
        out, resizes, between = joined
        parts = (value.site, out)
        if value.site is out:
            return None
        return half_site(
            "values",
            parts,
            value,
            work(parts, shape_of(self.shapes, self.scope, context.input[0]), value.width),
            resizes=(*value.resizes, *resizes),
            scales=(),
            usual=False,
            between=(*value.between, *between),
            region=((value.site.uses[0].input, context.input[0]), out.uses[0].output),
            groups=value.heads,
            caches=value.caches,
            refusal=self.refusal(value.caches),
        )


def work(parts: Sequence[Site], scores: Sequence[int] | None, width: int) -> int | None:
    """Multiply-accumulates of two layers and of the product that gives, or takes, scores of that shape."""
    macs = [site.macs for site in parts]
    if scores is None or any(entry is None for entry in macs):
        return None
    return sum(entry for entry in macs if entry is not None) + math.prod(scores) * width


def _is_usual(scales: Sequence[Scale], width: int) -> bool:
    total = math.prod(scale.factor for scale in scales)
    return bool(scales) and abs(total * math.sqrt(width) - 1) < _AS_USUAL


def half_site(
    half: str,
    parts: tuple[Site, Site],
    branch: Branch,
    macs: int | None,
    *,
    resizes: tuple[Resize, ...],
    scales: tuple[Scale, ...],
    usual: bool,
    between: tuple[str, ...],
    region: tuple[tuple[str, ...], str],
    groups: int = 0,
    tables: tuple[Table | Turned, ...] = (),
    caches: tuple[Cache, ...] = (),
    refusal: str = "",
) -> Site:
    """One half as a site; ``branch`` leads to its first layer, the rest are attributes of the site."""
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
            "heads": branch.heads * branch.shared,
            "groups": groups or branch.heads,
            "width": branch.width,
            "resizes": resizes,
            "scales": scales,
            "usual": usual,
            "between": between,
            "region": region,
            "tables": tables,
            "caches": caches,
            "refusal": refusal,
        },
        parts=tuple(part.name for part in parts),
    )
