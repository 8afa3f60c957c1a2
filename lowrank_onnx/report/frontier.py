"""Several budgets side by side, as ``sweep`` measures them: one table, and quality against speed and size."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from lowrank_onnx.report import html, plots
from lowrank_onnx.report.units import finite

_QUALITIES = {
    "metric_drop": ("Change of the metric, %", -100.0),  # drawn upwards: a drop is worse
    "sqnr_db": ("SQNR against the original, dB", 1.0),
    "cosine": ("Cosine to the original", 1.0),
}


@dataclass(frozen=True, slots=True)
class Section:
    """What the page shows: rows (references first), the plots with their titles, and what they leave out."""

    rows: tuple[Mapping[str, Any], ...]
    references: int
    plots: tuple[tuple[str, Markup], ...]
    omitted: int
    intervals: bool


def write_frontier_html(frontier: Mapping[str, Any], path: Path) -> None:
    """Write a sweep as one self-contained page.

    Args:
        frontier: ``model`` (path, or a dict with ``path``), ``points`` and ``reference``: lists of dicts with
            ``label``, ``keep``, ``macs_ratio``, ``parameters_ratio``, ``size_ratio`` (after / before),
            ``speedup``, ``speedup_low``, ``speedup_high`` (before / after), ``metric_drop`` (positive is
            worse), ``cosine``, ``sqnr_db`` and ``file``; each number may be null.
        path: The page; replaced where it exists.

    Raises:
        LowRankError: The page cannot be written.
    """
    model = frontier.get("model") or ""
    name = model.get("path", "") if isinstance(model, Mapping) else model
    html.write_page("frontier.html", path, name=str(name), frontier=section(frontier))


def section(frontier: Mapping[str, Any]) -> Section:
    """Return table and plots of a frontier; quality is the metric where it was measured, else fidelity."""
    references, points = list(frontier.get("reference") or ()), list(frontier.get("points") or ())
    quality = next((key for key in _QUALITIES if any(finite(point.get(key)) is not None for point in points)), None)
    drawn: list[tuple[str, Markup]] = []
    placed = 0
    if quality is not None:
        label, sign = _QUALITIES[quality]
        for x_key, x_label in (("speedup", "Speed-up, times"), ("size_ratio", "Size, after / before")):
            marks = [
                *_points(points, x_key, quality, sign, reference=False),
                *_points(references, x_key, quality, sign, reference=True),
            ]
            placed = max(placed, len(marks))
            if marks:
                title = f"Quality against {'speed' if x_key == 'speedup' else 'size'}"
                svg = plots.scatter(marks, x_label, label, f"frontier {x_key}")
                drawn.append((title, Markup(svg)))  # safe: drawn by us, text escaped
    return Section(
        tuple(references + points),
        len(references),
        tuple(drawn),
        len(points) + len(references) - placed if drawn else 0,
        any(finite(point.get("speedup_low")) is not None for point in points),
    )


def _points(
    models: Sequence[Mapping[str, Any]], x_key: str, y_key: str, sign: float, reference: bool
) -> list[plots.Point]:
    found = []
    for model in models:
        x, y = finite(model.get(x_key)), finite(model.get(y_key))
        if x is None or y is None:
            continue
        timed = x_key == "speedup"
        low = finite(model.get("speedup_low")) if timed else None
        high = finite(model.get("speedup_high")) if timed else None
        found.append(plots.Point(str(model.get("label", "")), x, low, high, sign * y + 0.0, reference))
    return found
