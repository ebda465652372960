"""Hook points: which places of a layer a dictionary can read and write, under every name they go by.

One table for dictionaries, ablations and relations. Names are those of transformer-lens ("blocks.3.hook_resid_post"),
of its bridge ("blocks.3.hook_out") and module paths of transformers ("model.layers.3.mlp", "gpt_neox.layers.3").

Points of the residual stream are numbered: 2l before layer l's attention, 2l + 1 between its attention and its MLP,
2l + 2 after its MLP.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal["sae", "transcoder", "neurons", "directions"]
Writer = Literal["residual", "attention", "mlp"]


@dataclass(frozen=True)
class Site:
    """A place in every layer.

    Attributes:
        name: The site's name in this package.
        written_by: Whose output it is, or belongs to.
        key: The point that a key here reads, less 2l; None: it reads no point of the residual stream.
        value: The point that a value here is added at, less 2l; None: it is not added to the residual stream.
        carried_by: The weight that turns a value here into a direction of the residual stream: "W_O" or "W_out".
        before_post_norm: The module whose output norm, where a model has one, lies between this site and the stream
            (for a key: between the stream and this site).
        reads_output: Keys here read what a module adds to the residual stream: they are directions of it, although they
            read no single point of it, and a transport carries them through that module (`HookPoint.module`).
        reads_inside: Keys here read what a module's output matrix reads (W_O: the heads' outputs), no direction of the
            stream; a transport fitted for it carries them through the part of the module before that.
    """

    name: str
    written_by: Writer
    key: int | None = None
    value: int | None = None
    carried_by: str = ""
    before_post_norm: str = ""
    reads_output: bool = False
    reads_inside: bool = False


SITES = (
    Site("resid_pre", "residual", key=0, value=0),
    Site("attn_normed", "attention"),
    Site("attn_input", "attention"),
    Site("z", "attention", value=1, carried_by="W_O", before_post_norm="attention", reads_inside=True),
    Site("attn_raw", "attention", value=1, before_post_norm="attention", reads_output=True),
    Site("attn_out", "attention", value=1, reads_output=True),
    Site("resid_mid", "residual", key=1, value=1),
    Site("mlp_in", "mlp", key=1),
    Site("mlp_normed", "mlp", key=1),
    Site("mlp_input", "mlp", key=1),
    Site("after_attn_norm", "mlp", key=1, before_post_norm="attention"),
    Site("mlp_pre", "mlp"),
    Site("mlp_post", "mlp", value=2, carried_by="W_out", before_post_norm="mlp", reads_inside=True),
    Site("mlp_raw", "mlp", value=2, before_post_norm="mlp", reads_output=True),
    Site("mlp_out", "mlp", value=2, reads_output=True),
    Site("resid_post", "residual", key=2, value=2),
    Site("heads", "attention"),
)

NAMES = {
    "resid_pre": "hook_resid_pre hook_in input ln1.hook_in",
    "attn_normed": "ln1.hook_normalized",
    "attn_input": "attn.hook_in ln1.hook_out input_layernorm input_layernorm.output ln_1 ln_1.output",
    "z": "attn.hook_z attn.o.hook_in self_attn.o_proj.input attn.c_proj.input attention.dense.input "
    "self_attn.out_proj.input attn.out_proj.input self_attn.dense.input self_attention.dense.input",
    "attn_raw": "attn.hook_out self_attn self_attn.output attn attn.output attention attention.output "
    "self_attention self_attention.output attn.o.hook_out",
    "attn_out": "hook_attn_out ln1_post.hook_out",
    "resid_mid": "hook_resid_mid ln2.hook_in",
    "mlp_in": "hook_mlp_in",
    "mlp_normed": "ln2.hook_normalized",
    "mlp_input": "mlp.hook_in ln2.hook_out mlp.input pre_feedforward_layernorm pre_feedforward_layernorm.output "
    "ln_2 ln_2.output",
    "after_attn_norm": "post_attention_layernorm post_attention_layernorm.output",
    "mlp_pre": "mlp.hook_pre mlp.hook_pre_linear",
    "mlp_post": "mlp.hook_post mlp.out.hook_in mlp.down_proj.input mlp.c_proj.input mlp.dense_4h_to_h.input "
    "mlp.fc_out.input mlp.fc2.input fc2.input",
    "mlp_raw": "mlp.hook_out mlp mlp.output mlp.out.hook_out",
    "mlp_out": "hook_mlp_out ln2_post.hook_out",
    "resid_post": "hook_resid_post hook_out output",
    "heads": "attn.hook_q attn.hook_k attn.hook_v attn.hook_result attn.hook_pattern attn.hook_attn_scores "
    "hook_attn_in hook_q_input hook_k_input hook_v_input",
}
for _inside, _raw in (("z", "attn_raw"), ("mlp_post", "mlp_raw")):  # the output matrix's own path is its output
    _paths = [n.removesuffix(".input") for n in NAMES[_inside].split() if n.endswith(".input")]
    NAMES[_raw] += "".join(f" {path} {path}.output" for path in _paths)
"""Each site's names after "blocks.N." or a layer's module path; the layer's own path is its output."""

