"""The mark, the ledger, the resume: paid things are charged once, read things stay the same, simulated runs say so."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults import at_file, in_child, kill
from PIL import Image

import vlm_itl.experiment.acceptance
import vlm_itl.experiment.judge_turn
import vlm_itl.experiment.loop
from vlm_itl.core.checks import DataError, JudgeError, LeakError, RunError
from vlm_itl.core.seeds import make_rng
from vlm_itl.data.labels import LabelSpace
from vlm_itl.data.masks import row_ids
from vlm_itl.data.scenes import make_scenes
from vlm_itl.experiment.config import Config, make_config
from vlm_itl.experiment.loop import Loop, run_al
from vlm_itl.experiment.pool import Ledger, priced_at, read_ledger
from vlm_itl.experiment.round import check_validation, draw_start
from vlm_itl.judging.trial import make_judge_config, try_judge
from vlm_itl.reports.report import Run, group_runs
from vlm_itl.vlm.cache import CachedHandler
from vlm_itl.vlm.handler import HANDLERS, Judgement, JudgeQuery, JudgeStopped, VLMHandler

TINY: dict[str, Any] = {
    "model": "segformer-nano",
    "proposer": "own",
    "mode": "vlm",
    "judge": "asked",
    "steps": 1,
    "batch_size": 2,
    "image_size": 32,
    "initial": 3,
    "increment": 3,
    "max_labelled": 6,
    "gallery": 0,
    "val_share": 3,
    "test_every_round": False,
    "leaks": "off",
    "preflight": 0,
}


class Asked(VLMHandler):
    """Says yes for a tenth of a cent, writes down each question, and does what `how` says."""

    batch_size = 4

    def __init__(self, *, log: str = "", how: str = "", price: float = 0.001) -> None:
        self.log, self.how, self.price = log, how, price

    def _judge_one(self, query: JudgeQuery) -> Judgement:
        with open(self.log, "a") as file:
            file.write(f"{query.id}\n")
        if self.how == "fails":
            return Judgement("abstain", error="no answer", usd=self.price)
        return Judgement("yes", p_yes=0.9, p_mass=1.0, score_kind="logprobs", raw="yes", usd=self.price, tokens=5)


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge by name, and small chunks, so that a kill falls between two."""
    Asked.name = "asked"
    monkeypatch.setitem(HANDLERS, "asked", Asked)
    monkeypatch.setattr(vlm_itl.experiment.judge_turn, "JUDGE_CHUNK", 4)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fourteen images to learn from, three of which validate; two to test on."""
    return make_scenes(tmp_path_factory.mktemp("scenes") / "voc", n_train=14, n_test=2, size=(40, 56), seed=3)


def settings(scenes: Path, out: Path, **more: Any) -> Config:
    """A run of two rounds whose judge writes into `out.txt`."""
    given = {**TINY, "dataset": str(scenes), "output_dir": str(out), **more}
    if given["judge"] == "asked":
        given.setdefault("judge_options", {"log": f"{out}.txt"})
    if given["judge"] == "cached":
        options = {"judge": "asked", "options": {"log": f"{out}.txt"}, "path": f"{out.parent}/answers.sqlite"}
        given["judge_options"] = {**options, **given.get("judge_options", {})}
    return make_config(given)


def questions(out: Path) -> list[str]:
    """What the judge of a run was asked."""
    path = Path(f"{out}.txt")
    return path.read_text().split() if path.is_file() else []


def summary(out: Path) -> dict[str, Any]:
    return json.loads((out / "summary.json").read_text())


# ---- the mark ----


@pytest.mark.parametrize(("judge", "simulated"), [("always_yes", False), ("mock", True)])
def test_fault_5_only_a_judge_that_reads_the_truth_is_simulated(
    judge: str, simulated: bool, scenes: Path, tmp_path: Path
) -> None:
    """Measuring a judge marks nothing, also after a resume; a simulated one is marked."""
    config = settings(scenes, tmp_path / "run", judge=judge, gallery=1)
    rounds = run_al(config)
    next(rounds)
    rounds.close()
    list(run_al(config))
    found = summary(tmp_path / "run")
    assert found["simulated"] is simulated
    assert (found["budget"]["peeks"] > 0) is simulated and found["budget"]["measured"] >= 8 + 5
    assert json.loads((tmp_path / "run/data.json").read_text())["simulated"] is simulated  # before the end, too


def test_peeks_are_images_a_round(scenes: Path, tmp_path: Path) -> None:
    """Behind a cache the truth is read twice for each question, and counted once."""
    options = {"judge": "mock", "options": {}, "path": str(tmp_path / "answers.sqlite")}
    plain = Loop.from_config(settings(scenes, tmp_path / "a", judge="mock"))
    cached = Loop.from_config(settings(scenes, tmp_path / "b", judge="cached", judge_options=options))
    assert plain.run_round().budget["peeks"] == cached.run_round().budget["peeks"] == 8


# ---- what may differ, and what may not ----


def test_fault_15_one_list_of_free_settings() -> None:
    """Runs that differ in what cannot change a number are of one recipe, and have one folder."""
    config = make_config(mode="al").to_dict()

    def groups(**more: Any) -> int:
        both = ({**config, "seed": 0}, {**config, "seed": 1, **more})
        return len(group_runs([Run(Path(f"r{one['seed']}"), one, [], None, {}, {}) for one in both]))

    assert groups(save_every=50) == groups(eval_batch_size=4) == groups(num_workers=4) == groups(gallery=0) == 1
    assert groups(steps=7) == groups(precision="bf16") == 2
    assert vlm_itl.judging.FREE_SETTINGS is vlm_itl.core.runfolder.FREE_SETTINGS  # a trial has no list of its own
    names = [
        vlm_itl.experiment.config.run_path(make_config(mode="al", **more)).name for more in ({}, {"save_every": 50})
    ]
    assert names[0] == names[1] != vlm_itl.experiment.config.run_path(make_config(mode="al", steps=7)).name


def test_fault_34_what_cannot_change_a_number_may_change(scenes: Path, tmp_path: Path) -> None:
    """Other pictures, batches, devices and prices; the whole run is told at the new price of a mask."""
    quiet = {"mode": "al", "judge": "mock", "judge_options": {}}
    rounds = run_al(settings(scenes, tmp_path / "run", **quiet))
    next(rounds)
    rounds.close()
    moved = shutil.copytree(scenes, tmp_path / "moved", copy_function=shutil.copyfile)
    free = {"gallery": 1, "eval_batch_size": 3, "device": "cpu", "mask_seconds": 10.0}
    after = list(run_al(settings(moved, tmp_path / "run", **quiet, **free)))
    assert [r.budget["human_seconds"] for r in after] == [10.0 * (3 + 3), 10.0 * (3 + 6)]
    lines = (tmp_path / "run/rounds.jsonl").read_text().splitlines()
    assert [json.loads(line)["budget"]["mask_seconds"] for line in lines] == [10.0, 10.0]
    list(run_al(settings(moved, tmp_path / "run", **quiet, mask_seconds=20.0)))  # it had ended
    assert summary(tmp_path / "run")["budget"]["human_seconds"] == 20.0 * 9
    for wrong in ({"steps": 2}, {"tau": 0.5}, {"precision": "bf16"}):
        with pytest.raises(RunError, match="another configuration"):
            list(run_al(settings(moved, tmp_path / "run", **quiet, **wrong)))


def test_a_price_is_a_factor() -> None:
    """Images, regions, checks; also from records that did not count the shares of regions."""
    ledger = Ledger(mask_seconds=10.0)
    ledger.pay_masks([100, 100])
    ledger.pay_region(25, 100, 1)
    ledger.pay_checks(2)
    assert ledger.human_seconds == 10 * 2.25 + 18 and priced_at(ledger, 4.0).human_seconds == 4 * 2.25 + 18
    assert priced_at(priced_at(ledger, 4.0), 10.0) == ledger
    old = {k: v for k, v in ledger.record().items() if k not in ("shares", "measured")}
    assert read_ledger(old) == ledger


@pytest.mark.parametrize(("usd", "kept"), [(math.nan, None), (-1.0, None), (math.inf, None), ("1", None), (0.5, 0.5)])
def test_nonsense_from_a_server_is_unknown(usd: Any, kept: float | None) -> None:
    """A price, a number of tokens or a time that is none must neither stop a run nor lower what was paid."""
    assert Judgement("yes", usd=usd).usd == Judgement("yes", latency_s=usd).latency_s == kept
    ledger = Ledger(judge_usd=1.0)
    ledger.pay_judge(1, usd if isinstance(usd, float) else None)
    assert ledger.judge_usd == (None if kept is None else 1.5)


def begun(scenes: Path, folder: Path) -> tuple[Path, Config]:
    """A data set of one's own, and a run that has done one round on it."""
    data = shutil.copytree(scenes, folder / "data")
    config = settings(data, folder / "run", mode="al", judge="mock", judge_options={}, strategy="random")
    Loop.from_config(config).run_round()
    return data, config


