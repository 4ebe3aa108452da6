"""Generated scenes: the same bytes from the same seed, a valid VOC folder, a pool with copies, a test set without."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from PIL import Image

from vlm_itl.core.checks import ConfigError, DataError
from vlm_itl.core.files import read_json
from vlm_itl.data.labels import BORDER_COLOR, VOC_CLASSES, VOID, voc_palette
from vlm_itl.data.scenes import SceneOptions, draw_scene, make_scenes, scene_options, scenes_folder


def digest(folder: Path) -> str:
    """One hash over names and bytes of all files."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        total.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return total.hexdigest()


def thumbnail(image: Image.Image) -> np.ndarray:
    """A small grey copy with mean 0 and length 1, for finding near-copies."""
    grey = np.asarray(image.convert("L").resize((24, 24), Image.Resampling.BOX), dtype=float)
    grey = grey - grey.mean()
    return grey.ravel() / np.linalg.norm(grey)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_scenes(tmp_path_factory.mktemp("scenes") / "a", n_train=40, n_test=20)


def test_official_palette():
    palette = voc_palette()
    assert palette.shape == (256, 3) and palette.dtype == np.uint8
    assert palette[1].tolist() == [128, 0, 0] and palette[15].tolist() == [192, 128, 128]
    assert palette[20].tolist() == [0, 64, 128] and tuple(palette[VOID]) == BORDER_COLOR
    assert len(VOC_CLASSES) == 21 and VOC_CLASSES[20] == "tvmonitor"


def test_two_folders_have_the_same_bytes(folder, tmp_path):
    assert digest(make_scenes(tmp_path / "b", n_train=40, n_test=20)) == digest(folder)
    assert digest(make_scenes(tmp_path / "c", n_train=40, n_test=20, seed=1)) != digest(folder)


def test_a_larger_pool_begins_with_the_smaller_one(folder, tmp_path):
    larger = make_scenes(tmp_path / "larger", n_train=45, n_test=21)
    for part in ("JPEGImages", "SegmentationClass"):
        for path in (folder / part).iterdir():
            assert path.read_bytes() == (larger / part / path.name).read_bytes()


def test_voc_layout(folder):
    lists = {name: (folder / f"ImageSets/Segmentation/{name}.txt").read_text().split() for name in ("train", "val")}
    assert len(lists["train"]) == 40 and len(lists["val"]) == 20
    both = (folder / "ImageSets/Segmentation/trainval.txt").read_text().split()
    assert both == lists["train"] + lists["val"] and len(set(both)) == 60
    sides = set()
    for name in both:
        image = Image.open(folder / f"JPEGImages/{name}.jpg")
        mask = Image.open(folder / f"SegmentationClass/{name}.png")
        assert image.mode == "RGB" and mask.mode == "P" and image.size == mask.size
        values = set(np.unique(np.asarray(mask)).tolist())
        assert values <= set(range(21)) | {VOID} and VOID in values and values & set(range(1, 21))
        palette = np.array(mask.getpalette()[: 3 * 256]).reshape(-1, 3)  # PIL may leave out unused entries at the end
        assert np.array_equal(palette, voc_palette()[: len(palette)])
        sides.update(image.size)
    assert min(sides) >= 96 and max(sides) <= 160 and len(sides) > 20


def counts(options: SceneOptions, split: str, number: int) -> np.ndarray:
    """In how many images each of the 20 classes occurs."""
    present = [np.unique(draw_scene(options, split, index)[1]) for index in range(number)]
    return np.bincount(np.concatenate(present), minlength=256)[1:21]


def test_pool_and_test_are_long_tailed_alike():
    pool, test = counts(scene_options(), "train", 200), counts(scene_options(), "test", 200)
    assert pool.min() >= 1 and pool.max() > 8 * pool.min() and test.min() >= 1 and test.max() > 8 * test.min()
    assert np.abs(pool - test).max() < 0.1 * 200
    assert scipy.stats.spearmanr(pool, test).statistic > 0.8


def test_a_shift_makes_the_test_set_another_one():
    options = scene_options(n_test=80, shift=True)
    test = counts(options, "test", options.n_test)
    assert test.min() >= 4 and test.max() < 6 * test.min()


