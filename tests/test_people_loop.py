"""A run whose masks people give: it asks, rests, goes on, and ends as the simulation does."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from toyloop import Eye, Listener, Parrot, no_figures, settings, toy_loop

from vlm_itl.core.checks import ConfigError, DataError
from vlm_itl.data.labels import VOID
from vlm_itl.data.masks import raw_rows
from vlm_itl.data.meaning import read_spec
from vlm_itl.data.sources import SegData, toy_images
from vlm_itl.experiment.acceptance import share_left
from vlm_itl.experiment.annotator import asked_of_people
from vlm_itl.experiment.config import make_config
from vlm_itl.experiment.export import export_run, run_masks
from vlm_itl.experiment.loop import Loop, run_al
from vlm_itl.formats import read_masks
from vlm_itl.people.account import LEAST_TIMED, WorkCosts, measured_costs, people_account
from vlm_itl.people.desk import Desk, Photographs
from vlm_itl.people.requests import (
    Annotator,
    Answer,
    AnswerStore,
    Asked,
    Request,
    Waiting,
    make_annotator,
    register_annotator,
)
from vlm_itl.people.robot import Robot, work
from vlm_itl.proposals.correction import CorrectionCost
from vlm_itl.reports.cards import model_card
from vlm_itl.reports.report import round_table
from vlm_itl.reports.run_figures import people_rows, plot_judge, plot_learning_curve, save_figures

TOY = toy_images()
TRUTH = {row["id"]: row["mask"] for rows in (TOY.train, TOY.val, TOY.test) for row in rows}


class Table(Annotator):
    """Questions on a table; the answers are kept in a dictionary, as a tool would keep them."""

    given: dict[str, Answer]

    def ask(self, requests: Any) -> None:
        self.asked.add(requests)

    def answered(self) -> dict[str, Answer]:
        return {i: answer for i, answer in self.given.items() if i in self.asked.all()}

    def waiting(self) -> str:
        return f"waiting for {len(self.left())} masks: on the table"


def people_loop(folder: Path, given: dict[str, Answer], data: SegData | None = None, **more: Any) -> Loop:
    """The toy loop, its masks on the table."""
    config, data = settings(folder, **more), data or toy_images()
    table = Table(folder / "people", data.labels)
    table.given = given
    photographs = Photographs(folder / "people/photographs", data.train, data.val, data.test)
    desk = Desk(folder, table, photographs, asked_of_people(config.start, data))
    parrot = Parrot(toy_images())
    return Loop(config, data, parrot, Eye(), tracker=Listener(), draw=no_figures, desk=desk)


def answer(request: Any, good: bool = True, **more: Any) -> Answer:
    """What a person says who knows the truth."""
    if request.kind == "verify":
        found = "accepted" if good else "rejected"
        return Answer(request.id, "verify", found, request.proposal if good else None, seconds=2.0, **more)
    verdict = {"draw": "drawn", "fix": "fixed"}[request.kind]
    return Answer(request.id, request.kind, verdict, TRUTH[request.image_id], seconds=10.0, **more)


def to_the_end(folder: Path, given: dict[str, Answer], one_by_one: bool = False, **more: Any) -> tuple[Any, list[Any]]:
    """Run, answer what is asked, run again; the summary, and what was asked each time."""
    asked = []
    for _ in range(40):
        loop = None
        try:
            loop = people_loop(folder, given, **more)
            list(loop.run())
            return json.loads((folder / "summary.json").read_text()), asked
        except Waiting as rest:
            assert "Run the same again" in str(rest)
            if loop is not None:
                loop.folder.close()
            table = Table(folder / "people", TOY.labels)
            table.given = given
            left = table.left()
            asked.append([(r.id.partition("~")[0], r.kind) for r in left])
            for request in left[:1] if one_by_one else left:
                given[request.id] = answer(request, good=more.get("good", True))
    raise AssertionError("it never ends")


def lines(folder: Path) -> list[dict[str, Any]]:
    """The rounds, without what differs on purpose: money, time, and what nobody can know."""
    found = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    return [{k: v for k, v in one.items() if k not in ("budget", "seconds", "judge")} for one in found]


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"audit": 0.02},
        {"policy": "fix", "audit": 1.0},
        {"policy": "fix"},
        {"policy": "triage"},
        {"mode": "al"},
        {"policy": "observe"},
    ],
)
@pytest.mark.parametrize("one_by_one", [False, True])
def test_people_and_simulation_end_alike(tmp_path: Path, more: dict[str, Any], one_by_one: bool) -> None:
    summary, asked = to_the_end(tmp_path / "people", {}, one_by_one, **more)
    list(toy_loop(settings(tmp_path / "simulated", **more)).run())
    assert lines(tmp_path / "people") == lines(tmp_path / "simulated")
    simulated = json.loads((tmp_path / "simulated/summary.json").read_text())
    assert summary["test"] == simulated["test"] and not summary["simulated"]
    assert sorted(asked[0]) == [("toy-2", "draw"), ("toy-4", "draw")]  # the start and validation, in one go
    store = (tmp_path / "people/answers/answers.jsonl").read_text().splitlines()
    seconds = sum(json.loads(line)["seconds"] for line in store if line)
    assert summary["budget"]["human_seconds"] == seconds  # every second that was measured, and no other


def test_the_judge_is_measured_on_what_people_answer(tmp_path: Path) -> None:
    to_the_end(tmp_path, {})
    found = [json.loads(line)["judge"] for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    assert [one["n"] for one in found] == [0, 0, 0] and found[0]["images"] == 3
    assert "answered" not in found[0] and found[1]["answered"]["n"] == 1 and found[1]["answered"]["round"] == 0


def test_a_plan_reckons_with_what_people_took_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm_itl.people.account.LEAST_TIMED", 2)
    more = {"goal": "dataset", "initial": 1, "max_labelled": 2, "mask_seconds": 239.7}
    _, asked = to_the_end(tmp_path, {}, one_by_one=True, **more)
    card = json.loads((tmp_path / "labels/labels.json").read_text())
    before = [one for turn in asked[:-1] for one in turn[:1]]
    drawn = {name for name, kind in before if kind == "draw"} - set(card_of_plan(tmp_path))
    assert card["work"]["mask"] == 10.0 and card["work"]["timed"] == {"draw": len(drawn)}  # not those of the plan
    assert card["work"]["check"] == 9.0  # nobody was timed while looking
    list(toy_loop(settings(tmp_path / "simulated", **more)).run())
    simulated = json.loads((tmp_path / "simulated/labels/labels.json").read_text())
    assert (simulated["work"]["mask"], simulated["work"]["timed"]) == (239.7, {})


def card_of_plan(folder: Path) -> list[str]:
    """The images that a plan had people draw."""
    lines = [json.loads(line) for line in (folder / "labels/provenance.jsonl").read_text().splitlines()]
    return [line["id"] for line in lines if line["human_seconds"] is not None]


def test_what_people_find_bad_trains_nobody(tmp_path: Path) -> None:
    given: dict[str, Answer] = {}
    to_the_end(tmp_path / "good", given)
    bad: dict[str, Answer] = {}
    for _ in range(10):
        loop = None
        try:
            loop = people_loop(tmp_path / "bad", bad, audit=0.02)
            list(loop.run())
            break
        except Waiting:
            if loop is not None:
                loop.folder.close()
            table = Table(tmp_path / "bad/people", TOY.labels)
            table.given = bad
            bad |= {r.id: answer(r, good=False) for r in table.left()}
    assert [one["pseudo"] for one in lines(tmp_path / "good")] == [0, 1, 1]
    assert [one["pseudo"] for one in lines(tmp_path / "bad")] == [0, 0, 0]
    assert lines(tmp_path / "bad")[1]["pseudo_ids"] == []  # and it is not accepted again


class Misled(Parrot):
    """Predicts a mask of several classes for toy-1, and it is wrong."""

    def look(self, images: Any, masks: Any = None, **options: Any) -> Any:
        scores = super().look(images, masks, **options)
        if masks is not None and "toy-1" in scores.ids:
            masks.write("toy-1", np.ascontiguousarray(TRUTH["toy-1"].T[::-1]))
        return scores


def put_right_loop(folder: Path, desk: bool, one_by_one: bool = False) -> list[Any]:
    """A run whose accepted mask is bad, and put right by whoever looks at it: what the network learnt from."""
    more = {"audit": 1.0, "max_labelled": 4, "annotator_options": {} if desk else {"puts_right": True}}
    helper = Robot(TRUTH.__getitem__, TOY.labels, puts_right=True)
    given: dict[str, Answer] = {}
    for _ in range(30):
        data, loop, parrot = toy_images(), None, Misled(toy_images())
        table = Table(folder / "people", TOY.labels)
        table.given = given
        photographs = Photographs(folder / "people/photographs", data.train, data.val, data.test)
        people = Desk(folder, table, photographs, asked_of_people("", data)) if desk else None
        try:
            loop = Loop(settings(folder, **more), data, parrot, Eye(), tracker=Listener(), draw=no_figures, desk=people)
            list(loop.run())
            return parrot.seen
        except Waiting:
            if loop is not None:
                loop.folder.close()
            left = table.left()
            given |= {request.id: helper.answer(request) for request in (left[:1] if one_by_one else left)}
    raise AssertionError("it never ends")


@pytest.mark.parametrize("one_by_one", [False, True])
def test_what_people_put_right_is_theirs(tmp_path: Path, one_by_one: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    put_right_loop(tmp_path / "people", True, one_by_one)
    put_right_loop(tmp_path / "simulated", False)
    assert lines(tmp_path / "people") == lines(tmp_path / "simulated")
    rounds = [json.loads(line) for line in (tmp_path / "people/rounds.jsonl").read_text().splitlines()]
    assert rounds[0]["pseudo_ids"] == ["toy-1"] and [r["pseudo"] for r in rounds] == [0, 0, 0, 0]
    assert rounds[1]["judge"]["audited"] == {"checked": ["toy-1"], "bad": ["toy-1"], "fixed": ["toy-1"]}
    assert [r["labelled"] for r in rounds] == [1, 3, 3, 4]
    books = [json.loads((tmp_path / name / "summary.json").read_text())["budget"] for name in ("people", "simulated")]
    assert books[0]["fixes"] == 1 and books[0]["human_seconds"] == pytest.approx(books[1]["human_seconds"])
    store = (tmp_path / "people/answers/answers.jsonl").read_text().splitlines()
    said = {line["id"]: line for line in map(json.loads, filter(None, store))}
    assert books[0]["human_seconds"] == pytest.approx(sum(line["seconds"] for line in said.values()))
    assert said["toy-1"]["kind"] == "fix" and said["toy-1"]["seconds"] > 9
    monkeypatch.setattr("vlm_itl.experiment.export.data_of_run", lambda config: toy_images())
    rows = {row.id: row for row in run_masks(tmp_path / "people")}
    assert rows["toy-1"].by == "corrected" and rows["toy-1"].seconds == said["toy-1"]["seconds"]
    assert np.array_equal(rows["toy-1"].mask, TRUTH["toy-1"])


def test_what_was_put_right_is_trained_on(tmp_path: Path) -> None:
    seen = put_right_loop(tmp_path, False)
    assert "toy-1" not in seen[0] and all(np.array_equal(rows["toy-1"], TRUTH["toy-1"]) for rows in seen[1:])


def test_a_judge_that_reads_the_truth_is_refused(tmp_path: Path) -> None:
    from vlm_itl.vlm.simulated import MockHandler

    data = toy_images()
    table = Table(tmp_path / "people", data.labels)
    table.given = {}
    desk = Desk(tmp_path, table, Photographs(tmp_path / "photographs", data.train), ["toy-0"])
    with pytest.raises(ConfigError, match="reads the true masks"):
        Loop(settings(tmp_path / "run"), data, Parrot(data), MockHandler(), desk=desk)


@pytest.mark.parametrize(
    "more, words",
    [
        ({}, "needs 10 of them in round 0, and there are 1: set initial to 10"),
        ({"acceptance": "certified"}, "can accept nothing: .* validation masks, and there are 1"),
    ],
)
def test_what_cannot_be_is_said_before_people_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], words: str
) -> None:
    """Not when they have drawn all that a run needs before its first training."""
    if not more:
        monkeypatch.setattr(Eye, "least_labelled", 10)
    with pytest.raises(ConfigError, match=words):
        people_loop(tmp_path, {}, **more)
    assert not (tmp_path / "people" / "asked.jsonl").exists()


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"annotator": "nobody"}, "annotator=.nobody. is not known"),
        ({"annotator": "folder", "annotator_options": {"colour": 1}}, "has no option 'colour'"),
        ({"annotator_options": {"url": "x"}}, "need people"),
        ({"start": "labelled"}, "need people"),
        ({"annotator": "folder", "unit": "region"}, "unit='image'"),
        ({"annotator": "folder", "mode": "baseline"}, "mode al or vlm"),
        ({"annotator": "folder", "start": "some"}, "start=.some. is not known"),
        ({"wait": -1}, "wait"),
    ],
)
def test_settings_that_cannot_be(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_config(wrong)


def test_an_answer_that_is_edited_later_is_told_and_not_taken(tmp_path: Path) -> None:
    given: dict[str, Answer] = {}
    for _ in range(2):
        with pytest.raises(Waiting):
            loop = people_loop(tmp_path, given)
            try:
                list(loop.run())
            finally:
                loop.folder.close()
        table = Table(tmp_path / "people", TOY.labels)
        table.given = given
        if not given:
            given |= {r.id: answer(r) for r in table.left()}
    given["toy-2"] = Answer("toy-2", "draw", "drawn", TRUTH["toy-0"])
    with pytest.warns(UserWarning, match="changed after the run had taken it"):
        loop = people_loop(tmp_path, given)
    with pytest.raises(Waiting):
        list(loop.run())
    assert (loop.team.annotator.labelled(["toy-2"])[0]["mask"] == TRUTH["toy-2"]).all()
    loop.folder.close()


def test_who_skips_an_image_teaches_nothing_and_is_not_asked_again(tmp_path: Path) -> None:
    given = {"toy-2": Answer("toy-2", "draw", "skipped", None, seconds=1.0), "toy-4": answer_of("toy-4")}
    loop = people_loop(tmp_path, given)
    with pytest.raises(Waiting):
        list(loop.run())
    assert (loop.team.annotator.labelled(["toy-2"])[0]["mask"] == VOID).all()
    assert loop.state.ledger.human_seconds == 11
    loop.folder.close()


def answer_of(image_id: str) -> Answer:
    """Drawn from nothing."""
    return Answer(image_id, "draw", "drawn", TRUTH[image_id], seconds=10.0)


def test_what_has_a_mask_is_the_start(tmp_path: Path) -> None:
    from dataclasses import replace

    data = replace(toy_images(), unlabelled=frozenset({"toy-1", "toy-3"}))
    loop = people_loop(tmp_path, {}, data, max_labelled=4)
    with pytest.raises(Waiting):
        list(loop.run())
    assert loop.rounds[0].start_ids == ["toy-0", "toy-2"] and loop.team.schedule == [2, 3, 4]
    assert set(loop.rounds[0].selection["ids"]) <= {"toy-1", "toy-3"}
    loop.folder.close()


def test_what_has_a_mask_is_not_called_chance(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    """Nobody knows whether chance had chosen it: the promise is about what is left, and says on what it rests."""
    from dataclasses import replace

    import vlm_itl.experiment.loop

    monkeypatch.setattr(vlm_itl.experiment.loop, "check_certifiable", lambda *_: None)  # one mask is too few
    certified = {"acceptance": "certified", "alpha": 0.9, "delta": 0.9, "max_labelled": 4}
    data = replace(toy_images(), unlabelled=frozenset({"toy-1", "toy-3"}))
    loop = people_loop(tmp_path / "labelled", {}, data, **certified)
    assert [share_left(loop.team, taken) for taken in (0, 1)] == [0.5, 0.25]
    with pytest.raises(Waiting):
        list(loop.run())
    loop.folder.close()
    assert "1 of 1 validation images had masks before people were asked" in capsys.readouterr().out
    with pytest.raises(Waiting) as rest:
        people_loop(tmp_path / "drawn", {}, initial=2, **certified)
    assert "had masks before" not in capsys.readouterr().out + str(rest.value)


def test_the_first_batch_holds_what_is_tested_on(tmp_path: Path) -> None:
    from dataclasses import replace

    data = replace(toy_images(), unlabelled=frozenset(TRUTH))
    with pytest.raises(Waiting, match="3 masks"):
        people_loop(tmp_path, {}, data)
    summary, asked = to_the_end(tmp_path, {}, data=data)
    assert sorted(asked[0]) == [("toy-2", "draw"), ("toy-4", "draw"), ("toy-5", "draw")]
    assert summary["budget"]["test_images"] == 1 and summary["budget"]["images"] == 5


def test_another_seed_does_not_take_over_what_people_were_asked(tmp_path: Path) -> None:
    with pytest.raises(Waiting):
        people_loop(tmp_path, {})
    with pytest.raises(Exception, match="seed"):
        people_loop(tmp_path, {}, seed=1)


def test_masks_come_back_as_they_were_drawn(tmp_path: Path) -> None:
    given: dict[str, Answer] = {}
    to_the_end(tmp_path, given, mode="al")
    loop = people_loop(tmp_path, given, mode="al")
    for row in loop.team.annotator.labelled(loop.state.pool.human):
        assert np.array_equal(row["mask"], TRUTH[row["id"]])
    loop.folder.close()


def test_some_corrections_are_drawn_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm_itl.experiment.state.AGAIN", 1.0)
    given: dict[str, Answer] = {}
    summary, asked = to_the_end(tmp_path / "people", given, policy="fix")
    again = [i for i in given if i.endswith("~again")]
    assert again and summary["budget"]["again"] == len(again)
    assert summary["budget"]["human_seconds"] == sum(a.seconds or 0 for a in given.values())
    agreement = summary["people"]["agreement"]
    assert (agreement["n"], agreement["iou"], agreement["bias"]) == (len(again), 1.0, 0.0) and agreement["before"] < 1
    assert summary["people"]["kinds"]["fix"]["n"] == len([a for a in given.values() if a.kind == "fix"])
    list(toy_loop(settings(tmp_path / "simulated", policy="fix")).run())
    assert lines(tmp_path / "people") == lines(tmp_path / "simulated")  # it changes nothing


def test_the_report_of_a_run_with_people(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds by kind, measured; what was taken as it stood; drawn without any truth that nobody has given."""
    monkeypatch.setattr("vlm_itl.experiment.state.AGAIN", 1.0)
    given: dict[str, Answer] = {}
    summary, _ = to_the_end(tmp_path, given, policy="fix", audit=1.0)
    monkeypatch.setattr("vlm_itl.reports.run_figures.plot_class_iou", plot_learning_curve)  # nothing is known by class
    assert {"people.png", "judge.png"} <= {path.name for path in save_figures(tmp_path)}
    assert "masks that people drew later" in plot_judge(tmp_path).axes[0].get_title(loc="left")
    rows, account = people_rows(tmp_path), summary["people"]["kinds"]
    assert {*rows["kind"]} == {"draw", "fix", "verify", "again"} and len(rows) == len(given)
    assert rows.set_index("id")["round"][["toy-2", "toy-4"]].tolist() == [0, 0]  # the start, and validation
    assert (rows[rows["kind"] != "draw"]["round"] > 0).all() and account["verify"]["seconds"] == 2.0
    text, table = model_card(tmp_path), round_table(tmp_path)
    assert "**measured**" in text and "| looked at | 1 | 1 | 2.000 | 2.000 | 1.000 |" in text
    assert "drawn without the proposal: IoU 1.000" in text
    assert table["human_measured"].tolist() == [1.0] * len(table)
    list(toy_loop(settings(tmp_path / "simulated", policy="fix")).run())
    assert "**assumed**" in model_card(tmp_path / "simulated") and not len(people_rows(tmp_path / "simulated"))
    assert round_table(tmp_path / "simulated")["human_measured"].tolist() == [0.0] * len(table)