def rewrite(path: Path, data: bytes) -> None:
    """Change a file and set its date back."""
    date = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(date.st_atime_ns, date.st_mtime_ns))


def names(data: Path, split: str) -> list[str]:
    return (data / f"ImageSets/Segmentation/{split}.txt").read_text().split()


def spoil_photographs(data: Path) -> None:
    for number, path in enumerate((data / "JPEGImages").iterdir()):
        with Image.open(path) as old:
            shape = (*old.size[::-1], 3)
        Image.fromarray(np.random.default_rng(number).integers(0, 255, shape, dtype=np.uint8)).save(path)


def spoil_mask(data: Path) -> None:
    path = data / f"SegmentationClass/{names(data, 'train')[0]}.png"
    content = path.read_bytes()
    rewrite(path, content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])  # same size, same date


def shorten_test(data: Path) -> None:
    (data / "ImageSets/Segmentation/val.txt").write_text("\n".join(names(data, "val")[:-1]))


def rename_class(data: Path) -> None:
    (data / "classes.txt").write_text("\n".join(LabelSpace.voc().names).replace("cat", "moggy") + "\n")


CHANGES = {
    spoil_photographs: r"^16 photographs \(\w+, \w+, \.\.\.\) differ from when the run",
    spoil_mask: r"^1 mask \(\w+\) differs from when the run",
    shorten_test: r"^the test list differs from when the run",
    rename_class: r"^the class list differs from when the run",
}


