"""Low rank of a layer in front of a softmax: what counts is what its probabilities lose.

    z = x W + b   becomes   z = (x A) B + b',   A B = P W,   P = S⁻¹ V Vᵀ S

S² is the second moment H of x, V the leading eigenvectors of S C S, and C the mean covariance of the columns of
W under the probabilities (see ``softmax_statistics``). That minimises tr((I-P)ᵀ H (I-P) C), about twice the KL
divergence, where truncated SVD minimises the squared error of the scores, most of which are of classes that
nobody expects.

With ``rerank=K`` the low rank only screens: the K best classes of every row get the scores they had,

    i = TopK(z, K),   e = (E[i] xᵀ) + b[i],   logits = ScatterElements(z, i, e),   E = Wᵀ

which keeps the whole weight in the file and costs K rows of it for every row of x.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
import scipy.linalg

from lowrank_onnx.base import Candidate, Dense, Factors, Moments, Pass, RankWish, Replacement, Site
from lowrank_onnx.chains import balanced, store
from lowrank_onnx.linalg import Array, regression, with_ridge
from lowrank_onnx.passes.svd import SVD, break_even, grid_step, pooled
from lowrank_onnx.softmax_statistics import is_scores


@dataclass(frozen=True, eq=False)
class Projections:
    """The analysis of one site: projections of every rank, nested.

    Attributes:
        weight: (K, N).
        into: (K, K) and ``back`` (K, K): P of rank r is ``into[:, :r] @ back[:r]``.
        gram: (K, K) of the input, centred where the bias takes up the mean.
        outer: (K, K) W Wᵀ.
        energy: E|x W|², which errors are relative to.
        mean: (K,) of the input; None where no bias takes up the mean.
    """

    weight: Array
    into: Array
    back: Array
    gram: Array
    outer: Array
    energy: float
    mean: Array | None

    def errors(self, rank: int) -> tuple[float, float]:
        """Relative errors of the weight and of the scores."""
        rest = np.eye(len(self.into)) - self.into[:, :rank] @ self.back[:rank]
        lost = rest @ self.outer @ rest.T
        weight = float(np.trace(lost) / np.trace(self.outer))
        scores = float(np.vdot(lost, self.gram)) / self.energy if self.energy > 0 else 0.0
        return float(np.sqrt(max(weight, 0.0))), float(np.sqrt(max(scores, 0.0)))


@dataclass(frozen=True)
class Logits(Pass):
    """Scores (x A) B, of all rank-r maps about the one whose probabilities are nearest on the calibration data.

    Options:
        multiple: Offer only ranks divisible by this; 0 chooses 8 for wide layers, less for narrow ones.
        ridge: Shrinkage towards plain SVD, in units of the mean input variance.
        rerank: Exact scores for so many of the best classes; it saves work, not size. What the layer does to
            the model is measured before re-ranking, so that more is promised than taken.
    """

    name = "logits"
    kinds = ("linear",)
    reference = "Fisher metric of a softmax: Amari 1998, doi:10.1162/089976698300017746; FWSVD, arXiv:2207.00112"
    default = False
    needs_data = True
    multiple: int = 0
    ridge: float = 0.01
    rerank: int = 0

    def refuse(self, site: Site) -> str | None:
        """See Pass.refuse."""
        if site.weight.ndim != 2 or len(site.uses) > 1 or not is_scores(site, site.uses[0]):
            return "what the layer gives are not the scores of a softmax"
        if self.rerank:
            if self.rerank >= site.weight.shape[1]:
                return f"there are {site.weight.shape[1]} classes, not more than the {self.rerank} to re-rank"
            if site.weight.dtype != np.float32 or site.attributes["opset"] < 13 or site.attributes["data_transposed"]:
                return "re-ranking takes rows of float32 and operator set 13"
        return SVD().refuse(site)

    def analyse(self, site: Site, moments: Mapping[str, Moments] | None) -> Projections:
        """See Pass.analyse."""
        assert moments is not None, "needs data"
        (use,) = site.uses
        has_bias = site.attributes[use.node]["op"] == "Gemm" or use.bias is not None
        seen, whole = (pooled(site, moments, centred=centred) for centred in (has_bias, False))
        weight = site.weight.astype(np.float64)
        outer = weight @ weight.T
        spread = moments[use.input].spread
        metric = with_ridge(outer if spread is None else spread, 1e-9)
        values, vectors = scipy.linalg.eigh(with_ridge(seen.gram, max(self.ridge, 1e-9)))
        scale = np.sqrt(np.maximum(values, 1e-300))
        root, inverse = (vectors * scale) @ vectors.T, (vectors / scale) @ vectors.T
        _, basis = scipy.linalg.eigh(root @ metric @ root)
        basis = basis[:, ::-1]
        basis = basis * np.where(basis[np.abs(basis).argmax(axis=0), np.arange(len(basis))] < 0, -1.0, 1.0)
        return Projections(
            weight,
            inverse @ basis,
            basis.T @ root,
            seen.gram,
            outer,
            float(np.vdot(whole.gram, outer)),
            seen.mean if has_bias else None,
        )

    def ranks(self, site: Site, analysis: Projections) -> Sequence[tuple[int, ...]]:
        """See Pass.ranks."""
        step = self.multiple or grid_step(min(site.weight.shape))
        return [(rank,) for rank in range(step, break_even(site) + 1, step)]

    def candidate(self, site: Site, analysis: Projections, ranks: tuple[int, ...]) -> Candidate:
        """See Pass.candidate."""
        (rank,) = ranks
        rows, columns = site.weight.shape
        weight_error, output_error = analysis.errors(rank)
        parameters = rank * (rows + columns) + (columns if self._new_bias(site, analysis) else 0)
        macs = None if site.macs is None else site.macs // (rows * columns) * rank * (rows + columns)
        if self.rerank:
            parameters += rows * columns if site.freed or not site.attributes["rows"] else 0
            parameters += columns if site.uses[0].bias is not None else 0
            macs = None if site.macs is None or macs is None else macs + site.macs // columns * self.rerank
        return Candidate(
            site=site.name,
            technique=self.name,
            ranks=ranks,
            parameters=parameters,
            macs=macs,
            nodes=10 if self.rerank else 1,
            weight_error=weight_error,
            output_error=output_error,
            options={"rerank": self.rerank} if self.rerank else {},
        )

    def _new_bias(self, site: Site, analysis: Projections) -> bool:
        return analysis.mean is not None and site.uses[0].bias is None

    def factorize(self, site: Site, analysis: Projections, candidate: Candidate) -> Factors:
        """See Pass.factorize."""
        (rank,) = candidate.ranks
        (use,) = site.uses
        first, second = balanced(analysis.into[:, :rank], analysis.back[:rank] @ analysis.weight)
        factors = {"first": store(first, site), "second": store(second, site)}
        if analysis.mean is not None:
            bias = 0.0 if use.bias is None else use.bias.astype(np.float64)
            lost = analysis.mean @ analysis.weight - (analysis.mean @ first) @ second
            factors[f"bias:{use.node}"] = store(bias + lost, site)
        if self.rerank and not site.attributes["rows"]:
            factors["rows"] = store(site.weight.T, site)
        return factors

    def emit(self, site: Site, candidate: Candidate, factors: Factors) -> Sequence[Replacement]:
        """See Pass.emit."""
        (made,) = SVD().emit(site, candidate, factors)
        if not candidate.options:
            return [made]
        return [dataclasses.replace(made, nodes=(*made.nodes, *_reranked(site, made, candidate, factors)))]

    def spell_rank(self, site: Site, analysis: Projections, wish: RankWish) -> tuple[int, ...] | str:
        """See Pass.spell_rank."""
        if wish.selector is not None or wish.energy is not None:
            return f"{self.name} takes a rank or a fraction only"
        return (wish.ranks(min(site.weight.shape)),)

    def check_ranks(self, site: Site, ranks: tuple[int, ...]) -> str | None:
        """See Pass.check_ranks."""
        return SVD().check_ranks(site, ranks)

    def targets(self, site: Site) -> tuple[Site, ...]:
        """See Pass.targets."""
        return (site,)

    def refit(self, site: Site, candidate: Candidate, factors: Factors, moments: Moments, ridge: float) -> Factors:
        """Fit the second factor anew: every class by itself, so that no metric of the scores changes the answer."""
        (use,) = site.uses
        bias = f"bias:{use.node}" in factors
        seen = pooled(site, {use.input: moments}, centred=bias)
        first = factors["first"].astype(np.float64)
        assert seen.target_cross is not None and moments.target_mean is not None
        second = regression(
            first.T @ seen.gram @ first, first.T @ seen.target_cross, factors["second"].astype(np.float64), ridge
        )
        made = {**factors, "second": store(second, site)}
        if bias:
            own = 0.0 if use.bias is None else use.bias.astype(np.float64)
            made[f"bias:{use.node}"] = store(own + moments.target_mean - (moments.mean @ first) @ second, site)
        return made

    def effective(self, site: Site, candidate: Candidate, factors: Factors) -> tuple[Array, Array | None]:
        """See Pass.effective."""
        return SVD().effective(site, candidate, factors)

    def dense_equivalent(self, site: Site, candidate: Candidate, factors: Factors) -> Mapping[str, Dense]:
        """See Pass.dense_equivalent."""
        return SVD().dense_equivalent(site, candidate, factors)


def _reranked(site: Site, made: Replacement, candidate: Candidate, factors: Factors) -> list[gs.Node]:
    """Turn what the chain gives into a screen, and put exact scores of the best classes into it."""
    (use,) = site.uses
    screen = gs.Variable(f"{use.node}/screen")
    (last,) = [node for node in made.nodes if node.outputs[0].name == use.output]
    last.outputs = [screen]
    nodes: list[gs.Node] = []

    def step(op: str, inputs: Sequence[gs.Tensor], outputs: int = 1, **attributes: object) -> gs.Variable:
        name = f"{use.node}/rerank_{op.lower()}{len(nodes)}"
        results = [gs.Variable(f"{name}_{place}") for place in range(outputs)]
        nodes.append(gs.Node(op, name, attributes, list(inputs), results))
        return results[-1]

    count = gs.Constant(f"{use.node}/rerank", np.array([candidate.options["rerank"]], np.int64))
    last_axis = gs.Constant(f"{use.node}/last_axis", np.array([-1], np.int64))
    rows: gs.Tensor = gs.Variable(site.attributes["rows"])
    if "rows" in factors:
        rows = gs.Constant(f"{site.name}/rows", factors["rows"])
    best = step("TopK", [screen, count], 2, axis=-1, sorted=0)
    column = step("Unsqueeze", [gs.Variable(use.input), last_axis])
    product = step("MatMul", [step("Gather", [rows, best], axis=0), column])
    exact = step("Squeeze", [product, last_axis])
    if use.bias is not None:
        bias = gs.Constant(f"{use.node}/exact_bias", store(use.bias, site))
        exact = step("Add", [exact, step("Gather", [bias, best], axis=0)])
    inputs = [screen, best, exact]
    nodes.append(gs.Node("ScatterElements", f"{use.node}/rerank", {"axis": -1}, inputs, [gs.Variable(use.output)]))
    return nodes
