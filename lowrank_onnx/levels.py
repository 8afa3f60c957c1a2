"""Several levels of one model in one file, switched by an input; the weights of the smaller ones are stored once.

    y = If(rank_level = K - 1, model_{K-1}(x), If(rank_level = K - 2, model_{K-2}(x), ...))

Each branch is the complete static model of its level, so that a runtime fuses what it would fuse in a file of its
own. A factor of a smaller level is a prefix of the factor of a larger one, as columns are ordered by importance:
the branch takes a Slice of the stored one, which a runtime folds when it loads the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from lowrank_onnx.composing import Composition, body, brought_in, instantiate
from lowrank_onnx.linalg import Array
from lowrank_onnx.model import FLOAT_TYPES, uses_external_data

LEVEL_INPUT = "rank_level"
LEVELS_KEY = "lowrank_onnx.levels"
"""Metadata: how many levels the file has."""


def level_count(proto: ModelProto) -> int | None:
    """How many levels a file has; None where it is an ordinary model."""
    if LEVEL_INPUT not in {value.name for value in proto.graph.input}:
        return None
    counts = [entry.value for entry in proto.metadata_props if entry.key == LEVELS_KEY]
    return int(counts[0]) if counts and counts[0].isdigit() else None


def build_levels(models: Sequence[ModelProto]) -> ModelProto:
    """Put models of rising size into one file.

    Args:
        models: Level 0, the smallest, first; equal inputs and outputs.

    Raises:
        ModelError: The operator set is too old.
    """
    whole = Composition(models[-1])
    graph = whole.proto.graph
    like = list(graph.output)
    count = len(models)
    stored: dict[str, Array] = {}
    branches = []
    for level in range(count - 1, -1, -1):
        model, prefix = models[level], f"level_{level}/"
        shared = {tensor.name: tensor.name for tensor in model.graph.initializer if _is_prefix(tensor, stored)}
        rest = _without(model, set(shared))
        names = whole.add_constants(rest, prefix) | shared
        if level:
            for tensor in rest.graph.initializer:
                if tensor.data_type in FLOAT_TYPES and not uses_external_data(tensor):
                    stored[names[tensor.name]] = numpy_helper.to_array(tensor)
        slices, local = brought_in(model, names, prefix)
        nodes, ends = instantiate(model, prefix, local, {})
        branches.append(body(f"level_{level}", [*slices, *nodes], [ends[name] for name in whole.outputs], like))
    whole.store(numpy_helper.from_array(np.array(count - 1, np.int64)), LEVEL_INPUT)
    graph.input.append(helper.make_tensor_value_info(LEVEL_INPUT, TensorProto.INT64, []))
    lowest = branches[-1]
    for level in range(1, count):
        number = f"{LEVEL_INPUT}/{level}"
        whole.store(numpy_helper.from_array(np.array(level, np.int64)), number)
        # Not Equal: a level beyond the highest is the highest, one below 0 the lowest.
        less = f"{LEVEL_INPUT}/below_{level}"
        graph.node.append(helper.make_node("Less", [LEVEL_INPUT, number], [less], less))
        upper = branches[count - 1 - level]
        outer = level == count - 1
        outputs = list(whole.outputs) if outer else [f"up_to_{level}/{name}" for name in whole.outputs]
        node = helper.make_node("If", [less], outputs, f"up_to_level_{level}", then_branch=lowest, else_branch=upper)
        if outer:
            graph.node.append(node)
        else:
            lowest = body(f"up_to_{level}", [node], outputs, like)
    whole.proto.metadata_props.add(key=LEVELS_KEY, value=str(count))
    return whole.proto


def _is_prefix(tensor: TensorProto, stored: Mapping[str, Array]) -> bool:
    """Whether a larger level stores a tensor of this name whose leading part this one is."""
    whole = stored.get(tensor.name)
    if whole is None or uses_external_data(tensor) or tensor.data_type not in FLOAT_TYPES:
        return False
    return is_leading(numpy_helper.to_array(tensor), whole)


def is_leading(value: Array, whole: Array) -> bool:
    """Whether an array is the leading part of another, along every axis."""
    if value.dtype != whole.dtype or value.ndim != whole.ndim:
        return False
    if any(a > b for a, b in zip(value.shape, whole.shape, strict=True)):
        return False
    return np.array_equal(value, whole[tuple(slice(size) for size in value.shape)])


def _without(model: ModelProto, names: set[str]) -> ModelProto:
    rest = ModelProto()
    rest.CopyFrom(model)
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in names]
    del rest.graph.initializer[:]
    rest.graph.initializer.extend(kept)
    return rest


class LevelSession:
    """A session of a file with several levels, held at one of them; used as the session it wraps."""

    def __init__(self, session: Any, level: int) -> None:
        self._session = session
        self._level = {LEVEL_INPUT: np.array(level, np.int64)}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, output_names: Sequence[str] | None, input_feed: Mapping[str, Array], run_options: Any = None) -> Any:
        """As ``InferenceSession.run``, at this level."""
        return self._session.run(output_names, {**input_feed, **self._level}, run_options)
