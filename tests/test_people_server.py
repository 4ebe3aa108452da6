"""Label Studio as an annotator: every case against a recorded one, and, where it is installed, against a real one.

The real one is slow (`make test-people`). Set VLM_ITL_LABEL_STUDIO to its executable, which lives in an environment of
its own (`python -m venv studio; studio/bin/pip install label-studio`); a browser needs playwright and chromium.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_label_studio import EMAIL, FakeStudio, Refuse
from PIL import Image
from test_people import LABELS, masks, photos, requests

from vlm_itl.core.checks import ConfigError, DataError, RunError
from vlm_itl.data.labels import VOID, LabelSpace
from vlm_itl.data.sources import load_data
from vlm_itl.people import AnswerStore, Request, Waiting, make_annotator
from vlm_itl.people.label_studio import LabelStudioAnnotator, Server, label_config, mask_of, results_of
from vlm_itl.people.robot import Robot, slipped, work

__all__ = ["photos"]  # the fixture


class RealStudio:
    """A real Label Studio on loopback, with its own data."""

    def __init__(self, executable: str, data: Path):
        self.executable, self.data, kept = executable, data, data / "token.txt"  # its owner is in its tables
        self.token = kept.read_text() if kept.is_file() else secrets.token_hex(20)
        kept.write_text(self.token)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.start()

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.port}"

    def start(self, seconds: float = 900.0) -> None:
        """Start it, and wait until it answers; the first time it makes its tables, which takes minutes."""
        quiet = {
            "COLLECT_ANALYTICS": "false",
            "LATEST_VERSION_CHECK": "false",
            "SENTRY_DSN": "",
            "FRONTEND_SENTRY_DSN": "",
        }
        user = ["--username", EMAIL, "--password", "a long password", "--user-token", self.token]
        place = ["--internal-host", "127.0.0.1", "--port", str(self.port), "--data-dir", str(self.data)]
        words = [self.executable, "start", "--init", "--no-browser", "--enable-legacy-api-token", *place, *user]
        clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "LABEL_STUDIO_URL")}
        with open(self.data / "server.log", "ab") as log:
            self.process = subprocess.Popen(words, env=clean | quiet, stdout=log, stderr=log, start_new_session=True)
        for _ in range(int(4 * seconds)):
            assert self.process.poll() is None, (self.data / "server.log").read_text()[-2000:]
            try:
                self.call("GET", "/api/version")
                return
            except OSError:
                time.sleep(0.25)
        raise TimeoutError((self.data / "server.log").read_text()[-2000:])

    def stop(self) -> None:
        """Kill it."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """One call, as its owner."""
        headers = {"Authorization": f"Token {self.token}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(
            urllib.request.Request(self.url + path, data, headers, method=method), timeout=60
        ) as got:
            text = got.read()
        return json.loads(text) if text else None


@pytest.fixture(scope="session")
def real(cache_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealStudio]:
    """A real one, for the session; its empty tables are kept, since they take minutes to make."""
    executable = os.environ.get("VLM_ITL_LABEL_STUDIO") or shutil.which("label-studio")
    if not executable or not Path(executable).exists():
        pytest.skip("no Label Studio: set VLM_ITL_LABEL_STUDIO to its executable")
    kept, data = cache_folder / "label_studio", tmp_path_factory.mktemp("studio") / "data"
    if kept.is_dir():
        shutil.copytree(kept, data)
    else:
        data.mkdir()
    studio = RealStudio(executable, data)
    if not kept.is_dir():
        studio.stop()
        shutil.copytree(data, kept)
        studio.start()
    yield studio
    studio.stop()


@pytest.fixture(params=["recorded", pytest.param("real", marks=pytest.mark.slow)])
def studio(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Label Studio, and the environment that leads to it."""
    found = FakeStudio() if request.param == "recorded" else request.getfixturevalue("real")
    if isinstance(found, FakeStudio):
        direct = Server(found.url)
        found.call = direct.call  # type: ignore[attr-defined]
    monkeypatch.setenv("LABEL_STUDIO_URL", found.url)
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", found.token)
    yield found
    if isinstance(found, FakeStudio):
        found.stop()


