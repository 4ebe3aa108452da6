"""Measures of a judge against independent implementations, intervals against simulations, break-even, rankings."""

from __future__ import annotations

import itertools
import math
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

import vlm_itl.experiment.config  # noqa: F401  makes every judge known
from vlm_itl.core.checks import ConfigError, DataError
from vlm_itl.core.files import to_json
from vlm_itl.data.labels import LabelSpace
from vlm_itl.judging.cards import card_table, interval_text, mask_groups, paired_difference, rank_judges, report_card
from vlm_itl.judging.certify import exact_interval
from vlm_itl.judging.judge_figures import (
    plot_acceptance,
    plot_break_even,
    plot_reliability,
    plot_risk_coverage,
    plot_roc,
    worst_mistakes,
)
from vlm_itl.judging.measures import (
    RATES,
    SCORE_MEASURES,
    VERDICT_MEASURES,
    break_even,
    gather_answers,
    image_weights,
    match_acceptance,
    risk_coverage,
    score_measures,
    verdict_measures,
    verdict_metrics,
)
from vlm_itl.vlm.handler import Judgement, JudgeQuery, make_handler

PLAIN = "coverage base_rate acceptance agreement_rate balanced_accuracy sensitivity specificity kappa precision".split()


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
        assert all(found[name] is not None for name in PLAIN)


def test_abstention_never_counts_as_no():
    found = verdict_metrics(["yes", "abstain", "abstain"], [0.9, 0.9, 0.1])
    assert found["coverage"] == 1 / 3 and found["base_rate"] == 2 / 3
    assert found["sensitivity"] == found["agreement_rate"] == found["precision"] == 1
    assert found["specificity"] is None and found["balanced_accuracy"] is None


def test_undefined_is_none():
    assert set(verdict_metrics([], []).items()) == {("n", 0), ("judged", 0), *((name, None) for name in PLAIN)}
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


def seconds_saved_by_the_mock(s: float, t: float, n: int) -> tuple[float, float]:
    """Saved an image by the mock's verdicts over n masks, half of them good, and by the formula."""
    labels, truth, bad = LabelSpace.voc(), np.full((2, 2), 8, np.uint8), np.zeros((2, 2), np.uint8)
    handler = make_handler("mock", sensitivity=s, specificity=t)
    handler.bind_truth(lambda image_id: truth)
    good = np.arange(n) < n // 2
    queries = [JudgeQuery(f"im{i}", None, truth if g else bad, labels=labels) for i, g in enumerate(good)]
    yes = np.array([j.verdict == "yes" for j in handler.judge(queries)])
    return float((239.7 * yes - 9 - 100 * (yes & ~good)).mean()), break_even(0.5, s, t, c_judge=9, psi=100)["saved_s"]


def test_the_mock_follows_the_break_even_formula():
    saved, formula = seconds_saved_by_the_mock(0.91, 0.23, 6000)
    assert math.isclose(saved, formula, rel_tol=0.03)


@pytest.mark.slow
@pytest.mark.parametrize(("s", "t"), [(0.9, 0.9), (0.91, 0.23), (0.6, 0.7), (1.0, 0.5), (0.7, 0.95)])
def test_the_mock_reproduces_the_break_even_formula(s: float, t: float):
    saved, formula = seconds_saved_by_the_mock(s, t, 60_000)
    assert math.isclose(saved, formula, rel_tol=0.01)


# ---- scores against independent implementations ----


def made_up(seed: int, n: int = 0, ties: bool = False) -> tuple[list[Judgement], np.ndarray, np.ndarray, np.ndarray]:
    """Judgements with scores, some abstaining, some IoUs unknown; scores and IoUs of the rows that count."""
    rng = np.random.default_rng(seed)
    n = n or int(rng.integers(20, 300))
    iou = rng.beta(3, 2, n)
    p = 1 / (1 + np.exp(-(4 * (iou - 0.6) + rng.normal(0, 1.5, n))))
    p = np.round(p, 1) if ties else p
    iou = np.round(iou, 1) if ties else iou
    quiet = rng.random(n) < 0.1
    shown = np.where(rng.random(n) < 0.05, np.nan, iou)
    said = [
        Judgement("abstain", p_yes=0.5, id=f"im{i}")
        if q
        else Judgement("yes" if x >= 0.5 else "no", p_yes=x, id=f"im{i}")
        for i, (x, q) in enumerate(zip(p.tolist(), quiet, strict=True))
    ]
    counted = ~quiet & ~np.isnan(shown)
    return said, shown, p[counted], iou[counted]


