"""Whose masks the judge sees: a folder in any format that the data part reads, several at once, your own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image
from toyloop import Listener, Parrot, no_figures, settings

from vlm_itl.core.checks import ConfigError, DataError
from vlm_itl.data.masks import MaskStore
from vlm_itl.data.sources import SegData, load_data, toy_images
from vlm_itl.experiment.loop import Loop
from vlm_itl.proposals import Proposal, Proposer, make_proposer, register_proposer
from vlm_itl.proposals.proposers import PROPOSERS
from vlm_itl.vlm.handler import make_handler


@pytest.fixture
def toy() -> SegData:
    return toy_images()


def saved(folder: Path, data: SegData, change: Any = lambda mask: Image.fromarray(mask), ending: str = "") -> Path:
    """The true masks of the pool in a form of its own."""
    folder.mkdir()
    for row in data.train:
        change(row["mask"]).save(folder / f"{row['id']}{ending}.png")
    return folder


def as_palette(mask: np.ndarray) -> Image.Image:
    picture = Image.fromarray(mask).convert("P")
    picture.putpalette([0, 0, 0, 200, 40, 40, 40, 60, 200] + [0] * 759)
    return picture


def as_rgb(mask: np.ndarray) -> Image.Image:
    return Image.fromarray(np.array([(0, 0, 0), (200, 40, 40), (40, 60, 200)], np.uint8)[mask])


FORMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "grey": (Image.fromarray, {}),
    "palette": (as_palette, {}),
    "colours": (as_rgb, {}),
    "values": (lambda mask: Image.fromarray(mask * 100), {"values": [0, 100, 200]}),
    "own order": (
        lambda mask: Image.fromarray(np.array([0, 2, 1], np.uint8)[mask]),
        {"classes": ["background", "blue", "red"]},
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_masks_in_any_format(form: str, toy: SegData, tmp_path: Path) -> None:
    """What the data part reads, a proposer reads: the masks come back as class indices of the data set."""
    change, options = FORMS[form]
    proposer = make_proposer("folder", path=str(saved(tmp_path / "masks", toy, change, "_mask")), **options)
    store = MaskStore(tmp_path / "store", toy.labels)
    proposals = proposer.propose(toy.train.remove_columns("mask"), store)
    assert list(proposals) == ["toy-0", "toy-1", "toy-2", "toy-3"]
    assert all((store[row["id"]] == row["mask"]).all() for row in toy.train)
    assert proposals["toy-0"] == Proposal("toy-0", "folder:masks")


def test_a_binary_task_reads_the_whole_class_list(toy: SegData, tmp_path: Path) -> None:
    store = MaskStore(tmp_path / "store", toy.labels.binary())
    make_proposer("folder", path=str(saved(tmp_path / "masks", toy))).propose(toy.train, store)
    assert np.unique(store["toy-3"]).tolist() == [0, 1]


WHITE = {
    "0 and 1": lambda mask: Image.fromarray((mask == 1).astype(np.uint8)),
    "0 and 255": lambda mask: Image.fromarray((mask == 1).astype(np.uint8) * 255),
    "1 bit": lambda mask: Image.fromarray(mask == 1),
}


@pytest.mark.parametrize("enough", [True, False])
@pytest.mark.parametrize("kind", WHITE)
def test_masks_of_foreground_are_not_read_as_the_first_class(
    kind: str, enough: bool, toy: SegData, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    """Foreground of whatever class is no red: refused, or told where a few masks may show one class by chance."""
    monkeypatch.setattr("vlm_itl.proposals.proposers.FEW", 4 if enough else 5)
    path, store = str(saved(tmp_path / "masks", toy, WHITE[kind])), MaskStore(tmp_path / "store", toy.labels)
    images, red = toy.train.remove_columns("mask"), {"classes": ["background", "red"]}
    proposer = make_proposer("folder", path=path)
    if enough:
        with pytest.raises(DataError, match="all hold only 0, .* say of which class: proposer_options=.*red"):
            proposer.propose(images, store)
    else:
        proposer.propose(images, store)
        assert "4 masks, and all hold only 0" in capsys.readouterr().out
    said = red | ({"values": [0, 255]} if "255" in kind else {})
    made = make_proposer("folder", path=path, **said).propose(images, store)
    assert made and all((store[row["id"]] == (row["mask"] == 1)).all() for row in toy.train)
    binary = toy.labels.binary()
    if "255" not in kind:  # foreground is what such a run is about
        make_proposer("folder", path=path).propose(images, MaskStore(tmp_path / "binary", binary))
    assert "hold only" not in capsys.readouterr().out


def test_images_without_a_proposal_have_none(toy: SegData, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """How many is said; a mask that is void everywhere says nothing either."""
    folder = saved(tmp_path / "masks", toy)
    (folder / "toy-2.png").unlink()
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save(folder / "toy-3.png")
    proposals = make_proposer("folder", path=str(folder)).propose(toy.train, MaskStore(tmp_path / "s", toy.labels))
    assert list(proposals) == ["toy-0", "toy-1"]
    assert "1 of 4 images have no proposal, e.g. 'toy-2'" in capsys.readouterr().out
    with pytest.raises(DataError, match="1 of 4 images have no proposal"):
        make_proposer("folder", path=str(folder), missing="refuse").prepare(toy.train, toy.labels)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ({"toy-0.png": 0.5, "toy-1.png": 0.6}, "no line is called like an image .* 'toy-0', but like 'toy-0.png'"),
        ({}, "no line is called like an image"),
        ({"toy-1": {"confidence": 0.5}}, "'toy-1': 'confidence' is neither score nor classes"),
    ],
)
def test_scores_that_are_about_no_mask_are_refused(
    lines: dict[str, Any], message: str, toy: SegData, tmp_path: Path
) -> None:
    """They were read, and not one mask had a score."""
    folder = saved(tmp_path / "masks", toy)
    (folder / "scores.json").write_text(json.dumps(lines))
    with pytest.raises(DataError, match=message):
        make_proposer("folder", path=str(folder), scores="scores.json").prepare(toy.train, toy.labels)


def test_masks_without_a_score_are_counted(toy: SegData, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved(tmp_path / "masks", toy)
    (folder / "scores.json").write_text(json.dumps({"toy-0": 0.5}))
    proposer = make_proposer("folder", path=str(folder), scores="scores.json")
    proposals = proposer.propose(toy.train, MaskStore(tmp_path / "s", toy.labels))
    assert [p.score for p in proposals.values()] == [0.5, None, None, None]
    assert "3 of 4 masks have no score, e.g. that of 'toy-1'" in capsys.readouterr().out


WRONG: dict[str, tuple[Any, str]] = {
    "size": (np.zeros((6, 8), np.uint8), r"row 'toy-1': the mask is 8x6, its image 8x8 pixels"),
    "class": (np.full((8, 8), 9, np.uint8), r"toy-1.png: mask value 9 .* means no class.*proposer_options="),
    "no picture": (None, r"toy-1.png: not a readable image"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_one_line(what: str, toy: SegData, tmp_path: Path) -> None:
    mask, message = WRONG[what]
    folder = saved(tmp_path / "masks", toy)
    if mask is None:
        (folder / "toy-1.png").write_bytes(b"\x89PNG and nothing else")
    else:
        Image.fromarray(mask).save(folder / "toy-1.png")
    with pytest.raises(DataError, match=message) as caught:
        make_proposer("folder", path=str(folder)).propose(toy.train, MaskStore(tmp_path / "s", toy.labels))
    assert "\n" not in str(caught.value)


def test_a_proposer_of_your_own(toy: SegData, tmp_path: Path) -> None:
    with Forgotten():

        @register_proposer("mine")
        class Mine(Proposer):
            "Says nothing about anything."

            def propose(self, images: datasets.Dataset, masks: MaskStore) -> dict[str, Proposal]:
                return {}

        assert make_proposer("mine").propose(toy.train, MaskStore(tmp_path, toy.labels)) == {}
        assert make_proposer("mine").fixed
    with pytest.raises(ConfigError, match="proposer='mine' is not known"):
        make_proposer("mine")


class Forgotten:
    """What is registered inside is forgotten."""

    def __enter__(self) -> None:
        self.restore = PROPOSERS.keep()

    def __exit__(self, *error: object) -> None:
        self.restore()


def test_masks_of_a_real_foundation_model(shared: Path, voc: Path, tmp_path: Path) -> None:
    """Grounded-SAM about photographs of VOC: every image has a proposal, in the data set's classes."""
    data = load_data(str(voc), options={"max_train": 12, "max_test": 1}, leaks="off")
    proposer = make_proposer("folder", path=str(shared / "data" / "grounded_sam_voc"))
    store = MaskStore(tmp_path, data.labels)
    proposals = proposer.propose(data.train.remove_columns("mask"), store)
    assert len(proposals) == len(data.train)
    assert all(store[row["id"]].shape == row["mask"].shape for row in data.train.select(range(3)))
    assert len(proposer.stamps(list(proposals))) == len(proposals)


