"""Answers combined: two questions to one judge, several judges; costs, silence, limits, fitted weights, real runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from vlm_itl.core.checks import ConfigError, DataError, JudgeError, RunError
from vlm_itl.data.labels import LabelSpace
from vlm_itl.experiment.config import make_config
from vlm_itl.experiment.judge_turn import Journal, ask_once
from vlm_itl.experiment.loop import run_al
from vlm_itl.vlm.cache import CachedHandler, JudgementCache, bill, handler_identity
from vlm_itl.vlm.ensemble import (
    COMBINATIONS,
    METHODS,
    BothHandler,
    EnsembleHandler,
    combine_answers,
    fit_ensemble,
    log_odds,
    probability_of,
    total_cost,
)
from vlm_itl.vlm.free import write_verdicts
from vlm_itl.vlm.handler import Judgement, JudgeQuery, JudgeStopped, VLMHandler, abstain, make_handler
from vlm_itl.vlm.local import HFJudge
from vlm_itl.vlm.simulated import MockHandler

pytestmark = pytest.mark.usefixtures("undrawn")

VOC = LabelSpace.voc()
TRUTH = np.zeros((6, 6), np.uint8)
TRUTH[:3] = 8
BAD = TRUTH.copy()
BAD[:3, 3:] = 12
IMAGE = Image.fromarray(np.arange(108, dtype=np.uint8).reshape(6, 6, 3))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def ask(i: int = 0, mask: Any = TRUTH, **fields: Any) -> JudgeQuery:
    return JudgeQuery(f"im{i}", fields.pop("image", IMAGE), mask, labels=fields.pop("labels", VOC), **fields)


class Script(VLMHandler):
    """Answers what a function of (id number, question) says: p_yes, None to abstain, or an error to raise."""

    def __init__(self, answer: Any, name: str = "script", usd: float | None = 0.001, batch_size: int = 32):
        self.model, self.batch_size = name, batch_size
        self._answer, self._usd = answer, usd
        self._asked: list[tuple[str, str]] = []

    def _judge_one(self, query: JudgeQuery) -> Judgement:
        self._asked.append((query.id, query.question))
        said = self._answer(int(query.id[2:]), query.question) if callable(self._answer) else self._answer
        if isinstance(said, Exception):
            raise said
        if isinstance(said, Judgement):
            return said
        if said is None:
            return abstain("asleep", usd=self._usd, tokens=5)
        verdict = "yes" if said >= 0.5 else "no"
        return Judgement(verdict, said, 0.9, "logprobs", raw=verdict, tokens=5, usd=self._usd, latency_s=0.5)


def bound_mock() -> MockHandler:
    judge = MockHandler(accuracy=1.0)
    judge.bind_truth(lambda image_id: TRUTH)
    return judge


# ---- costs ----


def test_costs_add_up() -> None:
    fresh = Judgement("yes", tokens=3, usd=0.5, latency_s=1.0, attempts=2)
    other = Judgement("no", tokens=4, usd=0.25, latency_s=2.0)
    kept = replace(other, cached=True)
    assert total_cost([fresh, other]) == {"tokens": 7, "usd": 0.75, "latency_s": 3.0, "attempts": 3, "cached": False}
    assert total_cost([fresh, kept]) == {"tokens": 3, "usd": 0.5, "latency_s": 1.0, "attempts": 2, "cached": False}
    assert total_cost([kept, kept])["cached"] and total_cost([kept, kept])["usd"] == 0.5
    assert total_cost([fresh, replace(other, usd=None)])["usd"] is None


def test_probabilities_of_answers() -> None:
    assert [probability_of(Judgement(v)) for v in ("yes", "no", "abstain")] == [1.0, 0.0, None]
    assert probability_of(Judgement("abstain", p_yes=0.9)) is None and probability_of(Judgement("no", 0.3)) == 0.3
    odds = [log_odds(Judgement("yes", p)) for p in (0.0, 0.5, 1.0)]
    assert odds == pytest.approx([logit(0.01), 0.0, logit(0.99)]) and log_odds(Judgement("abstain")) is None


# ---- both ----


@pytest.mark.parametrize(
    ("combine", "first", "second", "p_yes", "verdict"),
    [
        ("product", 0.9, 0.8, 0.72, "yes"),
        ("product", 0.6, 0.6, 0.36, "no"),
        ("product", 1.0, 0.0, 0.0, "no"),
        ("min", 0.6, 0.9, 0.6, "yes"),
        ("min", 0.9, 0.4, 0.4, "no"),
        ("mean", 0.9, 0.3, 0.6, "yes"),
    ],
)
def test_combining_two_answers(combine: str, first: float, second: float, p_yes: float, verdict: str) -> None:
    answers = {"quality": first, "exhaustive": second}
    judge = BothHandler(judge=Script(lambda i, question: answers[question]), combine=combine)
    (found,) = judge.judge([ask()])
    assert found.p_yes == pytest.approx(p_yes) and found.verdict == verdict and found.score_kind == "logprobs"
    assert (found.p_mass, found.tokens, found.usd, found.latency_s, found.attempts) == (0.9, 10, 0.002, 1.0, 2)
    assert found.raw.startswith("quality: ") and "| exhaustive: " in found.raw and found.model == "script"


@pytest.mark.parametrize("silent", ["quality", "exhaustive"])
@pytest.mark.parametrize("other", [0.0, 1.0])
@pytest.mark.parametrize("combine", list(COMBINATIONS))
def test_half_an_answer_is_none(silent: str, other: float, combine: str) -> None:
    judge = BothHandler(judge=Script(lambda i, question: None if question == silent else other), combine=combine)
    (found,) = judge.judge([ask()])
    assert found.verdict == "abstain" and found.p_yes is None and found.error == f"{silent}: asleep"
    assert found.attempts == 2


def test_hard_answers_and_mixed_kinds() -> None:
    hard = [Judgement("yes", score_kind="hard"), Judgement("no", score_kind="hard")]
    assert combine_answers(["a", "b"], hard).p_yes == 0.0 and combine_answers(["a", "b"], hard).score_kind == "hard"
    mixed = combine_answers(["a", "b"], [Judgement("yes", 0.7, None, "votes"), Judgement("yes", 0.9, 0.4, "logprobs")])
    assert mixed.score_kind == "score" and mixed.p_mass == 0.4 and mixed.p_yes == pytest.approx(0.63)


def test_both_keeps_order_and_asks_about_one_mask_in_a_row() -> None:
    """So that a judge that shares what a picture's questions have in common can do so."""
    inner = Script(lambda i, question: (i % 10) / 10 if question == "quality" else 1.0, batch_size=6)
    judge = BothHandler(judge=inner)
    assert judge.batch_size == 3
    found = judge.judge(ask(i, question="label") for i in range(11))
    assert [j.id for j in found] == [f"im{i}" for i in range(11)]
    assert [j.p_yes for j in found] == pytest.approx([(i % 10) / 10 for i in range(11)])
    assert inner._asked == [(f"im{i}", q) for i in range(11) for q in ("quality", "exhaustive")]


