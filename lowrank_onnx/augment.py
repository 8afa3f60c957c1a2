"""More calibration samples of text than were given: the same ones with some tokens exchanged.

A few hundred sentences show a small part of a vocabulary, and factors fitted to them follow what they happen
to say. Random tokens in real sentences spread the directions that are seen. Measured on a sentence encoder at
half of its multiply-accumulates, judged on a topic held out: 0.904 instead of 0.896 mean cosine.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lowrank_onnx.base import Site
from lowrank_onnx.data import Dataset
from lowrank_onnx.linalg import Array
from lowrank_onnx.statistics import padding_mask

SHARE = 0.3  # of the tokens of a sample
_COVERED = 0.5  # of the vocabulary; data that show more of it need no help
_FIXED = 0.9  # of the samples; a token that is in so many marks a place and is no word


def exchange_tokens(dataset: Dataset, sites: Sequence[Site], mask: str | None, seed: int) -> Dataset | None:
    """Return the data followed by as many samples with ``SHARE`` of their tokens drawn anew from the vocabulary.

    Args:
        sites: Of the model; an input that a Gather looks up in a table holds tokens.
        mask: As ``observe`` takes it; padding stays padding.

    Returns:
        None where no input holds tokens, or where the data show most of the vocabulary.
    """
    tables = {
        use.input: len(site.weight)
        for site in sites
        if site.kind == "embedding" and site.weight.ndim == 2 and site.attributes["axis"] == 0
        for use in site.uses
    }
    rows = {name: column.array for name, column in dataset.inputs.items() if column.starts is not None}
    keep = padding_mask(rows, mask) if mask is None or mask in rows else None
    rng = np.random.default_rng(seed)
    changed = {}
    for name, size in tables.items():
        tokens = rows.get(name)
        if tokens is not None and tokens.dtype.kind in "iu" and tokens.ndim == 2:
            words = _words(tokens, keep)
            if len(np.unique(tokens[words])) < _COVERED * size:
                drawn = words & (rng.random(tokens.shape) < SHARE)
                changed[name] = np.where(drawn, rng.integers(0, size, tokens.shape), tokens).astype(tokens.dtype)
    return dataset.doubled(changed) if changed else None


def _words(tokens: Array, keep: Array | None) -> Array:
    """Where real tokens are that differ from sample to sample, (N, positions) bool."""
    real = keep if keep is not None and keep.shape == tokens.shape else np.ones(tokens.shape, bool)
    present = np.concatenate([np.unique(row[there]) for row, there in zip(tokens, real, strict=True)])
    names, counts = np.unique(present, return_counts=True)
    return np.asarray(real & ~np.isin(tokens, names[counts >= _FIXED * len(tokens)]))
