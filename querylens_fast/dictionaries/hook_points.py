"""Hooks: the points of the residual stream that hook and module names stand for.

`walks` numbers the points: 2l before layer l's attention, 2l + 1 between its attention and its MLP, 2l + 2 after it.
"""

from __future__ import annotations

import re
from typing import Literal

Kind = Literal["sae", "transcoder", "neurons", "directions"]

_HOOK = re.compile(r"^blocks\.(\d+)\.(.+)$")
_MODULE = re.compile(r"^(?:model\.)?(?:language_model\.)?(?:transformer\.)?(?:layers|h)\.(\d+)(?:\.(.+))?$")
STREAM = {"hook_resid_pre": 0, "hook_resid_mid": 1, "hook_resid_post": 2}
_WRITES = {
    **STREAM,
    "hook_mlp_out": 2,
    "mlp.hook_out": 2,
    "hook_attn_out": 1,
    "output": 2,
    "": 2,
    "mlp": 2,
    "self_attn": 1,
}
_READS = {
    **STREAM,
    "mlp.hook_in": 1,
    "hook_mlp_in": 1,
    "ln2.hook_normalized": 1,
    "output": 2,
    "": 2,
    "mlp.input": 1,
    "pre_feedforward_layernorm.output": 1,
    "post_attention_layernorm.output": 1,
}


BEFORE_POST_NORM = {
    "value": {"mlp": "mlp", "mlp.hook_out": "mlp", "self_attn": "attention"},
    "key": {"post_attention_layernorm.output": "attention"},
}
"""Places that are the stream's (or the MLP's input) only where that module's output is not normed first."""


def parse_hook(hook_name: str) -> tuple[int, str] | None:
    """(layer, place) of a hook or module name: "blocks.3.hook_resid_post" → (3, "hook_resid_post")."""
    match = _HOOK.match(hook_name) or _MODULE.match(hook_name)
    return None if match is None else (int(match.group(1)), match.group(2) or "")


def place(
    name: str, hook_name: str, hook_name_out: str, layer: int | None, kind: Kind | None
) -> tuple[int, Kind, dict[str, int | None], dict[str, str]]:
    """(layer, kind, point by side, refusal by side) from the hook names and what the caller gave."""
    reads, writes = parse_hook(hook_name or ""), parse_hook(hook_name_out or hook_name or "")
    known = writes or reads
    if hook_name and reads is None:
        raise ValueError(f"dictionary {name!r}: hook name {hook_name!r} is not understood; pass layer= and hook_name=")
    if known is not None and layer is not None and known[0] != layer:
        raise ValueError(f"dictionary {name!r} is of layer {known[0]} by its hook {hook_name!r}, but layer={layer}")
    layer = known[0] if layer is None and known is not None else layer
    if layer is None:
        raise ValueError(f"dictionary {name!r} does not say its layer; pass layer=")
    kind = kind or ("transcoder" if hook_name_out and hook_name_out != hook_name else "sae")
    default_read = "mlp.hook_in" if kind in ("transcoder", "neurons") else "hook_resid_post"
    read_place = reads[1] if reads else default_read
    write_place = writes[1] if writes else "hook_resid_post"
    points: dict[str, int | None] = {}
    refusals = {}
    layers = {"key": layer if reads is None else reads[0], "value": layer}
    for side, place, table in (("key", read_place, _READS), ("value", write_place, _WRITES)):
        points[side] = 2 * layers[side] + table[place] if place in table else None
        if place not in table:
            refusals[side] = (
                f"its {side} acts at {place!r}, which is not a point of the residual stream; "
                f"supported for {side}s: {', '.join(sorted(p for p in table if p))}"
            )
    return layer, kind, points, refusals
