"""Curves as inline SVG: light, the same bytes every time, in the colours of the page around them.

Matplotlib draws with stand-in colours that become CSS variables, so one drawing serves the light scheme, the
dark one and print. Text stays text: the page's font shows it, and it can be searched.
"""

import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lowrank_onnx.report.units import finite, plain, significant

_INK, _MUTED, _RULE, _CURVE, _MARK, _OTHER = (f"#0{n}0{n}0{n}" for n in range(1, 7))
_VARIABLES = {
    _INK: "var(--ink)",
    _MUTED: "var(--muted)",
    _RULE: "var(--rule)",
    _CURVE: "var(--changed)",
    _MARK: "var(--mark)",
    _OTHER: "var(--kept)",
}
FLOOR = 1e-6
"""Curves on a log scale end this far below their highest value; what is below is numerical noise."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A falling curve over ranks.

    Attributes:
        ranks: Rank positions, counted from 1, rising.
        values: Positive values, one a rank.
        marks: Ranks to draw as vertical lines.
    """

    ranks: tuple[int, ...]
    values: tuple[float, ...]
    marks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Point:
    """A model on the frontier: x with its interval, quality y, its label, and whether it is a reference."""

    label: str
    x: float
    low: float | None
    high: float | None
    y: float
    reference: bool


def curve(ranks: Sequence[Any], values: Sequence[Any], marks: Sequence[Any] = ()) -> Curve | None:
    """Return the drawable part of a curve, or None where nothing is positive."""
    pairs = [(int(rank), finite(value)) for rank, value in zip(ranks, values, strict=False)]
    kept = [(rank, value) for rank, value in pairs if rank > 0 and value is not None and value > 0]
    if not kept:
        return None
    last = max(rank for rank, _ in kept)
    lines = tuple(sorted({int(mark) for mark in marks if mark is not None and 0 < mark <= last}))
    kept.sort()
    return Curve(tuple(rank for rank, _ in kept), tuple(value for _, value in kept), lines)


def small_multiples(curves: Sequence[Curve], scale_each: bool) -> list[str]:
    """Draw curves on one shared logarithmic axis, each as an SVG of its own that a page can flow.

    Args:
        curves: Drawn in this order.
        scale_each: Divide each curve by its highest value; else all by the highest of all.

    Returns:
        SVG elements without references to anything outside.
    """
    if not curves:
        return []
    peak = max(max(curve.values) for curve in curves)
    tops = [max(curve.values) if scale_each else peak for curve in curves]
    lowest = min(min(curve.values) / top for curve, top in zip(curves, tops, strict=True))
    bottom = 10.0 ** math.floor(math.log10(max(lowest, FLOOR)) - 1e-9)
    # Six labels crowd a panel this low: label every second decade where there are more than three.
    decades = round(-math.log10(bottom))
    ticks = [10.0**-power for power in range(0, decades + 1, 1 if decades <= 3 else 2)]
    return [
        _panel(curve, top, bottom, ticks, f"panel {place}")
        for place, (curve, top) in enumerate(zip(curves, tops, strict=True))
    ]


def scatter(points: Sequence[Point], x_label: str, y_label: str, salt: str) -> str:
    """Draw quality over speed or size: named points with intervals, references hollow.

    Args:
        points: At least one.
        x_label: What x is, with its unit.
        y_label: What y is, with its unit.
        salt: Tells this drawing's element ids from those of others on the page.
    """
    with _figure((420, 300), salt) as (figure, out):
        axes = figure.add_axes((0.13, 0.15, 0.83, 0.80))
        for point in points:
            colour = _OTHER if point.reference else _CURVE
            if point.low is not None and point.high is not None:
                axes.plot((point.low, point.high), (point.y, point.y), color=colour, linewidth=1)
            axes.plot(
                (point.x,),
                (point.y,),
                marker="o",
                markersize=6,
                markeredgewidth=1.3,
                markeredgecolor=colour,
                markerfacecolor="none" if point.reference else colour,
                zorder=3 if point.reference else 2,
            )
        chosen = sorted((point.x, point.y) for point in points if not point.reference)
        if len(chosen) > 1:
            axes.plot(*zip(*chosen, strict=True), color=_CURVE, linewidth=0.8, alpha=0.5, zorder=0)
        axes.margins(0.12, 0.14)
        middle = sum(axes.get_xlim()) / 2
        for point in points:
            right = point.x > middle  # labels grow towards the middle, where there is room
            axes.annotate(
                plain(point.label)[:40],
                (point.x, point.y),
                (-6 if right else 6, -13 if point.reference else 6),
                textcoords="offset points",
                ha="right" if right else "left",
                fontsize=10,
                color=_INK,
            )
        axes.set_xlabel(x_label, fontsize=11, color=_INK)
        axes.set_ylabel(y_label, fontsize=11, color=_INK)
        axes.grid(color=_RULE, linewidth=0.6)
        axes.set_axisbelow(True)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:g}".replace("-", "−"))
        _plain_axes(axes, 10)
    return _inline(out)


