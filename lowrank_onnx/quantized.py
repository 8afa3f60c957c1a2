"""The plain int8 model, which is what a user would try instead: a point of reference, never a result."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import onnx
from onnx import ModelProto

from lowrank_onnx.errors import ModelError
from lowrank_onnx.model import Model, save
from lowrank_onnx.runtime import one_line


def dynamic_int8(model: Model) -> ModelProto:
    """Return what ``onnxruntime.quantization.quantize_dynamic`` makes of a model with its defaults.

    Raises:
        ModelError: It cannot quantize this model, or nothing in it; the reason is in the message.
    """
    try:
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError as error:
        raise ModelError(f"onnxruntime.quantization cannot be loaded: {one_line(error)}") from error
    quiet = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)  # it warns about every model on the root logger
    try:
        with tempfile.TemporaryDirectory() as folder:
            # From a copy on disk: the classes change the model they are given.
            source, target = Path(folder) / "model.onnx", Path(folder) / "int8.onnx"
            save(model.original, source, model.folder)
            quantize_dynamic(source, target, weight_type=QuantType.QInt8)
            made = onnx.load(target)
    except Exception as error:  # it raises whatever its many helpers raise
        raise ModelError(f"onnxruntime cannot quantize the model: {one_line(error)}") from error
    finally:
        logging.getLogger().setLevel(quiet)
    if not any("Integer" in node.op_type or "Quantize" in node.op_type for node in made.graph.node):
        raise ModelError("onnxruntime finds nothing to quantize in the model")
    return made
