"""The OpenAI-compatible judge against a loopback server that fails in every way a server can."""

from __future__ import annotations

import asyncio
import http.server
import json
import logging
import math
import os
import pickle
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlm_itl.core.checks import ConfigError, JudgeError
from vlm_itl.data.labels import LabelSpace
from vlm_itl.vlm.cache import CachedHandler, query_key
from vlm_itl.vlm.exchange import PRICES, price_of, yes_share
from vlm_itl.vlm.handler import HANDLERS, Judgement, JudgeQuery, JudgeStopped, make_handler, remedy
from vlm_itl.vlm.server import OpenAIHandler

pytest.importorskip("openai")
pytestmark = [
    pytest.mark.filterwarnings("ignore:judge 'openai':RuntimeWarning"),  # what was lost is said
    pytest.mark.usefixtures("undrawn"),
]

VOC = LabelSpace.voc()
MASK = np.zeros((6, 6), np.uint8)
MASK[:3] = 8
IMAGE = Image.new("RGB", (6, 6), (90, 120, 150))
KEY = "sk-planted-0123456789abcdef"
OK = 200


def ask(i: int, **fields: Any) -> JudgeQuery:
    return JudgeQuery(
        f"im{i}", fields.pop("image", IMAGE), fields.pop("mask", MASK), question=f"Q{i}: right? yes or no", labels=VOC
    )


def reply(
    text: str | None = "Yes", p: float = 0.7, wish: dict[str, Any] | None = None, **changes: Any
) -> dict[str, Any]:
    """A chat completion; log-probabilities where the request asks for them."""
    word = "Yes" if text is None else text.split()[0].strip(",.") if text else ""
    other = "No" if word.lower() == "yes" else "Yes"
    top = [{"token": t, "logprob": math.log(q), "bytes": None} for t, q in ((word, p), (other, 0.9 - p))]
    asked = wish is not None and wish.get("logprobs")
    message = {"role": "assistant", "content": text, "refusal": changes.pop("refusal", None)}
    choice = {
        "index": 0,
        "finish_reason": changes.pop("finish_reason", "stop"),
        "message": message,
        "logprobs": {"content": [{**top[0], "top_logprobs": top}]} if asked else None,
    }
    count = changes.pop("count", 1)
    usage = {"prompt_tokens": 100, "completion_tokens": count, "total_tokens": 100 + count}
    body = {"id": "1", "object": "chat.completion", "created": 0, "model": "toy-1", "usage": usage}
    return {**body, "choices": [{**choice, "index": k} for k in range(count)], **changes}


