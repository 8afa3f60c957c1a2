"""What travels between the steps: sites, candidates, plans; and what a technique has to offer."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import onnx_graphsurgeon as gs

from lowrank_onnx.errors import LowRankError
from lowrank_onnx.linalg import Array
from lowrank_onnx.selectors import Selector

KINDS = (
    "linear",
    "convolution",
    "embedding",
    "recurrent",
    "attention",
    "feedforward",
    "tied",
    "shared_input",
    "shared_layers",
)


@dataclass(frozen=True, slots=True, eq=False)
class Use:
    """One place in the graph where a weight meets data.

    Attributes:
        node: Name of the node that reads the weight.
        also: Names of the other nodes a replacement covers, such as the Add of a bias.
        scope: Path of the subgraph; empty for the main graph.
        input: Name of the data tensor that goes in.
        output: Name of the tensor that comes out, behind the nodes in ``also``.
        raw_output: What the weight node itself gives.
        bias: (N,) constant that is added here; None without one.
        dynamic_bias: Name of a tensor that is added here instead; empty without one.
        input_shape, output_shape: At the shapes used; None where unknown.
    """

    node: str
    also: tuple[str, ...]
    scope: str
    input: str
    output: str
    raw_output: str
    bias: Array | None = None
    dynamic_bias: str = ""
    input_shape: tuple[int, ...] | None = None
    output_shape: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """One constant weight, or a few that belong together, and the places where data meet it.

    Attributes:
        name: Name of the first node; unique in the model.
        kind: The structure around it, one of ``KINDS``.
        op: ONNX operator.
        shape: Shape of the stored weight.
        weight: The weight in the layout its kind defines (see ``sites/``); float16, 32 or 64.
        uses: Every place; more than one means a shared weight, factorized once.
        parameters: Elements of the stored weight (all weights of a compound site).
        freed: Elements that leave the file when every use is replaced; 0 where somebody else reads it too.
        macs: Multiply-accumulates of all uses in one run; None where a shape is unknown.
        attributes: What the kind knows beyond: ``side`` of a linear constant, ``strides`` of a convolution.
        parts: Names of the single sites a compound one covers.
    """

    name: str
    kind: str
    op: str
    shape: tuple[int, ...]
    weight: Array
    uses: tuple[Use, ...]
    parameters: int
    freed: int
    macs: int | None
    attributes: Mapping[str, Any] = field(default_factory=dict)
    parts: tuple[str, ...] = ()

    @property
    def covers(self) -> tuple[str, ...]:
        """The single sites that are rewritten with this one: itself, or its parts."""
        return self.parts or (self.name,)


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Sums over the calibration rows of one input tensor, divided by their number.

    A refit asks for another output than the weight would give on this input; then ``target_*`` tell of that
    output t, before the bias.

    Attributes:
        rows: Number of rows summed; padding is left out.
        mean: (K,) E[x].
        gram: (K, K) E[xᵀ x], not centred.
        target_cross: (K, N) E[xᵀ t]; None where the weight's own output is wanted.
        target_mean: (N,) E[t].
        target_energy: E|t|².
        felt: (N, N) of a convolution: how much errors of its outputs matter to the model's outputs, up to a factor;
            None where all channels count alike.
        sensitivity: (2, directions, gates * hidden) of a recurrent cell: mean squared effect of an error in a
            row of W x and of R h on the states to come; None elsewhere.
        folds: Of a recurrent cell, the same sums over most samples and over those held out; None where there
            are too few.
        spread: (K, K) of a layer in front of a softmax: mean covariance of the weight's columns, drawn with the
            probabilities the layer predicts; None elsewhere.
    """

    rows: int
    mean: Array
    gram: Array
    target_cross: Array | None = None
    target_mean: Array | None = None
    target_energy: float = 0.0
    sensitivity: Array | None = None
    felt: Array | None = None
    folds: tuple[Moments, Moments] | None = None
    spread: Array | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Counts:
    """How often each row of a table was looked up on the calibration data; padding is left out.

    Attributes:
        rows: Number of lookups.
        total: (V,) lookups by row, negative indices counted where they point to.
        held: (V,) those of ``total`` that were held out, to choose a smoothing by.
    """

    rows: int
    total: Array
    held: Array


