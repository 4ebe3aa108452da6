"""The data set as the goal: a mask for every image, a line on each, the seconds in the ledger, killed or not."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlm_itl.core.checks import ConfigError
from vlm_itl.data.labels import VOID
from vlm_itl.data.masks import MaskStore, row_ids
from vlm_itl.data.scenes import make_scenes
from vlm_itl.data.sources import load_data, toy_images
from vlm_itl.experiment import label_turn as room
from vlm_itl.experiment.annotator import Oracle
from vlm_itl.experiment.config import make_config
from vlm_itl.experiment.export import run_masks
from vlm_itl.experiment.loop import run_al
from vlm_itl.judging.label_plan import LabelGoal
from vlm_itl.judging.measures import CHECK_SECONDS
from vlm_itl.model.metrics import image_iou
from vlm_itl.people import AnswerStore, Robot, Waiting, make_annotator, work

from faults import in_child, kill  # isort: skip

pytestmark = pytest.mark.usefixtures("undrawn")
N = 36


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes in VOC layout."""
    root = tmp_path_factory.mktemp("scenes") / "VOC2012"
    make_scenes(root, n_train=N, n_test=4, size=(48, 64), seed=1)
    return root


@pytest.fixture(scope="module")
def proposed(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Masks of another model: a third right, a third half, a third wrong; none for every ninth image."""
    folder = tmp_path_factory.mktemp("masks")
    data = load_data(str(scenes), val_share=0.1, leaks="off")
    for number, row in enumerate(r for split in (data.train, data.val) for r in split):
        mask = row["mask"].copy()
        if number % 3 == 1:
            mask[:, : mask.shape[1] // 2] = 0
        elif number % 3 == 2:
            mask = np.where(mask == 0, 1, 0).astype(np.uint8)
        if number % 9:
            Image.fromarray(mask).save(folder / f"{row['id']}.png")
    return folder


def settings(scenes: Path, proposed: Path, out: Path, **more: Any) -> dict[str, Any]:
    usual: dict[str, Any] = {
        "mode": "vlm", "dataset": str(scenes), "leaks": "off", "goal": "dataset", "proposer": "folder",
        "proposer_options": {"path": str(proposed)}, "judge_options": {"accuracy": 1.0}, "model": "cnn-nano",
        "image_size": 48, "steps": 0, "initial": 12, "increment": 1, "max_labelled": 12, "strategy": "random",
        "gallery": 0, "preflight": 0, "test_every_round": False, "output_dir": str(out),
    }  # fmt: skip
    return {**usual, **more}


def label(scenes: Path, proposed: Path, out: Path, **more: Any) -> dict[str, Any]:
    """Run it; the card, with the lines beside it."""
    list(run_al(make_config(settings(scenes, proposed, out, **more))))
    card: dict[str, Any] = json.loads((out / "labels" / "labels.json").read_text())
    lines = [json.loads(line) for line in (out / "labels" / "provenance.jsonl").read_text().splitlines()]
    return {**card, "lines": lines}


@pytest.fixture(scope="module")
def done(scenes: Path, proposed: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """One run, whole."""
    out = tmp_path_factory.mktemp("run") / "run"
    return label(scenes, proposed, out, goal_options={"quality": 0.7}), out


def test_every_image_has_a_mask_and_a_line(done: tuple[dict[str, Any], Path], scenes: Path) -> None:
    """Masks of people are the truth; accepted and verified ones are the proposals, to the pixel."""
    card, out = done
    data = load_data(str(scenes), val_share=0.1, leaks="off")
    truth, store = {r["id"]: r["mask"] for r in data.train}, MaskStore(out / "labels" / "masks", data.labels)
    assert sorted(line["id"] for line in card["lines"]) == sorted(truth) and card["images"] == len(truth)
    proposals = MaskStore(next((out / "proposals").glob("0_*")) / "masks", data.labels)
    for line in card["lines"]:
        mask, people = store[line["id"]], line["by"] in ("human", "corrected")
        wanted = truth[line["id"]] if people else proposals[line["id"]]
        assert (mask == wanted).all(), line
        assert line["by"] != "verified" or image_iou(mask, truth[line["id"]], len(data.labels)) >= 0.7
    assert {"judge", "human"} <= set(card["by"]) and sum(card["by"].values()) == len(truth)
    quality = np.mean([image_iou(store[i], truth[i], len(data.labels)) for i in truth])
    assert card["measured"]["quality"] == pytest.approx(quality) and quality >= 0.7


def test_the_seconds_add_up(done: tuple[dict[str, Any], Path]) -> None:
    """Image by image, in the ledger, and by hand for those that were drawn or looked at."""
    card, out = done
    new = [line for line in card["lines"] if line["human_seconds"] is not None]
    assert card["human_seconds"]["labels"] == pytest.approx(sum(line["human_seconds"] for line in new), abs=0.01)
    assert card["budget"]["human_seconds"] == pytest.approx(sum(card["human_seconds"].values()))
    for line in new:
        expected = {"human": 239.7, "judge": 0.0, "verified": CHECK_SECONDS}.get(line["by"])
        assert expected is None or line["human_seconds"] == pytest.approx(expected)
        assert line["by"] != "corrected" or 0 < line["human_seconds"] <= 239.7 + CHECK_SECONDS
    drawn = [line for line in new if line["proposer"] is None]
    assert drawn and all(line["by"] == "human" for line in drawn)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["labelled_pool"]["promise"] == card["promise"] and summary["simulated"]
    assert summary["labels"][0] == "background"  # the names of the classes stay


def test_the_judge_is_asked_about_no_more_than_its_limit(scenes: Path, proposed: Path, tmp_path: Path) -> None:
    """The labelling at the end as well: what is beyond the limit has no judge's word and is corrected by people."""
    card = label(scenes, proposed, tmp_path / "run", goal_options={"quality": 0.7}, judge_limit=3)
    truth = {r["id"]: r["mask"] for r in load_data(str(scenes), val_share=0.1, leaks="off").train}
    judged = [line for line in card["lines"] if line["p_yes"] is not None]
    others = [line for line in card["lines"] if line["proposer"] is not None and line["p_yes"] is None]
    assert 3 < len(judged) <= 6 and all(
        line["judge"] == "mock" for line in judged
    )  # three of the round are still known
    assert others and {(line["by"], line["judge"]) for line in others} == {("corrected", None)}
    store = MaskStore(tmp_path / "run" / "labels" / "masks", load_data(str(scenes), leaks="off").labels)
    assert all((store[line["id"]] == truth[line["id"]]).all() for line in others)
    seconds = card["measured"]["curve"]["seconds"]
    assert min(seconds) >= sum(line["human_seconds"] for line in others)  # no plan leaves them out
    assert card["measured"]["quality"] >= 0.7


def test_a_finished_run_is_read(done: tuple[dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    card, out = done
    monkeypatch.setattr(Oracle, "fix", None)
    before = {path: path.stat().st_mtime_ns for path in (out / "labels").rglob("*")}
    given = json.loads((out / "config.json").read_text())
    config = make_config({k: v for k, v in given.items() if k != "version"})
    list(run_al(config))
    assert {path: path.stat().st_mtime_ns for path in (out / "labels").rglob("*")} == before


@pytest.mark.parametrize("at", [1, 3])
def test_killed_while_people_label_it_ends_the_same(
    at: int, done: tuple[dict[str, Any], Path], scenes: Path, proposed: Path, tmp_path: Path
) -> None:
    """A real SIGKILL at a correction; the same command again."""
    card, whole = done
    config = make_config(settings(scenes, proposed, tmp_path / "run", goal_options={"quality": 0.7}))
    count, fix = 0, Oracle.fix

    def stop(self: Oracle, *args: Any) -> None:
        nonlocal count
        count += 1
        if count == at:
            kill()
        fix(self, *args)

    def work() -> None:
        Oracle.fix = stop  # type: ignore[method-assign]
        list(run_al(config))

    assert in_child(work)[0] == -signal.SIGKILL
    assert not (tmp_path / "run" / "labels").exists() and (tmp_path / "run" / "round_000").is_dir()
    again = label(scenes, proposed, tmp_path / "run", goal_options={"quality": 0.7})
    assert again == card
    for path in (whole / "labels" / "masks").iterdir():
        assert path.read_bytes() == (tmp_path / "run" / "labels" / "masks" / path.name).read_bytes()
    assert not list((tmp_path / "run").glob(".labels")) and not os.listdir(tmp_path / "run").count(".work_001")


def test_truth_that_nobody_paid_for_changes_nothing(
    done: tuple[dict[str, Any], Path], scenes: Path, proposed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read for measuring may be anything: actions, masks and seconds stay."""
    card, _ = done
    truth = Oracle.truth_for_measuring
    monkeypatch.setattr(Oracle, "truth_for_measuring", lambda self, i: np.full_like(truth(self, i), VOID))
    monkeypatch.setattr(room, "image_iou", _nan_is_zero)
    spoilt = label(scenes, proposed, tmp_path / "run", goal_options={"quality": 0.7})
    assert spoilt["lines"] == card["lines"] and spoilt["human_seconds"] == card["human_seconds"]


def _nan_is_zero(*masks: Any) -> float:
    return float(np.nan_to_num(image_iou(*masks)))


def test_a_judge_that_learns_is_asked_about_what_it_has_not_seen(
    scenes: Path, proposed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No mask of the sample is among those that the judge learnt from when it was asked about it."""
    taught: list[set[str]] = []
    told = room.ask_judge
    teach_apart = room._teach_apart

    def listen(team: Any, state: Any, part: Any, left_out: Any) -> None:
        taught.append(set(left_out))
        teach_apart(team, state, part, left_out)
        learnt = {str(i) for lesson in team.handler._lessons for i in lesson.segments.ids}
        assert learnt and not learnt & set(left_out)

    monkeypatch.setattr(room, "_teach_apart", listen)
    monkeypatch.setattr(room, "ask_judge", told)
    card = label(
        scenes, proposed, tmp_path / "run", judge="learned", judge_options={"folds": 2}, initial=16, max_labelled=16
    )
    assert len(taught) == room.APART and sum(map(len, taught)) == 16 and card["sample"] == 16 + 4
    assert not card["simulated"]


@pytest.mark.parametrize(
    "more",
    [
        {"judge": "confidence", "judge_options": {}},
        {"proposer": "own", "proposer_options": {}},
        {"cold_start": "typiclust"},
    ],
)
def test_where_chance_or_distance_is_missing_only_validation_counts(
    more: dict[str, Any], scenes: Path, proposed: Path, tmp_path: Path
) -> None:
    card = label(scenes, proposed, tmp_path / "run", **more)
    assert card["sample"] == 4 and card["images"] == N - 4


def test_one_frame_of_each_film_tells_how_good_masks_are(
    scenes: Path, proposed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pairs of pictures that belong together: the promise is made on one of each, of validation and of the start."""
    known, data = room.known_sample, load_data(str(scenes), val_share=0.1, leaks="off")
    names = sorted(row["id"] for split in data.splits.values() for row in split)
    films = {name: f"film {place // 2}" for place, name in enumerate(names)}
    samples: list[list[str]] = []

    def watched(team: Any, ids: Any, *rest: Any) -> Any:
        samples.append([*ids])
        return known(team, ids, *rest)

    monkeypatch.setattr(room, "known_sample", watched)
    more = {"goal_options": {"quality": 0.7}, "data_options": {"groups": films}, "judge_options": {"accuracy": 0.9}}
    label(scenes, proposed, tmp_path / "run", **more)
    for ids in samples[:2]:
        assert ids and len({films[name] for name in ids}) == len(ids)
    assert len(samples[0]) < 12 and len(samples[1]) == 2  # some of the twelve at the start are pairs; two in validation


@pytest.mark.parametrize(("more", "by_chance"), [({}, 6), ({"cold_start": "typiclust"}, 0)])
def test_what_a_strategy_took_helps_no_promise(
    more: dict[str, Any], by_chance: int, scenes: Path, proposed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have left what is bad: only images that chance took allow more loss in the rest."""
    planned, shares = room.plan_labels, list[float]()

    def watched(sample: Any, p_yes: Any, goal: Any, cost: Any, mask: Any, done: float, **rest: Any) -> Any:
        shares.append(done)
        return planned(sample, p_yes, goal, cost, mask, done, **rest)

    monkeypatch.setattr(room, "plan_labels", watched)
    card = label(scenes, proposed, tmp_path / "run", initial=6, increment=6, **more)
    assert shares == [by_chance / card["images"]] and card["by"]["human"] >= 12


@pytest.mark.drawn
def test_images_of_which_nobody_knows_anything_count_as_right(scenes: Path, proposed: Path, tmp_path: Path) -> None:
    """A third of the masks void everywhere: the quality is a number, and the figures are drawn."""
    root = tmp_path / "scenes"
    shutil.copytree(scenes, root)
    for path in sorted((root / "SegmentationClass").glob("train_*.png"))[::3]:
        with Image.open(path) as mask:
            Image.fromarray(np.full(mask.size[::-1], VOID, np.uint8)).save(path)
    card = label(root, proposed, tmp_path / "run", gallery=1, goal_options={"quality": 0.7})
    assert 0.7 <= card["measured"]["quality"] <= card["measured"]["draw_all"]["quality"]
    assert (tmp_path / "run" / "summary.json").is_file() and list((tmp_path / "run" / "figures").glob("*.png"))


@pytest.mark.parametrize("asked_for", ["all", "some"])
def test_masks_that_were_there_before_are_not_called_drawn_by_chance(asked_for: str) -> None:
    """Who drew them may have chosen them: the promise names its condition."""
    toy = toy_images()
    everyone = {*row_ids(toy.train), *row_ids(toy.val)}
    desk = SimpleNamespace(covers=frozenset(everyone if asked_for == "all" else everyone - {row_ids(toy.val)[0]}))
    team: Any = SimpleNamespace(data=toy, annotator=SimpleNamespace(desk=desk, ids=row_ids(toy.train)))
    plan: Any = {"price": 1.0, "bound": 0.1, "n": 12}
    for goal, word in ((LabelGoal(bad=0.2), "10.0%"), (LabelGoal(quality=0.8), "0.900")):
        told = room.promise(goal, plan, 0.0, room.masks_before(team))
        assert word in told and ("drawn by chance" in told) == (asked_for == "all")
        assert ("it holds if chance had chosen them" in told) == (asked_for == "some")
    team.annotator.desk = None  # a simulation: the start was drawn
    assert not room.masks_before(team)


def test_share_of_bad_masks(scenes: Path, proposed: Path, tmp_path: Path) -> None:
    card = label(scenes, proposed, tmp_path / "run", goal_options={"bad": 0.3}, initial=20, max_labelled=20)
    assert card["measured"]["bad"] <= 0.3 and "at most" in card["promise"]


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"mode": "al"}, "mode='vlm'"),
        ({"unit": "region"}, "unit='image'"),
        ({"goal": "model", "goal_options": {"bad": 0.1}}, "set it"),
        ({"goal_options": {"qualty": 0.8}}, "no 'qualty'"),
        ({"goal_options": {"quality": 2}}, "goal: quality"),
        ({"goal": "data"}, "goal"),
    ],
)
def test_goals_that_cannot_be_are_refused(more: dict[str, Any], word: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=word):
        make_config({"mode": "vlm", "goal": "dataset", "output_dir": str(tmp_path), **more})


def test_without_any_proposal_of_a_known_image_one_line_says_so(scenes: Path, proposed: Path, tmp_path: Path) -> None:
    few = tmp_path / "few"
    few.mkdir()
    config = make_config(settings(scenes, few, tmp_path / "run"))
    known = {r["id"] for r in load_data(str(scenes), val_share=0.1, leaks="off").val}
    for path in sorted(proposed.glob("*.png")):
        if path.stem not in known:
            os.link(path, few / path.name)
    with pytest.raises(ConfigError, match="no image with a human mask has a proposal"):
        monkey = make_config({**config.to_dict(), "cold_start": "typiclust"})
        list(run_al(monkey))


@pytest.mark.parametrize("goal", [{"quality": 0.7}, {"bad": 0.3}])
def test_people_label_the_pool_as_the_simulation_does(
    scenes: Path, proposed: Path, tmp_path: Path, goal: dict[str, float]
) -> None:
    """Asked in batches, answered by a robot who knows the masks: the same masks, and seconds that were measured."""
    free = {"judge": "confidence", "judge_options": {}, "goal_options": goal}
    simulated = label(scenes, proposed, tmp_path / "simulated", **free)
    data = load_data(str(scenes), leaks="off")
    truth = {row["id"]: row["mask"] for rows in data.splits.values() for row in rows}
    robot, batches = Robot(truth.__getitem__, data.labels), 0
    while True:
        try:
            drawn = label(scenes, proposed, tmp_path / "people", **free, annotator="folder", start="drawn")
            break
        except Waiting:
            batches += work(robot, make_annotator("folder", tmp_path / "people/people", data.labels)) > 0
    told = ("id", "by", "proposer", "p_yes")
    assert [[line[k] for k in told] for line in drawn["lines"]] == [[x[k] for k in told] for x in simulated["lines"]]
    stores = [MaskStore(tmp_path / where / "labels/masks", data.labels) for where in ("people", "simulated")]
    assert all(np.array_equal(*(store[line["id"]] for store in stores)) for line in drawn["lines"])
    trusted = any(line["by"] in ("judge", "verified") for line in drawn["lines"])
    assert (drawn["measured"] is None) == trusted and not drawn["simulated"] and 2 <= batches <= 3
    seconds = [line["seconds"] for line in AnswerStore(tmp_path / "people/answers", data.labels).lines().values()]
    assert drawn["budget"]["human_seconds"] == pytest.approx(sum(seconds), abs=0.01)
    assert sum(drawn["budget"][name] for name in ("timed_masks", "timed_checks", "fixes")) == len(seconds)
    rows, answers = (
        {row.id: row for row in run_masks(tmp_path / "people")},
        AnswerStore(tmp_path / "people/answers", data.labels),
    )
    given = {i: line for i, line in answers.lines().items() if line["kind"] != "verify"}
    assert {*rows} == {line["id"] for line in drawn["lines"]} | {*given}  # those for validation and test, too
    for name, line in given.items():
        assert rows[name].who == line["who"] == "robot" and rows[name].seconds >= line["seconds"] - 0.001
        assert np.array_equal(rows[name].mask, truth[name])


def test_what_people_skipped_is_no_mask_of_the_data_set(scenes: Path, proposed: Path, tmp_path: Path) -> None:
    """Void all over, said to be drawn by a human; and seconds that nobody has measured are not told as if."""
    data, folder = load_data(str(scenes), leaks="off"), tmp_path / "run"
    free = {"judge": "confidence", "judge_options": {}, "annotator": "folder", "start": "drawn"}
    truth = {row["id"]: row["mask"] for rows in data.splits.values() for row in rows}
    robot, skipped = Robot(truth.__getitem__, data.labels), ""
    while True:
        try:
            label(scenes, proposed, folder, **free)
            break
        except Waiting:
            annotator = make_annotator("folder", folder / "people", data.labels)
            for request in annotator.left():
                answer = replace(robot.answer(request), seconds=None)
                pool = request.id in {*row_ids(data.train)}
                if pool and request.kind == "draw" and not skipped:
                    skipped, answer = request.id, replace(answer, verdict="skipped", mask=None)
                annotator.deliver(answer)
    rows = {row.id: row for row in run_masks(folder)}
    assert skipped and skipped not in rows
    assert {row.seconds for row in rows.values() if row.by in ("human", "corrected")} == {None}
