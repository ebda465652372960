"""sae-lens's logit-weight statistics and token-set enrichment under their names, without features × vocabulary.

`get_W_U_W_dec_stats_df`, `get_stats_df` and `get_all_stats_dfs` are those of sae-lens's notebook
logits_lens_with_features; `get_enrichment_df` and `calculate_batch_enrichment_scores` those of
``sae_lens.tutorial.tsea``. Arguments, columns and numbers are theirs (1e-5). What differs: the projection that
`get_W_U_W_dec_stats_df` returns is computed when its rows are asked for, and token sets are never changed.

Enrichment. The tokens of a row are walked by descending score; a token of the set adds 1/|S|, another takes away
1/(V − |S|), and the score is the largest absolute running sum. It is reached just before or just after a token of the
set, so the ranks of the set's tokens are enough.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from querylens_fast.models.norms import at_least_float32
from querylens_fast.topk.products import full_float32, linear

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Projection",
    "calculate_batch_enrichment_scores",
    "get_W_U_W_dec_stats_df",
    "get_all_stats_dfs",
    "get_enrichment_df",
    "get_stats_df",
]

ROWS_AT_ONCE = 256
"""Rows of scores that are sorted at a time."""
TILE = (512, 2048)
"""Rows and columns of scores whose moments are taken at a time: what stays in the cache."""
CACHED_ROWS = 8
"""Rows of a whole projection whose moments are taken at a time."""


class Projection:
    """W_dec @ W_U [F, V] of which rows are computed when they are asked for.

    Args:
        W_dec: [F, D].
        W_U: [D, V], as transformer-lens has it.
        cosine_sim: Divide by the length of W_U's columns.
    """

    def __init__(self, W_dec: Tensor, W_U: Tensor, cosine_sim: bool = False) -> None:
        if W_dec.ndim != 2 or W_U.ndim != 2 or W_dec.shape[1] != W_U.shape[0]:
            raise ValueError(f"W_dec is {list(W_dec.shape)} and W_U {list(W_U.shape)}; expected [F, D] and [D, V]")
        self.W_dec, self.W = W_dec.detach(), W_U.detach().mT.contiguous()
        self.scale = 1 / torch.linalg.vector_norm(self.W, dim=1) if cosine_sim else None

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.W_dec), len(self.W)))

    def __len__(self) -> int:
        return len(self.W_dec)

    @torch.no_grad()
    def __getitem__(self, features: Any) -> Tensor:
        """Rows [n, V] of features: an id (then [V]), ids, a mask or a slice."""
        rows = self.W_dec[features] @ self.W.mT
        return rows if self.scale is None else rows * self.scale

    def moments(self) -> Tensor:
        """`get_stats_df`'s columns [4, F] in float64, from tiles of scores that stay in the cache.

        W is centered once, so scores come about their row's mean but for rounding, which the first moment counts.
        """
        W_dec, W = (at_least_float32(x) for x in (self.W_dec, self.W))
        W = W if self.scale is None else W * self.scale[:, None]
        center = W.mean(0)
        W = W - center
        room = W.new_empty(TILE[0] * TILE[1])
        parts = []
        for rows in W_dec.to(W).split(TILE[0]):
            rows, size = _near_one(rows)
            sums = torch.zeros(4, len(rows), dtype=torch.float64, device=W.device)
            for columns in W.split(TILE[1]):
                scores = linear(rows, columns)
                sums += _power_sums(scores, room[: scores.numel()].view(scores.shape))
            parts.append(_moments(rows.double() @ center.double(), sums / len(W), size))
        return torch.cat(parts, 1)


@torch.no_grad()
def get_stats_df(projection: Tensor | Projection) -> pd.DataFrame:
    """Mean, std, skewness and kurtosis of each row: population moments, kurtosis not in excess of 3.

    Args:
        projection: [F, V], or a `Projection`.
    """
    import pandas as pd

    with full_float32(projection.W.device if isinstance(projection, Projection) else projection.device):
        found = projection.moments() if isinstance(projection, Projection) else _moments_of_rows(projection)
    names = ("mean", "std", "skewness", "kurtosis")
    columns = zip(names, found.float().cpu().numpy(), strict=True)
    return pd.DataFrame({"feature": range(len(projection)), **dict(columns)})


def _moments_of_rows(projection: Tensor) -> Tensor:
    """Moments [4, F] of rows [F, V] that are held already, a few at a time."""
    parts = []
    for rows in projection.detach().split(CACHED_ROWS):
        rows = at_least_float32(rows)
        mean = rows.mean(1, keepdim=True)
        centered, size = _near_one(rows - mean)
        sums = _power_sums(centered, torch.empty_like(centered))
        parts.append(_moments(mean[:, 0].double() / size, sums / rows.shape[1], size))
    return torch.cat(parts, 1)


def _near_one(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows divided by a power of two that is their size [r], float64: the fourth powers of 1e-12 are 0 in float32."""
    size = torch.ldexp(rows.new_ones(len(rows)), torch.frexp(rows.abs().amax(1)).exponent.clamp(-120, 120))
    return rows / size[:, None], size.double()


def _power_sums(scores: Tensor, room: Tensor) -> Tensor:
    """Sums of the first four powers of rows of scores [r, c], as [4, r] float64; ``room`` is overwritten."""
    squares = torch.mul(scores, scores, out=room)
    second, fourth = (torch.linalg.vector_norm(x, dim=1).double().square() for x in (scores, squares))
    return torch.stack([scores.sum(1).double(), second, squares.mul_(scores).sum(1).double(), fourth])


