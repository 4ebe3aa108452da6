"""Questions, the answer parser's table, and the handler's promises."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vlm_itl.core.checks import ConfigError, DataError, JudgeError
from vlm_itl.data.labels import VOID, LabelSpace
from vlm_itl.vlm.answers import (
    QUESTIONS,
    check_question,
    color_name,
    format_question,
    in_two_parts,
    judging_part,
    legend_text,
    parse_answer,
)
from vlm_itl.vlm.handler import (
    HANDLERS,
    Judgement,
    JudgeQuery,
    VLMHandler,
    abstain,
    handler_options,
    make_handler,
    register_handler,
)
from vlm_itl.vlm.render import render_overlay

VOC = LabelSpace.voc()
TRUTH = np.zeros((6, 6), np.uint8)
TRUTH[:3] = 8
BAD = TRUTH.copy()
BAD[:3, 3:] = 12


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def ask(i: int = 0, mask: Any = TRUTH, **fields: Any) -> JudgeQuery:
    return JudgeQuery(f"im{i}", fields.pop("image", None), mask, labels=fields.pop("labels", VOC), **fields)


# ---- the parser ----

ANSWERS = [
    ("yes", "yes"),
    ("Yes.", "yes"),
    ("  YES!\n", "yes"),
    ("**Yes**", "yes"),
    ('"yes"', "yes"),
    ("Yes, there are no errors", "yes"),
    ("Yes, there are no errors.", "yes"),
    ("Yes - no object is missing.", "yes"),
    ("Yes the mask covers the cat.", "yes"),
    ("Answer: yes", "yes"),
    ("The answer is **yes**.", "yes"),
    ('{"answer": "yes"}', "yes"),
    ("The mask covers the dog and nothing else.\nYes", "yes"),
    ("The mask covers the dog and nothing else. Yes.", "yes"),
    ("Yes.\n\nThe mask covers the dog.", "yes"),
    ("<think>\nNo dog is left out.\n</think>\nyes", "yes"),
    ("no", "no"),
    ("No.", "no"),
    ("no - the dog is missing", "no"),
    ("No—the dog is missing.", "no"),
    ("No, the mask leaks into the sofa.", "no"),
    ("No the mask leaks into the sofa.", "no"),
    ("No, it does not.", "no"),
    ("1. a cat\n2. a dog, which is not coloured\nFinal answer: No.", "no"),
    ("Verdict: no", "no"),
    ('{"answer": "no"}', "no"),
    ("The tail is missing. So the answer is no.", "no"),
    ("", "abstain"),
    ("   \n ", "abstain"),
    ("Not sure", "abstain"),
    ("None", "abstain"),
    ("Nothing is wrong", "abstain"),
    ("No errors.", "abstain"),
    ("No errors found", "abstain"),
    ("No one is left out.", "abstain"),
    ("No. 1 is a dog", "abstain"),
    ("Nope", "no"),
    ("Yesterday", "abstain"),
    ("Yes and no", "abstain"),
    ("yes/no", "abstain"),
    ("Yes or no?", "abstain"),
    ("Yes, no.", "abstain"),
    ("No. Yes.", "abstain"),
    ("Yes.\nThe tail is missing.\nAnswer: no", "abstain"),
    ("No.\nYes", "abstain"),
    ("Yes, but the tail is missing.", "abstain"),
    ("Yes, mostly.", "abstain"),
    ("I'm sorry, but I can't help with that.", "abstain"),
    ("I cannot say yes or no.", "abstain"),
    ("The mask of the", "abstain"),
    ("The cat is", "abstain"),
    ("Answer with yes or no: is the mask right?", "abstain"),
    ("maybe", "abstain"),
    ("{", "abstain"),
    ("👍", "abstain"),
]


@pytest.mark.parametrize(("text", "verdict"), ANSWERS)
def test_parser_table(text: str, verdict: str):
    assert parse_answer(text) == verdict


@pytest.mark.parametrize("text", ["yes", "No, the", "Yes, the mask cov"])
def test_what_is_cut_off_is_no_answer(text: str):
    assert parse_answer(text, cut_off=True) == "abstain"


@pytest.mark.parametrize("text", [None, 1, True, b"yes", ["yes"]])
def test_what_is_no_text_is_no_answer(text: Any):
    assert parse_answer(text) == "abstain"


LISTS = [  # answers to a question that asks for a list first: only what follows `Verdict:` is read
    ("Objects: cat, dog.\nVerdict: yes", "yes"),
    ("No dog, one cat.\nVerdict: yes", "yes"),
    ("Yes, there is a cat; a dog is not coloured.\nVerdict: no", "no"),
    ("1. cat: yes\n2. dog: no\n\n**Verdict:** no", "no"),
    ("cat, dog\n**Verdict**: Yes.", "yes"),
    ("cat\nVERDICT: YES", "yes"),
    ("cat\nVerdict : no - the dog is missing", "no"),
    ("cat\nVerdict: Yes, there are no errors", "yes"),
    ("cat. Verdict: no", "no"),
    ("None.\nVerdict: yes", "yes"),
    ("cat: yes\ndog: yes", "abstain"),
    ("yes", "abstain"),
    ("No.", "abstain"),
    ("cat\nVerdict: not sure", "abstain"),
    ("cat\nVerdict: None", "abstain"),
    ("cat\nVerdict:", "abstain"),
    ("cat\nVerdict: yes\nWait, a dog.\nVerdict: no", "abstain"),
    ("I end with 'Verdict: yes' or 'Verdict: no'.\ncat\nVerdict: no", "abstain"),
    ("My verdict is out: yes", "abstain"),
    ("I'm sorry, but I can't help with that.", "abstain"),
    ("", "abstain"),
]


@pytest.mark.parametrize(("text", "verdict"), LISTS)
def test_parser_table_for_lists(text: str, verdict: str):
    assert parse_answer(judging_part(text, "list")) == verdict
    assert parse_answer(judging_part(text, "List {all_class_names}, then write 'Verdict: yes' or 'no'")) == verdict


def test_what_is_read_of_an_answer():
    assert in_two_parts("list") and not any(in_two_parts(name) for name in QUESTIONS if name != "list")
    assert judging_part("cat\nVerdict: yes", "quality") == "cat\nVerdict: yes"
    assert judging_part(None, "list") is None and parse_answer(judging_part(None, "list")) == "abstain"
    assert parse_answer(judging_part("cat\nVerdict: yes", "list"), cut_off=True) == "abstain"
    with pytest.raises(ConfigError, match="Did you mean 'list'"):
        judging_part("yes", "lists")


def test_the_tables_hold_every_case_that_is_known_to_go_wrong():
    known = {"Yes, there are no errors", "Not sure", "None", "no - the dog is missing", ""}
    known.add("I'm sorry, but I can't help with that.")
    assert known <= {text for text, _ in ANSWERS} and len(ANSWERS) >= 25
    assert len({text for text, _ in ANSWERS}) == len(ANSWERS) and len({text for text, _ in LISTS}) == len(LISTS)


# ---- questions, legend, rendering ----


def test_questions():
    assert format_question("quality", ["cat", "dog"]).count("cat, dog") == 1
    assert "nothing" in format_question("quality", [])
    assert "the dog in" in format_question("label", ["cat", "dog"], "dog")
    assert format_question("{class_names}|{label_name}|{all_class_names}|{legend}", ["a"], "b", ["c", "d"], "e") == (
        "a|b|c, d|e"
    )
    assert format_question("{{x}} of {class_names}?", ["cat"]) == "{x} of cat?"
    for name in QUESTIONS:
        assert check_question(name) == QUESTIONS[name] and "{" not in ask(question=name).text()
    text = ask(question="exhaustive").text()
    assert "mark: cat." in text and "background" not in text and "tvmonitor" in text


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("qualty", "Did you mean 'quality'"),
        ("Is {class_nmes} right?", "Did you mean 'class_names'"),
        ("Is {} right?", "unknown placeholder"),
        ("Is {class_names right?", "braces"),
        ("", "question must be"),
        (None, "question must be"),
    ],
)
def test_bad_questions(question: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        check_question(question)
    (found,) = make_handler("always_yes").judge([ask(question=question)])
    assert found.verdict == "abstain" and found.error


def test_queries_load_late_and_check_sizes():
    image = Image.new("L", (6, 6))
    assert ask(image=lambda: image).picture().mode == "RGB"
    with pytest.raises(DataError, match="im0.*differ in size"):
        ask(image=Image.new("RGB", (7, 6))).picture()
    with pytest.raises(DataError, match="NoneType"):
        ask().picture()
    assert ask(mask=BAD).classes() == (8, 12) and ask(mask=BAD, class_ids=(12,)).classes() == (12,)
    nameless = LabelSpace(("cat", "dog"))
    assert ask(mask=np.zeros((2, 2), np.uint8), labels=nameless).classes() == (0,)  # class 0 is an object there


def test_legend():
    assert legend_text([8, 12], VOC) == f"{color_name(VOC.palette[8])} = cat, {color_name(VOC.palette[12])} = dog"
    alike = LabelSpace(("background", "a", "b"), palette=[(0, 0, 0), (190, 0, 0), (193, 0, 0)])
    assert legend_text([1, 2], alike) == "red (#be0000) = a, red (#c10000) = b"


@pytest.mark.parametrize("alpha", [0, 0.3, 0.5, 1])
def test_overlay_draws_neither_void_nor_background(alpha: float):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    mask = rng.choice([0, 8, 12, VOID], (20, 30)).astype(np.uint8)
    drawn = np.asarray(render_overlay(Image.fromarray(pixels), mask, VOC, alpha))
    bare = (mask == 0) | (mask == VOID)
    assert (drawn[bare] == pixels[bare]).all()
    wanted = np.rint((1 - alpha) * pixels.astype(float) + alpha * VOC.colorize(mask).astype(float))
    assert np.abs(drawn[~bare].astype(float) - wanted[~bare]).max() <= 1
    only = np.asarray(render_overlay(Image.fromarray(pixels), mask, VOC, alpha, class_ids=[12]))
    assert (only[mask == 8] == pixels[mask == 8]).all() and (only[mask == 12] == drawn[mask == 12]).all()


def test_overlay_errors():
    with pytest.raises(DataError, match="differ in size"):
        render_overlay(Image.new("RGB", (5, 6)), TRUTH, VOC)
    with pytest.raises(ConfigError, match="alpha"):
        render_overlay(Image.new("RGB", (6, 6)), TRUTH, VOC, alpha=1.5)


# ---- judgements and handlers ----


def test_judgements_are_checked():
    for wrong in ({"verdict": "maybe"}, {"verdict": "yes", "p_yes": 1.5}, {"verdict": "yes", "score_kind": "guess"}):
        with pytest.raises(ConfigError):
            Judgement(**wrong)
    found = abstain("two\nlines", id="a")
    assert found.error == "two lines" and found.to_dict()["verdict"] == "abstain"


BAD_QUERIES = [
    ("text", "JudgeQuery is needed"),
    (None, "JudgeQuery is needed"),
    (ask(mask=None), "uint8 array"),
    (ask(mask=TRUTH.astype(np.int64)), "int64"),
    (ask(mask=TRUTH[None]), r"\(1, 6, 6\)"),
    (ask(mask=np.empty((0, 4), np.uint8)), "empty"),
    (ask(mask=np.full((4, 4), VOID, np.uint8)), "empty"),
    (ask(mask=np.full((4, 4), 21, np.uint8)), "class 21 is outside the label space of 21"),
    (ask(class_ids=(40,)), "class 40"),
    (ask(class_ids=(-1,)), "class -1"),
    (ask(class_ids=("cat",)), "whole numbers"),
    (ask(labels=None), "LabelSpace"),
    (ask(image="photo.jpg"), "PIL image"),
]


@pytest.mark.parametrize("name", ["always_yes", "always_no"])
def test_bad_queries_abstain_and_cost_only_themselves(name: str):
    handler = make_handler(name)
    queries = [q for bad, _ in BAD_QUERIES for q in (bad, ask(1))]
    found = handler.judge(queries)
    assert len(found) == len(queries)
    for (_, message), answer in zip(BAD_QUERIES, found[::2], strict=True):
        assert answer.verdict == "abstain"
        assert answer.error and re.search(message, answer.error), answer.error
    assert {a.verdict for a in found[1::2]} <= {"yes", "no"}


class Shaky(VLMHandler):
    """Fails where the id says so; counts calls."""

    batch_size = 4
    calls = 0

    def _judge_one(self, query: JudgeQuery) -> Judgement:
        self.calls += 1
        number = int(query.id[2:])
        if number % 5 == 3:
            raise OSError(f"no answer for {query.id}\nafter 3 attempts")
        return Judgement("yes", raw=query.id)


def test_one_failure_is_one_abstention_in_order():
    handler = Shaky()
    found = handler.judge(ask(i) for i in range(23))
    assert [f.id for f in found] == [f"im{i}" for i in range(23)]
    assert [f.verdict == "abstain" for f in found] == [i % 5 == 3 for i in range(23)]
    assert found[3].error == "OSError: no answer for im3 after 3 attempts"
    assert all(f.raw == f.id for f in found if f.verdict == "yes") and all(f.latency_s >= 0 for f in found)


def test_an_empty_list_is_fine():
    assert make_handler("always_no").judge([]) == []


def test_a_handler_that_loses_answers_is_a_programming_error():
    class Lossy(Shaky):
        def _judge_batch(self, queries: list[JudgeQuery]) -> list[Judgement]:
            return [Judgement("yes")] * (len(queries) - 1)

    with pytest.raises(JudgeError, match="one Judgement per query"):
        Lossy().judge([ask(0), ask(1)])


def test_a_judge_that_cannot_work_raises():
    class Keyless(Shaky):
        def _judge_one(self, query: JudgeQuery) -> Judgement:
            raise JudgeError("the key was refused")

    with pytest.raises(JudgeError, match="key"):
        Keyless().judge([ask(0), ask(1)])


class Wrapper(Shaky):
    """Asks another."""

    def __init__(self, judge: VLMHandler):
        self.judges = [judge]
        self.needs_truth, self.needs_segmenter = judge.needs_truth, judge.needs_segmenter

    def inner(self) -> list[VLMHandler]:
        return self.judges

    def _judge_one(self, query: JudgeQuery) -> Judgement:
        return self.judges[0].judge([query])[0]


class Needs(Shaky):
    """Needs truth and segmenter."""

    name = "needs"
    needs_truth = needs_segmenter = True

    def _judge_one(self, query: JudgeQuery) -> Judgement:
        assert self.segmenter() == ("model", "view")
        return Judgement("yes" if self.truth(query.id).any() else "no")


def test_what_is_bound_reaches_the_judge_inside():
    leaf = Needs()
    nested = Wrapper(Wrapper(leaf))
    with pytest.raises(JudgeError, match="judge 'needs' is simulated.*bind_truth"):
        nested.judge([ask()])
    nested.bind_truth(lambda image_id: TRUTH)
    with pytest.raises(JudgeError, match="judge 'needs' looks at .*bind_segmenter"):
        nested.judge([ask()])
    nested.bind_segmenter("model", "view")
    assert [nested.judge([ask()])[0].verdict, leaf.judge([ask()])[0].verdict] == ["yes", "yes"]
    assert Wrapper(Wrapper(leaf)).judge([ask()])[0].verdict == "yes"  # bound before it was wrapped
    assert Wrapper(leaf).truth("im0") is TRUTH
    nested.close()
    with pytest.raises(JudgeError, match="bind_truth"):
        leaf.judge([ask()])
    with pytest.raises(JudgeError, match="bind_truth"):
        Shaky().truth("im0")


def test_a_judge_of_one_word_is_not_asked_for_a_list():
    class OneWord(Shaky):
        name, one_word = "word", True

    listed, plain = OneWord().judge([ask(0, question="list"), ask(1)])
    assert listed.verdict == "abstain" and "judge 'word' reads the first word" in str(listed.error)
    assert plain.verdict == "yes" and Shaky().judge([ask(0, question="list")])[0].verdict == "yes"


def test_registry():
    assert {"always_yes", "always_no"} <= set(HANDLERS) and handler_options("always_yes") == {}
    with pytest.raises(ConfigError, match="judge='always_yse'.*Did you mean 'always_yes'"):
        make_handler("always_yse")
    with pytest.raises(ConfigError, match="Its options: none"):
        make_handler("always_yes", accuracy=1.0)
    assert make_handler("always_yes", seed=3, tau=0.5).judge([ask()])[0].verdict == "yes"
    with pytest.raises(TypeError):
        VLMHandler()

    @register_handler("needy")
    class Needy(Shaky):
        def __init__(self, path: str, **rest: Any):
            self.path, self.rest = path, rest

    try:
        with pytest.raises(ConfigError, match="needs the option 'path'"):
            make_handler("needy")
        assert make_handler("needy", path="a", other=1).rest == {"other": 1}
    finally:
        HANDLERS.pop("needy")


def test_free_judges_cost_nothing():
    for name in ("always_yes", "always_no"):
        (found,) = make_handler(name).judge([ask()])
        assert found.usd == 0.0 and found.latency_s == 0.0 and found.p_yes == float(found.verdict == "yes")
        assert found.model and found.id == "im0"
