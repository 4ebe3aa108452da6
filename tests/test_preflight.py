"""A judge is examined before it is paid: reachable, seeing, readable; equal failures stop it; nothing paid is lost."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlm_itl.core.checks import ConfigError, JudgeError
from vlm_itl.data.labels import LabelSpace
from vlm_itl.vlm.handler import HANDLERS, Judgement, JudgeQuery, VLMHandler, abstain, make_handler

pytestmark = pytest.mark.usefixtures("undrawn")

LABELS = LabelSpace(("background", "cat", "dog"))


def question(index: int) -> JudgeQuery:
    mask = np.zeros((6, 8), np.uint8)
    mask[1:4, 1 : 2 + index % 5] = 1
    return JudgeQuery(f"q{index}", Image.new("RGB", (8, 6), (index % 250, 9, 9)), mask, labels=LABELS)


class Scripted(VLMHandler):
    """Answers well, but for the questions that `fails` names; writes down what it was asked."""

    name = "scripted"

    def __init__(self, *, max_tokens: int = 64, good: int = 0, log: str = "", p_yes: bool = True) -> None:
        self.max_tokens, self.good, self.log, self.gives_p = max_tokens, good, log, p_yes
        self._asked = 0

    def _judge_one(self, query: JudgeQuery) -> Judgement:
        self._asked += 1
        if self.log:
            with open(self.log, "a") as file:
                file.write(f"{query.id}\n")
        if self.max_tokens < 100 and self._asked > self.good:
            reason = f"the answer was cut off at max_tokens={self.max_tokens} after {self._asked} letters"
            return abstain(reason, raw="[length]", tokens=900, usd=0.01)
        return Judgement("yes", 0.9 if self.gives_p else None, 0.9, "logprobs", "Yes", tokens=300, usd=0.002)


# ---- 25: failures that are alike ----


def test_25_failures_that_are_alike_stop_any_judge() -> None:
    """Ten in a row, whatever numbers stand in their reasons; the answers come with the exception."""
    judge = Scripted()
    with pytest.raises(JudgeError, match="10 times in a row.*cut off.*max_tokens") as caught:
        judge.judge([question(i) for i in range(40)])
    assert judge._asked == 10 and len(getattr(caught.value, "judgements", {})) == 10
    assert len(Scripted(max_tokens=100).judge([question(i) for i in range(40)])) == 40


def test_25_batches_that_matter_keep_their_size_and_others_stop_early() -> None:
    """A network's last digits depend on its batch; of a judge that is paid by the question no batch is lost."""
    from vlm_itl.vlm.server import OpenAIHandler

    sizes: list[int] = []

    class Network(Scripted):
        def _judge_batch(self, queries: Any) -> list[Judgement]:
            sizes.append(len(queries))
            return [self._judge_one(query) for query in queries]

    Network(max_tokens=100).judge([question(i) for i in range(40)])
    assert sizes == [32, 8] and Network().batches_matter
    assert not Scripted().batches_matter and not OpenAIHandler.batches_matter


def test_25_a_judge_that_answers_well_is_given_more_time() -> None:
    judge = Scripted(good=300)
    with pytest.raises(JudgeError, match="in a row"):
        judge.judge([question(i) for i in range(600)])
    assert 310 < judge._asked <= 300 + 64  # a tenth of what went well, and the end of a batch


