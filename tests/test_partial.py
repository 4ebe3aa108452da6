"""What of a mask is kept, and what it costs to correct the rest."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vlm_itl.data.labels import VOID, LabelSpace
from vlm_itl.model.metrics import image_iou
from vlm_itl.proposals import CorrectionCost, keep_classes
from vlm_itl.proposals.correction import changed_outline, changed_pixels
from vlm_itl.proposals.partial import is_empty, kept_quality, label_questions, object_classes, sum_up
from vlm_itl.vlm.handler import Judgement, JudgeQuery, make_handler

LABELS = LabelSpace(("background", "red", "blue"))
PLAIN = LabelSpace(("sky", "road"))  # no background
masks = arrays(np.uint8, (4, 5), elements=st.sampled_from([0, 1, 2, VOID]))
truths = arrays(np.uint8, (4, 5), elements=st.sampled_from([0, 1, 2, VOID]))


@given(masks, st.sets(st.sampled_from([1, 2])))
def test_what_is_kept_was_there(mask: np.ndarray, accepted: set[int]) -> None:
    """A kept pixel has its own class; only what was rejected is void."""
    kept = keep_classes(mask, accepted, LABELS)
    assert ((kept == mask) | (kept == VOID)).all()
    assert set(object_classes(kept, LABELS)) == set(object_classes(mask, LABELS)) & accepted
    assert ((kept == 0) == (mask == 0)).all()
    if set(object_classes(mask, LABELS)) <= accepted:
        assert (kept == mask).all()


@given(masks, truths)
def test_what_is_not_said_is_missed(mask: np.ndarray, truth: np.ndarray) -> None:
    """Void in a proposal is right about nothing; without it, nothing is new."""
    filled = np.where(mask == VOID, 2, mask).astype(np.uint8)
    whole, part = image_iou(filled, truth, 3), image_iou(np.where(filled == 2, VOID, filled), truth, 3)
    assert math.isnan(whole) == bool((truth == VOID).all())
    if not math.isnan(part) and (truth == 2).any():
        assert part <= image_iou(np.where(filled == 2, truth, filled), truth, 3) + 1e-12
    if not math.isnan(whole):
        quality, share = kept_quality(filled, truth, 3)
        assert (quality, share) == (whole, 1.0)


@given(masks, truths)
def test_a_correction_is_never_dearer_than_a_drawing(mask: np.ndarray, truth: np.ndarray) -> None:
    for cost in (CorrectionCost(), CorrectionCost(by="outline", rate=2.0)):
        share = cost.share(mask, truth, LABELS)
        drawing, looking = cost.parts(share, 100.0)
        assert 0 <= share <= 1 and 0 <= drawing * 100 + looking <= 100
    assert changed_pixels(truth, truth, LABELS) == 0 == changed_outline(truth, truth, LABELS)


def test_without_background_every_class_is_asked_about() -> None:
    mask = np.array([[0, 1]], np.uint8)
    asked = label_questions(JudgeQuery("a", None, mask, labels=PLAIN))
    assert [q.class_ids for q in asked] == [(0,), (1,)] and not is_empty(mask, PLAIN)
    assert changed_pixels(mask, np.array([[1, 1]], np.uint8), PLAIN) == 0.5


def test_a_simulated_judge_judges_one_class() -> None:
    """A perfect one says yes to the class that is right, and no to the other, in one mask."""
    truth, mask = np.array([[0, 1, 1, 2, 2]], np.uint8), np.array([[0, 1, 1, 2, 0]], np.uint8)
    judge = make_handler("mock", accuracy=1.0)
    judge.bind_truth(lambda image_id: truth)
    asked = label_questions(JudgeQuery("a", None, mask, labels=LABELS))
    assert [j.verdict for j in judge.judge(asked)] == ["yes", "no"]
    assert judge.judge([JudgeQuery("a", None, mask, labels=LABELS)])[0].verdict == "no"  # the whole mask: .67


@pytest.mark.parametrize(
    ("verdicts", "taken", "wanted"),
    [
        (["yes", "no"], [True, False], "yes"),
        (["no", "no"], [False, False], "no"),
        (["abstain", "no"], [False, False], "no"),
        (["abstain"], [False], "abstain"),
        ([], [], "abstain"),
    ],
)
def test_one_answer_for_an_image(verdicts: list[str], taken: list[bool], wanted: str) -> None:
    said = [Judgement(v, usd=0.5) for v in verdicts]
    summed = sum_up(said, taken, ["x"] * len(said), "a")
    assert summed.verdict == wanted and summed.id == "a" and summed.usd == 0.0
