"""What a mask means is never guessed: values, palettes, names, layouts and file names that people really have."""

from __future__ import annotations

import json
import unicodedata
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlm_itl.core.checks import ConfigError, DataError, RunError
from vlm_itl.data.labels import LabelSpace
from vlm_itl.data.masks import read_mask, row_ids
from vlm_itl.data.sources import SegData, check_data, load_data

pytestmark = pytest.mark.usefixtures("undrawn")

Save = Callable[[np.ndarray], Image.Image]
SIZE = (24, 20)
COLOURS = np.array([(0, 0, 0), (250, 50, 83), (51, 221, 255), (255, 204, 51)], np.uint8)


def picture(index: int) -> Image.Image:
    """A photograph unlike the others."""
    small = np.random.default_rng(1000 + index).integers(0, 256, (5, 6, 3)).astype(np.uint8)
    return Image.fromarray(small).resize(SIZE, Image.Resampling.BICUBIC)


def truth(index: int, classes: int = 4) -> np.ndarray:
    """Class indices: background and two rectangles."""
    mask = np.zeros(SIZE[::-1], np.uint8)
    mask[3:9, 4:12] = 1 + index % (classes - 1)
    mask[11:18, 10:20] = 1 + (index + 1) % (classes - 1)
    return mask


def write(root: Path, image: str, mask: str, save: Save, classes: int = 4, count: int = 8, names: str = "") -> Path:
    """A data set in any layout; `image` and `mask` are forms such as images/p{}.png."""
    for index in range(count):
        for form, made in ((image, picture(index)), (mask, save(truth(index, classes)))):
            path = root / form.format(index)
            path.parent.mkdir(parents=True, exist_ok=True)
            made.save(path)
    if names:
        (root / "classes.txt").write_text(names.replace(" ", "\n"))
    return root


def flat(
    root: Path, save: Save = Image.fromarray, classes: int = 4, names: str = "background crack pothole patch"
) -> Path:
    """images/ and masks/."""
    return write(root, "images/p{}.png", "masks/p{}.png", save, classes, names=names)


def wrong(data: SegData, classes: int = 4) -> int:
    """How many masks are read as something else than was drawn."""
    rows = [row for split in data.splits.values() for row in split]
    return sum(not np.array_equal(row["mask"], truth(int(row["id"][-1]), classes)) for row in rows)


def load(root: Path, **options: Any) -> SegData:
    """Without the search for copies."""
    return load_data(str(root), leaks="off", options=options or None)


def run(root: Path, out: Path, **options: Any) -> dict[str, Any]:
    """The summary of a shortest run."""
    from vlm_itl.experiment.config import make_config
    from vlm_itl.experiment.loop import run_baseline

    small = dict(image_size=32, steps=1, batch_size=2, val_share=2, gallery=0, device="cpu", leaks="off")
    list(run_baseline(make_config(dataset=str(root), output_dir=str(out), data_options=options, **small)))
    return json.loads((out / "summary.json").read_text())


def black_and_white(mask: np.ndarray) -> Image.Image:
    """0 and 255, as drawing programs write two classes."""
    return Image.fromarray((mask > 0).astype(np.uint8) * 255)


def by_first_use(mask: np.ndarray) -> Image.Image:
    """A palette of its own in every file: the colours are the same everywhere, the indices are not."""
    return Image.fromarray(COLOURS[mask]).quantize(colors=4, method=Image.Quantize.MEDIANCUT)


def with_palette(mask: np.ndarray, colours: np.ndarray) -> Image.Image:
    """A palette PNG."""
    image = Image.fromarray(mask)
    image.putpalette(colours.astype(np.uint8).tobytes())
    return image


# --- 2: 0 and 255


def test_number_2_black_and_white_masks_are_no_void(tmp_path: Path) -> None:
    """A mean IoU of 1.0 for nothing: refused before the first step, with the option that reads them."""
    root = flat(tmp_path / "data", black_and_white, 2, "background lesion")
    with pytest.raises(DataError, match=r"255.*'values': \[0, 255\]"):
        run(root, tmp_path / "out")
    summary = run(root, tmp_path / "out", values=[0, 255])  # the same folder: nothing was left that blocks
    assert set(summary["test"]["per_class_iou"]) == {"background", "lesion"}
    assert wrong(load(root, values=[0, 255]), 2) == 0
    card = json.loads((tmp_path / "out" / "data.json").read_text())
    assert card["masks"]["line"] == "8 masks: grey 0, 255 -> background, lesion; nothing is void"


