"""Interpretability score: a language model judges how well a signature's tokens support one theme (paper §5.3).

The judge reads "Tokens: a, b, c, …" (25 decoded strings) under a system prompt with a rubric and three worked examples,
and answers raw JSON with Score (0–10), Summary and Explanation. An answer that cannot be read has no score; it is
counted, never guessed. Two ways to ask:

    files     `write_requests` writes batch requests (JSONL, the format of OpenAI's batch interface); `read_answers`
              reads the answers
    a server  `ask` sends them to any server with OpenAI's chat interface, a few at a time; answers are appended to a
              JSONL file as they come, so that a run that stops goes on from there

A request is known by a hash of its token list, so equal signatures are asked about once, in any order of features. This
is an estimate by a sampled judge, for a sample of features. For every feature of a dictionary there is `coherence` in
`scores`: exact, offline, and no judgement of meaning.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib import error, request
from urllib.parse import urlsplit

from tqdm import tqdm

from querylens_fast.models.model import Model
from querylens_fast.runs.atomic_write import output_file, write_whole
from querylens_fast.runs.input_file import fits_memory

DEFAULT_JUDGE = "gpt-5-nano"
"""The reference's."""
TIMEOUT_S = 60.0
MAX_ANSWER_BYTES = 1 << 20
MAX_LINE_BYTES = 1 << 24
SYSTEM_PROMPT = files("querylens_fast.evaluation").joinpath("judge_prompt.txt").read_text(encoding="utf-8").strip()


@dataclass(frozen=True)
class Judgement:
    """A judge's answer on one token list; score None where it could not be read."""

    key: str
    score: float | None
    summary: str
    explanation: str


def prompt_digest() -> str:
    """A digest of the system prompt, for the metadata of results."""
    return hashlib.sha256(SYSTEM_PROMPT.encode()).hexdigest()[:16]


def list_key(tokens: Sequence[str]) -> str:
    """What a token list is known by: a hash of its strings in their order."""
    return hashlib.sha256(json.dumps(list(tokens), ensure_ascii=False).encode()).hexdigest()[:24]


def token_lists(model: Model, signature_ids: Iterable[Sequence[int]]) -> list[list[str]]:
    """The decoded strings of signatures."""
    return [model.str_tokens([int(i) for i in ids]) for ids in signature_ids]


def messages(tokens: Sequence[str]) -> list[dict[str, str]]:
    """The chat that asks about one token list."""
    return [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": "Tokens: " + ", ".join(tokens)},
    ]


def write_requests(
    lists: Sequence[Sequence[str]], path: str | Path, *, judge: str = DEFAULT_JUDGE, queries: int = 1
) -> Path:
    """Write batch requests, one JSON object a line; equal lists once. Returns the path.

    Args:
        lists: Token lists.
        path: The ``.jsonl`` file.
        judge: The judging model's name.
        queries: Times each list is asked about; the median counts.

    Raises:
        ValueError: No lists, an empty list, or queries below 1.
    """
    distinct = _distinct(lists, queries)
    lines = [
        json.dumps(
            {
                "custom_id": f"{key}-{query}",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": {"model": judge, "messages": messages(tokens)},
            },
            ensure_ascii=False,
        )
        for key, tokens in distinct.items()
        for query in range(queries)
    ]
    write_whole(Path(path), "".join(line + "\n" for line in lines))
    return Path(path)


