"""Which weights or features read what a feature writes (downstream), and which write what it reads (upstream).

Downstream, for a feature's value v (its decoder row) and every row w of a target that reads the stream later:

    score = ⟨C v, w⟩,   C = I (the direct path), or the partial transport from the feature's point to the target's

and upstream the same for its key u (its encoder column) and targets that write earlier, score = ⟨C u, w⟩. `weights`
lists the targets and their scores. A target that is a dictionary gives virtual weights: f_dec · f_enc. Signs are kept:
a positive score excites what reads. Vectors are not normalised; scores are in the units of the reader's input where the
norm in front of it divides by 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from querylens_fast.dictionaries.dictionary import Dictionary
from querylens_fast.dictionaries.load import load_dictionary
from querylens_fast.dictionaries.matrices import directions
from querylens_fast.models.load import as_model
from querylens_fast.models.model import Model
from querylens_fast.relations.latest import Latest
from querylens_fast.relations.tables import Block, RelationTable, digest_of, identity_of, tabulate, topk_rows
from querylens_fast.relations.weights import Search, Target, find_weights, rows_target
from querylens_fast.topk.api import TopK
from querylens_fast.transport.jacobians import Side
from querylens_fast.transport.partial import Passage, find_passage
from querylens_fast.transport.transport import Transport, load_transport

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_A_BLOCK = 1 << 20
"""Table rows of a block, at most."""
MAX_FEATURES = 1 << 13
"""Features of a block, at most."""

Targets = Dictionary | str | Tensor | Sequence["Dictionary | str | Tensor"]


def downstream(
    dictionary: Any,
    model: Any,
    *,
    targets: Targets,
    k: int = 32,
    features: Any = None,
    backend: str = "auto",
    transport: Passage | Transport | str | Path | None = None,
    final_norm: bool = True,
    out: str | Path | None = None,
    resume: bool = True,
    progress: bool | None = None,
) -> TopK | RelationTable:
    """The k strongest positive and negative readers of each feature's value vector.

    Args:
        dictionary: As in `signatures`; its values are what is written.
        model: As in `signatures`.
        targets: A `Dictionary` (its keys read: virtual weights); a weight by its name in `weights`, like
            "blocks.3.mlp.W_in", or a pattern like "blocks.*.mlp.W_*" (of which the later ones are taken); any matrix of
            readers [V, D]; or a list of these.
        k: Readers on each side. In a table a target with fewer gives all it has.
        features: As in `signatures`.
        backend: Of the streamed top-k.
        transport: None: the direct path. A `Passage` of the dictionary's point, from `fit_passage`, or a transport (or
            its file) with first-order terms: the value is first carried to the point where the target reads.
        final_norm: For targets that end in the unembedding: as in `signatures`.
        out: A ``.parquet`` file to stream to; the run resumes when it was killed.
        resume: Go on from what an earlier, killed run wrote to out; False: refuse to touch it.
        progress: Show a progress bar; by default with ``out``.

    Returns:
        For one target, named without ``*``, and no ``out``: `TopK`; ids are rows of the target, scores ⟨value, reader⟩.
        Otherwise a `RelationTable`.

    Raises:
        ValueError: Unknown target, a target before the feature's own point, or widths that do not agree.
        FileExistsError: ``out`` holds another run's result.

    Memory: the target at hand and a block of features; never features × targets.
    """
    return _relate(
        "value", dictionary, model, targets, k, features, backend, transport, final_norm, out, resume, progress
    )


def upstream(
    dictionary: Any,
    model: Any,
    *,
    targets: Targets,
    k: int = 32,
    features: Any = None,
    backend: str = "auto",
    transport: Passage | Transport | str | Path | None = None,
    out: str | Path | None = None,
    resume: bool = True,
    progress: bool | None = None,
) -> TopK | RelationTable:
    """The k strongest positive and negative writers of what each feature's key vector reads.

    Arguments, result and errors as in `downstream`, mirrored: keys for values, and earlier targets for later ones:
    dictionaries (their values write), weights that write ("blocks.*.mlp.W_out", "blocks.*.attn.W_O.heads",
    "blocks.*.attn.OV.*", "embed"), or a matrix. A passage is of the key's point with side="key".
    """
    return _relate("key", dictionary, model, targets, k, features, backend, transport, True, out, resume, progress)


def _relate(
    side: Side,
    dictionary: Any,
    model: Any,
    targets: Targets,
    k: int,
    features: Any,
    backend: str,
    transport: Passage | Transport | str | Path | None,
    final_norm: bool,
    out: str | Path | None,
    resume: bool,
    progress: bool | None,
) -> TopK | RelationTable:
    model = as_model(model)
    dictionary = load_dictionary(dictionary).on(model)
    if k < 1:
        raise ValueError(f"k is {k}; expected at least 1")
    given = load_transport(transport) if isinstance(transport, (str, Path)) else transport
    passage = None if given is None else find_passage(given, model, dictionary.point(side), side)
    chosen = dictionary.select(features)
    found = _find_targets(model, dictionary, side, targets, passage, final_norm)
    blocks = chosen.split(features_per_block(k))
    single = isinstance(targets, (Dictionary, Tensor)) or targets == found[0].name
    relation = _Relation(model, dictionary, side, passage, k, backend)
    if single and out is None:
        return TopK.concatenate([relation.topk(found[0], k, ids) for ids in blocks])
    metadata = identity_of(
        model,
        what="downstream" if side == "value" else "upstream",
        score="⟨C v, w⟩, see querylens_fast.relations.weights",
        side=side,
        k=k,
        targets=[t.name for t in found],
        target_fingerprints=[t.fingerprint for t in found],
        carried=None if passage is None else passage.metadata,
        final_norm=final_norm,
        **identity_of_features(dictionary, chosen),
    )
    parts = [Block(len(ids), partial(relation.rows, target, ids)) for target in found for ids in blocks]
    return tabulate(parts, metadata, out=out, resume=resume, progress=progress, unit="feature×target")


class _Relation:
    """One dictionary's vectors of one side against any target."""

    def __init__(
        self, model: Model, dictionary: Dictionary, side: Side, passage: Passage | None, k: int, backend: str
    ) -> None:
        self.model, self.dictionary, self.side, self.passage = model, dictionary, side, passage
        self.k, self.backend = k, backend
        self.opened: Latest[Search] = Latest()

    @torch.no_grad()
    def topk(self, target: Target, k: int, ids: Tensor) -> TopK:
        vectors = _read(self.dictionary, self.side, self.model, ids)
        if self.passage is not None and target.point is not None:
            vectors = self.passage.apply(vectors, target.point)
        return self.opened.get(target, target.open)(vectors, k, self.backend)

    def rows(self, target: Target, ids: Tensor) -> pa.Table:
        return topk_rows(
            self.topk(target, min(self.k, target.size), ids),
            ids,
            source=self.dictionary.name,
            source_layer=self.dictionary.layer,
            target=target.name,
            target_layer=target.layer,
        )


