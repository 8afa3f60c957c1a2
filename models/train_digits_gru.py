"""Train digits_gru: a GRU of width 96 reads a digit row by row, a linear layer names it."""

from pathlib import Path

import torch
from torch import Tensor, nn
from training import digits, evaluate, export, fit_classifier, prepare, print_facts, save_digits, top1

FOLDER = Path(__file__).parent / "digits_gru"
SEED = 0
EPOCHS = 60


class RowReader(nn.Module):
    """Rows (N, 8, 8), one row of eight pixels a step, to logits (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(8, 96)
        self.head = nn.Linear(96, 10)

    def forward(self, rows: Tensor) -> Tensor:
        _, last = self.gru(rows.transpose(0, 1))  # (1, N, 96)
        return self.head(last.squeeze(0))


def main() -> None:
    prepare(SEED)
    data = digits()
    model = RowReader()
    fit_classifier(model, data, shape=(8, 8), epochs=EPOCHS, weight_decay=0.1, augment=False)
    export(model, torch.zeros(2, 8, 8), FOLDER, name="rows", axes={0: "batch"})
    save_digits(data, FOLDER, name="rows", shape=(8, 8))
    print_facts(FOLDER, "top1", top1(*evaluate(FOLDER, "rows")))


if __name__ == "__main__":
    main()
