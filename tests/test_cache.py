"""The cache of judgements: what misses, what is never stored, two processes at once, a killed run, limits."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlm_itl.core.checks import ConfigError, JudgeError
from vlm_itl.data.labels import LabelSpace
from vlm_itl.vlm.cache import CachedHandler, JudgementCache, handler_identity, is_final, query_key, query_keys
from vlm_itl.vlm.handler import Judgement, JudgeQuery, JudgeStopped, VLMHandler, abstain, make_handler
from vlm_itl.vlm.simulated import MockHandler

pytestmark = pytest.mark.usefixtures("undrawn")

VOC = LabelSpace.voc()
MASK = np.zeros((6, 6), np.uint8)
MASK[:3] = 8
IMAGE = Image.fromarray(np.arange(108, dtype=np.uint8).reshape(6, 6, 3))


class Counting(VLMHandler):
    """Answers "yes"; fails on ids that begin with "bad"; counts."""

    name = "counting"

    def __init__(self, seed: int = 0, usd: float | None = 0.001):
        self.seed = seed
        self._usd = usd
        self._asked: list[str] = []

    def _judge_one(self, query: JudgeQuery) -> Judgement:
        self._asked.append(query.id)
        if query.id.startswith("bad"):
            return abstain("no answer within 30 s")
        return Judgement("yes", p_yes=0.75, p_mass=0.9, score_kind="logprobs", raw="Yes", tokens=7, usd=self._usd)


def ask(i: int = 0, mask: Any = None, image: Any = None, **fields: Any) -> JudgeQuery:
    if mask is None:
        mask = MASK.copy()
        mask[-1] = i % 21
        mask[-2] = i // 21 % 21
    return JudgeQuery(fields.pop("id", f"im{i}"), image, mask, labels=fields.pop("labels", VOC), **fields)


def changed(value: np.ndarray) -> np.ndarray:
    other = value.copy()
    other.reshape(-1)[0] ^= 1
    return other


# ---- the key ----


def test_same_question_same_key_whatever_the_id() -> None:
    handler = make_handler("always_yes")
    assert query_key(ask(image=IMAGE), handler) == query_key(ask(image=IMAGE.copy(), id="other"), handler)
    assert query_key(ask(image=lambda: IMAGE), handler) == query_key(ask(image=IMAGE), handler)


RENAMED = LabelSpace(tuple("moggy" if name == "cat" else name for name in VOC.names))


@pytest.mark.parametrize(
    "other",
    [
        ask(image=IMAGE, mask=changed(ask().mask)),
        ask(image=Image.fromarray(changed(np.asarray(IMAGE)))),
        ask(image=IMAGE, question="exhaustive"),
        ask(image=IMAGE, question="Is the {class_names} right?"),
        ask(image=IMAGE, class_ids=(8, 12)),
        ask(image=IMAGE, labels=RENAMED),
        ask(image=IMAGE, extra={"hint": "a"}),
    ],
    ids=["mask pixel", "image pixel", "question", "template", "classes", "class name", "extra"],
)
def test_a_change_misses(other: JudgeQuery) -> None:
    handler = make_handler("always_yes")
    assert query_key(other, handler) != query_key(ask(image=IMAGE), handler)


def test_option_handler_and_truth_are_in_the_key() -> None:
    one, two = Counting(seed=1), Counting(seed=2)
    assert query_key(ask(), one) != query_key(ask(), two)
    assert query_key(ask(), make_handler("always_yes")) != query_key(ask(), make_handler("always_no"))
    mock = MockHandler(accuracy=0.5)
    mock.bind_truth(lambda image_id: MASK)
    before = query_key(ask(), mock)
    assert before != query_key(ask(id="other"), mock)
    mock.bind_truth(lambda image_id: changed(MASK))
    assert before != query_key(ask(), mock)


def test_a_handler_that_cannot_be_compared_says_so() -> None:
    handler = Counting()
    handler.net = object()  # type: ignore[attr-defined]
    with pytest.raises(JudgeError, match="identity"):
        handler_identity(handler)


# ---- the file ----


def test_round_trip_keeps_every_field(tmp_path: Path) -> None:
    cache = JudgementCache(tmp_path / "deep" / "c.sqlite")
    first = Judgement("no", 0.25, 0.875, "logprobs", 'No: "é"\n', None, 12, 0.5, 1.5, 3, model="m", id="a")
    second = Judgement("abstain", raw="I'm sorry.", error="refused")
    assert cache.put({"a": first, "b": second}) == 2
    cache.close()
    again = JudgementCache(tmp_path / "deep" / "c.sqlite")
    assert again.get(["b", "a", "c"]) == {"a": replace(first, cached=True), "b": replace(second, cached=True)}
    columns = [row[1] for row in sqlite3.connect(again.path).execute("PRAGMA table_info(judgements)")]
    assert {"key", "id", "verdict", "p_yes", "raw", "question", "settings", "answered"} <= set(columns)
    assert sqlite3.connect(again.path).execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_many_keys_at_once(tmp_path: Path) -> None:
    cache = JudgementCache(tmp_path / "c.sqlite")
    cache.put({str(i): Judgement("yes", id=str(i)) for i in range(1201)})
    found = cache.get([str(i) for i in range(1300)])
    assert len(found) == len(cache) == 1201 and found["1200"].id == "1200"


def test_failures_are_never_stored(tmp_path: Path) -> None:
    assert not is_final(abstain("500")) and is_final(Judgement("abstain", raw="I cannot tell."))
    assert not is_final(Judgement("yes", error="2 of 5 votes failed", raw="Yes"))
    inner = Counting()
    judge = CachedHandler(judge=inner, path=tmp_path / "c.sqlite")
    queries = [ask(0), ask(1, id="bad1"), ask(2)]
    assert [j.verdict for j in judge.judge(queries)] == ["yes", "abstain", "yes"]
    judge.judge(queries)
    assert inner._asked == ["im0", "bad1", "im2", "bad1"] and len(judge.cache) == 2


@pytest.mark.parametrize("content", [b"not a database at all, but long enough" * 30, None], ids=["garbage", "folder"])
def test_an_unusable_file_is_one_clear_line(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "c.sqlite"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(JudgeError, match="c.sqlite cannot be used") as caught:
        JudgementCache(path)
    assert "\n" not in str(caught.value)


def test_a_table_of_somebody_else_is_refused(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "c.sqlite")
    connection.execute("CREATE TABLE judgements (a)")
    connection.close()
    with pytest.raises(JudgeError, match="not one of this library"):
        JudgementCache(tmp_path / "c.sqlite")


WRITER = """
import sys
from vlm_itl.vlm.cache import JudgementCache
from vlm_itl.vlm.handler import Judgement
path, name, batches = sys.argv[1], sys.argv[2], int(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
cache = JudgementCache(path)
for batch in range(batches):
    own = {f"{name} {batch} {i}": Judgement("yes", id=f"{i}") for i in range(8)}
    cache.put(own | {f"both {batch}": Judgement("no")})
    print(batch, flush=True)
"""


def start_writer(path: Path, name: str, batches: int) -> subprocess.Popen[str]:
    """A process that has imported everything and waits for a line before it opens the file."""
    arguments = [sys.executable, "-c", WRITER, str(path), name, str(batches)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(arguments, **pipes, text=True)


def let_go(writers: list[subprocess.Popen[str]]) -> None:
    """Start all of them at the same moment."""
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()


def test_two_processes_write_at_once(tmp_path: Path) -> None:
    writers = [start_writer(tmp_path / "c.sqlite", name, 100) for name in ("a", "b")]
    let_go(writers)
    for writer in writers:
        _, complaints = writer.communicate(timeout=60)
        assert writer.returncode == 0, complaints
    assert len(JudgementCache(tmp_path / "c.sqlite")) == 2 * 100 * 8 + 100
    assert sqlite3.connect(tmp_path / "c.sqlite").execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_killed_run_loses_at_most_one_batch(tmp_path: Path) -> None:
    writer = start_writer(tmp_path / "c.sqlite", "a", 10**6)
    let_go([writer])
    assert writer.stdout is not None
    said = [writer.stdout.readline() for _ in range(40)]
    os.kill(writer.pid, signal.SIGKILL)
    said += writer.stdout.readlines()
    writer.wait(timeout=20)
    whole = int([line for line in said if line.endswith("\n")][-1]) + 1
    kept = len(JudgementCache(tmp_path / "c.sqlite"))
    assert kept % 9 == 0, "a batch is stored whole or not at all"
    assert whole * 9 <= kept <= (whole + 1) * 9


# ---- the handler ----


def test_second_run_makes_no_call_and_one_pixel_makes_one(tmp_path: Path) -> None:
    queries = [ask(i) for i in range(200)]
    first = Counting()
    fresh = CachedHandler(judge=first, path=tmp_path / "c.sqlite").judge(queries)
    second = Counting()
    judge = CachedHandler(judge=second, path=tmp_path / "c.sqlite")
    again = judge.judge(queries[::-1])[::-1]
    assert len(first._asked) == 200 and not second._asked and judge.hits == 200
    assert all(j.cached for j in again) and not any(j.cached for j in fresh)
    assert [replace(j, cached=False) for j in again] == fresh
    queries[77] = replace(queries[77], mask=changed(queries[77].mask))
    judge.judge(queries)
    assert second._asked == ["im77"]


def test_the_same_question_twice_in_a_batch_is_asked_once(tmp_path: Path) -> None:
    inner = Counting()
    answers = CachedHandler(judge=inner, path=tmp_path / "c.sqlite").judge([ask(1), ask(2), ask(1, id="twin")])
    assert inner._asked == ["im1", "im2"] and [j.id for j in answers] == ["im1", "im2", "twin"]


def test_bad_queries_abstain_and_are_not_stored(tmp_path: Path) -> None:
    def broken() -> Image.Image:
        raise OSError("truncated file")

    class Looks(Counting):
        def _judge_one(self, query: JudgeQuery) -> Judgement:
            query.picture()
            return super()._judge_one(query)

    wrong = ["text", ask(mask=np.full((6, 6), 255, np.uint8)), ask(1, image=broken), ask(2, image=IMAGE.resize((3, 3)))]
    judge = CachedHandler(judge=Looks(), path=tmp_path / "c.sqlite")
    answers = judge.judge([*wrong, ask(3, image=IMAGE)])  # type: ignore[list-item]
    assert [j.verdict for j in answers] == ["abstain"] * 4 + ["yes"] and len(judge.cache) == 1
    assert "truncated file" in str(answers[2].error) and "differ in size" in str(answers[3].error)


def test_max_calls_stops_cleanly_and_resumes(tmp_path: Path) -> None:
    queries = [ask(i) for i in range(10)]
    for run in range(3):
        inner = Counting()
        judge = CachedHandler(judge=inner, path=tmp_path / "c.sqlite", max_calls=4, batch_size=3)
        if run < 2:
            with pytest.raises(JudgeStopped, match="max_calls=4") as stop:
                judge.judge(queries)
            assert "\n" not in str(stop.value)
            assert len(inner._asked) == 4 and len(judge.cache) == 4 * (run + 1)
        else:
            assert len(judge.judge(queries)) == 10 and len(inner._asked) == 2


def test_max_usd_stops_before_it_is_passed(tmp_path: Path) -> None:
    queries = [ask(i) for i in range(10)]
    judge = CachedHandler(judge=Counting(usd=0.03), path=tmp_path / "c.sqlite", max_usd=0.1)
    with pytest.raises(JudgeStopped, match="max_usd=0.1"):
        judge.judge(queries)
    assert len(judge.cache) == 3 and judge.usd <= 0.1
    judge = CachedHandler(judge=Counting(usd=0.03), path=tmp_path / "c.sqlite", max_usd=0.3)
    assert len(judge.judge(queries)) == 10 and judge.calls == 7 and judge.usd == pytest.approx(0.21)  # resumed
    unknown = CachedHandler(judge=Counting(seed=9, usd=None), path=tmp_path / "c.sqlite", max_usd=0.1)
    with pytest.raises(JudgeStopped, match="no known price"):
        unknown.judge(queries)
    assert unknown.calls == 1 and len(unknown.cache) == 11  # its one answer is kept


def test_a_judge_that_stops_midway_leaves_its_answers(tmp_path: Path) -> None:
    class Stops(Counting):
        def _judge_batch(self, queries: list[JudgeQuery]) -> list[Judgement]:
            raise JudgeStopped("wrong key", {1: Judgement("yes", raw="Yes", id=queries[1].id)})

    judge = CachedHandler(judge=Stops(), path=tmp_path / "c.sqlite")
    with pytest.raises(JudgeStopped, match="wrong key"):
        judge.judge([ask(0), ask(1), ask(2)])
    assert list(judge.cache.get(query_keys([ask(0), ask(1), ask(2)], judge.judge_handler)).values())[0].id == "im1"


def test_by_name_and_simulated(tmp_path: Path) -> None:
    judge = make_handler("cached", seed=5, tau=0.5, judge="mock", options={"accuracy": 0.9}, path=tmp_path / "c.sqlite")
    assert isinstance(judge, CachedHandler) and judge.needs_truth and "mock" in judge.model
    with pytest.raises(JudgeError, match="bind_truth"):
        judge.judge([ask(0)])
    judge.bind_truth(lambda image_id: MASK)
    plain = make_handler("mock", seed=5, tau=0.5, accuracy=0.9)
    plain.bind_truth(lambda image_id: MASK)
    queries = [ask(i) for i in range(50)]
    wanted = [j.verdict for j in plain.judge(queries)]
    assert [j.verdict for j in judge.judge(queries)] == wanted == [j.verdict for j in judge.judge(queries)]
    judge.close()


def test_wrong_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs the option"):
        make_handler("cached", judge="always_yes")
    with pytest.raises(ConfigError, match="judge must be"):
        make_handler("cached", judge=3, path=tmp_path / "c")
    with pytest.raises(ConfigError, match="max_calls"):
        make_handler("cached", judge="always_yes", path=tmp_path / "c", max_calls=-1)


# ---- through a run and a notebook ----


class Server(http.server.ThreadingHTTPServer):
    """Says yes to everything, and counts."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.requests: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *parts: Any) -> None:
        """Quiet."""

    def do_POST(self) -> None:
        self.server.requests.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Yes"}}
        body = {"id": "1", "object": "chat.completion", "created": 0, "model": "toy", "choices": [choice]}
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def test_a_second_run_of_an_experiment_makes_no_call(server: Server, tmp_path: Path) -> None:
    """The whole loop twice, in two run folders: trained, predicted and drawn anew, and not one question asked again."""
    pytest.importorskip("openai")
    from vlm_itl.experiment.config import make_config
    from vlm_itl.experiment.loop import run_al

    asked = {"judge": "openai", "options": {"model": "toy", "base_url": server.url}, "path": str(tmp_path / "c.sqlite")}
    tiny = {"steps": 2, "batch_size": 4, "image_size": 48, "initial": 6, "increment": 6, "max_labelled": 12}
    scenes = {"dataset": "scenes", "data_options": {"n_train": 30, "n_test": 2, "size": [48, 64]}, "val_share": 4}
    judged = {"mode": "vlm", "judge": "cached", "judge_options": asked, "policy": "pseudo", "gallery": 0}
    counts, verdicts = [], []
    for name in ("one", "two"):
        before = len(server.requests)
        rounds = list(run_al(make_config({**tiny, **scenes, **judged, "output_dir": str(tmp_path / name)})))
        counts.append(len(server.requests) - before)
        verdicts.append([(r.judge["n"], r.judge["accepted"]) for r in rounds if r.judge])
    assert counts[0] >= verdicts[0][0][0] == 20 and counts[1] == 0 and verdicts[0] == verdicts[1]


NOTEBOOK = """
import json
import numpy as np
from dataclasses import replace
from vlm_itl.vlm.cache import CachedHandler
from vlm_itl.data.sources import toy_images
from vlm_itl.vlm.server import OpenAIHandler
from vlm_itl.vlm.handler import JudgeQuery

toy = toy_images()
queries = [JudgeQuery(r["id"], r["image"], r["mask"], question=q, labels=toy.labels)
           for r in toy.train for q in ("quality", "exhaustive")]
if flip:
    mask = queries[0].mask.copy()
    mask[0, 0] = 1 - mask[0, 0]
    queries[0] = replace(queries[0], mask=mask)
answers = CachedHandler(judge=OpenAIHandler(model="toy", base_url=url), path=path).judge(queries)
print([j.verdict for j in answers].count("yes"), "of", len(answers))
"""


def test_a_notebook_run_again_makes_no_call_and_one_pixel_makes_one(server: Server, tmp_path: Path) -> None:
    """Through papermill, in fresh kernels."""
    pytest.importorskip("openai")
    import nbformat
    import papermill

    cells = [nbformat.v4.new_code_cell(text) for text in ('url = path = ""\nflip = False', NOTEBOOK)]
    cells[0].metadata["tags"] = ["parameters"]
    language = {"language_info": {"name": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=language), tmp_path / "book.ipynb")
    calls = []
    for turn, flip in enumerate([False, False, True]):
        given = {"url": server.url, "path": str(tmp_path / "c.sqlite"), "flip": flip}
        out = tmp_path / f"done{turn}.ipynb"
        before = len(server.requests)
        papermill.execute_notebook(
            tmp_path / "book.ipynb", out, given, kernel_name="python3", progress_bar=False, log_output=False
        )
        calls.append(len(server.requests) - before)
        assert "8 of 8" in out.read_text()
    assert calls == [8, 0, 1]


READER = """
import sqlite3, sys
with sqlite3.connect(f"file:{sys.argv[1]}?mode=ro", uri=True) as reader:
    rows = reader.execute("SELECT verdict, COUNT(*), AVG(p_yes) FROM judgements GROUP BY verdict").fetchall()
print(rows)
"""


def test_any_sqlite_tool_reads_it_while_it_is_in_use(tmp_path: Path) -> None:
    """Another process without this library, read-only, with our connection open; and Python's own command line."""
    judge = CachedHandler(judge=Counting(), path=tmp_path / "c.sqlite")
    judge.judge([ask(i) for i in range(3)])
    done = subprocess.run(
        [sys.executable, "-I", "-c", READER, str(tmp_path / "c.sqlite")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[('yes', 3, 0.75)]"
    if shutil.which("sqlite3"):
        shell = subprocess.run(
            ["sqlite3", str(tmp_path / "c.sqlite"), "SELECT COUNT(*) FROM judgements"], capture_output=True, text=True
        )
        assert shell.stdout.strip() == "3"


JUDGING = """
import sys, time
import numpy as np
from vlm_itl.vlm.cache import CachedHandler
from vlm_itl.data.labels import LabelSpace
from vlm_itl.vlm.handler import Judgement, JudgeQuery, VLMHandler

class Slow(VLMHandler):
    name = "slow"
    def _judge_one(self, query):
        print("asked", query.id, flush=True)
        time.sleep(0.002)
        return Judgement("yes", raw="Yes", score_kind="hard", usd=0.0)

labels = LabelSpace.voc()
queries = []
for i in range(400):
    mask = np.zeros((6, 6), np.uint8)
    mask[0], mask[1] = i % 20 + 1, i // 20 + 1
    queries.append(JudgeQuery(f"im{i}", None, mask, labels=labels))
CachedHandler(judge=Slow(), path=sys.argv[1], batch_size=8).judge(queries)
print("done", flush=True)
"""


def test_a_killed_judge_asks_at_most_one_batch_again(tmp_path: Path) -> None:
    """SIGKILL while judging in batches of 8, then the same command again: at most 8 questions are asked twice."""
    command = [sys.executable, "-c", JUDGING, str(tmp_path / "c.sqlite")]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    said = [first.stdout.readline() for _ in range(101)]
    os.kill(first.pid, signal.SIGKILL)
    said += first.stdout.readlines()
    first.wait(timeout=20)
    before = {line.split()[1] for line in said if line.startswith("asked") and line.endswith("\n")}
    kept = len(JudgementCache(tmp_path / "c.sqlite"))
    assert kept % 8 == 0 and 0 <= len(before) - kept <= 8
    second = subprocess.run(command, capture_output=True, text=True, check=True)
    after = {line.split()[1] for line in second.stdout.splitlines() if line.startswith("asked")}
    assert second.stdout.endswith("done\n") and len(after) == 400 - kept and len(before & after) <= 8
    assert len(before | after) == 400 == len(JudgementCache(tmp_path / "c.sqlite"))


@pytest.mark.slow
def test_two_judging_processes_share_one_file(tmp_path: Path) -> None:
    """The same 400 questions from two processes at once: both end, every answer is there once."""
    command = [sys.executable, "-c", JUDGING, str(tmp_path / "c.sqlite")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        said, complaints = process.communicate(timeout=60)
        assert process.returncode == 0 and said.endswith("done\n"), complaints
    connection = sqlite3.connect(tmp_path / "c.sqlite")
    assert connection.execute("SELECT COUNT(*), COUNT(DISTINCT key) FROM judgements").fetchone() == (400, 400)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_what_the_judge_is_told_is_in_the_key() -> None:
    """The sentence that says how to read the picture belongs to the question."""

    class Told(Counting):
        note = "Lines are borders."

        def query_text(self, query: JudgeQuery) -> str:
            return f"{self.note} {query.text()}"

    before = query_key(ask(), Told())
    Told.note = "Lines are borders!"
    assert query_key(ask(), Told()) != before
