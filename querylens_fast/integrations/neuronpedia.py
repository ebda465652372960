"""Neuronpedia's bulk folder: dashboards of every feature of a dictionary, ready to be imported.

    {folder}/{model_id}/{layer}-{source_set}/
        release.jsonl model.jsonl sourceset.jsonl source.jsonl    one line each
        features/batch-N.jsonl.gz                                 one line a feature
        activations/batch-N.jsonl.gz                              where texts are given
        explanations/batch-N.jsonl.gz                             where explanations are given
        import.sql                                                for psql, into a local Neuronpedia

Neuronpedia's importer takes the columns of a file from its first line and refuses the whole file for one number that is
NaN or one lone surrogate; so every line has the same keys, finite numbers and valid UTF-8. Nothing in the files depends
on the time, so an export that was killed ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from querylens_fast.integrations.activity import Activity, open_activity
from querylens_fast.integrations.dashboard import Rows
from querylens_fast.integrations.folder import claimed, json_bytes, write_bytes, write_lines
from querylens_fast.integrations.neighbours import (
    ComputedNeighbours,
    TabulatedNeighbours,
    empty_lists,
    identity_of,
    open_neighbours,
)
from querylens_fast.integrations.neuronpedia_lines import (
    Place,
    activation_lines,
    explanation_lines,
    feature_lines,
)
from querylens_fast.integrations.neuronpedia_metadata import Names, metadata_lines, place_of
from querylens_fast.integrations.neuronpedia_tables import LOCAL_CREATOR, MODELS, import_sql
from querylens_fast.integrations.sources import Source, blocks_of, checked_texts, open_source
from querylens_fast.integrations.tokens import token_strings
from querylens_fast.models.load import as_model
from querylens_fast.runs.arguments import whole_number
from querylens_fast.runs.run_record import digest_of

logger = logging.getLogger(__name__)

MAX_FILES = 1000
"""Files of a folder that the importer lists."""
FORMAT = "querylens_fast.neuronpedia/1"


def export_neuronpedia(
    source: Any,
    model: Any,
    folder: str | Path,
    *,
    model_id: str,
    source_set: str,
    layer: int | None = None,
    suffix: str | None = None,
    release: str | None = None,
    creator_id: str = LOCAL_CREATOR,
    creator_name: str = "querylens_fast",
    description: str | None = None,
    urls: Sequence[str] = (),
    source_fields: Mapping[str, Any] | None = None,
    hook_name: str | None = None,
    features: Any = None,
    dictionary: Any = None,
    k: int = 10,
    unit_norm: bool = True,
    unembedding: str = "raw",
    token_style: str = "dashboard",
    vectors: bool = True,
    neighbours: Any = 10,
    activations: Any = None,
    sample: Any = None,
    explanations: Mapping[int, str] | None = None,
    rows_per_file: int = 1024,
    sql: bool = True,
    resume: bool = True,
    progress: bool = False,
) -> Path:
    """Write Neuronpedia's bulk folder for a dictionary or a result.

    Args:
        source: A dictionary (or what `load_dictionary` takes): its values are read out as dashboards do. Or a result
            of `signatures`: its tokens are written, whatever the preset.
        model: From `load_model`, with a tokenizer (or what `as_model` takes).
        folder: Where ``{model_id}/{layer}-{source_set}`` is made.
        model_id: Neuronpedia's name of the model, such as "gpt2-small".
        source_set: Neuronpedia's name of the set of dictionaries, such as "res-jb".
        layer: The layer number; by default the dictionary's.
        suffix: Added to the source's id as ``__suffix``.
        release: Name of the release; by default the source set's.
        creator_id: An existing user; by default the one that a local Neuronpedia is seeded with.
        creator_name: Shown beside the release and the set.
        description: Of release and set.
        urls: Of release and set.
        source_fields: Further columns of the source: hfRepoId, hfFolderId, saelensRelease, saelensSaeId, num_prompts,
            num_tokens_in_prompt, dataset, notes.
        hook_name: Where steering adds a vector; by default the dictionary's hook name.
        features: Of a dictionary: which of them (as in `signatures`).
        dictionary: Of a result: its dictionary, for vectors, alignments and neighbours.
        k: Tokens on each side.
        unit_norm: Read decoder rows at unit length, as SAEDashboard does.
        unembedding: "raw" or "folded".
        token_style: "dashboard" or "decoded" (see `token_strings`).
        vectors: Write the features' vectors, which takes most of the space. Without them features that have no
            activations are covered by "no known activations".
        neighbours: How many cosine neighbours to compute (0: none), or a table of `ql.neighbours`.
        activations: Texts: a feature list (.json, .pkl, or a sequence of `Feature`).
        sample: Density and maximum of every feature (see `activity.open_activity`).
        explanations: Texts by feature id.
        rows_per_file: Features a file; raised where there would be more than 1,000 files.
        sql: Write import.sql.
        resume: Go on with what an earlier, killed run of the same export wrote; False: refuse to touch it.
        progress: Show a progress bar.

    Returns:
        The folder of the source.

    Raises:
        ValueError: What does not fit together, by name; nothing has been written then.
        FileExistsError: The folder holds another export.

    Memory: one file's rows, 64 MiB of logits, and for neighbours the dictionary's vectors in float32.
    """
    model = as_model(model)
    opened = open_source(
        source, model, features=features, dictionary=dictionary, k=k, unit_norm=unit_norm, unembedding=unembedding
    )
    layer = opened.layer if layer is None else layer
    place = place_of(opened, model_id, source_set, layer, suffix, creator_id, hook_name)
    names = Names(release or source_set, creator_name, description, urls, source_fields or {})
    n_features = opened.dictionary.n_features if opened.dictionary else int(opened.features.max()) + 1
    activity = open_activity(activations, sample, opened.features, layer, n_features)
    explanations = checked_texts("explanations", explanations, opened.features)
    whole_number("rows_per_file", rows_per_file)
    plan = _Plan(
        opened,
        place,
        metadata_lines(place, names, opened, model),
        token_strings(model, token_style),
        vectors,
        open_neighbours(neighbours, opened.dictionary),
        activity,
        explanations,
        blocks_of(len(opened), max(rows_per_file, -(-len(opened) // MAX_FILES))),
    )
    plan.say_missing()
    identity = plan.identity(token_style=token_style, vectors=vectors, neighbours=identity_of(neighbours), sql=sql)
    target = Path(folder) / model_id / place.source_id
    with claimed(target, identity, resume):
        plan.write(target, sql, progress)
    return target


@dataclass(frozen=True)
class _Plan:
    """An export that was checked."""

    source: Source
    place: Place
    metadata: dict[str, dict[str, Any]]
    strings: list[str]
    vectors: bool
    neighbours: ComputedNeighbours | TabulatedNeighbours | None
    activity: Activity
    explanations: Mapping[int, str]
    blocks: list[slice]

    def say_missing(self) -> None:
        """Log what the pages will lack."""
        missing = self.source.missing
        if self.place.model_id not in MODELS:
            missing.append(
                f"model_id {self.place.model_id!r} is not among the models known of neuronpedia.org (gpt2-small, "
                "gemma-2-2b, …): a local Neuronpedia makes it from model.jsonl, neuronpedia.org has to know it"
            )
        if not self.activity.texts:
            missing.append("no activations= are given: pages show no texts")
            if self.activity.maximum is None:
                missing.append("neither activations= nor sample= is given: the list of features leaves them all out")
        has_vectors = self.vectors and self.source.dictionary is not None
        if not has_vectors and not self.activity.texts and self.activity.maximum is None:
            missing.append('without vectors and activations pages are covered by "no known activations"')
        if broken := self.activity.broken():
            missing.append(f"{broken} texts hold no tokens or a value that is no number: they are left out")
        self.source.say_missing()

    def identity(self, **settings: Any) -> dict[str, Any]:
        """What makes two exports the same."""
        features = self.source.features.tolist()
        texts = hashlib.sha256()
        for line in activation_lines(self.place, sorted(self.activity.texts), self.activity):
            texts.update(json_bytes(line))
        sampled = [[self.activity.max_of(i), self.activity.density_of(i)] for i in features]
        return {
            "format": FORMAT,
            "source": self.source.identity,
            "metadata": self.metadata,
            "activations": texts.hexdigest()[:32],
            "sample": digest_of({"sample": sampled}),
            "explanations": digest_of({str(i): self.explanations[i] for i in sorted(self.explanations)}),
            "files": len(self.blocks),
            "hook_name": self.place.hook_name,
            **settings,
        }

    def write(self, target: Path, sql: bool, progress: bool) -> None:
        for name, line in self.metadata.items():
            write_lines(target / f"{name}.jsonl", [line])
        pending = [i for i in range(len(self.blocks)) if not self._path(target, "features", i).exists()]
        with tqdm(total=len(self.blocks), initial=len(self.blocks) - len(pending), disable=not progress) as bar:
            for i, rows in zip(pending, self.source.read([self.blocks[i] for i in pending]), strict=True):
                self._write_batch(target, i, rows)
                bar.update()
        if sql:
            batches = [
                f"{kind}/{path.name}"
                for kind in ("features", "activations", "explanations")
                for path in (self._path(target, kind, i) for i in range(len(self.blocks)))
                if path.exists()
            ]
            script = import_sql(self.place.creator_id, self.metadata, batches)
            write_bytes(target / "import.sql", script.encode())

    def _write_batch(self, target: Path, i: int, rows: Rows) -> None:
        """The features' file comes last: where it is, the batch is whole."""
        features = rows.features.tolist()
        others: dict[str, Iterator[dict[str, Any]]] = {
            "activations": activation_lines(self.place, features, self.activity),
            "explanations": explanation_lines(self.place, features, self.explanations),
        }
        for kind, lines in others.items():
            if found := list(lines):
                write_lines(self._path(target, kind, i), found)
        similar = empty_lists(features) if self.neighbours is None else self.neighbours.lists(rows.features)
        lines = feature_lines(self.place, rows, self.strings, self.vectors, similar, self.activity)
        write_lines(self._path(target, "features", i), lines)

    def _path(self, target: Path, kind: str, i: int) -> Path:
        return target / kind / f"batch-{i}.jsonl.gz"