def test_one_failure_costs_both_only_itself() -> None:
    judge = BothHandler(judge=Script(lambda i, q: OSError("no answer") if (i, q) == (2, "exhaustive") else 1.0))
    found = judge.judge([ask(0), ask(1, mask=TRUTH / 2), ask(2), ask(3)])
    assert [j.verdict for j in found] == ["yes", "abstain", "abstain", "yes"]
    assert "uint8" in str(found[1].error) and found[2].error == "exhaustive: OSError: no answer"


def test_both_by_options_three_questions_and_seeds() -> None:
    judge = make_handler("both", judge="mock", options={"accuracy": 0.8}, seed=4, tau=0.3)
    assert judge.needs_truth and not judge.needs_segmenter
    inner: Any = judge.inner()[0]
    assert (inner.seed, inner.tau) == (4, 0.3)
    judge.bind_truth(lambda image_id: TRUTH)
    plain = MockHandler(accuracy=0.8, seed=4, tau=0.3)
    plain.bind_truth(lambda image_id: TRUTH)
    queries = [ask(i) for i in range(60)]
    wanted = [
        min(a.p_yes, b.p_yes)  # type: ignore[type-var]
        for a, b in zip(
            plain.judge(queries), plain.judge([replace(q, question="exhaustive") for q in queries]), strict=True
        )
    ]
    assert [j.p_yes for j in judge.judge(queries)] == wanted and 0 < sum(p or 0 for p in wanted) < 60
    three = BothHandler(judge=Script(0.5), questions=["quality", "exhaustive", "Is the {class_names} right?"])
    assert three.judge([ask()])[0].p_yes == 0.125
    judge.close()
    for closed in (judge, inner):
        with pytest.raises(JudgeError, match="judge 'mock' is simulated.*bind_truth"):
            closed.judge([ask()])
    assert BothHandler(judge=plain).judge([ask()])[0].verdict in ("yes", "no")  # it came with its truth


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"judge": "moc"}, "Did you mean 'mock'"),
        ({"judge": "mock", "options": {"acuracy": 1}}, "Did you mean 'accuracy'"),
        ({"judge": 3}, "a name, with options, or a handler"),
        ({"judge": Script(1.0), "options": {"a": 1}}, "a name, with options, or a handler"),
        ({"judge": "mock", "questions": "quality"}, "two different"),
        ({"judge": "mock", "questions": ["quality", "quality"]}, "two different"),
        ({"judge": "mock", "questions": ["quality", "exhaustiv"]}, "Did you mean 'exhaustive'"),
        ({"judge": "mock", "combine": "sum"}, "combine"),
        ({"judge": "mock", "threshold": 2}, "threshold"),
        ({}, "needs the option 'judge'"),
    ],
)
def test_both_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_handler("both", **options)


