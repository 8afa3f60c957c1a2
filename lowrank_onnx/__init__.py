"""Make exported ONNX models smaller and faster by low-rank factorization, with measured proof."""

from lowrank_onnx.adaptive import AdaptiveSession
from lowrank_onnx.errors import LowRankError, TargetError
from lowrank_onnx.pipeline import Result, apply, benchmark, compress, inspect, passes, plan, sweep, validate
from lowrank_onnx.version import __version__

__all__ = [
    "AdaptiveSession",
    "LowRankError",
    "Result",
    "TargetError",
    "__version__",
    "apply",
    "benchmark",
    "compress",
    "inspect",
    "passes",
    "plan",
    "sweep",
    "validate",
]
