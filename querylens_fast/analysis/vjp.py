"""The key side, one feature at a time (reference ``analysis.vjp``)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from querylens_fast.analysis.caches import VJPResidCache
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
    use_vjp_layer_norm: bool = False,
    accumulation_steps: int = 1,
    resid_cache: VJPResidCache | None = None,
    transport: Transport | None = None,
) -> dict[str, Any]:
    """What activates a feature's key vector, earlier modules included; read out by the centred cosine.

    Arguments are those of `jvp.analyze_feature`, without the unembedding's norm; ``use_vjp_layer_norm`` takes Jacobians
    through the modules' norms, and ``resid_cache`` is a `VJPResidCache`.

    Returns:
        As `jvp.analyze_feature`; layer_indices run l + 1 (the identity), l, …, 0.

    Raises:
        ValueError: Arguments that do not fit each other.
    """
    if stream_transition not in ("first_order", "full"):
        raise ValueError(f"stream_transition is {stream_transition!r}; expected first_order or full")
    return analyze(
        model,
        f,
        sae,
        preset_of("key", stream_transition, "embed_cosine_centered"),
        pile_sample,
        rank,
        world_size,
        resid_cache=resid_cache,
        transport=transport,
        submodule=submodule,
        k=k,
        through_norms=use_vjp_layer_norm,
    )