def annotator(place: Path, labels: LabelSpace = LABELS) -> LabelStudioAnnotator:
    """A process that knows only what is on disk."""
    made = make_annotator("labelstudio", place / "people", labels)
    assert isinstance(made, LabelStudioAnnotator)
    made.project.server.tries = 1
    return made


def task_of(carrier: LabelStudioAnnotator, name: str) -> int:
    """The number of the only task of a question."""
    (task,) = carrier.tasks.all()[name]
    return int(task["id"])


def said(mask: np.ndarray | None = None, word: str | None = None, **more: Any) -> dict[str, Any]:
    """An annotation as a browser would send it."""
    results = [] if mask is None else results_of(mask, LABELS)
    if word:
        choice = {"choices": [word]}
        results.append({"id": "w", "type": "choices", "from_name": "verdict", "to_name": "image", "value": choice})
    return {"result": results, "lead_time": 3.25, **more}


def one_line(error: BaseException) -> str:
    """A message, which is a single line."""
    assert "\n" not in str(error) and len(str(error)) < 900
    return str(error)


def test_real_photographs_there_and_back(studio: Any, voc: Path, tmp_path: Path):
    """Of PASCAL VOC, with void borders: what is taken is what was known, and the seconds are the sum of lead_time."""
    data, count = load_data(str(voc), seed=0), 12 if isinstance(studio, RealStudio) else 3
    rows = {row["id"]: row for row in data.train.select(range(count))}
    asked: list[Request] = []
    for n, (image_id, row) in enumerate(rows.items()):
        row["image"].save(tmp_path / f"{image_id}.jpg")
        kind = ("draw", "fix", "verify")[n % 3]
        shown = None if kind == "draw" else (row["mask"] if n % 2 else slipped(row["mask"]))
        asked.append(Request(image_id, kind, tmp_path / f"{image_id}.jpg", shown, priority=float(n)))
    carrier = annotator(tmp_path, data.labels)
    carrier.ask(asked)
    assert (
        carrier.waiting()
        == f"waiting for {count} masks ({count // 3} to draw, {count // 3} to fix, {count // 3} to check)"
        + (f": {studio.url}/projects/{carrier.project.open()}/data")
    )
    order = [task["data"]["id"] for task in sorted((t for (t,) in carrier.tasks.all().values()), key=lambda t: t["id"])]
    assert order == list(rows)[::-1]  # the most urgent first
    robot = Robot(lambda image_id: rows[image_id]["mask"], data.labels)
    assert work(robot, carrier) == count and carrier.waiting() == ""
    store = AnswerStore(tmp_path / "answers", data.labels)
    assert all(store.take(answer) for answer in annotator(tmp_path, data.labels).answered().values())
    for request in asked:
        assert store[request.id].digest() == robot.answer(request).digest()
    sent = [a for t in carrier.tasks.all().values() for a in carrier.tasks.annotations(t[0])]
    assert sum(store.seconds.values()) == pytest.approx(sum(a["lead_time"] for a in sent), abs=1e-6)  # type: ignore[arg-type]
    assert {line["who"] for line in store.lines().values()} == {EMAIL}
    if isinstance(studio, RealStudio):
        agree_with_its_own_converter(studio, carrier, store, tmp_path)


def agree_with_its_own_converter(
    studio: RealStudio, carrier: LabelStudioAnnotator, store: AnswerStore, place: Path
) -> None:
    """Label Studio's own package reads the same pixels from its own export."""
    exported = studio.call(
        "GET", f"/api/projects/{carrier.project.open()}/export?exportType=JSON&download_all_tasks=true"
    )
    (place / "export.json").write_text(json.dumps(exported))
    code = """
import json, sys
import numpy as np
from label_studio_sdk.converter.brush import decode_rle
for task in json.load(open(sys.argv[1])):
    for result in task["annotations"][0]["result"]:
        if result["type"] == "brushlabels":
            size = result["original_height"], result["original_width"], 4
            alpha = decode_rle(result["value"]["rle"]).reshape(size)[..., 3] > 0
            name = f"{task['data']['id']}+{result['value']['brushlabels'][0]}"
            np.save(f"{sys.argv[2]}/{name}.npy", alpha)
"""
    python = Path(studio.executable).resolve().parent / "python"
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([str(python), "-c", code, str(place / "export.json"), str(place)], check=True, env=clean)
    index_of, found = {**carrier.labels.label2id, "void": VOID}, 0
    for path in place.glob("*+*.npy"):
        name, _, label = path.stem.partition("+")
        if store.lines()[name]["verdict"] in ("drawn", "fixed", "accepted"):
            assert (np.load(path) == (store[name].mask == index_of[label])).all()
            found += 1
    assert found >= 12


