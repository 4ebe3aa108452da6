"""Spoilt masks: valid, pure by seed, void untouched, IoU as measured; queries with their table; real errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vlm_itl.experiment.config  # noqa: F401  makes every judge known
from vlm_itl.core.checks import ConfigError, DataError
from vlm_itl.data.labels import VOID, LabelSpace
from vlm_itl.data.masks import truth_reader
from vlm_itl.data.scenes import SceneOptions, draw_scene
from vlm_itl.data.sources import load_data
from vlm_itl.judging.corruption import (
    ERROR_KINDS,
    MIN_CHANGE,
    TARGETS,
    components,
    corruption_queries,
    folder_queries,
    register_error,
    spoil_mask,
)
from vlm_itl.model.metrics import image_iou
from vlm_itl.vlm.handler import check_query, make_handler

VOC = LabelSpace.voc()
SCENES = [draw_scene(SceneOptions(), "test", index)[1] for index in (1, 7, 17)]


def two_blocks() -> np.ndarray:
    """A cat and a dog, each ringed by void, on background."""
    truth = np.zeros((60, 90), np.uint8)
    for class_id, left in ((8, 8), (12, 50)):
        truth[18:42, left - 2 : left + 26] = VOID
        truth[20:40, left : left + 24] = class_id
    return truth


@pytest.mark.parametrize("kind", ERROR_KINDS)
@pytest.mark.parametrize("number", range(4))
def test_spoilt_masks_are_valid_pure_and_measured(kind: str, number: int):
    truth = [*SCENES, two_blocks()][number]
    before = truth.copy()
    made = spoil_mask(truth, kind, VOC, seed=3, name="a")
    assert (truth == before).all()
    for one in made:
        assert one.mask.dtype == np.uint8 and one.mask.shape == truth.shape
        assert ((one.mask == VOID) == (truth == VOID)).all()
        assert one.mask[truth != VOID].max() < 21
        assert one.iou == image_iou(one.mask, truth, 21) < 1
        assert one.changed == (one.mask[truth != VOID] != truth[truth != VOID]).mean() >= MIN_CHANGE
        assert one.target in TARGETS
    again = spoil_mask(truth, kind, VOC, seed=3, name="a")
    assert [one.mask.tobytes() for one in again] == [one.mask.tobytes() for one in made]
    assert len({one.mask.tobytes() for one in made}) == len(made)


def test_other_seeds_and_images_err_elsewhere():
    truth = two_blocks()
    for kind in ("shift", "swap", "add"):
        bytes_of = {
            spoil_mask(truth, kind, VOC, (0.6,), seed, name)[0].mask.tobytes()
            for seed, name in [(0, "a"), (1, "a"), (2, "a"), (0, "b"), (0, "c")]
        }
        assert len(bytes_of) > 1, kind


def test_outline_errors_hit_their_targets():
    for truth in [*SCENES, two_blocks()]:
        for kind in ("erode", "dilate", "shift"):
            made = {one.target: one.iou for one in spoil_mask(truth, kind, VOC)}
            assert all(abs(iou - target) < 0.1 for target, iou in made.items()), (kind, made)
            assert sorted(made.values()) == [made[target] for target in sorted(made)]  # milder target, milder error


def test_each_kind_does_what_it_says():
    truth = two_blocks()
    known, cat, dog = truth != VOID, truth == 8, truth == 12
    eroded = spoil_mask(truth, "erode", VOC, (0.6,))[0].mask
    assert set(np.unique(eroded[cat])) == {0, 8} and (eroded[known & ~cat & ~dog] == 0).all()
    dilated = spoil_mask(truth, "dilate", VOC, (0.6,))[0].mask
    assert (dilated[cat] == 8).all() and (dilated[dog] == 12).all() and (dilated[known & ~cat & ~dog] > 0).any()
    shifted = spoil_mask(truth, "shift", VOC, (0.6,))[0].mask
    assert (shifted[cat] == 0).any() and (shifted[known & ~cat & ~dog] > 0).any()
    swapped = spoil_mask(truth, "swap", VOC, (0.4,))[0].mask
    wrong = known & (swapped != truth)
    assert (wrong & (cat | dog)).sum() == wrong.sum() and (swapped[wrong] > 0).all()
    dropped = spoil_mask(truth, "drop", VOC, (0.6,))[0].mask
    assert (dropped[cat] == 0).all() != (dropped[dog] == 0).all()  # one of the two is left out, whole
    added = spoil_mask(truth, "add", VOC, (0.6,))[0].mask
    assert (added[cat | dog] == truth[cat | dog]).all() and (added[known & ~cat & ~dog] > 0).any()
    merged = spoil_mask(truth, "merge", VOC, (0.4,))[0].mask
    assert len({*np.unique(merged[cat]), *np.unique(merged[dog])}) <= 2  # one runs over into the other


def test_some_errors_cannot_be():
    empty, one = np.zeros((20, 20), np.uint8), np.zeros((20, 20), np.uint8)
    one[5:15, 5:15] = 8
    full = np.full((20, 20), 8, np.uint8)
    assert all(spoil_mask(empty, kind, VOC) == [] for kind in ERROR_KINDS)
    assert spoil_mask(one, "merge", VOC) == []
    assert len(spoil_mask(one, "drop", VOC)) == 1  # all or nothing, and not four times the same
    assert spoil_mask(full, "erode", VOC) == [] and spoil_mask(full, "add", VOC) == []
    assert all(spoil_mask(np.full((8, 8), VOID, np.uint8), kind, VOC) == [] for kind in ERROR_KINDS)
    two_classes = LabelSpace(("background", "thing"))
    assert spoil_mask((one > 0).astype(np.uint8), "swap", two_classes) == []  # no other name to give
    speck = np.zeros((100, 100), np.uint8)
    speck[50, 50:53] = 8
    assert all(one.changed >= 0.00003 for kind in ERROR_KINDS for one in spoil_mask(speck, kind, VOC))
    assert len(components(speck, VOC)) == 1


def test_a_kind_of_your_own():
    @register_error("mirror")
    def mirror(truth, labels, rng):
        return lambda strength: truth[:, ::-1] if strength > 0.5 else truth

    try:
        (found,) = spoil_mask(SCENES[0], "mirror", VOC, (0.1,))
        assert found.kind == "mirror" and found.iou < 0.9
    finally:
        del ERROR_KINDS["mirror"]


def test_queries_and_table_pair_up(scenes_small):
    queries, table = corruption_queries(scenes_small.test, VOC, seed=1, limit=5, targets=(0.8, 0.5))
    assert len(queries) == len(table) and table["id"].nunique() == 5
    assert (table["kind"] == "none").sum() == 5 and (table.loc[table["kind"] == "none", "iou"] == 1).all()
    truth = truth_reader(scenes_small.test)
    for query, (_, row) in zip(queries, table.iterrows(), strict=True):
        assert query.id == row["id"] and check_query(query) is None
        assert image_iou(query.mask, truth(query.id), 21) == row["iou"]
    assert queries[0].picture().size == queries[0].mask.shape[::-1]
    again, same = corruption_queries(scenes_small.test, VOC, seed=1, limit=5, targets=(0.8, 0.5))
    assert same.equals(table) and all((a.mask == b.mask).all() for a, b in zip(again, queries, strict=True))
    few, fewer = corruption_queries(scenes_small.test, VOC, seed=1, limit=5, per_image=3, kinds=["erode", "shift"])
    assert fewer.groupby("id").size().max() == 4 and set(fewer["kind"]) <= {"none", "erode", "shift"}
    with pytest.raises(ConfigError, match="Did you mean 'erode'"):
        corruption_queries(scenes_small.test, VOC, limit=1, kinds=["erodee"])


def test_a_simulated_judge_has_its_rates_on_the_test_bed(scenes_small):
    queries, table = corruption_queries(scenes_small.test, VOC)
    judge = make_handler("mock", sensitivity=1.0, specificity=1.0)
    judge.bind_truth(truth_reader(scenes_small.test))
    said = [j.verdict == "yes" for j in judge.judge(queries)]
    assert said == (table["iou"] >= 0.7).tolist()


def test_folder_of_masks(scenes_small, tmp_path):
    rows = scenes_small.test
    for row in range(3):
        example = rows[row]
        mask = np.where(example["mask"] == VOID, 0, example["mask"])
        mask[: mask.shape[0] // 2] = 0
        Image.fromarray(mask.astype(np.uint8)).save(tmp_path / f"{example['id']}.png")
    queries, table = folder_queries(rows, VOC, tmp_path)
    assert len(queries) == 3 and (table["iou"] < 1).all() and (table["kind"] == "model").all()
    assert len(folder_queries(rows, VOC, tmp_path, limit=2, seed=1)[0]) == 2
    Image.fromarray(np.zeros((3, 3), np.uint8)).save(tmp_path / f"{rows[0]['id']}.png")
    with pytest.raises(DataError, match="its image"):
        folder_queries(rows, VOC, tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        folder_queries(rows, VOC, tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no mask"):
        folder_queries(rows, VOC, tmp_path / "empty")


def test_grounded_sam_masks_on_real_images(voc: Path, shared: Path):
    """A real model's errors: most masks good, some not, every kind of group there."""
    folder = shared / "data/grounded_sam_voc"
    if not folder.is_dir():
        pytest.skip("data/grounded_sam_voc is not in the shared folder")
    data = load_data(str(voc))
    queries, table = folder_queries(data.train, data.labels, folder, limit=40)
    assert len(queries) == 40 and 0.3 < table["iou"].mean() < 0.95
    assert set(table["size"]) <= {"small", "medium", "large"} and table["error"].nunique() >= 2
    assert queries[0].picture().size == queries[0].mask.shape[::-1]


def test_real_masks_can_be_spoilt(voc: Path):
    data = load_data(str(voc))
    queries, table = corruption_queries(data.test, data.labels, limit=3, seed=0)
    assert {"erode", "dilate", "shift", "swap", "drop", "add"} <= set(table["kind"])
    near = table[table["kind"].isin(["erode", "dilate", "shift"])]
    assert (np.abs(near["iou"] - near["target"]) < 0.12).all()
    truth = truth_reader(data.test)
    assert all(((q.mask == VOID) == (truth(q.id) == VOID)).all() for q in queries)
