"""Low rank of a table that is read both ways: rows looked up, and a head that multiplies all rows at once.

    ê_i = e_i P   and   logits = h Pᵀ Eᵀ,   P (D, D) of rank r, the same for both

With G = Σ_i f_i e_iᵀ e_i for the lookups, K = EᵀE and H = E[hᵀ h] for the head, what is lost is

    tr((I-P)ᵀ G (I-P)) by the lookups   and   tr((I-P)ᵀ K (I-P) H) by the logits.

The best for one of them is P = S V Vᵀ S⁻¹, V the leading eigenvectors of S M S: S = I and M = G, or S² = H and
M = K. For both no closed form is known; between the two lies a family, of which the best member is taken.

Where a softmax follows, what the logits lose of their probabilities is asked for instead: about
tr((I-P)ᵀ C (I-P) H), C the mean covariance of the rows of E under the probabilities (see ``softmax_statistics``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import scipy.linalg

from lowrank_onnx.linalg import Array

RIDGES = (0.01, 0.1, 1.0, 10.0, 1000.0)  # in units of the mean diagonal of H; the last is the plain metric
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the lookups in what the subspace is chosen by


@dataclass(frozen=True, eq=False)
class TiedBasis:
    """Projections of every rank, nested; not orthogonal.

    Attributes:
        into: (D, D) and ``back`` (D, D): P of rank r is ``into[:, :r] @ back[:r]``.
        lookup_gram: (D, D) G of the errors that are told, or K without data.
        table_gram: (D, D) K.
        head_gram: (D, D) H; the identity without data.
    """

    into: Array
    back: Array
    lookup_gram: Array
    table_gram: Array
    head_gram: Array

    def errors(self, rank: int) -> tuple[float, float]:
        """Relative errors of the lookups and of the logits."""
        rest = np.eye(len(self.into)) - self.into[:, :rank] @ self.back[:rank]
        lookup = np.vdot(rest, self.lookup_gram @ rest) / max(np.trace(self.lookup_gram), 1e-300)
        logits = np.vdot(self.table_gram @ rest, rest @ self.head_gram)
        logits /= max(np.vdot(self.table_gram, self.head_gram), 1e-300)
        return float(np.sqrt(max(lookup, 0.0))), float(np.sqrt(max(logits, 0.0)))

    def error(self, rank: int) -> float:
        """Root of the mean of both squared."""
        return float(np.sqrt(np.mean(np.square(self.errors(rank)))))


def tied_basis(
    lookup_gram: Array,
    table_gram: Array,
    head_gram: Array,
    rank: int,
    asked: Array | None = None,
    spread: Array | None = None,
) -> TiedBasis:
    """Return the member of the family that is best for both uses together at a rank.

    Args:
        lookup_gram: (D, D) Σ_i f_i e_iᵀ e_i.
        table_gram: (D, D) EᵀE.
        head_gram: (D, D) E[hᵀ h], not centred.
        rank: Where the members are compared.
        asked: (D, D) G of the errors that are told, such as that of unsmoothed counts; ``lookup_gram`` if None.
        spread: (D, D) C, to choose by instead of K; the errors that are told stay those of the logits.
    """
    scale = float(np.trace(head_gram)) / len(head_gram) or 1.0
    wanted = table_gram if spread is None else spread
    made = []
    for ridge in RIDGES:
        values, vectors = scipy.linalg.eigh(head_gram + ridge * scale * np.eye(len(head_gram)))
        root = (vectors * np.sqrt(values)) @ vectors.T
        inverse = (vectors / np.sqrt(values)) @ vectors.T
        for share in SHARES:
            metric = share * lookup_gram / (np.trace(lookup_gram) or 1.0)
            metric = metric + (1 - share) * wanted / (np.trace(wanted) or 1.0)
            _, basis = scipy.linalg.eigh(root @ metric @ root)
            basis = basis[:, ::-1]
            made.append(TiedBasis(root @ basis, basis.T @ inverse, lookup_gram, wanted, head_gram))
    best = min(made, key=lambda entry: entry.error(rank))
    return replace(best, lookup_gram=lookup_gram if asked is None else asked, table_gram=table_gram)
