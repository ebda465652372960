"""A model beside the results: which features fire at each token of a text, and the text under a steered feature.

Only dictionaries that were given when the server was started are run; the paths that results name are not opened.
One request computes at a time. Texts, the number of new tokens and the time of a steered text are bounded.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from querylens_fast.dictionaries.dictionary import Dictionary
from querylens_fast.dictionaries.load import load_dictionary
from querylens_fast.evaluation.generation import NextLogits, SteeredText, continuation, plain_logits, steered_logits
from querylens_fast.lens.ablations import activations
from querylens_fast.models.fingerprint import earlier_fingerprints, frame_fingerprint
from querylens_fast.models.load import as_model, load_model
from querylens_fast.queries.display import direction, shown
from querylens_fast.queries.results import Results
from querylens_fast.queries.views import Token
from querylens_fast.runs.run_record import agree

MAX_CHARACTERS = 2000
MAX_TOKENS = 256
MAX_NEW_TOKENS = 60
MAX_ACTIVATIONS = 1 << 26
"""Positions × features of one text; more are refused."""
MAX_SECONDS = 30.0
"""Of a steered text, and of waiting for another request's computation."""
N_FEATURES = 8
"""Features listed for a text."""


class Busy(RuntimeError):
    """Another request computes."""


class TooLong(RuntimeError):
    """A computation was stopped at its time limit."""


@dataclass(frozen=True)
class FiringToken:
    """A token of the text with the features that are most active at it."""

    token: Token
    features: tuple[tuple[int, float], ...]
    """(feature, activation), descending; active ones only."""


@dataclass(frozen=True)
class FiringFeature:
    """One of the text's most active features, with its activation at each token."""

    feature: int
    maximum: float
    activations: tuple[float, ...]


@dataclass(frozen=True)
class Firing:
    """What a dictionary's features do on a text."""

    dictionary: str
    tokens: tuple[FiringToken, ...]
    features: tuple[FiringFeature, ...]


