"""The judge: requests, answers that are and are not JSON, and a real local HTTP server of a transformers model."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from querylens_fast.demo.showcase import load_example
from querylens_fast.evaluation.generation import continuation, plain_logits
from querylens_fast.evaluation.judge import (
    Judgement,
    ask,
    list_key,
    median_judgement,
    parse_answer,
    read_answers,
    write_requests,
)

LISTS = [[" river", " lake"], [" walked", "ran"], [" river", " lake"]]
GOOD = '{"Score": 7, "Summary": "water", "Explanation": "both"}'


class Handler(BaseHTTPRequestHandler):
    """Answers chats with what the embedded model writes after the prompt, or as ``mode`` says."""

    mode = "json"
    asked: list[str] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/chat/completions" and body["messages"][0]["role"] == "system"
        prompt = body["messages"][1]["content"]
        type(self).asked.append(prompt)
        if self.mode == "slow":
            time.sleep(0.5)
        if self.mode == "no HTTP":
            self.wfile.write(b"SSH-2.0-OpenSSH\r\n")
            return
        if self.mode == "endless":
            self.send_response(200)
            self.end_headers()
            with suppress(OSError):
                while True:
                    self.wfile.write(b" ")
                    time.sleep(0.02)
        if self.mode == "error" or (self.mode == "second fails" and len(self.asked) > 1):
            self.send_error(503, "overloaded")
            return
        if self.mode == "model":
            model = load_example().model
            ids = model.tokenizer(prompt, return_tensors="pt")["input_ids"]
            text = model.tokenizer.decode(continuation(model, ids, 5, plain_logits(model))[0])
        else:
            text = GOOD
        content = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Handler.mode, Handler.asked = "json", []
    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}/v1"
    running.shutdown()
    running.server_close()


def test_requests_and_batch_answers(tmp_path: Path) -> None:
    path = write_requests(LISTS, tmp_path / "requests.jsonl", judge="some-judge", queries=3)
    requests = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(requests) == 6, "equal lists are asked about once"
    assert {r["body"]["model"] for r in requests} == {"some-judge"}
    assert requests[0]["body"]["messages"][1]["content"] == "Tokens:  river,  lake"
    answers = tmp_path / "answers.jsonl"
    scores = {requests[i]["custom_id"]: score for i, score in enumerate((9, 2, 4))}
    lines = [
        {"custom_id": key, "response": {"body": {"choices": [{"message": {"content": f'```{{"Score": {score}}}```'}}]}}}
        for key, score in scores.items()
    ]
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read_answers(answers)
    assert found[list_key(LISTS[0])].score == 4 and len(found) == 1


@pytest.mark.parametrize(
    "content",
    [
        "",
        "I cannot say",
        '{"Score": 11}',
        '{"Score": "high"}',
        '{"Score": true}',
        "[1]",
        '{"score": 3}',
        '{"a":' * 9999 + "}",
    ],
)
def test_answers_that_cannot_be_read_have_no_score(content: str) -> None:
    assert parse_answer("k", content).score is None


def test_median_of_an_even_number_is_the_lower() -> None:
    several = [Judgement("k", score, str(score), "") for score in (8.0, None, 2.0, 6.0, 4.0)]
    assert median_judgement(several).score == 4.0
    assert median_judgement([Judgement("k", None, "", "")]).score is None


def test_a_server_is_asked_and_answers_are_kept(server: str, tmp_path: Path) -> None:
    found = ask(LISTS, server, tmp_path / "answers.jsonl", progress=False)
    assert {j.score for j in found.values()} == {7.0} and len(Handler.asked) == 2
    assert ask(LISTS, server, tmp_path / "answers.jsonl", progress=False) == found and len(Handler.asked) == 2


def test_a_broken_run_goes_on(server: str, tmp_path: Path) -> None:
    Handler.mode = "second fails"
    answers = tmp_path / "answers.jsonl"
    with pytest.raises(OSError, match="answered 503: .*answers so far are kept"):
        ask(LISTS, server, answers, at_once=1, progress=False)
    with open(answers, "a") as file:
        file.write('{"custom_id": "half')
    Handler.mode = "json"
    found = ask(LISTS, server, answers, progress=False)
    assert {j.score for j in found.values()} == {7.0}
    assert len(answers.read_text().splitlines()) == 2


def test_a_server_that_times_out(server: str, tmp_path: Path) -> None:
    Handler.mode = "slow"
    with pytest.raises(OSError, match="could not be asked .*timed out.*; answers so far are kept"):
        ask(LISTS, server, tmp_path / "answers.jsonl", timeout_s=0.1, progress=False)
    Handler.mode = "json"
    assert {j.score for j in ask(LISTS, server, tmp_path / "answers.jsonl", progress=False).values()} == {7.0}


@pytest.mark.parametrize(("mode", "said"), [("no HTTP", "SSH-2.0"), ("endless", "timed out: the answer does not end")])
def test_a_server_that_is_none(mode: str, said: str, server: str, tmp_path: Path) -> None:
    Handler.mode = mode
    with pytest.raises(OSError, match=f"could not be asked .*{said}"):
        ask(LISTS[:1], server, tmp_path / "answers.jsonl", timeout_s=0.2, progress=False)


def test_a_small_model_talks_nonsense(server: str, tmp_path: Path) -> None:
    Handler.mode = "model"
    found = ask(LISTS[:1], server, tmp_path / "answers.jsonl", progress=False)
    assert [j.score for j in found.values()] == [None]


def test_mistakes(server: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="base_url is 'ftp://x'"):
        ask(LISTS, "ftp://x", tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="expected an http address"):
        ask(LISTS, "http://a b/v1\r\nX: y", tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="some empty or none at all"):
        write_requests([], tmp_path / "r.jsonl")
    with pytest.raises(OSError, match="could not be asked"):
        ask(LISTS, "http://127.0.0.1:9/v1", tmp_path / "a.jsonl", timeout_s=2, progress=False)
    (tmp_path / "bad.jsonl").write_text("no json\n")
    with pytest.raises(ValueError, match="line 1 is no answer"):
        read_answers(tmp_path / "bad.jsonl")
    (tmp_path / "bad.jsonl").write_text("[" * 9999 + "\n")
    with pytest.raises(ValueError, match="line 1 is no answer"):
        read_answers(tmp_path / "bad.jsonl")


@pytest.mark.parametrize(
    "text", ["my notes, without a line end", "my notes\n", '{"custom_id": "x-0", "judge": "another"}\n']
)
def test_a_file_of_something_else_is_left_alone(server: str, tmp_path: Path, text: str) -> None:
    (tmp_path / "notes.txt").write_text(text)
    with pytest.raises(ValueError, match="notes.txt' holds something else than answers of"):
        ask(LISTS, server, tmp_path / "notes.txt", progress=False)
    assert (tmp_path / "notes.txt").read_text() == text
