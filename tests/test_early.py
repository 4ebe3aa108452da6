"""A judge on a server is asked while the model still draws: the same answers, calls, prices and records, sooner."""

from __future__ import annotations

import json
import re
import sqlite3
import sys
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import test_openai_judge
from test_openai_judge import OK, Server, failing, reply

from vlm_itl.core.checks import JudgeError
from vlm_itl.data.masks import MaskStore
from vlm_itl.experiment import acceptance, make_config, run_al

pytest.importorskip("openai")
pytestmark = [
    pytest.mark.filterwarnings("ignore:judge 'openai':RuntimeWarning"),
    pytest.mark.usefixtures("undrawn"),
]
serve = test_openai_judge.serve  # a fixture
PROBLEM = {"n_train": 24, "n_test": 4, "size": [48, 48]}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four masks are asked about together; a mask takes a moment to draw, so that there is something to overlap."""
    monkeypatch.setattr("vlm_itl.experiment.judge_turn.JUDGE_CHUNK", 4)
    plain = acceptance.asking_early
    monkeypatch.setattr("vlm_itl.experiment.round.asking_early", lambda *given: plain(*given, chunk=4))
    write = MaskStore.write

    def slowly(store: MaskStore, *given: Any) -> None:
        time.sleep(0.02 if store.folder.name == "masks" else 0)
        write(store, *given)

    monkeypatch.setattr(MaskStore, "write", slowly)


def answer(number: int, attempt: int, wish: dict[str, Any]) -> tuple[Any, ...]:
    """Decided by the picture."""
    share = zlib.crc32(wish["messages"][-1]["content"][0]["image_url"]["url"].encode()) % 90 / 100
    return OK, reply("Yes", p=share, wish=wish) if share > 0.45 else reply("No", p=0.89 - share, wish=wish)


def settings(folder: Path, server: Server, **more: Any) -> dict[str, Any]:
    """A run of one round whose judge is behind a cache."""
    inside = {"model": "toy", "base_url": server.url, "price": [1, 2], "patience": 3, "max_retries": 0}
    judge = {
        "judge": "openai",
        "options": inside,
        "path": str(folder / "cache.sqlite"),
        **more.pop("judge_options", {}),
    }
    small = {"image_size": 48, "steps": 2, "batch_size": 4, "eval_batch_size": 3, "gallery": 0, "val_share": 4}
    budget = {"initial": 4, "increment": 4, "max_labelled": 4, "preflight": 0}
    named = {"mode": "vlm", "judge": "cached", "judge_options": judge, "policy": "pseudo"}
    run = {"dataset": "scenes", "data_options": PROBLEM, "output_dir": str(folder / "run"), **small, **budget, **named}
    return {**run, **more}


def records(folder: Path) -> list[Any]:
    """Rounds, answers and cache, without what a clock says and where the server is."""
    rounds = [json.loads(line) for line in (folder / "run" / "rounds.jsonl").read_text().splitlines()]
    for record in rounds:
        record.pop("seconds")
    lines = [p.read_text().splitlines() for p in sorted((folder / "run").glob("round_*/judgements.jsonl"))]
    told = [[{k: v for k, v in json.loads(line).items() if k != "latency_s"} for line in part] for part in lines]
    wanted = "SELECT p_yes, verdict, raw, tokens, usd, attempts, id FROM judgements ORDER BY rowid"
    cache = sqlite3.connect(folder / "cache.sqlite").execute(wanted).fetchall()
    return [rounds, told, cache]


@pytest.fixture
def off(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Ask after the pass, as if nobody could be asked early."""
    return lambda: monkeypatch.setattr(acceptance, "may_ask_early", lambda team, masks: False)


class Threads:
    """Which threads have asked how many questions."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.early = self.later = 0
        plain = acceptance.ask_about

        def counted(handler: Any, images: Any, *given: Any) -> Any:
            if threading.current_thread() is threading.main_thread():
                self.later += len(images)
            else:
                self.early += len(images)
            return plain(handler, images, *given)

        monkeypatch.setattr(acceptance, "ask_about", counted)


@pytest.mark.parametrize("by", ["image", "class"])
def test_early_answers_change_nothing(
    by: str, serve: Callable[..., Server], off: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    servers, folders = [serve(answer), serve(answer)], [tmp_path / "early", tmp_path / "late"]
    threads, more = Threads(monkeypatch), {"accept_by": by, "max_labelled": 8 if by == "image" else 4}
    list(run_al(make_config(settings(folders[0], servers[0], **more))))
    assert threads.early >= 8
    off()
    list(run_al(make_config(settings(folders[1], servers[1], **more))))
    assert records(folders[0]) == records(folders[1])
    assert len(servers[0].wishes) == len(servers[1].wishes) > 8  # nobody is asked twice


def test_a_limited_judge_is_asked_about_the_same_few(
    serve: Callable[..., Server], off: Callable[[], None], tmp_path: Path
):
    servers, folders = [serve(answer), serve(answer)], [tmp_path / "early", tmp_path / "late"]
    list(run_al(make_config(settings(folders[0], servers[0], judge_limit=9))))
    off()
    list(run_al(make_config(settings(folders[1], servers[1], judge_limit=9))))
    assert records(folders[0]) == records(folders[1]) and len(servers[0].wishes) == len(servers[1].wishes)


def test_a_run_killed_while_it_draws_pays_for_nothing_twice(
    serve: Callable[..., Server], off: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    servers, folders = [serve(answer), serve(answer)], [tmp_path / "killed", tmp_path / "late"]
    write, drawn = MaskStore.write, []

    def killed(store: MaskStore, *given: Any) -> None:
        drawn.append(given[0])
        if len(drawn) == 12:
            raise KeyboardInterrupt
        write(store, *given)

    with monkeypatch.context() as patch:
        patch.setattr(MaskStore, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            list(run_al(make_config(settings(folders[0], servers[0]))))
    assert 0 < len(servers[0].wishes) < 12
    list(run_al(make_config(settings(folders[0], servers[0]))))
    off()
    list(run_al(make_config(settings(folders[1], servers[1]))))
    assert records(folders[0]) == records(folders[1]) and len(servers[0].wishes) == len(servers[1].wishes)


def test_a_server_that_gives_up_ends_the_run_as_ever(
    serve: Callable[..., Server], off: Callable[[], None], tmp_path: Path
):
    """After the pass, in the same words; it goes on when the server is back."""

    def broken(number: int, attempt: int, wish: dict[str, Any]) -> tuple[Any, ...]:
        return answer(number, attempt, wish) if attempt <= 6 else (500, failing("oops"))

    told, rounds = [], []
    for name in ("early", "late"):
        server, folder = serve(broken), tmp_path / name
        with pytest.raises(JudgeError) as error:
            list(run_al(make_config(settings(folder, server))))
        words = str(error.value).replace(str(folder), "").replace(server.url, "")
        told.append(re.sub(r"failed \d+ times", "failed several times", words))  # calls that were out already count
        server.script = answer
        list(run_al(make_config(settings(folder, server))))
        (record,) = records(folder)[0]
        assert record["budget"].pop("judge_calls") == len(server.wishes)  # each question, failed ones too, and no other
        rounds.append(record)
        off()
    assert told[0] == told[1] and "several times in a row, always alike: InternalServerError" in told[0]
    assert rounds[0] == rounds[1]
