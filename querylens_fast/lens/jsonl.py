"""Signatures as JSON lines, in the reference's row format.

Rows are appended a block at a time, and a half-written last line is cut off when the run resumes. Beside the file lies
the identity of its run, ``<out>.run.json``; a file of another run is refused, never mixed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from querylens_fast.lens.results import Signatures
from querylens_fast.models.model import Model
from querylens_fast.runs.atomic_write import output_file, remove_leftovers, write_whole
from querylens_fast.runs.part_writer import changed_keys


class JsonlSink:
    """One JSON object a line; resumes by feature_index."""

    def __init__(self, path: Path, identity: dict[str, Any], resume: bool, token_strings: bool, model: Model) -> None:
        self.path, self._out = path, output_file(path)
        self.identity = json.loads(json.dumps(identity))
        self._out.parent.mkdir(parents=True, exist_ok=True)
        self._refuse_others(resume)
        self.done = _mend(self._out)
        write_whole(identity_path(self._out), json.dumps(self.identity, indent=1))

    def pending(self, block: slice) -> Sequence[int]:
        return [i for i in range(block.start, block.stop) if i not in self.done]

    def write(self, found: Signatures, indices: Sequence[int], names: Sequence[str] | None = None) -> None:
        names = names or [feature_name(found, f) for f in found.features.tolist()]
        lines = [
            json.dumps({"feature_index": index, "feature_str": name, **row}, ensure_ascii=False)
            for index, name, row in zip(indices, names, found.rows(), strict=True)
        ]
        with open(self._out, "a", encoding="utf-8") as file:
            file.write("".join(line + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
        self.done.update(indices)

    def finish(self, n_features: int) -> None:
        remove_leftovers(self._out)
        remove_leftovers(identity_path(self._out))

    def _refuse_others(self, resume: bool) -> None:
        if not self._out.exists() or self._out.stat().st_size == 0:
            return
        record = identity_path(self._out)
        if not record.is_file():
            raise FileExistsError(
                f"{str(self.path)!r} has no .run.json beside it that says what it is a result of, so it is left alone; "
                "choose another out"
            )
        if not resume:
            raise FileExistsError(
                f"{str(self.path)!r} exists already; delete it, choose another out, or use resume=True"
            )
        earlier = read_jsonl_identity(self._out)
        if earlier != self.identity:
            raise FileExistsError(
                f"{str(self.path)!r} holds the result of another run (different: "
                f"{', '.join(changed_keys(earlier, self.identity))}); delete it or choose another out"
            )


def feature_name(found: Signatures, feature: int) -> str:
    """The reference's feature_str, "Feature type-size/layer/feature"."""
    return found.source.feature_name(feature)


def identity_path(path: Path) -> Path:
    return path.with_name(path.name + ".run.json")


def read_jsonl_identity(path: Path) -> dict[str, Any]:
    """What a JSONL result is a result of; raises ValueError where nothing beside it says so."""
    record = identity_path(path)
    record = record if record.is_file() else identity_path(output_file(path))
    if not record.is_file():
        raise ValueError(f"{str(path)!r} has no .run.json beside it that says what it is a result of")
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(record)!r} is damaged: {error}; restore it, or delete it and {str(path)!r}") from error
    if not isinstance(found, dict):
        raise ValueError(
            f"{str(record)!r} is damaged: it holds no run's identity; restore it, or delete it and its result"
        )
    return found


def _mend(path: Path) -> set[int]:
    """The feature_index of every whole row; a half-written last line is cut off."""
    if not path.exists():
        return set()
    done, end = set(), 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                done.add(int(json.loads(line)["feature_index"]))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{str(path)!r} line {number} is no result row ({error}); mend or delete the file"
                ) from error
            end += len(line)
    with open(path, "r+b") as file:
        file.truncate(end)
    return done


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a result file."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]