class Mixed(VLMHandler):
    """Fails in two ways in turn; or is free; or fails on the item."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def _judge_one(self, query: JudgeQuery) -> Judgement:
        if self.kind == "free":
            return abstain("no human verdict", tokens=0, usd=0.0)
        if self.kind == "item":
            return abstain("FileNotFoundError: x.jpg", attempts=0)
        return abstain("TimeoutError: slow" if int(query.id[1:]) % 2 else "the judge refused", tokens=9)


@pytest.mark.parametrize("kind", ["free", "item", "two reasons"])
def test_25_what_is_not_alike_or_costs_nothing_goes_on(kind: str) -> None:
    assert len(Mixed(kind).judge([question(i) for i in range(30)])) == 30


def test_25_nothing_paid_is_lost_when_a_judge_stops(tmp_path: Path) -> None:
    """What it answered is on disk; its failures are asked again by the next process, and stay in the books."""
    from datasets import Dataset

    from vlm_itl.data.masks import MaskStore
    from vlm_itl.experiment.judge_turn import Journal, judge_masks

    queries = [question(i) for i in range(60)]
    store = MaskStore(tmp_path / "masks", LABELS)
    for query in queries:
        store.write(query.id, query.mask)
    images = Dataset.from_dict({"id": [q.id for q in queries], "image": [q.image for q in queries]})
    first = Scripted(good=20)
    with pytest.raises(JudgeError, match="in a row"):
        judge_masks(first, images, store, "quality", Journal(tmp_path / "pool.jsonl"))
    kept = Journal(tmp_path / "pool.jsonl")
    assert len(kept.known) == 20 and len(kept.spent) == first._asked - 20 >= 10
    assert sum(j.usd or 0 for j in (*kept.known.values(), *kept.spent)) == pytest.approx(
        20 * 0.002 + 0.01 * len(kept.spent)
    )
    second = Scripted(max_tokens=400)
    said = judge_masks(second, images, store, "quality", kept)
    assert second._asked == 40 and all(j.verdict == "yes" for j in said)


# ---- 26: keys and packages ----


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("openai", {}),
        ("cached", {"judge": "openai", "path": "c.sqlite"}),
        ("both", {"judge": "openai"}),
        ("ensemble", {"judges": ["always_yes", {"judge": "openai", "options": {}}]}),
    ],
)
def test_26_missing_keys_and_packages_are_found_when_made(
    name: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = {"model": "m", "api_key_env": "NO_SUCH_VARIABLE_OF_OURS", "base_url": "http://localhost:1/v1"}
    if name == "ensemble":
        options = {"judges": ["always_yes", {"judge": "openai", "options": own}]}
    elif name == "openai":
        options = own
    else:
        options = {**options, "options": own}
    with pytest.raises(JudgeError, match="NO_SUCH_VARIABLE_OF_OURS"):
        make_handler(name, **options)
    monkeypatch.setenv("NO_SUCH_VARIABLE_OF_OURS", "k")
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(JudgeError, match=r"vlm_itl\[openai\]"):
        make_handler(name, **options)


# ---- what the examination sees ----


def rows() -> list[dict[str, Any]]:
    found = []
    for i in range(5):
        mask = np.zeros((6, 8), np.uint8)
        mask[1:4, 1:5], mask[0] = 1 + i % 2, 255
        found.append({"id": str(i), "image": Image.new("RGB", (8, 6), (50 * i, 0, 0)), "mask": mask})
    return found


class Local(VLMHandler):
    """A model on this machine; `p_yes` of a mask and its place in the batch."""

    def __init__(self, p_yes: Any) -> None:
        self.p_yes = p_yes

    def _judge_batch(self, queries: list[JudgeQuery]) -> list[Judgement]:
        p = [self.p_yes(query, place) for place, query in enumerate(queries)]
        return [Judgement("yes" if x >= 0.5 else "no", x, 0.9, "logprobs", "Yes", tokens=50, usd=0.0) for x in p]

    def _judge_one(self, query: JudgeQuery) -> Judgement:
        return self._judge_batch([query])[0]


def test_examination_finds_blind_judges_and_batches_that_matter() -> None:
    from vlm_itl.judging.preflight import (
        accepted_rates,
        preflight,
        preflight_problem,
        preflight_queries,
        preflight_table,
    )

    queries = preflight_queries(rows(), LABELS, 6)
    for right, wrong in zip(queries[::2], queries[1::2], strict=True):
        assert right.id == wrong.id and right.text() == wrong.text()
        main = right.classes()[0]
        assert not ((right.mask == main) & (wrong.mask == main)).any() and 255 not in right.mask
    blind = preflight(Local(lambda query, place: 0.83), queries)
    assert blind["sees"] == "no" and "last digit" in preflight_table(blind) and blind["order_gap"] == 0
    seeing = preflight(Local(lambda query, place: 0.9 if query.mask[5, 7] == 0 else 0.1 + place / 100), queries)
    assert seeing["sees"] == "yes" and seeing["right"] == [3, 3] and seeing["opposite"] == [0, 3]
    assert seeing["order_gap"] == pytest.approx(0.05) and "batch_size=1" in preflight_table(seeing)
    assert accepted_rates(seeing) == (0.8, 0.2)
    useless = preflight(Scripted(), queries)
    assert useless["answered"] == 0 and "larger max_tokens" in str(preflight_problem(useless))
    free = preflight(Mixed("free"), queries)
    assert preflight_problem(free) is None and preflight_queries(rows(), LABELS, 0) == []


# ---- a run ----

TINY: dict[str, Any] = {
    "mode": "vlm", "judge": "scripted", "data_options": {"n_train": 24, "n_test": 8}, "val_share": 4, "steps": 1,
    "batch_size": 2, "image_size": 32, "initial": 12, "increment": 4, "max_labelled": 16, "gallery": 0,
    "test_every_round": False, "tau": 0.9,
}  # fmt: skip


def run(out: Path, **settings: Any) -> list[Any]:
    from vlm_itl.experiment.config import make_config
    from vlm_itl.experiment.loop import run_al

    return list(run_al(make_config({**TINY, "output_dir": str(out), **settings})))


def test_25_a_run_stops_before_training_and_goes_on_with_other_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Six questions, no training, one line; then larger answers: examined again, all six and six charged, once."""
    monkeypatch.setitem(HANDLERS, "scripted", Scripted)
    log, out = tmp_path / "asked.txt", tmp_path / "run"
    with pytest.raises(JudgeError, match="none of 6 questions.*larger max_tokens") as caught:
        run(out, judge_options={"log": str(log)})
    assert "\n" not in str(caught.value) and len(log.read_text().split()) == 6
    assert not list(out.glob("round_*")) and not list(out.glob(".round_*"))
    better = {"log": str(log), "max_tokens": 400}
    rounds = run(out, judge_options=better)
    assert len(log.read_text().split()) == 6 + 6 + 8 + 4
    budget = rounds[-1].budget
    assert (budget["preflight_calls"], budget["judge_calls"]) == (12, 12)
    assert budget["preflight_usd"] == pytest.approx(6 * 0.01 + 6 * 0.002)
    assert budget["judge_usd"] == pytest.approx(12 * 0.002)
    told = json.loads((out / "preflight.json").read_text())["examinations"]
    assert [one["passed"] for one in told] == [False, True] and told[1]["sees"] == "no"
    assert "sees the picture" in capsys.readouterr().out
    # few of the masks are good after one step, and the judge says yes to everything
    assert rounds[0].judge["foreseen"]["precision"] < 0.5 and "expected" in str(rounds[0])
    assert len(run(out, judge_options=better)) == 2 and len(log.read_text().split()) == 24  # not repeated
    with pytest.raises(Exception, match="another configuration"):
        run(out, judge_options={**better, "max_tokens": 500})


