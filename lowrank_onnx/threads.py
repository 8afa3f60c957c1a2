"""How many threads the linear algebra may take.

OpenBLAS waits by spinning. Beside onnxruntime, or any other busy process, a pool as wide as the machine
makes small products a hundred times slower; half of it loses little where the machine is idle. On few
cores it is one thread, which also gives the same bytes on every run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import joblib
from threadpoolctl import threadpool_limits

Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")


def few_threads(function: Callable[Arguments, Answer]) -> Callable[Arguments, Answer]:
    """Run a function with BLAS limited to half of the cores."""

    @functools.wraps(function)
    def limited(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Answer:
        with threadpool_limits(limits=max(joblib.cpu_count() // 2, 1), user_api="blas"):
            return function(*args, **kwargs)

    return limited
