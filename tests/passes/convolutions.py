"""Convolutions of every shape, as hypothesis draws them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import ModelProto

from tests.builders import Array

OPSETS = (7, 11, 17, 22, 24)


@dataclass(frozen=True)
class Convolution:
    """One node and the size of its map; attributes that have a default are left out if not ``spelled``."""

    outputs: int
    inputs: int
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    auto_pad: str
    group: int
    bias: bool
    transposed: bool
    output_padding: tuple[int, ...]
    spatial: tuple[int, ...]
    opset: int
    spelled: bool


@st.composite
def convolutions(
    draw: st.DrawFn, groups: Sequence[int] = (1, 2), transposed: bool = False, dims: Sequence[int] = (1, 2, 3)
) -> Convolution:
    """Any convolution that onnxruntime runs, small."""
    count = draw(st.sampled_from(list(dims)))
    group = draw(st.sampled_from(list(groups)))

    def axes(low: int, high: int, times: int = 1) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(times * count))

    kernel, strides, dilations = axes(1, 3), axes(1, 2), axes(1, 2)
    reach = [(length - 1) * dilation + 1 for length, dilation in zip(kernel, dilations, strict=True)]
    auto_pad = draw(st.sampled_from(["NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    if auto_pad.startswith("SAME"):  # onnxruntime takes dilation and SAME together in few kernels
        dilations = (1,) * count
    pads = tuple(min(pad, length) for pad, length in zip(axes(0, 2, 2), [r - 1 for r in reach] * 2, strict=True))
    return Convolution(
        outputs=group * draw(st.integers(1, 4)),
        inputs=group * draw(st.integers(1, 4)),
        kernel=kernel,
        strides=strides,
        dilations=dilations,
        pads=pads if auto_pad == "NOTSET" else (0,) * (2 * count),
        auto_pad=auto_pad,
        group=group,
        bias=draw(st.booleans()),
        transposed=transposed,
        output_padding=tuple(min(p, s - 1) for p, s in zip(axes(0, 1), strides, strict=True)),
        spatial=tuple(size + draw(st.integers(0, 3)) for size in reach),
        opset=draw(st.sampled_from(OPSETS)),
        spelled=draw(st.booleans()),
    )


def model_of(entry: Convolution, samples: int = 3) -> tuple[ModelProto, Array]:
    """A model of one node with random weights and no fixed size, and an input."""
    rng = np.random.default_rng(0)
    shape = (entry.outputs, entry.inputs // entry.group, *entry.kernel)
    if entry.transposed:
        shape = (entry.inputs, entry.outputs // entry.group, *entry.kernel)
    constants = {"w": rng.standard_normal(shape).astype(np.float32)}
    if entry.bias:
        constants["b"] = rng.standard_normal(entry.outputs).astype(np.float32)
    attributes: dict[str, Any] = {
        "kernel_shape": entry.kernel,
        "strides": entry.strides,
        "dilations": entry.dilations,
        "group": entry.group,
        **({"pads": entry.pads} if entry.auto_pad == "NOTSET" else {"auto_pad": entry.auto_pad}),
        **({"output_padding": entry.output_padding} if entry.transposed else {}),
    }
    if not entry.spelled:
        defaults = {"kernel_shape": entry.kernel, "group": 1, "auto_pad": "NOTSET"}
        defaults |= {name: (1,) * len(entry.kernel) for name in ("strides", "dilations")}
        defaults |= {"pads": (0,) * len(entry.pads), "output_padding": (0,) * len(entry.kernel)}
        attributes = {name: value for name, value in attributes.items() if value != defaults[name]}
    operator = "ConvTranspose" if entry.transposed else "Conv"
    node = onnx.helper.make_node(operator, ["x", *constants], ["y"], name="conv", **attributes)
    axes = [f"s{place}" for place in range(len(entry.kernel))]
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [onnx.helper.make_tensor_value_info("x", 1, ["n", entry.inputs, *axes])],
        [onnx.helper.make_tensor_value_info("y", 1, ["n", entry.outputs, *[f"o{name}" for name in axes]])],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", entry.opset)], ir_version=8)
    return proto, rng.standard_normal((samples, entry.inputs, *entry.spatial)).astype(np.float32)
