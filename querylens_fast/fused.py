"""The Triton backend of the streamed top-k: the fused kernel's candidates, settled exactly.

The one module that talks to csrc_triton, imported only when a call goes there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from csrc_triton.configs import topk_config
from csrc_triton.select import column_of
from csrc_triton.topk import topk as launch

from . import blocked, certified


def topk(
    F: Tensor,
    W: Tensor,
    k: int,
    epilogue: blocked.Epilogue,
    *,
    top: bool,
    bottom: bool,
    block_rows: int | None,
    dtype: torch.dtype | None = None,
) -> certified.Outcome:
    """The k largest and the k smallest scores of each row (arguments already checked).

    ``dtype`` is what the kernel multiplies in; None takes bfloat16 for float32 inputs on a GPU, else the inputs' own.
    """
    if dtype is None:
        # The interpreter multiplies bf16 wrongly, so it keeps float32.
        low = F.dtype == torch.float32 and F.device.type == "cuda"
        dtype = torch.bfloat16 if low else F.dtype
    config = topk_config(dtype)
    m = k + 16 if dtype == F.dtype else (5 * k) // 2 + 16
    narrow_W = W.to(dtype).contiguous()
    vectors = blocked.Epilogue(*(None if v is None else v.float().contiguous() for v in epilogue))
    places = torch.arange(config.group, device=F.device)

    def propose(rows: slice, wide: bool) -> tuple[certified.Proposal | None, certified.Proposal | None]:
        bias, scale, offset = vectors.of_rows(rows)
        sides = launch(
            F[rows].to(dtype).contiguous(),
            narrow_W,
            m,
            bias=bias,
            scale=scale,
            offset=offset,
            top=top,
            bottom=bottom,
            config=config,
        )
        proposals = []
        for side, nothing in zip(sides, (-torch.inf, torch.inf), strict=True):
            if side is None:
                proposals.append(None)
                continue
            behind = side.scores.masked_fill(~side.second, nothing)
            proposals.append(
                certified.Proposal(
                    side.columns,
                    side.left_out,
                    side.groups,
                    behind,
                    lambda groups: column_of(groups[..., None], places, config.group).clamp(max=len(W)),
                )
            )
        return proposals[0], proposals[1]

    bound = certified.ErrorBound.of(W, epilogue, dtype)
    # Winners take 16 bytes a group and side; this keeps them under 256 MiB.
    block_rows = block_rows or max(128, (1 << 28) // (32 * max(1, len(W) // config.group)))
    block_rows = min(block_rows, 1 << 15)
    return certified.topk(F, W, k, epilogue, propose, bound, top=top, bottom=bottom, block_rows=block_rows)
