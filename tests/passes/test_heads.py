"""Attention blocks: where their halves are found, what is left alone, and that fused ones answer the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto

import lowrank_onnx
from lowrank_onnx.base import Moments, Replacement, Site
from lowrank_onnx.decompositions.heads import block_diagonal
from lowrank_onnx.errors import PlanError, TargetError
from lowrank_onnx.kept import dense_node
from lowrank_onnx.passes.heads import Heads
from lowrank_onnx.problem import Problem, pose
from lowrank_onnx.rewrite import rewrite
from lowrank_onnx.runtime import Runtime, open_session, run
from tests.builders import Array, answers, build, correlated, difference, falling, moments, problem

HEADS, WIDTH, MODEL = 4, 16, 64
WIDE = HEADS * WIDTH

BLOCK = """g (float[n,s,64] x, int64[n,s] mask) => (float[n,s,64] y) {
    x0 = LayerNormalization<axis=-1>(x, g0, b0)
    m1 = Unsqueeze(mask, one)  m2 = Unsqueeze(m1, two)  m3 = Cast<to=1>(m2)  m4 = Sub(onef, m3)  m5 = Mul(m4, low)
    qm = MatMul(x0, q)  qb = Add(bq, qm)  qs = Reshape(qb, split)  qh = Transpose<perm=[0,2,1,3]>(qs)
    km = MatMul(x0, k)  kb = Add(bk, km)  ks = Reshape(kb, split)  kh = Transpose<perm=[0,2,3,1]>(ks)
    vm = MatMul(x0, v)  vb = Add(bv, vm)  vs = Reshape(vb, split)  vh = Transpose<perm=[0,2,1,3]>(vs)
    a = MatMul(qh, kh)  b = Div(a, scale)  c = Add(b, m5)  p = Softmax<axis=-1>(c)
    h = MatMul(p, vh)  ht = Transpose<perm=[0,2,1,3]>(h)  hj = Reshape(ht, join)
    om = MatMul(hj, o)  ob = Add(bo, om)  r = Add(ob, x0)  y = LayerNormalization<axis=-1>(r, g1, b1) }"""


def constants(scale: float = 4.0) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    made = {name: 3 * falling(MODEL, WIDE, seed=seed) for seed, name in enumerate("qkv")}
    made["o"] = falling(WIDE, MODEL, seed=3)
    for name in ("bq", "bk", "bv", "bo", "b0", "b1"):
        made[name] = np.asarray(0.3 * rng.standard_normal(MODEL), np.float32)
    for name in ("g0", "g1"):
        made[name] = np.asarray(1 + 0.1 * rng.standard_normal(MODEL), np.float32)
    numbers = {"split": [0, 0, HEADS, WIDTH], "join": [0, 0, WIDE], "one": [1], "two": [2]}
    made |= {name: np.array(value) for name, value in numbers.items()}
    floats = {"scale": scale, "onef": 1.0, "low": -10000.0}
    return made | {name: np.array(value, np.float32) for name, value in floats.items()}


def data(count: int = 24) -> dict[str, Array]:
    mask = np.ones((count, 9), np.int64)
    mask[::3, 6:] = 0
    return {"x": correlated((count, 9, MODEL)), "mask": mask}


def block(scale: float = 4.0, changes: Mapping[str, str] | None = None) -> ModelProto:
    text = BLOCK
    for old, new in (change.split(" -> ") for change in (changes or {}).values()):
        assert old in text, old
        text = text.replace(old, new)
    read = {name: value for name, value in constants(scale).items() if f"{name})" in text or f"{name}," in text}
    return build(text, read)


def halves(posed: Problem) -> dict[str, Site]:
    return {site.attributes["half"]: site for site in posed.sites if site.kind == "attention"}


def narrow(proto: ModelProto, width: int, technique: Heads | None = None) -> ModelProto:
    """The model with both halves of every block at one width."""
    technique = technique or Heads()
    posed = problem(proto, data())
    seen = moments(posed)
    replacements: list[Replacement] = []
    for site in halves(posed).values():
        analysis = technique.analyse(site, seen[site.name])
        candidate = technique.candidate(site, analysis, (width,))
        replacements += technique.emit(site, candidate, technique.factorize(site, analysis, candidate))
    return rewrite(posed.model, replacements)


def test_both_halves_are_found() -> None:
    found = halves(problem(block(), data()))
    assert {half: (site.attributes["heads"], site.attributes["width"]) for half, site in found.items()} == {
        "scores": (HEADS, WIDTH),
        "values": (HEADS, WIDTH),
    }
    assert found["scores"].macs == 9 * MODEL * WIDE * 2 + HEADS * 9 * 9 * WIDTH


def test_full_width_gives_the_original_back() -> None:
    made = narrow(block(), WIDTH)
    assert difference(answers(made, data())["y"], answers(block(), data())["y"]) < 1e-5


def test_no_node_is_added_and_none_is_lost() -> None:
    def kinds(proto: ModelProto) -> list[str]:
        return sorted(node.op_type for node in proto.graph.node)

    assert kinds(narrow(block(), 8)) == kinds(block())


@pytest.mark.parametrize("width", [4, 8, 12, WIDTH])
def test_fused_by_onnxruntime_answers_the_same(width: int, tmp_path: Path) -> None:
    """The optimizer takes the scale from the width of the heads, whatever the graph says."""
    transformers = pytest.importorskip("onnxruntime.transformers.optimizer")
    made = narrow(block(), width)
    onnx.save(made, tmp_path / "made.onnx")
    fused = transformers.optimize_model(
        str(tmp_path / "made.onnx"), "bert", num_heads=HEADS, hidden_size=0, opt_level=0
    )
    assert "Attention" in {node.op_type for node in fused.model.graph.node}
    assert difference(answers(fused.model, data())["y"], answers(made, data())["y"]) < 1e-5


def test_a_scale_of_its_own_is_kept() -> None:
    for scale in (1.0, 7.5):
        made = narrow(block(scale), 8)
        stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in made.graph.initializer}
        assert stored["scale"] == np.float32(scale)


SPELLINGS = {
    "scale on the queries": {"a": "a = MatMul(qh, kh)  b = Div(a, scale) -> qd = Div(qh, scale)  b = MatMul(qd, kh)"},
    "scale before the split": {
        "a": "qs = Reshape(qb, split) -> qd = Div(qb, scale)  qs = Reshape(qd, split)",
        "b": "b = Div(a, scale) -> b = Identity(a)",
    },
    "two transposes of the keys": {
        "a": "kh = Transpose<perm=[0,2,3,1]>(ks) -> "
        "ki = Transpose<perm=[0,2,1,3]>(ks)  kh = Transpose<perm=[0,1,3,2]>(ki)"
    },
    "mask by Where": {"a": "c = Add(b, m5) -> mb = Cast<to=9>(m3)  c = Where(mb, b, low)"},
    "dropout behind the softmax": {"a": "h = MatMul(p, vh) -> pd = Dropout(p)  h = MatMul(pd, vh)"},
    "biases on the right": {"a": "qb = Add(bq, qm) -> qb = Add(qm, bq)"},
    "no bias": {"a": "vb = Add(bv, vm)  vs = Reshape(vb, -> vs = Reshape(vm,"},
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_other_spellings_are_the_same_block(spelling: str) -> None:
    proto = block(changes=SPELLINGS[spelling])
    assert set(halves(problem(proto, data()))) == {"scores", "values"}
    expected = answers(proto, data())["y"]
    assert difference(answers(narrow(proto, WIDTH), data())["y"], expected) < 1e-5
    usual = difference(answers(narrow(block(), 12), data())["y"], answers(block(), data())["y"])
    assert difference(answers(narrow(proto, 12), data())["y"], expected) < 3 * usual


LEFT_ALONE = {
    "queries read twice": ("scores", {"a": "a = MatMul(qh, kh) -> a0 = MatMul(qh, kh)  qr = ReduceMax(qh)  "
                                      "a = Add(a0, qr)"}),
    "a scale per column": ("scores", {"a": "qs = Reshape(qb, split) -> qd = Mul(qb, g0)  qs = Reshape(qd, split)"}),
    "keys not turned": ("scores", {"a": "kh = Transpose<perm=[0,2,3,1]>(ks) -> kh = Transpose<perm=[0,2,1,3]>(ks)",
                                   "b": "a = MatMul(qh, kh) -> a = MatMul(kh, qh)"}),
    "no softmax": ("scores", {"a": "p = Softmax<axis=-1>(c) -> p = Sigmoid(c)"}),
    "values read twice": ("values", {"a": "h = MatMul(p, vh) -> h0 = MatMul(p, vh)  h = Add(h0, vh)"}),
    "context read twice": ("values", {"a": "r = Add(ob, x0) -> r0 = Add(ob, x0)  r = Add(r0, hj)"}),
    "heads not joined": ("values", {"a": "ht = Transpose<perm=[0,2,1,3]>(h) -> ht = Identity(h)"}),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_what_is_not_understood_is_left_alone(case: str) -> None:
    half, changes = LEFT_ALONE[case]
    proto = block(changes=changes)
    onnx.checker.check_model(proto)
    assert half not in {site.attributes["half"] for site in problem(proto).sites if site.kind == "attention"}


def test_a_plan_is_applied_again(tmp_path: Path, models: Path) -> None:
    folder = models / "char_transformer"
    calibrate = {name: value[:48] for name, value in np.load(folder / "calibrate.npz").items()}
    model = folder / "model.onnx"
    made = lowrank_onnx.plan(model, keep_macs=0.9, technique=["heads"], calibrate=calibrate, cache=False)
    rows = [row for row in made["sites"] if row["decision"] == "factorized"]
    assert rows
    assert {row["technique"] for row in rows} == {"heads"}
    applied = lowrank_onnx.apply(model, json.loads(json.dumps(made)), calibrate=calibrate)
    assert applied.report["ratio"]["macs"] <= 0.9
    rows[0]["ranks"] = [1000]
    with pytest.raises(PlanError, match="width of a head"):
        lowrank_onnx.apply(model, made, calibrate=calibrate)


def test_values_of_a_block_whose_queries_are_not_understood_are_still_found() -> None:
    """As where positions are turned into the queries and keys: their columns cannot be mixed."""
    turned = {"a": "a = MatMul(qh, kh) -> qt = Mul(qh, tables)  a = MatMul(qt, kh)"}
    proto = block(changes=turned)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(correlated((1, 1, 9, WIDTH)), "tables"))
    assert set(halves(problem(proto, data()))) == {"values"}


@pytest.mark.parametrize("half", ["scores", "values"])
def test_a_refit_to_what_was_delivered_before_changes_nothing(half: str) -> None:
    posed = problem(block(), data())
    site = halves(posed)[half]
    analysis = Heads().analyse(site, moments(posed)[site.name])
    candidate = Heads().candidate(site, analysis, (WIDTH,))
    factors = Heads().factorize(site, analysis, candidate)
    targets = Heads().targets(site)
    seen = moments(posed)[site.name][targets[0].uses[0].input]
    weight = np.concatenate([part.weight.astype(np.float64) for part in targets], axis=1)
    gram, mean = seen.gram, seen.mean
    if half == "values":
        spread = block_diagonal(factors["value"].astype(np.float64))
        gram, mean = spread.T @ gram @ spread, mean @ spread
        cross = spread.T @ seen.gram @ weight
    else:
        cross = gram @ weight
    energy = float(np.einsum("kn,kn->", weight, seen.gram @ weight))
    asked = Moments(seen.rows, mean, gram, cross, seen.mean @ weight, energy)
    fitted = Heads().refit(site, candidate, factors, asked, 0.01)
    made = rewrite(posed.model, Heads().emit(site, candidate, fitted))
    assert difference(answers(made, data())["y"], answers(block(), data())["y"]) < 1e-4


def test_a_refit_makes_up_for_a_changed_input() -> None:
    posed = problem(block(), data())
    site = halves(posed)["scores"]
    analysis = Heads().analyse(site, moments(posed)[site.name])
    candidate = Heads().candidate(site, analysis, (WIDTH,))
    factors = Heads().factorize(site, analysis, candidate)
    seen = moments(posed)[site.name][site.uses[0].input]
    weight = np.concatenate([part.weight.astype(np.float64) for part in Heads().targets(site)], axis=1)
    # The input arrives doubled and moved; the layers have to halve it.
    mean = 2 * seen.mean + 1
    gram = 4 * seen.gram + 2 * np.add.outer(seen.mean, seen.mean) + 1
    cross = 2 * seen.gram @ weight + np.outer(np.ones(len(mean)), seen.mean @ weight)
    energy = float(np.einsum("kn,kn->", weight, seen.gram @ weight))
    fitted = Heads().refit(site, candidate, factors, Moments(1, mean, gram, cross, seen.mean @ weight, energy), 1e-9)
    covariance = seen.gram - np.outer(seen.mean, seen.mean)
    assert difference(covariance @ (2 * fitted["both"]), covariance @ weight) < 1e-5
    given = np.concatenate([part.uses[0].bias for part in Heads().targets(site) if part.uses[0].bias is not None])
    assert difference(mean @ fitted["both"] + fitted["bias"], seen.mean @ weight + given) < 1e-5


def test_keys_from_elsewhere_are_not_refitted_with_the_queries() -> None:
    cross = {"a": "km = MatMul(x0, k) -> km = MatMul(x, k)"}
    proto = block(changes=cross)
    site = halves(problem(proto, data()))["scores"]
    assert Heads().targets(site) == ()
    assert difference(answers(narrow(proto, WIDTH), data())["y"], answers(proto, data())["y"]) < 1e-5


# --- a decoder: rotary positions, grouped queries, a cache ---------------------------------------------

STEPS = 32


def decoder(models: Path, allow: bool = True) -> Problem:
    folder = models / "char_decoder"
    calibrate = {name: value[:64] for name, value in np.load(folder / "calibrate.npz").items()}
    return pose(str(folder / "model.onnx"), Runtime("cpu", 1), calibrate=calibrate, allow_io_change=allow)


def at_widths(posed: Problem, widths: Mapping[str, int]) -> ModelProto:
    """A decoder with its halves at some widths."""
    seen = moments(posed)
    replacements: list[Replacement] = []
    for half, site in halves(posed).items():
        analysis = Heads().analyse(site, seen[site.name])
        candidate = Heads().candidate(site, analysis, (widths[half],))
        replacements += Heads().emit(site, candidate, Heads().factorize(site, analysis, candidate))
    return rewrite(posed.model, replacements)


def generated(proto: ModelProto, start: Array, cached: bool) -> tuple[Array, Array]:
    """Tokens of greedy decoding and the scores they were chosen by, with the past handed on or read all over again."""
    session = open_session(proto, Runtime("cpu", 1))
    caches = {value.name: value.shape for value in session.get_inputs() if value.name.startswith("past")}
    empty = {name: np.zeros((len(start), shape[1], 0, shape[3]), np.float32) for name, shape in caches.items()}
    tokens, past, fed, scores = start, empty, start, []
    for _ in range(STEPS):
        got = run(session, {"tokens": fed, **past})
        scores.append(got["logits"][:, -1])
        tokens = np.concatenate([tokens, scores[-1].argmax(-1)[:, None]], axis=1)
        if cached:
            past, fed = {name: got[name.replace("past", "present")] for name in caches}, tokens[:, -1:]
        else:
            fed = tokens
    return tokens, np.stack(scores)


def test_a_decoder_is_understood(models: Path) -> None:
    found = halves(decoder(models))
    for half, name in (("scores", "key"), ("values", "value")):
        told = found[half].attributes
        assert (told["heads"], told["groups"], told["width"]) == (4, 2, 8)
        assert [(cache.name, cache.axis) for cache in told["caches"]] == [(f"past_{name}", 3), (f"present_{name}", 3)]
    assert len(found["scores"].attributes["tables"]) == 4


def test_a_cache_holds_the_heads_back(models: Path) -> None:
    for site in halves(decoder(models, allow=False)).values():
        assert "--allow-io-change" in str(Heads().refuse(site))


def test_a_decoder_at_full_width_gives_the_original_back(models: Path) -> None:
    posed = decoder(models)
    made = at_widths(posed, {"scores": 8, "values": 8})
    start = np.load(models / "char_decoder" / "evaluate.npz")["tokens"][:8]
    expected = generated(posed.model.proto, start, cached=True)
    for cached in (True, False):
        tokens, scores = generated(made, start, cached)
        assert np.array_equal(tokens, expected[0])
        assert difference(scores, expected[1]) < 1e-5


@pytest.mark.parametrize("widths", [(6, 8), (8, 6), (4, 6)])
def test_a_narrower_cache_holds_what_is_needed(models: Path, widths: tuple[int, int]) -> None:
    posed = decoder(models)
    made = at_widths(posed, dict(zip(("scores", "values"), widths, strict=True)))
    onnx.checker.check_model(made, full_check=True)
    shapes = {value.name: value.type.tensor_type.shape.dim[3].dim_value for value in made.graph.input[1:]}
    assert tuple(shapes.values()) == widths
    start = np.load(models / "char_decoder" / "evaluate.npz")["tokens"][:8]
    with_cache, without = generated(made, start, True), generated(made, start, False)
    assert np.array_equal(with_cache[0], without[0])
    assert difference(with_cache[1], without[1]) < 1e-5


@pytest.mark.parametrize("half", ["scores", "values"])
def test_the_narrow_decoder_answers_as_the_dense_layer_says(models: Path, half: str) -> None:
    posed = decoder(models)
    site = halves(posed)[half]
    analysis = Heads().analyse(site, moments(posed)[site.name])
    candidate = Heads().candidate(site, analysis, (6,))
    factors = Heads().factorize(site, analysis, candidate)
    made = rewrite(posed.model, Heads().emit(site, candidate, factors))
    ((name, dense),) = Heads().dense_equivalent(site, candidate, factors).items()
    part = posed.by_name[name]
    bias = dense.biases.get(part.uses[0].node)
    same = rewrite(posed.model, [dense_node(part, part.uses[0], "dense", dense.weight, bias)])
    assert posed.calibrate is not None
    feeds = posed.calibrate.batch(range(8))
    got, expected = (run(open_session(proto, Runtime("cpu", 1)), feeds)["logits"] for proto in (made, same))
    assert difference(got, expected) < 1e-5


def test_a_decoder_from_end_to_end(models: Path, tmp_path: Path) -> None:
    folder = models / "char_decoder"
    options: dict[str, Any] = {name: folder / f"{name}.npz" for name in ("calibrate", "evaluate")}
    options["metric"] = "perplexity"
    model = folder / "model.onnx"
    with pytest.raises(TargetError, match="cannot be met"):
        lowrank_onnx.compress(model, keep_macs=0.97, technique=["heads"], threads=1, cache=False, **options)
    told = lowrank_onnx.compress(model, keep_macs=0.97, technique=["svd:multiple=1"], threads=1, **options)
    assert sum("--allow-io-change" in text for text in told.report["warnings"]) == 2
    made = lowrank_onnx.compress(
        model, keep_macs=0.97, technique=["heads"], threads=1, cache=False, allow_io_change=True, **options
    )
    assert made.report["ratio"]["macs"] <= 0.97
    assert any("past_" in text for text in made.report["warnings"])
    applied = lowrank_onnx.apply(model, made.plan, calibrate=options["calibrate"], threads=1)
    assert applied.model.SerializeToString(deterministic=True) == made.model.SerializeToString(deterministic=True)
