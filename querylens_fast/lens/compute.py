"""Signatures: the tokens of every feature, block by block from the dictionary's file to the writer.

`signatures` is the package's main job. It plans a `Pipeline` (every check happens there, before anything is computed
or written), then streams blocks of features through it, each read from the dictionary's file while the one before it
is computed. In memory the result is one `Signatures`; with ``out=`` blocks go to a Parquet or JSONL file and a killed
run resumes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from querylens_fast.dictionaries.load import load_dictionary
from querylens_fast.dictionaries.prefetch import read_ahead
from querylens_fast.lens.pipeline import Pipeline, Stats, plan
from querylens_fast.lens.presets import Preset
from querylens_fast.lens.results import Signatures, concatenate
from querylens_fast.lens.storage import StoredSignatures, format_of, open_sink
from querylens_fast.models.tokens import Tokens
from querylens_fast.runs import processes as ranks
from querylens_fast.runs.run_lock import held, resumable
from querylens_fast.transport.jacobians import batches
from querylens_fast.transport.transport import Transport

__all__ = ["Pipeline", "Signatures", "plan", "scores_at", "signatures"]

BLOCK_ROWS = 2048
MIN_BLOCK_ROWS, MAX_BLOCK_ROWS = 1 << 8, 1 << 15
BLOCK_BYTES = 1 << 25
"""Of one block's vectors or result; some eight such are held at a time."""


def signatures(
    dictionary: Any,
    model: Any,
    *,
    preset: str | Preset | Sequence[str | None] = "query_lens_value",
    transport: Transport | str | Path | None = None,
    k: int = 25,
    features: Any = None,
    out: str | Path | None = None,
    tokens: Tokens | Tensor | str | Path | None = None,
    tuned_lens: str | Path | None = None,
    stats: Stats = "auto",
    layers: bool = False,
    token_change_value: float = 10.0,
    adaptive_threshold: float = 0.5,
    final_norm: bool = True,
    backend: str = "auto",
    max_memory_gib: float = 2.0,
    vectors: bool = False,
    format: str | None = None,
    token_strings: bool = True,
    block_rows: int | None = None,
    resume: bool = True,
    progress: bool | None = None,
) -> Any:
    """Token signatures of a dictionary's features.

    Args:
        dictionary: From `load_dictionary`, `directions` or `neuron_dictionary` (or what `load_dictionary` takes).
        model: From `load_model` (or what `as_model` takes).
        preset: A name in `PRESETS`, or (feature_vector, stream_transition, readout).
        transport: From `fit_transport` or `load_transport`, or a file. Without one, give ``tokens``: few features are
            then walked one by one, more than d_model features through a transport fitted for the call.
        k: Tokens on each side.
        features: None or "all", a slice, "a:b", or feature ids.
        out: A ``.parquet`` or ``.jsonl`` file to stream to; the run resumes when it was killed.
        tokens: The sample, for token_change, zero_out, ``stats="exact"``, or in place of a transport.
        tuned_lens: The params file, for tuned_lens.
        stats: "auto" gives what comes for free; "rel_var" wants the transport's energies; "exact" all of the
            reference's statistics, by walking each feature; "none".
        layers: For first order: each layer's own tokens and energy too.
        token_change_value: The activation token_change sets.
        adaptive_threshold: See `Adaptive`.
        final_norm: Apply the final norm before W_U (reference ``use_unembed_layer_norm``).
        backend: Of the streamed top-k.
        max_memory_gib: Bound on the working memory of walks.
        vectors: Keep the vectors that are read out in the result.
        format: "parquet" or "jsonl", by default from out's ending.
        token_strings: Write token strings beside ids (needs a tokenizer).
        block_rows: Features a block: what is computed at a time and lost when the run is killed. By default as many
            as keep a block's vectors and its result under 32 MiB each, 32,768 at most; 256 where every feature costs a
            pass through the model.
        resume: Go on from what an earlier, killed run wrote to out; False: refuse to touch it.
        progress: Show a progress bar; by default with ``out``.

    Returns:
        `Signatures`, or with ``out`` a `StoredSignatures`.

    Raises:
        ValueError: Anything that does not fit together, by name; nothing has been written then.
        FileNotFoundError: A missing file.
        FileExistsError: ``out`` holds the result of another run.
        OSError: The disk is full; what was written stays and the run resumes.

    Within `ranks.joined` the blocks of a result are dealt out to the processes, on any number of which it
    resumes; the file is byte for byte that of one process. It has to lie where all of them can write.

    Memory: the model, a bfloat16 copy of its unembedding on processors that multiply in it, and some 0.6 GiB, whatever
    the dictionary's width: it is read a block at a time (token_change and zero_out hold the dictionary and its
    activations on the sample). The disk holds a Parquet result twice while it is finished.
    """
    dictionary = load_dictionary(dictionary)
    chosen = dictionary.select(features)
    show = out is not None if progress is None else progress
    pipeline = plan(
        dictionary,
        model,
        preset=preset,
        transport=transport,
        k=k,
        tokens=tokens,
        tuned_lens=tuned_lens,
        stats=stats,
        layers=layers,
        token_change_value=token_change_value,
        adaptive_threshold=adaptive_threshold,
        final_norm=final_norm,
        backend=backend,
        max_memory_gib=max_memory_gib,
        vectors=vectors,
        n_features=len(chosen),
        progress=show,
    )
    if block_rows is None:
        block_rows = rows_per_block(pipeline)
    if block_rows < 1:
        raise ValueError(f"block_rows is {block_rows}; expected at least 1")
    if out is None:
        with _progress(pipeline, len(chosen), 0, show) as bar:
            parts = []
            for found in _computed(pipeline, list(chosen.split(block_rows))):
                parts.append(found)
                bar.update(len(found))
        return concatenate(parts)
    identity = {
        **pipeline.identity(chosen),
        "dictionary_fingerprint": dictionary.fingerprint,
        "block_rows": block_rows,
    }
    group, format = ranks.current(), format_of(out, format)
    if not len(chosen):
        raise ValueError(f"features={features!r} chooses none of {dictionary.n_features}: nothing to write")
    group.agree("the run", identity)
    with ExitStack() as stack:
        if group.leads:
            stack.enter_context(held(Path(out)))
        with group.in_turn("open"):
            sink = open_sink(out, format, identity, resume=resume, token_strings=token_strings, model=pipeline.model)
        stack.enter_context(resumable(Path(out)))
        if pipeline.tokens is not None and group.leads:
            pipeline.tokens.save(Path(f"{out}.tokens.safetensors"))
        blocks = group.share(list(batches(len(chosen), block_rows)))
        pending = [found for block in blocks if (found := sink.pending(block))]
        total = sum(block.stop - block.start for block in blocks)
        ids = [chosen[torch.tensor(indices)] for indices in pending]
        with _progress(pipeline, total, total - sum(map(len, pending)), show and group.leads) as bar:
            for indices, found in zip(pending, _computed(pipeline, ids), strict=True):
                sink.write(found, indices)
                bar.update(len(found))
                group.check()
        group.wait("written")
        if group.leads:
            sink.finish(len(chosen))
        group.wait("finished")
        return StoredSignatures(Path(out), len(chosen), format)


