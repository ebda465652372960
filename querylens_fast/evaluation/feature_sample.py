"""Feature activity on a token sample: where each feature is active, how often and how strongly.

One pass over the sample gives, for every feature of a dictionary, its density, its mean and maximum activation, the
tokens that it is active at, and the sequences that activate it most (paper §5.1: "maximally activating tokens").

    density     positions where the feature is active / valid positions
    mean        mean activation over the positions where it is active
    examples    the n_examples sequences with the largest activation, with the value, position and token of each peak

Memory: the activations of a few positions at a time, 24 bytes for each of the n · m examples, and 16 bytes for each
(feature, token) pair that occurs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from querylens_fast.dictionaries.load import load_dictionary
from querylens_fast.evaluation.activity import Activity
from querylens_fast.lens.ablations import activations_by_position
from querylens_fast.models.load import as_model
from querylens_fast.models.tokens import Tokens, as_tokens
from querylens_fast.runs.arguments import finite_number, whole_number
from querylens_fast.runs.atomic_write import whole
from querylens_fast.runs.sealed_parquet import read_checked, write_sealed

if TYPE_CHECKING:
    import pyarrow as pa

METADATA_KEY = b"querylens_fast"
WHAT = "feature sample"
NEEDED = ("dictionary", "dictionary_fingerprint", "tokens", "tokens_digest", "n_valid", "n_sequences", "n_examples")
"""What a sample's metadata has to say."""
BYTES_AN_ACTIVATION = 24
"""Of an activation while it is counted: encoded, masked, compared, and its peaks' places."""
MAX_SEQUENCES = 16
"""Run through the model together."""
ROW_GROUP = 1 << 12
"""Features of a row group: one feature's examples are read without those of all."""


