"""Attention as PyTorch's tracing exporter writes it: what is found, and that full width gives the original back."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto

from lowrank_onnx.kept import dense_node
from lowrank_onnx.model import parameter_count
from lowrank_onnx.passes.heads import Heads
from lowrank_onnx.problem import Problem, pose
from lowrank_onnx.rewrite import rewrite
from lowrank_onnx.runtime import Runtime
from lowrank_onnx.sites.attention import left_alone
from tests.builders import Array, answers, difference, moments

torch: Any = pytest.importorskip("torch")
WIDTH, HEADS, SIZE = 32, 4, 8


class Block(torch.nn.Module):  # type: ignore[misc]
    """One block; ``attend`` says how it is spelled."""

    def __init__(self, attend: Callable[..., Any], groups: int) -> None:
        super().__init__()
        self.attend = attend
        widths = {"query": WIDTH, "key": groups * SIZE, "value": groups * SIZE, "output": WIDTH, "packed": 3 * WIDTH}
        for name, width in widths.items():
            setattr(self, name, torch.nn.Linear(WIDTH, width))

    def forward(self, *inputs: Any) -> Any:
        return self.attend(self, *inputs)


def split(x: Any) -> Any:
    return x.view(x.shape[0], x.shape[1], -1, SIZE).transpose(1, 2)


def joined(block: Block, x: Any) -> Any:
    return block.output(x.transpose(1, 2).reshape(x.shape[0], x.shape[2], WIDTH))


def plain(block: Block, x: Any) -> Any:
    attention = torch.nn.functional.scaled_dot_product_attention
    return joined(block, attention(split(block.query(x)), split(block.key(x)), split(block.value(x))))


def causal(block: Block, x: Any) -> Any:
    attention = torch.nn.functional.scaled_dot_product_attention
    parts = (split(block.query(x)), split(block.key(x)), split(block.value(x)))
    return joined(block, attention(*parts, is_causal=True))


def vision(block: Block, x: Any) -> Any:
    batch, length, width = x.shape
    parts = block.packed(x).reshape(batch, length, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4).unbind(0)
    weights = ((parts[0] * SIZE**-0.5) @ parts[1].transpose(-2, -1)).softmax(-1)
    return block.output((weights @ parts[2]).transpose(1, 2).reshape(batch, length, width))


def rows(x: Any, layer: Any) -> Any:
    flat = torch.addmm(layer.bias, x.view(-1, x.size(-1)), layer.weight.T)
    return flat.view((*x.size()[:-1], len(layer.bias)))


def packed_rows(block: Block, x: Any) -> Any:
    query, key, value = (split(part) for part in rows(x, block.packed).split(WIDTH, dim=2))
    length = x.shape[1]
    seen = torch.tril(torch.ones(length, length)) == 1
    weights = (query @ key.transpose(-1, -2) / SIZE**0.5).masked_fill(~seen, -1e9).softmax(-1)
    return rows((weights @ value).permute(0, 2, 1, 3).reshape(x.shape[0], length, WIDTH), block.output)


def cross(block: Block, x: Any, y: Any) -> Any:
    weights = (split(block.query(x)) @ split(block.key(y)).transpose(2, 3) * SIZE**-0.5).softmax(-1)
    return joined(block, weights @ split(block.value(y)))


def rotary(block: Block, x: Any) -> Any:
    batch, length, _ = x.shape
    frequency = 1e4 ** (-torch.arange(0, SIZE, 2) / SIZE)
    places = torch.arange(length)[None].expand(batch, -1)[:, None, :].float()
    angle = (frequency[None, :, None].expand(batch, -1, 1) @ places).transpose(1, 2)
    cos, sin = (
        table.unsqueeze(1) for table in (torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin())
    )

    def turned(part: Any) -> Any:
        half = part.shape[-1] // 2
        return part * cos + torch.cat((-part[..., half:], part[..., :half]), -1) * sin

    def repeated(part: Any) -> Any:
        return part[:, :, None].expand(batch, 2, 2, length, SIZE).reshape(batch, HEADS, length, SIZE)

    key, value = repeated(turned(split(block.key(x)))), repeated(split(block.value(x)))
    scores = turned(split(block.query(x))) @ key.transpose(2, 3) * SIZE**-0.5
    scores = scores + torch.triu(torch.full((length, length), -1e9), 1)
    return joined(block, scores.softmax(-1) @ value)


def rotary_pairs(block: Block, x: Any) -> Any:
    batch, length, _ = x.shape
    angle = torch.arange(length).float()[:, None] * 1e4 ** (-torch.arange(0, SIZE, 2) / SIZE)
    cos, sin = (torch.repeat_interleave(table[None, :, None], 2, 3) for table in (angle.cos(), angle.sin()))

    def turned(part: Any) -> Any:
        heads = part.view(batch, length, -1, SIZE)
        return heads * cos + torch.stack((-heads[..., 1::2], heads[..., ::2]), -1).flatten(-2) * sin

    query, key = turned(block.query(x)).permute(0, 2, 1, 3), turned(block.key(x)).permute(0, 2, 1, 3)
    scores = query @ key.transpose(-1, -2) / SIZE**0.5 + torch.triu(torch.full((length, length), -1e9), 1)
    return joined(block, scores.softmax(-1) @ split(block.value(x)))


SPELLINGS: dict[str, tuple[Callable[..., Any], int]] = {
    "scaled_dot_product_attention": (plain, HEADS),
    "the same, causal": (causal, HEADS),
    "packed and stacked, as vision transformers do": (vision, HEADS),
    "packed, rows of all samples, as GPT-2 does": (packed_rows, HEADS),
    "cross attention": (cross, HEADS),
    "rotary, grouped queries, as LLaMA does": (rotary, 2),
    "rotary by pairs of neighbours, before heads come first, as GPT-J does": (rotary_pairs, HEADS),
}


def exported(spelling: str) -> tuple[ModelProto, dict[str, Array]]:
    attend, groups = SPELLINGS[spelling]
    torch.manual_seed(0)
    names = ["x", "y"] if attend is cross else ["x"]
    axes = {name: {0: "batch", 1: f"length_{name}"} for name in names}
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Block(attend, groups).eval(),
            tuple(torch.randn(2, 7 - 2 * place, WIDTH) for place, _ in enumerate(names)),
            stream,
            input_names=names,
            output_names=["out"],
            dynamic_axes={**axes, "out": {0: "batch", 1: "length_x"}},
            opset_version=17,
            dynamo=False,
        )
    rng = np.random.default_rng(0)
    data = {name: rng.standard_normal((16, 9 - place, WIDTH)).astype(np.float32) for place, name in enumerate(names)}
    return onnx.load_from_string(stream.getvalue()), data


def at_width(posed: Problem, width: int) -> ModelProto:
    seen = moments(posed)
    replacements = []
    for site in posed.sites:
        if site.kind == "attention":
            analysis = Heads().analyse(site, seen[site.name])
            candidate = Heads().candidate(site, analysis, (width,))
            replacements += list(Heads().emit(site, candidate, Heads().factorize(site, analysis, candidate)))
    return rewrite(posed.model, replacements)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_exported_blocks_are_understood(spelling: str) -> None:
    proto, data = exported(spelling)
    posed = pose(proto, Runtime("cpu", 1), calibrate=data)
    found = {site.attributes["half"]: site.attributes for site in posed.sites if site.kind == "attention"}
    assert set(found) == {"scores", "values"}
    groups = SPELLINGS[spelling][1]
    assert all((told["heads"], told["groups"], told["width"]) == (HEADS, groups, SIZE) for told in found.values())
    assert left_alone(posed.model, posed.shapes, [site for site in posed.sites if not site.parts]) == []
    expected = answers(proto, data)["out"]
    assert difference(answers(at_width(posed, SIZE), data)["out"], expected) < 1e-5
    narrow = at_width(posed, 6)
    onnx.checker.check_model(narrow, full_check=True)
    assert 1e-5 < difference(answers(narrow, data)["out"], expected) < 0.9
    other = {name: value[:3, :4] for name, value in data.items()}
    assert answers(narrow, other)["out"].shape == (3, 4, WIDTH)


def test_numbers_of_shapes_behind_casts_are_read() -> None:
    """As PaddlePaddle's exporter writes them."""
    proto, data = exported("packed and stacked, as vision transformers do")
    constants = {node.output[0]: node.attribute[0].t for node in proto.graph.node if node.op_type == "Constant"}
    constants |= {tensor.name: tensor for tensor in proto.graph.initializer}
    casts = []
    for node in proto.graph.node:
        if node.op_type == "Concat":
            for slot, name in enumerate(node.input):
                if name in constants:
                    stored = f"{node.output[0]}/{slot}"
                    values = onnx.numpy_helper.to_array(constants[name]).astype(np.int32)
                    proto.graph.initializer.append(onnx.numpy_helper.from_array(values, stored))
                    casts.append(onnx.helper.make_node("Cast", [stored], [f"{stored}/cast"], to=TensorProto.INT64))
                    node.input[slot] = f"{stored}/cast"
    nodes = [*casts, *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    assert len(casts) > 2
    posed = pose(proto, Runtime("cpu", 1), calibrate=data)
    assert {site.attributes["half"] for site in posed.sites if site.kind == "attention"} == {"scores", "values"}
    expected = answers(proto, data)["out"]
    assert difference(answers(at_width(posed, SIZE), data)["out"], expected) < 1e-5


def test_weights_stored_as_nodes_are_stored_once_when_cut() -> None:
    proto, data = exported("packed and stacked, as vision transformers do")
    stored = list(proto.graph.initializer)
    del proto.graph.initializer[:]
    for place, tensor in enumerate(stored):
        proto.graph.node.insert(place, onnx.helper.make_node("Constant", [], [tensor.name], value=tensor))
    before = parameter_count(proto)
    posed = pose(proto, Runtime("cpu", 1), calibrate=data)
    assert {site.attributes["half"] for site in posed.sites if site.kind == "attention"} == {"scores", "values"}
    assert parameter_count(posed.model.proto) == before


def test_what_is_not_understood_is_told() -> None:
    """PyTorch's own MultiheadAttention folds batch and heads into one axis."""
    layer = torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).eval()

    class Wrapped(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Any) -> Any:
            return self.layer(x, x, x, need_weights=False)[0]

    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(Wrapped(), (torch.randn(1, 7, WIDTH),), stream, input_names=["x"], dynamo=False)
    data = {"x": np.zeros((2, 7, WIDTH), np.float32)}
    posed = pose(onnx.load_from_string(stream.getvalue()), Runtime("cpu", 1), calibrate=data)
    told = left_alone(posed.model, posed.shapes, [site for site in posed.sites if not site.parts])
    assert any("queries and keys" in text and "not understood at" in text for text in told)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_narrow_heads_answer_as_one_dense_layer_says(spelling: str) -> None:
    """The scale, written or asked of a shape, included."""
    proto, data = exported(spelling)
    posed = pose(proto, Runtime("cpu", 1), calibrate=data)
    seen = moments(posed)
    for site in posed.sites:
        if site.kind != "attention":
            continue
        analysis = Heads().analyse(site, seen[site.name])
        candidate = Heads().candidate(site, analysis, (4,))
        factors = Heads().factorize(site, analysis, candidate)
        made = rewrite(posed.model, Heads().emit(site, candidate, factors))
        ((name, dense),) = Heads().dense_equivalent(site, candidate, factors).items()
        part = posed.by_name[name]
        use = part.uses[0]
        same = rewrite(posed.model, [dense_node(part, use, "dense", dense.weight, dense.biases.get(use.node))])
        assert difference(answers(made, data)["out"], answers(same, data)["out"]) < 1e-5
