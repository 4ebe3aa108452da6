"""Simulated proposals: pure functions of (seed, image, truth), graded by their options, never without a bound truth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toyloop import Listener, Parrot, no_figures, settings, toy_loop

import vlm_itl.proposals.kept as kept
from vlm_itl.core.checks import ConfigError
from vlm_itl.data.labels import VOC_CLASSES, VOID, LabelSpace
from vlm_itl.data.masks import MaskStore, row_ids, truth_reader
from vlm_itl.data.scenes import draw_scene, scene_options
from vlm_itl.data.sources import toy_images
from vlm_itl.experiment.loop import Loop
from vlm_itl.model.metrics import image_iou
from vlm_itl.proposals.proposers import make_proposer
from vlm_itl.proposals.simulated import Mistakes, Simulated, simulate_proposal

VOC = LabelSpace(VOC_CLASSES)
TRUTHS = [draw_scene(scene_options(), "train", place)[1] for place in range(60)]
NONE = {"wrong": 0.0, "missed": 0.0, "merged": 0.0, "invented": 0.0, "coarse": 0.0}


def ious(seed: int = 0, **mistakes: float) -> np.ndarray:
    """Mean IoU of a proposal for each of some scenes."""
    made = Mistakes(**mistakes)
    masks = [simulate_proposal(truth, VOC, made, str(place), seed)[0] for place, truth in enumerate(TRUTHS)]
    return np.array([image_iou(mask, truth, 21) for mask, truth in zip(masks, TRUTHS, strict=True)])


def test_about_as_good_as_real_ones():
    """As the masks of Grounded-SAM on photographs: under half of them are good, and few are hopeless."""
    shares = [(ious(seed) >= 0.7).mean() for seed in range(3)]
    assert 0.35 < np.mean(shares) < 0.65


@pytest.mark.parametrize("kind", list(NONE))
def test_every_mistake_costs_and_more_of_it_costs_more(kind: str):
    none, some, much = (ious(**{**NONE, kind: share}).mean() for share in (0.0, 0.3, 0.9))
    assert none > 0.98 and none > some > much


def test_of_an_image_whose_truth_is_void_nothing_is_proposed(tmp_path: Path):
    """One such mask ended the run, in a line that named no image."""
    toy, proposer = toy_images(), make_proposer("simulated")
    truths = {**dict.fromkeys(row_ids(toy.train), np.zeros((8, 8), np.uint8)), "toy-1": np.full((8, 8), VOID, np.uint8)}
    proposer.bind_truth(truths.__getitem__)
    store = MaskStore(tmp_path, toy.labels)
    proposals = proposer.propose(toy.train.remove_columns("mask"), store)
    assert set(proposals) == {*row_ids(toy.train)} - {"toy-1"} and "toy-1" not in store


@pytest.mark.parametrize("place", range(0, 60, 7))
def test_proposals_say_something_everywhere(place: int):
    mask, sure = simulate_proposal(TRUTHS[place], VOC, Mistakes(), str(place))
    assert mask.shape == TRUTHS[place].shape and mask.dtype == np.uint8 and VOID not in mask
    assert set(sure) == set(np.unique(mask).tolist()) - {0} and all(0 <= score <= 1 for score in sure.values())


def test_a_class_is_taken_for_the_same_one_again_and_again():
    """Wrong names are the proposer's own: they do not average out."""
    square = np.zeros((40, 40), np.uint8)
    square[10:30, 10:30] = 3
    only_names = Mistakes(**{**NONE, "wrong": 1.0})
    said = {int(simulate_proposal(square, VOC, only_names, str(n))[0][20, 20]) for n in range(20)}
    other = {int(simulate_proposal(square, VOC, only_names, "0", seed)[0][20, 20]) for seed in range(20)}
    assert len(said) == 1 and said != {3} and len(other) > 5


