"""The whole loop on six images that one can count, with a network that has never seen a tensor: nothing is trained."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from toyloop import Eye, Listener, Parrot, no_figures, settings

from vlm_itl.core.checks import JudgeError, LeakError
from vlm_itl.data.sources import SegData, toy_images
from vlm_itl.experiment.loop import Loop
from vlm_itl.experiment.state import Round


@pytest.fixture
def toy() -> SegData:
    return toy_images()


def test_a_whole_run(toy: SegData, tmp_path: Path) -> None:
    """Four images, one more each round; what the judge accepts is trained on as predicted; the test is read once."""
    learner, judge, tracker = Parrot(toy), Eye(), Listener()
    loop = Loop(settings(tmp_path / "run"), toy, learner, judge, tracker=tracker, draw=no_figures)
    rounds = list(loop.run())
    assert [r.labelled for r in rounds] == [1, 2, 3] and tracker.told == [0, 1, 2]
    (start,) = rounds[0].start_ids
    free = [i for i in ("toy-0", "toy-1", "toy-2", "toy-3") if i != start]
    assert rounds[0].selection["ids"] == [max(i for i in free if i != "toy-1")]  # the least sure that was not accepted
    assert rounds[0].pseudo_ids == ["toy-1"] and rounds[1].pseudo == 1
    assert set(learner.seen[0]) == {start} and set(learner.seen[1]) == {start, "toy-1", *rounds[0].selection["ids"]}
    assert judge.asked == [*free, *(i for i in free if i not in rounds[0].selection["ids"]), *judge.asked[5:]]
    assert [r.budget["judge_usd"] for r in rounds] == [0.75, 1.25, 1.5] and rounds[-1].budget["images"] == 3 + 1
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert tracker.summary["curve"] == summary["curve"] and not summary["simulated"]
    assert summary["curve"]["test_mean_iou"] == [0.1, 0.3, 0.4] and summary["test"]["images"] == 1
    assert [r.judge["accepted"] for r in rounds] == [1, 1, 1]


def test_killed_after_any_round_it_ends_alike(toy: SegData, tmp_path: Path) -> None:
    """Another process goes on: records, books and questions are the same, and nobody is asked twice."""
    whole = list(Loop(settings(tmp_path / "whole"), toy, Parrot(toy), Eye(), tracker=Listener(), draw=no_figures).run())
    for killed_after in (1, 2):
        folder = tmp_path / str(killed_after)
        first, asked = Loop(settings(folder), toy, Parrot(toy), Eye(), tracker=Listener(), draw=no_figures), []
        for _ in range(killed_after):
            first.run_round()
        asked += first.team.handler.asked
        first.folder.close()
        second = Loop(settings(folder), toy, Parrot(toy), Eye(), tracker=Listener(), draw=no_figures)
        again = list(second.run())
        assert len(asked + second.team.handler.asked) == 6
        assert [without_clock(r) for r in again] == [without_clock(r) for r in whole]


def without_clock(record: Round) -> dict[str, Any]:
    return {name: value for name, value in asdict(record).items() if name != "seconds"}


@pytest.mark.parametrize("policy", ["observe", "pseudo", "triage"])
def test_policies(policy: str, toy: SegData, tmp_path: Path) -> None:
    """Who chooses: the strategy among all, among what was not accepted, or the judge."""
    loop = Loop(settings(tmp_path / "run", policy=policy), toy, Parrot(toy), Eye())
    record = loop.run_round()
    loop.folder.close()
    free = [row["id"] for row in toy.train if row["id"] not in record.start_ids]
    rejected = [i for i in free if i != "toy-1"]
    assert record.judge["accepted"] == 1 and record.pseudo_ids == ([] if policy == "observe" else ["toy-1"])
    (chosen,) = record.selection["ids"]
    if policy == "triage":
        assert chosen in rejected and "rejected by the judge" in record.selection["reasons"][0]
    else:
        assert chosen == max(free if policy == "observe" else rejected)


def test_what_is_not_paid_is_not_seen(toy: SegData, tmp_path: Path) -> None:
    """The network learns from what was paid for; the rest of the pool, and the test split, cannot be read."""
    loop = Loop(settings(tmp_path / "run"), toy, Parrot(toy), Eye())
    record = loop.run_round()
    assert list(loop.team.learner.seen[0]) == record.start_ids
    with pytest.raises(LeakError, match="a mask of the pool"):
        loop.team.data.train[0]["mask"]
    with pytest.raises(LeakError, match="after the last round"):
        loop.test_round(0)
    loop.folder.close()


def test_a_judge_that_stops_is_asked_for_the_rest(toy: SegData, tmp_path: Path) -> None:
    """What it answered is kept and charged once; the same command goes on."""
    loop = Loop(settings(tmp_path / "run"), toy, Parrot(toy), Eye(stops_after=2), tracker=Listener(), draw=no_figures)
    with pytest.raises(JudgeError, match="the money is gone.*to go on from here"):
        list(loop.run())
    loop.folder.close()
    again = Loop(settings(tmp_path / "run"), toy, Parrot(toy), Eye(), tracker=Listener(), draw=no_figures)
    assert again.run_round().budget["judge_usd"] == 0.75
    assert len(again.team.handler.asked) == 1
    again.folder.close()


def test_a_whole_loop_takes_under_a_second(toy: SegData, tmp_path: Path) -> None:
    """The parts of a run are so loose that a whole one costs next to nothing (processor time)."""
    started = time.process_time()
    list(Loop(settings(tmp_path / "run"), toy, Parrot(toy), Eye(), tracker=Listener(), draw=no_figures).run())
    assert time.process_time() - started < 1
