"""What the training scripts share: seeds, the digits and their split, export, the manifest's facts."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

HELD_OUT = 500
CALIBRATION = 256


class Digits(NamedTuple):
    """Images (N, 8, 8) float32 in [0, 1] and labels (N,) int64; no image is in both halves."""

    train_images: Tensor
    train_labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor


def prepare(seed: int) -> None:
    """Make a run repeatable: one thread, one seed, no operator that depends on timing."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)


def digits() -> Digits:
    """Return the 1,797 digits of scikit-learn, 500 of them held out with every class in proportion."""
    bunch = load_digits()
    images = (bunch.images / 16).astype(np.float32)
    labels = bunch.target.astype(np.int64)
    parts = train_test_split(images, labels, test_size=HELD_OUT, random_state=0, stratify=labels)
    train_images, held_out_images, train_labels, held_out_labels = map(torch.from_numpy, parts)
    return Digits(train_images, train_labels, held_out_images, held_out_labels)


def shifted(images: Tensor) -> Tensor:
    """Move each image (N, 8, 8) by -1, 0 or 1 pixel along both axes; what enters is background (0)."""
    padded = nn.functional.pad(images, (1, 1, 1, 1))
    windows = padded.unfold(1, 8, 1).unfold(2, 8, 1)  # (N, 3, 3, 8, 8)
    down, right = torch.randint(3, (2, len(images)))
    return windows[torch.arange(len(images)), down, right]


def batches(count: int, size: int) -> Iterator[Tensor]:
    """Yield the indices 0 … count - 1 in a new random order, ``size`` at a time."""
    yield from torch.randperm(count).split(size)


def fit_classifier(
    model: nn.Module,
    data: Digits,
    *,
    shape: tuple[int, ...],
    epochs: int,
    weight_decay: float,
    augment: bool,
) -> None:
    """Train ``model`` on the training half with AdamW under a one-cycle learning rate, and set it to eval.

    Args:
        model: Maps images reshaped to (N, *shape) to logits (N, 10).
        data: Only its training half is read.
        shape: What the model wants each image reshaped to.
        epochs: Passes over the training half, 64 images a step.
        weight_decay: Decoupled decay; a strong one leaves weights of low effective rank.
        augment: Shift every image by at most one pixel, anew in every epoch.
    """
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=weight_decay)
    steps = epochs * -(-len(data.train_labels) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    model.train()
    for _ in range(epochs):
        images = shifted(data.train_images) if augment else data.train_images
        for batch in batches(len(images), 64):
            logits = model(images[batch].reshape(-1, *shape))
            loss = nn.functional.cross_entropy(logits, data.train_labels[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


def export(model: nn.Module, example: Tensor, folder: Path, *, name: str, axes: dict[int, str]) -> None:
    """Write ``folder/model.onnx``: input ``name``, output ``logits``, the same dynamic ``axes`` on both."""
    folder.mkdir(exist_ok=True)
    torch.onnx.export(
        model.eval(),
        (example,),
        folder / "model.onnx",
        input_names=[name],
        output_names=["logits"],
        dynamic_axes={name: axes, "logits": axes},
        opset_version=17,
        # The tracing exporter writes the Gemm, Conv and LayerNormalization nodes most models in use have.
        dynamo=False,
    )


def save_digits(data: Digits, folder: Path, *, name: str, shape: tuple[int, ...]) -> None:
    """Write ``calibrate.npz`` (from the training half) and ``evaluate.npz`` (all that is held out)."""
    splits = {
        "calibrate": (data.train_images[:CALIBRATION], data.train_labels[:CALIBRATION]),
        "evaluate": (data.held_out_images, data.held_out_labels),
    }
    for split, (images, labels) in splits.items():
        arrays = {name: images.reshape(-1, *shape).numpy(), "labels": labels.numpy()}
        np.savez_compressed(folder / f"{split}.npz", **arrays)


def evaluate(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Run ``model.onnx`` on ``evaluate.npz``; return logits (N, …, classes) and labels (N, …)."""
    session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    with np.load(folder / "evaluate.npz", allow_pickle=False) as data:
        (logits,) = session.run(["logits"], {name: data[name]})
        return logits, data["labels"]


def top1(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of samples whose largest logit is the label."""
    return float((logits.argmax(axis=-1) == labels).mean())


def print_facts(folder: Path, metric: str, baseline: float) -> None:
    """Print what the manifest says of this model and changes with every training, as TOML."""
    model = onnx.load(folder / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    weights = [w for w in model.graph.initializer if w.data_type == onnx.TensorProto.FLOAT]
    print(f"opset = {model.opset_import[0].version}")
    print(f"parameters = {sum(int(np.prod(w.dims)) for w in weights)}")
    print(f'metric = "{metric}"')
    print(f"baseline = {baseline:.6f}")
    for file in ("model.onnx", "calibrate.npz", "evaluate.npz"):
        print(f'"{file}" = "{hashlib.sha256((folder / file).read_bytes()).hexdigest()}"')