@pytest.mark.parametrize("change", CHANGES)
def test_fault_7_a_changed_data_set_is_noticed(change: Any, scenes: Path, tmp_path: Path) -> None:
    """One line that says what differs; put back, the run goes on."""
    data, config = begun(scenes, tmp_path)
    kept = shutil.copytree(data, tmp_path / "kept")
    change(data)
    card = (tmp_path / "run/data.json").read_bytes()
    with pytest.raises(RunError, match=CHANGES[change]) as caught:
        list(run_al(config))
    assert (tmp_path / "run/data.json").read_bytes() == card  # reports read it: what is refused changes nothing
    if change is rename_class:
        (tmp_path / "run/.broken_data").write_text("a mask was broken")  # no excuse for other classes
        with pytest.raises(RunError, match=CHANGES[change]):
            list(run_al(config))
        (tmp_path / "run/.broken_data").unlink()
    assert "put back what was there, or choose another output_dir" in str(caught.value)
    assert "\n" not in str(caught.value)
    shutil.rmtree(data)
    shutil.move(kept, data)
    assert len(list(run_al(config))) == 2


def test_a_broken_mask_may_be_mended(scenes: Path, tmp_path: Path) -> None:
    """The run stops over a mask that it has paid for; mended, it goes on. What was trained on may not change."""
    data, config = begun(scenes, tmp_path)
    chosen = json.loads((tmp_path / "run/rounds.jsonl").read_text())["selection"]["ids"]
    shutil.rmtree(tmp_path / "run")
    broken = data / f"SegmentationClass/{chosen[1]}.png"
    good = broken.read_bytes()
    with Image.open(broken) as mask:
        Image.fromarray(np.full(mask.size[::-1], 77, np.uint8)).save(broken)
    for _ in range(2):  # when it is paid for, and when the run is started again
        with pytest.raises(DataError, match=f"{chosen[1]}.*77"):
            list(run_al(config))
    used = data / f"SegmentationClass/{json.loads((tmp_path / 'run/rounds.jsonl').read_text())['start_ids'][0]}.png"
    kept = used.read_bytes()
    broken.write_bytes(good)
    used.write_bytes(kept + b"!")
    with pytest.raises(RunError, match="1 mask"):
        list(run_al(config))
    used.write_bytes(kept)
    assert len(list(run_al(config))) == 2 and not (tmp_path / "run/.broken_data").exists()


