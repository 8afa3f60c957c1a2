"""GroupQueryAttention: narrower as one node, in onnxruntime, with a cache and with positions turned inside."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto

import lowrank_onnx
from lowrank_onnx.base import Site
from lowrank_onnx.errors import PlanError
from lowrank_onnx.kept import dense_node
from lowrank_onnx.passes.heads import Heads
from lowrank_onnx.passes.whole_heads import WholeHeads
from lowrank_onnx.problem import Problem, pose
from lowrank_onnx.rewrite import rewrite
from lowrank_onnx.runtime import Runtime, open_session, run
from lowrank_onnx.sites.attention import left_alone
from tests.builders import Array, answers, build, difference, factorized, falling

HEADS, GROUPS, MODEL, WORDS, STEPS = 4, 2, 24, 20, 32

TEXT = """g (int64[n,s] tokens, float[n,2,p,WIDTH] past_key, float[n,2,p,WIDTH] past_value)
    => (float[n,s,20] logits, float[n,2,t,WIDTH] present_key, float[n,2,t,WIDTH] present_value) {
    x = Gather(table, tokens)  before = Shape(past_key)  past = Slice(before, two, three)
    shape = Shape(tokens)  batch = Slice(shape, zero, one)  steps = Slice(shape, one, two)
    all = Add(past, steps)  whole = Cast<to=6>(all)  total = Squeeze(whole)  last = Sub(total, less)
    lengths = Expand(last, batch)
    qm = MatMul(x, q)  qb = Add(qm, bq)  km = MatMul(x, k)  kb = Add(km, bk)  vm = MatMul(x, v)  vb = Add(vm, bv)
    c, present_key, present_value = com.microsoft.GroupQueryAttention
        <num_heads=4, kv_num_heads=2, do_rotary=1, rotary_interleaved=0>
        (qb, kb, vb, past_key, past_value, lengths, total, cos, sin)
    om = MatMul(c, o)  ob = Add(om, bo)  y = Add(ob, x)  logits = MatMul(y, w) }"""


def decoder(width: int = 32, changes: str = "", turned: int | None = None) -> ModelProto:
    """One block of a decoder; ``turned``: columns of a head that positions are turned into."""
    text = TEXT.replace("WIDTH", str(width))
    for change in filter(None, changes.split(" && ")):
        old, new = change.split(" -> ")
        assert old in text, old
        text = text.replace(old, new)
    rng = np.random.default_rng(0)
    sizes = {"q": HEADS * width, "k": GROUPS * width, "v": GROUPS * width}
    held: dict[str, Array] = {name: np.array([value]) for name, value in
                              (("zero", 0), ("one", 1), ("two", 2), ("three", 3))}  # fmt: skip
    held |= {"less": np.array(1, np.int32), "table": 3 * rng.standard_normal((WORDS, MODEL)).astype(np.float32)}
    for seed, (name, size) in enumerate(sizes.items()):
        held[name] = 3 * falling(MODEL, size, seed=seed)
        held[f"b{name}"] = np.asarray(0.3 * rng.standard_normal(size), np.float32)
    held |= {"o": 3 * falling(HEADS * width, MODEL, seed=4), "bo": np.ones(MODEL, np.float32)}
    held |= {"w": falling(MODEL, WORDS, seed=5)}
    columns = turned or width
    angle = np.arange(64)[:, None] * 20.0 ** -np.arange(0, 2, 4 / columns)[: columns // 2]
    held |= {"cos": np.cos(angle).astype(np.float32), "sin": np.sin(angle).astype(np.float32)}
    used = {name: value for name, value in held.items() if f" {name})" in text or f"({name}," in text
            or f" {name}," in text}  # fmt: skip
    return build(text, used, imports=', "com.microsoft": 1')


def samples(width: int = 32, count: int = 24) -> dict[str, Array]:
    tokens = np.random.default_rng(1).integers(0, WORDS, (count, 11))
    empty = np.zeros((count, GROUPS, 0, width), np.float32)
    return {"tokens": tokens, "past_key": empty, "past_value": empty}


def posed(proto: ModelProto, width: int = 32, allow: bool = True) -> Problem:
    return pose(proto, Runtime("cpu", 1), calibrate=samples(width), allow_io_change=allow)


def whole(problem: Problem) -> Site:
    (site,) = [site for site in problem.sites if site.kind == "attention"]
    assert site.attributes["half"] == "whole"
    return site


def notes(problem: Problem, told_all: bool = True) -> list[str]:
    return left_alone(problem.model, problem.shapes, [site for site in problem.sites if not site.parts], told_all)


def generated(proto: ModelProto, width: int, cached: bool) -> tuple[Array, Array]:
    """Tokens of greedy decoding and the scores they were chosen by, with the past handed on or read all over again."""
    session = open_session(proto, Runtime("cpu", 1))
    tokens = samples()["tokens"][:3]
    empty = {name: np.zeros((3, GROUPS, 0, width), np.float32) for name in ("past_key", "past_value")}
    past, fed, scores = empty, tokens, []
    for _ in range(STEPS):
        got = run(session, {"tokens": fed, **past})
        scores.append(got["logits"][:, -1])
        tokens = np.concatenate([tokens, scores[-1].argmax(-1)[:, None]], axis=1)
        fed = tokens
        if cached:
            past, fed = {name: got[name.replace("past", "present")] for name in empty}, tokens[:, -1:]
    return tokens, np.stack(scores)


INTERLEAVED = "rotary_interleaved=0 -> rotary_interleaved=1"
PLAIN = "do_rotary=1 -> do_rotary=0 && , total, cos, sin) -> , total)"
SPELLINGS = {"halves turned": "", "pairs turned": INTERLEAVED, "not turned": PLAIN}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_full_width_generates_the_same_tokens(spelling: str) -> None:
    proto = decoder(changes=SPELLINGS[spelling])
    problem = posed(proto)
    made = factorized(problem, WholeHeads(), whole(problem), (32,))
    expected = generated(proto, 32, cached=True)
    for cached in (True, False):
        tokens, scores = generated(made, 32, cached)
        assert np.array_equal(tokens, expected[0])
        assert difference(scores, expected[1]) < 1e-5


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_narrower_cache_holds_what_is_needed(spelling: str) -> None:
    """Positions that were turned wrong would tell apart what is read again from what was kept."""
    problem = posed(decoder(changes=SPELLINGS[spelling]))
    made = factorized(problem, WholeHeads(), whole(problem), (16,))
    onnx.checker.check_model(made)
    shapes = {value.name: value.type.tensor_type.shape for value in (*made.graph.input, *made.graph.output)}
    caches = ("past_key", "past_value", "present_key", "present_value")
    assert [shapes[name].dim[3].dim_value for name in caches] == [16] * 4
    with_cache, without = generated(made, 16, True), generated(made, 16, False)
    assert np.array_equal(with_cache[0], without[0])
    assert difference(with_cache[1], without[1]) < 1e-5


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_narrow_node_answers_as_the_dense_layers_say(spelling: str) -> None:
    """What is turned together stays together: other columns of the tables would not do."""
    proto = decoder(changes=SPELLINGS[spelling])
    problem = posed(proto)
    site = whole(problem)
    technique = WholeHeads()
    analysis = technique.analyse(site, None)
    candidate = technique.candidate(site, analysis, (16,))
    factors = technique.factorize(site, analysis, candidate)
    made = rewrite(problem.model, technique.emit(site, candidate, factors))
    dense = technique.dense_equivalent(site, candidate, factors)
    same = rewrite(
        problem.model,
        [
            dense_node(part, part.uses[0], f"dense/{name}", told.weight, told.biases.get(part.uses[0].node))
            for name, told in dense.items()
            for part in [problem.by_name[name]]
        ],
    )
    feeds = samples()
    narrow = {name: value[..., :16] if value.ndim == 4 else value for name, value in feeds.items()}
    got, expected = answers(made, narrow)["logits"], answers(same, feeds)["logits"]
    assert difference(got, expected) < 1e-5
    assert difference(expected, answers(proto, feeds)["logits"]) > 1e-3


def test_the_pairs_kept_are_those_the_scores_owe_most() -> None:
    """Columns of a loud pair survive, wherever they lie."""
    for changes, columns in (("", [5, 21]), (INTERLEAVED, [10, 11])):
        proto = decoder(changes=changes)
        for tensor in proto.graph.initializer:
            if tensor.name in ("q", "k"):
                loud = onnx.numpy_helper.to_array(tensor).copy()
                loud.reshape(MODEL, -1, 32)[:, :, columns] *= 50
                tensor.CopyFrom(onnx.numpy_helper.from_array(loud, tensor.name))
        problem = posed(proto)
        scores, _ = WholeHeads().analyse(whole(problem), None)
        assert scores.pairs[0] == (10 // 2 if changes else 5)  # type: ignore[union-attr, index]


def test_a_cache_holds_the_node_back() -> None:
    problem = posed(decoder(), allow=False)
    assert "--allow-io-change" in str(WholeHeads().refuse(whole(problem)))
    assert any("--allow-io-change" in note for note in notes(problem, told_all=False))


@pytest.mark.parametrize(("width", "changes", "step"), [(16, "", 16), (8, PLAIN, 8)])
def test_widths_the_kernel_does_not_take_are_not_offered(width: int, changes: str, step: int) -> None:
    problem = posed(decoder(width, changes), width)
    site = whole(problem)
    assert f"a multiple of {step}" in str(WholeHeads().refuse(site))
    larger = whole(posed(decoder(48, changes), 48))
    assert [rank for (rank,) in WholeHeads().ranks(larger, ())] == list(range(step, 48, step))
    assert f"a multiple of {step}" in str(WholeHeads().check_ranks(larger, (20,)))


def test_halves_and_wholes_are_left_to_their_own_technique() -> None:
    assert "whole_heads" in str(Heads().refuse(whole(posed(decoder()))))


LEFT_ALONE = {
    "a sink": ("cos, sin) -> cos, sin, , , sink)", "sinks"),
    "a bent score": ("num_heads=4, -> num_heads=4, softcap=3.0,", "bent"),
    "a softer softmax": ("num_heads=4, -> num_heads=4, smooth_softmax=1,", "bent"),
    "values read twice": ("y = Add(ob, x) -> r = Add(ob, x)  t = ReduceMean<axes=[2], keepdims=1>(vb)  y = Add(r, t)",
                          "not understood"),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_what_is_not_followed_is_told(case: str) -> None:
    changes, reason = LEFT_ALONE[case]
    proto = decoder(changes=changes)
    if case == "a sink":
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(HEADS, np.float32), "sink"))
    problem = posed(proto)
    assert not [site for site in problem.sites if site.kind == "attention"]
    assert [note for note in notes(problem) if "GroupQueryAttention" in note and reason in note]


def test_heads_turned_in_part_are_left_alone() -> None:
    problem = posed(decoder(turned=16))
    assert not [site for site in problem.sites if site.kind == "attention"]
    assert any("GroupQueryAttention" in note for note in notes(problem))


def test_from_end_to_end() -> None:
    options: dict[str, Any] = {"calibrate": samples(), "threads": 1, "cache": False, "technique": ["whole_heads"]}
    made = lowrank_onnx.compress(decoder(), keep_macs=0.8, allow_io_change=True, **options)
    assert made.report["ratio"]["macs"] <= 0.8
    (row,) = [row for row in made.plan["sites"] if row["decision"] == "factorized"]
    assert (row["technique"], row["ranks"]) == ("whole_heads", [16])
    assert any("past_key" in text for text in made.report["warnings"])
    again = json.loads(json.dumps(made.plan))
    applied = lowrank_onnx.apply(decoder(), again, calibrate=samples(), threads=1)
    assert applied.model.SerializeToString(deterministic=True) == made.model.SerializeToString(deterministic=True)
    next(row for row in again["sites"] if row["decision"] == "factorized")["ranks"] = [24]
    with pytest.raises(PlanError, match="a multiple of 16"):
        lowrank_onnx.apply(decoder(), again, calibrate=samples(), threads=1)
