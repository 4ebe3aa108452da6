"""A run that looks for answers again and again reads what is new or changed, and holds one mask at a time."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_label_studio import FakeStudio
from PIL import Image
from test_people import LABELS, masks, photos, requests

from vlm_itl.core.checks import DataError
from vlm_itl.formats.formats import MaskRow, MaskSet, write_masks
from vlm_itl.people import Annotator, Answer, AnswerStore, Request, make_annotator
from vlm_itl.people import canvas as canvas_room
from vlm_itl.people import folder as folder_room
from vlm_itl.people import label_studio as studio_room
from vlm_itl.people import robot as robot_room
from vlm_itl.people.desk import Desk
from vlm_itl.people.requests import mask_png
from vlm_itl.people.robot import Robot, work

__all__ = ["photos"]  # the fixture

# Where each annotator decodes a mask that somebody has given.
DECODES: dict[str, tuple[Any, str]] = {
    "folder": (folder_room, "checked_mask"),
    "export": (folder_room, "checked_mask"),
    "notebook": (canvas_room, "read_indices"),
    "labelstudio": (studio_room, "mask_of"),
    "robot": (robot_room, "read_mask"),
}


@pytest.fixture
def studio(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeStudio]:
    """A recorded Label Studio."""
    found = FakeStudio()
    monkeypatch.setenv("LABEL_STUDIO_URL", found.url)
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", found.token)
    yield found
    found.stop()


def desk_of(place: Path, kind: str) -> Desk:
    """The desk of a process that knows only what is on disk."""
    known = {"robot": {"masks": str(place / "truth")}, "notebook": {"show": False}}
    name = "folder" if kind == "export" else kind
    annotator = make_annotator(name, place / "people", LABELS, **known.get(kind, {}))
    return Desk(place, annotator, None, [])  # type: ignore[arg-type]


def answer_all(place: Path, kind: str, annotator: Annotator) -> None:
    """Through the tool: three answers, one of each kind of question."""
    if kind == "export":
        rows = [
            MaskRow(name, masks()[image], by="human")
            for name, image in (("002_toy-0", "toy-3"), ("001_toy-1", "toy-1"), ("003_toy-2", "toy-2"))
        ]
        shutil.rmtree(place / "back", ignore_errors=True)
        write_masks(MaskSet(LABELS, rows), place / "back", "coco")
        shutil.copy(place / "back" / "annotations" / "instances_train.json", place / "people" / "masks" / "mine.json")
    elif kind != "robot":
        robot = Robot(lambda image_id: masks()[image_id], LABELS, puts_right=True)
        assert work(robot, annotator) == 3


def edit_one(place: Path, kind: str, studio: FakeStudio) -> None:
    """Toy-0 becomes another mask, in the tool."""
    other = masks()["toy-3"]
    if kind == "folder":
        (place / "people" / "masks" / "002_toy-0.png").write_bytes(mask_png(other, LABELS))
    elif kind == "export":
        path = place / "people" / "masks" / "mine.json"
        told = json.loads(path.read_text())
        second = [annotation for annotation in told["annotations"] if annotation["image_id"] == 2]
        told["annotations"] = [annotation for annotation in told["annotations"] if annotation["image_id"] != 1]
        told["annotations"] += [annotation | {"image_id": 1} for annotation in second]
        path.write_text(json.dumps(told))
    elif kind == "notebook":
        person = make_annotator("notebook", place / "people", LABELS, show=False)
        person.deliver(Answer("toy-0", "draw", "drawn", other))
    elif kind == "labelstudio":
        (number,) = [a["id"] for a in studio.annotations.values() if studio.tasks[a["task"]]["data"]["id"] == "toy-0"]
        studio.change({}, {"result": studio_room.results_of(other, LABELS)}, number)
    else:
        (place / "truth" / "toy-0.png").write_bytes(mask_png(other, LABELS))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[int]]:
    """Counts what an annotator decodes from now on."""

    def watch(kind: str) -> list[int]:
        room, name = DECODES[kind]
        count, real = [0], getattr(room, name)

        def counted(*given: Any, **more: Any) -> Any:
            count[0] += 1
            return real(*given, **more)

        monkeypatch.setattr(room, name, counted)
        return count

    return watch


@pytest.mark.parametrize("kind", DECODES)
def test_what_was_taken_is_not_decoded_again(
    tmp_path: Path, photos: dict[str, Path], kind: str, decoded: Callable[[str], list[int]], studio: FakeStudio
):
    """Not at the next look, nor in the next process, nor after a copy; an edit is decoded once, and told."""
    place = tmp_path / "run"
    (place / "truth").mkdir(parents=True)
    for name, mask in masks().items():
        (place / "truth" / f"{name}.png").write_bytes(mask_png(mask, LABELS))
    desk = desk_of(place, kind)
    desk.annotator.ask(requests(photos))
    answer_all(place, kind, desk.annotator)
    count = decoded(kind)
    desk.take()
    assert count[0] >= 3 and len(desk.store.lines()) >= 3
    frozen, count[0] = desk.store.lines(), 0

    for process in (desk, desk_of(place, kind)):  # this one, and the next
        for _ in range(3):
            process.take()
            assert process.annotator.waiting() == ""
    assert count[0] == 0

    for file in (place / "people").rglob("*.*"):
        if kind != "labelstudio" and file.parent.name in ("masks", "answers"):
            os.utime(file, (1e9, 1e9))  # the run was copied to another disk
    process = desk_of(place, kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        process.take()
    assert count[0] == 0

    edit_one(place, kind, studio)
    with pytest.warns(UserWarning, match="the answer for 'toy-0' was changed after the run had taken it"):
        process.take()
    at_most = 3 if kind == "export" else 1  # an export is one file
    assert 1 <= count[0] <= at_most
    process.take()
    assert 1 <= count[0] <= at_most and process.store.lines() == frozen


def test_an_answer_without_a_stamp_is_read_once_a_process(
    tmp_path: Path, photos: dict[str, Path], decoded: Callable[[str], list[int]]
):
    """Runs that were begun before answers had stamps go on."""
    desk = desk_of(tmp_path / "run", "folder")
    desk.annotator.ask(requests(photos))
    answer_all(tmp_path / "run", "folder", desk.annotator)
    desk.take()
    path = tmp_path / "run" / "answers" / "answers.jsonl"
    old = [{k: v for k, v in line.items() if k != "stamp"} for line in desk.store.lines().values()]
    path.write_text("".join(json.dumps(line) + "\n" for line in old))
    count, process = decoded("folder"), desk_of(tmp_path / "run", "folder")
    for _ in range(3):
        process.take()
    assert count[0] == 3 and list(process.store.lines().values()) == old


def test_a_file_that_vanishes_after_it_was_taken_is_not_waited_for(tmp_path: Path, photos: dict[str, Path]):
    desk = desk_of(tmp_path / "run", "folder")
    desk.annotator.ask(requests(photos))
    Image.fromarray(masks()["toy-0"]).save(tmp_path / "run" / "people" / "masks" / "toy-0.png")
    desk.take()
    (tmp_path / "run" / "people" / "masks" / "toy-0.png").unlink()
    desk.take()
    assert desk.annotator.waiting().startswith("waiting for 2 masks (1 to fix, 1 to check)")


def test_many_large_answers_are_taken_in_the_memory_of_a_few(tmp_path: Path):
    """Twenty-four masks of a million pixels, all there at once."""
    Image.new("RGB", (1000, 1000)).save(tmp_path / "photo.jpg")
    desk = desk_of(tmp_path / "run", "folder")
    desk.annotator.ask([Request(f"big-{n}", "draw", tmp_path / "photo.jpg") for n in range(24)])
    for n in range(24):
        Image.new("L", (1000, 1000), 1).save(tmp_path / "run" / "people" / "masks" / f"big-{n}.png")
    tracemalloc.start()
    desk.take()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(desk.store.lines()) == 24 and peak < 12e6


def test_one_bad_answer_does_not_hold_up_the_others(tmp_path: Path, photos: dict[str, Path]):
    """What can be taken is; the one that cannot is named, and taken as soon as it is put right."""
    desk = desk_of(tmp_path / "run", "folder")
    desk.annotator.ask(requests(photos))
    answer_all(tmp_path / "run", "folder", desk.annotator)
    bad = tmp_path / "run" / "people" / "masks" / "002_toy-0.png"
    Image.new("L", (8, 8), 7).save(bad)
    for _ in range(2):
        with pytest.raises(DataError, match="'toy-0' is not taken: .* value 7 "):
            desk.take()
    assert {*desk.store.lines()} == {"toy-1"}  # it comes before the bad one
    bad.write_bytes(mask_png(masks()["toy-0"], LABELS))
    desk.take()
    assert {"toy-0", "toy-1"} <= set(desk.store.lines())


def test_a_long_list_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two hundred answers are taken by reading about as many lines, not their square; another process's lines count."""
    store, read = AnswerStore(tmp_path, LABELS), [0]
    real = json.loads
    monkeypatch.setattr(json, "loads", lambda text: (read.__setitem__(0, read[0] + 1), real(text))[1])
    for n in range(200):
        assert store.take(Answer(f"a-{n}", "verify", "rejected", None))
    assert read[0] < 1000
    assert AnswerStore(tmp_path, LABELS).take(Answer("late", "verify", "rejected", None)) and "late" in store
    (tmp_path / "answers.jsonl").unlink()
    assert "late" not in store and store.lines() == {}