def _panel(curve: Curve, top: float, bottom: float, ticks: Sequence[float], salt: str) -> str:
    with _figure((180, 118), salt) as (figure, out):
        axes = figure.add_axes((0.19, 0.16, 0.77, 0.74))
        axes.set_yscale("log")
        heights = [max(value / top, bottom) for value in curve.values]
        single = len(heights) == 1
        axes.plot(
            curve.ranks,
            heights,
            color=_CURVE,
            linewidth=1.4,
            marker="o" if len(heights) <= 12 else "",
            markersize=2.5,
        )
        last = max(curve.ranks)
        axes.set_xlim(0 if single else min(curve.ranks), last + single)
        axes.set_ylim(bottom, 1.25)
        for mark in curve.marks:
            axes.axvline(mark, color=_MARK, linewidth=1.1)
        x_ticks = [tick for tick in (min(curve.ranks), last) if not single or tick == last]
        axes.set_xticks(x_ticks, [str(tick) for tick in x_ticks])
        for label, side in zip(axes.get_xticklabels(), ("left", "right") if not single else ("center",), strict=True):
            label.set_horizontalalignment(side)
        if len(curve.marks) == 1:
            _label_mark(axes, curve.marks[0], last)
        axes.set_yticks(list(ticks), [_decade(tick) for tick in ticks])
        axes.set_yticks([], minor=True)
        _plain_axes(axes, 8.5)
    return _inline(out)


def _label_mark(axes: Any, rank: int, last: int) -> None:
    # Above the axes: a curve that falls late would run through a label inside.
    share = rank / last
    side = "left" if share < 0.2 else "right" if share > 0.8 else "center"
    axes.annotate(
        str(rank), (rank, 1), (0, 3), xycoords=("data", "axes fraction"), textcoords="offset points",
        ha=side, fontsize=8.5, color=_MARK, annotation_clip=False,
    )  # fmt: skip


def _plain_axes(axes: Any, fontsize: float) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_MUTED)
        axes.spines[side].set_linewidth(0.6)
    axes.tick_params(which="major", length=2.5, width=0.6, color=_MUTED, labelcolor=_MUTED, labelsize=fontsize)


def _decade(value: float) -> str:
    return significant(value, 1) if value >= 1e-3 else f"1e{round(math.log10(value))}".replace("-", "−")


@contextmanager
def _figure(pixels: tuple[int, int], salt: str) -> Iterator[tuple[Any, io.StringIO]]:
    # Imported here: matplotlib takes longer to load than the rest of the command line together.
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: Mapping[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "path.simplify": True,
        "text.parse_math": False,  # a name may hold dollar signs
        "font.family": "sans-serif",
        "axes.unicode_minus": True,
    }
    out = io.StringIO()
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **settings, "backend": "svg"}):
        figure = Figure(figsize=(pixels[0] / 72, pixels[1] / 72), dpi=72)
        FigureCanvasSVG(figure)
        yield figure, out
        with warnings.catch_warnings():
            # Only the reader's browser has to have the glyphs; here they are measured, roughly.
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            figure.savefig(out, format="svg")


def _inline(out: io.StringIO) -> str:
    """Return the drawing as an element for the middle of a page: no prologue, no metadata, CSS colours."""
    text = out.getvalue()
    text = text[text.index("<svg") :].rstrip()
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\s*<style type="text/css">.*?</style>', "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[A-Za-z_]+[0-9]+">', "<g>", text)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)
    text = re.sub(r'<svg ([^>]*?)width="[^"]*" ?', r"<svg \1", text, count=1)
    text = re.sub(r'<svg ([^>]*?)height="[^"]*" ?', r'<svg aria-hidden="true" \1', text, count=1)
    for stand_in, variable in _VARIABLES.items():
        text = text.replace(stand_in, variable)
    return re.sub(r"\n\s*", "\n", text)