_SITE_OF = {name: site for site in SITES for name in NAMES[site.name].split()} | {"": SITES[-2]}
_WRAPPERS = (
    "model|transformer|gpt_neox|rwkv|language_model|text_model|decoder|backbone|base_model|module|original_model|"
    "_orig_mod"
)
_LAYER = re.compile(rf"^(?:(?:{_WRAPPERS})\.)*(?:blocks|layers|h)\.(\d+)(?:\.(.+))?$")


@dataclass(frozen=True)
class HookPoint:
    """A site of one layer, and the name it was given by."""

    name: str
    layer: int
    site: Site

    def point(self, side: str) -> int | None:
        """The point of the residual stream that a value here is added at, or a key here reads; None: there is none."""
        offset = self.site.value if side == "value" else self.site.key
        return None if offset is None or (side == "value" and self.site.carried_by) else 2 * self.layer + offset

    @property
    def module(self) -> int | None:
        """The module (2l attention, 2l + 1 MLP) that a key here reads the output or the inside of; None: neither."""
        reads = self.site.reads_output or self.site.reads_inside
        return 2 * self.layer + (self.site.value or 0) - 1 if reads else None

    def is_direction(self, side: str) -> bool:
        """Whether such vectors are directions of the residual stream, as identity presets take them."""
        return self.point(side) is not None or (side == "key" and self.site.reads_output)

    def refusal(self, side: str) -> str:
        """Why there is no point for this side."""
        if side == "value" and self.site.carried_by:
            return (
                f"its values are written at {self.name!r}, which is not a point of the residual stream but goes there "
                f"through {self.site.carried_by}: pass dictionary.on(model)"
            )
        if side == "key" and self.site.reads_inside:
            return (
                f"its keys act at {self.name!r}, inside a module, which is not a point of the residual stream: only "
                "query_lens_key and query_lens_key_approx carry them there, through the module"
            )
        known = [name for s in SITES if (s.value if side == "value" else s.key) is not None
                 for name in NAMES[s.name].split()]  # fmt: skip
        return (
            f"its {side}s act at {self.name!r}, which is not a point of the residual stream; "
            f"supported for {side}s: {', '.join(known)}"
        )


def hook_point(name: str) -> HookPoint:
    """The hook point that a hook name or module path stands for.

    Raises:
        ValueError: The name has no layer, or what follows is not in the table (the message lists it).
    """
    match = _LAYER.match(name)
    site = None if match is None else _SITE_OF.get(match[2] or "")
    if match is None or site is None:
        raise ValueError(
            f"hook name {name!r} is not understood; expected 'blocks.N.' or a module path like 'model.layers.N.', then "
            f"one of {', '.join(n for n in _SITE_OF if n)} (or nothing after a module path: the layer's output)"
        )
    return HookPoint(name, int(match[1]), site)


def place(
    name: str, hook_name: str, hook_name_out: str, layer: int | None, kind: Kind | None
) -> tuple[int, Kind, HookPoint, HookPoint]:
    """(layer, kind, where it reads, where it writes) of a dictionary from its hook names and what the caller gave.

    Raises:
        ValueError: A hook name that is not understood, an unknown layer, or a layer that contradicts the hook.
    """
    try:
        reads = hook_point(hook_name) if hook_name else None
        writes = hook_point(hook_name_out) if hook_name_out else reads
    except ValueError as error:
        raise ValueError(f"dictionary {name!r}: {error}; or pass layer= and hook_name=") from None
    known = writes or reads
    if known is not None and layer is not None and known.layer != layer:
        raise ValueError(f"dictionary {name!r} is of layer {known.layer} by its hook {known.name!r}, but layer={layer}")
    layer = known.layer if layer is None and known is not None else layer
    if layer is None:
        raise ValueError(f"dictionary {name!r} does not say its layer; pass layer=")
    kind = kind or ("transcoder" if hook_name_out and hook_name_out != hook_name else "sae")
    default_read = "mlp.hook_in" if kind in ("transcoder", "neurons") else "hook_resid_post"
    reads = reads or hook_point(f"blocks.{layer}.{default_read}")
    return layer, kind, reads, writes or hook_point(f"blocks.{layer}.hook_resid_post")
