"""Plans for labels: only the sample is believed, prices only ever make a plan stricter, and promises are kept."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_itl.core.checks import ConfigError, DataError
from vlm_itl.judging.label_plan import (
    ACTIONS,
    LabelGoal,
    Sample,
    action_prices,
    believe,
    choose_actions,
    label_curve,
    losses_left,
    plan_labels,
    risk_bound,
    seconds_spent,
)
from vlm_itl.judging.measures import CHECK_SECONDS
from vlm_itl.proposals.correction import CorrectionCost

QUALITY, BAD = LabelGoal(quality=0.8), LabelGoal(bad=0.1)


def draw(n: int, seed: int, noise: float = 0.2) -> Sample:
    """Proposals with a noisy score; some without a mask, some without an answer."""
    rng = np.random.default_rng(seed)
    iou = rng.random(n)
    p_yes = np.where(rng.random(n) < 0.1, np.nan, (iou + noise * rng.normal(size=n)).clip(0, 1))
    none = rng.random(n) < 0.1
    share = (1.2 * (1 - iou)).clip(0, 1)
    return Sample(np.where(none, np.nan, p_yes), np.where(none, np.nan, iou), np.where(none, np.nan, share))


@given(st.integers(0, 10_000), st.sampled_from([QUALITY, BAD]), st.sampled_from([0.5, 1.0, 3.0]))
def test_a_higher_price_only_makes_a_plan_stricter(seed: int, goal: LabelGoal, rate: float) -> None:
    """Image by image the true loss falls, which the promise rests on."""
    sample, pool = draw(40, seed), draw(30, seed + 1)
    prices = action_prices(believe(sample, pool.p_yes, goal), CorrectionCost(rate=rate))
    left = [losses_left(choose_actions(*prices, price), pool.iou, goal) for price in np.geomspace(0.1, 1e7, 60)]
    assert (np.diff(np.stack(left), axis=0) <= 1e-12).all()
    assert left[0].sum() >= left[-1].sum()


@given(st.integers(0, 10_000))
def test_the_chosen_actions_are_the_cheapest_of_all(seed: int) -> None:
    """Against trying every combination: no plan that is expected to leave as little wrong costs less."""
    goal, pool = QUALITY, draw(5, seed + 1)
    seconds, loss = action_prices(believe(draw(40, seed), pool.p_yes, goal), CorrectionCost())
    chosen = choose_actions(seconds, loss, 150.0)
    rows = np.arange(5)
    mine = seconds[rows, chosen].sum(), loss[rows, chosen].sum()
    for actions in itertools.product(range(4), repeat=5):
        places = np.array(actions)
        if loss[rows, places].sum() <= mine[1] + 1e-12:
            assert seconds[rows, places].sum() >= mine[0] - 1e-9


def test_expected_prices_by_hand() -> None:
    """Two kinds of masks, told apart by their score."""
    sample = Sample(np.array([0.9, 0.9, 0.1, 0.1]), np.array([0.9, 0.9, 0.2, 0.4]), np.array([0.1, 0.1, 0.8, 0.6]))
    seconds, loss = action_prices(believe(sample, np.array([0.9, 0.1]), QUALITY), CorrectionCost(), mask_seconds=100.0)
    assert np.allclose(loss, [[0.1, 0.1, 0, 0], [0.7, 0, 0, 0]])
    assert np.allclose(seconds[0], [0, CHECK_SECONDS, 9 + 10, 100])
    assert np.allclose(seconds[1], [0, CHECK_SECONDS + 70, 9 + 70, 100])


def test_spent_is_what_the_ledger_would_charge() -> None:
    """A drawing is never exceeded, and what has no proposal is drawn whatever the plan says."""
    iou, share = np.array([0.9, 0.1, np.nan]), np.array([0.0, 1.0, np.nan])
    for action in range(4):
        spent = seconds_spent(np.full(3, action), iou, share, QUALITY, CorrectionCost(), mask_seconds=50.0)
        assert spent[2] == 50.0 and (spent <= 50.0 + CHECK_SECONDS).all()
    assert losses_left(np.zeros(3, int), iou, QUALITY).tolist() == pytest.approx([0.1, 0.9, 0.0])


@pytest.mark.parametrize("noise", [0.1, 0.4, 50.0])
def test_promises_are_kept(noise: float) -> None:
    """150 samples of 50: the mean quality reaches the goal; in at most a tenth of the pools too many masks are bad."""
    losses: dict[str, list[float]] = {"quality": [], "bad": []}
    for seed in range(150):
        sample, pool = draw(50, 2 * seed, noise), draw(200, 2 * seed + 1, noise)
        for name, goal in (("quality", QUALITY), ("bad", BAD)):
            plan = plan_labels(sample, pool.p_yes, goal, seed=seed)
            actions = np.array([ACTIONS.index(action) for action in plan["actions"]])
            losses[name].append(float(losses_left(actions, pool.iou, goal).mean()))
            assert plan["bound"] <= plan["limit"]
    error = np.std(losses["quality"]) / np.sqrt(150)
    assert np.mean(losses["quality"]) <= 0.2 + 2 * error
    assert np.mean(np.array(losses["bad"]) > 0.1) <= 0.1 + 3 * np.sqrt(0.09 / 150)


@pytest.mark.parametrize("taken", ["right ones", "doubtful ones"])
def test_promises_are_kept_whatever_a_strategy_took(taken: str) -> None:
    """Half of the pool is drawn, chosen by what nobody should know: the promise holds if it is not counted as done."""
    failed = {0.0: 0, 0.5: 0}
    for seed in range(60):
        sample, pool = draw(60, 2 * seed), draw(400, 2 * seed + 1)
        right, doubt = -np.nan_to_num(pool.iou), np.abs(np.nan_to_num(pool.p_yes) - 0.5)
        left = pool.take(np.argsort(right if taken == "right ones" else doubt)[200:])
        for done in failed:
            plan = plan_labels(sample, left.p_yes, BAD, done=done, seed=seed)
            actions = np.array([ACTIONS.index(action) for action in plan["actions"]])
            failed[done] += losses_left(actions, left.iou, BAD).sum() / 400 > BAD.limit
    assert failed[0.0] <= 6 + 3 * np.sqrt(0.09 * 60) and failed[0.5] > failed[0.0]


def test_a_better_judge_saves_where_nobody_can_correct() -> None:
    spent = []
    for noise in (0.05, 50.0):
        each = []
        for seed in range(20):
            sample, pool = draw(60, 2 * seed, noise), draw(300, 2 * seed + 1, noise)
            cost = CorrectionCost(rate=1000)
            actions = np.array([ACTIONS.index(a) for a in plan_labels(sample, pool.p_yes, QUALITY, cost)["actions"]])
            each.append(seconds_spent(actions, pool.iou, pool.share, QUALITY, cost).sum())
        spent.append(np.mean(each))
    assert spent[0] < 0.9 * spent[1]


def test_masks_that_are_there_allow_more_loss_in_the_rest() -> None:
    sample, pool = draw(80, 0), draw(200, 1)
    alone, beside = (plan_labels(sample, pool.p_yes, QUALITY, done=done) for done in (0.0, 0.5))
    assert beside["limit"] == pytest.approx(2 * alone["limit"]) and beside["seconds"] < alone["seconds"]


def test_what_cannot_be_promised_is_corrected() -> None:
    """Also without a sample at all; then nothing is left to chance."""
    small = draw(8, 3)
    plan = plan_labels(small, draw(50, 1).p_yes, LabelGoal(bad=0.05))
    assert plan["price"] is None and plan["bound"] == 0 and set(plan["actions"]) <= {"fix", "draw"}
    whole = plan_labels(draw(40, 0), draw(50, 1).p_yes, LabelGoal(quality=1.0))
    assert set(whole["actions"]) <= {"fix", "draw"}


def test_a_curve_ends_where_everything_is_right() -> None:
    curve = label_curve(draw(60, 0), draw(200, 1), QUALITY)
    assert curve["seconds"][0] == pytest.approx(239.7 * np.isnan(draw(200, 1).iou).sum())
    assert curve["quality"][-1] == pytest.approx(1.0, abs=0.02) and curve["bad"][-1] == 0
    assert (np.diff(curve["quality"]) >= -1e-9).all()


@pytest.mark.parametrize(
    ("wrong", "word"),
    [({}, "either quality"), ({"quality": 0.8, "bad": 0.1}, "either quality"), ({"quality": 1.5}, "goal: quality"),
     ({"bad": 1.0}, "goal: bad"), ({"quality": 0.8, "tau": 2}, "tau")],
)  # fmt: skip
def test_impossible_goals_are_refused(wrong: dict[str, float], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        LabelGoal(**wrong)


def test_samples_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match="as many"):
        Sample(np.zeros(2), np.zeros(3), np.zeros(3))
    none = np.full(3, np.nan)
    with pytest.raises(DataError, match="no image of the sample"):
        plan_labels(Sample(none, none, none), np.zeros(2), QUALITY)


def test_bounds_by_hand() -> None:
    assert risk_bound(np.array([0.5, 0.0, 0.5]), QUALITY) == 2 / 4
    assert risk_bound(np.zeros(22), BAD) == pytest.approx(1 - 0.1 ** (1 / 22))
