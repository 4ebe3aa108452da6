"""The canvas of the annotator `notebook`: its JavaScript against definitions (with node), and the kernel's half."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from brushes import area, outline, stroke
from PIL import Image

from vlm_itl.core.checks import ConfigError, DataError
from vlm_itl.data.labels import LabelSpace
from vlm_itl.people import Answer, NotebookAnnotator, Request, Robot, make_annotator, open_canvas, work

LABELS = LabelSpace(("background", "cat", "dog"))
CODE = Path(sys.modules[NotebookAnnotator.__module__].__file__ or "").with_name("canvas.js")

# ------------------------------------------------------------------------------------------------- JavaScript

PIXELS = """
import { Mask } from "./canvas.mjs";
import { readFileSync } from "node:fs";
const { width, height, start, steps } = JSON.parse(readFileSync(0, "utf8"));
const mask = new Mask(width, height, Uint8Array.from(Buffer.from(start, "base64")));
const seen = steps.map(([what, ...how]) => {
  if (what === "undo" || what === "redo") mask[what]();
  else {
    mask.begin();
    if (what === "stroke") {
      const [points, size, value] = how;
      points.forEach((b, at) => mask.segment(...points[Math.max(at - 1, 0)], ...b, size, value));
    } else mask[what](...how);
    mask.end();
  }
  const rect = mask.takeDirty() ?? [0, 0, 0, 0];
  return { pixels: Buffer.from(mask.pixels).toString("base64"), rect, done: mask.done.length };
});
console.log(JSON.stringify(seen));
"""

CLOCK = """
import { WorkClock } from "./canvas.mjs";
let now = 0;
const clock = new WorkClock(() => now);
const at = (time, act) => { now = time; act(); return [clock.read(), clock.runs]; };
console.log(JSON.stringify([
  at(0, () => clock.start(5, false)),   // shown, and nobody has done anything yet
  at(10, () => clock.touch()),          // the hand is there
  at(30, () => {}),                     // it looks
  at(69, () => clock.touch()),          // 59 seconds later it paints
  at(300, () => {}),                    // gone: counted for a minute
  at(310, () => clock.touch()),         // back
  at(315, () => clock.pause()),         // the page is hidden
  at(330, () => {}),
  at(340, () => clock.touch()),
  at(341, () => clock.start(0, true)),  // the next image
  at(343, () => {}),
]));
"""


def node(folder: Path, script: str, given: Any = None) -> Any:
    """What a script says about the canvas's code."""
    if shutil.which("node") is None:
        pytest.skip("node, which runs the canvas's JavaScript outside a browser, is not installed")
    shutil.copy(CODE, folder / "canvas.mjs")
    (folder / "script.mjs").write_text(script)
    done = subprocess.run(
        ["node", "script.mjs"], input=json.dumps(given), capture_output=True, text=True, cwd=folder, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def painted(folder: Path, start: np.ndarray, steps: list[Any]) -> list[tuple[np.ndarray, Any]]:
    """The mask after each step, and what the canvas says has changed."""
    given = {"width": start.shape[1], "height": start.shape[0], "steps": steps}
    seen = node(folder, PIXELS, {**given, "start": base64.b64encode(start.tobytes()).decode()})
    decode = lambda one: np.frombuffer(base64.b64decode(one["pixels"]), np.uint8).reshape(start.shape)  # noqa: E731
    return [(decode(one), one) for one in seen]


def test_two_thousand_steps_mark_what_the_definitions_say(tmp_path: Path):
    """Brush, outline and fill, inside and across the edge, each checked pixel for pixel; what is shown is enough."""
    rng = np.random.default_rng(0)
    shape, steps = (83, 141), []
    for _ in range(2000):
        value = int(rng.choice([0, 1, 2, 255]))
        points = rng.integers((-20, -20), (shape[1] + 20, shape[0] + 20), (int(rng.integers(1, 7)), 2)).tolist()
        inside = rng.integers(0, (shape[1], shape[0])).tolist()
        size = int(rng.choice([1, 3, 5, 9, 33]))
        kinds = [["stroke", points, size, value], ["polygon", [*points, inside, inside[::-1]], value]]
        steps.append([*kinds, ["fill", *inside, value]][int(rng.choice([0, 1, 2], p=[0.5, 0.2, 0.3]))])
    mask = rng.integers(0, 3, shape).astype(np.uint8)
    for (what, *how), (after, said) in zip(steps, painted(tmp_path, mask, steps), strict=True):
        before = mask
        if what == "stroke":
            mask = np.where(stroke(shape, [tuple(p) for p in how[0]], how[1]), how[2], mask).astype(np.uint8)
        elif what == "polygon":
            mask = np.where(outline(shape, [tuple(p) for p in how[0]]), how[1], mask).astype(np.uint8)
        else:
            mask = np.where(area(mask, (how[0], how[1])), how[2], mask).astype(np.uint8)
        assert np.array_equal(after, mask), (what, how)
        changed, (x0, y0, x1, y1) = np.argwhere(before != mask), said["rect"]
        assert not len(changed) or ((changed >= (y0, x0)).all() and (changed < (y1, x1)).all()), (
            "the part that is drawn anew lacks a change"
        )


def test_undo_and_redo(tmp_path: Path):
    start = np.zeros((150, 200), np.uint8)
    strokes = [["stroke", [[i, i], [199 - i, 40]], 7, 1 + i % 2] for i in range(0, 100, 20)]
    nothing = ["stroke", [[-90, -90]], 3, 1]  # paints beside the image: no step
    steps = [*strokes, nothing, *[["undo"]] * 6, *[["redo"]] * 3, ["stroke", [[100, 140]], 9, 2], ["redo"], ["undo"]]
    masks = [start, *(mask for mask, _ in painted(tmp_path, start, steps))]
    assert np.array_equal(masks[6], masks[5])
    assert all(np.array_equal(masks[6 + k], masks[5 - k]) for k in range(1, 6))
    assert np.array_equal(masks[12], start)  # nothing is left to undo
    assert np.array_equal(masks[15], masks[3])
    assert np.array_equal(masks[17], masks[16]), "what was painted since is not overwritten by redo"
    assert np.array_equal(masks[18], masks[15])


def test_the_clock_counts_work(tmp_path: Path):
    assert node(tmp_path, CLOCK) == [
        [5, False],
        [5, True],
        [25, True],
        [64, True],
        [124, False],
        [124, True],
        [129, False],
        [129, False],
        [129, True],
        [0, True],
        [2, True],
    ]


def test_nothing_comes_from_a_network():
    """The page is whole without a network: no address, no import, no font from elsewhere."""
    for name in ("canvas.js", "canvas.css"):
        text = CODE.with_name(name).read_text(encoding="utf-8")
        assert not re.search(r"https?://|\bimport\b|@import|url\(|fetch\(", text), name


# ------------------------------------------------------------------------------------------------- the kernel's half


class Page:
    """The page's half of the conversation, without a browser."""

    def __init__(self, annotator: NotebookAnnotator, monkeypatch: pytest.MonkeyPatch):
        self.canvas, self.heard = annotator.canvas, []
        monkeypatch.setattr(self.canvas, "send", lambda content, buffers=None: self.heard.append((content, buffers)))

    def say(self, what: str, mask: np.ndarray | None = None, **more: Any) -> dict[str, Any]:
        """Say something as the browser does, through ipywidgets; the last thing that comes back."""
        packed = [] if mask is None else [memoryview(zlib.compress(mask.tobytes()))]
        data = {"method": "custom", "content": {"what": what, **more}}
        self.canvas._handle_msg({"content": {"data": data}, "buffers": packed})
        return self.heard[-1][0] if self.heard else {}

    def mask(self, which: int) -> np.ndarray:
        """What was shown last: 1 what it starts from, 2 where it goes on."""
        content, buffers = self.heard[-1]
        shape = content["height"], content["width"]
        return np.frombuffer(zlib.decompress(buffers[which]), np.uint8).reshape(shape)


@pytest.fixture
def requests(tmp_path: Path) -> list[Request]:
    """Three images of 6 x 4 pixels: draw a, fix b, verify c."""
    for name in "abc":
        Image.new("RGB", (6, 4), (90, 120, 60)).save(tmp_path / f"{name}.png")
    proposal = np.array([[0, 0, 1, 1, 0, 0]] * 4, np.uint8)
    kinds = [("a", "draw", None), ("b", "fix", proposal), ("c", "verify", proposal)]
    return [Request(i, kind, tmp_path / f"{i}.png", shown, "why not", 1.0) for i, kind, shown in kinds]


@pytest.fixture
def person(tmp_path: Path, requests: list[Request]) -> NotebookAnnotator:
    annotator = make_annotator("notebook", tmp_path / "run", LABELS, who="anna")
    annotator.ask(requests)
    return annotator


ONES = np.ones((4, 6), np.uint8)


def test_a_page_is_led_through_all_that_is_asked(person: NotebookAnnotator, monkeypatch: pytest.MonkeyPatch):
    page = Page(person, monkeypatch)
    task = page.say("ready", view="1")
    assert (task["what"], task["id"], task["ask"], task["view"]) == ("task", "a", "draw", "1")
    assert (task["place"], task["total"], task["answered"], task["reason"]) == (1, 3, 0, "why not")
    assert (task["width"], task["height"], task["seconds"], task["verdict"]) == (6, 4, 0.0, "")
    assert not page.mask(1).any() and not page.mask(2).any()
    assert page.heard[-1][1][0][:2] == b"\xff\xd8"  # JPEG, whatever the file was
    assert page.say("submit", ONES, id="a", seconds=12.5)["id"] == "b"
    assert page.mask(1).tolist() == [[0, 0, 1, 1, 0, 0]] * 4
    assert page.say("submit", page.mask(1), id="b", seconds=3)["id"] == "c"
    done = page.say("reject", id="c", seconds=1)
    assert (done["what"], done["total"]) == ("done", 3)
    answers = person.answered()
    told = {i: (a.kind, a.verdict, a.seconds, a.who) for i, a in answers.items()}
    assert told == {
        "a": ("draw", "drawn", 12.5, "anna"),
        "b": ("fix", "accepted", 3.0, "anna"),
        "c": ("verify", "rejected", 1.0, "anna"),
    }
    assert (answers["a"].mask == 1).all() and answers["c"].mask is None
    assert person.waiting() == ""


def test_what_is_half_done_is_there_again(
    person: NotebookAnnotator, requests: list[Request], monkeypatch: pytest.MonkeyPatch
):
    page = Page(person, monkeypatch)
    page.say("ready")
    page.say("draft", ONES, id="a", seconds=7.5)
    assert person.answered() == {} and page.heard[-1][0] == {
        "what": "kept",
        "id": "a",
        "view": "",
    }  # nobody is interrupted
    again = make_annotator("notebook", person.folder, LABELS)
    again.ask(requests)
    page = Page(again, monkeypatch)
    assert page.say("ready")["seconds"] == 7.5
    assert not page.mask(1).any() and page.mask(2).all()
    page.say("skip", id="a", seconds=8)
    assert list((person.folder / "drafts").iterdir()) == []


def test_going_back_and_answering_again(person: NotebookAnnotator, monkeypatch: pytest.MonkeyPatch):
    page = Page(person, monkeypatch)
    page.say("submit", ONES, id="a", seconds=1)
    task = page.say("go", id="b", by=-1)
    assert (task["id"], task["verdict"], task["seconds"]) == ("a", "drawn", 1.0) and page.mask(2).all()
    assert page.say("go", id="a", by=-1)["id"] == "a"  # there is none before it
    assert page.say("submit", 2 * ONES, id="a", seconds=5)["id"] == "b"
    assert (person.answered()["a"].mask == 2).all() and person.answered()["a"].seconds == 5
    assert len(list((person.folder / "answers").iterdir())) == 2
    assert page.say("go", id="", by=-1)["id"] == "c"  # from the end


def test_each_of_two_pages_is_told_alone(person: NotebookAnnotator, monkeypatch: pytest.MonkeyPatch):
    """What one asks for is not shown on the other, where somebody may be painting."""
    page = Page(person, monkeypatch)
    page.say("ready", view="1")
    page.say("ready", view="2")
    page.say("go", id="a", by=1, view="2")
    page.say("draft", ONES, id="b", seconds=2, view="2")
    page.say("submit", ONES[:1], id="b", seconds=2, view="2")  # broken on its way
    for name in ("b", "c", "a"):
        page.say("skip", id=name, seconds=1, view="2")
    what = [(said["what"], said["view"]) for said, _ in page.heard]
    kinds = ["task", "kept", "problem", "task", "task", "done"]
    assert what == [("task", "1"), ("task", "2"), *[(kind, "2") for kind in kinds]]


@pytest.mark.parametrize("elsewhere", [False, True])  # another page of this notebook, or another notebook
def test_an_answer_of_somebody_else_is_not_replaced_without_a_word(
    person: NotebookAnnotator, monkeypatch: pytest.MonkeyPatch, elsewhere: bool
):
    other = open_canvas(person.folder, who="ben") if elsewhere else person
    first, second = (
        (Page(who, monkeypatch) for who in (person, other)) if elsewhere else [Page(person, monkeypatch)] * 2
    )
    first.say("ready", view="1")
    second.say("ready", view="2")
    assert first.say("submit", ONES, id="a", seconds=9, view="1")["id"] == "b"
    for what, mask in (("submit", 2 * ONES), ("skip", None)):
        told = second.say(what, mask, id="a", seconds=3, view="2")
        if what == "submit":
            assert told["what"] == "problem" and "answered on another page by anna" in told["text"]
            assert (person.answered()["a"].mask == 1).all() and person.answered()["a"].seconds == 9
    assert person.answered()["a"].verdict == "skipped"  # who says it twice means it
    assert first.say("submit", ONES, id="b", seconds=9, view="1")["id"] == "c"
    assert first.say("go", id="b", by=-1, view="1")["verdict"] == "skipped"
    assert first.say("submit", ONES, id="a", seconds=9, view="1")["what"] == "task"  # it was shown what is replaced


def test_who_only_looks_is_timed_and_takes_nothing_away(person: NotebookAnnotator, monkeypatch: pytest.MonkeyPatch):
    page = Page(person, monkeypatch)
    page.say("draft", id="c", seconds=30)
    task = page.say("go", id="b", by=1)
    assert (task["id"], task["seconds"]) == ("c", 30) and (page.mask(1) == page.mask(2)).all()
    page.say("draft", ONES, id="a", seconds=9, view="1")
    page.say("draft", id="a", seconds=4, view="2")  # another page, on which nothing is painted
    task = page.say("go", id="b", by=-1)
    assert task["seconds"] == 9 and page.mask(2).all()
    page.say("submit", 2 * ONES, id="b", seconds=5)
    page.say("draft", id="b", seconds=8)
    task = page.say("go", id="a", by=1)
    assert (task["verdict"], task["seconds"]) == ("fixed", 8) and (page.mask(2) == 2).all()
    page.say("reject", id="c", seconds=31)
    assert person.answered()["c"].seconds == 31 and not (person.folder / "drafts" / "c.json").exists()


def test_half_a_second_answer_says_that_there_is_a_first(person: NotebookAnnotator, monkeypatch: pytest.MonkeyPatch):
    page = Page(person, monkeypatch)
    page.say("submit", ONES, id="a", seconds=1)
    page.say("draft", 2 * ONES, id="a", seconds=3)
    task = page.say("go", id="b", by=-1)
    assert (task["id"], task["verdict"], task["seconds"]) == ("a", "drawn", 3) and (page.mask(2) == 2).all()


def test_a_robot_answers_here_as_anywhere(person: NotebookAnnotator, requests: list[Request]):
    """Through the page's own words, to the same answers."""
    robot = Robot(lambda name: {"a": ONES, "b": 2 * ONES, "c": ONES}[name], LABELS)
    assert work(robot, person) == 3 and person.left() == []
    answered = person.answered()
    for request in requests:
        expected = robot.answer(request)
        assert answered[request.id].digest() == expected.digest()
        assert answered[request.id].seconds == expected.seconds


def test_nobody_sees_that_an_image_is_asked_about_again(
    person: NotebookAnnotator, requests: list[Request], monkeypatch: pytest.MonkeyPatch
):
    person.ask([Request("b~again", "draw", requests[1].image, priority=9.0, about="b")])
    task = Page(person, monkeypatch).say("ready")
    assert (task["id"], task["name"]) == ("b~again", "b")


def test_void_is_painted_too_and_where_nothing_is_background_it_is_the_start(tmp_path: Path, requests: list[Request]):
    person = make_annotator("notebook", tmp_path / "run", LabelSpace(("sky", "cat", "dog")))
    person.ask(requests)
    assert person.canvas.blank == 255
    half = ONES.copy()
    half[:, :3] = 255
    person.deliver(Answer("a", "draw", "drawn", half))
    assert (person.answered()["a"].mask == half).all()
    with pytest.raises(DataError, match="'b' is not asked|nothing is painted"):
        person.deliver(Answer("a", "draw", "drawn", 255 * ONES))


@pytest.mark.parametrize(
    ("what", "more", "mask", "text"),
    [
        ("submit", {"id": "x", "seconds": 1}, ONES, "image 'x' is not asked here"),
        ("submit", {"id": "a", "seconds": -1}, ONES, "seconds must be a number >= 0"),
        ("submit", {"id": "a", "seconds": float("nan")}, ONES, "seconds must be a number >= 0"),
        ("submit", {"id": "a", "seconds": 1}, ONES[:3], "did not arrive whole"),
        ("submit", {"id": "a", "seconds": 1}, 7 * ONES, "value 7 at row 0, column 0 means no class"),
        ("submit", {"id": "a", "seconds": 1}, None, "the page said"),
        ("reject", {"id": "a", "seconds": 1}, None, "verdict='rejected' is not known"),
        ("dance", {"id": "a", "seconds": 1}, ONES, "the page said"),
        ("submit", {}, ONES, "the page said"),
    ],
)
def test_what_cannot_be_taken_is_said_on_the_page(
    person: NotebookAnnotator, monkeypatch: pytest.MonkeyPatch, what: str, more: dict, mask: Any, text: str
):
    said = Page(person, monkeypatch).say(what, mask, **more)
    assert said["what"] == "problem" and text in said["text"] and "\n" not in said["text"]
    assert person.answered() == {}


def test_a_bomb_is_not_unpacked(person: NotebookAnnotator, monkeypatch: pytest.MonkeyPatch):
    """Some kilobytes that would become a gigabyte are read as far as the photograph has pixels."""
    said = Page(person, monkeypatch).say("submit", np.zeros(2**27, np.uint8), id="a", seconds=1)
    assert "did not arrive whole" in said["text"]


def test_answers_that_other_hands_have_changed_are_told(person: NotebookAnnotator):
    person.deliver(Answer("a", "draw", "drawn", ONES, 1.0))
    file = person.folder / "answers" / "a.json"
    line = json.loads(file.read_text())
    Image.fromarray(2 * ONES).save(file.with_name(line["mask"]))
    with pytest.raises(DataError, match="the answer for image 'a' .* remove .*a.json, and the canvas asks again"):
        person.answered()
    file.write_text("{")
    with pytest.raises(DataError, match="the answer for image 'a' cannot be read .* remove .*a.json"):
        person.answered()
    file.unlink()
    assert [request.id for request in person.left()] == ["a", "b", "c"]


def test_a_mask_outside_the_folder_is_not_read(person: NotebookAnnotator):
    person.deliver(Answer("a", "draw", "drawn", ONES, 1.0))
    file = person.folder / "answers" / "a.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "mask": "../asked/b.png"}))
    with pytest.raises(DataError, match="no name of a file inside"):
        person.answered()


def test_two_notebooks_on_one_folder_are_led_past_each_other(
    person: NotebookAnnotator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """What is open in another kernel that still runs comes last; what a killed kernel had open does not."""
    held = person.folder / "held"
    held.mkdir()
    (held / "a.json").write_text(json.dumps({"pid": 2**22 + 1, "host": socket.gethostname()}))  # of a killed kernel
    assert Page(person, monkeypatch).say("ready", view="1")["id"] == "a"
    monkeypatch.setattr("os.getpid", lambda: 1)  # another notebook, whose process surely runs
    other = open_canvas(person.folder, who="ben")
    assert other.canvas
    monkeypatch.undo()
    page, second = Page(person, monkeypatch), Page(other, monkeypatch)
    assert second.say("ready", view="2")["id"] == "b"  # "a" is open elsewhere
    assert second.say("submit", ONES, id="b", seconds=2, view="2")["id"] == "c"
    assert second.say("submit", ONES, id="c", seconds=2, view="2")["id"] == "a"  # nothing else is left
    assert page.say("submit", ONES, id="a", seconds=2, view="1")["what"] == "done"


def test_a_folder_knows_its_classes(person: NotebookAnnotator, tmp_path: Path):
    opened = open_canvas(person.folder)
    assert opened.labels == LABELS and [one["name"] for one in opened.canvas.classes] == [*LABELS.names, "void"]
    with pytest.raises(ConfigError, match="holds answers for other classes: choose another folder"):
        make_annotator("notebook", person.folder, LabelSpace.voc())
    with pytest.raises(ConfigError, match="is no folder in which a run"):
        open_canvas(tmp_path / "nowhere")


def deliver_and_die(folder: Path, answer: Answer, left: int) -> int:
    """Deliver in a process that is killed before its write number `left`; its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    writes = iter(range(left))

    def counted(act: Any) -> Any:
        def write(*arguments: Any, **named: Any) -> Any:
            if next(writes, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return act(*arguments, **named)

        return write

    os.replace, os.unlink = counted(os.replace), counted(os.unlink)
    make_annotator("notebook", folder, LABELS).deliver(answer)
    os._exit(0)


def test_killed_between_any_two_writes(person: NotebookAnnotator, tmp_path: Path):
    """The old answer or the new one, never half of one; and the same again ends the same."""
    seen, second = [], Answer("a", "draw", "drawn", 2 * ONES, 9.0)
    person.deliver(Answer("a", "draw", "drawn", ONES, 1.0))
    for left in range(6):
        folder = tmp_path / f"killed{left}"
        shutil.copytree(person.folder, folder)
        code = deliver_and_die(folder, second, left)
        answer = make_annotator("notebook", folder, LABELS).answered()["a"]
        assert answer.mask is not None and {*np.unique(answer.mask)} in ({1}, {2})
        seen.append((code, int(answer.mask[0, 0])))
        make_annotator("notebook", folder, LABELS).deliver(second)
        assert make_annotator("notebook", folder, LABELS).answered()["a"].digest() == second.digest()
    killed = -signal.SIGKILL
    assert seen == [(killed, 1), (killed, 1), (killed, 2), (killed, 2), (killed, 2), (0, 2)]


def test_twelve_million_pixels_are_taken_in_seconds(tmp_path: Path):
    """The kernel's part of a large image; a bound for a busy machine, some hundred milliseconds on a free one."""
    Image.new("RGB", (4000, 3000), (90, 120, 60)).save(tmp_path / "big.jpg")
    person = make_annotator("notebook", tmp_path / "run", LABELS)
    person.ask([Request("big", "draw", tmp_path / "big.jpg")])
    mask = np.zeros((3000, 4000), np.uint8)
    mask[500:2500, 700:3000] = 1
    begun = time.perf_counter()
    person.deliver(Answer("big", "draw", "drawn", mask, 60.0))
    assert time.perf_counter() - begun < 10
    assert (person.answered()["big"].mask == mask).all()


def test_the_canvas_is_part_of_the_package(tmp_path: Path):
    """JavaScript and style travel in the wheel, and are what the widget shows."""
    root = Path(__file__).resolve().parent.parent
    assert "recursive-include vlm_itl *.js *.css" in (root / "MANIFEST.in").read_text()
    canvas = make_annotator("notebook", tmp_path, LABELS).canvas
    assert canvas._esm == CODE.read_text(encoding="utf-8")
    assert os.path.getsize(CODE) < 60_000