def _computed(pipeline: Pipeline, blocks: Sequence[Tensor]) -> Iterator[Signatures]:
    """The signatures of each block of feature ids in turn, the next block read meanwhile."""
    side, dictionary = pipeline.preset.feature_vector, pipeline.dictionary
    with read_ahead(dictionary, side, blocks, pipeline.model.device) as ahead:
        reading = replace(pipeline, dictionary=ahead)
        for block in blocks:
            yield replace(reading(block), pipeline=pipeline)


def _progress(pipeline: Pipeline, total: int, n_done: int, show: bool) -> tqdm[Any]:
    label = f"{pipeline.preset.name} layer {pipeline.dictionary.layer}"
    return tqdm(total=total, initial=n_done, desc=label, unit="feature", disable=not show)


def rows_per_block(pipeline: Pipeline) -> int:
    """Features a block: few where each costs a pass through the model, else as many as `BLOCK_BYTES` hold."""
    preset = pipeline.preset
    walks = preset.needs_transport and (pipeline.transport is None or pipeline.stats == "exact")
    if walks or preset.is_ablation:
        return MIN_BLOCK_ROWS
    lists = 1 + (pipeline.model.n_layers if pipeline.layers else 0)
    vectors = pipeline.model.d_model * torch.promote_types(pipeline.model.dtype, torch.float32).itemsize
    n = BLOCK_BYTES // max(vectors, 24 * pipeline.k * lists)
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
