"""Train digits_cnn: a stem, a strided convolution and a residual one, all 3 × 3, then a linear head."""

from pathlib import Path

import torch
from torch import Tensor, nn
from training import digits, evaluate, export, fit_classifier, prepare, print_facts, save_digits, top1

FOLDER = Path(__file__).parent / "digits_cnn"
SEED = 0
EPOCHS = 40


class CNN(nn.Module):
    """Image (N, 1, 8, 8) to logits (N, 10).

    The exporter folds the first two batch normalizations into the convolution before them. The third
    normalizes a tensor that the shortcut reads too, so it stays a node of its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(32)
        self.down = nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False)
        self.down_norm = nn.BatchNorm2d(64)
        self.residual_norm = nn.BatchNorm2d(64)
        self.residual = nn.Conv2d(64, 64, 3, padding=1)
        self.head = nn.Linear(64, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem_norm(self.stem(image)).relu()  # (N, 32, 8, 8)
        x = self.down_norm(self.down(x))  # (N, 64, 4, 4)
        x = x + self.residual(self.residual_norm(x).relu())
        return self.head(x.relu().mean(dim=(2, 3)))


def main() -> None:
    prepare(SEED)
    data = digits()
    model = CNN()
    fit_classifier(model, data, shape=(1, 8, 8), epochs=EPOCHS, weight_decay=0.1, augment=True)
    export(model, torch.zeros(2, 1, 8, 8), FOLDER, name="image", axes={0: "batch"})
    save_digits(data, FOLDER, name="image", shape=(1, 8, 8))
    print_facts(FOLDER, "top1", top1(*evaluate(FOLDER, "image")))


if __name__ == "__main__":
    main()