def brute_aurc(p: np.ndarray, good: np.ndarray) -> float:
    """Mean risk over k = 1..n, the tied in random order: by linear interpolation of the bad count inside each tie."""
    total, done, bad_done = 0.0, 0, 0
    for value in sorted(set(p.tolist()), reverse=True):
        members = ~good[p == value]
        for k in range(1, len(members) + 1):
            total += (bad_done + k * members.mean()) / (done + k)
        done, bad_done = done + len(members), bad_done + members.sum()
    return total / done


def brute_ece(p: np.ndarray, good: np.ndarray) -> float:
    """Fifteen bins by the middle rank of each distinct score."""
    bins: dict[int, list[int]] = {}
    for i, value in enumerate(p.tolist()):
        middle = (p < value).sum() * 2 + (p == value).sum()
        bins.setdefault(min(14, int(15 * middle) // (2 * len(p))), []).append(i)
    return sum(abs(good[rows].sum() - p[rows].sum()) for rows in map(np.array, bins.values())) / len(p)


@pytest.mark.parametrize(("seed", "ties"), itertools.product(range(12), (False, True)))
def test_scores_equal_to_scikit_learn_and_scipy(seed: int, ties: bool):
    metrics = pytest.importorskip("sklearn.metrics")
    said, ious, p, iou = made_up(seed, ties=ties)
    good = iou >= 0.6
    card = report_card(said, ious, tau=0.6, resamples=20)
    found = {name: row["value"] for name, row in card["measures"].items()}
    yes = p >= 0.5
    wanted = {
        "roc_auc": metrics.roc_auc_score(good, p),
        "average_precision": metrics.average_precision_score(good, p),
        "brier": metrics.brier_score_loss(good, p),
        "mcc": metrics.matthews_corrcoef(good, yes),
        "kappa": metrics.cohen_kappa_score(good, yes),
        "spearman": stats.spearmanr(p, iou).statistic,
        "aurc": brute_aurc(p, good),
        "ece": brute_ece(p, good) if ties else found["ece"],
    }
    for name, value in wanted.items():
        assert math.isclose(found[name], value, abs_tol=1e-9), name
    assert card["scored"] == len(p) == card["judged"]
    plain = verdict_metrics(said, ious, tau=0.6)
    assert all(math.isclose(plain[n], found[n]) for n in VERDICT_MEASURES if n in plain)


def test_scores_equal_to_torchmetrics():
    classification = pytest.importorskip("torchmetrics.functional.classification")
    import torch

    said, ious, p, iou = made_up(5, 400)
    good = torch.tensor(iou >= 0.7)
    found = {name: row["value"] for name, row in report_card(said, ious, resamples=1)["measures"].items()}
    scores = torch.tensor(p)
    assert math.isclose(found["roc_auc"], classification.binary_auroc(scores, good), abs_tol=1e-6)
    assert math.isclose(found["average_precision"], classification.binary_average_precision(scores, good), abs_tol=1e-6)
    assert math.isclose(found["mcc"], classification.binary_matthews_corrcoef(scores, good), abs_tol=1e-6)


def test_ece_has_bins_of_equal_mass():
    """150 distinct scores: fifteen bins of ten."""
    rng = np.random.default_rng(0)
    p, iou = np.sort(rng.random(150)), rng.random(150)
    good = iou >= 0.7
    wanted = sum(abs(good[k : k + 10].sum() - p[k : k + 10].sum()) for k in range(0, 150, 10)) / 150
    order = rng.permutation(150)
    said = [Judgement("yes", p_yes=p[i]) for i in order]
    assert math.isclose(report_card(said, iou[order], resamples=1)["measures"]["ece"]["value"], wanted)


@pytest.mark.parametrize("ties", [False, True])
def test_weights_are_repeated_rows(ties: bool):
    """A bootstrap sample by weights equals the measures of the rows written out as often as they were drawn."""
    said, ious, _, _ = made_up(3, 80, ties)
    answers = gather_answers(said, ious, 0.6)
    weights = image_weights(answers.image, 25, np.random.default_rng(0))
    by_weight = {**verdict_measures(weights, answers), **score_measures(weights, answers)}
    for r, row in enumerate(weights.astype(int)):
        copy = answers.take(np.repeat(np.arange(len(answers)), row))
        once = np.ones((1, len(copy)))
        for name, value in {**verdict_measures(once, copy), **score_measures(once, copy)}.items():
            assert math.isclose(by_weight[name][r], value[0], abs_tol=1e-9), name


def test_images_are_drawn_not_rows():
    """Ten copies of each row change no interval; ten times the images narrow it."""
    said, ious, _, _ = made_up(7, 100)
    once = report_card(said, ious)["measures"]["roc_auc"]
    copies = report_card(said * 10, np.tile(ious, 10))["measures"]["roc_auc"]
    apart = report_card(said * 10, np.tile(ious, 10), images=range(1000))["measures"]["roc_auc"]
    assert once == pytest.approx(copies)
    assert 2.5 < (once["high"] - once["low"]) / (apart["high"] - apart["low"]) < 4  # the root of ten


def test_card_is_pure_by_seed_and_plain():
    said, ious, _, _ = made_up(1, 60)
    by = {"round": [i % 3 for i in range(60)], "class": [("cat", "dog") if i % 2 else ("dog",) for i in range(60)]}
    card = report_card(said, ious, by=by, resamples=50)
    assert to_json(card) == to_json(report_card(said, ious, by=by, resamples=50))
    assert to_json(card) != to_json(report_card(said, ious, by=by, resamples=50, seed=1))
    known = ~np.isnan(ious)
    assert card["by"]["class"]["dog"]["n"] == known.sum() and card["by"]["class"]["cat"]["n"] == known[1::2].sum()
    assert sum(part["n"] for part in card["by"]["round"].values()) == card["n"] == known.sum()
    alone = report_card(said[1::3], ious[1::3], resamples=1)["measures"]["roc_auc"]["value"]
    assert math.isclose(card["by"]["round"]["1"]["measures"]["roc_auc"]["value"], alone)
    assert list(card_table(card, "round").index) == ["0", "1", "2"]
    assert set(card_table(card).index) == {*VERDICT_MEASURES, *SCORE_MEASURES}


def test_undefined_measures_are_none():
    empty = report_card([], [])
    assert empty["n"] == 0 and all(row["value"] is None for row in empty["measures"].values())
    silent = report_card([Judgement("abstain", p_yes=0.9)] * 3, [0.9, 0.1, float("nan")])
    assert silent["n"] == 2 and silent["scored"] == 0 and silent["measures"]["coverage"]["value"] == 0
    assert silent["measures"]["roc_auc"]["value"] is None and silent["measures"]["brier"]["value"] is None
    hard = report_card(["yes", "no"], [0.9, 0.1], resamples=10)  # verdicts without scores
    assert hard["measures"]["kappa"]["value"] == 1 and hard["measures"]["roc_auc"]["value"] is None
    assert interval_text(hard["measures"]["roc_auc"]) == "-"


def test_what_never_occurred_is_not_certain():
    """20 good masks accepted: precision 1, and the exact interval instead of (1, 1)."""
    found = report_card([Judgement("yes", p_yes=0.9, id=f"im{i % 20}") for i in range(60)], [0.9] * 60)["measures"]
    assert found["precision"]["value"] == found["precision"]["high"] == 1
    assert math.isclose(found["precision"]["low"], 0.025 ** (1 / 20)) and found["specificity"]["value"] is None
    assert set(RATES) < set(found)
    perfect = report_card([Judgement("yes", p_yes=0.9), Judgement("no", p_yes=0.1)] * 10, [0.9, 0.1] * 10)["measures"]
    assert perfect["roc_auc"] == {"value": 1.0, "low": None, "high": None}


def test_risk_coverage():
    coverage, risk = risk_coverage([0.2, 0.9, 0.9, float("nan")], [False, True, False, True])
    assert coverage.tolist() == [0.5, 0.75] and risk.tolist() == [0.5, 2 / 3]
    assert risk_coverage([], [])[0].size == 0
    with pytest.raises(DataError, match="pair up"):
        risk_coverage([0.5], [])


def test_groups_of_a_mask():
    voc = LabelSpace.voc()
    truth = np.zeros((10, 10), np.uint8)
    truth[:1, :3], truth[5] = 8, 255
    mask = truth.copy()
    mask[:1, :3] = 12
    assert mask_groups(mask, truth, voc) == {"class": ("cat", "dog"), "size": "small", "error": "swapped"}
    assert mask_groups(np.zeros_like(truth), truth, voc)["error"] == "missing"
    assert mask_groups(truth, np.full_like(truth, 255), voc)["class"] == ()  # nothing is known


# ---- judges beside each other ----


def pair_of_judges(seed: int, n: int, skill: float) -> tuple[list[Judgement], list[Judgement], np.ndarray]:
    """Two judges that see the same hard images; the first has `skill` more."""
    rng = np.random.default_rng(seed)
    good = rng.random(n) < 0.6
    hard = rng.normal(size=n)
    out = []
    for gain in (1.0 + skill, 1.0):
        latent = gain * good + hard + 0.5 * rng.normal(size=n)
        out.append([Judgement("yes", p_yes=1 / (1 + math.exp(-z)), id=f"im{i}") for i, z in enumerate(latent)])
    return out[0], out[1], np.where(good, 0.9, 0.1)


def test_paired_difference_is_narrower_and_signed():
    better, worse, ious = pair_of_judges(0, 400, 0.8)
    gap = paired_difference(better, worse, ious)
    assert gap["low"] > 0 and gap["n"] == 400
    back = paired_difference(worse, better, ious)
    assert math.isclose(back["value"], -gap["value"]) and back["high"] < 0
    a, b = (report_card(judge, ious)["measures"]["roc_auc"] for judge in (better, worse))
    assert math.isclose(gap["value"], a["value"] - b["value"])
    apart = math.hypot(a["high"] - a["low"], b["high"] - b["low"])  # if each had images of its own
    assert gap["high"] - gap["low"] < 0.85 * apart


def test_paired_difference_uses_what_both_answered():
    one, two, ious = pair_of_judges(1, 50, 0.5)
    one[:10] = [Judgement("abstain", id=j.id) for j in one[:10]]
    two[5:20] = [Judgement("abstain", id=j.id) for j in two[5:20]]
    assert paired_difference(one, two, ious)["n"] == 30
    assert paired_difference(one, two, ious, "balanced_accuracy")["n"] == 30
    assert paired_difference(one[:5], two[:5], ious[:5])["value"] is None
    with pytest.raises(ConfigError, match="roc_auc"):
        paired_difference(one, two, ious, "auc")


@pytest.mark.slow
def test_paired_difference_covers_the_truth():
    """At least 95 % - 3 sigma of 300 intervals hold the true difference of AUCs."""
    z = math.sqrt(2 * (1 + 0.25))
    true = stats.norm.cdf(1.5 / z) - stats.norm.cdf(1 / z)
    hits = 0
    for seed in range(300):
        one, two, ious = pair_of_judges(seed, 200, 0.5)
        gap = paired_difference(one, two, ious, resamples=500)
        hits += gap["low"] <= true <= gap["high"]
    assert hits >= 300 * 0.95 - 3 * math.sqrt(300 * 0.95 * 0.05), hits


def test_ranking_says_who_deserves_trust():
    better, worse, ious = pair_of_judges(2, 400, 1.0)
    nods = [Judgement("yes", p_yes=1.0, id=j.id) for j in better]
    judges: dict[str, Any] = {"always_yes": nods, "confidence (margin)": worse, "vlm": better}
    ranking = rank_judges(judges, ious)
    assert list(ranking.table.index) == ["vlm", "confidence (margin)", "always_yes"]
    assert ranking.best_free == "confidence (margin)" and ranking.trusted == ("vlm",)
    assert ranking.sentence.startswith("Deserves trust: vlm is better than confidence (margin)")
    assert math.isnan(float(ranking.table.loc["confidence (margin)"]["difference"]))
    other = rank_judges({**judges, "confidence (margin)": better, "vlm": worse}, ious)
    assert other.trusted == () and other.sentence.startswith("No judge deserves more trust than what is free")
    assert rank_judges({"always_yes": nods}, ious).sentence.startswith("Only free judges")
    mute = rank_judges({"vlm": [Judgement("abstain", id=j.id) for j in better], "always_yes": nods}, ious)
    assert mute.trusted == () and "cannot be compared" in mute.sentence
    alone = rank_judges({"vlm": better}, ious)
    assert alone.best_free is None and alone.trusted == ("vlm",) and "a coin" in alone.sentence


@pytest.mark.slow
def test_a_judge_that_knows_nothing_is_seldom_trusted():
    """Twenty judges of noise, 40 samples: the level is split, so hardly one is called better."""
    trusted = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        ious = rng.random(120)
        said = {f"noise {k}": [Judgement("yes", p_yes=float(p)) for p in rng.random(120)] for k in range(5)}
        said["always_yes"] = [Judgement("yes", p_yes=1.0)] * 120
        trusted += bool(rank_judges(said, ious, resamples=400).trusted)
    assert trusted <= 40 * 0.05 + 3 * math.sqrt(40 * 0.05 * 0.95)


@pytest.mark.parametrize("images", [1, 2, 5])
def test_few_images_are_no_proof_however_many_their_masks(images: int):
    """The bootstrap draws images: of one, every sample is the same, and what is the same looks certain."""
    rng = np.random.default_rng(images)
    ious = rng.random(40 * images)
    places = np.repeat(np.arange(images), 40).tolist()
    sees = [Judgement("yes" if iou > 0.7 else "no", p_yes=float(iou)) for iou in ious]
    nods = [Judgement("yes", p_yes=1.0)] * len(ious)
    ranking = rank_judges({"vlm": sees, "always_yes": nods}, ious, images=places, resamples=100)
    assert ranking.trusted == () and f"masks of {images} images or groups" in ranking.sentence
    card = report_card([replace(j, p_yes=0.5 + 0.1 * (j.p_yes > 0.6)) for j in sees], ious, images=places)["measures"]
    assert card["roc_auc"]["low"] is None and card["base_rate"]["low"] is None
    assert card["specificity"]["low"] == pytest.approx(0.025 ** (1 / images))  # an exact interval needs no resampling
    many = rank_judges({"vlm": sees, "always_yes": nods}, ious, resamples=100)
    assert many.trusted == ("vlm",)  # were each mask of an image of its own


def test_report_card_bad_input():
    for call in (
        lambda: report_card(["yes"], []),
        lambda: report_card(["yes"], [0.5], images=[]),
        lambda: report_card(["yes"], [0.5], by={"class": ["cat", "dog"]}),
    ):
        with pytest.raises(DataError):
            call()
    for options in ({"resamples": 0}, {"level": 1}, {"tau": 2}):
        with pytest.raises(ConfigError):
            report_card(["yes"], [0.5], **options)
    with pytest.raises(ConfigError, match="Did you mean 'class'"):
        card_table(report_card(["yes"], [0.5], by={"class": ["cat"]}), by="clas")


# ---- figures: the lines that are drawn ----


def lines_of(figure: Any) -> dict[str, np.ndarray]:
    """Label -> points (N, 2)."""
    return {line.get_label().split(":")[0]: line.get_xydata() for line in figure.axes[0].get_lines()}


def test_roc_is_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    said, ious, p, iou = made_up(4, ties=True)
    drawn = lines_of(plot_roc({"vlm": said, "mute": ["yes"] * len(said)}, ious.tolist(), tau=0.6))
    false, true, _ = metrics.roc_curve(iou >= 0.6, p, drop_intermediate=False)
    assert np.allclose(drawn["vlm"], np.stack([false, true], axis=1)) and "mute" not in drawn


def test_risk_curve_ends_at_the_share_of_bad_masks():
    said, ious, p, iou = made_up(5)
    drawn = lines_of(plot_risk_coverage({"vlm": said}, ious.tolist(), alpha=None))["vlm"]
    known = (~np.isnan(ious)).sum()
    assert np.allclose(drawn[-1], [len(p) / known, (iou < 0.7).mean()])


def test_acceptance_counts_by_iou():
    ious = [0.1, 0.2, 0.65, 0.75, 0.75, 1.0, float("nan")]
    verdicts = ["yes", "no", "abstain", "yes", "no", "yes", "yes"]
    (figure,) = [plot_acceptance({"vlm": [Judgement(v) for v in verdicts]}, ious)]  # type: ignore[arg-type]
    points = figure.axes[0].containers[0].lines[0].get_xydata()
    assert points.tolist() == [[0, 0.5], [4, 0.5], [6, 1.0]]  # the bin of .65 holds only an abstention
    assert figure.axes[0].get_xticklabels()[0].get_text() == "0 to 0.3\n2"


def test_break_even_lines_are_the_formula():
    said = [Judgement(v) for v in ["yes"] * 3 + ["no"] * 2 + ["yes"]]
    card = report_card(said, [0.9, 0.9, 0.1, 0.1, 0.9, 0.8], resamples=1)
    drawn = lines_of(plot_break_even({"vlm": card}, c_mask=100.0))["vlm"]
    rates = (card["measures"][m]["value"] for m in ("base_rate", "sensitivity", "specificity"))
    assert np.allclose(drawn[:, 1], break_even(*rates, c_mask=100.0, psi=drawn[:, 0])["saved_s"])
    with pytest.raises(DataError, match="nothing to draw"):
        plot_break_even({"vlm": report_card(["yes"], [0.9], resamples=1)})


def test_worst_mistakes_come_first():
    said = [Judgement("yes", p_yes=p) for p in (0.9, 0.6, 0.9, 0.8)] + [
        Judgement("no", p_yes=0.1),
        Judgement("abstain"),
    ]
    assert worst_mistakes(said, [0.1, 0.1, 0.6, 0.9, 0.95, 0.9]) == [0, 4, 1, 2]
    assert worst_mistakes(said, [float("nan")] * 6) == [] and len(worst_mistakes(said, [0.1] * 6, count=1)) == 1


def test_reliability_leaves_hard_judges_out():
    said, ious, p, iou = made_up(6, 200)
    figure = plot_reliability({"vlm": said, "hard": ["yes"] * 200}, ious.tolist(), bins=5)  # type: ignore[dict-item]
    (container,) = figure.axes[0].containers
    points = container.lines[0].get_xydata()
    order = np.argsort(p, kind="stable")
    wanted = [[p[rows].mean(), (iou[rows] >= 0.7).mean()] for rows in np.array_split(order, 5)]
    assert np.allclose(points, wanted)


def test_bars_count_images_not_their_masks():
    """Twenty masks of each of five images say little more than five masks: the bars of ten images' worth of both."""
    rng = np.random.default_rng(3)
    p, ious = rng.random(100), rng.random(100)
    said = [Judgement("yes", p_yes=float(value), id=f"image {row % 5}") for row, value in enumerate(p)]
    for figure in (plot_reliability({"vlm": said}, ious, bins=2), plot_acceptance({"vlm": said}, ious, edges=(0, 1))):
        (container,) = figure.axes[0].containers
        share, bar = container.lines[0].get_xydata()[0, 1], container.lines[2][0].get_segments()[0][:, 1]
        assert bar == pytest.approx(exact_interval(5 * share, 5))


def test_no_empty_panels():
    hard, ious = [Judgement("yes"), Judgement("no")], [0.9, 0.1]
    for draw in (plot_roc, plot_risk_coverage, plot_reliability):
        with pytest.raises(DataError, match="nothing to draw"):
            draw({"hard": hard}, ious)


def test_a_rival_may_choose_its_threshold():
    """A free confidence whose numbers all lie above .5 is not a judge that says yes to everything."""
    free = [Judgement("yes", p_yes=p) for p in (0.9, 0.6, 0.8, 0.7)] + [Judgement("abstain"), Judgement("no")]
    matched = match_acceptance(free, 2)
    assert [j.verdict for j in matched] == ["yes", "no", "yes", "no", "abstain", "no"]
    assert [j.p_yes for j in matched] == [j.p_yes for j in free]
    assert [j.verdict for j in match_acceptance(free, 9)][:4] == ["yes"] * 4
    with pytest.raises(ConfigError, match="count"):
        match_acceptance(free, -1)


# ---- what a judge adds ----


def added_by_hand(p_yes: np.ndarray, yes: np.ndarray, good: np.ndarray, agreement: np.ndarray) -> dict[str, float]:
    """All pairs of a good and a bad mask in one fifth of the agreement, one by one."""
    edges = sorted({float(np.quantile(agreement, q)) for q in (0.2, 0.4, 0.6, 0.8)})
    stratum = [sum(a >= edge for edge in edges) for a in agreement]
    ordered = pairs = lot = 0.0
    for i, j in itertools.product(np.flatnonzero(good), np.flatnonzero(~good)):
        if stratum[i] == stratum[j] and not np.isnan(p_yes[[i, j]]).any():
            pairs += 1
            ordered += 1.0 if p_yes[i] > p_yes[j] else 0.5 if p_yes[i] == p_yes[j] else 0.0
    for i in np.flatnonzero(yes):
        lot += np.mean([good[j] for j in range(len(good)) if stratum[j] == stratum[i]])
    return {"partial_auc": ordered / pairs, "precision": good[yes].mean(), "by_lot": lot / yes.sum()}


@pytest.mark.parametrize("seed", range(6))
def test_added_value_equals_counting_all_pairs(seed: int):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(60, 160))
    ious, agreement = rng.random(n), np.round(rng.random(n), int(rng.integers(1, 4)))  # with ties
    p = np.round(rng.random(n), 1)
    p[rng.random(n) < 0.1 * (seed % 2)] = np.nan  # answers without a score
    said = [Judgement("yes" if np.nan_to_num(x) >= 0.5 else "no", p_yes=None if np.isnan(x) else float(x)) for x in p]
    added = report_card(said, ious, agreement=agreement, resamples=20)["added"]
    wanted = added_by_hand(p, np.nan_to_num(p) >= 0.5, ious >= 0.7, agreement)
    for name, value in wanted.items():
        assert math.isclose(added[name]["value"], value, abs_tol=1e-12), name
    assert math.isclose(added["gain"]["value"], wanted["precision"] - wanted["by_lot"], abs_tol=1e-12)
    assert sum(part["n"] for part in added["strata"]) == n


def two_judges(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray, dict[str, list[Judgement]]]:
    """A model that agrees with good masks, a judge that sees for itself, and one that repeats the model."""
    quality = rng.normal(size=n)
    model, judge = (quality + rng.normal(size=n) for _ in range(2))
    said = {"sees": judge, "parrot": model + 1e-3 * rng.normal(size=n)}
    scored = {
        name: [
            Judgement("yes" if x > 0 else "no", p_yes=float(1 / (1 + np.exp(-x))), id=f"im{i}")
            for i, x in enumerate(xs)
        ]
        for name, xs in said.items()
    }
    return (quality > 0).astype(float), model, scored


def test_a_parrot_adds_nothing_though_its_auc_is_as_high():
    ious, model, said = two_judges(np.random.default_rng(0), 1500)
    added = {
        name: report_card(answers, ious, agreement=model, resamples=200)["added"] for name, answers in said.items()
    }
    assert all(0.8 < a["roc_auc"]["value"] < 0.88 for a in added.values())
    assert added["sees"]["partial_auc"]["low"] > 0.65 and added["parrot"]["partial_auc"]["value"] < 0.62
    assert added["sees"]["gain"]["value"] > 3 * added["parrot"]["gain"]["value"]
    assert "it adds to what the model knows" in added["sees"]["sentence"]


def test_the_interval_of_what_a_judge_adds_covers_and_is_drawn_by_image():
    """40 pools of 150 masks: about 95 % of the intervals hold the value of a large pool."""
    ious, model, said = two_judges(np.random.default_rng(1), 20_000)
    true = report_card(said["sees"], ious, agreement=model, resamples=1)["added"]["partial_auc"]["value"]
    hits = 0
    for seed in range(40):
        ious, model, said = two_judges(np.random.default_rng(100 + seed), 150)
        found = report_card(said["sees"], ious, agreement=model, resamples=100)["added"]["partial_auc"]
        hits += found["low"] <= true <= found["high"]
    assert hits >= 34
    twice = [answer for answer in said["sees"] for _ in range(2)]  # each mask told twice: no more is known
    again = report_card(twice, np.repeat(ious, 2), agreement=np.repeat(model, 2), resamples=100)["added"]["partial_auc"]
    assert math.isclose(again["high"] - again["low"], found["high"] - found["low"], rel_tol=0.15)


def test_what_cannot_be_said_of_what_a_judge_adds():
    silent = report_card(["yes", "no", "abstain"], [0.9, 0.1, 0.9], agreement=[0.1, 0.2, 0.3], resamples=10)["added"]
    assert silent["partial_auc"]["value"] is None and "cannot be said" in silent["sentence"]
    assert report_card([], [], agreement=[], resamples=5)["added"]["strata"] == []
    unknown = report_card(["yes"] * 4, [0.9, 0.1, 0.9, 0.2], agreement=[math.nan] * 4, resamples=5)["added"]
    assert unknown["strata"] == [] and unknown["precision"]["value"] is None
    with pytest.raises(DataError, match="agreement has 1 values for 2"):
        report_card(["yes", "no"], [0.9, 0.1], agreement=[0.5])
    to_json(silent)
