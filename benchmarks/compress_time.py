"""Seconds and memory to compress, and the measured speed of the result, for models on disk.

    python benchmarks/compress_time.py --keep-macs 0.5,0.8 --threads 1 FOLDER [FOLDER ...]

Each folder holds model.onnx and calibrate.npz. Every model runs in a process of its own, twice: with an
empty cache and with the cache the first run left. Of several shares the first that can be met counts.
Processor seconds stand beside wall seconds, as other work does not lengthen them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--keep-macs", default="0.5", help="shares to try, separated by commas")
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    print("| model | first run s (processor) | warm cache s | peak GB | MACs | speed-up | cosine |")
    print("|---|---|---|---|---|---|---|")
    for folder in options.folders:
        for keep in options.keep_macs.split(","):
            with tempfile.TemporaryDirectory() as scratch:
                first, processor = _compress(folder, keep, options.threads, Path(scratch))
                if not isinstance(first, str):
                    warm, _ = _compress(folder, keep, options.threads, Path(scratch))
                    break
        if isinstance(first, str) or isinstance(warm, str):
            print(f"| {folder.name} | {first if isinstance(first, str) else warm} | | | | | |", flush=True)
            continue
        ratio = first["ratio"]
        speed = f"{ratio['speedup']:.2f} ({ratio['speedup_low']:.2f} to {ratio['speedup_high']:.2f})"
        print(
            f"| {folder.name} | {first['seconds']['total']:.0f} ({processor:.0f}) | {warm['seconds']['total']:.0f} | "
            f"{first['peak_rss_bytes'] / 1e9:.2f} | {ratio['macs']:.3f} | {speed} | "
            f"{first['fidelity']['cosine']:.4f} |",
            flush=True,
        )


def _compress(folder: Path, keep: str, threads: int, scratch: Path) -> tuple[dict[str, dict[str, float]] | str, float]:
    """The report, or why there is none; and processor seconds, those of starting the tool included."""
    report = scratch / "report.json"
    command = [sys.executable, "-m", "lowrank_onnx.cli", "compress", str(folder / "model.onnx")]
    command += ["-o", str(scratch / "out.onnx"), "--overwrite", "--calibrate", str(folder / "calibrate.npz")]
    command += ["--keep-macs", keep, "--threads", str(threads), "--json", str(report)]
    environment = {**os.environ, "LOWRANK_ONNX_CACHE": str(scratch / "cache")}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if done.returncode:
        return done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}", processor
    made: dict[str, dict[str, float]] = json.loads(report.read_text())
    return made, processor


if __name__ == "__main__":
    main()
