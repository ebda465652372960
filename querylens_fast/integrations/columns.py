"""Numbers and tokens of `Rows` as JSON values: finite, rounded as dashboards round, nothing that a database refuses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from querylens_fast.integrations.dashboard import Rows
from querylens_fast.integrations.tokens import OUT_OF_RANGE
from querylens_fast.models.norms import at_least_float32

DECIMALS = 5
"""As SAEDashboard rounds."""
LOGIT_FIELDS = ("neg_str", "neg_values", "pos_str", "pos_values")
LOGIT_FIELDS += ("logits_hist_data_bar_heights", "logits_hist_data_bar_values")
VECTOR_FIELDS = ("neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1", "decoder_weights_dist")
DIGITS = 7
"""Significant digits of a vector's largest component, which is all that float32 has."""


def rounded(values: Tensor, decimals: int = DECIMALS) -> list[list[float]]:
    """Rows [n, m] as lists of floats; entries that are no finite number become 0."""
    return values.double().nan_to_num(0.0, 0.0, 0.0).round(decimals=decimals).add(0.0).tolist()


def ids_and_scores(
    ids: Tensor, scores: Tensor, decimals: int | None = DECIMALS
) -> tuple[list[list[int]], list[list[float]]]:
    """Ids and scores [n, k] as lists, entries without a finite score left out; decimals=None does not round."""
    ids, scores = ids.cpu(), scores.cpu().double()
    kept = torch.isfinite(scores) & (ids >= 0)
    listed, numbers = ids.tolist(), scores.tolist() if decimals is None else rounded(scores, decimals)
    for i in (~kept).any(1).nonzero()[:, 0].tolist():
        chosen = kept[i].tolist()
        listed[i], numbers[i] = (list(compress(row[i], chosen)) for row in (listed, numbers))
    return listed, numbers


def tokens_and_scores(ids: Tensor, scores: Tensor, strings: Sequence[str]) -> tuple[list[list[str]], list[list[float]]]:
    """Token strings and rounded scores of ids and scores [n, k]; entries without a finite score are left out."""
    listed, numbers = ids_and_scores(ids, scores)
    return [[_string(strings, i) for i in row] for row in listed], numbers


def _string(strings: Sequence[str], index: int) -> str:
    return strings[index] if index < len(strings) else OUT_OF_RANGE


def vector_lists(vectors: Tensor) -> list[list[float]]:
    """Vectors [n, D] as lists of floats of about seven significant digits."""
    wide = vectors.cpu().double()
    largest = wide.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny)
    scale = 10.0 ** (DIGITS - 1 - largest.log10().floor())[:, None]
    return (wide * scale).round().div(scale).add(0.0).tolist()


def alignments(vectors: Tensor, k: int = 3) -> tuple[list[list[int]], list[list[float]], list[list[float]]]:
    """SAEDashboard's neuron alignment: the k largest components of each vector [n, D], at unit length.

    Returns:
        Their indices, their values, and the values over the vector's L1 norm.
    """
    rows = torch.nn.functional.normalize(at_least_float32(vectors).cpu(), dim=1)
    found = rows.topk(min(k, rows.shape[1]), dim=1)
    share = found.values / rows.abs().sum(1, keepdim=True)
    return found.indices.tolist(), rounded(found.values), rounded(share)


def logit_fields(rows: Rows, strings: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The fields that come from the unembedding, as dashboards name them: a dictionary a feature."""
    none: list[list[Any]] = [[] for _ in range(len(rows.features))]
    negative = tokens_and_scores(rows.bottom_ids, rows.bottom_scores, strings)
    positive = tokens_and_scores(rows.top_ids, rows.top_scores, strings)
    bars = (none, none) if rows.histogram is None else (rows.histogram.heights.tolist(), rounded(rows.histogram.values))
    return _by_feature(LOGIT_FIELDS, (*negative, *positive, *bars))


def vector_fields(rows: Rows) -> Iterator[dict[str, Any]]:
    """The neuron alignment and the heads' shares, empty where they are not known: a dictionary a feature."""
    none: list[list[Any]] = [[] for _ in range(len(rows.features))]
    aligned = (none, none, none) if rows.vectors is None else alignments(rows.vectors)
    shares = none if rows.vectors is None or not rows.heads else head_shares(rows.vectors, rows.heads)
    return _by_feature(VECTOR_FIELDS, (*aligned, shares))


def head_shares(vectors: Tensor, heads: int) -> list[list[float]]:
    """SAEDashboard's decoder_weights_dist: the share of each head's part of a vector [n, heads · d_head], by length."""
    lengths = torch.linalg.vector_norm(at_least_float32(vectors).cpu().unflatten(1, (heads, -1)), dim=2)
    return rounded(lengths / lengths.sum(1, keepdim=True))


def _by_feature(names: Sequence[str], columns: Sequence[list[Any]]) -> Iterator[dict[str, Any]]:
    for values in zip(*columns, strict=True):
        yield dict(zip(names, values, strict=True))
