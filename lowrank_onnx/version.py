"""The version, read from the installed package."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("lowrank-onnx")
except PackageNotFoundError:  # a bare checkout
    __version__ = "0+unknown"