def test_a_list_is_not_for_a_judge_of_one_word() -> None:
    class OneWord(Script):
        one_word = True

    judge = OneWord(1.0)
    listed, plain = judge.judge([ask(0, question="list"), ask(1)])
    assert HFJudge.one_word and "first word" in str(listed.error)
    assert plain.verdict == "yes" and judge._asked == [("im1", "quality")]


def test_the_cache_inside_and_outside(tmp_path: Path) -> None:
    counting = Script(lambda i, question: 0.9)
    inside = BothHandler(judge=CachedHandler(judge=counting, path=tmp_path / "in.sqlite"))
    queries = [ask(i, mask=np.where(np.eye(6), i, TRUTH).astype(np.uint8)) for i in range(4)]
    first, second = inside.judge(queries), inside.judge(queries)
    assert len(counting._asked) == 8 and not any(j.cached for j in first) and all(j.cached for j in second)
    assert [j.p_yes for j in second] == [j.p_yes for j in first]
    inside.judge([replace(queries[0], mask=BAD), *queries[1:]])
    assert len(counting._asked) == 10
    outside = CachedHandler(judge="both", options={"judge": Script(0.9)}, path=tmp_path / "out.sqlite")
    assert [outside.judge(queries)[0].cached, outside.judge(queries)[0].cached] == [False, True]


@pytest.mark.parametrize(("max_calls", "whole"), [(4, [0, 1]), (3, [0]), (0, [])])
def test_both_keeps_what_was_answered_before_a_stop(tmp_path: Path, max_calls: int, whole: list[int]) -> None:
    cached = CachedHandler(judge=Script(0.9), path=tmp_path / "c.sqlite", max_calls=max_calls)
    queries = [ask(i, mask=np.where(np.eye(6), i, TRUTH).astype(np.uint8)) for i in range(4)]
    with pytest.raises(JudgeStopped, match=f"max_calls={max_calls}") as stop:
        BothHandler(judge=cached).judge(queries)
    assert sorted(stop.value.judgements) == whole
    assert (
        all(j.p_yes == pytest.approx(0.81) for j in stop.value.judgements.values()) and len(cached.cache) == max_calls
    )


# ---- ensemble: vote and mean ----


@pytest.mark.parametrize(
    ("said", "quorum", "verdict", "p_yes", "mass"),
    [
        ([0.9, 0.8, 0.1], 1, "yes", 2 / 3, 1.0),
        ([0.9, 0.2, 0.1], 1, "no", 1 / 3, 1.0),
        ([0.9, 0.2, None], 1, "abstain", None, 2 / 3),
        ([0.9, None, None], 1, "yes", 1.0, 1 / 3),
        ([0.9, None, None], 2, "abstain", None, 1 / 3),
        ([None, None, None], 1, "abstain", None, 0.0),
        ([0.0, 0.0, None], 2, "no", 0.0, 2 / 3),
        ([0.9, OSError("away"), 0.9], 1, "yes", 1.0, 2 / 3),
    ],
)
def test_a_vote(said: list[Any], quorum: int, verdict: str, p_yes: float | None, mass: float) -> None:
    judges = [Script(s, f"judge {k}") for k, s in enumerate(said)]
    (found,) = make_handler("ensemble", judges=judges, quorum=quorum).judge([ask()])
    assert (found.verdict, found.p_yes) == (verdict, pytest.approx(p_yes)) and found.p_mass == pytest.approx(mass)
    assert found.score_kind == ("none" if verdict == "abstain" else "votes") and found.attempts == 3
    assert found.raw.startswith("judge 0: ") and (found.error is None) == (verdict != "abstain")


