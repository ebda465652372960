"""The dictionaries among result files: which results, samples, scores and relations are of each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from querylens_fast.queries.files import RELATIONS, SAMPLE, SCORES, SIGNATURES, ResultFile
from querylens_fast.queries.views import Side
from querylens_fast.runs.run_record import agree

PREFERRED = (
    *("query_lens_value", "query_lens_key", "query_lens_value_adaptive"),
    *("query_lens_value_approx", "query_lens_key_approx", "tuned_lens", "logit_lens_value", "logit_lens_key"),
)
"""Which preset stands for a side, where there are several."""


@dataclass(frozen=True)
class Member:
    """One layer of one result of `signatures`."""

    file: ResultFile
    layer: int
    several_layers: bool
    label: str
    """The preset's name within its dictionary."""

    @property
    def side(self) -> Side:
        return self.file.identity["feature_vector"]

    @property
    def preset(self) -> str:
        return self.file.identity["preset"]


@dataclass
class Entry:
    """A dictionary and what the results hold of it."""

    slug: str
    name: str
    layer: int
    kind: str
    fingerprint: str | None
    model: str
    model_fingerprint: str
    members: list[Member] = field(default_factory=list)
    sample: ResultFile | None = None
    scores: list[tuple[ResultFile, str]] = field(default_factory=list)
    """Score files with the label that the dictionary has there."""
    relations: list[ResultFile] = field(default_factory=list)

    @property
    def files(self) -> list[ResultFile]:
        """All that the results hold of it."""
        some = [self.sample] if self.sample is not None else []
        return [*(m.file for m in self.members), *some, *(file for file, _ in self.scores), *self.relations]

    @property
    def hook_point(self) -> str | None:
        """Where the dictionary reads and, where that is another place, writes; None in results of earlier versions."""
        for said in (m.file.identity for m in self.members if not m.several_layers):
            if said.get("hook_name"):
                return " → ".join(filter(None, (said["hook_name"], said.get("hook_name_out"))))
        return None

    def member(self, label: str) -> Member:
        """The member of a label. Raises ValueError for an unknown one."""
        for member in self.members:
            if member.label == label:
                return member
        known = ", ".join(m.label for m in self.members) or "none"
        raise ValueError(f"preset is {label!r}; dictionary {self.slug!r} has {known}")

    def preferred(self, side: Side) -> Member | None:
        """The member that stands for a side."""
        own = [m for m in self.members if m.side == side]
        rank = {name: i for i, name in enumerate(PREFERRED)}
        return min(own, key=lambda m: (rank.get(m.preset, len(rank)), m.label), default=None)


def catalog(files: Sequence[ResultFile]) -> list[Entry]:
    """The dictionaries, by layer and name."""
    entries: dict[tuple[Any, ...], Entry] = {}
    for file in files:
        if file.kind == SIGNATURES:
            for entry, member in _members(file, entries):
                entry.members.append(member)
    for file in files:
        if file.kind == SAMPLE:
            _entry(entries, file.identity).sample = file
    found = list(entries.values())
    for file in files:
        if file.kind == SCORES:
            _give_scores(file, found)
        elif file.kind in RELATIONS:
            for entry in found:
                if _is_source(file.identity, entry):
                    entry.relations.append(file)
    for slug, entry in zip(_slugs([e.name for e in found], [e.layer for e in found]), found, strict=True):
        entry.slug = slug
    return sorted(found, key=lambda e: (e.layer, e.slug))


def _members(file: ResultFile, entries: dict[tuple[Any, ...], Entry]) -> Iterable[tuple[Entry, Member]]:
    """The layers of a result, each with its dictionary's entry."""
    identity = file.identity
    several = isinstance(identity["layer"], list)
    for layer in identity["layer"] if several else [identity["layer"]]:
        name = identity["dictionary"]
        if isinstance(name, list):
            name = name[0] if len(name) == 1 else " + ".join(name)
        entry = _entry(entries, {**identity, "dictionary": name, "layer": layer})
        taken = [m.preset for m in entry.members].count(identity["preset"])
        label = identity["preset"] + (f"~{taken + 1}" if taken else "")
        yield entry, Member(file, int(layer), several, label)


def _entry(entries: dict[tuple[Any, ...], Entry], identity: dict[str, Any]) -> Entry:
    """The dictionary's entry, a new one where there is none. Results of several layers carry no fingerprint."""
    fingerprint = identity.get("dictionary_fingerprint")
    layer, name = int(identity["layer"]), str(identity["dictionary"])
    for entry in entries.values():
        known = fingerprint is not None and entry.fingerprint is not None
        same = _agree(entry.fingerprint, fingerprint) if known else entry.name == name
        if same and entry.layer == layer and entry.kind == identity["kind"]:
            entry.fingerprint = entry.fingerprint or fingerprint
            return entry
    entry = Entry(
        "", name, layer, str(identity["kind"]), fingerprint, str(identity["model"]), str(identity["fingerprint"])
    )
    entries[len(entries),] = entry
    return entry


def _give_scores(file: ResultFile, entries: Sequence[Entry]) -> None:
    said = file.identity
    for label, fingerprint in zip(said["dictionaries"], said["fingerprints"], strict=True):
        for entry in entries:
            if _agree(entry.fingerprint, fingerprint):
                entry.scores.append((file, label))


def _is_source(identity: dict[str, Any], entry: Entry) -> bool:
    """Are relations of this dictionary's features in the table?"""
    prints = identity.get("fingerprints")
    if identity["what"] == "neighbours" and prints:
        prints = prints[:1]
    if prints is None:
        prints = [identity.get("dictionary_fingerprint")]
    return any(_agree(entry.fingerprint, fingerprint) for fingerprint in prints)


def _agree(first: str | None, second: str | None) -> bool:
    """Are these fingerprints of one dictionary? Either may be the shorter one that earlier versions recorded."""
    return first is not None and second is not None and (agree(first, second) or agree(second, first))


def _slugs(names: Sequence[str], layers: Sequence[int]) -> list[str]:
    """Short, unique names for URLs: the last part of each name, with the layer or a number where that is not enough."""
    short = [re.sub(r"[^A-Za-z0-9._-]+", "-", Path(name).name).strip("-.")[:80] or "dictionary" for name in names]
    some = [s if short.count(s) == 1 else f"{s}-layer{n}" for s, n in zip(short, layers, strict=True)]
    found: list[str] = []
    for slug in some:
        n = 1
        while (named := slug if n == 1 else f"{slug}-{n}") in found:
            n += 1
        found.append(named)
    return found