def test_number_2_said_by_check_data_and_by_reading(tmp_path: Path) -> None:
    root = write(tmp_path, "images/p{}.png", "masks/p{}.png", black_and_white, 2, count=14, names="background lesion")
    with pytest.warns(UserWarning, match=r"'values': \[0, 255\]"):
        check_data(load(root))
    with pytest.raises(DataError, match=r"'values': \[0, 255\]"):
        [row["mask"] for row in load(root).train]
    with pytest.raises(DataError, match="'values'"):
        [row["mask"] for row in load_data(str(root), leaks="off", binary=True).train]


@pytest.mark.parametrize("use", ["fit", "evaluate"])
def test_number_2_the_way_of_the_library(use: str, tmp_path: Path) -> None:
    """Training and evaluation take rows undecoded, past the transform that watched."""
    from vlm_itl.model.predict import Inference, evaluate
    from vlm_itl.model.recipe import TrainSettings
    from vlm_itl.model.segmenter import load_model
    from vlm_itl.model.train import fit

    root = write(tmp_path, "images/p{}.png", "masks/p{}.png", black_and_white, 2, count=14, names="background lesion")
    for options in ({}, {"values": [0, 255]}):
        data = load(root, **options)
        model = load_model("segformer-nano", data.labels)
        expected = nullcontext() if options else pytest.raises(DataError, match=r"'values': \[0, 255\]")
        with expected:
            if use == "fit":
                fit(model, data.train, TrainSettings(steps=4, batch_size=4), Inference(32))
            else:
                evaluate(model, data.train, Inference(32))


@pytest.mark.parametrize("limit", [3, 0])
def test_number_2_a_trial_of_a_judge(limit: int, tmp_path: Path) -> None:
    """Truth without a class would make every judge's accuracy meaningless."""
    from vlm_itl.judging.trial import make_judge_config, try_judge

    root = write(tmp_path, "images/p{}.png", "masks/p{}.png", black_and_white, 2, count=20, names="background lesion")
    settings = dict(
        dataset=str(root), leaks="off", limit=limit, per_image=2, resamples=10, output_dir=str(tmp_path / "o")
    )
    with pytest.raises(DataError, match=r"'values': \[0, 255\]"):
        try_judge(make_judge_config(settings, split="train"))
    said = {"data_options": {"values": [0, 255]}}  # the same folder: nothing was left that blocks
    assert try_judge(make_judge_config({**settings, **said}, split="train")).report["queries"] > 0


def test_number_2_questions_that_were_paid_are_kept(tmp_path: Path) -> None:
    """The judge was examined before the masks of the start were read: the account stays, or it would be paid twice."""
    from vlm_itl.experiment.config import make_config
    from vlm_itl.experiment.loop import run_al

    root, out = flat(tmp_path / "data", black_and_white, 2, "background lesion"), tmp_path / "out"
    small = dict(image_size=32, steps=1, batch_size=2, val_share=2, gallery=0, device="cpu", leaks="off", initial=2)
    config = make_config(
        dataset=str(root), output_dir=str(out), mode="vlm", judge="always_yes", max_labelled=2, **small
    )
    for _ in range(2):
        with pytest.raises(DataError, match="'values'"):
            list(run_al(config))
        assert (out / "preflight.json").is_file() and (out / "config.json").is_file()


