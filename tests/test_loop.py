"""The whole loop on six images that one can count, with a network that has never seen a tensor: nothing is trained."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from toyloop import Eye, Listener, Parrot, no_figures, settings

from vlm_itl.core.checks import ConfigError, DataError, JudgeError, LeakError, RunError
from vlm_itl.data.masks import DecodeRows, make_rows
from vlm_itl.data.sources import SegData, toy_images
from vlm_itl.experiment.loop import Loop
from vlm_itl.experiment.pool import Pool
from vlm_itl.experiment.state import Round
from vlm_itl.judging.measures import FULL_MASK_SECONDS
from vlm_itl.proposals import kept
from vlm_itl.vlm.handler import Judgement


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


PROPOSED = {"toy-1": "toy-1", "toy-2": "toy-2", "toy-3": "toy-2"}  # image -> whose true mask is proposed for it


def proposals_of(toy: SegData, folder: Path, more: dict[str, str] | None = None) -> dict[str, Any]:
    """A folder of masks, and the settings of a run over it: right about two images, wrong about the third."""
    folder.mkdir()
    truth = {row["id"]: row["mask"] for split in (toy.train, toy.val) for row in split}
    for image_id, of in {**PROPOSED, **(more or {})}.items():
        Image.fromarray(truth[of]).save(folder / f"{image_id}.png")
    return {"proposer": "folder", "proposer_options": {"path": str(folder)}, "initial": 0, "max_labelled": 2}


def loop_of(toy: SegData, folder: Path, judge: Eye | None = None, **more: Any) -> Loop:
    return Loop(settings(folder, **more), toy, Parrot(toy), judge or Eye(), tracker=Listener(), draw=no_figures)


def test_proposals_are_judged_before_the_first_training(toy: SegData, tmp_path: Path) -> None:
    """Round 0 learns from accepted proposals alone; no mask is judged twice, nor paid twice, in the whole run."""
    loop = loop_of(toy, tmp_path / "run", **proposals_of(toy, tmp_path / "masks"))
    rounds = list(loop.run())
    everyone = ["toy-1", "toy-2", "toy-3"]
    assert [r.labelled for r in rounds] == [0, 1, 2] and rounds[0].start_ids == []
    assert rounds[0].start_pseudo_ids == everyone  # the eye likes every mask with two colours
    assert rounds[0].pseudo == 3 and list(loop.team.learner.seen[0]) == everyone
    assert (loop.team.learner.seen[0]["toy-3"] == toy.train[2]["mask"]).all()  # as proposed, not as it is
    assert loop.team.handler.asked == everyone and [r.budget["judge_usd"] for r in rounds] == [0.75] * 3
    assert rounds[0].selection["ids"] == ["toy-0"]  # nothing is proposed for it
    assert set(loop.team.learner.seen[1]) == {"toy-0", *everyone}
    assert rounds[1].judge["n"] == 3 and rounds[1].judge["class_precision"]["red"] < 1


@pytest.mark.parametrize("accept_by", ["image", "class"])
@pytest.mark.parametrize("killed_after", [0, 1, 2])
def test_killed_with_proposals_it_ends_alike(accept_by: str, killed_after: int, toy: SegData, tmp_path: Path) -> None:
    """Between rounds, and in the middle of the judging before the first training."""
    more = {**proposals_of(toy, tmp_path / "masks"), "accept_by": accept_by, "policy": "fix"}
    whole = list(loop_of(toy, tmp_path / "whole", **more).run())
    first = loop_of(toy, tmp_path / "run", Eye(stops_after=99 if killed_after else 2), **more)
    try:
        for _ in range(killed_after or 1):
            first.run_round()
    except JudgeError:
        assert killed_after == 0
    first.folder.close()
    second = loop_of(toy, tmp_path / "run", **more)
    assert [without_clock(r) for r in second.run()] == [without_clock(r) for r in whole]
    asked = 3 if accept_by == "image" else 4  # toy-1 and toy-2 are red; toy-3 is proposed as red
    assert len(first.team.handler.asked + second.team.handler.asked) <= asked


def test_killed_while_proposing_it_ends_alike(toy: SegData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is made is made once; a chunk that was not noted down is made again."""
    more, calls = proposals_of(toy, tmp_path / "masks"), []
    whole = list(loop_of(toy, tmp_path / "whole", **more).run())
    monkeypatch.setattr(kept, "PROPOSAL_CHUNK", 1)
    note = kept.KeptProposals._note

    def killed(self: Any, lines: Any) -> None:
        calls.append(lines[0]["id"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        note(self, lines)

    monkeypatch.setattr(kept.KeptProposals, "_note", killed)
    first = loop_of(toy, tmp_path / "run", **more)
    with pytest.raises(KeyboardInterrupt):
        first.run_round()
    first.folder.close()
    again = list(loop_of(toy, tmp_path / "run", **more).run())
    assert [without_clock(r) for r in again] == [without_clock(r) for r in whole]
    assert calls == ["toy-0", "toy-1", "toy-2", "toy-2", "toy-3", "toy-4"]


@pytest.mark.parametrize("where", ["folder", "run"])
def test_changed_proposals_are_refused(where: str, toy: SegData, tmp_path: Path) -> None:
    """By the name of the image; put back, the run goes on."""
    more = proposals_of(toy, tmp_path / "masks")
    loop = loop_of(toy, tmp_path / "run", **more)
    loop.run_round()
    loop.folder.close()
    place = tmp_path / "masks" if where == "folder" else tmp_path / "run" / "proposals" / "0_folder" / "masks"
    before = (place / "toy-2.png").read_bytes()
    (place / "toy-2.png").write_bytes((place / "toy-1.png").read_bytes())
    with pytest.raises(RunError, match="the proposal of image 'toy-2' by folder:masks is another one"):
        loop_of(toy, tmp_path / "run", **more)
    (place / "toy-2.png").write_bytes(before)
    assert len(list(loop_of(toy, tmp_path / "run", **more).run())) == 3


def test_garbage_in_unpaid_masks_changes_nothing(toy: SegData, tmp_path: Path) -> None:
    """Proposals are inputs: what nobody has paid for decides about nothing, and corrections are of paid images."""
    more = {**proposals_of(toy, tmp_path / "masks"), "policy": "fix"}
    clean = list(loop_of(toy, tmp_path / "clean", **more).run())
    paid = {i for r in clean[:-1] for i in r.selection["ids"]}
    raw = toy.train.with_format(None)
    cells = [cell if i in paid else raw[0]["mask"] for i, cell in zip(raw["id"][:], raw["mask"][:], strict=True)]
    spoilt = raw.remove_columns("mask").add_column("mask", cells).cast_column("mask", raw.features["mask"])
    garbage = replace(toy, train=spoilt.with_transform(DecodeRows(toy.labels)))
    dirty = list(loop_of(garbage, tmp_path / "dirty", **more).run())
    for one, other in zip(clean, dirty, strict=True):
        assert one.selection == other.selection and one.fix_ids == other.fix_ids
        assert (one.pseudo_ids, one.start_pseudo_ids) == (other.pseudo_ids, other.start_pseudo_ids)
        assert one.metrics == other.metrics and one.budget == other.budget


def test_a_correction_costs_what_changes(toy: SegData, tmp_path: Path) -> None:
    """What is rejected is shown to the human, who changes it; the mask that is learnt is the human's."""
    more = proposals_of(toy, tmp_path / "masks", {"toy-1": "toy-0"})  # an empty mask, which the eye does not like
    loop = loop_of(toy, tmp_path / "run", policy="fix", **more)
    rounds = list(loop.run())
    assert rounds[0].selection["ids"] == ["toy-1"] == rounds[0].fix_ids
    assert "rejected by the judge" in rounds[0].selection["reasons"][0]
    assert rounds[1].budget["fixes"] == 1 and rounds[1].budget["train_images"] == 1
    assert (loop.team.learner.seen[1]["toy-1"] == toy.train[1]["mask"]).all()
    price = FULL_MASK_SECONDS  # all of the red is missing: it is drawn anew
    assert rounds[1].budget["human_seconds"] == round(2 * price, 3) and rounds[1].budget["fix_seconds"] == price
    drawn = list(loop_of(toy, tmp_path / "triage", policy="triage", **more).run())
    assert drawn[0].selection["ids"] == ["toy-1"] and drawn[1].budget["fixes"] == 0


def test_several_are_judged_and_the_best_counts(toy: SegData, tmp_path: Path) -> None:
    """The model's own mask, or the folder's, whichever the judge believes; own masks are judged each round."""
    folder = proposals_of(toy, tmp_path / "masks")
    of = [["own", {}], ["folder", folder["proposer_options"]]]
    loop = loop_of(toy, tmp_path / "run", proposer="several", proposer_options={"of": of})
    rounds = list(loop.run())
    assert rounds[0].start_pseudo_ids == []  # the model has to be trained first
    free = [i for i in ("toy-0", "toy-1", "toy-2", "toy-3") if i not in rounds[0].start_ids]
    assert set(rounds[0].pseudo_ids) <= set(free) & set(PROPOSED) and rounds[0].pseudo_ids
    assert rounds[0].judge["n"] == 3
    learnt = loop.team.learner.seen[1]
    assert all((learnt[i] == toy.train[int(PROPOSED[i][-1])]["mask"]).all() for i in rounds[0].pseudo_ids)


def test_accepted_classes_are_learnt_and_the_rest_is_void(toy: SegData, tmp_path: Path) -> None:
    class Red(Eye):
        def _judge_one(self, query: Any) -> Judgement:
            self.asked.append((query.id, query.text()))
            yes = query.labels.names[query.class_ids[0]] == "red" if query.class_ids else False
            return Judgement("yes" if yes else "no", p_yes=float(yes), usd=0.25)

    more = proposals_of(toy, tmp_path / "masks", {"toy-0": "toy-0", "toy-3": "toy-4"})  # toy-4: red, blue, background
    loop = loop_of(toy, tmp_path / "run", Red(), accept_by="class", **more)
    record = loop.run_round()
    loop.folder.close()
    assert record.start_pseudo_ids == ["toy-1", "toy-2", "toy-3"]
    assert np.unique(loop.team.learner.seen[0]["toy-3"]).tolist() == [0, 1, 255]  # blue is not
    assert np.unique(loop.team.learner.seen[0]["toy-1"]).tolist() == [0, 1]
    assert [i for i, text in loop.team.handler.asked if "Is every one of them coloured" in text] == ["toy-0"]
    assert record.judge["empty_dropped"] == 1 and 0.5 < record.judge["kept_pixels"] < 1
    assert record.judge["images"] == 4 and record.judge["n"] == 5  # one red each, red and blue, and the empty one
    assert record.selection["ids"] == ["toy-3"]  # blue of it was rejected: the human may be asked, as about toy-0


def test_what_is_kept_of_a_mask_weighs_as_much_as_the_judge_believes_in_it(
    toy: SegData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was rejected of it is void, and no reason to trust the rest less: before the first training, and after."""

    class Red(Eye):
        def _judge_one(self, query: Any) -> Judgement:
            red = query.labels.names[query.class_ids[0]] == "red" if query.class_ids else False
            return Judgement("yes" if red else "no", p_yes=0.875 if red else 0.125, usd=0.25)

    given = {f"toy-{number}": "toy-4" for number in range(4)}  # red and blue, all of them
    more = proposals_of(toy, tmp_path / "masks", given) | {"accept_by": "class"}
    told: list[dict[str, float]] = []
    set_pseudo = Pool.set_pseudo
    monkeypatch.setattr(Pool, "set_pseudo", lambda *given: (set_pseudo(*given), told.append(dict(given[0].sure))))
    first = loop_of(toy, tmp_path / "run", Red(), **more)
    first.run_round()
    first.folder.close()
    second = loop_of(toy, tmp_path / "run", Red(), **more)
    second.folder.close()
    assert len(told) >= 2 and all(sure and set(sure.values()) == {0.875} for sure in told)
    assert second.state.pool.sure.keys() == second.state.pool.pseudo.keys()


def test_pixels_that_both_agree_on(toy: SegData, tmp_path: Path) -> None:
    """Of a folder's masks, the model keeps what it predicts as well: nothing before it is trained."""
    loop = loop_of(toy, tmp_path / "run", accept_by="pixels", **proposals_of(toy, tmp_path / "masks"))
    rounds = [loop.run_round(), loop.run_round()]
    loop.folder.close()
    assert rounds[0].start_pseudo_ids == [] and rounds[0].metrics["steps"] == 0  # nothing to learn from yet
    assert rounds[0].pseudo_ids == ["toy-1"]  # the parrot is right about toy-1; about the others it says blue
    assert rounds[0].judge["empty_dropped"] == 2 and (loop.team.learner.seen[0]["toy-1"] == toy.train[1]["mask"]).all()


def test_an_empty_mask_needs_the_word_that_nothing_is_missing(toy: SegData, tmp_path: Path) -> None:
    class Believer(Eye):
        def _judge_one(self, query: Any) -> Judgement:
            self.asked.append((query.id, query.question))
            return Judgement("no" if query.question == "exhaustive" else "yes", p_yes=1.0, usd=0.25)

    more = proposals_of(toy, tmp_path / "masks", {"toy-1": "toy-0"})
    loop = loop_of(toy, tmp_path / "run", Believer(), accept_by="image", **more)
    record = loop.run_round()
    loop.folder.close()
    assert record.start_pseudo_ids == ["toy-2", "toy-3"] and record.judge["empty_dropped"] == 1
    assert ("toy-1", "exhaustive") in loop.team.handler.asked and len(loop.team.handler.asked) == 4
    assert record.budget["judge_calls"] == 4


def test_what_cannot_work_with_proposals_is_one_line(toy: SegData, tmp_path: Path) -> None:
    more = proposals_of(toy, tmp_path / "masks")
    certified = {"acceptance": "certified", "alpha": 0.9, "delta": 0.9, "min_share": 0.1}
    with pytest.raises(ConfigError, match="needs a proposal of folder:masks for every validation image: 1 of 1"):
        loop_of(toy, tmp_path / "certified", **more, **certified)  # before anything is drawn or paid
    assert not (tmp_path / "certified" / "round_000").exists()
    more["proposer_options"] = {"path": str(tmp_path / "masks"), "ignore": 255}
    (held,) = toy.val["id"]
    Image.fromarray(np.full_like(toy.val[0]["mask"], 255)).save(tmp_path / "masks" / f"{held}.png")
    loop = loop_of(toy, tmp_path / "void", **more, **certified)  # there is a file, and nothing in it
    with pytest.raises(ConfigError, match="needs a proposal of folder:masks for every validation image: 1 of 1"):
        loop.run_round()
    loop.folder.close()
    with pytest.raises(ConfigError, match="initial=0 gives no image"):
        loop_of(toy, tmp_path / "own", initial=0)
    with pytest.raises(DataError, match="no such folder"):
        loop_of(toy, tmp_path / "none", proposer="folder", proposer_options={"path": str(tmp_path / "nowhere")})
    assert not (tmp_path / "none" / "round_000").exists()


def test_true_masks_are_no_proposals(toy: SegData, tmp_path: Path) -> None:
    """The folder of the data set's own masks, taken for proposals, would be the truth of the whole pool, unpaid."""
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    ids = [row["id"] for row in toy.train]
    for row in toy.train:
        row["image"].save(tmp_path / "images" / f"{row['id']}.png")
        Image.fromarray(row["mask"]).save(tmp_path / "masks" / f"{row['id']}.png")
    files = {name: [tmp_path / name / f"{i}.png" for i in ids] for name in ("images", "masks")}
    rows = make_rows(ids, files["images"], files["masks"]).with_transform(DecodeRows(toy.labels))
    options = {"proposer": "folder", "proposer_options": {"path": str(tmp_path / "masks")}}
    with pytest.raises(LeakError, match="the true mask of image 'toy-0', for which nobody has paid"):
        loop_of(replace(toy, train=rows), tmp_path / "run", **options)


def test_a_run_goes_on_where_the_folder_is_gone(toy: SegData, tmp_path: Path) -> None:
    """Its proposals are in the run folder."""
    more = proposals_of(toy, tmp_path / "masks")
    loop = loop_of(toy, tmp_path / "run", **more)
    loop.run_round()
    loop.folder.close()
    shutil.rmtree(tmp_path / "masks")
    assert len(list(loop_of(toy, tmp_path / "run", **more).run())) == 3


def test_a_run_from_before_mixtures_goes_on_without_one(tmp_path: Path) -> None:
    """Its record does not name the setting: it had none, whatever is usual today."""
    loop = loop_of(toy_images(), tmp_path / "run", mixture={})
    loop.run_round()
    loop.folder.close()
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    del record["mixture"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(record))
    with pytest.raises(RunError, match="another configuration.*mixture"):
        loop_of(toy_images(), tmp_path / "run")
    loop_of(toy_images(), tmp_path / "run", mixture={}).folder.close()