@dataclass(frozen=True)
class FeatureSample:
    """Activity of every feature of a dictionary on a token sample.

    Attributes:
        metadata: Model, dictionary, tokens and settings.
        n_active: Positions where each feature is active, [n] int64.
        mean: Mean activation over them, [n] float32; 0 for features that are never active.
        maximum: Largest activation, [n] float32.
        n_sequences: Sequences with an active position, [n] int64.
        values: Peak activations of the examples, [n, m] float32, descending; 0 where there are fewer than m.
        sequences: Their sequences, [n, m] int64; −1 where there are fewer.
        positions: The peaks' positions, [n, m] int64; −1 where there are fewer.
        tokens: The peaks' token ids, [n, m] int64; −1 where there are fewer.
        pairs: (feature, token, count) of every token at which a feature is active, sorted by feature, then count.
    """

    metadata: dict[str, Any]
    n_active: Tensor
    mean: Tensor
    maximum: Tensor
    n_sequences: Tensor
    values: Tensor
    sequences: Tensor
    positions: Tensor
    tokens: Tensor
    pairs: tuple[Tensor, Tensor, Tensor]

    @property
    def n_features(self) -> int:
        return len(self.n_active)

    @property
    def density(self) -> Tensor:
        """Share of the sample's valid positions at which each feature is active, [n]."""
        return self.n_active / self.metadata["n_valid"]

    @property
    def counts(self) -> Tensor:
        """Examples found for each feature, at most m, [n]."""
        return (self.tokens >= 0).sum(1)

    def choose(self, n_features: int = 100, min_examples: int = 20, seed: int = 0) -> Tensor:
        """Ids of a seeded sample of the features with at least ``min_examples`` activating sequences, ascending.

        Raises:
            ValueError: No feature has that many; the message gives the largest number found.
        """
        eligible = (self.n_sequences >= min_examples).nonzero()[:, 0]
        if not len(eligible):
            raise ValueError(
                f"no feature of {self.metadata['dictionary']!r} is active in {min_examples} sequences of the sample "
                f"(the most active one is in {int(self.n_sequences.max())}); use more tokens or a smaller min_examples"
            )
        order = torch.randperm(len(eligible), generator=torch.Generator().manual_seed(seed))
        return eligible[order[:n_features]].sort().values

    def top_tokens(self, feature: int, n: int = 10) -> list[tuple[int, int]]:
        """(token id, count) of the tokens at which a feature is active most often."""
        features, tokens, counts = self.pairs
        start, stop = torch.searchsorted(features, torch.tensor([feature, feature + 1])).tolist()
        stop = min(stop, start + n)
        return list(zip(tokens[start:stop].tolist(), counts[start:stop].tolist(), strict=True))

    def save(self, path: str | Path) -> Path:
        """Write one Parquet row per feature: activity, examples and the token distribution. Returns the path."""
        path = Path(path)
        if path.suffix != ".parquet":
            raise ValueError(f"out is {str(path)!r}; expected a .parquet file")
        table = self.table()
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as partial:
            write_sealed(partial, [table], table.schema, {"compression": "zstd"}, ROW_GROUP)
        return path

    def table(self) -> pa.Table:
        """The sample as a pyarrow Table; its schema metadata holds ``metadata``."""
        import pyarrow as pa

        features, tokens, counts = self.pairs
        offsets = torch.searchsorted(features, torch.arange(self.n_features + 1)).int().numpy()

        def examples(values: Tensor) -> pa.Array:
            kept = values[self.tokens >= 0]
            starts = torch.cat([torch.zeros(1, dtype=torch.int64), self.counts.cumsum(0)]).int().numpy()
            return pa.ListArray.from_arrays(pa.array(starts), pa.array(kept.numpy()))

        def lists(values: Tensor) -> pa.Array:
            return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.numpy()))

        columns = {
            "feature": pa.array(torch.arange(self.n_features).numpy()),
            "n_active": pa.array(self.n_active.numpy()),
            "density": pa.array(self.density.float().numpy()),
            "mean": pa.array(self.mean.numpy()),
            "maximum": pa.array(self.maximum.numpy()),
            "n_sequences": pa.array(self.n_sequences.numpy()),
            "example_values": examples(self.values),
            "example_sequences": examples(self.sequences),
            "example_positions": examples(self.positions),
            "example_tokens": examples(self.tokens),
            "token_ids": lists(tokens),
            "token_counts": lists(counts),
        }
        return pa.table(columns).replace_schema_metadata({METADATA_KEY: json.dumps(self.metadata).encode()})


