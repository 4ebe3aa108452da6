"""Several servers for one judge, against loopback servers that die; and what a judge will cost, before it is asked."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_openai_judge import OK, Server, ask, reply, serve  # noqa: F401  serve is a fixture

from vlm_itl.core.checks import ConfigError, JudgeError
from vlm_itl.vlm.cache import CachedHandler
from vlm_itl.vlm.exchange import PRICES, PROVIDERS, Wishes, estimate_cost, picture_tokens, price_of
from vlm_itl.vlm.handler import JudgeStopped, make_handler
from vlm_itl.vlm.server import OpenAIHandler

pytest.importorskip("openai")
pytestmark = [
    pytest.mark.filterwarnings("ignore:judge 'openai':RuntimeWarning"),
    pytest.mark.usefixtures("undrawn"),
]


def fine(number: int, attempt: int, wish: dict[str, Any]) -> tuple[Any, ...]:
    "Yes to even questions."
    return OK, reply("Yes" if number % 2 == 0 else "No", wish=wish)


def several(*urls: str, **options: Any) -> OpenAIHandler:
    "A judge at several servers, which does not wait long."
    usual = {"max_retries": 0, "concurrency": 3, "timeout_s": 5.0}
    judge = make_handler("openai", model="toy", base_url=list(urls), **{**usual, **options})
    assert isinstance(judge, OpenAIHandler)
    return judge


def asked_at(server: Server) -> list[int]:
    "Which questions a server was asked."
    return sorted(server.attempts)


def test_all_servers_take_from_one_pile(serve: Callable[..., Server]) -> None:  # noqa: F811
    servers = [serve(fine) for _ in range(3)]
    answers = several(*[server.url for server in servers]).judge([ask(i) for i in range(60)])
    assert [a.verdict for a in answers] == ["yes", "no"] * 30 and [a.id for a in answers] == [
        f"im{i}" for i in range(60)
    ]
    assert sum(sum(server.attempts.values()) for server in servers) == 60  # each question once
    assert all(5 <= sum(server.attempts.values()) and server.most <= 3 for server in servers)


def test_one_that_dies_in_the_middle_is_taken_out_and_the_rest_redo_its_questions(
    serve: Callable[..., Server],  # noqa: F811
) -> None:
    count = threading.Semaphore(8)

    def dying(number: int, attempt: int, wish: dict[str, Any]) -> tuple[Any, ...]:
        if not count.acquire(blocking=False):
            raise ConnectionResetError  # the connection breaks off without a word
        return fine(number, attempt, wish)

    bad, good = serve(dying), serve(fine)
    judge = several(bad.url, good.url)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        answers = judge.judge([ask(i) for i in range(60)])
    assert [a.verdict for a in answers] == ["yes", "no"] * 30 and not any(a.error for a in answers)
    lines = [str(w.message) for w in told if "taken out" in str(w.message)]
    assert len(lines) == 1 and bad.url in lines[0] and "1 still answer" in lines[0]
    before = sum(bad.attempts.values())
    assert [a.verdict for a in judge.judge([ask(i) for i in range(60, 70)])] == ["yes", "no"] * 5
    assert sum(bad.attempts.values()) == before  # it stays out


def test_what_failed_at_one_server_is_counted_with_its_answer_from_another(
    serve: Callable[..., Server],  # noqa: F811
) -> None:
    """Requests and dollars are those that the servers count: thoughts that ate all tokens were paid, a 429 was sent."""

    def wasting(number: int, attempt: int, wish: dict[str, Any]) -> tuple[Any, ...]:
        if number % 3 == 0:
            return 429, {"error": {"message": "slow down"}}, {"Retry-After": "0.01"}
        return OK, reply("", wish=None, usage={"prompt_tokens": 100, "completion_tokens": 400, "total_tokens": 500})

    count = threading.Semaphore(4)

    def dying(number: int, attempt: int, wish: dict[str, Any]) -> tuple[Any, ...]:
        if not count.acquire(blocking=False):
            raise ConnectionResetError
        return fine(number, attempt, wish)

    servers = [serve(wasting), serve(fine), serve(dying)]
    judge = several(*[server.url for server in servers], price=(1.0, 1.0), patience=99, concurrency=1)
    answers = judge.judge([ask(i) for i in range(30)])
    assert [a.verdict for a in answers] == ["yes", "no"] * 15
    assert sum(a.attempts for a in answers) == sum(sum(server.attempts.values()) for server in servers)
    wasted = sum(times for number, times in servers[0].attempts.items() if number % 3)
    assert wasted and sum(a.usd or 0.0 for a in answers) == pytest.approx((30 * 101 + wasted * 500) / 1e6)
    assert judge.spent == pytest.approx(sum(a.usd or 0.0 for a in answers))


def test_one_that_only_fails_is_taken_out_after_patience(serve: Callable[..., Server]) -> None:  # noqa: F811
    bad, good = serve(lambda *_: (500, {"error": {"message": "CUDA error"}})), serve(fine)
    answers = several(bad.url, good.url, patience=3).judge([ask(i) for i in range(40)])
    assert [a.verdict for a in answers] == ["yes", "no"] * 20
    assert sum(bad.attempts.values()) <= 12  # three in a row of one kind, and what is in flight: not its half of 40


def test_when_all_are_gone_one_line_says_so_and_nothing_is_lost(
    serve: Callable[..., Server],  # noqa: F811
    tmp_path: Path,
) -> None:
    count, alive = threading.Semaphore(15), threading.Event()

    def dying(number: int, attempt: int, wish: dict[str, Any]) -> tuple[Any, ...]:
        if not alive.is_set() and not count.acquire(blocking=False):
            raise ConnectionResetError
        return fine(number, attempt, wish)

    servers = [serve(dying), serve(dying)]
    judge = CachedHandler(judge=several(*[s.url for s in servers]), path=tmp_path / "judge.sqlite")
    with pytest.raises(JudgeStopped, match="none of 2 servers answers any more: ") as stop:
        judge.judge([ask(i) for i in range(40)])
    line = str(stop.value)
    assert "\n" not in line and all(server.url in line for server in servers) and "cannot be reached" in line
    assert len(judge.cache) == 15  # all that was answered
    alive.set()
    answers = judge.judge([ask(i) for i in range(40)])
    assert [a.verdict for a in answers] == ["yes", "no"] * 20 and sum(a.cached for a in answers) >= 15 - 1


def test_servers_are_named_once() -> None:
    for urls in ([], ["http://127.0.0.1:1/v1", "http://127.0.0.1:1/v1/"]):
        with pytest.raises(ConfigError, match="one server, or several different ones"):
            several(*urls)
    one, two = several("http://a/v1"), several("http://a/v1", "http://b/v1")
    assert one.identity() == two.identity() and "and 1 more" in repr(two)  # a server more keeps the cache


def test_the_cost_is_told_before_the_first_call(
    serve: Callable[..., Server],  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    server = serve(fine)
    judge = several(server.url, price=(2.0, 8.0), max_tokens=1, max_cost=1.0)
    answers = judge.judge([ask(i) for i in range(20)])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "USD" in line]
    assert line.startswith("judge 'openai' (toy): 20 questions of about ") and "USD at most (2 and 8 a million" in line
    assert judge.spent > 0 and judge.spent == pytest.approx(sum(a.usd or 0 for a in answers))


def test_what_may_cost_too_much_is_not_begun(serve: Callable[..., Server], tmp_path: Path) -> None:  # noqa: F811
    server = serve(fine)
    dear = several(server.url, price=(2.0, 8.0), max_cost=0.001)
    queries = [ask(i) for i in range(100)]
    with pytest.raises(JudgeError, match=r"100 questions .* more than max_cost=0.001. Ask about fewer images"):
        dear.judge(queries)
    with pytest.raises(JudgeError, match="more than max_cost=0.001"):
        CachedHandler(judge=dear, path=tmp_path / "judge.sqlite").judge(queries)  # all of them, not the first batch
    with pytest.raises(JudgeError, match="has no known price, so max_cost=1 cannot be kept: give its price"):
        several(server.url, max_cost=1).judge(queries[:2])
    assert not server.attempts


def test_prices_are_of_their_providers_own_endpoint() -> None:
    for (provider, model), price in PRICES.items():
        assert price_of(model, PROVIDERS[provider]) == price and price.as_of and price.source
        assert price_of(model, "http://127.0.0.1/v1") is None


@pytest.mark.parametrize(
    ("model", "size", "tokens"),
    [
        ("gpt-4o", (512, 512), 255),
        ("gpt-4o", (2048, 4096), 1105),
        ("gpt-4.1-mini", (1024, 1024), 1659),
        ("google/gemini-2.5-flash", (384, 100), 258),
        ("gemini-2.5-pro", (960, 540), 6 * 258),  # the page's own example: three by two tiles
        ("pixtral-large-latest", (768, 512), 49 * 32),  # patches of 16 pixels, and a token at the end of each row
        ("pixtral-large-latest", (2048, 1024), 65 * 32),
    ],
)
def test_picture_tokens_are_those_of_the_providers_page(model: str, size: tuple[int, int], tokens: int) -> None:
    assert picture_tokens(model, *size) == tokens
    votes = estimate_cost(model, ["?"], [size], 10, Wishes(votes=5))
    assert votes.read > 6 * 10 * tokens and votes.written == 6 * 10 * 64
