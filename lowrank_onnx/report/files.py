"""Text files that appear complete or not at all."""

import os
import secrets
from pathlib import Path

from lowrank_onnx.errors import LowRankError


def write_text(text: str, path: Path) -> None:
    """Write text beside its place, then rename it there; leave nothing behind on any failure.

    Args:
        text: Written as UTF-8. A lone surrogate (a file name that was not UTF-8) becomes ``\\udcxx``.
        path: Replaced where it exists; its folder has to exist.

    Raises:
        LowRankError: The operating system refuses.
    """
    # A short name of its own: the target's name plus a suffix may be longer than the file system allows.
    temporary = path.with_name(f".lowrank-onnx-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise LowRankError(
            f"cannot write the report '{path}': {reason}; name a file in a folder that exists and is writable"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)  # gone already where the rename went through
