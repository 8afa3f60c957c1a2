"""What operators say of themselves that hold an attention block but its layers.

Attention (since opset 23)             heads of queries, keys and values of any width
com.microsoft MultiHeadAttention       the same, as many heads of keys as of queries
com.microsoft GroupQueryAttention      one width for queries, keys and values: a multiple of 8, of 16 where the
                                       node turns positions into queries and keys
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from onnx import NodeProto

from lowrank_onnx.sites.weights import attribute

FUSED = frozenset(["Attention", "MultiHeadAttention", "GroupQueryAttention"])
PAST_AT = {"Attention": (4, 5), "MultiHeadAttention": (6, 7), "GroupQueryAttention": (3, 4)}
"""Which inputs are past keys and values; the outputs with the longer past are always the second and third."""

# Inputs that are not followed: lengths of a past, biases, norms and scales of heads, a sink beside the keys.
_NOT_FOLLOWED = {
    "Attention": (6,),
    "MultiHeadAttention": (3, 8, 9),
    "GroupQueryAttention": (11, 12, 13, 14, 15, 16),
}
_BENT = ("softcap", "smooth_softmax", "kv_cache_bit_width", "sliding_window_cache")
_COSINES, _SINES = 7, 8


@dataclass(frozen=True, eq=False)
class Turned:
    """A node that turns rotary positions into its queries and keys.

    Attributes:
        node: The node.
        cosines, sines: Names of its tables (positions, d / 2).
        interleaved: Whether columns (2 i, 2 i + 1) are turned together, instead of (i, i + d / 2).
    """

    node: NodeProto
    cosines: str
    sines: str
    interleaved: bool

    @property
    def slots(self) -> tuple[int, int]:
        """Which inputs of the node the tables are."""
        return _COSINES, _SINES


def fused_heads(node: NodeProto) -> int | None:
    """The number of heads of a node that holds a block but its layers; None for any other node.

    Left alone: biases inside the node, key and value that come from outside, anything bent between scores and softmax.
    """
    standard = node.op_type == "Attention" and node.domain in ("", "ai.onnx")
    if not standard and (node.op_type not in FUSED - {"Attention"} or node.domain != "com.microsoft"):
        return None
    heads = int(attribute(node, "q_num_heads" if standard else "num_heads", 0))
    unknown = any(node.input[slot] for slot in _NOT_FOLLOWED[node.op_type] if slot < len(node.input))
    unknown = unknown or any(node.output[3:])
    bent = any(entry.name in _BENT and (entry.f or entry.i > 0) for entry in node.attribute)
    fewer = heads < 1 or key_heads(node) < 1 or heads % key_heads(node)
    return None if unknown or bent or fewer or len(node.input) < 3 or not all(node.input[:3]) else heads


def key_heads(node: NodeProto) -> int:
    """Heads of the keys and values of a fused node."""
    return int(attribute(node, "num_heads" if node.op_type == "MultiHeadAttention" else "kv_num_heads", 0))


def keys_seen(node: NodeProto, shape_of: Callable[[str], tuple[int, ...] | None]) -> int | None:
    """How many keys a query of a fused node meets, those of the past included; None where that is unknown."""
    key = shape_of(node.input[1])
    slot = PAST_AT[node.op_type][0]
    past = shape_of(node.input[slot]) if slot < len(node.input) and node.input[slot] else (0, 0, 0, 0)
    return None if key is None or past is None or len(key) < 3 or len(past) < 4 else key[-2] + past[2]


def turned_inside(node: NodeProto) -> Turned:
    """The tables of a GroupQueryAttention that turns positions into queries and keys."""
    return Turned(node, node.input[_COSINES], node.input[_SINES], bool(attribute(node, "rotary_interleaved", 0)))


def not_taken(node: NodeProto) -> str:
    """Why ``fused_heads`` does not take a node that holds attention."""
    if node.op_type == "Attention" and node.domain:
        return "its weights could not be taken out of the node"
    if node.op_type == "GroupQueryAttention":
        return "packed or quantized inputs, norms of heads, sinks or a bent score are not followed into the node"
    return "inputs split into heads outside, lengths of a past, biases or a bent score are not followed into the node"
