"""Sources: every layout, every bad input, real VOC, and the promise that loading reads no human label."""

from __future__ import annotations

import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, Value, load_dataset
from datasets import Image as ImageColumn
from PIL import Image

from vlm_itl.core.checks import ConfigError, DataError
from vlm_itl.core.seeds import stable_hash
from vlm_itl.data.groups import carve
from vlm_itl.data.labels import VOID, LabelSpace
from vlm_itl.data.masks import raw_rows, row_ids
from vlm_itl.data.sources import SOURCES, SegData, check_data, load_data, register_source, toy_images

VOC = LabelSpace.voc()
AS_VOC = {"classes": "voc"}


def write_pair(folder: Path, name: str, images: str, masks: str, suffix: str = ".jpg") -> None:
    """An image of 20 x 12, of its name's own colour, and its mask (background, one row of cat, one void pixel)."""
    size, colour = (20, 12), tuple(stable_hash(name)[:3])
    for part in (images, masks):
        (folder / part / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(folder / images / f"{name}{suffix}")
    mask = np.zeros(size[::-1], dtype=np.uint8)
    mask[0], mask[1, 0] = 8, VOID
    image = Image.fromarray(mask)
    image.putpalette(VOC.palette.tobytes())
    image.save(folder / masks / f"{name}.png")


@pytest.fixture
def voc_like(tmp_path: Path) -> Path:
    """Six training and two validation images in VOC layout."""
    folder = tmp_path / "VOCdevkit" / "VOC2012"
    names = [f"2007_{index:06d}" for index in range(8)]
    for name in names:
        write_pair(folder, name, "JPEGImages", "SegmentationClass")
    lists = folder / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("\n".join(names[:6]) + "\n")
    (lists / "val.txt").write_text("\n".join(names[6:]) + "\n")
    return folder


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Ten images in images/ and masks/."""
    folder = tmp_path / "own"
    for index in range(10):
        write_pair(folder, f"pic{index}", "images", "masks", suffix=".png")
    (folder / "classes.txt").write_text("\n".join(VOC.names))
    return folder


def all_ids(data: SegData) -> dict[str, list[str]]:
    """The ids by split."""
    return {split: row_ids(rows) for split, rows in data.splits.items()}


# --- VOC layout


def test_voc_layout_from_any_level(voc_like: Path) -> None:
    loaded = [load_data(str(path)) for path in (voc_like, voc_like.parent, voc_like.parent.parent)]
    assert [len(rows) for rows in loaded[0].splits.values()] == [5, 1, 2]
    assert all_ids(loaded[0]) == all_ids(loaded[1]) == all_ids(loaded[2])
    row = loaded[0].train[0]
    assert row["image"].mode == "RGB" and row["mask"].shape == (12, 20) and set(np.unique(row["mask"])) == {0, 8, VOID}
    assert all_ids(loaded[0])["test"] == ["2007_000006", "2007_000007"]


def test_loading_reads_no_mask_pixel(voc_like: Path) -> None:
    """Everything behind the header of every mask is destroyed; loading and the images must not notice."""
    before = all_ids(load_data(str(voc_like)))
    for path in (voc_like / "SegmentationClass").glob("*.png"):
        content = path.read_bytes()
        header = content.index(b"IDAT") - 4
        path.write_bytes(content[:header] + b"\x00\x00\x00\x04IDATgarbage")
    data = load_data(str(voc_like))
    assert all_ids(data) == before
    pool = data.train.remove_columns("mask")
    assert [row["image"].size for row in pool] == [(20, 12)] * 5
    with pytest.raises(DataError, match="SegmentationClass"):
        data.train[0]
    with pytest.raises(DataError, match="8 broken rows"):
        check_data(data)


def test_carving_is_by_seed_and_id_only(voc_like: Path) -> None:
    first, again, other = (load_data(str(voc_like), seed=seed, val_share=2) for seed in (0, 0, 1))
    assert all_ids(first) == all_ids(again)
    assert set(all_ids(first)["train"]) | set(all_ids(first)["val"]) == {f"2007_{i:06d}" for i in range(6)}
    chosen = {tuple(row_ids(load_data(str(voc_like), seed=seed, val_share=2).val)) for seed in range(8)}
    assert len(chosen) > 3 and tuple(row_ids(other.val)) in chosen
    shuffled = raw_rows(first.train).shuffle(seed=5)
    assert set(row_ids(carve(shuffled, 2)[1])) == set(row_ids(carve(first.train, 2)[1]))


@pytest.mark.parametrize("share", [0, 1.5, -0.1, 6, "half", True, float("nan")])
def test_impossible_validation(voc_like: Path, share: Any) -> None:
    with pytest.raises(ConfigError, match="val_share"):
        load_data(str(voc_like), val_share=share)


def test_voc_missing_parts(voc_like: Path) -> None:
    lists = voc_like / "ImageSets" / "Segmentation"
    with open(lists / "train.txt", "a") as file:
        file.write("2009_000001\n2009_000002\n")
    with pytest.raises(DataError, match=r"train\.txt: '2009_000001' \(and 1 more\) has no image file"):
        load_data(str(voc_like))
    write_pair(voc_like, "2009_000001", "JPEGImages", "elsewhere")
    (lists / "train.txt").write_text("2009_000001\n")
    with pytest.raises(DataError, match="'2009_000001' has no mask file"):
        load_data(str(voc_like))
    (lists / "train.txt").write_text("\n\n")
    with pytest.raises(DataError, match=r"train\.txt: the list is empty"):
        load_data(str(voc_like))
    (lists / "train.txt").unlink()
    with pytest.raises(DataError, match=r"train\.txt: no such list; the folder holds val\.txt"):
        load_data(str(voc_like))
    shutil.rmtree(voc_like / "SegmentationClass")
    with pytest.raises(DataError, match="SegmentationClass: no such folder"):
        load_data(str(voc_like))


def test_an_image_in_two_splits_is_a_leak(voc_like: Path) -> None:
    lists = voc_like / "ImageSets" / "Segmentation"
    with open(lists / "val.txt", "a") as file:
        file.write("2007_000000\n")
    with pytest.raises(DataError, match="'2007_000000' is in (train|val) and in test"):
        load_data(str(voc_like))
    with open(lists / "val.txt", "a") as file:
        file.write("2007_000006\n")
    with pytest.raises(DataError, match="listed twice"):
        load_data(str(voc_like))


def test_voc_lists_by_option(voc_like: Path) -> None:
    (voc_like / "ImageSets" / "Segmentation" / "tiny.txt").write_text("2007_000003\n2007_000004\n")
    data = load_data(str(voc_like), options={"train_list": "tiny"}, val_share=1)
    assert len(data.train) == len(data.val) == 1
    with pytest.raises(ConfigError, match="train_lst.*Did you mean 'train_list'"):
        load_data(str(voc_like), options={"train_lst": "tiny"})


def test_mask_of_another_size(voc_like: Path) -> None:
    Image.new("L", (19, 12)).save(voc_like / "SegmentationClass" / "2007_000002.png")
    with pytest.raises(DataError, match="'2007_000002': the mask is 19x12, its image 20x12"):
        load_data(str(voc_like))


def test_broken_jpeg_is_named(voc_like: Path) -> None:
    path = voc_like / "JPEGImages" / "2007_000001.jpg"
    noise = np.random.default_rng(0).integers(0, 255, (12, 20, 3)).astype(np.uint8)
    Image.fromarray(noise).save(path, quality=95)
    content = path.read_bytes()
    path.write_bytes(content[:-40])
    data = load_data(str(voc_like))  # the header is whole
    with pytest.raises(DataError, match=r"2007_000001\.jpg: broken file"):
        check_data(data)
    path.write_bytes(content[:10])
    with pytest.raises(DataError, match=r"2007_000001\.jpg"):
        load_data(str(voc_like))


def test_mask_value_out_of_range(voc_like: Path) -> None:
    Image.new("L", (20, 12), 99).save(voc_like / "SegmentationClass" / "2007_000006.png")
    with pytest.raises(DataError, match=r"2007_000006\.png: mask value 99"):
        load_data(str(voc_like)).test[0]


def test_max_train_and_max_test(voc_like: Path) -> None:
    data = load_data(str(voc_like), val_share=1, options={"max_train": 3, "max_test": 1})
    assert [len(rows) for rows in data.splits.values()] == [2, 1, 1]
    assert all_ids(data) == all_ids(load_data(str(voc_like), val_share=1, options={"max_train": 3, "max_test": 1}))
    with pytest.raises(ConfigError, match="max_train"):
        load_data(str(voc_like), options={"max_train": 1})


# --- images/ and masks/


def test_folder_without_lists(own: Path) -> None:
    data = load_data(str(own), val_share=2)
    assert [len(rows) for rows in data.splits.values()] == [6, 2, 2]
    assert all_ids(data) == all_ids(load_data(str(own), val_share=2))


def test_folder_lists_csv_and_subfolders_agree(own: Path, tmp_path: Path) -> None:
    names = {"train": [f"pic{i}" for i in range(6)], "val": ["pic6", "pic7"], "test": ["pic8", "pic9"]}
    for split, members in names.items():
        (own / f"{split}.txt").write_text("\n".join(f"{member}.png" for member in members))
    by_list = all_ids(load_data(str(own)))
    assert by_list == names
    lines = ["id,split"] + [f"{m},{'validation' if s == 'val' else s}" for s, ms in names.items() for m in ms]
    (own / "split.csv").write_text("\n".join(lines))
    assert all_ids(load_data(str(own))) == names
    for split, members in names.items():
        for member in members:
            write_pair(tmp_path / "deep", f"{split}/{member}", "images", "masks")
    deep = all_ids(load_data(str(tmp_path / "deep"), options=AS_VOC))
    assert deep == {split: [f"{split}-{member}" for member in members] for split, members in names.items()}


def test_folder_val_only_is_the_test(own: Path) -> None:
    (own / "train.txt").write_text("\n".join(f"pic{i}" for i in range(8)))
    (own / "val.txt").write_text("pic8\npic9\n")
    data = load_data(str(own), val_share=2)
    assert all_ids(data)["test"] == ["pic8", "pic9"] and len(data.train) == 6


def test_folder_labels(own: Path) -> None:
    (own / "classes.txt").write_text("\n".join(["background", *(f"thing {i}" for i in range(8))]))
    assert len(load_data(str(own)).labels) == 9
    (own / "classes.txt").write_text("background\nthing\n")
    with pytest.raises(DataError, match=r"mask value 8 .*2 classes"):
        load_data(str(own)).train[0]
    binary = load_data(str(own), options={"classes": list(VOC.names)}, binary=True)
    assert binary.binary and binary.labels.names == ("background", "foreground")
    assert set(np.unique(binary.train[0]["mask"])) == {0, 1, VOID}
    with pytest.raises(DataError, match="names.txt"):
        load_data(str(own), options={"classes": "names.txt"})


def test_folder_slips(own: Path) -> None:
    (own / "masks" / "pic3.png").rename(own / "masks" / "pic3_mask.png")
    with pytest.raises(DataError, match="'pic3' has no mask file"):
        load_data(str(own))
    shutil.copy(own / "images" / "pic1.png", own / "images" / "pic1.jpg")
    with pytest.raises(DataError, match=r"pic1\.jpg lies beside it"):
        load_data(str(own))
    (own / "images" / "pic1.jpg").unlink()
    shutil.rmtree(own / "masks")
    with pytest.raises(DataError, match="masks: no such folder"):
        load_data(str(own))
    shutil.rmtree(own / "images")
    (own / "images").mkdir()
    (own / "masks").mkdir()
    with pytest.raises(DataError, match="no image files"):
        load_data(str(own))


def test_folder_of_jpeg_masks(own: Path) -> None:
    for path in list((own / "masks").glob("*.png")):
        Image.open(path).convert("L").save(path.with_suffix(".jpg"))
        path.unlink()
    with pytest.raises(DataError, match="save masks as PNG"):
        load_data(str(own))


# --- datasets


def hub_like(rows: dict[str, list[dict[str, Any]]]) -> DatasetDict:
    """Splits with embedded image and RGB mask, as nateraw/pascal-voc-2012 has them."""
    features = Features(image=ImageColumn(), mask=ImageColumn())
    return DatasetDict({split: Dataset.from_list(members, features=features) for split, members in rows.items()})


def coloured(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Rows with RGB masks; row k has colour and class k, counted from `start`."""
    out = []
    for index in range(start, start + count):
        mask = np.zeros((12, 20), dtype=np.uint8)
        mask[0], mask[1, 0] = index % 21, VOID
        out.append({"image": Image.new("RGB", (20, 12), (index, 0, 0)), "mask": Image.fromarray(VOC.colorize(mask))})
    return out


@pytest.mark.parametrize("form", ["save_to_disk", "parquet"])
def test_datasets_folder(form: str, tmp_path: Path) -> None:
    made = hub_like({"train": coloured(12), "val": coloured(3, 50)})
    folder = tmp_path / form
    if form == "save_to_disk":
        made.save_to_disk(str(folder))
    else:
        folder.mkdir()
        for split, rows in made.items():
            rows.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    data = load_data(str(folder), val_share=2, cache_dir=tmp_path / "cache", options=AS_VOC)
    assert [len(rows) for rows in data.splits.values()] == [10, 2, 3]
    name = "val" if form == "save_to_disk" else "validation"  # `datasets` names the split of val-*.parquet so
    assert all_ids(data)["test"] == [f"{name}-00000", f"{name}-00001", f"{name}-00002"]
    for row in data.train:
        index = int(row["id"].split("-")[1])
        assert row["image"].getpixel((0, 0)) == (index, 0, 0)
        assert (row["mask"][0] == index % 21).all() and row["mask"][1, 0] == VOID
    assert all_ids(data) == all_ids(load_data(str(folder), val_share=2, cache_dir=tmp_path / "cache", options=AS_VOC))


def test_imagefolder_with_masks(tmp_path: Path) -> None:
    folder = tmp_path / "imgs" / "train"
    for index in range(6):
        write_pair(folder, f"a{index}", "pics", "labels", suffix=".png")
    lines = ["file_name,mask_file_name"] + [f"pics/a{i}.png,labels/a{i}.png" for i in range(6)]
    (folder / "metadata.csv").write_text("\n".join(lines))
    data = load_data(str(folder.parent), val_share=1, cache_dir=tmp_path / "cache", options=AS_VOC)
    assert sorted(sum(all_ids(data).values(), [])) == [f"a{i}" for i in range(6)]
    assert set(np.unique(data.train[0]["mask"])) == {0, 8, VOID}


def test_datasets_options_and_slips(tmp_path: Path) -> None:
    made = hub_like({"train": coloured(4), "validation": coloured(3, 50), "test": coloured(2, 60)})
    made = made.rename_columns({"image": "photo", "mask": "annotation"})
    made.save_to_disk(str(tmp_path / "d"))
    source = str(tmp_path / "d")
    with pytest.raises(DataError, match="no column image / img .*'photo'"):
        load_data(source)
    data = load_data(source, options={"image_column": "photo", **AS_VOC})
    assert [len(rows) for rows in data.splits.values()] == [4, 3, 2]
    splits = {"train": "train", "test": "validation"}
    data = load_data(source, val_share=1, options={"image_column": "photo", "splits": splits, **AS_VOC})
    assert [len(rows) for rows in data.splits.values()] == [3, 1, 3]
    with pytest.raises(ConfigError, match="split='tset'"):
        load_data(source, options={"image_column": "photo", "splits": {"train": "train", "test": "tset"}})
    with pytest.raises(ConfigError, match="'image_colum' is not known.*Did you mean 'image_column'"):
        load_data(source, options={"image_colum": "photo"})


def test_datasets_of_another_kind(tmp_path: Path) -> None:
    features = Features(image=ImageColumn(), label=Value("int64"))
    rows = Dataset.from_dict({"image": [None], "label": [3]}, features=features)
    rows.save_to_disk(str(tmp_path / "classify"))
    with pytest.raises(DataError, match="column 'label' holds Value, not masks"):
        load_data(str(tmp_path / "classify"))
    only_train = hub_like({"train": coloured(10)})
    only_train.save_to_disk(str(tmp_path / "one"))
    one = load_data(str(tmp_path / "one"), val_share=1, options=AS_VOC)
    assert [len(rows) for rows in one.splits.values()] == [7, 1, 2]
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "readme.md").write_text("no data")
    with pytest.raises(DataError, match="no data set"):
        load_data(str(tmp_path / "nothing"))


