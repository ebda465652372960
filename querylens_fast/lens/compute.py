"""`signatures`: the tokens of every feature of a dictionary. `scores_at`: given tokens of given features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from querylens_fast.dictionaries.load import load_dictionary
from querylens_fast.lens.options import LensOptions, takes
from querylens_fast.lens.pipeline import Pipeline
from querylens_fast.lens.planning import plan
from querylens_fast.lens.results import Signatures, concatenate
from querylens_fast.lens.stream import Batch, computed, progress_bar, write

__all__ = ["Pipeline", "Signatures", "plan", "scores_at", "signatures"]

MIN_BLOCK_ROWS, MAX_BLOCK_ROWS = 1 << 8, 1 << 15
BLOCK_BYTES = 1 << 25
"""Of one block's vectors or result, with ``out``; about eight of them are in memory at a time. The sizes that follow
from it are part of a run's identity."""
IN_MEMORY = 4
"""How many times larger blocks are without ``out``: one large product is faster than several small ones."""


@takes(LensOptions)
def signatures(dictionary: Any, model: Any, **options: Any) -> Any:
    """Token signatures of a dictionary's features.

    Everything is checked before anything is computed or written.

    Args:
        dictionary: From `load_dictionary`, `directions` or `neuron_dictionary` (or what `load_dictionary` takes).
        model: From `load_model` (or what `as_model` takes).
        **options: The fields of `LensOptions`.

    Returns:
        `Signatures`, or with ``out`` a `StoredSignatures`.

    Raises:
        ValueError: Options, files or shapes that do not fit together, by name.
        FileNotFoundError: A missing file.
        FileExistsError: ``out`` holds the result of another run.
        OSError: The disk is full; what was written stays and the run resumes.

    Within `processes.joined` the blocks of a result are shared among the processes, on any number of which the run
    resumes; the file is byte for byte that of one process. It has to lie where all of them can write.

    Memory: the model, a bfloat16 copy of its unembedding on processors that multiply in it, and about 0.6 GiB, whatever
    the dictionary's width: it is read a block at a time (token_change and zero_out hold the dictionary and its
    activations on the sample). The disk holds a Parquet result twice while it is finished.
    """
    dictionary, given = load_dictionary(dictionary), LensOptions.of(options)
    chosen = dictionary.select(given.features)
    pipeline = plan(dictionary, model, given, n_features=len(chosen))
    block_rows = given.block_rows or rows_per_block(pipeline)
    if given.out is None:
        parts = []
        with progress_bar(pipeline, len(chosen), 0, bool(given.progress)) as bar:
            for found in computed(pipeline, chosen.split(block_rows)):
                parts.append(found)
                bar.update(len(found))
        return concatenate(parts)
    if not len(chosen):
        raise ValueError(
            f"features={given.features!r} chooses none of {dictionary.n_features} of {dictionary.name!r}: nothing to "
            "write"
        )
    identity = {
        **pipeline.identity(chosen),
        "dictionary_fingerprint": dictionary.fingerprint,
        "block_rows": block_rows,
    }
    dictionary.check_finite(pipeline.preset.feature_vector, chosen)

    def save_tokens() -> None:
        if pipeline.tokens is not None:
            pipeline.tokens.save(Path(f"{given.out}.tokens.safetensors"))

    batch = Batch(pipeline, chosen)
    return write([batch], given.out, identity, given, block_rows=block_rows, beside=save_tokens)


def rows_per_block(pipeline: Pipeline) -> int:
    """Features a block: few where each costs a pass through the model, else as many as `BLOCK_BYTES` hold."""
    if pipeline.transition.costs_passes:
        return MIN_BLOCK_ROWS
    lists = 1 + (pipeline.model.n_layers if pipeline.options.layers else 0)
    vectors = pipeline.model.d_model * torch.promote_types(pipeline.model.dtype, torch.float32).itemsize
    limit = BLOCK_BYTES if pipeline.options.out is not None else IN_MEMORY * BLOCK_BYTES
    n = limit // max(vectors, 24 * pipeline.options.k * lists + 8 * pipeline.options.histogram)
    return max(MIN_BLOCK_ROWS, min(MAX_BLOCK_ROWS, 1 << (n.bit_length() - 1)))


def scores_at(dictionary: Any, model: Any, features: Any, token_ids: Tensor | Sequence[int], **options: Any) -> Tensor:
    """Scores of given tokens for given features, [n, m], beside the top-k that `signatures` gives.

    Args:
        dictionary: As in `signatures`.
        model: As in `signatures`.
        features: As in `signatures`.
        token_ids: [m], or [n, m] for other tokens for each feature.
        **options: preset, transport, tokens, tuned_lens, … as in `signatures`.
    """
    dictionary = load_dictionary(dictionary)
    chosen = dictionary.select(features)
    return plan(dictionary, model, n_features=len(chosen), **options).scores_at(chosen, token_ids)
