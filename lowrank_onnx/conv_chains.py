"""Nodes that carry out a chain of small convolutions in the place of one.

Every kernel axis belongs to one link of the chain, and takes its stride, padding and dilation along; the
others see kernel 1, stride 1 and no padding on it. ``auto_pad`` works axis by axis, so it is passed on as it
is and holds for every size of the map. Only the last link has a bias: one before padding would be missing at
the border.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from lowrank_onnx.base import Replacement, Site, Use
from lowrank_onnx.chains import store
from lowrank_onnx.linalg import Array


@dataclass(frozen=True, slots=True)
class Link:
    """One convolution of a chain.

    Attributes:
        role: What its constant is called.
        axes: The kernel axes it covers.
        shape: (groups, outputs, inputs, *kernel), outputs and inputs of one group.
    """

    role: str
    axes: tuple[int, ...]
    shape: tuple[int, ...]


def stored(blocks: Array, transposed: bool) -> Array:
    """The inverse of ``patches.blocks_of``."""
    parts = np.swapaxes(blocks, 1, 2) if transposed else blocks
    return np.ascontiguousarray(parts.reshape(-1, *parts.shape[2:]))


def multiply_out(chain: Sequence[Array]) -> Array:
    """The kernel (groups, outputs, inputs, *kernel) that a chain of blocks amounts to, from the input on.

    A link of more groups than the one ahead shares its channels out, depthwise one to each; a link of fewer reads
    what several groups give, side by side.
    """
    return reduce(_compose, chain)


def _compose(first: Array, second: Array) -> Array:
    groups = max(len(first), len(second))
    # (few, outputs, several · r, *kernel) -> (few · several, outputs, r, *kernel)
    reads = second.reshape(len(second), second.shape[1], groups // len(second), -1, *second.shape[3:])
    reads = np.moveaxis(reads, 2, 1).reshape(groups, second.shape[1], -1, *second.shape[3:])
    gives = first.reshape(groups, -1, *first.shape[2:])
    left = np.moveaxis(reads, (0, 1, 2), (-3, -2, -1))  # (*kernel, groups, outputs, r)
    right = np.moveaxis(gives, (0, 1, 2), (-3, -2, -1))  # (*kernel, groups, r, inputs)
    product = np.moveaxis(left @ right, (-3, -2, -1), (0, 1, 2))  # (groups, outputs, inputs, *kernel)
    if len(second) >= len(first):  # groups that read the same inputs lie one behind the other
        return product.reshape(len(first), -1, *product.shape[2:])
    beside = np.moveaxis(product.reshape(len(second), -1, *product.shape[1:]), 1, 2)
    return beside.reshape(len(second), product.shape[1], -1, *product.shape[3:])


def balanced_chain(chain: Sequence[Array]) -> list[Array]:
    """Share the scale of every channel between evenly, so that half precision does not overflow.

    Args:
        chain: Blocks from the input on; a depthwise link is left as it is.
    """
    made = list(chain)
    for place in range(len(made) - 1):
        first, second = made[place], made[place + 1]
        if len(first) != len(second):
            continue
        into = np.linalg.norm(np.moveaxis(first, 1, 0).reshape(first.shape[1], -1), axis=1)
        out = np.linalg.norm(np.moveaxis(second, 2, 0).reshape(second.shape[2], -1), axis=1)
        scale = np.sqrt(np.divide(out, into, out=np.ones_like(out), where=(into > 0) & (out > 0)))
        trail = (1,) * (first.ndim - 3)
        made[place] = first * scale.reshape(1, -1, 1, *trail)
        made[place + 1] = second / scale.reshape(1, 1, -1, *trail)
    return made


def chain_parameters(links: Sequence[Link]) -> int:
    """Elements of all weights."""
    return sum(math.prod(link.shape) for link in links)


def chain_macs(site: Site, links: Sequence[Link]) -> int | None:
    """Multiply-accumulates of one run over all uses; None where a shape is unknown."""
    total = 0
    for use in site.uses:
        if use.input_shape is None or use.output_shape is None:
            return None
        size = list(use.input_shape[2:])
        for link in links:
            before = math.prod(size)
            for axis in link.axes:
                size[axis] = use.output_shape[2 + axis]
            positions = before if site.attributes["transposed"] else math.prod(size)
            total += use.input_shape[0] * positions * math.prod(link.shape)
    return total


def convolution_chain(
    site: Site, use: Use, links: Sequence[Link], weights: Sequence[Array], bias: Array | None
) -> Replacement:
    """Replace one use of a convolution by a chain of convolutions.

    Args:
        site: A convolution site.
        use: One of its uses.
        links: From the input on; together they cover every kernel axis once.
        weights: The constants of the links, as ONNX stores them; shared by all uses.
        bias: (O,) the whole bias; None keeps what the node has now.
    """
    nodes = []
    current = gs.Variable(use.input)
    for place, (link, weight) in enumerate(zip(links, weights, strict=True)):
        last = place == len(links) - 1
        inputs = [current, gs.Constant(f"{site.name}/{link.role}", store(weight, site))]
        if last and bias is not None:
            inputs.append(gs.Constant(f"{use.node}/bias", store(bias, site)))
        elif last and site.attributes["addends"][use.node]:
            inputs.append(gs.Variable(site.attributes["addends"][use.node]))
        current = gs.Variable(use.output if last else f"{use.node}/rank{place or ''}")
        name = f"{use.node}/factor_last" if last else f"{use.node}/factor{place}"
        nodes.append(gs.Node(site.op, name, link_attributes(site, link), inputs, [current]))
    return Replacement(use.scope, (use.node,), tuple(nodes))


def link_attributes(site: Site, link: Link) -> dict[str, Any]:
    """The attributes of a link's node: those of the site on the axes it covers, neutral ones elsewhere."""
    entry = site.attributes
    dims = len(site.weight.shape) - 2

    def on_axes(values: Sequence[int], neutral: int) -> list[int]:
        return [int(values[axis]) if axis in link.axes else neutral for axis in range(dims)]

    made: dict[str, Any] = {
        "kernel_shape": list(link.shape[3:]),
        "strides": on_axes(entry["strides"], 1),
        "dilations": on_axes(entry["dilations"], 1),
        "group": link.shape[0],
    }
    if entry["auto_pad"] == "NOTSET":
        made["pads"] = on_axes(entry["pads"][:dims], 0) + on_axes(entry["pads"][dims:], 0)
    else:
        made["auto_pad"] = entry["auto_pad"]
    if entry["transposed"] and any(entry["output_padding"]):
        made["output_padding"] = on_axes(entry["output_padding"], 0)
    return made
