"""Names of the rows of a non-negative factor, and which of them make up a component."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_onnx.errors import LowRankError
from lowrank_onnx.linalg import Array

STRONGEST = 10


def read_labels(path: str | os.PathLike[str]) -> list[str]:
    """Read one name a line.

    Raises:
        LowRankError: The file cannot be read, is no UTF-8 text, or is empty.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise LowRankError(f"--labels '{path}' is no UTF-8 text; expected one name a line") from error
    except OSError as error:
        raise LowRankError(f"--labels '{path}' cannot be read: {error.strerror}") from error
    # Not splitlines, which also cuts at marks that may be tokens themselves, such as U+2028.
    names = text.removesuffix("\n").split("\n")
    if "\0" in text or not text.strip():
        raise LowRankError(f"--labels '{path}' holds no text; expected one name a line")
    return names


def strongest_rows(factor: Array, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the components of a non-negative factor (rows, r), the largest first, with their strongest rows.

    Strength is relative to the strongest row of the component; rows that are zero are left out.
    """
    factor = factor.astype(np.float64)
    found = []
    for place in np.argsort(-np.linalg.norm(factor, axis=0), kind="stable"):
        column = factor[:, place]
        order = [row for row in np.argsort(-column, kind="stable")[:STRONGEST] if column[row] > 0]
        rows = [{"name": names[row], "strength": float(column[row] / column[order[0]])} for row in order]
        found.append({"component": int(place), "rows": rows})
    return found
