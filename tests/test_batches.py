"""Questions handed in as a file, against a loopback server that keeps files and batches as OpenAI's does."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_openai_judge import ask, reply

from vlm_itl.core.checks import ConfigError
from vlm_itl.data.labels import LabelSpace
from vlm_itl.data.masks import DecodeRows, MaskStore, make_rows
from vlm_itl.experiment.judge_turn import ask_about
from vlm_itl.judging.batches import OpenAIBatch, batch_line, write_parts
from vlm_itl.vlm.cache import CachedHandler
from vlm_itl.vlm.handler import JudgeStopped, make_handler

pytest.importorskip("openai")
pytestmark = [
    pytest.mark.filterwarnings("ignore:judge 'openai':RuntimeWarning"),
    pytest.mark.usefixtures("undrawn"),
]


class Office(http.server.ThreadingHTTPServer):
    "Keeps files; a batch is done at the second look. `broken`: what becomes of a question instead of an answer."

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Desk)
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.ends, self.broken, self.unanswered = "completed", dict[int, Any](), set[int]()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def work(self, batch: dict[str, Any]) -> None:
        "Answer all lines of a batch."
        good, bad = [], []
        for line in map(json.loads, self.files[batch["input_file_id"]].splitlines()):
            assert (line["method"], line["url"]) == ("POST", "/v1/chat/completions")
            number = int(line["custom_id"][1:])
            if number in self.broken:
                bad.append({"custom_id": line["custom_id"], **self.broken[number]})
            elif number not in self.unanswered:
                body = reply("No" if number % 2 else "Yes", wish=line["body"])
                told = {"status_code": 200, "body": body, "request_id": "a\u2028b"}  # no line ends at U+2028
                good.append({"custom_id": line["custom_id"], "response": told})
        for name, lines in (("output_file_id", good), ("error_file_id", bad)):
            if lines:
                batch[name] = f"{name} {batch['id']}"
                text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines[::-1])  # in any order
                self.files[batch[name]] = text.encode()
        batch["status"] = self.ends


class Desk(http.server.BaseHTTPRequestHandler):
    server: Office

    def log_message(self, *parts: Any) -> None:
        "Quiet."

    def send(self, body: Any, status: int = 200) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self) -> None:
        office, data = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/files"):
            name = f"file{len(office.files)}"
            office.files[name] = b"\n".join(line for line in data.splitlines() if line.startswith(b'{"custom_id"'))
            return self.send({"id": name, "object": "file"})
        name = f"batch{len(office.batches)}"
        office.batches[name] = {"id": name, "object": "batch", "status": "validating", "looks": 0, **json.loads(data)}
        self.send(office.batches[name])

    def do_GET(self) -> None:
        office = self.server
        if self.path.endswith("/content"):
            kept = office.files[self.path.split("/")[-2].replace("%20", " ")]
            return self.send(kept) if kept else self.send({"error": {"message": "No such File object"}}, 404)
        if "/batches/" not in self.path:
            return self.send({"object": "list", "data": list(office.batches.values()), "has_more": False})
        batch = office.batches[self.path.split("/")[-1]]
        batch["looks"] += 1
        if batch["looks"] == 2:
            office.work(batch)
        self.send(batch)


@pytest.fixture
def office() -> Iterator[Office]:
    server = Office()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def judge_at(office: Office, **options: Any) -> OpenAIBatch:
    usual = {"base_url": office.url, "poll_s": 0.01, "price": (1.0, 4.0), "max_retries": 0}
    judge = make_handler("openai_batch", model="toy", **{**usual, **options})
    assert isinstance(judge, OpenAIBatch)
    return judge


def test_answers_are_those_of_the_judge_openai(office: Office) -> None:
    answers = judge_at(office).judge([ask(i) for i in range(30)])
    assert [a.verdict for a in answers] == ["yes", "no"] * 15 and {a.score_kind for a in answers} == {"logprobs"}
    assert answers[0].p_yes == pytest.approx(0.7 / 0.9) and answers[0].usd == pytest.approx((100 + 4) / 1e6)
    (batch,) = office.batches.values()
    assert batch["completion_window"] == "24h" and len(office.files[batch["input_file_id"]].splitlines()) == 30


@pytest.mark.parametrize("cached", [False, True])
def test_a_round_is_one_file(office: Office, tmp_path: Path, cached: bool) -> None:
    """Ninety masks were three files, each waited for before the next was handed in, and also with a cache before it."""
    labels = LabelSpace(("background", "thing"), palette=[(0, 0, 0), (200, 0, 0)])
    masks, judge = MaskStore(tmp_path / "masks", labels), judge_at(office)
    pictures = [Image.fromarray(np.full((8, 8, 3), number, np.uint8)) for number in range(90)]
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number}.png")
        masks.write(str(number), np.eye(8, dtype=np.uint8))
    rows = make_rows([str(n) for n in range(90)], [tmp_path / f"{n}.png" for n in range(90)])
    rows = rows.with_transform(DecodeRows(labels))
    asked = CachedHandler(judge=judge, path=tmp_path / "answers.db") if cached else judge
    answers = ask_about(asked, rows, masks, "quality", lambda query: [query])
    assert [said.verdict for ((_, said),) in answers] == ["yes", "no"] * 45
    assert len(office.batches) == 1


def test_who_is_killed_while_waiting_finds_the_batch_again(office: Office) -> None:
    queries = [ask(i) for i in range(6)]
    first = judge_at(office).judge(queries)
    assert [a.verdict for a in judge_at(office).judge(queries)] == [a.verdict for a in first]
    assert len(office.batches) == 1  # handed in once, by two processes
    judge_at(office).judge(queries[:5])
    assert len(office.batches) == 2  # other questions


def test_what_fails_abstains_and_is_asked_again(office: Office, tmp_path: Path) -> None:
    filtered = {"error": {"code": "content_filter", "message": "the picture was filtered", "param": None}}
    office.broken = {
        1: {"response": {"status_code": 400, "body": filtered}, "error": None},
        2: {"response": None, "error": {"code": "batch_expired", "message": "This request could not be executed"}},
    }
    office.ends, office.unanswered = "expired", {3}
    judge = CachedHandler(judge=judge_at(office), path=tmp_path / "judge.sqlite")
    answers = judge.judge([ask(i) for i in range(6)])
    assert [a.verdict for a in answers] == ["yes", "abstain", "abstain", "abstain", "yes", "no"]
    assert "could not be executed" in str(answers[2].error) and "ended before" in str(answers[3].error)
    office.ends, office.broken, office.unanswered = "completed", {}, set()
    again = judge.judge([ask(i) for i in range(6)])
    assert [a.verdict for a in again if not a.cached] and all(a.error is None for a in again if a.id != "im1")


@pytest.mark.parametrize("ends", ["expired", "completed"])
def test_a_batch_that_ended_without_an_answer_is_not_fetched_for_ever(
    office: Office, tmp_path: Path, ends: str
) -> None:
    """The day was too short, or every request failed for a while: the same questions are handed in anew."""
    office.ends, office.unanswered = ends, {0, 1, 2} if ends == "expired" else set()
    busy = {"response": {"status_code": 500, "body": {"error": {"message": "busy"}}}, "error": None}
    office.broken = {} if ends == "expired" else dict.fromkeys(range(3), busy)
    judge = CachedHandler(judge=judge_at(office), path=tmp_path / "judge.sqlite")
    assert {a.verdict for a in judge.judge([ask(i) for i in range(3)])} == {"abstain"}
    office.ends, office.unanswered, office.broken = "completed", set(), {}
    assert [a.verdict for a in judge.judge([ask(i) for i in range(3)])] == ["yes", "no", "yes"]


def test_answers_that_the_server_has_thrown_away_are_asked_for_anew(office: Office) -> None:
    """Servers keep what came of a batch for some weeks; who comes back later is not told of a missing file for ever."""
    queries = [ask(i) for i in range(3)]
    first = judge_at(office).judge(queries)
    for name in ("output_file_id", "error_file_id"):
        if gone := office.batches["batch0"].get(name):
            office.files[gone] = b""
    again = judge_at(office).judge(queries)
    assert [a.verdict for a in again] == [a.verdict for a in first] and len(office.batches) == 2


@pytest.mark.parametrize("oldest_first", [True, False])
def test_the_newest_batch_whose_answers_are_there_is_taken(office: Office, oldest_first: bool) -> None:
    """Two of three of one content are thrown away: whichever the list names first, the third is fetched, unpaid."""
    queries = [ask(i) for i in range(3)]

    def throw_away() -> None:
        for batch in office.batches.values():
            office.files[batch["output_file_id"]] = b""

    first = judge_at(office).judge(queries)
    for _ in range(2):
        throw_away()
        judge_at(office).judge(queries)
    assert len(office.batches) == 3
    told = list(office.batches.items())
    for made, (_, batch) in enumerate(told):
        batch["created_at"] = 1_700_000_000 + made
    office.batches = dict(told if oldest_first else told[::-1])
    assert [a.verdict for a in judge_at(office).judge(queries)] == [a.verdict for a in first]
    assert len(office.batches) == 3
    throw_away()
    assert [a.verdict for a in judge_at(office).judge(queries)] == [a.verdict for a in first]
    assert len(office.batches) == 4


def test_answers_of_today_that_are_missing_are_not_paid_for_twice(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that cannot hand out what it has just worked on would not hand out the next either."""
    work = office.work

    def forgetful(batch: dict[str, Any]) -> None:
        work(batch)
        office.files[batch["output_file_id"]] = b""

    monkeypatch.setattr(office, "work", forgetful)
    with pytest.raises(JudgeStopped, match="does not go on"):
        judge_at(office).judge([ask(0), ask(1)])
    assert len(office.batches) == 1


