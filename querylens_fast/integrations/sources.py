"""Where an exporter's rows come from: a dictionary, read out as dashboards do, or a result of `signatures`.

`open_source` takes either and checks it before anything is written; the rest of the exporters sees a `Source`, which
gives `Rows` block by block.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from querylens_fast.dictionaries.dashboard_values import as_dashboards, held, norm_left_out
from querylens_fast.dictionaries.dictionary import Dictionary
from querylens_fast.dictionaries.load import load_dictionary
from querylens_fast.integrations.dashboard import Dashboard, Rows, heads_of, histogram_between
from querylens_fast.integrations.result_rows import HISTOGRAM, is_result, rows_of
from querylens_fast.lens.results import Signatures
from querylens_fast.lens.storage import StoredSignatures, read_identity, refuse_other_columns
from querylens_fast.models.model import Model
from querylens_fast.runs.arguments import whole_number
from querylens_fast.runs.run_record import agree

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Rows of features, in order.

    Attributes:
        features: Feature ids, [n] int64.
        read: Yields `Rows` for each slice of positions in ``features``.
        identity: What the rows are of, as JSON values.
        preset: The preset's name.
        layer: The dictionary's layer.
        dictionary: For vectors and neighbours, or None.
        missing: Sentences that say what an export will lack.
    """

    features: Tensor
    read: Callable[[Sequence[slice]], Iterator[Rows]]
    identity: dict[str, Any]
    preset: str
    layer: int
    dictionary: Dictionary | None
    missing: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.features)

    def say_missing(self) -> None:
        """Log what the export will lack. Called before anything is written."""
        for sentence in self.missing:
            logger.warning("%s", sentence)


def open_source(
    source: Any,
    model: Model | None,
    *,
    features: Any = None,
    dictionary: Any = None,
    k: int = 10,
    bins: int = 50,
    unit_norm: bool = True,
    unembedding: str = "raw",
) -> Source:
    """The rows of a dictionary or of a result.

    Args:
        source: A dictionary (or what `load_dictionary` takes), or a result: `Signatures`, `StoredSignatures`, or the
            path of a .parquet or .jsonl file.
        model: Its model; a result can do without.
        features: Of a dictionary: which of them. A result is exported whole.
        dictionary: Of a result: the dictionary it is of, for its vectors and neighbours.
        k: Tokens on each side; a result that holds fewer gives what it has.
        bins: Of the histogram; 0 leaves it out. A result gives as many as it holds.
        unit_norm: See `Dashboard`.
        unembedding: See `Dashboard`.

    Raises:
        ValueError: What does not fit together.
        FileNotFoundError: No such file.
    """
    whole_number("k", k)
    whole_number("bins", bins, 0)
    if not is_result(source):
        if dictionary is not None:
            raise ValueError("dictionary= is for an export of a result; the first argument is a dictionary already")
        if model is None:
            raise ValueError("a dictionary is read out through its model: pass model=")
        return _of_dictionary(load_dictionary(source), model, features, k, bins, unit_norm, unembedding)
    if features is not None:
        raise ValueError("features= chooses from a dictionary; a result is exported whole")
    return _of_result(source, model, k, bins, None if dictionary is None else load_dictionary(dictionary))


def checked_texts(name: str, texts: Mapping[int, str] | None, features: Tensor) -> Mapping[int, str]:
    """Texts by feature id.

    Raises:
        ValueError: One is of a feature that is not exported, or is no text.
    """
    known = set(features.tolist())
    for feature, text in (texts or {}).items():
        if feature not in known:
            raise ValueError(f"{name} has feature {feature!r}, which is not exported")
        if not isinstance(text, str):
            raise ValueError(f"{name} has {text!r} for feature {feature}; expected a text")
    return texts or {}


def blocks_of(n: int, rows: int) -> list[slice]:
    """Slices of at most ``rows`` positions."""
    return [slice(start, min(start + rows, n)) for start in range(0, n, rows)]


def _of_dictionary(
    dictionary: Dictionary, model: Model, features: Any, k: int, bins: int, unit_norm: bool, unembedding: str
) -> Source:
    board = Dashboard(dictionary, model, k, unit_norm, unembedding, bins)
    board.check()
    ids = dictionary.select(features)
    if not 0 < len(ids.unique()) == len(ids):
        raise ValueError(f"features={features!r} chooses {len(ids)} features; expected at least one, and each once")
    dictionary.check_finite("value", ids)
    identity = {**board.identity, "features": hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16]}
    missing = []
    if norm_left_out(dictionary, model):
        missing.append(
            f"{model.name!r} norms what is written at {dictionary.writes.name!r}; logits are without that norm, as "
            "dashboards show them"
        )
    return Source(
        ids,
        lambda slices: board.blocks([ids[rows] for rows in slices]),
        identity,
        "dashboard",
        dictionary.layer,
        dictionary,
        missing,
    )


