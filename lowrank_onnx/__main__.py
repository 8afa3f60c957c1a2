"""``python -m lowrank_onnx``, the same as the command ``lowrank-onnx``."""

from lowrank_onnx.cli import main

main()
