"""Fuzzed settings, YAML and judge replies: each works, or one line says what is wrong."""

from __future__ import annotations

import base64
import gzip
import json
import math
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fuzzing import FACTOR, NUMBERS, PLAIN, TEXTS, WILD, Tried, fuzz
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlm_itl.cli.run import gather_parameters, notebook_parameters, read_yaml
from vlm_itl.core.checks import ConfigError, DataError, JudgeError, RunError, check_choice, check_number
from vlm_itl.core.files import read_json, resolve_path, to_json, write_json
from vlm_itl.core.guards import refuse_secrets
from vlm_itl.core.reading import parse_yaml
from vlm_itl.core.seeds import stable_hash
from vlm_itl.core.settings import read_settings
from vlm_itl.data.labels import LabelSpace
from vlm_itl.experiment.config import Config, make_config, run_path
from vlm_itl.judging.trial import JudgeConfig, judge_run_path, make_judge_config
from vlm_itl.vlm.answers import judging_part, parse_answer
from vlm_itl.vlm.cache import JudgementCache
from vlm_itl.vlm.handler import Judgement, JudgeQuery
from vlm_itl.vlm.server import OpenAIHandler

Record = Callable[[str, Any], None]
FIELDS = [f.name for f in fields(Config)]
JUDGE_FIELDS = [f.name for f in fields(JudgeConfig)]


def kind(value: Any) -> str:
    """A test's name; some values here cannot be printed."""
    return type(value).__name__


def near(name: str, default: Any) -> st.SearchStrategy[Any]:
    """A value close to a valid one."""
    if isinstance(default, bool):
        return st.sampled_from([True, False, "true", 1])
    if isinstance(default, (int, float)):
        return st.sampled_from([default, -default, default * 2, str(default), default + 0.5, float(default)])
    return st.sampled_from([default, str(default), [default], None])


DEFAULTS = {f.name: getattr(Config(), f.name) for f in fields(Config)}
JUDGE_DEFAULTS = {f.name: getattr(JudgeConfig(), f.name) for f in fields(JudgeConfig)}


def settings_of(defaults: dict[str, Any]) -> st.SearchStrategy[dict[Any, Any]]:
    """A few settings, most of them with a name that exists."""

    def one(name: Any) -> st.SearchStrategy[tuple[Any, Any]]:
        value = st.one_of(near(name, defaults[name]), WILD) if name in defaults else WILD
        return st.tuples(st.just(name), value)

    names = st.one_of(st.sampled_from(list(defaults)), st.sampled_from(list(defaults)), st.one_of(TEXTS, st.integers()))
    return st.lists(names.flatmap(one), min_size=1, max_size=3).map(dict)


def test_settings(record_property: Record) -> None:
    """Any settings: a Config that can be written and named, or one line."""
    tried = Tried()

    @fuzz(900)
    @given(settings_of(DEFAULTS))
    def check(settings: dict[Any, Any]) -> None:
        with tried.case():
            config = make_config(settings)
            assert json.loads(to_json(config.to_dict())) is not None
            assert len(run_path(config).name.encode()) <= 255

    check()
    tried.report(record_property)


def test_judge_settings(record_property: Record) -> None:
    """The same for a trial of a judge."""
    tried = Tried()

    @fuzz(500)
    @given(settings_of(JUDGE_DEFAULTS))
    def check(settings: dict[Any, Any]) -> None:
        with tried.case():
            config = make_judge_config(settings)
            assert json.loads(to_json(config.to_dict())) is not None
            judge_run_path(config)

    check()
    tried.report(record_property)


def test_read_settings_takes_any_mapping(record_property: Record) -> None:
    """Names and values of any type against defaults of every type."""
    tried = Tried()
    defaults = {"a": 1, "b": 0.5, "c": "x", "d": {}, "e": True, "f": []}

    @fuzz(400)
    @given(st.dictionaries(st.one_of(st.sampled_from(list(defaults)), TEXTS, st.integers()), WILD, max_size=3))
    def check(settings: dict[Any, Any]) -> None:
        with tried.case():
            read_settings(settings, defaults)

    check()
    tried.report(record_property)


