"""Narrower heads: no added node, and every product of an attention block smaller.

    scores = (x Q_h + q_h)(x' K_h + k_h)ᵀ   becomes   (x Q_h A_h + q_h A_h)(x' K_h B_h + k_h B_h)ᵀ
    y = Σ_h P_h (x' V_h + v_h) O_h + o      becomes   Σ_h P_h (x' V_h B_h + v_h B_h) O'_h + o'

with A_h, B_h (d, r) in every head h, P_h the attention; heads that share keys or values share A_h and B_h. Where
positions are turned into queries and keys, both keep some of the pairs that are turned together; elsewhere the
scores keep the best rank-r product on the data;
the output layer is refitted on what the narrower values deliver.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lowrank_onnx.base import Candidate, Dense, Factors, Moments, Pass, RankWish, Replacement, Site
from lowrank_onnx.chains import linear_chain, store
from lowrank_onnx.decompositions.heads import best_pairs, block_diagonal, score_bases, score_error, value_factors
from lowrank_onnx.head_chains import narrowed, query_gain
from lowrank_onnx.kept import Kept
from lowrank_onnx.linalg import Array, covariance, covariances, regression, with_ridge


@dataclass(frozen=True, eq=False)
class Scores:
    """The analysis of query and key, per head.

    Attributes:
        queries, keys: (G, d, d) moments of both; those of the keys centred, those of queries of one key added up.
        mixed_q, mixed_k: (G, d, d) mixings, nested; empty where pairs are chosen.
        pairs: (d / 2,) the pairs that are turned together, the best first; None where columns may be mixed.
        interleaved: Whether pair i is the columns (2 i, 2 i + 1), instead of (i, i + d / 2).
        seen: Whether data were seen.
    """

    queries: Array
    keys: Array
    mixed_q: Array
    mixed_k: Array
    pairs: Array | None
    interleaved: bool
    seen: bool

    def mixings(self, rank: int) -> tuple[Array, Array]:
        """(G, d, r) of queries and keys."""
        if self.pairs is None:
            return self.mixed_q[:, :, :rank], self.mixed_k[:, :, :rank]
        groups, width, _ = self.queries.shape
        chosen = np.eye(width)[:, chosen_columns(self.pairs, rank, self.interleaved)]
        return (np.broadcast_to(chosen, (groups, width, rank)),) * 2


@dataclass(frozen=True, eq=False)
class Values:
    """The analysis of value and output: moments of what the heads deliver, all heads side by side.

    Attributes:
        gram: (H·d, H·d) centred.
        mean: (H·d,)
        energy: E|c W|², which errors are relative to.
        seen: Whether data were seen.
    """

    gram: Array
    mean: Array
    energy: float
    seen: bool


@dataclass(frozen=True)
class Heads(Pass):
    """Keep the columns of every head that its scores, or its output, depend on most.

    Options:
        multiple: Offer only head widths divisible by this; 0 chooses 8 for heads of 64 and more, less for narrower.
        ridge: Shrinkage towards the weights alone, in units of the mean variance of the input.
    """

    name = "heads"
    kinds = ("attention",)
    reference = "MoDeGPT, ICLR 2025, arXiv:2408.09632 (types II and III), joint over both weights"
    multiple: int = 0
    ridge: float = 0.001

    def refuse(self, site: Site) -> str | None:
        """See Pass.refuse."""
        if site.attributes["half"] == "whole":
            return "its node wants queries, keys and values of one width, which whole_heads changes together"
        if site.attributes["refusal"]:
            return str(site.attributes["refusal"])
        empty = [part.name for part in site.attributes["parts"] if not part.weight.any()]
        return f"weight of '{empty[0]}' is all zeros" if empty else None

    def analyse(self, site: Site, moments: Mapping[str, Moments] | None) -> Scores | Values:
        """See Pass.analyse."""
        if site.attributes["half"] == "scores":
            return self._scores(site, moments)
        return _values(site, moments)

    def _scores(self, site: Site, moments: Mapping[str, Moments] | None) -> Scores:
        query, key = site.attributes["parts"]
        groups, width = site.attributes["groups"], site.attributes["width"]
        turned = bool(site.attributes["tables"])
        plain: list[Array] = []
        ridged: list[Array] = []
        for part, centred in ((query, False), (key, not turned)):  # a turned mean is another one at every position
            weight = part.weight.astype(np.float64)
            entry = _entry(part, moments)
            mean = np.zeros(weight.shape[1]) if centred else entry.mean @ weight + _bias(part)
            spread = covariance(entry.gram, entry.mean)
            for found, metric in ((plain, spread), (ridged, with_ridge(spread, self.ridge))):
                blocks = _blocks(weight.T @ metric @ weight + np.outer(mean, mean), width)
                found.append(blocks.reshape(groups, -1, width, width).sum(axis=1))
        if turned:
            none = np.empty((groups, width, 0))
            interleaved = site.attributes["tables"][0].interleaved
            pairs = best_pairs(plain[0], plain[1], interleaved)
            return Scores(plain[0], plain[1], none, none, pairs, interleaved, moments is not None)
        mixed_q, mixed_k, _ = score_bases(*ridged)
        return Scores(plain[0], plain[1], mixed_q, mixed_k, None, False, moments is not None)

    def ranks(self, site: Site, analysis: Scores | Values) -> Sequence[tuple[int, ...]]:
        """See Pass.ranks."""
        width = site.attributes["width"]
        step = self.multiple or (8 if width >= 64 else 4 if width >= 16 else 2 if width >= 8 else 1)
        step = max(step, 2) if site.attributes["tables"] else step  # whole pairs
        return [(rank,) for rank in range(step, width, step)]

    def candidate(self, site: Site, analysis: Scores | Values, ranks: tuple[int, ...]) -> Candidate:
        """See Pass.candidate."""
        (rank,) = ranks
        width = site.attributes["width"]
        first, last = site.attributes["parts"]
        # Stored biases shrink with the layers; counted when it is finished.
        biases = [part for part in (first, last) if part.uses[0].bias is not None]
        shrinking = biases if isinstance(analysis, Scores) else [part for part in biases if part is first]
        new = last.weight.shape[1] if isinstance(analysis, Values) and last not in biases else 0
        if isinstance(analysis, Scores):
            error = score_error(analysis.queries, analysis.keys, *analysis.mixings(rank))
        else:
            error = _value_error(site, analysis, *self._reduced(site, analysis, rank))
        return Candidate(
            site=site.name,
            technique=self.name,
            ranks=ranks,
            parameters=site.parameters // width * rank
            + new
            - sum(part.weight.shape[1] // width * (width - rank) for part in shrinking),
            macs=None if site.macs is None else site.macs // width * rank,
            nodes=0,
            weight_error=None if analysis.seen else error,
            output_error=error if analysis.seen else None,
        )

    def _reduced(self, site: Site, analysis: Values, rank: int) -> tuple[Array, Array]:
        weight = site.weight.astype(np.float64)
        return value_factors(analysis.gram, weight, site.attributes["groups"], rank, self.ridge, _shared(site))

    def factorize(self, site: Site, analysis: Scores | Values, candidate: Candidate) -> Factors:
        """See Pass.factorize."""
        (rank,) = candidate.ranks
        if isinstance(analysis, Scores):
            mixed_q, mixed_k = analysis.mixings(rank)
            return {"query": store(mixed_q, site), "key": store(mixed_k, site)}
        mixing, out = self._reduced(site, analysis, rank)
        return {
            "value": store(mixing, site),
            "out": store(out, site),
            "bias": store(_out_bias(site, analysis.mean, mixing, out), site),
        }

    def emit(self, site: Site, candidate: Candidate, factors: Factors) -> Sequence[Replacement]:
        """See Pass.emit."""
        _, last = site.attributes["parts"]
        (rank,) = candidate.ranks
        if "out" in factors:
            out = linear_chain(last, last.uses[0], [(f"{last.name}/heads", factors["out"])], factors["bias"])
            return [narrowed(site, rank, [_mixed(_value(site, factors), factors["value"]), out])]
        gain = query_gain(site, rank)
        query, key = (_refitted(site, place, factors) for place in (0, 1))
        mixed = np.repeat(factors["query"] * gain, _shared(site), axis=0)
        # Both keep the same columns of the tables.
        columns = np.flatnonzero(factors["query"][0].any(axis=1)) if site.attributes["tables"] else None
        return [narrowed(site, rank, [_mixed(query, mixed), _mixed(key, factors["key"])], columns)]

    def targets(self, site: Site) -> tuple[Site, ...]:
        """See Pass.targets."""
        first, last = site.attributes["parts"]
        if site.attributes["half"] == "values":
            return (last,)
        return (first, last) if first.uses[0].input == last.uses[0].input else ()

    def refit(self, site: Site, candidate: Candidate, factors: Factors, moments: Moments, ridge: float) -> Factors:
        """See Pass.refit.

        Queries and keys are asked to be what they were, before their columns are mixed.
        """
        assert moments.target_cross is not None and moments.target_mean is not None
        centred = "out" in factors or all(part.uses[0].bias is not None for part in self.targets(site))
        delivered, wanted = moments.mean, moments.target_mean
        if not centred:
            delivered, wanted = np.zeros_like(delivered), np.zeros_like(wanted)
        gram, cross = covariances(moments.gram, delivered, moments.target_cross, wanted)
        if "out" in factors:
            out = regression(gram, cross, factors["out"].astype(np.float64), ridge)
            bias = _bias(site.attributes["parts"][1]) + wanted - delivered @ out
            return {**factors, "out": store(out, site), "bias": store(bias, site)}
        joined, given = _joined(site)
        both = regression(gram, cross, joined, ridge)
        bias = {"bias": store(given + wanted - delivered @ both, site)} if centred else {}
        return {**factors, "both": store(both, site), **bias}

    def kept_layers(self, site: Site, factors: Factors) -> tuple[Site, ...]:
        """See Pass.kept_layers; the values, before their columns are mixed."""
        value = site.attributes["parts"][0]
        if site.attributes["half"] == "scores" or Kept().refuse(value) is not None:
            return ()
        return (_value(site, factors),)

    def with_kept(self, site: Site, factors: Factors, layer: str, fitted: Factors) -> Factors:
        """See Pass.with_kept."""
        bias = fitted.get(f"bias:{site.attributes['parts'][0].uses[0].node}")
        return {**factors, "value weight": fitted["weight"], **({} if bias is None else {"value bias": bias})}

    def delivered(self, factors: Factors, rows: Array) -> Array:
        """See Pass.delivered."""
        return np.asarray(rows @ _spread(factors["value"], rows.shape[1])) if "out" in factors else rows

    def after_refit(self, site: Site, candidate: Candidate, error: float) -> float:
        """See Pass.after_refit; what the narrower scores lose comes on top."""
        return error if site.attributes["half"] == "values" else float(np.hypot(error, candidate.error))

    def effective(self, site: Site, candidate: Candidate, factors: Factors) -> tuple[Array, Array | None]:
        """See Pass.effective; of the scores, queries and keys before their columns are mixed."""
        if "out" in factors:
            return factors["out"].astype(np.float64), factors["bias"]
        return factors.get("both", _joined(site)[0]).astype(np.float64), factors.get("bias")

    def spell_rank(self, site: Site, analysis: Scores | Values, wish: RankWish) -> tuple[int, ...] | str:
        """See Pass.spell_rank."""
        return "a fixed rank is carried out layer by layer"

    def check_ranks(self, site: Site, ranks: tuple[int, ...]) -> str | None:
        """See Pass.check_ranks."""
        full = site.attributes["width"]
        if site.attributes["tables"] and len(ranks) == 1 and ranks[0] % 2:
            return f"columns are turned in pairs: expected an even width, got {ranks[0]}"
        return None if len(ranks) == 1 and 1 <= ranks[0] <= full else f"expected one width of a head from 1 to {full}"

    def dense_equivalent(self, site: Site, candidate: Candidate, factors: Factors) -> Mapping[str, Dense]:
        """See Pass.dense_equivalent.

        One layer is enough: ``q A (k B)ᵀ = (q A Bᵀ) kᵀ``, and the output layer reads ``c B W'``.
        """
        _, last = site.attributes["parts"]
        if "out" in factors:
            weight = _spread(factors["value"].astype(np.float64), len(site.weight)) @ factors["out"]
            return {last.name: Dense(weight, {last.uses[0].node: factors["bias"]})}
        inner = factors["query"].astype(np.float64) @ np.swapaxes(factors["key"], 1, 2)
        first = _refitted(site, 0, factors)
        weight, bias = _applied(first, np.repeat(inner, _shared(site), axis=0))
        return {first.name: Dense(weight, {} if bias is None else {first.uses[0].node: bias})}


def _values(site: Site, moments: Mapping[str, Moments] | None) -> Values:
    value, out = site.attributes["parts"]
    weight = site.weight.astype(np.float64)
    if moments is not None:
        entry = moments[out.uses[0].input]
        mean, whole = entry.mean, entry.gram
        gram = covariance(whole, mean)
    else:
        # Inputs without mean and of unit variance, and attention that passes them on.
        columns = _repeated(value.weight.astype(np.float64), site)
        gram, mean = columns.T @ columns, _repeated(_bias(value), site)
        whole = gram + np.outer(mean, mean)
    return Values(gram, mean, float(np.einsum("fn,fn->", weight, whole @ weight)), moments is not None)


def _entry(part: Site, moments: Mapping[str, Moments] | None) -> Moments:
    """Moments of the input of a layer; without data, those of uncorrelated inputs of unit variance."""
    if moments is not None:
        return moments[part.uses[0].input]
    inputs = part.weight.shape[0]
    return Moments(1, np.zeros(inputs), np.eye(inputs))


def chosen_columns(pairs: Array, rank: int, interleaved: bool) -> Array:
    """The columns (r,) of the best r / 2 pairs in the order they had, so that they are turned together again."""
    first = np.sort(pairs[: rank // 2])
    if interleaved:
        return np.stack([2 * first, 2 * first + 1], axis=1).reshape(-1)
    return np.concatenate([first, first + len(pairs)])


def _shared(site: Site) -> int:
    """Heads of the queries that one head of the keys or values serves."""
    return int(site.attributes["heads"] // site.attributes["groups"])


def _repeated(columns: Array, site: Site) -> Array:
    """The columns (..., G·d) of the values, as often as their heads are read: (..., H·d)."""
    split = columns.reshape(*columns.shape[:-1], site.attributes["groups"], -1)
    return np.repeat(split, _shared(site), axis=-2).reshape(*columns.shape[:-1], -1)


def _spread(mixing: Array, width: int) -> Array:
    """The mixing (G, d, r) of the values as that of what all heads deliver, (H·d, H·r); ``width`` is H·d."""
    shared = width // (mixing.shape[0] * mixing.shape[1])
    return block_diagonal(np.repeat(mixing, shared, axis=0))


def _blocks(gram: Array, width: int) -> Array:
    """(H, d, d) blocks on the diagonal of a matrix (H·d, H·d)."""
    return np.stack([gram[at : at + width, at : at + width] for at in range(0, len(gram), width)])


def _value_error(site: Site, analysis: Values, mixing: Array, out: Array) -> float:
    lost = site.weight.astype(np.float64) - _spread(mixing, len(site.weight)) @ out
    error = float(np.einsum("fn,fn->", lost, analysis.gram @ lost))
    return float(np.sqrt(max(error, 0.0) / analysis.energy)) if analysis.energy > 0 else 0.0


def _out_bias(site: Site, mean: Array, mixing: Array, out: Array) -> Array:
    """The bias of the output layer, with the mean of what is lost."""
    lost = site.weight.astype(np.float64) - _spread(mixing, len(site.weight)) @ out
    return np.asarray(_bias(site.attributes["parts"][1]) + mean @ lost)


def _mixed(part: Site, mixing: Array) -> Replacement:
    """A layer with the columns of its heads mixed."""
    weight, bias = _applied(part, mixing)
    return linear_chain(part, part.uses[0], [(f"{part.name}/heads", weight)], bias)


def _refitted(site: Site, place: int, factors: Factors) -> Site:
    """Query or key, with the weight and bias of a refit if there was one."""
    part: Site = site.attributes["parts"][place]
    if "both" not in factors:
        return part
    border = site.attributes["parts"][0].weight.shape[1]
    half = slice(0, border) if place == 0 else slice(border, None)
    use = part.uses[0]
    bias = factors["bias"][half] if "bias" in factors else use.bias
    return dataclasses.replace(part, weight=factors["both"][:, half], uses=(dataclasses.replace(use, bias=bias),))


def _value(site: Site, factors: Factors) -> Site:
    """The values, with the weight and bias of a refit if there was one."""
    part: Site = site.attributes["parts"][0]
    use = part.uses[0]
    use = dataclasses.replace(use, bias=factors.get("value bias", use.bias))
    return dataclasses.replace(part, weight=factors.get("value weight", part.weight), uses=(use,))


def _joined(site: Site) -> tuple[Array, Array]:
    """Query and key side by side: weight (K, 2·H·d) and bias."""
    parts = site.attributes["parts"]
    weight = np.concatenate([part.weight.astype(np.float64) for part in parts], axis=1)
    return weight, np.concatenate([_bias(part) for part in parts])


def _applied(part: Site, mixing: Array) -> tuple[Array, Array | None]:
    """Weight (K, H·r) and bias (H·r,) of a layer (K, H·d) behind a mixing (H, d, r)."""
    spread = block_diagonal(mixing.astype(np.float64))
    bias = part.uses[0].bias
    return part.weight.astype(np.float64) @ spread, None if bias is None else bias.astype(np.float64) @ spread


def _bias(part: Site) -> Array:
    bias = part.uses[0].bias
    return np.zeros(part.weight.shape[1]) if bias is None else np.asarray(bias, np.float64)
