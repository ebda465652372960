"""What there is: dictionaries with their results, and runs that are not finished."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from querylens_fast.queries.catalog import Member
from querylens_fast.queries.files import SIGNATURES, ResultFile
from querylens_fast.queries.inventory import DictionaryInfo, PresetInfo, Progress
from querylens_fast.queries.opened import OpenDictionary
from querylens_fast.runs.run_record import DamagedFile
from querylens_fast.runs.sealed_parquet import opened

DETAILS = (
    *("model", "convention", "dtype", "final_norm", "stats", "adaptive_threshold", "token_change_value"),
    *("submodule", "through_norms", "unit_norm", "unembedding", "tuned_lens"),
)
TRANSPORT_DETAILS = ("tokens", "n_valid", "n_sequences", "energy", "groups", "linearisation")


def dictionary(found: OpenDictionary) -> DictionaryInfo:
    """A dictionary as the overview shows it."""
    entry, scores = found.entry, found.scores
    sample = None if entry.sample is None else str(entry.sample.identity.get("tokens"))
    relations = dict.fromkeys(str(file.identity["what"]) for file in entry.relations)
    return DictionaryInfo(
        slug=entry.slug,
        name=entry.name,
        layer=entry.layer,
        kind=entry.kind,
        n_features=len(found.features) if entry.members else _sample_size(found),
        hook_point=entry.hook_point,
        model=entry.model,
        presets=tuple(preset(found, member) for member in entry.members),
        fields=found.fields(),
        score_methods=() if scores is None else scores.methods,
        mean_scores={} if scores is None else found.once("means", scores.means),
        sample=sample,
        relations=tuple(relations),
        rel_var=_means(found, "rel_var"),
        stable_k=_means(found, "stable_k"),
    )


def _means(found: OpenDictionary, name: str) -> dict[str, float]:
    """The mean of a statistic in each result that has it, by label."""
    means = {member.label: found.mean(name, member) for member in found.entry.members}
    return {label: mean for label, mean in means.items() if mean is not None}


def preset(found: OpenDictionary, member: Member) -> PresetInfo:
    """One result of `signatures`."""
    rows, said = found.rows_of(member), member.file.identity
    return PresetInfo(
        preset=member.label,
        name=member.preset,
        side=member.side,
        transition=said["stream_transition"],
        readout=said["readout"],
        k=int(said["k"]),
        n_features=len(rows),
        statistics=rows.statistics,
        has_errors=rows.has("top_se"),
        has_layer_terms=rows.has("layer_indices"),
        file=str(member.file.path),
        indexed=rows.indexed,
        details=_details(said),
    )


def progress(file: ResultFile) -> Progress:
    """How far a run is that has written parts."""
    parts = file.parts
    done, changed = 0, 0.0
    for part in parts:
        try:
            with opened(part) as parquet:
                done += parquet.metadata.num_rows
            changed = max(changed, part.stat().st_mtime)
        except (DamagedFile, FileNotFoundError):  # it was joined or is damaged; the run's next step says so
            continue
    said = file.identity
    signatures = file.kind == SIGNATURES
    layer, name = said.get("layer"), said.get("dictionary") or said.get("dictionaries") or ""
    return Progress(
        file=str(file.path),
        what=said["preset"] if signatures else said["what"],
        dictionary=" + ".join(map(str, name)) if isinstance(name, list) else str(name),
        layer=layer if isinstance(layer, int) else None,
        done=done if signatures else len(parts),
        total=said.get("n_features") if signatures else said.get("blocks"),
        running=_is_locked(file.path.with_name(file.path.name + ".lock")),
        changed=changed,
    )


def _details(said: dict[str, Any]) -> dict[str, str]:
    found = {name: str(said[name]) for name in DETAILS if said.get(name) is not None}
    transport = said.get("transport")
    if isinstance(transport, dict):
        own = {name: transport[name] for name in TRANSPORT_DETAILS if name in transport}
        found |= {f"transport {name}": str(value) for name, value in own.items()}
    return found


def _sample_size(found: OpenDictionary) -> int:
    return 0 if found.sample is None else len(found.sample.features)


def _is_locked(lock: Path) -> bool:
    """Does a process hold the lock? Asked of the system's list, as trying it could keep a run from starting."""
    try:
        inode = os.stat(lock).st_ino
        held = Path("/proc/locks").read_text(encoding="ascii").split()
    except FileNotFoundError:
        return lock.exists()
    return any(word.endswith(f":{inode}") for word in held)