def test_a_name_is_compared_with_the_files_that_are_called_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two hundred photographs and as many masks: not each with each."""
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.jpg")
    annotator = desk_of(tmp_path / "run", "folder").annotator
    annotator.ask([Request(f"IMG_{n:04}", "draw", tmp_path / "photo.jpg") for n in range(200)])
    for n in range(200):
        Image.new("L", (8, 8)).save(tmp_path / "run" / "people" / "masks" / f"{n + 1:03}_IMG_{n:04}_mask.png")
    compared, real = [0], folder_room.pair_masks

    def counted(images: Any, files: Any, where: str) -> Any:
        compared[0] += len(files)
        return real(images, files, where)

    monkeypatch.setattr(folder_room, "pair_masks", counted)
    assert len(annotator.answered()) == 200 and compared[0] <= 800


@pytest.mark.parametrize("who", ["A\u2028B", "A\x85B", "A\x0cB", "A\nB"])
def test_a_name_with_a_line_break_of_some_kind_is_no_second_line(tmp_path: Path, who: str):
    """JSON leaves U+2028 and U+0085 as they are, and Python's splitlines breaks at them: the answer was lost."""
    store = AnswerStore(tmp_path, LABELS)
    assert store.take(Answer("a", "draw", "drawn", np.ones((2, 2), np.uint8), 1.0, who))
    assert AnswerStore(tmp_path, LABELS)["a"].who == who and not store.take(Answer("a", "draw", "skipped", None))
