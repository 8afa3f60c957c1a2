"""The same command line on CPU and CUDA: what the tool makes of the models at hand, as a table.

    python benchmarks/cuda.py --providers cpu,cuda,cuda-graph --targets max-drop=0.01,speedup=1.1 FOLDER ...
    python benchmarks/cuda.py --providers cuda --targets keep-macs=0.5,keep-macs=0.25 blocks/

A folder holds model.onnx and, where there are any, calibrate.npz, evaluate.npz and metric.py. Every row is a run of
``lowrank-onnx compress`` in a process of its own; where it gives up (exit 3) the row says why. ``--half`` converts
the models to float16 first, ``--shape`` and whatever stands behind ``--`` goes to every run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import onnx

_COMMAND = "from lowrank_onnx.cli import main; main()"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--providers", default="cpu,cuda")
    parser.add_argument("--targets", default="max-drop=0.01")
    parser.add_argument("--half", action="store_true")
    parser.add_argument("--shape", action="append", default=[])
    parser.add_argument("--metric", default="", help="used where a folder has no metric.py")
    parser.add_argument("--minutes", type=float, default=10, help="most for one run")
    parser.add_argument("--rows", type=Path, help="append every row to this file, as JSON")
    options, more = parser.parse_known_args()
    told = ""
    with tempfile.TemporaryDirectory() as place:
        for folder in options.folders:
            model = _half(folder / "model.onnx", Path(place)) if options.half else folder / "model.onnx"
            for target in options.targets.split(","):
                for provider in options.providers.split(","):
                    row = _run(folder, model, target, provider, options, more, Path(place))
                    if row["where"] and row["where"] != told:
                        told = row["where"]
                        print(f"\n{told}\n\n| model | provider | target | MACs | speed-up | loss | seconds |")
                        print("|---|---|---|---|---|---|---|", flush=True)
                    print(f"| {' | '.join(row['cells'])} |", flush=True)
                    if options.rows is not None:
                        with options.rows.open("a") as file:
                            file.write(json.dumps(row) + "\n")


def _run(
    folder: Path, model: Path, target: str, provider: str, options: argparse.Namespace, more: list[str], place: Path
) -> dict[str, Any]:
    """One row: the arguments, the report if there is one, and the cells of the table."""
    kind, _, value = target.partition("=")
    report = place / "report.json"
    report.unlink(missing_ok=True)
    arguments = ["compress", str(model), "-o", str(place / "out.onnx"), f"--{kind}", value, "--provider", provider]
    arguments += ["--json", str(report), "--overwrite", *more]
    for name in ("calibrate", "evaluate"):
        if (folder / f"{name}.npz").exists():
            arguments += [f"--{name}", str(folder / f"{name}.npz")]
    metric = f"{folder / 'metric.py'}:metric" if (folder / "metric.py").exists() else options.metric
    arguments += ["--metric", metric] if metric else []
    for shape in options.shape:
        arguments += ["--shape", shape]
    begin = perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, "-c", _COMMAND, *arguments],
            capture_output=True,
            text=True,
            timeout=60 * options.minutes,
            check=False,
        )
        code, said = done.returncode, (done.stderr.strip() or done.stdout.strip()).splitlines()
    except subprocess.TimeoutExpired:
        code, said = -1, [f"stopped after {options.minutes:g} minutes"]
    seconds = perf_counter() - begin
    name = f"{folder.resolve().name}{' fp16' if options.half else ''} {' '.join(options.shape)}".strip()
    content = json.loads(report.read_text()) if report.exists() and code == 0 else {}
    cells = [name, provider, target, *_cells(content, code, said), f"{seconds:.0f}"]
    return {"where": _where(content), "cells": cells, "exit": code, "said": said[-12:], "report": content}


def _cells(report: dict[str, Any], code: int, said: list[str]) -> list[str]:
    if not report:
        return ["", f"exit {code}: {said[-1] if said else ''}", ""]
    ratio, metric, fidelity = report["ratio"], report["metric"], report["fidelity"]
    speed = f"{ratio['speedup']:.2f} ({ratio['speedup_low']:.2f} to {ratio['speedup_high']:.2f})"
    loss = "" if fidelity is None else f"cosine {fidelity['cosine']:.4f}"
    if metric is not None:
        called = metric["name"].rpartition("/")[2]
        loss = f"{called} {100 * metric['relative_drop']:+.2f} %"
    return [f"{ratio['macs']:.2f}", speed, loss]


def _where(report: dict[str, Any]) -> str:
    if not report:
        return ""
    where = report["environment"]
    versions = ", ".join(f"{name} {number}" for name, number in where.get("versions", {}).items())
    return f"{where['device']}, onnxruntime {where['onnxruntime']}{', ' + versions if versions else ''}"


def _half(path: Path, place: Path) -> Path:
    """The model in float16, inputs and outputs as they were."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    out = place / f"{path.resolve().parent.name}.onnx"
    onnx.save(convert_float_to_float16(onnx.load(path), keep_io_types=True), out)
    return out


if __name__ == "__main__":
    main()