def test_number_2_real_void_is_not_called_into_question(tmp_path: Path, voc: Path) -> None:
    """VOC's border, void beside both classes, and what somebody has said, are void."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_data(load_data(str(voc), options={"max_train": 6, "max_test": 2}, val_share=2, leaks="off"))
    root = flat(tmp_path / "said", black_and_white, 2, "background lesion")
    assert check_data(load(root, values=[0, 1])).loc["void", "train images"] == 5

    def bordered(mask: np.ndarray) -> Image.Image:
        mask[0] = 255
        return Image.fromarray(mask)

    assert len(list(load(flat(tmp_path / "border", bordered)).train)) == 5


def test_number_2_a_class_that_is_only_void_is_said(tmp_path: Path) -> None:
    """Three classes as 0, 1 and 255."""
    root = flat(tmp_path / "data", lambda m: Image.fromarray(np.array([0, 1, 255], np.uint8)[m]), 3, "background a b")
    with pytest.warns(UserWarning, match="no pixel of 'b'.*255"):
        check_data(load(root))
    with pytest.warns(UserWarning, match="no pixel of 'b'.*255"):
        run(root, tmp_path / "out")
    assert wrong(load(root, values=[0, 1, 255]), 3) == 0


# --- 3: palettes


def test_number_3_palettes_of_their_own_are_refused_by_name(tmp_path: Path) -> None:
    root = flat(tmp_path / "data", by_first_use)
    for path in (root / "masks").glob("*.png"):  # headers are enough: no pixel is read
        data = path.read_bytes()
        path.write_bytes(data[: data.index(b"IDAT") - 4] + b"\x00\x00\x00\x04IDATgarbage")
    with pytest.raises(DataError, match=r"p\d\.png.*palette.*'read_by': 'colour'"):
        load(root)
    with pytest.raises(DataError, match=r"p\d\.png: palette entry \d has the colour of class"):
        load(root, palette=COLOURS.tolist())


def test_number_3_colours_count_where_that_is_said(tmp_path: Path) -> None:
    data = load(flat(tmp_path / "data", by_first_use), palette=COLOURS.tolist(), read_by="colour")
    assert wrong(data) == 0 and data.labels.palette[1].tolist() == [250, 50, 83]


def test_number_3_one_used_entry_of_another_class_is_enough(tmp_path: Path) -> None:
    """Blended and quantised: most entries are colours of no class."""
    colours = np.full((256, 3), 77)
    colours[:3] = COLOURS[0], (9, 9, 9), COLOURS[1]
    path = tmp_path / "blended.png"
    with_palette(np.array([[0, 1, 2]], np.uint8), colours).save(path)
    labels = LabelSpace(("background", "crack", "pothole", "patch"), palette=COLOURS)
    with pytest.raises(DataError, match=r"blended\.png: palette entry 2 has the colour of class 1 \('crack'\)"):
        read_mask(path, labels)


@pytest.mark.parametrize("kind", ["short", "padded", "grey", "one colour"])
def test_number_3_palettes_that_agree_are_read(kind: str, tmp_path: Path) -> None:
    """Cut after the last used entry, filled up with black, or saying nothing."""
    count = [0]

    def save(mask: np.ndarray) -> Image.Image:
        count[0] += 1
        colours = np.zeros((256, 3), np.uint8)
        colours[:4] = COLOURS
        if kind == "short" and count[0] % 2:
            colours = COLOURS
        if kind == "grey":
            colours = np.arange(256)[:, None].repeat(3, 1)
        if kind == "one colour":
            colours = np.full((256, 3), 7)
        return with_palette(mask, colours)

    data = load(flat(tmp_path / "data", save))
    assert wrong(data) == 0
    if kind in ("short", "padded"):
        assert data.labels.palette[:4].tolist() == COLOURS.tolist()  # drawn as the owner draws them


def test_colours_of_another_data_set_are_not_assumed(tmp_path: Path) -> None:
    """RGB masks with names of one's own were read by VOC's colours."""
    root = flat(tmp_path / "data", lambda mask: Image.fromarray(LabelSpace.voc().colorize(mask)))
    with pytest.raises(DataError, match=r"RGB.*'palette'.*'read_by': 'index'"):
        load(root)
    assert wrong(load(root, palette="voc")) == 0


@pytest.mark.parametrize("channels", ["three", "red"])
def test_indices_in_rgb(channels: str, tmp_path: Path) -> None:
    def save(mask: np.ndarray) -> Image.Image:
        rest = mask if channels == "three" else np.zeros_like(mask)
        return Image.fromarray(np.stack([mask, rest, rest], -1))

    root = flat(tmp_path / "data", save)
    with pytest.raises(DataError, match="'read_by': 'index'"):
        load(root)
    assert wrong(load(root, read_by="index")) == 0
    white = flat(tmp_path / "white", lambda mask: black_and_white(mask).convert("RGB"), 2, "background lesion")
    assert wrong(load(white, values=[0, 255]), 2) == 0


# --- 8: names


def test_number_8_names_are_never_another_data_sets(tmp_path: Path) -> None:
    root = flat(tmp_path / "data", names="")
    with pytest.raises(DataError, match=r"classes\.txt.*'classes'"):
        load(root)
    assert load(root, classes=4).labels.names == ("class 0", "class 1", "class 2", "class 3")
    names = {0: "a", 1: "b", 2: "c", 3: "d"}
    assert load(root, classes=names).labels.names == ("a", "b", "c", "d")  # not the keys
    assert load(root, classes={"sky": 2, "wall": 1, "sea": 3}).labels.file_values == (1, 2, 3)
    (root / "classes.txt").mkdir()
    with pytest.raises(DataError, match=r"classes\.txt: is a folder"):
        load(root)


def test_number_8_not_for_hub_sets_or_voc_layouts_either(tmp_path: Path) -> None:
    from datasets import Dataset, Features
    from datasets import Image as ImageColumn

    rows = [{"image": picture(index), "mask": Image.fromarray(truth(index))} for index in range(8)]
    Dataset.from_list(rows, features=Features(image=ImageColumn(), mask=ImageColumn())).save_to_disk(
        str(tmp_path / "hub")
    )
    with pytest.raises(DataError, match="'classes'"):
        load(tmp_path / "hub")
    hub = load(tmp_path / "hub", classes=["a", "b", "c"], ignore=[0])
    assert hub.labels.file_values == (1, 2, 3)
    mine = write(tmp_path / "mine", "JPEGImages/p{}.png", "SegmentationClass/p{}.png", Image.fromarray)
    (mine / "ImageSets/Segmentation").mkdir(parents=True)
    (mine / "ImageSets/Segmentation/train.txt").write_text("p0\np1\np2\np3\np4\n")
    (mine / "ImageSets/Segmentation/val.txt").write_text("p5\np6\n")
    with pytest.raises(DataError, match="'classes'"):
        load(mine)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("labels.txt", "0 background\n1 crack\n2 pothole\n3 patch\n255 void\n"),
        ("labels.txt", "2: pothole\n0: background\n3: patch\n1: crack\n"),
        ("class_names.txt", "background\ncrack\npothole\npatch"),
        ("labels.txt", "background 0\ncrack 1\npothole 2\npatch 3\n"),
        ("_classes.csv", "Pixel Value, Class\n0, background\n1, crack\n2, pothole\n3, patch\n"),
        ("labelmap.txt", "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncrack:250,50,83::\n"
                         "pothole:51,221,255::\npatch:255,204,51::\n"),
        ("class_dict.csv", "name,r,g,b\nbackground,0,0,0\ncrack,250,50,83\npothole,51,221,255\npatch,255,204,51\n"),
        ("label_colors.txt", "0 0 0\tbackground\n250 50 83\tcrack\n51 221 255\tpothole\n255 204 51\tpatch\n"),
    ],
)  # fmt: skip
def test_number_8_files_that_name_classes(name: str, text: str, tmp_path: Path) -> None:
    root = flat(tmp_path / "data", names="")
    (root / name).write_text(text)
    data = load(root)
    assert data.labels.names == ("background", "crack", "pothole", "patch") and wrong(data) == 0
    coloured = flat(tmp_path / "rgb", lambda mask: Image.fromarray(COLOURS[mask]), names="")
    (coloured / name).write_text(text)
    if "250" in text:
        assert wrong(load(coloured)) == 0
    (root / "classes.txt").write_text("background\nred\n")
    with pytest.raises(DataError, match="different things about the classes"):
        load(root)


# --- 9: ignore


def test_number_9_other_values_can_be_ignored(tmp_path: Path) -> None:
    """ADE's 0, CamVid's 11, Cityscapes' ids, in one option."""
    root = flat(tmp_path / "ade", names="wall building sky")
    with pytest.raises(DataError, match=r"value 3 .*'ignore': \[0\]"):
        check_data(load(root))
    row = load(root, ignore=[0]).test[0]
    drawn = truth(int(row["id"][-1]))
    assert (row["mask"][drawn == 0] == 255).all() and (row["mask"][drawn > 0] == drawn[drawn > 0] - 1).all()
    assert load(root, ignore=0).labels == load(root, ignore=[0]).labels
    camvid = LabelSpace(tuple(f"class {index}" for index in range(11)), ignore=[11])
    assert read_mask(Image.fromarray(np.array([[0, 10, 11, 255]], np.uint8)), camvid).tolist() == [[0, 10, 255, 255]]
    named = LabelSpace(("a", "b"), values=[7, 8], ignore=[0, 9])
    assert read_mask(Image.fromarray(np.array([[0, 7, 8, 9]], np.uint8)), named).tolist() == [[255, 0, 1, 255]]
    with pytest.raises(DataError, match="value 1 "):
        read_mask(Image.fromarray(np.array([[1]], np.uint8)), named)
    painted = LabelSpace(("a", "b"), palette=[(9, 0, 0), (0, 9, 0)], ignore=[[255, 255, 255]])
    cell = Image.fromarray(np.array([[(9, 0, 0), (255, 255, 255), (0, 9, 0)]], np.uint8))
    assert read_mask(cell, painted).tolist() == [[0, 255, 1]]


