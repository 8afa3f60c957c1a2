"""Tensors in, factors out, one technique a file. No ONNX here: each is usable on any array."""