@torch.no_grad()
def feature_sample(
    dictionary: Any,
    model: Any,
    tokens: Tokens | Tensor | Sequence[str] | str | Path,
    *,
    n_examples: int = 20,
    out: str | Path | None = None,
    max_memory_gib: float = 2.0,
    progress: bool = True,
) -> FeatureSample:
    """Run the model and the dictionary over a token sample and record where each feature is active.

    Args:
        dictionary: As in `signatures`; one that can be run.
        model: As in `signatures`.
        tokens: The sample, as in `fit_transport`, or your own texts, one sequence each; padded positions do not count.
            To score a signature, use other text than the transport was fitted on.
        n_examples: Sequences kept for each feature, m.
        out: A ``.parquet`` file to write as well.
        max_memory_gib: Bound on the activations held at a time.
        progress: Show a progress bar.

    Raises:
        ValueError: n_examples below 1, a dictionary that cannot be run, or no position where any feature is active.

    Cost: one forward pass over the sample, and n · d_model multiply-adds for each position.
    """
    model, dictionary = as_model(model), load_dictionary(dictionary)
    tokens = as_tokens(tokens, model)
    dictionary.check_model(model)
    n_examples = whole_number("n_examples", n_examples)
    finite_number("max_memory_gib", max_memory_gib, above=0)
    counted = Activity(dictionary.n_features, min(n_examples, len(tokens.ids)), model)
    length = tokens.ids.shape[1]
    held = max(1, int(max_memory_gib * (1 << 30)) // (BYTES_AN_ACTIVATION * dictionary.n_features))
    rows, positions = min(max(1, held // length), MAX_SEQUENCES), min(held, length)
    label = f"activations {Path(dictionary.name).name}"
    with tqdm(total=len(tokens.ids), desc=label, unit="sequence", disable=not progress) as bar:
        for start in range(0, len(tokens.ids), rows):
            ids, valid = (x[start : start + rows].to(model.device) for x in (tokens.ids, tokens.valid_mask))
            parts = activations_by_position(model, dictionary, ids, positions)
            masks = valid[..., None].split(positions, 1)
            masked = (acts.float().masked_fill(~mask, 0) for acts, mask in zip(parts, masks, strict=True))
            counted.add(masked, ids, start)
            bar.update(len(ids))
    metadata = {
        "what": WHAT,
        "model": model.name,
        "fingerprint": model.fingerprint,
        "dictionary": dictionary.name,
        "dictionary_fingerprint": dictionary.fingerprint,
        "kind": dictionary.kind,
        "layer": dictionary.layer,
        "tokens": tokens.source,
        "tokens_digest": tokens.digest,
        "n_valid": tokens.n_valid,
        "n_sequences": len(tokens.ids),
        "n_examples": n_examples,
    }
    found = FeatureSample(metadata, **counted.finish(tokens.ids))
    if not bool(found.n_active.any()):
        raise ValueError(
            f"no feature of {dictionary.name!r} is active anywhere in {tokens.source}: is the dictionary of this "
            "model, and its scale that of the model's activations?"
        )
    if out is not None:
        found.save(out)
    return found


def load_feature_sample(path: str | Path) -> FeatureSample:
    """Read what `FeatureSample.save` wrote.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It is no feature sample, or damaged.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"feature sample {str(path)!r} does not exist; make one with feature_sample(..., out=)")
    try:
        file = read_checked(Path(path))
        metadata = json.loads(file.entries[METADATA_KEY])
        if metadata.get("what") != WHAT or not all(name in metadata for name in NEEDED):
            raise ValueError(f"it holds {metadata.get('what')!r}; expected a {WHAT}, whole")
        return _from_table(metadata, file.table())
    except OSError:
        raise
    except Exception as error:  # of the parser too: its columns may be of any type
        raise ValueError(f"{str(path)!r} is no feature sample of this package, or damaged: {error}") from error


def _from_table(metadata: dict[str, Any], table: pa.Table) -> FeatureSample:
    """The sample that `FeatureSample.table` made a table of; raises what the columns of another table lead to."""

    def column(name: str) -> Tensor:
        return torch.from_numpy(table[name].combine_chunks().to_numpy(zero_copy_only=False).copy())

    def flat(name: str) -> Tensor:
        return torch.from_numpy(table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False).copy())

    counts = torch.tensor([len(x) for x in table["example_tokens"].to_pylist()])
    m = int(counts.max())
    present = torch.arange(m) < counts[:, None]

    def padded(name: str, missing: float, dtype: torch.dtype) -> Tensor:
        return torch.full((len(counts), m), missing, dtype=dtype).masked_scatter_(present, flat(name))

    lengths = torch.tensor(table["token_ids"].combine_chunks().value_lengths().to_pylist())
    features = torch.arange(len(counts)).repeat_interleave(lengths)
    if not len(flat("token_ids")) == len(flat("token_counts")) == len(features):
        raise ValueError("its lists are of different lengths")
    if not 0 <= int(flat("example_sequences").min()) <= int(flat("example_sequences").max()) < metadata["n_sequences"]:
        raise ValueError("it has examples of other sequences than its own")
    return FeatureSample(
        metadata,
        column("n_active"),
        column("mean"),
        column("maximum"),
        column("n_sequences"),
        padded("example_values", 0.0, torch.float32),
        padded("example_sequences", -1, torch.int64),
        padded("example_positions", -1, torch.int64),
        padded("example_tokens", -1, torch.int64),
        (features, flat("token_ids"), flat("token_counts")),
    )