@pytest.mark.parametrize("ignore", ["zero", [300], [[1, 2]], [True], [-1], 1.5, [7], [[0, 0, 0]]])
def test_number_9_what_cannot_be_ignored(ignore: Any) -> None:
    with pytest.raises(ConfigError, match="ignore"):
        LabelSpace(("a", "b"), values=[7, 8], ignore=ignore)


# --- 20: names of files


@pytest.mark.parametrize(
    "names",
    [
        ["一号照片", "二号照片", "三号照片", "四号照片", "五号照片", "六号照片"],
        ["снимок", "дорога", "мост", "река", "лес", "пёс"],
        ["हिन्दी", "हिन्दू", "हिन्द", "हन्द", "हिदं", "ह"],
        ["a/b", "a-b", "a b", "a  b", "a;b", "A-b"],
        ["ä", "ö", "Ä", "Ö", "ß", "ss"],
        ["CON", "nul", "-x", "👍", "👎", "x" * 240],
    ],
    ids=["han", "cyrillic", "marks", "dashes", "capitals", "odd"],
)
def test_number_20_names_stay_apart(names: list[str], tmp_path: Path) -> None:
    for index, name in enumerate(names):
        for part, made in (("images", picture(index)), ("masks", Image.fromarray(truth(index)))):
            path = tmp_path / part / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            made.save(path)
    (tmp_path / "classes.txt").write_text("a\nb\nc\nd\n")
    data = load(tmp_path)
    ids = [name for rows in data.splits.values() for name in row_ids(rows)]
    assert len({one.casefold() for one in ids}) == len(names)
    assert all(len(one.encode()) <= 150 and not set(one) & set(' /;\\:"*?<>|') and one[0] != "." for one in ids)
    if names[0] in ("снимок", "一号照片"):
        assert set(ids) == set(names)