YAML = st.one_of(
    st.text(max_size=40),
    st.binary(max_size=20),
    st.lists(
        st.sampled_from(
            [
                "a",
                ": ",
                "- ",
                "&x ",
                "*x",
                "!!int ",
                "!!float ",
                "!!binary ",
                "!!timestamp ",
                "!!set ",
                "!!omap ",
                "!!bool ",
                "?",
                "{",
                "}",
                "[",
                "]",
                ",",
                "\n",
                "  ",
                "'",
                '"',
                "1",
                ".nan",
                "2001-01-01",
                "<<: ",
                "|",
                ">",
                "%",
                "@",
                "\t",
                "#",
                "0b",
                "190:20:30",
                "0o9",
                "---",
                "...",
                "seed: ",
            ]
        ),
        max_size=12,
    ).map("".join),
)


def test_yaml(record_property: Record, root: Any) -> None:
    """Parameter files: names and plain values, or one line; and the same through the command's options."""
    tried = Tried()
    known = notebook_parameters(root / "nbs" / "run_al.ipynb")

    @fuzz(500)
    @given(YAML)
    def check(text: str | bytes) -> None:
        with tried.case():
            to_json(read_yaml(text, "-y"))
        with tried.case():
            parse_yaml(text, "a")

    @fuzz(300)
    @given(YAML, st.lists(st.tuples(st.sampled_from([*FIELDS[:12], "x"]), TEXTS), max_size=2), st.booleans())
    def check_options(text: str | bytes, pairs: list[tuple[str, str]], coded: bool) -> None:
        raw = text.encode("utf-8", "replace") if isinstance(text, str) else text
        options: dict[str, Any] = {"parameters_file": [], "parameters": pairs, "parameters_raw": pairs[:1]}
        options["parameters_base64"] = [base64.b64encode(raw).decode()] if coded else [raw.decode("latin-1")]
        options["parameters_yaml"] = [text if isinstance(text, str) else raw.decode("latin-1")]
        with tried.case():
            gather_parameters(options, known)

    check()
    check_options()
    tried.report(record_property)


NINE = zip("abcdefgh", "bcdefghi", strict=True)
BOMB = "a: &a [1,1,1]\n" + "".join(f"{c}: &{c} [{','.join(['*' + p] * 9)}]\n" for p, c in NINE)


@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        "a: &x [*x]",
        "a: " + "[" * 5000,
        "a: " + "{a: " * 40 + "1" + "}" * 40,
        "a: 1" + "0" * 5000,
        "a: !!binary aGk=",
        "a: !!set {b, c}",
        "a: !!timestamp x",
        "a: !!int ''",
    ],
    ids=kind,
)
def test_hostile_yaml_is_refused(text: str) -> None:
    """Bombs of anchors, endless loops, depth, tags and numbers no one can print."""
    with pytest.raises(ConfigError) as caught:
        read_yaml(text, "-y")
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)
    with pytest.raises(ConfigError):
        make_config(data_options=text[3:])


@pytest.mark.parametrize("value", [object(), {1}, b"1", 10**400], ids=kind)
def test_settings_are_plain_values(value: Any) -> None:
    """A share of any type was kept, and failed when the run folder was written."""
    with pytest.raises(ConfigError, match="initial"):
        make_config(initial=value)


def test_dates_in_yaml_are_text() -> None:
    """As in papermill: a run called 2026-01-31 is a name."""
    assert read_yaml("output_dir: 2026-01-31", "-y") == {"output_dir": "2026-01-31"}


# ---- what was found, one by one ----


@pytest.mark.parametrize(
    "value", [10**400, -(10**5000), 1 + 2j, np.complex64(1), np.array([1.0]), [1], None, "1", True], ids=kind
)
def test_no_number_is_refused_in_words(value: Any) -> None:
    """A whole number too long for a float was an OverflowError, a longer one could not even be printed."""
    with pytest.raises(ConfigError, match="must be a number"):
        check_number("tau", value)