def test_a_mean_leaves_out_who_is_silent() -> None:
    judges = [Script(0.9), Script(None), Script(Judgement("no")), Script(0.6)]
    (found,) = EnsembleHandler(judges=judges, method="mean").judge([ask()])
    assert found.p_yes == pytest.approx((0.9 + 0.0 + 0.6) / 3) and found.verdict == "yes" and found.p_mass == 0.75
    (strict,) = EnsembleHandler(judges=judges, method="mean", threshold=0.51).judge([ask()])
    assert strict.verdict == "no"
    (silent,) = EnsembleHandler(judges=[Script(None), Script(None)], method="mean").judge([ask()])
    assert silent.verdict == "abstain" and silent.error == "0 of 2 judges answered (asleep; asleep)"


def test_order_batches_and_bad_queries() -> None:
    judges = [Script(lambda i, q: (i % 7) / 7, batch_size=4), Script(lambda i, q: None if i % 3 else 0.5, batch_size=9)]
    handler = EnsembleHandler(judges=judges, method="mean")
    assert handler.batch_size == 4
    queries: list[Any] = [ask(i) for i in range(23)]
    queries[5:5] = ["no query", ask(99, mask=TRUTH / 2), ask(99, class_ids=(40,)), ask(99, image="x.jpg")]
    found = handler.judge(queries)
    assert [j.verdict for j in found[5:9]] == ["abstain"] * 4 and all(j.error for j in found[5:9])
    rest = found[:5] + found[9:]
    assert [j.id for j in rest] == [f"im{i}" for i in range(23)]
    wanted = [(i % 7) / 7 if i % 3 else ((i % 7) / 7 + 0.5) / 2 for i in range(23)]
    assert [j.p_yes for j in rest] == pytest.approx(wanted)
    assert handler.judge([]) == []


# ---- ensemble: fitted ----

N = 1200


@pytest.fixture(scope="module")
def several() -> tuple[list[JudgeQuery], np.ndarray, list[MockHandler]]:
    """Judges of AUC 0.7, 0.8 and 0.85 that err apart from each other; the second is silent now and then."""
    good = np.arange(N) % 5 < 2
    queries = [ask(i, TRUTH if g else BAD, image=None) for i, g in enumerate(good)]
    options: list[dict[str, Any]] = [{"auc": 0.7, "temperature": 0.3}, {"auc": 0.8, "abstain_rate": 0.2}, {"auc": 0.85}]
    judges = [MockHandler(kind="binormal", who=str(k), **o) for k, o in enumerate(options)]
    for judge in judges:
        judge.bind_truth(lambda image_id: TRUTH)
    return queries, good, judges


def p_of(judgements: list[Judgement]) -> np.ndarray:
    return np.array([np.nan if j.p_yes is None else j.p_yes for j in judgements])


def test_a_fitted_ensemble_beats_its_judges_on_unseen_images(several: Any, tmp_path: Path) -> None:
    queries, good, judges = several
    half = N // 2
    alone = [p_of(judge.judge(queries[half:])) for judge in judges]
    aucs = [roc_auc_score(good[half:][~np.isnan(p)], p[~np.isnan(p)]) for p in alone]
    brier = {}
    for method in ("mean", "stack"):
        handler = EnsembleHandler(judges=judges, method=method)
        weights = handler.fit(queries[:half], good[:half], path=tmp_path / f"{method}.json")
        assert json.loads((tmp_path / f"{method}.json").read_text()) == weights and weights["n"] == half
        said = handler.judge(queries[half:])
        p = p_of(said)
        assert not np.isnan(p).any() and roc_auc_score(good[half:], p) > max(aucs) + 0.02
        brier[method] = np.mean((p - good[half:]) ** 2)
        again = make_handler("ensemble", judges=judges, method=method, weights=str(tmp_path / f"{method}.json"))
        assert [j.p_yes for j in again.judge(queries[half:])] == [j.p_yes for j in said]
    assert brier["stack"] < brier["mean"] < np.mean((alone[0] - good[half:]) ** 2)


