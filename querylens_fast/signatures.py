"""Signatures: the tokens of every feature, block by block from the dictionary's file to the writer.

`signatures` is the package's main job. It plans a `Pipeline` (every check happens there, before anything is computed
or written), then streams blocks of features through it. In memory the result is one `Signatures`; with ``out=`` blocks
go to a Parquet or JSONL file and a killed run resumes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from querylens_fast.pipeline import Pipeline, Stats, plan
from querylens_fast.presets import Preset
from querylens_fast.results import Signatures, concatenate
from querylens_fast.sources import load_dictionary
from querylens_fast.store import open_sink
from querylens_fast.tokens import Tokens
from querylens_fast.transport import Transport
from querylens_fast.walks import batches

__all__ = ["Pipeline", "Signatures", "plan", "scores_at", "signatures"]

BLOCK_ROWS = 2048


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
    block_rows: int = BLOCK_ROWS,
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
        block_rows: Features a block.
        resume: Go on from what an earlier, killed run wrote to out; False: refuse to touch it.
        progress: Show a progress bar; by default with ``out``.

    Returns:
        `Signatures`, or with ``out`` a `StoredSignatures`.

    Raises:
        ValueError: Anything that does not fit together, by name; nothing has been written then.
        FileNotFoundError: A missing file.
        FileExistsError: ``out`` holds the result of another run.
        OSError: The disk is full; what was written stays and the run resumes.
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
    if block_rows < 1:
        raise ValueError(f"block_rows is {block_rows}; expected at least 1")
    label = f"{pipeline.preset.name} layer {dictionary.layer}"
    if out is None:
        with tqdm(total=len(chosen), desc=label, unit="feature", disable=not show) as bar:
            parts = []
            for block in batches(len(chosen), block_rows):
                parts.append(pipeline(chosen[block]))
                bar.update(len(parts[-1]))
        return concatenate(parts) if parts else pipeline(chosen)
    identity = {**pipeline.identity(chosen), "block_rows": block_rows}
    with open_sink(out, format, identity, resume=resume, token_strings=token_strings, model=pipeline.model) as sink:
        if pipeline.tokens is not None:
            pipeline.tokens.save(Path(f"{out}.tokens.safetensors"))
        with tqdm(total=len(chosen), desc=label, unit="feature", disable=not show) as bar:
            for block in batches(len(chosen), block_rows):
                pending = sink.pending(block)
                if pending:
                    sink.write(pipeline(chosen[pending]), pending)
                bar.update(block.stop - block.start)
        return sink.finish(len(chosen))


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