def test_what_people_drew_is_exported(tmp_path: Path) -> None:
    folder = tmp_path / "toy"
    for row in TOY.train:
        (folder / "images").mkdir(parents=True, exist_ok=True)
        row["image"].save(folder / "images" / f"{row['id']}.png")
    plan = {"mode": "al", "dataset": str(folder), "data_options": {"classes": list(TOY.labels.names)}, "steps": 1}
    plan |= {"annotator": "folder", "initial": 1, "max_labelled": 1, "test_share": 1, "val_share": 1, "image_size": 32}
    config = make_config(plan, output_dir=str(tmp_path / "run"), leaks="off", gallery=0)
    with pytest.raises(Waiting):
        list(run_al(config))
    work(Robot(TRUTH.__getitem__, TOY.labels), make_annotator("folder", tmp_path / "run/people", TOY.labels))
    list(run_al(config))
    _, masks = export_run(tmp_path / "run", "coco", tmp_path / "coco")
    back = {row.id: row.mask for row in read_masks(tmp_path / "coco")}
    assert len(masks) == len(back) == 3  # one of the pool, those of validation and test: people drew all of them
    for row in masks:
        assert row.by == "human" and row.seconds == pytest.approx(239.7) and np.array_equal(row.mask, TRUTH[row.id])
        assert np.array_equal(back[row.id], row.mask)