def features_per_block(k: int) -> int:
    """Features whose 2k relations are computed and written as one block; ValueError for k < 1."""
    if k < 1:
        raise ValueError(f"k is {k}; expected at least 1")
    return max(256, min(MAX_FEATURES, ROWS_A_BLOCK // (2 * k)))


def layers_behind(dictionary: Dictionary, model: Model) -> range:
    """The layers whose attention and MLP both read what the dictionary's values write."""
    return range(-(-dictionary.point("value") // 2), model.n_layers)


def identity_of_features(dictionary: Dictionary, chosen: Tensor) -> dict[str, Any]:
    """What tells these features of this dictionary from others, for a table's metadata."""
    return {
        "dictionary": dictionary.name,
        "kind": dictionary.kind,
        "layer": dictionary.layer,
        "dictionary_fingerprint": dictionary.fingerprint,
        "features": digest_of(chosen),
        "n_features": len(chosen),
    }


def _find_targets(
    model: Model, dictionary: Dictionary, side: Side, targets: Targets, passage: Passage | None, final_norm: bool
) -> list[Target]:
    """The targets asked for that lie on the right side of the features."""
    found: list[Target] = []
    if isinstance(targets, (list, tuple)) and not targets:
        raise ValueError("targets is an empty list; expected at least one")
    for wanted in targets if isinstance(targets, (list, tuple)) else [targets]:
        if isinstance(wanted, Tensor):
            if passage is not None:
                raise ValueError(
                    "targets is a matrix, which has no layer to carry features to; pass directions(matrix, layer=…)"
                )
            fingerprint = directions(wanted, layer=dictionary.layer).fingerprint
            read = partial(Tensor.to, wanted, model.device, model.dtype)
            found.append(rows_target("matrix", None, None, len(wanted), read, fingerprint))
            continue
        if isinstance(wanted, str):
            several = find_weights(model, side, wanted, final_norm)
        else:
            several = [_features_target(model, wanted, "key" if side == "value" else "value")]
        own = dictionary.point(side) if any(t.point is not None for t in several) else 0
        reached = [t for t in several if t.point is None or (t.point >= own if side == "value" else t.point <= own)]
        if not reached:
            where = ("before", "reads") if side == "value" else ("after", "writes")
            raise ValueError(
                f"targets lie {where[0]} layer {dictionary.layer}'s {dictionary.name!r}: nothing there {where[1]} it"
            )
        found += reached
    return found


def _features_target(model: Model, target: Any, side: str) -> Target:
    """A dictionary's features as readers (their keys) or writers (their values)."""
    other = load_dictionary(target).on(model)
    point = other.point(side)
    read = partial(_read, other, side, model)
    return rows_target(other.name, other.layer, point, other.n_features, read, other.fingerprint)


def _read(dictionary: Dictionary, side: str, model: Model, ids: Tensor | slice = slice(None)) -> Tensor:
    return dictionary.vectors(side, ids).to(model.device, model.dtype)
