"""People who answer with files, and the robot that does as they do: nothing is lost, one line says what is wrong."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_people import LABELS, killed, masks, photos, requests, tree

from vlm_itl.core.checks import ConfigError, DataError
from vlm_itl.data.labels import VOID, LabelSpace
from vlm_itl.data.sources import load_data
from vlm_itl.formats.formats import MaskRow, MaskSet, write_masks
from vlm_itl.people import Answer, AnswerStore, Request, make_annotator
from vlm_itl.people.folder import FolderAnnotator, read_verdicts
from vlm_itl.people.robot import Robot, slipped, work

__all__ = ["photos"]  # the fixture


@pytest.fixture
def folder(tmp_path: Path, photos: dict[str, Path]) -> FolderAnnotator:
    """Three questions, asked: 001_toy-1 to fix, 002_toy-0 to draw, 003_toy-2 to check."""
    annotator = make_annotator("folder", tmp_path / "run", LABELS)
    annotator.ask(requests(photos))
    assert isinstance(annotator, FolderAnnotator)
    return annotator


def test_the_most_urgent_comes_first_and_has_everything_beside_it(folder: FolderAnnotator):
    names = ["001_toy-1", "002_toy-0", "003_toy-2"]
    assert sorted(p.stem for p in (folder.folder / "ask").iterdir()) == names
    assert sorted(p.stem for p in (folder.folder / "proposals").iterdir()) == [names[0], names[2]]
    assert [r.id for r in folder.left()] == ["toy-1", "toy-0", "toy-2"]
    told = (folder.folder / "how_to.txt").read_text()
    assert "red (red 200, green 40, blue 40)" in told and "002_toy-0: draw. unsure" in told
    assert folder.waiting().startswith("waiting for 3 masks (1 to draw, 1 to fix, 1 to check): ")


def test_one_file_answers_one_question(tmp_path: Path, photos: dict[str, Path]):
    """A name that fits two images is refused, where both had the same mask; the name in ask/ settles it."""
    annotator, there = make_annotator("folder", tmp_path / "run", LABELS), tmp_path / "run" / "masks"
    names = ("cat", "cat_mask", "001_cat")
    annotator.ask([Request(name, "draw", photos["toy-0"], priority=-n) for n, name in enumerate(names)])
    Image.fromarray(masks()["toy-1"]).save(there / "cat_mask.png")
    with pytest.raises(DataError, match="cat_mask.png could be the mask of image 'cat' or of 'cat_mask': call it 001"):
        annotator.answered()
    (there / "cat_mask.png").rename(there / "002_cat_mask.png")
    Image.fromarray(masks()["toy-3"]).save(there / "001_cat.png")
    found = {name: answer.mask for name, answer in annotator.answered().items()}
    assert {*found} == {"cat", "cat_mask"} and (found["cat"] == masks()["toy-3"]).all()
    assert annotator.waiting().startswith("waiting for 1 mask (1 to draw)")


def test_later_questions_go_on_counting(folder: FolderAnnotator, photos: dict[str, Path]):
    folder.ask([Request("toy-3", "draw", photos["toy-3"], priority=9.0)])
    assert (folder.folder / "ask" / "004_toy-3.png").is_file() and folder.left()[0].id == "toy-3"


def colours(mask: np.ndarray) -> Image.Image:
    """Each class in its colour."""
    return Image.fromarray(LABELS.colorize(mask))


def palette(mask: np.ndarray) -> Image.Image:
    """Indices with a palette."""
    picture = Image.fromarray(mask).convert("P")
    picture.putpalette(LABELS.palette.tobytes())
    return picture


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("002_toy-0.png", Image.fromarray),
        ("002_toy-0.tif", colours),
        ("002_toy-0_mask.png", palette),
        ("toy-0.bmp", Image.fromarray),
        ("toy-0_L.png", colours),
        ("done/SegmentationClass/002_toy-0.png", palette),
        ("002_toy-0.webp", lambda mask: colours(mask)),
    ],
)
def test_masks_come_back_as_tools_write_them(folder: FolderAnnotator, name: str, make: Callable[..., Image.Image]):
    mask = masks()["toy-1"].copy()
    mask[0, 0] = 255
    path = folder.folder / "masks" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    make(mask).save(path, **({"lossless": True} if name.endswith("webp") else {}))
    answer = folder.answered()["toy-0"]
    assert (answer.mask == mask).all() and answer.verdict == "drawn" and answer.source == str(path)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("001_toy-1,acept\n", r"line 1 \(001_toy-1\): 'acept' is no verdict. Did you mean 'accept'"),
        ("name,verdict\n001_toy-1,accept,-3\n", "'-3' are no seconds"),
        ("001_toy-1,accept,nan\n", "'nan' are no seconds"),
        ("001_toy-1,accept\n1_toy-2,no\n", "'1_toy-2' was not asked. Did you mean '001_toy-1'|'003_toy-2'"),
        ("001_toy-1,no\n", "'rejected', which does not answer 'fix'; allowed: fixed, accepted, skipped"),
        ("002_toy-0,accept\n", "'accepted', which does not answer 'draw'"),
    ],
)
def test_a_line_that_cannot_be_understood(folder: FolderAnnotator, lines: str, words: str):
    (folder.folder / "verdicts.csv").write_text(lines)
    with pytest.raises(DataError, match=words) as told:
        folder.answered()
    assert "\n" not in str(told.value)


def test_a_table_from_a_spreadsheet(tmp_path: Path):
    table = tmp_path / "v.csv"
    table.write_bytes("\ufeffName;Verdict;Seconds;Who\r\n001_a;Accept;12,5;Zoë\r\n".replace("12,5", "12.5").encode())
    assert read_verdicts(table)["001_a"].who == "Zoë"
    table.write_bytes("001_a,yes,,Zo\xeb\n".encode("latin-1"))
    with pytest.raises(DataError, match="is not UTF-8"):
        read_verdicts(table)
    assert read_verdicts(tmp_path / "none.csv") == {}


def test_of_two_answers_none_is_taken(folder: FolderAnnotator):
    for name in ("002_toy-0.png", "toy-0_mask.png"):
        Image.fromarray(masks()["toy-0"]).save(folder.folder / "masks" / name)
    with pytest.raises(DataError, match="image 'toy-0' has two answers, 002_toy-0.png and toy-0_mask.png"):
        folder.answered()
    (folder.folder / "masks" / "toy-0_mask.png").rename(folder.folder / "masks" / "002_toy-0.tif")
    with pytest.raises(DataError):
        folder.answered()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_file_that_is_being_written_waits(folder: FolderAnnotator, share: float):
    path = folder.folder / "masks" / "002_toy-0.png"
    mask = np.random.default_rng(0).integers(0, 3, (8, 8)).astype(np.uint8)
    palette(mask).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    assert "toy-0" not in folder.answered() and len(folder.left()) == 3
    os.utime(path, (1e9, 1e9))
    with pytest.raises(DataError, match="the answer for image 'toy-0' is not taken"):
        folder.answered()
    path.write_bytes(whole)
    assert (folder.answered()["toy-0"].mask == mask).all()


def test_a_stray_file_is_told(folder: FolderAnnotator):
    Image.fromarray(masks()["toy-0"]).save(folder.folder / "masks" / "02_toy0.png")
    assert folder.waiting().endswith("02_toy0.png in masks/ has the name of no photograph in ask/")


def test_options(tmp_path: Path):
    with pytest.raises(ConfigError, match="settle must be a number >= 0"):
        make_annotator("folder", tmp_path, LABELS, settle=-1)


def test_killed_while_asking(tmp_path: Path, photos: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    def ask(place: Path) -> None:
        make_annotator("folder", place, LABELS).ask(requests(photos))

    ask(tmp_path / "whole")
    (tmp_path / "whole" / "how_to.txt").unlink()
    steps = 0
    while killed(monkeypatch, partial(ask, tmp_path / str(steps)), steps):
        ask(tmp_path / str(steps))
        (tmp_path / str(steps) / "how_to.txt").unlink()
        assert tree(tmp_path / str(steps)) == tree(tmp_path / "whole"), steps
        steps += 1
    assert steps > 15


def test_a_robot_killed_while_it_answers(tmp_path: Path, photos: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    robot = Robot(lambda image_id: masks()[image_id], LABELS)
    expected = {r.id: robot.answer(r) for r in requests(photos)}
    steps = 0
    while True:
        annotator = make_annotator("folder", tmp_path / str(steps), LABELS)
        annotator.ask(requests(photos))
        stopped = killed(monkeypatch, partial(work, robot, annotator), steps)
        work(robot, make_annotator("folder", tmp_path / str(steps), LABELS))
        found = annotator.answered()
        assert {i: (a.digest(), a.seconds) for i, a in found.items()} == {
            i: (a.digest(), a.seconds) for i, a in expected.items()
        }
        if not stopped:
            break
        steps += 1
    assert steps >= 8


def test_a_robot_errs_as_often_as_told_and_the_same_whoever_asks(photos: dict[str, Path]):
    robot = Robot(lambda image_id: masks()[image_id], LABELS, error=0.25)
    many = [Request(f"toy-1~{n}", "draw", photos["toy-1"], about="toy-1") for n in range(120)]
    wrong = [r.id for r in many if not np.array_equal(robot.answer(r).mask, masks()["toy-1"])]
    assert 18 < len(wrong) < 45
    assert wrong == [r.id for r in reversed(many) if (robot.answer(r).mask != masks()["toy-1"]).any()][::-1]
    assert slipped(np.zeros((2, 1), np.uint8)).shape == (2, 1)
    for bad in ({"error": 1.5}, {"tau": -1.0}, {"draw_seconds": -5.0}):
        with pytest.raises(ConfigError):
            Robot(masks().__getitem__, LABELS, **bad)


def test_real_photographs_there_and_back(voc: Path, tmp_path: Path):
    """Ten of PASCAL VOC, with void borders: what is taken is what was known, to the pixel, and so are the seconds."""
    data = load_data(str(voc), seed=0)
    rows = {row["id"]: row for row in data.train.select(range(10))}
    asked: list[Request] = []
    for n, (image_id, row) in enumerate(rows.items()):
        row["image"].save(tmp_path / f"{image_id}.jpg")
        kind: Any = ("draw", "fix", "verify")[n % 3]
        shown = None if kind == "draw" else (row["mask"] if n % 2 else slipped(row["mask"]))
        asked.append(Request(image_id, kind, tmp_path / f"{image_id}.jpg", shown, priority=float(n)))
    annotator = make_annotator("folder", tmp_path / "run", data.labels)
    annotator.ask(asked)
    robot = Robot(lambda image_id: rows[image_id]["mask"], data.labels)
    assert work(robot, annotator) == 10 and annotator.waiting() == ""
    store = AnswerStore(tmp_path / "answers", data.labels)
    assert all(store.take(answer) for answer in annotator.answered().values())
    for request in asked:
        known: Answer = robot.answer(request)
        assert store[request.id].digest() == known.digest() and store.seconds[request.id] == known.seconds
    assert isinstance(data.labels, LabelSpace)


def exported(to: Path, word: str, zipped: bool = False, names: Any = None, **known: Any) -> None:
    """What a tool exports: masks of the first two questions, nothing on the third, and our proposal for the last."""
    names = names or ["001_toy-1", "toy-2", "003_toy-0"]
    truth = masks()
    drawn = truth["toy-1"].copy()
    drawn[0, 0] = VOID
    rows = [MaskRow(names[0], drawn, by="human", who="anna", seconds=31.5, **known), MaskRow(names[1], truth["toy-2"])]
    rows += [MaskRow(names[2], np.zeros((8, 8), np.uint8))]
    rows += [MaskRow("004_toy-3", truth["toy-3"], by="judge", who="mock")]
    write_masks(MaskSet(LABELS, rows), to, word)
    if zipped:
        shutil.make_archive(str(to), "zip", to)
        shutil.rmtree(to)


def four(photos: dict[str, Path], folder: Path) -> FolderAnnotator:
    """Four questions."""
    made = make_annotator("folder", folder, LABELS)
    asked = [Request(f"toy-{n}", "draw", photos[f"toy-{n}"]) for n in (1, 2, 0)]
    made.ask([*asked, Request("toy-3", "fix", photos["toy-3"], np.ones((8, 8), np.uint8))])
    assert isinstance(made, FolderAnnotator)
    return made


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("word", ["coco", "cvat", "labelstudio", "voc", "huggingface", "cvat-masks"])
def test_what_tools_export_is_taken(photos: dict[str, Path], tmp_path: Path, word: str, zipped: bool):
    annotator = four(photos, tmp_path / "run")
    exported(tmp_path / "run" / "masks" / "mine", word, zipped and word != "cvat-masks")  # which is a zip already
    found = annotator.answered()
    assert {*found} == {"toy-1", "toy-2"}  # not what nobody has opened, and not what a judge has made
    assert found["toy-1"].mask[0, 0] == VOID and (found["toy-1"].mask.ravel()[1:] == masks()["toy-1"].ravel()[1:]).all()
    assert (found["toy-2"].mask == masks()["toy-2"]).all()
    assert (found["toy-1"].who, found["toy-1"].seconds) == ("anna", 31.5) and found["toy-2"].seconds is None
    assert "mine" in found["toy-1"].source and "2 masks (1 to draw, 1 to fix)" in annotator.waiting()
    (tmp_path / "run" / "verdicts.csv").write_text("003_toy-0,drawn,4,ben\n001_toy-1,drawn,99,\n")
    found = annotator.answered()
    assert (found["toy-0"].mask == 0).all() and (found["toy-0"].who, found["toy-0"].seconds) == ("ben", 4)
    assert (found["toy-1"].who, found["toy-1"].seconds) == ("anna", 99)  # a line counts more than a tool


@pytest.mark.parametrize("word", ["coco", "cvat", "labelstudio", "voc", "pictures"])
def test_names_that_tools_put_into_plain_letters(photos: dict[str, Path], tmp_path: Path, word: str):
    """A question that is asked again has a ~ in its name, and photographs are called as people call them."""
    annotator, truth = make_annotator("folder", tmp_path / "run", LABELS), masks()
    asked = [Request("toy-1", "draw", photos["toy-1"]), Request("toy-1~again", "draw", photos["toy-1"], about="toy-1")]
    annotator.ask([*asked, Request("a, b (2)", "draw", photos["toy-2"])])
    plain = {"001_toy-1": "toy-1", "002_toy-1-again": "toy-2", "003_a-b-2-": "toy-3"}
    if word == "labelstudio":  # an upload there leaves out what is no letter
        plain = dict(zip(["001_toy-1", "002_toy-1again", "003_a_b_2"], plain.values(), strict=True))
    back = tmp_path / "run" / "masks"
    if word == "pictures":
        for name, of in plain.items():
            Image.fromarray(truth[of]).save(back / f"{name}.png")
    else:
        write_masks(MaskSet(LABELS, [MaskRow(name, truth[of]) for name, of in plain.items()]), back / "mine", word)
    found = annotator.answered()
    assert [*found] == ["toy-1", "toy-1~again", "a, b (2)"] and annotator.waiting() == ""
    for answer, of in zip(found.values(), plain.values(), strict=True):
        assert (answer.mask == truth[of]).all()


def test_an_export_beside_pictures(photos: dict[str, Path], tmp_path: Path):
    annotator, back = four(photos, tmp_path / "run"), tmp_path / "run" / "masks"
    exported(back / "mine", "coco")
    annotator.deliver(
        Answer("toy-0", "draw", "drawn", masks()["toy-0"], 5.0)
    )  # which the export holds, with nothing on it
    assert {*annotator.answered()} == {"toy-0", "toy-1", "toy-2"}
    Image.fromarray(masks()["toy-1"]).save(back / "toy-1.png")
    with pytest.raises(DataError, match="image 'toy-1' has two answers, toy-1.png and mine"):
        annotator.answered()
    (back / "toy-1.png").unlink()
    exported(back / "later", "cvat")
    with pytest.raises(DataError, match="image 'toy-1' has two answers, (later|mine) and (later|mine)"):
        annotator.answered()


def test_an_export_that_cannot_be_taken(photos: dict[str, Path], tmp_path: Path):
    annotator, back = four(photos, tmp_path / "run"), tmp_path / "run" / "masks"
    exported(tmp_path / "made", "coco")
    (file,) = (tmp_path / "made").rglob("*.json")
    text = file.read_text()
    (back / "mine.json").write_text(text[: len(text) - 3])  # it is still being written
    assert annotator.answered() == {}
    os.utime(back / "mine.json", (1e9, 1e9))
    with pytest.raises(DataError, match="mine.json is not taken.*no JSON that can be read"):
        annotator.answered()
    (back / "mine.json").write_text(text.replace('"red"', '"rot"'))
    with pytest.raises(DataError, match="no class 'rot'.*format_options"):
        annotator.answered()
    lenient = make_annotator("folder", tmp_path / "run", LABELS, format_options={"unknown": "void"})
    assert VOID in lenient.answered()["toy-1"].mask
    (back / "mine.json").write_text(text.replace('"iscrowd":0', '"iscrowd":1').replace('"iscrowd": 0', '"iscrowd": 1'))
    with pytest.raises(DataError, match="say crowd='class' .options go into .*format_options"):  # as CVAT has brushes
        annotator.answered()
    brushes = make_annotator("folder", tmp_path / "run", LABELS, format_options={"crowd": "class"})
    assert {*brushes.answered()} == {"toy-1", "toy-2"}
    (back / "mine.json").unlink()
    (back / "mine.zip").write_bytes(b"PK" + bytes(40))
    os.utime(back / "mine.zip", (1e9, 1e9))
    with pytest.raises(DataError, match="mine.zip is not taken.*cannot be unpacked"):
        annotator.answered()
    with pytest.raises(ConfigError, match="format='cocoa' is not known"):
        make_annotator("folder", tmp_path / "run", LABELS, format="cocoa")


@pytest.mark.parametrize(
    "whole",
    [
        LabelSpace.voc(),
        LabelSpace(("background", "cat", "dog"), palette=[(1, 2, 3), (10, 20, 30), (40, 50, 60)]),
        LabelSpace(("background", "cat", "dog"), values=(5, 7, 9)),
        LabelSpace(("cat", "background", "dog")),
    ],
)
@pytest.mark.parametrize("how", ["values", "colours", "coco", "coco, whole"])
def test_a_foreground_is_drawn_as_the_sheet_says(tmp_path: Path, photos: dict[str, Path], whole: LabelSpace, how: str):
    """Whatever the files of the data set hold: of one whose background is class 1, every mask came back inverted."""
    labels, mask = whole.binary(), masks()["toy-1"]
    annotator = make_annotator("folder", tmp_path / "run", labels)
    annotator.ask([Request("toy-1", "draw", photos["toy-1"])])
    file = tmp_path / "run" / "masks" / "001_toy-1.png"
    sheet = (tmp_path / "run" / "how_to.txt").read_text()
    assert "0    background (red 0, green 0, blue 0)\n1    foreground (red 128, green 0, blue 0)" in sheet
    if how == "values":
        Image.fromarray(mask).save(file)
    elif how == "colours":
        Image.fromarray(np.array([[0, 0, 0], [128, 0, 0]], np.uint8)[mask]).save(file)
    else:
        names = ("background", "foreground" if how == "coco" else whole.names[-1])
        rows = [MaskRow("001_toy-1", mask, by="human")]
        write_masks(MaskSet(LabelSpace(names), rows), file.with_suffix(""), "coco")
    assert (annotator.answered()["toy-1"].mask == mask).all()


@pytest.mark.parametrize("alpha", [0, 127])
def test_what_nobody_sees_is_not_taken(folder: FolderAnnotator, alpha: int):
    """A drawing program keeps the colour under what was rubbed out; it was taken as if it were painted."""
    path, mask = folder.folder / "masks" / "002_toy-0.png", masks()["toy-1"]
    picture = np.dstack([LABELS.colorize(mask), np.full((8, 8), 255, np.uint8)])
    Image.fromarray(picture).save(path)
    assert (folder.answered()["toy-0"].mask == mask).all()
    picture[mask == 0, 3] = 0  # a layer without a background
    Image.fromarray(picture).save(path)
    assert (folder.answered()["toy-0"].mask == mask).all()
    picture[:, :, 3][mask == 1] = alpha
    Image.fromarray(picture).save(path)
    with pytest.raises(DataError, match=f"{int(mask.sum())} pixels of 002_toy-0.png are transparent, and hold 'red'"):
        folder.answered()


@pytest.mark.parametrize(
    ("said", "void"),
    [
        ({}, "255  no class"),
        ({"values": (1, 2, 3), "ignore": [0]}, "255  no class"),
        ({"ignore": [0]}, "255  no class"),
        ({"values": (2, 0, 1)}, "255  no class"),
        ({"values": (0, 128, 255), "ignore": [7]}, "7    no class"),
        ({"values": (0, 128, 255)}, "     no class"),
    ],
)
@pytest.mark.parametrize("colours", [False, True])
def test_a_proposal_is_changed_and_saved_in_a_drawing_program(
    tmp_path: Path, photos: dict[str, Path], said: dict[str, Any], void: str, colours: bool
):
    """Whatever values the data set's files have: the proposal is in them, and our mark is not missed."""
    labels = LabelSpace(LABELS.names[:3], **said)
    annotator, proposal = make_annotator("folder", tmp_path / "run", labels), np.zeros((8, 8), np.uint8)
    proposal[2:4], proposal[4:6], proposal[7] = 1, 2, VOID
    annotator.ask([Request("toy-0", "fix", photos["toy-0"], proposal)])
    sheet = (tmp_path / "run" / "how_to.txt").read_text()
    assert f"\n{void}: unclear" in sheet and sheet.count(f"\n{void[:4]}") == 1
    with Image.open(tmp_path / "run" / "proposals" / "001_toy-0.png") as opened:
        picture = opened.copy()
    picture.info = {}  # what a program does not know it does not keep
    picture.paste(picture.getpixel((0, 2)), (0, 0, 8, 1))
    (picture.convert("RGB") if colours else picture).save(tmp_path / "run" / "masks" / "001_toy-0.png")
    proposal[0] = 1
    answer = annotator.answered()["toy-0"]
    assert answer.verdict == "fixed" and (answer.mask == proposal).all()


