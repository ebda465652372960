"""Search: what a result file says of a feature, and which features' signatures hold a token.

Both read the file a row group at a time, so memory does not grow with it: `show` only the group whose range of
features holds the one asked for, `search` the ids or token strings and the scores of one side of all of them. Over a
million features with k = 25 that is some 0.3 s on two cores, so there is no index beside the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from querylens_fast.lens.storage import FORMATS, read_identity, read_jsonl, refuse_other_columns
from querylens_fast.runs.sealed_parquet import opened

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from torch import Tensor

SIDES = ("top", "bottom")
N_CANDIDATES = 10


@dataclass(frozen=True)
class Hits:
    """Signatures that hold a token, the highest score first (on the bottom side the lowest), then the lower feature.

    Attributes:
        side: "top" or "bottom".
        features: Feature ids, [m] int64.
        layers: Their layers, [m] int64.
        scores: The token's score, [m].
        ranks: Its place in the signature, [m] int64, 0 the most extreme.
        token_ids: Which of the tokens asked for it is, [m] int64.
    """

    side: str
    features: Tensor
    layers: Tensor
    scores: Tensor
    ranks: Tensor
    token_ids: Tensor

    def __len__(self) -> int:
        return len(self.features)


def search(
    path: str | Path,
    token: str | int | Sequence[int],
    *,
    side: Literal["top", "bottom"] = "top",
    exact: bool = False,
    limit: int | None = None,
    model: Any = None,
) -> Hits:
    """The features whose signatures hold a token, ranked by its score.

    Args:
        path: A result of `signatures`, Parquet (read in part) or JSONL (read whole).
        token: A token as a string, found with and without a leading space, or a token id, or several ids.
        side: Look among the top tokens or the bottom tokens.
        exact: Take the string as it is, leading space or none.
        limit: Keep this many of the best.
        model: A `Model`, a tokenizer or where to load one from, for a string in a result without token strings.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It is no result of this package, holds no token strings while no model is given, or the string is
            not one token of the model.
    """
    import torch

    return Hits(side, *map(torch.from_numpy, ranked_hits(path, token, side, exact=exact, limit=limit, model=model)))


def ranked_hits(
    path: str | Path,
    token: str | int | Sequence[int],
    side: str,
    *,
    exact: bool = False,
    limit: int | None = None,
    model: Any = None,
) -> tuple[np.ndarray, ...]:
    """`search` without torch: features, layers, scores, ranks and token ids of the hits."""
    if side not in SIDES:
        raise ValueError(f"side is {side!r}; expected 'top' or 'bottom'")
    spellings: list[str] | None = None
    ids: list[int] = []
    if isinstance(token, str):
        spellings = [token] if exact or token.startswith(" ") else [token, f" {token}"]
        if model is not None:
            spellings, ids = None, _ids_of(spellings, model)
    else:
        ids = [token] if isinstance(token, int) else list(token)
    parts = [_hits_in(group, side, ids, spellings) for group in _groups(path, side, strings=spellings is not None)]
    return _ranked(side, parts, limit)


def show(path: str | Path, feature: int, *, model: Any = None) -> list[dict[str, Any]]:
    """What a result file holds of a feature: its rows (one, or one for each layer), by column.

    Args:
        path: A result of `signatures`.
        feature: The feature's id.
        model: As in `search`, to add top_tokens and bottom_tokens to a result without token strings.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It is no result of this package, or the feature is not in it.
    """
    _signatures_identity(path)
    rows = _rows_of(Path(path), feature)
    if not rows:
        raise ValueError(f"feature {feature} is not in {str(path)!r}")
    for row in rows:
        for side in SIDES:
            if model is not None and f"{side}_tokens" not in row:
                row[f"{side}_tokens"] = _strings_of(row[f"{side}_ids"], model)
    return rows


def tokens_like(path: str | Path, text: str) -> list[str]:
    """Some tokens of a result with token strings that contain a text, in any case: what may have been meant."""
    for group in _groups(path, "top", strings=True):
        known = set(_dictionary(group["top_tokens"])[1].to_pylist())
        return sorted((t for t in known if text.strip().lower() in t.lower()), key=len)[:N_CANDIDATES]
    return []


def _signatures_identity(path: str | Path) -> dict[str, Any]:
    identity = read_identity(path)
    if "preset" not in identity:
        raise ValueError(
            f"{str(path)!r} is a table of {identity.get('what')!r}, not of signatures; ql.read_table reads it"
        )
    refuse_other_columns(path)
    return identity


def _groups(path: str | Path, side: str, strings: bool) -> Iterator[dict[str, pa.Array]]:
    """The columns needed to search one side, a row group at a time."""
    identity = _signatures_identity(path)
    if strings and identity.get("token_strings") is False:
        raise ValueError(
            f"{str(path)!r} holds no token strings; pass model= (a folder or hub id) to turn the token into an id, "
            "or search for the id"
        )
    columns = ["feature", "layer", f"{side}_ids", f"{side}_scores", *([f"{side}_tokens"] if strings else [])]
    if FORMATS.get(Path(path).suffix) == "jsonl":
        import pyarrow as pa

        rows = [{name: row[name] for name in columns} for row in read_jsonl(path, columns)]
        if rows:
            yield _flat(pa.Table.from_pylist(rows))
        return
    encoded = [f"{side}_tokens.list.element"] if strings else None
    with opened(Path(path), read_dictionary=encoded) as file:
        for i in range(file.num_row_groups):
            yield _flat(file.read_row_group(i, columns))


def _flat(table: pa.Table) -> dict[str, pa.Array]:
    return {name: table[name].combine_chunks() for name in table.column_names}


def _hits_in(
    group: dict[str, pa.Array], side: str, ids: Sequence[int], spellings: Sequence[str] | None
) -> tuple[np.ndarray, ...]:
    """(features, layers, scores, ranks, token ids) of the hits in a row group."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    lists = group[f"{side}_ids"]
    token_ids = _numbers(lists.values)
    if spellings is None:
        held = np.isin(token_ids, ids) if len(ids) > 1 else token_ids == ids[0] if ids else np.zeros(0, bool)
    else:
        codes, known = _dictionary(group[f"{side}_tokens"])
        wanted = _numbers(pc.is_in(known, value_set=pa.array(spellings)))  # type: ignore[attr-defined]
        held = wanted[codes] if len(known) else np.zeros(0, bool)
    places = np.flatnonzero(held)
    starts = _numbers(lists.offsets)
    rows = np.searchsorted(starts, places, side="right") - 1
    return (
        _numbers(group["feature"])[rows],
        _numbers(group["layer"])[rows],
        _numbers(group[f"{side}_scores"].values)[places],
        places - starts[rows],
        token_ids[places],
    )


