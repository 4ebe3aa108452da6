"""Verdict metrics against scikit-learn, break-even against a simulation, and the certified threshold's promise."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from scipy import stats

from vlm_itl.core import ConfigError, DataError
from vlm_itl.judge import CERTIFY_GRID, break_even, certify, clopper_pearson_upper, verdict_metrics
from vlm_itl.vlm import Judgement

RATES = "coverage base_rate acceptance agreement_rate balanced_accuracy sensitivity specificity kappa precision".split()


@pytest.mark.parametrize("seed", range(20))
def test_equal_to_scikit_learn(seed: int):
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(seed)
    n = int(rng.integers(5, 400))
    ious = rng.random(n)
    verdicts = rng.choice(["yes", "no", "abstain"], n, p=rng.dirichlet([3, 3, 1]))
    found = verdict_metrics([Judgement(str(v)) for v in verdicts], ious.tolist(), tau=0.5)
    judged = verdicts != "abstain"
    truth, said = (ious >= 0.5)[judged], (verdicts == "yes")[judged]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = {
            "agreement_rate": metrics.accuracy_score(truth, said),
            "balanced_accuracy": metrics.balanced_accuracy_score(truth, said),
            "sensitivity": metrics.recall_score(truth, said),
            "specificity": metrics.recall_score(truth, said, pos_label=False),
            "kappa": metrics.cohen_kappa_score(truth, said),
            "precision": metrics.precision_score(truth, said),
        }
    assert (found["n"], found["judged"]) == (n, judged.sum())
    assert math.isclose(found["base_rate"], (ious >= 0.5).mean()) and math.isclose(found["acceptance"], said.mean())
    for name, value in wanted.items():
        if found[name] is not None:
            assert math.isclose(found[name], value, abs_tol=1e-12), name
    if 0 < truth.sum() < len(truth) and said.any():
        assert all(found[name] is not None for name in RATES)


def test_abstention_never_counts_as_no():
    found = verdict_metrics(["yes", "abstain", "abstain"], [0.9, 0.9, 0.1])
    assert found["coverage"] == 1 / 3 and found["base_rate"] == 2 / 3
    assert found["sensitivity"] == found["agreement_rate"] == found["precision"] == 1
    assert found["specificity"] is None and found["balanced_accuracy"] is None


def test_undefined_is_none():
    assert set(verdict_metrics([], []).items()) == {("n", 0), ("judged", 0), *((name, None) for name in RATES)}
    silent = verdict_metrics(["abstain"] * 3, [0.9, 0.1, 0.2])
    assert silent["coverage"] == 0 and silent["base_rate"] == 1 / 3 and silent["agreement_rate"] is None
    one_sided = verdict_metrics(["yes", "yes"], [0.9, 0.8])
    assert one_sided["kappa"] is None and one_sided["specificity"] is None and one_sided["agreement_rate"] == 1
    assert verdict_metrics(["no"], [0.1])["precision"] is None


def test_void_truth_is_left_out():
    found = verdict_metrics(["yes", "no"], [float("nan"), 0.1])
    assert found["n"] == 1 and found["acceptance"] == 0 and found["base_rate"] == 0


def test_tau_is_inclusive():
    assert verdict_metrics(["yes"], [0.7])["sensitivity"] == 1


def test_bad_input():
    with pytest.raises(DataError, match="pair up"):
        verdict_metrics(["yes"], [])
    with pytest.raises(DataError, match="'maybe'"):
        verdict_metrics(["maybe"], [0.5])
    with pytest.raises(ConfigError, match="tau"):
        verdict_metrics(["yes"], [0.5], tau=7)
    for wrong in ({"pi": -0.1}, {"specificity": 2}, {"c_mask": -1}, {"psi": float("inf")}, {"pi": float("nan")}):
        with pytest.raises(ConfigError):
            break_even(**{"pi": 0.5, "sensitivity": 0.5, "specificity": 0.5, **wrong})


@pytest.mark.parametrize(("s", "t"), [(0.9, 0.9), (0.91, 0.23), (0.5, 0.5), (1, 0), (0.7, 0.95)])
def test_break_even_equals_a_simulation(s: float, t: float):
    rng = np.random.default_rng(0)
    good = rng.random(400_000) < 0.6
    yes = np.where(good, rng.random(400_000) < s, rng.random(400_000) >= t)
    found = break_even(0.6, s, t, c_judge=9, psi=300)
    assert math.isclose(found["accepted"], yes.mean(), abs_tol=0.005)
    assert math.isclose(found["bad_among_accepted"], (~good[yes]).mean(), abs_tol=0.005)
    assert math.isclose(found["saved_s"], (239.7 * yes - 9 - 300 * (yes & ~good)).mean(), abs_tol=2)
    assert found["pays"] == (found["saved_s"] > 0)


def test_break_even_of_a_judge_that_accepts_nothing():
    found = break_even(0.6, 0.0, 1.0)
    assert found["accepted"] == 0 and math.isnan(found["bad_among_accepted"]) and not found["pays"]
    assert break_even([0.2, 0.8], 0.9, [[0.1], [0.5], [0.9]])["saved_s"].shape == (3, 2)


def test_clopper_pearson():
    for bad, accepted in [(0, 10), (3, 50), (49, 50), (7, 7), (0, 0)]:
        upper = clopper_pearson_upper(bad, accepted, 0.1)
        if bad == accepted:
            assert upper == 1
        else:
            assert math.isclose(stats.binom.cdf(bad, accepted, upper), 0.1, rel_tol=1e-6)


def draw(rng: np.random.Generator, n: int, auc: float, base: float) -> tuple[np.ndarray, np.ndarray]:
    good = rng.random(n) < base
    latent = rng.normal(size=n) + good * np.sqrt(2) * stats.norm.ppf(auc)
    return 1 / (1 + np.exp(-latent)), good


def bad_share(threshold: float, auc: float, base: float) -> float:
    latent = np.log(threshold / (1 - threshold))
    good = base * stats.norm.sf(latent - np.sqrt(2) * stats.norm.ppf(auc))
    bad = (1 - base) * stats.norm.sf(latent)
    return float(bad / (good + bad))


@pytest.mark.parametrize(("auc", "n"), [(0.92, 200), (0.92, 500), (0.85, 500)])
def test_certify_keeps_its_promise(auc: float, n: int):
    repetitions, alpha, delta = 500, 0.1, 0.1
    broken = naive = 0
    for seed in range(repetitions):
        p_yes, good = draw(np.random.default_rng(seed), n, auc, 0.6)
        threshold = certify(p_yes, good, alpha, delta)["threshold"]
        broken += threshold is not None and bad_share(threshold, auc, 0.6) > alpha
        ordered = np.argsort(-p_yes)
        observed = np.cumsum(~good[ordered]) / np.arange(1, n + 1)
        passing = np.flatnonzero(observed <= alpha)
        naive += len(passing) > 0 and bad_share(p_yes[ordered][passing[-1]], auc, 0.6) > alpha
    assert broken <= repetitions * delta + 3 * math.sqrt(repetitions * delta * (1 - delta))
    assert naive > 0.3 * repetitions  # what it protects from


def test_certify_accepts_nothing_rather_than_something_wrong():
    rng = np.random.default_rng(0)
    assert certify(rng.random(300), rng.random(300) < 0.5)["threshold"] is None
    assert certify([0.9] * 21, [True] * 21)["threshold"] is None  # too few to know
    found = certify([0.9] * 22 + [float("nan")] * 5, [True] * 22 + [False] * 5)
    assert found["accepted"] == 22 and found["threshold"] <= 0.9 and found["n"] == 27
    assert certify([0.0] * 50, [True] * 50)["threshold"] is None  # below every threshold of the grid
    assert certify([1.0] * 50, [True] * 50)["accepted"] == 50
    assert np.all(np.diff(CERTIFY_GRID) < 0)


def test_certify_stops_at_the_first_failure():
    scores, good = [0.99] * 25 + [0.5] * 975, [True] * 20 + [False] * 5 + [True] * 975
    assert certify(scores, good, min_share=0.5)["accepted"] == 1000  # 5 bad of 1000: passes where it begins
    assert certify(scores, good, min_share=0.02)["threshold"] is None  # 5 bad of 25 comes first, and fails


def test_certify_bad_input():
    for scores, good in [([], []), ([0.5], [True, False]), ([1.5], [True])]:
        with pytest.raises(DataError):
            certify(scores, good)
    for options in ({"alpha": 0}, {"delta": 1}, {"min_share": 2}):
        with pytest.raises(ConfigError):
            certify([0.5], [True], **options)
