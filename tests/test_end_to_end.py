"""Trained models through the command line: the promise is kept, and the files say what the models do."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import onnxruntime as ort
import pytest

import lowrank_onnx.report as report_package
from lowrank_onnx.base import Pass, RankWish
from lowrank_onnx.data import load_data
from lowrank_onnx.errors import TargetError
from lowrank_onnx.model import parameter_count
from lowrank_onnx.passes.svd import SVD
from lowrank_onnx.pipeline import compress, inspect
from lowrank_onnx.problem import pose
from lowrank_onnx.rewrite import rewrite
from lowrank_onnx.runtime import Runtime, input_specs, open_session, run
from tests.builders import difference
from tests.test_contract import put_dense_linear

SCHEMA = json.loads((Path(report_package.__file__).parent / "schema.json").read_text())
MODELS = ["char_transformer", "digits_cnn", "digits_gru", "digits_mlp"]
ZOO = [
    "charrnn", "cifar10_resnet20", "magika", "minilm", "nsnet2", "silero_vad", "squeezenet_fp16", "style_transfer",
    "tashkeel", "ultraface", "vdsr",
]  # fmt: skip


def command(*arguments: str | Path, status: int = 0) -> str:
    """Run the command line in a process of its own, on one thread."""
    done = subprocess.run(
        [sys.executable, "-m", "lowrank_onnx.cli", *map(str, arguments), "--threads", "1"],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "target", "share", "drop"),
    [("digits_mlp", "--keep-macs", 0.4, 0.03), ("char_transformer", "--keep-params", 0.75, 0.10)],
)  # fmt: skip
def test_a_trained_model_gets_smaller_and_stays_good(
    models: Path, tmp_path: Path, name: str, target: str, share: float, drop: float
) -> None:
    place = models / name
    manifest = tomllib.loads((models / "manifest.toml").read_text(encoding="utf-8"))["model"]
    entry = next(model for model in manifest if model["name"] == name)
    out, told = tmp_path / "out.onnx", tmp_path / "r.json"
    options: list[str | Path] = [
        "--calibrate",
        place / "calibrate.npz",
        "--evaluate",
        place / "evaluate.npz",
        "--metric",
        entry["metric"],
    ]
    html = tmp_path / "r.html"
    arguments: list[str | Path] = [
        "compress",
        place / "model.onnx",
        "-o",
        out,
        target,
        str(share),
        "--json",
        told,
        "--report",
        html,
    ]
    text = command(*arguments, *options)
    report: dict[str, Any] = json.loads(told.read_text())
    jsonschema.validate(report, SCHEMA)
    unit = {"--keep-macs": "macs", "--keep-params": "parameters"}[target]
    assert share - 0.03 <= report["ratio"][unit] <= share
    assert report["metric"]["before"] == pytest.approx(entry["baseline"], rel=2e-3)
    assert report["metric"]["relative_drop"] <= drop
    assert report["ratio"]["size"] < 1 and report["after"]["size_bytes"] == out.stat().st_size
    assert report["after"]["parameters"] == parameter_count(onnx.load(out))
    assert all(row["reason"] for row in report["sites"] if row["decision"] == "kept")
    assert html.read_text().lower().startswith("<!doctype html>")
    assert str(out) in text.replace("\n", "") or "out.onnx" in text
    ort.InferenceSession(out, providers=["CPUExecutionProvider"])


@pytest.mark.slow
def test_max_drop_is_the_default_and_is_kept(models: Path, tmp_path: Path) -> None:
    place = models / "digits_mlp"
    command(
        "compress", place / "model.onnx", "-o", tmp_path / "o.onnx", "--calibrate", place / "calibrate.npz",
        "--evaluate", place / "evaluate.npz", "--metric", "top1", "--json", tmp_path / "r.json", "--minimize", "macs",
    )  # fmt: skip
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["target"] == {"max_drop": 0.01} and report["metric"]["relative_drop"] <= 0.01
    assert report["ratio"]["macs"] < 0.8


@pytest.mark.slow
def test_plan_then_apply_is_compress(models: Path, tmp_path: Path) -> None:
    place = models / "digits_mlp"
    options: list[str | Path] = ["--calibrate", place / "calibrate.npz", "--keep-macs", "0.5", "--seed", "1"]
    command("compress", place / "model.onnx", "-o", tmp_path / "a.onnx", *options)
    command("plan", place / "model.onnx", "-o", tmp_path / "p.json", *options)
    command("apply", place / "model.onnx", tmp_path / "p.json", "-o", tmp_path / "b.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


@pytest.mark.slow
def test_data_beat_the_weight_alone(models: Path) -> None:
    place = models / "digits_mlp"
    options: dict[str, Any] = {
        "keep_macs": 0.15,
        "evaluate": place / "evaluate.npz",
        "threads": 1,
        "technique": ["svd"],
    }
    aware = compress(place / "model.onnx", calibrate=place / "calibrate.npz", **options).report
    blind = compress(place / "model.onnx", **options).report
    assert aware["fidelity"]["sqnr_db"] > blind["fidelity"]["sqnr_db"] + 1
    assert (aware["data"]["errors"], blind["data"]["errors"]) == ("output", "weight")


def linear_everywhere(path: Path, technique: Pass, wish: RankWish) -> tuple[onnx.ModelProto, onnx.ModelProto, Any]:
    """The model rewritten at every linear site, and with the dense weights in place; by the weights alone."""
    posed = pose(path, Runtime("cpu", 1))
    replacements: list[Any] = []
    dense: dict[str, Any] = {}
    for site in posed.sites:
        if site.kind == "linear" and technique.refuse(site) is None and not any(use.scope for use in site.uses):
            analysis = technique.analyse(site, None)
            ranks = technique.spell_rank(site, analysis, wish)
            if isinstance(ranks, tuple):
                candidate = technique.candidate(site, analysis, ranks)
                factors = technique.factorize(site, analysis, candidate)
                replacements += technique.emit(site, candidate, factors)
                dense |= technique.dense_equivalent(site, candidate, factors)
    if not replacements:
        pytest.skip("no linear layer in the main graph")
    return rewrite(posed.model, replacements), put_dense_linear(posed, dense), posed


def on_samples(proto: onnx.ModelProto, posed: Any, place: Path, count: int = 2) -> list[np.ndarray[Any, Any]]:
    session = open_session(proto, Runtime("cpu", 1), posed.model.folder)
    data = load_data(place / "calibrate.npz", input_specs(posed.session))
    answers = [run(session, data.feeds(index)) for index in range(min(count, len(data)))]
    return [value for answer in answers for value in answer.values() if value.dtype.kind == "f"]


def check_exactness(place: Path, wishes: Sequence[tuple[RankWish, float]]) -> None:
    for wish, tolerance in wishes:
        made, dense, posed = linear_everywhere(place / "model.onnx", SVD(), wish)
        reference = posed.model.proto if wish.fraction == 1.0 else dense
        for ours, theirs in zip(on_samples(made, posed, place), on_samples(reference, posed, place), strict=True):
            assert difference(ours, theirs) <= tolerance


EXACT = [(RankWish(fraction=1.0), 1e-5), (RankWish(energy=0.9), 1e-4)]


@pytest.mark.parametrize("name", MODELS)
def test_factors_are_exact(models: Path, name: str) -> None:
    check_exactness(models / name, EXACT)


@pytest.mark.zoo
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ZOO if name not in ("minilm", "tashkeel")])
def test_factors_are_exact_in_the_wild(zoo: Path, name: str) -> None:
    check_exactness(zoo / name, EXACT)


@pytest.mark.zoo
@pytest.mark.slow
@pytest.mark.parametrize("name", ["charrnn", "cifar10_resnet20", "nsnet2", "silero_vad", "ultraface", "vdsr"])
def test_every_model_in_the_wild_is_understood(zoo: Path, name: str) -> None:
    report = inspect(zoo / name / "model.onnx", threads=1)
    assert report["before"]["parameters"] > 0 and report["sites"]
    try:
        made = compress(zoo / name / "model.onnx", rank="energy=0.9", threads=1)
    except TargetError as error:
        assert "no layer can be factorized" in str(error)
        return
    assert made.report["ratio"]["parameters"] <= 1
