"""The models in models/ are what models/manifest.toml says they are."""

import hashlib
import re
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest

FOLDER = Path(__file__).parents[1] / "models"
MANIFEST = tomllib.loads((FOLDER / "manifest.toml").read_text(encoding="utf-8"))
MODELS: list[dict[str, Any]] = MANIFEST["model"]
SIZE_LIMIT = 3_000_000  # bytes; the repository stays quick to clone

Array = npt.NDArray[Any]

each_model = pytest.mark.parametrize("entry", MODELS, ids=[model["name"] for model in MODELS])


def load(entry: dict[str, Any], split: str) -> dict[str, Array]:
    with np.load(FOLDER / entry["name"] / f"{split}.npz", allow_pickle=False) as data:
        return dict(data)


def session(entry: dict[str, Any]) -> ort.InferenceSession:
    return ort.InferenceSession(FOLDER / entry["file"], providers=["CPUExecutionProvider"])


def top1(logits: Array, labels: Array) -> float:
    return float((logits.argmax(axis=-1) == labels).mean())


def perplexity(logits: Array, labels: Array) -> float:
    chosen = np.take_along_axis(logits.astype(np.float64), labels[..., None], axis=-1)[..., 0]
    normalizer = np.logaddexp.reduce(logits.astype(np.float64), axis=-1)
    return float(np.exp((normalizer - chosen).mean()))


METRICS = {"top1": top1, "perplexity": perplexity}


def samples(data: dict[str, Array]) -> set[bytes]:
    """Each sample's bytes, all its input arrays together, without the labels."""
    inputs = [data[name] for name in sorted(data) if name != "labels"]
    return {b"".join(array[i].tobytes() for array in inputs) for i in range(len(inputs[0]))}


def test_the_manifest_names_every_model_folder() -> None:
    folders = {path.parent.name for path in FOLDER.glob("*/model.onnx")}
    assert [model["name"] for model in MODELS] == sorted(folders)
    assert len(folders) == 5


def test_everything_together_stays_small() -> None:
    files = [p for p in FOLDER.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert sum(p.stat().st_size for p in files) < SIZE_LIMIT


@each_model
def test_files_are_those_the_manifest_was_written_for(entry: dict[str, Any]) -> None:
    assert set(entry["sha256"]) == {"model.onnx", "calibrate.npz", "evaluate.npz"}
    for name, expected in entry["sha256"].items():
        content = (FOLDER / entry["name"] / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == expected, name


@each_model
def test_opset_and_parameters_are_as_stated(entry: dict[str, Any]) -> None:
    model = onnx.load(FOLDER / entry["file"])
    onnx.checker.check_model(model, full_check=True)
    assert model.opset_import[0].version == entry["opset"]
    floats = [w for w in model.graph.initializer if w.data_type == onnx.TensorProto.FLOAT]
    assert sum(int(np.prod(w.dims)) for w in floats) == entry["parameters"]


@each_model
def test_metric_is_reproduced(entry: dict[str, Any]) -> None:
    data = load(entry, "evaluate")
    labels = data.pop("labels")
    (logits,) = session(entry).run(["logits"], data)
    assert METRICS[entry["metric"]](logits, labels) == pytest.approx(entry["baseline"], abs=1e-3)


@each_model
@pytest.mark.parametrize("split", ["calibrate", "evaluate"])
def test_data_fit_the_inputs_and_every_batch_size(entry: dict[str, Any], split: str) -> None:
    data = load(entry, split)
    labels = data.pop("labels")
    running = session(entry)
    types = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
    assert {i.name: types[i.type] for i in running.get_inputs()} == {n: a.dtype for n, a in data.items()}
    (few,) = running.run(["logits"], {name: array[:5] for name, array in data.items()})
    (one,) = running.run(["logits"], {name: array[4:5] for name, array in data.items()})
    assert few.shape[:-1] == labels[:5].shape
    np.testing.assert_allclose(one[0], few[4], rtol=1e-3, atol=1e-4)


@each_model
def test_no_evaluation_sample_is_a_calibration_sample(entry: dict[str, Any]) -> None:
    calibrate, evaluate = samples(load(entry, "calibrate")), samples(load(entry, "evaluate"))
    assert len(calibrate) >= 128 and len(evaluate) >= 96
    assert not calibrate & evaluate


def test_transformer_beats_counting_pairs_of_characters() -> None:
    (entry,) = (model for model in MODELS if model["name"] == "char_transformer")
    assert entry["baseline"] < 0.6 * entry["bigram_perplexity"]


def test_transformer_reads_any_length_and_never_ahead() -> None:
    (entry,) = (model for model in MODELS if model["name"] == "char_transformer")
    tokens = load(entry, "evaluate")["tokens"][:2]
    running = session(entry)
    (whole,) = running.run(["logits"], {"tokens": tokens})
    (start,) = running.run(["logits"], {"tokens": tokens[:, :23]})
    np.testing.assert_allclose(start, whole[:, :23], rtol=1e-3, atol=1e-4)


def test_scripts_name_the_manifest_seed_and_length() -> None:
    for entry in MODELS:
        source = (FOLDER / entry["script"]).read_text(encoding="utf-8")
        for constant in ("SEED", "EPOCHS", "STEPS"):
            match = re.search(rf"^{constant} = (\d+)$", source, re.MULTILINE)
            assert entry.get(constant.lower()) == (int(match[1]) if match else None), entry["name"]