def test_weights_are_those_of_scikit_learn(several: Any) -> None:
    queries, good, judges = several
    answers = [judge.judge(queries) for judge in judges]
    weights = fit_ensemble(answers, good.tolist(), "stack")
    odds = np.array([[0.0 if log_odds(j) is None else log_odds(j) for j in row] for row in answers]).T
    silent = np.array([[j.verdict == "abstain" for j in row] for row in answers]).T
    model = LogisticRegression(max_iter=1000).fit(np.hstack([odds, silent]), good)
    assert weights["odds"] + weights["silence"] == pytest.approx(model.coef_[0].tolist())
    assert weights["silence"][0] == weights["silence"][2] == 0 and weights["judges"] == [j.model for j in judges]
    handler = EnsembleHandler(judges=judges, method="stack", weights=weights)
    wanted = model.predict_proba(np.hstack([odds, silent]))[:, 1]
    assert [j.p_yes for j in handler.judge(queries)] == pytest.approx(wanted.tolist(), abs=1e-9)
    # mean: one curve for each judge, from the images on which it spoke
    lines = fit_ensemble(answers, good.tolist(), "mean")
    heard = ~silent[:, 1]
    curve = LogisticRegression(max_iter=1000).fit(odds[heard, 1:2], good[heard])
    assert (lines["slopes"][1], lines["intercepts"][1]) == pytest.approx((curve.coef_[0, 0], curve.intercept_[0]))
    spoken = [p for p in (log_odds(row[3]) for row in answers)]
    parts = [
        expit(s * o + b) for s, o, b in zip(lines["slopes"], spoken, lines["intercepts"], strict=True) if o is not None
    ]
    found = EnsembleHandler(judges=judges, method="mean", weights=lines).judge(queries[3:4])[0]
    assert found.p_yes == pytest.approx(np.mean(parts))


def test_what_cannot_be_fitted(several: Any) -> None:
    yes = [Judgement("yes", model="a")] * 4
    with pytest.raises(DataError, match=r"do not pair up"):
        fit_ensemble([yes, yes[:3]], [True, False, True, False])
    with pytest.raises(DataError, match="do not pair up"):
        fit_ensemble([], [])
    with pytest.raises(DataError, match="good and bad masks are needed to fit, and there are 4 of 4"):
        fit_ensemble([yes, yes], [True] * 4)
    silent = [Judgement("abstain", model="b")] * 4
    with pytest.raises(DataError, match="judge 'b': .*0 of 0"):
        fit_ensemble([yes, silent], [True, False, True, False], "mean")
    assert fit_ensemble([yes, silent], [True, False, True, False], "stack")["odds"][1] == 0
    with pytest.raises(ConfigError, match="method='vote'"):
        fit_ensemble([yes], [True] * 4, "vote")
    handler = EnsembleHandler(judges=["always_yes", "always_no"])
    with pytest.raises(ConfigError, match="nothing to fit"):
        handler.fit([ask()], [True])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"judges": ["always_yes"]}, "two or more"),
        ({"judges": "always_yes"}, "two or more"),
        ({"judges": {"judge": "mock"}}, "two or more"),
        ({"judges": ["always_yes", "always_on"]}, "Did you mean 'always_no'"),
        ({"judges": ["always_yes", {"judge": "mock", "options": {"acuracy": 1}}]}, "Did you mean 'accuracy'"),
        ({"judges": ["always_yes", {"judge": "mock", "accuracy": 1}]}, "is needed, not"),
        ({"judges": ["always_yes", 3]}, "a name, with options, or a handler"),
        ({"judges": ["always_yes", "always_no"], "method": "stak"}, "Did you mean 'stack'"),
        ({"judges": ["always_yes", "always_no"], "quorum": 3}, "quorum"),
        ({"judges": ["always_yes", "always_no"], "threshold": -1}, "threshold"),
        ({"judges": ["always_yes", "always_no"], "weights": {}}, "takes no weights"),
        (
            {"judges": ["always_yes", "always_no"], "method": "mean", "weights": {"method": "stack"}},
            "for method 'stack'",
        ),
        (
            {"judges": ["always_yes", "always_no"], "method": "mean", "weights": {"method": "mean", "judges": ["a"]}},
            r"weights are for \['a'\]",
        ),
        (
            {
                "judges": ["always_yes", "always_no"],
                "method": "mean",
                "weights": {"method": "mean", "judges": ["always_yes", "always_no"], "slopes": [1]},
            },
            "a number for each judge",
        ),
    ],
)
def test_an_ensemble_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_handler("ensemble", **options)


