"""The command line. Every command calls the function of the same name and shows what it gives."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lowrank_onnx import pipeline
from lowrank_onnx.errors import LowRankError, TargetError
from lowrank_onnx.level_files import check_level_outputs, level_paths
from lowrank_onnx.model import check_output, data_file, external_files, load
from lowrank_onnx.multilevel import FORMS
from lowrank_onnx.report import (
    encodable,
    render_inspection,
    render_terminal,
    write_arrays,
    write_html,
    write_inspection_html,
    write_json,
)
from lowrank_onnx.report.units import plural, significant
from lowrank_onnx.report.wording import similarity
from lowrank_onnx.runtime import PROVIDERS
from lowrank_onnx.statistics import Progress as Told
from lowrank_onnx.target import KINDS, OBJECTIVES
from lowrank_onnx.version import __version__

Command = TypeVar("Command", bound=Callable[..., Any])

EXIT_TARGET = 3


class Interrupted(BaseException):
    """A signal asked the process to end; not KeyboardInterrupt, of which click makes something else."""


def _options(*decorators: Callable[[Any], Any]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


_target = _options(
    click.option("--keep-params", type=float, metavar="F", help="Parameters after / before at most F."),
    click.option("--keep-macs", type=float, metavar="F", help="Multiply-accumulates after / before at most F."),
    click.option("--keep-size", type=float, metavar="F", help="File bytes after / before at most F."),
    click.option("--speedup", type=float, metavar="X", help="Measured latency before / after at least X."),
    click.option("--max-drop", type=float, metavar="D", help="Relative loss of the metric at most D.  [default: 0.01]"),
    click.option("--rank", metavar="R", help="No search: 64, 0.25, energy=0.95, or a technique's selector."),
)
_calibrate = click.option(
    "--calibrate", metavar="DATA", help="Representative inputs: .npz, folder of test_data_set_N, module:function."
)
_evaluate = click.option("--evaluate", metavar="DATA", help="Held-out inputs, for the figures of the result.")
_metric = click.option("--metric", metavar="NAME", help="top1, psnr, ..., path.py:function. Fidelity without one.")
_technique = click.option("--technique", multiple=True, metavar="NAME[:opt=value,...]", help="May repeat.")
_samples = click.option(
    "--samples", type=click.IntRange(8), metavar="N", help="Of bayesian:variant=gibbs, for each layer.  [default: 200]"
)
_filters = _options(
    click.option("--include", multiple=True, metavar="GLOB", help="Only nodes of this name. May repeat."),
    click.option("--exclude", multiple=True, metavar="GLOB", help="Not nodes of this name. May repeat."),
)
_mask = click.option("--mask", metavar="NAME", help="Input that is non-zero at real rows; padding does not count.")
_runtime = _options(
    click.option("--provider", type=click.Choice(list(PROVIDERS)), default="cpu", show_default=True),
    click.option("--threads", type=click.IntRange(0), default=0, help="0: as many as there are cores."),
    click.option("--shape", multiple=True, metavar="NAME=1,128", help="Fixes a dynamic input. May repeat."),
)
_seed = click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Same seed, same bytes out.")
_jobs = _options(
    click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Local workers."),
    click.option("--scheduler", metavar="URL", help="A Dask cluster whose workers decompose: tcp://host:8786."),
)
_refine = click.option(
    "--no-refine", "refine", is_flag=True, flag_value=False, default=True, help="Do not refit the factors."
)
_augment = click.option(
    "--no-augment",
    "augment",
    is_flag=True,
    flag_value=False,
    default=True,
    help="Calibrate on the given samples alone, without copies with exchanged tokens or mirrored images.",
)
_io_change = click.option(
    "--allow-io-change",
    is_flag=True,
    help="Let inputs and outputs that hold a cache of keys or values get narrower.",
)
_minimize = click.option(
    "--minimize",
    type=click.Choice(OBJECTIVES),
    default="latency",
    show_default=True,
    help="Objective under --max-drop.",
)
_cache = click.option(
    "--no-cache", "cache", is_flag=True, flag_value=False, default=True, help="Measure anew what earlier runs measured."
)
_labels = click.option(
    "--labels", metavar="FILE", help="Names, one a line, for the rows of the factors of nmf; the report lists them."
)
_agreement = click.option(
    "--agreement",
    type=float,
    metavar="A",
    help="Cascade: the target is the cheap level, and samples it is unsure of go on to the original, so that a share "
    "A of all keep their best class.",
)
_levels = _options(
    click.option("--levels", metavar="F,F,...", help="Several shares to keep, chosen at run time."),
    click.option(
        "--levels-as",
        type=click.Choice(FORMS),
        default=FORMS[0],
        show_default=True,
        help="OUT for the highest level, a file beside it for each smaller one, and one file of weights for all; or "
        "one file that the input rank_level switches.",
    ),
    click.option("--by", type=click.Choice(["macs", "params", "size"]), default="macs", help="What --levels share."),
)
_uncertainty = _options(
    click.option(
        "--uncertainty",
        "posteriors",
        type=click.Path(path_type=Path),
        metavar="FILE.npz",
        help="Write how sure the calibration data make every layer's factors; a quarter of the data is held out.",
    ),
    click.option(
        "--emit-uncertainty",
        is_flag=False,
        flag_value="",
        metavar="[NAME,...]",
        help="Add an output NAME_stddev, the deviation that the compression is predicted to cause, for these outputs "
        "or for all of floating-point numbers; a quarter of the calibration data is held out.",
    ),
)
_json = click.option(
    "--json", "json_file", type=click.Path(path_type=Path), metavar="FILE", help="JSON report; replaced if it exists."
)
_overwrite = click.option("--overwrite", is_flag=True, help="Replace files that exist.")
_report = click.option(
    "--report", type=click.Path(path_type=Path), metavar="FILE.html", help="HTML report; replaced if it exists."
)
_out = click.option("-o", "--out", required=True, type=click.Path(path_type=Path), metavar="OUT")
_model = click.argument("model", type=click.Path(path_type=Path))


_WRITTEN = ("out", "report", "json_file", "html", "posteriors")
_READ = ("model", "models", "reference", "candidate", "plan", "calibrate", "evaluate", "metric", "labels")


class Guarded(click.Command):
    """A command that refuses to write over any file it reads, whatever ``--overwrite`` says."""

    def invoke(self, ctx: click.Context) -> Any:
        """Check the paths, then run the command."""
        values = [(name, value) for name in _READ for value in _listed(ctx.params.get(name))]
        for name in _WRITTEN:
            path = ctx.params.get(name)
            if path is None or not path.is_file():
                continue
            for role, value in values:
                # A metric or a loader is file.py:function.
                source = Path(str(value).rpartition(":")[0] if ".py:" in str(value) else value)
                if source.is_file() and any(path.samefile(entry) for entry in (source, *external_files(source))):
                    what = "the model itself" if role == "model" and path.samefile(source) else "read by this command"
                    raise LowRankError(f"'{path}' is {what} and would be overwritten; name another file for the output")
        return super().invoke(ctx)


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, tuple) else [value]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="lowrank-onnx")
def cli() -> None:
    """Make an exported ONNX model smaller and faster by low-rank factorization, with measured proof."""


@cli.command(cls=Guarded, short_help="Tell what a model is made of, how compressible it is.")
@_model
@_calibrate
@_technique
@_mask
@_runtime
@_seed
@_jobs
@_augment
@_cache
@_json
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE", help="HTML page.")
@click.option("--structure", is_flag=True, help="Error of each structure at half of a layer's parameters.")
@_overwrite
def inspect(model: Path, json_file: Path | None, html: Path | None, overwrite: bool, **options: Any) -> None:
    """Show what MODEL is made of and how compressible each layer is."""
    _check_reports(overwrite, ("--json", json_file), ("--html", html))
    with _progress() as progress:
        report = pipeline.inspect(model, progress=progress, **options)
    render_inspection(report, _console())
    if json_file is not None:
        write_json(report, json_file)
    if html is not None:
        write_inspection_html(report, html)


@cli.command(cls=Guarded, short_help="Write a smaller, faster model, and prove it.")
@_model
@_out
@_target
@_agreement
@_levels
@_calibrate
@_evaluate
@_metric
@_technique
@_samples
@_filters
@_mask
@_runtime
@_seed
@_jobs
@_refine
@_augment
@_io_change
@_minimize
@_cache
@_labels
@_uncertainty
@_report
@_json
@_overwrite
def compress(
    model: Path,
    out: Path,
    levels: str | None,
    posteriors: Path | None,
    emit_uncertainty: str | None,
    report: Path | None,
    json_file: Path | None,
    overwrite: bool,
    **options: Any,
) -> None:
    """Write a smaller, faster MODEL to OUT, and prove it."""
    _check_target(options)
    options["uncertainty"] = posteriors is not None
    if emit_uncertainty is not None:
        options["emit_uncertainty"] = tuple(filter(None, emit_uncertainty.split(",")))
    if levels is not None:
        options["levels"] = _shares("--levels", levels)
    target = check_output(out, load(model), overwrite)
    if levels is not None and options["levels_as"] == "files":
        check_level_outputs(target, load(model), len(options["levels"]), overwrite)
    _check_reports(overwrite, ("--report", report), ("--json", json_file), ("--uncertainty", posteriors), out=target)
    with _progress() as progress:
        result = pipeline.compress(model, progress=progress, **options)
    with _together(posteriors):
        if posteriors is not None:
            write_arrays(result.posteriors, posteriors)
        _finish(result, target, report, json_file)


@cli.command(cls=Guarded, short_help="Write down what compress would do, to read and edit.")
@_model
@_out
@_target
@_calibrate
@_evaluate
@_metric
@_technique
@_samples
@_filters
@_mask
@_runtime
@_seed
@_jobs
@_refine
@_augment
@_io_change
@_minimize
@_cache
@_report
@_json
@_overwrite
def plan(model: Path, out: Path, report: Path | None, json_file: Path | None, overwrite: bool, **options: Any) -> None:
    """Decide what compress would do to MODEL, and write that down as JSON to read, edit and apply."""
    _check_target(options)
    target = check_output(out, load(model), overwrite)
    _check_reports(overwrite, ("--report", report), ("--json", json_file), out=target)
    with _progress() as progress:
        result = pipeline.compress(model, progress=progress, **options)
    with _together(report, json_file):
        _write(result.report, report, json_file)
        write_json(result.plan, target)
    render_terminal(result.report, _console())
    click.echo(f"wrote {target}")


@cli.command(cls=Guarded, short_help="Carry out a plan, maybe edited by hand.")
@_model
@click.argument("plan", type=click.Path(path_type=Path))
@_out
@_calibrate
@_evaluate
@_metric
@click.option("--threads", type=click.IntRange(0), default=0, help="0: as many as there are cores.")
@click.option("--shape", multiple=True, metavar="NAME=1,128", help="Fixes a dynamic input. May repeat.")
@_jobs
@_report
@_json
@_overwrite
def apply(
    model: Path, plan: Path, out: Path, report: Path | None, json_file: Path | None, overwrite: bool, **options: Any
) -> None:
    """Carry out PLAN on MODEL; the plan may have been edited by hand."""
    target = check_output(out, load(model), overwrite)
    _check_reports(overwrite, ("--report", report), ("--json", json_file), out=target)
    with _progress() as progress:
        result = pipeline.apply(model, plan, progress=progress, **options)
    _finish(result, target, report, json_file)


@cli.command(cls=Guarded, short_help="Compare two models: accuracy and speed, side by side.")
@click.argument("reference", type=click.Path(path_type=Path))
@click.argument("candidate", type=click.Path(path_type=Path))
@_evaluate
@_metric
@_runtime
@_seed
@_report
@_json
@_overwrite
def validate(
    reference: Path, candidate: Path, report: Path | None, json_file: Path | None, overwrite: bool, **options: Any
) -> None:
    """Compare accuracy and speed of CANDIDATE with REFERENCE, side by side."""
    _check_reports(overwrite, ("--report", report), ("--json", json_file))
    with _progress() as progress:
        content = pipeline.validate(reference, candidate, progress=progress, **options)
    with _together(report, json_file):
        _write(content, report, json_file)
    render_terminal(content, _console())
    _tell_levels(content)


@cli.command(cls=Guarded, short_help="Time models side by side.")
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="MODEL [MODEL ...]")
@_evaluate
@_runtime
@_seed
@click.option("--seconds", type=float, default=6.0, show_default=True, help="Time to spend at most.")
@_json
@_overwrite
def benchmark(models: tuple[Path, ...], json_file: Path | None, overwrite: bool, **options: Any) -> None:
    """Time models side by side, interleaved; speed-ups are against the first."""
    _check_reports(overwrite, ("--json", json_file))
    content = pipeline.benchmark(models, **options)
    table = Table(title=_where(content["environment"]), title_justify="left")
    for heading, justify in (("model", "left"), ("median ms", "right"), ("IQR", "right"), ("runs", "right")):
        table.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]
    table.add_column("speed-up (95 %)", justify="right")
    for row in content["models"]:
        latency = row["latency_ms"]
        speed = f"{row['speedup']:.2f} ({row['speedup_low']:.2f} to {row['speedup_high']:.2f})"
        cells = (row["path"], significant(latency["median"]), significant(latency["iqr"]), str(latency["runs"]), speed)
        table.add_row(*cells)
    _console().print(table)
    if json_file is not None:
        write_json(content, json_file)


@cli.command(cls=Guarded, short_help="Write a model at several budgets, and what each costs.")
@_model
@click.option("-o", "--out", "folder", required=True, type=click.Path(path_type=Path), metavar="DIR")
@click.option("--budgets", metavar="F,F,...", help="Shares to keep.  [default: 0.9,0.8,...,0.2]")
@click.option("--by", type=click.Choice(["macs", "params", "size"]), default="macs", show_default=True)
@_calibrate
@_evaluate
@_metric
@_technique
@_samples
@_filters
@_mask
@_runtime
@_seed
@_jobs
@_refine
@_augment
@_io_change
@_cache
@_overwrite
def sweep(model: Path, folder: Path, budgets: str | None, **options: Any) -> None:
    """Write MODEL at several budgets to DIR, with a table and a plot of what each is worth."""
    shares = pipeline.SWEEP if budgets is None else _shares("--budgets", budgets)
    with _progress() as progress:
        content = pipeline.sweep(model, folder, budgets=shares, progress=progress, **options)
    table = Table(title=_where(content["environment"]), title_justify="left")
    columns = ("", "MACs", "parameters", "size", "speed-up (95 %)", "drop", "cosine")
    for heading in columns:
        table.add_column(heading, justify="right" if heading else "left")
    for row in (*content["reference"], *content["points"]):
        speed = (
            ""
            if row["speedup"] is None
            else f"{row['speedup']:.2f} ({row['speedup_low']:.2f} to {row['speedup_high']:.2f})"
        )
        cells = [_number(row[key]) for key in ("macs_ratio", "parameters_ratio", "size_ratio")]
        drop = "" if row["metric_drop"] is None else f"{100 * row['metric_drop']:.2f} %"
        table.add_row(row["label"], *cells, speed, drop, _cosine(row["cosine"]))
    console = _console()
    console.print(table)
    for text in content["warnings"]:
        console.print(text, highlight=False, markup=False)
    click.echo(f"wrote {len(content['points'])} models, frontier.csv, frontier.json and frontier.html to {folder}")


def _shares(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise LowRankError(f"{option} must be numbers separated by commas, got '{text}'") from error


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _cosine(value: float | None) -> str:
    return "" if value is None else similarity(value)


@cli.command("calibrate-device", cls=Guarded, short_help="Measure which layers gain on this device.")
@click.option("--provider", type=click.Choice(list(PROVIDERS)), default="cuda", show_default=True)
@click.option("--threads", type=click.IntRange(0), default=0, help="0: as many as there are cores.")
@_cache
@_json
@_overwrite
def calibrate_device(json_file: Path | None, overwrite: bool, **options: Any) -> None:
    """Measure once which ranks and sizes of layers are quicker factorized on this device."""
    _check_reports(overwrite, ("--json", json_file))
    with _progress() as progress:
        content = pipeline.calibrate_device(progress=progress, **options)
    table = Table(title=_where(content["environment"]), title_justify="left")
    for heading in ("layer", "rows", "dense µs"):
        table.add_column(heading, justify="left" if heading == "layer" else "right")
    table.add_column("speed-up at share of break-even", justify="left", overflow="fold")
    for row in content["crossovers"]:
        speeds = ", ".join(f"{value:.2f} at {share:.2f}" for share, value, _, _ in row["speedups"])
        layer = f"{row['dtype']} {row['inputs']} x {row['outputs']}"
        table.add_row(layer, str(row["rows"]), f"{row['dense_us']:.1f}", speeds)
    console = _console()
    console.print(table)
    for dtype, step in content["steps"].items():
        console.print(f"ranks of {dtype} layers are offered in steps of {step}", highlight=False)
    if json_file is not None:
        write_json(content, json_file)


@cli.command(cls=Guarded, short_help="List the techniques, their options and sources.")
@click.option("--json", "as_json", is_flag=True, help="As JSON on standard output.")
def passes(as_json: bool) -> None:
    """List the techniques, the kinds of layers they take, their options and where they come from."""
    rows = pipeline.passes()
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    console = _console()
    for row in rows:
        options = ", ".join(f"{name}={value}" for name, value in row["options"].items()) or "none"
        console.print(f"[bold]{row['name']}[/]  {encodable(row['summary'], console)}", highlight=False)
        console.print(
            f"    kinds: {', '.join(row['kinds'])}; {'on' if row['default'] else 'off'} by default", highlight=False
        )
        console.print(f"    options: {options}", highlight=False, markup=False)
        console.print(f"    {row['reference']}", highlight=False, markup=False)


def main() -> None:
    """Run the command line; the entry point of the package."""
    _open_streams()
    try:
        with _signals():
            cli(standalone_mode=False)
    except TargetError as error:
        _fail(str(error), EXIT_TARGET)
    except LowRankError as error:
        _fail(str(error), 1)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except Interrupted as error:
        _fail("interrupted; nothing unfinished was left behind", 128 + int(error.args[0]))
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # such as a name that is too long, wherever it is looked at first
        what = f"'{error.filename}'" if error.filename else "a file, or standard output,"
        _fail(f"{what} cannot be used: {error.strerror or error}", 1)
    except MemoryError:
        _fail("out of memory; use fewer calibration samples, or a machine with more memory", 1)


def _open_streams() -> None:
    """Have something to write to where a stream is closed, and let no letter fail that its encoding lacks."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by `>&-`
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # standard error spells such letters out by itself
        sys.stdout.reconfigure(errors="replace")


