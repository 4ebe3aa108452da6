"""What people are asked and what comes back: written down whole, once, and frozen when taken."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlm_itl.core.checks import ConfigError, DataError, RunError
from vlm_itl.data.labels import VOID, LabelSpace
from vlm_itl.data.masks import MaskStore
from vlm_itl.data.sources import load_data, toy_images
from vlm_itl.people import (
    Annotator,
    Answer,
    AnswerStore,
    Request,
    Waiting,
    make_annotator,
    register_annotator,
)
from vlm_itl.people.desk import Desk
from vlm_itl.people.requests import ANNOTATORS, Asked, Lines, checked_mask, mask_png

TOY = toy_images()
LABELS = TOY.labels


@pytest.fixture
def photos(tmp_path: Path) -> dict[str, Path]:
    """Four photographs as files."""
    found = {}
    for row in TOY.train:
        found[row["id"]] = tmp_path / f"{row['id']}.png"
        row["image"].save(found[row["id"]])
    return found


def masks() -> dict[str, np.ndarray]:
    """What is true of them."""
    return {row["id"]: row["mask"] for row in TOY.train}


def requests(photos: dict[str, Path]) -> list[Request]:
    """One of each kind, the second the most urgent."""
    proposal = np.ones((8, 8), np.uint8)
    return [
        Request("toy-0", "draw", photos["toy-0"], reason="unsure", priority=1.0),
        Request("toy-1", "fix", photos["toy-1"], proposal, priority=2.0),
        Request("toy-2", "verify", photos["toy-2"], proposal),
    ]


@pytest.mark.parametrize(
    ("kind", "proposal", "words"),
    [
        ("draw", np.zeros((8, 8), np.uint8), "'draw' shows no proposal"),
        ("verify", None, "'verify' needs a proposal"),
        ("label", None, "kind='label' is not known"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(kind: str, proposal: Any, words: str):
    with pytest.raises(ConfigError, match=words):
        Request("a", kind, Path("a.png"), proposal)


@pytest.mark.parametrize("name", ["", ".", "../a", "a/b", "a\\b", "C:a", 7])
def test_an_id_is_fit_for_a_file_name(name: Any):
    with pytest.raises((ConfigError, RunError)):
        Request(name, "draw", Path("a.png"))


@pytest.mark.parametrize(
    ("kind", "verdict", "with_mask", "seconds"),
    [
        ("draw", "accepted", True, 1.0),
        ("draw", "drawn", False, 1.0),
        ("fix", "rejected", False, 1.0),
        ("verify", "rejected", True, 1.0),
        ("verify", "drawn", True, 1.0),
        ("fix", "fixed", True, -1.0),
        ("fix", "fixed", True, float("nan")),
    ],
)
def test_an_answer_fits_its_question(kind: str, verdict: str, with_mask: bool, seconds: float):
    with pytest.raises(ConfigError):
        Answer("a", kind, verdict, np.zeros((2, 2), np.uint8) if with_mask else None, seconds)


def test_the_digest_sees_id_verdict_and_every_pixel():
    mask = np.zeros((4, 6), np.uint8)
    one = Answer("a", "fix", "fixed", mask, 3.0, "anna", "here").digest()
    assert one == Answer("a", "fix", "fixed", mask.copy(), None).digest()
    spot = mask.copy()
    spot[3, 5] = VOID
    others = [
        Answer("b", "fix", "fixed", mask),
        Answer("a", "fix", "accepted", mask),
        Answer("a", "fix", "fixed", spot),
        Answer("a", "fix", "fixed", mask.reshape(6, 4)),
        Answer("a", "fix", "skipped", None),
    ]
    assert len({one, *(other.digest() for other in others)}) == 6


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (np.zeros((8, 4), np.uint8), "its mask is 4x8 pixels and the photograph 8x8"),
        (np.full((8, 8), 9, np.uint8), "value 9 at row 0, column 0 means no class"),
        (np.zeros((8, 8, 3), np.uint8), "a mask has two dimensions"),
        (Path("nowhere.png"), "no such file"),
    ],
)
def test_a_mask_that_cannot_be_one_names_the_image(photos: dict[str, Path], mask: Any, words: str):
    with pytest.raises(DataError, match=words) as told:
        checked_mask(requests(photos)[0], mask, LABELS)
    assert "'toy-0'" in str(told.value) and "\n" not in str(told.value)


def test_asked_once_whoever_asks(tmp_path: Path, photos: dict[str, Path]):
    three = requests(photos)
    assert len(Asked(tmp_path / "w", LABELS).add(three[:2])) == 2
    assert [r.id for r in Asked(tmp_path / "w", LABELS).add(three)] == ["toy-2"]
    for before, after in zip(three, Asked(tmp_path / "w", LABELS).all().values(), strict=True):
        same = (before.id, before.kind, before.reason, before.priority) == (
            after.id,
            after.kind,
            after.reason,
            after.priority,
        )
        assert same and np.array_equal(before.proposal, after.proposal) and before.image == after.image


class Killed(BaseException):
    """The process ends here; nothing after it is run."""


def tree(folder: Path) -> dict[str, bytes]:
    """All files of a folder but those that were being written when the process was killed."""
    files = [p for p in folder.rglob("*") if p.is_file() and not p.name.endswith(".tmp")]
    return {p.relative_to(folder).as_posix(): p.read_bytes().replace(b"\n\n", b"\n") for p in sorted(files)}


def killed(monkeypatch: pytest.MonkeyPatch, work: Callable[[], Any], steps: int) -> bool:
    """Work until so many writes are safe on disk, or to the end; was it killed?"""
    done = [0]

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def write(*given: Any) -> Any:
            if done[0] == steps:
                raise Killed
            done[0] += 1
            return real(*given)

        return write

    with monkeypatch.context() as patch:
        for name in ("fsync", "replace"):
            patch.setattr(os, name, counted(getattr(os, name)))
        try:
            work()
        except Killed:
            return True
    return False


def ask_three(folder: Path, photos: dict[str, Path]) -> None:
    """Requests of every kind, by a process that knows nothing of an earlier one."""
    Asked(folder, LABELS).add(requests(photos))


def take_three(folder: Path, photos: dict[str, Path]) -> None:
    """Answers, likewise."""
    store = AnswerStore(folder, LABELS)
    for name in list(photos)[:3]:
        store.take(Answer(name, "fix", "fixed", np.full((8, 8), 2, np.uint8), 5.0))


@pytest.mark.parametrize("work", [ask_three, take_three])
def test_killed_between_any_two_writes(
    tmp_path: Path, photos: dict[str, Path], monkeypatch: pytest.MonkeyPatch, work: Callable[..., None]
):
    work(tmp_path / "whole", photos)
    steps = 0
    while killed(monkeypatch, partial(work, tmp_path / str(steps), photos), steps):
        work(tmp_path / str(steps), photos)
        assert tree(tmp_path / str(steps)) == tree(tmp_path / "whole"), steps
        steps += 1
    assert steps >= 7  # a picture, its name and a line for each of three; nothing is shown for the one to be drawn


def test_half_a_line_is_no_line(tmp_path: Path):
    lines = Lines(tmp_path / "a.jsonl")
    assert lines.all() == {}
    lines.append({"id": "a", "n": 1})
    with open(lines.path, "ab") as file:
        file.write(b'\n{"id": "b", "n": "\xc3')
    assert lines.all() == {"a": {"id": "a", "n": 1}}
    lines.append({"id": "c"})
    lines.append({"id": "a", "n": 2})  # the first one counts
    assert lines.all() == Lines(lines.path).all() == {"a": {"id": "a", "n": 1}, "c": {"id": "c"}}


def test_what_was_taken_stays(tmp_path: Path):
    store = AnswerStore(tmp_path / "s", LABELS)
    mask = masks()["toy-1"]
    first = Answer("toy-0", "draw", "drawn", mask, 90.5, "anna", "file.png")
    assert store.take(first) and store.take(Answer("toy-1", "fix", "skipped", None))
    assert not store.take(first) and "toy-0" in store and "toy-2" not in store
    read = AnswerStore(tmp_path / "s", LABELS)["toy-0"]
    assert (read.mask == mask).all() and (read.who, read.seconds, read.source) == ("anna", 90.5, "file.png")
    edited = Answer("toy-0", "draw", "drawn", np.ones_like(mask))
    assert store.changed(edited) and not store.changed(first) and not store.take(edited)
    assert store.changed(Answer("toy-1", "fix", "fixed", mask)) and not store.changed(
        Answer("toy-3", "draw", "drawn", mask)
    )
    assert store.seconds == {"toy-0": 90.5, "toy-1": None}
    store.masks.path("toy-0").write_bytes(mask_png(np.zeros_like(mask), LABELS))
    with pytest.raises(RunError, match="is another mask than the run has taken"):
        store["toy-0"]


def test_masks_of_people_have_colours_and_254_classes(tmp_path: Path):
    labels = LabelSpace(tuple(f"c{n}" for n in range(254)))
    mask = np.arange(256, dtype=np.uint8).reshape(16, 16)
    mask[mask == 254] = 0
    store = AnswerStore(tmp_path, labels)
    store.take(Answer("a", "draw", "drawn", mask))
    assert (store["a"].mask == mask).all()


def test_an_annotator_of_ones_own(tmp_path: Path):
    @register_annotator("silent")
    class Silent(Annotator):
        "Never answers."

        def __init__(self, folder: Path, labels: LabelSpace, place: str, patience: int = 3):
            super().__init__(folder, labels)

        def ask(self, requests: Any) -> None:
            self.asked.add(requests)

        def answered(self) -> dict[str, Answer]:
            return {}

        def waiting(self) -> str:
            return ""

    try:
        with pytest.raises(ConfigError, match="needs the option 'place'"):
            make_annotator("silent", tmp_path, LABELS)
        with pytest.raises(ConfigError, match="no option 'patients'. Did you mean 'patience'"):
            make_annotator("silent", tmp_path, LABELS, place="", patients=1)
        with pytest.raises(ConfigError, match="is not known"):
            make_annotator("silence!", tmp_path, LABELS)
        silent = make_annotator("silent", tmp_path, LABELS, place="")
        assert silent.name == "silent" and silent.left() == []
        silent.close()
    finally:
        del ANNOTATORS["silent"]
    with pytest.raises(ConfigError, match="must be a class over Annotator"):
        register_annotator("half")(Annotator)
    assert Waiting.code == os.EX_TEMPFAIL


def test_a_photograph_on_its_side(tmp_path: Path):
    """A camera's turn counts: people see it upright, and so must their masks be."""
    data = load_data("scenes", seed=0, options={"n_train": 2, "n_test": 1})
    image = data.train[0]["image"]
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    request = Request("turned", "draw", tmp_path / "turned.jpg")
    assert request.size == image.size[::-1]
    with pytest.raises(DataError, match="without scaling or turning it"):
        checked_mask(request, np.zeros(image.size[::-1], np.uint8)[:5], data.labels)


def test_proposals_are_not_kept_in_memory(photos: dict[str, Path], tmp_path: Path):
    """Twelve masks of a million pixels are asked about in the memory of a few, in this process and in the next."""
    store = MaskStore(tmp_path / "masks", LABELS)
    names = [f"big-{n}" for n in range(12)]
    for name in names:
        store.write(name, np.zeros((1000, 1000), np.uint8))

    class Nobody(Annotator):
        def ask(self, requests: Any) -> None:
            self.asked.add(requests)

        def answered(self) -> dict[str, Answer]:
            return {}

        def waiting(self) -> str:
            return ""

    for _ in range(2):
        desk = Desk(tmp_path, Nobody(tmp_path / "people", LABELS), dict.fromkeys(names, photos["toy-0"]), names)  # type: ignore[arg-type]
        tracemalloc.start()
        desk.ask(names, "fix", store)
        desk.ask(names[:6], "verify", {name: store.path(name) for name in names})
        known = desk.annotator.asked.all()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(known) == 18 and peak < 6e6
        assert all(
            isinstance(request.shown, Path) and request.proposal.shape == (1000, 1000) for request in known.values()
        )
