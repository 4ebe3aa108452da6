"""Several processes: what two find is what one finds; whoever dies takes the others along, and the run goes on."""

from __future__ import annotations

import copy
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
import tiny_vlms

from vlm_itl.core.checks import ConfigError, DataError, RunError
from vlm_itl.core.processes import Processes, help_leader, launched_rank, processes_of_run, share_of, who
from vlm_itl.data.masks import MaskStore, make_rows, raw_rows
from vlm_itl.data.sources import SegData, load_data
from vlm_itl.experiment import make_config, run_al
from vlm_itl.experiment.judge_turn import Journal, ask_about, judge_masks
from vlm_itl.model.predict import Inference, evaluate
from vlm_itl.model.recipe import TrainSettings
from vlm_itl.model.scoring import PoolScores, score_pool
from vlm_itl.model.segmenter import Segmenter, load_model, save_model
from vlm_itl.model.train import fit
from vlm_itl.proposals.partial import write_confident
from vlm_itl.proposals.proposers import make_proposer
from vlm_itl.sampler.gradient import GradientProbe
from vlm_itl.sampler.helpers import Helpers
from vlm_itl.sampler.region_choice import score_regions
from vlm_itl.sampler.regions import Regions
from vlm_itl.sampler.together import Together, merged_moments, put_together
from vlm_itl.sampler.uncertainty import scoring_options
from vlm_itl.vlm import free
from vlm_itl.vlm.cache import bill
from vlm_itl.vlm.handler import make_handler
from vlm_itl.vlm.local import HFJudge

pytestmark = pytest.mark.usefixtures("undrawn")
VIEW = Inference(image_size=48, batch_size=3)
PROBLEM = {"n_train": 20, "n_test": 8, "size": (64, 64)}


@pytest.fixture(scope="module")
def scenes() -> SegData:
    return load_data("scenes", val_share=5, options=PROBLEM)


@pytest.fixture(scope="module")
def pair() -> Iterator[Processes]:
    """Two processes for all tests that do not end one; their start is most of what a test would cost."""
    processes = Processes(2)
    yield processes
    processes.stop()


def alive(pid: int) -> bool:
    """Does a process run? One that has ended and was not waited for does not."""
    state = Path(f"/proc/{pid}/stat")
    return state.is_file() and state.read_text().rsplit(")", 1)[1].split()[0] != "Z"


