"""Several models in one file: their nodes under names of their own, their weights stored once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence

from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from lowrank_onnx.errors import ModelError
from lowrank_onnx.model import subgraphs, uses_external_data

FIRST_OPSET = 11  # of ScatterND, and of If with the rules of today
FIRST_IR = 4  # from here on initializers need not be inputs


class Composition:
    """A graph that grows from parts of models that answer the same inputs with the same outputs.

    Args:
        source: The model whose inputs, outputs and description the composition has.

    Raises:
        ModelError: The operator set of the model is too old.
    """

    def __init__(self, source: ModelProto) -> None:
        opset = next((entry.version for entry in source.opset_import if entry.domain in ("", "ai.onnx")), 1)
        if opset < FIRST_OPSET:
            raise ModelError(
                f"several levels in one file need operator set {FIRST_OPSET} or newer, the model has {opset}; "
                "convert it with onnx.version_converter"
            )
        self.opset = opset
        self.proto = ModelProto()
        self.proto.CopyFrom(source)
        graph = self.proto.graph
        for field in (graph.node, graph.initializer, graph.value_info, graph.quantization_annotation):
            del field[:]
        self.proto.ir_version = max(source.ir_version, FIRST_IR)
        self._stored: dict[bytes, str] = {}
        self._taken = {name for value in graph.input for name in [value.name]}
        if source.ir_version < FIRST_IR:  # the format of that time lists every initializer as an input
            known = {tensor.name for tensor in source.graph.initializer}
            kept = [value for value in graph.input if value.name not in known]
            self._taken = {value.name for value in kept}
            _replace(graph, kept)
        self.outputs = tuple(value.name for value in graph.output)
        self._taken.update(self.outputs)

    def add_constants(self, model: ModelProto, prefix: str) -> dict[str, str]:
        """Store the initializers of a model, equal ones once; return what they are called here.

        A name that is free is kept, so that the weights of the first model keep theirs.
        """
        self._add_imports(model)
        names = {}
        for tensor in model.graph.initializer:
            key = _identity(tensor)
            if key not in self._stored:
                name = tensor.name if tensor.name not in self._taken else f"{prefix}{tensor.name}"
                self._stored[key] = self.store(tensor, name)
            names[tensor.name] = self._stored[key]
        return names

    def store(self, tensor: TensorProto, name: str) -> str:
        """Store one tensor under a name nobody else has.

        Raises:
            ModelError: An input or output of the model has it, as those of a file made this way have.
        """
        if name in self._taken:
            raise ModelError(
                f"the model has a tensor '{name}' of its own; start from the original, or rename the tensor"
            )
        self._taken.add(name)
        copy = self.proto.graph.initializer.add()
        copy.CopyFrom(tensor)
        copy.name = name
        return name

    def _add_imports(self, model: ModelProto) -> None:
        known = {entry.domain for entry in self.proto.opset_import}
        self.proto.opset_import.extend(entry for entry in model.opset_import if entry.domain not in known)
        functions = {(entry.domain, entry.name) for entry in self.proto.functions}
        self.proto.functions.extend(entry for entry in model.functions if (entry.domain, entry.name) not in functions)


def instantiate(
    model: ModelProto, prefix: str, constants: Mapping[str, str], inputs: Mapping[str, str]
) -> tuple[list[NodeProto], dict[str, str]]:
    """Copy the nodes of a model under other names.

    Args:
        prefix: Goes before the name of every node and of every tensor the nodes make.
        constants: What the initializers are called where the nodes go.
        inputs: What the inputs are called there; the same as here where it is not told.

    Returns:
        The nodes, and what the outputs of the model are called.
    """
    names = {value.name: value.name for value in model.graph.input} | dict(constants) | dict(inputs)
    nodes = list(_renamed(model.graph, prefix, names))
    return nodes, {value.name: names[value.name] for value in model.graph.output}


def _renamed(graph: GraphProto, prefix: str, names: dict[str, str]) -> Iterator[NodeProto]:
    """Copies of the nodes; adds to ``names`` what they make."""
    for node in graph.node:
        names.update({name: f"{prefix}{name}" for name in node.output if name})
    for node in graph.node:
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.name = f"{prefix}{node.name}"
        for field in (copy.input, copy.output):
            for place, name in enumerate(field):
                field[place] = names.get(name, name)
        for _, inner in subgraphs(copy):
            _rename_body(inner, prefix, dict(names))
        yield copy


def _rename_body(graph: GraphProto, prefix: str, names: dict[str, str]) -> None:
    for entry in (*graph.input, *graph.initializer):
        names[entry.name] = f"{prefix}{entry.name}"
        entry.name = names[entry.name]
    nodes = list(_renamed(graph, prefix, names))
    for value in graph.output:
        value.name = names[value.name]
    del graph.value_info[:], graph.node[:]
    graph.node.extend(nodes)


def body(name: str, nodes: Sequence[NodeProto], outputs: Sequence[str], like: Sequence[ValueInfoProto]) -> GraphProto:
    """A branch of an If that gives ``outputs``, typed as ``like``; a copy, as a branch must make what it gives."""
    ends, values = [], []
    for place, (output, value) in enumerate(zip(outputs, like, strict=True)):
        end = f"{name}/result_{place}"
        ends.append(helper.make_node("Identity", [output], [end], name=f"{name}/give_{place}"))
        values.append(helper.make_tensor_value_info(end, value.type.tensor_type.elem_type, None))
    return helper.make_graph([*nodes, *ends], name, [], values)


def brought_in(model: ModelProto, constants: Mapping[str, str], prefix: str) -> tuple[list[NodeProto], dict[str, str]]:
    """Take initializers of the main graph into a branch: nodes that do so, and what they are called there.

    Fusions and layouts of onnxruntime look for a weight in the graph of the node that reads it, and leave the node
    as it is where they do not find it. A Slice over all of it is folded into a weight of the branch before they
    look; an Identity would be removed instead.
    """
    nodes: list[NodeProto] = []
    names = dict(constants)
    for tensor in model.graph.initializer:
        if tensor.dims:
            names[tensor.name] = f"{prefix}here/{tensor.name}"
            nodes += take_prefix(constants[tensor.name], names[tensor.name], tensor.dims)
    return nodes, names


def take_prefix(source: str, target: str, shape: Sequence[int]) -> list[NodeProto]:
    """Nodes of a branch that make the leading part of a tensor, of that shape."""
    nodes = []
    for role, values in (("from", [0] * len(shape)), ("to", list(shape))):
        value = helper.make_tensor("value", TensorProto.INT64, [len(shape)], values)
        nodes.append(helper.make_node("Constant", [], [f"{target}/{role}"], f"{target}/{role}", value=value))
    cut = helper.make_node("Slice", [source, f"{target}/from", f"{target}/to"], [target], f"{target}/prefix")
    return [*nodes, cut]


def _identity(tensor: TensorProto) -> bytes:
    """Equal for tensors of equal type, shape and bytes, whatever they are called."""
    copy = TensorProto()
    copy.CopyFrom(tensor)
    copy.name = copy.doc_string = ""
    content = copy.SerializeToString(deterministic=True)
    assert not uses_external_data(tensor) or len(content) < 1 << 16  # told by file and offset
    return hashlib.sha256(content).digest()


def _replace(graph: GraphProto, inputs: Sequence[ValueInfoProto]) -> None:
    copies = []
    for value in inputs:
        copy = ValueInfoProto()
        copy.CopyFrom(value)
        copies.append(copy)
    del graph.input[:]
    graph.input.extend(copies)
