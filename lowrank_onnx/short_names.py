"""Tensors under the shortest names there are: in a file whose weights lie elsewhere most bytes are names."""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterator

from onnx import GraphProto, ModelProto

from lowrank_onnx.model import subgraphs


def shorten_names(model: ModelProto) -> None:
    """Rename every tensor of a model but its inputs and outputs, inside its subgraphs as well; changes the model.

    Nodes keep their names, and functions, which see no tensor from outside, theirs. One name becomes one name
    wherever it stands, so that what a subgraph reads of the graph around it, or hides of it, stays the same.
    """
    kept = {"", *(value.name for value in (*model.graph.input, *model.graph.output))}
    short: dict[str, str] = {name: name for name in kept}
    fresh = (name for name in _names() if name not in kept)

    def renamed(name: str) -> str:
        if name not in short:
            short[name] = next(fresh)
        return short[name]

    for graph in _graphs(model.graph):
        for node in graph.node:
            node.input[:] = [renamed(name) for name in node.input]
            node.output[:] = [renamed(name) for name in node.output]
        for named in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
            named.name = renamed(named.name)
        for sparse in graph.sparse_initializer:
            sparse.values.name = renamed(sparse.values.name)
        for note in graph.quantization_annotation:
            note.tensor_name = renamed(note.tensor_name)
            for entry in note.quant_parameter_tensor_names:
                entry.value = renamed(entry.value)


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for node in graph.node:
        for _, inner in subgraphs(node):
            yield from _graphs(inner)


def _names() -> Iterator[str]:
    """a, b, ... Z, aa, ab and so on."""
    for length in itertools.count(1):
        yield from map("".join, itertools.product(string.ascii_letters, repeat=length))
