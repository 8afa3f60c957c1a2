"""What the techniques for convolutions share: a chain of small convolutions fitted to the output on patches.

A technique says which chain it makes of one group (``structure``) and how it fits one (``fit``); costs,
errors, bias, groups, transposed convolutions, nodes and refits are the same for all.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lowrank_onnx.base import Candidate, Dense, Factors, Moments, Pass, RankWish, Replacement, Site
from lowrank_onnx.chains import store
from lowrank_onnx.conv_chains import (
    Link,
    balanced_chain,
    chain_macs,
    chain_parameters,
    convolution_chain,
    multiply_out,
    stored,
)
from lowrank_onnx.decompositions.output_metric import Felt, gentle_solve, layer_output
from lowrank_onnx.linalg import Array, psd_root, right_basis, with_ridge
from lowrank_onnx.passes.svd import pooled
from lowrank_onnx.patches import as_linear, as_matrix, blocks_of, unseen
from lowrank_onnx.selectors import Selector

MOST_RANKS = 12  # of one site; between them the error hardly changes

Form = tuple[int, ...]
"""Which variant of a technique: the kernel axes that the first link of the chain covers."""


@dataclass(frozen=True, eq=False)
class Target:
    """What one group's chain is fitted to, in float64; moments are centred where the bias may take the mean.

    Attributes:
        weight: (O, I, *kernel).
        gram: (F, F) second moment of the patches delivered; None without data.
        cross: (O, F) of the wanted output with them, and the ``energy`` of all groups; None where it is the
            weight's own.
        ridge: In units of the mean diagonal of ``gram``.
        start: The chain so far, for a refit.
        felt: How much errors of the outputs matter; None where all count alike. A chain is then fitted to outputs
            turned by it, see ``Felt``.
        memo: What a technique found that holds for every rank.
    """

    weight: Array
    gram: Array | None
    cross: Array | None
    energy: float | None
    ridge: float
    start: tuple[Array, ...] | None = None
    felt: Felt | None = None
    memo: dict[str, Array] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Layer:
    """The analysis of one site.

    Attributes:
        targets: One per group.
        means: Per use (node): mean of the patches delivered (F,) and of the wanted output (O,); empty where the
            bias stays.
        energy: E|y|² without bias, which output errors are relative to; 0 without data.
        form: The variant used at every rank.
        felt: See Moments.felt.
        fits: Chains found so far, by form and ranks; one array of blocks per link.
    """

    targets: tuple[Target, ...]
    means: Mapping[str, tuple[Array, Array]]
    energy: float
    form: Form = ()
    felt: Array | None = None
    fits: dict[tuple[Form, tuple[int, ...]], tuple[Array, ...]] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        """(O, I, *kernel) of one group."""
        return self.targets[0].weight.shape


@dataclass(frozen=True)
class ConvolutionPass(Pass):
    """A chain of convolutions for one.

    Options:
        multiple: Channels between are divisible by this; 0 chooses 16, less for layers narrower than 32.
        ridge: Pull towards the original weight, in units of the mean variance of the patch.
        sweeps: Most rounds of alternating least squares.
    """

    kinds = ("convolution",)
    multiple: int = 0
    ridge: float = 0.001
    sweeps: int = 6

    # --- what a technique says -----------------------------------------------------------------------

    @abstractmethod
    def forms(self, shape: Sequence[int]) -> Sequence[Form]:
        """The variants for a weight (O, I, *kernel) of one group; empty where the technique has none."""

    @abstractmethod
    def structure(self, shape: Sequence[int], form: Form, ranks: tuple[int, ...]) -> tuple[Link, ...]:
        """The chain for one group."""

    @abstractmethod
    def fit(self, target: Target, form: Form, ranks: tuple[int, ...]) -> tuple[Array, ...]:
        """The weights (outputs, inputs, *kernel) of the links for one group."""

    @abstractmethod
    def full(self, shape: Sequence[int], form: Form) -> tuple[int, ...]:
        """The ranks at which any weight of one group is reproduced."""

    @abstractmethod
    def grid(self, shape: Sequence[int], form: Form, step: int) -> Sequence[tuple[int, ...]]:
        """Every choice of ranks on the grid, rising in cost."""

    no_form = "the kernel has one position on all axes but one"

    # --- what all do ----------------------------------------------------------------------------------

    def refuse(self, site: Site) -> str | None:
        """See Pass.refuse."""
        group = int(site.attributes["group"])
        outputs, inputs = blocks_of(site.weight, group, site.attributes["transposed"]).shape[1:3]
        if group > 1 and min(outputs, inputs) == 1:
            return "depthwise: every channel is by itself, there is nothing to share between channels"
        if site.attributes["output_shape"]:
            return "its padding is given by output_shape, which depends on the size of the map"
        if not site.weight.any():
            return "weight is all zeros"
        if not self.forms(self._shape(site)):
            return f"{self.no_form}: {self.name} has nothing to split"
        return None

    def analyse(self, site: Site, moments: Mapping[str, Moments] | None) -> Layer:
        """See Pass.analyse."""
        layer = self._layer(site, moments, self.ridge)
        forms = self.forms(layer.shape)
        if len(forms) > 1:
            errors = [self._error_at_half(site, layer, form) for form in forms]
            forms = [forms[int(np.argmin(errors))]]
        return dataclasses.replace(layer, form=tuple(forms[0]))

    def ranks(self, site: Site, analysis: Layer) -> Sequence[tuple[int, ...]]:
        """See Pass.ranks."""
        return self._offered(site, analysis.shape, analysis.form)

    def candidate(self, site: Site, analysis: Layer, ranks: tuple[int, ...]) -> Candidate:
        """See Pass.candidate."""
        links = self._links(site, analysis.form, ranks)
        chain = self._chain(analysis, analysis.form, ranks)
        weight_error, output_error = self._errors(site, analysis, chain)
        new = [analysis.means[use.node] for use in site.uses if use.bias is None and use.node in analysis.means]
        return Candidate(
            site=site.name,
            technique=self.name,
            ranks=ranks,
            parameters=chain_parameters(links) + sum(len(wanted) for _, wanted in new),
            macs=chain_macs(site, links),
            nodes=(len(links) - 1) * len(site.uses),
            weight_error=weight_error,
            output_error=output_error,
            options={"form": list(analysis.form)},
            felt_error=_felt_error(analysis, chain),
        )

    def factorize(self, site: Site, analysis: Layer, candidate: Candidate) -> Factors:
        """See Pass.factorize."""
        form = tuple(candidate.options["form"])
        links = self._links(site, form, candidate.ranks)
        chain: Sequence[Array] = self._chain(analysis, form, candidate.ranks)
        if site.weight.dtype == np.float16:
            chain = balanced_chain(chain)
        factors = {
            link.role: store(stored(blocks, site.attributes["transposed"]), site)
            for link, blocks in zip(links, chain, strict=True)
        }
        product = self._product(site, links, factors)
        matrix = as_matrix(product)
        for use in site.uses if analysis.means else ():
            delivered, wanted = analysis.means[use.node]
            bias = 0.0 if use.bias is None else use.bias.astype(np.float64)
            factors[f"bias:{use.node}"] = store(bias + wanted - delivered @ matrix, site)
        return factors

    def emit(self, site: Site, candidate: Candidate, factors: Factors) -> Sequence[Replacement]:
        """See Pass.emit."""
        links = self._links(site, tuple(candidate.options["form"]), candidate.ranks)
        weights = [factors[link.role] for link in links]
        return [convolution_chain(site, use, links, weights, factors.get(f"bias:{use.node}")) for use in site.uses]

    def targets(self, site: Site) -> tuple[Site, ...]:
        """See Pass.targets."""
        return (site,) if len(site.uses) == 1 and unseen(site) is None else ()

    def refit(self, site: Site, candidate: Candidate, factors: Factors, moments: Moments, ridge: float) -> Factors:
        """See Pass.refit."""
        form = tuple(candidate.options["form"])
        layer = self._layer(site, {site.uses[0].input: moments}, ridge)
        links, transposed = self._links(site, form, candidate.ranks), site.attributes["transposed"]
        so_far = [blocks_of(factors[link.role], link.shape[0], transposed).astype(np.float64) for link in links]
        # (groups · depth, outputs, inputs, *kernel) -> one chain of (outputs, inputs, *kernel) per group
        chains = zip(
            *(blocks.reshape(len(layer.targets), -1, *blocks.shape[2:]) for blocks in so_far),
            strict=True,
        )
        warm = tuple(
            dataclasses.replace(target, start=chain) for target, chain in zip(layer.targets, chains, strict=True)
        )
        return self.factorize(site, dataclasses.replace(layer, targets=warm, form=form), candidate)

    def felt(self, analysis: Layer) -> Array | None:
        """See Pass.felt."""
        return analysis.felt

    def effective(self, site: Site, candidate: Candidate, factors: Factors) -> tuple[Array, Array | None]:
        """See Pass.effective."""
        product = self._product(site, self._links(site, tuple(candidate.options["form"]), candidate.ranks), factors)
        return as_matrix(product), factors.get(f"bias:{site.uses[0].node}")

    def spell_rank(self, site: Site, analysis: Layer, wish: RankWish) -> tuple[int, ...] | str:
        """See Pass.spell_rank."""
        if wish.selector is not None:
            return self._evident(site, analysis, wish.selector)
        full = self.full(analysis.shape, analysis.form)
        if wish.energy is None:
            return tuple(wish.ranks(entry) for entry in full)
        for ranks in self._offered(site, analysis.shape, analysis.form):
            made = self.candidate(site, analysis, ranks)
            error = made.weight_error if made.output_error is None else made.output_error
            if error is not None and 1 - error**2 >= wish.energy:
                return ranks
        return f"no rank on the grid of {self.name} below break-even keeps energy {wish.energy:g}"

    def unfoldings(self, weight: Array, form: Form) -> tuple[Array, ...]:
        """The matrices of a weight (O, I, *kernel) whose ranks are the ranks of the chain; empty where none are."""
        return ()

    def _evident(self, site: Site, analysis: Layer, selector: Selector) -> tuple[int, ...] | str:
        """Ranks by a selector; groups share the largest."""
        ranks: tuple[int, ...] = ()
        for target in analysis.targets:
            found = []
            for matrix in self.unfoldings(_whitened(target), analysis.form):
                sigma = np.linalg.svd(matrix, compute_uv=False)
                entry = selector.rank(sigma, (matrix.shape[0], matrix.shape[1]))
                if isinstance(entry, str):
                    return entry
                found.append(entry)
            ranks = tuple(map(max, ranks, found)) if ranks else tuple(found)
        if not ranks:
            return f"{self.name} offers no selector '{selector.rule}'"
        if chain_parameters(self._links(site, analysis.form, ranks)) >= site.weight.size:
            return f"ranks {list(ranks)} of {selector.rule} are past break-even"
        return ranks

    def check_ranks(self, site: Site, ranks: tuple[int, ...]) -> str | None:
        """See Pass.check_ranks."""
        limits = [self.full(self._shape(site), form) for form in self.forms(self._shape(site))]
        if any(len(ranks) == len(full) and _within(ranks, full) for full in limits):
            return None
        largest = " or ".join(str(list(full)) for full in dict.fromkeys(limits))
        return f"expected {len(limits[0])} rank(s) from 1 to {largest}"

    def dense_equivalent(self, site: Site, candidate: Candidate, factors: Factors) -> Mapping[str, Dense]:
        """See Pass.dense_equivalent."""
        product = self._product(site, self._links(site, tuple(candidate.options["form"]), candidate.ranks), factors)
        biases = {use.node: factors[f"bias:{use.node}"] for use in site.uses if f"bias:{use.node}" in factors}
        return {site.name: Dense(stored(product, site.attributes["transposed"]), biases)}

    # --- algebra --------------------------------------------------------------------------------------

    def _shape(self, site: Site) -> tuple[int, ...]:
        return blocks_of(site.weight, site.attributes["group"], site.attributes["transposed"]).shape[1:]

    def _links(self, site: Site, form: Form, ranks: tuple[int, ...]) -> tuple[Link, ...]:
        """The chain for all groups together."""
        group = int(site.attributes["group"])
        return tuple(
            dataclasses.replace(link, shape=(group * link.shape[0], *link.shape[1:]))
            for link in self.structure(self._shape(site), form, ranks)
        )

    def _layer(self, site: Site, moments: Mapping[str, Moments] | None, ridge: float) -> Layer:
        blocks = blocks_of(site.weight.astype(np.float64), site.attributes["group"], site.attributes["transposed"])
        if moments is None:
            return Layer(tuple(Target(block, None, None, None, ridge) for block in blocks), {}, 0.0)
        flat = as_linear(site)
        matrix = flat.weight.astype(np.float64)  # (F, O)
        centred = not any(use.dynamic_bias for use in site.uses)
        whole = pooled(flat, moments, centred=False)
        seen = pooled(flat, moments, centred=True) if centred else whole
        energy = whole.target_energy or float(np.einsum("kn,kn->", matrix, whole.gram @ matrix))
        means = {}
        for use in site.uses if centred else ():
            entry = moments[use.input]
            means[use.node] = (entry.mean, entry.mean @ matrix if entry.target_mean is None else entry.target_mean)
        felt = moments[site.uses[0].input].felt
        targets = tuple(_of_group(place, block, seen, ridge, felt) for place, block in enumerate(blocks))
        return Layer(targets, means, energy, felt=felt)

    def _chain(self, layer: Layer, form: Form, ranks: tuple[int, ...]) -> tuple[Array, ...]:
        """The blocks of every link, over all groups; fitted once."""
        key = (form, ranks)
        if key not in layer.fits:
            fitted = [self._fit(target, form, ranks) for target in layer.targets]
            links = self.structure(layer.shape, form, ranks)
            layer.fits[key] = tuple(
                np.concatenate([weights[place].reshape(link.shape) for weights in fitted])
                for place, link in enumerate(links)
            )
        return layer.fits[key]

    def _fit(self, target: Target, form: Form, ranks: tuple[int, ...]) -> tuple[Array, ...]:
        """Fit a chain where errors of the outputs count by what is felt of them: its last link turns them back."""
        felt = target.felt
        if felt is None:
            return self.fit(target, form, ranks)
        turned = dataclasses.replace(
            target,
            weight=felt.turn(target.weight),
            cross=None if target.cross is None else felt.turn(target.cross),
            start=None if target.start is None else (*target.start[:-1], felt.turn(target.start[-1])),
        )
        *earlier, last = self.fit(turned, form, ranks)
        return (*earlier, felt.back(last))

    def _product(self, site: Site, links: Sequence[Link], factors: Factors) -> Array:
        """What the stored weights multiply out to, (groups, O, I, *kernel), in float64."""
        transposed = site.attributes["transposed"]
        return multiply_out(
            [blocks_of(factors[link.role].astype(np.float64), link.shape[0], transposed) for link in links]
        )

    def _errors(self, site: Site, layer: Layer, chain: Sequence[Array]) -> tuple[float, float | None]:
        """Relative errors of the weight and of the output."""
        product = multiply_out(chain)
        lost = norm = squared = 0.0
        for target, made in zip(layer.targets, product, strict=True):
            residual = (target.weight - made).reshape(len(made), -1)
            lost += float(np.linalg.norm(residual) ** 2)
            norm += float(np.linalg.norm(target.weight) ** 2)
            if target.gram is not None:
                squared += float(np.vdot(residual @ target.gram, residual))
        weight_error = float(np.sqrt(lost / norm)) if norm > 0 else 0.0
        if layer.targets[0].gram is None:
            return weight_error, None
        return weight_error, float(np.sqrt(max(squared, 0.0) / layer.energy)) if layer.energy > 0 else 0.0

    def _offered(self, site: Site, shape: Sequence[int], form: Form) -> list[tuple[int, ...]]:
        """Ranks on the grid that cost less than the layer, thinned to a few."""
        full = self.full(shape, form)
        step = self.multiple or channel_step(shape[0], shape[1])
        below = [
            ranks for ranks in self.grid(shape, form, step) if _within(ranks, full) and self._pays(site, form, ranks)
        ]
        if len(below) <= MOST_RANKS:
            return below
        return [below[place] for place in np.unique(np.linspace(0, len(below) - 1, MOST_RANKS).round().astype(int))]

    def _pays(self, site: Site, form: Form, ranks: tuple[int, ...]) -> bool:
        links = self._links(site, form, ranks)
        macs = chain_macs(site, links)
        fewer = chain_parameters(links) < site.weight.size
        return fewer and (macs is None or site.macs is None or macs < site.macs)

    def _error_at_half(self, site: Site, layer: Layer, form: Form) -> float:
        """The error where the chain costs half the layer, for a comparison of forms; between two ranks if need be."""
        offered = self._offered(site, layer.shape, form) or [self.full(layer.shape, form)]
        costs = [self._cost(site, form, ranks) for ranks in offered]
        place = int(np.argmin(np.abs(np.array(costs) - 0.5)))
        chain = self._chain(layer, form, offered[place])
        weight_error, output_error = self._errors(site, layer, chain)
        felt_error = _felt_error(layer, chain)
        error = next(entry for entry in (felt_error, output_error, weight_error) if entry is not None)
        # Squared error falls about exponentially with cost; two forms seldom meet at one cost.
        return float(error * np.exp(costs[place] - 0.5))

    def _cost(self, site: Site, form: Form, ranks: tuple[int, ...]) -> float:
        links = self._links(site, form, ranks)
        macs = chain_macs(site, links)
        if macs is None or not site.macs:
            return chain_parameters(links) / site.weight.size
        return macs / site.macs


def _of_group(place: int, block: Array, seen: Moments, ridge: float, felt: Array | None) -> Target:
    """What the chain of one group is fitted to: its own part of the moments of all channels."""
    inputs, outputs = block[0].size, len(block)
    rows, columns = slice(place * inputs, (place + 1) * inputs), slice(place * outputs, (place + 1) * outputs)
    gram = seen.gram[rows, rows]
    metric = None if felt is None else Felt.of(felt[columns, columns])
    if seen.target_cross is None:
        return Target(block, gram, None, None, ridge, felt=metric)
    return Target(block, gram, seen.target_cross[rows, columns].T, seen.target_energy, ridge, felt=metric)


def _felt_error(layer: Layer, chain: Sequence[Array]) -> float | None:
    """Relative error of the output with every direction counted by what is felt of it; None where unknown."""
    if any(target.felt is None for target in layer.targets):
        return None

    def size(target: Target, weight: Array) -> float:
        assert target.felt is not None and target.gram is not None
        turned = target.felt.turn(weight).reshape(len(weight), -1)
        return max(float(np.vdot(turned @ target.gram, turned)), 0.0)

    pairs = list(zip(layer.targets, multiply_out(chain), strict=True))
    lost = sum(size(target, target.weight - made) for target, made in pairs)
    norm = sum(size(target, target.weight) for target, _ in pairs)
    return float(np.sqrt(lost / norm)) if norm > 0 else 0.0


def _whitened(target: Target) -> Array:
    """The weight (O, I, *kernel) in the metric of its patches; itself without data."""
    if target.gram is None:
        return target.weight
    root = psd_root(with_ridge(target.gram, target.ridge))
    return np.asarray((target.weight.reshape(len(target.weight), -1) @ root).reshape(target.weight.shape))


def output_basis(target: Target) -> tuple[Array, Array]:
    """The weight (O, F) to truncate, and the directions (O, q) of its output on the data, most important first."""
    assert target.gram is not None
    if not target.memo:
        wanted, metric = layer_output(target.weight, target.gram, target.cross, target.energy).regularised(target.ridge)
        target.memo["wanted"], target.memo["basis"] = wanted, right_basis(psd_root(metric), wanted.T)[1]
    return target.memo["wanted"], target.memo["basis"]


def refit_last(target: Target, chain: Sequence[Array]) -> tuple[Array, ...]:
    """Least squares on the data for the last link, a 1 x 1; the others are kept.

    Args:
        target: With data.
        chain: (outputs, inputs, *kernel) of every link, a depthwise one (channels, 1, *kernel).
    """
    assert target.gram is not None
    output = layer_output(target.weight, target.gram, target.cross, target.energy)
    wanted, metric = output.regularised(target.ridge)
    *earlier, last = chain
    given = [earlier[0].shape[1], *map(len, earlier)]
    blocks = [
        link[None] if link.shape[1] == before else link[:, None] for before, link in zip(given, earlier, strict=False)
    ]
    filters = multiply_out(blocks)[0].reshape(last.shape[1], -1).T  # (F, r)
    mapped = metric @ filters
    gram = filters.T @ mapped
    now = last.reshape(last.shape[:2])
    step = gentle_solve((gram + gram.T) / 2, ((wanted - now @ filters.T) @ mapped).T).T
    return (*earlier, (now + step).reshape(last.shape))


def _within(ranks: Sequence[int], full: Sequence[int]) -> bool:
    return all(1 <= rank <= most for rank, most in zip(ranks, full, strict=True))


def channel_step(outputs: int, inputs: int) -> int:
    """Step of the rank grid: the block of channels that kernels work on, less where the layer itself has fewer."""
    width = min(outputs, inputs)
    return 16 if width >= 32 else 8 if width >= 16 else 4
