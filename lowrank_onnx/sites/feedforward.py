"""Compound sites of kind ``feedforward``: linear layers into hidden units, an activation, a linear layer out.

Between the layers every node works unit by unit, so that hidden units can be taken out of all of them.
The weight is that of the layer out, (F, N); attribute ``into`` holds the sites that make the hidden units
(two of them in a gated layer), ``out`` the site that reads them, ``between`` the names of the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnx import NodeProto

from lowrank_onnx.base import Site
from lowrank_onnx.model import Model, Scope
from lowrank_onnx.sites.shared_input import is_plain

# Each works on every element by itself, whatever stands beside it.
_ELEMENTWISE = frozenset(
    [
        "Abs",
        "Add",
        "BiasGelu",
        "Cast",
        "Celu",
        "Clip",
        "Div",
        "Dropout",
        "Elu",
        "Erf",
        "Exp",
        "FastGelu",
        "Gelu",
        "HardSigmoid",
        "HardSwish",
        "Identity",
        "LeakyRelu",
        "Log",
        "Max",
        "Min",
        "Mish",
        "Mul",
        "Neg",
        "Pow",
        "QuickGelu",
        "Relu",
        "Selu",
        "Sigmoid",
        "Softplus",
        "Softsign",
        "Sqrt",
        "Sub",
        "Swish",
        "Tanh",
        "ThresholdedRelu",
    ]
)


def find(model: Model, singles: Sequence[Site]) -> list[Site]:
    """Return one site per layer out whose input is made of hidden units only."""
    plain = [site for site in singles if is_plain(site)]
    made = {(site.uses[0].scope, site.uses[0].output): site for site in plain}
    scopes = {scope.path: scope for scope in model.scopes}
    sites = []
    for out in plain:
        region = _region(model, scopes[out.uses[0].scope], out, made)
        if region is not None:
            sites.append(_join(out, *region))
    return sites


def _region(
    model: Model, scope: Scope, out: Site, made: Mapping[tuple[str, str], Site]
) -> tuple[list[Site], list[str]] | None:
    """The layers that make the hidden units, and the tensors in between; None if anything else is there."""
    into: list[Site] = []
    nodes: list[NodeProto] = []
    tensors: list[str] = []
    stack = [out.uses[0].input]
    while stack:
        name = stack.pop()
        if name in tensors:
            continue
        tensors.append(name)
        site = made.get((scope.path, name))
        if site is not None:
            into.append(site)
            continue
        node = scope.producers.get(name)
        if node is None or node.op_type not in _ELEMENTWISE:
            return None
        nodes.append(node)
        for source in filter(None, node.input):
            constant = model.constant(scope, source)
            if constant is None:
                stack.append(source)
            elif constant.value.size != 1:
                return None  # a value per unit would have to be cut as well
    width = out.weight.shape[0]
    if not into or out in into or any(site.weight.shape[1] != width or site.uses[0].dynamic_bias for site in into):
        return None
    inside = {node.name for node in nodes} | {out.uses[0].node}
    outputs = {value.name for value in scope.graph.output}
    for name in tensors:
        if name in outputs or any(reader.node.name not in inside for reader in scope.readers.get(name, ())):
            return None
    hidden = [name for node in nodes for name in node.output if name]
    return into[::-1], [*tensors, *(name for name in hidden if name not in tensors)]


def _join(out: Site, into: Sequence[Site], between: Sequence[str]) -> Site:
    macs = [site.macs for site in (*into, out)]
    return Site(
        name=f"{into[0].name}>{out.name}",
        kind="feedforward",
        op=out.op,
        shape=(into[0].weight.shape[0], *out.weight.shape),
        weight=out.weight,
        uses=out.uses,
        parameters=sum(site.parameters for site in (*into, out)),
        freed=sum(site.freed for site in (*into, out)),
        macs=None if None in macs else sum(entry for entry in macs if entry is not None),
        attributes={"into": tuple(into), "out": out, "between": tuple(between)},
        parts=tuple(site.name for site in (*into, out)),
    )
