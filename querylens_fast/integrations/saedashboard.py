"""SAEDashboard: batch files with logits and histograms, new or replaced in place, and columnar tables.

``batch-N.json`` is what its ``neuronpedia-runner`` writes and its converters read. In files that exist only the fields
that come from the unembedding are replaced: neg_str, neg_values, pos_str, pos_values, logits_hist_data_bar_heights and
logits_hist_data_bar_values. The columnar form has a folder of Parquet tables for each batch of features, of which
logits_tables and logits_histograms hold the logits, and a manifest in each folder and above them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from querylens_fast.integrations.columns import logit_fields, vector_fields
from querylens_fast.integrations.dashboard import Rows
from querylens_fast.integrations.folder import claimed, json_bytes, write_bytes
from querylens_fast.integrations.saedashboard_tables import COLUMNAR, tables_of
from querylens_fast.integrations.sources import Source, blocks_of, open_source
from querylens_fast.integrations.tokens import token_strings
from querylens_fast.models.load import as_model
from querylens_fast.runs.arguments import whole_number
from querylens_fast.runs.atomic_write import whole

FORMS = ("batch-*.json", "columnar")
FORMAT = "querylens_fast.saedashboard/1"
_BATCH = re.compile(r"batch-(\d+)\.json")


def export_saedashboard(
    source: Any,
    model: Any,
    folder: str | Path,
    *,
    into: str = "batch-*.json",
    model_id: str = "",
    sae_set: str = "",
    sae_id_suffix: str | None = None,
    layer: int | None = None,
    features: Any = None,
    dictionary: Any = None,
    k: int = 10,
    bins: int = 50,
    unit_norm: bool = True,
    unembedding: str = "raw",
    rows_per_file: int = 128,
    resume: bool = True,
) -> list[Path]:
    """Write SAEDashboard's batch files or columnar tables, or refresh the logits of batch files that exist.

    Args:
        source: A dictionary (or what `load_dictionary` takes), or a result of `signatures` (its tokens are written).
        model: Its model, with a tokenizer.
        folder: The runner's output folder. Where it holds batch files that this package did not write, and
            into="batch-*.json", their logit and histogram fields are replaced, file by file, each atomically.
        into: "batch-*.json" or "columnar".
        model_id: Of new batch files.
        sae_set: Of new batch files.
        sae_id_suffix: Of new batch files.
        layer: Of new batch files; by default the dictionary's.
        features: Of a dictionary: which of them; of new files.
        dictionary: Of a result: its dictionary, for alignments.
        k: Tokens on each side.
        bins: Of the histogram.
        unit_norm: Read decoder rows at unit length, as SAEDashboard does.
        unembedding: "raw" (its main branch) or "folded" (0.8.0).
        rows_per_file: Features in a batch; the runner's n_features_at_a_time.
        resume: Go on with new files that an earlier, killed call wrote; False: refuse to touch them.

    Returns:
        The files written or replaced, in order; of the columnar form the tables of logits and histograms.

    Raises:
        ValueError: What does not fit together; nothing has been written then.
        FileExistsError: The folder holds another export.
    """
    if into not in FORMS:
        raise ValueError(f"into is {into!r}; expected {' or '.join(FORMS)}")
    whole_number("rows_per_file", rows_per_file)
    model, target = as_model(model), Path(folder)
    strings = token_strings(model, "dashboard")
    opened = open_source(
        source,
        model,
        features=features,
        dictionary=dictionary,
        k=k,
        bins=bins,
        unit_norm=unit_norm,
        unembedding=unembedding,
    )
    existing = _existing(target)
    if into == FORMS[0] and existing and not (target / "querylens_fast.json").exists():
        return _replace(existing, opened, strings)
    if into == FORMS[0] and not (model_id and sae_set):
        opened.missing.append("model_id= and sae_set= are not both given: batch files leave those names empty")
    opened.missing.append("activations and densities are not known here: those fields are left empty")
    opened.say_missing()
    head = {
        "model_id": model_id,
        "layer": whole_number("layer", opened.layer if layer is None else layer, 0),
        "sae_set": sae_set,
        "sae_id_suffix": sae_id_suffix,
    }
    blocks = blocks_of(len(opened), rows_per_file)
    identity = {"format": FORMAT, "into": into, **head, "source": opened.identity, "files": len(blocks)}
    with claimed(target, identity, resume):
        if into == "columnar":
            return _write_columnar(target, opened, blocks)
        return _write_batches(target, opened, blocks, strings, head)


def _existing(folder: Path) -> list[Path]:
    """Batch files, by their number."""
    named = [(_BATCH.fullmatch(path.name), path) for path in folder.glob("batch-*.json")]
    return [path for _, path in sorted((int(match[1]), path) for match, path in named if match)]


def _replace(paths: Sequence[Path], source: Source, strings: Sequence[str]) -> list[Path]:
    """Replace the fields in every file; all of them are read and checked first."""
    at = {feature: i for i, feature in enumerate(source.features.tolist())}
    for path in paths:
        for feature in _read_batch(path)["features"]:
            if feature["feature_index"] not in at:
                raise ValueError(
                    f"{str(path)!r} holds feature {feature['feature_index']}, which the source does not have"
                )
    source.say_missing()
    for path in paths:
        batch = _read_batch(path)
        places = [at[feature["feature_index"]] for feature in batch["features"]]
        fields = (fields for rows in _scattered(source, places) for fields in logit_fields(rows, strings))
        for feature, found in zip(batch["features"], fields, strict=True):
            feature |= {name: value for name, value in found.items() if value or not name.startswith("logits_hist")}
        write_bytes(path, json.dumps(batch).encode())
    return list(paths)


def _scattered(source: Source, places: Sequence[int]) -> Iterator[Rows]:
    """Rows at places, in runs of consecutive ones."""
    breaks = [i for i in range(1, len(places)) if places[i] != places[i - 1] + 1]
    starts, stops = [0, *breaks], [*breaks, len(places)]
    runs = [slice(places[a], places[b - 1] + 1) for a, b in zip(starts, stops, strict=True) if a < b]
    return source.read(runs)


def _read_batch(path: Path) -> dict[str, Any]:
    try:
        batch = json.loads(path.read_text(encoding="utf-8"))
        if all(isinstance(feature["feature_index"], int) for feature in batch["features"]):
            return batch
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is no batch file of SAEDashboard ({error})") from error
    raise ValueError(f"{str(path)!r} is no batch file of SAEDashboard: a feature_index is no number")


def _write_batches(
    target: Path, source: Source, blocks: Sequence[slice], strings: Sequence[str], head: dict[str, Any]
) -> list[Path]:
    paths = [target / f"batch-{i}.json" for i in range(len(blocks))]
    pending = [i for i, path in enumerate(paths) if not path.exists()]
    for i, rows in zip(pending, source.read([blocks[i] for i in pending]), strict=True):
        fields = zip(rows.features.tolist(), vector_fields(rows), logit_fields(rows, strings), strict=True)
        features = [{**_blank(feature), **alignment, **logits} for feature, alignment, logits in fields]
        write_bytes(paths[i], json_bytes({**head, "features": features}))
    return paths


def _blank(feature: int) -> dict[str, Any]:
    """A feature's fields without activations, in the order that SAEDashboard has."""
    lists = "neuron_alignment_indices neuron_alignment_values neuron_alignment_l1 correlated_neurons_indices"
    lists += " correlated_neurons_l1 correlated_neurons_pearson correlated_features_indices correlated_features_l1"
    lists += " correlated_features_pearson neg_str neg_values pos_str pos_values"
    more = "freq_hist_data_bar_values freq_hist_data_bar_heights logits_hist_data_bar_heights"
    more += " logits_hist_data_bar_values"
    return {
        "feature_index": feature,
        **{name: [] for name in lists.split()},
        "frac_nonzero": 0,
        **{name: [] for name in more.split()},
        "n_prompts_total": 0,
        "n_tokens_in_prompt": 0,
        "dataset": "",
        "decoder_weights_dist": [],
        "activations": [],
        "vector": [],
    }