@pytest.mark.parametrize("value", [np.array(["a", "b"]), 10**5000, {"a": 1}, ["a"], None, "x" * 10**5], ids=kind)
def test_no_choice_is_refused_in_words(value: Any) -> None:
    """An array compared with a list has no truth value."""
    with pytest.raises(ConfigError) as caught:
        check_choice("mode", value, ["al", "vlm"])
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("path", ["x" * 5000, "~nobody-here/x", None, 3], ids=kind)
def test_no_path_is_refused_in_words(path: Any) -> None:
    """Too long a name was an OSError, an unknown user a RuntimeError."""
    with pytest.raises(ConfigError, match="cannot be a path"):
        resolve_path(path)


def test_half_letters_survive(tmp_path: Any) -> None:
    """A reply or file name may hold half of a surrogate pair: JSON, cache and hash take it."""
    write_json(tmp_path / "a.json", {"raw": "yes \ud800"})
    assert read_json(tmp_path / "a.json") == {"raw": "yes \ud800"}
    cache = JudgementCache(tmp_path / "a.sqlite")
    assert cache.put({"k": Judgement("yes", 1.0, raw="yes \ud800")}) == 1
    assert cache.get(["k"])["k"].raw == "yes \\ud800"
    assert stable_hash("\ud800") != stable_hash("\ud801")


def test_errors_are_one_line() -> None:
    """Whatever a file is called."""
    assert str(DataError("a\nb\x1b[31m\udcff.png: broken")) == "a b\\x1b[31m\\udcff.png: broken"


@pytest.mark.parametrize("text", ["{", "[" * 10**5, "NaN", '{"a": Infinity}', "\x00", "", "1" * 5000], ids=kind)
def test_no_json_is_refused_in_words(text: str, tmp_path: Any) -> None:
    """Depth was a RecursionError, NaN was taken."""
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(RunError, match="a.json is not readable JSON"):
        read_json(tmp_path / "a.json")


# ---- replies ----

WORDS = st.sampled_from(
    [
        "yes",
        "no",
        "Yes.",
        "NO",
        " ",
        "\n",
        "but",
        "Verdict:",
        "**",
        "—",
        "- ",
        "answer",
        "is",
        ":",
        "not",
        "{",
        "}",
        '"',
        "、",
        "\ud800",
        "\x00",
        "1",
        ",",
    ]
)
SAID = st.one_of(
    st.text(max_size=30), st.lists(WORDS, max_size=14).map(" ".join), st.lists(WORDS, max_size=14).map("".join)
)


def test_answers(record_property: Record) -> None:
    """Any text, and what is none, has one of three verdicts."""
    tried = Tried()

    @fuzz(1000)
    @given(st.one_of(SAID, SAID, WILD), st.booleans(), st.sampled_from(["quality", "list"]))
    def check(text: Any, cut: bool, question: str) -> None:
        with tried.case():
            assert parse_answer(judging_part(text, question), cut) in ("yes", "no", "abstain")

    check()
    tried.report(record_property)


@pytest.mark.parametrize(
    "text",
    [
        " " * 10**6 + "x",
        "yes" + " " * 10**6 + "no",
        "yes. " * 10**5,
        "- " * 10**5,
        "no, " * 4000,
        ("a" + " " * 9) * 1900,
    ],
    ids=kind,
)
def test_long_answers_take_no_time(text: str) -> None:
    """A pattern over a long run of spaces took time that grew with its square."""
    assert parse_answer(text) in ("yes", "no", "abstain")


