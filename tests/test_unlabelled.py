"""Photographs without masks are a data set, where somebody says that this is meant."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlm_itl.core.checks import ConfigError, DataError
from vlm_itl.data.masks import row_ids
from vlm_itl.data.sources import load_data

CLASSES = {"classes": ["background", "thing"]}


def photographs(folder: Path, count: int = 20, masks: int = 0, layout: str = "") -> Path:
    """Some pictures, the first few with a mask."""
    rng = np.random.default_rng(0)
    (folder / layout).mkdir(parents=True)
    for number in range(count):
        Image.fromarray(rng.integers(0, 255, (16, 20, 3), np.uint8)).save(folder / layout / f"p{number:02d}.png")
    for number in range(masks):
        (folder / "masks").mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 2, (16, 20), np.uint8)).save(folder / "masks" / f"p{number:02d}.png")
    return folder


@pytest.mark.parametrize("layout", ["", "images", "JPEGImages"])
def test_photographs_alone_are_refused_unless_it_is_said(tmp_path: Path, layout: str) -> None:
    folder = str(photographs(tmp_path / "photos", layout=layout))
    words = None if layout else "If nobody has drawn masks yet, people can: annotator='folder'"
    with pytest.raises(DataError, match=words):
        load_data(folder, options=CLASSES)
    if layout == "JPEGImages":  # VOC's own name, without its lists
        return
    data = load_data(folder, options=CLASSES, unlabelled=True, test_share=4, val_share=2)
    assert [len(rows) for rows in data.splits.values()] == [14, 2, 4]
    assert data.unlabelled == {name for rows in data.splits.values() for name in row_ids(rows)}
    with pytest.raises(DataError, match="the cell is empty"):
        data.train[0]


@pytest.mark.parametrize("name", ["test_share", "val_share"])
def test_a_share_that_takes_all_is_called_by_its_name(tmp_path: Path, name: str) -> None:
    """Too large a test split was said to be a validation split."""
    folder = str(photographs(tmp_path / "photos"))
    with pytest.raises(ConfigError, match=f"{name}=200 would take 200 of"):
        load_data(folder, options=CLASSES, unlabelled=True, **{name: 200})
    with pytest.raises(ConfigError, match=name):
        load_data(folder, options=CLASSES, unlabelled=True, **{name: 0})


def test_what_has_a_mask_is_tested_and_validated_on(tmp_path: Path) -> None:
    folder = str(photographs(tmp_path / "photos", masks=9, layout="images"))
    data = load_data(folder, options=CLASSES, unlabelled=True, test_share=4, val_share=3)
    assert len(data.unlabelled) == 11 and data.unlabelled <= set(row_ids(data.train))
    assert data.test[0]["mask"].shape == (16, 20)


def test_masks_decide_nothing_about_the_splits_of_photographs(tmp_path: Path) -> None:
    with_masks = photographs(tmp_path / "with", masks=20, layout="images")
    shutil.copytree(with_masks / "images", tmp_path / "without")
    ways = [load_data(str(with_masks), options=CLASSES), load_data(str(with_masks), options=CLASSES, unlabelled=True)]
    ways.append(load_data(str(tmp_path / "without"), options=CLASSES, unlabelled=True))
    assert len({str([row_ids(rows) for rows in data.splits.values()]) for data in ways}) == 1


def test_classes_have_to_be_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nobody says what the classes are called"):
        load_data(str(photographs(tmp_path / "photos")), unlabelled=True)


def test_a_voc_folder_without_masks(tmp_path: Path) -> None:
    folder = photographs(tmp_path / "mine", layout="JPEGImages")
    (folder / "ImageSets/Segmentation").mkdir(parents=True)
    names = [f"p{number:02d}\n" for number in range(20)]
    (folder / "ImageSets/Segmentation/train.txt").write_text("".join(names))
    data = load_data(str(folder), options=CLASSES, unlabelled=True, test_share=0.25)
    assert len(data.test) == 5 and len(data.unlabelled) == 20
