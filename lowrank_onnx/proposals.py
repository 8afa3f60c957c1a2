"""Which technique offers what at which site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from lowrank_onnx.base import Candidate, Pass, RankWish, Site
from lowrank_onnx.errors import LowRankError
from lowrank_onnx.workers import HERE, Workers

UNSUITED = "no technique in use takes kind"  # begins the reason of a site that every technique leaves to others


@dataclass(frozen=True, eq=False)
class Proposal:
    """One technique at one site: its analysis, and the candidates it offers, rising in rank."""

    site: Site
    technique: Pass
    analysis: Any
    candidates: tuple[Candidate, ...]


def filter_sites(
    sites: Sequence[Site], include: Sequence[str], exclude: Sequence[str]
) -> tuple[list[Site], dict[str, str]]:
    """Split sites by ``--include`` and ``--exclude`` into those left and the reasons for the others.

    Raises:
        LowRankError: A pattern matches no node.
    """
    for option, patterns in (("--include", include), ("--exclude", exclude)):
        for pattern in patterns:
            if not any(_matches(_spellings(site), [pattern]) for site in sites):
                raise LowRankError(
                    f"{option} '{pattern}' matches no node with a weight; lowrank-onnx inspect lists their names"
                )
    by_name = {site.name: site for site in sites}
    kept, reasons = [], {}
    for site in sites:
        # A compound site changes every layer it covers: each has to be wanted, none may be excluded.
        members = [_spellings(by_name[name]) for name in site.covers]
        if include and not all(_matches(names, include) for names in members):
            reasons[site.name] = "not matched by --include"
        elif any(_matches(names, exclude) for names in members):
            reasons[site.name] = "matched by --exclude"
        else:
            kept.append(site)
    return kept, reasons


def _matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _spellings(site: Site) -> list[str]:
    """The nodes of a site, with and without the operator that tables leave out: ``/fc1/Gemm`` and ``/fc1``."""
    names = [use.node for use in site.uses]
    return [*names, *(name.removesuffix(f"/{site.op}") for name in names)]


def with_work(sites: Sequence[Site]) -> tuple[list[Site], dict[str, str]]:
    """Leave out what costs no multiply-accumulates, for targets that speak of work or time.

    Returns:
        The sites that are left, and a reason for every other one.
    """
    left = [site for site in sites if site.macs != 0]
    reason = "a lookup takes no multiply-accumulates and hardly any time; it counts for --keep-params and --keep-size"
    return left, {site.name: reason for site in sites if site.macs == 0}


def propose(
    sites: Sequence[Site],
    passes: Sequence[Pass],
    statistics: Mapping[str, Mapping[str, Any]],
    wish: RankWish | None,
    workers: Workers = HERE,
) -> tuple[list[Proposal], dict[str, str]]:
    """Analyse every site with every technique that takes it.

    Args:
        sites: The sites that may change.
        passes: The techniques.
        statistics: Moments by site; a site without any is judged by its weight alone.
        wish: ``--rank``; None offers every rank on the grid.
        workers: Who decomposes.

    Returns:
        Proposals with at least one candidate, and a reason for every site without any.
    """
    tasks, reasons = [], {}
    for site in sites:
        suited = [entry for entry in passes if site.kind in entry.kinds]
        refusals = {entry.name: entry.refuse(site) for entry in suited}
        if not suited:
            names = ", ".join(entry.name for entry in passes)
            reasons[site.name] = f"{UNSUITED} {site.kind} (in use: {names})"
        elif all(refusals.values()):
            reasons[site.name] = "; ".join(dict.fromkeys(text for text in refusals.values() if text))
        tasks += [(site, entry) for entry in suited if not refusals[entry.name]]
    calls = ((site, entry, statistics.get(site.name), wish) for site, entry in tasks)
    answers = workers.run(_propose, calls)
    proposals = []
    for (site, _), answer in zip(tasks, answers, strict=True):
        if isinstance(answer, str):
            reasons.setdefault(site.name, answer)
        else:
            # Workers return copies; what is compared by identity must be ours.
            proposals.append(Proposal(site, answer.technique, answer.analysis, answer.candidates))
    for entry in proposals:
        reasons.pop(entry.site.name, None)
    return proposals, reasons


def _propose(site: Site, technique: Pass, moments: Mapping[str, Any] | None, wish: RankWish | None) -> Proposal | str:
    if technique.needs_data and moments is None:
        return f"{technique.name} needs calibration data at this site"
    try:
        analysis = technique.analyse(site, moments)
    except (ArithmeticError, ValueError) as error:
        raise LowRankError(
            f"{technique.name} of '{site.name}' {list(site.shape)} failed: {error}; leave the layer out with "
            f"--exclude '{site.name}'"
        ) from error
    if wish is None:
        ranks = list(technique.ranks(site, analysis))
        if not ranks:
            return f"too small: no rank on the grid of {technique.name} is below break-even"
    else:
        spelled = technique.spell_rank(site, analysis, wish)
        if isinstance(spelled, str):
            return spelled
        ranks = [spelled]
    return Proposal(site, technique, analysis, tuple(technique.candidate(site, analysis, rank) for rank in ranks))


def decompose(
    site: Site, technique: Pass, moments: Mapping[str, Any] | None, ranks: tuple[int, ...]
) -> tuple[Any, Candidate]:
    """Analyse one site and form the candidate at some ranks."""
    analysis = technique.analyse(site, moments)
    return analysis, technique.candidate(site, analysis, ranks)
