"""Compound sites of kind ``shared_input``: several linear weights that read the same tensor.

Query, key and value of an attention block, or gate and up of a gated feed-forward layer. The weight is
all of them side by side, (K, N1 + N2 + ...); attribute ``parts`` holds the single sites.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lowrank_onnx.base import Site


def find(singles: Sequence[Site]) -> list[Site]:
    """Return one site per tensor that two or more plain linear sites read."""
    groups: dict[tuple[str, str, str], list[Site]] = {}
    for site in singles:
        if is_plain(site):
            use = site.uses[0]
            groups.setdefault((use.scope, use.input, site.weight.dtype.str), []).append(site)
    return [_join(group) for group in groups.values() if len(group) > 1]


def is_plain(site: Site) -> bool:
    """A linear site with one use and a 2-D constant on the right: ``x @ W``."""
    return (
        site.kind == "linear"
        and len(site.uses) == 1
        and site.weight.ndim == 2
        and site.attributes["side"] == "right"
        and not site.attributes["data_transposed"]
    )


def _join(group: Sequence[Site]) -> Site:
    weight = np.concatenate([site.weight for site in group], axis=1)
    macs = [site.macs for site in group]
    return Site(
        name=f"{group[0].name}+{len(group) - 1}",
        kind="shared_input",
        op=group[0].op,
        shape=weight.shape,
        weight=weight,
        uses=tuple(site.uses[0] for site in group),
        parameters=sum(site.parameters for site in group),
        freed=sum(site.freed for site in group),
        macs=None if None in macs else sum(entry for entry in macs if entry is not None),
        attributes={"parts": tuple(group)},
        parts=tuple(site.name for site in group),
    )
