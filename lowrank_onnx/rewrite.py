"""Carry out replacements on a copy of a model. The only module that changes a graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import GraphProto, ModelProto, NodeProto
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

from lowrank_onnx.base import Replacement
from lowrank_onnx.errors import ModelError
from lowrank_onnx.linalg import Array
from lowrank_onnx.model import Model, Scope, index_scopes, subgraphs

FIRST_IR_WITH_FREE_INITIALIZERS = 4


def rewrite(model: Model, replacements: Sequence[Replacement]) -> ModelProto:
    """Return a copy of the model with every replacement carried out.

    Constants of the new nodes become initializers of the main graph, each name once. Whatever only the
    removed nodes read is gone afterwards; everything else, names and order included, stays as it was.
    """
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    scopes = {scope.path: scope for scope in index_scopes(proto)}
    naming = _Naming(scopes.values())
    constants: dict[str, Array] = {}
    orphans: list[tuple[str, str]] = []
    for path, group in _by_scope(replacements).items():
        graph = scopes[path].graph
        removed = {name for entry in group for name in entry.remove}
        gone = [node for node in graph.node if node.name in removed]
        assert len(gone) == len(removed), f"replacement removes unknown nodes {removed - {n.name for n in gone}}"
        replaced = {name for node in gone for name in node.output}
        orphans += [(path, name) for node in gone for name in node.input if name]
        places = {node.name: place for place, node in enumerate(graph.node)}
        inserted: list[tuple[int, NodeProto]] = []
        for entry in group:
            place = min(places[name] for name in entry.remove)
            for node in entry.nodes:
                inserted.append((place, _export(node, replaced, naming, constants)))
        kept = [(place, node) for place, node in enumerate(graph.node) if node.name not in removed]
        _set_nodes(graph, [node for _, node in sorted(inserted + kept, key=lambda pair: pair[0])])
        _drop_value_info(graph, {name for entry in group for name in entry.reshaped})
    sizes = {name: (axis, size) for entry in replacements for name, axis, size in entry.resized}
    for value in (*proto.graph.input, *proto.graph.output):
        if value.name in sizes and value.type.tensor_type.HasField("shape"):
            axis, size = sizes[value.name]
            value.type.tensor_type.shape.dim[axis].dim_value = size
    for name, array in constants.items():
        _add_initializer(proto, name, array)
    _prune(proto, orphans)
    for scope in index_scopes(proto):
        _drop_value_info(scope.graph, {value.name for value in scope.graph.value_info} - set(_names(scope)))
    changed = {entry.scope for entry in replacements}
    for scope in index_scopes(proto):
        if scope.path in changed:
            _sort(scope.graph)
    return proto


def set_initializers(proto: ModelProto, values: Mapping[str, Array]) -> None:
    """Give initializers of the main graph new values, in place. Shapes may differ from before."""
    for tensor in proto.graph.initializer:
        if tensor.name in values:
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(values[tensor.name]), tensor.name))


def _by_scope(replacements: Sequence[Replacement]) -> dict[str, list[Replacement]]:
    groups: dict[str, list[Replacement]] = {}
    for entry in replacements:
        groups.setdefault(entry.scope, []).append(entry)
    return groups


def _names(scope: Scope) -> Iterable[str]:
    yield from scope.producers
    yield from scope.initializers
    yield from scope.inputs


class _Naming:
    """Names that are taken, and what new tensors are called whose names were taken."""

    def __init__(self, scopes: Iterable[Scope]) -> None:
        self.tensors: set[str] = set()
        self.nodes: set[str] = set()
        for scope in scopes:
            self.tensors.update(_names(scope))
            self.nodes.update(node.name for node in scope.graph.node)
        self.renamed: dict[str, str] = {}


def _free(name: str, taken: set[str]) -> str:
    """The name, or with a number behind it; taken from now on."""
    found, number = name, 1
    while found in taken:
        found, number = f"{name}_{number}", number + 1
    taken.add(found)
    return found


def _export(node: gs.Node, replaced: set[str], naming: _Naming, constants: dict[str, Array]) -> NodeProto:
    """Turn a node into its stored form, with names nobody else has; ``replaced`` tensors keep theirs.

    Raises:
        ModelError: A constant's name is taken: it is what a plan and a refit know the constant by.
    """
    proto: NodeProto = OnnxExporter.export_node(node)
    proto.name = _free(proto.name, naming.nodes)
    for place, tensor in enumerate(node.inputs):
        if not isinstance(tensor, gs.Constant):
            proto.input[place] = naming.renamed.get(tensor.name, tensor.name)
            continue
        if tensor.name in naming.tensors and tensor.name not in constants:
            raise ModelError(f"the model has a tensor '{tensor.name}', the name a factor needs; rename it")
        naming.tensors.add(tensor.name)
        constants.setdefault(tensor.name, tensor.values)
    for place, name in enumerate(proto.output):
        if name and name not in replaced:
            naming.renamed[name] = proto.output[place] = _free(name, naming.tensors)
    return proto


def _set_nodes(graph: GraphProto, nodes: Sequence[NodeProto]) -> None:
    copies = []
    for node in nodes:
        copy = NodeProto()
        copy.CopyFrom(node)
        copies.append(copy)
    del graph.node[:]
    graph.node.extend(copies)


def _drop_value_info(graph: GraphProto, names: set[str]) -> None:
    kept = [value for value in graph.value_info if value.name not in names]
    if len(kept) < len(graph.value_info):
        copies = []
        for value in kept:
            copy = onnx.ValueInfoProto()
            copy.CopyFrom(value)
            copies.append(copy)
        del graph.value_info[:]
        graph.value_info.extend(copies)


def _add_initializer(proto: ModelProto, name: str, array: Array) -> None:
    tensor = onnx.numpy_helper.from_array(np.asarray(array, order="C"), name)
    proto.graph.initializer.append(tensor)
    if proto.ir_version < FIRST_IR_WITH_FREE_INITIALIZERS:  # the format of that time lists them as inputs too
        proto.graph.input.append(onnx.helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))


def _prune(proto: ModelProto, orphans: list[tuple[str, str]]) -> None:
    """Remove what nobody reads any more: nodes that fed only removed nodes, and unread initializers."""
    while orphans:
        scopes = {scope.path: scope for scope in index_scopes(proto)}
        dead: dict[str, set[str]] = {}
        following: list[tuple[str, str]] = []
        for path, name in orphans:
            owner = scopes[path].owner(name) if path in scopes else None
            node = owner.producers.get(name) if owner is not None else None
            if owner is None or node is None or not _is_unread(owner, node):
                continue
            dead.setdefault(owner.path, set()).add(node.name)
            following += [(owner.path, source) for source in node.input if source]
            # A node with a body also read what its body took from outside.
            following += [(owner.path, source) for source in _captured(node)]
        for path, names in dead.items():
            graph = scopes[path].graph
            _set_nodes(graph, [node for node in graph.node if node.name not in names])
        orphans = following if dead else []
    for scope in index_scopes(proto):
        outputs = {value.name for value in scope.graph.output}
        unread = {name for name in scope.initializers if name not in scope.readers and name not in outputs}
        if unread:
            _drop_initializers(scope.graph, unread)


def _is_unread(owner: Scope, node: NodeProto) -> bool:
    outputs = {value.name for value in owner.graph.output}
    return not any(name in outputs or owner.readers.get(name) for name in node.output if name)


def _captured(node: NodeProto) -> Iterable[str]:
    for _, inner in subgraphs(node):
        for entry in inner.node:
            yield from (name for name in entry.input if name)
            yield from _captured(entry)


def _drop_initializers(graph: GraphProto, names: set[str]) -> None:
    for field in (graph.initializer, graph.input):
        for place in range(len(field) - 1, -1, -1):
            if field[place].name in names:
                del field[place]


def _sort(graph: GraphProto) -> None:
    """Order nodes so that each comes after what it reads; nodes that are in order keep their places."""
    produced = {name for node in graph.node for name in node.output if name}
    done: set[str] = set()
    order: list[NodeProto] = []
    waiting = list(graph.node)
    while waiting:
        later = []
        for node in waiting:
            needs = {name for name in (*node.input, *_captured(node)) if name in produced}
            if needs <= done:
                order.append(node)
                done.update(node.output)
            else:
                later.append(node)
        assert len(later) < len(waiting), "replacement makes a cycle"
        waiting = later
    _set_nodes(graph, order)