TOKEN = st.fixed_dictionaries(
    {},
    optional={
        "token": st.one_of(st.sampled_from(["yes", "no", "Yes", " no", "the"]), PLAIN),
        "logprob": st.one_of(st.floats(-3, 0), NUMBERS, TEXTS, st.none()),
        "top_logprobs": st.one_of(
            st.none(),
            st.lists(st.fixed_dictionaries({"token": st.sampled_from(["yes", "no"]), "logprob": NUMBERS}), max_size=3),
            PLAIN,
        ),
    },
)
MESSAGE = st.fixed_dictionaries(
    {}, optional={"content": st.one_of(SAID, st.just("yes"), WILD), "refusal": st.one_of(st.none(), PLAIN)}
)
CHOICE = st.fixed_dictionaries(
    {"message": st.one_of(MESSAGE, MESSAGE, MESSAGE, PLAIN)},
    optional={
        "finish_reason": st.one_of(st.just("stop"), st.sampled_from(["length", "content_filter"]), PLAIN),
        "logprobs": st.one_of(
            st.none(), st.fixed_dictionaries({"content": st.one_of(st.lists(TOKEN, max_size=4), PLAIN)}), PLAIN
        ),
    },
)
USAGE = st.one_of(st.none(), PLAIN, st.fixed_dictionaries({"prompt_tokens": PLAIN, "completion_tokens": PLAIN}))
REPLY = st.fixed_dictionaries(
    {"choices": st.one_of(st.lists(CHOICE, min_size=1, max_size=2), st.lists(CHOICE, max_size=2), PLAIN)},
    optional={"usage": USAGE, "model": PLAIN, "id": PLAIN, "object": PLAIN, "error": PLAIN},
)


def as_object(value: Any) -> Any:
    """What the client makes of JSON: dictionaries become objects."""
    if isinstance(value, dict):
        return SimpleNamespace(**{str(k): as_object(v) for k, v in value.items()})
    return [as_object(v) for v in value] if isinstance(value, list) else value


def fair(answer: Judgement) -> None:
    """A verdict, probabilities in range, and plain values that a run folder and a cache can hold."""
    assert answer.verdict in ("yes", "no", "abstain")
    for value in (answer.p_yes, answer.p_mass):
        assert value is None or (math.isfinite(value) and 0 <= value <= 1)
    assert answer.error is None or "\n" not in answer.error
    assert answer.tokens is None or 0 <= answer.tokens < 2**63
    assert len(answer.raw) < 30_000 and len(to_json(answer.to_dict())) < 10**6


@pytest.mark.parametrize("structured", [False, True])
def test_replies(structured: bool, record_property: Record) -> None:
    """Any reply gives a fair judgement; what is no chat completion is a ValueError, which becomes an abstention."""
    pytest.importorskip("openai")
    tried = Tried()
    handler = OpenAIHandler(model="m", base_url="http://127.0.0.1:1/v1", stated=structured, price=[1, 1])

    @fuzz(500)
    @given(REPLY, st.sampled_from(["quality", "list"]))
    def check(reply: dict[str, Any], question: str) -> None:
        with tried.case():
            try:
                fair(handler.talk.read(as_object(reply), question))
            except ValueError as error:
                assert str(error) == "the reply is not a chat completion"

    check()
    tried.report(record_property)


class _Server(ThreadingHTTPServer):
    """A server on this machine that says what `body` holds."""

    daemon_threads = True
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()
    status = 200


