"""Values as dashboards read them: at unit length where the dictionary holds them, then carried by W_O or W_out.

SAEDashboard multiplies decoder rows at attn.hook_z by W_O and rows at mlp.hook_post by W_out, after it has divided them
by their length, and leaves out a norm that the model may have behind that weight (Gemma's post-norms).
"""

from __future__ import annotations

from dataclasses import replace

from querylens_fast.dictionaries.dictionary import Dictionary
from querylens_fast.dictionaries.rows import CarriedRows
from querylens_fast.models.model import Model

_REASONS = ("refusals", "no_direction")


def held(dictionary: Dictionary) -> Dictionary:
    """The dictionary with the values of its source, where `Dictionary.on` carried them."""
    rows = dictionary.value_rows
    if not isinstance(rows, CarriedRows):
        return dictionary
    return replace(dictionary, d_model=rows.rows.shape[1], value_rows=rows.rows, carried=False)


def as_dashboards(dictionary: Dictionary, model: Model, unit_norm: bool) -> Dictionary:
    """The dictionary with values that dashboards multiply by W_U; those that are not carried keep their length.

    Raises:
        ValueError: The dictionary cannot belong to the model, or its values are written at no such place.
    """
    source = held(dictionary)
    bound = source.on(model)
    if source.writes.site.carried_by and source.value_rows is not None:
        return source.carry(model, unit_norm)
    if norm_left_out(source, model):
        said = {name: {s: x for s, x in getattr(source, name).items() if s != "value"} for name in _REASONS}
        return replace(source, value_point=source.writes.point("value"), **said)
    bound.check_direction("value")
    return bound


def norm_left_out(dictionary: Dictionary, model: Model) -> bool:
    """Whether the model norms what the dictionary writes before it adds it to the residual stream."""
    hook = dictionary.writes
    module = hook.site.before_post_norm
    return bool(module) and not getattr(model.blocks[hook.layer], module).adds_directly
