"""Simulated judges: rates, AUC, curve and shared difficulty as set; pure by seed; the break-even formula reproduced."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from scipy.special import ndtr
from sklearn.metrics import roc_auc_score

from vlm_itl.core.checks import ConfigError, JudgeError
from vlm_itl.data.labels import VOID, LabelSpace
from vlm_itl.data.masks import MaskStore, truth_reader
from vlm_itl.data.sources import load_data
from vlm_itl.judging.measures import break_even
from vlm_itl.model.metrics import image_iou
from vlm_itl.model.predict import Inference
from vlm_itl.model.scoring import look_on_grid
from vlm_itl.model.segmenter import load_model
from vlm_itl.vlm.cache import CachedHandler, handler_identity
from vlm_itl.vlm.handler import Judgement, JudgeQuery, Shown, VLMHandler, handler_options, make_handler
from vlm_itl.vlm.simulated import APPROVAL_CURVES, MOCK_KINDS, approval, check_curve, separation

VOC = LabelSpace.voc()
TRUTH = np.zeros((6, 6), np.uint8)
TRUTH[:3] = 8
BAD = TRUTH.copy()
BAD[:3, 3:] = 12
N = 4000


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def quick_iou(monkeypatch: pytest.MonkeyPatch):
    """Thousands of queries about a handful of masks: count each mask once."""
    known: dict[bytes, float] = {}

    def iou(prediction: np.ndarray, truth: np.ndarray, number: int, classes: Any = None) -> float:
        key = (
            prediction.tobytes()
            + truth.tobytes()
            + bytes(prediction.shape)
            + bytes(truth.shape)
            + repr(classes).encode()
        )
        if key not in known:
            known[key] = image_iou(prediction, truth, number, classes=classes)
        return known[key]

    monkeypatch.setattr("vlm_itl.vlm.simulated.image_iou", iou)


def ask(i: int = 0, mask: Any = TRUTH, **fields: Any) -> JudgeQuery:
    return JudgeQuery(f"im{i}", fields.pop("image", None), mask, labels=fields.pop("labels", VOC), **fields)


def mock(**options: Any) -> VLMHandler:
    handler = make_handler("mock", **options)
    handler.bind_truth(lambda image_id: TRUTH)
    return handler


@pytest.fixture(scope="module")
def many() -> list[JudgeQuery]:
    """Good and bad in turn."""
    return [ask(i, BAD if i % 2 else TRUTH) for i in range(N)]


GOOD = np.arange(N) % 2 == 0
KINDS: list[dict[str, Any]] = [
    {"accuracy": 0.5},
    {"kind": "binormal", "auc": 0.8},
    {"kind": "curve", "curve": [[0, 0.5]]},
    {"kind": "difficulty", "auc": 0.8, "rho": 0.4},
]


def within(count: float, n: int, p: float) -> bool:
    """Three standard deviations; exact where p is 0 or 1."""
    return abs(count - n * p) <= 3 * np.sqrt(n * p * (1 - p)) + 1e-9


# ---- options ----


def test_options_and_kinds():
    assert handler_options("mock")["abstain_rate"] == 0.0
    assert {name for names in MOCK_KINDS.values() for name in names} <= set(handler_options("mock"))
    with pytest.raises(ConfigError, match="judge='mok'.*Did you mean 'mock'"):
        make_handler("mok")
    with pytest.raises(ConfigError, match="'acuracy'.*Did you mean 'accuracy'"):
        make_handler("mock", acuracy=0.9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accuracy": 1.1}, "accuracy"),
        ({"accuracy": -0.1}, "accuracy"),
        ({"accuracy": "high"}, "accuracy"),
        ({"accuracy": float("nan")}, "accuracy"),
        ({"sensitivity": 0.9}, "go together"),
        ({"specificity": 0.9}, "go together"),
        ({"accuracy": 0.9, "sensitivity": 0.9, "specificity": 0.9}, "either"),
        ({"sensitivity": 0.9, "specificity": 2}, "specificity"),
        ({"abstain_rate": 1.5}, "abstain_rate"),
        ({"tau": 2}, "tau"),
        ({"seed": 1.5}, "seed"),
        ({"kind": "binomial"}, "Did you mean 'binormal'"),
        ({"auc": 0.9}, "auc is an option of kind 'binormal' or 'difficulty' or 'echo', not of 'confusion'"),
        ({"kind": "binormal", "rho": 0.3}, "rho is an option of kind 'difficulty'"),
        ({"kind": "echo", "accuracy": 0.9, "auc": 0.8}, "accuracy and auc: give either"),
        ({"kind": "echo", "sensitivity": 0.9}, "go together"),
        ({"kind": "echo", "rho": -0.1}, "rho"),
        ({"kind": "echo", "curve": "ovis2"}, "curve is an option of kind 'curve'"),
        ({"kind": "binormal", "accuracy": 0.9}, "accuracy is an option of kind 'confusion'"),
        ({"kind": "difficulty", "curve": "ovis2"}, "curve is an option of kind 'curve'"),
        ({"kind": "curve", "temperature": 2.0}, "temperature"),
        ({"kind": "binormal", "auc": 0.4}, "auc"),
        ({"kind": "binormal", "auc": 1.0}, "auc"),
        ({"kind": "binormal", "temperature": 0}, "temperature"),
        ({"kind": "binormal", "base_rate": 1}, "base_rate"),
        ({"kind": "difficulty", "rho": 1.5}, "rho"),
        ({"kind": "curve", "curve": "ovis"}, "Did you mean 'ovis2'"),
        ({"kind": "curve", "curve": []}, "pairs"),
        ({"kind": "curve", "curve": 3}, "pairs"),
        ({"kind": "curve", "curve": [0, 1]}, "pairs"),
        ({"kind": "curve", "curve": [[0.1, 1]]}, "begin at IoU 0"),
        ({"kind": "curve", "curve": [[0, 0.2], [0.5, 0.3], [0.4, 1]]}, "ascend"),
        ({"kind": "curve", "curve": [[0, 1.2]]}, "number"),
        ({"kind": "curve", "curve": [[0, "a"]]}, "number"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        make_handler("mock", **options)


# ---- confusion ----


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "ynynynynynyyynnyynynynynyyynynynynynynynnnynynyn"),
        ({"accuracy": 0.6, "seed": 1}, "ynnyynyynnnnnyynnnnyynyyynynnnnyynnyyyynnnynnnny"),
        (
            {"sensitivity": 0.91, "specificity": 0.23, "abstain_rate": 0.1, "seed": 7},
            "yyyyyyyynyynyyyayyyynyynyyynyyynyyyyyyyyyaynyyyy",
        ),
    ],
)
def test_the_verdicts_of_earlier_versions_are_kept(many: list[JudgeQuery], options: dict[str, Any], said: str):
    assert "".join(j.verdict[0] for j in mock(**options).judge(many[:48])) == said


@pytest.mark.parametrize("accuracy", [0.0, 0.6, 0.9, 1.0])
def test_it_agrees_with_reality_as_often_as_it_is_told(many: list[JudgeQuery], accuracy: float):
    said = [j.verdict for j in mock(accuracy=accuracy, seed=5).judge(many)]
    agree = sum((v == "yes") == good for v, good in zip(said, GOOD, strict=True))
    assert set(said) <= {"yes", "no"} and within(agree, N, accuracy)


def test_sensitivity_specificity_and_abstentions(many: list[JudgeQuery]):
    said = np.array([j.verdict for j in mock(sensitivity=0.91, specificity=0.23, abstain_rate=0.1).judge(many)])
    assert within((said == "abstain").sum(), N, 0.1)
    good, bad = said[GOOD], said[~GOOD]
    good, bad = good[good != "abstain"], bad[bad != "abstain"]
    assert within((good == "yes").sum(), len(good), 0.91) and within((bad == "no").sum(), len(bad), 0.23)


POINTS = [
    (0.9, 0.9),
    (0.91, 0.23),
    *(pytest.param(*p, marks=pytest.mark.slow) for p in ((0.95, 0.6), (0.8, 0.5), (0.85, 0.95))),
]


@pytest.mark.parametrize(("sensitivity", "specificity"), POINTS)
def test_the_break_even_formula_is_reproduced_within_one_percent(sensitivity: float, specificity: float):
    """40,000 masks of which exactly 60 % are good; seconds saved per image, share accepted, bad among them."""
    size, pi, c_mask, psi = 40_000, 0.6, 239.7, 120.0
    good = np.arange(size) % 5 < 3
    queries = [ask(i, TRUTH if g else BAD) for i, g in enumerate(good)]
    said = mock(sensitivity=sensitivity, specificity=specificity, seed=11).judge(queries)
    yes = np.array([j.verdict == "yes" for j in said])
    formula = break_even(pi, sensitivity, specificity, c_mask=c_mask, psi=psi)
    saved = (yes.sum() * c_mask - (yes & ~good).sum() * psi) / size
    assert saved == pytest.approx(formula["saved_s"], rel=0.01)
    assert yes.mean() == pytest.approx(formula["accepted"], rel=0.01)
    assert (yes & ~good).sum() / yes.sum() == pytest.approx(formula["bad_among_accepted"], abs=0.01)


# ---- binormal ----


@pytest.mark.parametrize("auc", [0.5, 0.7, 0.92])
def test_the_achieved_auc_is_the_one_asked_for(many: list[JudgeQuery], auc: float):
    answers = mock(kind="binormal", auc=auc, seed=2).judge(many)
    p = np.array([j.p_yes for j in answers])
    half = N // 2  # standard error by Hanley & McNeil 1982
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    error = np.sqrt((auc * (1 - auc) + (half - 1) * (q1 + q2 - 2 * auc**2)) / half**2)
    assert abs(roc_auc_score(GOOD, p) - auc) <= 3 * error + 1e-12
    assert all((j.verdict == "yes") == (j.p_yes >= 0.5) and j.score_kind == "score" for j in answers)
    assert auc == 0.5 or len(set(p.tolist())) == N


def calibration_gap(p: np.ndarray) -> float:
    """Mean over ten bins of equal size of |share of good - mean p|."""
    bins = np.array_split(np.argsort(p), 10)
    return float(np.mean([abs(GOOD[b].mean() - p[b].mean()) for b in bins]))


def test_temperature_spoils_calibration_and_nothing_else(many: list[JudgeQuery]):
    p = {t: np.array([j.p_yes for j in mock(kind="binormal", temperature=t).judge(many)]) for t in (0.25, 1.0, 4.0)}
    orders = [np.argsort(values) for values in p.values()]
    assert all((order == orders[0]).all() for order in orders)
    verdicts = [values >= 0.5 for values in p.values()]
    assert all((verdict == verdicts[0]).all() for verdict in verdicts)
    assert calibration_gap(p[1.0]) < 0.04 < 0.1 < min(calibration_gap(p[0.25]), calibration_gap(p[4.0]))


def test_it_is_calibrated_for_the_base_rate_it_reckons_with():
    size = N // 2
    good = np.arange(size) % 5 == 0
    queries = [ask(i, TRUTH if g else BAD) for i, g in enumerate(good)]
    p = np.array([j.p_yes for j in mock(kind="binormal", base_rate=0.2).judge(queries)])
    assert abs(p.mean() - 0.2) < 0.02
    assert abs(np.array([j.p_yes for j in mock(kind="binormal").judge(queries)]).mean() - 0.2) > 0.08


def test_separation():
    assert separation(0.5) == 0 and separation(0.92) == pytest.approx(1.98709, abs=1e-4)
    assert mock(kind="binormal", auc=0.9999).judge([ask(0), ask(1, BAD)])[0].p_yes > 0.9


# ---- curve ----


def test_ovis2_is_replayed():
    truth = np.repeat([[0, 1]], 100, axis=1).astype(np.uint8)
    handler = make_handler("mock", kind="curve", seed=3)
    handler.bind_truth(lambda image_id: truth)
    curve = APPROVAL_CURVES["ovis2"]
    for forgotten in (2, 20, 30, 55, 90):
        mask = truth.copy()
        mask[:, 100 : 100 + forgotten] = 0
        iou = image_iou(mask, truth, 21)
        wanted = approval(iou, curve)
        said = [j.verdict for j in handler.judge([ask(i, mask) for i in range(1000)])]
        assert within(said.count("yes"), 1000, wanted), (iou, wanted)
    assert check_curve([[0, 1], [0.5, 0.25]]) == ((0.0, 1.0), (0.5, 0.25))
    assert [approval(iou, curve) for iou in (0, 0.2999, 0.3, 0.9, 1)] == [0.73, 0.73, 0.77, 0.95, 0.95]


# ---- difficulty ----


def wrong(judge: VLMHandler, queries: list[JudgeQuery], good: np.ndarray = GOOD) -> np.ndarray:
    return np.array([(j.verdict == "yes") != g for j, g in zip(judge.judge(queries), good, strict=True)])


@pytest.mark.parametrize("rho", [0.0, 0.6, 1.0])
def test_errors_come_back_on_the_same_image(many: list[JudgeQuery], rho: float):
    """Errors of two judges, and of two rounds, correlate; the AUC stays."""
    options = {"kind": "difficulty", "auc": 0.85, "rho": rho}
    first = wrong(mock(who="A", **options), many)
    other_judge = wrong(mock(who="B", **options), many)
    turned = [replace(q, mask=BAD if g else TRUTH) for q, g in zip(many, GOOD, strict=True)]  # good became bad
    other_round = wrong(mock(who="A", **options), turned, ~GOOD)
    # two normal margins of mean d / 2 and correlation rho: P(both below 0) from the bivariate normal
    rng = np.random.default_rng(0)
    z, e1, e2 = rng.normal(size=(3, 200_000))
    d = separation(0.85)
    both = (
        (d / 2 + rho**0.5 * z + (1 - rho) ** 0.5 * e1 < 0) & (d / 2 + rho**0.5 * z + (1 - rho) ** 0.5 * e2 < 0)
    ).mean()
    for second in (other_judge, other_round):
        assert within((first & second).sum(), N, both)
    p = [j.p_yes for j in mock(who="A", **options).judge(many)]
    assert abs(roc_auc_score(GOOD, p) - 0.85) < 0.025


# ---- echo ----


class Believer:
    """Stands for the pool of a round: the segmenter's belief in each mask is set by hand."""

    def __init__(self, beliefs: np.ndarray, masks: list[np.ndarray]):
        self.rows = datasets.Dataset.from_dict({"id": [f"im{i}" for i in range(len(masks))]})
        self.masks = Store({f"im{i}": mask for i, mask in enumerate(masks)})
        self.of = {f"im{i}": float(b) for i, b in enumerate(beliefs)}


