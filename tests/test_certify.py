"""Calibrators against independent fits, the certified threshold's promise, estimates of a pool by their coverage."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from scipy import optimize, stats

from vlm_itl.core.checks import ConfigError, DataError
from vlm_itl.data.groups import one_of_each
from vlm_itl.judging.certify import (
    CERTIFY_GRID,
    METHODS,
    Calibrator,
    calibrate,
    certify,
    clopper_pearson_upper,
    estimate_good_rate,
    rogan_gladen,
)


def draw(rng: np.random.Generator, n: int, auc: float, base: float) -> tuple[np.ndarray, np.ndarray]:
    good = rng.random(n) < base
    latent = rng.normal(size=n) + good * np.sqrt(2) * stats.norm.ppf(auc)
    return 1 / (1 + np.exp(-latent)), good


def bad_share(threshold: float, auc: float, base: float) -> float:
    latent = np.log(threshold / (1 - threshold))
    good = base * stats.norm.sf(latent - np.sqrt(2) * stats.norm.ppf(auc))
    bad = (1 - base) * stats.norm.sf(latent)
    return float(bad / (good + bad))


# ---- calibration ----


def log_loss(y: np.ndarray, z: np.ndarray) -> float:
    return float((np.logaddexp(0, z) - y * z).sum())


@pytest.mark.parametrize("seed", range(4))
def test_platt_minimises_its_loss(seed: int):
    """Platt's targets and loss, minimised independently."""
    p, good = draw(np.random.default_rng(seed), 120, 0.85, 0.6)
    z, n1, n0 = np.log(p / (1 - p)), good.sum(), (~good).sum()
    target = np.where(good, (n1 + 1) / (n1 + 2), 1 / (n0 + 2))
    best = optimize.minimize(lambda x: log_loss(target, x[0] * z + x[1]), [1.0, 0.0], tol=1e-12)
    found = calibrate(p, good)
    assert (found.scale, found.shift) == pytest.approx(best.x, abs=2e-3)


@pytest.mark.parametrize("seed", range(4))
def test_temperature_minimises_its_loss(seed: int):
    p, good = draw(np.random.default_rng(seed), 120, 0.85, 0.5)
    z = np.log(p / (1 - p))
    best = optimize.minimize_scalar(lambda a: log_loss(good, a * z), bounds=(0, 20), method="bounded")
    found = calibrate(p, good, "temperature")
    assert found.scale == pytest.approx(max(0, best.x), abs=2e-3) and found.shift == 0
    assert found.apply(0.5) == 0.5


