"""The report as JSON; ``schema.json`` beside this file is its form."""

import json
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from lowrank_onnx.report.files import write_text

ReportDict: TypeAlias = dict[str, Any]
"""A report as ``schema.json`` describes it; also what ``write_json`` puts into the file."""


def write_json(report: Mapping[str, Any], path: Path) -> None:
    """Write a report, whole or not at all.

    Keys come in the order in which the schema names them, unknown ones after those by name, so equal
    reports are equal bytes. NaN and infinities, which JSON lacks, become null.

    Args:
        report: A report, or what ``inspect``, ``validate`` and ``sweep`` tell; NumPy values welcome.
        path: The file; replaced where it exists.

    Raises:
        LowRankError: The file cannot be written.
    """
    write_text(json.dumps(_jsonable(report), indent=1, ensure_ascii=False, allow_nan=False) + "\n", path)


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        order = _schema_order()
        keys = sorted(value, key=lambda key: (order.get(str(key), len(order)), str(key)))
        return {str(key): _jsonable(value[key]) for key in keys}
    if isinstance(value, np.ndarray | np.generic):
        return _jsonable(value.tolist())
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


@cache
def _schema_order() -> dict[str, int]:
    """Return every property name of the schema with its place, first mention first, outer objects first."""
    names: dict[str, int] = {}
    schema = json.loads(Path(__file__).with_name("schema.json").read_text(encoding="utf-8"))
    level = [schema]
    while level:
        for node in level:
            for name in node.get("properties", {}):
                names.setdefault(name, len(names))
        level = [child for node in level for child in _children(node) if isinstance(child, dict)]
    return names


def _children(node: Mapping[str, Any]) -> list[Any]:
    return [*node.get("properties", {}).values(), *node.get("$defs", {}).values(), node.get("items")]
