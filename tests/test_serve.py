"""The judge `openai` against a real server, `transformers serve`, with a tiny model that was taught yes and no."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
import tiny_vlms

from vlm_itl.core.checks import JudgeError
from vlm_itl.data.labels import LabelSpace
from vlm_itl.vlm.cache import CachedHandler
from vlm_itl.vlm.handler import JudgeQuery, JudgeStopped
from vlm_itl.vlm.local import HFJudge
from vlm_itl.vlm.local_model import load_vlm, vlm_inputs
from vlm_itl.vlm.render import instruct, render
from vlm_itl.vlm.server import OpenAIHandler

MISSING = [name for name in ("openai", "fastapi", "uvicorn", "rich") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"pip install 'transformers[serving]' openai: no {MISSING}")
LABELS = LabelSpace(("background", "disc"), palette=[(0, 0, 0), (255, 0, 0)])
# The server ends with us, however we end: its input is a pipe that only this process holds open.
SERVER = """
import os, sys, threading
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
import torch
torch.set_num_threads(1)
from transformers.cli.transformers import main
sys.argv = ["transformers", "serve", sys.argv[1], "--device", "cpu", "--host", "127.0.0.1", "--port", sys.argv[2]]
main()
"""


def ask(i: int, question: str = "Right?") -> JudgeQuery:
    """A bright photograph (even) or a dark one, with a mask in its middle."""
    rng = np.random.default_rng(i)
    level = 190 if i % 2 == 0 else 40
    pixels = np.clip(level + rng.normal(0, 20, (32, 32, 3)), 0, 255).astype(np.uint8)
    mask = np.zeros((32, 32), np.uint8)
    mask[10 : 20 + i % 5, 12:22] = 1
    return JudgeQuery(f"im{i}", Image.fromarray(pixels), mask, question=question, labels=LABELS)


def teach(folder: Path) -> None:
    """A few seconds of training: "Yes" and stop for bright photographs, "No" and stop for dark ones."""
    vlm = load_vlm(str(tiny_vlms.build("llava", folder, spread=1)))
    queries = [ask(i) for i in range(200)]
    inputs = vlm_inputs(vlm, [render(query) for query in queries], [instruct(query) for query in queries])
    words = torch.tensor([[(vlm.yes if i % 2 == 0 else vlm.no)[0], vlm.tokenizer.eos_token_id] for i in range(200)])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], words[:, :1]], 1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(words[:, :1])], 1)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(vlm.net.parameters(), lr=3e-3)
    for _ in range(60):
        rows = torch.randint(0, 200, (16,), generator=generator)
        logits = vlm.net(**{key: value[rows] for key, value in inputs.items()}, logits_to_keep=2).logits
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), words[rows].flatten()).backward()
        optimizer.step()
    vlm.net.save_pretrained(folder)
    vlm.processor.save_pretrained(folder)


@dataclass
class Served:
    """A running server."""

    folder: str
    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def requests(self) -> int:
        return self.log.read_text(errors="replace").count('"POST /v1/chat/completions')


@contextlib.contextmanager
def running(folder: Path, place: Path) -> Iterator[Served]:
    """Start the server on a free port of this machine, wait until it answers, and end it whatever happens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (place / "hub").mkdir(exist_ok=True)  # the server needs the folder to be there
    log = place / f"serve-{port}.log"
    environment = {**os.environ, "HF_HUB_CACHE": str(place / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("wb") as out:
        command = [sys.executable, "-c", SERVER, str(folder), str(port)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, stderr=out, env=environment)
        try:
            give_up = time.monotonic() + 90
            while True:
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                    break
                if process.poll() is not None or time.monotonic() > give_up:
                    pytest.fail(f"transformers serve did not start: {log.read_text(errors='replace')[-800:]}")
                time.sleep(0.1)
            yield Served(str(folder), f"http://127.0.0.1:{port}/v1", process, log)
        finally:
            process.kill()
            process.wait(timeout=20)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    place = tmp_path_factory.mktemp("serve")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    teach(place / "model")
    with running(place / "model", place) as server:
        yield server
    torch.set_num_threads(threads)


def judge_at(served: Served, **options: Any) -> Any:
    return OpenAIHandler(**{"model": served.folder, "base_url": served.url, "max_tokens": 4, **options})


def test_same_verdicts_as_the_model_itself(served: Served) -> None:
    """Logprobs are asked for and silently ignored: hard text, told as such, equal to the local handler's verdicts."""
    queries = [ask(i) for i in range(1000, 1024)]
    answers = judge_at(served, price=[1.0, 2.0]).judge(queries)
    local = HFJudge(served.folder).judge(queries)
    assert [j.id for j in answers] == [q.id for q in queries]
    assert [j.verdict for j in answers] == [j.verdict for j in local] == ["yes", "no"] * 12
    assert {(j.score_kind, j.p_mass, j.attempts, j.error) for j in answers} == {("hard", None, 1, None)}
    assert [j.p_yes for j in answers] == [1.0, 0.0] * 12
    for j, other in zip(answers, local, strict=True):
        assert j.tokens is not None and other.tokens is not None and j.tokens == other.tokens + 2  # the word, the end
        assert j.usd == pytest.approx((other.tokens + 2 * 2.0) / 1e6) and 0 < (j.latency_s or 0) < 60
        assert served.folder in j.model


def test_votes_where_logprobs_are_ignored(served: Served) -> None:
    """`n` is ignored as well, so each vote is a request; the first question alone pays for finding out."""
    answers = judge_at(served, votes=3, concurrency=1).judge([ask(i) for i in (1000, 1001)])
    assert [(j.verdict, j.score_kind, j.attempts) for j in answers] == [("yes", "votes", 4), ("no", "votes", 3)]
    assert all(j.p_yes is not None and j.p_mass is not None for j in answers)
    assert answers[0].p_yes > 0.5 > answers[1].p_yes


def test_a_wish_for_json_is_ignored_and_the_text_is_read(served: Served) -> None:
    answers = judge_at(served, structured=True, logprobs=False).judge([ask(1000), ask(1001)])
    assert [(j.verdict, j.score_kind) for j in answers] == [("yes", "hard"), ("no", "hard")]


def test_a_cut_off_answer_abstains(served: Served) -> None:
    answers = judge_at(served, max_tokens=1).judge([ask(1000), ask(1001)])
    assert [j.verdict for j in answers] == ["abstain", "abstain"]
    assert all("cut off" in str(j.error) and j.p_yes is None for j in answers)


def test_what_the_server_cannot_read_abstains(served: Served) -> None:
    """A malformed message is answered with 500: an abstention after the retries, never a "no"."""
    broken = judge_at(served, max_retries=1, extra_body={"messages": "nonsense"})
    (answer,) = broken.judge([ask(1001)])
    assert answer.verdict == "abstain" and "500" in str(answer.error) and answer.attempts == 2
    (fine,) = judge_at(served).judge([ask(1001)])
    assert fine.verdict == "no"


def test_a_second_run_asks_nothing_and_one_pixel_asks_once(served: Served, tmp_path: Path) -> None:
    queries = [ask(i) for i in range(1000, 1012)]
    judge = CachedHandler(judge=judge_at(served), path=tmp_path / "c.sqlite")
    first, calls = judge.judge(queries), served.requests()
    again = CachedHandler(judge=judge_at(served), path=tmp_path / "c.sqlite").judge(queries)
    assert served.requests() == calls and all(j.cached for j in again)
    assert [replace(j, cached=False) for j in again] == first
    mask = queries[5].mask.copy()
    mask[0, 0] = 1
    queries[5] = replace(queries[5], mask=mask)
    judge.judge(queries)
    assert served.requests() == calls + 1


def test_a_server_that_dies_keeps_the_verdicts(served: Served, tmp_path: Path) -> None:
    """Killed in the middle: abstentions until patience ends, then one line; what was answered is in the cache."""
    queries = [ask(i) for i in range(1000, 1040)]
    with running(Path(served.folder), tmp_path) as server:
        inner = judge_at(server, concurrency=2, patience=3, max_retries=0)
        judge = CachedHandler(judge=inner, path=tmp_path / "c.sqlite", batch_size=8)
        assert len(judge.judge(queries[:8])) == 8
        server.process.kill()
        server.process.wait(timeout=20)
        with pytest.raises(JudgeStopped, match=r"failed \d times in a row.*APIConnectionError") as caught:
            judge.judge(queries)
        assert "\n" not in str(caught.value) and len(judge.cache) == 8
        with pytest.raises(JudgeError, match="cannot be reached"):
            judge_at(server, max_retries=0).judge(queries)
