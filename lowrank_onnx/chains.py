"""Nodes that carry out a chain of thin matrices in the place of one linear layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from lowrank_onnx.base import Replacement, Site, Use
from lowrank_onnx.linalg import Array


def balanced(first: Array, second: Array) -> tuple[Array, Array]:
    """Share the scale of each component between both factors, so that half precision does not overflow."""
    norms = np.linalg.norm(first, axis=-2)
    scale = np.sqrt(np.where(norms > 0, norms, 1.0))
    return first / scale[..., None, :], second * scale[..., :, None]


def store(array: Array, site: Site) -> Array:
    """Cast a factor to the dtype of the model, contiguous."""
    return np.ascontiguousarray(array, dtype=site.weight.dtype)


def linear_chain(site: Site, use: Use, matrices: Sequence[tuple[str, Array]], bias: Array | None) -> Replacement:
    """Replace one use of a linear site by ``x @ M1 @ M2 @ ... + bias``.

    Args:
        site: A linear site.
        use: One of its uses.
        matrices: (constant's name, matrix (*batch, K, r)) from the input on; a name is shared by all uses.
        bias: (N,) the whole bias of this use; None keeps whatever bias the graph has now.

    Returns:
        The replacement. A bias that changes stays in the operator it was in (the C of Gemm, the Add),
        so that whatever onnxruntime fused behind it is fused still.
    """
    left = site.attributes["side"] == "left"
    nodes: list[gs.Node] = []
    current = gs.Variable(use.input)
    if site.attributes["data_transposed"]:
        turned = gs.Variable(f"{use.node}/transposed")
        nodes.append(gs.Node("Transpose", f"{use.node}/transpose", {"perm": [1, 0]}, [current], [turned]))
        current = turned
    steps = [
        gs.Constant(name, store(np.swapaxes(matrix, -1, -2) if left else matrix, site)) for name, matrix in matrices
    ]
    for place, constant in enumerate(steps[:-1]):
        inner = gs.Variable(f"{use.node}/rank{place or ''}")
        inputs = [constant, current] if left else [current, constant]
        nodes.append(gs.Node("MatMul", f"{use.node}/factor{place}", {}, inputs, [inner]))
        current = inner
    last = [steps[-1], current] if left else [current, steps[-1]]
    remove, more = _finish(site, use, last, bias, left)
    return Replacement(use.scope, remove, tuple(nodes + more))


def _finish(
    site: Site, use: Use, last: list[gs.Tensor], bias: Array | None, left: bool
) -> tuple[tuple[str, ...], list[gs.Node]]:
    """The last product and the bias behind it."""
    extra = site.attributes[use.node]
    name = f"{use.node}/factor_last"
    if extra["op"] == "Gemm":
        if bias is not None:
            constant = gs.Constant(f"{use.node}/bias", store(bias[:, None] if left else bias, site))
            return (use.node,), [gs.Node("Gemm", name, {}, [*last, constant], [gs.Variable(use.output)])]
        if extra["addend"]:
            attributes = {"beta": extra["beta"]}
            inputs = [*last, gs.Variable(extra["addend"])]
            return (use.node,), [gs.Node("Gemm", name, attributes, inputs, [gs.Variable(use.output)])]
        return (use.node,), [gs.Node("MatMul", name, {}, last, [gs.Variable(use.output)])]
    if bias is None:
        return (use.node,), [gs.Node("MatMul", name, {}, last, [gs.Variable(use.raw_output)])]
    shape = extra["bias_shape"]
    if not extra["add"] or int(np.prod(shape)) != len(bias):  # none was stored, or one number for all outputs
        shape = (len(bias), 1) if left else (*(1,) * (len(shape) - 1), len(bias))
    constant = gs.Constant(f"{use.node}/bias", store(bias.reshape(shape), site))
    inner = gs.Variable(f"{use.node}/product")
    return (use.node, *use.also), [
        gs.Node("MatMul", name, {}, last, [inner]),
        gs.Node("Add", f"{use.node}/add", {}, [inner, constant], [gs.Variable(use.output)]),
    ]