def test_a_run_on_photographs_begins_without_a_human_mask(shared: Path, voc: Path, tmp_path: Path) -> None:
    """Masks of Grounded-SAM, a perfect judge: what it accepts is good, each mask is judged once, the human corrects."""
    data = load_data(
        str(voc),
        val_share=2,
        options={"max_train": 14, "max_test": 1},
        leaks="off",
    )
    judge = make_handler("mock", seed=0, tau=0.5, accuracy=1.0)
    options = {"proposer_options": {"path": str(shared / "data" / "grounded_sam_voc")}, "policy": "fix", "tau": 0.5}
    config = settings(tmp_path, proposer="folder", initial=0, increment=3, max_labelled=3, **options)
    loop = Loop(config, data, Parrot(data, ()), judge, tracker=Listener(), draw=no_figures)
    rounds = list(loop.run())
    first, last = rounds
    assert len(data.train) == 12 and 0 < len(first.start_pseudo_ids) < 12
    assert first.judge["precision"] == 1.0 and first.judge["accepted_label_miou"] > 0.5
    assert first.budget["judge_calls"] == last.budget["judge_calls"] == 12
    assert last.budget["fixes"] == 3 and last.budget["human_seconds"] < 5 * config.mask_seconds  # two validate
    learnt = loop.team.learner.seen[1]
    truth = {row["id"]: row["mask"] for row in data.train}
    assert all((learnt[i] == truth[i]).all() for i in first.fix_ids) and len(first.fix_ids) == 3