# ---- what was paid ----


@pytest.mark.parametrize("judge", ["asked", "cached"])
def test_killed_between_answer_and_journal(judge: str, scenes: Path, tmp_path: Path) -> None:
    """Whatever a killed process had paid for is in the ledger, and nothing is there twice."""
    config = settings(scenes, tmp_path / "run", judge=judge, question="quality")

    def work() -> None:
        at_file("*pool.jsonl", 2, kill)
        list(run_al(config))

    assert in_child(work) == (-signal.SIGKILL, "") and len(questions(tmp_path / "run")) == 8
    last = list(run_al(config))[-1]
    asked = questions(tmp_path / "run")
    if judge == "cached":  # the cache had them
        assert len(asked) == 8 + 5 == last.budget["judge_calls"]
        assert last.budget["judge_usd"] == pytest.approx(0.013)
    else:  # the four answers that were on their way into the journal are lost, and only those are asked for again
        assert len(asked) == 8 + 4 + 5 and last.budget["judge_calls"] == 8 + 5


def test_mutant_cached_answers_are_not_charged(scenes: Path, tmp_path: Path) -> None:
    """A second run behind the same cache asks nobody and pays nothing; so does one that begins anew in its folder."""
    first = list(run_al(settings(scenes, tmp_path / "a", judge="cached")))
    assert [r.budget["judge_calls"] for r in first] == [8, 13]
    options = {"options": {"log": f"{tmp_path / 'a'}.txt"}}
    for out in ("b", "a"):
        shutil.rmtree(tmp_path / out, ignore_errors=True)
        again = list(run_al(settings(scenes, tmp_path / out, judge="cached", judge_options=options)))
        assert [r.budget["judge_calls"] for r in again] == [0, 0] and again[-1].budget["judge_usd"] == 0
        assert [r.pseudo_ids for r in again] == [r.pseudo_ids for r in first]
    assert len(questions(tmp_path / "a")) == 13


