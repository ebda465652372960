"""The k largest and k smallest entries of each row of F Wᵀ, without storing the product. Knows nothing of models."""

from querylens_fast.topk.api import TopK, scores_at, streamed_topk

__all__ = ["TopK", "scores_at", "streamed_topk"]