def _numbers(array: pa.Array) -> np.ndarray:
    return array.to_numpy(zero_copy_only=False)


def _dictionary(lists: pa.Array) -> tuple[np.ndarray, pa.Array]:
    """(codes, strings) of a column of lists of strings."""
    import pyarrow as pa

    values = lists.values
    if not pa.types.is_dictionary(values.type):
        values = values.dictionary_encode()
    return _numbers(values.indices), values.dictionary


def _ranked(side: str, parts: Sequence[tuple[np.ndarray, ...]], limit: int | None) -> tuple[np.ndarray, ...]:
    import numpy as np

    if not parts:
        parts = [tuple(np.zeros(0, t) for t in ("i8", "i8", "f4", "i8", "i8"))]
    features, layers, scores, ranks, token_ids = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((features, -scores if side == "top" else scores))[:limit]
    found = [column[order] for column in (features, layers, scores, ranks, token_ids)]
    return tuple(column if column.dtype.kind == "f" else column.astype("i8") for column in found)


def _rows_of(path: Path, feature: int) -> list[dict[str, Any]]:
    if FORMATS.get(path.suffix) == "jsonl":
        columns = [f"{side}_{what}" for side in SIDES for what in ("ids", "scores")]
        return [row for row in read_jsonl(path, ["feature", "layer", *columns]) if row["feature"] == feature]
    import numpy as np

    rows: list[dict[str, Any]] = []
    with opened(path) as file:
        for i in range(file.num_row_groups):
            group = file.metadata.row_group(i)
            place = next(j for j in range(group.num_columns) if group.column(j).path_in_schema == "feature")
            range_ = group.column(place).statistics
            if range_ is not None and range_.has_min_max and not range_.min <= feature <= range_.max:
                continue
            places = np.flatnonzero(file.read_row_group(i, ["feature"])["feature"].to_numpy() == feature)
            if len(places):
                rows += file.read_row_group(i).take(places).to_pylist()
    return rows


def _tokenizer(model: Any) -> Any:
    """The tokenizer of a `Model`, a tokenizer itself, or the one at a folder or hub id."""
    if isinstance(model, (str, Path)):
        from querylens_fast.models.folders import load_tokenizer

        return load_tokenizer(model, None, required=True)
    found = getattr(model, "tokenizer", model)
    if found is None:
        raise ValueError(f"model {getattr(model, 'name', model)!r} has no tokenizer; pass one that has")
    return found


def _ids_of(spellings: Sequence[str], model: Any) -> list[int]:
    """Ids of the spellings that are one token."""
    tokenizer = _tokenizer(model)
    pieces = [tokenizer.encode(text, add_special_tokens=False) for text in spellings]
    found = {ids[0] for ids in pieces if len(ids) == 1} - {tokenizer.unk_token_id}
    if not found:
        parts = [tokenizer.decode([i]) for i in pieces[0]]
        raise ValueError(f"{spellings[0]!r} is not one token of the model: it is {' + '.join(map(repr, parts))}")
    return sorted(found)


def _strings_of(ids: Sequence[int], model: Any) -> list[str]:
    return _tokenizer(model).batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