def test_number_20_a_mac_and_the_others_mean_the_same_name(tmp_path: Path) -> None:
    apart = unicodedata.normalize("NFD", "Übung")
    root = write(tmp_path / "a", "images/Übung{}.png", f"masks/{apart}{{}}.png", Image.fromarray, names="a b c d")
    assert wrong(load(root)) == 0
    root = write(tmp_path / "b", f"images/{apart}{{}}.png", f"masks/{apart}{{}}.png", Image.fromarray, names="a b c d")
    (root / "train.txt").write_text("Übung0\nÜbung1\nÜbung2\nÜbung3\n")
    (root / "test.txt").write_text("Übung4\nÜbung5.png\n")
    assert row_ids(load(root).test) == ["Übung4", "Übung5"]


def test_number_20_a_name_that_is_no_text(tmp_path: Path) -> None:
    root = flat(tmp_path / "data")
    with open(bytes(root / "images") + b"/\xff\xfe.png", "wb") as file:
        picture(0).save(file, "PNG")
    with pytest.raises(DataError, match=r"xff.xfe\.png.* is not UTF-8; rename") as caught:
        load(root)
    str(caught.value).encode()


# --- 30: a new run


def test_number_30_a_bad_mask_is_the_datas_own_error(tmp_path: Path) -> None:
    """A class name short: the run said that its record was damaged."""
    root = flat(tmp_path / "data", names="background crack pothole")
    with pytest.raises(DataError, match="mask value 3") as caught:
        run(root, tmp_path / "out")
    assert "record.json" not in str(caught.value)
    assert [path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")] == []
    (root / "classes.txt").write_text("background\ncrack\npothole\npatch\n")
    assert run(root, tmp_path / "out")["finished"]
    (root / "classes.txt").write_text("background\npatch\ncrack\npothole\n")  # beyond the list: it went on in silence
    with pytest.raises(RunError, match="read its masks as .*crack, pothole, patch.* now it would be .*patch, crack"):
        run(root, tmp_path / "out")


# --- 32 and 36: layouts


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("{}/images/p{}.jpg", "{}/masks/p{}.png"),
        ("img/p{1}.jpg", "label/p{1}.png"),
        ("Images/p{1}.jpg", "GT/p{1}.png"),
        ("images/{}/p{}.jpg", "annotations/{}/p{}.png"),
        ("images/p{1}.jpg", "masks/p{1}_mask.png"),
        ("images/p{1}.png", "images/p{1}_mask.png"),
        ("{}/p{}.jpg", "{}/p{}_mask.png"),
        ("p{1}.jpg", "p{1}_segmentation.png"),
        ("{}/p{}.jpg", "{}annot/p{}.png"),
        ("{}/p{}.png", "{}_labels/p{}_L.png"),
        ("{}_images/p{}.png", "{}_masks/p{}.png"),
        ("leftImg8bit/{}/ulm/p{}_leftImg8bit.png", "gtFine/{}/ulm/p{}_gtFine_labelIds.png"),
        ("images/.ipynb_checkpoints/../p{1}.png", "masks/p{1}.png"),
    ],
)
def test_number_32_layouts(image: str, mask: str, tmp_path: Path) -> None:
    for index in range(8):
        split = "train" if index < 4 else "val" if index < 6 else "test"
        for form, made in ((image, picture(index)), (mask, Image.fromarray(truth(index)))):
            path = tmp_path / form.format(split, index)
            path.parent.mkdir(parents=True, exist_ok=True)
            made.save(path)
    if ".ipynb_checkpoints" in image:  # number 36
        (tmp_path / "images/.ipynb_checkpoints").mkdir(exist_ok=True)
        picture(0).save(tmp_path / "images/.ipynb_checkpoints/p0-checkpoint.png")
    data = load(tmp_path, classes=["background", "crack", "pothole", "patch"])
    read = {
        split: {next(c for c in row["id"] if c.isdigit() and "p" + c in row["id"]): row["mask"] for row in rows}
        for split, rows in data.splits.items()
    }
    assert sum(len(rows) for rows in read.values()) == 8
    assert all(np.array_equal(m, truth(int(n))) for rows in read.values() for n, m in rows.items())
    if "{}" in image:
        assert set(read["test"]) == {"6", "7"} and set(read["val"]) == {"4", "5"}


