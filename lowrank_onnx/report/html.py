"""The report as one HTML page that needs nothing beside it: no script, no font, no image from elsewhere."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from lowrank_onnx.report import plots, uncertainty, units, wording
from lowrank_onnx.report.files import write_text
from lowrank_onnx.report.units import finite, plain

PANELS = 24
"""Most spectra, and most sensitivity curves, on one page."""

BARS = 60
"""Most layers in the chart of costs."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One layer in the chart of costs; lengths are percent of the costliest layer, error of the worst."""

    name: str
    changed: bool
    before: str
    after: str
    before_length: float
    after_length: float
    error: str
    error_length: float


@dataclass(frozen=True, slots=True)
class Bars:
    """The chart of costs: what is compared, layers in the order of the graph, and how many are left out."""

    quantity: str
    rows: tuple[Bar, ...]
    omitted: int
    errors: bool


@dataclass(frozen=True, slots=True)
class Panel:
    """One small plot with the layer's name and one line of facts."""

    name: str
    caption: str
    svg: Markup


@dataclass(frozen=True, slots=True)
class Panels:
    """Small plots side by side, and how many layers with data are left out."""

    panels: tuple[Panel, ...]
    omitted: int
    kinds: tuple[str, ...] = ()


def write_html(report: Mapping[str, Any], path: Path) -> None:
    """Write a report as one self-contained page that opens offline, on a phone and in print.

    Args:
        report: A dict of ``schema.json``; null is welcome wherever the schema allows it.
        path: The page; replaced where it exists.

    Raises:
        LowRankError: The page cannot be written.
    """
    # Imported here: the page of a frontier is built from the pieces of this module.
    from lowrank_onnx.report import frontier

    sites = report["sites"]
    write_page(
        "template.html",
        path,
        report=report,
        headline=wording.headline(report),
        asked=wording.asked(report),
        comparisons=wording.comparisons(report),
        sentences=wording.notes(report),
        factorized=len(wording.factorized(sites)),
        kept=wording.by_reason(site for site in sites if site.get("decision") != "factorized"),
        bars=bars(sites, wording.errors_are_output(report)),
        spectra=spectra(sites),
        sensitivity=sensitivity(sites),
        components=wording.components(sites),
        sure=uncertainty.sentences(report),
        posteriors=uncertainty.layers(report),
        unsure_headers=uncertainty.HEADERS,
        unsure_meaning=uncertainty.MEANING,
        without=uncertainty.without(report),
        frontier=frontier.section(report["frontier"]) if report.get("frontier") else None,
        steps=_steps(report.get("seconds") or {}),
    )


def breakable(name: str) -> Markup:
    """Return a layer's name that lines may break after its slashes."""
    return Markup("/<wbr>").join(plain(name).split("/"))


def write_page(template: str, path: Path, **context: Any) -> None:
    """Render a template of this package into a file, whole or not at all."""
    write_text(_environment().get_template(template).render(context), path)


def bars(sites: Sequence[Mapping[str, Any]], output: bool = True) -> Bars:
    """Return the costliest layers for the chart of costs.

    Args:
        sites: Sites of a report, or of an inspection: those have ``macs`` and ``parameters`` alone.
        output: Whether errors shown are output errors, else weight errors.
    """
    key = wording.quantity(sites)
    error_key = "output_error" if output else "weight_error"

    def cost(site: Mapping[str, Any]) -> float:
        return finite(site.get(f"{key}_before", site.get(key))) or 0.0

    chosen = _largest(sites, cost, BARS)
    top = max(map(cost, chosen), default=0.0) or 1.0
    # A rewritten layer may cost more than it did (smaller, at the price of work): it sets the scale too.
    top = max([top, *(finite(site.get(f"{key}_after")) or 0.0 for site in chosen)])
    errors = [finite(site.get(error_key)) or 0.0 for site in chosen if site.get("decision") == "factorized"]
    worst = max(errors, default=0.0) or 1.0
    rows = []
    for site in chosen:
        changed = site.get("decision") == "factorized"
        after = finite(site.get(f"{key}_after")) if changed else None
        error = finite(site.get(error_key)) if changed else None
        rows.append(
            Bar(
                plain(site["name"]),
                changed,
                units.count(site.get(f"{key}_before", site.get(key))),
                units.count(after) if after is not None else "",
                round(100 * cost(site) / top, 2),
                round(100 * (after if after is not None else cost(site)) / top, 2),
                units.percent(error) if error is not None else "",
                round(100 * (error or 0.0) / worst, 2),
            )
        )
    return Bars("MACs" if key == "macs" else "Parameters", tuple(rows), len(sites) - len(chosen), any(errors))