LOST = {"logprobs": "left out: 'not allowed'"}


class Weakened(Scripted):
    """Finds out with its first question what its server refuses."""

    name = "weakened"

    def _judge_one(self, query: JudgeQuery) -> Judgement:
        self.lost = LOST
        return super()._judge_one(query)

    def notes(self) -> dict[str, str]:
        return dict(getattr(self, "lost", {}))


@pytest.mark.parametrize("preflight", [0, 2])
def test_what_a_judge_had_to_do_without_is_recorded(
    preflight: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the summary, whether it was examined or not; a later process that asks nothing forgets nothing."""
    monkeypatch.setitem(HANDLERS, "weakened", Weakened)
    options = {"judge": "weakened", "judge_options": {"max_tokens": 400}, "preflight": preflight}
    summary = tmp_path / "run" / "summary.json"
    for asks in (True, False):
        run(tmp_path / "run", **options)
        assert json.loads(summary.read_text())["judge_notes"] == LOST, asks
        summary.unlink()
        monkeypatch.setattr(Weakened, "notes", VLMHandler.notes)


def test_a_trial_remembers_what_a_judge_had_to_do_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlm_itl.judging.trial import make_judge_config, try_judge

    monkeypatch.setitem(HANDLERS, "weakened", Weakened)
    data = {"n_train": 24, "n_test": 8}
    settings = {"handler": "weakened", "options": {"max_tokens": 400}, "data_options": data, "limit": 2, "per_image": 4}
    for _ in range(2):
        cost = try_judge(make_judge_config(settings, resamples=20, output_dir=str(tmp_path))).report["cost"]
        assert cost["weakened"]["done_without"] == LOST and cost["always_yes"]["done_without"] == {}
        monkeypatch.setattr(Weakened, "notes", VLMHandler.notes)  # the answers are remembered: nothing is found out


def test_27_impossible_certificates_are_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"at least 29 validation masks, and there are 4\b"):
        run(tmp_path / "run", judge="always_yes", acceptance="certified")
    assert not list((tmp_path / "run").glob("round_*"))


FROM_ELSEWHERE = {"proposer": "simulated"}
SEVERAL = {"proposer": "several", "proposer_options": {"of": ["simulated", "own"]}}


class Patient(Scripted):
    """Writes down all but what it is asked about masks that mark nothing."""

    def _judge_one(self, query: JudgeQuery) -> Judgement:
        self.log, log = "" if query.question == "exhaustive" else self.log, self.log
        try:
            return super()._judge_one(query)
        finally:
            self.log = log


@pytest.mark.parametrize(
    ("more", "at_most"),
    [
        ({}, 8 + 4),  # of 20 images, 12 and 16 are drawn
        ({"judge_limit": 3}, 3 + 3),
        ({"goal": "dataset"}, 8 + 4 + 4 + 4),  # what is left, and validation
        ({"acceptance": "certified", "alpha": 0.6, "delta": 0.8}, 8 + 4 + 2 * 4),
        (FROM_ELSEWHERE, 8),  # each mask once
        ({**FROM_ELSEWHERE, "judge_limit": 3}, 3 + 3),
        ({"goal": "dataset", "judge_limit": 2}, 2 + 2 + 2 + 4),  # a limit is one at the end as well
        ({**FROM_ELSEWHERE, "judge_limit": 3, "goal": "dataset"}, 8 + 4 + 12),  # what is left, and what was drawn
        ({**FROM_ELSEWHERE, "judge_limit": 1, "goal": "dataset"}, 1 + 1 + 1 + 4 + 12),
        ({**FROM_ELSEWHERE, "goal": "dataset", "stop": {"seconds": 1}}, 8 + 4 + 12),
        (SEVERAL, 8 + 8 + 4),
    ],
)
def test_no_more_is_asked_than_was_said_before(
    more: dict[str, Any],
    at_most: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What a user agrees to pay counts every proposer, held-out masks, and the labelling at the end."""
    monkeypatch.setitem(HANDLERS, "scripted", Patient)
    log = tmp_path / "asked.txt"
    options = {"log": str(log), "max_tokens": 400}
    rounds = run(tmp_path / "run", judge_options=options, **{"steps": 0, "accept_by": "image", **more})
    one_kind_of_mask = more is not SEVERAL and more.get("acceptance") != "certified"
    assert (rounds[0].judge["foreseen"] is not None) == one_kind_of_mask  # of the first proposer's, nobody has asked
    examined = json.loads((tmp_path / "run" / "preflight.json").read_text())["examinations"][0]["calls"]
    assert f" for {at_most} more questions, and one for each accepted mask" in capsys.readouterr().out
    assert len(log.read_text().split()) - examined <= at_most


def test_what_acceptance_needs_is_asked_for_before_any_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(HANDLERS, "scripted", Scripted)
    settings = {"judge_options": {"max_tokens": 400, "p_yes": False}, "acceptance": "threshold"}
    with pytest.raises(ConfigError, match="needs p_yes"):
        run(tmp_path / "run", **settings)
    assert not list((tmp_path / "run").glob(".round_*"))
