"""Text under steering: what a model writes after a prompt when a feature is set to a value at every position.

Each step runs the model on the whole text so far (no cache of keys and values): for the few dozen tokens of an output
score or a look at a feature that costs little, and the layers are the same that everything else here runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from querylens_fast.dictionaries.dictionary import Dictionary
from querylens_fast.dictionaries.load import load_dictionary
from querylens_fast.lens.splice import run_from, splice
from querylens_fast.models.load import as_model
from querylens_fast.models.model import Model
from querylens_fast.models.norms import at_least_float32
from querylens_fast.runs.arguments import finite_number, whole_number

TEMPERATURE = 0.75
"""The reference's."""
NextLogits = Callable[[Tensor], Tensor]
"""Token ids [B, S] → logits after the last position, [B, V]."""


class SteeredText(NamedTuple):
    """Continuations of a prompt."""

    prompt: str
    clean: str
    """What the model writes."""
    steered: str
    """What it writes with the feature set to ``strength``."""
    feature: int
    strength: float


def steer(
    model: Any,
    dictionary: Any,
    feature: int,
    strength: float,
    prompt: str,
    *,
    n_tokens: int = 20,
    temperature: float = TEMPERATURE,
    seed: int = 0,
) -> SteeredText:
    """Continue a prompt with and without a feature set to a value at every position, its error term kept.

    Args:
        model: As in `signatures`, with a tokenizer.
        dictionary: As in `signatures`; one that can be run.
        feature: The feature's id.
        strength: The activation it is set to; negative values suppress what it writes.
        prompt: Text of at least one token.
        n_tokens: Tokens to write, fewer where the model ends the text.
        temperature: Of sampling; 0 takes the most likely token.
        seed: Of sampling; the same for both texts.

    Raises:
        ValueError: An unknown feature, an empty prompt, no tokenizer, n_tokens below 1, or a text that is longer than
            the model's positions.
    """
    model, dictionary = as_model(model), load_dictionary(dictionary)
    dictionary.check_model(model)
    (chosen,) = dictionary.select([whole_number("feature", feature, least=0)])
    strength = finite_number("strength", strength)
    if model.tokenizer is None:
        raise ValueError(f"model {model.name!r} has no tokenizer: load it with tokenizer='path-or-hub-id'")
    ids = torch.tensor([model.tokenizer(prompt)["input_ids"]], dtype=torch.int64)
    if not ids.numel():
        raise ValueError(f"prompt is {prompt!r}; expected at least one token")
    texts = []
    for next_logits in (plain_logits(model), steered_logits(model, dictionary, chosen, strength)):
        found = continuation(model, ids, n_tokens, next_logits, temperature=temperature, seed=seed)
        texts.append(model.tokenizer.decode(found[0, ids.shape[1] :].tolist(), skip_special_tokens=True))
    return SteeredText(prompt, texts[0], texts[1], int(feature), float(strength))


@torch.no_grad()
def continuation(
    model: Model,
    ids: Tensor,
    n_tokens: int,
    next_logits: NextLogits,
    *,
    temperature: float = TEMPERATURE,
    seed: int = 0,
) -> Tensor:
    """ids [B, S] continued by sampling, [B, S + m] with m ≤ n_tokens; a row that has ended repeats its last token.

    Stops when every row has written the end-of-text token.
    """
    n_tokens, temperature = whole_number("n_tokens", n_tokens), finite_number("temperature", temperature, 0)
    room = model.max_positions
    # The last token written is not read again.
    if room is not None and ids.shape[1] + n_tokens - 1 > room:
        raise ValueError(
            f"n_tokens is {n_tokens} after {ids.shape[1]} tokens; the model has positions for {room}, so expected at "
            f"most {max(room + 1 - ids.shape[1], 0)}"
        )
    generator = torch.Generator().manual_seed(whole_number("seed", seed, least=0))
    end = getattr(model.tokenizer, "eos_token_id", None)
    ids = ids.to(model.device)
    over = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    for _ in range(n_tokens):
        logits = next_logits(ids)
        if not bool(torch.isfinite(logits).any(-1).all()) or bool(logits.isnan().any()):
            raise ValueError(f"the logits after {ids.shape[1]} tokens are not finite; use a smaller strength")
        if temperature == 0:
            chosen = logits.argmax(-1)
        else:
            weights = (logits / temperature).softmax(-1).cpu()
            chosen = torch.multinomial(weights, 1, generator=generator)[:, 0].to(ids.device)
        if end is not None:
            chosen = torch.where(over, ids[:, -1], chosen)
            over |= chosen == end
        ids = torch.cat([ids, chosen[:, None]], 1)
        if bool(over.all()):
            break
    return ids.cpu()


def plain_logits(model: Model) -> NextLogits:
    """The model's own next-token logits, float32 or wider."""

    def logits(ids: Tensor) -> Tensor:
        final = run_from(model, model.first_residual(ids)[None], 0, ids, last=1)[0, :, 0]
        return at_least_float32(model.logits(final))

    return logits


def steered_logits(model: Model, dictionary: Dictionary, feature: Tensor, strength: float) -> NextLogits:
    """Next-token logits with a feature set to a value at every position, the error term kept."""

    def logits(ids: Tensor) -> Tensor:
        spliced = splice(model, dictionary, ids, error_term=True)
        stream = spliced.changed(feature.reshape(1).to(model.device), strength)
        return at_least_float32(model.logits(run_from(model, stream, spliced.point, ids, last=1)[0, :, 0]))

    return logits