class Eager(Table):
    """An annotator that writes something as soon as it is made, as tools do."""

    def __init__(self, folder: Path, labels: Any) -> None:
        super().__init__(folder, labels)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "window.json").write_text("{}")


def test_an_annotator_may_write_before_it_is_asked(tmp_path: Path) -> None:
    register_annotator("eager")(Eager)
    Eager.given = {}
    folder = tmp_path / "photos"
    folder.mkdir()
    for row in TOY.train:
        row["image"].save(folder / f"{row['id']}.png")
    plan = {"mode": "al", "dataset": str(folder), "data_options": {"classes": list(TOY.labels.names)}, "steps": 1}
    plan |= {"annotator": "eager", "initial": 1, "max_labelled": 1, "test_share": 1, "val_share": 1, "image_size": 32}
    for _ in range(2):
        with pytest.raises(Waiting):
            list(run_al(make_config(plan, output_dir=str(tmp_path / "run"), leaks="off")))


def test_names_with_a_tilde_and_a_run_that_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = TOY.train.select([0, 1])
    renamed = raw_rows(rows).remove_columns("id").add_column("id", ["IMG~1", "b"])
    table = Table(tmp_path / "people", TOY.labels)
    table.given = {"IMG~1": Answer("IMG~1", "draw", "skipped", None)}
    desk = Desk(tmp_path, table, Photographs(tmp_path / "photographs", renamed), ["IMG~1", "b"], wait=0.05)
    looks: list[int] = []

    def wait(seconds: float) -> None:
        looks.append(1)
        if len(looks) == 3:
            table.given["b"] = Answer("b", "draw", "drawn", TRUTH["toy-1"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vlm_itl.people.desk.time.sleep", wait)
        desk.need(["IMG~1", "b"])
    assert desk.store.masks["IMG~1"].shape == (8, 8) and (desk.store.masks["IMG~1"] == VOID).all()
    assert capsys.readouterr().out.count("waiting for 1 masks") == 1  # told once


def test_a_tilde_in_a_name_is_part_of_it(tmp_path: Path) -> None:
    names = {"IMG~1": "toy-0", "IMG~2": "toy-1", "IMG~2~again": "toy-2"}
    renamed = raw_rows(TOY.train.select([0, 1, 2])).remove_columns("id").add_column("id", [*names])
    robot = Robot(lambda name: TRUTH[names[name]], TOY.labels, puts_right=True)
    for process in range(2):  # another process reads what the first one has asked
        annotator = make_annotator("folder", tmp_path / "people", TOY.labels)
        desk = Desk(tmp_path, annotator, Photographs(tmp_path / "photographs", renamed), [*names])
        for kind, ids in (("draw", ["IMG~2~again"]), ("fix", ["IMG~1"]), ("again", ["IMG~1"]), ("verify", ["IMG~2"])):
            if not process:
                desk.ask(ids, kind, {name: TRUTH["toy-3"] for name in names})
        work(robot, annotator)
        desk.take()
    assert {request.image_id for request in annotator.asked.all().values()} == {*names}
    assert all(np.array_equal(desk.store.masks[name], TRUTH[toy]) for name, toy in names.items())
    account = people_account(tmp_path, TOY.labels)
    assert {kind: one["n"] for kind, one in account["kinds"].items()} == {"draw": 1, "fix": 2, "verify": 1, "again": 1}
    assert account["agreement"]["n"] == 1 and account["agreement"]["iou"] == 1.0


def test_what_people_found_bad_is_not_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Answer] = {}
    for _ in range(10):
        loop = None
        try:
            loop = people_loop(tmp_path, given, audit=0.02, max_labelled=2)
            list(loop.run())
            break
        except Waiting:
            if loop is not None:
                loop.folder.close()
            table = Table(tmp_path / "people", TOY.labels)
            table.given = given
            given |= {r.id: answer(r, good=False) for r in table.left()}
    assert (
        loop is not None
        and loop.rounds[0].pseudo_ids == ["toy-1"]
        and loop.rounds[1].judge
        and loop.rounds[1].judge["audited"]["bad"] == ["toy-1"]
    )
    monkeypatch.setattr("vlm_itl.experiment.export.data_of_run", lambda config: toy_images())
    assert "toy-1" not in {row.id for row in run_masks(tmp_path)}


def test_corrections_that_took_twice_as_long_cost_twice_as_much(tmp_path: Path) -> None:
    truth, proposal = TRUTH["toy-1"], TRUTH["toy-2"]
    asked, store = Asked(tmp_path / "people", TOY.labels), AnswerStore(tmp_path / "answers", TOY.labels)
    picture = Photographs(tmp_path / "photographs", TOY.train)["toy-1"]
    assumed = WorkCosts(100.0, 9.0, CorrectionCost())
    drawing, looking = assumed.cost.parts(assumed.cost.share(proposal, truth, TOY.labels), 100.0)
    for number in range(LEAST_TIMED):
        assert measured_costs(tmp_path, TOY.labels, assumed) == assumed  # too few
        asked.add([Request(f"p{number}", "fix", picture, proposal)])
        store.take(Answer(f"p{number}", "fix", "fixed", truth, 2 * (drawing * 100 + looking)))
    found = measured_costs(tmp_path, TOY.labels, assumed)
    assert found.timed == {"fix": LEAST_TIMED} and (found.mask, found.check) == (100.0, 9.0)
    assert found.cost.look_seconds == pytest.approx(18) and found.cost.rate == pytest.approx(2)


def test_a_few_seconds_to_skip_are_not_the_price_of_a_mask(tmp_path: Path) -> None:
    store, assumed = AnswerStore(tmp_path / "answers", TOY.labels), WorkCosts(100.0, 9.0, CorrectionCost())
    for number in range(LEAST_TIMED):
        store.take(Answer(f"drawn-{number}", "draw", "drawn", TRUTH["toy-1"], 200.0))
        store.take(Answer(f"skipped-{number}", "draw", "skipped", None, 2.0))
        store.take(Answer(f"unsure-{number}", "verify", "skipped", None, 60.0))
    found = measured_costs(tmp_path, TOY.labels, assumed)
    draw = people_account(tmp_path, TOY.labels)["kinds"]["draw"]
    assert (found.mask, found.check, found.timed) == (200.0, 9.0, {"draw": LEAST_TIMED})
    assert (draw["n"], draw["timed"], draw["seconds"]) == (2 * LEAST_TIMED, LEAST_TIMED, 200.0)


@pytest.mark.parametrize("goal", ["model", "dataset"])
def test_all_work_is_told_at_the_end(goal: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What was drawn once more is a mask, too; and labelling the rest of the pool is work."""
    book = json.loads((Path(__file__).resolve().parent.parent / "nbs" / "run_label.ipynb").read_text(encoding="utf-8"))
    source = next("".join(cell["source"]) for cell in book["cells"] if cell["id"] == "run-label-time")
    train = {"images": 22, "again": 1, "checks": 0, "human_seconds": 3600.0}
    train |= {"timed_masks": 19, "timed_fixes": 4, "timed_checks": 0}
    rest = train | {"images": 29, "checks": 7, "human_seconds": 7200.0, "timed_fixes": 11, "timed_checks": 7}
    summary = {"budget": train, "people": None, "labelled_pool": {"budget": rest} if goal == "dataset" else None}
    exec(source, {"run": SimpleNamespace(summary=summary)})
    told = capsys.readouterr().out
    whole = (
        "30 masks and 7 checks by people, 2.0 hours; 37 of"
        if goal == "dataset"
        else "23 masks and 0 checks by people, 1.0 hours; 23 of"
    )
    assert told.startswith(whole)


@pytest.mark.parametrize("number", [2, 40])  # forty names are longer than any file's name may be
def test_classes_are_named_on_the_command_line(tmp_path: Path, number: int) -> None:
    """A text with commas, or a file; what is neither is told as a file that is missing."""
    book = json.loads((Path(__file__).resolve().parent.parent / "nbs" / "run_label.ipynb").read_text(encoding="utf-8"))
    source = next("".join(cell["source"]) for cell in book["cells"] if cell["id"] == "run-label-config")
    names = ["background", *(f"kind of plant {index}" for index in range(1, number))]
    (tmp_path / "classes.txt").write_text("\n".join(names))

    def read(said: str) -> Any:
        space = {"notebook_settings": dict, "make_config": dict, "run_path": str, "os": os}
        exec(source, space | {"given": {"classes": said, "mode": "vlm", "data_options": {}}}, space)
        return tuple(read_spec(space["config"]["data_options"]).names or ())

    assert read(", ".join(names)) == read(str(tmp_path / "classes.txt")) == tuple(names)
    assert len(read("voc")) == 21
    with pytest.raises(DataError, match="no such file"):
        read(str(tmp_path / "clases.txt"))
