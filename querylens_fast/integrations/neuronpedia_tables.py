"""Neuronpedia's tables as far as this package fills them: columns with their Postgres types, and `import.sql`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

LOCAL_CREATOR = "clkht01d40000jv08hvalcvly"
"""The user that a local Neuronpedia is seeded with."""
MODELS = frozenset(
    "deepseek-r1-distill-llama-8b gemma-2-27b gemma-2-2b gemma-2-2b-it gemma-2-9b gemma-2-9b-it gemma-2b gemma-2b-it "
    "gemma-3-12b gemma-3-1b gemma-3-1b-it gemma-3-270m gemma-3-270m-it gemma-3-27b-it gemma-3-4b gemma-3-4b-it "
    "gpt-oss-20b gpt2-small llama3-8b-it llama3.1-8b llama3.1-8b-it llama3.3-70b-it pythia-70m-deduped qwen2.5-7b-it "
    "qwen3-0.6b qwen3-1.7b qwen3-14b qwen3-4b qwen3-8b".split()
)
"""Model ids of neuronpedia.org that sae-lens's list of public SAEs names."""

RELEASE = {
    "name": "text",
    "description": "text",
    "creatorName": "text",
    "creatorId": "text",
    "urls": "text[]",
    "visibility": '"Visibility"',
}
MODEL = {
    "id": "text",
    "layers": "integer",
    "neuronsPerLayer": "integer",
    "owner": "text",
    "creatorId": "text",
    "displayName": "text",
    "displayNameShort": "text",
    "visibility": '"Visibility"',
}
SOURCE_SET = {
    "modelId": "text",
    "name": "text",
    "description": "text",
    "creatorName": "text",
    "creatorId": "text",
    "releaseName": "text",
    "urls": "text[]",
    "visibility": '"Visibility"',
    "showHeadAttribution": "boolean",
}
SOURCE = {
    "id": "text",
    "modelId": "text",
    "setName": "text",
    "creatorId": "text",
    "visibility": '"Visibility"',
    "hfRepoId": "text",
    "hfFolderId": "text",
    "saelensRelease": "text",
    "saelensSaeId": "text",
    "num_prompts": "integer",
    "num_tokens_in_prompt": "integer",
    "dataset": "text",
    "notes": "text",
}
SOURCE_EXTRAS = tuple(SOURCE)[5:]
"""Columns of a source that only the caller knows."""
NEURON = {
    "modelId": "text",
    "layer": "text",
    "index": "text",
    "sourceSetName": "text",
    "creatorId": "text",
    "maxActApprox": "double precision",
    "hasVector": "boolean",
    "vector": "double precision[]",
    "vectorDefaultSteerStrength": "double precision",
    "hookName": "text",
    "topkCosSimIndices": "integer[]",
    "topkCosSimValues": "double precision[]",
    "neuron_alignment_indices": "integer[]",
    "neuron_alignment_values": "double precision[]",
    "neuron_alignment_l1": "double precision[]",
    "neg_str": "text[]",
    "neg_values": "double precision[]",
    "pos_str": "text[]",
    "pos_values": "double precision[]",
    "decoder_weights_dist": "double precision[]",
    "frac_nonzero": "double precision",
    "logits_hist_data_bar_heights": "double precision[]",
    "logits_hist_data_bar_values": "double precision[]",
}
ACTIVATION = {
    "id": "text",
    "modelId": "text",
    "layer": "text",
    "index": "text",
    "tokens": "text[]",
    "values": "double precision[]",
    "maxValue": "double precision",
    "maxValueTokenIndex": "integer",
    "minValue": "double precision",
    "creatorId": "text",
    "binMin": "double precision",
    "binMax": "double precision",
    "binContains": "double precision",
    "qualifyingTokenIndex": "integer",
}
EXPLANATION = {
    "id": "text",
    "modelId": "text",
    "layer": "text",
    "index": "text",
    "description": "text",
    "authorId": "text",
}
_METADATA = {
    "release": ("SourceRelease", RELEASE),
    "model": ("Model", MODEL),
    "sourceset": ("SourceSet", SOURCE_SET),
    "source": ("Source", SOURCE),
}
_BATCHES = {
    "features": ("Neuron", NEURON),
    "activations": ("Activation", ACTIVATION),
    "explanations": ("Explanation", EXPLANATION),
}

_HEADER = """\
-- Imports this folder into a local Neuronpedia's Postgres. Run it here, in the folder, with psql and gzip at hand:
--     psql "$POSTGRES_URL" -f import.sql
-- All of it is imported or nothing. A second run changes nothing. The user {creator} has to exist.
\\set ON_ERROR_STOP on
BEGIN;
CREATE TEMP TABLE querylens_lines (line text) ON COMMIT DROP;
"""
_FORMAT = "WITH (FORMAT csv, QUOTE E'\\x01', DELIMITER E'\\x02')"


def import_sql(creator: str, metadata: Mapping[str, Iterable[str]], batches: Iterable[str]) -> str:
    """The psql script for a folder.

    Args:
        creator: The creator's id, for the comment.
        metadata: The columns of the line of release, model, sourceset and source.
        batches: Paths of gzipped batches within the folder, features before activations and explanations.
    """
    parts = [_HEADER.format(creator=creator)]
    for name, columns in metadata.items():
        table, kinds = _METADATA[name]
        parts.append(_statements(f"'{name}.jsonl'", table, {column: kinds[column] for column in columns}))
    for path in batches:
        parts.append(_statements(f"PROGRAM 'gzip -dc {path}'", *_BATCHES[PurePosixPath(path).parts[0]]))
    return "".join(parts) + "COMMIT;\n"


def _statements(source: str, table: str, columns: dict[str, str]) -> str:
    names = ", ".join(f'"{name}"' for name in columns)
    types = ", ".join(f'"{name}" {kind}' for name, kind in columns.items())
    # Prisma fills a model's updatedAt itself; the column has no default.
    into, chosen = (f'{names}, "updatedAt"', f"{names}, CURRENT_TIMESTAMP") if table == "Model" else (names, names)
    return (
        f"\\copy querylens_lines FROM {source} {_FORMAT}\n"
        f'INSERT INTO "{table}" ({into})\n'
        f"  SELECT {chosen} FROM querylens_lines, jsonb_to_record(line::jsonb) AS t({types})\n"
        "  ON CONFLICT DO NOTHING;\n"
        "TRUNCATE querylens_lines;\n"
    )
