"""Files that appear complete or not at all."""

import io
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_onnx.errors import LowRankError
from lowrank_onnx.linalg import Array


def write_text(text: str, path: Path) -> None:
    """Write text beside its place, then rename it there; leave nothing behind on any failure.

    Args:
        text: Written as UTF-8. A lone surrogate (a file name that was not UTF-8) becomes ``\\udcxx``.
        path: Replaced where it exists; its folder has to exist.

    Raises:
        LowRankError: The operating system refuses.
    """
    _write(text.encode("utf-8", "backslashreplace"), path, "the report")


def write_arrays(arrays: Mapping[str, Array], path: Path) -> None:
    """Write arrays as a compressed ``.npz``, the same bytes for the same arrays; see ``write_text``."""
    stream = io.BytesIO()
    named: dict[str, Any] = dict(arrays)
    np.savez_compressed(stream, allow_pickle=False, **named)
    _write(stream.getvalue(), path, "the arrays")


def _write(content: bytes, path: Path, what: str) -> None:
    # A short name of its own: the target's name plus a suffix may be longer than the file system allows.
    temporary = path.with_name(f".lowrank-onnx-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise LowRankError(
            f"cannot write {what} '{path}': {reason}; name a file in a folder that exists and is writable"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)  # gone already where the rename went through
