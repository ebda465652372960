"""How alike the tokens of a list are: mean similarity over all pairs, by characters and by embeddings."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from querylens_fast.models.model import Model
from querylens_fast.models.norms import at_least_float32

ROWS_AT_ONCE = 8192
EMBEDDINGS_AT_ONCE = 1 << 23


def string_similarity(model: Model, ids: Tensor) -> Tensor:
    """Mean over pairs of the Dice coefficient of the tokens' character bigrams, [n] float64, for token ids [n, k].

    Tokens are stripped and in lower case; a token of one character counts as itself.
    """
    distinct = ids.unique().tolist()
    grams = dict(zip(distinct, map(_bigrams, model.str_tokens(distinct)), strict=True))
    means = []
    for tokens in ids.tolist():
        pairs = [2 * len(a & b) / (len(a) + len(b)) for a, b in combinations((grams[t] for t in tokens), 2)]
        means.append(sum(pairs) / len(pairs))
    return torch.tensor(means, dtype=torch.float64)


@torch.no_grad()
def embedding_similarity(model: Model, ids: Tensor, centre: Tensor | None = None) -> Tensor:
    """Mean over pairs of the cosine of the tokens' embeddings, [n] float64, for token ids [n, k].

    Args:
        model: The model.
        ids: Token ids, k at least 2.
        centre: What the embeddings are centered on, [D]; None: `vocabulary_centre`.
    """
    centre = vocabulary_centre(model) if centre is None else centre
    k, means = ids.shape[1], []
    for part in ids.split(max(1, EMBEDDINGS_AT_ONCE // (k * model.d_model))):
        embedded = at_least_float32(model.W_E[part.to(model.device)]) - centre
        unit = torch.nn.functional.normalize(embedded, dim=-1)
        # Σ over pairs = (‖Σ e‖² − Σ ‖e‖²) / 2.
        pairs = unit.sum(1).square().sum(-1) - unit.square().sum((1, 2))
        means.append(pairs.double().cpu() / (k * (k - 1)))
    return torch.cat(means) if means else torch.empty(0, dtype=torch.float64)


def vocabulary_centre(model: Model) -> Tensor:
    """The mean embedding over the vocabulary, [D] in float32 or wider."""
    parts = [at_least_float32(part).sum(0) for part in model.W_E.split(ROWS_AT_ONCE)]
    return torch.stack(parts).sum(0) / len(model.W_E)


def _bigrams(text: str) -> frozenset[str]:
    """Character bigrams of a token's letters; the text itself where it is shorter."""
    plain = text.strip().lower() or text
    return frozenset(plain[i : i + 2] for i in range(len(plain) - 1)) or frozenset([plain])