class Server(http.server.ThreadingHTTPServer):
    """Answers with `script(i, attempt, wish) -> (status, body, headers)`, (0, s) being silence; counts."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, script: Callable[[int, int, dict[str, Any]], tuple[Any, ...]]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script = script
        self.lock = threading.Lock()
        self.attempts: Counter[int] = Counter()
        self.wishes: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.now = self.most = 0
        self.times: list[float] = []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, *parts: Any) -> None:
        """A client that gave up is no news."""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def log_message(self, *parts: Any) -> None:
        """Quiet."""

    def do_POST(self) -> None:
        wish = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = wish["messages"][-1]["content"]
        assert content[0]["image_url"]["url"].startswith("data:image/png;base64,")
        match = re.search(r"\bQ(\d+):", content[1]["text"])
        number = int(match[1]) if match else -1
        server = self.server
        with server.lock:
            server.times.append(time.monotonic())
            server.wishes.append(wish)
            server.keys.add(self.headers["Authorization"])
            server.attempts[number] += 1
            attempt = server.attempts[number]
            server.now += 1
            server.most = max(server.most, server.now)
        try:
            status, body, *more = server.script(number, attempt, wish)
            time.sleep(0.01)
        finally:
            with server.lock:
                server.now -= 1
        if status == 0:  # silence; the client gives up before
            time.sleep(body)
            self.close_connection = True
            return
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(more[0] if more else {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(script: Callable[[int, int, dict[str, Any]], tuple[Any, ...]]) -> Server:
        server = Server(script)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def judge_at(server: Server, **options: Any) -> OpenAIHandler:
    handler = make_handler("openai", **{"model": "toy", "base_url": server.url, **options})
    assert isinstance(handler, OpenAIHandler)
    return handler


def failing(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "t", "param": None, "code": None}}


# ---- the storm ----


FIRST = {**{kind: "429" for kind in range(20)}, 20: "500", 21: "500", 22: "silence"}
LASTING = {
    30: ("no JSON", "not JSON"),
    31: ("no completion", "not a chat completion"),
    32: ("refusal", "refused"),
    33: ("filter", "refused"),
    34: ("cut off", "cut off at max_tokens"),
    35: ("cut off", "cut off at max_tokens"),
    36: ("no answer", "neither yes nor no"),
    37: ("empty", "neither yes nor no"),
    **{kind: ("no logprobs", "") for kind in range(40, 50)},
}  # kind -> what is wrong with every answer, and what the abstention says


def storm(number: int, attempt: int, wish: dict[str, Any]) -> tuple[Any, ...]:
    """First attempts: 20 % 429, 2 % 500, 1 % silence. For good: garbage, refusals, cut-off, no log-probabilities."""
    kind = number % 100
    now = FIRST.get(kind, "") if attempt == 1 else ""
    if now == "429":
        return 429, failing("slow down"), {"Retry-After": f"{0.01 * (1 + number % 3):.2f}"}
    if now == "500":
        return 500, failing("oops")
    if now == "silence":
        return 0, 2.0
    text = "Yes" if number % 2 else "No"
    wrong = LASTING.get(kind, ("", ""))[0]
    if wrong == "no JSON":
        return OK, b"<html>bad gateway</html>"
    if wrong == "no completion":
        return OK, {"unexpected": True}
    if wrong == "refusal":
        return OK, reply(None, refusal="No. I can't help with that.")
    if wrong == "filter":
        return OK, reply("No", wish=wish, finish_reason="content_filter")
    if wrong == "cut off":
        return OK, reply("No", wish=wish, finish_reason="length")
    if wrong == "no answer":
        return OK, reply("No errors are visible.", wish=None)
    if wrong == "empty":
        return OK, reply("", wish=None)
    return OK, reply(text, wish=None if wrong == "no logprobs" else wish)


def test_500_questions_in_a_storm(serve: Callable[..., Server]) -> None:
    """Everything was really injected, everything is answered in order, and no failure became a "no"."""
    sent: Counter[str] = Counter()

    def script(number: int, attempt: int, wish: dict[str, Any]) -> tuple[Any, ...]:
        made = storm(number, attempt, wish)
        first = FIRST.get(number % 100, "") if attempt == 1 else ""
        sent[first or LASTING.get(number % 100, ("fine", ""))[0]] += 1  # one Counter step, under the interpreter's lock
        assert first != "429" or "Retry-After" in made[2]
        return made

    server = serve(script)
    judge = judge_at(server, concurrency=8, timeout_s=1.0)
    judge.judge([ask(10**6 + 50)])  # the client's imports are not what is timed out here
    server.attempts.clear()
    sent.clear()
    server.most = 0
    answers = judge.judge([ask(i) for i in range(500)])
    assert [j.id for j in answers] == [f"im{i}" for i in range(500)]
    calls = sum(server.attempts.values())
    least = 500 + 500 // 100 * len(FIRST)
    wanted: Counter[str] = Counter()
    for kind in range(100):
        wanted[LASTING.get(kind, ("fine", ""))[0]] += 5
        if kind in FIRST:
            wanted[FIRST[kind]] += 5
    if calls == least:  # a call more is an answer that came too late on a busy machine
        assert sent == wanted
    assert sent["429"] == 100 and sent["500"] == 10 and sent["silence"] == 5 and sent["no logprobs"] >= 50
    assert least <= calls <= least + 5 and calls <= 1.3 * 500, f"{calls} calls"
    assert sum(j.attempts for j in answers) >= calls
    assert 6 <= server.most <= 8
    for i, j in enumerate(answers):
        kind = i % 100
        wrong, says = LASTING.get(kind, ("", ""))
        if says:
            assert j.verdict == "abstain" and j.p_yes is None and says in str(j.error), f"{i}: {j}"
        else:
            assert j.verdict == ("yes" if i % 2 else "no"), f"{i}: {j}"
            assert j.score_kind == ("hard" if wrong == "no logprobs" else "logprobs")
            assert j.model == "toy-1" and j.tokens == 101 and j.usd is None
        assert j.attempts == (2 if kind in FIRST else 1) or calls > least
    assert Counter(j.verdict for j in answers)["no"] == sum(1 for i in range(0, 500, 2) if i % 100 not in range(30, 38))
    print(f"{calls} calls, at most {server.most} at once")


def test_when_retries_run_out_the_question_abstains(serve: Callable[..., Server]) -> None:
    def script(number: int, attempt: int, wish: dict[str, Any]) -> tuple[Any, ...]:
        if number % 3 == 1:
            return 429, failing("slow down"), {"Retry-After": "0.01"}
        if number % 3 == 2:
            time.sleep(0.5)
        return OK, reply("No", wish=wish)

    answers = judge_at(serve(script), max_retries=0, timeout_s=0.25).judge([ask(i) for i in range(9)])
    assert [j.verdict for j in answers] == ["no", "abstain", "abstain"] * 3
    assert "429" in str(answers[1].error) and "APITimeoutError" in str(answers[2].error)
    assert answers[1].attempts == 1 and answers[1].p_yes is None


def test_retry_after_is_honoured(serve: Callable[..., Server]) -> None:
    def script(number: int, attempt: int, wish: dict[str, Any]) -> tuple[Any, ...]:
        return (OK, reply(wish=wish)) if attempt > 1 else (429, failing("later"), {"Retry-After": "0.35"})

    server = serve(script)
    (answer,) = judge_at(server).judge([ask(1)])
    assert answer.verdict == "yes" and answer.attempts == 2
    assert server.times[1] - server.times[0] >= 0.35


def test_rate_limit_counts_every_request(serve: Callable[..., Server]) -> None:
    def script(number: int, attempt: int, wish: dict[str, Any]) -> tuple[Any, ...]:
        return (OK, reply(wish=wish)) if attempt > 1 else (429, failing("later"), {"Retry-After": "0.01"})

    server = serve(script)
    judge_at(server, requests_per_minute=1200).judge([ask(i) for i in range(6)])
    assert len(server.times) == 12 and server.times[-1] - server.times[0] >= 11 * 0.05 * 0.8


def test_works_inside_a_running_loop(serve: Callable[..., Server]) -> None:
    server = serve(lambda number, attempt, wish: (OK, reply(wish=wish)))

    async def notebook() -> list[Judgement]:
        return judge_at(server).judge([ask(i) for i in range(5)])

    assert [j.verdict for j in asyncio.run(notebook())] == ["yes"] * 5


@pytest.mark.parametrize("inside", [False, True], ids=["script", "notebook"])
def test_ctrl_c_asks_no_further_question(serve: Callable[..., Server], inside: bool) -> None:
    was = signal.signal(signal.SIGINT, signal.default_int_handler)  # what is started in the background ignores it

    def script(number: int, attempt: int, wish: dict[str, Any]) -> tuple[Any, ...]:
        if number == 6:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.02)
        return OK, reply(wish=wish)

    server = serve(script)

    async def notebook() -> None:
        judge_at(server, concurrency=2).judge([ask(i) for i in range(200)])

    with pytest.raises(KeyboardInterrupt):
        if inside:
            asyncio.new_event_loop().run_until_complete(notebook())
        else:
            judge_at(server, concurrency=2).judge([ask(i) for i in range(200)])
    signal.signal(signal.SIGINT, was)
    time.sleep(0.1)
    assert len(server.wishes) < 12


# ---- the ladder ----


@pytest.mark.parametrize("name", ["logprobs", "top_logprobs", "max_tokens", "temperature", "response_format"])
def test_what_the_server_refuses_by_name_is_left_out(serve: Callable[..., Server], name: str) -> None:
    def script(number: int, attempt: int, wish: dict[str, Any]) -> tuple[Any, ...]:
        if name in wish:
            return 400, failing(f"Unsupported parameter: '{name}' is not supported with this model.")
        return OK, reply("Yes", wish=wish)

    server = serve(script)
    answers = judge_at(server, structured=name == "response_format").judge([ask(i) for i in range(10)])
    assert [j.verdict for j in answers] == ["yes"] * 10 and len(server.wishes) == 11
    assert answers[0].score_kind == ("hard" if name == "logprobs" else "logprobs")  # without alternatives is better
    assert ("max_completion_tokens" in server.wishes[-1]) == (name == "max_tokens")


@pytest.mark.parametrize("honours_n", [True, False])
def test_votes_where_no_logprobs_come(serve: Callable[..., Server], honours_n: bool) -> None:
    said = ["Yes", "No", "Yes", "Yes", "Not sure"]

    def script(number: int, attempt: int, wish: dict[str, Any]) -> tuple[Any, ...]:
        body = reply("Yes", count=wish.get("n", 1) if honours_n else 1)
        for k, choice in enumerate(body["choices"]):
            choice["message"] = {"role": "assistant", "content": said[k if honours_n else (attempt - 2) % 5]}
        return OK, body

    server = serve(script)
    answers = judge_at(server, votes=5, concurrency=1).judge([ask(i) for i in range(2)])
    assert [j.score_kind for j in answers] == ["votes", "votes"]
    assert answers[0].verdict == "yes" and answers[0].p_yes == 0.75 and answers[0].p_mass == 0.8
    assert len(server.wishes) == (1 + 1 + 1 if honours_n else 1 + 5 + 5)
    assert answers[1].attempts == (1 if honours_n else 5) and server.wishes[-1]["temperature"] == 1.0


def test_votes_without_majority_abstain(serve: Callable[..., Server]) -> None:
    words = ["Yes", "No", "Hm", "Hm"]
    server = serve(lambda number, attempt, wish: (OK, reply(words[attempt - 1])))
    (answer,) = judge_at(server, votes=4, logprobs=False).judge([ask(1)])
    assert answer.verdict == "abstain" and "no majority: 1 yes, 1 no of 4" in str(answer.error)


@pytest.mark.parametrize(
    ("text", "verdict", "p_yes", "kind"),
    [
        ('{"answer": "yes", "confidence": 0.9}', "yes", 0.9, "stated"),
        ('{"answer": "no", "confidence": 0.75}', "no", 0.25, "stated"),
        ('{"answer": "no", "confidence": 75}', "no", 0.0, "hard"),
        ('{"answer": "no", "confidence": true}', "no", 0.0, "hard"),
        ('{"answer": "perhaps", "confidence": 0.9}', "abstain", None, "none"),
        ('{"answer": "yes", "confid', "abstain", None, "none"),
        ("No.", "no", 0.0, "hard"),
        ("[1, 2]", "abstain", None, "none"),
    ],
)
def test_stated_numbers(serve: Callable[..., Server], text: str, verdict: str, p_yes: float | None, kind: str) -> None:
    server = serve(lambda number, attempt, wish: (OK, reply(text)))
    (answer,) = judge_at(server, stated=True).judge([ask(1)])
    assert (answer.verdict, answer.p_yes, answer.score_kind) == (verdict, p_yes, kind) and answer.raw == text
    assert server.wishes[0]["response_format"]["json_schema"]["schema"]["required"] == ["answer", "confidence"]
    assert "confidence" in server.wishes[0]["messages"][0]["content"][1]["text"]


def token(word: str, p: float, **top: float) -> SimpleNamespace:
    others = [SimpleNamespace(token=t.replace("_", " "), logprob=math.log(q)) for t, q in top.items()]
    return SimpleNamespace(token=word, logprob=math.log(p), top_logprobs=others)


def listing(text: str, p: float) -> dict[str, Any]:
    """A reply in two parts, its tokens as words; the last word carries the probabilities."""
    words = re.findall(r"\S+\s*", text)
    body = reply(text)
    tokens: list[dict[str, Any]] = [{"token": w, "logprob": -0.01, "bytes": None, "top_logprobs": []} for w in words]
    last = words[-1]
    other = "no" if "yes" in last else "yes"
    top = [{"token": t, "logprob": math.log(q), "bytes": None} for t, q in ((last, p), (other, 0.9 - p))]
    tokens[-1] = {**top[0], "top_logprobs": top}
    body["choices"][0]["logprobs"] = {"content": tokens}
    return body


@pytest.mark.parametrize(
    ("text", "verdict", "p_yes"),
    [
        ("No dog, one cat.\nVerdict: yes", "yes", 0.6 / 0.9),
        ("Yes: a cat, a dog.\nVerdict: no", "no", 0.3 / 0.9),
        ("yes and no, 2 cats\n**Verdict:** yes", "yes", 0.6 / 0.9),
        ("cat: yes\ndog: yes", "abstain", None),
    ],
)
def test_a_list_is_read_behind_its_mark(
    serve: Callable[..., Server], text: str, verdict: str, p_yes: float | None
) -> None:
    server = serve(lambda number, attempt, wish: (OK, listing(text, 0.6)))
    query = replace(ask(1), question="list")
    (answer,) = judge_at(server).judge([query])
    assert answer.verdict == verdict and answer.raw == text and answer.p_yes == (p_yes and pytest.approx(p_yes))
    assert "Verdict: yes" in server.wishes[0]["messages"][0]["content"][1]["text"]


def test_a_structured_list(serve: Callable[..., Server]) -> None:
    server = serve(lambda number, attempt, wish: (OK, reply('{"objects": ["no dog"], "answer": "yes"}')))
    answers = judge_at(server, structured=True).judge([replace(ask(1), question="list"), ask(2)])
    assert [a.verdict for a in answers] == ["yes", "yes"]
    schemas = [wish["response_format"]["json_schema"]["schema"]["required"] for wish in server.wishes]
    assert schemas == [["objects", "answer"], ["answer"]]


@pytest.mark.parametrize(
    ("tokens", "verdict", "wanted"),
    [
        ([token("Yes", 0.6, Yes=0.6, No=0.2)], "yes", (0.75, 0.8)),
        ([token("Yes", 0.5, Yes=0.5, _yes=0.2, NO=0.1, The=0.1)], "yes", (0.875, 0.8)),
        ([token('"', 0.9), token("no", 0.6, no=0.6, yes=0.2)], "no", (0.25, 0.8)),
        ([token("Answer", 0.9), token(":", 1.0), token(" No", 0.8, _No=0.8)], "no", (0.2, 0.8)),  # at most what is left
        ([token("Perhaps", 0.9, Perhaps=0.9, Yes=0.03, No=0.01)], "abstain", (0.75, 0.04)),
        ([token("Perhaps", 0.9, Perhaps=0.9)], "abstain", (None, 0.0)),
        ([token("Yes", 0.8)], "yes", (0.8, 0.8)),
        ([token("Yes", 0.8, Yes=0.8, The=0.05)], "yes", (0.8 / 0.85, 0.8)),  # at most the least that is shown
        ([token("Yes", 1.0, Yes=1.0)], "yes", (1 - 1e-6, 1.0)),
        ([token("Y", 0.8, Y=0.8, N=0.2)], "yes", (0.8, 1.0)),
        ([], "yes", (None, None)),
    ],
)
def test_yes_share(tokens: list[Any], verdict: str, wanted: tuple[float | None, float | None]) -> None:
    assert yes_share(tokens, verdict) == (pytest.approx(wanted[0]), pytest.approx(wanted[1]))


@pytest.mark.parametrize(
    ("text", "p", "why"),
    [("Yes, but the tail is missing.", 0.7, "neither"), ("Yes", 0.89e-2, "P(yes) + P(no)"), ("", 0.7, "neither")],
)
def test_unclear_answers_abstain(serve: Callable[..., Server], text: str, p: float, why: str) -> None:
    def script(number: int, attempt: int, wish: dict[str, Any]) -> tuple[Any, ...]:
        body = reply(text, p=0.7, wish=wish)
        if p < 0.1:
            lone = {"token": "Yes", "logprob": math.log(p), "bytes": None}
            body["choices"][0]["logprobs"] = {"content": [{**lone, "top_logprobs": [lone]}]}
        return OK, body

    (answer,) = judge_at(serve(script)).judge([ask(1)])
    assert answer.verdict == "abstain" and why in str(answer.error)


# ---- number 1: thoughts among the log-probabilities ----


def spelt(*tokens: tuple[str, dict[str, float]]) -> dict[str, Any]:
    """Log-probabilities of tokens; the first of the likely ones was written."""
    made = []
    for word, likely in tokens:
        top = [{"token": t, "logprob": math.log(q), "bytes": None} for t, q in likely.items()]
        made.append({"token": word, "logprob": math.log(likely.get(word, 0.9)), "bytes": None, "top_logprobs": top})
    return {"content": made}


THOUGHTS = [("Yes", {"Yes": 0.6, "Okay": 0.4}), *[(w, {w: 0.9}) for w in (",", " I", " see", ".", "</think>", "\n\n")]]
NO, YES = ("No", {"No": 0.97, "Yes": 0.03}), ("Yes", {"Yes": 0.9, "No": 0.1})


@pytest.mark.parametrize(
    ("content", "tokens", "verdict", "p_yes"),
    [
        ("No", [*THOUGHTS, NO], "no", 0.03),
        ("\n\nNo", [*THOUGHTS, NO], "no", 0.03),
        (
            "No",
            [*THOUGHTS, ("\u0120No", {"\u0120No": 0.97, "\u0120Yes": 0.03}), ("<|im_end|>", {"<|im_end|>": 1.0})],
            "no",
            0.03,
        ),
        (
            "No, the tail is missing.",
            [*THOUGHTS, NO, *[(w, {w: 0.9}) for w in (",", " the tail", " is missing.")]],
            "no",
            0.03,
        ),
        ("No", THOUGHTS, "no", None),  # the tokens of the thoughts alone
        ("No", [YES], "no", None),  # of another text altogether
        ("No", [("No", {"No": 0.2, "Yes": 0.7})], "abstain", None),  # the word says no, its probabilities yes
        (
            "The answer is yes.",
            [
                ("The", {"The": 1.0}),
                (" answer is", {" answer is": 1.0}),
                (" yes", {" yes": 0.6, " no": 0.4}),
                (".", {".": 1.0}),
            ],
            "yes",
            0.6,
        ),
        (
            "<think>No.</think>Yes",
            [("<think>", {"<think>": 1.0}), NO, (".</think>", {".</think>": 1.0}), YES],
            "yes",
            0.9,
        ),
        ("Yes", [("Y", {"Y": 0.8, "N": 0.15}), ("es", {"es": 0.99})], "yes", 0.792 / 0.942),
    ],
)
def test_1_probabilities_are_those_of_the_answer(
    serve: Callable[..., Server], content: str, tokens: list[Any], verdict: str, p_yes: float | None
) -> None:
    body = reply(content)
    body["choices"][0]["logprobs"] = spelt(*tokens)
    (answer,) = judge_at(serve(lambda number, attempt, wish: (OK, body))).judge([ask(1)])
    assert answer.verdict == verdict and answer.p_yes == (p_yes and pytest.approx(p_yes))
    assert p_yes is not None or answer.score_kind == "none"
    assert answer.p_yes is None or (answer.p_yes >= 0.5) == (answer.verdict == "yes")
    assert verdict != "abstain" or "the opposite" in str(answer.error)


def test_4_a_word_that_is_not_shown_is_not_impossible(serve: Callable[..., Server]) -> None:
    """Three sure answers, none of which shows the other word: their order stays, and none is 0 or 1."""
    sure = {1: {"Yes": 0.9, "The": 0.05}, 2: {"Yes": 0.99, "The": 0.004}, 3: {"Yes": 0.999, "The": 0.0001}}

    def script(number: int, attempt: int, wish: dict[str, Any]) -> tuple[Any, ...]:
        body = reply("Yes")
        body["choices"][0]["logprobs"] = spelt(("Yes", sure[number]))
        return OK, body

    answers = judge_at(serve(script)).judge([ask(i) for i in (1, 2, 3)])
    chances = [j.p_yes for j in answers]
    assert chances == sorted(chances) and len(set(chances)) == 3 and all(0.5 < p < 1 for p in chances)


def test_content_in_parts_is_read(serve: Callable[..., Server]) -> None:
    """Own hunt: Magistral and others send a list of parts, thoughts first."""
    body = reply("x")
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "No?"}]}, {"type": "text", "text": "Yes."}]
    body["choices"][0]["message"]["content"] = parts
    (answer,) = judge_at(serve(lambda number, attempt, wish: (OK, body))).judge([ask(1)])
    assert answer.verdict == "yes" and answer.raw == "Yes."


# ---- numbers 23 and 24: what a server refuses ----


def picky(**refused: tuple[int, Any]) -> Callable[..., tuple[Any, ...]]:
    """Answers unless a field is there that is refused; `top_logprobs_5`: unless there are more than 5."""

    def script(number: int, attempt: int, wish: dict[str, Any]) -> tuple[Any, ...]:
        for name, (status, body) in refused.items():
            field, _, limit = name.partition("__")
            if field in wish and (not limit or wish[field] > int(limit)):
                return status, body
        return OK, reply("Yes", wish=wish)

    return script


def google(words: str) -> list[Any]:
    violation = {"description": words}
    details = [{"@type": "type.googleapis.com/google.rpc.BadRequest", "fieldViolations": [violation]}]
    return [{"error": {"code": 400, "message": words, "status": "INVALID_ARGUMENT", "details": details}}]


REFUSED: dict[str, tuple[dict[str, tuple[int, Any]], dict[str, Any], str]] = {
    "OpenAI 403": (
        {"logprobs": (403, failing("You are not allowed to request logprobs from this model"))},
        {"logprobs": None},
        "hard",
    ),
    "Gemini": (
        {
            "top_logprobs": (400, google('Unknown name "topLogprobs": Cannot find field.')),
            "logprobs": (400, google('Unknown name "logprobs": Cannot find field.')),
        },
        {"logprobs": None},
        "hard",
    ),
    "TGI": (
        {
            "top_logprobs__5": (
                422,
                {
                    "error": "Input validation error: `top_n_tokens` must be >= 0 and <= 5. Given: 20",
                    "error_type": "validation",
                },
            )
        },
        {"top_logprobs": 5},
        "logprobs",
    ),
    "vLLM": (
        {
            "top_logprobs__5": (
                400,
                {
                    "object": "error",
                    "message": "Requested sample logprobs of 20, which is greater than max allowed: 5",
                    "code": 400,
                },
            )
        },
        {"top_logprobs": 5},
        "logprobs",
    ),
    "text": ({"top_logprobs__5": (400, b"max 5 logprobs")}, {"top_logprobs": 5}, "logprobs"),
    "FastAPI": (
        {
            "logprobs": (
                422,
                {
                    "detail": [
                        {
                            "type": "extra_forbidden",
                            "loc": ["body", "logprobs"],
                            "msg": "Extra inputs are not permitted",
                            "input": True,
                        }
                    ]
                },
            )
        },
        {"logprobs": None},
        "hard",
    ),
    "in a 200": (
        {"logprobs": (200, {"error": {"message": "logprobs is not supported", "param": "logprobs"}, "choices": None})},
        {"logprobs": None},
        "hard",
    ),
    "500": ({"logprobs": (500, failing("logprobs is not implemented"))}, {"logprobs": None}, "hard"),
}


@pytest.mark.parametrize("who", REFUSED)
def test_23_the_field_that_is_named_decides_whatever_the_status(serve: Callable[..., Server], who: str) -> None:
    """One question finds out; the others are asked once. What was lost stands in the notes."""
    refused, sent, kind = REFUSED[who]
    server = serve(picky(**refused))
    judge = judge_at(server)
    answers = judge.judge([ask(i) for i in range(5)])
    assert [(j.verdict, j.score_kind) for j in answers] == [("yes", kind)] * 5
    assert len(server.wishes) == 5 + len(refused)
    assert {name: server.wishes[-1].get(name) for name in sent} == sent
    assert set(sent) <= set(judge.notes()) and all("\n" not in told for told in judge.notes().values())


def test_23_what_votes_are_sampled_at_is_not_lost_with_the_zero(serve: Callable[..., Server]) -> None:
    def script(number: int, attempt: int, wish: dict[str, Any]) -> tuple[Any, ...]:
        if wish.get("temperature") == 0:
            return 422, {"error": "Input validation error: `temperature` must be strictly positive"}
        return OK, reply("Yes")

    server = serve(script)
    judge_at(server, votes=3).judge([ask(1)])
    assert [wish.get("temperature") for wish in server.wishes] == [0, 0.01, 1.0, 1.0, 1.0]


def test_23_a_field_of_the_users_own_is_not_taken_away(serve: Callable[..., Server]) -> None:
    server = serve(lambda number, attempt, wish: (400, failing("top_logprobs is too large, max 1")))
    (answer,) = judge_at(server, extra_body={"top_logprobs": 3}).judge([ask(1)])
    assert answer.verdict == "abstain" and "max 1" in str(answer.error) and len(server.wishes) == 1


def test_24_an_error_inside_a_200_is_asked_again_where_it_is_passing(serve: Callable[..., Server]) -> None:
    busy = {
        "choices": None,
        "error": {"message": "Provider returned error", "code": 429, "metadata": {"raw": "Too Many"}},
    }

    def script(number: int, attempt: int, wish: dict[str, Any]) -> tuple[Any, ...]:
        if number == 1 and attempt == 1:
            return OK, busy, {"Retry-After": "0.01"}
        if number == 2:
            return OK, {"error": {"message": "the picture is of a kind we do not take", "code": 400}}
        return OK, reply("No", wish=wish)

    answers = judge_at(serve(script), patience=99).judge([ask(i) for i in range(4)])
    assert [j.verdict for j in answers] == ["no", "no", "abstain", "no"] and [j.attempts for j in answers] == [
        1,
        2,
        1,
        1,
    ]
    assert "400 inside a 200" in str(answers[2].error) and "of a kind we do not take" in str(answers[2].error)


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (
            404,
            b"404 page not found",
            r"nothing at /chat/completions \(404\).*page not found.*try http://127.0.0.1:\d+/v1",
        ),
        (404, failing("model 'toy' not found, try pulling it first"), "knows no model 'toy'.*try pulling it first"),
        (200, {"error": {"message": "foo is not a valid model ID", "code": 400}}, "knows no model 'toy'.*not a valid"),
        (403, failing("Country not supported"), r"refuses the key \(403\).*Country not supported"),
        (400, google("API key not valid. Please pass a valid API key."), r"refuses the key \(400\).*API key not valid"),
        (402, failing("Insufficient credits"), "wants to be paid first.*Insufficient credits"),
        (
            429,
            {"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}},
            "wants to be paid",
        ),
    ],
)
def test_24_what_cannot_go_on_stops_at_once_in_the_servers_words(
    serve: Callable[..., Server], status: int, body: Any, says: str
) -> None:
    server = serve(lambda number, attempt, wish: (status, body))
    server.url = server.url.replace("/v1", "/api")
    with pytest.raises(JudgeStopped, match=says) as caught:
        judge_at(server).judge([ask(i) for i in range(9)])
    assert len(server.wishes) == 1 and "\n" not in str(caught.value)


def test_24_azure(serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    """api-version travels in the address, the key in api-key; without the version one line says how."""
    monkeypatch.setenv("TOY_KEY", KEY)
    seen: list[tuple[str, Any, Any]] = []

    class Spy(Handler):
        def do_POST(self) -> None:
            seen.append((self.path, self.headers["api-key"], self.headers["Authorization"]))
            super().do_POST()

    server = serve(lambda number, attempt, wish: (OK, reply(wish=wish)))
    server.RequestHandlerClass = Spy
    base = server.url.replace("/v1", "/openai/deployments/gpt-4o")
    (answer,) = judge_at(server, base_url=base + "?api-version=2024-10-21", api_key_env="TOY_KEY").judge([ask(1)])
    assert answer.verdict == "yes"
    assert seen == [("/openai/deployments/gpt-4o/chat/completions?api-version=2024-10-21", KEY, None)]
    server.script = lambda number, attempt, wish: (404, {"error": {"code": "404", "message": "Resource not found"}})
    with pytest.raises(JudgeError, match="api-version="):
        judge_at(server, base_url=base, api_key_env="TOY_KEY").judge([ask(1)])


def test_24_the_full_path_of_the_endpoint_is_understood(serve: Callable[..., Server]) -> None:
    paths: list[str] = []

    class Spy(Handler):
        def do_POST(self) -> None:
            paths.append(self.path)
            super().do_POST()

    server = serve(lambda number, attempt, wish: (OK, reply(wish=wish)))
    server.RequestHandlerClass = Spy
    for path in ("/chat/completions", "/chat/completions/", "/"):
        (answer,) = judge_at(server, base_url=server.url + path).judge([ask(1)])
        assert answer.verdict == "yes"
    assert set(paths) == {"/v1/chat/completions"}


def test_24_https_to_http_is_one_clear_line(serve: Callable[..., Server]) -> None:
    server = serve(lambda number, attempt, wish: (OK, reply(wish=wish)))
    with pytest.raises(JudgeError, match="does not speak https: write http://"):
        judge_at(server, base_url=server.url.replace("http:", "https:"), max_retries=0).judge([ask(1)])


def test_a_filter_that_dislikes_one_picture_is_no_wrong_key(serve: Callable[..., Server], tmp_path: Path) -> None:
    """Own hunt: OpenRouter's moderation answers 403, Azure's 400; the run went down."""

    def script(number: int, attempt: int, wish: dict[str, Any]) -> tuple[Any, ...]:
        if number == 1:
            return 403, {"error": {"message": "requires moderation, and your input was flagged", "code": 403}}
        if number == 2:
            return 400, {"error": {"message": "content management policy", "code": "content_filter", "param": "prompt"}}
        return OK, reply("No", wish=wish)

    server = serve(script)
    judge = CachedHandler(judge=judge_at(server, price=[1, 1]), path=tmp_path / "c.sqlite", max_usd=1.0)
    answers = judge.judge([ask(i) for i in range(4)])
    assert [j.verdict for j in answers] == ["no", "abstain", "abstain", "no"]
    assert {j.error for j in answers[1:3]} == {"the judge refused"} and "flagged" in answers[1].raw
    assert len(judge.cache) == 4


def test_a_wait_that_stands_in_the_body_is_honoured(serve: Callable[..., Server]) -> None:
    """Own hunt: Google and OpenAI say in the body how long to wait."""
    body = {"error": {"code": 429, "message": "quota", "details": [{"retryDelay": "1.2s"}]}}

    def script(number: int, attempt: int, wish: dict[str, Any]) -> tuple[Any, ...]:
        return (OK, reply(wish=wish)) if attempt > 1 else (429, [body])

    server = serve(script)
    (answer,) = judge_at(server).judge([ask(1)])
    assert answer.verdict == "yes" and 1.1 <= server.times[1] - server.times[0]


@pytest.mark.parametrize("content", [None, "", "Let me look at"])
def test_thoughts_that_eat_everything_say_what_to_do(serve: Callable[..., Server], content: str | None) -> None:
    body = reply(content or "x", finish_reason="length")
    body["choices"][0]["message"] |= {"content": content, "reasoning_content": "The user shows"}
    answers = judge_at(serve(lambda number, attempt, wish: (OK, body))).judge([ask(1), ask(2)])
    assert {j.verdict for j in answers} == {"abstain"} and len({j.error for j in answers}) == 1
    assert "cut off at max_tokens=64" in str(answers[0].error) and "2000" in str(answers[0].error) and answers[0].raw


# ---- what cannot go on ----


def test_wrong_key_stops_at_once(serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_KEY", KEY)
    server = serve(lambda number, attempt, wish: (401, failing(f"Incorrect API key provided: {KEY}")))
    with pytest.raises(JudgeError, match=r"refuses the key \(401\); look at TOY_KEY") as caught:
        judge_at(server, api_key_env="TOY_KEY").judge([ask(i) for i in range(50)])
    assert len(server.wishes) == 1 and "\n" not in str(caught.value) and KEY not in str(caught.value)


def test_a_key_that_expires_keeps_the_verdicts(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(lambda number, attempt, wish: (OK, reply(wish=wish)) if number < 20 else (401, failing("expired")))
    judge = CachedHandler(judge=judge_at(server, concurrency=4), path=tmp_path / "c.sqlite")
    with pytest.raises(JudgeStopped, match="401"):
        judge.judge([ask(i) for i in range(50)])
    assert len(judge.cache) == 20 and 21 <= len(server.wishes) <= 24
    server.script = lambda number, attempt, wish: (OK, reply(wish=wish))
    before = len(server.wishes)
    assert len(judge.judge([ask(i) for i in range(50)])) == 50 and len(server.wishes) - before == 30


def test_unreachable_is_one_clear_line() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(JudgeError, match="cannot be reached") as caught:
        make_handler("openai", model="m", base_url=f"http://127.0.0.1:{port}/v1", max_retries=0).judge([ask(1), ask(2)])
    assert "\n" not in str(caught.value)


def test_unknown_model_stops_at_once(serve: Callable[..., Server]) -> None:
    server = serve(lambda number, attempt, wish: (404, failing("no such model")))
    with pytest.raises(JudgeError, match=r"knows no model 'toy'"):
        judge_at(server).judge([ask(i) for i in range(9)])
    assert len(server.wishes) == 1


def test_a_model_that_cannot_see_runs_out_of_patience(serve: Callable[..., Server]) -> None:
    server = serve(lambda number, attempt, wish: (400, failing("this model does not support image input")))
    with pytest.raises(JudgeStopped, match="failed 5 times in a row.*image input") as caught:
        judge_at(server, patience=5, concurrency=1).judge([ask(i) for i in range(50)])
    assert len(server.wishes) == 5 and {j.verdict for j in caught.value.judgements.values()} == {"abstain"}


def test_bad_queries_cost_no_call(serve: Callable[..., Server]) -> None:
    def broken() -> Image.Image:
        raise OSError("truncated file")

    server = serve(lambda number, attempt, wish: (OK, reply(wish=wish)))
    wrong: list[Any] = [
        ask(0, image=broken),
        ask(1, image=None),
        ask(2, image="cat.jpg"),
        ask(3, image=IMAGE.resize((3, 3))),
        ask(4, mask=np.full((6, 6), 255, np.uint8)),
        ask(5, mask=MASK.astype(np.int64)),
        ask(6, mask=np.full((6, 6), 99, np.uint8)),
        "no query",
    ]
    answers = judge_at(server, patience=1).judge([*wrong, ask(9)])
    assert [j.verdict for j in answers] == ["abstain"] * 8 + ["yes"] and len(server.wishes) == 1
    assert all(j.error and "\n" not in j.error and j.attempts == 0 for j in answers[:8])


# ---- the key ----


def test_the_key_is_written_nowhere(
    serve: Callable[..., Server],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def script(number: int, attempt: int, wish: dict[str, Any]) -> tuple[Any, ...]:
        if number == 1:
            return 400, failing(f"bad request by {KEY}")
        if number == 2:
            return OK, reply(None, refusal=f"I will not work for {KEY}")
        return OK, reply("Yes" if number else f"Yes\n{KEY}\nyes", wish=wish)

    monkeypatch.setenv("TOY_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    server = serve(script)
    inner = judge_at(server, api_key_env="TOY_KEY")
    judge = CachedHandler(judge=inner, path=tmp_path / "c.sqlite")
    answers = judge.judge([ask(i) for i in range(5)])
    assert server.keys == {f"Bearer {KEY}"} and [j.verdict for j in answers][1:3] == ["abstain", "abstain"]
    written = [repr(inner), str(vars(inner)), repr(answers), json.dumps(inner.identity()), caplog.text]
    written += [*capfd.readouterr(), pickle.dumps(vars(inner)).decode("latin-1")]
    written += [path.read_bytes().decode("latin-1") for path in tmp_path.iterdir()]
    assert len(judge.cache) == 4
    assert not [text[:80] for text in written if KEY in text]


ECHOES: dict[str, Callable[[str], tuple[Any, ...]]] = {
    "headers in JSON": lambda key: (400, {"error": {"message": "bad", "headers": {"Authorization": f"Bearer {key}"}}}),
    "headers as text": lambda key: (500, f"<html>GET / Authorization: Bearer {key}</html>".encode()),
    "header of the reply": lambda key: (500, failing("x"), {"WWW-Authenticate": f"Bearer {key}", "X-Echo": key}),
    "no completion": lambda key: (OK, {"request": {"authorization": key}}),
    "name of the model": lambda key: (OK, reply("Yes", model=f"toy {key}")),
    "refusal": lambda key: (OK, reply(None, refusal=f"not for {key}")),
    "wrong key": lambda key: (401, failing(f"Incorrect API key provided: {key}")),
    "forbidden": lambda key: (403, f"{key} may not".encode()),
    "unknown model": lambda key: (404, failing(f"no such model for {key}")),
    "redirect": lambda key: (302, b"", {"Location": f"http://127.0.0.1:1/{key}"}),
}


@pytest.mark.parametrize("echo", ECHOES)
def test_no_echo_of_the_key_survives(
    echo: str,
    serve: Callable[..., Server],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whatever part of a reply repeats the key: not in judgements, errors, tracebacks, the cache or our log."""
    monkeypatch.setenv("TOY_KEY", KEY)
    server = serve(lambda number, attempt, wish: ECHOES[echo](KEY))
    inner = judge_at(server, api_key_env="TOY_KEY", max_retries=0, patience=2)
    judge = CachedHandler(judge=inner, path=tmp_path / "c.sqlite")
    written = []
    try:
        written.append(repr(judge.judge([ask(1), ask(2), ask(3)])))
    except JudgeError as error:
        written += ["".join(traceback.format_exception(error)), repr(getattr(error, "judgements", ""))]
        assert "\n" not in str(error)
    written += [repr(inner), repr(judge), str(vars(inner)), pickle.dumps(vars(inner)).decode("latin-1")]
    written += [record.getMessage() for record in caplog.records if record.name.startswith("vlm_itl")]
    written += [path.read_bytes().decode("latin-1") for path in tmp_path.iterdir()]
    assert server.keys == {f"Bearer {KEY}"} and not [text[:80] for text in written if KEY in text]


