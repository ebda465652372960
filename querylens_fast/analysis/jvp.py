"""The value side, one feature at a time (reference ``analysis.jvp``)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from querylens_fast.analysis.caches import ResidCache
from querylens_fast.analysis.calls import analyze, preset_of
from querylens_fast.transport.transport import Transport


def analyze_feature(
    model: Any,
    f: Any,
    sae: Any,
    pile_sample: Tensor,
    rank: int,
    world_size: int,
    stream_transition: str,
    submodule: str = "both",
    k: int = 25,
    use_unembed_layer_norm: bool = True,
    use_jvp_layer_norm: bool = False,
    accumulation_steps: int = 1,
    resid_cache: ResidCache | None = None,
    transport: Transport | None = None,
) -> dict[str, Any]:
    """What a feature's value vector promotes, later modules included.

    Args:
        model: A hooked model, a transformers model or a `Model`.
        f: A `Feature` (of ours or the reference's): its layer and index are read.
        sae: A sae-lens object, a path or a `Dictionary`; None for an MLP neuron.
        pile_sample: Token ids [B, S], the whole sample on every process.
        rank: Of this process.
        world_size: Number of processes; more than one needs torch.distributed to be running.
        stream_transition: "first_order" or "full".
        submodule: "both", "attn" or "mlp": whose Jacobians count.
        k: Tokens on each side.
        use_unembed_layer_norm: Apply the final norm before the unembedding.
        use_jvp_layer_norm: Take Jacobians through the modules' norms.
        accumulation_steps: Kept for the reference's callers; memory is bounded without it.
        resid_cache: Says what is padding; without one the model's pad token does.
        transport: Fitted with the same options over the same sample; by default ``resid_cache.transport``. The mean
            vector then comes from it, and one walk gives the statistics that need every position.

    Returns:
        layer, top_tokens, bottom_tokens, top_ids, bottom_ids, stats, and for first_order the layer_* lists.

    Raises:
        ValueError: Arguments that do not fit each other.
    """
    if stream_transition not in ("first_order", "full"):
        raise ValueError(f"stream_transition is {stream_transition!r}; expected first_order or full")
    return analyze(
        model,
        f,
        sae,
        preset_of("value", stream_transition, "unembed"),
        pile_sample,
        rank,
        world_size,
        resid_cache=resid_cache,
        transport=transport,
        submodule=submodule,
        k=k,
        final_norm=use_unembed_layer_norm,
        through_norms=use_jvp_layer_norm,
    )
