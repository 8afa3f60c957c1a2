"""Resident memory of a loaded model, each measured in a fresh process, less what the process holds anyway."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from onnx import ModelProto

from lowrank_onnx.model import save
from lowrank_onnx.runtime import Runtime

_SECONDS = 120
# The allocator gives back what it can before both readings, or parsing the file would count.
_CODE = """
import ctypes, gc, sys
import onnxruntime, psutil
def held():
    gc.collect()
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss
options = onnxruntime.SessionOptions()
options.log_severity_level = 4
options.intra_op_num_threads = int(sys.argv[2])
before = held()
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
print(held() - before)
"""


def session_rss_bytes(models: Sequence[tuple[ModelProto, Path | None]], runtime: Runtime) -> list[int | None]:
    """Return by how many bytes a process grows that opens a model on the CPU, for each of some models.

    Args:
        models: Each with the folder of its external data.
        runtime: For the number of threads.

    Returns:
        None where the process could not be run or did not end in two minutes.
    """
    with tempfile.TemporaryDirectory() as folder:
        answers = []
        for place, (proto, source) in enumerate(models):
            file = Path(folder) / str(place) / "model.onnx"
            file.parent.mkdir()
            save(proto, file, source)
            answers.append(_measured(file, runtime.used_threads))
    return answers


def _measured(file: Path, threads: int) -> int | None:
    command = [sys.executable, "-c", _CODE, str(file), str(threads)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return max(int(done.stdout), 0) if done.returncode == 0 else None
