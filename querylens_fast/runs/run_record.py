"""What run a result is of: a JSON file beside rows that are not finished, with a digest of its own contents."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from querylens_fast.runs.atomic_write import write_whole

_DIGEST = "sha256"
DESCRIBING = ("hook_name", "hook_name_out")
"""Keys of an identity that earlier versions did not record, of what other keys tell apart: the dictionary's digest."""
_FINGERPRINT = re.compile("[0-9a-f]{32}-[0-9a-f]{32}")


class DamagedFile(ValueError):
    """A file's bytes are not those that were written."""


def digest_of(identity: Any) -> str:
    """32 hexadecimal digits of a run's identity (JSON values)."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def write_record(path: Path, identity: dict[str, Any]) -> None:
    """Write a run's identity and its digest, whole or not at all."""
    write_whole(path, json.dumps({**identity, _DIGEST: digest_of(identity)}, indent=1))


def read_record(path: Path) -> tuple[dict[str, Any], bool]:
    """(A run's identity, was it written with its digest); records of earlier versions have none.

    Raises:
        DamagedFile: There is none, or it is not what was written.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedFile(f"{str(path)!r} is missing or damaged: {error}") from error
    if not isinstance(found, dict) or not found:
        raise DamagedFile(f"{str(path)!r} is damaged: it holds no run's identity")
    digest = found.pop(_DIGEST, None)
    if digest not in (None, digest_of(found)):
        raise DamagedFile(f"{str(path)!r} is damaged: its digest is not that of its contents")
    return found, digest is not None


def agree(earlier: Any, now: Any) -> bool:
    """Whether two values of identities are the same, a dictionary's fingerprint of an earlier version included.

    Earlier versions recorded the first 32 of a fingerprint's digits alone.
    """
    if isinstance(earlier, list) and isinstance(now, list):
        return len(earlier) == len(now) and all(map(agree, earlier, now))
    if isinstance(earlier, dict) and isinstance(now, dict):
        return earlier.keys() == now.keys() and all(agree(earlier[k], now[k]) for k in earlier)
    if earlier == now:
        return True
    texts = isinstance(earlier, str) and isinstance(now, str)
    return texts and bool(_FINGERPRINT.fullmatch(now)) and earlier == now[:32]


def differences(earlier: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The keys by which two identities are those of different runs."""
    keys = (earlier.keys() | now.keys()) - {key for key in DESCRIBING if key not in earlier}
    return sorted(key for key in keys if not agree(earlier.get(key), now.get(key)))


def refuse_others(there: Path, earlier: dict[str, Any], identity: dict[str, Any], resume: bool) -> None:
    """Raise FileExistsError unless what lies ``there`` is of this run and may be gone on with."""
    if not resume:
        raise FileExistsError(f"{str(there)!r} exists already; delete it, choose another out, or use resume=True")
    if changed := differences(earlier, identity):
        raise FileExistsError(
            f"{str(there)!r} holds the result of another run (different: {', '.join(changed)}); delete it or choose "
            "another out"
        )