def test_killed_at_any_call(studio: Any, tmp_path: Path, photos: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    """While asking and while answering: the same again goes on, and nothing is asked twice."""
    robot = Robot(lambda image_id: masks()[image_id], LABELS)
    expected = {r.id: (robot.answer(r).digest(), robot.answer(r).seconds) for r in requests(photos)}
    plain = Server.call

    def run(place: Path) -> dict[str, Any]:
        carrier = annotator(place)
        carrier.ask(requests(photos))
        work(robot, carrier)
        return {i: (a.digest(), a.seconds) for i, a in carrier.answered().items()}

    for late in (False, True):  # killed before a call, or after the server has done it
        steps = 0
        while True:
            count = [0]

            def counted(
                self: Server, *given: Any, limit: int = steps, count: list[int] = count, late: bool = late
            ) -> Any:
                if count[0] == limit and not late:
                    raise KeyboardInterrupt
                count[0] += 1
                reply = plain(self, *given)
                if count[0] == limit + 1 and late:
                    raise KeyboardInterrupt
                return reply

            place, stopped = tmp_path / f"{late}-{steps}", False
            monkeypatch.setattr(Server, "call", counted)
            try:
                run(place)
            except KeyboardInterrupt:
                stopped = True
            monkeypatch.setattr(Server, "call", plain)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert run(place) == expected, (late, steps)
            tasks = annotator(place).tasks.all()
            assert sorted(tasks) == sorted(expected) and all(len(own) == 1 for own in tasks.values())
            if not stopped:
                break
            steps += 5 if isinstance(studio, FakeStudio) else 2
        assert steps > 15


def test_a_server_that_is_killed_and_comes_back(studio: Any, tmp_path: Path, photos: dict[str, Path]):
    carrier = annotator(tmp_path)
    carrier.ask(requests(photos))
    robot = Robot(lambda image_id: masks()[image_id], LABELS)
    work(robot, carrier, at_most=2)
    before = {i: a.digest() for i, a in carrier.answered().items()}
    studio.stop()
    with pytest.raises(RunError, match="cannot be reached .*Start it, then run the same again") as told:
        carrier.answered()
    assert studio.token not in one_line(told.value)
    studio.start()
    assert {i: a.digest() for i, a in annotator(tmp_path).answered().items()} == before
    assert work(robot, carrier) == 1 and carrier.waiting() == ""


def test_a_deleted_task_is_asked_again_and_a_seen_answer_stays(studio: Any, tmp_path: Path, photos: dict[str, Path]):
    carrier = annotator(tmp_path)
    carrier.ask(requests(photos))
    studio.call("POST", f"/api/tasks/{task_of(carrier, 'toy-1')}/annotations/", said(masks()["toy-1"]))
    first = carrier.answered()["toy-1"]
    for name in ("toy-0", "toy-1"):
        studio.call("DELETE", f"/api/tasks/{task_of(carrier, name)}/")
    with pytest.warns(
        RuntimeWarning, match="the task of image 'toy-0' was deleted in Label Studio, and is asked again"
    ):
        assert [r.id for r in annotator(tmp_path).left()] == ["toy-0", "toy-2"]
    now = annotator(tmp_path)
    assert sorted(now.tasks.all()) == ["toy-0", "toy-2"] and now.answered()["toy-1"].digest() == first.digest()


def test_a_cancelled_annotation_is_a_skip_until_there_is_a_real_one(
    studio: Any, tmp_path: Path, photos: dict[str, Path]
):
    carrier = annotator(tmp_path)
    carrier.ask(requests(photos))
    number = task_of(carrier, "toy-0")
    studio.call("POST", f"/api/tasks/{number}/annotations/", said(was_cancelled=True))
    assert carrier.answered()["toy-0"].verdict == "skipped"
    studio.call("POST", f"/api/tasks/{number}/annotations/", said(masks()["toy-3"]))
    answer = carrier.answered()["toy-0"]
    assert answer.verdict == "drawn" and (answer.mask == masks()["toy-3"]).all()


def test_an_edit_is_seen_by_its_digest(studio: Any, tmp_path: Path, photos: dict[str, Path]):
    carrier = annotator(tmp_path)
    carrier.ask(requests(photos))
    made = studio.call("POST", f"/api/tasks/{task_of(carrier, 'toy-0')}/annotations/", said(masks()["toy-1"]))
    store = AnswerStore(tmp_path / "answers", LABELS)
    assert store.take(carrier.answered()["toy-0"])
    studio.call("PATCH", f"/api/annotations/{made['id']}/", {"result": results_of(masks()["toy-3"], LABELS)})
    assert store.changed(carrier.answered()["toy-0"]) and (store["toy-0"].mask == masks()["toy-1"]).all()
    studio.call("DELETE", f"/api/annotations/{made['id']}/")
    assert (carrier.answered()["toy-0"].mask == masks()["toy-1"]).all()  # it was seen


def test_two_annotations(studio: Any, tmp_path: Path, photos: dict[str, Path]):
    """Alike, they are one; if they differ, somebody has to say which counts; what comes after one was seen is told."""
    carrier = annotator(tmp_path)
    carrier.ask(requests(photos))
    path = f"/api/tasks/{task_of(carrier, 'toy-0')}/annotations/"
    for _ in range(2):
        studio.call("POST", path, said(masks()["toy-1"]))
    other = studio.call("POST", path, said(masks()["toy-3"]))
    with pytest.raises(
        DataError, match="'toy-0' is not taken: .* has 3 annotations that differ .*delete those"
    ) as told:
        carrier.answered()
    assert EMAIL in one_line(told.value)
    studio.call("DELETE", f"/api/annotations/{other['id']}/")
    assert (carrier.answered()["toy-0"].mask == masks()["toy-1"]).all()
    studio.call("POST", path, said(masks()["toy-3"]))
    with pytest.warns(RuntimeWarning, match="Before, it was understood, and that counts"):
        assert (carrier.answered()["toy-0"].mask == masks()["toy-1"]).all()


def spoilt(**fields: Any) -> dict[str, Any]:
    """A red annotation with something wrong in its region."""
    body = said(np.ones((8, 8), np.uint8))
    value = fields.pop("value", {})
    body["result"][0] |= fields
    body["result"][0]["value"] |= value
    return body


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (spoilt(value={"brushlabels": ["rde"]}), "no class is called 'rde'. Did you mean 'red'"),
        (spoilt(value={"brushlabels": []}), "it has no label"),
        (spoilt(original_width=16, original_height=4), "painted on 16x4 pixels, and the photograph has 8x8"),
        (
            spoilt(value={"rle": results_of(np.ones((9, 9), np.uint8), LABELS)[0]["value"]["rle"]}),
            "no picture of 8 x 8",
        ),
        (spoilt(image_rotation=90), "painted on the picture turned by 90 degrees"),
        (spoilt(from_name="brush"), "this project asks for brushes only"),
        (spoilt(type="rectanglelabels", value={"x": 1}), "a region of type 'rectanglelabels'"),
        (spoilt(value={"rle": [0, 0, 1]}), "brush"),
    ],
)
def test_what_cannot_be_taken_is_one_line_and_loses_nothing(
    studio: Any, tmp_path: Path, photos: dict[str, Path], body: Any, words: str
):
    carrier = annotator(tmp_path)
    carrier.ask(requests(photos))
    studio.call("POST", f"/api/tasks/{task_of(carrier, 'toy-1')}/annotations/", said(masks()["toy-1"]))
    made = studio.call("POST", f"/api/tasks/{task_of(carrier, 'toy-0')}/annotations/", body)
    with pytest.raises(DataError, match=words) as told:
        carrier.answered()
    assert "the answer for image 'toy-0' is not taken" in one_line(told.value)
    studio.call("PATCH", f"/api/annotations/{made['id']}/", {"result": said(masks()["toy-2"])["result"]})
    found = annotator(tmp_path).answered()
    assert (found["toy-0"].mask == masks()["toy-2"]).all() and (found["toy-1"].mask == masks()["toy-1"]).all()