def test_mutant_cached_answers_of_an_examination_are_not_charged(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an earlier run paid is not charged to the examination of a later one, also where the judge stops in it."""
    options = {"options": {"log": f"{tmp_path / 'a'}.txt"}}
    for out, calls in (("a", 4), ("b", 0)):
        config = settings(scenes, tmp_path / out, judge="cached", judge_options=options, preflight=4)
        assert next(run_al(config)).budget["preflight_calls"] == calls
    monkeypatch.setattr(Asked, "patience", 2)
    monkeypatch.setattr(Asked, "_judge_one", lambda self, query: Judgement("abstain", error="no answer", usd=0.001))
    with pytest.raises(JudgeError, match="2 times in a row"):
        list(run_al(settings(scenes, tmp_path / "c", judge="cached", judge_options=options, preflight=6)))
    told = json.loads((tmp_path / "c" / "preflight.json").read_text())["examinations"][-1]
    assert (told["passed"], told["calls"], told["paid_usd"]) == (False, 2, pytest.approx(0.002))


def query(number: int, name: str = "") -> JudgeQuery:
    mask = np.zeros((6, 6), np.uint8)
    mask[:3], mask[-1] = 8, number
    return JudgeQuery(name or f"q{number}", None, mask, labels=LabelSpace.voc())


def test_one_question_in_a_batch_is_one_payment(tmp_path: Path) -> None:
    """Two equal pictures: asked once, and only one of the answers is fresh; told again to whom it was not told."""
    options: dict[str, Any] = {"judge": Asked(log=str(tmp_path / "log")), "path": tmp_path / "c.sqlite"}
    judge = CachedHandler(**options)
    judge.bind_payer("run")
    assert [j.cached for j in judge.judge([query(1), query(2), query(1, "twin")])] == [False, False, True]
    assert [j.cached for j in judge.judge([query(1), query(2)])] == [True, True]
    assert judge.cache.spent("run")["calls"] == 2
    for payer, cached in (("run", [True, False]), ("other", [True, True]), ("", [True, True])):
        later = CachedHandler(**options)  # after a kill, whose journal had not come so far
        later.bind_payer(payer)
        assert [j.cached for j in later.judge([query(1, "twin"), query(1)])] == cached
    assert (tmp_path / "log").read_text().split() == ["q1", "q2"]


def test_every_failure_is_a_payment_of_its_own(tmp_path: Path) -> None:
    """A failure is not stored, so it is asked again, also by the same process."""
    judge = CachedHandler(judge=Asked(log=str(tmp_path / "log"), how="fails"), path=tmp_path / "c.sqlite")
    judge.bind_payer("run")
    for _ in range(2):
        assert [j.cached for j in judge.judge([query(1), query(1, "twin")])] == [False, True]
    assert judge.cache.spent("run") | {"seconds": 0} == {"calls": 2, "usd": 0.002, "seconds": 0} and judge.calls == 2


def test_a_cache_behind_a_cache_pays_once(tmp_path: Path) -> None:
    """A cache behind a cache: the answer is paid for once."""
    inner = CachedHandler(judge=Asked(log=str(tmp_path / "log")), path=tmp_path / "c.sqlite")
    outer = CachedHandler(judge=inner, path=tmp_path / "d.sqlite")
    outer.bind_payer("run")
    assert [j.cached for j in outer.judge([query(1), query(2)])] == [False, False] and outer.calls == 2
    anew = CachedHandler(judge=inner, path=tmp_path / "e.sqlite", max_calls=1)
    anew.bind_payer("next")
    assert all(j.cached for j in anew.judge([query(1), query(2)])) and anew.calls == 0 and anew.usd == 0


def test_a_cache_of_an_earlier_version_is_read_on(tmp_path: Path) -> None:
    """It has no table of payments yet."""
    path, log = tmp_path / "c.sqlite", str(tmp_path / "log")
    CachedHandler(judge=Asked(log=log), path=path).judge([query(1)])
    with sqlite3.connect(path) as base:
        base.execute("DROP TABLE payments")
    judge = CachedHandler(judge=Asked(log=log), path=path)
    judge.bind_payer("run")
    assert [j.cached for j in judge.judge([query(1), query(2)])] == [True, False]
    assert judge.cache.spent("run")["calls"] == 1


def test_what_came_before_a_stop_is_charged(scenes: Path, tmp_path: Path) -> None:
    """`max_calls` is reached in the middle: the run that goes on has all that was asked in its ledger."""
    config = settings(scenes, tmp_path / "run", judge="cached", judge_options={"max_calls": 6})
    with pytest.raises(JudgeStopped, match="max_calls=6"):
        list(run_al(config))
    for _ in range(3):
        try:
            last = list(run_al(config))[-1]
            break
        except JudgeStopped:
            pass
    assert last.budget["judge_calls"] == len(questions(tmp_path / "run")) == 13


def test_what_nobody_asks_for_again_is_charged_all_the_same(scenes: Path, tmp_path: Path) -> None:
    """Answers about masks that the resumed round does not predict again, as on another device, are paid for."""
    experiment = Loop.from_config(settings(scenes, tmp_path / "run"))
    work = tmp_path / "run/.round_000.work"
    work.mkdir()
    vlm_itl.experiment.judge_turn.Journal(work / "pool.jsonl").add(
        {"another mask": Judgement("no", usd=0.25, attempts=3)}
    )
    budget = experiment.run_round().budget
    assert budget["judge_calls"] == 8 + 3 and budget["judge_usd"] == pytest.approx(0.258)


def test_a_judge_that_stops_midway_is_asked_for_the_rest_only(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a cache: the answers of the broken batch and of those before it are in the journal.

    The same object tries again, as a cell does that is run twice: what it had charged before is not charged again.
    """
    whole = Asked._judge_batch

    def stops(self: Asked, queries: list[JudgeQuery]) -> list[Judgement]:
        if len(questions(tmp_path / "run")) >= 4:
            said = [self._complete(self._judge_one(q), q, 0.0) for q in queries[:2]]
            raise JudgeStopped("no money left", dict(enumerate(said)))
        return whole(self, queries)

    config = settings(scenes, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(Asked, "_judge_batch", stops)
        experiment = Loop.from_config(config)
        with pytest.raises(JudgeStopped, match="no money"):
            experiment.run_round()
    assert len(questions(tmp_path / "run")) == 6
    budget = experiment.run_round().budget
    assert budget["judge_calls"] == len(questions(tmp_path / "run")) == 8 and budget["images"] == 3 + 3


def test_a_paid_judge_beside_a_simulated_one_is_asked_once(scenes: Path, tmp_path: Path) -> None:
    """Killed while it judges: the journal holds for an ensemble that peeks, and its peeks are counted alike."""
    judges = [{"judge": "asked", "options": {"log": f"{tmp_path / 'run'}.txt"}}, "mock"]
    config = settings(scenes, tmp_path / "run", judge="ensemble", judge_options={"judges": judges})

    def work() -> None:
        at_file("*judgements.jsonl*", 1, kill)
        list(run_al(config))

    assert in_child(work) == (-signal.SIGKILL, "")
    rounds = list(run_al(config))
    assert len(questions(tmp_path / "run")) == 8 + 5
    assert [r.budget["peeks"] for r in rounds] == [8, 13]


# ---- a trial's account ----


def trial(folder: Path, **more: Any) -> Any:
    """A judge's trial on two images, four spoilt masks each."""
    given = {"handler": "asked", "options": {"log": f"{folder}.txt"}, "limit": 2, "per_image": 4, "resamples": 10}
    given |= {"dataset": "scenes", "data_options": {"n_train": 24, "n_test": 8}, "leaks": "off"}
    return make_judge_config({**given, "output_dir": str(folder), **more})


@pytest.fixture(autouse=True)
def no_figures(undrawn: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take most of the time of a tiny trial, too."""
    monkeypatch.setattr(vlm_itl.judging.trial, "_figures", lambda *_: {})


def cost(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())["cost"]["asked"]


def test_fault_14_a_trials_cost_survives(tmp_path: Path) -> None:
    """Repeated, killed and resumed: the account holds every call once, and a second trial's is its own."""
    a, b = tmp_path / "a", tmp_path / "b"
    try_judge(trial(a))
    first = cost(a)
    assert first["calls"] == len(questions(a)) > 0 and first["usd"] == pytest.approx(0.001 * first["calls"])
    try_judge(trial(a))
    assert cost(a) == first and len(questions(a)) == first["calls"]

    def work() -> None:
        at_file("*judgements.jsonl*", 1, kill)
        try_judge(trial(b))

    assert in_child(work) == (-signal.SIGKILL, "")
    try_judge(trial(b))
    assert cost(b) | {"seconds_per_call": 0} == first | {"seconds_per_call": 0}
    try_judge(trial(b, cache=str(tmp_path / "other.sqlite")))  # another file of answers: all is asked and paid again
    assert cost(b)["calls"] == len(questions(b)) == 2 * first["calls"]
    c = tmp_path / "c"
    try_judge(trial(c, cache=str(a / "judgements.sqlite"), options={"log": f"{a}.txt"}))
    assert (cost(c)["calls"], cost(c)["usd"]) == (0, 0.0)
    assert cost(c)["from_cache"] == first["calls"] + first["from_cache"]
    assert cost(c)["usd_of_cached"] >= first["usd"]


def test_failures_are_paid_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A judge that fails is asked again, and what it took adds up."""
    monkeypatch.setattr(Asked, "patience", 1000)
    config = trial(tmp_path / "a", options={"log": f"{tmp_path / 'a'}.txt", "how": "fails"})
    for _ in range(2):
        try_judge(config)
        assert cost(tmp_path / "a")["calls"] == len(questions(tmp_path / "a"))


# ---- four mutants that survived, and their kind ----


def test_mutant_the_start_follows_the_seed(scenes: Path, tmp_path: Path) -> None:
    """Other seed, other start; and the documented draw."""
    found = {}
    for seed in (0, 5):
        experiment = Loop.from_config(settings(scenes, tmp_path / str(seed), mode="al", judge="mock", seed=seed))
        pool = sorted(experiment.state.pool.ids)
        found[seed] = draw_start(experiment.team, experiment.state)
        assert found[seed] == [pool[i] for i in make_rng(seed, "start").permutation(len(pool))[:3]]
    places = [[i in found[seed] for i in sorted({*found[0], *found[5]})] for seed in (0, 5)]
    assert places[0] != places[1]


def test_mutant_an_audits_bad_mask_is_dropped(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a human saw to be bad is not trained on; the look is charged."""
    monkeypatch.setattr(vlm_itl.experiment.acceptance, "certify_answers", lambda *_: {"threshold": 0.5})
    monkeypatch.setattr(vlm_itl.experiment.loop, "check_certifiable", lambda *_: None)  # three masks are too few
    config = settings(scenes, tmp_path / "run", acceptance="certified", tau=1.0)
    record = Loop.from_config(config).run_round()
    audit = record.judge["certified"]["audit"]
    assert len(audit["checked"]) == 1 and audit["bad"] == audit["checked"]
    assert record.judge["accepted"] == 8 and record.pseudo_ids and not {*audit["bad"]} & {*record.pseudo_ids}
    assert record.budget["checks"] == 1 and record.budget["judge_calls"] == 8 + 3


def test_mutant_no_image_is_both_asked_and_guessed(scenes: Path, tmp_path: Path) -> None:
    """Everything accepted: those that the human labels next are no pseudo-labels."""
    record = Loop.from_config(settings(scenes, tmp_path / "run")).run_round()
    chosen = set(record.selection["ids"])
    assert len(chosen) == 3 and len(record.pseudo_ids) == 5 and not chosen & set(record.pseudo_ids)


@pytest.mark.parametrize("how", ["human", "pseudo", "part"])
def test_validation_teaches_nothing(how: str, scenes: Path, tmp_path: Path) -> None:
    """A round refuses to start where a validation image was trained on, in whatever way."""
    experiment = Loop.from_config(settings(scenes, tmp_path / "run", mode="al", judge="mock", judge_options={}))
    name = sorted(row_ids(experiment.team.data.val))[0]
    check_validation(experiment.team, experiment.state)
    if how == "human":
        experiment.state.pool.human.append(name)
    elif how == "pseudo":
        experiment.state.pool.pseudo[name] = Path("mask.png")
    else:
        experiment.team.annotator.parts[name] = b""
    with pytest.raises(LeakError, match=f"{name}.* was trained on"):
        check_validation(experiment.team, experiment.state)