def test_missing_weights(tmp_path: Path) -> None:
    two = ["always_yes", "always_no"]
    with pytest.raises(JudgeError, match="call fit"):
        make_handler("ensemble", judges=two, method="stack").judge([ask()])
    with pytest.raises(RunError, match="does not exist"):
        make_handler("ensemble", judges=two, method="stack", weights=tmp_path / "none.json")


# ---- ensemble: needs, cache, stops ----


def test_needs_are_passed_on_and_identities_tell_ensembles_apart(several: Any, tmp_path: Path) -> None:
    nested = {"judge": "both", "options": {"judge": "mock"}}
    handler = make_handler("ensemble", judges=[nested, "confidence"], seed=3)
    assert handler.needs_truth and handler.needs_segmenter
    with pytest.raises(JudgeError, match="bind_truth"):
        handler.judge([ask()])
    handler.bind_truth(lambda image_id: TRUTH)
    with pytest.raises(JudgeError, match="bind_segmenter"):
        handler.judge([ask()])
    assert not make_handler("ensemble", judges=["always_yes", "always_no"]).needs_truth
    pairs: list[dict[str, Any]] = [
        {"judges": ["always_yes", "always_no"]},
        {"judges": ["always_no", "always_yes"]},
        {"judges": ["always_yes", {"judge": "mock", "options": {"accuracy": 0.7}}]},
        {"judges": ["always_yes", {"judge": "mock", "options": {"accuracy": 0.8}}]},
        {"judges": ["always_yes", "always_no"], "method": "mean"},
        {"judges": ["always_yes", "always_no"], "quorum": 2},
        {"judges": ["always_yes", "always_no"], "method": "mean", "threshold": 0.7},
    ]
    assert len({str(handler_identity(make_handler("ensemble", **p))) for p in pairs}) == len(pairs)
    queries, good, judges = several
    stack = EnsembleHandler(judges=judges, method="stack")
    before = handler_identity(stack)
    stack.fit(queries[:200], good[:200])
    assert handler_identity(stack) != before


@pytest.mark.parametrize("outside", [True, False])
def test_an_ensemble_and_the_cache(tmp_path: Path, outside: bool) -> None:
    scripts = [Script(0.9, "a"), Script(0.4, "b")]
    queries = [ask(i, mask=np.where(np.eye(6), i, TRUTH).astype(np.uint8)) for i in range(5)]
    judge: VLMHandler
    if outside:  # a simulated judge that has its truth already needs no second one
        assert CachedHandler(judge=BothHandler(judge=bound_mock()), path=tmp_path / "m.sqlite").judge([ask()])[0].p_yes
        judge = CachedHandler(judge=EnsembleHandler(judges=scripts, method="mean"), path=tmp_path / "c.sqlite")
    else:
        kept = [CachedHandler(judge=s, path=tmp_path / "c.sqlite") for s in scripts]
        judge = EnsembleHandler(judges=kept, method="mean")
    first, second = judge.judge(queries), judge.judge(queries)
    assert [len(s._asked) for s in scripts] == [5, 5] and all(j.cached for j in second)
    assert [j.p_yes for j in first] == [j.p_yes for j in second] == pytest.approx([0.65] * 5)
    assert first[0].usd == pytest.approx(0.002)


def test_an_ensemble_keeps_what_all_answered_before_a_stop(tmp_path: Path) -> None:
    queries = [ask(i, mask=np.where(np.eye(6), i, TRUTH).astype(np.uint8)) for i in range(5)]

    def limited(name: str) -> CachedHandler:
        return CachedHandler(judge=Script(0.9, name), path=tmp_path / f"{name}.sqlite", max_calls=2)

    with pytest.raises(JudgeStopped) as stop:
        EnsembleHandler(judges=[Script(0.8), limited("last")], method="mean").judge(queries)
    assert sorted(stop.value.judgements) == [0, 1] and stop.value.judgements[0].p_yes == pytest.approx(0.85)
    with pytest.raises(JudgeStopped) as stop:
        EnsembleHandler(judges=[limited("first"), Script(0.8)], method="mean").judge(queries)
    assert not stop.value.judgements