def test_a_revoked_token(studio: Any, tmp_path: Path, photos: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    carrier = annotator(tmp_path)
    carrier.ask(requests(photos))
    old, fresh = studio.token, studio.call("POST", "/api/current-user/reset-token")["token"]
    studio.token = fresh
    with pytest.raises(RunError, match="does not take the key in LABEL_STUDIO_API_KEY .* Nothing is lost") as told:
        carrier.answered()
    assert old not in one_line(told.value) and fresh not in str(told.value)
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", fresh)
    assert len(carrier.left()) == 3


def test_a_personal_token(studio: Any, tmp_path: Path, photos: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    """The kind that new installations hand out: it is exchanged for one that lives for minutes, again and again."""
    if isinstance(studio, RealStudio):
        personal = studio.call("POST", "/api/token/")["token"]
    else:
        personal = f"e30.{studio.token}.sig"
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", personal)
    carrier = annotator(tmp_path)
    carrier.ask(requests(photos))
    assert work(Robot(lambda image_id: masks()[image_id], LABELS), carrier) == 3 and carrier.waiting() == ""
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", "e30.nobody.sig")
    with pytest.raises(RunError, match="does not take the key") as told:
        annotator(tmp_path).answered()
    assert "nobody" not in one_line(told.value)


def test_a_deleted_project(studio: Any, tmp_path: Path, photos: dict[str, Path]):
    carrier = annotator(tmp_path)
    carrier.ask(requests(photos))
    studio.call("DELETE", f"/api/projects/{carrier.project.open()}/")
    for process in (carrier, annotator(tmp_path)):
        with pytest.raises(
            RunError, match="is not in Label Studio at .* any more, or this key does not see it"
        ) as told:
            process.answered()
        one_line(told.value)


@pytest.mark.parametrize("more", [{}, pytest.param({"policy": "triage"}, marks=pytest.mark.slow)])
def test_three_rounds_end_as_the_simulation_does(studio: Any, tmp_path: Path, more: dict[str, Any]):
    """A run that rests, a robot in Label Studio, the same run again: ids, masks and metrics of the simulator."""
    from test_people_loop import TRUTH, lines
    from toyloop import Eye, Listener, Parrot, no_figures, settings, toy_loop

    from vlm_itl.data.sources import toy_images
    from vlm_itl.experiment.annotator import asked_of_people
    from vlm_itl.experiment.loop import Loop
    from vlm_itl.people.desk import Desk, Photographs

    place, data, rests = tmp_path / "people_run", toy_images(), 0
    robot = Robot(TRUTH.__getitem__, data.labels)
    while not (place / "summary.json").is_file():
        loop, carrier = None, make_annotator("labelstudio", place / "people", data.labels)
        try:
            config = settings(place, **more)
            photographs = Photographs(place / "people/photographs", data.train, data.val, data.test)
            desk = Desk(place, carrier, photographs, asked_of_people(config, data))
            loop = Loop(config, data, Parrot(data), Eye(), tracker=Listener(), draw=no_figures, desk=desk)
            list(loop.run())
        except Waiting as rest:
            assert f"{studio.url}/projects/" in str(rest)
            if loop is not None:
                loop.folder.close()
            rests += 1
            assert work(robot, make_annotator("labelstudio", place / "people", data.labels), at_most=2) > 0
    list(toy_loop(settings(tmp_path / "simulated", **more)).run())
    assert lines(place) == lines(tmp_path / "simulated") and len(lines(place)) == 3 and rests >= 3
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (place, tmp_path / "simulated")]
    assert summaries[0]["test"] == summaries[1]["test"]
    tasks = annotator(place, data.labels).tasks.all()
    whole = [studio.call("GET", f"/api/tasks/{task['id']}/") for own in tasks.values() for task in own]
    lead_time = sum(annotation["lead_time"] for task in whole for annotation in task["annotations"])
    assert summaries[0]["budget"]["human_seconds"] == pytest.approx(lead_time)


def test_odd_names_and_no_background(studio: Any, tmp_path: Path):
    """Classes of any name; where none is the background, what nobody has painted is void."""
    labels = LabelSpace(('a "quoted" & <odd> name', "Straße 道路", "void"))
    mask = np.array([[0, 1, 2, VOID]] * 5, np.uint8)
    Image.new("RGB", (4, 5)).save(tmp_path / "a.png")
    carrier = annotator(tmp_path, labels)
    carrier.ask(
        [
            Request("a", "draw", tmp_path / "a.png"),
            Request("a~again", "fix", tmp_path / "a.png", mask[:, ::-1], about="a"),
        ]
    )
    work(Robot({"a": mask}.__getitem__, labels), carrier)
    found = carrier.answered()
    assert (found["a"].mask == mask).all() and (found["a~again"].mask == mask).all()
    assert "(void)" in label_config(labels)


def test_submitted_with_nothing_painted(studio: Any, tmp_path: Path):
    """With a background it is all background; without one nothing is said at all, which was taken as drawn."""
    Image.new("RGB", (4, 5)).save(tmp_path / "a.png")
    for names in (("background", "cat"), ("sky", "tree")):
        carrier = annotator(tmp_path / names[0], LabelSpace(names))
        carrier.ask([Request("a", "draw", tmp_path / "a.png")])
        studio.call("POST", f"/api/tasks/{task_of(carrier, 'a')}/annotations/", said())
        if names[0] == "background":
            assert (carrier.answered()["a"].mask == 0).all()
            continue
        with pytest.raises(DataError, match="'a' is not taken: .* nothing is painted yet. Paint it, or skip it"):
            carrier.answered()


def test_more_tasks_than_fit_a_page(tmp_path: Path, photos: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    studio = FakeStudio()
    monkeypatch.setenv("LABEL_STUDIO_URL", studio.url)
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", studio.token)
    for number in range(3):
        studio.make_project({}, {"description": "of somebody else", "title": f"other {number}"})
    many = [Request(f"toy-0~{n}", "draw", photos["toy-0"]) for n in range(103)]
    carrier = annotator(tmp_path)
    carrier.ask(many)
    again = annotator(tmp_path)
    again.ask(many)
    assert len(again.left()) == 103 and len(studio.tasks) == 103 and len(studio.projects) == 4
    studio.stop()


def test_trouble_on_the_way(tmp_path: Path, photos: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    """What is busy is asked again, what writes is not; a redirect is not followed, and no stranger is understood."""
    studio = FakeStudio()
    monkeypatch.setenv("LABEL_STUDIO_URL", studio.url)
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", studio.token)
    carrier, calls = annotator(tmp_path), []
    carrier.project.server.tries = 2
    monkeypatch.setattr(time, "sleep", lambda seconds: None)

    def busy(status: int, every: int) -> Callable[[str, str], None]:
        def before(method: str, path: str) -> None:
            calls.append(method)
            if len(calls) % every == 0:
                raise Refuse(status, f"no, {studio.token}")

        return before

    studio.before = busy(503, 3)
    for _ in range(40):
        try:
            carrier.ask(requests(photos))
            break
        except RunError as error:
            assert "answers with error 503" in one_line(error)
    assert sorted(carrier.tasks.all()) == ["toy-0", "toy-1", "toy-2"]
    for status, words in ((418, "refuses GET .* .418."), (302, "refuses GET"), (403, "does not take the key")):
        studio.before = busy(status, 1)
        with pytest.raises(RunError, match=words) as told:
            carrier.answered()
        assert studio.token not in one_line(told.value)
    studio.before = lambda method, path: None
    monkeypatch.setattr(json, "dumps", lambda value, **more: "<html>")
    with pytest.raises(RunError, match="answers, but not as Label Studio does: is LABEL_STUDIO_URL right"):
        carrier.project.server.call("GET", "/api/version")
    studio.stop()


@pytest.mark.parametrize(
    ("url", "key", "words"),
    [
        (None, "k" * 20, "set the environment variable LABEL_STUDIO_URL"),
        ("localhost:8080", "k" * 20, "such as http://localhost:8080"),
        ("http://me:secret@localhost:8080", "k" * 20, "such as http://localhost:8080"),
        ("http://localhost:8080/?a=b", "k" * 20, "such as http://localhost:8080"),
        ("http://labels.example.org", "k" * 20, "plain http to labels.example.org"),
        ("http://127.0.0.1.example.org", "k" * 20, "plain http to 127.0.0.1.example.org"),
        ("https://labels.example.org", None, "set the environment variable LABEL_STUDIO_API_KEY"),
    ],
)
def test_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: Any, key: Any, words: str):
    for name, value in (("LABEL_STUDIO_URL", url), ("LABEL_STUDIO_API_KEY", key)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=words) as told:
        annotator(tmp_path)
    assert "secret" not in one_line(told.value)


def test_the_title(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LABEL_STUDIO_URL", "http://localhost:8080")
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", "k" * 20)
    with pytest.raises(ConfigError, match="3 to 50 characters"):
        make_annotator("labelstudio", tmp_path, LABELS, project="ab")
    assert re.fullmatch("vlm_itl .*", annotator(tmp_path).project.title)


def to_the_path(size: tuple[int, int], points: list[tuple[float, float]]) -> np.ndarray:  # (H, W) pixels
    """How far each pixel is from a line through points, given in shares of width and height."""
    height, width = size
    rows, columns = np.mgrid[:height, :width] + 0.5
    far = np.full(size, np.inf)
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        start, way = np.array([x0 * width, y0 * height]), np.array([(x1 - x0) * width, (y1 - y0) * height])
        along = ((columns - start[0]) * way[0] + (rows - start[1]) * way[1]) / (way @ way)
        along = along.clip(0, 1)
        far = np.minimum(far, np.hypot(columns - start[0] - along * way[0], rows - start[1] - along * way[1]))
    return far


class Browser:
    """A person at a mouse."""

    def __init__(self, page: Any, studio: RealStudio):
        self.page, self.url = page, studio.url
        page.goto(f"{self.url}/user/login/", wait_until="domcontentloaded")
        page.fill("input[name=email]", EMAIL)
        page.fill("input[name=password]", "a long password")
        page.click("button[type=submit]")
        page.wait_for_url(re.compile("^(?!.*/login)"), timeout=120_000, wait_until="domcontentloaded")

    def open(self, address: str) -> list[float]:  # x, y, width, height of the picture
        """Go to a task, and wait until its picture and regions are drawn."""
        self.page.goto(address, wait_until="domcontentloaded")
        self.page.wait_for_selector("canvas", timeout=120_000)
        self.page.wait_for_timeout(5000)
        place = "document.querySelector('img[style*=brightness]').getBoundingClientRect()"
        return self.page.evaluate(
            f"(r => [r.x, r.y, r.width, r.height])({place})"
        )  # 5 % more than is seen: its toolbar

    def paint(self, box: list[float], points: list[tuple[float, float]]) -> None:
        """A stroke with the mouse."""
        for number, (x, y) in enumerate(points):
            self.page.mouse.move(box[0] + x * box[2], box[1] + y * box[3], steps=12)
            if not number:
                self.page.mouse.down()
        self.page.mouse.up()
        self.page.wait_for_timeout(500)

    def say(self, word: str) -> None:
        """A word of the verdict."""
        self.page.locator(f"label:has-text('{word}')").first.click()

    def submit(self) -> dict[str, Any]:  # what the browser has sent
        """Press the button."""
        with self.page.expect_response(lambda r: "/annotations" in r.url and r.request.method == "POST") as reply:
            self.page.click("button[aria-label='Submit current annotation']")
        assert reply.value.status == 201
        return json.loads(reply.value.request.post_data)


@pytest.fixture
def browser(real: RealStudio, monkeypatch: pytest.MonkeyPatch) -> Iterator[Browser]:
    """Chromium, logged in."""
    automation = pytest.importorskip("playwright.sync_api", reason="no playwright, which leads a browser")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium")
    monkeypatch.setenv("LABEL_STUDIO_URL", real.url)
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", real.token)
    with automation.sync_playwright() as machine:
        window = machine.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield Browser(window.new_context(viewport={"width": 1500, "height": 1100}).new_page(), real)
        window.close()


def seen(picture: Image.Image, box: list[float], size: tuple[int, int]) -> np.ndarray:  # (H, W, 3)
    """The photograph's part of a screenshot, in its own size."""
    x, y, width, height = box
    return np.asarray(
        picture.convert("RGB").crop((round(x), round(y), round(x + width), round(y + height))).resize(size), int
    )


@pytest.mark.slow
def test_a_browser_shows_changes_and_submits(browser: Browser, voc: Path, tmp_path: Path):
    """The proposal is seen on the photograph; untouched it comes back as it was; a stroke changes what it covers."""
    data = load_data(str(voc), seed=0)
    rows = {row["id"]: row for row in data.train.select([0, 2, 3])}
    asked = []
    for n, (image_id, row) in enumerate(rows.items()):
        row["image"].save(tmp_path / f"{image_id}.jpg")
        kind = ("fix", "verify", "verify")[n]
        asked.append(Request(image_id, kind, tmp_path / f"{image_id}.jpg", row["mask"], priority=float(-n)))
    carrier = annotator(tmp_path, data.labels)
    carrier.ask(asked)
    there, path, sent = carrier.tasks.all(), [(0.1, 0.9), (0.3, 0.95), (0.3, 0.8)], {}
    for n, request in enumerate(asked):
        box = browser.open(carrier.project.address(there[request.id][0]["id"]))
        browser.page.screenshot(path=tmp_path / f"{n}.png")
        if n == 0:
            proposal, photo = np.asarray(request.proposal), np.asarray(rows[request.id]["image"], int)
            shown, near = seen(Image.open(tmp_path / "0.png"), box, photo.shape[1::-1]), Image.open(tmp_path / "0.png")
            painted = data.labels.colorize(proposal).astype(int)
            edge = np.ones(proposal.shape, bool)
            edge[12:-12, 16:-40] = False  # hidden at first, or under a tool
            for index in np.unique(proposal[proposal != 0]).tolist():  # void, too
                inside = (proposal == index) & ~edge
                to_paint = np.abs(shown - painted)[inside].mean() / np.abs(photo - painted)[inside].mean()
                assert to_paint < 0.85, (index, to_paint, near.size)  # nearer to its colour than the photograph is
            assert np.abs(shown - photo)[(proposal == 0) & ~edge].mean() < 12  # and the rest is the photograph
            browser.page.get_by_text("horse", exact=True).last.click()
            browser.page.click("[aria-label=brush-tool]")
            browser.paint(box, path)
            browser.page.screenshot(path=tmp_path / "0_painted.png")
        browser.say(("fix", "accept", "fix")[n])
        sent[request.id] = browser.submit()
    found = carrier.answered()
    assert [found[r.id].verdict for r in asked] == ["fixed", "accepted", "rejected"]
    assert (found[asked[1].id].mask == asked[1].proposal).all()
    changed, far = found[asked[0].id].mask != asked[0].proposal, to_the_path(asked[0].proposal.shape, path)  # type: ignore[union-attr]
    stroke = (far < 2) & (asked[0].proposal == 0)
    assert changed[stroke].all() and not changed[far > 8].any() and (found[asked[0].id].mask[changed] == 13).all()
    for request in asked:
        assert found[request.id].seconds == pytest.approx(sent[request.id]["lead_time"])
    posted = mask_of(sent[asked[0].id]["result"], data.labels, asked[0].proposal.shape, "the browser")  # type: ignore[union-attr]
    assert (posted == found[asked[0].id].mask).all()
