"""What the structured techniques refuse, each with its reason."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto

from lowrank_onnx import compress
from lowrank_onnx.base import RankWish
from lowrank_onnx.decompositions.block import FORMS
from lowrank_onnx.errors import LowRankError, TargetError
from lowrank_onnx.passes.blast import BlastPass
from lowrank_onnx.passes.block_linear import BlockLinear
from lowrank_onnx.passes.hierarchical import Hierarchical
from lowrank_onnx.passes.kronecker import Kronecker
from lowrank_onnx.passes.monarch import Monarch
from lowrank_onnx.passes.structured import StructuredPass
from tests.builders import build, difference, falling, problem

ALL = (BlockLinear, Monarch, Kronecker, Hierarchical, BlastPass)
every = pytest.mark.parametrize("technique", ALL, ids=lambda kind: str(kind.name))


def product(rows: int, columns: int, opset: int = 17) -> ModelProto:
    text = f"g (float[n,{rows}] x) => (float[n,{columns}] y) {{ y = MatMul(x, w) }}"
    return build(text, {"w": falling(rows, columns)}, opset=opset)


def reason(technique: type[StructuredPass], proto: ModelProto) -> str:
    (site,) = problem(proto).sites
    found = technique().refuse(site)
    assert found is not None
    return found


@every
def test_narrow_layers(technique: type[StructuredPass]) -> None:
    assert "one side of the weight is 3" in reason(technique, product(16, 3))


@every
def test_single_rows(technique: type[StructuredPass]) -> None:
    assert "one side of the weight is 1" in reason(technique, product(1, 16))


@every
def test_weights_of_zeros(technique: type[StructuredPass]) -> None:
    proto = build("g (float[n,32] x) => (float[n,32] y) { y = MatMul(x, w) }", {"w": np.zeros((32, 32), np.float32)})
    assert "all zeros" in reason(technique, proto)


@pytest.mark.parametrize("shape", [(64, 37), (37, 64), (33, 33), (19, 50), (17, 31)], ids=str)
@pytest.mark.parametrize(
    "technique",
    [
        *(BlockLinear(form=form, blocks=blocks) for form in FORMS for blocks in (2, 3, 4)),
        *(Monarch(groups=groups) for groups in (2, 3, 4)),
        *(Hierarchical(depth=depth, leaf=3) for depth in (1, 2, 3)),
        *(BlastPass(blocks=blocks) for blocks in (2, 3, 4)),
        Kronecker(),
    ],
    ids=str,
)
def test_full_rank_is_exact_where_groups_are_of_unequal_width(
    technique: StructuredPass, shape: tuple[int, int]
) -> None:
    (site,) = problem(product(*shape)).sites
    if technique.refuse(site) is not None:
        pytest.skip("refused")
    analysis = technique.analyse(site, None)
    rank = technique.spell_rank(site, analysis, RankWish(fraction=1.0))
    assert isinstance(rank, tuple)
    made = technique.structure(technique.factorize(site, analysis, technique.candidate(site, analysis, rank)))
    assert difference(made.dense(), site.weight) < 1e-5


@every
def test_zero_blocks_and_half_precision_give_finite_factors(technique: type[StructuredPass]) -> None:
    weight = falling(32, 32).astype(np.float16)
    weight[:16, :20] = 0
    weight[:, 3] = 0
    (site,) = problem(build("g (float16[n,32] x) => (float16[n,32] y) { y = MatMul(x, w) }", {"w": weight})).sites
    made = technique()
    analysis = made.analyse(site, None)
    for ranks in made.ranks(site, analysis):
        candidate = made.candidate(site, analysis, ranks)
        factors = made.factorize(site, analysis, candidate)
        assert all(np.isfinite(entry).all() for entry in factors.values())
        assert all(entry.dtype == np.float16 for entry in factors.values() if entry.dtype.kind == "f")
        dense, _ = made.effective(site, candidate, factors)
        measured = np.linalg.norm(dense - weight) / np.linalg.norm(weight.astype(np.float64))
        assert measured == pytest.approx(candidate.error, abs=2e-3)


@every
def test_old_operator_sets(technique: type[StructuredPass]) -> None:
    assert "operator set 11, the model has 9" in reason(technique, product(32, 32, opset=9))


@every
def test_stacks(technique: type[StructuredPass]) -> None:
    stack = np.stack([falling(16, 20), falling(16, 20)])
    proto = build("g (float[2,n,16] x) => (float[2,n,20] y) { y = MatMul(x, w) }", {"w": stack})
    assert "one matrix, not a stack" in reason(technique, proto)


@every
def test_added_tensors_that_gemm_scales(technique: type[StructuredPass]) -> None:
    proto = build(
        "g (float[n,32] x, float[n,32] c) => (float[n,32] y) { y = Gemm<beta=0.5>(x, w, c) }", {"w": falling(32, 32)}
    )
    assert "scales a tensor it adds" in reason(technique, proto)


@pytest.mark.parametrize("technique", [BlockLinear, Monarch], ids=lambda kind: str(kind.name))
def test_layers_too_small_for_any_form(technique: type[StructuredPass]) -> None:
    assert "of a 5 x 5 weight is smaller than the weight" in reason(technique, product(5, 5))


def test_sides_that_are_prime_have_no_kronecker_form() -> None:
    assert "no form of kronecker of a 13 x 17 weight" in reason(Kronecker, product(13, 17))


def test_kronecker_takes_weights_on_the_right() -> None:
    proto = build("g (float[16,n] x) => (float[32,n] y) { y = MatMul(w, x) }", {"w": falling(32, 16)})
    assert "on the right of the data" in reason(Kronecker, proto)


@pytest.mark.parametrize(
    ("technique", "told"),
    [
        ("block:form=diamond", "form must be auto"),
        ("block:blocks=1", "at least 2"),
        ("monarch:groups=1", "groups must be 0 or at least 2"),
        ("hierarchical:leaf=0", "leaf must be at least 1"),
        ("kronecker:ridge=-1", "ridge must not be negative"),
        ("blast:blocks=1", "blocks must be 0 or at least 2"),
    ],
)
def test_options_out_of_range(technique: str, told: str) -> None:
    with pytest.raises(LowRankError, match=told):
        compress(product(32, 32), rank=0.5, technique=[technique])


@every
def test_a_model_without_suited_layers_tells_why(technique: type[StructuredPass]) -> None:
    with pytest.raises(TargetError, match=r"no layer can be factorized .*one side of the weight is 3"):
        compress(product(16, 3), keep_params=0.5, technique=[technique.name])


def test_ranks_past_break_even_are_told() -> None:
    told = compress(product(32, 32), rank=1.0, technique=["hierarchical"]).report["warnings"]
    assert any("1 layer stores more than before, past break-even" in line for line in told), told
    told = compress(product(32, 32), rank=2, technique=["hierarchical"]).report["warnings"]
    assert not any("break-even" in line for line in told), told