def read_answers(path: str | Path) -> dict[str, Judgement]:
    """Judgements by `list_key`, from a batch answer file or from what `ask` wrote.

    Of several answers on one list the one with the median score counts, the lower of two in the middle.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A line that is no answer (named by its number), or no line at all.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"answer file {str(path)!r} does not exist")
    found: dict[str, list[Judgement]] = {}
    with open(path, "rb") as file:
        for number, data in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b""), 1):
            if len(data) == MAX_LINE_BYTES:
                raise ValueError(f"{str(path)!r} line {number} is too long for an answer of a judge")
            line = data.decode(errors="replace")
            if not line.strip():
                continue
            try:
                answer = json.loads(line)
                key = str(answer["custom_id"]).rpartition("-")[0]
            except (ValueError, KeyError, TypeError, RecursionError) as problem:
                if not line.endswith("\n"):
                    break  # the last line of a run that was killed while writing
                raise ValueError(f"{str(path)!r} line {number} is no answer of a judge ({problem})") from problem
            found.setdefault(key, []).append(parse_answer(key, _content(answer)))
    if not found:
        raise ValueError(f"answer file {str(path)!r} holds no answers; submit the requests, or ask with base_url")
    return {key: median_judgement(several) for key, several in found.items()}


def parse_answer(key: str, content: str) -> Judgement:
    """A judgement from the text that a judge answered; score None where it holds no object with a Score of 0 to 10."""
    start, end = content.find("{"), content.rfind("}")
    try:
        found = json.loads(content[start : end + 1])
        score = float(found["Score"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return Judgement(key, None, "", content[:500])
    if isinstance(found["Score"], bool) or not 0 <= score <= 10:
        return Judgement(key, None, "", content[:500])
    return Judgement(key, score, str(found.get("Summary", "")), str(found.get("Explanation", "")))


def median_judgement(several: Sequence[Judgement]) -> Judgement:
    """The answer with the median score, the lower of two in the middle; one without a score where none has one."""
    scored = [j for j in several if j.score is not None]
    if not scored:
        return several[0]
    ordered = sorted(scored, key=lambda j: j.score or 0.0)
    return ordered[(len(ordered) - 1) // 2]


def ask(
    lists: Sequence[Sequence[str]],
    base_url: str,
    answers: str | Path,
    *,
    judge: str = DEFAULT_JUDGE,
    api_key: str | None = None,
    queries: int = 1,
    at_once: int = 4,
    timeout_s: float = TIMEOUT_S,
    progress: bool = True,
) -> dict[str, Judgement]:
    """Ask a server with OpenAI's chat interface about token lists; answers are kept in a file as they come.

    Args:
        lists: Token lists.
        base_url: Of the server, up to ``/v1``, e.g. "http://127.0.0.1:8000/v1".
        answers: A ``.jsonl`` file; lists that it has answers on are not asked about again.
        judge: The judging model's name.
        api_key: Sent as a bearer token.
        queries: Times each list is asked about.
        at_once: Requests under way at a time.
        timeout_s: Of one request.
        progress: Show a progress bar.

    Raises:
        ValueError: No lists, a base_url that is no http address, or a file of anything but this judge's answers.
        OSError: The server cannot be reached, times out or answers with an error; the answers so far are kept, and the
            same call goes on from there.
    """
    if urlsplit(base_url).scheme not in ("http", "https") or re.search(r"[\s\x00-\x1f\x7f]", base_url):
        raise ValueError(f"base_url is {base_url!r}; expected an http address like 'http://127.0.0.1:8000/v1'")
    distinct, answers = _distinct(lists, queries), Path(answers)
    done = _answered(answers, judge)
    waiting = [
        (f"{key}-{query}", tokens)
        for key, tokens in distinct.items()
        for query in range(queries)
        if f"{key}-{query}" not in done
    ]
    answers.parent.mkdir(parents=True, exist_ok=True)

    def one(item: tuple[str, Sequence[str]]) -> str:
        body = {"model": judge, "messages": messages(item[1])}
        answer = {"body": _post(base_url, body, api_key, timeout_s)}
        return json.dumps({"custom_id": item[0], "judge": judge, "response": answer})

    total = len(distinct) * queries
    with (
        tqdm(total=total, initial=total - len(waiting), desc="judge", unit="list", disable=not progress) as bar,
        ThreadPoolExecutor(max(1, at_once)) as pool,
        open(answers, "a", encoding="utf-8") as file,
    ):
        for start in range(0, len(waiting), max(1, at_once)):
            # A few at a time: what fails stops the run with no more than those under way lost.
            for line in pool.map(one, waiting[start : start + max(1, at_once)]):
                file.write(line + "\n")
                file.flush()
                bar.update()
    found = read_answers(answers)
    return {key: found[key] for key in distinct}


def _answered(answers: Path, judge: str) -> set[str]:
    """The custom_ids of the whole lines of an answer file; a half-written last line is cut off."""
    if not answers.exists():
        return set()
    output_file(answers)
    with fits_memory(answers):
        text = answers.read_bytes()
    whole, half = text[: text.rfind(b"\n") + 1], text[text.rfind(b"\n") + 1 :]
    found = set()
    try:
        for line in filter(bytes.strip, whole.splitlines()):
            row = json.loads(line)
            found.add(str(row["custom_id"]))
            if row.get("judge", judge) != judge:
                raise ValueError(f"answers of the judge {row['judge']!r}")
        if not half.startswith(_BEGINNING[: len(half)]):
            raise ValueError("text at its end")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as problem:
        raise ValueError(
            f"{str(answers)!r} holds something else than answers of {judge!r} ({problem}), so it is left alone; choose "
            "another file"
        ) from problem
    if half:
        answers.write_bytes(whole)
    return found


def _post(base_url: str, body: dict[str, Any], api_key: str | None, timeout_s: float) -> dict[str, Any]:
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {api_key}"} if api_key else {})}
    url = base_url.rstrip("/") + "/chat/completions"
    asked = request.Request(url, json.dumps(body).encode(), headers)
    try:
        with request.urlopen(asked, timeout=timeout_s) as response:
            found = json.loads(_body(response, timeout_s))
    except error.HTTPError as problem:
        detail = " ".join(problem.read(500).decode(errors="replace").split())
        raise OSError(f"the judge at {url} answered {problem.code}: {detail}; {_KEPT}") from problem
    except (OSError, HTTPException, ValueError, RecursionError) as problem:
        raise OSError(f"the judge at {url} could not be asked ({problem}); {_KEPT}") from problem
    return found if isinstance(found, dict) else {"error": str(found)[:200]}


def _body(response: HTTPResponse, timeout_s: float) -> bytes:
    """The bytes of an answer, which has to be whole in time: a socket's own limit begins anew with each byte."""
    limit, body = time.monotonic() + timeout_s, b""
    while (part := response.read1(1 << 16)) and len(body) <= MAX_ANSWER_BYTES:
        body += part
        if time.monotonic() > limit:
            raise TimeoutError("timed out: the answer does not end")
    return body


_BEGINNING = b'{"custom_id": "'
"""Of each line that `ask` writes."""
_KEPT = "answers so far are kept, run the same call again to go on from there"


def _content(answer: dict[str, Any]) -> str:
    """The text of a batch answer or of `ask`'s line; "" where there is none."""
    try:
        return str(answer["response"]["body"]["choices"][0]["message"]["content"] or "")
    except (KeyError, IndexError, TypeError):
        return ""


def _distinct(lists: Sequence[Sequence[str]], queries: int) -> dict[str, Sequence[str]]:
    if not lists or not all(len(tokens) for tokens in lists):
        raise ValueError(f"lists holds {len(lists)} token lists, some empty or none at all; expected tokens to judge")
    if queries < 1:
        raise ValueError(f"queries is {queries}; expected at least 1")
    return {list_key(tokens): tokens for tokens in lists}