def _moments(shift: Tensor, powers: Tensor, size: Tensor) -> Tensor:
    """Mean, standard deviation, skewness and kurtosis [4, r] of rows whose parts of ``size`` [r] have these mean powers
    [4, r] about a shift [r]."""
    first, second, third, fourth = powers
    variance = (second - first**2).clamp_min(0)
    fourth = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
    third = third - 3 * first * second + 2 * first**3
    return torch.stack([size * (shift + first), size * variance.sqrt(), third / variance**1.5, fourth / variance**2])


def get_W_U_W_dec_stats_df(
    W_dec: Tensor, model: Any, cosine_sim: bool = False
) -> tuple[pd.DataFrame, Projection]:  # fmt: skip
    """Statistics of W_dec @ W_U, and the projection itself, computed when rows are asked for.

    Args:
        W_dec: [F, D].
        model: Anything with transformer-lens's ``W_U`` [D, V] (its processed weights are used as they are), or a
            `Model`, whose raw unembedding is taken.
        cosine_sim: Divide by the length of W_U's columns.
    """
    projection = Projection(W_dec.detach().cpu(), _unembedding(model), cosine_sim)
    return get_stats_df(projection), projection


def get_all_stats_dfs(
    gpt2_small_sparse_autoencoders: Mapping[str, Any],
    gpt2_small_sae_sparsities: Mapping[str, Tensor],
    model: Any,
    cosine_sim: bool = False,
) -> pd.DataFrame:
    """`get_W_U_W_dec_stats_df` of several SAEs in one frame, with log_feature_sparsity and layer.

    Args:
        gpt2_small_sparse_autoencoders: SAEs by hook point, "blocks.{layer}.…".
        gpt2_small_sae_sparsities: Log feature sparsities [F] by the same keys.
        model: As in `get_W_U_W_dec_stats_df`.
        cosine_sim: Likewise.
    """
    import pandas as pd

    frames = []
    for key, sae in gpt2_small_sparse_autoencoders.items():
        frame, _ = get_W_U_W_dec_stats_df(sae.W_dec, model, cosine_sim)
        frame["log_feature_sparsity"] = gpt2_small_sae_sparsities[key].detach().cpu()
        frame["layer"] = int(key.split(".")[1]) + (1 if "post" in key else 0)
        frames.append(frame)
    return pd.concat(frames, axis=0)


def get_enrichment_df(
    projections: Tensor | Projection,
    features: Sequence[int],
    gene_sets_selected: Mapping[str, Iterable[int]],
    signed: bool = False,
) -> pd.DataFrame:
    """Enrichment of token sets among the scores of features: rows are sets, columns features.

    Args:
        projections: [F, V], or a `Projection`.
        features: Feature ids.
        gene_sets_selected: Token ids by name.
        signed: Keep the sign: positive where the set's tokens score high.
    """
    import pandas as pd

    features = [int(i) for i in features]
    sets = {name: torch.tensor(sorted(set(ids)), dtype=torch.int64) for name, ids in gene_sets_selected.items()}
    parts = [
        _enrichment(projections[features[start : start + ROWS_AT_ONCE]], list(sets.values()), signed)
        for start in range(0, len(features), ROWS_AT_ONCE)
    ]
    found = torch.cat(parts, 1) if parts else torch.empty(len(sets), 0)
    return pd.DataFrame(found.cpu().numpy(), index=pd.Index(list(sets)), columns=pd.Index(features))


def calculate_batch_enrichment_scores(scores: Tensor, index_lists: Tensor, signed: bool = False) -> Tensor:
    """Enrichment scores [n_sets, n] of token sets among rows of scores.

    Args:
        scores: [n, V].
        index_lists: [n_sets, m] token ids, padded with −1.
        signed: Keep the sign.
    """
    sets = [row[row != -1] for row in index_lists]
    rows = scores.to(index_lists.device).split(ROWS_AT_ONCE)
    return torch.cat([_enrichment(part, sets, signed) for part in rows], 1)


@torch.no_grad()
def _enrichment(scores: Tensor, sets: Sequence[Tensor], signed: bool) -> Tensor:
    """[n_sets, n] of rows of scores [n, V]; a set that names a token twice counts it twice in its size, as theirs."""
    order = scores.sort(dim=1, descending=True).indices
    places = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    ranks = torch.empty_like(order).scatter_(1, order, places)
    found = torch.empty(len(sets), len(scores), device=scores.device)
    for i, ids in enumerate(sets):
        found[i] = _largest_sum(ranks[:, ids.unique().to(ranks.device)], len(ids), scores.shape[1], signed)
    return found


def _largest_sum(ranks: Tensor, size: int, vocabulary: int, signed: bool) -> Tensor:
    """The running sum of largest absolute value [n], from the ranks [n, s] of a set's tokens among V."""
    n, s = ranks.shape
    hit = 1 / size if size else 0.0
    miss = 1 / (vocabulary - size) if vocabulary > size else 0.0
    hits = torch.arange(1, s + 1, dtype=torch.float64, device=ranks.device)
    misses = ranks.sort(dim=1).values.double() - (hits - 1)
    sums = [hits * hit - misses * miss, (hits - 1) * hit - misses * miss]
    end = torch.full((n, 1), s * hit - (vocabulary - s) * miss, dtype=torch.float64, device=ranks.device)
    every = torch.cat([*sums, end], 1)
    largest = every.gather(1, every.abs().argmax(1, keepdim=True))[:, 0]
    return (largest if signed else largest.abs()).float()


def _unembedding(model: Any) -> Tensor:
    """W_U [D, V] on the CPU."""
    from querylens_fast.models.model import Model

    W_U = model.W_U.detach().cpu()
    return W_U.mT if isinstance(model, Model) else W_U