class TryIt:
    """A model and dictionaries that can be run, by their names in the results."""

    limits: ClassVar = {"tokens": MAX_TOKENS, "characters": MAX_CHARACTERS, "new_tokens": MAX_NEW_TOKENS}

    def __init__(self, model: Any, dictionaries: Mapping[str, Any], results: Results) -> None:
        """Load them.

        Args:
            model: As in `signatures`, or where to load one from; with a tokenizer.
            dictionaries: As in `signatures`, by slug.
            results: What the pages show; the model and the dictionaries have to be those of the results.

        Raises:
            ValueError: No tokenizer, a dictionary that cannot be run, or another model or dictionary than the results'.
        """
        self.model = load_model(model) if isinstance(model, (str, Path)) else as_model(model)
        if self.model.tokenizer is None:
            raise ValueError(f"model {self.model.name!r} has no tokenizer: load it with tokenizer='path-or-hub-id'")
        self.dictionaries: dict[str, Dictionary] = {}
        for slug, source in dictionaries.items():
            dictionary = load_dictionary(source)
            dictionary.check_model(self.model)
            self._check(slug, dictionary, results)
            activations(self.model, dictionary, torch.zeros(1, 1, dtype=torch.int64, device=self.model.device))
            self.dictionaries[slug] = dictionary
        self._lock = threading.Lock()

    def _check(self, slug: str, dictionary: Dictionary, results: Results) -> None:
        try:
            wanted, model = results.fingerprints(slug)
        except LookupError as error:
            raise ValueError(f"{error}; a dictionary to run needs the name of one of them") from error
        if wanted is not None and not agree(wanted, dictionary.fingerprint):
            raise ValueError(
                f"{dictionary.name!r} is not the dictionary that the results of {slug!r} were computed from"
            )
        own = frame_fingerprint(self.model) if model.startswith("frame:") else self.model.fingerprint
        if own != model and model not in earlier_fingerprints(self.model):
            raise ValueError(
                f"model {self.model.name!r} is not the model that the results of {slug!r} were computed with"
            )

    def firing(self, slug: str, text: str, k: int = 5) -> Firing:
        """The k most active features at each token of a text, and the most active ones of all of it.

        Raises:
            KeyError: No such dictionary.
            ValueError: An empty or too long text.
            Busy: Another request computes.
        """
        dictionary = self.dictionaries[slug]
        ids = self._ids(text)
        if len(ids) * dictionary.n_features > MAX_ACTIVATIONS:
            raise ValueError(
                f"text has {len(ids)} tokens; this dictionary has {dictionary.n_features} features: at most "
                f"{MAX_ACTIVATIONS // dictionary.n_features} tokens at a time"
            )
        with self._alone():
            acts = activations(self.model, dictionary, torch.tensor([ids], device=self.model.device))[0].float().cpu()
        values, features = acts.topk(min(k, acts.shape[1]), dim=1)
        tokens = tuple(
            FiringToken(token, tuple((f, v) for f, v in zip(own, found, strict=True) if v > 0))
            for token, own, found in zip(self._tokens(ids), features.tolist(), values.tolist(), strict=True)
        )
        return Firing(slug, tokens, _strongest(acts))

    def steer(self, slug: str, feature: int, strength: float, prompt: str, n_tokens: int = 20) -> SteeredText:
        """Continuations of a prompt with and without a feature set to a value at every position.

        Raises:
            KeyError: No such dictionary.
            ValueError: An unknown feature, an empty or too long prompt, too many tokens or no finite strength.
            Busy: Another request computes.
            TooLong: It took longer than `MAX_SECONDS`.
        """
        dictionary = self.dictionaries[slug]
        (chosen,) = dictionary.select([feature])
        ids = torch.tensor([self._ids(prompt)])
        if not 1 <= n_tokens <= MAX_NEW_TOKENS:
            raise ValueError(f"n_tokens is {n_tokens}; expected 1 to {MAX_NEW_TOKENS}")
        if not abs(strength) < float("inf"):
            raise ValueError(f"strength is {strength}; expected a finite activation")
        with self._alone():
            deadline = time.monotonic() + MAX_SECONDS
            texts = []
            for logits in (plain_logits(self.model), steered_logits(self.model, dictionary, chosen, strength)):
                found = continuation(self.model, ids, n_tokens, _until(deadline, logits))
                texts.append(self.model.tokenizer.decode(found[0, ids.shape[1] :].tolist(), skip_special_tokens=True))
        return SteeredText(prompt, texts[0], texts[1], feature, strength)

    def _ids(self, text: str) -> list[int]:
        if len(text) > MAX_CHARACTERS:
            raise ValueError(f"text has {len(text)} characters; expected at most {MAX_CHARACTERS}")
        ids = self.model.tokenizer(text)["input_ids"]
        if not 1 <= len(ids) <= MAX_TOKENS:
            raise ValueError(f"text has {len(ids)} tokens; expected 1 to {MAX_TOKENS}")
        return ids

    def _tokens(self, ids: Sequence[int]) -> list[Token]:
        strings = self.model.str_tokens(list(ids))
        return [Token(i, s, shown(s), direction(s)) for i, s in zip(ids, strings, strict=True)]

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._lock.acquire(timeout=MAX_SECONDS):
            raise Busy("the model is computing for another page; try again in a moment")
        try:
            yield
        finally:
            self._lock.release()


def _strongest(acts: Tensor) -> tuple[FiringFeature, ...]:
    """The features with the largest activations anywhere in the text."""
    maximum = acts.amax(0)
    values, features = maximum.topk(min(N_FEATURES, len(maximum)))
    return tuple(
        FiringFeature(f, v, tuple(acts[:, f].tolist()))
        for f, v in zip(features.tolist(), values.tolist(), strict=True)
        if v > 0
    )


def _until(deadline: float, logits: NextLogits) -> NextLogits:
    def bounded(ids: Tensor) -> Tensor:
        if time.monotonic() > deadline:
            raise TooLong(f"the text took longer than {MAX_SECONDS:g} s; ask for fewer tokens")
        return logits(ids)

    return bounded
