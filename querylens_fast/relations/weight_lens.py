"""WeightLens: a feature described by the outliers among its products with other weights.

Golimblevskaia et al. (arXiv 2510.14936) describe a transcoder's feature without data. A few of its products with the
embedding, the unembedding and the decoders of earlier features stand out from the rest:

    input tokens       ⟨embed_t, u⟩ with z > 5.5 within the 1,000 largest     (u the key)
    earlier features   ⟨g_dec, u⟩ with z > 4 within the 100 largest           (of each earlier dictionary)
    output tokens      unembed(v)_t with z > 5.5 within the 1,000 largest     (v the value)

where z = (score − mean) / standard deviation of those 1,000 or 100 scores alone (n − 1 in the deviation), and the
description is built from layer to layer: the candidates of a feature are its own input tokens and those of the earlier
features that it reads. A candidate is accepted when the model, run on [BOS, token], activates the feature at the token.

Choices the paper leaves open. Only tokens accepted for an earlier feature are handed on. Norms are left out of the
products, as in `upstream`; the final norm is applied to values, as in ``logit_lens_value``. Where the run is left out
(``validate=False``) every candidate is accepted.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from querylens_fast.dictionaries.dictionary import Dictionary
from querylens_fast.dictionaries.load import load_dictionary
from querylens_fast.lens.ablations import activations
from querylens_fast.lens.readouts import Scorer, embed, unembed
from querylens_fast.models.load import as_model
from querylens_fast.models.model import Model
from querylens_fast.relations.outliers import Found, Outliers, outliers, ranks_within
from querylens_fast.relations.readers import identity_of_features
from querylens_fast.relations.tables import Block, Categories, RelationTable, identity_of, rows, tabulate
from querylens_fast.topk.api import TopK, streamed_topk

if TYPE_CHECKING:
    import pyarrow as pa

FEATURES_AT_ONCE = 4096
ACTIVATIONS_AT_ONCE = 1 << 25
SCORES_AT_ONCE = 1 << 24


class WeightLensThresholds(NamedTuple):
    """What counts as an outlier; the defaults are the paper's."""

    token_z: float = 5.5
    """Standard deviations above the mean of the ``top_tokens`` largest scores."""
    top_tokens: int = 1000
    feature_z: float = 4.0
    """Standard deviations above the mean of the ``top_features`` largest scores."""
    top_features: int = 100