def test_a_refused_file_is_one_clear_line(office: Office) -> None:
    office.ends = "failed"
    with pytest.raises(JudgeStopped, match=r"the batch batch0 has failed: no reason given\."):
        judge_at(office).judge([ask(0), ask(1)])


def test_a_server_that_is_gone_is_one_clear_line(office: Office) -> None:
    judge = judge_at(office, base_url="http://127.0.0.1:1/v1")
    with pytest.raises(JudgeStopped, match="does not go on .* run again to fetch their answers") as stop:
        judge.judge([ask(0)])
    assert "\n" not in str(stop.value)


def test_files_are_no_larger_than_may_be(tmp_path: Path) -> None:
    lines = [batch_line(i, {"model": "toy", "messages": "x" * 100}) for i in range(10)]
    size = len(lines[0]) + 1
    for most, wanted in (({"most_lines": 4}, [4, 4, 2]), ({"most_bytes": 3 * size}, [3, 3, 3, 1])):
        parts = [path.read_text().splitlines() for path in write_parts(lines, tmp_path, **most)]
        assert [len(part) for part in parts] == wanted and [line for part in parts for line in part] == lines


def test_the_list_price_is_halved_and_a_given_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-planted-0123456789abcdef")
    half = make_handler("openai_batch", model="gpt-4o")
    own = make_handler("openai_batch", model="gpt-4o", price=(1, 2))
    assert isinstance(half, OpenAIBatch) and isinstance(own, OpenAIBatch)
    assert half.talk.price is not None and own.talk.price is not None
    assert (half.talk.price.read, half.talk.price.written, own.talk.price.read) == (1.25, 5.0, 1)
    with pytest.raises(ConfigError, match="has no option 'votees'. Did you mean 'votes'"):
        make_handler("openai_batch", model="gpt-4o", votees=3)