class _Says(BaseHTTPRequestHandler):
    """Answers every question with the server's body."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """Read the question, send the body."""
        self.rfile.read(int(self.headers["Content-Length"]))
        server: Any = self.server
        self.send_response(server.status)
        for name, value in server.headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(server.body)))
        self.end_headers()
        self.wfile.write(server.body)

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def server() -> Iterator[_Server]:
    """A loopback server."""
    made = _Server(("127.0.0.1", 0), _Says)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


GOOD = {
    "id": "x",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "yes"}}],
}


def bodies(rng: random.Random) -> tuple[bytes, tuple[tuple[str, str], ...]]:
    """A reply that is wrong in some way."""
    kind = rng.randrange(8)
    good = json.dumps(GOOD).encode()
    as_json = (("Content-Type", "application/json"),)
    if kind == 0:
        return rng.randbytes(rng.randrange(40)), as_json
    if kind == 1:
        return good[: rng.randrange(len(good))], as_json
    if kind == 2:
        return b'{"choices":' * 2000 + b"[" * 5000, as_json
    if kind == 3:
        return rng.choice([gzip.compress(good)[: rng.randrange(10, 60)], good]), (
            *as_json,
            ("Content-Encoding", "gzip"),
        )
    if kind == 4:
        broken = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        return bytes(broken), as_json
    if kind == 5:
        text = json.dumps({**GOOD, "choices": [{"message": {"content": "yes " * rng.choice([1, 10**5])}}]})
        return text.encode(), as_json
    if kind == 6:
        return good, rng.choice([(("Content-Type", "text/html"),), (("Content-Type", "\xff"),), ()])
    name = rng.choice(["choices", "usage", "model", "object"])
    value = rng.choice(
        [
            None,
            1,
            "x",
            [],
            [None],
            {},
            [[]],
            [{}],
            [1],
            1e400,
            True,
            [{"message": None}],
            [{"message": {"content": [1]}}],
        ]
    )
    return json.dumps({**GOOD, name: value}).encode(), as_json


def test_server_bodies(server: _Server, record_property: Record) -> None:
    """The real client against a server that sends anything: every question gets a fair judgement."""
    pytest.importorskip("openai")
    tried, rng = Tried(), random.Random(0 if FACTOR == 1 else None)
    labels = LabelSpace(("background", "red"))
    image = Image.new("RGB", (8, 8))
    query = JudgeQuery("a", image, np.eye(8, dtype=np.uint8), labels=labels)
    options: dict[str, Any] = {"max_retries": 0, "patience": 10**6, "timeout_s": 20.0, "concurrency": 1}
    for _ in range(int(16 * FACTOR)):
        handler = OpenAIHandler(model="m", base_url=f"http://127.0.0.1:{server.server_port}/v1", **options)
        for _ in range(10):
            server.body, server.headers = bodies(rng)
            server.status = rng.choice([200] * 6 + [400, 422, 500, 503])
            with tried.case():
                answers = handler.judge([query])
                assert len(answers) == 1
                fair(answers[0])
    tried.report(record_property)


def test_broken_gzip_is_an_abstention(server: _Server) -> None:
    """It was taken for a server that is not there, and stopped the run."""
    pytest.importorskip("openai")
    server.body, server.status = b"no gzip at all", 200
    server.headers = (("Content-Type", "application/json"), ("Content-Encoding", "gzip"))
    handler = OpenAIHandler(model="m", base_url=f"http://127.0.0.1:{server.server_port}/v1", max_retries=0)
    mask = np.eye(8, dtype=np.uint8)
    answer = handler.judge([JudgeQuery("a", Image.new("RGB", (8, 8)), mask, labels=LabelSpace(("background", "red")))])[
        0
    ]
    assert answer.verdict == "abstain" and "packed" in str(answer.error)


def test_log_probabilities_that_are_none(record_property: Record) -> None:
    """NaN, text and missing fields in log-probabilities leave the text's verdict standing."""
    handler = OpenAIHandler(model="m", base_url="http://127.0.0.1:1/v1", price=[1, 1])
    for logprob in (math.nan, "0.1", None, 3.0, True, -(10**400), {}):
        token = SimpleNamespace(token="yes", logprob=logprob, top_logprobs="none")
        choice = SimpleNamespace(
            message=SimpleNamespace(content="yes"), finish_reason="stop", logprobs=SimpleNamespace(content=[token, 3])
        )
        answer = handler.talk.read(
            SimpleNamespace(choices=[choice], usage=SimpleNamespace(prompt_tokens="1", completion_tokens="2")),
            "quality",
        )
        assert answer.verdict in ("yes", "abstain") and answer.p_yes in (None, 1.0) and answer.tokens is None


@pytest.mark.parametrize("error", [ConfigError, DataError, RunError, JudgeError])
def test_errors_can_be_told_apart(error: type[Exception]) -> None:
    """The builtin class they also are stays."""
    assert issubclass(error, (ValueError, RuntimeError))


def test_keys_are_looked_for_in_endless_settings() -> None:
    """A list inside itself, and nine lists of nine: looked through once, however often they stand there."""
    endless: list[Any] = []
    endless.append(endless)
    for value in (endless, {0: endless}, "{0: &0 [*0]}", {10**5000: 1}):
        refuse_secrets("mode", value)
    bomb: Any = "lol"
    for _ in range(40):
        bomb = [bomb] * 9
    refuse_secrets("mode", bomb)
    with pytest.raises(ConfigError, match="must hold no 'api_key'"):
        refuse_secrets("mode", [bomb, endless, {"a": [{"api_key": "x"}]}])