def test_number_32_lists_of_pairs(tmp_path: Path) -> None:
    root = write(tmp_path, "photos/p {}.jpg", "drawn/q {}.png", Image.fromarray, names="a b c d")
    for split, members in (("train", range(5)), ("val", (5, 6)), ("test", (7,))):
        (root / f"{split}.txt").write_text("".join(f"photos/p {i}.jpg drawn/q {i}.png\n" for i in members))
    data = load(root)
    assert wrong(data) == 0 and [len(rows) for rows in data.splits.values()] == [5, 2, 1]
    (root / "val.txt").write_text("photos/p 5.jpg drawn/q 55.png\n")
    with pytest.raises(DataError, match=r"val\.txt: line 1 does not name an image and a mask"):
        load(root)


def test_number_32_cvat(tmp_path: Path) -> None:
    form = ("JPEGImages/f{}.jpg", "SegmentationClass/f{}.png")
    root = write(tmp_path, *form, lambda mask: Image.fromarray(COLOURS[mask]))
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    (root / "ImageSets/Segmentation/default.txt").write_text("".join(f"f{index}\n" for index in range(8)))
    lines = [f"{name}:{','.join(map(str, COLOURS[k]))}::" for k, name in enumerate(("background", "Cat", "Dog", "Cow"))]
    (root / "labelmap.txt").write_text("# label:color_rgb:parts:actions\n" + "\n".join(lines) + "\n")
    for options in ({}, {"train_list": "default"}, {"train_list": "default", "test_list": "default"}):
        data = load(root, **options)
        assert data.labels.names[1] == "Cat" and wrong(data) == 0