# --- shares -----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 200), st.integers(1, 20), st.integers(1, 9))
def test_shares_are_all_places_in_order_by_whole_batches(items: int, unit: int, count: int):
    shares = [share_of(items, unit, rank, count) for rank in range(count)]
    assert [place for share in shares for place in share] == list(range(items))
    assert all(share.start % unit == 0 for share in shares if len(share))
    sizes = [-(-len(share) // unit) for share in shares]
    assert max(sizes) - min(sizes) <= 1


@given(st.lists(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=5), min_size=1, max_size=4))
def test_moments_of_parts_are_those_of_the_whole(parts: list[list[float]]):
    rows = [[len(p), np.mean(p), np.var(p)] for p in parts]
    count, mean, variance = merged_moments(torch.tensor(rows, dtype=torch.float64))
    whole = np.concatenate(parts)
    assert count == len(whole)
    assert np.isclose(mean, whole.mean(), atol=1e-9) and np.isclose(variance, whole.var(), atol=1e-6)


# --- what two processes find ------------------------------------------------------------------------------------------


def same(one: PoolScores, two: PoolScores) -> None:
    assert one.ids == two.ids and one.scores.keys() == two.scores.keys()
    assert all(np.array_equal(one.scores[name], two.scores[name]) for name in one.scores)
    assert np.array_equal(one.embedding, two.embedding) and np.array_equal(one.class_hist, two.class_hist)
    assert (one.gradient is None) == (two.gradient is None)
    assert one.gradient is None or np.array_equal(one.gradient, two.gradient)


@pytest.mark.parametrize("name", ["cnn-nano", "segformer-nano"])
def test_passes_are_equal_to_the_last_bit(name: str, scenes: SegData, pair: Processes, tmp_path: Path):
    model = load_model(name, scenes.labels)
    team, images = Together(model, VIEW, pair), scenes.train.remove_columns("mask")
    counts: tuple[list[np.ndarray], list[np.ndarray]] = [], []
    one, two = evaluate(model, scenes.test, VIEW, counts=counts[0]), team.evaluate(scenes.test, counts=counts[1])
    assert one == two and np.array_equal(*counts)
    keys = ["entropy-topk", "bald-mean"] if name == "segformer-nano" else ["entropy-topk"]  # the other drops nothing
    options = {**scoring_options(keys, passes=3), "probe": GradientProbe(width=8)}
    stores = [MaskStore(tmp_path / number, scenes.labels) for number in ("one", "two")]
    alone = score_pool(model, images, VIEW, masks=stores[0], **copy.deepcopy(options))
    same(alone, put_together(team.look(score_pool, images, stores[1], options)))
    assert all(stores[0].path(i).read_bytes() == stores[1].path(i).read_bytes() for i in alone.ids)


def test_sure_pixels_and_regions_are_equal(scenes: SegData, pair: Processes, tmp_path: Path):
    model, images = load_model("cnn-nano", scenes.labels), scenes.val.remove_columns("mask")
    team, regions = Together(model, VIEW, pair), Regions(images, "slic", count=6)
    stores = [MaskStore(tmp_path / number, scenes.labels) for number in ("one", "two")]
    write_confident(model, images, VIEW, stores[0], 0.3)
    team.look(write_confident, images, stores[1], {"threshold": 0.3})
    assert all(np.array_equal(stores[0][i], stores[1][i]) for i in images["id"])
    alone = score_regions(model, images, regions, VIEW, key="entropy-mean")
    same(alone, put_together(team.look(score_regions, images, None, {"regions": regions, "key": "entropy-mean"})))


def test_a_share_may_be_empty(scenes: SegData, pair: Processes):
    model = load_model("cnn-nano", scenes.labels)
    few = scenes.test.select(range(2))
    assert Together(model, VIEW, pair).evaluate(few) == evaluate(model, few, VIEW)


def test_a_copied_network_sends_its_own_weights(scenes: SegData, pair: Processes):
    team = Together(load_model("cnn-nano", scenes.labels), VIEW, pair)
    before, twin = team.evaluate(scenes.test), copy.deepcopy(team)
    with torch.no_grad():
        for weight in twin.model.parameters():
            weight.zero_()
    assert twin.processes is pair and twin.evaluate(scenes.test) == evaluate(twin.model, scenes.test, VIEW) != before
    assert team.evaluate(scenes.test) == before


# --- judges and proposers that look -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(scenes: SegData, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny vision-language model, and a segmenter of somebody else's."""
    root = tmp_path_factory.mktemp("models")
    other = save_model(load_model("segformer-nano", scenes.labels, seed=3), root / "segmenter")
    return {"vlm": str(tiny_vlms.build("llava", root / "vlm")), "segmenter": str(other)}


@pytest.fixture(scope="module")
def proposed(scenes: SegData, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, MaskStore]:
    """Images, and masks of them."""
    images = scenes.train.remove_columns("mask").select(range(9))
    masks = MaskStore(tmp_path_factory.mktemp("masks"), scenes.labels)
    score_pool(load_model("cnn-nano", scenes.labels), images, VIEW, masks=masks)
    return images, masks


JUDGES: dict[str, tuple[str, dict[str, Any]]] = {
    "hf": ("hf", {"model": "vlm", "batch_size": 2, "min_mass": 0.0}),
    "second_opinion": ("second_opinion", {"model": "segmenter", "batch_size": 2, "image_size": 48}),
    "tta": ("confidence", {"kind": "tta"}),
    "margin": ("confidence", {"kind": "margin"}),
}


def make_judge(name: str, models: dict[str, str], scenes: SegData, helpers: Helpers | None, **more: Any) -> Any:
    """A judge that looks, alone or with helpers."""
    kind, options = JUDGES[name]
    options = {key: models.get(value, value) for key, value in options.items()} | more
    judge = make_handler(kind, **options)
    judge.bind_segmenter(load_model("cnn-nano", scenes.labels), VIEW)
    judge.bind_helpers(helpers)
    return judge


def told(judgements: list[Any]) -> list[Any]:
    """Answers without their seconds."""
    return [replace(judgement, latency_s=None) for judgement in judgements]


@pytest.mark.parametrize("name", JUDGES)
def test_judges_answer_as_alone(
    name: str, models: dict[str, str], scenes: SegData, proposed: Any, pair: Processes, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    """To the last bit, with the same journal; the leader has looked at its share only, and again at nothing."""
    alone, both = make_judge(name, models, scenes, None), make_judge(name, models, scenes, Helpers(pair))
    wanted = judge_masks(alone, *proposed, "quality", Journal(tmp_path / "alone"))
    looked = Looks(monkeypatch)
    found = judge_masks(both, *proposed, "quality", Journal(tmp_path / "both"))
    assert told(found) == told(wanted) and {j.verdict for j in found} <= {"yes", "no"}
    journals = [Journal(tmp_path / who).known for who in ("alone", "both")]
    assert list(journals[0]) == list(journals[1])
    pictures = 9 * (5 if name == "tta" else 1)
    assert 0 < looked.pictures <= pictures * 2 / 3
    if name == "second_opinion":  # whose memory is the leader's
        judge_masks(both, *proposed, "quality")
        assert looked.pictures <= pictures * 2 / 3


class Looks:
    """Counts the pictures that judges look at in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pictures = 0
        plain, asked = free._looks, HFJudge.ask

        def counted(model: Any, pictures: Any, view: Any) -> Any:
            self.pictures += len(pictures)
            return plain(model, pictures, view)

        def ask(judge: HFJudge, pictures: Any, texts: Any) -> Any:
            self.pictures += len(pictures)
            return asked(judge, pictures, texts)

        monkeypatch.setattr(free, "_looks", counted)
        monkeypatch.setattr(HFJudge, "ask", ask)


def test_judges_of_judges_answer_as_alone(
    models: dict[str, str], scenes: SegData, proposed: Any, pair: Processes, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    """A cache around two questions of a judge, and another judge beside it: the same answers, prices and cache."""

    def make(who: str, helpers: Helpers | None) -> Any:
        pairs = make_handler("both", judge=make_judge("hf", models, scenes, None, batch_size=4))
        cached = make_handler("cached", judge=pairs, path=tmp_path / f"{who}.sqlite")
        judge = make_handler("ensemble", judges=[cached, make_judge("second_opinion", models, scenes, None)])
        judge.bind_helpers(helpers)
        return judge

    images, masks = proposed
    known = make("both", None)  # which has answered some questions before, in the middle of batches
    judge_masks(known, images.select([1, 4]), masks, "quality")
    judge_masks(make("alone", None), images.select([1, 4]), masks, "quality")
    wanted = judge_masks(make("alone", None), *proposed, "quality")
    looked = Looks(monkeypatch)
    both = make("both", Helpers(pair))
    found = judge_masks(both, *proposed, "quality")
    assert told(found) == told(wanted) and bill(found) == bill(wanted)
    assert looked.pictures < 2 * 7 + 9
    rows = [
        sqlite3.connect(tmp_path / f"{who}.sqlite").execute("SELECT key, p_yes, verdict FROM judgements").fetchall()
        for who in ("alone", "both")
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 9
    before = looked.pictures
    assert told(judge_masks(both, *proposed, "quality")) == told(judge_masks(make("alone", None), *proposed, "quality"))
    assert looked.pictures == before + 9  # the second segmenter of `alone`, made anew; a cache asks nobody


def test_questions_about_one_picture_share_its_reading_as_alone(
    models: dict[str, str], scenes: SegData, proposed: Any, pair: Processes
):
    """What a process has read before changes no digit: neither of the first nor of a later batch."""

    def ask(helpers: Helpers | None) -> list[Any]:
        judge = make_judge("hf", models, scenes, helpers, batch_size=4)
        return ask_about(
            judge, *proposed, "label", lambda query: [replace(query, class_ids=(c,)) for c in (1, 2, 3, 4)]
        )

    alone, both = ask(None), ask(Helpers(pair))
    assert [told([j for _, j in row]) for row in alone] == [told([j for _, j in row]) for row in both]


def test_a_pass_is_watched_in_all_processes(scenes: SegData, proposed: Any, pair: Processes, tmp_path: Path):
    images, seen = proposed[0], []
    for number, together in enumerate((False, True)):
        model = load_model("cnn-nano", scenes.labels)
        judge = make_handler("confidence")
        judge.bind_segmenter(model, VIEW)
        masks, watchers = MaskStore(tmp_path / str(number), scenes.labels), judge.watchers(by_class=True)
        if together:
            Together(model, VIEW, pair).look(score_pool, images, masks, {"watchers": watchers})
        else:
            score_pool(model, images, VIEW, masks=masks, watchers=watchers)
        seen.append(judge._seen)
    assert seen[0] == seen[1] and {name for name, _, _ in seen[0]} == set(images["id"])


def test_a_promptable_proposer_draws_as_alone(
    models: dict[str, str], proposed: Any, pair: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    images, stores, made = proposed[0], list[MaskStore](), list[Any]()
    for side in ("alone", "both"):  # each with a cache of its own
        monkeypatch.setenv("VLM_ITL_CACHE", str(tmp_path / "cache" / side))
        proposer = make_proposer("hf", model=models["segmenter"], batch_size=2, image_size=48)
        proposer.bind_helpers(Helpers(pair) if side == "both" else None)
        stores.append(MaskStore(tmp_path / side, proposed[1].labels))
        made.append(proposer.propose(images, stores[-1]))
    assert made[0] == made[1] and list(made[0]) == list(images["id"])
    assert all(stores[0].path(i).read_bytes() == stores[1].path(i).read_bytes() for i in images["id"])
    kept = [{p.name for p in (tmp_path / "cache" / side).rglob("*.json")} for side in ("alone", "both")]
    assert kept[0] == kept[1] and len(kept[0]) == len(images)


def test_a_picture_that_is_gone_is_told_as_alone(
    models: dict[str, str], scenes: SegData, proposed: Any, pair: Processes
):
    images, masks = proposed
    cells = [cell["path"] for cell in images.with_format(None)["image"]]
    rows = make_rows(images["id"], [*cells[:-1], "/nowhere/at-all.png"])
    rows = rows.with_transform(images.format["format_kwargs"]["transform"])
    with pytest.raises(DataError, match="at-all.png: no such file"):
        judge_masks(make_judge("hf", models, scenes, Helpers(pair)), rows, masks, "quality")


def test_a_judge_whose_helper_is_killed_goes_on_where_it_was(
    models: dict[str, str], scenes: SegData, proposed: Any, pair: Processes, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    """One line; what was answered before is not asked again."""
    monkeypatch.setattr("vlm_itl.experiment.judge_turn.JUDGE_CHUNK", 4)
    wanted = judge_masks(make_judge("hf", models, scenes, None), *proposed, "quality")
    pid, plain, calls = pair.call(who)[1][1], HFJudge.answers_to, iter(range(9))

    def deadly(judge: HFJudge, batches: Any) -> Any:
        if next(calls) == 1:
            os.kill(pid, signal.SIGKILL)
        return plain(judge, batches)

    monkeypatch.setattr(HFJudge, "answers_to", deadly)
    with pytest.raises(RunError, match=r"^process 2 of 2 was ended by SIGKILL\.$"):
        judge_masks(make_judge("hf", models, scenes, Helpers(pair)), *proposed, "quality", Journal(tmp_path / "j"))
    assert len(Journal(tmp_path / "j").known) == 4
    looked = Looks(monkeypatch)
    found = judge_masks(make_judge("hf", models, scenes, None), *proposed, "quality", Journal(tmp_path / "j"))
    assert told(found) == told(wanted) and looked.pictures == 5


# --- training ---------------------------------------------------------------------------------------------------------


def trained(name: str, scenes: SegData, share_of_pair: Processes | None, **more: Any) -> tuple[Segmenter, Any]:
    model = load_model(name, scenes.labels)
    settings = TrainSettings(**{"steps": 1, "batch_size": 4, "warmup": 0.0, "learning_rate": 1e-4, **more})
    share = None if share_of_pair is None else Together(model, VIEW, share_of_pair).share
    rows = scenes.train.select(range(8))
    return model, fit(model, rows, settings, VIEW, scenes.val if settings.eval_every else None, share=share)


class Gradients:
    """Keeps the gradients that the optimizer of a training of one step is given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kept: list[list[torch.Tensor]] = []
        step = torch.optim.AdamW.step

        def watched(optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
            self.kept.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"]])
            return step(optimizer, *args, **kwargs)

        monkeypatch.setattr(torch.optim.AdamW, "step", watched)


@pytest.mark.parametrize("name", ["cnn-nano", "segformer-nano"])  # both with BatchNorm in training mode
def test_the_gradient_of_a_batch_is_that_of_its_parts(
    name: str, scenes: SegData, pair: Processes, monkeypatch: pytest.MonkeyPatch
):
    """To 1e-5 of the largest: float32 sums over pixels, in another order, are not closer."""
    watch = Gradients(monkeypatch)
    (one, alone), (two, both) = trained(name, scenes, None), trained(name, scenes, pair)
    assert both.train_loss == pytest.approx(alone.train_loss, rel=1e-6)
    for a, b in zip(*watch.kept, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-5 * max(g.abs().max().item() for g in watch.kept[0]))
    pairs = zip(one.named_buffers(), two.buffers(), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for (_, a), b in pairs)  # statistics of BatchNorm


def test_weighted_images_and_an_uneven_batch(scenes: SegData, pair: Processes, monkeypatch: pytest.MonkeyPatch):
    told = raw_rows(scenes.train).add_column("human", [True, False, True] * 5).add_column("weight", [0.5] * 15)
    weighted = replace(scenes, train=told)
    watch = Gradients(monkeypatch)
    losses = [trained("cnn-nano", weighted, who, batch_size=3)[1].train_loss for who in (None, pair)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    largest = max(g.abs().max().item() for g in watch.kept[0])
    assert all(torch.allclose(a, b, rtol=0, atol=1e-5 * largest) for a, b in zip(*watch.kept, strict=True))


def test_looks_at_validation_within_a_training(scenes: SegData, pair: Processes):
    """The best weights are kept, as alone; to 1e-3 after eight steps of Adam, which makes steps of rounding too."""
    how = {"steps": 8, "eval_every": 4, "learning_rate": 1e-3}
    (_, alone), (_, both) = trained("cnn-nano", scenes, None, **how), trained("cnn-nano", scenes, pair, **how)
    assert [h.get("step", h.get("epoch")) for h in alone.history] == [
        h.get("step", h.get("epoch")) for h in both.history
    ]
    assert both.train_loss == pytest.approx(alone.train_loss, rel=1e-3)
    looks = [[h["eval_mean_iou"] for h in result.history if "eval_mean_iou" in h] for result in (alone, both)]
    assert looks[0] == pytest.approx(looks[1], abs=0.01) and len(looks[0]) == 2


def test_the_same_training_twice_is_the_same(scenes: SegData, pair: Processes):
    weights = [trained("cnn-nano", scenes, pair, steps=4)[0].state_dict().values() for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_a_training_goes_on_with_another_number_of_processes(
    scenes: SegData, pair: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Two process begin, one goes on: the checkpoint does not know who made it."""
    settings = TrainSettings(steps=6, batch_size=4, save_every=3, learning_rate=1e-4, warmup=0.0)
    rows = scenes.train.select(range(8))

    def run(folder: Path | None, processes: Processes | None) -> Any:
        model = load_model("cnn-nano", scenes.labels)
        share = None if processes is None else Together(model, VIEW, processes).share
        return fit(model, rows, settings, VIEW, checkpoints=folder, share=share)

    steps = torch.optim.AdamW.step
    taken = iter(range(100))

    def killed(*args: Any, **kwargs: Any) -> Any:
        if next(taken) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return steps(*args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, pair)
    monkeypatch.setattr(torch.optim.AdamW, "step", steps)
    left = [path.name for path in tmp_path.iterdir()]
    assert left == ["checkpoint-5"]
    gone_on, undisturbed = run(tmp_path, None), run(None, None)
    assert gone_on.steps == 6 and gone_on.train_loss == pytest.approx(undisturbed.train_loss, rel=1e-3)
    assert pair.running  # a stop in good order costs nobody's life


# --- who ends, and why ------------------------------------------------------------------------------------------------


def test_a_broken_file_in_the_share_of_a_helper_is_told_as_ever(scenes: SegData, pair: Processes):
    cells = [cell["path"] for cell in scenes.test.with_format(None)["image"]]
    rows = make_rows([f"i{n}" for n in range(len(cells))], [*cells[:-1], "/nowhere/at-all.png"])
    with pytest.raises(DataError, match="at-all.png: no such file"):
        Together(load_model("cnn-nano", scenes.labels), VIEW, pair).look(score_pool, rows, None, {})
    assert not pair.running


def test_a_killed_helper_ends_a_training_soon(scenes: SegData, pair: Processes, monkeypatch: pytest.MonkeyPatch):
    pid, step = pair.call(who)[1][1], torch.optim.AdamW.step

    def deadly(*args: Any, **kwargs: Any) -> Any:
        os.kill(pid, signal.SIGKILL)
        return step(*args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", deadly)
    started = time.monotonic()
    with pytest.raises(RunError, match=r"^process 2 of 2 was ended by SIGKILL\.$"):
        trained("cnn-nano", scenes, pair, steps=50)
    assert time.monotonic() - started < 30 and not pair.running


def test_a_helper_ends_with_its_leader():
    code = "from vlm_itl.core.processes import *\nprint(Processes(2).call(who)[1][1], flush=True)\ninput()"
    leader = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert leader.stdout is not None
    pid = int(leader.stdout.readline())
    assert alive(pid)
    leader.kill()
    leader.wait()
    until = time.monotonic() + 20
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.1)
    assert not alive(pid)


def test_only_one_run_of_a_process_has_helpers(pair: Processes):
    pair.start()
    with pytest.raises(RunError, match="in use in this process already"):
        Processes(2).call(who)
    assert len(pair.call(who)) == 2  # who was there first goes on
    pair.stop()


def test_a_helper_that_cannot_start_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        "vlm_itl.core.processes._HELPER", "raise SystemExit('no such thing {port} {rank} {count} {threads}')"
    )
    with pytest.raises(RunError, match=r"process 2 of 2 ended with status 1: no such thing \d+ 1 2 1"):
        Processes(2).call(who)


def test_impossible_settings(scenes: SegData, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match="processes .* must be"):
        processes_of_run(0)
    settings = {"dataset": "scenes", "data_options": PROBLEM, "processes": 2, "batch_size": 1, "image_size": 48}
    with pytest.raises(ConfigError, match="batch_size=1 cannot be shared by 2 processes"):
        next(run_al(make_config(settings)))
    with pytest.raises(ConfigError, match=r"processes: a part of this run cannot be sent.*set processes=1"):
        Processes(2).call(lambda processes: None)
    assert launched_rank() is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert launched_rank() == 1


# --- runs -------------------------------------------------------------------------------------------------------------


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    """A run of two rounds."""
    small = {"image_size": 48, "steps": 6, "batch_size": 4, "eval_batch_size": 3, "gallery": 0, "val_share": 4}
    budget = {"initial": 4, "increment": 4, "max_labelled": 8}
    return {"dataset": "scenes", "data_options": PROBLEM, **small, **budget, "output_dir": str(folder), **more}


def record(folder: Path) -> dict[str, Any]:
    """What a run found, without seconds."""
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    curve = json.loads((folder / "summary.json").read_text())["curve"]
    ids = [[r["start_ids"], r["selection"]["ids"]] for r in rounds]
    return {"ids": ids, "labelled": curve["labelled"], "test": curve["test_mean_iou"], "val": curve["val_mean_iou"]}


def agree(one: dict[str, Any], two: dict[str, Any]) -> None:
    """The same images; the same metrics but for pixels on the border between two classes."""
    assert one["ids"] == two["ids"] and one["labelled"] == two["labelled"]
    assert one["test"] == pytest.approx(two["test"], abs=0.005) and one["val"] == pytest.approx(two["val"], abs=0.005)


def judged(models: dict[str, str]) -> dict[str, Any]:
    """Settings with a proposer and a judge that look with networks of their own."""
    proposer = {"model": models["segmenter"], "batch_size": 2, "image_size": 48}
    judge = {"model": models["vlm"], "batch_size": 2, "min_mass": 0.0}
    named = {"proposer": "hf", "proposer_options": proposer, "judge": "hf", "judge_options": judge}
    return {"mode": "vlm", "preflight": 0, "policy": "observe", **named}


def answers(folder: Path) -> list[Any]:
    """What the judge said in all rounds, without seconds, and about which masks."""
    lines = [line for path in sorted(folder.glob("round_*/judgements.jsonl")) for line in path.read_text().splitlines()]
    told = [{k: v for k, v in json.loads(line).items() if k != "latency_s"} for line in lines]
    return [*told, (folder / "proposals" / "0_hf" / "index.jsonl").read_text().split("\n")]


def test_a_run_is_the_same_whoever_computes_and_goes_on_alone(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A run of two processes, one of which is killed in round 1, is finished by one; another was alone all the time."""
    folders = [tmp_path / name for name in ("alone", "together")]
    with_judge = judged(models)
    monkeypatch.setenv("VLM_ITL_CACHE", str(tmp_path / "cache alone"))
    list(run_al(make_config(settings(folders[0], **with_judge))))
    monkeypatch.setenv("VLM_ITL_CACHE", str(tmp_path / "cache together"))
    rounds = run_al(make_config(settings(folders[1], processes=2, **with_judge)))
    next(rounds)
    children = subprocess.run(["pgrep", "-P", str(os.getpid())], capture_output=True, text=True).stdout.split()
    helpers = [int(c) for c in children if "help_leader" in Path(f"/proc/{c}/cmdline").read_text()]
    os.kill(helpers[-1], signal.SIGKILL)
    with pytest.raises(RunError, match=r"process 2 of 2 was ended by SIGKILL"):
        next(rounds)
    list(run_al(make_config(settings(folders[1], **with_judge))))
    agree(record(folders[0]), record(folders[1]))
    assert answers(folders[0]) == answers(folders[1]) and len(answers(folders[0])) > 16


LAUNCHED = """
import sys
from vlm_itl.experiment import make_config, run_al
import json
config = make_config(json.loads(sys.argv[1]))
print(len(list(run_al(config))), "rounds", flush=True)
"""


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
ACCELERATE += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
NOTEBOOKS = Path(__file__).resolve().parents[1] / "nbs"


def launch(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a launcher to its end."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_a_launcher_runs_the_same(launcher: list[str], tmp_path: Path):
    """Both processes run the same script: the first one yields all rounds, the other none."""
    script = tmp_path / "script.py"
    script.write_text(LAUNCHED)
    together, alone = tmp_path / "together", tmp_path / "alone"
    done = launch(*launcher, str(script), json.dumps(settings(together)))
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(done.stdout.split("\n")[:2]) == ["0 rounds", "2 rounds"]
    list(run_al(make_config(settings(alone))))
    agree(record(alone), record(together))


@pytest.mark.slow
def test_a_notebook_is_run_by_several_processes(tmp_path: Path):
    """By `vlm_itl_run`: the first process executes it, the other helps. By papermill all would, and that is refused."""
    file, together, alone = tmp_path / "settings.yaml", tmp_path / "together", tmp_path / "alone"
    file.write_text(json.dumps(settings(together)))
    asked = [str(NOTEBOOKS / "run_al.ipynb"), str(tmp_path / "done.ipynb"), "-f", str(file)]
    done = launch(*TORCHRUN, "-m", "papermill", *asked)
    assert done.returncode != 0 and "RunError: this notebook runs in 2 processes of a launcher" in done.stderr
    done = launch(*TORCHRUN, "--no-python", str(Path(sys.executable).with_name("vlm_itl_run")), *asked)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("executed notebook:") == 2  # of the first process: before and after
    list(run_al(make_config(settings(alone))))
    agree(record(alone), record(together))


@pytest.mark.slow
def test_a_command_without_a_run_lets_its_helpers_go():
    started = time.monotonic()
    done = launch(*TORCHRUN, "--no-python", str(Path(sys.executable).with_name("vlm_itl_run")), "list")
    assert done.returncode == 0 and done.stdout.count("run_baseline") == 1
    assert time.monotonic() - started < 120


def test_what_a_helper_is_started_with_is_what_it_takes():
    """The line that starts a helper fits the function that it calls."""
    from vlm_itl.core.processes import _HELPER

    assert [name for name in help_leader.__annotations__ if name != "return"] == ["port", "rank", "count", "threads"]
    compile(_HELPER.format(port=1, rank=1, count=2, threads=1), "helper", "exec")
