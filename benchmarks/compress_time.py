"""Seconds and memory to compress, and the measured speed of the result, for models on disk.

    python benchmarks/compress_time.py --keep-macs 0.5 FOLDER [FOLDER ...]

Each folder holds model.onnx and calibrate.npz. Every model runs in a process of its own, twice: with an
empty cache and with the cache the first run left.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--keep-macs", default="0.5")
    options = parser.parse_args()
    print("| model | first run s | warm cache s | peak GB | MACs | speed-up | cosine |")
    print("|---|---|---|---|---|---|---|")
    for folder in options.folders:
        with tempfile.TemporaryDirectory() as scratch:
            runs = [_compress(folder, options.keep_macs, Path(scratch)) for _ in range(2)]
        if any(isinstance(run, str) for run in runs):
            print(f"| {folder.name} | {runs[0]} | | | | | |", flush=True)
            continue
        first, warm = runs
        ratio = first["ratio"]
        speed = f"{ratio['speedup']:.2f} ({ratio['speedup_low']:.2f} to {ratio['speedup_high']:.2f})"
        print(
            f"| {folder.name} | {first['seconds']['total']:.0f} | {warm['seconds']['total']:.0f} | "
            f"{first['peak_rss_bytes'] / 1e9:.2f} | {ratio['macs']:.3f} | {speed} | "
            f"{first['fidelity']['cosine']:.4f} |",
            flush=True,
        )


def _compress(folder: Path, keep: str, scratch: Path) -> dict[str, dict[str, float]] | str:
    report = scratch / "report.json"
    command = [sys.executable, "-m", "lowrank_onnx.cli", "compress", str(folder / "model.onnx")]
    command += ["-o", str(scratch / "out.onnx"), "--overwrite", "--calibrate", str(folder / "calibrate.npz")]
    command += ["--keep-macs", keep, "--json", str(report)]
    environment = {**os.environ, "LOWRANK_ONNX_CACHE": str(scratch / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}"
    made: dict[str, dict[str, float]] = json.loads(report.read_text())
    return made


if __name__ == "__main__":
    main()