def test_order_and_company_do_not_matter(scenes_small: Any, tmp_path: Path):
    truth, pool = truth_reader(scenes_small.train), scenes_small.train.remove_columns("mask")
    proposer = make_proposer("simulated", seed=4)
    proposer.bind_truth(truth)
    stores = [MaskStore(tmp_path / name, scenes_small.labels) for name in "ab"]
    whole = proposer.propose(pool, stores[0])
    part = proposer.propose(pool.select([9, 2]), stores[1])
    assert list(whole) == row_ids(pool) and all(part[i] == whole[i] for i in part) and len(part) == 2
    assert all((stores[0][i] == stores[1][i]).all() for i in part)


def test_binary_tasks_have_no_wrong_names():
    labels = LabelSpace(("background", "foreground"))
    truth = (TRUTHS[3] > 0).astype(np.uint8)
    mask, _ = simulate_proposal(truth, labels, Mistakes(**{**NONE, "wrong": 1.0}), "x")
    assert image_iou(mask, truth, 2) > 0.98


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wrong": 1.2}, "wrong must be a number >= 0 and <= 1"),
        ({"coarse": "a lot"}, "coarse"),
        ({"seed": 0.5}, "seed"),
        ({"wrongly": 0.1}, "Did you mean 'wrong'"),
    ],
)
def test_odd_options_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        make_proposer("simulated", **options)


def test_without_truth_or_background_it_cannot_work(scenes_small: Any, tmp_path: Path):
    with pytest.raises(ConfigError, match="bind_truth"):
        make_proposer("simulated").propose(scenes_small.train, MaskStore(tmp_path, scenes_small.labels))
    with pytest.raises(ConfigError, match="background"):
        simulate_proposal(TRUTHS[0], LabelSpace(("sky", "sea")), Mistakes(), "x")
    with pytest.raises(ConfigError, match="void everywhere"):
        simulate_proposal(np.full((8, 8), VOID, np.uint8), VOC, Mistakes(), "x")


SIMULATED: dict[str, Any] = {
    "proposer": "simulated",
    "proposer_options": {"wrong": 0.2, "coarse": 0.0},
    "initial": 0,
    "max_labelled": 2,
}


def test_a_run_with_a_real_judge_is_marked_and_its_peeks_are_counted(tmp_path: Path):
    """The judge of this loop reads no truth; the proposer does, each image of the pool once."""
    loop = toy_loop(settings(tmp_path / "run", **SIMULATED))
    rounds = list(loop.run())
    assert loop.team.simulated and loop.folder.summary["simulated"]
    assert [record.budget["peeks"] for record in rounds] == [len(loop.team.annotator.ids)] * len(rounds)
    plain = toy_loop(settings(tmp_path / "plain"))
    assert not plain.team.simulated and list(plain.run())[-1].budget["peeks"] == 0


def test_mode_al_never_peeks(tmp_path: Path):
    toy = toy_images()
    config = settings(tmp_path / "run", **{**SIMULATED, "mode": "al", "initial": 1})
    loop = Loop(config, toy, Parrot(toy), None, tracker=Listener(), draw=no_figures)
    assert list(loop.run())[-1].budget["peeks"] == 0 and not loop.team.simulated


@pytest.mark.parametrize("after", [1, 3])
def test_killed_while_proposing_it_ends_alike(after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = list(toy_loop(settings(tmp_path / "whole", **SIMULATED)).run())
    monkeypatch.setattr(kept, "PROPOSAL_CHUNK", 1)
    plain, calls = Simulated.propose, []

    def dies(self: Any, images: Any, masks: MaskStore) -> Any:
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return plain(self, images, masks)

    monkeypatch.setattr(Simulated, "propose", dies)
    config = settings(tmp_path / "cut", **SIMULATED)
    loop = toy_loop(config)
    with pytest.raises(KeyboardInterrupt):
        loop.run_round()
    loop.folder.close()
    monkeypatch.setattr(Simulated, "propose", plain)
    again = list(toy_loop(config).run())
    assert [r.budget for r in again] == [r.budget for r in whole]
    assert [(r.pseudo, r.pseudo_ids, r.selection) for r in again] == [
        (r.pseudo, r.pseudo_ids, r.selection) for r in whole
    ]
