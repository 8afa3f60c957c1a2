"""Which sites may change."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowrank_onnx.errors import LowRankError
from lowrank_onnx.problem import pose
from lowrank_onnx.proposals import filter_sites
from lowrank_onnx.runtime import Runtime


def kept(models: Path, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> set[str]:
    sites = pose(models / "digits_mlp" / "model.onnx", Runtime()).sites
    return {site.name for site in filter_sites(sites, include, exclude)[0]}


def test_a_compound_site_goes_with_any_layer_it_covers(models: Path) -> None:
    everything = kept(models)
    assert {name for name in everything if ">" in name} == {"/fc1/Gemm>/fc2/Gemm", "/fc2/Gemm>/fc3/Gemm"}
    assert kept(models, exclude=("/fc1/*",)) == {"/fc2/Gemm", "/fc3/Gemm", "/fc2/Gemm>/fc3/Gemm"}
    assert kept(models, include=("/fc2/Gemm",)) == {"/fc2/Gemm"}
    assert kept(models, include=("/fc[12]/*",)) == {"/fc1/Gemm", "/fc2/Gemm", "/fc1/Gemm>/fc2/Gemm"}


def test_a_layer_goes_by_the_name_tables_show(models: Path) -> None:
    assert kept(models, include=("/fc2",)) == {"/fc2/Gemm"}


def test_a_pattern_that_matches_nothing_is_told(models: Path) -> None:
    with pytest.raises(LowRankError, match="--exclude 'fc9' matches no node"):
        kept(models, exclude=("fc9",))
