"""Reading yes and no: some five hundred replies as models write them, each with its right reading."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from vlm_itl.vlm.answers import parse_answer

REPLIES = json.loads((Path(__file__).parent / "replies.json").read_text(encoding="utf-8"))
STYLES = sorted({reply["style"] for reply in REPLIES})


def misread(replies: list[dict[str, str]]) -> list[str]:
    found = [(reply, parse_answer(reply["reply"])) for reply in replies]
    return [f"{r['reply']!r}: {got}, not {r['expected']}" for r, got in found if got != r["expected"]]


@pytest.mark.parametrize("style", STYLES)
def test_18_replies_are_read_as_they_are_meant(style: str) -> None:
    assert not misread([reply for reply in REPLIES if reply["style"] == style])


def test_18_the_replies_beside_the_data() -> None:
    """The same list as it was handed over, where it is at hand."""
    path = Path(os.environ.get("VLM_ITL_SHARED", "nowhere")) / "faults" / "replies.json"
    if not path.is_file():
        pytest.skip("VLM_ITL_SHARED does not hold faults/replies.json")
    assert not misread(json.loads(path.read_text(encoding="utf-8")))


def test_there_are_enough_and_none_twice() -> None:
    texts = [reply["reply"] for reply in REPLIES]
    assert len(texts) == len(set(texts)) >= 400 and {reply["expected"] for reply in REPLIES} == {"yes", "no", "abstain"}


@pytest.mark.parametrize(
    "frame", ["{}", "  {}\n\n", "**{}**", "<|im_start|>assistant\n{}<|im_end|>", "{}</s>", "\ufeff{}"]
)
def test_what_stands_around_an_answer_changes_nothing(frame: str) -> None:
    plain = [
        reply for reply in REPLIES if reply["style"] in ("llava", "internvl", "claude") and "**" not in reply["reply"]
    ]
    assert not misread([{**reply, "reply": frame.format(reply["reply"])} for reply in plain])


@pytest.mark.parametrize(
    "thought", ["<think>\nYes. No. Hm.\n</think>\n", "◁think▷no, no, no◁/think▷", "yes, I see</think>"]
)
def test_thoughts_change_nothing(thought: str) -> None:
    plain = [reply for reply in REPLIES if reply["style"] in ("llava", "gemini", "moondream")]
    assert not misread([{**reply, "reply": thought + reply["reply"]} for reply in plain])
    assert not misread([{**reply, "reply": "<think>" + reply["reply"], "expected": "abstain"} for reply in plain])


def test_the_place_is_where_the_word_stands() -> None:
    from vlm_itl.vlm.answers import VERDICT_WORDS, read_answer

    for reply in REPLIES:
        reading = read_answer(reply["reply"])
        word = reply["reply"][reading.start : reading.end].lower()
        if reading.verdict == "abstain":
            assert word == "", reply
        elif "\\u" not in reply["reply"]:
            assert {**VERDICT_WORDS, "y": "yes", "n": "no", "not": "no"}[word] == reading.verdict, reply


@pytest.mark.parametrize(
    "text",
    [
        "\n" * 19_000 + "yes",
        "so   " * 3000 + "yes",
        "answer is " * 1900,
        "<answer>" * 2000,
        "| " * 9000,
        "a: yes, " * 50,
    ],
    ids=["lines", "so", "answer", "tags", "table", "items"],
)
def test_odd_answers_take_no_time(text: str) -> None:
    began = time.process_time()
    parse_answer(text)
    assert time.process_time() - began < 2


NOT_ANSWERS = [  # each was read as yes
    "Yes.\n\nWait, actually no.",
    "Is the cat covered? Yes. Is anything else covered? Yes.",
    "Cat: yes. Other objects: yes.",
    "1. cat - yes 2. dog - no",
    "Yes for the cat, no for the dog.",
    "Yes to the cat, no to the dog.",
    "Yes for the cat, not for the dog.",
    "The cat: yes. The dog: no. Overall: yes.",
    "The correct answer would be yes if the tail were covered.",
    "I'd answer yes had the tail been covered.",
    "A yes would require the tail.",
    "Yes, minus the tail.",
    "Yes, save for the tail.",
    "Yes, it covers about 80% of the cat.",
    "Yes, about half.",
    "Yes, the tail sticks out.",
    "Yes, the region is bigger than the cat.",
    "Yes, there's a bit of grass in it.",
    "Yes, the colours are swapped.",
]
ANSWERS = {
    "Is any part of another object coloured? No. Verdict: yes": "yes",
    "Other objects coloured: no. Cat covered: yes. Verdict: yes": "yes",
    "1) cat: yes 2) dog: yes": "yes",
    "The cat: yes. The dog: no. Overall: no.": "no",
    "Yes, the region is no larger than the cat.": "yes",
    "Yes, it covers 100% of the cat.": "yes",
    "Yes, 95%": "yes",
    "No (0.9)": "no",
    "No: 30% of the cat is uncovered.": "no",
    "No more than half is covered. No.": "no",
}


def test_a_yes_that_is_taken_back_or_said_of_something_else_is_none() -> None:
    """Retractions, conditions, shares, a second question that asks for what is wrong, a list in one line."""
    replies = [{"reply": reply, "expected": "abstain"} for reply in NOT_ANSWERS]
    assert not misread([*replies, *({"reply": r, "expected": verdict} for r, verdict in ANSWERS.items())])