@pytest.mark.parametrize(
    ("shift", "split", "expected"),
    [
        (True, "train", "c9a2b54a8929ac4b4348090dcfe26bd5c6f24e81ba9b1571fdfbb46fc294c8f2"),
        (True, "test", "f58d58dc4b5af639a7b3ae1c38c04490089c9b736fe7b01c6702847e01ab273e"),
        (False, "train", "c9a2b54a8929ac4b4348090dcfe26bd5c6f24e81ba9b1571fdfbb46fc294c8f2"),
        (False, "test", "579ca6564b81ffa67806618f58ff58758fcb2a8a15dae166ded93f6d1da3cf28"),
    ],
)
def test_scenes_of_version_1_are_one_option_away(shift: bool, split: str, expected: str):
    """With `shift=True` the pixels are those that version 1 drew (its digests); the pool has never changed."""
    total = hashlib.sha256()
    for index in range(24):
        image, mask, quality = draw_scene(scene_options(shift=shift), split, index)
        total.update(image.tobytes() + mask.tobytes() + bytes([quality]))
    assert total.hexdigest() == expected


def test_copies_are_in_the_pool_only():
    options = scene_options(n_train=80, n_test=40)
    pool = np.stack([thumbnail(draw_scene(options, "train", index)[0]) for index in range(80)])
    test = np.stack([thumbnail(draw_scene(options, "test", index)[0]) for index in range(40)])
    alike = pool @ pool.T - np.eye(80)
    assert (alike.max(1) > 0.9).mean() > 0.4  # most of the pool has a near-copy
    assert (test @ pool.T).max() < 0.9
    assert (test @ test.T - np.eye(40)).max() < 0.9


def test_clips_are_noted(folder):
    note = read_json(folder / "scenes.json")
    ids = [name for clip in note["clips"].values() for name in clip]
    assert len(ids) == len(set(ids)) == 24 and note["options"]["redundancy"] == 0.6
    none = scene_options(redundancy=0.0)
    assert draw_scene(none, "train", 0)[0].size


def test_second_call_returns_at_once_and_others_are_refused(folder, tmp_path):
    before = digest(folder)
    assert make_scenes(folder, n_train=40, n_test=20) == folder
    with pytest.raises(DataError, match="n_train 40 there, 41 asked"):
        make_scenes(folder, n_train=41, n_test=20)
    (tmp_path / "mine.txt").write_text("my own work")
    with pytest.raises(DataError, match="not a folder of generated scenes"):
        make_scenes(tmp_path, n_train=2, n_test=1)
    assert digest(folder) == before and (tmp_path / "mine.txt").read_text() == "my own work"


def test_a_stopped_run_leaves_nothing(tmp_path, monkeypatch):
    import vlm_itl.data.scenes as scenes

    def stop(folder, options, split, index):
        raise KeyboardInterrupt

    monkeypatch.setattr(scenes, "_write_scene", stop)
    with pytest.raises(KeyboardInterrupt):
        make_scenes(tmp_path / "x", n_train=2, n_test=1)
    assert list(tmp_path.iterdir()) == []


def test_cache_folder_depends_on_every_option(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_ITL_CACHE", str(tmp_path))
    base = scenes_folder()
    assert base.parent == tmp_path and scenes_folder(scene_options()) == base
    others = [
        dict(seed=1),
        dict(n_test=3),
        dict(size=(96, 128)),
        dict(noise=0.0),
        dict(tail=0.0),
        dict(frames=3),
        dict(shift=True),
    ]
    assert len({scenes_folder(scene_options(**other)) for other in others} | {base}) == 8
    made = make_scenes(n_train=2, n_test=1)
    assert made.parent == tmp_path and made == make_scenes(n_train=2, n_test=1, cache_dir=tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [dict(n_train=0), dict(n_test=1.5), dict(size=(96,)), dict(size=(8, 96)), dict(size=(160, 96)), dict(tail=-1),
     dict(redundancy=2), dict(frames=1), dict(classes=3), dict(seed="a"), dict(noise=float("nan")), dict(size=160),
     dict(size=("a", "b")), dict(shift="yes")],
)  # fmt: skip
def test_impossible_options_are_config_errors(wrong):
    with pytest.raises(ConfigError):
        scene_options(**wrong)


def test_unknown_split():
    with pytest.raises(ConfigError, match="split"):
        draw_scene(scene_options(), "val", 0)