class Store(dict):
    labels = VOC


@pytest.fixture
def believed(monkeypatch: pytest.MonkeyPatch, many: list[JudgeQuery]) -> Believer:
    """Right about four good masks of five, and about four bad ones of five."""
    rng = np.random.default_rng(0)
    side = np.where(GOOD, 1, -1) * np.where(rng.random(N) < 0.8, 1, -1)
    pool = Believer(ndtr(rng.normal(2.0 * side, 0.5)), [q.mask for q in many])
    monkeypatch.setattr("vlm_itl.vlm.simulated._beliefs", lambda shown, masks: {i: shown.of[i] for i in masks})
    return pool


def echo(pool: Believer, **options: Any) -> VLMHandler:
    handler = mock(kind="echo", **options)
    handler.bind_pool(pool)  # type: ignore[arg-type]
    return handler


RATES: list[dict[str, Any]] = [{"accuracy": 0.85}, {"sensitivity": 0.9, "specificity": 0.7}, {"auc": 0.9}]


@pytest.mark.parametrize("options", RATES, ids=str)
def test_the_quality_of_an_echo_does_not_depend_on_rho(
    many: list[JudgeQuery], believed: Believer, options: dict[str, Any]
):
    """Rates, AUC and calibration stay; errors move to where the segmenter errs."""
    right = stats.norm.cdf(separation(options["auc"]) / 2) if "auc" in options else 0.0
    sensitivity = options.get("sensitivity", options.get("accuracy", right))
    specificity = options.get("specificity", options.get("accuracy", right))
    astray = np.array([(believed.of[q.id] >= 0.5) != good for q, good in zip(many, GOOD, strict=True)])
    shared = []
    for rho in (0.0, 0.3, 0.7, 1.0):
        answers = echo(believed, rho=rho, **options).judge(many)
        yes = np.array([j.verdict == "yes" for j in answers])
        assert within(yes[GOOD].sum(), N // 2, sensitivity) and within((~yes[~GOOD]).sum(), N // 2, specificity)
        if "auc" in options:
            p = np.array([j.p_yes for j in answers])
            assert abs(roc_auc_score(GOOD, p) - 0.9) < 0.02 and calibration_gap(p) < 0.05
        shared.append(astray[yes != GOOD].mean())
    assert shared == sorted(shared) and abs(shared[0] - astray.mean()) < 0.05 and shared[-1] > 0.6


def test_an_echo_of_nothing_is_the_plain_judge_and_a_full_one_is_the_segmenter(
    many: list[JudgeQuery], believed: Believer
):
    for plain, same in (({"accuracy": 0.8}, {"accuracy": 0.8}), ({"kind": "binormal", "auc": 0.8}, {"auc": 0.8})):
        said = [j.p_yes for j in mock(**plain).judge(many[:500])]
        assert [j.p_yes for j in echo(believed, rho=0, **same).judge(many[:500])] == said
    yes = np.array([j.verdict == "yes" for j in echo(believed, rho=1, accuracy=0.9).judge(many)])
    belief = np.array([believed.of[q.id] for q in many])
    for good, wrongly in ((GOOD, ~yes), (~GOOD, yes)):  # by hand: the tenth believed least, or most
        order = np.argsort(belief if good is GOOD else -belief)
        expected = [i for i in order if good[i]][: N // 20]
        assert set(np.flatnonzero(good & wrongly)) == set(expected)


def test_an_echo_is_a_pure_function_of_question_and_segmenter(many: list[JudgeQuery], believed: Believer):
    said = [j.p_yes for j in echo(believed, auc=0.8).judge(many[:200])]
    assert [j.p_yes for j in echo(believed, auc=0.8).judge(many[:200][::-1])][::-1] == said
    assert handler_identity(echo(believed)) == handler_identity(echo(believed))
    before = handler_identity(echo(believed))
    believed.of["im3"] = 0.123
    assert handler_identity(echo(believed)) != before
    with pytest.raises(JudgeError, match="bind_pool"):
        mock(kind="echo").judge(many[:1])


def test_an_echo_looks_through_the_segmenters_eyes(tmp_path: Path):
    """With a real network: beliefs are those of the formula, and a mask that the round does not have is looked at."""
    data, view = load_data("toy"), Inference(image_size=64)
    model, store = load_model("segformer-nano", data.labels), MaskStore(tmp_path, data.labels)
    for row in data.train:
        store.write(row["id"], row["mask"])
    handler = make_handler("mock", kind="echo", rho=1, accuracy=0.75)
    handler.bind_truth(truth_reader(data.train))
    handler.bind_pool(Shown(data.train, store, segmenter=(model, view)))
    queries = [JudgeQuery(row["id"], row["image"], row["mask"], labels=data.labels) for row in data.train]
    said = {j.id: j.verdict for j in handler.judge(queries)}
    by_hand = {}
    for row, (image_id, p) in zip(data.train, look_on_grid(model, data.train, view), strict=True):
        by_hand[image_id] = np.mean([p[c][row["mask"] == c].mean() for c in np.unique(row["mask"])])
    assert [i for i, verdict in said.items() if verdict == "no"] == [min(by_hand, key=by_hand.__getitem__)]
    other = np.where(queries[2].mask == 1, 2, queries[2].mask).astype(np.uint8)  # not among the masks of the round
    assert handler.judge([replace(queries[2], mask=other)])[0].verdict in ("yes", "no")


# ---- all kinds ----


@pytest.mark.parametrize("options", KINDS, ids=lambda o: o.get("kind", "confusion"))
def test_a_pure_function(many: list[JudgeQuery], options: dict[str, Any]):
    queries = many[:300]
    state = np.random.get_state()[1].copy()  # type: ignore[index]
    said = [j.p_yes for j in mock(seed=1, **options).judge(queries)]
    for batch_size in (1, 7, 1000):
        handler = mock(seed=1, **options)
        handler.batch_size = batch_size
        assert [j.p_yes for j in handler.judge(queries[::-1])][::-1] == said
        assert handler.judge(queries[17:18])[0].p_yes == said[17]

    def differ(other: list[JudgeQuery], **more: Any) -> float:
        answers = mock(**{"seed": 1, **options, **more}).judge(other)
        return float(np.mean([a != j.p_yes for a, j in zip(said, answers, strict=True)]))

    pixel = [replace(q, mask=np.where(np.arange(36).reshape(6, 6) == 35, 8, q.mask).astype(np.uint8)) for q in queries]
    for changed in (
        differ(queries, seed=2),
        differ(queries, who="B"),
        differ([replace(q, question="exhaustive") for q in queries]),
        differ([replace(q, id="x" + q.id) for q in queries]),
        differ(pixel),
    ):
        assert changed > 0.35  # another throw of a fair coin, or another score
    # what is no part of the question changes nothing
    assert differ([replace(q, extra={"round": 3}, image=Image.new("RGB", (6, 6))) for q in queries]) == 0
    assert (np.random.get_state()[1] == state).all()  # type: ignore[index]


def test_it_follows_tau():
    # background 18 of 18, cat 9 of 18, dog 0 of 9: mean IoU 0.5
    assert mock(accuracy=1.0, tau=0.5).judge([ask(mask=BAD)])[0].verdict == "yes"
    assert mock(accuracy=1.0, tau=0.51).judge([ask(mask=BAD)])[0].verdict == "no"
    empty = ask(mask=np.zeros((6, 6), np.uint8))  # all background is a mask, and a bad one here
    assert mock(accuracy=1.0).judge([empty])[0].verdict == "no"


@pytest.mark.parametrize("options", KINDS, ids=lambda o: o.get("kind", "confusion"))
def test_what_cannot_be_judged_abstains_and_costs_only_itself(options: dict[str, Any]):
    handler = make_handler("mock", **options)
    truths = {"im0": np.full((6, 6), VOID, np.uint8), "im1": TRUTH[:4], "im3": TRUTH}
    handler.bind_truth(truths.__getitem__)
    queries = [ask(0), ask(1), ask(2), ask(3), ask(3, mask=TRUTH / 2), ask(3, mask=np.full((6, 6), 21, np.uint8))]
    found = handler.judge(queries)
    reasons = ["void everywhere", "shape", "KeyError", None, "uint8", "class 21 is outside"]
    for answer, reason in zip(found, reasons, strict=True):
        assert (answer.error is None) == (reason is None)
        assert reason is None or (answer.verdict == "abstain" and reason in str(answer.error))
    assert found[3].verdict in ("yes", "no") and [f.id for f in found] == [q.id for q in queries]


@pytest.mark.parametrize("options", KINDS, ids=lambda o: o.get("kind", "confusion"))
def test_free_and_cacheable(options: dict[str, Any], tmp_path: Path):
    handler = mock(**options)
    (found,) = handler.judge([ask()])
    assert found.usd == 0.0 and found.latency_s == 0.0 and found.p_mass == 1.0 and found.id == "im0"
    assert handler_identity(handler) == handler_identity(mock(**options))
    others = [{"seed": 1}, {"tau": 0.5}, {"who": "B"}, {"abstain_rate": 0.1}]
    assert len({str(handler_identity(mock(**{**options, **other}))) for other in [{}, *others]}) == 5
    cached = CachedHandler(judge="mock", options=options, path=tmp_path / "c.sqlite")
    cached.bind_truth(lambda image_id: TRUTH)
    assert replace(cached.judge([ask()])[0], cached=False) == found and cached.judge([ask()])[0].cached


def test_it_needs_the_truth():
    with pytest.raises(JudgeError, match="bind_truth"):
        make_handler("mock").judge([ask()])
    closed = mock()
    closed.close()
    with pytest.raises(JudgeError, match="bind_truth"):
        closed.judge([ask()])


def test_names_tell_the_kinds_apart():
    assert mock().model == "mock(accuracy=0.9)"
    assert mock(kind="curve").model == "mock(curve)" and mock(kind="curve", curve="ovis2").model == "mock(curve, ovis2)"
    assert (
        mock(kind="difficulty", who="B").model == "mock B(difficulty, auc=0.85, temperature=1, base_rate=0.5, rho=0.5)"
    )
    assert isinstance(mock().judge([ask()])[0], Judgement)