def weight_lens(
    dictionaries: Any,
    model: Any,
    *,
    earlier: Sequence[Any] = (),
    thresholds: WeightLensThresholds | None = None,
    validate: bool = True,
    bos_token_id: int | None = None,
    features: Any = None,
    backend: str = "auto",
    out: str | Path | None = None,
    resume: bool = True,
    progress: bool | None = None,
) -> RelationTable:
    """The tokens and earlier features that stand out among each feature's products with the weights.

    Args:
        dictionaries: One, or a list; each is also described by those before it: that write at or before the point it
            reads at, and read before that point.
        model: As in `signatures`.
        earlier: Further dictionaries whose values may be read, described only as far as they are; with keys, and with
            an encoder where tokens are validated.
        thresholds: None: the paper's, `WeightLensThresholds()`.
        validate: Accept only tokens that activate the feature behind BOS. Needs dictionaries that can be run.
        bos_token_id: The token in front; None: the tokenizer's own, else the model's.
        features: As in `signatures`, of a single dictionary.
        backend: Of the streamed top-k.
        out: As in `downstream`.
        resume: As in `downstream`.
        progress: As in `downstream`.

    Returns:
        `RelationTable`: for each feature its "input token"s, "inherited token"s, "earlier feature"s and "output
        token"s (column relation), each ranked by score, with z, activation (behind BOS; null where nothing was run),
        accepted (part of the description) and token (its text, where the model has a tokenizer). A feature with no
        outlier has no row. `weight_descriptions` makes one line of a feature's rows.

    Raises:
        ValueError: No BOS token, thresholds that leave fewer than two scores to compare, ``features`` with several
            dictionaries, a dictionary that cannot be run, or what the sides raise.

    Memory: a block of features' largest scores, the values of one earlier dictionary at a time, the activations of one
    dictionary on some tokens, and the accepted tokens of earlier features.
    """
    model, thresholds = as_model(model), thresholds or WeightLensThresholds()
    several = dictionaries if isinstance(dictionaries, (list, tuple)) else [dictionaries]
    given = sorted((load_dictionary(d).on(model) for d in several), key=lambda d: d.point("key"))
    if not given:
        raise ValueError("dictionaries is an empty list; expected at least one")
    if features is not None and len(given) > 1:
        raise ValueError(f"features is for one dictionary, but {len(given)} are given; leave it out")
    if min(thresholds.top_tokens, thresholds.top_features) < 2:
        raise ValueError(
            f"top_tokens, top_features are {thresholds.top_tokens}, {thresholds.top_features}; expected at least 2: z "
            "is taken within them"
        )
    known = [*given, *(load_dictionary(d).on(model) for d in earlier)]
    for dictionary in known:
        if validate and dictionary.kind != "neurons":
            dictionary.check_runs()
    bos = _bos_token(model, bos_token_id) if validate else None
    lens = _Lens(model, known, thresholds, bos, backend)
    chosen = [d.select(features) for d in given]
    metadata = identity_of(
        model,
        what="weight lens",
        score="⟨embed, u⟩, ⟨g_dec, u⟩, unembed(v); z within the largest",
        dictionaries=[d.name for d in given],
        earlier=[d.name for d in known[len(given) :]],
        fingerprints=[d.fingerprint for d in known],
        thresholds=thresholds._asdict(),
        bos_token_id=bos,
        features=[identity_of_features(d, ids)["features"] for d, ids in zip(given, chosen, strict=True)],
    )
    blocks = [
        Block(len(part), partial(lens.rows, dictionary, part))
        for dictionary, ids in zip(given, chosen, strict=True)
        for part in ids.split(FEATURES_AT_ONCE)
    ]
    return tabulate(blocks, metadata, out=out, resume=resume, progress=progress)


def weight_descriptions(found: RelationTable, n: int = 5) -> pa.Table:
    """One row a feature: source, source_layer, source_id, activated_by and promotes, the n strongest accepted tokens.

    Tokens that activate are ordered by their activation behind BOS (else by score), promoted ones by score; as text
    where the table has texts, else as ids. A feature of which nothing was accepted has no row.

    Raises:
        ValueError: The table is none of `weight_lens`.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if found.metadata.get("what") != "weight lens":
        raise ValueError(f"found is a table of {found.metadata.get('what')!r}; expected one of weight_lens")
    columns = ["source", "source_layer", "source_id", "target_id", "relation", "score", "activation", "token"]
    described = pc.field("accepted") & (pc.field("relation") != "earlier feature")
    table = found.table([*columns, "accepted"]).filter(described)
    grouped: dict[tuple[str, int, int], dict[str, list[tuple[float, float, str]]]] = {}
    for row in table.to_pylist():
        side = "promotes" if row["relation"] == "output token" else "activated_by"
        text = str(row["target_id"]) if row["token"] is None else repr(row["token"])
        key = (row["source"], row["source_layer"], row["source_id"])
        strength = row["activation"] if row["activation"] is not None else 0.0
        grouped.setdefault(key, {}).setdefault(side, []).append((-strength, -row["score"], text))

    def line(sides: dict[str, list[tuple[float, float, str]]], side: str) -> str:
        return ", ".join(list(dict.fromkeys(text for _, _, text in sorted(sides.get(side, ()))))[:n])

    return pa.table(
        {
            "source": pa.array([key[0] for key in grouped], pa.string()),
            "source_layer": pa.array([key[1] for key in grouped], pa.int32()),
            "source_id": pa.array([key[2] for key in grouped], pa.int64()),
            "activated_by": pa.array([line(sides, "activated_by") for sides in grouped.values()], pa.string()),
            "promotes": pa.array([line(sides, "promotes") for sides in grouped.values()], pa.string()),
        }
    )


class _Part(NamedTuple):
    """Relations of one kind, with what the model's run said of them."""

    relation: str
    target: str
    layer: int | None
    found: Found
    activation: Tensor
    """[m], NaN where nothing was run."""
    accepted: Tensor

    @classmethod
    def unrun(cls, relation: str, target: str, layer: int | None, found: Found) -> _Part:
        """Relations that no run has to confirm."""
        n = len(found.row)
        return cls(relation, target, layer, found, torch.full((n,), torch.nan), torch.ones(n, dtype=torch.bool))