def _write_columnar(target: Path, source: Source, blocks: Sequence[slice]) -> list[Path]:
    import pyarrow.parquet as pq

    folders = [target / f"feature_batch_{i}" for i in range(len(blocks))]
    pending = [i for i, folder in enumerate(folders) if not (folder / "manifest.json").exists()]
    for i, rows in zip(pending, source.read([blocks[i] for i in pending]), strict=True):
        folders[i].mkdir(parents=True, exist_ok=True)
        tables = tables_of(rows)
        for name, table in tables.items():
            with whole(folders[i] / f"{name}.parquet") as partial:
                pq.write_table(table, partial, compression="zstd")
        manifest = {
            **COLUMNAR,
            "feature_batch_index": i,
            "row_counts": {name: table.num_rows for name, table in tables.items()},
            "tables": {name: f"{name}.parquet" for name in tables},
        }
        write_bytes(folders[i] / "manifest.json", json_bytes(manifest))
    batches = [
        {"artifact_dir": folder.name, "feature_batch_index": i, "feature_indices": source.features[block].tolist()}
        for i, (folder, block) in enumerate(zip(folders, blocks, strict=True))
    ]
    write_bytes(target / "manifest.json", json_bytes({**COLUMNAR, "batches": batches}))
    return [folder / f"{name}.parquet" for folder in folders for name in ("logits_tables", "logits_histograms")]