@contextmanager
def _signals() -> Iterator[None]:
    """Let Ctrl-C, a polite kill and a closed terminal unwind the stack, so that temporary files go."""

    def interrupt(number: int, frame: object) -> NoReturn:
        raise Interrupted(number)

    found = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    heeded = [number for number in found if signal.getsignal(number) is not signal.SIG_IGN]  # nohup has one ignored
    before = {number: signal.signal(number, interrupt) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _fail(message: str, status: int) -> NoReturn:
    click.echo(f"Error: {' '.join(message.split())}", err=True)
    sys.exit(status)


def _finish(result: pipeline.Result, out: Path, report: Path | None, json_file: Path | None) -> None:
    with _together(report, json_file):
        _write(result.report, report, json_file)
        result.save(out, overwrite=True)  # whether it may be replaced was asked before the work
    render_terminal(result.report, _console())
    _tell_levels(result.report)
    weights = [data_file(out)] if data_file(out).is_file() and external_files(out) else []
    for path in [*reversed(level_paths(out, len(result.levels) + 1)), *weights]:
        click.echo(f"wrote {path}")


def _tell_levels(content: Mapping[str, Any]) -> None:
    """One row a level of a file with several, and what a cascade sends on."""
    cascade = content.get("cascade")
    if cascade:
        told = [f"{cascade['escalated']:.1%} of the samples go on to the full model"]
        if cascade.get("expected_ms"):
            told.append(f"expected {cascade['expected_ms']:.4f} ms against {cascade['original_ms']:.4f} ms")
        if cascade.get("static_tried"):
            static = cascade["static"]
            alone = "no model without a cascade agrees as often"
            if static is not None:
                alone = f"{static['ms']:.4f} ms a model without a cascade that agrees as often ({static['option']})"
            told.append(f"{alone}, of {cascade['static_tried']} tried")
        click.echo("cascade: " + "; ".join(told))
    rows = content.get("levels") or ()
    if not rows:
        return
    for entry in content.get("level_forms") or ():
        speeds = [speed for speed in entry["against_static"] if speed is not None]
        speed = f"; {min(speeds):.2f} to {max(speeds):.2f} times as fast as levels alone" if speeds else ""
        chosen = "" if entry["chosen"] else " (not written)"
        files = plural(entry["files"], "file")
        click.echo(f"levels as {entry['form']}: {files}, {entry['size_bytes']:,} bytes{speed}{chosen}")
    table = Table(title="levels", title_justify="left")
    for heading in ("", "MACs", "speed-up (95 %)", "against its own file", "drop", "cosine", "agreement"):
        table.add_column(heading, justify="right")
    for row in rows:
        speed = (
            ""
            if row["speedup"] is None
            else f"{row['speedup']:.2f} ({row['speedup_low']:.2f} to " + (f"{row['speedup_high']:.2f})")
        )
        drop = "" if row["metric_drop"] is None else f"{100 * row['metric_drop']:.2f} %"
        cells = (_number(row["macs_ratio"]), speed, _number(row["against_static"]), drop)
        table.add_row(str(row["level"]), *cells, _cosine(row["cosine"]), _number(row["agreement"], 4))
    _console().print(table)


def _write(content: Mapping[str, Any], report: Path | None, json_file: Path | None) -> None:
    if json_file is not None:
        write_json(content, json_file)
    if report is not None:
        write_html({**content, "argv": " ".join(["lowrank-onnx", *sys.argv[1:]])}, report)


@contextmanager
def _together(*reports: Path | None) -> Iterator[None]:
    """Take reports away again where what they tell of could not be written."""
    new = [file for file in reports if file is not None and not file.exists()]
    try:
        yield
    except BaseException:
        for file in new:
            file.unlink(missing_ok=True)
        raise


def _check_target(options: Mapping[str, Any]) -> None:
    given = [f"--{kind.replace('_', '-')}" for kind in KINDS if options[kind] is not None]
    if len(given) > 1:
        raise click.UsageError(f"exactly one target may be given, got {', '.join(given)}")


def _check_reports(overwrite: bool, *files: tuple[str, Path | None], out: Path | None = None) -> None:
    """Find out that a report cannot be written before the work, not after it."""
    taken = {} if out is None else {out.resolve(): "-o"}
    for option, file in files:
        if file is not None:
            if file.resolve() in taken:
                raise LowRankError(f"{option} '{file}' is the file of {taken[file.resolve()]} too; name another file")
            taken[file.resolve()] = option
            check_output(file, None, overwrite or file.suffix in (".html", ".json"), option)


def _where(environment: Mapping[str, Any]) -> str:
    return (
        f"onnxruntime {environment['onnxruntime']}, {environment['provider']}, {environment['device']}, "
        f"{plural(environment['threads'], 'thread')}"
    )


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 100)


@contextmanager
def _progress() -> Iterator[Told | None]:
    """A progress bar on standard error, if that is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def told(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = bars.add_task(step, total=total)
            bars.update(tasks[step], completed=done, total=total)

        yield told


if __name__ == "__main__":
    main()
