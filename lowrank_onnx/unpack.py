"""Take the layers out of com.microsoft Attention, which packs query, key and value into one constant.

    Attention(x, [Q K V], [q k v], mask)   becomes   MultiHeadAttention(x Q + q, x K + k, x V + v, mask)

Both are one kernel inside onnxruntime and take the same time; outside the node the layers can be found.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

_KEPT = ("mask_filter_value", "num_heads", "scale", "unidirectional")
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)


def unpack_attention(proto: ModelProto) -> None:
    """Unpack the nodes of the main graph whose weights are constants inside the file. Changes ``proto``.

    Nodes with a past, rotation, or biases that are computed stay as they are.
    """
    graph = proto.graph
    if proto.ir_version < 4:  # that old a format lists every constant among the inputs
        return
    stored = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[NodeProto] = []
    packed: set[str] = set()
    for node in graph.node:
        if node.op_type == "Attention" and node.domain == "com.microsoft" and _understood(node, stored):
            nodes += _unpacked(node, stored, proto)
            packed.update(node.input[1:3])
        else:
            nodes.append(node)
    if not packed:
        return
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
    unread = packed - set(_reads(graph)) - {value.name for value in graph.output}
    for field in (graph.initializer, graph.input):
        for place in range(len(field) - 1, -1, -1):
            if field[place].name in unread:
                del field[place]


def _reads(graph: GraphProto) -> Iterator[str]:
    """Every tensor that the nodes of a graph read, and those of the bodies inside."""
    for node in graph.node:
        yield from node.input
        for entry in node.attribute:
            for inner in (*entry.graphs, *((entry.g,) if entry.HasField("g") else ())):
                yield from _reads(inner)


def _understood(node: NodeProto, stored: dict[str, TensorProto]) -> bool:
    weight = stored.get(node.input[1])
    bias = stored.get(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    given = len(node.input) > 2 and bool(node.input[2])
    here = [tensor for tensor in (weight, bias) if tensor is not None]
    attributes = {entry.name: entry.i for entry in node.attribute}
    return (
        weight is not None
        and (bias is not None) == given
        and all(tensor.data_type in _FLOATS and not tensor.external_data for tensor in here)
        and not any(name for slot, name in enumerate(node.input) if slot in (4, 6))  # the past
        and not any(node.output[1:])
        and not attributes.get("do_rotary")
        and not attributes.get("past_present_share_buffer")
    )


def _unpacked(node: NodeProto, stored: dict[str, TensorProto], proto: ModelProto) -> list[NodeProto]:
    stem = node.name or node.output[0]
    weight = numpy_helper.to_array(stored[node.input[1]])
    bias = numpy_helper.to_array(stored[node.input[2]]) if len(node.input) > 2 and node.input[2] else None
    sizes = next((list(entry.ints) for entry in node.attribute if entry.name == "qkv_hidden_sizes"), [])
    ends = np.cumsum(sizes or [weight.shape[1] // 3] * 3)
    made: list[NodeProto] = []
    heads: list[str] = []
    for role, start, end in zip(("query", "key", "value"), (0, *ends[:2]), ends, strict=True):
        name = f"{stem}/{role}"
        columns = numpy_helper.from_array(np.ascontiguousarray(weight[:, start:end]), f"{name}/weight")
        proto.graph.initializer.append(columns)
        product = f"{name}/product" if bias is not None else name
        made.append(helper.make_node("MatMul", [node.input[0], columns.name], [product], name=f"{name}/MatMul"))
        if bias is not None:
            proto.graph.initializer.append(numpy_helper.from_array(bias[start:end], f"{name}/bias"))
            made.append(helper.make_node("Add", [product, f"{name}/bias"], [name], name=f"{name}/Add"))
        heads.append(name)
    mask, addend = (node.input[slot] if slot < len(node.input) else "" for slot in (3, 5))
    inputs = [*heads, "", mask, addend]
    while not inputs[-1]:
        inputs.pop()
    block = helper.make_node("MultiHeadAttention", inputs, [node.output[0]], name=stem, domain="com.microsoft")
    block.attribute.extend(entry for entry in node.attribute if entry.name in _KEPT)
    return [*made, block]
