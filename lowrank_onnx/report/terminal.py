"""The report as tables for a terminal: readable in 80 columns, in a pipe, and without colour."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.cells import cell_len, chop_cells
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowrank_onnx.report import uncertainty, units, wording
from lowrank_onnx.report.units import NBSP, finite, plain

ROWS = 40
"""Longest table of layers; what is beyond is counted, not listed."""

COMPONENTS = 5
"""Most components of one layer."""

_ASCII = str.maketrans(
    {"→": "->", "×": "x", "–": "-", "−": "-", "≤": "<=", "≈": "~", "…": "...", "·": "-", "\ufffd": "?"}
)
_ASCII_RULE = box.Box("    \n    \n -- \n    \n    \n -- \n    \n    \n", ascii=True)
_MIN_NAME = 14


def render_terminal(report: Mapping[str, Any], console: Console) -> None:
    """Print a report: the result, before and after, every layer or the essence of them, and the reasons.

    Args:
        report: A dict of ``schema.json``; null is welcome wherever the schema allows it.
        console: Its width decides how far layer names are shortened; without a terminal it writes no colour.
    """
    model = report["model"]
    say(
        console,
        f"{plain(model['path'])}  opset {model['opset']}  sha256 {plain(model['sha256'])[:12]}",
        "dim",
    )
    say(console, wording.asked(report), "dim")
    console.print()
    say(console, wording.headline(report), "bold")
    console.print()
    console.print(_before_after(report, console))
    console.print()
    for sentence in wording.notes(report):
        say(console, sentence)
    if where := wording.environment(report):
        say(console, f"Measured with {where}.")
    for warning in report.get("warnings") or ():
        say(console, f"Warning: {wording.sentence(warning)}", "yellow")
    _layers(report, console)
    for name, lines in wording.components(report["sites"]):
        console.print()
        say(console, f"{name}: the strongest rows of {units.plural(len(lines), 'component')}", "bold")
        for line in lines[:COMPONENTS]:
            say(console, f"  {line}")
        if len(lines) > COMPONENTS:
            say(console, f"and {len(lines) - COMPONENTS} more; the JSON and HTML reports list every component.")
    _uncertainty(report, console)


def _uncertainty(report: Mapping[str, Any], console: Console) -> None:
    sentences, rows = uncertainty.sentences(report), uncertainty.layers(report)
    if not sentences:
        return
    console.print()
    say(console, "How sure this is", "bold")
    for sentence in sentences:
        say(console, sentence)
    if rows:
        console.print()
        console.print(layer_table(console, uncertainty.HEADERS, rows[:ROWS], right=range(2, len(uncertainty.HEADERS))))
        if len(rows) > ROWS:
            say(console, f"and {len(rows) - ROWS} more; the JSON and HTML reports list every layer.")
        say(console, uncertainty.MEANING)
    for sentence in uncertainty.without(report):
        say(console, f"No posterior of {sentence}")


def say(console: Console, sentence: str, style: str = "") -> None:
    """Print one sentence, wrapped between words."""
    console.print(Text(encodable(sentence, console), style=style))


def encodable(text: str, console: Console) -> str:
    """Return text the console's encoding has: pipes on Windows and in the C locale are not UTF-8."""
    text = text.replace(NBSP, " ")
    if console.encoding.lower().startswith("utf"):
        return text.encode("utf-8", "replace").decode()  # lone surrogates
    return text.translate(_ASCII).encode(console.encoding, "replace").decode(console.encoding)