def test_what_to_do_about_a_mask_is_what_a_painter_can_do(folder: FolderAnnotator):
    """Options of the data set are none of it: a run that waits keeps them."""
    mixed = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8).repeat(4, 0).repeat(4, 1)).convert("P")
    mixed.putpalette([*LABELS.palette[1].tolist(), *LABELS.palette[0].tolist()])  # what a program thinks is smaller
    for picture in (mixed, Image.new("L", (8, 8), 127), Image.new("RGB", (8, 8), (1, 2, 3))):
        picture.save(folder.folder / "masks" / "002_toy-0.png")
        with pytest.raises(DataError, match="Save it in the grey values or colours of the classes[.]$") as told:
            folder.answered()
        assert "data_options" not in str(told.value) and ".. " not in str(told.value)


def test_black_and_white_is_asked_about(tmp_path: Path, photos: dict[str, Path]):
    """White is 255, no class: of two classes nothing of the second would ever have been learnt."""
    annotator = make_annotator("folder", tmp_path / "run", LabelSpace(("background", "cell")))
    annotator.ask([Request("toy-1", "draw", photos["toy-1"])])
    Image.fromarray(masks()["toy-1"] * 255).save(tmp_path / "run" / "masks" / "001_toy-1.png")
    with pytest.raises(DataError, match="if white means 'cell', save it as 1 or in its colour"):
        annotator.answered()
    (tmp_path / "run" / "verdicts.csv").write_text("001_toy-1,drawn\n")
    assert set(np.unique(annotator.answered()["toy-1"].mask)) == {0, VOID}
    (tmp_path / "run" / "verdicts.csv").unlink()
    Image.fromarray(masks()["toy-1"]).save(tmp_path / "run" / "masks" / "001_toy-1.png")
    assert (annotator.answered()["toy-1"].mask == masks()["toy-1"]).all()


def test_a_mask_of_void_alone_is_no_answer(folder: FolderAnnotator):
    """Nobody could learn from it; the canvas had always said so, files were taken without a word."""
    Image.new("L", (8, 8), 255).save(folder.folder / "masks" / "002_toy-0.png")
    with pytest.raises(DataError, match="'toy-0' is not taken: .*002_toy-0.png: nothing is painted yet. Paint it, or"):
        folder.answered()
    (folder.folder / "masks" / "002_toy-0.png").unlink()
    (folder.folder / "verdicts.csv").write_text("002_toy-0,skip\n")
    assert folder.answered()["toy-0"].verdict == "skipped"
