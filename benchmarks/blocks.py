"""A stack of large transformer blocks with weights as trained ones have them: mixed directions, a decaying spectrum.

    python benchmarks/blocks.py --hidden 4096 --feedforward 11008 --layers 4 --tokens 2048 --dtype float16 model.onnx

Pre-norm blocks of a decoder: causal attention of 128 numbers a head, gated feed-forward with SiLU. The weights lie
beside the model; with --samples N so do N random inputs as calibrate.npz and half as many as evaluate.npz.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from lowrank_onnx.accelerator import gpu_algebra
from lowrank_onnx.linalg import product

_HEAD = 128
_DECAY = 0.8  # of the singular values, as a power of their place


class Weights:
    """Random matrices; one pair of orthonormal bases, shuffled and turned for each of them.

    Args:
        hidden, feedforward: The two widths.
    """

    def __init__(self, hidden: int, feedforward: int, dtype: str) -> None:
        self.rng = np.random.default_rng(0)
        self.dtype = dtype
        narrow = self.rng.standard_normal((hidden, hidden))
        wide = self.rng.standard_normal((feedforward, hidden))
        self.bases = {hidden: np.linalg.qr(narrow)[0], feedforward: np.linalg.qr(wide)[0]}

    def matrix(self, inputs: int, outputs: int) -> NDArray[np.generic]:
        """A weight (inputs, outputs) that keeps the variance of its input."""
        left, right = self._basis(inputs), self._basis(outputs)
        sigma = np.arange(1, left.shape[1] + 1) ** -_DECAY
        sigma *= np.sqrt(outputs / np.sum(sigma**2))
        return np.asarray(product(left * sigma, np.ascontiguousarray(right.T)), self.dtype)

    def _basis(self, width: int) -> NDArray[np.float64]:
        basis = self.bases[width]
        rows, columns = (self.rng.permutation(size) for size in basis.shape)
        return np.asarray(basis[rows][:, columns] * self.rng.choice([-1.0, 1.0], basis.shape[1]))


def build(hidden: int, feedforward: int, layers: int, tokens: int, dtype: str) -> onnx.ModelProto:
    """Make the model; input and output ``x`` and ``y`` (1, tokens, hidden)."""
    weights = Weights(hidden, feedforward, dtype)
    graph = onnx.GraphProto(name="blocks")
    make = onnx.helper.make_node

    def stored(name: str, array: NDArray[np.generic]) -> str:
        graph.initializer.append(onnx.numpy_helper.from_array(array, name))
        return name

    def linear(name: str, source: str, inputs: int, outputs: int) -> str:
        graph.node.append(make("MatMul", [source, stored(f"{name}/weight", weights.matrix(inputs, outputs))], [name]))
        return name

    def normed(name: str, source: str) -> str:
        scale, bias = (
            stored(f"{name}/{role}", np.full(hidden, value, dtype)) for role, value in (("scale", 1), ("bias", 0))
        )
        graph.node.append(make("LayerNormalization", [source, scale, bias], [name], axis=-1))
        return name

    current = "x"
    for layer in range(layers):
        at = f"block{layer}"
        source = normed(f"{at}/norm1", current)
        heads = [linear(f"{at}/{role}", source, hidden, hidden) for role in ("query", "key", "value")]
        graph.node.append(
            make(
                "MultiHeadAttention",
                heads,
                [f"{at}/attention"],
                domain="com.microsoft",
                num_heads=hidden // _HEAD,
                unidirectional=1,
            )
        )
        graph.node.append(
            make("Add", [current, linear(f"{at}/output", f"{at}/attention", hidden, hidden)], [f"{at}/middle"])
        )
        source = normed(f"{at}/norm2", f"{at}/middle")
        gate = linear(f"{at}/gate", source, hidden, feedforward)
        up = linear(f"{at}/up", source, hidden, feedforward)
        graph.node.append(make("Sigmoid", [gate], [f"{at}/sigmoid"]))
        graph.node.append(make("Mul", [gate, f"{at}/sigmoid"], [f"{at}/silu"]))
        graph.node.append(make("Mul", [f"{at}/silu", up], [f"{at}/gated"]))
        current = "y" if layer == layers - 1 else f"{at}/end"
        down = linear(f"{at}/down", f"{at}/gated", feedforward, hidden)
        graph.node.append(make("Add", [f"{at}/middle", down], [current]))
    for node in graph.node:
        node.name = node.output[0]
    element = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph.input.append(onnx.helper.make_tensor_value_info("x", element, [1, tokens, hidden]))
    graph.output.append(onnx.helper.make_tensor_value_info("y", element, [1, tokens, hidden]))
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets)
    model.ir_version = 8
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path)
    for name, default in (("hidden", 4096), ("feedforward", 11008), ("layers", 4), ("tokens", 2048)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--samples", type=int, default=0)
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16")
    options = parser.parse_args()
    with gpu_algebra(True):
        model = build(options.hidden, options.feedforward, options.layers, options.tokens, options.dtype)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    place = options.out.with_suffix(".data").name
    options.out.with_name(place).unlink(missing_ok=True)  # it would be appended to
    onnx.save_model(model, options.out, save_as_external_data=True, location=place, size_threshold=1024)
    rng = np.random.default_rng(1)
    for name, count in (("calibrate", options.samples), ("evaluate", options.samples // 2)):
        if count:
            shape = (count, options.tokens, options.hidden)
            np.savez(
                options.out.with_name(f"{name}.npz"), x=rng.standard_normal(shape, np.float32).astype(options.dtype)
            )


if __name__ == "__main__":
    main()