def test_rows_without_masks_are_said(tmp_path: Path) -> None:
    rows = coloured(4)
    rows[2]["mask"] = None
    hub_like({"train": rows, "val": coloured(1, 50)}).save_to_disk(str(tmp_path / "holes"))
    with pytest.raises(DataError, match="'train-00002': no mask"):
        load_data(str(tmp_path / "holes"), val_share=1)


def test_own_ids_are_made_safe(tmp_path: Path) -> None:
    features = Features(id=Value("string"), image=ImageColumn(), mask=ImageColumn())
    rows = [{"id": f"../a b/{index}", **row} for index, row in enumerate(coloured(3))]
    made = DatasetDict({"train": Dataset.from_list(rows, features=features), "val": Dataset.from_list(coloured(1, 50))})
    made.save_to_disk(str(tmp_path / "ids"))
    for members in all_ids(load_data(str(tmp_path / "ids"), val_share=1, options=AS_VOC)).values():
        for name in members:
            assert name == Path(name).name and not name.startswith(".") and " " not in name


# --- names


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("scnes", "Did you mean 'scenes'"),
        ("/nowhere/VOC2012", "/nowhere/VOC2012: no such folder.*'scenes'"),
        ("./nowhere", "no such folder"),
        ("a/b/c", "no such folder"),
        ("voc", "no such folder"),
        ("nateraw/pascal-voc-2012", "no network.*'scenes'"),
        ("", "."),
    ],
)
def test_unknown_sources(source: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises((DataError, ConfigError), match=message) as caught:
        load_data(source, cache_dir=tmp_path)
    assert "\n" not in str(caught.value)


def test_a_file_is_no_source(tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(b"")
    with pytest.raises(DataError, match="is a file"):
        load_data(str(tmp_path / "x.zip"))


def test_register_source() -> None:
    try:
        register_source("mine")(lambda source, **rest: SOURCES["toy"]("toy"))
        assert len(load_data("mine").train) == 4
    finally:
        del SOURCES["mine"]


def test_toy() -> None:
    data = load_data("toy")
    assert all_ids(data) == {"train": [f"toy-{i}" for i in range(4)], "val": ["toy-4"], "test": ["toy-5"]}
    assert [row["mask"].shape for row in toy_images(16).train] == [(16, 16)] * 4
    table = check_data(data)
    assert table.loc["void", "test images"] == 1 and list(table.index) == ["background", "red", "blue", "void"]


def test_scenes(scenes_small: SegData) -> None:
    assert [len(rows) for rows in scenes_small.splits.values()] == [22, 2, 8]
    again = load_data("scenes", seed=0, options={"n_train": 24, "n_test": 8})
    assert all_ids(again) == all_ids(scenes_small)
    assert again.train[3]["image"].tobytes() == scenes_small.train[3]["image"].tobytes()
    with pytest.raises(ConfigError):
        load_data("scenes", options={"n_trian": 3})


# --- real VOC


def test_real_voc(voc: Path) -> None:
    data = load_data(str(voc), val_share=0.1)
    assert [len(rows) for rows in data.splits.values()] == [393, 44, 445]
    table = check_data(data)  # all 882 decode
    images = table[["train images", "val images", "test images"]].sum(axis=1)
    assert {name: int(images[name]) for name in ("cat", "dog", "person", "horse", "cow", "sheep", "sofa", "chair")} == {
        "cat": 250, "dog": 249, "person": 168, "horse": 147, "cow": 133, "sheep": 120, "sofa": 35, "chair": 35,
    }  # fmt: skip
    assert images["train"] <= 3 and images["aeroplane"] <= 3
    pixels = table[["train pixels %", "test pixels %"]].mean(axis=1)
    assert 64 < pixels["background"] < 68 and 5 < pixels["void"] < 7


def test_real_voc_as_hub_dataset(voc: Path, tmp_path: Path) -> None:
    """The form of nateraw/pascal-voc-2012: embedded images, RGB masks, splits train and val, as parquet."""
    data = load_data(str(voc), options={"max_train": 12, "max_test": 4}, val_share=2)
    made = {}
    for split, rows in {"train": data.train, "val": data.test}.items():
        members = [{"image": row["image"], "mask": Image.fromarray(VOC.colorize(row["mask"]))} for row in rows]
        made[split] = members
    folder = tmp_path / "parquet"
    folder.mkdir()
    for split, table in hub_like(made).items():
        table.to_parquet(str(folder / f"{split}.parquet"))
    assert "mask" in load_dataset(str(folder), cache_dir=str(tmp_path / "c"), split="train").column_names
    read = load_data(str(folder), val_share=1, cache_dir=tmp_path / "c", options=AS_VOC)
    originals = {row["id"]: row for row in data.train}
    assert len(read.train) == 9 and len(read.test) == 4
    for row in read.train:  # the ids are the stems of the files that were embedded
        original = originals[row["id"]]
        assert zlib.crc32(row["mask"].tobytes()) == zlib.crc32(original["mask"].tobytes())