@pytest.mark.parametrize("seed", range(4))
def test_isotonic_is_scikit_learns_and_monotone(seed: int):
    isotonic = pytest.importorskip("sklearn.isotonic")
    rng = np.random.default_rng(seed)
    p, good = draw(rng, 100, 0.8, 0.6)
    new = rng.random(200)
    wanted = isotonic.IsotonicRegression(out_of_bounds="clip").fit(p, good).predict(new)
    found = calibrate(p, good, "isotonic").apply(new)
    assert np.allclose(found, wanted) and (np.diff(found[np.argsort(new)]) >= 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_calibrators_stay_inside_and_pass_silence_on(method: str):
    p, good = draw(np.random.default_rng(0), 200, 0.9, 0.6)
    silent = p.copy()
    silent[::7] = np.nan
    calibrator = calibrate(silent, good, method)
    assert calibrator.n == (~np.isnan(silent)).sum()
    out = calibrator.apply([0.0, 1e-12, 0.3, np.nan, None, 1.0])  # type: ignore[list-item]
    assert np.isnan(out[3:5]).all() and (out[[0, 1, 2, 5]] >= 0).all() and (out[[0, 1, 2, 5]] <= 1).all()
    again = Calibrator.from_dict(json.loads(json.dumps(calibrator.to_dict())))
    assert again == calibrator and np.array_equal(again.apply(p), calibrator.apply(p))


@pytest.mark.parametrize("method", METHODS)
def test_calibration_helps_on_new_masks(method: str):
    rng = np.random.default_rng(1)
    p, good = draw(rng, 2000, 0.9, 0.6)
    z = np.log(p / (1 - p))
    truth = math.sqrt(2) * float(stats.norm.ppf(0.9))
    right = 1 / (1 + np.exp(-(truth * z - truth**2 / 2 + math.log(1.5))))
    over = 1 / (1 + np.exp(-3 * np.log(right / (1 - right))))  # three times too sure
    fit, new = np.arange(2000) < 1000, np.arange(2000) >= 1000
    after = calibrate(over[fit], good[fit], method).apply(over)[new]
    assert ((after - good[new]) ** 2).mean() < ((over[new] - good[new]) ** 2).mean() - 0.005
    assert np.abs(after - right[new]).mean() < 0.05


def test_separated_samples_are_not_infinitely_sure():
    sure = calibrate([0.1, 0.2, 0.8, 0.9] * 3, [False, False, True, True] * 3)
    assert 0.8 < sure.apply(0.9) < 1 and np.isfinite(sure.scale)


def test_a_judge_read_backwards():
    """Platt turns it round; a temperature cannot, and says that it knows nothing."""
    p, good = draw(np.random.default_rng(0), 300, 0.9, 0.5)
    assert calibrate(1 - p, good).scale < 0
    assert calibrate(1 - p, good, "temperature").apply([0.1, 0.9]).tolist() == [0.5, 0.5]


def test_calibrate_refuses_one_class():
    for p, good, message in [
        ([0.5, 0.6], [True, True], "all 2 scored masks are good"),
        ([0.5, float("nan")], [False, True], "all 1 scored masks are bad"),
        ([float("nan")] * 2, [False, True], "abstained on all"),
    ]:
        with pytest.raises(DataError, match=message):
            calibrate(p, good)
    with pytest.raises(ConfigError, match="Did you mean 'isotonic'"):
        calibrate([0.5, 0.6], [True, False], "isotonc")
    with pytest.raises(DataError, match="0, 1"):
        calibrate([1.5, 0.6], [True, False])


# ---- the certified threshold ----


def test_clopper_pearson():
    for bad, accepted in [(0, 10), (3, 50), (49, 50), (7, 7), (0, 0)]:
        upper = clopper_pearson_upper(bad, accepted, 0.1)
        if bad == accepted:
            assert upper == 1
        else:
            assert math.isclose(stats.binom.cdf(bad, accepted, upper), 0.1, rel_tol=1e-6)


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


def one_by_one(p_yes: Any, good: Any, alpha: float, delta: float, min_share: float) -> tuple[Any, int, int]:
    """The rule as it is told: threshold after threshold."""
    scores, is_good = np.asarray(p_yes), np.asarray(good)
    best: tuple[Any, int, int] = (None, 0, 0)
    for threshold in CERTIFY_GRID:
        above = scores >= threshold
        accepted, bad = int(above.sum()), int((above & ~is_good).sum())
        if accepted < max(1, min_share * len(scores)) or 1 - delta ** (1 / accepted) > alpha:
            continue  # too few: below what may pass, or could ever pass
        if bad == accepted or stats.beta.ppf(1 - delta, bad + 1, accepted - bad) > alpha:
            break
        if accepted > best[1]:
            best = (float(threshold), accepted, bad)
    return best


@pytest.mark.parametrize("seed", range(25))
def test_certify_equals_the_rule_step_by_step(seed: int):
    rng = np.random.default_rng(seed)
    p, good = draw(rng, int(rng.integers(30, 300)), 0.95, 0.75)
    p[rng.random(len(p)) < 0.1] = np.nan
    p = np.round(p, int(rng.integers(1, 4)))
    alpha, delta, share = rng.uniform(0.05, 0.4), rng.uniform(0.02, 0.3), rng.uniform(0, 0.5)
    found = certify(p, good, alpha, delta, share)
    assert (found["threshold"], found["accepted"], found["bad"]) == one_by_one(p, good, alpha, delta, share)


def test_27_a_start_that_could_never_pass_is_left_out():
    """One hundred good masks, no two alike: 15 of them can certify nothing, 22 can, and 100 do."""
    scores = np.linspace(0.3, 0.99, 100)
    assert certify(scores, [True] * 100, min_share=0.15)["accepted"] == 100
    assert certify(scores, [True] * 100, 0.1, 0.1 / 4)["accepted"] == 100


def test_27_least_sample():
    from vlm_itl.judging.certify import least_sample

    for delta, left in [(0.1, 1.0), (0.1 / 4, 1.0), (0.1 / 4, 0.7), (0.5, 0.2)]:
        n = least_sample(0.1, delta, left)
        assert clopper_pearson_upper(0, n, delta) / left <= 0.1 < clopper_pearson_upper(0, n - 1, delta) / left
    assert (least_sample(0.1, 0.1), least_sample(0.1, 0.1 / 4)) == (22, 36)


def loop_breaks(seed: int, n: int, easy_first: float, counted: bool, size: int = 400, rounds: int = 4) -> bool:
    """Does a loop whose strategy takes good masks first accept too many bad ones in any round?"""
    rng = np.random.default_rng([seed, n])
    sample, sample_good = draw(rng, n, 0.92, 0.6)
    p, good = draw(rng, size, 0.92, 0.6)
    easy, left = rng.normal(size=size) + easy_first * good, np.arange(size)
    for _ in range(rounds):
        known: dict[str, Any] = {"left": len(left) / size, "pool": p[left]} if counted else {}
        threshold = certify(sample, sample_good, 0.1, 0.1 / rounds, **known)["threshold"]
        taken = p[left] >= (2 if threshold is None else threshold)
        if taken.any() and (~good[left][taken]).mean() > 0.1:
            return True
        left = left[np.argsort(-easy[left])[size // 10 :]]
    return False


@pytest.mark.parametrize(("n", "easy_first"), [(150, 2.0), (400, 2.0), (400, 9.0)])
def test_28_a_strategy_that_takes_easy_images_keeps_the_promise(n: int, easy_first: float):
    repetitions = 60
    broken = sum(loop_breaks(seed, n, easy_first, True) for seed in range(repetitions)) / repetitions
    assert broken <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / repetitions)


def test_28_what_it_protects_from():
    assert sum(loop_breaks(seed, 400, 9.0, False) for seed in range(20)) > 5
    with pytest.raises(DataError, match="pool"):
        certify([0.9] * 30, [True] * 30, left=0.5)


# ---- how many masks of a pool are good ----


def covered(n: int, auc: float, base: float, repetitions: int) -> dict[str, float]:
    """Share of intervals that hold the true rate."""
    hits = {"ppi": 0, "rogan_gladen": 0}
    for repetition in range(repetitions):
        rng = np.random.default_rng([repetition, n, int(100 * auc)])
        few, few_good = draw(rng, n, auc, base)
        many, _ = draw(rng, 1000, auc, base)
        ppi = estimate_good_rate(many, few, few_good)
        hits["ppi"] += ppi["low"] <= base <= ppi["high"]
        rg = rogan_gladen(*(np.where(p >= 0.5, "yes", "no").tolist() for p in (many, few)), few_good)
        hits["rogan_gladen"] += rg["value"] is None or rg["low"] <= base <= rg["high"]
    return {name: count / repetitions for name, count in hits.items()}


@pytest.mark.parametrize(("n", "auc", "base"), [(100, 0.92, 0.6), (100, 0.6, 0.6), (200, 0.85, 0.8)])
def test_estimates_cover_the_truth(n: int, auc: float, base: float):
    """At least 95 % - 3 sigma of 250 intervals (the sample must not be tiny)."""
    floor = 0.95 - 3 * math.sqrt(0.95 * 0.05 / 250)
    assert all(share >= floor for share in covered(n, auc, base, 250).values())


def test_ppi_gains_from_a_good_judge_and_loses_nothing_by_a_poor_one():
    rng = np.random.default_rng(0)
    few, few_good = draw(rng, 150, 0.95, 0.6)
    many, _ = draw(rng, 3000, 0.95, 0.6)
    good_one = estimate_good_rate(many, few, few_good)
    poor = estimate_good_rate(rng.random(3000), rng.random(150), few_good)
    labels = estimate_good_rate(np.full(3000, 0.5), np.full(150, 0.5), few_good)
    assert labels["weight"] == 0 and math.isclose(labels["value"], few_good.mean())
    assert good_one["high"] - good_one["low"] < 0.8 * (labels["high"] - labels["low"])
    assert poor["high"] - poor["low"] < 1.05 * (labels["high"] - labels["low"])
    biased = estimate_good_rate(many * 0.5, few * 0.5, few_good)  # half the scale, twice the weight
    assert math.isclose(biased["value"], good_one["value"]) and math.isclose(biased["high"], good_one["high"])


def test_ppi_by_hand():
    """f = y on the sample, one half of the pool scored 1: lambda is 1 up to the pool's share, the estimate 0.5."""
    y = np.array([True, False] * 20)
    found = estimate_good_rate(np.array([1.0, 0.0] * 2000), y.astype(float), y)
    assert found["weight"] > 0.98 and math.isclose(found["value"], 0.5) and found["high"] - found["low"] < 0.05
    sure = estimate_good_rate([0.9] * 50, [0.8] * 30, [True] * 30)  # all good: the exact interval, not a point
    assert sure["value"] == sure["high"] == 1 and math.isclose(sure["low"], 0.025 ** (1 / 30))
    silent = estimate_good_rate([np.nan] * 50, [np.nan] * 30, [True, False] * 15)
    assert silent["value"] == 0.5 and silent["weight"] == 0


def test_rogan_gladen_inverts_the_acceptance():
    pool = ["yes"] * 854 + ["no"] * 146 + ["abstain"] * 77
    sample = ["yes"] * 91 + ["no"] * 9 + ["yes"] * 77 + ["no"] * 23 + ["abstain"] * 5
    found = rogan_gladen(pool, sample, [True] * 100 + [False] * 105)
    assert found["value"] == pytest.approx(0.6) and found["low"] < 0.6 < found["high"]
    assert rogan_gladen(["yes"], ["yes", "yes"], [True, False])["value"] is None  # a coin
    assert rogan_gladen(["abstain"], ["yes", "no"], [True, False])["value"] is None  # silence
    assert rogan_gladen(["yes"], ["yes", "no"], [True, True])["value"] is None  # no bad mask: specificity unknown


def test_estimates_refuse_bad_input():
    with pytest.raises(DataError, match="three labelled"):
        estimate_good_rate([0.5] * 5, [0.5], [True])
    with pytest.raises(ConfigError, match="level"):
        estimate_good_rate([0.5] * 5, [0.5] * 3, [True] * 3, level=2)
    with pytest.raises(DataError, match="pair up"):
        rogan_gladen(["yes"], ["yes"], [])


def test_a_certificate_from_one_frame_of_each_film_keeps_its_promise():
    """Forty films of twenty frames, a third of the films bad: all frames together break the promise far too often."""
    rng, name = np.random.default_rng(0), [f"{film} {frame}" for film in range(40) for frame in range(20)]
    groups = {frame: frame.split()[0] for frame in name}

    def films(count: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and truths of all frames."""
        film = np.repeat(np.arange(count), 20)
        good = rng.random(count * 20) < np.where(rng.random(count) < 0.35, 0.1, 0.97)[film]
        noise = rng.normal(0, 0.25, count * 20) + rng.normal(0, 0.15, count)[film]
        return (0.4 + 0.2 * good + noise).clip(0.001, 0.999), good

    wide, truly = films(4000)
    broken = {"all": 0, "one": 0}
    for seed in range(200):
        scores, good = films(40)
        for how, places in (("all", list(range(800))), ("one", one_of_each(name, groups, seed))):
            found = certify(scores[places], good[places], alpha=0.2, delta=0.1)["threshold"]
            broken[how] += found is not None and (~truly[wide >= found]).mean() > 0.2
    assert len(one_of_each(name, groups, 0)) == 40 and one_of_each(name, {}, 0) == list(range(800))
    assert broken["all"] > 40 and broken["one"] <= 200 * 0.1 + 3 * math.sqrt(200 * 0.1 * 0.9)