def test_a_judge_that_cannot_work_stops_the_ensemble() -> None:
    with pytest.raises(JudgeError, match="the key was refused"):
        EnsembleHandler(judges=["always_yes", Script(JudgeError("the key was refused"))]).judge([ask()])


# ---- in a run ----


def test_a_run_with_everything_at_once(tmp_path: Path) -> None:
    write_verdicts(tmp_path / "human.csv", [("nobody", None, "yes")])
    members = [
        {"judge": "both", "options": {"judge": "mock", "options": {"kind": "binormal", "auc": 0.9}}},
        {"judge": "confidence", "options": {"kind": "softmin"}},
        {"judge": "human", "options": {"path": str(tmp_path / "human.csv")}},
    ]
    settings: dict[str, Any] = {
        "mode": "vlm",
        "judge": "ensemble",
        "judge_options": {"judges": members, "method": "mean"},
        "dataset": "scenes",
        "data_options": {"n_train": 20, "n_test": 4},
        "val_share": 4,
        "steps": 3,
        "batch_size": 4,
        "image_size": 48,
        "initial": 6,
        "increment": 6,
        "max_labelled": 12,
        "gallery": 0,
        "test_every_round": False,
    }
    rounds = list(run_al(make_config(settings, output_dir=str(tmp_path / "run"))))
    lines = (tmp_path / "run" / "round_001" / "judgements.jsonl").read_text().splitlines()
    for line in map(json.loads, lines):
        assert line["error"] is None and 0 <= line["p_yes"] <= 1 and line["p_mass"] == pytest.approx(2 / 3)
        assert line["attempts"] == 4 and line["usd"] == 0.0 and "human(human.csv): abstain" in line["raw"]
    assert len(rounds) == 2 and rounds[1].judge and rounds[1].judge["coverage"] == 1.0
    assert set(METHODS) == {"vote", "mean", "stack"}


def unlike(count: int) -> list[JudgeQuery]:
    return [ask(i, mask=np.where(np.eye(6), i, TRUTH).astype(np.uint8)) for i in range(count)]


def dying(good: int, name: str = "dies") -> Script:
    """Answers some questions, then fails as a server that is gone."""
    judge = lively(lambda i, q: 0.9 if len(judge._asked) <= good else abstain("server gone", usd=0.001), name)
    return judge


def lively(said: Any, name: str, batch_size: int = 32) -> Script:
    judge = Script(said, name, batch_size=batch_size)
    judge.patience = 3
    return judge


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("where", ["memory", "cache", "journal"])
def test_answers_of_the_others_are_not_paid_for_again(tmp_path: Path, at: int, where: str) -> None:
    """One of three judges dies in the middle: what the others had answered is kept until the answer is whole."""
    queries, file = unlike(6), tmp_path / ("c.sqlite" if where == "cache" else "j.jsonl")
    kept: dict[str, Any] = {}

    def asked(judges: list[Script]) -> tuple[list[Judgement], Journal]:
        judge: VLMHandler = EnsembleHandler(judges=judges, method="mean")
        journal = Journal(file) if where == "journal" else Journal(tmp_path / "none")
        if where == "cache":
            judge = CachedHandler(judge=judge, path=file)
            judge.bind_payer("me")
        elif where == "memory":
            judge.bind_parts(kept.setdefault("parts", judge.parts()))
        return (ask_once(judge, queries, journal) if where == "journal" else judge.judge(queries)), journal

    first = [lively(0.8, "a"), lively(0.6, "b"), lively(0.7, "c")]
    first[at] = dying(2, first[at].model)
    with pytest.raises(JudgeStopped):
        asked(first)
    again = [lively(0.8, "a"), lively(0.6, "b"), lively(0.7, "c")]
    again[at]._answer = 0.9
    said, journal = asked(again)
    told = 2 * (where == "memory" and at == 2)  # the error brought them, and nobody has kept it
    assert [len(judge._asked) for judge in again] == [told] * at + [4 + told] + [6] * (2 - at)
    assert [j.p_yes for j in said] == pytest.approx(
        [np.mean([[0.8, 0.6, 0.7][k] if k != at else 0.9 for k in range(3)])] * 6
    )
    if where == "journal":  # all that was sent is charged, once
        calls, _ = bill([*journal.known.values(), *journal.lost])
        sent = sum(len(judge._asked) for judge in (*first, *again))
        assert calls == sent, (calls, sent)
        assert Journal(file).lost == journal.lost and not Journal(file).parts.known
    elif where == "cache":
        assert JudgementCache(file).spent("me")["calls"] == sum(len(judge._asked) for judge in (*first, *again))