@dataclass(frozen=True, slots=True)
class Candidate:
    """What one technique would do to one site; numbers only.

    Attributes:
        site: Name of the site.
        technique: Name of the pass.
        ranks: Rank per bond of the chain.
        parameters: Elements of all factors, and of whatever constant the replacement adds.
        macs: Multiply-accumulates in one run; None where a shape is unknown.
        nodes: How many nodes the replacement adds.
        weight_error: Relative Frobenius error of the weight.
        output_error: Relative error of the site's output on the calibration data; None without data.
        felt_error: The same with every direction of the output counted by what the model feels of it; None where
            that was not measured.
        options: What ``factorize`` has to know beyond the ranks.
        diagnostics: What a technique that samples tells of its chains: ``samples``, ``r_hat``, ``effective_samples``.
    """

    site: str
    technique: str
    ranks: tuple[int, ...]
    parameters: int
    macs: int | None
    nodes: int
    weight_error: float | None
    output_error: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    felt_error: float | None = None
    diagnostics: Mapping[str, Any] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """The error to compare by: what is felt of it, else of the output where data were seen, else of the weight."""
        if self.felt_error is not None:
            return self.felt_error
        return self.output_error if self.output_error is not None else float(self.weight_error or 0.0)


@dataclass(frozen=True, slots=True)
class Plan:
    """Choices, one per site at most, and the reason for every site left alone.

    Attributes:
        model: Digest of the model the plan was made for.
        choices: The chosen candidates.
        refusals: Site name to reason.
        setting: What the factors depend on beyond the ranks: target, data, seed, options of the passes.
        refits: Sites left alone whose dense weights may be fitted anew to what the compressed layers deliver.
    """

    model: str
    choices: tuple[Candidate, ...]
    refusals: Mapping[str, str]
    setting: Mapping[str, Any] = field(default_factory=dict)
    refits: frozenset[str] = frozenset()


Factors = Mapping[str, Array]
"""The constants of a replacement by role: ``first``, ``second``, ``bias``; in the dtype of the model."""


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """A weight in the layout of ``Site.weight``, and the whole bias by node where it changes.

    Attributes:
        behind: (D, H + 1, H) of a recurrent cell: what its states are multiplied by behind it, and in the last
            row what is added to them; None where they are handed on as they are.
    """

    weight: Array
    biases: Mapping[str, Array]
    behind: Array | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Replacement:
    """Nodes to take out of one graph, and nodes to put in.

    Attributes:
        scope: Path of the subgraph; empty for the main graph.
        remove: Names of the nodes that go.
        nodes: The nodes that come, in any order; they read and write tensors by name.
        reshaped: Tensors that stay but change their shape.
        resized: Inputs and outputs of the model that change their shape: name, axis, and its new size.
    """

    scope: str
    remove: tuple[str, ...]
    nodes: tuple[gs.Node, ...]
    reshaped: tuple[str, ...] = ()
    resized: tuple[tuple[str, int, int], ...] = ()


_LARGEST = 1_000_000  # of any number among the options: far beyond every rank, count and share there is