def spectra(sites: Sequence[Mapping[str, Any]], marks: Mapping[str, str] | None = None) -> Panels:
    """Draw singular values of the layers that matter most, each relative to its largest.

    Args:
        sites: Those without a spectrum are passed over.
        marks: Site keys whose rank is a vertical line, with their name; None marks the ranks chosen.
    """
    return _panels(sites, "spectrum", "index", marks, scale_each=True)


def sensitivity(sites: Sequence[Mapping[str, Any]], marks: Mapping[str, str] | None = None) -> Panels:
    """Draw the damage to the model's output over the rank of one layer; see ``spectra`` for the arguments."""
    return _panels(sites, "damage", "ranks", marks, scale_each=False)


def _panels(
    sites: Sequence[Mapping[str, Any]],
    key: str,
    ranks: str,
    marks: Mapping[str, str] | None,
    scale_each: bool,
) -> Panels:
    drawable = []
    for site in sites:
        data = site.get(key) or {}
        lines = (site.get("ranks") or ()) if marks is None else [site.get(mark) for mark in marks]
        drawn = plots.curve(data.get(ranks) or (), data.get("values") or (), lines)
        if drawn is not None:
            drawable.append((site, drawn))

    def importance(pair: tuple[Mapping[str, Any], plots.Curve]) -> tuple[bool, float]:
        site = pair[0]
        saved = (finite(site.get("parameters_before")) or 0.0) - (finite(site.get("parameters_after")) or 0.0)
        size = finite(site.get("parameters_before", site.get("parameters"))) or 0.0
        changed = site.get("decision") == "factorized"
        return changed, saved if changed else size

    chosen = _largest(drawable, importance, PANELS)
    drawings = plots.small_multiples([drawn for _, drawn in chosen], scale_each)
    panels = tuple(
        Panel(plain(site["name"]), _caption(site, drawn, marks), Markup(svg))  # safe: text escaped
        for (site, drawn), svg in zip(chosen, drawings, strict=True)
    )
    kinds = sorted({str((site.get(key) or {}).get("kind")) for site, _ in chosen})
    return Panels(panels, len(drawable) - len(chosen), tuple(kinds))


def _caption(site: Mapping[str, Any], drawn: plots.Curve, marks: Mapping[str, str] | None) -> str:
    if marks is not None:
        told = [f"{name} {site[mark]}" for mark, name in marks.items() if site.get(mark) is not None]
        return ", ".join(told) or f"full rank {max(drawn.ranks)}"
    if site.get("decision") != "factorized":
        return "kept"
    noun = "ranks" if len(site.get("ranks") or ()) > 1 else "rank"
    return f"{plain(site.get('technique') or 'factorized')}, {noun} {units.ranks(site.get('ranks'))}"


def _largest(items: Sequence[Any], weight: Callable[[Any], Any], number: int) -> list[Any]:
    places = sorted(range(len(items)), key=lambda place: weight(items[place]), reverse=True)[:number]
    return [items[place] for place in sorted(places)]


def _steps(seconds: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """Return steps with their time and their percent of the whole run, the whole run last."""
    total = finite(seconds.get("total")) or sum(finite(value) or 0.0 for value in seconds.values()) or 1.0
    names = [name for name in seconds if name != "total" and seconds[name]] + ["total"] * ("total" in seconds)
    return [
        (
            plain(name),
            units.duration(seconds[name]),
            min(100.0, round(100 * (finite(seconds[name]) or 0) / total, 1)),
        )
        for name in names
    ]


@cache
def _environment() -> jinja2.Environment:
    here = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here),
        autoescape=True,  # model files name their nodes, and people their files, freely
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["style"] = Markup((here / "style.css").read_text(encoding="utf-8"))
    for filter_ in (
        units.significant,
        units.count,
        units.size,
        units.ratio,
        units.percent,
        units.change,
        units.duration,
        units.latency,
        units.shape,
        units.ranks,
        units.plural,
        units.plain,
        wording.decibels,
        wording.similarity,
        wording.environment,
        wording.sentence,
        breakable,
    ):
        environment.filters[filter_.__name__] = filter_
    return environment
