"""What ``inspect`` found in a model: the layers, what could take them, and how far their rank falls."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from lowrank_onnx.report import html, units, wording
from lowrank_onnx.report.terminal import ROWS, layer_name, layer_table, reasons, say
from lowrank_onnx.report.units import plain

STRUCTURES_NOTE = "Error of each structure with half of the layer's parameters, on the data where there are any."


def render_inspection(report: Mapping[str, Any], console: Console) -> None:
    """Print an inspection: the model's size, a table of its layers, and who takes them or why nobody does.

    Args:
        report: The inspection; see ``write_inspection_html``.
        console: See ``render_terminal``.
    """
    model, before, sites = report["model"], report["before"], report["sites"]
    say(
        console,
        f"{plain(model['path'])}  opset {model['opset']}  sha256 {plain(model['sha256'])[:12]}",
        "dim",
    )
    console.print()
    say(console, summary(report), "bold")
    console.print()
    say(
        console,
        f"Parameters {units.count(before.get('parameters'), 4)}, MACs {units.count(before.get('macs'), 4)}, "
        f"size {units.size(before.get('size_bytes'))}.",
    )
    say(console, spectra_note(report))
    if not sites:
        return
    largest = sorted(range(len(sites)), key=lambda place: _weight(sites[place]), reverse=True)[:ROWS]
    shown = [sites[place] for place in sorted(largest)]
    rows = [
        [
            layer_name(site),
            plain(site["op"]),
            units.shape(site.get("shape")),
            units.count(site.get("parameters")),
            units.count(site.get("macs")),
            *(_rank(site.get(key)) for key in ("break_even_rank", "rank_90", "rank_99")),
            units.significant(site.get("effective_rank")),
        ]
        for site in shown
    ]
    console.print()
    headers = ["Layer", "Op", "Shape", "Params", "MACs", "Even", "90 %", "99 %", "Eff."]
    console.print(layer_table(console, headers, rows, right=range(3, 9)))
    if len(sites) > len(shown):
        say(
            console,
            f"The {len(shown)} largest of {units.plural(len(sites), 'layer')}; JSON and HTML list all.",
        )
    say(
        console,
        "Even: factors of this rank cost as much as the layer. 90 %, 99 %: the rank that holds this share of "
        "the squared spectrum. Eff.: effective rank.",
        "dim",
    )
    if compared := structures(report):
        names = compared[0][1].keys()
        console.print()
        say(console, STRUCTURES_NOTE)
        lines = [[name, *(units.percent(error) for error in errors.values())] for name, errors, _ in compared[:ROWS]]
        console.print(layer_table(console, ["Layer", *names], lines, right=range(1, 1 + len(names))))
    if taken := takers(report):
        counts = ", ".join(f"{technique} ({len(names)})" for technique, names in taken)
        console.print()
        what = "layers or blocks" if report.get("blocks") else "layers"
        say(console, f"Techniques, and how many {what} each takes: {counts}.")
    refused = [site for site in sites if not site.get("techniques")]
    reasons(console, wording.by_reason(refused), "Layers that no technique takes, and why")


def write_inspection_html(report: Mapping[str, Any], path: Path) -> None:
    """Write an inspection as one self-contained page.

    Args:
        report: ``schema``, ``version``, ``model``, ``before`` (a state of ``schema.json``), ``sites`` and,
            where known, ``environment`` and ``data``. A site has ``name``, ``kind``, ``op``, ``shape``,
            ``parameters``, ``macs``, ``reason`` (why no technique takes it), ``techniques``,
            ``break_even_rank``, ``rank_90``, ``rank_99``, ``effective_rank``, and maybe ``spectrum`` and
            ``damage`` as in ``schema.json``. ``blocks``, if any, are layers that techniques take together: ``name``,
            ``kind`` and ``techniques``.
        path: The page; replaced where it exists.

    Raises:
        LowRankError: The page cannot be written.
    """
    marks = {"break_even_rank": "break-even", "rank_99": "99 %"}
    html.write_page(
        "inspection.html",
        path,
        report=report,
        summary=summary(report),
        note=spectra_note(report),
        takers=takers(report),
        refused=wording.by_reason(site for site in report["sites"] if not site.get("techniques")),
        bars=html.bars(report["sites"]),
        structures=structures(report),
        structures_note=STRUCTURES_NOTE,
        spectra=html.spectra(report["sites"], marks),
        sensitivity=html.sensitivity(report["sites"], marks),
    )


def structures(report: Mapping[str, Any]) -> list[tuple[str, dict[str, float | None], str]]:
    """Return the layers where structures were compared: name, error by structure, the structure with the least."""
    compared = [(plain(site["name"]), dict(site["structures"])) for site in report["sites"] if site.get("structures")]
    return [
        (name, errors, min((e, key) for key, e in errors.items() if e is not None)[1])
        for name, errors in compared
        if any(error is not None for error in errors.values())
    ]


def summary(report: Mapping[str, Any]) -> str:
    """Return the inspection in one sentence."""
    sites = report["sites"]
    if not sites:
        return "The model has no layer that low-rank factorization could take."
    takeable = sum(bool(site.get("techniques")) for site in sites)
    return f"{takeable} of {units.plural(len(sites), 'layer')} can be factorized."


def spectra_note(report: Mapping[str, Any]) -> str:
    """Return one sentence on whether ranks were judged through data."""
    kinds = {(site.get("spectrum") or {}).get("kind") for site in report["sites"]}
    if "whitened" in kinds:
        return "Ranks are those of the weights seen through the calibration data."
    return "Ranks are those of the weights alone: no calibration data was used."


def takers(report: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Return each technique with the names of the layers and blocks it takes, the most frequent first."""
    groups: dict[str, list[str]] = {}
    for site in (*report["sites"], *(report.get("blocks") or ())):
        for technique in site.get("techniques") or ():
            groups.setdefault(plain(technique), []).append(plain(site["name"]))
    return sorted(groups.items(), key=lambda group: (-len(group[1]), group[0]))


def _weight(site: Mapping[str, Any]) -> float:
    return units.finite(site.get("macs")) or units.finite(site.get("parameters")) or 0.0


def _rank(value: Any) -> str:
    return units.DASH if value is None else f"{value}"