@pytest.mark.parametrize(
    "options",
    [
        {"judge": "openai", "judge_options": {"model": "m", "api_key": KEY}},
        {"judge": "openai", "judge_options": {"model": "m", "api_key_env": KEY}},
        {"judge": "openai", "judge_options": {"model": "m", "extra_body": {"x-api-key": KEY}}},
        {"judge": "openai", "judge_options": {"model": "m", "base_url": f"http://u:{KEY}@127.0.0.1/v1"}},
        {"judge": "cached", "judge_options": {"judge": "openai", "options": {"model": "m", "key": KEY}, "path": "c"}},
        {"judge": "hf", "judge_options": {"model": "m/m", "model_options": {"token": KEY}}},
    ],
    ids=["option", "variable", "body", "address", "cached", "token"],
)
def test_a_run_with_a_key_in_its_settings_writes_nothing(options: dict[str, Any], tmp_path: Path) -> None:
    from vlm_itl.experiment.config import make_config
    from vlm_itl.experiment.loop import run_al

    scenes = {"dataset": "scenes", "data_options": {"n_train": 30, "n_test": 2, "size": [48, 64]}, "mode": "vlm"}
    with pytest.raises(ConfigError) as caught:
        next(iter(run_al(make_config({**scenes, **options, "output_dir": str(tmp_path / "run")}))))
    assert KEY not in str(caught.value) and not list(tmp_path.iterdir())


