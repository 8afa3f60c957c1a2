"""Train digits_mlp: 64 → 512 → 512 → 10, three Gemm nodes with ReLU between them."""

from pathlib import Path

import torch
from torch import Tensor, nn
from training import digits, evaluate, export, fit_classifier, prepare, print_facts, save_digits, top1

FOLDER = Path(__file__).parent / "digits_mlp"
SEED = 0
EPOCHS = 60


class MLP(nn.Module):
    """Pixels (N, 64) to logits (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(64, 512)
        self.fc2 = nn.Linear(512, 512)
        self.fc3 = nn.Linear(512, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.fc3(self.fc2(self.fc1(pixels).relu()).relu())


def main() -> None:
    prepare(SEED)
    data = digits()
    model = MLP()
    fit_classifier(model, data, shape=(64,), epochs=EPOCHS, weight_decay=0.3, augment=False)
    export(model, torch.zeros(2, 64), FOLDER, name="pixels", axes={0: "batch"})
    save_digits(data, FOLDER, name="pixels", shape=(64,))
    print_facts(FOLDER, "top1", top1(*evaluate(FOLDER, "pixels")))


if __name__ == "__main__":
    main()