def test_number_32_two_masks_of_one_image_are_refused(tmp_path: Path) -> None:
    root = flat(tmp_path / "a")
    Image.fromarray(truth(1)).save(root / "masks" / "p0_1.png")
    with pytest.raises(DataError, match="'p0' has two masks"):
        load(root)
    root = write(tmp_path / "b", "images/p{}.png", "masks/p{}_mask.png", Image.fromarray, names="a b c d")
    write(root, "images/p{}.png", "masks/p{}_seg.png", Image.fromarray)
    with pytest.raises(DataError, match="'_mask' and '_seg' fit.*'mask_suffix'"):
        load(root)
    assert wrong(load(root, mask_suffix="_seg")) == 0
    (root / "photos").mkdir()
    picture(0).save(root / "photos" / "p0.png")
    with pytest.raises(DataError, match="images and photos could all.*'images'"):
        load(root, mask_suffix="_seg")


@pytest.mark.parametrize(
    "options", [{"mask_suffix": 3}, {"images": ["a"]}, {"classes": {"a": "b"}}, {"read_by": "color"}]
)
def test_options_of_another_type_are_said(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        load(flat(tmp_path), **options)


@pytest.mark.parametrize("kind", ["coco", "coco by split", "labelme", "yolo"])
def test_number_32_polygons_get_a_hint(kind: str, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    picture(0).save(tmp_path / "images" / "p0.png")
    coco = {"images": [], "annotations": [{"segmentation": [[1, 2, 3, 4]], "bbox": []}], "categories": []}
    if kind == "coco by split":
        (tmp_path / "labels").rmdir()
        (tmp_path / "images").rename(tmp_path / "train")
        (tmp_path / "train" / "_annotations.coco.json").write_text(json.dumps(coco))
    elif kind == "coco":
        (tmp_path / "_annotations.coco.json").write_text(json.dumps(coco))
    elif kind == "labelme":
        (tmp_path / "images" / "p0.json").write_text(json.dumps({"shapes": [], "imagePath": "p0.png"}))
    else:
        (tmp_path / "labels" / "p0.txt").write_text("0 .1 .2 .3 .4\n")
    with pytest.raises(DataError, match="read_masks" if kind.startswith("coco") else "draw its polygons, one PNG"):
        load(tmp_path)


# --- beyond the list


@pytest.mark.parametrize("options", [{"values": [0, 7, 9, 255]}, {"ignore": [0], "classes": ["a", "b", "c"]}])
def test_pseudo_labels_are_read_as_they_were_written(options: dict[str, Any], tmp_path: Path) -> None:
    """Predicted masks hold class indices, and were decoded by the values of the data set's own files."""
    from vlm_itl.data.masks import MaskStore
    from vlm_itl.experiment.annotator import Oracle, training_rows
    from vlm_itl.experiment.pool import Ledger, Pool

    spread = np.array([0, 7, 9, 255], np.uint8)
    data = load(
        flat(tmp_path / "data", (lambda m: Image.fromarray(spread[m])) if "values" in options else Image.fromarray),
        **options,
    )
    oracle = Oracle(data, Ledger())
    pool, store = Pool(oracle.ids), MaskStore(tmp_path / "masks", data.labels)
    oracle.label(oracle.ids[:1])
    pool.add_human(oracle.ids[:1])
    mask = np.arange(SIZE[0] * SIZE[1]).reshape(SIZE[::-1]) % 3
    mask[0] = 255
    store.write(oracle.ids[1], mask.astype(np.uint8))
    pool.set_pseudo({oracle.ids[1]: store.path(oracle.ids[1])})
    assert np.array_equal(training_rows(pool, oracle)[1]["mask"], mask)


def test_pseudo_labels_of_binary_tasks(tmp_path: Path) -> None:
    """Where the background is not class 0, its predicted mask was merged once more, into foreground."""
    from vlm_itl.data.masks import MaskStore

    labels = LabelSpace(("tree", "background", "car")).binary()
    store = MaskStore(tmp_path, labels)
    store.write("a", np.array([[0, 1, 255]], np.uint8))
    assert read_mask(store.path("a"), labels).tolist() == [[0, 1, 255]]


def test_a_mask_of_8_bits_that_was_saved_with_16_is_told(tmp_path: Path) -> None:
    root = flat(tmp_path / "data", lambda mask: Image.fromarray(mask.astype(np.uint16) * 257))
    with pytest.raises(DataError, match=r"mask value (257|514|771) .*257: a mask of 8 bits.*16"):
        check_data(load(root))
