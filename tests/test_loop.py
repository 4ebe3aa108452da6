"""The whole loop on six images that one can count, with a network that has never seen a tensor: nothing is trained."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from vlm_itl.core.checks import JudgeError, LeakError
from vlm_itl.data.masks import MaskStore, row_ids
from vlm_itl.data.sources import SegData, toy_images
from vlm_itl.experiment.config import Config, make_config
from vlm_itl.experiment.loop import Loop
from vlm_itl.experiment.state import Round
from vlm_itl.model.scoring import PoolScores
from vlm_itl.model.train import FitResult
from vlm_itl.vlm.handler import Judgement, JudgeStopped, VLMHandler


class Parrot:
    """Learns nothing but how many rows it was shown; the masks it predicts for some images are right."""

    segmenter = None

    def __init__(self, data: SegData, right: Sequence[str] = ("toy-1",)) -> None:
        self.notes: list[str] = []
        self.truth = {row["id"]: row["mask"] for split in (data.train, data.val) for row in split}
        self.right, self.rows, self.seen = set(right), 0, []

    def restart(self) -> None:
        self.rows = 0

    def load(self, folder: Path) -> None:
        self.rows = int((folder / "rows.txt").read_text())

    def fit(self, rows: datasets.Dataset, validation: datasets.Dataset, desc: str, checkpoints: Path) -> FitResult:
        self.seen.append({row["id"]: row["mask"] for row in rows})
        self.rows = len(rows)
        return FitResult(steps=0, train_loss=0.0)

    def evaluate(self, rows: datasets.Dataset, desc: str) -> dict[str, Any]:
        return {"mean_iou": self.rows / 10, "pixel_accuracy": self.rows / 10, "images": len(rows)}

    def look(self, images: datasets.Dataset, masks: MaskStore | None = None, **options: Any) -> PoolScores:
        ids = row_ids(images)
        for image_id in ids if masks is not None else ():
            truth = self.truth[image_id]
            masks.write(image_id, truth if image_id in self.right else np.full_like(truth, 2))
        scores = {"entropy-mean": np.array([float(i[-1]) for i in ids], np.float32)}  # the last one is the least sure
        return PoolScores(ids, scores, np.zeros((len(ids), 2), np.float32), np.zeros((len(ids), 3), np.float32))

    def look_at_regions(self, images: datasets.Dataset, regions: Any, **options: Any) -> PoolScores:
        raise AssertionError("images are asked for here")

    def earlier(self, folders: Sequence[Path]) -> list[Any]:
        return []

    def save(self, folder: Path, pictures: Sequence[Any]) -> None:
        folder.mkdir()
        (folder / "rows.txt").write_text(str(self.rows))


class Listener:
    """A tracker that remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[int] = []
        self.summary: dict[str, Any] = {}

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def log_round(self, record: dict[str, Any], folder: Path) -> None:
        self.told.append(record["index"])

    def finish(self, summary: dict[str, Any], figures: Any) -> None:
        self.summary = summary


class Eye(VLMHandler):
    """Says yes to masks with more than one class, and remembers whom it was asked about."""

    name = "eye"
    batch_size = 1

    def __init__(self, stops_after: int = 99) -> None:
        self.asked: list[str] = []
        self.stops_after = stops_after

    def _judge_one(self, query: Any) -> Judgement:
        if len(self.asked) >= self.stops_after:
            raise JudgeStopped("the money is gone.", {})
        self.asked.append(query.id)
        verdict = "yes" if len(np.unique(query.mask)) > 1 else "no"
        return Judgement(verdict, p_yes=float(verdict == "yes"), usd=0.25)


@pytest.fixture
def toy() -> SegData:
    return toy_images()


def no_figures(folder: Path) -> list[Path]:
    return []


def settings(folder: Path, **more: Any) -> Config:
    small = {"mode": "vlm", "initial": 1, "increment": 1, "max_labelled": 3, "gallery": 0, "preflight": 0, "steps": 0}
    return make_config({**small, "output_dir": str(folder), **more})


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
