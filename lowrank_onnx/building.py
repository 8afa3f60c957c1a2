"""From a plan to a model: factors, replacements, rewriting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from onnx import ModelProto

from lowrank_onnx.base import Candidate, Factors, Replacement
from lowrank_onnx.errors import LowRankError
from lowrank_onnx.model import Model, saved_size
from lowrank_onnx.proposals import Proposal
from lowrank_onnx.rewrite import rewrite


@dataclass(frozen=True, eq=False)
class Choice:
    """A candidate, with what is needed to carry it out."""

    proposal: Proposal
    candidate: Candidate


@dataclass(frozen=True, eq=False)
class Built:
    """A rewritten model.

    Attributes:
        proto: The model.
        factors: By site name.
        size_bytes: What a save would write.
    """

    proto: ModelProto
    factors: Mapping[str, Factors]
    size_bytes: int


def factorize(choices: Sequence[Choice]) -> dict[str, Factors]:
    """Compute the factors of every choice."""
    made = {}
    for choice in choices:
        entry = choice.proposal
        try:
            made[entry.site.name] = entry.technique.factorize(entry.site, entry.analysis, choice.candidate)
        except (ArithmeticError, ValueError) as error:
            raise LowRankError(
                f"{entry.technique.name} of '{entry.site.name}' at rank {list(choice.candidate.ranks)} failed: {error}"
            ) from error
    return made


def build(model: Model, choices: Sequence[Choice], factors: Mapping[str, Factors]) -> Built:
    """Rewrite a copy of the model with the factors put in place."""
    replacements: list[Replacement] = []
    for choice in choices:
        entry = choice.proposal
        replacements += entry.technique.emit(entry.site, choice.candidate, factors[entry.site.name])
    proto = rewrite(model, replacements)
    return Built(proto, factors, saved_size(proto))