class _Lens:
    """Descriptions of any known dictionary's features; the tokens accepted for each are kept for later layers."""

    def __init__(
        self, model: Model, known: Sequence[Dictionary], thresholds: WeightLensThresholds, bos: int | None, backend: str
    ) -> None:
        self.model, self.known, self.thresholds, self.bos, self.backend = model, known, thresholds, bos, backend
        self.embed, self.unembed = embed(model), unembed(model)
        self.kept: dict[int, dict[int, Tensor]] = {id(d): {} for d in known}

    @torch.no_grad()
    def rows(self, dictionary: Dictionary, ids: Tensor) -> pa.Table:
        """The table's rows of a block of features."""
        values = dictionary.values(ids).to(self.model.device, self.model.dtype)
        outputs = self._tokens(self.unembed, values).found
        parts = [*self.describe(dictionary, ids), _Part.unrun("output token", "unembed", None, outputs)]

        def joined(name: str) -> Tensor:
            return torch.cat([getattr(part.found, name) for part in parts])

        kind = torch.arange(len(parts)).repeat_interleave(torch.tensor([len(part.found.row) for part in parts]))
        # By feature, and within it part by part.
        order = (joined("row") * len(parts) + kind).argsort(stable=True)
        kind, target_id = kind[order], joined("id")[order]
        is_token = torch.tensor([part.layer is None for part in parts])[kind]
        table = rows(
            len(order),
            source=dictionary.name,
            source_layer=dictionary.layer,
            source_id=ids[joined("row")[order]],
            target=Categories([part.target for part in parts], kind),
            target_layer=torch.tensor([-1 if part.layer is None else part.layer for part in parts])[kind],
            target_id=target_id,
            side="top",
            rank=torch.cat([ranks_within(part.found.row) for part in parts])[order].int(),
            score=joined("score")[order],
            relation=Categories([part.relation for part in parts], kind),
            z=joined("z")[order],
            activation=torch.cat([part.activation for part in parts])[order],
            accepted=torch.cat([part.accepted for part in parts])[order],
            token=self._texts(target_id, is_token),
        )
        table = _with_nulls(table, "target_layer", is_token)
        return _with_nulls(table, "activation", torch.cat([part.activation for part in parts])[order].isnan())

    def describe(self, dictionary: Dictionary, ids: Tensor) -> list[_Part]:
        """What activates the features ids: tokens and earlier features."""
        keys = dictionary.keys(ids).to(self.model.device, self.model.dtype)
        inputs = self._tokens(self.embed, keys)
        read = [(other, self._features(other, keys)) for other in self._before(dictionary)]
        inherited = self._inherited(keys, inputs, read)
        parts = []
        for relation, found in (("input token", inputs.found), ("inherited token", inherited)):
            part = _Part.unrun(relation, "embed", None, found)
            if self.bos is not None:
                activation = self._activations(dictionary, ids[found.row], found.id)
                part = part._replace(activation=activation, accepted=activation > 0)
            parts.append(part)
        row = torch.cat([part.found.row[part.accepted] for part in parts])
        tokens = torch.cat([part.found.id[part.accepted] for part in parts])
        own = tokens[row.argsort(stable=True)].split(torch.bincount(row, minlength=len(ids)).tolist())
        self.kept[id(dictionary)].update(zip(ids.tolist(), own, strict=True))
        return [*parts, *(_Part.unrun("earlier feature", other.name, other.layer, found) for other, found in read)]

    def _before(self, dictionary: Dictionary) -> list[Dictionary]:
        """The dictionaries that write at or before the point this one reads at, and read before it."""
        at = dictionary.point("key")
        return [d for d in self.known if d.point("value") <= at and d.point("key") < at]

    def _tokens(self, scorer: Scorer, vectors: Tensor) -> Outliers:
        """Tokens that stand out for vectors [n, D]."""

        def search(vectors: Tensor, k: int) -> TopK:
            return scorer.topk(vectors, k, self.backend, bottom=False)

        return outliers(search, vectors, len(scorer.W), self.thresholds.top_tokens, self.thresholds.token_z)

    def _features(self, other: Dictionary, keys: Tensor) -> Found:
        """Features of an earlier dictionary that stand out for keys [n, D]."""
        values = other.values(slice(None)).to(keys)

        def search(keys: Tensor, k: int) -> TopK:
            return streamed_topk(keys, values, k, bottom=False, backend=self.backend)

        return outliers(search, keys, len(values), self.thresholds.top_features, self.thresholds.feature_z).found

    def _inherited(self, keys: Tensor, inputs: Outliers, read: list[tuple[Dictionary, Found]]) -> Found:
        """The tokens accepted for the earlier features that keys read, without the inputs; strongest first."""
        V = self.model.vocab_size
        pairs = [torch.empty(0, dtype=torch.int64)]
        for other, found in read:
            kept = self.kept[id(other)]
            missing = [i for i in found.id.unique().tolist() if i not in kept]
            for part in torch.tensor(missing, dtype=torch.int64).split(FEATURES_AT_ONCE):
                if len(part):
                    self.describe(other, part)
            pairs += [row * V + kept[i] for row, i in zip(found.row.tolist(), found.id.tolist(), strict=True)]
        pair = torch.cat(pairs).unique()
        pair = pair[~torch.isin(pair, inputs.found.row * V + inputs.found.id)]
        row, token = pair // V, pair % V
        if not len(pair):
            return Found(row, token, torch.empty(0), torch.empty(0))
        step = max(1, SCORES_AT_ONCE // keys.shape[1])
        chunks = zip(row.split(step), token.split(step), strict=True)
        scores = torch.cat([self.embed.scores_at(keys[r], t[:, None])[:, 0] for r, t in chunks]).cpu()
        order = scores.argsort(descending=True, stable=True)
        order = order[row[order].argsort(stable=True)]
        row, scores = row[order], scores[order]
        return Found(row, token[order], scores, (scores.double() - inputs.mean[row]) / inputs.deviation[row])

    def _activations(self, dictionary: Dictionary, features: Tensor, tokens: Tensor) -> Tensor:
        """The activation of each feature [m] at its token [m] behind BOS, float32."""
        assert self.bos is not None
        found = torch.zeros(len(tokens))
        distinct, place = tokens.unique(return_inverse=True)
        step = max(1, ACTIVATIONS_AT_ONCE // (2 * dictionary.n_features))
        for start in range(0, len(distinct), step):
            some = distinct[start : start + step]
            acts = activations(self.model, dictionary, torch.stack([torch.full_like(some, self.bos), some], 1))[:, 1]
            here = ((place >= start) & (place < start + step)).nonzero().squeeze(1)
            found[here] = acts[(place[here] - start).to(acts.device), features[here].to(acts.device)].float().cpu()
        return found

    def _texts(self, ids: Tensor, is_token: Tensor) -> Any:
        """Each token as text, None for features and where there is no tokenizer."""
        if self.model.tokenizer is None:
            return [None] * len(ids)
        texts = dict(zip(distinct := ids[is_token].unique().tolist(), self.model.str_tokens(distinct), strict=True))
        return [texts[i] if token else None for i, token in zip(ids.tolist(), is_token.tolist(), strict=True)]


def _with_nulls(table: pa.Table, name: str, missing: Tensor) -> pa.Table:
    """A column made null where nothing is known."""
    import pyarrow as pa

    at = table.column_names.index(name)
    column = table.column(at).combine_chunks()
    values = pa.array(column.to_numpy(zero_copy_only=False), column.type, mask=missing.numpy())
    return table.set_column(at, name, values)


def _bos_token(model: Model, given: int | None) -> int:
    """The token that a text begins with."""
    config = getattr(model.source, "config", None)
    for bos in (given, getattr(model.tokenizer, "bos_token_id", None), getattr(config, "bos_token_id", None)):
        if bos is not None:
            if not 0 <= bos < model.vocab_size:
                raise ValueError(f"bos_token_id is {bos}, outside the vocabulary of {model.vocab_size}")
            return int(bos)
    raise ValueError(
        f"model {model.name!r} names no BOS token to run tokens behind: pass bos_token_id=, or validate=False"
    )
