"""Standard errors of token scores, and which top tokens stay: the jackknife over groups of sequences.

A transport is a mean over a token sample, so every score has a sampling error. A transport fitted with ``groups=G``
gives the matrices as they would be without each of G disjoint groups of sequences. The scores under those, through the
same readout (the final norm is not linear, so errors cannot be propagated by a matrix), give the standard error by the
delete-a-group jackknife, for groups of unequal size as in Busing, Meijer & van der Leeden (Statistics and Computing 9,
1999). An interval of 95 % is ± t · se with Student's t of G − 1 degrees of freedom: 2.36 for G = 8.

Cost: one pass of the streamed top-k (top side) and one of given scores for each group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from querylens_fast.lens.presets import Preset
from querylens_fast.lens.readouts import find_readout
from querylens_fast.lens.transitions import shrunk
from querylens_fast.models.model import Model
from querylens_fast.models.norms import at_least_float32
from querylens_fast.transport.jacobians import Order
from querylens_fast.transport.transport import Transport


class Reliability(NamedTuple):
    """How far the top tokens of n features depend on the sample."""

    top_se: Tensor
    """[n, k] standard error of each top score, float32 or wider."""
    stable_k: Tensor
    """[n] int64: how many of the k top tokens are among the top k without any one group, whichever it is."""


class Jackknife:
    """The scores of one preset at one point as they would be without each group of a transport's sequences."""

    def __init__(self, model: Model, transport: Transport, preset: Preset, point: int, final_norm: bool = True) -> None:
        """Take the leave-one-out matrices and readouts.

        Args:
            model: The model.
            transport: Fitted with groups > 1, on the model's device.
            preset: One whose transition is "first_order", "full", or "adaptive" without a threshold.
            point: Where the features act.
            final_norm: As in `signatures`.

        Raises:
            ValueError: The transport keeps no groups, or no energies of groups, which "adaptive" needs; or the preset
                does not go through a transport.
        """
        if preset.stream_transition not in ("first_order", "full", "adaptive"):
            raise ValueError(
                f"preset {preset.name!r} has stream_transition={preset.stream_transition!r}; standard errors are "
                "of first_order, full and adaptive"
            )
        order: Order = "first_order" if preset.stream_transition == "first_order" else "full"
        self.matrices = transport.leave_one_out(preset.feature_vector, order, point)
        adaptive = preset.stream_transition == "adaptive"
        self.energies = transport.leave_one_out_energies("value", "full", point) if adaptive else None
        self.sizes = torch.tensor(transport.group_sizes, dtype=torch.float64)
        centres = transport.leave_one_out_centres()
        if preset.readout != "embed_cosine_centered" or centres is None:
            self.scorers = [find_readout(model, preset, transport.centre, final_norm)] * len(self.sizes)
        else:
            self.scorers = [find_readout(model, preset, centre, final_norm) for centre in centres]

    @torch.no_grad()
    def __call__(self, vectors: Tensor, top_ids: Tensor, top_scores: Tensor, backend: str = "auto") -> Reliability:
        """The reliability of features' top tokens.

        Args:
            vectors: The features' own vectors, before transport, [n, D].
            top_ids: Their top tokens under the whole transport, [n, k].
            top_scores: The scores of those, [n, k].
            backend: Of the streamed top-k.
        """
        ids = top_ids.to(self.matrices.device)
        stays, without = torch.ones_like(ids, dtype=torch.bool), []
        for group, scorer in enumerate(self.scorers):
            moved = self._moved(vectors, group)
            without.append(at_least_float32(scorer.scores_at(moved, ids)))
            kept = scorer.topk(moved, ids.shape[1], backend, bottom=False).top_ids
            assert kept is not None
            stays &= (ids[:, :, None] == kept[:, None, :]).any(2)
        scores = top_scores.to(without[0])
        return Reliability(jackknife_se(scores, without, self.sizes), stays.sum(1))

    def _moved(self, vectors: Tensor, group: int) -> Tensor:
        """What is read out for features' vectors [n, D] without a group of the sequences, [n, D]."""
        own = vectors.to(self.matrices)
        moved = own @ self.matrices[group].mT
        if self.energies is None:
            return moved
        energy = ((own @ self.energies[group]) * own).sum(-1).clamp_min(torch.finfo(own.dtype).tiny)
        return shrunk(moved, own, (1 - moved.square().sum(-1) / energy).clamp(0, 1))


def jackknife_se(whole: Tensor, without: Sequence[Tensor], sizes: Tensor) -> Tensor:
    """Standard error of an estimate by the delete-a-group jackknife.

    Args:
        whole: The estimate from all the data, any shape.
        without: The estimates without each of G groups, each of that shape.
        sizes: The sizes of the groups, [G].
    """
    mean = len(without) * whole
    pseudo, h = torch.zeros_like(whole), (sizes.sum() / sizes).tolist()
    for h_j, theta in zip(h, without, strict=True):
        mean = mean - (1 - 1 / h_j) * theta
    for h_j, theta in zip(h, without, strict=True):
        pseudo += (h_j * whole - (h_j - 1) * theta - mean).square() / (h_j - 1)
    return (pseudo / len(h)).sqrt()