def shorten(names: Sequence[str], width: int) -> list[str]:
    """Return names in at most so many terminal cells each, cut in the middle where most stay distinct.

    Args:
        names: One a layer.
        width: In cells, at least 8; wide characters take two.
    """
    # The end carries a layer's own name: two thirds of the room, unless another cut tells more apart.
    cuts = [[_cut(name, width, width * share // 12) for name in names] for share in (4, 2, 6, 8, 10)]
    return max(cuts, key=lambda shortened: len(set(shortened)))


def _cut(text: str, width: int, head: int) -> str:
    if cell_len(text) <= width:
        return text
    return chop_cells(text, head)[0] + "…" + chop_cells(text[::-1], width - 1 - head)[0][::-1]


def layer_name(site: Mapping[str, Any]) -> str:
    """Return a layer's name without the operator that exporters append: the next column says it."""
    name, ending = plain(site["name"]), "/" + plain(site["op"])
    return name.removesuffix(ending) or name


def plain_table(console: Console, headers: Sequence[str], right: Iterable[int] = ()) -> Table:
    """Return an empty table in the look of the reports; ``right`` names the columns of numbers."""
    unicode = console.encoding.lower().startswith("utf")
    table = Table(
        box=box.SIMPLE_HEAD if unicode else _ASCII_RULE,
        show_edge=False,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        header_style="bold",
    )
    numbers = set(right)
    for place, header in enumerate(headers):
        table.add_column(encodable(header, console), justify="right" if place in numbers else "left", overflow="fold")
    return table


def layer_table(
    console: Console,
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: Iterable[int],
    style: Callable[[int], str] = lambda row: "",
) -> Table:
    """Return a table whose first column, the layer's name, gives way to the others.

    Args:
        console: For its width and encoding.
        headers: One a column.
        rows: One string a column.
        right: Places of the columns of numbers.
        style: Style of a row by its place.
    """
    cells = [[encodable(cell, console) for cell in row] for row in rows]
    heads = [encodable(header, console) for header in headers]
    widths = [max(map(cell_len, column)) for column in zip(heads, *cells, strict=True)]
    gaps = 2 * (len(headers) - 1)
    name = max(_MIN_NAME, console.width - sum(widths[1:]) - gaps)
    table = plain_table(console, headers, right)
    for column, width in zip(table.columns[1:], widths[1:], strict=True):
        column.min_width = min(width, 5)
    table.columns[0].no_wrap = True
    # An ellipsis outside the console's encoding is three dots: two more cells.
    names = shorten([row[0] for row in cells], name if encodable("…", console) == "…" else name - 2)
    for place, (first, row) in enumerate(zip(names, cells, strict=True)):
        table.add_row(*(Text(cell) for cell in (encodable(first, console), *row[1:])), style=style(place))
    return table


def reasons(console: Console, groups: Sequence[tuple[str, list[str]]], title: str) -> None:
    """Print groups of layers under their reason, with counts and the first few names."""
    if not groups:
        return
    console.print()
    say(console, title, "bold")
    for reason, names in groups:
        shown = ", ".join(shorten(names[:3], 40))
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        head = Text(f"{len(names):>5}  ", style="bold")
        body = Text(encodable(f"{reason}: {shown}{more}", console))
        grid = Table.grid()
        grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold")
        grid.add_row(head, body)
        console.print(grid)


def _before_after(report: Mapping[str, Any], console: Console) -> Table:
    table = plain_table(console, ["", "Before", "After", "After / before"], right=(1, 2))
    for line in wording.comparisons(report):
        table.add_row(*(Text(encodable(text, console)) for text in (line.label, line.before, line.after, line.outcome)))
    return table


def _layers(report: Mapping[str, Any], console: Console) -> None:
    sites = report["sites"]
    if not sites and report.get("candidate"):
        return
    if not sites:
        console.print()
        say(console, "The model has no layer that low-rank factorization could take.")
        return
    done = wording.factorized(sites)
    shown = sites if len(sites) <= ROWS else done[:ROWS]
    console.print()
    say(console, f"{len(done)} of {units.plural(len(sites), 'layer')} factorized", "bold")
    if shown:
        console.print()
        console.print(_layer_rows(shown, sites, wording.errors_are_output(report), console))
    if len(sites) > ROWS and len(done) > ROWS:
        say(console, f"and {len(done) - ROWS} more factorized; the JSON and HTML reports list every layer.")
    if any(_error(site, wording.errors_are_output(report))[-1] == "*" for site in shown):
        say(console, "* weight error: this layer's output was not observed.")
    kept = [site for site in sites if site.get("decision") != "factorized"]
    reasons(console, wording.by_reason(kept), f"{units.plural(len(kept), 'layer')} kept, and why")


def _layer_rows(
    shown: Sequence[Mapping[str, Any]], sites: Sequence[Mapping[str, Any]], output: bool, console: Console
) -> Table:
    key = wording.quantity(sites)
    headers = [
        "Layer",
        "Op",
        "Shape",
        "Decision",
        "Ranks",
        "Error",
        "MACs" if key == "macs" else "Parameters",
    ]
    rows = []
    for site in shown:
        changed = site.get("decision") == "factorized"
        before, after = units.count(site.get(f"{key}_before")), units.count(site.get(f"{key}_after"))
        rows.append(
            [
                layer_name(site),
                plain(site["op"]),
                units.shape(site.get("shape")),
                plain(site.get("technique") or "factorized") if changed else "kept",
                units.ranks(site.get("ranks")) if changed else "",
                _error(site, output) if changed else "",
                f"{before}→{after}" if changed else before,
            ]
        )
    styles = ["" if site.get("decision") == "factorized" else "dim" for site in shown]
    return layer_table(console, headers, rows, right=(5,), style=styles.__getitem__)


def _error(site: Mapping[str, Any], output: bool) -> str:
    if output and finite(site.get("output_error")) is None and finite(site.get("weight_error")) is not None:
        return units.percent(site["weight_error"]) + "*"
    return units.percent(site.get("output_error" if output else "weight_error"))
