"""Train char_decoder: rotary positions, grouped queries, and a cache of keys and values; next character of a text."""

import hashlib
import platform
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import Tensor, nn
from train_char_transformer import bigram_perplexity, perplexity, read_text
from training import prepare, print_facts

FOLDER = Path(__file__).parent / "char_decoder"
SEED = 0
STEPS = 4000
BATCH = 64
CONTEXT = 48
STORED = 16  # characters of a sample
SAMPLES = {"calibrate": 128, "evaluate": 96}


class Norm(nn.Module):
    """Root mean square normalization, one gain a column."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.gain


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + size / 2) of every head."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


class CharDecoder(nn.Module):
    """Token ids (N, T), past keys and values (N, 2, P, size), to logits (N, T, vocabulary) and the longer past."""

    def __init__(self, vocabulary: int, width: int = 20, heads: int = 4, groups: int = 2, size: int = 8) -> None:
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, size
        self.token = nn.Embedding(vocabulary, width)
        self.attention_norm, self.feedforward_norm, self.norm = Norm(width), Norm(width), Norm(width)
        self.query = nn.Linear(width, heads * size, bias=False)
        self.key = nn.Linear(width, groups * size, bias=False)
        self.value = nn.Linear(width, groups * size, bias=False)
        self.output = nn.Linear(heads * size, width, bias=False)
        self.gate, self.up = nn.Linear(width, 26, bias=False), nn.Linear(width, 26, bias=False)
        self.down = nn.Linear(26, width, bias=False)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.register_buffer("frequency", 100.0 ** (-torch.arange(0, size, 2) / size), persistent=False)
        nn.init.normal_(self.token.weight, std=0.5)

    def forward(self, tokens: Tensor, past_key: Tensor, past_value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, length = tokens.shape
        steps = torch.arange(past_key.shape[2] + length)
        now = steps[past_key.shape[2] :]
        angle = now[:, None].float() * self.frequency
        cos, sin = torch.cat((angle, angle), dim=-1).cos(), torch.cat((angle, angle), dim=-1).sin()
        x = self.token(tokens)
        h = self.attention_norm(x)
        q = self.query(h).view(batch, length, self.heads, self.size).transpose(1, 2)  # (N, heads, T, size)
        k = self.key(h).view(batch, length, self.groups, self.size).transpose(1, 2)
        v = self.value(h).view(batch, length, self.groups, self.size).transpose(1, 2)
        key = torch.cat((past_key, rotated(k, cos, sin)), dim=2)
        value = torch.cat((past_value, v), dim=2)
        scores = rotated(q, cos, sin) @ self.repeated(key).transpose(2, 3) / self.size**0.5
        scores = scores.masked_fill(steps[None, :] > now[:, None], -1e9)
        mixed = scores.softmax(dim=-1) @ self.repeated(value)
        x = x + self.output(mixed.transpose(1, 2).reshape(batch, length, self.heads * self.size))
        h = self.feedforward_norm(x)
        x = x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))
        return self.head(self.norm(x)), key, value

    def repeated(self, x: Tensor) -> Tensor:
        """(N, groups, T, size) to (N, heads, T, size): every group serves the queries of several heads."""
        batch, _, length, _ = x.shape
        each = x[:, :, None].expand(batch, self.groups, self.heads // self.groups, length, self.size)
        return each.reshape(batch, self.heads, length, self.size)

    def empty(self, batch: int) -> Tensor:
        """A past of no character."""
        return torch.zeros(batch, self.groups, 0, self.size)


def fold(text: str) -> str:
    """Small letters, one digit and the usual punctuation, so that the tables stay small."""
    return re.sub(r"[^a-z0 \n.,:()'_]", "#", re.sub(r"\d", "0", text.lower()))


def windows(ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Windows (count, STORED) spread evenly over ``ids``, none of them rulers and blanks, and the ids that follow."""
    at = torch.linspace(9, len(ids) - STORED - 1, 2 * count).long()[:, None] + torch.arange(STORED)
    rich = [row for row in at if len(ids[row].unique()) > 5]
    at = torch.stack(rich[:: len(rich) // count][:count])
    return ids[at], ids[at + 1]


def fit(model: CharDecoder, ids: Tensor) -> None:
    """Train on random windows of ``ids`` with AdamW under a one-cycle learning rate."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=STEPS, pct_start=0.1)
    empty = model.empty(BATCH)
    for step in range(STEPS):
        at = torch.randint(len(ids) - CONTEXT, (BATCH, 1)) + torch.arange(CONTEXT)
        logits, _, _ = model(ids[at], empty, empty)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[at + 1].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            print(f"# step {step}: loss {loss.item():.3f}", flush=True)


def export(model: CharDecoder) -> None:
    """Write ``model.onnx``; constants once each and short names, as those fill the file."""
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / "model.onnx"
    inputs, outputs = ["tokens", "past_key", "past_value"], ["logits", "present_key", "present_value"]
    text, cache = {0: "batch", 1: "sequence"}, {0: "batch", 2: "past"}
    axes = {"tokens": text, "logits": text, "past_key": cache, "past_value": cache}
    past = torch.zeros(2, model.groups, 3, model.size)
    torch.onnx.export(
        model.eval(),
        (torch.zeros(2, 5, dtype=torch.long), past, past),
        path,
        input_names=inputs,
        output_names=outputs,
        dynamic_axes=axes | {name: {0: "batch", 2: "whole"} for name in outputs[1:]},
        opset_version=17,
        dynamo=False,
    )
    proto = onnx.load(path)
    short = {name: name for name in (*inputs, *outputs, *(tensor.name for tensor in proto.graph.initializer), "")}
    stored: dict[bytes, str] = {}
    nodes = []
    for node in proto.graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = short[name]
        value = node.attribute[0].SerializeToString() if node.op_type == "Constant" else None
        if value in stored:
            short[node.output[0]] = stored[value]
            continue
        for place, name in enumerate(node.output):
            node.output[place] = short.setdefault(name, f"t{len(short)}")
        if value is not None:
            stored[value] = node.output[0]
        node.name = f"{node.op_type}_{len(nodes)}"
        nodes.append(node)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del proto.graph.node[:], proto.graph.value_info[:]
    proto.graph.node.extend(copies)
    onnx.save(proto, path)


def evaluate() -> tuple[np.ndarray, np.ndarray]:
    """Run ``model.onnx`` on ``evaluate.npz``; return logits (N, T, vocabulary) and labels (N, T)."""
    session = ort.InferenceSession(FOLDER / "model.onnx", providers=["CPUExecutionProvider"])
    with np.load(FOLDER / "evaluate.npz", allow_pickle=False) as data:
        (logits,) = session.run(["logits"], {name: data[name] for name in data if name != "labels"})
        return logits, data["labels"]


def main() -> None:
    prepare(SEED)
    train_text, held_out_text = map(fold, read_text())
    vocabulary = {character: i for i, character in enumerate(sorted(set(train_text + held_out_text)))}
    train, held_out = (torch.tensor([vocabulary[c] for c in text]) for text in (train_text, held_out_text))
    model = CharDecoder(len(vocabulary))
    fit(model, train)
    export(model)
    for split, ids in {"calibrate": train, "evaluate": held_out}.items():
        tokens, labels = windows(ids, SAMPLES[split])
        empty = model.empty(SAMPLES[split]).numpy()
        arrays = {"tokens": tokens.numpy(), "past_key": empty, "past_value": empty, "labels": labels.numpy()}
        np.savez_compressed(FOLDER / f"{split}.npz", **arrays)
    print(f'text_sha256 = "{hashlib.sha256((train_text + held_out_text).encode()).hexdigest()}"')
    print(f'python = "{platform.python_version()}"')
    counted = bigram_perplexity(train, *windows(held_out, SAMPLES["evaluate"]), len(vocabulary))
    print(f"bigram_perplexity = {counted:.6f}")
    print_facts(FOLDER, "perplexity", perplexity(*evaluate()))


if __name__ == "__main__":
    main()