@dataclass(frozen=True)
class Pass(ABC):
    """One technique. Its dataclass fields are its options, set by ``--technique name:option=value``.

    Attributes:
        name: As the command line says it.
        kinds: The kinds of sites it takes.
        reference: Where the method comes from.
        default: Whether it takes part when no ``--technique`` is given.
        needs_data: Whether it has nothing to offer without calibration data.
        spells_out: Whether it puts plain operators in the place of a fused one; then only where that measured faster.
        widens: Whether its dense equivalents have something behind the weight.
    """

    name: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]]
    reference: ClassVar[str]
    default: ClassVar[bool] = True
    needs_data: ClassVar[bool] = False
    spells_out: ClassVar[bool] = False
    widens: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the numbers among the options; a technique with narrower ranges calls this first.

        Raises:
            ValueError: One is NaN, negative or beyond every use.
        """
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, int | float) and not 0 <= value <= _LARGEST:  # NaN is not between either
                raise ValueError(f"{entry.name} must not be negative nor above {_LARGEST}, got {value:g}")

    @abstractmethod
    def refuse(self, site: Site) -> str | None:
        """Return why this technique does not take a site of one of its kinds; None if it does."""

    @abstractmethod
    def analyse(self, site: Site, moments: Mapping[str, Any] | None) -> Any:
        """Do once per site what does not depend on the rank, such as the whitened spectrum.

        Args:
            site: A site that was not refused.
            moments: Per input tensor of the site; None without data.
        """

    @abstractmethod
    def ranks(self, site: Site, analysis: Any) -> Sequence[tuple[int, ...]]:
        """The ranks to offer, on the grid of the provider and below break-even, rising."""

    @abstractmethod
    def candidate(self, site: Site, analysis: Any, ranks: tuple[int, ...]) -> Candidate:
        """Tell cost and error of one choice."""

    @abstractmethod
    def factorize(self, site: Site, analysis: Any, candidate: Candidate) -> Factors:
        """Compute the factors of one choice."""

    @abstractmethod
    def emit(self, site: Site, candidate: Candidate, factors: Factors) -> Sequence[Replacement]:
        """Build the replacing nodes. Touches nothing."""

    @abstractmethod
    def targets(self, site: Site) -> tuple[Site, ...]:
        """The linear sites whose outputs a refit aims at; they read one tensor. Empty: no refit but of ``stages``."""

    @abstractmethod
    def refit(self, site: Site, candidate: Candidate, factors: Factors, moments: Moments, ridge: float) -> Factors:
        """Fit the factors anew, at the same ranks, to what the rewritten graph delivers.

        Args:
            moments: Of the tensor the last factors read in the rewritten graph; the target is the outputs of
                ``targets(site)``, side by side.
            ridge: In units of the mean diagonal of ``moments.gram``.
        """

    def kept_layers(self, site: Site, factors: Factors) -> tuple[Site, ...]:
        """The layers ahead of the targets that stay dense, as they are in the rewritten graph; refitted as well."""
        return ()

    def stages(self, site: Site, analysis: Any) -> tuple[tuple[Site, Any], ...]:
        """Sites with their analyses to refit one after another instead, where layers read different tensors."""
        return ()

    def with_kept(self, site: Site, factors: Factors, layer: str, fitted: Factors) -> Factors:
        """The factors with a new ``weight`` and ``bias:<node>`` for one of ``kept_layers``, or those of a stage."""
        raise NotImplementedError(f"{self.name} keeps no layer")

    def components(self, site: Site, factors: Factors) -> Array | None:
        """The non-negative factor as (rows, r), rows of a table or outputs of a layer; None where there is none."""
        return None

    def delivered(self, factors: Factors, rows: Array) -> Array:
        """What the last factors would read of original input rows (n, K) of the targets; all of it, mostly."""
        return rows

    def felt(self, analysis: Any) -> Array | None:
        """What an analysis was told of how much errors of the output matter; see ``Moments.felt``."""
        return None

    def after_refit(self, site: Site, candidate: Candidate, error: float) -> float:
        """The relative output error of the site, from that of its targets as ``effective`` gives them."""
        return error

    @abstractmethod
    def effective(self, site: Site, candidate: Candidate, factors: Factors) -> tuple[Array, Array | None]:
        """The map (K, N) the factors make of that tensor, and the whole bias (N,); None if unchanged."""

    @abstractmethod
    def spell_rank(self, site: Site, analysis: Any, wish: RankWish) -> tuple[int, ...] | str:
        """Turn ``--rank`` into the ranks of one site, or say why it does not apply there."""

    @abstractmethod
    def check_ranks(self, site: Site, ranks: tuple[int, ...]) -> str | None:
        """Return why ranks a person wrote do not suit a site; None if they do."""

    @abstractmethod
    def dense_equivalent(self, site: Site, candidate: Candidate, factors: Factors) -> Mapping[str, Dense]:
        """What the factors multiply out to, by single site: the same output from dense layers."""


@dataclass(frozen=True, slots=True)
class RankWish:
    """``--rank``: exactly one of the fields is set.

    Attributes:
        absolute: The rank itself; clipped to full rank.
        fraction: Share of full rank, in (0, 1].
        energy: Share of the squared spectrum to keep, in (0, 1]; only where the factors are smaller.
        selector: A rule that reads the rank off the spectrum.
    """

    absolute: int | None = None
    fraction: float | None = None
    energy: float | None = None
    selector: Selector | None = None

    def ranks(self, full: int) -> int:
        """Rank for an absolute or fractional wish at a weight of full rank ``full``."""
        wanted = self.absolute if self.absolute is not None else round((self.fraction or 0.0) * full)
        return min(max(wanted, 1), full)


def configure(kind: type[Pass], options: Mapping[str, str]) -> Pass:
    """Make a pass with options given as text.

    Raises:
        LowRankError: The pass has no such option, or the text does not fit its type.
    """
    fields = {entry.name: entry for entry in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for name, text in options.items():
        if name not in fields:
            known = ", ".join(fields) or "none"
            raise LowRankError(f"technique '{kind.name}' has no option '{name}'; its options: {known}")
        values[name] = _parse(kind.name, name, text, str(fields[name].type))
    try:
        return kind(**values)
    except ValueError as error:
        raise LowRankError(f"technique '{kind.name}': {error}") from error


def _parse(technique: str, name: str, text: str, annotation: str) -> Any:
    try:
        if annotation == "bool":
            return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[text.lower()]
        return {"int": int, "float": float, "str": str}[annotation](text)
    except (KeyError, ValueError) as error:
        raise LowRankError(
            f"option '{name}' of technique '{technique}' must be of type {annotation}, got '{text}'"
        ) from error
