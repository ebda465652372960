"""Keys that read a module, not a point of the residual stream: what of a transport carries them."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from querylens_fast.transport.jacobians import Order, counts
from querylens_fast.transport.transport import Transport


def reading(transport: Transport, module: int, inside: bool) -> Transport:
    """A copy for keys that read a module: its one key matrix of each order, at point module + 1, is theirs.

    A key that reads the module's output has its gradient go through the module's Jacobian and on from its input:
    K_{i+1} − K_i, exactly, as both carry the key on from that input alike; of the first order that is T′_i. With
    ``inside`` the key reads what the module's output matrix reads, [D, W], which has to have been fitted.

    Raises:
        ValueError: The transport holds nothing of that kind for the module.
    """
    shares: dict[Order, Tensor] = {}
    counted = counts(module, transport.metadata.get("submodule", "both"))
    if inside:
        shares = {order: kept for (order, at), kept in transport.inside.items() if at == module}
    elif counted and module in transport.points and module + 1 in transport.points:
        for (side, order), kept in (transport.groups or {k: m[None] for k, m in transport.matrices.items()}).items():
            if side == "key" and order == "full":
                at, before = (transport.points.index(p) for p in (module + 1, module))
                shares[order] = kept[:, at] - kept[:, before]
            elif side == "key":
                shares[order] = kept[:, module]
    if not shares:
        name = inside_name(module) if inside else f"{'mlp' if module % 2 else 'attn'} {module // 2}'s output"
        remedy = f"inside=[{name!r}]" if inside else "sides=('key',) or both, and submodule='both'"
        raise ValueError(
            f"this transport of {transport.metadata['model']!r} ({transport.metadata['tokens']}) cannot carry keys "
            f"that read {name}: fit it with {remedy}"
        )
    return replace(
        transport,
        matrices={("key", order): kept.sum(0)[None] for order, kept in shares.items()},
        energies={},
        group_energies={},
        groups={("key", order): kept[:, None] for order, kept in shares.items()} if transport.groups else {},
        metadata={**transport.metadata, "points": str(module + 1), "keys_read": "modules"},
    )


def inside_name(module: int) -> str:
    """The hook name of what a module's output matrix reads: "blocks.3.attn.hook_z" or "blocks.3.mlp.hook_post"."""
    return f"blocks.{module // 2}.{'mlp.hook_post' if module % 2 else 'attn.hook_z'}"