def test_a_key_goes_only_where_it_belongs(serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve(lambda number, attempt, wish: (OK, reply(wish=wish)))
    judge_at(server).judge([ask(1)])
    assert not any(KEY in key for key in server.keys)
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(JudgeError, match="OPENAI_API_KEY"):
        make_handler("openai", model="gpt-4o-mini").judge([ask(1)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": ""}, "model"),
        ({"api_key_env": KEY}, "NAME of an environment variable"),
        ({"base_url": f"http://me:{KEY}@127.0.0.1/v1"}, "no user"),
        ({"base_url": f"http://127.0.0.1/v1?key={KEY}"}, "no user"),
        ({"base_url": "localhost:8000"}, "must look like"),
        ({"api_key": KEY}, "no option 'api_key'"),
        ({"style": "cubist"}, "style"),
        ({"concurrency": 0}, "concurrency"),
        ({"extra_body": {"api_key": KEY}}, "must hold no 'api_key'"),
        ({"extra_body": {"headers": {"Authorization": f"Bearer {KEY}"}}}, "must hold no 'Authorization'"),
        ({"extra_body": [KEY]}, "must be a dictionary"),
        ({"price": 0.5}, "price must be two numbers"),
        ({"price": [0.1]}, "price must be two numbers"),
        ({"price": [0.1, -1]}, "price must be a number >= 0"),
    ],
)
def test_wrong_options_are_refused_without_repeating_a_key(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make_handler("openai", **{"model": "m", **options})
    assert KEY not in str(caught.value)


# ---- the rest ----


def test_missing_package_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(JudgeError, match=r"pip install 'vlm_itl\[openai\]'"):
        make_handler("openai", model="m", base_url="http://127.0.0.1:1/v1").judge([ask(1)])


def test_second_run_asks_only_what_failed(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(storm)
    judge = CachedHandler(judge=judge_at(server), path=tmp_path / "c.sqlite")
    queries = [ask(i) for i in range(29, 61)]
    judge.judge(queries)
    before = sum(server.attempts.values())
    assert sum(j.cached for j in judge.judge(queries)) == 29
    assert sum(server.attempts.values()) - before == 3  # two were no chat completions, one was empty
    changed = MASK.copy()
    changed[5, 5] = 1
    judge.judge([*queries[9:], ask(60, mask=changed)])
    assert sum(server.attempts.values()) - before == 4


def test_what_is_in_the_key_of_the_cache() -> None:
    base = {"model": "m", "base_url": "http://127.0.0.1:1/v1"}
    key = query_key(ask(1), make_handler("openai", **base))
    for same in ({"concurrency": 3}, {"timeout_s": 9.0}, {"max_retries": 1}, {"price": (1.0, 2.0)}):
        assert query_key(ask(1), make_handler("openai", **base, **same)) == key
    others: list[dict[str, Any]] = [
        {"model": "n"},
        {"base_url": "http://127.0.0.1:2/v1"},
        {"revision": "b"},
        {"style": "contour"},
        {"max_side": None},
        {"system": "You are strict."},
        {"temperature": 0.1},
        {"max_tokens": 65},
        {"votes": 3},
        {"stated": True},
        {"extra_body": {"top_k": 1}},
    ]
    assert len({query_key(ask(1), make_handler("openai", **{**base, **other})) for other in others} | {key}) == 12


def test_prices_are_dated_and_unknown_is_none() -> None:
    mini = price_of("gpt-4o-mini-2024-07-18")
    assert mini is not None and mini == price_of("gpt-4o-mini") and (mini.read, mini.written) == (0.15, 0.60)
    assert price_of("gpt-4o-mini", "http://127.0.0.1/v1") is None and price_of("o99") is None
    for price in PRICES.values():
        assert re.fullmatch(r"20\d\d-\d\d", price.as_of) and price.source and 0 < price.read < price.written


def test_money_follows_the_price(serve: Callable[..., Server]) -> None:
    """Unknown stays unknown, a price of one's own counts, free is 0; a refusal costs, a failure is unknown."""

    def script(number: int, attempt: int, wish: dict[str, Any]) -> tuple[Any, ...]:
        return {1: (OK, reply("Yes")), 2: (OK, reply(None, refusal="No.")), 3: (400, failing("bad"))}[number]

    server, queries = serve(script), [ask(1), ask(2), ask(3)]
    assert [j.usd for j in judge_at(server).judge(queries)] == [None] * 3
    paid = (100 * 2.0 + 1 * 8.0) / 1e6
    assert [j.usd for j in judge_at(server, price=[2, 8]).judge(queries)] == [pytest.approx(paid)] * 2 + [None]
    assert [j.usd for j in judge_at(server, price=[0, 0]).judge(queries)] == [0.0, 0.0, None]


def test_a_run_knows_the_judges() -> None:
    import vlm_itl.experiment.config  # noqa: F401

    assert {"openai", "cached"} <= set(HANDLERS)


def test_a_run_stops_at_its_limit_goes_on_and_holds_no_key(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from vlm_itl.experiment.config import make_config
    from vlm_itl.experiment.loop import run_al

    monkeypatch.setenv("TOY_KEY", KEY)
    server = serve(lambda number, attempt, wish: (OK, reply("Yes" if len(wish) % 2 else "No", wish=wish)))
    options = {"model": "toy", "base_url": server.url, "api_key_env": "TOY_KEY", "price": [0.15, 0.6]}
    judge = {"judge": "openai", "options": options, "path": str(tmp_path / "judge.sqlite"), "max_calls": 20}
    tiny = {"steps": 2, "batch_size": 4, "image_size": 48, "initial": 6, "increment": 6, "max_labelled": 12}
    settings = {
        **tiny,
        "dataset": "scenes",
        "data_options": {"n_train": 30, "n_test": 2, "size": [48, 64]},
        "val_share": 4,
        "mode": "vlm",
        "judge": "cached",
        "judge_options": judge,
        "policy": "observe",
        "preflight": 0,
        "gallery": 1,
        "output_dir": str(tmp_path / "run"),
    }
    rounds: list[Any] = []
    for again in range(4):
        before = len(server.wishes)
        try:
            rounds = list(run_al(make_config(settings)))
            break
        except JudgeStopped as stop:
            assert "max_calls=20" in str(stop) and len(server.wishes) - before == 20, f"run {again}"
    assert rounds and rounds[0].judge["n"] == 20 and len(server.wishes) <= sum(r.judge["n"] for r in rounds)
    assert server.keys == {f"Bearer {KEY}"}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5 and not [path for path in files if KEY.encode() in path.read_bytes()]


@pytest.mark.parametrize(
    ("ended", "why"),
    [
        ("model_length", "cut off at max_tokens"),  # Mistral
        ("MAX_TOKENS", "cut off at max_tokens"),  # Gemini, behind gateways
        ("max_tokens", "cut off at max_tokens"),  # Anthropic, behind gateways
        ("SAFETY", "the judge refused"),
        ("refusal", "the judge refused"),
        ("abort", "broke off"),  # SGLang, vLLM
        ("eos_token", None),  # TGI
        ("STOP", None),
        (None, None),
    ],
)
def test_an_answer_that_did_not_end_is_none_in_whatever_words(
    serve: Callable[..., Server], ended: str | None, why: str | None
) -> None:
    """Half of 'Yes, it covers the cat, but not ...' is no yes."""
    server = serve(lambda i, attempt, wish: (OK, reply("Yes, it covers the cat", finish_reason=ended)))
    (said,) = make_handler("openai", model="toy", base_url=server.url, max_retries=0).judge([ask(0)])
    assert said.verdict == ("yes" if why is None else "abstain") and (why or "") in (said.error or "")


def test_thoughts_that_are_counted_in_the_sum_alone_are_paid(serve: Callable[..., Server]) -> None:
    usage = {"prompt_tokens": 100, "completion_tokens": 5, "total_tokens": 305}  # Gemini
    server = serve(lambda i, attempt, wish: (OK, {**reply("Yes"), "usage": usage}))
    (said,) = make_handler("openai", model="toy", base_url=server.url, price=(1.0, 10.0)).judge([ask(0)])
    assert said.tokens == 305 and said.usd == pytest.approx((100 + 10 * 205) / 1e6)


def test_a_page_instead_of_a_reply_speaks_of_the_address(serve: Callable[..., Server]) -> None:
    server = serve(lambda i, attempt, wish: (OK, b"<html>Welcome</html>", {"Content-Type": "text/html"}))
    judge = make_handler("openai", model="toy", base_url=server.url, max_retries=0)
    (said,) = judge.judge([ask(0)])
    assert "is base_url right" in str(said.error) and "base_url" in remedy(str(said.error))


def test_retries_do_not_go_far_beyond_a_limit_of_calls(serve: Callable[..., Server], tmp_path: Path) -> None:
    """A server that is down: twenty questions that were tried thrice were sixty calls of twenty."""
    server = serve(lambda i, attempt, wish: (503, failing("away")))
    inner = judge_at(server, max_retries=2, patience=100)
    judge = CachedHandler(judge=inner, path=tmp_path / "c.sqlite", max_calls=20)
    with pytest.raises(JudgeStopped):
        judge.judge([ask(i) for i in range(40)])
    assert 20 <= len(server.wishes) <= 20 + 2