def test_a_mask_that_the_last_judge_failed_on_as_it_died_is_asked_about_again(tmp_path: Path) -> None:
    """Else the verdict of those that were left would stand for good, as if it were that of all."""
    queries, path = unlike(6), tmp_path / "j.jsonl"
    with pytest.raises(JudgeStopped) as stop:
        ask_once(EnsembleHandler(judges=[lively(0.8, "a"), dying(2)], method="mean"), queries, Journal(path))
    assert sorted(stop.value.judgements) == [0, 1]
    ensemble = EnsembleHandler(judges=[lively(0.8, "a"), lively(0.2, "dies")], method="mean")
    said = ask_once(ensemble, queries, Journal(path))
    assert [j.p_yes for j in said] == pytest.approx([0.85] * 2 + [0.5] * 4) and {j.p_mass for j in said} == {1.0}


def test_parts_that_no_answer_came_to_need_are_charged(tmp_path: Path) -> None:
    """The dead judge is taken out: what the others had answered for the old ensemble was paid all the same."""
    queries, path = unlike(4), tmp_path / "j.jsonl"
    first = [lively(0.8, "a"), dying(0), lively(0.7, "c")]
    with pytest.raises(JudgeStopped):
        ask_once(EnsembleHandler(judges=first), queries, Journal(path))
    journal, rest = Journal(path), [lively(0.8, "other"), lively(0.7, "c")]
    ask_once(EnsembleHandler(judges=rest), queries, journal)
    calls, _ = bill([*journal.known.values(), *journal.lost])
    assert calls == sum(len(judge._asked) for judge in (*first, *rest))


def test_half_of_both_is_kept_and_small_batches_lose_nothing(tmp_path: Path) -> None:
    """Three questions to a judge that takes two at a time, which dies at the fifth."""
    path, questions = tmp_path / "j.jsonl", ["quality", "exhaustive", "Is it right?"]
    judge = dying(4)
    judge.batch_size, judge.patience = 2, 1
    with pytest.raises(JudgeStopped):
        ask_once(BothHandler(judge=judge, questions=questions), unlike(4), Journal(path))
    again = lively(0.9, "dies", batch_size=2)
    again.patience = 1
    assert len(ask_once(BothHandler(judge=again, questions=questions), unlike(4), Journal(path))) == 4
    assert len(again._asked) == 12 - 4


@pytest.mark.parametrize(("max_calls", "sent"), [(7, 6), (9, 9), (2, 0)])
@pytest.mark.parametrize("kind", ["ensemble", "both"])
def test_a_limit_of_calls_counts_those_of_every_judge(tmp_path: Path, kind: str, max_calls: int, sent: int) -> None:
    """Three calls a mask: as many masks were asked about as there were calls."""
    scripts, judge = [lively(0.9, name) for name in "abc"], Any
    if kind == "ensemble":
        judge = EnsembleHandler(judges=scripts, method="mean")
    else:
        judge = BothHandler(judge=scripts[0], questions=["quality", "exhaustive", "Is it right?"])
    cached = CachedHandler(judge=judge, path=tmp_path / "c.sqlite", max_calls=max_calls)
    with pytest.raises(JudgeStopped, match=f"stopped at max_calls={max_calls}"):
        cached.judge(unlike(6))
    assert sum(len(script._asked) for script in scripts) == sent == cached.calls
    again = CachedHandler(judge=judge, path=tmp_path / "c.sqlite")
    assert len(again.judge(unlike(6))) == 6 and sum(len(script._asked) for script in scripts) == 18


def test_what_is_asked_to_fit_is_kept_when_a_judge_stops() -> None:
    queries = [*unlike(4), *(replace(q, id=f"im{10 + i}", mask=BAD) for i, q in enumerate(unlike(4)))]
    first = lively(lambda i, q: 0.2 if i >= 10 else 0.8, "a")
    judge, good = EnsembleHandler(judges=[first, dying(2)], method="mean"), [True] * 4 + [False] * 4
    with pytest.raises(JudgeStopped):
        judge.fit(queries, good)
    judge._judges[1] = lively(lambda i, q: 0.3 if i >= 10 else 0.9, "dies")
    assert judge.fit(queries, good)["n"] == 8 and len(first._asked) == 8