def _of_result(source: Any, model: Model | None, k: int, bins: int, dictionary: Dictionary | None) -> Source:
    path = source.path if isinstance(source, StoredSignatures) else source
    identity = _identity_in_memory(source) if isinstance(source, Signatures) else read_identity(path)
    if "preset" not in identity:
        raise ValueError(f"{str(path)!r} is a table of {identity.get('what')!r}; expected a result of `signatures`")
    if not isinstance(source, Signatures):
        refuse_other_columns(path)
    if not isinstance(identity.get("layer"), (int, list)):
        raise ValueError(f"{str(path)!r} does not say what layer it is of; compute it again")
    recorded = identity.get("fingerprint") is not None
    if model is not None and recorded and (difference := model.difference_from(identity)) is not None:
        raise ValueError(
            f"the result is of model {identity.get('model')!r} with {difference}; pass the model it was computed with"
        )
    stored = rows_of(source)
    features = stored.features()
    _check_dictionary(identity, features, model, dictionary)
    missing = []
    if bins and HISTOGRAM not in stored.columns:
        missing.append(
            f"the result ({identity['preset']}) holds no histogram of all logits: those fields are not written; "
            f"compute it with histogram={bins}"
        )
    if dictionary is None:
        missing.append("the result holds no vectors: pass dictionary= for vectors, alignments and neighbours")

    heads = 0 if dictionary is None or model is None else heads_of(dictionary, model)

    def read(slices: Sequence[slice]) -> Iterator[Rows]:
        for rows in slices:
            ids = features[rows]
            vectors = None if dictionary is None else held(dictionary).values(ids)
            columns = stored.read(rows)
            heights, ends = columns.pop(HISTOGRAM, None), [columns[f"{end}_scores"][:, :1] for end in ("bottom", "top")]
            bars = None if heights is None or not bins else histogram_between(heights, *ends)
            sides: dict[str, Any] = {name: x[:, :k] for name, x in columns.items()}
            yield Rows(ids, **sides, histogram=bars, vectors=vectors, heads=heads)

    kept = {name: identity[name] for name in sorted(identity) if name != "block_rows"}
    kept |= {"exported_k": k, "rows": hashlib.sha256(features.numpy().tobytes()).hexdigest()[:16]}
    if dictionary is not None:
        kept["dictionary_fingerprint"] = dictionary.fingerprint
    return Source(features, read, kept, identity["preset"], int(identity["layer"]), dictionary, missing)


def _check_dictionary(
    identity: dict[str, Any], features: Tensor, model: Model | None, dictionary: Dictionary | None
) -> None:
    if not len(features):
        raise ValueError("the result holds no features: nothing to export")
    if len(features.unique()) < len(features):
        raise ValueError("the result holds a feature more than once; export the results of one dictionary at a time")
    if dictionary is None:
        return
    if model is not None:
        dictionary.check_model(model)
    dictionary.check_finite("value", dictionary.select(features))
    known = identity.get("dictionary_fingerprint")
    fits = known is None or any(agree(known, d.fingerprint) for d in _forms(dictionary, model))
    if not fits or identity["layer"] != dictionary.layer:
        raise ValueError(
            f"dictionary {dictionary.name!r} (layer {dictionary.layer}) is not the one that the result is of: "
            f"{identity.get('dictionary')!r}, layer {identity['layer']}"
        )


def _forms(dictionary: Dictionary, model: Model | None) -> Iterator[Dictionary]:
    """A dictionary as it is, and with its values carried into the stream, as results are computed and record it."""
    yield dictionary
    if model is not None and dictionary.writes.site.carried_by:
        yield held(dictionary).on(model)
        yield from (as_dashboards(dictionary, model, unit_norm) for unit_norm in (True, False))


def _identity_in_memory(found: Signatures) -> dict[str, Any]:
    digest = hashlib.sha256()
    for name in rows_of(found).columns:
        digest.update(getattr(found, name).contiguous().numpy().tobytes())
    return {"preset": found.preset, "layer": found.layer, "digest": digest.hexdigest()[:32]}
